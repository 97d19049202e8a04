"""Every owed e-mail is sent at least once, or given up after its last try, whatever store and notifier do."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import pytest
from attrs import define

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackRequest, CallbackState, CallbackStatus, FailedReason
from callbackq.dataaccess import Notification
from callbackq.errors import (
    CallbackNotFoundError,
    DataAccessError,
    InvalidRequestError,
    NotificationError,
    TransientDataAccessError,
)
from callbackq.outbox import Outbox, OutboxStore
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock, RecordingNotifier

ADDRESS = "ops@example.com"
LEASE = timedelta(minutes=2)
POLL = timedelta(seconds=15)


def a_request() -> CallbackRequest:
    return CallbackRequest(url="https://receiver.example/hook", notification_email_address=ADDRESS)


@define
class Debt:
    due: float
    tries: int = 0
    token: int = 0


class DebtStore:
    """The smallest store the outbox can work with: debts only, in the order in which they were made."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._debts: dict[str, Debt] = {}
        self._mutex = threading.Lock()

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        with self._mutex:
            now = self._clock.monotonic()
            due = [(id, debt) for id, debt in self._debts.items() if debt.due <= now][:limit]
            for _, debt in due:
                debt.due = now + lock_timeout.total_seconds()
                debt.token += 1
            return [
                Notification(callback_id=id, email_address=ADDRESS, tries=debt.tries, token=debt.token)
                for id, debt in due
            ]

    def record_notification(self, notification: Notification, *, retry_in: timedelta | None) -> None:
        with self._mutex:
            debt = self._debts.get(notification.callback_id)
            if debt is None or debt.token != notification.token:
                return
            if retry_in is None:
                del self._debts[notification.callback_id]
            else:
                debt.tries += 1
                debt.due = self._clock.monotonic() + retry_in.total_seconds()

    def get_callback_status(self, id: str) -> CallbackStatus:
        return CallbackStatus(
            id=id, request=a_request(), state=CallbackState.FAILED, failed_reason=FailedReason.EXHAUSTED
        )

    def fail(self, id: str) -> None:
        with self._mutex:
            self._debts[id] = Debt(due=self._clock.monotonic())


class WholeStore(InMemoryDataAccess):
    """The shipped store, with callbacks that have failed."""

    def fail(self, id: str) -> None:
        self.store_callback_request(a_request(), id=id)
        [acquired] = self.acquire_locks("machine", lock_timeout=timedelta(seconds=30), limit=1)
        self.record_attempt(
            acquired,
            None,
            Transition(state=CallbackState.FAILED, notify=True, failed_reason=FailedReason.ABANDONED),
        )


class FailingStore(OutboxStore, Protocol):
    def fail(self, id: str) -> None:
        """Let a callback fail for good and owe an e-mail."""


