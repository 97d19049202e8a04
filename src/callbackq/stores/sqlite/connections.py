"""How connections to the database are made and set up."""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path
from typing import Final

from callbackq.stores.sqlite.transaction import STATEMENTS

__all__ = ["connect", "set_journal", "set_syncing"]

# Of each connection. Twice as much makes a worker 9 MiB larger, and there is little to win: as it is, a claim costs the
# same with a million callbacks stored as with a thousand (benchmarks/claim.py).
_CACHE_KIB: Final = 8 * 1024
_WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024

# How thoroughly to sync, by whether a commit must survive the loss of power.
_AHEAD: Final = {True: "FULL", False: "NORMAL"}
# EXTRA also syncs the directory after a rollback journal is removed, without which the journal could come back after a
# power failure and undo the commit. NORMAL would sync the journal's pages together with their number: a page that is
# torn could then be counted, pass its checksum, which takes one byte in 200, and damage the database.
_ROLLBACK: Final = {True: "EXTRA", False: "FULL"}


def connect(path: Path, *, busy_seconds: float) -> sqlite3.Connection:
    """
    Connect to a file that exists.

    Args:
        path: the file.
        busy_seconds: how long SQLite itself waits for other connections.
    """
    # mode=rw: SQLite must not create the file, it would let everybody read it.
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        timeout=busy_seconds,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=len(STATEMENTS) + 16,
    )
    # Text that isn't UTF-8 must spoil its own row only, not the statement that reads many. What stands in for it is
    # found by the models' checks, and can be written back, unlike surrogates.
    connection.text_factory = partial(str, encoding="utf-8", errors="replace")
    try:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA cache_size = {-_CACHE_KIB}")
        # The checks are for others. We must be able to write to a row that breaks them, to end it.
        connection.execute("PRAGMA ignore_check_constraints = 1")
    except BaseException:
        # The first statement finds out whether the file is a database.
        connection.close()
        raise
    return connection


def set_journal(connection: sqlite3.Connection, *, write_ahead: bool) -> bool:
    """Write ahead, or keep a rollback journal. Says which of both it has become: not every system can do the first."""
    (mode,) = connection.execute(f"PRAGMA journal_mode = {'wal' if write_ahead else 'delete'}").fetchone()
    # What a burst has made of the log is given back when it is begun anew.
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    return bool(mode == "wal")


def set_syncing(connection: sqlite3.Connection, *, durable: bool, write_ahead: bool) -> None:
    """Sync at each commit, or only so often that the database stays whole."""
    levels = _AHEAD if write_ahead else _ROLLBACK
    connection.execute(f"PRAGMA synchronous = {levels[durable]}")
    # On macOS an ordinary sync ends in the disk's own cache.
    connection.execute(f"PRAGMA fullfsync = {int(durable)}")
