"""
Operations on a connection of the application's, as part of its transaction.

Nothing of the connection is changed, and its transaction is neither ended nor, unless the driver does so before any
statement that writes, begun. What is read comes out the same whatever the application has set: a cursor of our own has
no row factory, and as text factories and converters can't be left out, neither text nor columns of a declared type are
read (`plainly`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from callbackq.errors import DataAccessError, InvalidRequestError
from callbackq.stores.sqlite import faults, schema
from callbackq.stores.sqlite.transaction import STATEMENTS, SQLiteTransaction

__all__ = ["check_connection", "plainly", "run_enlisted"]

_LEGACY: Final = -1
"""sqlite3.LEGACY_TRANSACTION_CONTROL, which Python 3.11 has no name for and no alternative to."""

_T = TypeVar("_T")


def run_enlisted(connection: sqlite3.Connection, path: Path, operation: Callable[[SQLiteTransaction], _T]) -> _T:
    """
    Run an operation within the application's transaction.

    When it raises, what it wrote is undone, and the rest of the transaction is as it was.

    Args:
        connection: the application's.
        path: the store's file, which must be the connection's main database.
        operation: what to run.

    Raises:
        InvalidRequestError: the connection can't be used for this.
        TransientDataAccessError: the transaction can't write now.
        SchemaVersionError: a newer release has migrated the file since the store was opened.
    """
    try:
        guest = _Guest(_enter(connection))
        _take_write_lock(guest, path)
        schema.check_version(guest)
        with _savepoint(connection, guest):
            return operation(guest)
    except sqlite3.Error as error:
        raise faults.translate_enlisted(error, path) from error


def check_connection(connection: object) -> None:
    """Refuse what is no connection of the driver's."""
    if not isinstance(connection, sqlite3.Connection):
        raise _unusable(
            "must be a sqlite3.Connection; SQLAlchemy has it as session.connection().connection.driver_connection, "
            "Django as django.db.connection.connection"
        )


def _unusable(reason: str) -> InvalidRequestError:
    return InvalidRequestError([("connection", reason)])


def _enter(connection: sqlite3.Connection) -> sqlite3.Cursor:
    """Make a cursor without the connection's row factory, if a transaction is under way or will be."""
    try:
        is_in_transaction = connection.in_transaction
        cursor = sqlite3.Cursor(connection)
    except sqlite3.ProgrammingError as error:
        raise _unusable("must be open, and used by the thread that opened it") from error
    if not is_in_transaction and not _begins_by_itself(connection):
        raise _unusable("has no transaction under way, and begins none by itself: begin it with BEGIN IMMEDIATE")
    return cursor


def _begins_by_itself(connection: sqlite3.Connection) -> bool:
    """Whether the driver begins a transaction before a statement that writes, as it does unless told otherwise."""
    return connection.isolation_level is not None and getattr(connection, "autocommit", _LEGACY) == _LEGACY


def _take_write_lock(guest: _Guest, path: Path) -> None:
    # First of all. The driver begins a transaction before this statement, but would not before a savepoint, whose
    # release would then be a commit; and a transaction that has read nothing yet can wait for its turn to write.
    try:
        guest.run("take_write_lock", {})
    except sqlite3.OperationalError as error:
        if not faults.is_refused_statement(error):
            raise
        _check_file(guest, path)
        raise DataAccessError(
            f"{path} was not a store yet when your transaction began: open the store before"
        ) from error
    _check_file(guest, path)


def _check_file(guest: _Guest, path: Path) -> None:
    # Whatever the path is called: links are followed. A database in memory has none.
    main = guest.value("main_file")
    with suppress(OSError):
        if main and path.samefile(main):
            return
    raise _unusable("must have the store's file as its main database, not another file")


@contextmanager
def _savepoint(connection: sqlite3.Connection, guest: _Guest) -> Iterator[None]:
    try:
        guest.script(["SAVEPOINT callbackq"])
    except sqlite3.OperationalError as error:
        # The write lock is held, so this isn't about other connections.
        if not faults.is_busy(error):
            raise
        raise _unusable(
            "is in the middle of a statement that writes: fetch the remaining rows that it returns first"
        ) from error
    try:
        yield
        guest.script(["RELEASE callbackq"])
    except BaseException:
        # After some faults SQLite has rolled back the whole transaction by itself.
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                guest.script(["ROLLBACK TO callbackq", "RELEASE callbackq"])
        raise


class _Guest(SQLiteTransaction):
    """Named statements on a connection that isn't ours."""

    __slots__ = ("_encoding",)

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        super().__init__(cursor)
        self._encoding = ""

    def all(self, name: str, /, **values: object) -> list[Sequence[Any]]:
        statement = STATEMENTS[name]
        described = self._connection.execute(f"SELECT * FROM ({statement}) LIMIT 0", values).description  # noqa: S608
        rows = self._connection.execute(plainly(statement, len(described)), values).fetchall()
        return [self._read(row) for row in rows]

    def _read(self, row: Sequence[Any]) -> Sequence[Any]:
        return tuple(
            value.decode(self._text_encoding(), "replace") if is_text else value
            for is_text, value in zip(row[::2], row[1::2], strict=True)
        )

    def _text_encoding(self) -> str:
        # As bytes, text is what the file holds, and the application may have chosen that.
        if not self._encoding:
            (letter,) = self._connection.execute("SELECT CAST('a' AS BLOB)").fetchone()
            self._encoding = _ENCODINGS[letter]
        return self._encoding


_ENCODINGS: Final = {"a".encode(encoding): encoding for encoding in ("utf-8", "utf-16-le", "utf-16-be")}


@cache
def plainly(statement: str, columns: int) -> str:
    """Let a statement give, for each of its columns, whether it is text, and its value, text as bytes."""
    names = [f"c{number}" for number in range(columns)]
    results = (
        f"typeof({one}) = 'text', CASE typeof({one}) WHEN 'text' THEN CAST({one} AS BLOB) ELSE {one} END"
        for one in names
    )
    return f"WITH found ({', '.join(names)}) AS ({statement}) SELECT {', '.join(results)} FROM found"  # noqa: S608
