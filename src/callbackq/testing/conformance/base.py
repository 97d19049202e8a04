"""
What all groups of the suite share: the hooks of a store's author, and short words for everyday steps.

Names must not clash with those of `unittest.TestCase` (``fail``, ``id``, ``run``), next to which the suite may stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar, cast
from unittest import SkipTest

from attrs import evolve

from callbackq.core.models import (
    AttemptFailure,
    CallbackAttempt,
    CallbackData,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
)
from callbackq.dataaccess import (
    Acquired,
    DataAccess,
    SupportsBackup,
    SupportsEnlist,
    SupportsHandover,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
    Transition,
)
from callbackq.errors import InvalidRequestError
from callbackq.testing.doubles import FakeClock

__all__ = [
    "DELIVERED",
    "DUE_AGAIN",
    "EXHAUSTED",
    "HELD",
    "LOCK_TIMEOUT",
    "MOMENT",
    "Caught",
    "Conformance",
    "a_request",
    "an_attempt",
    "check_whole",
    "raises",
    "refuses",
]

LOCK_TIMEOUT: Final = timedelta(minutes=1)
MOMENT: Final = timedelta(milliseconds=1)
"""The little bit before or after an instant: no store needs to be finer than that."""

DELIVERED: Final = Transition(state=CallbackState.SUCCEEDED, counted=True)
DUE_AGAIN: Final = Transition(state=CallbackState.WAITING, counted=True)
EXHAUSTED: Final = Transition(state=CallbackState.FAILED, counted=True, failed_reason=FailedReason.EXHAUSTED)
HELD: Final = evolve(EXHAUSTED, hold=True)


def a_request(**changes: Any) -> CallbackRequest:
    """Build a request; keyword arguments replace its fields."""
    return evolve(CallbackRequest(url="https://receiver.example/hook"), **changes)


def an_attempt(status_code: int = 500, **changes: Any) -> CallbackAttempt:
    """Build an attempt; keyword arguments replace its fields."""
    attempt = CallbackAttempt(
        status_code=status_code,
        response=CallbackData(headers={"Server": "test"}, data=b"answer"),
        time=datetime(2026, 1, 1, 12, tzinfo=UTC),
        duration=timedelta(milliseconds=20),
        failure=None if status_code else AttemptFailure.TIMEOUT,
        machine_name="machine a",
    )
    return evolve(attempt, **changes)


_Error = TypeVar("_Error", bound=BaseException)


class Caught(Generic[_Error]):
    """The exception that a block raised."""

    error: _Error


@contextmanager
def raises(kind: type[_Error], promise: str) -> Iterator[Caught[_Error]]:
    """Demand that the block raises *kind*; other exceptions pass through."""
    caught: Caught[_Error] = Caught()
    try:
        yield caught
    except kind as error:
        caught.error = error
        return
    raise AssertionError(f"{promise}: {kind.__name__} was not raised")


def refuses(argument: str, call: Callable[[Any], object], *values: object) -> None:
    """Demand that *call* refuses each value, and names the argument that it is given as."""
    for value in values:
        with raises(InvalidRequestError, f"{argument}={value!a:.40}") as caught:
            call(value)
        paths = [path for path, _ in caught.error.errors]
        assert paths == [argument], f"the error for {argument}={value!a:.40} must name {argument}, it names {paths}"


def check_whole(status: CallbackStatus) -> None:
    """Demand what must be true of a callback at every moment, while nobody releases or loses a lock."""
    locked = status.state is CallbackState.LOCKED
    live = [lock for lock in status.locks if lock.ended is None]
    assert len(live) == locked, "a callback has a live lock exactly while it is LOCKED"
    assert all(lock.completed != (lock in live) for lock in status.locks), "a lock is completed when it ends"
    assert len(status.attempts) == len(status.locks) - locked, "each lock that ended must come with its attempt"
    waiting = status.state is CallbackState.WAITING
    assert (status.next_attempt_at is not None) == waiting, "a callback has a next attempt exactly while it is WAITING"
    failed = status.state is CallbackState.FAILED
    assert (status.failed_reason is not None) == failed, "a callback has a reason exactly while it is FAILED"
    assert not (locked and status.blocked_by), "a LOCKED callback is the head of its queue"
    if status.success:
        assert status.attempts[-1].status_code == 200, "success must come with the attempt that brought it"


class _Enlisting(SupportsEnlist[Any], DataAccess, Protocol):
    """A store of which both is known: type checkers can't say so of one variable otherwise."""