class Intercepted:
    """A store or notifier to whose calls a test can add something, before or after: a fault, time, a rival."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, options))
            self.before.get(name, lambda: None)()
            result = method(*args, **options)
            self.after.get(name, lambda: None)()
            return result

        return call if callable(method) else method


def raising(*errors: BaseException) -> Callable[[], None]:
    """Raise these, one per call, then nothing."""
    left = list(errors)

    def act() -> None:
        if left:
            raise left.pop(0)

    return act


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=[DebtStore, WholeStore], ids=["debts only", "in memory"])
def store(request: pytest.FixtureRequest, clock: FakeClock) -> FailingStore:
    whole = request.param is WholeStore
    failing: FailingStore = WholeStore(clock=clock) if whole else DebtStore(clock)
    return failing


def an_outbox(store: Any, notifier: Any, clock: FakeClock, **options: Any) -> Outbox:
    settings = {"lock_timeout": LEASE, "poll_interval": POLL, "random": lambda: 0.0}
    return Outbox(store, notifier, clock=clock, **{**settings, **options})


def drain(outbox: Outbox) -> None:
    for _ in range(100):
        if outbox.step() > 0:
            return
    raise AssertionError("the outbox never rests")


def told(notifier: RecordingNotifier) -> list[str]:
    return [status.id for status in notifier.notified]


# One e-mail.


def test_an_owed_email_is_sent_once(store: FailingStore, clock: FakeClock) -> None:
    store.fail("a")
    notifier = RecordingNotifier()
    outbox = an_outbox(store, notifier, clock)

    assert outbox.step() == 0.0
    assert outbox.step() == POLL.total_seconds()

    clock.advance(timedelta(days=2))
    drain(outbox)
    assert told(notifier) == ["a"]
    assert notifier.notified[0].request.notification_email_address == ADDRESS


def test_without_debts_it_rests(store: FailingStore, clock: FakeClock) -> None:
    notifier = RecordingNotifier()

    assert an_outbox(store, notifier, clock).step() == POLL.total_seconds()

    assert notifier.notified == []


def test_one_step_sends_one_email_oldest_first(store: FailingStore, clock: FakeClock) -> None:
    for id in ("a", "b", "c"):
        store.fail(id)
        clock.advance(1)
    notifier = RecordingNotifier()
    outbox = an_outbox(store, notifier, clock)

    outbox.step()
    assert told(notifier) == ["a"]
    drain(outbox)
    assert told(notifier) == ["a", "b", "c"]


def test_two_outboxes_on_one_store_send_each_email_once(store: FailingStore, clock: FakeClock) -> None:
    for id in ("a", "b", "c"):
        store.fail(id)
    notifier = Intercepted(RecordingNotifier())
    other = an_outbox(store, notifier, clock)

    def let_the_other_work() -> None:
        notifier.before.clear()
        drain(other)

    notifier.before["notify"] = let_the_other_work

    drain(an_outbox(store, notifier, clock))

    assert sorted(told(notifier._inner)) == ["a", "b", "c"]


# When it fails.

EVERY_DELAY = [timedelta(minutes=1)] * 5 + [timedelta(minutes=10)] * 12 + [timedelta(hours=1)] * 24


def test_a_failed_email_is_tried_again_for_a_day_and_then_given_up(
    store: FailingStore, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    store.fail("a")
    notifier = Intercepted(RecordingNotifier(fail=10**6))
    outbox = an_outbox(store, notifier, clock)

    drain(outbox)
    for number, delay in enumerate(EVERY_DELAY, start=1):
        assert len(notifier.calls) == number
        clock.advance(delay - timedelta(seconds=1))
        drain(outbox)
        assert len(notifier.calls) == number, "tried too early"
        clock.advance(1)
        drain(outbox)
    assert len(notifier.calls) == 1 + len(EVERY_DELAY)

    clock.advance(timedelta(days=30))
    drain(outbox)
    assert len(notifier.calls) == 1 + len(EVERY_DELAY)
    [given_up] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert given_up.name == "callbackq.outbox"
    assert given_up.getMessage().startswith(
        "the e-mail about callback 'a' is given up after try 42: ConnectionError at "
    )


def test_an_email_that_was_failing_is_sent_when_the_mail_server_is_back(store: FailingStore, clock: FakeClock) -> None:
    store.fail("a")
    notifier = RecordingNotifier(fail=3)
    outbox = an_outbox(store, notifier, clock)

    for _ in range(4):
        drain(outbox)
        clock.advance(timedelta(minutes=1))

    drain(outbox)
    assert told(notifier) == ["a"]


def test_the_schedule_survives_a_restart(store: FailingStore, clock: FakeClock) -> None:
    store.fail("a")
    notifier = Intercepted(RecordingNotifier(fail=10**6))
    for _ in range(5):
        drain(an_outbox(store, notifier, clock))
        clock.advance(timedelta(minutes=1))

    drain(an_outbox(store, notifier, clock))
    clock.advance(timedelta(minutes=1))
    drain(an_outbox(store, notifier, clock))

    assert len(notifier.calls) == 6  # the next one is due after ten minutes


def test_a_refused_address_is_given_up_at_once(
    store: FailingStore, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    store.fail("a")
    notifier = Intercepted(RecordingNotifier())
    notifier.before["notify"] = raising(NotificationError("the recipient: 550", permanent=True))
    outbox = an_outbox(store, notifier, clock)

    drain(outbox)
    clock.advance(timedelta(days=2))
    drain(outbox)

    assert len(notifier.calls) == 1
    [given_up] = caplog.records
    assert given_up.levelno == logging.ERROR
    assert given_up.getMessage() == "the e-mail about callback 'a' is given up after try 1: 'the recipient: 550'"


@pytest.mark.parametrize(
    "error",
    [
        NotificationError("busy"),
        OSError("no route"),
        ValueError(),
        MemoryError(),
        CallbackNotFoundError("another"),
        DataAccessError("the notifier's own store"),
    ],
)
def test_whatever_a_notifier_raises_is_tried_again(store: FailingStore, clock: FakeClock, error: Exception) -> None:
    store.fail("a")
    notifier = Intercepted(RecordingNotifier())
    notifier.before["notify"] = raising(error)
    outbox = an_outbox(store, notifier, clock)

    drain(outbox)
    clock.advance(timedelta(minutes=1))
    drain(outbox)

    assert told(notifier._inner) == ["a"]


def test_one_email_that_fails_holds_up_no_other(store: FailingStore, clock: FakeClock) -> None:
    store.fail("a")
    store.fail("b")
    notifier = RecordingNotifier(fail=1)

    drain(an_outbox(store, notifier, clock))

    assert len(told(notifier)) == 1


# When the store fails, or its callback is gone.


def test_an_email_about_a_callback_that_is_gone_is_dropped(store: FailingStore, clock: FakeClock) -> None:
    store.fail("a")
    purged = Intercepted(store)
    purged.before["get_callback_status"] = raising(CallbackNotFoundError("a"))
    notifier = RecordingNotifier()
    outbox = an_outbox(purged, notifier, clock)

    drain(outbox)
    clock.advance(timedelta(days=2))
    drain(outbox)

    assert notifier.notified == []
    assert [options for name, options in purged.calls if name == "record_notification"] == [{"retry_in": None}]


def test_a_callback_that_can_never_be_read_is_given_up_in_the_end(store: FailingStore, clock: FakeClock) -> None:
    store.fail("a")
    corrupt = Intercepted(store)
    corrupt.before["get_callback_status"] = raising(*[DataAccessError("unreadable")] * 100)
    outbox = an_outbox(corrupt, RecordingNotifier(), clock)

    for _ in range(100):
        drain(outbox)
        clock.advance(timedelta(hours=1))

    assert [name for name, _ in corrupt.calls].count("get_callback_status") == 42


def test_rests_grow_while_the_store_fails_and_begin_anew_afterwards(store: FailingStore, clock: FakeClock) -> None:
    flaky = Intercepted(store)
    flaky.before["acquire_notifications"] = raising(*[TransientDataAccessError("down")] * 8)
    outbox = an_outbox(flaky, RecordingNotifier(), clock)

    assert [outbox.step() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, POLL.total_seconds()]

    flaky.before["acquire_notifications"] = raising(ValueError("a fault of the store's own"))
    assert outbox.step() == 1


class Killed(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", ["acquire_notifications", "get_callback_status", "notify", "record_notification"])
@pytest.mark.parametrize("error", [Killed, DataAccessError], ids=["death", "fault"])
def test_an_email_interrupted_anywhere_is_sent_once_or_twice_and_never_not(
    store: FailingStore, clock: FakeClock, moment: str, call: str, error: type[BaseException]
) -> None:
    store.fail("a")
    notifier = Intercepted(RecordingNotifier())
    unlucky = Intercepted(store)
    hooks = getattr(notifier if call == "notify" else unlucky, moment)
    hooks[call] = raising(error("here"))
    try:
        an_outbox(unlucky, notifier, clock).step()
    except Killed:
        pass

    survivor = an_outbox(unlucky, notifier, clock)
    for _ in range(3):
        drain(survivor)
        clock.advance(LEASE)

    sent_before_the_record = (call, moment) in {("notify", "after"), ("record_notification", "before")}
    assert told(notifier._inner) == ["a"] * (2 if sent_before_the_record else 1)


# The lease.


def test_an_email_whose_lease_would_not_last_is_left_to_the_next_lease(store: FailingStore, clock: FakeClock) -> None:
    store.fail("a")
    slow = Intercepted(store)
    slow.after["get_callback_status"] = lambda: clock.advance(timedelta(seconds=91))
    notifier = Intercepted(RecordingNotifier())
    notifier._inner.deadline = timedelta(seconds=30)
    outbox = an_outbox(slow, notifier, clock)

    drain(outbox)
    assert notifier.calls == []
    assert "record_notification" not in [name for name, _ in slow.calls]

    slow.after.clear()
    clock.advance(timedelta(seconds=29))
    drain(outbox)
    assert told(notifier._inner) == ["a"]


@pytest.mark.parametrize(
    ("deadline", "lease"),
    [
        (None, timedelta(minutes=2)),
        ("soon", timedelta(minutes=2)),
        (timedelta(seconds=30), timedelta(minutes=2)),
        (timedelta(minutes=10), timedelta(minutes=20)),
    ],
)
def test_a_lease_outlasts_the_notifier_by_default(
    store: FailingStore, clock: FakeClock, deadline: object, lease: timedelta
) -> None:
    notifier = RecordingNotifier()
    notifier.deadline = deadline  # type: ignore[attr-defined]
    watched = Intercepted(store)

    an_outbox(watched, notifier, clock, lock_timeout=None).step()

    assert watched.calls == [("acquire_notifications", {"lock_timeout": lease, "limit": 1})]


@pytest.mark.parametrize(
    ("deadline", "settings", "faults"),
    [
        (timedelta(seconds=10), {"lock_timeout": timedelta(seconds=12)}, []),
        (timedelta(seconds=10), {"lock_timeout": timedelta(seconds=11.9)}, ["lock_timeout"]),
        (timedelta(seconds=90), {"lock_timeout": timedelta(seconds=100)}, []),
        (timedelta(seconds=91), {"lock_timeout": timedelta(seconds=100)}, ["lock_timeout"]),
        (None, {"lock_timeout": timedelta(seconds=1)}, ["lock_timeout"]),
        (None, {"lock_timeout": timedelta(0)}, ["lock_timeout"]),
        (None, {"poll_interval": timedelta(0)}, ["poll_interval"]),
        (None, {"lock_timeout": timedelta(seconds=1), "poll_interval": -POLL}, ["lock_timeout", "poll_interval"]),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    clock: FakeClock, deadline: timedelta | None, settings: dict[str, Any], faults: list[str]
) -> None:
    notifier = RecordingNotifier()
    notifier.deadline = deadline  # type: ignore[attr-defined]

    refused: list[str] = []
    try:
        an_outbox(DebtStore(clock), notifier, clock, **settings)
    except InvalidRequestError as refusal:
        refused = [path for path, _ in refusal.errors]

    assert refused == faults


# What is logged.


def test_logs_name_the_callback_on_one_line_and_never_the_address(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="callbackq")
    id = "x\r\nERROR forged \x1b[31m\u202e"
    notifier = Intercepted(RecordingNotifier())
    notifier.before["notify"] = raising(
        OSError(f"{ADDRESS} is unknown"), NotificationError("a\nb"), NotificationError("c", permanent=True)
    )
    store = Intercepted(DebtStore(clock))
    store._inner.get_callback_status = lambda _: CallbackStatus(id="a", request=a_request())
    store.before["acquire_notifications"] = raising(OSError(f"{ADDRESS} is in this row"))
    store._inner.fail(id)
    outbox = an_outbox(store, notifier, clock)

    for _ in range(4):
        drain(outbox)
        clock.advance(timedelta(minutes=1))

    assert len(caplog.records) == 4
    for record in caplog.records:
        assert ADDRESS not in record.getMessage()
        assert re.fullmatch("[ -~]+", record.getMessage())
        assert record.exc_info is None
    assert r"callback 'x\r\nERROR forged \x1b[31m\u202e' failed, try 1: OSError at " in caplog.messages[1]
    assert caplog.messages[2].endswith(r"try 2: 'a\nb'; next in 0:01:00")


# The thread.


class Doorbell:
    """A notifier that lets a test wait for its calls."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._rang = threading.Condition()
        self.act: Callable[[], object] = lambda: None

    def notify(self, status: CallbackStatus) -> None:
        with self._rang:
            self.ids.append(status.id)
            self._rang.notify_all()
        self.act()

    def wait_for(self, count: int) -> bool:
        with self._rang:
            return self._rang.wait_for(lambda: len(self.ids) >= count, 5)


