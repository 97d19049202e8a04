"""Holders that died, within one write transaction."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from callbackq.stores.sql.instants import earlier
from callbackq.stores.sqlite.transaction import SQLiteTransaction

__all__ = ["end_locks_of", "purge"]


def purge(transaction: SQLiteTransaction, now: int, *, finished_for: timedelta, limit: int) -> int:
    """Forget finished callbacks, and say how many."""
    rows = transaction.all("purgeable", before=earlier(now, finished_for), limit=limit)
    callbacks = [{"callback": key} for (key,) in rows]
    for statement in ("forget_history", "forget_request", "forget_callback"):
        transaction.run_many(statement, callbacks)
    return len(callbacks)


def end_locks_of(transaction: SQLiteTransaction, now: int, dead: Iterable[int]) -> None:
    """Let the locks of dead holders time out at once, and forget the holders."""
    for holder in dead:
        # A holder that removed itself meanwhile has been closed: its locks live on until their timeout.
        if transaction.run("remove_holder", {"holder": holder}):
            transaction.run("end_locks_of_holder", {"holder": holder, "now": now})
