"""What storms are judged by: which duplicates a kill or a freeze explains, and which nothing does."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from attrs import evolve

from callbackq import CallbackAttempt, CallbackLock, CallbackRequest, CallbackState, CallbackStatus, RetryPhase
from callbackq.testing.history import Arrival

START = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=3)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def evidence() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("evidence")


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def lock(token: int, began: float, ended: float, machine: str, *, completed: bool = True) -> CallbackLock:
    return CallbackLock(
        acquired=at(began),
        timeout=at(began) + LEASE,
        ended=at(ended),
        completed=completed,
        machine_name=machine,
        token=token,
    )


def status(id: str, *locks: CallbackLock, queue: str = "q", sequence: int = 1) -> CallbackStatus:
    phases = [RetryPhase(retries=9, delay=timedelta(0))]
    return CallbackStatus(
        id=id,
        request=CallbackRequest(url="http://receiver.test/", queue_id=queue, retry_phases=phases),
        queue_id=queue,
        sequence=sequence,
        state=CallbackState.SUCCEEDED,
        attempts=[CallbackAttempt(status_code=200, time=START, duration=timedelta(0))],
        locks=locks,
    )


def arrival(id: str, token: int, started: float, *, queue: str = "q", sequence: int = 1) -> Arrival:
    accepted = started + 0.1
    return Arrival(
        callback_id=id, queue_id=queue, sequence=sequence, token=token, started=started, accepted=accepted
    )  # fmt: skip


def judge(
    evidence: ModuleType,
    folder: Path,
    arrivals: list[Arrival],
    statuses: list[CallbackStatus],
    interruptions: dict[str, list[Any]],
    *,
    acknowledged: tuple[tuple[str, str], ...] = (),
    outages: Sequence[Any] = (),
    sees_deaths: bool = False,
) -> Any:
    seen, stored, ended = (evidence.Evidence(folder, kind) for kind in ("arrivals", "acknowledged", "statuses"))
    for one in arrivals:
        seen.arrived(one)
    for id, queue_id in acknowledged:
        stored.acknowledged(id, queue_id)
    for status in statuses:
        ended.ended(status)
    for kind in (seen, stored, ended):
        kind.close()
    return evidence.judge(folder, interruptions, outages, lease=LEASE, sees_deaths=sees_deaths)


TAKEN_OVER = status("a", lock(1, 0, 3.5, "m1", completed=False), lock(2, 3.5, 4, "m2"))
TWICE = [arrival("a", 1, 0.5), arrival("a", 2, 3.6)]


def test_a_kill_explains_one_duplicate_of_what_was_in_flight(evidence: ModuleType, tmp_path: Path) -> None:
    killed = {"m1": [evidence.Interruption(began=at(1))]}

    verdict = judge(evidence, tmp_path, TWICE, [TAKEN_OVER], killed)

    assert verdict.is_ok()
    assert (verdict.duplicates, verdict.in_flight) == (1, 1)
    assert verdict.hit == {("m1", 0)}


@pytest.mark.parametrize("machine", ["m2", "m3"])
def test_a_kill_of_another_explains_nothing(evidence: ModuleType, tmp_path: Path, machine: str) -> None:
    killed = {machine: [evidence.Interruption(began=at(1))]}

    verdict = judge(evidence, tmp_path, TWICE, [TAKEN_OVER], killed)

    assert not verdict.is_ok()
    assert (verdict.broken, verdict.abandoned_by_others) == ({"duplicates": 1}, 1)


def test_a_duplicate_is_not_explained_by_what_was_in_flight_of_another_callback(
    evidence: ModuleType, tmp_path: Path
) -> None:
    other = status("b", lock(5, 5, 6, "m2"), lock(6, 7, 8, "m2"), sequence=2)
    arrivals = [TWICE[1], arrival("b", 5, 5.1, sequence=2), arrival("b", 6, 7.1, sequence=2)]
    killed = {"m1": [evidence.Interruption(began=at(1))]}

    verdict = judge(evidence, tmp_path, arrivals, [TAKEN_OVER, other], killed)

    assert (verdict.duplicates, verdict.in_flight) == (1, 1), "the sum is within the sum of what was in flight"
    assert verdict.broken == {"duplicates": 1}
    assert verdict.figures()["duplicates_unexplained"] == 1
    assert not verdict.is_ok()


def test_a_kill_explains_another_request_than_its_own_no_more_than_it_explains_another_callback(
    evidence: ModuleType, tmp_path: Path
) -> None:
    # The first request was refused, and its dispatcher killed; two others had theirs accepted.
    thrice = status("a", *TAKEN_OVER.locks, lock(3, 5, 6, "m2"))
    killed = {"m1": [evidence.Interruption(began=at(1))]}

    verdict = judge(evidence, tmp_path, [TWICE[1], arrival("a", 3, 5.1)], [thrice], killed)

    assert (verdict.duplicates, verdict.in_flight) == (1, 1)
    assert verdict.broken == {"duplicates": 1}


def test_what_a_slow_receiver_accepts_of_somebody_killed_after_his_successors_is_explained(
    evidence: ModuleType, tmp_path: Path
) -> None:
    slow = [evolve(TWICE[0], accepted=9.0), TWICE[1]]
    killed = {"m1": [evidence.Interruption(began=at(1))]}

    assert judge(evidence, tmp_path, slow, [TAKEN_OVER], killed).is_ok()


def test_what_may_be_tried_forever_must_be_delivered(evidence: ModuleType, tmp_path: Path) -> None:
    failed = evolve(TAKEN_OVER, state=CallbackState.FAILED, attempts=())

    verdict = judge(evidence, tmp_path, TWICE[:1], [failed], {"m1": [evidence.Interruption(began=at(1))]})

    assert verdict.broken == {}
    assert verdict.figures()["lost"] == verdict.undelivered == 1
    assert not verdict.is_ok()


@pytest.mark.parametrize(("ended", "is_ok"), [(None, False), (0.1, True), (-0.1, False)])
def test_a_lock_may_be_abandoned_without_a_kill_only_if_the_server_was_away(
    evidence: ModuleType, tmp_path: Path, ended: float | None, is_ok: bool
) -> None:
    outages = [] if ended is None else [evidence.Interruption(began=at(-1), ended=at(ended))]

    verdict = judge(evidence, tmp_path, TWICE[1:], [TAKEN_OVER], {}, outages=outages)

    assert (verdict.abandoned_by_others, verdict.held_up) == ((0, 1) if is_ok else (1, 0))
    assert verdict.is_ok() is is_ok


def test_a_freeze_explains_what_other_dispatchers_could_not_record(evidence: ModuleType, tmp_path: Path) -> None:
    frozen = {"m3": [evidence.Interruption(began=at(1), ended=at(5), resumed=5.0)]}

    verdict = judge(evidence, tmp_path, TWICE, [TAKEN_OVER], frozen)

    assert verdict.is_ok()
    assert (verdict.in_flight, verdict.held_up) == (0, 1)


@pytest.mark.parametrize(("began", "ended"), [(0.5, 1.5), (2.9, 6.0)])
def test_a_freeze_explains_no_lock_of_others_whose_result_it_did_not_keep_from_being_recorded(
    evidence: ModuleType, tmp_path: Path, began: float, ended: float
) -> None:
    frozen = {"m3": [evidence.Interruption(began=at(began), ended=at(ended), resumed=ended)]}

    verdict = judge(evidence, tmp_path, TWICE, [TAKEN_OVER], frozen)

    assert (verdict.held_up, verdict.abandoned_by_others) == (0, 1)
    assert verdict.broken == {"duplicates": 1}


@pytest.mark.parametrize("brings_forward", [False, True], ids=["the timeout stays", "the timeout is brought forward"])
@pytest.mark.parametrize(
    ("machine", "thaws", "sees_deaths", "is_ok"),
    [
        ("m1", None, True, True),  # killed, and the store saw it
        ("m1", None, False, False),
        ("m1", 4.5, True, False),  # frozen, and alive
        ("m3", 4.5, True, False),  # somebody else was
    ],
)
def test_a_lock_may_be_taken_over_early_only_from_somebody_whose_death_the_store_sees(
    evidence: ModuleType,
    tmp_path: Path,
    machine: str,
    thaws: float | None,
    sees_deaths: bool,
    is_ok: bool,
    brings_forward: bool,
) -> None:
    early = lock(1, 0, 2, "m1", completed=False)
    early = evolve(early, timeout=early.ended) if brings_forward else early
    interruption = evidence.Interruption(began=at(1), ended=thaws and at(thaws), resumed=thaws or float("inf"))
    arrivals, taken = [TWICE[0], arrival("a", 2, 2.1)], status("a", early, lock(2, 2, 2.5, "m2"))

    verdict = judge(evidence, tmp_path, arrivals, [taken], {machine: [interruption]}, sees_deaths=sees_deaths)

    assert verdict.broken == ({} if is_ok else {"takeover": 1})
    assert verdict.is_ok() is is_ok
    assert verdict.figures()["overlapping_locks"] == (0 if is_ok else 1)


@pytest.mark.parametrize(("ended", "unexplained"), [(4.0, 0), (1.5, 1)])
def test_a_freeze_explains_an_answer_that_was_missed_only_of_a_lock_that_outlasted_it(
    evidence: ModuleType, tmp_path: Path, ended: float, unexplained: int
) -> None:
    missed = status("a", lock(1, 0, ended, "m1"), lock(2, 4.5, 5, "m1"))
    frozen = {"m1": [evidence.Interruption(began=at(1), ended=at(3.5), resumed=3.5)]}

    verdict = judge(evidence, tmp_path, [arrival("a", 1, 0.5), arrival("a", 2, 4.6)], [missed], frozen)

    assert verdict.broken["duplicates"] == unexplained
    assert verdict.is_ok() is not bool(unexplained)


@pytest.mark.parametrize("late", [1, 2])
def test_one_request_may_leave_late_after_a_freeze_and_no_more(evidence: ModuleType, tmp_path: Path, late: int) -> None:
    queues = [f"q{number}" for number in range(late)]
    statuses = [
        status(queue, lock(2 * nth + 1, 0, 3.5, "m1", completed=False), lock(2 * nth + 2, 3.5, 4, "m2"), queue=queue)
        for nth, queue in enumerate(queues)
    ]
    arrivals = [
        arrival(queue, 2 * nth + 2 - past, 4.5 if past else 3.6, queue=queue)
        for nth, queue in enumerate(queues)
        for past in (True, False)
    ]
    frozen = {"m1": [evidence.Interruption(began=at(1), ended=at(4.2), resumed=4.2)]}

    verdict = judge(evidence, tmp_path, arrivals, statuses, frozen)

    assert verdict.broken == {}
    assert verdict.sent_late == {("m1", 0): late}
    assert verdict.is_ok() is (late == 1)


def test_what_is_missing_is_found_in_any_portion(evidence: ModuleType, tmp_path: Path) -> None:
    acknowledged = tuple((f"callback-{number}", f"q{number % 7}" if number % 2 else "") for number in range(500))

    verdict = judge(evidence, tmp_path, [], [], {}, acknowledged=acknowledged)

    assert verdict.broken == {"lost": 500}
    assert verdict.figures()["lost"] == 500


def test_a_queue_lies_whole_in_one_portion(evidence: ModuleType, tmp_path: Path) -> None:
    statuses = [
        status(f"c{number}", lock(number, number, number + 0.5, "m1"), sequence=number) for number in range(1, 40)
    ]
    backwards = [arrival(f"c{number}", number, 50.0 - number, sequence=number) for number in range(1, 40)]

    verdict = judge(evidence, tmp_path, backwards, statuses, {})

    assert verdict.broken["order"] == 38
