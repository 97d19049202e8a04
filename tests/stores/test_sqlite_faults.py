"""SQLite's errors come out as ours, and only what surely wrote nothing is called passing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.stores.sqlite import faults

PATH = Path("/srv/callbacks.db")


def error(code: int, kind: type[sqlite3.Error] = sqlite3.OperationalError) -> sqlite3.Error:
    made = kind("SQLite's own words")
    made.sqlite_errorcode = code
    made.sqlite_errorname = "SQLITE_NAME"
    return made


@pytest.mark.parametrize(
    ("code", "text", "passing"),
    [
        (sqlite3.SQLITE_BUSY, "is being written to by another program for too long", True),
        (sqlite3.SQLITE_BUSY_RECOVERY, "is being written to by another program for too long", True),
        (sqlite3.SQLITE_FULL, "free some space", True),
        (sqlite3.SQLITE_IOERR_WRITE, "check its disk", True),
        (sqlite3.SQLITE_READONLY_DIRECTORY, "check its permissions", False),
        (sqlite3.SQLITE_CANTOPEN, "check that it is there", False),
        (sqlite3.SQLITE_PERM, "check its permissions", False),
        (sqlite3.SQLITE_NOTADB, "is not an SQLite database", False),
        (sqlite3.SQLITE_CORRUPT_INDEX, "restore a backup", False),
        (sqlite3.SQLITE_ERROR, "refused a statement", False),
        (sqlite3.SQLITE_CONSTRAINT_UNIQUE, "refused a statement", False),
    ],
)
def test_errors_name_the_file_and_the_remedy(code: int, text: str, passing: bool) -> None:
    cause = error(code)

    translated = faults.translate(cause, PATH, nothing_written=True)

    assert type(translated) is (TransientDataAccessError if passing else DataAccessError)
    assert str(translated).startswith("/srv/callbacks.db ")
    assert text in str(translated)
    assert "SQLITE_NAME" in str(translated)
    assert translated.__cause__ is cause


def test_what_may_have_written_something_is_never_called_passing() -> None:
    translated = faults.translate(error(sqlite3.SQLITE_IOERR_FSYNC), PATH, nothing_written=False)

    assert type(translated) is DataAccessError


def test_an_error_of_the_module_itself_has_no_code() -> None:
    translated = faults.translate(sqlite3.ProgrammingError("closed"), PATH, nothing_written=True)

    assert str(translated) == "/srv/callbacks.db refused a statement (ProgrammingError)"


@pytest.mark.parametrize(
    ("code", "undone"),
    [
        (sqlite3.SQLITE_FULL, True),
        (sqlite3.SQLITE_BUSY, True),
        (sqlite3.SQLITE_IOERR_FSYNC, False),
        (sqlite3.SQLITE_IOERR_WRITE, False),
    ],
)
def test_a_commit_that_could_not_be_synced_may_have_happened(code: int, undone: bool) -> None:
    assert faults.is_undone_commit(error(code)) is undone


def test_a_connection_is_used_on_only_after_what_was_foreseen() -> None:
    assert faults.leaves_connection_sound(error(sqlite3.SQLITE_FULL))
    assert faults.leaves_connection_sound(error(sqlite3.SQLITE_CONSTRAINT_UNIQUE))
    assert not faults.leaves_connection_sound(error(sqlite3.SQLITE_IOERR_READ))
    assert not faults.leaves_connection_sound(error(sqlite3.SQLITE_CORRUPT))


def test_only_being_in_each_others_way_is_busy() -> None:
    assert faults.is_busy(error(sqlite3.SQLITE_BUSY_SNAPSHOT))
    assert faults.is_busy(error(sqlite3.SQLITE_LOCKED))
    assert not faults.is_busy(error(sqlite3.SQLITE_FULL))
    assert not faults.is_busy(ValueError())
