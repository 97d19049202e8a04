"""The judge: a clean run passes, and every broken promise is named."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

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
FAILED, CANCELLED = CallbackState.FAILED, CallbackState.CANCELLED


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


def attempt(
    status_code: int, *, failure: AttemptFailure | None = None, late: bool = False, at: float = 0.0
) -> CallbackAttempt:
    return CallbackAttempt(
        status_code=status_code,
        time=START + timedelta(seconds=at),
        duration=timedelta(0),
        failure=failure,
        late=late,
        machine_name="m",
    )


def status(
    id: str, sequence: int, *locks: CallbackLock, queue: str = "q", codes: Sequence[int] = (200,)
) -> CallbackStatus:
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
        attempts=[attempt(code) for code in codes],
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
    status("a", 1, lock(1, 0, 0.5), lock(2, 1, 1.5), codes=(500, 200)),
    status("b", 2, lock(3, 2, 2.5)),
    status("c", 1, lock(4, 0.5, 1), queue="other"),
    status("d", 1, lock(5, 0, 1), queue=""),
]


def judge(
    arrivals: list[Arrival] = CLEAN_ARRIVALS,
    statuses: list[CallbackStatus] = CLEAN_STATUSES,
    acknowledged: tuple[str, ...] = ("a", "b", "c", "d"),
    bound: int = 0,
    **known: Any,
) -> Judgement:
    return History(arrivals, statuses, acknowledged=acknowledged, duplicates_bound=bound, **known).judge()


def test_a_clean_run_breaks_nothing() -> None:
    judgement = judge()

    assert judgement.ok
    assert judgement.broken() == {}
    assert (judgement.callbacks, judgement.arrivals, judgement.duplicates, judgement.takeovers) == (4, 5, 0, 0)


def replaced(values: list[CallbackStatus], index: int, **changes: object) -> list[CallbackStatus]:
    return [evolve(value, **changes) if place == index else value for place, value in enumerate(values)]


BROKEN: dict[str, dict[str, Any]] = {
    "lost": {"acknowledged": ("a", "b", "c", "d", "e")},
    "not drained": {"statuses": replaced(CLEAN_STATUSES, 1, state=CallbackState.WAITING)},
    "cancelled": {"statuses": replaced(CLEAN_STATUSES, 3, state=CANCELLED, attempts=())},
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
        "statuses": replaced(CLEAN_STATUSES, 1, state=FAILED, failed_reason=FailedReason.EXHAUSTED),
    },
    "unfounded": {
        "statuses": replaced(CLEAN_STATUSES, 3, attempts=(), state=FAILED, failed_reason=FailedReason.REFUSED),
    },
    "too soon": {"arrivals": [CLEAN_ARRIVALS[0], arrival("a", 1, 2, 0.4), *CLEAN_ARRIVALS[2:]]},
    "order": {"arrivals": [*CLEAN_ARRIVALS[:2], arrival("b", 2, 3, 0.2, 0.3), *CLEAN_ARRIVALS[3:]]},
    "early start": {"arrivals": [*CLEAN_ARRIVALS[:2], arrival("b", 2, 3, 1.05, 3.0), *CLEAN_ARRIVALS[3:]]},
    "stale": {"arrivals": [*CLEAN_ARRIVALS, arrival("a", 1, 2, 5.0, None)]},
    "early lock": {"statuses": replaced(CLEAN_STATUSES, 1, locks=(lock(3, 0.6, 0.9), lock(4, 2, 2.5)))},
    "lock overlap": {"statuses": replaced(CLEAN_STATUSES, 1, locks=(lock(3, 1.4, 2.5),))},
    "takeover": {
        "statuses": replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.5, completed=False), lock(2, 1, 1.5))),
        "excused": (),
    },
    "duplicates": {
        "arrivals": [arrival("a", 1, 1, 0.0), *CLEAN_ARRIVALS[1:]],
    },
}


def test_there_is_an_example_for_every_rule() -> None:
    assert set(BROKEN) == set(RULES)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_promise_is_named(rule: str) -> None:
    judgement = judge(**BROKEN[rule])

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
    interrupted = partial(attempt, 0, failure=AttemptFailure.INTERRUPTED)

    def broken(*attempts: CallbackAttempt) -> dict[str, int]:
        refused = [evolve(one, accepted=None) for one in CLEAN_ARRIVALS[:2]]
        failed = {"state": FAILED, "failed_reason": FailedReason.EXHAUSTED, "attempts": attempts}
        return judge([*refused, *CLEAN_ARRIVALS[2:]], replaced(CLEAN_STATUSES, 0, **failed)).broken()

    assert broken(attempt(500), attempt(500)) == {}
    assert broken(interrupted(late=True), attempt(500), attempt(500)) == {}
    assert broken(attempt(500, late=True), attempt(500)) == {"too few": 1}
    assert broken(interrupted(), attempt(500)) == {"too few": 1}


# What counts as what it counts as.


def alone(state: CallbackState, reason: FailedReason | None, *locks: CallbackLock, **changes: Any) -> CallbackStatus:
    """The only callback of its queue, which has no acceptance in its record."""
    return evolve(status("a", 1, *locks), **{"state": state, "failed_reason": reason, "attempts": (), **changes})


def broken_alone(one: CallbackStatus, *arrivals: Arrival, **known: Any) -> dict[str, int]:
    return judge(list(arrivals), [one], ("a",), **known).broken()


def test_nobody_but_an_operator_cancels() -> None:
    while_waiting = alone(CANCELLED, None)
    while_locked = alone(CANCELLED, None, lock(1, 0, 0.5), attempts=[attempt(500)])

    for one, arrivals in ((while_waiting, ()), (while_locked, (arrival("a", 1, 1, 0.1, None),))):
        assert broken_alone(one, *arrivals) == {"cancelled": 1}
        assert broken_alone(one, *arrivals, cancelled=["b"]) == {"cancelled": 1}
        assert broken_alone(one, *arrivals, cancelled=["a"]) == {}


@pytest.mark.parametrize(
    ("attempts", "is_borne_out"),
    [
        ([], False),
        ([attempt(500)], False),
        ([attempt(410), attempt(500)], False),
        ([attempt(500), attempt(410, late=True)], False),
        ([attempt(0, failure=AttemptFailure.DNS)], False),
        ([attempt(410)], True),
        ([attempt(500), attempt(410)], True),
        ([attempt(410), attempt(500, late=True)], True),
    ],
)
def test_only_a_final_answer_is_a_refusal(attempts: list[CallbackAttempt], is_borne_out: bool) -> None:
    refused = alone(FAILED, FailedReason.REFUSED, lock(1, 0, 0.5), lock(2, 1, 1.5), attempts=attempts)

    assert broken_alone(refused) == ({} if is_borne_out else {"unfounded": 1})


def test_whose_attempts_never_arrive_has_them_counted_all_the_same() -> None:
    locks = (lock(1, 0, 0.5), lock(2, 1, 1.5))

    def broken(*attempts: CallbackAttempt) -> dict[str, int]:
        return broken_alone(alone(FAILED, FailedReason.EXHAUSTED, *locks, attempts=attempts))

    unreachable = attempt(0, failure=AttemptFailure.CONNECT)
    assert broken(unreachable, unreachable) == {}
    assert broken(unreachable) == {"too few": 1}


def test_which_answers_are_final_is_the_hosts_choice() -> None:
    refused = alone(FAILED, FailedReason.REFUSED, lock(1, 0, 0.5), attempts=[attempt(404)])

    assert broken_alone(refused) == {"unfounded": 1}
    assert broken_alone(refused, final_statuses=[404, 422]) == {}


def test_who_was_abandoned_shows_locks_that_were() -> None:
    last = lock(2, 31, 31.1)

    assert broken_alone(alone(FAILED, FailedReason.ABANDONED, last)) == {"unfounded": 1}
    assert broken_alone(alone(FAILED, FailedReason.ABANDONED, lock(1, 0, 30), last)) == {"unfounded": 1}
    assert broken_alone(alone(FAILED, FailedReason.ABANDONED, lock(1, 0, 30, completed=False), last)) == {}


def test_what_can_not_be_read_fails_without_an_attempt() -> None:
    assert broken_alone(alone(FAILED, FailedReason.UNDECODABLE, lock(1, 0, 0.1))) == {}
    assert broken_alone(alone(FAILED, FailedReason.UNDECODABLE)) == {}


def test_what_was_accepted_must_not_be_recorded_as_refused() -> None:
    both = [arrival("a", 1, 1, 0.0), arrival("a", 1, 2, 1.0)]

    def broken(*attempts: CallbackAttempt, **known: Any) -> dict[str, int]:
        failed = alone(FAILED, FailedReason.EXHAUSTED, lock(1, 0, 0.5), lock(2, 1, 1.5), attempts=attempts)
        return broken_alone(failed, *both, bound=1, **known)

    assert broken(attempt(500), attempt(500)) == {"contradiction": 2}
    assert broken(attempt(0), attempt(500)) == {"contradiction": 1}
    assert broken(attempt(0), attempt(0)) == {}, "answers get lost"
    assert broken(attempt(500), attempt(500), stale_requests=[("a", 1), ("a", 2)]) == {}


def test_a_lock_that_was_given_back_has_no_attempt() -> None:
    # Given back was the first, or the second, or the last of three locks; only the first attempt's answer was lost.
    locks = (lock(1, 0, 0.1), lock(2, 1, 1.1), lock(3, 2, 2.1))

    def broken(accepted: int, *, codes: Sequence[int]) -> dict[str, int]:
        failed = alone(FAILED, FailedReason.EXHAUSTED, *locks, attempts=[attempt(code) for code in codes])
        return broken_alone(failed, arrival("a", 1, accepted, float(accepted)))

    assert [broken(token, codes=(0, 500)) for token in (1, 2, 3)] == [{}, {}, {"contradiction": 1}]
    assert [broken(token, codes=(500, 0)) for token in (1, 2, 3)] == [{"contradiction": 1}, {}, {}]


def test_what_was_accepted_under_a_lock_that_was_lost_need_not_be_known() -> None:
    locks = (lock(1, 0, 30, completed=False), lock(2, 30, 30.5), lock(3, 31, 31.5))
    failed = alone(FAILED, FailedReason.EXHAUSTED, *locks, attempts=[attempt(500), attempt(500)])

    assert broken_alone(failed, arrival("a", 1, 1, 0.0), arrival("a", 1, 2, 30.0, None)) == {}


def test_a_record_that_says_delivered_belongs_to_a_callback_that_was() -> None:
    def broken(state: CallbackState, *attempts: CallbackAttempt) -> dict[str, int]:
        one = alone(state, None, lock(1, 0, 0.5), lock(2, 1, 1.5), attempts=attempts)
        return broken_alone(one, arrival("a", 1, 2, 1.0), cancelled=["a"])

    assert broken(FAILED, attempt(500), attempt(200)) == {"contradiction": 1}
    assert broken(CANCELLED, attempt(500), attempt(204)) == {"contradiction": 1}
    assert broken(CANCELLED, attempt(500), attempt(0), attempt(200, late=True)) == {}, "too late for those two"
    assert broken(CallbackState.SUCCEEDED, attempt(500), attempt(0)) == {"contradiction": 1}
    assert broken(CallbackState.SUCCEEDED, attempt(200, late=True), attempt(500)) == {}


# Turns.


def two(first: CallbackStatus, *locks: CallbackLock, **changes: Any) -> list[CallbackStatus]:
    return [first, evolve(status("b", 2, *(locks or (lock(3, 1.2, 1.4),))), **changes)]


EXHAUSTED = alone(FAILED, FailedReason.EXHAUSTED, lock(1, 0, 0.5), lock(2, 3, 3.5), attempts=[attempt(500), attempt(0)])
FIRST_OF_A, ONLY_OF_B = arrival("a", 1, 1, 0.0, None), arrival("b", 2, 3, 1.2)


def turns(statuses: list[CallbackStatus], **known: Any) -> dict[str, int]:
    return judge([FIRST_OF_A, ONLY_OF_B], statuses, ("a", "b"), **known).broken()


def test_nobody_is_locked_before_those_in_front_are_over_whether_or_not_they_ever_arrive() -> None:
    # The second attempt of the first died in DNS, so that no receiver can tell when it was.
    assert turns(two(EXHAUSTED)) == {"early lock": 1}
    assert turns(two(EXHAUSTED, lock(3, 3.5, 4))) == {}
    assert turns([EXHAUSTED, status("b", 2, lock(3, 1.2, 1.4), queue="other")]) == {}


def test_what_is_still_open_lets_nobody_pass() -> None:
    waiting = evolve(EXHAUSTED, state=CallbackState.WAITING, failed_reason=None, locks=EXHAUSTED.locks[:1])

    assert turns(two(waiting)) == {"not drained": 1, "early lock": 1}


def test_what_was_cancelled_while_it_waited_tells_nobody_when() -> None:
    never_locked = alone(CANCELLED, None)
    after_its_first = alone(CANCELLED, None, lock(1, 0, 0.5), attempts=[attempt(500)])

    assert judge([ONLY_OF_B], two(never_locked), ("a", "b"), cancelled=["a"]).ok
    assert turns(two(after_its_first), cancelled=["a"]) == {}
    assert turns(two(after_its_first, lock(3, 0.3, 0.4)), cancelled=["a"])["early lock"] == 1


def test_what_was_cancelled_under_its_lock_is_over_with_that() -> None:
    lost = alone(CANCELLED, None, lock(1, 0, 30, completed=False))

    assert turns(two(lost, lock(3, 30, 31)), cancelled=["a"]) == {}
    assert turns(two(lost, lock(3, 29, 30)), cancelled=["a"]) == {"early lock": 1, "lock overlap": 1}


def test_a_queue_that_is_held_stays_closed_until_somebody_opens_it() -> None:
    holding = evolve(EXHAUSTED, request=evolve(EXHAUSTED.request, on_exhausted="hold"))
    statuses = two(holding, lock(3, 4, 5))

    assert turns(statuses) == {"early lock": 1}
    assert turns(statuses, cancelled=["a"]) == {}
    assert turns(two(holding), cancelled=["a"]) == {"early lock": 1}


def test_who_was_redelivered_at_the_tail_has_locks_from_before() -> None:
    statuses = two(EXHAUSTED, lock(3, 1.2, 1.4), lock(4, 4, 5))

    assert turns(statuses) == {"early lock": 1}
    assert turns(statuses, redelivered=["b"]) == {}
    assert turns(statuses, redelivered=["a"]) == {"early lock": 1}


def test_without_a_number_nobody_has_a_turn() -> None:
    assert turns(two(EXHAUSTED, sequence=0)) == {}


# Locks that were lost, and requests that were repeated.


def test_a_live_lock_is_taken_over_only_after_a_death() -> None:
    statuses = replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.5, completed=False), lock(2, 1, 1.5)))

    assert judge(statuses=statuses).ok, "nobody says who was killed"
    assert judge(statuses=statuses, excused=[]).broken() == {"takeover": 1}
    assert judge(statuses=statuses, excused=[("a", 2), ("b", 1)]).broken() == {"takeover": 1}
    assert judge(statuses=statuses, excused=[("a", 1)]).ok


def test_a_lock_that_has_timed_out_needs_no_death() -> None:
    locks = (lock(1, -30, 0, completed=False), lock(2, 1, 1.5))

    assert judge(statuses=replaced(CLEAN_STATUSES, 0, locks=locks), excused=[]).ok


def test_a_timeout_that_was_brought_forward_is_an_early_end_too() -> None:
    # As SQLite does with the locks of a dispatcher whose process has ended.
    brought_forward = evolve(lock(1, 0, 0.5, completed=False), timeout=START + timedelta(seconds=0.5))
    statuses = replaced(CLEAN_STATUSES, 0, locks=(brought_forward, lock(2, 1, 1.5)))

    assert judge(statuses=statuses, excused=[]).broken() == {"takeover": 1}
    assert judge(statuses=statuses, excused=[("a", 1)]).ok


def test_the_lease_of_another_machine_says_nothing() -> None:
    short = evolve(lock(1, 0, 0.5, completed=False), timeout=START + timedelta(seconds=0.5), machine_name="brisk")

    assert judge(statuses=replaced(CLEAN_STATUSES, 0, locks=(short, lock(2, 1, 1.5))), excused=[]).ok


TWICE = [arrival("a", 1, 1, 0.0), *CLEAN_ARRIVALS[1:]]


def test_only_what_befell_a_request_excuses_its_repetition() -> None:
    assert judge(TWICE, bound=9, excused=[]).broken() == {"duplicates": 1}
    assert judge(TWICE, excused=[("b", 1), ("a", 2)]).broken() == {"duplicates": 1}

    judgement = judge(TWICE, excused=[("a", 1)])

    assert judgement.ok
    assert (judgement.duplicates, judgement.duplicates_bound) == (1, 1)


def test_each_request_that_was_accepted_before_needs_its_own_excuse() -> None:
    thrice = [*TWICE, arrival("a", 1, 6, 1.6)]
    statuses = replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.5), lock(2, 1, 1.5), lock(6, 1.6, 1.7)))

    def broken(*tokens: int) -> int:
        excused = [("a", token) for token in tokens]
        return judge(thrice, statuses, excused=excused).broken().get("duplicates", 0)

    assert [broken(), broken(1), broken(2), broken(6), broken(1, 2)] == [2, 1, 2, 2, 0]


def test_a_slow_receiver_may_accept_the_request_of_the_dead_last() -> None:
    slow = [arrival("a", 1, 1, 0.9, 3.0), *CLEAN_ARRIVALS[1:]]
    statuses = replaced(CLEAN_STATUSES, 0, locks=(lock(1, 0, 0.95, completed=False), lock(2, 1, 1.5)))

    assert judge(slow, statuses, excused=[("a", 1)]).ok
    assert judge(slow, statuses, excused=[("a", 2)]).broken() == {"takeover": 1, "duplicates": 1}


def test_what_was_redelivered_may_be_accepted_again() -> None:
    assert judge(TWICE, excused=[], redelivered=["a"]).ok
