"""The judge: a clean run passes, and every broken promise is named."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from attrs import evolve

from callbackq.core.models import (
    AttemptFailure,
    CallbackAttempt,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
    RetryPhase,
)
from callbackq.testing.history import RULES, Arrival, History, Judgement

START = datetime(2026, 1, 1, tzinfo=UTC)


def arrival(
    id: str, sequence: int, token: int, started: float, accepted: float | None = -1, queue: str = "q"
) -> Arrival:
    return Arrival(
        callback_id=id,
        queue_id=queue,
        sequence=sequence,
        token=token,
        started=started,
        accepted=started + 0.1 if accepted == -1 else accepted,
    )


def lock(token: int, begin: float, end: float, *, completed: bool = True) -> CallbackLock:
    return CallbackLock(
        acquired=START + timedelta(seconds=begin),
        timeout=START + timedelta(seconds=begin + 30),
        ended=START + timedelta(seconds=end),
        completed=completed,
        machine_name="m",
        token=token,
    )


def status(id: str, sequence: int, *locks: CallbackLock, queue: str = "q") -> CallbackStatus:
    return CallbackStatus(
        id=id,
        request=CallbackRequest(
            url="http://receiver.test/",
            queue_id=queue,
            retry_phases=[RetryPhase(retries=1, delay=timedelta(seconds=0.5))],
        ),
        queue_id=queue,
        sequence=sequence,
        state=CallbackState.SUCCEEDED,
        locks=locks,
    )


CLEAN_ARRIVALS = [
    arrival("a", 1, 1, 0.0, None),  # an error
    arrival("a", 1, 2, 1.0),
    arrival("b", 2, 3, 2.0),
    arrival("c", 1, 4, 0.5, queue="other"),
    arrival("d", 1, 5, 0.0, queue=""),
]
CLEAN_STATUSES = [
    status("a", 1, lock(1, 0, 0.5), lock(2, 1, 1.5)),
    status("b", 2, lock(3, 2, 2.5)),
    status("c", 1, lock(4, 0.5, 1), queue="other"),
    status("d", 1, lock(5, 0, 1), queue=""),
]


def judge(
    arrivals: list[Arrival] = CLEAN_ARRIVALS,
    statuses: list[CallbackStatus] = CLEAN_STATUSES,
    acknowledged: tuple[str, ...] = ("a", "b", "c", "d"),
    bound: int = 0,
) -> Judgement:
    return History(arrivals, statuses, acknowledged=acknowledged, duplicates_bound=bound).judge()


def test_a_clean_run_breaks_nothing() -> None:
    judgement = judge()

    assert judgement.ok
    assert judgement.broken() == {}
    assert (judgement.callbacks, judgement.arrivals, judgement.duplicates, judgement.takeovers) == (4, 5, 0, 0)


def replaced(values: list[CallbackStatus], index: int, **changes: object) -> list[CallbackStatus]:
    return [evolve(value, **changes) if place == index else value for place, value in enumerate(values)]


BROKEN = {
    "lost": {"acknowledged": ("a", "b", "c", "d", "e")},
    "not drained": {"statuses": replaced(CLEAN_STATUSES, 1, state=CallbackState.WAITING)},
    "contradiction": {"arrivals": [one for one in CLEAN_ARRIVALS if one.callback_id != "b"]},
    "unrecorded": {"statuses": replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.5),))},
    "token order": {
        "arrivals": [arrival("a", 1, 2, 0.0, None), arrival("a", 1, 1, 1.0), *CLEAN_ARRIVALS[2:]],
    },
    "too many": {
        "arrivals": [*CLEAN_ARRIVALS[:2], arrival("a", 1, 9, 1.6, None), *CLEAN_ARRIVALS[2:]],
        "statuses": replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.5), lock(2, 1, 1.5), lock(9, 1.6, 1.7))),
    },
    "too few": {
        "statuses": replaced(CLEAN_STATUSES, 1, state=CallbackState.FAILED, failed_reason=FailedReason.EXHAUSTED),
    },
    "too soon": {"arrivals": [CLEAN_ARRIVALS[0], arrival("a", 1, 2, 0.4), *CLEAN_ARRIVALS[2:]]},
    "order": {"arrivals": [*CLEAN_ARRIVALS[:2], arrival("b", 2, 3, 0.2, 0.3), *CLEAN_ARRIVALS[3:]]},
    "early start": {"arrivals": [*CLEAN_ARRIVALS[:2], arrival("b", 2, 3, 1.05, 3.0), *CLEAN_ARRIVALS[3:]]},
    "stale": {"arrivals": [*CLEAN_ARRIVALS, arrival("a", 1, 2, 5.0, None)]},
    "lock overlap": {"statuses": replaced(CLEAN_STATUSES, 1, locks=(lock(3, 1.4, 2.5),))},
    "duplicates": {
        "arrivals": [arrival("a", 1, 1, 0.0), *CLEAN_ARRIVALS[1:]],
    },
}


def test_there_is_an_example_for_every_rule() -> None:
    assert set(BROKEN) == set(RULES)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_promise_is_named(rule: str) -> None:
    judgement = judge(**BROKEN[rule])  # type: ignore[arg-type]

    assert not judgement.ok
    assert rule in judgement.broken()


def test_duplicates_within_the_bound_are_no_violation() -> None:
    judgement = judge([arrival("a", 1, 1, 0.0), *CLEAN_ARRIVALS[1:]], bound=1)

    assert judgement.ok
    assert (judgement.duplicates, judgement.duplicates_bound) == (1, 1)


def test_locks_of_one_callback_without_a_queue_must_not_overlap_either() -> None:
    statuses = replaced(CLEAN_STATUSES, 3, locks=(lock(5, 0, 1), lock(6, 0.5, 2)))

    assert judge(statuses=statuses).broken() == {"lock overlap": 1}


def test_two_callbacks_without_a_queue_may_be_locked_at_a_time() -> None:
    assert judge(
        [*CLEAN_ARRIVALS, arrival("e", 1, 6, 0.0, queue="")], [*CLEAN_STATUSES, status("e", 1, lock(6, 0, 1), queue="")]
    ).ok


def test_a_lock_that_was_taken_over_is_counted() -> None:
    statuses = replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.5, completed=False), lock(2, 1, 1.5)))

    assert judge(statuses=statuses).takeovers == 1


def test_arrivals_are_read_from_the_headers_callbackq_sends() -> None:
    headers = {
        "webhook-id": "a",
        "callbackq-queue": "q",
        "callbackq-sequence": "7",
        "callbackq-attempt": "1",
        "callbackq-token": "9",
    }

    assert Arrival.from_headers(headers, started=1.0, accepted=None) == arrival("a", 7, 9, 1.0, None)


def test_a_request_whose_lock_was_abandoned_uses_up_no_retry_and_needs_no_delay() -> None:
    first = [arrival("a", 1, 1, 0.0, None), arrival("a", 1, 2, 0.1, None), arrival("a", 1, 8, 1.0)]
    locks = (lock(1, 0, 0.05, completed=False), lock(2, 0.1, 0.2), lock(8, 1, 1.5))

    assert judge([*first, *CLEAN_ARRIVALS[2:]], replaced(CLEAN_STATUSES, 0, locks=locks)).ok


def test_a_callback_that_was_redelivered_has_its_retries_anew() -> None:
    again = {
        "arrivals": [*CLEAN_ARRIVALS[:2], arrival("a", 1, 9, 1.2, None), *CLEAN_ARRIVALS[2:]],
        "statuses": replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.5), lock(2, 1, 1.1), lock(9, 1.2, 1.3))),
    }

    def broken(redelivered: list[str]) -> dict[str, int]:
        ids = ("a", "b", "c", "d")
        return History(**again, acknowledged=ids, redelivered=redelivered).judge().broken()  # type: ignore[arg-type]

    assert broken([]) == {"too many": 1}
    assert broken(["a"]) == {}
    assert broken(["b"]) == {"too many": 1}


def test_a_copy_of_a_dispatcher_that_stood_still_at_the_first_byte_is_not_judged_by_its_order() -> None:
    stale = [*CLEAN_ARRIVALS, arrival("a", 1, 1, 5.0, None)]

    def broken(requests: list[tuple[str, int]]) -> dict[str, int]:
        ids = ("a", "b", "c", "d")
        return History(stale, CLEAN_STATUSES, acknowledged=ids, stale_requests=requests).judge().broken()

    assert broken([]) == {"token order": 1, "stale": 1, "too many": 1}
    assert broken([("a", 1)]) == {}
    assert broken([("b", 1)]) == broken([])


def test_a_killed_dispatchers_request_may_be_accepted_after_its_successors() -> None:
    # Started before, accepted when number 2 is done: number 1 was accepted in between, under the next lock.
    slow = [arrival("a", 1, 1, 0.9, 3.0), *CLEAN_ARRIVALS[1:]]
    statuses = replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.95, completed=False), lock(2, 1, 1.5)))

    assert judge(slow, statuses, bound=1).broken() == {}


def test_a_late_word_about_an_interruption_takes_nothing_from_the_attempts() -> None:
    def attempt(status_code: int, *, late: bool = False) -> CallbackAttempt:
        failure = None if status_code else AttemptFailure.INTERRUPTED
        return CallbackAttempt(
            status_code=status_code, time=START, duration=timedelta(0), failure=failure, late=late, machine_name="m"
        )

    def broken(*attempts: CallbackAttempt) -> dict[str, int]:
        refused = [evolve(one, accepted=None) for one in CLEAN_ARRIVALS[:2]]
        failed = {"state": CallbackState.FAILED, "failed_reason": FailedReason.EXHAUSTED, "attempts": attempts}
        return judge([*refused, *CLEAN_ARRIVALS[2:]], replaced(CLEAN_STATUSES, 0, **failed)).broken()

    assert broken(attempt(500), attempt(500)) == {}
    assert broken(attempt(0, late=True), attempt(500), attempt(500)) == {}
    assert broken(attempt(500, late=True), attempt(500)) == {"too few": 1}
    assert broken(attempt(0), attempt(500)) == {"too few": 1}
