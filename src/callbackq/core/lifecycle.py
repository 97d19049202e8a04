"""
The life of a callback: one table of states and events, and the functions that decide what follows.

This is the only place that decides the fate of a callback. Stores receive the finished decision and write
it. The diagram in the documentation is drawn from `TABLE`.
"""

from __future__ import annotations

from datetime import timedelta
from enum import Enum
from types import MappingProxyType
from typing import Final

from attrs import frozen

from callbackq.core.models import AttemptFailure, CallbackRequest, CallbackState, FailedReason
from callbackq.core.retry import delay_before_retry, postpone
from callbackq.core.verdict import Verdict
from callbackq.errors import IllegalTransitionError

__all__ = [
    "TABLE",
    "Action",
    "Effect",
    "Event",
    "Transition",
    "abandon",
    "after_attempt",
    "apply_action",
    "give_up",
    "settle",
]


class Event(Enum):
    """What can happen to a callback."""

    LOCK_ACQUIRED = "lock acquired"
    LOCK_RELEASED = "lock released"
    LOCK_TIMED_OUT = "lock timed out"
    DELIVERED = "delivered"
    RETRY_SCHEDULED = "retry scheduled"
    GAVE_UP = "gave up"
    CANCELLED_BY_REQUEST = "cancel"
    CANCEL_NOTED = "cancel noted"
    REDELIVERY_REQUESTED = "redeliver"
    QUEUE_OPENED = "skip"


_S, _E = CallbackState, Event

TABLE: Final = MappingProxyType(
    {
        (_S.WAITING, _E.LOCK_ACQUIRED): _S.LOCKED,
        (_S.WAITING, _E.CANCELLED_BY_REQUEST): _S.CANCELLED,
        (_S.LOCKED, _E.DELIVERED): _S.SUCCEEDED,
        (_S.LOCKED, _E.RETRY_SCHEDULED): _S.WAITING,
        (_S.LOCKED, _E.LOCK_RELEASED): _S.WAITING,
        (_S.LOCKED, _E.LOCK_TIMED_OUT): _S.WAITING,
        (_S.LOCKED, _E.GAVE_UP): _S.FAILED,
        (_S.LOCKED, _E.CANCEL_NOTED): _S.LOCKED,
        (_S.LOCKED, _E.CANCELLED_BY_REQUEST): _S.CANCELLED,
        (_S.FAILED, _E.REDELIVERY_REQUESTED): _S.WAITING,
        (_S.FAILED, _E.QUEUE_OPENED): _S.FAILED,
        (_S.FAILED, _E.CANCELLED_BY_REQUEST): _S.CANCELLED,
    }
)
"""(state, event) → next state. What is not in it can't happen."""


@frozen(kw_only=True)
class Transition:
    """
    What a store must write when a lock ends.

    Attributes:
        state: the state that follows.
        delay: with WAITING: the callback is due this long after the store's own now.
        counted: the attempt uses up one of those the request allows: add one to the callback's count.
        hold: with FAILED: the queue stays closed behind the callback.
        notify: with FAILED: an e-mail is owed. Written in the same transaction.
        failed_reason: with FAILED: why.
    """

    state: CallbackState
    delay: timedelta = timedelta(0)
    counted: bool = False
    hold: bool = False
    notify: bool = False
    failed_reason: FailedReason | None = None


def after_attempt(
    request: CallbackRequest,
    *,
    attempts_made: int,
    verdict: Verdict,
    failure: AttemptFailure | None = None,
    retry_after: timedelta | None = None,
    jitter: float = 0.0,
    random: float = 0.0,
) -> Transition:
    """
    Decide what follows from an attempt.

    Args:
        request: the callback's request.
        attempts_made: counted attempts before this one, since the callback was stored or redelivered.
        verdict: what the answer means.
        failure: why there was no answer. An attempt that our own shutdown interrupted is not counted and
            the callback is due again at once.
        retry_after: what the receiver asked for.
        jitter: see `postpone`.
        random: see `postpone`.
    """
    if failure is AttemptFailure.INTERRUPTED:
        return Transition(state=CallbackState.WAITING)
    if verdict is Verdict.DELIVERED:
        return Transition(state=CallbackState.SUCCEEDED, counted=True)
    if verdict is Verdict.REFUSED:
        return give_up(request, FailedReason.REFUSED, counted=True)
    delay = delay_before_retry(request.retry_phases, attempts_made + 1)
    if delay is None:
        return give_up(request, FailedReason.EXHAUSTED, counted=True)
    delay = postpone(delay, retry_after=retry_after, jitter=jitter, random=random)
    return Transition(state=CallbackState.WAITING, delay=delay, counted=True)


