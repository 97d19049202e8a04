"""Copying a database that is in use."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from callbackq.errors import DataAccessError, InvalidRequestError
from callbackq.stores.sqlite import faults
from callbackq.stores.sqlite.database import Database

__all__ = ["back_up"]


def back_up(database: Database, target: Path) -> None:
    """
    Copy a database as of one moment, check the copy, and put it in place.

    Writers go on meanwhile. What they write ahead can't be reclaimed until the copy is done.

    Raises:
        InvalidRequestError: there is something in place already.
    """
    _refuse_to_replace(target)
    draft = target.with_name(f"{target.name}.part-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        # Nobody else knows this file, so it may be opened the plain way. Only its owner may read it.
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        _copy(database, draft)
        _sync(draft)
        # Once more: copying took a while, in which another backup may have come to its end.
        _refuse_to_replace(target)
        draft.replace(target)
        _sync(target.parent)
    except sqlite3.Error as error:
        raise faults.translate(error, database.path, nothing_written=True) from error
    except OSError as error:
        raise DataAccessError(f"the backup {target} can't be written: {error.strerror}") from error
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def _refuse_to_replace(target: Path) -> None:
    if os.path.lexists(target):
        raise InvalidRequestError([("path", "must name nothing that exists: remove it first, or choose another path")])


def _copy(database: Database, draft: Path) -> None:
    with database.lent_connection() as source, closing(sqlite3.connect(draft, isolation_level=None)) as copy:
        # All pages in one step: in several, each commit in between would begin the copy anew.
        source.backup(copy, pages=-1)
        # One file only, whatever the journal of the original.
        copy.execute("PRAGMA journal_mode = DELETE")
        (verdict,) = copy.execute("PRAGMA quick_check").fetchone()
        if verdict != "ok":
            raise DataAccessError(f"{database.path} is damaged, so its copy was thrown away: {verdict}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
