"""
Random operations on a store and on the reference store side by side: whatever can be seen must be the same.

Where the conformance suite proves sentences, this looks for the sequences nobody thought of. Needs hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

from attrs import evolve
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from callbackq.core.models import CallbackLock, CallbackState, CallbackStatus, FailedReason
from callbackq.dataaccess import (
    Acquired,
    Action,
    AttemptRecord,
    DataAccess,
    Notification,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
    Transition,
)
from callbackq.errors import CallbackNotFoundError, CallbackqError
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing.conformance.base import a_request, an_attempt
from callbackq.testing.doubles import FakeClock

__all__ = ["DataAccessComparison"]

_Result = TypeVar("_Result")
_Pair = tuple[_Result, _Result]
"""The reference's and the candidate's."""

_TICK: Final = timedelta(milliseconds=1)
"""Passes before every step, so that nothing falls due, or is due, at the same instant by chance."""

_FEW: Final = 8
"""So few callbacks that most steps meet one to which something has happened already."""

_TELLING: Final = (CallbackState.LOCKED, CallbackState.FAILED)

_OWING: Final = Transition(state=CallbackState.FAILED, notify=True, failed_reason=FailedReason.EXHAUSTED)

_queues = st.sampled_from(["", "a", "b"])
_delays = st.sampled_from([timedelta(0), timedelta(seconds=5), timedelta(seconds=50)])
_waits = st.sampled_from([timedelta(0), timedelta(seconds=7), timedelta(seconds=61), timedelta(hours=1)])
_timeouts = st.sampled_from([timedelta(seconds=10), timedelta(seconds=60)])
_attempts = st.sampled_from([None, an_attempt(200), an_attempt(500), an_attempt(0)])
_transitions = st.one_of(
    st.builds(Transition, state=st.just(CallbackState.SUCCEEDED), counted=st.booleans()),
    st.builds(Transition, state=st.just(CallbackState.WAITING), delay=_delays, counted=st.booleans()),
    st.builds(
        Transition,
        state=st.just(CallbackState.FAILED),
        counted=st.booleans(),
        hold=st.booleans(),
        notify=st.booleans(),
        failed_reason=st.sampled_from(FailedReason),
    ),
)


_few_attempts = st.lists(st.tuples(_attempts, _transitions), max_size=3)


class DataAccessComparison(RuleBasedStateMachine):
    """
    Compare a store with `InMemoryDataAccess`.

    ::

        class Comparison(DataAccessComparison):
            def make_data_access(self, clock):
                return MyDataAccess("...", clock=clock)

        TestComparison = Comparison.TestCase
    """

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        """Make the store under test: fresh, empty, and taking all its time from *clock*."""
        raise NotImplementedError("override make_data_access(self, clock)")

    def reopen(self, data_access: DataAccess, clock: FakeClock) -> DataAccess:
        """Make another object on what *data_access*, which has been closed, has stored. By default it is used again."""
        return data_access

    @initialize(queue_ids=st.lists(_queues, min_size=2, max_size=_FEW))
    def begin(self, queue_ids: list[str]) -> None:
        self.clock = FakeClock()
        self.reference: DataAccess = InMemoryDataAccess(clock=self.clock)
        self.candidate = self.make_data_access(self.clock)
        # The reference's time begins here; a wall clock that is set before the first use must make no difference.
        self.candidate.open()
        self.ids: list[str] = []
        self.locks: list[_Pair[Acquired]] = []
        self.leases: list[_Pair[Notification]] = []
        for queue_id in queue_ids:
            self._store_new(queue_id)

    def teardown(self) -> None:
        if hasattr(self, "candidate"):
            self.candidate.close()

    # The world.

    @rule(hours=st.sampled_from([-30, 30]))
    def the_wall_clock_is_set(self, hours: int) -> None:
        self.clock.step_wall(timedelta(hours=hours))

    @rule()
    def the_store_is_opened_again(self) -> None:
        self.candidate.close()
        self.candidate = self.reopen(self.candidate, self.clock)

    # Applications.

    @precondition(lambda self: len(self.ids) < _FEW)
    @rule(queue_id=_queues)
    def store(self, queue_id: str) -> None:
        self._store_new(queue_id)

    @rule(data=st.data(), queue_id=_queues)
    def store_again(self, data: st.DataObject, queue_id: str) -> None:
        """Store under an id that is taken, or was until it was purged."""
        self._store(data.draw(st.sampled_from(self.ids)), queue_id)

    def _store_new(self, queue_id: str) -> None:
        self.ids.append(f"callback-{len(self.ids)}")
        self._store(self.ids[-1], queue_id)

    def _store(self, id: str, queue_id: str) -> None:
        request = a_request(queue_id=queue_id, notification_email_address=self._address_for(id, queue_id))
        self._same_status(self._on_both(lambda store: store.store_callback_request(request, id=id)))

    def _address_for(self, id: str, queue_id: str) -> str:
        """Say whom to tell of a failure. (A store in several places groups those without a queue otherwise.)"""
        return "someone@host.example"

    # Dispatchers.

    @precondition(lambda self: self.reference.next_due())
    @rule(wait=_waits, lock_timeout=_timeouts, limit=st.integers(1, 4), attempts=_few_attempts)
    def deliver(
        self, wait: timedelta, lock_timeout: timedelta, limit: int, attempts: list[tuple[Any, Transition]]
    ) -> None:
        """Let time pass, acquire what is due, and record at once for the first few."""
        self.clock.advance(wait)
        for locks, (attempt, transition) in zip(self._acquire(lock_timeout, limit), attempts, strict=False):
            self._record(locks, attempt, transition)

    @precondition(lambda self: self.reference.next_due())
    @rule(wait=_waits, lock_timeout=_timeouts)
    def fail(self, wait: timedelta, lock_timeout: timedelta) -> None:
        """Let all that is due fail for good and owe: what is told together, and when, shows only with several."""
        self.clock.advance(wait)
        for locks in self._acquire(lock_timeout, _FEW):
            self._record(locks, None, _OWING)

    def _acquire(self, lock_timeout: timedelta, limit: int) -> list[_Pair[Acquired]]:
        """Acquire until nothing is due: which of those due at the same instant comes first is a store's own choice."""

        def acquire_all(store: DataAccess) -> dict[str, Acquired]:
            acquired: list[Acquired] = []
            # A call may find only locks whose end finishes their callbacks, and nothing to acquire.
            for _ in range(2 * len(self.ids)):
                batch = store.acquire_locks("machine", lock_timeout=lock_timeout, limit=limit)
                assert len(batch) <= limit, "more were acquired than the limit"
                acquired += batch
                due = store.next_due()
                if due is None or due > store.now():
                    break
            return {one.id: one for one in acquired}

        expected, actual = self._on_both(acquire_all)
        assert expected.keys() == actual.keys(), "other callbacks were acquired"
        pairs = [(expected[id], actual[id]) for id in sorted(expected)]
        for pair in pairs:
            self._same(*((_facts(one), _lock(one.lock)) for one in pair))
        self.locks += pairs
        return pairs

    @precondition(lambda self: self.locks)
    @rule(data=st.data(), attempt=_attempts, transition=_transitions)
    def record(self, data: st.DataObject, attempt: Any, transition: Transition) -> None:
        """Record under a lock that is live, lost, released or was recorded before."""
        self._record(data.draw(self._any_lock()), attempt, transition)

    def _record(self, locks: _Pair[Acquired], attempt: Any, transition: Transition) -> None:
        dated = attempt and evolve(attempt, time=locks[0].lock.acquired)
        self._same(*self._on_both(lambda store: store.record_attempt(self._own(store, locks), dated, transition).state))

    @precondition(lambda self: self.locks)
    @rule(data=st.data(), transitions=st.lists(_transitions, max_size=3))
    def record_several(self, data: st.DataObject, transitions: list[Transition]) -> None:
        several = [(data.draw(self._any_lock()), transition) for transition in transitions]

        def record(store: DataAccess) -> list[object]:
            records = [
                AttemptRecord(acquired=self._own(store, locks), attempt=None, transition=transition)
                for locks, transition in several
            ]
            results = store.record_attempts(records)
            return [result.state if isinstance(result, Transition) else type(result) for result in results]

        self._same(*self._on_both(record))

    @precondition(lambda self: self.locks)
    @rule(data=st.data(), delay=_delays)
    def release(self, data: st.DataObject, delay: timedelta) -> None:
        locks = data.draw(self._any_lock())
        self._same(*self._on_both(lambda store: store.release_lock(self._own(store, locks), delay=delay).state))

    # Operators.

    @rule(data=st.data(), action=st.sampled_from(Action))
    def act(self, data: st.DataObject, action: Action) -> None:
        # Most can be done with one that is LOCKED or FAILED, and few are.
        telling = [status.id for status in self._all(self.reference) if status.state in _TELLING]
        id = data.draw(st.sampled_from(telling or self.ids) | st.sampled_from(self.ids))
        self._same_status(self._on_both(lambda store: store.request_transition(id, action)))

    @precondition(lambda self: isinstance(self.candidate, SupportsPurge) and self._has_finished())
    @rule(finished_for=_delays)
    def purge(self, finished_for: timedelta) -> None:
        def purge(store: DataAccess) -> int:
            assert isinstance(store, SupportsPurge)
            return store.purge(finished_for=finished_for)

        self._same(*self._on_both(purge))

    # E-mails.

    @precondition(lambda self: isinstance(self.candidate, SupportsNotifications) and self._has_finished())
    @rule(wait=_waits, lock_timeout=_timeouts, ends=st.lists(st.tuples(st.none() | _delays, _waits), max_size=2))
    def pay_debts(
        self, wait: timedelta, lock_timeout: timedelta, ends: list[tuple[timedelta | None, timedelta]]
    ) -> None:
        """Let time pass, lease what is owed, and end the first few leases at once."""
        self.clock.advance(wait)

        def lease(store: DataAccess) -> list[Notification]:
            assert isinstance(store, SupportsNotifications)
            leased = store.acquire_notifications(lock_timeout=lock_timeout, limit=1000)
            return sorted(leased, key=lambda one: (one.email_address, one.queue_id))

        expected, actual = self._on_both(lease)
        self._same(*([_owed(one) for one in each] for each in (expected, actual)))
        leases = list(zip(expected, actual, strict=True))
        self.leases += leases
        for lease_of_both, (retry_in, quiet_for) in zip(leases, ends, strict=False):
            self._end_lease(lease_of_both, retry_in, quiet_for)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), retry_in=st.none() | _delays, quiet_for=_waits)
    def end_any_lease(self, data: st.DataObject, retry_in: timedelta | None, quiet_for: timedelta) -> None:
        """End a lease that is live, lost or was ended before."""
        self._end_lease(data.draw(st.sampled_from(self.leases)), retry_in, quiet_for)

    def _end_lease(self, leases: _Pair[Notification], retry_in: timedelta | None, quiet_for: timedelta) -> None:
        def end(store: DataAccess) -> None:
            assert isinstance(store, SupportsNotifications)
            store.record_notification(self._own(store, leases), retry_in=retry_in, quiet_for=quiet_for)

        self._on_both(end)

    # What can be seen.

    @invariant()
    def everything_that_can_be_seen_is_the_same(self) -> None:
        self._same(*self._on_both(lambda store: store.now()))
        self._same(*self._on_both(lambda store: store.next_due()))
        expected, actual = self._on_both(self._all)
        self._same([_seen(status) for status in expected], [_seen(status) for status in actual])
        for status in actual:
            tokens = [lock.token for lock in status.locks]
            assert tokens == sorted(set(tokens)), "tokens must rise strictly"

    def _all(self, store: DataAccess) -> list[CallbackStatus]:
        if isinstance(self.candidate, SupportsListing) and isinstance(store, SupportsListing):
            return list(store.list_callbacks())
        statuses = []
        for id in self.ids:
            try:
                statuses.append(store.get_callback_status(id))
            except CallbackNotFoundError:
                continue
        return statuses

    def _has_finished(self) -> bool:
        return any(not status.state.is_open for status in self._all(self.reference))

    def _any_lock(self) -> st.SearchStrategy[_Pair[Acquired]]:
        # The latest ones are likely to be live.
        return st.sampled_from(self.locks[-3:]) | st.sampled_from(self.locks)

    def _own(self, store: DataAccess, pair: _Pair[_Result]) -> _Result:
        return pair[0] if store is self.reference else pair[1]

    def _on_both(self, operation: Callable[[DataAccess], _Result]) -> _Pair[_Result]:
        """Do the same to both, a moment later than all before; both must return, or raise the same."""
        self.clock.advance(_TICK)
        expected, expected_error = _outcome(operation, self.reference)
        actual, actual_error = _outcome(operation, self.candidate)
        self._same(_told(expected_error), _told(actual_error))
        return expected, actual

    def _same_status(self, statuses: _Pair[CallbackStatus]) -> None:
        self._same(*(status and _seen(status) for status in statuses))

    def _same(self, expected: object, actual: object) -> None:
        assert actual == expected, f"the store differs from the reference:\n  {expected!r}\n  {actual!r}"


def _outcome(operation: Callable[[DataAccess], Any], store: DataAccess) -> tuple[Any, CallbackqError | None]:
    try:
        return operation(store), None
    except CallbackqError as error:
        return None, error


def _facts(acquired: Acquired) -> tuple[object, ...]:
    one = acquired
    return (one.id, one.request, one.queue_id, one.sequence, one.attempts_made, one.abandoned)


def _owed(notification: Notification) -> tuple[object, ...]:
    one = notification
    is_first = one.token == one.first_token
    return (one.email_address, one.queue_id, one.callback_ids, one.count, one.tries, is_first)


def _lock(lock: CallbackLock) -> CallbackLock:
    # Tokens need only rise, and an abandoned lock may have ended when it timed out or when that was noticed.
    abandoned = lock.ended is not None and not lock.completed
    return evolve(lock, token=0, ended=lock.timeout if abandoned else lock.ended)


def _seen(status: CallbackStatus) -> CallbackStatus:
    return evolve(status, locks=tuple(_lock(lock) for lock in status.locks))


def _told(error: CallbackqError | None) -> tuple[object, ...]:
    return (type(error), *(getattr(error, name, None) for name in ("id", "state", "action")))
