"""Storing callbacks, within one write transaction."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import define

from callbackq.core.models import CallbackRequest, CallbackStatus
from callbackq.errors import ConflictError, DataAccessError
from callbackq.stores._ids import rising_id
from callbackq.stores.sql.reading import status_of
from callbackq.stores.sql.rows import Values, new_status, request_values
from callbackq.stores.sqlite.transaction import SQLiteTransaction

__all__ = ["store", "stored_of"]


@define
class _Queue:
    """A queue, as far as storing changes it."""

    key: int
    tail: int
    head: str | None


def store(
    transaction: SQLiteTransaction, now: int, requests: Iterable[tuple[str | None, CallbackRequest]]
) -> list[CallbackStatus]:
    """
    Store callbacks, all or none, in this order.

    Args:
        transaction: a write transaction.
        now: the store's time.
        requests: each with its id, or ``None`` for a new one.

    Raises:
        ConflictError: an id is stored with another request.
    """
    queues: dict[str, _Queue] = {}
    callbacks: list[Values] = []
    statuses: list[CallbackStatus] = []
    added: dict[str, CallbackStatus] = {}
    key = transaction.value("last_callback")
    for id, request in requests:
        if id is not None and (earlier := added.get(id) or _find(transaction, id)) is not None:
            statuses.append(_unless_other(earlier, request))
            continue
        key += 1
        id = id or rising_id(now)
        sequence, head = _join(transaction, queues, request.queue_id, id)
        queue = queues.get(request.queue_id)
        callbacks.append(
            {
                "callback": key,
                "id": id,
                "queue": queue and queue.key,
                "sequence": sequence,
                "is_head": int(head is None),
                "now": now,
                **request_values(request),
            }
        )
        added[id] = new_status(id, request, sequence=sequence, due=now, blocked_by=head)
        statuses.append(added[id])
    transaction.run_many("add_callback", callbacks)
    transaction.run_many("add_request", callbacks)
    transaction.run_many("set_tail", ({"queue": queue.key, "tail": queue.tail} for queue in queues.values()))
    return statuses


def stored_of(transaction: SQLiteTransaction, ids: Iterable[str]) -> set[str]:
    """Tell which of these ids are stored."""
    return {id for id in ids if transaction.value("callback_of_id", id=id) is not None}


def _find(transaction: SQLiteTransaction, id: str) -> CallbackStatus | None:
    callback = transaction.value("callback_of_id", id=id)
    return None if callback is None else status_of(transaction, callback)


def _unless_other(status: CallbackStatus, request: CallbackRequest) -> CallbackStatus:
    if status.request != request:
        raise ConflictError(status.id)
    return status


def _join(transaction: SQLiteTransaction, queues: dict[str, _Queue], name: str, id: str) -> tuple[int, str | None]:
    """Take the queue's next number, and see who is its head."""
    if not name:
        return 1, None
    queue = queues.get(name)
    if queue is None:
        row = transaction.one("queue", name=name)
        queue = _Queue(*row) if row else _Queue(transaction.add("add_queue", {"name": name}), 0, None)
        queues[name] = queue
    if type(queue.tail) is not int:
        raise DataAccessError("a row of callbackq_queues is damaged: restore a backup, or correct its tail")
    queue.tail += 1
    head = queue.head
    queue.head = head or id
    return queue.tail, head
