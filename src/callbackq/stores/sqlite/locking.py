"""Taking locks, ending them, and operators' wishes, within one write transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from attrs import evolve

from callbackq.core.lifecycle import Action, Effect, Transition, apply_action
from callbackq.core.models import CallbackLock, CallbackState, CallbackStatus
from callbackq.dataaccess import Acquired, AttemptRecord
from callbackq.errors import LockLostError
from callbackq.stores.sqlite.changes import Changes
from callbackq.stores.sqlite.reading import find, status_of
from callbackq.stores.sqlite.rows import (
    LOCKED,
    ROW_COLUMNS,
    STATES,
    CallbackRow,
    attempt_values,
    read_on_exhausted,
    read_request,
)
from callbackq.stores.sqlite.timeline import instant, later
from callbackq.stores.sqlite.transaction import Transaction

__all__ = ["Claim", "acquired", "act", "claim", "end_locks"]

Claim = tuple[CallbackRow, Sequence[Any]]
"""A callback that was locked, and its request's columns."""


def claim(
    transaction: Transaction, now: int, *, machine_name: str, lock_timeout: timedelta, limit: int, holder: int | None
) -> list[Claim]:
    """
    Lock due heads.

    Putting together what was locked is left to `acquired`, outside of the transaction, where it holds up nobody.
    """
    claims: list[Claim] = []
    while len(claims) < limit:
        changes = Changes(now)
        heads = transaction.all("due_heads", now=now, limit=limit - len(claims))
        found = [(CallbackRow(*head[:ROW_COLUMNS]), head[ROW_COLUMNS:]) for head in heads]
        free = [(row, request) for row, request in found if row.state != LOCKED or _is_free_again(row, changes)]
        _lock(transaction, now, [row for row, _ in free], machine_name, later(now, lock_timeout), holder)
        changes.write(transaction)
        claims += free
        if len(free) == len(found):
            break
        # Some ended with their locks, and those behind them may be due.
    return claims


def _is_free_again(row: CallbackRow, changes: Changes) -> bool:
    """End a lock that has timed out; a cancel noted under it, or a late acceptance, ends the callback too."""
    changes.lose_lock(row)
    row.abandoned += 1
    settled = changes.settle(row, Transition(state=CallbackState.WAITING))
    if settled.state is CallbackState.WAITING:
        return True
    changes.apply(row, settled)
    return False


def _lock(
    transaction: Transaction, now: int, rows: list[CallbackRow], machine_name: str, timeout: int, holder: int | None
) -> None:
    if not rows:
        return
    if holder is not None:
        # Each time: it costs little, and the row may have been lost.
        transaction.run("add_holder", {"holder": holder})
    transaction.run("draw_tokens", {"count": len(rows), "now": now})
    token = transaction.value("last_token") - len(rows)
    for row in rows:
        token += 1
        row.token, row.acquired, row.due, row.machine = token, now, timeout, machine_name
    transaction.run_many("lock", ({**vars(row), "holder": holder} for row in rows))


def acquired(claim: Claim) -> Acquired:
    """Put together what `DataAccess.acquire_locks` returns."""
    row, request = claim
    return Acquired(
        id=row.id,
        request=read_request(request),
        queue_id=request[0] or "",
        sequence=row.sequence,
        lock=CallbackLock(
            acquired=instant(row.acquired or 0),
            timeout=instant(row.due or 0),
            machine_name=row.machine or "",
            token=row.token,
        ),
        attempts_made=row.attempts_made,
        abandoned=row.abandoned,
        on_exhausted=read_on_exhausted(request),
    )


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
    changes = Changes(now)
    seen: set[str] = set()
    for record in records:
        id, token = record.acquired.id, record.acquired.lock.token
        if id in seen:
            # Its row must be read as the earlier record left it.
            changes.write(transaction)
            changes = Changes(now, made_due=changes.made_due)
            seen.clear()
        seen.add(id)
        found = transaction.one("callback", id=id)
        row = CallbackRow(*found) if found else None
        if row is not None and row.state == LOCKED and row.token == token:
            settled = changes.settle(row, record.transition)
            changes.end_lock(row, settled=None if released else settled, attempt=record.attempt)
            if not released:
                row.abandoned = 0
            changes.apply(row, settled)
            outcomes.append(settled)
        elif row is None or released:
            outcomes.append(LockLostError(id, token))
        else:
            outcomes.append(_repeat_or_keep_late(transaction, row, record))
    changes.write(transaction)
    return outcomes, changes.made_due


def _repeat_or_keep_late(
    transaction: Transaction, row: CallbackRow, record: AttemptRecord
) -> Transition | LockLostError:
    lost = LockLostError(row.id, record.acquired.lock.token)
    lock = transaction.one("ended_lock", token=lost.token, callback=row.callback)
    if lock is None:
        # The callback that was locked has been purged, and its id used again.
        return lost
    if lock[0] is not None:
        return Transition(state=STATES[lock[0]])
    if record.attempt is not None:
        attempt = evolve(record.attempt, late=True)
        transaction.run("keep_late", {"token": lost.token, **attempt_values(attempt, lock_machine=None)})
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
    row = find(transaction, id)
    changes = Changes(now)
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
            changes.revive(row, is_head=_join_tail(transaction, row))
        case Effect.OPEN_QUEUE:
            row.holds = 0
            changes.leave_queue(row)
            changes.keep(row)
    changes.write(transaction)
    return status_of(transaction, row.callback), changes.made_due


def _join_tail(transaction: Transaction, row: CallbackRow) -> bool:
    """Give a callback its queue's next number, and say whether it is alone there."""
    (queue,) = transaction.all("queue_tail", queue=row.queue)
    tail, has_head = queue
    transaction.run("set_tail", {"queue": row.queue, "tail": tail + 1})
    transaction.run("join_tail", {"callback": row.callback, "sequence": tail + 1})
    return not has_head
