"""
What a dispatcher tells the host about its work.

An `Observer` is called in the dispatcher's own thread, after the store has taken the change it speaks of. It must be
quick; what it raises is logged and goes no further. Events carry ids and figures; of a URL no
more than its origin, of headers and bodies nothing.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from enum import Enum
from typing import Protocol

from attrs import frozen

from callbackq.core.models import AttemptFailure, FailedReason

__all__ = ["EventKind", "LoggingObserver", "ObservedEvent", "Observer"]


class EventKind(Enum):
    """What happened. Those up to LOCK_LOST speak of one callback, the others of the dispatcher."""

    ABANDONED = "abandoned"
    """
    The lock before timed out without a result: its dispatcher died, froze, or lost its store. Told before LOCKED, by
    the dispatcher that takes over, so that the log names a request which kills its dispatchers before it does so again.
    """
    LOCKED = "locked"
    RETRY_SCHEDULED = "retry scheduled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """The attempt was ended by a stop; the callback is WAITING and due, its retries untouched."""
    RELEASED = "released"
    """The lock was given back unused; the callback is WAITING. (If it was cancelled meanwhile: CANCELLED.)"""
    LOCK_LOST = "lock lost"
    """
    Another dispatcher took over before the result was recorded; the attempt, if there was one, was kept as late.
    Without an attempt, it may also be a lock that was given back already when the store failed, and again afterwards.
    """

    STARTED = "dispatcher started"
    STOPPED = "dispatcher stopped"
    STORE_FAILED = "store failed"
    """The store raised; the dispatcher rests and tries again. Told once until the store is back."""
    STORE_RECOVERED = "store recovered"
    LOCAL_FAULT = "local fault"
    """
    This machine can't open connections at the moment (descriptors, memory, ports, the way to the proxy): no attempt, a
    rest.
    """


@frozen(kw_only=True)
class ObservedEvent:
    """
    One thing that happened.

    Attributes:
        kind: what.
        machine_name: the dispatcher's name.
        callback_id: which callback; ``None`` when the event speaks of the dispatcher.
        queue_id: its queue; empty when it has one of its own.
        application_id: the request's label.
        origin: where it goes to, as ``scheme://host:port``; empty when the request can't be read.
        sequence: its number in the queue.
        token: the fencing token of the lock.
        attempt: number of the attempt, from 1; 0 when there was none.
        status_code: of the answer; 0 when there was none.
        failure: why there was no answer.
        duration: of the attempt.
        next_attempt_in: until the callback is due again, for RETRY_SCHEDULED.
        failed_reason: for FAILED.
        abandoned: for ABANDONED: how many locks of the callback have timed out in a row, without a result in between.
        abandoned_by: for ABANDONED: the name of the machine that held the last of them.
        detail: a few words about a fault: `CallbackAttempt.detail`, or an exception's type, never its text.
    """

    kind: EventKind
    machine_name: str
    callback_id: str | None = None
    queue_id: str = ""
    application_id: str = ""
    origin: str = ""
    sequence: int = 0
    token: int = 0
    attempt: int = 0
    status_code: int = 0
    failure: AttemptFailure | None = None
    duration: timedelta | None = None
    next_attempt_in: timedelta | None = None
    failed_reason: FailedReason | None = None
    abandoned: int = 0
    abandoned_by: str = ""
    detail: str = ""


class Observer(Protocol):
    """Receives events. One method, so that new kinds of events break nobody."""

    def observe(self, event: ObservedEvent) -> None:
        """Take note of *event*; be quick, don't raise."""
        ...


_LEVELS = {
    EventKind.LOCKED: logging.DEBUG,
    EventKind.RELEASED: logging.DEBUG,
    EventKind.RETRY_SCHEDULED: logging.INFO,
    EventKind.SUCCEEDED: logging.INFO,
    EventKind.CANCELLED: logging.INFO,
    EventKind.INTERRUPTED: logging.INFO,
    EventKind.STARTED: logging.INFO,
    EventKind.STOPPED: logging.INFO,
    EventKind.STORE_RECOVERED: logging.INFO,
    EventKind.ABANDONED: logging.WARNING,
    EventKind.LOCK_LOST: logging.WARNING,
    EventKind.FAILED: logging.ERROR,
    EventKind.STORE_FAILED: logging.ERROR,
    EventKind.LOCAL_FAULT: logging.ERROR,
}


class LoggingObserver:
    """
    Writes one line per event to a standard logger: the default observer.

    The event itself is on the log record as ``callbackq_event``, for structured handlers.

    Args:
        logger: where to; ``logging.getLogger("callbackq")`` by default.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("callbackq")

    def observe(self, event: ObservedEvent) -> None:
        level = _LEVELS[event.kind]
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", _line(event), extra={"callbackq_event": event})


def _line(event: ObservedEvent) -> str:
    # ascii(): ids are the application's text; a log line must stay one line and harmless on a terminal. Numbers, too:
    # in a database that somebody else has written to, they may be text.
    words = [f"{event.kind.value}:"]
    if event.callback_id is not None:
        words.append(f"callback={event.callback_id!a} queue={event.queue_id!a} sequence={event.sequence!a}")
    if event.application_id:
        words.append(f"application={event.application_id!a}")
    if event.origin:
        words.append(f"origin={event.origin!a}")
    if event.attempt:
        words.append(f"attempt={event.attempt}")
    if event.status_code:
        words.append(f"status={event.status_code}")
    if event.failure is not None:
        words.append(f"failure={event.failure.value}")
    if event.failed_reason is not None:
        words.append(f"reason={event.failed_reason.value}")
    if event.duration is not None:
        words.append(f"duration={event.duration.total_seconds():.3f}s")
    if event.next_attempt_in is not None:
        words.append(f"next_in={event.next_attempt_in.total_seconds():.3f}s")
    if event.abandoned:
        words.append(f"in_a_row={event.abandoned} by={event.abandoned_by!a}")
    if event.detail:
        words.append(f"detail={event.detail!a}")
    words.append(f"machine={event.machine_name!a}")
    return " ".join(words)
