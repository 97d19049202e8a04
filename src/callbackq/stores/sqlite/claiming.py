"""Taking locks, within one write transaction."""

from __future__ import annotations

from datetime import timedelta

from callbackq.stores.sql import locking
from callbackq.stores.sql.instants import later
from callbackq.stores.sql.rows import CallbackRow
from callbackq.stores.sqlite.transaction import SQLiteTransaction

__all__ = ["claim"]


def claim(
    transaction: SQLiteTransaction,
    now: int,
    *,
    machine_name: str,
    lock_timeout: timedelta,
    limit: int,
    holder: int | None,
) -> list[locking.Claim]:
    """Lock due heads for a holder, whose death will end the locks."""
    timeout = later(now, lock_timeout)

    def take(rows: list[CallbackRow]) -> None:
        if holder is not None:
            # Each time: it costs little, and the row may have been lost.
            transaction.run("add_holder", {"holder": holder})
        for token, row in enumerate(rows, transaction.draw_tokens(len(rows), now)):
            row.take(token=token, acquired=now, timeout=timeout, machine_name=machine_name)
        transaction.run_many("lock", ({**vars(row), "holder": holder} for row in rows))

    return locking.claim(transaction, now, limit=limit, take=take)
