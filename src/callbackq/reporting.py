"""Builds the events a dispatcher's observer hears, and fences the observer off."""

from __future__ import annotations

import logging
from collections.abc import Callable

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackAttempt, CallbackState
from callbackq.dataaccess import Acquired
from callbackq.events import EventKind, ObservedEvent, Observer
from callbackq.faultlog import log_fault

__all__ = ["Reporter"]

_log = logging.getLogger("callbackq")

_KIND_OF_STATE = {
    CallbackState.WAITING: EventKind.RETRY_SCHEDULED,
    CallbackState.SUCCEEDED: EventKind.SUCCEEDED,
    CallbackState.FAILED: EventKind.FAILED,
    CallbackState.CANCELLED: EventKind.CANCELLED,
}


class Reporter:
    """Tells an observer what one dispatcher did."""

    def __init__(self, observer: Observer, machine_name: str) -> None:
        self._observer = observer
        self._machine_name = machine_name

    def recorded(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> None:
        """A result was recorded, and *transition* is what was written."""
        kind = _KIND_OF_STATE[transition.state]
        if kind is EventKind.RETRY_SCHEDULED and attempt is not None and not attempt.is_counted:
            kind = EventKind.INTERRUPTED
        self.callback(kind, acquired, attempt, transition)

    def released(self, acquired: Acquired, transition: Transition) -> None:
        """A lock was given back unused, and *transition* is what was written: it may have been cancelled meanwhile."""
        kind = _KIND_OF_STATE[transition.state]
        self.callback(EventKind.RELEASED if kind is EventKind.RETRY_SCHEDULED else kind, acquired)

    def callback(
        self,
        kind: EventKind,
        acquired: Acquired,
        attempt: CallbackAttempt | None = None,
        transition: Transition | None = None,
        *,
        abandoned_by: str = "",
    ) -> None:
        """Something happened to a callback."""
        self._tell(
            lambda: ObservedEvent(
                kind=kind,
                machine_name=self._machine_name,
                callback_id=acquired.id,
                queue_id=acquired.queue_id,
                application_id="" if acquired.request is None else acquired.request.application_id,
                origin="" if acquired.request is None else acquired.request.target.origin,
                sequence=acquired.sequence,
                token=acquired.lock.token,
                attempt=0 if attempt is None else acquired.attempts_made + 1,
                status_code=0 if attempt is None else attempt.status_code,
                failure=None if attempt is None else attempt.failure,
                duration=None if attempt is None else attempt.duration,
                next_attempt_in=transition.delay if transition and kind is EventKind.RETRY_SCHEDULED else None,
                failed_reason=transition.failed_reason if transition else None,
                abandoned=acquired.abandoned if kind is EventKind.ABANDONED else 0,
                abandoned_by=abandoned_by,
                detail="" if attempt is None else attempt.detail,
            )
        )

    def dispatcher(self, kind: EventKind, detail: str = "") -> None:
        """Something happened to the dispatcher itself."""
        self._tell(lambda: ObservedEvent(kind=kind, machine_name=self._machine_name, detail=detail))

    def _tell(self, make_event: Callable[[], ObservedEvent]) -> None:
        try:
            # It is made in here, too: for want of memory for it, no lock that was just taken may be forgotten.
            self._observer.observe(make_event())
        except KeyboardInterrupt:
            raise  # somebody wants the whole program to end
        except BaseException as error:
            # An observer is the host's code; its faults, and its wish to end a thread that is ours, stop no deliveries.
            log_fault(_log, "an observer raised", error)
