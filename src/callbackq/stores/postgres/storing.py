"""Storing callbacks: one statement for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from callbackq.core.models import CallbackRequest, CallbackStatus
from callbackq.errors import ConflictError, DataAccessError
from callbackq.stores.postgres import faults
from callbackq.stores.postgres.transaction import PostgreSQLTransaction
from callbackq.stores.sql.rows import new_status, read_status, request_values

__all__ = ["Requests", "Run", "drawn", "store", "stored_of"]

_T = TypeVar("_T")

Requests = Sequence[tuple[str, CallbackRequest]]
"""What to store, with its ids."""

_MOST_TRIES: Final = 10


class Run(Protocol):
    """Runs an operation so that all or nothing of it is written, and raises our errors."""

    def __call__(self, operation: Callable[[PostgreSQLTransaction], _T], /) -> _T: ...


def drawn(requests: Sequence[tuple[str | None, CallbackRequest]], *, draw: Callable[[], str]) -> Requests:
    """Give an id to those that have none."""
    return [(draw() if id is None else id, request) for id, request in requests]


def stored_of(run: Run, ids: Sequence[str]) -> set[str]:
    """Tell which of these ids are stored."""
    if not ids:
        return set()
    return {id for (id,) in run(lambda transaction: transaction.all("taken_ids", ids=list(ids)))}


def store(
    run: Run,
    requests: Requests,
    *,
    read: Run,
    now: int | None,
    patience_ms: int,
    channel: str,
    shard_of: Callable[[str], int],
) -> list[CallbackStatus]:
    """
    Store callbacks, all or none, in this order; those that are stored already stay as they are.

    The first try takes all for new. When an id turns out to be taken, those that are there are looked at, and the rest
    is tried again.

    Args:
        run: runs an operation so that all or nothing of it is written.
        requests: what to store.
        read: runs an operation that reads, as of one moment if it can.
        now: the time; ``None`` for the server's.
        patience_ms: how long to wait for others that join the same queues.
        channel: whom to hint.
        shard_of: where the head of a queue, or a callback without one, is searched.

    Raises:
        ConflictError: an id is stored with another request.
    """
    new: dict[str, CallbackRequest] = {}
    for id, request in requests:
        if new.setdefault(id, request) != request:
            raise ConflictError(id)
    stored: dict[str, CallbackStatus] = {}
    settings: dict[str, object] = {"now": now, "patience": str(patience_ms), "channel": channel}
    doubt = faults.Doubt()
    for tries_left in reversed(range(_MOST_TRIES)):
        try:
            with doubt:
                stored |= run(lambda transaction: _insert(transaction, new, settings, shard_of))
            break
        except DataAccessError as error:
            if not tries_left or not faults.is_taken_id(error):
                raise
        with doubt:
            stored |= read(lambda transaction: _look(transaction, new))
        for id in stored:
            new.pop(id, None)
    return [stored[id] for id, _ in requests]


def _look(transaction: PostgreSQLTransaction, requests: dict[str, CallbackRequest]) -> dict[str, CallbackStatus]:
    found: dict[str, CallbackStatus] = {}
    for (id,) in transaction.all("taken_ids", ids=list(requests)):
        # In the application's transaction, one may be purged between two statements. Then it is new after all.
        if row := transaction.one("status", callback=id):
            found[id] = read_status(row, transaction.all("history", callback=id))
    for id, status in found.items():
        if status.request != requests[id]:
            raise ConflictError(id)
    return found


def _insert(
    transaction: PostgreSQLTransaction,
    requests: dict[str, CallbackRequest],
    settings: dict[str, object],
    shard_of: Callable[[str], int],
) -> dict[str, CallbackStatus]:
    if not requests:
        return {}
    rows = [
        {
            "callback": id,
            "queue": request.queue_id or None,
            "shard": shard_of(request.queue_id or id),
            **request_values(request),
        }
        for id, request in requests.items()
    ]
    if len(rows) == 1 and transaction.has("store_one"):
        places = transaction.all("store_one", **settings, **rows[0])
    else:
        places = transaction.all("store", **settings, **{name: [row[name] for row in rows] for name in rows[0]})
    return {
        id: new_status(id, request, sequence=sequence, due=moment, blocked_by=None if head == id else head)
        for (id, request), (sequence, head, moment, *_) in zip(requests.items(), places, strict=True)
    }
