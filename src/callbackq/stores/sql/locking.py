"""Taking locks, ending them, and operators' wishes, within one write transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final

from attrs import evolve

from callbackq.core.lifecycle import Action, Effect, Transition, apply_action
from callbackq.core.models import CallbackLock, CallbackState, CallbackStatus, FailedReason, unchecked
from callbackq.core.validation import check_callback_id
from callbackq.dataaccess import Acquired, AttemptRecord
from callbackq.errors import CallbackNotFoundError, LockLostError
from callbackq.stores.sql.changes import Changes
from callbackq.stores.sql.instants import instant
from callbackq.stores.sql.reading import find, status_of
from callbackq.stores.sql.rows import (
    LOCKED,
    ROW_COLUMNS,
    STATES,
    WAITING,
    CallbackRow,
    Key,
    attempt_values,
    read_on_exhausted,
    read_request,
)
from callbackq.stores.sql.transaction import Transaction

__all__ = ["Claim", "Take", "acquired", "act", "claim", "end_locks", "releases"]

_LOG: Final = logging.getLogger("callbackq.stores")

Claim = tuple[CallbackRow, Sequence[Any]]
"""A callback that was locked, and its request's columns."""

Take = Callable[[list[CallbackRow]], None]
"""Gives rows a new lock, here and in the database."""


def claim(transaction: Transaction, now: int, *, limit: int, take: Take) -> list[Claim]:
    """
    Lock due heads.

    Putting together what was locked is left to `acquired`, outside of the transaction, where it holds up nobody.
    """
    claims: list[Claim] = []
    seen: set[Key] = set()
    while len(claims) < limit:
        # All queues wait for a claim, so it waits for none (for a few moments, where a server can't pass over rows).
        changes = Changes(now, wait="not at all")
        heads = transaction.all("due_heads", now=now, limit=limit - len(claims))
        requests = {head[0]: head[ROW_COLUMNS:] for head in heads}
        found = [CallbackRow(*head[:ROW_COLUMNS]).mended() for head in heads]
        free = [row for row in found if _can_be_taken(row, changes)]
        if free:
            take(free)
        changes.write(transaction)
        claims += [(row, requests[row.callback]) for row in free]
        # Where what was written can't be seen (an index is damaged, a trigger is in the way), they come again.
        if len(free) == len(found) or seen.issuperset(row.callback for row in found):
            break
        # Some ended with their locks, and those behind them may be due.
        seen.update(row.callback for row in found)
    return claims


def _can_be_taken(row: CallbackRow, changes: Changes) -> bool:
    if row.owes_an_opening():
        changes.open_queue_behind(row)
        return False
    if any(check_callback_id(row.id)):
        # It can't even be named: it fails, and nobody else waits for it.
        _LOG.error("a callback whose id can't be read has failed: it was changed by another program, or its disk has")
        row.holds, row.failed_reason = 0, FailedReason.UNDECODABLE.value
        changes.finish(row, CallbackState.FAILED)
        return False
    return row.state == WAITING or _is_free_again(row, changes)


def _is_free_again(row: CallbackRow, changes: Changes) -> bool:
    """End a lock that has timed out; a cancel noted under it, or a late acceptance, ends the callback too."""
    changes.lose_lock(row)
    row.abandoned += 1
    settled = changes.settle(row, Transition(state=CallbackState.WAITING))
    if settled.state is CallbackState.WAITING:
        return True
    changes.apply(row, settled)
    return False


def acquired(claim: Claim) -> Acquired:
    """Put together what `DataAccess.acquire_locks` returns."""
    row, request = claim
    return Acquired(
        id=row.id,
        request=None if row.is_damaged else read_request(request),
        queue_id=request[0] or "",
        sequence=row.sequence,
        lock=unchecked(
            CallbackLock,
            acquired=instant(row.acquired or 0),
            timeout=instant(row.due or 0),
            completed=False,
            machine_name=row.machine or "",
            token=row.token,
            ended=None,
        ),
        attempts_made=row.attempts_made,
        abandoned=row.abandoned,
        on_exhausted=read_on_exhausted(request),
    )


def releases(locks: Iterable[tuple[Acquired, timedelta]]) -> list[AttemptRecord]:
    """Say what `end_locks` is to write for locks that are given back unused, each with its delay."""
    return [
        AttemptRecord(acquired=acquired, attempt=None, transition=Transition(state=CallbackState.WAITING, delay=delay))
        for acquired, delay in locks
    ]


