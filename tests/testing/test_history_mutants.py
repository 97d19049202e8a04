"""The judge: whatever is changed in the history of a real run, it names the promise that this breaks."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from attrs import evolve, frozen

from callbackq.core.models import CallbackLock, CallbackState, CallbackStatus, FailedReason
from callbackq.testing.history import RULES, Arrival, History, Judgement
from callbackq.testing.simulation import simulate

# How many seeds of each store. Together they hold kills, freezes, redeliveries, cancels, skips and held queues.
SEEDS = {"memory": 40, "sqlite": 10}
# So many places at least that each change must find in them.
FEWEST = 3
SUCCEEDED, FAILED, CANCELLED = CallbackState.SUCCEEDED, CallbackState.FAILED, CallbackState.CANCELLED
SECOND = timedelta(seconds=1)


@frozen
class Run:
    """What the judge is given of a run: requests, the final dump, and what is known of it."""

    arrivals: Sequence[Arrival]
    statuses: Sequence[CallbackStatus]
    known: dict[str, Any]

    def judge(self) -> Judgement:
        return History(self.arrivals, self.statuses, **self.known).judge()

    def of(self, id: str) -> list[Arrival]:
        return [one for one in self.arrivals if one.callback_id == id]

    def acceptance(self, id: str) -> Arrival | None:
        """The only one, by a dispatcher that did not stand still."""
        accepted = [one for one in self.of(id) if one.accepted is not None]
        is_plain = len(accepted) == 1 and (id, accepted[0].token) not in self.known["stale_requests"]
        return accepted[0] if is_plain else None

    def neighbours(self) -> Iterator[tuple[CallbackStatus, CallbackStatus]]:
        """Callbacks that follow each other in a queue, and kept their numbers from the beginning."""
        queues: dict[str, list[CallbackStatus]] = defaultdict(list)
        for status in self.statuses:
            if status.queue_id:
                queues[status.queue_id].append(status)
        for queue in queues.values():
            for before, after in pairwise(sorted(queue, key=lambda one: one.sequence)):
                if not {before.id, after.id} & set(self.known["redelivered"]):
                    yield before, after

    def accepted_neighbours(self) -> Iterator[tuple[Arrival, Arrival]]:
        for before, after in self.neighbours():
            one, other = self.acceptance(before.id), self.acceptance(after.id)
            if one is not None and other is not None:
                yield one, other

    def with_arrivals(self, *changed: tuple[Arrival, Arrival | None]) -> Run:
        """Put others in the place of some arrivals, or nothing."""
        instead = dict(changed)
        arrivals = [instead.get(one, one) for one in self.arrivals]
        return evolve(self, arrivals=[one for one in arrivals if one is not None])

    def with_status(self, status: CallbackStatus, **changes: Any) -> Run:
        return evolve(self, statuses=[evolve(one, **changes) if one is status else one for one in self.statuses])

    def with_lock(self, status: CallbackStatus, lock: CallbackLock, **changes: Any) -> Run:
        locks = [evolve(one, **changes) if one is lock else one for one in status.locks]
        return self.with_status(status, locks=locks)

    def locks(self) -> Iterator[tuple[CallbackStatus, CallbackLock]]:
        return ((status, lock) for status in self.statuses for lock in status.locks)

    def is_excused(self, status: CallbackStatus, lock: CallbackLock) -> bool:
        return (status.id, lock.token) in self.known["excused"]


def record_of(seed: int, store: str) -> Run:
    recorded: list[Run] = []

    def record(arrivals: Sequence[Arrival], statuses: Sequence[CallbackStatus], **known: Any) -> History:
        recorded.append(Run(list(arrivals), list(statuses), known))
        return History(arrivals, statuses, **known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("callbackq.testing.simulation.run"), "History", record)
        assert simulate(seed, store=store).ok
    return recorded[0]


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [record_of(seed, store) for store, seeds in SEEDS.items() for seed in range(seeds)]


Mutant = Callable[[Run], Iterator[Run]]
MUTANTS: dict[str, tuple[str, Mutant]] = {}
"""Changes by name: the rule that must be named, and one changed run for every place where it can be made."""


def breaks(rule: str) -> Callable[[Mutant], Mutant]:
    def enter(mutant: Mutant) -> Mutant:
        MUTANTS[mutant.__name__] = rule, mutant
        return mutant

    return enter


# What the receivers saw.


@breaks("contradiction")
def drop_an_acceptance(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        if status.state is SUCCEEDED:
            yield run.with_arrivals(*((one, evolve(one, accepted=None)) for one in run.of(status.id)))


@breaks("order")
def swap_two_acceptances_of_a_queue(run: Run) -> Iterator[Run]:
    for one, other in run.accepted_neighbours():
        yield run.with_arrivals(
            (one, evolve(one, accepted=other.accepted)), (other, evolve(other, accepted=one.accepted))
        )


@breaks("early start")
def start_before_the_one_in_front_is_accepted(run: Run) -> Iterator[Run]:
    for one, other in run.accepted_neighbours():
        assert one.accepted is not None
        yield run.with_arrivals((other, evolve(other, started=one.accepted - 1e-3)))


@breaks("stale")
def send_what_is_over_once_more(run: Run) -> Iterator[Run]:
    for one, other in run.accepted_neighbours():
        yield evolve(run, arrivals=[*run.arrivals, evolve(one, started=other.started + 1, accepted=None)])


@breaks("unrecorded")
def send_under_a_token_that_nobody_gave(run: Run) -> Iterator[Run]:
    for one in run.arrivals:
        yield run.with_arrivals((one, evolve(one, token=one.token + 10**6)))


@breaks("token order")
def swap_two_tokens_of_a_callback(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        for one, other in pairwise(run.of(status.id)):
            if {(status.id, one.token), (status.id, other.token)}.isdisjoint(run.known["stale_requests"]):
                yield run.with_arrivals((one, evolve(one, token=other.token)), (other, evolve(other, token=one.token)))


@breaks("duplicates")
def accept_once_more_without_an_excuse(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        accepted = run.acceptance(status.id)
        if accepted is not None and status.id not in run.known["redelivered"]:
            again = evolve(accepted, token=status.locks[-1].token + 1)
            unexcused = run.known["excused"] - {(status.id, accepted.token)}
            yield evolve(run, arrivals=[*run.arrivals, again], known={**run.known, "excused": unexcused})


# What the store says in the end.


@breaks("lost")
def drop_a_status(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        if status.id in run.known["acknowledged"]:
            yield evolve(run, statuses=[one for one in run.statuses if one is not status])


@breaks("not drained")
def leave_a_callback_waiting(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        yield run.with_status(status, state=CallbackState.WAITING, failed_reason=None)


@breaks("contradiction")
def deny_a_delivery(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        if any(200 <= one.status_code <= 299 and not one.late for one in status.attempts):
            yield run.with_status(status, state=FAILED, failed_reason=FailedReason.EXHAUSTED)
            yield run.with_status(status, state=CANCELLED)


@breaks("contradiction")
def record_an_acceptance_as_an_error(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        accepted = run.acceptance(status.id)
        tokens = [lock.token for lock in status.locks if lock.completed]
        kept = [one for one in status.attempts if not one.late]
        # One attempt for each lock: so it is known which is which.
        if accepted is not None and accepted.token in tokens and len(tokens) == len(kept):
            false = evolve(kept[tokens.index(accepted.token)], status_code=500, failure=None)
            attempts = [false if place == tokens.index(accepted.token) else one for place, one in enumerate(kept)]
            yield run.with_status(status, state=FAILED, failed_reason=FailedReason.EXHAUSTED, attempts=attempts)


@breaks("contradiction")
def claim_a_delivery(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        if status.state is FAILED and not any(200 <= one.status_code <= 299 for one in status.attempts):
            yield run.with_status(status, state=SUCCEEDED, failed_reason=None)


@breaks("cancelled")
def cancel_without_a_wish(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        if status.id not in run.known["cancelled"]:
            yield run.with_status(status, state=CANCELLED, failed_reason=None)


@breaks("unfounded")
def call_a_failure_a_refusal(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        if status.failed_reason is FailedReason.EXHAUSTED:
            yield run.with_status(status, failed_reason=FailedReason.REFUSED)


@breaks("unfounded")
def call_a_failure_abandoned(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        if status.state is FAILED and all(lock.completed for lock in status.locks):
            yield run.with_status(status, failed_reason=FailedReason.ABANDONED)


@breaks("too few")
def give_up_early(run: Run) -> Iterator[Run]:
    for status in run.statuses:
        counted = [one for one in status.attempts if one.is_counted]
        if status.failed_reason is FailedReason.EXHAUSTED and status.id not in run.known["redelivered"]:
            yield run.with_status(status, attempts=counted[1:])


# Its locks.


@breaks("lock overlap")
def extend_a_lock(run: Run) -> Iterator[Run]:
    for before, after in run.neighbours():
        if before.locks and after.locks:
            yield run.with_lock(before, before.locks[-1], ended=after.locks[0].acquired + SECOND)


@breaks("early lock")
def lock_before_the_one_in_front_is_over(run: Run) -> Iterator[Run]:
    for before, after in run.neighbours():
        if before.locks and after.locks:
            ended = before.locks[-1].ended
            assert isinstance(ended, datetime)
            yield run.with_lock(after, after.locks[0], acquired=ended - timedelta(microseconds=1))


@breaks("early lock")
def pass_what_holds_its_queue(run: Run) -> Iterator[Run]:
    for before, after in run.neighbours():
        if before.state is FAILED and before.request.on_exhausted == "hold" and after.locks:
            yield evolve(run, known={**run.known, "cancelled": run.known["cancelled"] - {before.id}})


@breaks("takeover")
def take_over_a_live_lock(run: Run) -> Iterator[Run]:
    for status, lock in run.locks():
        if lock.completed and not run.is_excused(status, lock):
            yield run.with_lock(status, lock, completed=False)


@breaks("takeover")
def shorten_an_abandoned_lock(run: Run) -> Iterator[Run]:
    for status, lock in run.locks():
        if not lock.completed:
            assert lock.ended is not None
            shorter = run.with_lock(status, lock, ended=lock.ended - (lock.ended - lock.acquired) / 2)
            unexcused = run.known["excused"] - {(status.id, lock.token)}
            yield evolve(shorter, known={**run.known, "excused": unexcused})


def test_the_runs_themselves_broke_nothing(runs: list[Run]) -> None:
    assert [run.judge().broken() for run in runs] == [{}] * len(runs)


def test_the_runs_hold_what_is_hard_to_judge(runs: list[Run]) -> None:
    statuses = [status for run in runs for status in run.statuses]

    assert {status.state for status in statuses} == {SUCCEEDED, FAILED, CANCELLED}
    assert {FailedReason.EXHAUSTED, FailedReason.REFUSED} <= {status.failed_reason for status in statuses}
    assert any(attempt.late for status in statuses for attempt in status.attempts)
    assert any(not lock.completed for status in statuses for lock in status.locks)
    assert any(run.known["redelivered"] for run in runs)


def test_nearly_every_rule_is_tried() -> None:
    # The delays and the number of requests are for the examples of test_history.py.
    assert {rule for rule, _ in MUTANTS.values()} == set(RULES) - {"too many", "too soon"}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_change_breaks_the_promise_that_it_should(runs: list[Run], name: str) -> None:
    rule, mutant = MUTANTS[name]
    broken = [changed.judge().broken() for run in runs for changed in mutant(run)]

    assert len(broken) >= FEWEST
    assert [one for one in broken if rule not in one] == []
