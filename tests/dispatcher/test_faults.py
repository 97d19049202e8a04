"""Whatever raises (store, transport, observer), deliveries go on."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from attrs import evolve

from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason
from callbackq.core.models import AttemptFailure, CallbackRequest, CallbackState
from callbackq.core.verdict import ResponsePolicy, Verdict
from callbackq.dataaccess import Acquired
from callbackq.dispatcher import Dispatcher
from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.events import EventKind, ObservedEvent
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from support.dispatching import HeldTransport, InlineSender, Witness, a_request, an_engine, drive

Build = Callable[..., Dispatcher]
STORE_CALLS = ["acquire_locks", "record_attempts", "release_locks", "next_due", "now"]


class FaultyStore(InMemoryDataAccess):
    """Raises from one method as often as it is told to."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self._mutex_of_faults = threading.Lock()
        self._faults: dict[str, list[BaseException]] = {}
        self.fails_after_writing = False

    def fail(self, method: str, *errors: BaseException) -> None:
        with self._mutex_of_faults:
            self._faults[method] = list(errors)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in STORE_CALLS:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._mutex_of_faults:
                faults = self._faults.get(name)
                error = faults.pop(0) if faults else None
            if error is not None and self.fails_after_writing:
                found(*args, **kwargs)
            if error is not None:
                raise error
            return found(*args, **kwargs)

        return call


@pytest.fixture
def faulty(clock: FakeClock) -> FaultyStore:
    return FaultyStore(clock)


@pytest.mark.parametrize("error", [TransientDataAccessError("x"), DataAccessError("x"), KeyError("a bug")], ids=repr)
@pytest.mark.parametrize("method", ["acquire_locks", "record_attempts", "next_due", "now"])
def test_a_store_that_raises_is_asked_again_and_nothing_is_lost_or_sent_twice(
    method: str, error: Exception, faulty: FaultyStore, clock: FakeClock, witness: Witness
) -> None:
    ids = [faulty.store_callback_request(a_request("q")).id for _ in range(3)]
    transport = ScriptedTransport(clock=clock)
    faulty.fail(method, error, error)

    drive(
        an_engine(faulty, InlineSender(transport), clock, witness),
        clock,
        # What is due next is asked for when all is done.
        until=lambda: EventKind.STORE_RECOVERED in witness.kinds() and witness.kinds().count(EventKind.SUCCEEDED) == 3,
    )

    assert [delivery.callback_id for delivery in transport.deliveries] == ids
    assert EventKind.STORE_FAILED in witness.kinds()


def test_a_record_whose_outcome_is_unknown_is_repeated_without_harm(
    faulty: FaultyStore, clock: FakeClock, witness: Witness
) -> None:
    id = faulty.store_callback_request(a_request()).id
    faulty.fails_after_writing = True
    faulty.fail("record_attempts", DataAccessError("the connection broke at COMMIT"))

    drive(
        an_engine(faulty, InlineSender(ScriptedTransport(clock=clock)), clock, witness),
        clock,
        until=lambda: EventKind.SUCCEEDED in witness.kinds(),
    )

    status = faulty.get_callback_status(id)
    assert status.state is CallbackState.SUCCEEDED
    assert [attempt.late for attempt in status.attempts] == [False]


def test_a_result_the_store_can_never_take_holds_up_no_other(clock: FakeClock, witness: Witness) -> None:
    class Picky(InMemoryDataAccess):
        def record_attempts(self, records: Any) -> Any:
            if any(record.acquired.id == "poison" for record in records):
                raise DataAccessError("too strange")
            return super().record_attempts(records)

    store = Picky(clock=clock)
    store.store_callback_request(a_request(), id="poison")
    for number in range(200):
        store.store_callback_request(a_request(), id=f"good-{number}")
    engine = an_engine(store, InlineSender(ScriptedTransport(clock=clock)), clock, witness)
    began = clock.monotonic()

    drive(engine, clock, until=lambda: witness.kinds().count(EventKind.SUCCEEDED) == 200)

    assert clock.monotonic() - began < 5


def test_a_result_that_makes_a_custom_store_raise_nonsense_is_given_up_even_when_it_is_alone(
    clock: FakeClock, witness: Witness
) -> None:
    class Buggy(InMemoryDataAccess):
        def record_attempts(self, records: Any) -> Any:
            raise KeyError("a bug")

    store = Buggy(clock=clock)
    store.store_callback_request(a_request())
    engine = an_engine(store, InlineSender(ScriptedTransport(clock=clock)), clock, witness)
    engine.step()

    drive(engine, clock, until=lambda: engine.busy == 0)