def outbox_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "callbackq-outbox"]


@pytest.fixture
def started(clock: FakeClock) -> Iterator[Callable[[Any, Any], Outbox]]:
    outboxes: list[Outbox] = []

    def start(store: Any, notifier: Any) -> Outbox:
        outboxes.append(an_outbox(store, notifier, clock, poll_interval=timedelta(hours=1)))
        outboxes[-1].start()
        return outboxes[-1]

    yield start
    assert all(outbox.stop() for outbox in outboxes)
    assert outbox_threads() == []


Started = Callable[[Any, Any], Outbox]


def test_a_started_outbox_sends_what_is_owed_and_what_it_is_woken_for(store: FailingStore, started: Started) -> None:
    store.fail("a")
    bell = Doorbell()

    outbox = started(store, bell)
    assert bell.wait_for(1)
    store.fail("b")
    outbox.wake()

    assert bell.wait_for(2)
    assert bell.ids == ["a", "b"]
    [thread] = outbox_threads()
    assert thread.daemon


def test_starting_twice_makes_one_thread_and_stopping_twice_is_harmless(store: FailingStore, started: Started) -> None:
    outbox = started(store, Doorbell())

    outbox.start()

    assert len(outbox_threads()) == 1
    assert outbox.stop()
    assert outbox.stop()
    assert outbox_threads() == []


