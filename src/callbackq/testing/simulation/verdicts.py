"""Judges what is recorded by what the transport has told: the contract's rules for retries and final failures."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from typing import Final

from callbackq.core.delivery import Answer, Delivery, NotSent
from callbackq.core.lifecycle import Transition
from callbackq.core.models import AttemptFailure, CallbackState, FailedReason
from callbackq.dataaccess import AttemptRecord
from callbackq.testing.simulation.account import Account
from callbackq.testing.simulation.world import Actor

__all__ = ["SILENCE", "Verdicts"]

_HOUR_US: Final = 3_600_000_000
_GIVEN_UP: Final = (0, AttemptFailure.TIMEOUT)


class _Word(Enum):
    SILENCE = "silence"


SILENCE: Final = _Word.SILENCE
"""What a transport says that never tells what came of an attempt, or too late."""


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
        self._outcomes: dict[tuple[str, int], tuple[object, bool]] = {}
        self._newest: dict[tuple[Actor, str], int] = {}

    def told(self, holder: Actor, delivery: Delivery, outcome: object, *, is_overdue: bool = False) -> None:
        """
        A dispatcher's transport told what came of an attempt.

        Args:
            holder: the dispatcher.
            delivery: what it was given.
            outcome: ``None`` when it has just begun, and `SILENCE` as soon as it may never tell.
            is_overdue: so late that the dispatcher may have given the attempt up before.
        """
        self._outcomes[delivery.callback_id, delivery.token] = outcome, is_overdue
        newest = self._newest.get((holder, delivery.callback_id), 0)
        self._newest[holder, delivery.callback_id] = max(newest, delivery.token)

    def judge(self, holder: Actor, account: Account, record: AttemptRecord) -> None:
        """Judge the record of a live lock, before it is entered into the account."""
        wanted, attempt = record.transition, record.attempt
        if attempt is None:
            right = account.abandoned >= self._max_abandoned and wanted.failed_reason is FailedReason.ABANDONED
            if not right or wanted.state is not CallbackState.FAILED or wanted.counted:
                self._break_rule("verdict", account.id, f"ended unsent after {account.abandoned} abandoned locks")
            self._judge_failure(account, wanted)
            return
        # Whose own lock timed out goes on with its attempt when it is given another.
        token = self._newest.get((holder, account.id), 0)
        outcome, is_overdue = self._outcomes.get((account.id, token), (None, False))
        if outcome is None or isinstance(outcome, NotSent):
            what = "the transport has said nothing yet" if outcome is None else "nothing was sent"
            self._break_rule("verdict", account.id, f"recorded as an attempt, though {what}")
            return
        rightly, recorded = _what_to_record(outcome), (attempt.status_code, attempt.failure)
        if recorded != rightly and not (is_overdue and recorded == _GIVEN_UP):
            self._break_rule("verdict", account.id, f"{_words(recorded)} recorded, not {_words(rightly)}")
        self._judge_transition(account, wanted, *recorded, outcome)

    def _judge_transition(
        self,
        account: Account,
        wanted: Transition,
        status: int,
        failure: AttemptFailure | None,
        outcome: object,
    ) -> None:
        delays = [phase.delay for phase in account.request.retry_phases for _ in range(phase.retries)]
        is_last = account.attempts_made >= len(delays)
        if failure is AttemptFailure.INTERRUPTED:
            if wanted.state is not CallbackState.WAITING or wanted.counted or wanted.delay:
                self._break_rule("verdict", account.id, "an interrupted attempt must count as none, and be due at once")
        elif 200 <= status <= 299:
            if wanted.state is not CallbackState.SUCCEEDED:
                self._break_rule("verdict", account.id, f"{wanted.state.value} after {status}")
        elif status == 410 or is_last:
            reason = FailedReason.REFUSED if status == 410 else FailedReason.EXHAUSTED
            if wanted.state is not CallbackState.FAILED or wanted.failed_reason is not reason or not wanted.counted:
                self._break_rule("verdict", account.id, f"{wanted.state.value} after the last attempt")
            self._judge_failure(account, wanted)
        else:
            # Nothing but an answer that was told in time can ask for a delay.
            told = outcome if isinstance(outcome, Answer) and failure is outcome.failure else None
            delay_us = round(delays[account.attempts_made].total_seconds() * 1e6)
            self._judge_retry(account, wanted, delay_us, None if told is None else _asked_us(told))

    def _judge_retry(self, account: Account, wanted: Transition, least_us: int, asked_us: int | None) -> None:
        if asked_us is not None:
            least_us = max(least_us, min(asked_us, max(2 * least_us, _HOUR_US)))
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


def _what_to_record(outcome: object) -> tuple[int, AttemptFailure | None]:
    if isinstance(outcome, Answer):
        return outcome.status_code, outcome.failure
    return _GIVEN_UP if outcome is SILENCE else (0, AttemptFailure.INTERNAL)


def _asked_us(answer: Answer) -> int | None:
    """Read how long a receiver asks to be left alone: in seconds, or until a date."""
    asked = answer.response.headers.get("Retry-After")
    if asked is None or asked.isdigit():
        return None if asked is None else int(asked) * 1_000_000
    date = datetime.strptime(asked, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
    return max(round((date - answer.time).total_seconds() * 1e6), 0)


def _words(recorded: tuple[int, AttemptFailure | None]) -> str:
    status, failure = recorded
    return failure.value if failure else str(status)
