"""The seam between what SQL stores share and one database: named statements, and what each does its own way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from callbackq.stores.sql.rows import CallbackRow, Row

__all__ = ["Transaction"]


class Transaction(Protocol):
    """
    Runs named statements, whose values are bound by name, within one transaction.

    Locks on rows, where the database has them, are always taken in one order: queues by their names, and then
    callbacks. Whoever takes them in another order may wait for ever for somebody who waits for him.
    """

    @abstractmethod
    def all(self, name: str, /, **values: object) -> list[Row]:
        """Give all rows."""
        ...

    @abstractmethod
    def run_many(self, name: str, rows: Iterable[Mapping[str, object]]) -> int:
        """Write for each set of values, and say how many rows were changed."""
        ...

    @abstractmethod
    def rows_to_change(self, ids: Iterable[str], *, queues: Iterable[int | str | None]) -> dict[str, CallbackRow]:
        """
        Read callbacks that nobody else can change until the transaction ends, and those that are to be.

        Args:
            ids: which; those that aren't there are left out.
            queues: those they are in, by key or by name. Nobody else can join, leave or open them from here on.
        """
        ...

    @abstractmethod
    def join_tail(self, row: CallbackRow) -> bool:
        """Give a callback its queue's next number, and say whether it is alone there. Its queue can't be changed."""
        ...

    def one(self, name: str, /, **values: object) -> Row | None:
        """Give the first row; for statements that give one at most, since all are read."""
        rows = self.all(name, **values)
        return rows[0] if rows else None

    def value(self, name: str, /, **values: object) -> Any:
        """Give the first column of the first row; ``None`` without a row."""
        row = self.one(name, **values)
        return row[0] if row else None

    def run(self, name: str, values: Mapping[str, object]) -> int:
        """Write, and say how many rows were changed."""
        return self.run_many(name, [values])