def test_an_outbox_that_was_never_started_can_be_woken_and_stopped(store: FailingStore, clock: FakeClock) -> None:
    outbox = an_outbox(store, Doorbell(), clock)

    outbox.wake()

    assert outbox.stop()


def test_a_stopped_outbox_can_be_started_again(store: FailingStore, started: Started) -> None:
    bell = Doorbell()
    outbox = started(store, bell)
    outbox.stop()
    store.fail("a")

    outbox.start()

    assert bell.wait_for(1)


def test_stopping_does_not_wait_longer_than_it_is_told_and_the_thread_ends_after_its_email(
    store: FailingStore, started: Started
) -> None:
    store.fail("a")
    store.fail("b")
    bell, mail_server_answers = Doorbell(), threading.Event()
    bell.act = lambda: mail_server_answers.wait(5)
    outbox = started(store, bell)
    assert bell.wait_for(1)

    assert not outbox.stop(timeout=timedelta(milliseconds=1))

    mail_server_answers.set()
    assert outbox.stop()
    assert len(bell.ids) == 1


def test_a_thread_that_was_stopped_is_not_revived_by_the_next_start(store: FailingStore, started: Started) -> None:
    store.fail("a")
    store.fail("b")
    bell, mail_server_answers = Doorbell(), threading.Event()
    bell.act = lambda: mail_server_answers.wait(5)
    outbox = started(store, bell)
    assert bell.wait_for(1)
    [first] = outbox_threads()
    outbox.stop(timeout=timedelta(0))

    outbox.start()

    assert bell.wait_for(2)
    mail_server_answers.set()
    first.join(5)
    assert not first.is_alive()
    assert len(outbox_threads()) == 1


