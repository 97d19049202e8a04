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
from pathlib import Path
from typing import Any, Protocol

import pytest
from attrs import define, field

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackRequest, CallbackState, CallbackStatus, FailedReason
from callbackq.dataaccess import MOST_LISTED, Action, AttemptRecord, DataAccess, Notification
from callbackq.errors import (
    CallbackNotFoundError,
    DataAccessError,
    InvalidRequestError,
    NotificationError,
    TransientDataAccessError,
)
from callbackq.notifier import FailureNotice
from callbackq.outbox import Outbox, OutboxStore
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock, RecordingNotifier

ADDRESS = "ops@example.com"
LEASE = timedelta(minutes=2)
POLL = timedelta(seconds=15)


def a_request(queue_id: str = "") -> CallbackRequest:
    return CallbackRequest(url="https://receiver.example/hook", queue_id=queue_id, notification_email_address=ADDRESS)


@define
class Mailing:
    due: float
    debts: list[str] = field(factory=list)
    covered: int = 0
    tries: int = 0
    token: int = 0
    first_token: int = 0


class DebtStore:
    """The smallest store the outbox can work with: debts of one address only, in the order in which they were made."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._mailings: dict[str, Mailing] = {}
        self._last_token = 0
        self._mutex = threading.Lock()

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        with self._mutex:
            now = self._clock.monotonic()
            due = [(queue_id, one) for queue_id, one in self._mailings.items() if one.debts and one.due <= now][:limit]
            for _, one in due:
                self._last_token += 1
                one.due = now + lock_timeout.total_seconds()
                one.token = self._last_token
                if not one.covered:
                    one.covered, one.first_token = len(one.debts), one.token
            return [
                Notification(
                    email_address=ADDRESS,
                    queue_id=queue_id,
                    callback_ids=tuple(one.debts[: min(one.covered, MOST_LISTED)]),
                    count=one.covered,
                    tries=one.tries,
                    token=one.token,
                    first_token=one.first_token,
                )
                for queue_id, one in due
            ]

    def record_notification(
        self, notification: Notification, *, retry_in: timedelta | None, quiet_for: timedelta = timedelta(0)
    ) -> None:
        with self._mutex:
            one = self._mailings[notification.queue_id]
            if one.token != notification.token:
                return
            one.token = 0
            if retry_in is None:
                one.debts = one.debts[one.covered :]
                one.covered = one.tries = 0
            else:
                one.tries += 1
            one.due = self._clock.monotonic() + (quiet_for if retry_in is None else retry_in).total_seconds()

    def get_callback_status(self, id: str) -> CallbackStatus:
        return CallbackStatus(
            id=id, request=a_request(), state=CallbackState.FAILED, failed_reason=FailedReason.EXHAUSTED
        )

    def fail(self, id: str, queue_id: str | None = None) -> None:
        with self._mutex:
            now = self._clock.monotonic()
            self._mailings.setdefault(queue_of(id, queue_id), Mailing(due=now)).debts.append(id)


def queue_of(id: str, queue_id: str | None) -> str:
    return f"queue of {id}" if queue_id is None else queue_id


def fail_in(store: DataAccess, id: str, queue_id: str | None) -> None:
    store.store_callback_request(a_request(queue_of(id, queue_id)), id=id)
    [acquired] = store.acquire_locks("machine", lock_timeout=timedelta(seconds=30), limit=1)
    store.record_attempt(
        acquired, None, Transition(state=CallbackState.FAILED, notify=True, failed_reason=FailedReason.ABANDONED)
    )


class WholeStore(InMemoryDataAccess):
    """A shipped store, with callbacks that have failed."""

    def fail(self, id: str, queue_id: str | None = None) -> None:
        fail_in(self, id, queue_id)


class FileStore(SQLiteDataAccess):
    """The other one."""

    def fail(self, id: str, queue_id: str | None = None) -> None:
        fail_in(self, id, queue_id)


class FailingStore(OutboxStore, Protocol):
    def fail(self, id: str, queue_id: str | None = None) -> None:
        """Let a callback fail for good and owe an e-mail, in a queue of its own name unless told otherwise."""


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


@pytest.fixture(params=["debts only", "in memory"])
def store(request: pytest.FixtureRequest, clock: FakeClock) -> FailingStore:
    failing: FailingStore = WholeStore(clock=clock) if request.param == "in memory" else DebtStore(clock)
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
    return [status.id for notice in notifier.notified for status in notice.callbacks]


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
    assert notifier.notified[0].email_address == ADDRESS


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


# Many failures.


@pytest.fixture(params=["debts only", "in memory", "in a file"])
def any_store(request: pytest.FixtureRequest, clock: FakeClock, tmp_path: Path) -> Iterator[FailingStore]:
    if request.param == "in a file":
        with FileStore(tmp_path / "callbacks.db", clock=clock) as store:
            yield store
    else:
        yield WholeStore(clock=clock) if request.param == "in memory" else DebtStore(clock)


HOUR = timedelta(hours=1)


def counts(notifier: RecordingNotifier) -> list[int]:
    return [notice.count for notice in notifier.notified]


def test_failures_of_one_queue_give_one_email_and_an_hour_later_one_with_all_others(
    any_store: FailingStore, clock: FakeClock
) -> None:
    notifier = RecordingNotifier()
    outbox = an_outbox(any_store, notifier, clock)
    for number in range(25):
        any_store.fail(str(number), "orders")
        drain(outbox)
        clock.advance(timedelta(minutes=2))
    assert counts(notifier) == [1]

    clock.advance(HOUR - timedelta(minutes=50, seconds=1))
    drain(outbox)
    assert counts(notifier) == [1], "an e-mail within the hour"
    clock.advance(1)
    drain(outbox)

    first, digest = notifier.notified
    assert [status.id for status in first.callbacks] == ["0"]
    assert (digest.email_address, digest.queue_id) == (ADDRESS, "orders")
    assert (digest.count, digest.unlisted) == (24, 4)
    assert [status.id for status in digest.callbacks] == [str(number) for number in range(1, 21)]


@pytest.mark.parametrize("kind", ["in memory", "in a file"])
def test_ten_thousand_failures_are_two_emails(kind: str, clock: FakeClock, tmp_path: Path) -> None:
    whole = kind == "in memory"
    store = InMemoryDataAccess(clock=clock) if whole else SQLiteDataAccess(tmp_path / "callbacks.db", clock=clock)
    notifier = RecordingNotifier()
    outbox = an_outbox(store, notifier, clock)
    failure = Transition(state=CallbackState.FAILED, notify=True, failed_reason=FailedReason.ABANDONED)

    with store:
        for _ in range(10):
            store.store_callback_requests([a_request()] * 1000)
            failing = store.acquire_locks("machine", lock_timeout=timedelta(seconds=30), limit=1000)
            store.record_attempts(
                [AttemptRecord(acquired=one, attempt=None, transition=failure) for one in failing[:1]]
            )
            drain(outbox)
            store.record_attempts(
                [AttemptRecord(acquired=one, attempt=None, transition=failure) for one in failing[1:]]
            )
            drain(outbox)
        assert counts(notifier) == [1]

        for _ in range(3):
            clock.advance(HOUR)
            drain(outbox)

        assert counts(notifier) == [1, 9999]
        purged = [store.purge(finished_for=timedelta(0), limit=20_000) for _ in range(2)]
        assert purged == [10_000, 0], "no debt may be left"


def test_the_limit_holds_for_all_outboxes_on_a_store_and_across_restarts(clock: FakeClock, tmp_path: Path) -> None:
    notifier = RecordingNotifier()
    for number in range(12):
        with FileStore(tmp_path / "callbacks.db", clock=clock) as store:
            store.fail(str(number), "orders")
            drain(an_outbox(store, notifier, clock))
            clock.advance(timedelta(minutes=10))

    assert counts(notifier) == [1, 6]


@pytest.mark.parametrize(
    ("interval", "notified"),
    [
        (timedelta(0), [1, 1, 1, 1]),
        (timedelta(minutes=2), [1, 1, 2]),
        (timedelta(hours=1), [1]),
        (None, [1]),
        ("often", [1]),
    ],
)
def test_the_notifier_says_how_long_an_address_is_left_alone(
    store: FailingStore, clock: FakeClock, interval: Any, notified: list[int]
) -> None:
    notifier = RecordingNotifier(interval=interval)
    outbox = an_outbox(store, notifier, clock)

    for number in range(4):
        store.fail(str(number), "orders")
        drain(outbox)
        clock.advance(timedelta(minutes=1))
        drain(outbox)

    assert counts(notifier) == notified


@pytest.mark.parametrize("interval", [-timedelta(seconds=1), timedelta.max])
def test_an_interval_that_the_store_would_refuse_is_refused_before_an_email_is_sent(
    clock: FakeClock, interval: timedelta
) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        an_outbox(DebtStore(clock), RecordingNotifier(interval=interval), clock)

    assert [path for path, _ in refusal.value.errors] == ["notifier.interval"]


def test_tries_are_not_held_back_and_their_email_tells_of_the_same(store: FailingStore, clock: FakeClock) -> None:
    notifier = RecordingNotifier(fail=2)
    outbox = an_outbox(store, notifier, clock)
    for number in range(3):
        store.fail(str(number), "orders")
        drain(outbox)
        clock.advance(timedelta(minutes=1))

    assert [status.id for status in notifier.notified[0].callbacks] == ["0"]
    clock.advance(HOUR)
    drain(outbox)
    assert counts(notifier) == [1, 2]


def test_an_email_that_is_given_up_gives_up_what_it_told_of_and_nothing_else(
    store: FailingStore, clock: FakeClock
) -> None:
    store.fail("a", "orders")
    notifier = RecordingNotifier(fail=1 + len(EVERY_DELAY))
    outbox = an_outbox(store, notifier, clock)
    drain(outbox)
    store.fail("b", "orders")

    for delay in [*EVERY_DELAY, HOUR]:
        assert told(notifier) == []
        clock.advance(delay)
        drain(outbox)

    assert told(notifier) == ["b"]


def test_an_address_that_is_refused_for_good_is_asked_once_an_hour(store: FailingStore, clock: FakeClock) -> None:
    notifier = Intercepted(RecordingNotifier())
    notifier.before["notify"] = raising(*[NotificationError("the recipient: 550", permanent=True)] * 100)
    outbox = an_outbox(store, notifier, clock)

    for number in range(70):
        store.fail(str(number), "orders")
        drain(outbox)
        clock.advance(timedelta(minutes=1))

    assert [name for name, _ in notifier.calls] == ["notify"] * 2


def test_a_callback_that_failed_twice_is_listed_once_and_counted_twice(clock: FakeClock) -> None:
    store = WholeStore(clock=clock)
    store.fail("a", "")
    store.request_transition("a", Action.REDELIVER)
    store.fail("a", "")
    notifier = RecordingNotifier()

    drain(an_outbox(store, notifier, clock))

    assert told(notifier) == ["a"]
    [notice] = notifier.notified
    assert (notice.count, notice.unlisted) == (2, 0)


@pytest.mark.parametrize("error", [CallbackNotFoundError("b"), DataAccessError("unreadable")])
def test_one_callback_that_is_gone_or_unreadable_keeps_no_other_from_being_told(
    store: FailingStore, clock: FakeClock, error: Exception
) -> None:
    for id in "abc":
        store.fail(id, "orders")
    damaged = Intercepted(store)
    damaged.before["get_callback_status"] = raising(error)
    notifier = RecordingNotifier()

    drain(an_outbox(damaged, notifier, clock))

    assert told(notifier) == ["b", "c"]
    [notice] = notifier.notified
    assert (notice.count, notice.unlisted) == (3, 1)


def test_when_all_that_would_be_listed_are_gone_the_others_are_still_counted(
    store: FailingStore, clock: FakeClock
) -> None:
    for number in range(MOST_LISTED + 1):
        store.fail(str(number), "orders")
    purged = Intercepted(store)
    purged.before["get_callback_status"] = raising(*[CallbackNotFoundError("gone")] * MOST_LISTED)
    notifier = RecordingNotifier()

    drain(an_outbox(purged, notifier, clock))

    [notice] = notifier.notified
    assert (notice.callbacks, notice.count, notice.unlisted) == ((), MOST_LISTED + 1, MOST_LISTED + 1)


def test_a_transient_fault_of_the_store_makes_no_email_poorer(store: FailingStore, clock: FakeClock) -> None:
    for id in "abc":
        store.fail(id, "orders")
    flaky = Intercepted(store)
    flaky.before["get_callback_status"] = raising(TransientDataAccessError("busy"))
    notifier = RecordingNotifier()
    outbox = an_outbox(flaky, notifier, clock)

    outbox.step()
    clock.advance(LEASE)
    drain(outbox)

    assert told(notifier) == ["a", "b", "c"]


def test_a_copy_has_the_same_key_and_nothing_else_has(any_store: FailingStore, clock: FakeClock) -> None:
    any_store.fail("a", "orders")
    notifier = RecordingNotifier(interval=timedelta(0))
    unlucky = Intercepted(any_store)
    unlucky.before["record_notification"] = raising(DataAccessError("lost"))
    outbox = an_outbox(unlucky, notifier, clock)

    outbox.step()
    any_store.fail("b", "orders")
    clock.advance(LEASE)
    drain(outbox)

    assert told(notifier) == ["a", "a", "b"]
    first, copy, other = [notice.key for notice in notifier.notified]
    assert first == copy != other
    assert re.fullmatch("[0-9a-f]{32}", first)


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
    assert [options for name, options in purged.calls if name == "record_notification"] == [
        {"retry_in": None, "quiet_for": timedelta(0)}
    ]


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

    def notify(self, notice: FailureNotice) -> None:
        with self._rang:
            self.ids += [status.id for status in notice.callbacks]
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


def test_the_thread_survives_when_there_is_no_memory_to_tell_of_a_fault(store: FailingStore, started: Started) -> None:
    class Starved(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise MemoryError

    starved, logger = Starved(), logging.getLogger("callbackq.outbox")
    logger.addHandler(starved)
    try:
        store.fail("a")
        bell = Doorbell()
        bell.act = raising(OSError(), MemoryError())
        outbox = started(store, bell)
        assert bell.wait_for(1)
        store.fail("b")

        outbox.wake()

        assert bell.wait_for(2)
    finally:
        logger.removeHandler(starved)


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
