"""Reading what is known about callbacks, within one transaction."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from callbackq.core.models import CallbackStatus
from callbackq.core.validation import check_callback_id, check_text
from callbackq.errors import CallbackNotFoundError, DataAccessError
from callbackq.stores.sql.rows import CallbackRow, read_status
from callbackq.stores.sql.transaction import Transaction

__all__ = ["LIST_BATCH", "find", "keys_of_all", "keys_of_queue", "readable_statuses", "status_of"]

_LOG = logging.getLogger("callbackq.stores")

LIST_BATCH: Final = 10_000
"""Keys read at a time. Few enough for a short read, many enough not to sort a long queue's keys often."""


def find(transaction: Transaction, id: str) -> CallbackRow:
    """Read the row of the callback with this id. Raises CallbackNotFoundError."""
    # What can't be an id can't be bound to a statement either: a lone surrogate is no UTF-8.
    row = None if any(check_callback_id(id)) else transaction.one("callback", id=id)
    if row is None:
        raise CallbackNotFoundError(id)
    return CallbackRow(*row).mended()


def status_of(transaction: Transaction, callback: int | str) -> CallbackStatus:
    """Read all about a callback that is there."""
    (row,) = transaction.all("status", callback=callback)
    return read_status(row, transaction.all("history", callback=callback))


def keys_of_queue(transaction: Transaction, name: str, *, state: int | None, after: int) -> list[int]:
    """List callbacks of a queue in the order in which they were stored; an empty list is the end."""
    if any(check_text(name)):
        return []  # no queue can have this name, and a lone surrogate in it could not be bound
    return [key for (key,) in transaction.all("list_queue", name=name, state=state, after=after, limit=LIST_BATCH)]


def keys_of_all(transaction: Transaction, *, state: int | None, alone: bool, after: int) -> list[int] | None:
    """
    List callbacks with keys from *after* to *after* + LIST_BATCH.

    Args:
        transaction: any transaction.
        state: only those in this state.
        alone: only those without a queue.
        after: where to go on.

    Returns:
        Maybe none of this stretch; ``None`` behind the last.
    """
    if after >= transaction.value("last_callback"):
        return None
    rows = transaction.all("list_callbacks", state=state, alone=int(alone), after=after, until=after + LIST_BATCH)
    return [key for (key,) in rows]


def readable_statuses(transaction: Transaction, callbacks: Iterable[int]) -> list[CallbackStatus]:
    """Read those that are still there and can be read; say in the log which can't."""
    statuses = []
    for callback in callbacks:
        for row in transaction.all("status", callback=callback):
            try:
                statuses.append(read_status(row, transaction.all("history", callback=callback)))
            except DataAccessError as error:
                _LOG.error("left out of a listing: %s", error)
    return statuses
