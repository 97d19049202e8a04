"""A store that records and acquires in one commit: what the dispatcher makes of it, and of its faults."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackState, RetryPhase
from callbackq.dataaccess import Acquired, AttemptRecord, SupportsHandover, SupportsShards
from callbackq.errors import DataAccessError, LockLostError
from callbackq.events import EventKind
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from support.dispatching import HeldTransport, InlineSender, Witness, a_request, an_engine, drive


class HandingOver(InMemoryDataAccess, SupportsHandover):
    """Notes what it is asked for; raises in place of, or after, what it is to do."""

    def __init__(self, *, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.calls: list[tuple[str, int]] = []
        self.faults: list[Exception] = []
        self.faults_afterwards: list[Exception] = []
        self._is_handing_over = False

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        if not self._is_handing_over:
            self.calls.append(("acquire", limit))
        return super().acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)

    def record_attempts(self, records: Sequence[AttemptRecord]) -> list[Transition | LockLostError]:
        if not self._is_handing_over:
            self.calls.append(("record", len(records)))
        return super().record_attempts(records)

    def record_and_acquire(
        self, records: Sequence[AttemptRecord], machine_name: str, *, lock_timeout: timedelta, limit: int
    ) -> tuple[list[Transition | LockLostError], list[Acquired]]:
        self.calls.append(("hand over", limit))
        if self.faults:
            raise self.faults.pop()
        self._is_handing_over = True
        results = self.record_attempts(records)
        acquired = self.acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)
        self._is_handing_over = False
        if self.faults_afterwards:
            raise self.faults_afterwards.pop()
        return results, acquired


@pytest.fixture
def store(clock: FakeClock) -> HandingOver:
    return HandingOver(clock=clock)


def test_a_queue_is_walked_through_with_one_call_for_each_callback(
    store: HandingOver, clock: FakeClock, witness: Witness
) -> None:
    ids = [store.store_callback_request(a_request("queue")).id for _ in range(5)]
    sent = ScriptedTransport([200] * 5, clock=clock)
    engine = an_engine(store, InlineSender(sent), clock, witness, concurrency=3)

    drive(engine, clock, until=lambda: store.get_callback_status(ids[-1]).success)

    assert [delivery.callback_id for delivery in sent.deliveries] == ids
    assert store.calls == [("acquire", 3), *[("hand over", 3)] * 5]
    assert witness.kinds() == [EventKind.LOCKED, EventKind.SUCCEEDED] * 5


def test_no_more_is_asked_for_than_there_are_slots(
    store: HandingOver, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    ids = [store.store_callback_request(a_request()).id for _ in range(5)]
    engine = an_engine(store, transport, clock, witness, concurrency=3)
    engine.step()

    transport.answer(ids[0], 200)
    transport.answer(ids[2], 200)
    engine.step()

    assert store.calls == [("acquire", 3), ("hand over", 2)]
    assert sorted(transport.under_way) == sorted([ids[1], *ids[3:]])


def test_a_callback_that_is_due_again_at_once_is_sent_again(
    store: HandingOver, clock: FakeClock, witness: Witness
) -> None:
    phases = [RetryPhase(retries=2, delay=timedelta(0))]
    id = store.store_callback_request(a_request(retry_phases=phases)).id
    sent = ScriptedTransport([500, 500, 200], clock=clock)
    engine = an_engine(store, InlineSender(sent), clock, witness, concurrency=1)

    drive(engine, clock, until=engine.is_idle)

    assert [delivery.attempt for delivery in sent.deliveries] == [1, 2, 3]
    assert store.get_callback_status(id).state is CallbackState.SUCCEEDED


def test_while_it_stops_nothing_is_acquired(
    store: HandingOver, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    first, second = (store.store_callback_request(a_request("queue")).id for _ in range(2))
    engine = an_engine(store, transport, clock, witness)
    engine.step()

    transport.answer(first, 200)
    engine.step(draining=True)

    assert store.calls[-1] == ("record", 1)
    assert store.get_callback_status(second).state is CallbackState.WAITING
    assert engine.busy == 0


def test_results_that_could_not_be_handed_over_are_recorded_alone(
    store: HandingOver, clock: FakeClock, witness: Witness
) -> None:
    ids = [store.store_callback_request(a_request()).id for _ in range(3)]
    store.faults = [DataAccessError("a claim fails")]
    sent = ScriptedTransport([200] * 3, clock=clock)
    engine = an_engine(store, InlineSender(sent), clock, witness)

    drive(engine, clock, until=engine.is_idle)

    assert len(sent.deliveries) == 3
    assert {store.get_callback_status(id).state for id in ids} == {CallbackState.SUCCEEDED}
    assert store.calls.count(("record", 1)) == 3
    assert witness.kinds().count(EventKind.STORE_FAILED) == 1
    assert witness.kinds().count(EventKind.STORE_RECOVERED) == 1


def test_what_was_handed_over_and_denied_is_taken_over_when_its_locks_time_out(
    store: HandingOver, clock: FakeClock, witness: Witness
) -> None:
    first, second = (store.store_callback_request(a_request("queue")).id for _ in range(2))
    store.faults_afterwards = [DataAccessError("the connection broke at COMMIT")]
    sent = ScriptedTransport([200, 200], clock=clock)
    engine = an_engine(store, InlineSender(sent), clock, witness)

    drive(engine, clock, until=lambda: store.get_callback_status(second).success)

    assert [delivery.callback_id for delivery in sent.deliveries] == [first, second]
    assert len(store.get_callback_status(first).attempts) == 1
    assert [lock.completed for lock in store.get_callback_status(second).locks] == [False, True]


def test_a_lock_of_ours_that_is_handed_over_goes_to_the_attempt_that_is_under_way(
    store: HandingOver, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    quick, slow = (store.store_callback_request(a_request()).id for _ in range(2))
    engine = an_engine(store, transport, clock, witness)
    engine.step()

    clock.advance(31)
    transport.answer(quick, 200)
    engine.step()
    transport.answer(slow, 200)
    drive(engine, clock, until=engine.is_idle)

    assert len(transport.deliveries) == 2
    assert [lock.completed for lock in store.get_callback_status(slow).locks] == [False, True]
    assert [attempt.late for attempt in store.get_callback_status(slow).attempts] == [False]


def test_of_several_shards_only_one_hands_over_at_a_time(
    clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    class Sharded(HandingOver, SupportsShards):
        def shard_of(self, acquired: Acquired) -> int:
            return int(acquired.id)

    store = Sharded(clock=clock)
    for number in range(4):
        store.store_callback_request(a_request(), id=str(number))
    engine = an_engine(store, transport, clock, witness, concurrency=2)
    engine.step()

    for id in sorted(transport.under_way):
        transport.answer(id, 200)
    engine.step()

    assert [call for call, _ in store.calls] == ["acquire", "hand over", "record", "acquire"]
    assert sorted(transport.under_way) == ["2", "3"]


def test_a_store_whose_subclass_overrides_what_it_stands_for_is_not_asked_to_hand_over(
    clock: FakeClock, witness: Witness
) -> None:
    class Choosing(HandingOver):
        def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
            return super().acquire_locks(machine_name, lock_timeout=lock_timeout, limit=1)

    store = Choosing(clock=clock)
    ids = [store.store_callback_request(a_request()).id for _ in range(3)]
    engine = an_engine(store, InlineSender(ScriptedTransport([200] * 3, clock=clock)), clock, witness)

    drive(engine, clock, until=lambda: all(store.get_callback_status(id).success for id in ids))

    assert {call for call, _ in store.calls} == {"acquire", "record"}
    assert {limit for call, limit in store.calls if call == "acquire"} == {1}