def test_results_are_kept_through_an_outage_of_any_length(
    faulty: FaultyStore, clock: FakeClock, witness: Witness
) -> None:
    ids = [faulty.store_callback_request(a_request()).id for _ in range(10)]
    transport = ScriptedTransport(clock=clock)
    faulty.fail("record_attempts", *[DataAccessError("down")] * 50)

    drive(
        an_engine(faulty, InlineSender(transport), clock, witness),
        clock,
        until=lambda: witness.kinds().count(EventKind.SUCCEEDED) == 10,
    )

    assert sorted(delivery.callback_id for delivery in transport.deliveries) == sorted(ids)


def test_an_outage_is_told_once_however_long_it_lasts(
    faulty: FaultyStore, clock: FakeClock, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    faulty.store_callback_request(a_request())
    faulty.fail("acquire_locks", *[DataAccessError("down")] * 100)

    with caplog.at_level(logging.INFO, logger="callbackq"):
        drive(
            an_engine(faulty, InlineSender(ScriptedTransport(clock=clock)), clock, witness),
            clock,
            until=lambda: EventKind.SUCCEEDED in witness.kinds(),
        )

    assert witness.kinds().count(EventKind.STORE_FAILED) == 1
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


@pytest.mark.parametrize("error", [RuntimeError("bug"), MemoryError(), OSError(24, "too many open files")], ids=repr)
def test_a_transport_that_raises_makes_an_attempt_that_failed_with_internal(
    error: Exception, store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    id = store.store_callback_request(a_request()).id

    def explode(_: Delivery) -> int:
        raise error

    build(transport=ScriptedTransport([explode], clock=clock)).run_until_idle()

    (attempt,) = store.get_callback_status(id).attempts
    assert (attempt.failure, attempt.detail) == (
        AttemptFailure.INTERNAL,
        {RuntimeError: "RuntimeError", MemoryError: "MemoryError", OSError: "EMFILE"}[type(error)],
    )


def test_a_transport_that_returns_nonsense_makes_an_attempt_that_failed_with_internal(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    class Odd(ScriptedTransport):
        def send(self, delivery: Delivery) -> None:  # type: ignore[override]
            super().send(delivery)

    id = store.store_callback_request(a_request()).id

    build(transport=Odd(clock=clock)).run_until_idle()

    (attempt,) = store.get_callback_status(id).attempts
    assert (attempt.failure, attempt.detail) == (AttemptFailure.INTERNAL, "no answer but a NoneType")


def test_a_transport_that_raises_on_submit_makes_an_attempt_that_failed_with_internal(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    id = store.store_callback_request(a_request()).id
    transport.submit = lambda *_: 1 / 0  # type: ignore[assignment, return-value]

    build(transport=transport).run_until_idle()

    (attempt,) = store.get_callback_status(id).attempts
    assert (attempt.failure, attempt.detail) == (AttemptFailure.INTERNAL, "ZeroDivisionError")


def test_an_observer_that_raises_stops_nothing(store: InMemoryDataAccess, clock: FakeClock, build: Build) -> None:
    class Rude:
        def observe(self, event: ObservedEvent) -> None:
            raise ValueError(event)

    ids = [store.store_callback_request(a_request("q")).id for _ in range(3)]

    build(transport=ScriptedTransport(clock=clock), observer=Rude()).run_until_idle()

    assert all(store.get_callback_status(id).success for id in ids)


def test_a_fault_of_this_machine_is_no_attempt_and_pauses_acquiring(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, transport: HeldTransport, witness: Witness
) -> None:
    id = store.store_callback_request(a_request()).id
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)

    transport.answer(id, NotSentReason.LOCAL_FAULT)
    witness.wait_for(EventKind.RELEASED)
    assert EventKind.LOCAL_FAULT in witness.kinds()
    assert len(transport.deliveries) == 1
    clock.advance(timedelta(seconds=1))
    transport.wait_for(2)
    transport.answer(id, 200)
    witness.wait_for(EventKind.SUCCEEDED)

    assert len(store.get_callback_status(id).attempts) == 1


@pytest.mark.parametrize("error", [TransientDataAccessError("x"), DataAccessError("x")], ids=repr)
def test_a_store_that_fails_half_the_time_makes_no_duplicate(
    error: Exception, faulty: FaultyStore, clock: FakeClock, witness: Witness
) -> None:
    ids = [faulty.store_callback_request(a_request()).id for _ in range(200)]
    chance = random.Random(1)
    transport = ScriptedTransport(clock=clock)
    original = InMemoryDataAccess.record_attempts

    class Flaky(FaultyStore):
        def record_attempts(self, records: Any) -> Any:
            if chance.random() < 0.5 and isinstance(error, TransientDataAccessError):
                raise error
            return original(self, records)

    faulty.__class__ = Flaky

    drive(
        an_engine(faulty, InlineSender(transport), clock, witness),
        clock,
        until=lambda: witness.kinds().count(EventKind.SUCCEEDED) == 200,
    )

    assert sorted(delivery.callback_id for delivery in transport.deliveries) == sorted(ids)


def test_an_outage_shorter_than_a_lock_makes_no_duplicate_on_another_machine(
    faulty: FaultyStore, clock: FakeClock, witness: Witness
) -> None:
    id = faulty.store_callback_request(a_request()).id
    first, second = ScriptedTransport(clock=clock), ScriptedTransport(clock=clock)
    engine = an_engine(faulty, InlineSender(first), clock, witness)
    other = an_engine(faulty, InlineSender(second), clock, witness)
    faulty.fail("record_attempts", *[TransientDataAccessError("down")] * 10_000)
    began = clock.monotonic()

    drive(engine, clock, until=lambda: clock.monotonic() > began + 26)
    faulty.fail("record_attempts")
    drive(engine, clock, until=lambda: faulty.get_callback_status(id).success)
    other.step()

    assert clock.monotonic() < began + 30
    assert (len(first.deliveries), len(second.deliveries)) == (1, 0)


def test_attempts_that_never_end_do_not_take_all_slots_for_ever(
    store: InMemoryDataAccess, clock: FakeClock, witness: Witness
) -> None:
    class Forgetful:
        forgets = True

        def submit(self, delivery: Delivery, done: Callable[[object], None]) -> None:
            if not self.forgets:
                done(Answer(status_code=200, time=clock.now(), duration=timedelta(0)))

        def interrupt(self, deliveries: object) -> None: ...

    sender = Forgetful()
    engine = an_engine(store, sender, clock, witness, concurrency=2, host_concurrency=2)  # type: ignore[arg-type]
    ids = [store.store_callback_request(a_request()).id for _ in range(3)]
    engine.step()
    sender.forgets = False

    drive(engine, clock, until=lambda: store.get_callback_status(ids[2]).success)

    assert [store.get_callback_status(id).attempts[0].failure for id in ids[:2]] == [AttemptFailure.TIMEOUT] * 2


def test_a_release_the_store_can_never_take_holds_up_no_other(clock: FakeClock, witness: Witness) -> None:
    class Picky(InMemoryDataAccess):
        def release_locks(self, locks: Any) -> Any:
            if any(acquired.id == "poison" for acquired, _ in locks):
                raise DataAccessError("too strange")
            return super().release_locks(locks)

    store = Picky(clock=clock)
    store.store_callback_request(a_request(), id="poison")
    for number in range(20):
        store.store_callback_request(a_request(), id=f"good-{number}")
    not_sent = NotSent(reason=NotSentReason.TIME_IS_UP)
    transport = ScriptedTransport([not_sent] * 21, clock=clock)

    drive(
        an_engine(store, InlineSender(transport), clock, witness),
        clock,
        until=lambda: witness.kinds().count(EventKind.SUCCEEDED) >= 20,
    )


def test_an_answer_that_cannot_be_recorded_is_an_internal_failure(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    id = store.store_callback_request(a_request()).id
    naive = Answer(status_code=200, time=datetime(2026, 1, 1), duration=timedelta(0))

    build(transport=ScriptedTransport([naive], clock=clock)).run_until_idle()

    (attempt,) = store.get_callback_status(id).attempts
    assert (attempt.failure, attempt.detail) == (AttemptFailure.INTERNAL, "InvalidRequestError")
    assert "can't be recorded" in caplog.text


def test_a_response_policy_that_raises_does_not_turn_an_accepted_callback_into_a_failure(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    class Broken(ResponsePolicy):
        def judge(self, status_code: int) -> Verdict:
            raise KeyError(status_code)

    id = store.store_callback_request(a_request()).id

    build(transport=ScriptedTransport([200], clock=clock), response_policy=Broken()).run_until_idle()

    assert store.get_callback_status(id).success


def test_a_transport_that_tells_twice_is_believed_once(
    store: InMemoryDataAccess, clock: FakeClock, witness: Witness
) -> None:
    class Talkative(InlineSender):
        def submit(self, delivery: Delivery, done: Any) -> None:
            super().submit(delivery, done)
            super().submit(delivery, done)

    id = store.store_callback_request(a_request()).id
    engine = an_engine(store, Talkative(ScriptedTransport([200, 500], clock=clock)), clock, witness)

    drive(engine, clock, until=lambda: engine.is_idle() and EventKind.SUCCEEDED in witness.kinds())

    assert len(store.get_callback_status(id).attempts) == 1


def test_many_requests_that_meet_one_local_fault_pause_as_for_one(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    ids = [store.store_callback_request(a_request()).id for _ in range(20)]
    engine = an_engine(store, transport, clock, witness)
    drive(engine, clock, until=lambda: len(transport.under_way) == 20)
    began = clock.monotonic()

    for id in ids:
        transport.answer(id, NotSentReason.LOCAL_FAULT)
    drive(engine, clock, until=lambda: len(transport.deliveries) > 20)

    assert clock.monotonic() - began < 2


def test_what_is_never_sent_does_not_make_the_dispatcher_spin(
    store: InMemoryDataAccess, clock: FakeClock, witness: Witness
) -> None:
    store.store_callback_request(a_request())
    transport = ScriptedTransport(default=NotSent(reason=NotSentReason.TIME_IS_UP), clock=clock)
    engine = an_engine(store, InlineSender(transport), clock, witness)
    began = clock.monotonic()

    drive(engine, clock, until=lambda: clock.monotonic() > began + 10)

    assert len(transport.deliveries) <= 110


def test_results_are_kept_while_only_releases_are_taken(
    clock: FakeClock, witness: Witness, faulty: FaultyStore
) -> None:
    not_sent = NotSent(reason=NotSentReason.TIME_IS_UP)
    ids = [faulty.store_callback_request(a_request()).id for _ in range(5)]
    waiting = faulty.store_callback_request(a_request(), id="never-sent").id

    def answer(delivery: Delivery) -> Any:
        return not_sent if delivery.callback_id == waiting and clock.monotonic() < began + 25 else 200

    transport = ScriptedTransport(default=answer, clock=clock)
    faulty.fail("record_attempts", *[DataAccessError("down")] * 10_000)
    began = clock.monotonic()
    engine = an_engine(faulty, InlineSender(transport), clock, witness)

    drive(engine, clock, until=lambda: clock.monotonic() > began + 25)
    faulty.fail("record_attempts")
    drive(engine, clock, until=lambda: witness.kinds().count(EventKind.SUCCEEDED) == 6)

    sent = [delivery.callback_id for delivery in transport.deliveries if delivery.callback_id != waiting]
    assert sorted(sent) == sorted(ids)


def test_a_callback_that_there_is_no_memory_for_is_given_back(clock: FakeClock, witness: Witness) -> None:
    memory_is_back_at = clock.monotonic() + 1

    class Heavy:
        """A request whose reading takes memory."""

        def __init__(self, request: CallbackRequest) -> None:
            self._request = request

        def __getattr__(self, name: str) -> Any:
            if name == "target" and clock.monotonic() < memory_is_back_at:
                raise MemoryError
            return getattr(self._request, name)

    class HeavyStore(InMemoryDataAccess):
        def acquire_locks(self, *args: Any, **kwargs: Any) -> list[Acquired]:
            heavy: Any = Heavy
            return [evolve(one, request=heavy(one.request)) for one in super().acquire_locks(*args, **kwargs)]

    store = HeavyStore(clock=clock)
    ids = [store.store_callback_request(a_request()).id for _ in range(3)]
    engine = an_engine(store, InlineSender(ScriptedTransport(clock=clock)), clock, witness)

    drive(engine, clock, until=lambda: witness.kinds().count(EventKind.SUCCEEDED) == 3)

    statuses = [store.get_callback_status(id) for id in ids]
    assert [len(status.attempts) for status in statuses] == [1, 1, 1]
    assert all(lock.completed for status in statuses for lock in status.locks), "none may count as abandoned"
    assert EventKind.LOCAL_FAULT in witness.kinds()


def test_an_answer_is_kept_until_there_is_memory_to_record_it(
    store: InMemoryDataAccess, clock: FakeClock, witness: Witness
) -> None:
    faults = [MemoryError(), MemoryError()]

    class Heavy(Answer):
        """An answer whose reading takes memory."""

        def __getattribute__(self, name: str) -> Any:
            if name == "status_code" and faults:
                raise faults.pop()
            return super().__getattribute__(name)

    id = store.store_callback_request(a_request("q")).id
    transport = ScriptedTransport([Heavy(status_code=200, time=clock.now(), duration=timedelta(0))], clock=clock)

    drive(
        an_engine(store, InlineSender(transport), clock, witness),
        clock,
        until=lambda: EventKind.SUCCEEDED in witness.kinds(),
    )

    assert [attempt.status_code for attempt in store.get_callback_status(id).attempts] == [200]
    assert len(transport.deliveries) == 1
