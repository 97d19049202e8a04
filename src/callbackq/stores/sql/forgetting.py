"""Callbacks that can be forgotten, within one write transaction."""

from __future__ import annotations

from datetime import timedelta

from callbackq.stores.sql.instants import earlier
from callbackq.stores.sql.transaction import Transaction

__all__ = ["purge"]


def purge(transaction: Transaction, now: int, *, finished_for: timedelta, limit: int) -> int:
    """Forget finished callbacks, and say how many."""
    found = transaction.purgeable(before=earlier(now, finished_for), limit=limit)
    callbacks = [{"callback": key} for key in found]
    for statement in ("forget_history", "forget_request", "forget_callback"):
        if callbacks:
            transaction.run_many(statement, callbacks)
    return len(callbacks)
