"""Two dispatchers, one lock: what happens when a holder comes too late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest

from callbackq.core.delivery import NotSent, NotSentReason
from callbackq.core.lifecycle import Transition
from callbackq.core.models import AttemptFailure, CallbackAttempt, CallbackState, CallbackStatus, RetryPhase
from callbackq.dataaccess import Acquired, Action, AttemptRecord
from callbackq.dispatcher import Dispatcher
from callbackq.errors import DataAccessError, LockLostError
from callbackq.events import EventKind
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from support.dispatching import HeldTransport, InlineSender, Witness, a_request, an_engine, drive

Build = Callable[..., Dispatcher]


class Hanging(InMemoryDataAccess):
    """A store that stands still at the next claim, while the test lets something happen."""

    hang: Callable[[], None] | None = None

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        hang, self.hang = self.hang, None
        if hang is not None:
            hang()
        return super().acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)


def test_another_machine_takes_over_after_the_lock_timed_out_and_the_late_result_changes_nothing(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, transport: HeldTransport, witness: Witness
) -> None:
    id = store.store_callback_request(a_request()).id
    build(transport=transport, machine_name="frozen").start()
    transport.wait_for(1)

    clock.advance(30)
    build(transport=ScriptedTransport([200], clock=clock), machine_name="heir").run_until_idle()
    transport.answer(id, 500)
    witness.wait_for(EventKind.LOCK_LOST)

    status = store.get_callback_status(id)
    assert status.state is CallbackState.SUCCEEDED
    assert sorted((attempt.machine_name, attempt.late) for attempt in status.attempts) == [
        ("frozen", True),
        ("heir", False),
    ]
    assert [(lock.machine_name, lock.completed) for lock in status.locks] == [("frozen", False), ("heir", True)]


def test_a_late_accepted_result_makes_the_present_holders_failure_a_success(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, witness: Witness
) -> None:
    frozen, heir = HeldTransport(clock), HeldTransport(clock)
    id = store.store_callback_request(a_request(retry_phases=[RetryPhase(retries=9, delay=timedelta(hours=1))])).id
    build(transport=frozen, machine_name="frozen").start()
    frozen.wait_for(1)
    clock.advance(30)
    build(transport=heir, machine_name="heir").start()
    heir.wait_for(1)

    frozen.answer(id, 200)
    witness.wait_for(EventKind.LOCK_LOST)
    heir.answer(id, 500)
    witness.wait_for(EventKind.SUCCEEDED)

    assert store.get_callback_status(id).state is CallbackState.SUCCEEDED


def test_a_result_that_comes_after_the_timeout_but_before_any_takeover_counts(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, transport: HeldTransport, witness: Witness
) -> None:
    id = store.store_callback_request(a_request()).id
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)
    store.subscribe(lambda: None)

    # No poll comes in between: the slot is the only one, so the dispatcher itself can't take over.
    clock.advance(29.999999)
    transport.answer(id, 200)
    witness.wait_for(EventKind.SUCCEEDED)

    assert [attempt.late for attempt in store.get_callback_status(id).attempts] == [False]


def test_a_dispatcher_that_stood_still_longer_than_its_lock_does_not_send_its_own_callback_again(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    id = store.store_callback_request(a_request()).id
    engine = an_engine(store, transport, clock, witness)
    drive(engine, clock, until=lambda: id in transport.under_way)

    clock.advance(40)
    engine.wake()
    engine.step()
    transport.answer(id, 200)
    drive(engine, clock, until=lambda: EventKind.SUCCEEDED in witness.kinds())

    assert len(transport.deliveries) == 1
    status = store.get_callback_status(id)
    assert [attempt.late for attempt in status.attempts] == [False]
    assert [lock.completed for lock in status.locks] == [False, True]


def test_a_transport_that_never_answers_at_all_loses_its_slot_in_the_end(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    id = store.store_callback_request(a_request()).id
    engine = an_engine(store, transport, clock, witness)
    drive(engine, clock, until=lambda: id in transport.under_way)

    drive(engine, clock, until=lambda: EventKind.FAILED in witness.kinds())

    (attempt,) = store.get_callback_status(id).attempts
    assert attempt.failure is AttemptFailure.TIMEOUT
    transport.answer(id, 200)  # whatever it says now is too late
    engine.step()
    assert engine.busy == 0


def test_a_result_that_the_store_took_and_denied_is_not_recorded_a_second_time(
    clock: FakeClock, witness: Witness
) -> None:
    class Denying(InMemoryDataAccess):
        denials = 1

        def record_attempts(self, records: Sequence[AttemptRecord]) -> list[Transition | LockLostError]:
            results = super().record_attempts(records)
            if self.denials:
                self.denials -= 1
                raise DataAccessError("the connection broke at COMMIT")
            return results

    store = Denying(clock=clock)
    id = store.store_callback_request(a_request(retry_phases=[RetryPhase(retries=1, delay=timedelta(0))])).id
    sent = ScriptedTransport([500, 500], clock=clock)
    engine = an_engine(store, InlineSender(sent), clock, witness)

    drive(engine, clock, until=lambda: EventKind.FAILED in witness.kinds())

    assert len(store.get_callback_status(id).attempts) == len(sent.deliveries) == 2


def test_an_answer_that_came_while_the_store_stood_still_counts(
    clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    store = Hanging(clock=clock)
    id = store.store_callback_request(a_request()).id
    engine = an_engine(store, transport, clock, witness)
    drive(engine, clock, until=lambda: id in transport.under_way)

    def hang() -> None:
        transport.answer(id, 200)
        clock.advance(90)

    store.hang = hang
    engine.wake()
    drive(engine, clock, until=engine.is_idle)

    assert [attempt.status_code for attempt in store.get_callback_status(id).attempts] == [200]
    assert len(transport.deliveries) == 1


def test_callbacks_in_line_are_sent_under_their_new_locks_after_the_store_stood_still(
    clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    store = Hanging(clock=clock)
    ids = [store.store_callback_request(a_request()).id for _ in range(3)]
    engine = an_engine(store, transport, clock, witness, host_concurrency=1)
    drive(engine, clock, until=lambda: len(transport.under_way) == 1)
    store.hang = lambda: clock.advance(90)
    engine.wake()
    engine.step()

    def answer_all() -> bool:
        for id, (delivery, _) in list(transport.under_way.items()):
            too_late = delivery.ends_at <= clock.monotonic()
            transport.answer(id, NotSentReason.TIME_IS_UP if too_late else 200)
        return engine.is_idle()

    drive(engine, clock, until=answer_all)

    statuses = [store.get_callback_status(id) for id in ids]
    # Also the first, of which nothing had been sent yet when the transport was asked at last.
    assert [status.state for status in statuses] == [CallbackState.SUCCEEDED] * 3
    assert [len(status.attempts) for status in statuses] == [1, 1, 1]


RETRIED_ONCE = [RetryPhase(retries=1, delay=timedelta(seconds=5))]


def fail_elsewhere(store: InMemoryDataAccess, clock: FakeClock) -> None:
    """Have another dispatcher take over all that is locked, be refused, and leave it to whoever is first."""
    clock.advance(30)
    delay = RETRIED_ONCE[0].delay
    for taken in store.acquire_locks("other", lock_timeout=timedelta(seconds=30), limit=9):
        refused = CallbackAttempt(status_code=503, time=clock.now(), duration=timedelta(0))
        waiting = Transition(state=CallbackState.WAITING, delay=delay, counted=True)
        store.record_attempt(taken, refused, waiting)
    clock.advance(delay.total_seconds())


@pytest.mark.parametrize(
    ("answer", "state", "requests"),
    [
        (503, CallbackState.SUCCEEDED, 2),
        (AttemptFailure.TIMEOUT, CallbackState.SUCCEEDED, 2),
        (200, CallbackState.SUCCEEDED, 1),
        (410, CallbackState.FAILED, 1),
    ],
)
def test_an_attempt_that_outlived_its_lock_is_not_counted_as_the_retry_after_anothers(
    store: InMemoryDataAccess,
    clock: FakeClock,
    transport: HeldTransport,
    witness: Witness,
    answer: int | AttemptFailure,
    state: CallbackState,
    requests: int,
) -> None:
    id = store.store_callback_request(a_request(retry_phases=RETRIED_ONCE)).id
    engine = an_engine(store, transport, clock, witness)
    drive(engine, clock, until=lambda: id in transport.under_way)
    fail_elsewhere(store, clock)
    # It locks the callback once more before it hears what came of the request that it has under way.
    engine.wake()
    engine.step()

    transport.answer(id, answer)
    if requests > 1:
        drive(engine, clock, until=lambda: id in transport.under_way)
        transport.answer(id, 200)
    drive(engine, clock, until=engine.is_idle)

    assert store.get_callback_status(id).state is state
    assert [delivery.attempt for delivery in transport.deliveries] == [1, 2][:requests]


def test_an_attempt_that_outlived_its_lock_is_none_of_a_redelivered_callback(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    id = store.store_callback_request(a_request()).id
    engine = an_engine(store, transport, clock, witness)
    drive(engine, clock, until=lambda: id in transport.under_way)
    clock.advance(30)
    (taken,) = store.acquire_locks("other", lock_timeout=timedelta(seconds=30), limit=1)
    store.record_attempt(taken, None, Transition(state=CallbackState.FAILED, counted=True))
    store.request_transition(id, Action.REDELIVER)
    engine.wake()
    engine.step()

    transport.answer(id, 503)
    drive(engine, clock, until=lambda: id in transport.under_way)
    transport.answer(id, 200)
    drive(engine, clock, until=engine.is_idle)

    assert store.get_callback_status(id).state is CallbackState.SUCCEEDED


def test_an_attempt_that_outlived_its_lock_may_still_ask_for_patience(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    id = store.store_callback_request(a_request(retry_phases=RETRIED_ONCE)).id
    engine = an_engine(store, transport, clock, witness)
    drive(engine, clock, until=lambda: id in transport.under_way)
    fail_elsewhere(store, clock)
    engine.wake()
    engine.step()

    transport.answer(id, 503, {"Retry-After": "40"})
    answered_at = clock.monotonic()
    drive(engine, clock, until=lambda: id in transport.under_way)

    assert 40 <= clock.monotonic() - answered_at < 45


def test_who_stood_in_line_while_another_made_the_attempt_makes_the_next(
    clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    store = Hanging(clock=clock)
    ids = {store.store_callback_request(a_request(retry_phases=RETRIED_ONCE)).id for _ in range(2)}
    engine = an_engine(store, transport, clock, witness, host_concurrency=1)
    drive(engine, clock, until=lambda: len(transport.under_way) == 1)
    (first,) = transport.under_way
    (second,) = ids - {first}
    store.hang = lambda: fail_elsewhere(store, clock)
    engine.wake()
    engine.step()

    transport.answer(first, 200)
    drive(engine, clock, until=lambda: second in transport.under_way)

    assert [delivery.attempt for delivery in transport.deliveries] == [1, 2]


# What observers hear of it.


def test_a_takeover_names_the_machine_whose_lock_was_abandoned_once_and_before_it_sends(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, witness: Witness
) -> None:
    for number in range(3):
        store.store_callback_request(a_request(), id=f"c-{number}")
    for name in ("first", "second"):
        store.acquire_locks(name, lock_timeout=timedelta(seconds=30), limit=2)
        clock.advance(30)

    build(transport=ScriptedTransport(clock=clock), machine_name="heir").run_until_idle()

    told = [event for event in witness.events if event.kind is EventKind.ABANDONED]
    assert {(event.callback_id, event.abandoned, event.abandoned_by) for event in told} == {
        ("c-2", 1, "second"),
        ("c-0", 2, "second"),
        ("c-1", 1, "first"),
    }
    assert all(event.machine_name == "heir" for event in told)
    for event in told:
        assert witness.kinds(event.callback_id)[:2] == [EventKind.ABANDONED, EventKind.LOCKED]


def test_a_lock_that_was_abandoned_once_is_not_told_again_after_a_release(
    store: InMemoryDataAccess, clock: FakeClock, witness: Witness
) -> None:
    store.store_callback_request(a_request(), id="c")
    store.acquire_locks("dead", lock_timeout=timedelta(seconds=30), limit=1)
    clock.advance(30)
    unsent = NotSent(reason=NotSentReason.TIME_IS_UP)
    engine = an_engine(store, InlineSender(ScriptedTransport([unsent, unsent, 200], clock=clock)), clock, witness)

    drive(engine, clock, until=lambda: EventKind.SUCCEEDED in witness.kinds())

    kinds = witness.kinds("c")
    assert (kinds.count(EventKind.LOCKED), kinds.count(EventKind.ABANDONED)) == (3, 1)


def test_a_record_that_cannot_be_read_does_not_keep_its_callback_from_being_taken_over(
    clock: FakeClock, witness: Witness
) -> None:
    class Unreadable(InMemoryDataAccess):
        def get_callback_status(self, id: str) -> CallbackStatus:
            raise DataAccessError("it can't be read")

    store = Unreadable(clock=clock)
    store.store_callback_request(a_request(), id="c")
    store.acquire_locks("dead", lock_timeout=timedelta(seconds=30), limit=1)
    clock.advance(30)
    engine = an_engine(store, InlineSender(ScriptedTransport(clock=clock)), clock, witness)

    drive(engine, clock, until=lambda: EventKind.SUCCEEDED in witness.kinds())

    assert EventKind.ABANDONED not in witness.kinds()


@pytest.mark.parametrize(
    ("meanwhile", "told"),
    [
        ("nothing", EventKind.RELEASED),
        ("cancelled", EventKind.CANCELLED),
        ("accepted late", EventKind.SUCCEEDED),
        ("taken over", EventKind.LOCK_LOST),
    ],
)
def test_giving_a_lock_back_is_told_as_what_it_came_to(
    store: InMemoryDataAccess, clock: FakeClock, witness: Witness, meanwhile: str, told: EventKind
) -> None:
    store.store_callback_request(a_request(), id="c")
    stale = store.acquire_locks("stale", lock_timeout=timedelta(seconds=1), limit=1)[0]
    clock.advance(1)
    transport = HeldTransport(clock)
    engine = an_engine(store, transport, clock, witness)
    engine.step()
    match meanwhile:
        case "cancelled":
            store.request_transition("c", Action.CANCEL)
        case "accepted late":
            with pytest.raises(LockLostError):
                store.record_attempt(stale, None, Transition(state=CallbackState.SUCCEEDED))
        case "taken over":
            clock.advance(30)
            store.acquire_locks("other", lock_timeout=timedelta(seconds=30), limit=1)

    transport.answer("c", NotSentReason.TIME_IS_UP)
    engine.step(draining=True)

    assert witness.kinds("c")[2:] == [told]
    assert engine.recorder.released == (told is not EventKind.LOCK_LOST)
