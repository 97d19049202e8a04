"""Named statements on a connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from callbackq.stores._sql import load_statements

__all__ = ["STATEMENTS", "Transaction"]

STATEMENTS: Final = load_statements("callbackq.stores.sqlite", "statements.sql")


class Transaction:
    """Runs named statements, whose values are bound by name."""

    __slots__ = ("_connection",)

    def __init__(self, connection: sqlite3.Connection | sqlite3.Cursor) -> None:
        self._connection = connection

    def all(self, name: str, /, **values: object) -> list[Sequence[Any]]:
        """Give all rows."""
        return self._connection.execute(STATEMENTS[name], values).fetchall()

    def one(self, name: str, /, **values: object) -> Sequence[Any] | None:
        """Give the first row; for statements that give one at most, since all are read."""
        rows = self.all(name, **values)
        return rows[0] if rows else None

    def value(self, name: str, /, **values: object) -> Any:
        """Give the first column of the first row; ``None`` without a row."""
        row = self.one(name, **values)
        return row[0] if row else None

    def run(self, name: str, values: Mapping[str, object]) -> int:
        """Write, and say how many rows were changed."""
        return self._connection.execute(STATEMENTS[name], values).rowcount

    def add(self, name: str, values: Mapping[str, object]) -> int:
        """Insert a row, and give its key."""
        key = self._connection.execute(STATEMENTS[name], values).lastrowid
        return key or 0

    def run_many(self, name: str, rows: Iterable[Mapping[str, object]]) -> int:
        """Write for each set of values, and say how many rows were changed."""
        return self._connection.executemany(STATEMENTS[name], rows).rowcount

    def script(self, statements: Iterable[str]) -> None:
        """Run statements without values."""
        for statement in statements:
            self._connection.execute(statement)
