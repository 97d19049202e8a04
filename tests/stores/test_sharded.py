"""Several stores as one: where what lies, and what is left when one of them fails."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbackq.core.lifecycle import Action, Transition
from callbackq.core.models import CallbackAttempt, CallbackRequest, CallbackState, FailedReason
from callbackq.dataaccess import (
    Acquired,
    AttemptRecord,
    DataAccess,
    Durability,
    SupportsBackup,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
)
from callbackq.errors import (
    CallbackNotFoundError,
    ConflictError,
    DataAccessError,
    InvalidRequestError,
    LockLostError,
    SchemaVersionError,
    TransientDataAccessError,
)
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.stores.sharded import ShardedDataAccess
from callbackq.stores.sharded.routing import draw_id, shard_of
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock
from support.outages import FrailStore

MINUTE = timedelta(minutes=1)
MOMENT = timedelta(milliseconds=1)
DELIVERED = Transition(state=CallbackState.SUCCEEDED, counted=True)
OWING = Transition(state=CallbackState.FAILED, counted=True, notify=True, failed_reason=FailedReason.EXHAUSTED)
SHARDS = 3
HOMES = [
    next(f"q{number}" for number in range(99) if shard_of(f"q{number}", SHARDS) == shard) for shard in range(SHARDS)
]
"""A queue of each shard."""


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def shards(clock: FakeClock) -> list[FrailStore]:
    return [FrailStore(clock) for _ in range(SHARDS)]


@pytest.fixture
def store(shards: list[FrailStore], clock: FakeClock) -> Any:
    # Any: whether it can list and purge depends on its shards, and these can.
    return ShardedDataAccess(shards, clock=clock)


def request(queue_id: str = "", **fields: Any) -> CallbackRequest:
    return CallbackRequest(url="https://receiver.example/hook", queue_id=queue_id, **fields)


def one_in_each(store: DataAccess) -> list[str]:
    """Store a callback in each shard, and say their ids."""
    return [store.store_callback_request(request(queue)).id for queue in HOMES]


def acquire(store: DataAccess, limit: int = 100) -> list[Acquired]:
    return store.acquire_locks("machine", lock_timeout=MINUTE, limit=limit)


def queues(acquired: list[Acquired]) -> list[str]:
    return sorted(one.queue_id for one in acquired)


def attempt(store: DataAccess) -> CallbackAttempt:
    return CallbackAttempt(status_code=200, time=datetime(2026, 1, 1, tzinfo=UTC), duration=timedelta(0))


def end(store: DataAccess, acquired: Acquired, transition: Transition = DELIVERED) -> None:
    store.record_attempt(acquired, attempt(store), transition)


# Where what lies.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", [0, 1, 2, 2, 2, 5, 5]),
        ("order-1", [0, 1, 2, 2, 2, 10, 10]),
        ("order-2", [0, 0, 0, 0, 4, 6, 6]),
        ("Überweisung", [0, 0, 0, 0, 0, 10, 10]),
        ("\U0001f600", [0, 1, 1, 1, 1, 11, 11]),
    ],
)
def test_a_name_belongs_to_the_same_shard_in_every_release(name: str, expected: list[int]) -> None:
    assert [shard_of(name, shards) for shards in (1, 2, 3, 4, 5, 16, 17)] == expected


@given(st.text(max_size=20), st.integers(1, 64))
def test_a_shard_more_at_the_end_takes_names_over_and_moves_no_other(name: str, shards: int) -> None:
    before, after = shard_of(name, shards), shard_of(name, shards + 1)

    assert 0 <= before < shards
    assert after in (before, shards)


@pytest.mark.parametrize("shards", [2, 5, 16])
def test_names_spread_evenly(shards: int) -> None:
    loads = Counter(shard_of(f"order-{number}", shards) for number in range(1000 * shards))

    assert all(900 < loads[shard] < 1100 for shard in range(shards))


@given(st.integers(0, 6))
def test_a_drawn_id_belongs_to_the_shard_it_was_drawn_for(shard: int) -> None:
    ids = {draw_id(shard, 7, datetime(2026, 1, 1, tzinfo=UTC)) for _ in range(5)}

    assert len(ids) == 5
    assert {shard_of(id, 7) for id in ids} == {shard}


def test_each_queue_lies_whole_in_one_shard(store: Any, shards: list[FrailStore]) -> None:
    for _ in range(4):
        one_in_each(store)

    for number, shard in enumerate(shards):
        assert [status.queue_id for status in shard.list_callbacks()] == [HOMES[number]] * 4
        assert [status.sequence for status in shard.list_callbacks()] == [1, 2, 3, 4]


def test_whoever_asks_for_an_id_that_was_drawn_here_asks_one_shard(store: Any, shards: list[FrailStore]) -> None:
    ids = [*one_in_each(store), *(store.store_callback_request(request()).id for _ in range(9))]
    for shard in shards:
        shard.calls.clear()

    for id in ids:
        store.get_callback_status(id)

    assert sum(len(shard.calls) for shard in shards) == len(ids)


def test_an_id_of_the_callers_is_found_wherever_it_lies(store: Any) -> None:
    for id in ("a", "b", "c", "d"):
        for queue in HOMES:
            store.store_callback_request(request(queue), id=f"{id}-{queue}")

            assert store.get_callback_status(f"{id}-{queue}").queue_id == queue
            assert store.request_transition(f"{id}-{queue}", Action.CANCEL).state is CallbackState.CANCELLED


# One id, one callback.


@pytest.mark.parametrize("first", ["", *HOMES])
@pytest.mark.parametrize("other", ["", *HOMES])
def test_an_id_is_refused_for_another_queue_wherever_that_lies(store: Any, first: str, other: str) -> None:
    for id in ("a", "b", "c", "d"):
        before = store.store_callback_request(request(first), id=id)
        if first == other:
            assert store.store_callback_request(request(other), id=id) == before
            continue

        for store_other in (store.store_callback_request, lambda it, id: store.store_callback_requests([it], ids=[id])):
            with pytest.raises(ConflictError):
                store_other(request(other), id=id)

    assert len(list(store.list_callbacks())) == 4


def test_an_id_with_two_queues_in_a_batch_is_refused_before_anything_is_written(store: Any) -> None:
    with pytest.raises(ConflictError):
        store.store_callback_requests([request(queue) for queue in HOMES], ids=["a", "b", "a"])

    assert list(store.list_callbacks()) == []


@pytest.mark.parametrize("down", range(SHARDS))
def test_while_a_shard_is_down_no_id_that_it_holds_is_stored_elsewhere(
    store: Any, shards: list[FrailStore], down: int
) -> None:
    store.store_callback_request(request(HOMES[down]), id="there")
    with shards[down].down():
        for queue in HOMES:
            with pytest.raises(DataAccessError) as refused:
                store.store_callback_request(request(queue), id="there")
            # The queue's own shard says for itself what it knows; elsewhere nothing was written.
            assert isinstance(refused.value, TransientDataAccessError) == (queue != HOMES[down])

    assert [status.queue_id for status in store.list_callbacks()] == [HOMES[down]]
    with pytest.raises(ConflictError):
        store.store_callback_request(request(HOMES[down - 1]), id="there")


def test_a_call_that_is_repeated_needs_its_own_shard_only(store: Any, shards: list[FrailStore]) -> None:
    before = store.store_callback_request(request(HOMES[0]), id="repeated")

    with shards[1].down(), shards[2].down():
        assert store.store_callback_request(request(HOMES[0]), id="repeated") == before


def test_a_call_that_is_repeated_after_a_shard_was_added_stores_nothing_anew(clock: FakeClock) -> None:
    stores = [InMemoryDataAccess(clock=clock) for _ in range(4)]
    before = ShardedDataAccess(stores[:3], clock=clock)
    moved = [name for name in map(str, range(60)) if shard_of(name, 4) == 3]
    stored = [before.store_callback_request(request(queue), id=f"id-{queue}") for queue in moved]

    after = ShardedDataAccess(stores, clock=clock)

    assert moved
    assert [after.store_callback_request(one.request, id=one.id) for one in stored] == stored


# One shard is down.


def test_storing_without_an_id_needs_the_queues_shard_only(store: Any, shards: list[FrailStore]) -> None:
    with shards[1].down():
        store.store_callback_request(request(HOMES[0]))
        store.store_callback_requests([request(HOMES[2])] * 2)
        with pytest.raises(DataAccessError):
            store.store_callback_request(request(HOMES[1]))

    assert [len(list(shard.list_callbacks())) for shard in shards] == [1, 0, 2]


@pytest.mark.parametrize("down", range(SHARDS))
@pytest.mark.parametrize("error", [TransientDataAccessError("x"), DataAccessError("x"), KeyError("a bug")], ids=repr)
def test_locks_of_the_healthy_are_given_and_none_is_lost(
    store: Any, shards: list[FrailStore], down: int, error: Exception
) -> None:
    one_in_each(store)
    healthy = [queue for number, queue in enumerate(HOMES) if number != down]

    for only in ({"next_due"}, {"now"}, {"acquire_locks"}, None):
        with shards[down].down(error, only=only):
            acquired = acquire(store)
            assert queues(acquired) == sorted(healthy)
            for one in acquired:
                store.release_lock(one)
        shards[down]._clock.advance(301.0)  # type: ignore[attr-defined]

    assert queues(acquire(store)) == sorted(HOMES)


def test_locks_are_kept_when_their_shard_fails_right_after(store: Any, shards: list[FrailStore]) -> None:
    for _ in range(4):
        store.store_callback_request(request())
    real = InMemoryDataAccess.acquire_locks
    for shard in shards:

        def acquire_and_break(*args: Any, shard: FrailStore = shard, **kwargs: Any) -> list[Acquired]:
            locked = real(shard, *args, **kwargs)
            shard.error = DataAccessError("gone")
            return locked

        shard.acquire_locks = acquire_and_break  # type: ignore[method-assign]

    assert acquire(store, limit=1)


def test_what_is_next_due_is_told_of_the_healthy(store: Any, shards: list[FrailStore], clock: FakeClock) -> None:
    assert store.next_due() is None
    one_in_each(store)
    for acquired in acquire(store):
        delay = MINUTE * (1 + HOMES.index(acquired.queue_id))
        end(store, acquired, Transition(state=CallbackState.WAITING, delay=delay))
    assert store.next_due() == store.now() + MINUTE

    with shards[0].down():
        assert store.next_due() == store.now() + 2 * MINUTE


@pytest.mark.parametrize("call", ["acquire", "next_due", "now", "open", "acquire_notifications"])
def test_when_all_are_down_that_is_said(store: Any, shards: list[FrailStore], call: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "acquire": lambda: acquire(store),
        "acquire_notifications": lambda: store.acquire_notifications(lock_timeout=MINUTE, limit=1),
    }
    for shard in shards:
        shard.error = TransientDataAccessError("busy")

    for _ in range(3):  # while they rest, too
        with pytest.raises(TransientDataAccessError):
            calls.get(call, lambda: getattr(store, call)())()
    shards[1].error = DataAccessError("nobody knows what was written")
    with pytest.raises(DataAccessError, match="nobody knows"):
        calls.get(call, lambda: getattr(store, call)())()


def test_a_callback_is_found_while_others_are_down(store: Any, shards: list[FrailStore]) -> None:
    for number, queue in enumerate(HOMES):
        for id in ("a", "b", "c", "d", "e", "f"):
            store.store_callback_request(request(queue), id=f"{id}{number}")
    others = {0: (1, 2), 1: (0, 2), 2: (0, 1)}

    for number in range(SHARDS):
        with shards[others[number][0]].down(), shards[others[number][1]].down():
            for id in ("a", "b", "c", "d", "e", "f"):
                assert store.get_callback_status(f"{id}{number}").id == f"{id}{number}"
                store.request_transition(f"{id}{number}", Action.CANCEL)


def test_a_callback_that_a_shard_that_is_down_may_hold_is_not_said_to_be_unknown(
    store: Any, shards: list[FrailStore]
) -> None:
    with shards[2].down():
        for call in (store.get_callback_status, lambda id: store.request_transition(id, Action.CANCEL)):
            with pytest.raises(DataAccessError):
                call("unknown")

    with pytest.raises(CallbackNotFoundError):
        store.get_callback_status("unknown")


@pytest.mark.parametrize("error", [TransientDataAccessError("x"), DataAccessError("x")], ids=repr)
def test_a_batch_reaches_the_healthy_and_is_repeated_without_harm(
    store: Any, shards: list[FrailStore], error: Exception
) -> None:
    requests = [request(queue) for queue in HOMES * 2]
    ids = [f"id-{number}" for number in range(6)]
    with shards[1].down(error, only={"store_callback_requests"}):
        with pytest.raises(DataAccessError) as raised:
            store.store_callback_requests(requests, ids=ids)
        assert not isinstance(raised.value, TransientDataAccessError)  # something was written
    assert sorted(status.id for status in store.list_callbacks()) == ["id-0", "id-2", "id-3", "id-5"]

    statuses = store.store_callback_requests(requests, ids=ids)

    assert [status.id for status in statuses] == ids
    assert [status.sequence for status in statuses] == [1, 1, 1, 2, 2, 2]


def test_a_batch_for_one_shard_that_is_busy_has_written_nothing(store: Any, shards: list[FrailStore]) -> None:
    with shards[1].down(TransientDataAccessError("busy")), pytest.raises(TransientDataAccessError):
        store.store_callback_requests([request(HOMES[1])] * 2)

    assert list(store.list_callbacks()) == []


def test_results_reach_the_healthy_and_are_repeated_without_harm(store: Any, shards: list[FrailStore]) -> None:
    ids = one_in_each(store)
    records = [
        AttemptRecord(acquired=one, attempt=attempt(store), transition=DELIVERED)
        for one in sorted(acquire(store), key=lambda one: HOMES.index(one.queue_id))
    ]
    with shards[1].down(), pytest.raises(DataAccessError):
        store.record_attempts(records)
    states = [CallbackState.SUCCEEDED, CallbackState.LOCKED, CallbackState.SUCCEEDED]
    assert [store.get_callback_status(id).state for id in ids] == states
    store._clock.advance(MOMENT)

    results = store.record_attempts(records)

    assert [result.state for result in results] == [CallbackState.SUCCEEDED] * 3
    assert [len(store.get_callback_status(id).attempts) for id in ids] == [1, 1, 1]


def test_results_whose_locks_were_lost_are_told_in_their_places(store: Any) -> None:
    one_in_each(store)
    locks = sorted(acquire(store), key=lambda one: one.queue_id)
    store.release_lock(locks[1])

    results = store.record_attempts(
        [AttemptRecord(acquired=one, attempt=None, transition=DELIVERED) for one in reversed(locks)]
    )

    assert [isinstance(result, LockLostError) for result in results] == [False, True, False]


def test_locks_are_given_back_to_the_healthy(store: Any, shards: list[FrailStore]) -> None:
    ids = one_in_each(store)
    locks = [(one, timedelta(0)) for one in acquire(store)]

    with shards[1].down(), pytest.raises(DataAccessError):
        store.release_locks(locks)

    states = [CallbackState.WAITING, CallbackState.LOCKED, CallbackState.WAITING]
    assert [store.get_callback_status(id).state for id in ids] == states


def test_a_listing_shows_all_there_is_before_it_says_what_is_missing(store: Any, shards: list[FrailStore]) -> None:
    ids = one_in_each(store)
    seen = []

    with shards[0].down():
        with pytest.raises(DataAccessError):
            seen.extend(status.id for status in store.list_callbacks())
        of_a_queue = [status.id for status in store.list_callbacks(queue_id=HOMES[1])]

    assert seen == ids[1:]
    assert of_a_queue == [ids[1]]


def test_a_purge_goes_on_in_the_healthy(store: Any, shards: list[FrailStore]) -> None:
    for _ in range(2):
        one_in_each(store)
        for acquired in acquire(store):
            end(store, acquired)

    with shards[0].down():
        assert [store.purge(finished_for=timedelta(0), limit=3) for _ in range(2)] == [3, 1]
        with pytest.raises(DataAccessError):
            store.purge(finished_for=timedelta(0))
    assert store.purge(finished_for=timedelta(0)) == 2


def test_a_purge_spreads_its_limit(store: Any, shards: list[FrailStore]) -> None:
    for _ in range(4):
        one_in_each(store)
        for acquired in acquire(store):
            end(store, acquired)

    store.purge(finished_for=timedelta(0), limit=6)

    assert [len(list(shard.list_callbacks())) for shard in shards] == [2, 2, 2]


def test_the_others_are_closed_when_one_can_not_be(store: Any, shards: list[FrailStore]) -> None:
    closed = []
    for number, shard in enumerate(shards):

        def close(number: int = number) -> None:
            closed.append(number)
            if number == 0:
                raise DataAccessError("gone")

        shard.close = close  # type: ignore[method-assign]

    with pytest.raises(DataAccessError, match="gone"):
        store.close()

    assert closed == [0, 1, 2]


def test_it_opens_without_the_one_that_is_down(store: Any, shards: list[FrailStore]) -> None:
    with shards[1].down():
        store.open()
        store.store_callback_request(request(HOMES[0]))

        assert queues(acquire(store)) == [HOMES[0]]


def test_data_of_a_newer_release_is_told_of_at_once(store: Any, shards: list[FrailStore]) -> None:
    with shards[1].down(SchemaVersionError(found=9, expected=1)), pytest.raises(SchemaVersionError):
        store.open()


# How long it is left alone.


def test_a_shard_that_fails_is_asked_less_and_less_and_the_log_says_so_once(
    store: Any, shards: list[FrailStore], clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    one_in_each(store)
    with shards[1].down():
        for _ in range(4 * 600):  # ten minutes of polling
            acquire(store)
            store.next_due()
            clock.advance(0.25)
        assert 15 < shards[1].calls.count("next_due") < 60
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "shard 1 of 3 fails" in caplog.text

    clock.advance(30.0)

    assert HOMES[1] in queues(acquire(store))
    assert [record.getMessage() for record in caplog.records[1:]] == ["shard 1 of 3 works again"]


def test_a_shard_that_comes_and_goes_does_not_flood_the_log(
    store: Any, shards: list[FrailStore], clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(600):
        with shards[1].down():
            acquire(store)
        clock.advance(0.5)
        acquire(store)
        clock.advance(0.5)

    assert len(caplog.records) <= 2 * 11


def test_a_shard_that_can_be_read_but_not_written_to_has_not_recovered(
    store: Any, shards: list[FrailStore], clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    one_in_each(store)
    with shards[1].down(only={"acquire_locks"}):
        for _ in range(4 * 120):
            acquire(store)
            store.next_due()
            clock.advance(0.25)

    assert 5 < shards[1].calls.count("acquire_locks") < 20
    assert len(caplog.records) == 1


def test_a_shard_that_takes_long_to_fail_holds_the_others_up_a_third_of_the_time(
    store: Any, shards: list[FrailStore], clock: FakeClock
) -> None:
    one_in_each(store)
    began = clock.monotonic()

    with shards[1].down(takes=timedelta(seconds=10), only={"acquire_locks"}):
        while clock.monotonic() < began + 1000:
            acquire(store)
            clock.advance(0.5)

    # Chance draws the rests of faults in a row, up to 30 s, where that is longer than the 20 of a slow one.
    assert 1000 // (10 + 30.5) <= shards[1].calls.count("acquire_locks") <= 1000 // (10 + 20) + 1


def test_a_shard_that_takes_very_long_to_fail_is_asked_again_after_a_minute(
    store: Any, shards: list[FrailStore], clock: FakeClock
) -> None:
    one_in_each(store)
    with shards[1].down(takes=timedelta(minutes=5)):
        store.next_due()

    clock.advance(59.0)
    assert HOMES[1] not in queues(acquire(store))
    clock.advance(2.0)
    assert HOMES[1] in queues(acquire(store))


def test_results_for_a_shard_that_takes_long_to_fail_leave_the_others_their_turn(
    store: Any, shards: list[FrailStore], clock: FakeClock
) -> None:
    """One turn after the first fault, half of the time in a long outage: there is no lock left to be in time for."""
    one_in_each(store)
    records = [AttemptRecord(acquired=one, attempt=None, transition=DELIVERED) for one in acquire(store)]
    began = clock.monotonic()

    with shards[1].down(takes=timedelta(seconds=10)):
        while clock.monotonic() < began + 600:
            with pytest.raises(DataAccessError):
                store.record_attempts(records)
            clock.advance(1.0)

    assert 28 < shards[1].calls.count("record_attempts") < 33
    clock.advance(20.0)
    assert [result.state for result in store.record_attempts(records)] == [CallbackState.SUCCEEDED] * 3


def test_results_are_recorded_before_their_locks_time_out_when_a_silent_shard_is_back(
    store: Any, shards: list[FrailStore], clock: FakeClock
) -> None:
    one_in_each(store)
    acquired = store.acquire_locks("machine", lock_timeout=timedelta(seconds=30), limit=100)
    records = [AttemptRecord(acquired=one, attempt=None, transition=DELIVERED) for one in acquired]
    with shards[1].down(takes=timedelta(seconds=20)), pytest.raises(DataAccessError):
        store.record_attempts(records)
    with pytest.raises(TransientDataAccessError, match="took long to fail"):
        store.record_attempts(records[1:2])

    clock.advance(1.0)

    assert [result.state for result in store.record_attempts(records)] == [CallbackState.SUCCEEDED] * 3
    store.store_callback_request(request(HOMES[1]))
    assert queues(acquire(store)) == [HOMES[1]], "a shard that takes results is left alone no longer"


def test_a_fault_that_came_fast_shortens_no_rest_of_results(
    store: Any, shards: list[FrailStore], clock: FakeClock
) -> None:
    one_in_each(store)
    records = [AttemptRecord(acquired=one, attempt=None, transition=DELIVERED) for one in acquire(store)]
    with shards[1].down(takes=timedelta(seconds=20)), pytest.raises(DataAccessError):
        store.record_attempts(records)
    with shards[1].down(), pytest.raises(DataAccessError):
        store._shards.all[1].look()

    with pytest.raises(TransientDataAccessError, match="took long to fail"):
        store.record_attempts(records[1:2])


def test_a_shard_that_took_long_to_fail_holds_up_neither_results_nor_locks_again_at_once(
    store: Any, shards: list[FrailStore], clock: FakeClock
) -> None:
    one_in_each(store)
    records = [AttemptRecord(acquired=one, attempt=None, transition=DELIVERED) for one in acquire(store)]
    with shards[1].down(takes=timedelta(seconds=10)):
        with pytest.raises(DataAccessError):
            store.record_attempts(records)
        began = clock.monotonic()
        acquire(store)
        store.next_due()
        assert clock.monotonic() == began, "not asked"

        clock.advance(25.0)
        store.next_due()
        asked = clock.monotonic()
        with pytest.raises(TransientDataAccessError, match="took long to fail"):
            store.record_attempts(records[1:2])
        assert clock.monotonic() == asked == began + 35, "asked once"


def test_a_call_that_needs_a_resting_shard_asks_it(store: Any, shards: list[FrailStore]) -> None:
    ids = one_in_each(store)
    with shards[1].down():
        acquire(store)

    assert HOMES[1] not in queues(acquire(store))
    assert store.get_callback_status(ids[1]).state is CallbackState.WAITING
    assert store.store_callback_request(request(HOMES[1])).sequence == 2


# Whose turn it is.


def test_no_shard_starves_behind_the_backlog_of_another(store: Any, clock: FakeClock) -> None:
    for number in range(600):
        store.store_callback_request(request(f"{HOMES[0]}" if number == 0 else ""))
        clock.advance(0.001)
    late = [store.store_callback_request(request(f"late-{number}")).id for number in range(30)]
    seen: list[str] = []

    while len(seen) < 630:
        for acquired in acquire(store, limit=60):
            seen.append(acquired.id)
            end(store, acquired)

    assert all(seen.index(id) >= 600 - 60 for id in late)
    assert Counter(seen).most_common(1)[0][1] == 1


def test_those_longest_due_come_first_to_within_a_share(store: Any, clock: FakeClock) -> None:
    due: dict[str, int] = {}
    for number in range(600):
        # The same at each run: how evenly ids that are drawn lie on the shards is chance.
        due[store.store_callback_request(request(), id=f"c{number}").id] = number
        clock.advance(0.001)

    for first in range(0, 600, 60):
        numbers = sorted(due[one.id] for one in acquire(store, limit=60))
        assert len(numbers) == 60
        assert numbers[-1] < first + 60 + SHARDS * 10


def test_an_idle_store_writes_nothing_and_a_busy_one_twice_for_each_shard(store: Any, shards: list[FrailStore]) -> None:
    for _ in range(300):
        store.store_callback_request(request())
    for shard in shards:
        shard.calls.clear()

    acquire(store, limit=60)

    assert sum(shard.calls.count("acquire_locks") for shard in shards) == 2 * SHARDS


def test_each_shards_own_clock_judges_what_is_due(clock: FakeClock) -> None:
    ahead, behind = FakeClock(clock.now() + timedelta(days=2)), FakeClock(clock.now() - timedelta(days=2))
    clocks = [clock, ahead, behind]
    store = ShardedDataAccess([InMemoryDataAccess(clock=one) for one in clocks], clock=clock)

    def pass_time(seconds: float) -> None:
        for one in clocks:
            one.advance(seconds)

    for queue in (HOMES[1], HOMES[0], HOMES[2]):
        store.store_callback_request(request(queue))
        pass_time(1.0)

    order = [acquire(store, limit=1)[0] for _ in range(3)]

    assert [one.queue_id for one in order] == [HOMES[1], HOMES[0], HOMES[2]]
    assert acquire(store) == []
    assert store.next_due() == store.now() + MINUTE
    pass_time(60.0)
    assert queues(acquire(store)) == sorted(HOMES)


# The list of stores is not the one they were filled with.


def test_callbacks_in_the_wrong_shard_are_put_off_and_delivered_when_the_list_is_right_again(
    store: Any, shards: list[FrailStore], clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    one_in_each(store)
    swapped = ShardedDataAccess([shards[1], shards[0], shards[2]], clock=clock)

    for _ in range(20):
        assert queues(acquire(swapped)) in ([HOMES[2]], [])

    assert "shard 0 of 3 holds callbacks that belong to other shards" in caplog.text
    assert len(caplog.records) == 2
    clock.advance(MINUTE + MOMENT)
    assert queues(acquire(store)) == sorted(HOMES)


# E-mails.


def test_an_email_finds_its_way_back_through_any_object(store: Any, shards: list[FrailStore], clock: FakeClock) -> None:
    for queue in HOMES:
        store.store_callback_request(request(queue, notification_email_address="someone@host.example"))
    for acquired in acquire(store):
        end(store, acquired, OWING)
    other: Any = ShardedDataAccess(shards, clock=clock)

    leased = [store.acquire_notifications(lock_timeout=MINUTE, limit=1)[0] for _ in range(3)]
    for one in leased:
        other.record_notification(one, retry_in=None)

    clock.advance(timedelta(days=1))
    assert len({one.token for one in leased}) == 3
    assert store.acquire_notifications(lock_timeout=MINUTE, limit=9) == []


def test_emails_of_the_healthy_are_leased(store: Any, shards: list[FrailStore]) -> None:
    for queue in HOMES:
        store.store_callback_request(request(queue, notification_email_address="someone@host.example"))
    for acquired in acquire(store):
        end(store, acquired, OWING)

    with shards[1].down():
        assert len(store.acquire_notifications(lock_timeout=MINUTE, limit=9)) == 2


# What it can do, and what it can't be made of.


def a_store_that_can_do_no_more_than_it_must(clock: FakeClock) -> DataAccess:
    inner = InMemoryDataAccess(clock=clock)
    required = {name: getattr(inner, name) for name in DataAccess.__abstractmethods__}
    kind = type("PlainStore", (DataAccess,), {name: staticmethod(call) for name, call in required.items()})
    plain: DataAccess = kind()
    plain.durability = Durability.REPLICATED
    return plain


def test_it_can_do_what_all_its_shards_can(clock: FakeClock, tmp_path: Path) -> None:
    memory, sqlite = InMemoryDataAccess(clock=clock), SQLiteDataAccess(tmp_path / "one.db", clock=clock)
    able, unable = (
        ShardedDataAccess([memory, sqlite]),
        ShardedDataAccess([memory, a_store_that_can_do_no_more_than_it_must(clock)]),
    )

    for ability in (SupportsListing, SupportsPurge, SupportsNotifications):
        assert isinstance(able, ability)
        assert not isinstance(unable, ability)
    assert not isinstance(ShardedDataAccess([sqlite]), SupportsBackup)
    assert isinstance(able, ShardedDataAccess)
    assert type(able) is type(ShardedDataAccess([memory]))
    assert type(able).__name__ == "ShardedDataAccess"


def test_it_is_as_durable_as_the_least_of_its_shards(clock: FakeClock, tmp_path: Path) -> None:
    sqlite = SQLiteDataAccess(tmp_path / "one.db", clock=clock)

    assert ShardedDataAccess([sqlite]).durability is Durability.POWER
    assert ShardedDataAccess([sqlite, InMemoryDataAccess(clock=clock)]).durability is Durability.MEMORY


@pytest.mark.parametrize("stores", [None, [], (), "store", {}, iter([]), 3])
def test_it_needs_a_list_of_stores(stores: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        ShardedDataAccess(stores)

    assert [path for path, _ in refused.value.errors] == ["stores"]


def test_its_stores_must_be_different_ones(clock: FakeClock) -> None:
    store = InMemoryDataAccess(clock=clock)

    with pytest.raises(InvalidRequestError) as refused:
        ShardedDataAccess([store, None, InMemoryDataAccess, store], clock=3)  # type: ignore[list-item,arg-type]

    assert [path for path, _ in refused.value.errors] == ["stores[1]", "stores[2]", "stores[3]", "clock"]


# Hints.


def test_hints_come_from_every_shard_until_the_subscription_ends(store: Any, shards: list[FrailStore]) -> None:
    hints: list[int] = []
    end_it = store.subscribe(lambda: hints.append(1))

    one_in_each(store)
    assert len(hints) == 3
    end_it()
    one_in_each(store)

    assert len(hints) == 3


def test_a_shard_that_gives_no_hints_doesnt_keep_the_others_from_it(store: Any, shards: list[FrailStore]) -> None:
    hints: list[int] = []
    with shards[1].down():
        end_it = store.subscribe(lambda: hints.append(1))

    one_in_each(store)
    end_it()

    assert len(hints) == 2
