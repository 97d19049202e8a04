"""One callback, from the store to its final state."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason
from callbackq.core.models import (
    AttemptFailure,
    CallbackState,
    FailedReason,
    RetryPhase,
)
from callbackq.core.verdict import ResponsePolicy
from callbackq.dispatcher import Dispatcher
from callbackq.events import EventKind
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock, RecordingNotifier, ScriptedTransport
from support.dispatching import HeldTransport, InlineSender, Witness, a_request, an_engine, drive

Build = Callable[..., Dispatcher]
PHASES = (RetryPhase(retries=2, delay=timedelta(seconds=10)), RetryPhase(retries=1, delay=timedelta(minutes=5)))


def test_an_accepted_callback_succeeds_and_its_attempt_and_lock_are_recorded(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    id = store.store_callback_request(a_request("q")).id

    assert build(transport=ScriptedTransport([201], clock=clock)).run_until_idle()

    status = store.get_callback_status(id)
    assert status.state is CallbackState.SUCCEEDED
    assert [(attempt.status_code, attempt.machine_name) for attempt in status.attempts] == [(201, "one")]
    assert [(lock.completed, lock.machine_name) for lock in status.locks] == [(True, "one")]


def test_a_delivery_carries_what_the_receiver_needs_to_tell_copies_apart(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    transport = ScriptedTransport([500, 200, 200], clock=clock)
    dispatcher = build(transport=transport)
    first = store.store_callback_request(a_request("q", retry_phases=PHASES)).id
    second = store.store_callback_request(a_request("q")).id

    dispatcher.run_until_idle()
    clock.advance(10)
    dispatcher.run_until_idle()

    sent = [(d.callback_id, d.sequence, d.attempt) for d in transport.deliveries]
    assert sent == [(first, 1, 1), (first, 1, 2), (second, 2, 1)]
    tokens = [d.token for d in transport.deliveries]
    assert tokens[0] < tokens[1]


def test_retries_follow_the_phases_and_then_the_callback_fails_for_good(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    transport = ScriptedTransport(default=500, clock=clock)
    dispatcher = build(transport=transport)
    id = store.store_callback_request(a_request(retry_phases=PHASES)).id
    waits = []

    while (status := store.get_callback_status(id)).state.is_open:
        dispatcher.run_until_idle()
        status = store.get_callback_status(id)
        if status.next_attempt_at is not None:
            wait = status.next_attempt_at - store.now()
            waits.append(wait.total_seconds())
            clock.advance(wait - timedelta(microseconds=1))
            before = len(transport.deliveries)
            dispatcher.run_until_idle()
            assert len(transport.deliveries) == before, "sent before it was due"
            clock.advance(timedelta(microseconds=1))

    assert waits == [10, 10, 300]
    assert len(transport.deliveries) == 4
    assert status.state is CallbackState.FAILED
    assert status.failed_reason is FailedReason.EXHAUSTED


@pytest.mark.parametrize("failure", [f for f in AttemptFailure if f is not AttemptFailure.INTERRUPTED])
def test_no_answer_is_a_recorded_attempt_with_a_word_for_the_reason(
    failure: AttemptFailure, store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    id = store.store_callback_request(a_request(retry_phases=PHASES)).id

    build(transport=ScriptedTransport([failure], clock=clock)).run_until_idle()

    (attempt,) = store.get_callback_status(id).attempts
    assert (attempt.status_code, attempt.failure) == (0, failure)


def test_the_cause_of_a_failure_and_its_target_are_recorded_and_told(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, witness: Witness
) -> None:
    id = store.store_callback_request(a_request()).id
    refused = Answer(
        status_code=0,
        time=clock.now(),
        duration=timedelta(0),
        failure=AttemptFailure.CONNECT,
        detail="ECONNREFUSED",
    )

    build(transport=ScriptedTransport([refused], clock=clock)).run_until_idle()

    (attempt,) = store.get_callback_status(id).attempts
    assert attempt.detail == "ECONNREFUSED"
    told = [event for event in witness.events if event.callback_id == id]
    assert {event.origin for event in told} == {"http://receiver.test:80"}
    assert [event.detail for event in told if event.kind is EventKind.FAILED] == ["ECONNREFUSED"]


def test_a_final_status_ends_the_callback_at_once(store: InMemoryDataAccess, clock: FakeClock, build: Build) -> None:
    gone = store.store_callback_request(a_request(retry_phases=PHASES)).id
    teapot = store.store_callback_request(a_request(retry_phases=PHASES)).id
    policy = ResponsePolicy(final_statuses=[410, 418])

    build(transport=ScriptedTransport([410, 418], clock=clock), response_policy=policy).run_until_idle()

    for id in (gone, teapot):
        assert store.get_callback_status(id).failed_reason is FailedReason.REFUSED


def test_retry_after_moves_the_next_attempt_later_but_not_earlier(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, transport: HeldTransport
) -> None:
    dispatcher = build(transport=transport)
    later = store.store_callback_request(a_request(retry_phases=PHASES), id="later").id
    sooner = store.store_callback_request(a_request(retry_phases=PHASES), id="sooner").id
    dispatcher.start()
    transport.wait_for(2)
    transport.answer(later, 503, {"Retry-After": "600"})
    transport.answer(sooner, 503, {"retry-after": "1"})
    dispatcher.stop()

    waits = {id: store.get_callback_status(id).next_attempt_at - store.now() for id in (later, sooner)}  # type: ignore[operator]
    assert waits == {later: timedelta(seconds=600), sooner: timedelta(seconds=10)}


def test_jitter_only_ever_adds(store: InMemoryDataAccess, clock: FakeClock, build: Build) -> None:
    id = store.store_callback_request(a_request(retry_phases=PHASES)).id

    build(transport=ScriptedTransport([500], clock=clock), retry_jitter=0.5, random=lambda: 0.8).run_until_idle()

    due = store.get_callback_status(id).next_attempt_at
    assert due is not None
    assert due - store.now() == timedelta(seconds=14)


def test_a_callback_that_keeps_killing_its_dispatcher_fails_as_abandoned(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    id = store.store_callback_request(a_request("q", notification_email_address="a@example.com")).id
    behind = store.store_callback_request(a_request("q")).id
    for _ in range(5):
        assert store.acquire_locks("dies", lock_timeout=timedelta(seconds=30), limit=1)
        clock.advance(30)
    transport = ScriptedTransport(clock=clock)

    build(transport=transport, max_abandoned=5).run_until_idle()

    status = store.get_callback_status(id)
    assert status.state is CallbackState.FAILED
    assert status.failed_reason is FailedReason.ABANDONED
    assert status.attempts == ()
    assert [d.callback_id for d in transport.deliveries] == [behind]


def test_abandoned_locks_use_up_no_retry(store: InMemoryDataAccess, clock: FakeClock, build: Build) -> None:
    id = store.store_callback_request(a_request()).id
    for _ in range(4):
        store.acquire_locks("dies", lock_timeout=timedelta(seconds=30), limit=1)
        clock.advance(30)

    build(transport=ScriptedTransport([200], clock=clock)).run_until_idle()

    assert store.get_callback_status(id).state is CallbackState.SUCCEEDED


@pytest.mark.parametrize("reason", NotSentReason)
def test_a_request_that_was_not_sent_is_no_attempt_and_is_due_again(
    reason: NotSentReason, store: InMemoryDataAccess, clock: FakeClock, witness: Witness
) -> None:
    id = store.store_callback_request(a_request()).id
    transport = ScriptedTransport([NotSent(reason=reason), 200], clock=clock)
    engine = an_engine(store, InlineSender(transport), clock, witness)

    drive(engine, clock, until=engine.is_idle)

    status = store.get_callback_status(id)
    assert status.state is CallbackState.SUCCEEDED
    assert len(status.attempts) == 1
    assert len(status.locks) == 2


def test_an_attempt_must_end_before_its_lock_does(store: InMemoryDataAccess, clock: FakeClock, build: Build) -> None:
    store.store_callback_request(a_request())
    transport = ScriptedTransport(clock=clock)
    began = clock.monotonic()

    build(transport=transport, lock_timeout=timedelta(seconds=40)).run_until_idle()

    assert transport.deliveries[0].ends_at == began + 36


def test_every_state_change_is_told_once_and_after_it_was_stored(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    seen: list[tuple[EventKind, CallbackState]] = []

    class Reading(Witness):
        def observe(self, event: object) -> None:
            super().observe(event)  # type: ignore[arg-type]
            if (id := self.events[-1].callback_id) is not None:
                seen.append((self.events[-1].kind, store.get_callback_status(id).state))

    id = store.store_callback_request(a_request(retry_phases=PHASES), id="c").id
    dispatcher = build(transport=ScriptedTransport([500, 200], clock=clock), observer=Reading())
    dispatcher.run_until_idle()
    clock.advance(10)
    dispatcher.run_until_idle()

    assert id == "c"
    assert seen == [
        (EventKind.LOCKED, CallbackState.LOCKED),
        (EventKind.RETRY_SCHEDULED, CallbackState.WAITING),
        (EventKind.LOCKED, CallbackState.LOCKED),
        (EventKind.SUCCEEDED, CallbackState.SUCCEEDED),
    ]


def test_a_cancelled_callback_is_told_as_cancelled_though_the_dispatcher_meant_to_retry(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport, witness: Witness
) -> None:
    from callbackq.core.lifecycle import Action

    id = store.store_callback_request(a_request(retry_phases=PHASES)).id
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)
    store.request_transition(id, Action.CANCEL)
    transport.answer(id, 500)
    dispatcher.stop()

    assert store.get_callback_status(id).state is CallbackState.CANCELLED
    assert witness.kinds(id) == [EventKind.LOCKED, EventKind.CANCELLED]


def test_the_final_failure_is_mailed_with_retries_of_its_own_and_blocks_no_queue(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    notifier = RecordingNotifier(fail=2)
    failed = store.store_callback_request(a_request("q", notification_email_address="a@example.com")).id
    behind = store.store_callback_request(a_request("q")).id
    dispatcher = build(transport=ScriptedTransport([500], clock=clock), notifier=notifier)

    dispatcher.run_until_idle()
    assert store.get_callback_status(behind).state is CallbackState.SUCCEEDED
    assert notifier.notified == []
    for _ in range(10):
        clock.advance(timedelta(minutes=2))
        dispatcher.run_until_idle()

    assert [status.id for notice in notifier.notified for status in notice.callbacks] == [failed]


def test_a_stored_request_that_cannot_be_read_fails_alone(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    from attrs import evolve

    class Rotten(InMemoryDataAccess):
        def acquire_locks(self, *args: object, **kwargs: object) -> list:  # type: ignore[type-arg, override]
            return [
                evolve(one, request=None) if one.id == "rotten" else one
                for one in super().acquire_locks(*args, **kwargs)  # type: ignore[arg-type]
            ]

    rotten_store = Rotten(clock=clock)
    rotten_store.store_callback_request(a_request("q"), id="rotten")
    rotten_store.store_callback_request(a_request("q"), id="good")
    sent: list[Delivery] = []

    def note(delivery: Delivery) -> int:
        sent.append(delivery)
        return 200

    build(data_access=rotten_store, transport=ScriptedTransport(default=note, clock=clock)).run_until_idle()

    assert rotten_store.get_callback_status("rotten").failed_reason is FailedReason.UNDECODABLE
    assert [delivery.callback_id for delivery in sent] == ["good"]
