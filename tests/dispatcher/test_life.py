"""Starting, stopping, resting, forking."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from callbackq.clock import SystemClock
from callbackq.core.delivery import Delivery, Outcome
from callbackq.core.models import AttemptFailure, CallbackRequest, CallbackState, RetryPhase
from callbackq.dataaccess import Acquired
from callbackq.dispatcher import Dispatcher, StopReport
from callbackq.errors import DataAccessError, DispatcherStateError, InvalidRequestError
from callbackq.events import EventKind, ObservedEvent
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock, RecordingNotifier, ScriptedTransport
from support.dispatching import LIMIT, HeldTransport, Witness, a_request

Build = Callable[..., Dispatcher]


def test_a_started_dispatcher_notices_a_callback_stored_through_the_same_object_at_once(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, witness: Witness
) -> None:
    build(transport=ScriptedTransport(clock=clock), poll_interval=timedelta(hours=1)).start()
    witness.wait_for(EventKind.STARTED)

    store.store_callback_request(a_request())

    witness.wait_for(EventKind.SUCCEEDED)


def test_a_callback_stored_without_a_hint_is_found_by_polling(clock: FakeClock, build: Build, witness: Witness) -> None:
    class Mute(InMemoryDataAccess):
        def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
            return lambda: None

    store = Mute()
    build(
        data_access=store,
        transport=ScriptedTransport(),
        poll_interval=timedelta(milliseconds=20),
        clock=None,
    ).start()
    witness.wait_for(EventKind.STARTED)

    store.store_callback_request(a_request())

    witness.wait_for(EventKind.SUCCEEDED)


def test_run_blocks_until_stop_is_called_from_elsewhere(build: Build, clock: FakeClock, witness: Witness) -> None:
    dispatcher = build(transport=ScriptedTransport(clock=clock))
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    witness.wait_for(EventKind.STARTED)
    assert thread.is_alive()

    dispatcher.stop()

    thread.join(LIMIT)
    assert not thread.is_alive()


def test_stop_lets_requests_under_way_finish_and_records_them(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    id = store.store_callback_request(a_request()).id
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)
    reports: list[StopReport] = []
    stopping = threading.Thread(target=lambda: reports.append(dispatcher.stop(60)))
    stopping.start()

    transport.answer(id, 200)
    stopping.join(LIMIT)

    assert reports == [StopReport(finished=1, released=0, interrupted=0, unrecorded=0)]
    assert store.get_callback_status(id).success


def test_stop_interrupts_what_is_not_over_in_time_and_counts_no_retry(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    id = store.store_callback_request(a_request(retry_phases=[RetryPhase(retries=1, delay=timedelta(hours=1))])).id
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)

    report = dispatcher.stop(0)

    assert report == StopReport(finished=0, released=0, interrupted=1, unrecorded=0)
    status = store.get_callback_status(id)
    assert status.state is CallbackState.WAITING
    assert status.next_attempt_at == store.now()
    assert [attempt.failure for attempt in status.attempts] == [AttemptFailure.INTERRUPTED]
    (again,) = store.acquire_locks("other", lock_timeout=timedelta(seconds=30), limit=1)
    assert again.attempts_made == 0


def test_stop_gives_back_what_has_not_been_sent(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    ids = [store.store_callback_request(CallbackRequest(url="http://busy.test/")).id for _ in range(5)]
    dispatcher = build(transport=transport, host_concurrency=2)
    dispatcher.start()
    transport.wait_for(2)

    report = dispatcher.stop(0)

    assert (report.released, report.interrupted) == (3, 2)
    assert all(store.get_callback_status(id).state is CallbackState.WAITING for id in ids)


def test_a_stop_never_makes_a_final_state_that_a_kill_would_not(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    id = store.store_callback_request(a_request()).id  # no retries: one counted failure would be final
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)

    dispatcher.stop(0)

    assert store.get_callback_status(id).state is CallbackState.WAITING


def test_a_store_that_is_gone_does_not_keep_stop_from_returning(
    clock: FakeClock, build: Build, transport: HeldTransport
) -> None:
    class Gone(InMemoryDataAccess):
        def record_attempts(self, records: object) -> list[object]:  # type: ignore[override]
            raise DataAccessError("gone")

    store = Gone(clock=clock)
    store.store_callback_request(a_request())
    dispatcher = build(data_access=store, transport=transport)
    dispatcher.start()
    transport.wait_for(1)

    assert dispatcher.stop(0).unrecorded == 1


def test_a_second_stop_may_shorten_the_first(store: InMemoryDataAccess, build: Build, transport: HeldTransport) -> None:
    store.store_callback_request(a_request())
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)
    patient = threading.Thread(target=lambda: dispatcher.stop(3600))
    patient.start()

    dispatcher.stop(0)

    patient.join(LIMIT)
    assert not patient.is_alive()


def test_stop_can_be_called_by_an_observer_and_before_any_start(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    class Stopping(Witness):
        def observe(self, event: ObservedEvent) -> None:
            super().observe(event)
            if event.kind is EventKind.SUCCEEDED:
                dispatcher.stop()

    witness = Stopping()
    dispatcher = build(transport=ScriptedTransport(clock=clock), observer=witness)
    assert dispatcher.stop() == StopReport(finished=0, released=0, interrupted=0, unrecorded=0)

    dispatcher.start()
    store.store_callback_request(a_request())

    witness.wait_for(EventKind.STOPPED)


def test_a_stopped_dispatcher_can_be_started_again(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, witness: Witness
) -> None:
    dispatcher = build(transport=ScriptedTransport(clock=clock))
    for count in (1, 2, 3):
        with dispatcher:
            store.store_callback_request(a_request())
            witness.wait_for(EventKind.SUCCEEDED, count)


def test_a_running_dispatcher_cannot_be_started_or_run_a_second_time(clock: FakeClock, build: Build) -> None:
    dispatcher = build(transport=ScriptedTransport(clock=clock))
    dispatcher.start()

    for call in (dispatcher.start, dispatcher.run, dispatcher.run_until_idle):
        with pytest.raises(DispatcherStateError, match="running"):
            call()


def test_starts_and_stops_from_many_threads_leave_it_usable(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, witness: Witness
) -> None:
    dispatcher = build(transport=ScriptedTransport(clock=clock), notifier=RecordingNotifier())
    unexpected: list[BaseException] = []

    def start_and_stop() -> None:
        for _ in range(50):
            try:
                dispatcher.start()
            except DispatcherStateError:
                pass
            except BaseException as error:
                unexpected.append(error)
            dispatcher.stop(0)

    threads = [threading.Thread(target=start_and_stop) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT * 3)
    assert not unexpected
    dispatcher.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("callbackq-dispatcher")]

    store.store_callback_request(a_request())
    assert dispatcher.run_until_idle()


def test_a_store_that_cannot_be_opened_is_an_error_at_start_and_leaves_it_startable(
    clock: FakeClock, build: Build
) -> None:
    class Closed(InMemoryDataAccess):
        broken = True

        def open(self) -> None:
            if self.broken:
                raise DataAccessError("no such folder")

    store = Closed(clock=clock)
    dispatcher = build(data_access=store, transport=ScriptedTransport(clock=clock))
    with pytest.raises(DataAccessError):
        dispatcher.start()

    store.broken = False
    dispatcher.start()


def test_a_machine_without_threads_left_is_an_error_at_start_and_leaves_it_startable(
    clock: FakeClock, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    dispatcher = build(transport=ScriptedTransport(clock=clock))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="thread"):
            dispatcher.start()
    assert dispatcher.health().state == "stopped"

    dispatcher.start()


def test_run_until_idle_says_when_it_ran_out_of_time(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    store.store_callback_request(a_request())

    assert build(transport=transport, clock=None).run_until_idle(timeout=0.05) is False


def test_an_exception_from_outside_releases_and_passes_on(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    id = store.store_callback_request(a_request()).id

    class Interrupting(Witness):
        def observe(self, event: ObservedEvent) -> None:
            if event.kind is EventKind.LOCKED:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(transport=transport, observer=Interrupting()).run()

    assert store.get_callback_status(id).state is CallbackState.LOCKED


def test_its_repr_and_health_say_how_it_is(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, transport: HeldTransport
) -> None:
    store.store_callback_request(a_request())
    dispatcher = build(transport=transport, concurrency=16)
    assert repr(dispatcher) == "<Dispatcher 'one' new>"
    dispatcher.start()
    transport.wait_for(1)
    clock.advance(3)

    health = dispatcher.health()

    assert (health.state, health.busy, health.unrecorded, health.store_is_failing) == ("running", 1, 0, False)
    assert repr(dispatcher).startswith("<Dispatcher 'one' running, 1/16 slots busy, last poll ")
    dispatcher.stop(0)
    assert dispatcher.health().state == "stopped"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("concurrency", 0),
        ("host_concurrency", 0),
        ("max_abandoned", 0),
        ("poll_interval", timedelta(0)),
        ("retry_jitter", 1.5),
        ("retry_jitter", -0.1),
        ("lock_timeout", timedelta(seconds=16.9)),
        ("lock_timeout", timedelta(0)),
        ("lock_timeout", 30),
        ("lock_timeout", timedelta.max),
        ("poll_interval", 0.25),
        ("poll_interval", timedelta.max),
        ("concurrency", "8"),
        ("concurrency", 4.5),
        ("concurrency", True),
        ("max_abandoned", None),
        ("retry_jitter", "much"),
        ("response_policy", {410}),
        ("observer", print),
        ("notifier", print),
        ("transport", object()),
        ("transport", ScriptedTransport),
        ("data_access", "callbacks.db"),
        ("clock", 5),
        ("random", 0.5),
        ("machine_name", "two\nlines"),
    ],
)
def test_an_impossible_setting_is_refused_by_name_when_it_is_built(setting: str, value: object, build: Build) -> None:
    settings = {"transport": ScriptedTransport(deadline=timedelta(seconds=15)), setting: value}

    with pytest.raises(InvalidRequestError) as caught:
        build(**settings)

    assert {name for name, _ in caught.value.errors} == {setting}


def test_the_shortest_lock_timeout_that_fits_is_accepted(build: Build) -> None:
    build(transport=ScriptedTransport(deadline=timedelta(seconds=15)), lock_timeout=timedelta(seconds=17))


def test_a_notifier_needs_a_store_that_keeps_owed_emails(build: Build, store: InMemoryDataAccess) -> None:
    class Plain:
        def __getattr__(self, name: str) -> object:
            if "notification" in name:
                raise AttributeError(name)
            return getattr(store, name)

    with pytest.raises(ValueError, match="SupportsNotifications"):
        build(data_access=Plain(), transport=ScriptedTransport(), notifier=RecordingNotifier())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_the_child_knows_that_it_is_not_running_and_can_start(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, witness: Witness
) -> None:
    dispatcher = build(transport=ScriptedTransport(clock=clock))
    dispatcher.start()
    witness.wait_for(EventKind.STARTED)
    reader, writer = os.pipe()

    child = os.fork()
    if child == 0:
        words = [dispatcher.health().state]
        try:
            dispatcher.start()
            store.store_callback_request(a_request())
            witness.wait_for(EventKind.SUCCEEDED)
            words.append("delivered")
            dispatcher.stop()
        finally:
            os.write(writer, " ".join(words).encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.read() == "new delivered"
    os.waitpid(child, 0)

    assert dispatcher.health().state == "running"


def test_request_stop_never_waits(store: InMemoryDataAccess, build: Build, transport: HeldTransport) -> None:
    id = store.store_callback_request(a_request()).id
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)

    dispatcher.request_stop(3600)

    assert dispatcher.health().state == "stopping"
    transport.answer(id, 200)
    assert dispatcher.stop().finished == 1


def test_a_stop_that_is_asked_for_while_the_store_is_opened_is_not_lost(clock: FakeClock, build: Build) -> None:
    class Slow(InMemoryDataAccess):
        def open(self) -> None:
            dispatcher.request_stop()

    dispatcher = build(data_access=Slow(clock=clock), transport=ScriptedTransport(clock=clock))

    dispatcher.run()  # returns

    assert dispatcher.health().state == "stopped"


def test_a_failed_start_leaves_nothing_running(clock: FakeClock, build: Build) -> None:
    class Deaf(InMemoryDataAccess):
        def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
            raise DataAccessError("no hints")

    dispatcher = build(data_access=Deaf(clock=clock), transport=ScriptedTransport(clock=clock))

    for _ in range(2):
        with pytest.raises(DataAccessError):
            dispatcher.start()
    assert dispatcher.health().state == "new"


def test_collaborators_that_raise_at_the_end_do_not_keep_a_stop_from_ending(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    class Clinging(HeldTransport):
        def interrupt(self, deliveries: object) -> None:
            raise RuntimeError("no")

    transport = Clinging(clock)
    store.store_callback_request(a_request())
    store.subscribe = lambda wake: lambda: 1 / 0  # type: ignore[assignment, return-value]
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)

    assert dispatcher.stop(0).unrecorded == 1
    assert dispatcher.health().state == "stopped"


def test_an_observer_that_stops_at_the_start_does_not_wait_for_itself(clock: FakeClock, build: Build) -> None:
    class Hasty(Witness):
        def observe(self, event: ObservedEvent) -> None:
            super().observe(event)
            if event.kind is EventKind.STARTED:
                dispatcher.stop()

    witness = Hasty()
    dispatcher = build(transport=ScriptedTransport(clock=clock), observer=witness)

    dispatcher.start()

    witness.wait_for(EventKind.STOPPED)


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit()], ids=repr)
def test_an_observer_that_wants_to_end_the_thread_stops_nothing(
    error: BaseException, store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    class Rude(Witness):
        def observe(self, event: ObservedEvent) -> None:
            super().observe(event)
            raise error

    witness = Rude()
    build(transport=ScriptedTransport(clock=clock), observer=witness).start()
    store.store_callback_request(a_request())

    witness.wait_for(EventKind.SUCCEEDED)


def test_a_dispatcher_lives_on_when_there_is_no_memory_to_tell_of_a_fault(build: Build, witness: Witness) -> None:
    class Starved(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise MemoryError

    class FailingStore(InMemoryDataAccess):
        faults = [MemoryError()]  # noqa: RUF012

        def acquire_locks(self, *args: Any, **kwargs: Any) -> list[Acquired]:
            if self.faults:
                raise self.faults.pop()
            return super().acquire_locks(*args, **kwargs)

    starved, logger = Starved(), logging.getLogger("callbackq")
    logger.addHandler(starved)
    try:
        store = FailingStore()
        store.store_callback_request(a_request())
        build(data_access=store, transport=ScriptedTransport(), clock=SystemClock()).start()

        witness.wait_for(EventKind.SUCCEEDED)
    finally:
        logger.removeHandler(starved)


def test_run_until_idle_is_not_done_while_callbacks_that_were_due_are_parked(
    store: InMemoryDataAccess, build: Build
) -> None:
    import time

    class Slow(ScriptedTransport):
        def send(self, delivery: Delivery) -> Outcome:
            threading.Event().wait(0.15)
            return super().send(delivery)

    clock = None
    slow_store = InMemoryDataAccess()
    ids = [slow_store.store_callback_request(a_request()).id for _ in range(12)]
    began = time.monotonic()

    assert build(data_access=slow_store, clock=clock, transport=Slow(), host_concurrency=2).run_until_idle(30)

    assert all(slow_store.get_callback_status(id).success for id in ids)
    assert time.monotonic() - began < 30


def test_a_store_that_is_cancelled_does_not_end_the_dispatchers_own_thread(
    clock: FakeClock, build: Build, witness: Witness
) -> None:
    class Cancelled(InMemoryDataAccess):
        errors = 2

        def acquire_locks(self, *args: object, **kwargs: object) -> list[Acquired]:
            if self.errors:
                self.errors -= 1
                raise asyncio.CancelledError
            return super().acquire_locks(*args, **kwargs)  # type: ignore[arg-type]

    store = Cancelled(clock=clock)
    build(data_access=store, transport=ScriptedTransport(clock=clock), poll_interval=timedelta(milliseconds=10)).start()
    store.store_callback_request(a_request())

    witness.wait_for(EventKind.SUCCEEDED)


def test_the_shortest_of_several_stops_counts_in_whatever_order_they_come(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    store.store_callback_request(a_request())
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)

    dispatcher.request_stop(3600)
    dispatcher.request_stop(0)
    dispatcher.request_stop(1800)

    assert dispatcher.stop(3600).interrupted == 1