def give_up(request: CallbackRequest, reason: FailedReason, *, counted: bool = False) -> Transition:
    """End a callback for good."""
    return Transition(
        state=CallbackState.FAILED,
        counted=counted,
        hold=request.on_exhausted == "hold",
        notify=bool(request.notification_email_address),
        failed_reason=reason,
    )


def abandon(request: CallbackRequest, *, abandoned: int, max_abandoned: int) -> Transition | None:
    """
    Decide whether a callback that was just locked must fail instead of being sent.

    A request that kills its dispatcher leaves an abandoned lock each time; it must not live for ever.

    Args:
        request: the callback's request.
        abandoned: locks of this callback that timed out in a row.
        max_abandoned: how many are allowed.
    """
    return give_up(request, FailedReason.ABANDONED) if abandoned >= max_abandoned else None


def settle(transition: Transition, *, accepted_late: bool, cancel_requested: bool) -> Transition:
    """
    Combine a holder's transition with what happened while it held the lock.

    Stores call this in the transaction that writes the transition.

    Args:
        transition: what the holder decided.
        accepted_late: a late attempt of an earlier holder was accepted by the receiver: the callback has
            been delivered, whatever the present holder met.
        cancel_requested: somebody asked to cancel while the callback was locked.
    """
    if transition.state is CallbackState.SUCCEEDED:
        return transition
    if accepted_late:
        return Transition(state=CallbackState.SUCCEEDED, counted=transition.counted)
    if cancel_requested:
        return Transition(state=CallbackState.CANCELLED, counted=transition.counted)
    return transition


class Action(Enum):
    """What an operator can ask of a callback."""

    CANCEL = "cancel"
    """Send it no more. A callback whose attempt is under way is cancelled when that ends undelivered."""
    REDELIVER = "redeliver"
    """Try a FAILED callback again, with all its attempts: in place when it holds its queue, at the tail otherwise."""
    SKIP = "skip"
    """Leave the failed head of a held queue FAILED and open the queue."""


class Effect(Enum):
    """What a store must do to carry out an `Action`."""

    CANCEL = "cancel"
    """State CANCELLED, the lock (if any) ended as abandoned; the queue opens."""
    NOTE_CANCEL = "note cancel"
    """Keep the wish: `settle` is told of it when the lock ends."""
    REDELIVER_IN_PLACE = "redeliver in place"
    """State WAITING, due now, counters of attempts and abandoned locks at 0; number and place kept; no longer held."""
    REDELIVER_AT_TAIL = "redeliver at tail"
    """The same with the queue's next number."""
    OPEN_QUEUE = "open queue"
    """The state stays FAILED; the next callback of the queue becomes its head."""


def apply_action(action: Action, *, id: str, state: CallbackState, lock_is_live: bool, holds_queue: bool) -> Effect:
    """
    Decide what an operator's wish means for a callback.

    Args:
        action: the wish.
        id: the callback, for the error.
        state: its state.
        lock_is_live: with LOCKED: the lock has not timed out by the store's clock.
        holds_queue: with FAILED: its queue stands still because of it, or it has a queue of its own.

    Raises:
        IllegalTransitionError: the state does not allow it.
    """
    match action, state:
        case Action.CANCEL, CallbackState.WAITING:
            return Effect.CANCEL
        case Action.CANCEL, CallbackState.LOCKED:
            return Effect.NOTE_CANCEL if lock_is_live else Effect.CANCEL
        case Action.CANCEL, CallbackState.FAILED if holds_queue:
            return Effect.CANCEL
        case Action.REDELIVER, CallbackState.FAILED:
            return Effect.REDELIVER_IN_PLACE if holds_queue else Effect.REDELIVER_AT_TAIL
        case Action.SKIP, CallbackState.FAILED if holds_queue:
            return Effect.OPEN_QUEUE
    raise IllegalTransitionError(id, state.value, action.value)