def test_a_notifier_may_stop_the_outbox_it_is_called_by(store: FailingStore, started: Started) -> None:
    bell = Doorbell()
    results: list[bool] = []
    outbox = started(store, bell)
    bell.act = lambda: results.append(outbox.stop())
    [thread] = outbox_threads()
    store.fail("a")
    store.fail("b")

    outbox.wake()
    thread.join(5)

    assert results == [False]
    assert len(bell.ids) == 1


def test_an_outbox_can_be_stopped_by_its_very_first_email(store: FailingStore, clock: FakeClock) -> None:
    store.fail("a")
    store.fail("b")
    bell = Doorbell()
    outbox = an_outbox(store, bell, clock)
    bell.act = lambda: outbox.stop()

    outbox.start()

    for thread in outbox_threads():
        thread.join(5)
    assert outbox_threads() == []
    assert len(bell.ids) == 1


@pytest.mark.parametrize("error", [OSError, SystemExit, KeyboardInterrupt])
def test_the_thread_survives_what_notifiers_raise(
    store: FailingStore, started: Started, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    store.fail("a")
    bell = Doorbell()
    bell.act = raising(error())
    outbox = started(store, bell)
    assert bell.wait_for(1)
    store.fail("b")

    outbox.wake()

    assert bell.wait_for(2)
    assert f"{error.__name__} at " in caplog.text


def test_starting_and_stopping_from_many_threads_leaves_nothing_behind(store: FailingStore, clock: FakeClock) -> None:
    outbox = an_outbox(store, Doorbell(), clock)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                outbox.start()
                outbox.wake()
                outbox.stop()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert failures == []
    assert outbox.stop()
    assert outbox_threads() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_no_outbox_until_it_starts_one(store: FailingStore, started: Started) -> None:
    store.fail("a")
    bell, mail_server_answers = Doorbell(), threading.Event()
    bell.act = lambda: mail_server_answers.wait(5)
    outbox = started(store, bell)
    assert bell.wait_for(1)

    # As if another thread were starting or stopping it at this moment.
    with outbox._mutex, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "this process is multi-threaded": that is the point
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # rather than hang
            bell.act = lambda: None
            store.fail("b")
            outbox.start()
            outbox.wake()
            os._exit(0 if bell.wait_for(2) and outbox.stop() else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    mail_server_answers.set()
    assert len(outbox_threads()) == 1
