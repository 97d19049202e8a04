"""The seam between what SQL stores share and one database: named statements, and what each does its own way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from callbackq.stores.sql.rows import CallbackRow, Key, Row

__all__ = ["Transaction", "Wait"]

Wait = Literal["not at all", "a moment", "patiently"]


class Transaction(Protocol):
    """
    Runs named statements, whose values are bound by name, within one transaction.

    Locks on rows, where the database has them, are taken in the order of their keys, and whoever holds a callback's
    waits for a queue's only for a moment: otherwise two might wait for each other.
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
    def rows_to_change(self, ids: Iterable[str]) -> dict[str, CallbackRow]:
        """Read callbacks, by their ids, which nobody else can change until the transaction ends."""
        ...

    @abstractmethod
    def lock_queues(self, queues: Iterable[Key], *, wait: Wait = "a moment") -> set[Key]:
        """
        Keep everybody else from joining, leaving and opening queues until the transaction ends.

        Args:
            queues: their keys.
            wait: for others who have them. Where other queues' callbacks wait, too, only a moment.

        Returns:
            Those that are locked now; all of them, if waited for patiently.
        """
        ...

    @abstractmethod
    def join_tail(self, row: CallbackRow) -> bool:
        """Give a callback its queue's next number, and say whether it is alone there. Its queue can't be changed."""
        ...

    @abstractmethod
    def draw_tokens(self, count: int, now: int) -> int:
        """Give the first of so many numbers in a row, which nobody else is given."""
        ...

    @abstractmethod
    def purgeable(self, *, before: int, limit: int) -> list[Key]:
        """Find callbacks that can be forgotten, that ended *before*, and that nobody else can change any more."""
        ...

    @abstractmethod
    def owe(self, debts: Sequence[Mapping[str, object]]) -> None:
        """Write that somebody is to be told of callbacks' failures; each debt says which callback, and when it is."""
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
