"""Holders that died, within one write transaction."""

from __future__ import annotations

from collections.abc import Iterable

from callbackq.stores.sqlite.transaction import SQLiteTransaction

__all__ = ["end_locks_of"]


def end_locks_of(transaction: SQLiteTransaction, now: int, dead: Iterable[int]) -> None:
    """Let the locks of dead holders time out at once, and forget the holders."""
    for holder in dead:
        # A holder that removed itself meanwhile has been closed: its locks live on until their timeout.
        if transaction.run("remove_holder", {"holder": holder}):
            transaction.run("end_locks_of_holder", {"holder": holder, "now": now})
