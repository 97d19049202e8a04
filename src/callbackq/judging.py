"""
What an outcome means for its callback, with the host's own code (transport, response policy) fenced off.

Whatever a transport hands back becomes an attempt that a store can take; whatever a policy raises, the answer is
judged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta

from callbackq.clock import Clock
from callbackq.core.delivery import Answer
from callbackq.core.lifecycle import Transition, abandon, after_attempt
from callbackq.core.models import AttemptFailure, CallbackAttempt, CallbackState, FailedReason
from callbackq.core.retry import parse_retry_after
from callbackq.core.verdict import ResponsePolicy, Verdict
from callbackq.dataaccess import Acquired
from callbackq.faultlog import log_fault
from callbackq.settings import Settings

__all__ = ["Judge"]

_log = logging.getLogger("callbackq")


class Judge:
    """
    Turns outcomes into attempts, and attempts into transitions.

    Args:
        settings: the host's choices.
        clock: for attempts of which nothing else is known.
        random: chance, from 0 to 1, for jitter.
    """

    def __init__(self, settings: Settings, clock: Clock, random: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._random = random

    def attempt(self, outcome: object) -> tuple[CallbackAttempt, timedelta | None]:
        """
        Return the attempt that *outcome* (an `Answer`, if all is well) stands for, and its Retry-After.

        Raises:
            MemoryError: ask again.
        """
        if isinstance(outcome, CallbackAttempt):
            return outcome, None  # ours: `no_answer`
        try:
            if isinstance(outcome, Answer):
                return self._attempt(outcome), self._retry_after(outcome)
            _log.error("the transport returned a %s instead of an Answer or NotSent", type(outcome).__name__)
            detail = f"no answer but a {type(outcome).__name__}"
        except MemoryError:
            raise  # it may have been accepted, which must not be forgotten for that
        except Exception as error:
            # The models refuse it (a naive time, say). The callback was sent all the same, so this is an attempt.
            log_fault(_log, "the transport returned an answer that can't be recorded", error)
            detail = type(error).__name__
        return self.no_answer(AttemptFailure.INTERNAL, detail), None

    def no_answer(self, failure: AttemptFailure, detail: str = "") -> CallbackAttempt:
        """Return the attempt of a transport that said nothing of use."""
        return self._attempt(
            Answer(status_code=0, time=self._clock.now(), duration=timedelta(0), failure=failure, detail=detail)
        )

    def wants_retry(self, attempt: CallbackAttempt) -> bool:
        """Tell whether an attempt settled nothing: it uses up a retry, or the last."""
        return attempt.failure is not AttemptFailure.INTERRUPTED and self._verdict(attempt.status_code) is Verdict.RETRY

    def after_attempt(self, acquired: Acquired, attempt: CallbackAttempt, retry_after: timedelta | None) -> Transition:
        """Decide what follows from an attempt."""
        if acquired.request is None:
            return self.undecodable(acquired)
        return after_attempt(
            acquired.request,
            attempts_made=acquired.attempts_made,
            verdict=self._verdict(attempt.status_code),
            failure=attempt.failure,
            retry_after=retry_after,
            jitter=self._settings.retry_jitter,
            random=self._random(),
        )

    def unsent(self, acquired: Acquired) -> Transition | None:
        """Decide whether a callback that was just acquired ends without being sent; ``None`` to send it."""
        if acquired.request is None:
            return self.undecodable(acquired)
        return abandon(acquired.request, abandoned=acquired.abandoned, max_abandoned=self._settings.max_abandoned)

    def undecodable(self, acquired: Acquired) -> Transition:
        """End a callback that can't be read. Its queue follows its wish; nobody can be told by e-mail."""
        return Transition(
            state=CallbackState.FAILED,
            hold=acquired.on_exhausted == "hold",
            failed_reason=FailedReason.UNDECODABLE,
        )

    def _attempt(self, answer: Answer) -> CallbackAttempt:
        return CallbackAttempt(
            status_code=answer.status_code,
            response=answer.response,
            time=answer.time,
            duration=answer.duration,
            failure=answer.failure,
            machine_name=self._settings.machine_name,
            truncated=answer.truncated,
            detail=answer.detail,
        )

    def _retry_after(self, answer: Answer) -> timedelta | None:
        if self._settings.response_policy.honour_retry_after:
            for name, value in answer.response.headers.items():
                if name.lower() == "retry-after":
                    return parse_retry_after(value, answer.time + answer.duration)
        return None

    def _verdict(self, status_code: int) -> Verdict:
        try:
            return self._settings.response_policy.judge(status_code)
        except Exception as error:
            # A policy of the host's. Its fault must neither lose the answer nor look like one of the store.
            log_fault(_log, "the response policy raised; the answer is judged by the default policy", error)
            return ResponsePolicy().judge(status_code)
