"""Named statements on a connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from callbackq.stores.sql.rows import CallbackRow, Key, Row
from callbackq.stores.sql.scripts import load_statements
from callbackq.stores.sql.transaction import Transaction, Wait

__all__ = ["STATEMENTS", "SQLiteTransaction"]

STATEMENTS: Final = load_statements("callbackq.stores.sqlite", "statements.sql")


class SQLiteTransaction(Transaction):
    """Within it nobody else writes, so there are no locks on rows."""

    __slots__ = ("_connection",)

    def __init__(self, connection: sqlite3.Connection | sqlite3.Cursor) -> None:
        self._connection = connection

    def all(self, name: str, /, **values: object) -> list[Row]:
        return self._connection.execute(STATEMENTS[name], values).fetchall()

    def run(self, name: str, values: Mapping[str, object]) -> int:
        return self._connection.execute(STATEMENTS[name], values).rowcount

    def run_many(self, name: str, rows: Iterable[Mapping[str, object]]) -> int:
        return self._connection.executemany(STATEMENTS[name], rows).rowcount

    def lock_queues(self, queues: Iterable[Key], *, wait: Wait = "a moment") -> set[Key]:
        return set(queues)

    def rows_to_change(self, ids: Iterable[str]) -> dict[str, CallbackRow]:
        found = (self.one("callback", id=id) for id in ids)
        return {row[1]: CallbackRow(*row).mended() for row in found if row is not None}

    def join_tail(self, row: CallbackRow) -> bool:
        (queue,) = self.all("queue_tail", queue=row.queue)
        tail, has_head = queue
        self.run("set_tail", {"queue": row.queue, "tail": tail + 1})
        self.run("join_tail", {"callback": row.callback, "sequence": tail + 1})
        return not has_head

    def draw_tokens(self, count: int, now: int) -> int:
        self.run("draw_tokens", {"count": count, "now": now})
        last: int = self.value("last_token")
        return last - count + 1

    def purgeable(self, *, before: int, limit: int) -> list[Key]:
        return [key for (key,) in self.all("purgeable", before=before, limit=limit)]

    def owe(self, debts: Sequence[Mapping[str, object]]) -> None:
        for debt in debts:
            self.run("number_debt", debt)
            self.run("add_debt", debt)

    def add(self, name: str, values: Mapping[str, object]) -> int:
        """Insert a row, and give its key."""
        key = self._connection.execute(STATEMENTS[name], values).lastrowid
        return key or 0

    def script(self, statements: Iterable[str]) -> None:
        """Run statements without values."""
        for statement in statements:
            self._connection.execute(statement)
