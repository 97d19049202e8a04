"""SQLite's errors in our words. The only place that reads its error codes."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from callbackq.errors import DataAccessError, TransientDataAccessError

__all__ = [
    "is_busy",
    "is_refusal_of_one_operation",
    "is_refused_statement",
    "is_undone_commit",
    "leaves_connection_sound",
    "translate",
    "translate_enlisted",
]

_PASSING: Final = {
    sqlite3.SQLITE_BUSY: "is being written to by another program for too long",
    sqlite3.SQLITE_LOCKED: "is being written to by another program for too long",
    sqlite3.SQLITE_FULL: "can't grow: free some space on its disk",
    sqlite3.SQLITE_IOERR: "could not be read or written: check its disk",
    sqlite3.SQLITE_NOMEM: "could not be used for want of memory",
    sqlite3.SQLITE_PROTOCOL: "could not be locked: try again",
    sqlite3.SQLITE_INTERRUPT: "was interrupted",
}
"""What may pass by itself: the same call may be made again."""

_LASTING: Final = {
    sqlite3.SQLITE_READONLY: "can't be written to: check its permissions and those of its directory",
    sqlite3.SQLITE_CANTOPEN: "can't be opened: check that it is there, its permissions and those of its directory",
    sqlite3.SQLITE_PERM: "can't be opened: check its permissions and those of its directory",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database: give another path, or remove the file",
    sqlite3.SQLITE_CORRUPT: "is damaged: restore a backup",
}

_HARMLESS: Final = frozenset(
    {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CONSTRAINT}
)


def translate(error: sqlite3.Error, path: Path, *, nothing_written: bool) -> DataAccessError:
    """Build our error for one of SQLite's, which is its cause."""
    code = _primary_code(error)
    kind = TransientDataAccessError if nothing_written and code in _PASSING else DataAccessError
    text = _PASSING.get(code) or _LASTING.get(code) or "refused a statement"
    ours = kind(f"{path} {text} ({_name(error)})")
    ours.__cause__ = error
    return ours


def translate_enlisted(error: sqlite3.Error, path: Path) -> DataAccessError:
    """Build our error for one of SQLite's within a transaction of the application's, where nothing of ours is left."""
    if not is_busy(error):
        return translate(error, path, nothing_written=True)
    return TransientDataAccessError(
        f"{path} is being written to by another connection, or was since your transaction first read: roll the "
        f"transaction back and repeat it, begun with BEGIN IMMEDIATE ({_name(error)})"
    )


def is_busy(error: BaseException) -> bool:
    """Whether another connection was in the way, and waiting helps."""
    return isinstance(error, sqlite3.Error) and _primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_refusal_of_one_operation(error: sqlite3.Error) -> bool:
    """Whether only what the statement wanted was wrong: others in the same transaction can go on."""
    return _primary_code(error) == sqlite3.SQLITE_CONSTRAINT


def is_refused_statement(error: sqlite3.Error) -> bool:
    """Whether the statement itself was wrong: it names a table that isn't there."""
    return _primary_code(error) == sqlite3.SQLITE_ERROR


def is_undone_commit(error: sqlite3.Error) -> bool:
    """Whether a commit that failed so has surely written nothing."""
    return _primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL)


def leaves_connection_sound(error: sqlite3.Error) -> bool:
    """Whether the connection can be used further. After anything unforeseen a new one is the safer choice."""
    return _primary_code(error) in _HARMLESS


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", type(error).__name__)


def _primary_code(error: sqlite3.Error) -> int:
    # The lower byte of an extended code; errors of the sqlite3 module itself have none.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
