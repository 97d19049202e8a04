"""Judges what is recorded by what the transport has told: the contract's rules for retries and final failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from callbackq.core.delivery import Answer, NotSent
from callbackq.core.lifecycle import Transition
from callbackq.core.models import AttemptFailure, CallbackState, FailedReason
from callbackq.dataaccess import AttemptRecord
from callbackq.testing.simulation.account import Account
from callbackq.testing.simulation.world import Actor

__all__ = ["Verdicts"]

_HOUR_US: Final = 3_600_000_000


class Verdicts:
    """
    Judge what dispatchers record.

    Args:
        break_rule: notes a broken promise: rule, id, what was seen.
        max_abandoned: of all dispatchers.
        jitter: the greatest of all dispatchers.
    """

    def __init__(self, break_rule: Callable[[str, str, str], None], *, max_abandoned: int, jitter: float) -> None:
        self._break_rule = break_rule
        self._max_abandoned = max_abandoned
        self._jitter = jitter
        self._outcomes: dict[tuple[Actor, str], object] = {}

    def told(self, holder: Actor, id: str, outcome: object) -> None:
        """
        A dispatcher's transport told what came of an attempt.

        Nothing (``None``) when it has just begun; any word when it will never tell.
        """
        self._outcomes[holder, id] = outcome

    def judge(self, holder: Actor, account: Account, record: AttemptRecord) -> None:
        """Judge the record of a live lock, before it is entered into the account."""
        wanted, attempt = record.transition, record.attempt
        if attempt is None:
            right = account.abandoned >= self._max_abandoned and wanted.failed_reason is FailedReason.ABANDONED
            if not right or wanted.state is not CallbackState.FAILED or wanted.counted:
                self._break_rule("verdict", account.id, f"ended unsent after {account.abandoned} abandoned locks")
            self._judge_failure(account, wanted)
            return
        outcome = self._outcomes.get((holder, account.id))
        if outcome is None or isinstance(outcome, NotSent):
            what = "the transport has said nothing yet" if outcome is None else "nothing was sent"
            self._break_rule("verdict", account.id, f"recorded as an attempt, though {what}")
            return
        status, failure = attempt.status_code, attempt.failure
        if isinstance(outcome, Answer) and failure is not AttemptFailure.TIMEOUT:
            if (status, failure) != (outcome.status_code, outcome.failure):
                self._break_rule("verdict", account.id, f"{status} {failure} recorded, not {outcome.status_code}")
            status, failure = outcome.status_code, outcome.failure
        self._judge_transition(account, wanted, status, failure, outcome)

    def _judge_transition(
        self,
        account: Account,
        wanted: Transition,
        status: int,
        failure: AttemptFailure | None,
        outcome: object,
    ) -> None:
        phase = account.request.retry_phases[0] if account.request.retry_phases else None
        is_last = phase is None or account.attempts_made >= phase.retries
        if failure is AttemptFailure.INTERRUPTED:
            if wanted.state is not CallbackState.WAITING or wanted.counted or wanted.delay:
                self._break_rule("verdict", account.id, "an interrupted attempt must count as none, and be due at once")
        elif 200 <= status <= 299:
            if wanted.state is not CallbackState.SUCCEEDED:
                self._break_rule("verdict", account.id, f"{wanted.state.value} after {status}")
        elif status == 410 or is_last or phase is None:
            reason = FailedReason.REFUSED if status == 410 else FailedReason.EXHAUSTED
            if wanted.state is not CallbackState.FAILED or wanted.failed_reason is not reason or not wanted.counted:
                self._break_rule("verdict", account.id, f"{wanted.state.value} after the last attempt")
            self._judge_failure(account, wanted)
        else:
            asked = outcome.response.headers.get("Retry-After") if isinstance(outcome, Answer) else None
            self._judge_retry(account, wanted, round(phase.delay.total_seconds() * 1e6), asked)

    def _judge_retry(self, account: Account, wanted: Transition, least_us: int, asked: str | None) -> None:
        if asked is not None:
            least_us = max(least_us, min(int(asked) * 1_000_000, max(2 * least_us, _HOUR_US)))
        delay_us = round(wanted.delay.total_seconds() * 1e6)
        if wanted.state is not CallbackState.WAITING or not wanted.counted:
            self._break_rule("verdict", account.id, f"{wanted.state.value} with retries left")
        elif not least_us <= delay_us <= least_us * (1 + self._jitter) + 1:
            self._break_rule("verdict", account.id, f"retried after {delay_us / 1e6} s instead of {least_us / 1e6} s")

    def _judge_failure(self, account: Account, wanted: Transition) -> None:
        if wanted.hold != (account.request.on_exhausted == "hold"):
            self._break_rule("verdict", account.id, "its queue is not as it wishes")
        if wanted.notify != bool(account.request.notification_email_address):
            self._break_rule("verdict", account.id, "its e-mail is forgotten, or nobody wanted it")