def end_locks(
    transaction: Transaction, now: int, records: Sequence[AttemptRecord], *, released: bool = False
) -> tuple[list[Transition | LockLostError], bool]:
    """
    Write the ends of locks, in this order.

    Args:
        transaction: a write transaction.
        now: the store's time.
        records: what to write.
        released: the locks are given back unused: no result is kept, and the count of abandoned locks stays.

    Returns:
        For each record what was written, or that the lock was lost; and whether a callback became due. (Not raised:
        an exception would undo the late attempt that was kept.)
    """
    outcomes: list[Transition | LockLostError] = []
    made_due = False
    for batch in _without_repetitions(records):
        changes = Changes(now)
        rows = transaction.rows_to_change(record.acquired.id for record in batch)
        for record in batch:
            row = rows.get(record.acquired.id)
            outcomes.append(_end_lock(transaction, changes, row, record, released=released))
        changes.write(transaction)
        made_due = made_due or changes.made_due
    return outcomes, made_due


def _without_repetitions(records: Sequence[AttemptRecord]) -> Iterator[list[AttemptRecord]]:
    """Part records where a callback comes again: its row must be read as the earlier record left it."""
    batch: dict[str, AttemptRecord] = {}
    for record in records:
        if record.acquired.id in batch:
            yield list(batch.values())
            batch.clear()
        batch[record.acquired.id] = record
    if batch:
        yield list(batch.values())


def _end_lock(
    transaction: Transaction, changes: Changes, row: CallbackRow | None, record: AttemptRecord, *, released: bool
) -> Transition | LockLostError:
    token = record.acquired.lock.token
    if row is not None and row.state == LOCKED and row.token == token:
        settled = changes.settle(row, record.transition)
        changes.end_lock(row, settled=None if released else settled, attempt=record.attempt)
        if not released:
            row.abandoned = 0
        changes.apply(row, settled)
        return settled
    if row is None or released:
        return LockLostError(record.acquired.id, token)
    return _repeat_or_keep_late(transaction, row, record)


def _repeat_or_keep_late(
    transaction: Transaction, row: CallbackRow, record: AttemptRecord
) -> Transition | LockLostError:
    lost = LockLostError(row.id, record.acquired.lock.token)
    lock = transaction.one("ended_lock", token=lost.token, callback=row.callback)
    if lock is None:
        # The callback that was locked has been purged, and its id used again.
        return lost
    if lock[0] in range(len(STATES)):
        return Transition(state=STATES[lock[0]])
    if record.attempt is not None:
        attempt = evolve(record.attempt, late=True)
        values = attempt_values(attempt, lock_machine=None)
        transaction.run("keep_late", {"token": lost.token, "callback": row.callback, **values})
    if record.transition.state is CallbackState.SUCCEEDED:
        transaction.run("accept_late", {"callback": row.callback})
    return lost


def act(transaction: Transaction, now: int, id: str, action: Action) -> tuple[CallbackStatus, bool]:
    """
    Carry out an operator's wish.

    Returns:
        The status afterwards, and whether a callback became due.

    Raises:
        CallbackNotFoundError, IllegalTransitionError: nothing was changed.
    """
    found = find(transaction, id)
    if found.queue is not None:
        transaction.lock_queues([found.queue], wait="patiently")
    row = transaction.rows_to_change([id]).get(id)
    if row is None:  # purged since
        raise CallbackNotFoundError(id)
    changes = Changes(now)
    if row.owes_an_opening():
        changes.open_queue_behind(row)
        changes.write(transaction)
        changes = Changes(now, made_due=changes.made_due)
    effect = apply_action(
        action,
        id=id,
        state=STATES[row.state],
        lock_is_live=row.due is not None and row.due > now,
        holds_queue=bool(row.holds) or row.queue is None,
    )
    match effect:
        case Effect.CANCEL:
            changes.cancel(row)
        case Effect.NOTE_CANCEL:
            row.cancel_requested = 1
            changes.keep(row)
        case Effect.REDELIVER_IN_PLACE:
            changes.revive(row, is_head=True)
        case Effect.REDELIVER_AT_TAIL:
            changes.revive(row, is_head=transaction.join_tail(row))
        case Effect.OPEN_QUEUE:
            row.holds = 0
            changes.leave_queue(row)
            changes.keep(row)
    changes.write(transaction)
    return status_of(transaction, row.callback), changes.made_due