class Conformance:
    """The hooks, and what the groups of tests are written with."""

    # What the author of a store provides.

    one_order: bool = True
    """
    Whether there is one order of storing for all callbacks. Set it to ``False`` for a store that spreads them over
    several places and says so: then only those of one queue must be listed, and their e-mails leased, in order.
    """

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        """
        Make the store under test: fresh, empty, and taking all its time from *clock*.

        Called once for each test. What it returns is closed after the test.
        """
        raise NotImplementedError("override make_data_access(self, clock)")

    def reopen(self, data_access: DataAccess, clock: FakeClock) -> DataAccess:
        """
        Make another object on what is stored in *data_access*, as a second process would.

        *data_access* may have been closed or still be in use. Not overriding this skips the tests that need it, which
        is right only for a store whose data is gone with the object.
        """
        raise SkipTest("the test class has no reopen()")

    def open_backup(self, path: Path, clock: FakeClock) -> DataAccess:
        """Make an object on a copy that `SupportsBackup.backup` wrote under *path*."""
        raise SkipTest("the test class has no open_backup()")

    def outage(self, data_access: DataAccess) -> AbstractContextManager[None]:
        """
        Keep the backend of *data_access* from working while the block runs, as it would fail in real life.

        Not overriding this skips the tests that need it.
        """
        raise SkipTest("the test class has no outage()")

    def application_transaction(self, data_access: DataAccess) -> AbstractContextManager[Any]:
        """
        Begin a transaction as an application would that `SupportsEnlist` is offered to.

        The block gets the driver's connection, with ``commit()`` and ``rollback()``. A transaction that is still under
        way at its end is rolled back. Called from several threads, for a connection of its own each time.
        """
        raise SkipTest("the test class has no application_transaction()")

    # Both frameworks' ways of saying that a test begins and is over. Some runners say it in both.

    def setup_method(self, method: object = None) -> None:
        self._begin()

    def setUp(self) -> None:
        self._begin()

    def teardown_method(self, method: object = None) -> None:
        self._end()

    def tearDown(self) -> None:
        self._end()

    def _begin(self) -> None:
        if not hasattr(self, "_made"):
            self._made: list[DataAccess] = []
            self.clock = FakeClock()
            self.store = self.closed_later(self.make_data_access(self.clock))

    def _end(self) -> None:
        for data_access in self._made:
            data_access.close()
        self._made.clear()

    # What the tests use: the store under test, the clock it runs on, and words for everyday steps.

    def closed_later(self, data_access: DataAccess) -> DataAccess:
        self._made.append(data_access)
        return data_access

    def another_object(self) -> DataAccess:
        """A second object on the same stored data, while the first is in use."""
        return self.closed_later(self.reopen(self.store, self.clock))

    def start_again(self) -> None:
        """Go on with a new object on the same stored data, as after a restart."""
        self.store.close()
        self.store = self.another_object()

    @property
    def purging(self) -> SupportsPurge:
        if not isinstance(self.store, SupportsPurge):
            raise SkipTest("the store is no SupportsPurge")
        return self.store

    @property
    def listing(self) -> SupportsListing:
        if not isinstance(self.store, SupportsListing):
            raise SkipTest("the store is no SupportsListing")
        return self.store

    @property
    def notifications(self) -> SupportsNotifications:
        if not isinstance(self.store, SupportsNotifications):
            raise SkipTest("the store is no SupportsNotifications")
        return self.store

    @property
    def backups(self) -> SupportsBackup:
        if not isinstance(self.store, SupportsBackup):
            raise SkipTest("the store is no SupportsBackup")
        return self.store

    @property
    def enlisting(self) -> _Enlisting:
        if not isinstance(self.store, SupportsEnlist):
            raise SkipTest("the store is no SupportsEnlist")
        return cast("_Enlisting", self.store)

    @property
    def handing_over(self) -> SupportsHandover:
        if not isinstance(self.store, SupportsHandover):
            raise SkipTest("the store is no SupportsHandover")
        return self.store

    def transaction(self) -> AbstractContextManager[Any]:
        """A transaction of the application's. The store must be open before it begins."""
        self.enlisting.open()
        return self.application_transaction(self.store)

    def stored(self, queue_id: str = "", *, id: str | None = None, **changes: Any) -> str:
        """Store a callback and say its id."""
        return self.store.store_callback_request(a_request(queue_id=queue_id, **changes), id=id).id

    def status(self, id: str) -> CallbackStatus:
        return self.store.get_callback_status(id)

    def state(self, id: str) -> CallbackState:
        return self.status(id).state

    def check_listed(self, ids: Sequence[str], expected: Sequence[str], promise: str) -> None:
        """Demand these callbacks in the order in which they were stored."""
        if self.one_order:
            assert list(ids) == list(expected), promise
            return
        assert sorted(ids) == sorted(expected), promise
        for queue_id in {queue for id in expected if (queue := self.status(id).queue_id)}:
            ids_of_queue = [[id for id in each if self.status(id).queue_id == queue_id] for each in (ids, expected)]
            assert ids_of_queue[0] == ids_of_queue[1], promise

    def acquire(
        self, *, limit: int = 1000, lock_timeout: timedelta = LOCK_TIMEOUT, machine_name: str = "machine a"
    ) -> list[Acquired]:
        return self.store.acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)

    def acquire_one(self, *, lock_timeout: timedelta = LOCK_TIMEOUT, machine_name: str = "machine a") -> Acquired:
        """Lock the only callback that can be locked."""
        acquired = self.acquire(lock_timeout=lock_timeout, machine_name=machine_name)
        assert len(acquired) == 1, f"exactly one callback can be locked now, {len(acquired)} were"
        return acquired[0]

    def acquire_only(self, id: str) -> Acquired:
        acquired = self.acquire_one()
        assert acquired.id == id, "another callback was locked than the only one that can be"
        return acquired

    def take_over(self, *, lock_timeout: timedelta = LOCK_TIMEOUT) -> Acquired:
        """Let the present locks time out, and lock the only callback anew."""
        self.clock.advance(LOCK_TIMEOUT + MOMENT)
        return self.acquire_one(lock_timeout=lock_timeout, machine_name="machine b")

    def succeed(self, acquired: Acquired) -> None:
        self.store.record_attempt(acquired, an_attempt(200), DELIVERED)

    def retry(self, acquired: Acquired, delay: timedelta = timedelta(0)) -> None:
        self.store.record_attempt(acquired, an_attempt(500), evolve(DUE_AGAIN, delay=delay))

    def give_up(self, acquired: Acquired, *, hold: bool = False, notify: bool = False) -> None:
        self.store.record_attempt(acquired, an_attempt(500), evolve(EXHAUSTED, hold=hold, notify=notify))
