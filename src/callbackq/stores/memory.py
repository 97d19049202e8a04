"""
A store in the memory of one process: what every store must do, in its plainest form.

It is the reference the others are compared with, a test double, and enough for callbacks that may be lost with the
process. It must stay free of policy (that is `callbackq.core.lifecycle`), and no operation may walk over the
backlog, the finished callbacks or the queues: those that wait behind a head hang in a chain, and heads, mailings
and finished callbacks stand in agendas.
"""

from __future__ import annotations

import os
import threading
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import islice
from typing import Final
from uuid import uuid4

from attrs import define, evolve, field, frozen

from callbackq.clock import Clock, SystemClock
from callbackq.core.lifecycle import Action, Effect, Transition, apply_action, settle
from callbackq.core.models import (
    NEVER,
    CallbackAttempt,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
)
from callbackq.core.validation import check_callback_id, refuse
from callbackq.dataaccess import (
    MOST_LISTED,
    Acquired,
    DataAccess,
    Durability,
    Notification,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
    check_arguments,
    ids_for,
)
from callbackq.errors import CallbackNotFoundError, ConflictError, LockLostError
from callbackq.settings import check_collaborator
from callbackq.stores._agenda import Agenda, Entry
from callbackq.stores._door import ORDINARY_LIMITS, ask, check_accept

__all__ = ["InMemoryDataAccess"]

_MAILINGS_FORGOTTEN_AT_ONCE: Final = 100

# Without it two threads would take the same head, or read a callback half changed. All stores of the process share
# it, so that a fork can wait for it: the child would otherwise inherit a half-changed store, and a mutex held by a
# thread that doesn't exist there, and hang for ever.
_MUTEX: Final = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_MUTEX.acquire, after_in_parent=_MUTEX.release, after_in_child=_MUTEX.release)


class InMemoryDataAccess(DataAccess, SupportsNotifications, SupportsListing, SupportsPurge):
    """
    Keep callbacks in memory. They are gone with the process; a forked child has a copy of its own.

    Closing keeps them. Times are the wall time at construction plus what a clock that never steps has counted since.
    The names of queues are remembered for ever, since their numbers must never be used again.

    Args:
        clock: where time comes from; the machine's clock by default.
        accept: the host's own rules for what may be stored, as for `SQLiteDataAccess`.

    Raises:
        InvalidRequestError: *clock* is no `Clock`, or *accept* can't be called.
    """

    durability = Durability.MEMORY

    def __init__(
        self, *, clock: Clock | None = None, accept: Callable[[CallbackRequest], None] = ORDINARY_LIMITS
    ) -> None:
        self._mutex = _MUTEX
        self._clock = SystemClock() if clock is None else clock
        self._accept = accept
        refuse([*check_collaborator("clock", self._clock, "now", "monotonic", "boot_id"), *check_accept(accept)])
        self._wall_at_start = self._clock.now()
        self._monotonic_at_start = self._clock.monotonic()
        self._callbacks: dict[str, _Callback] = {}
        self._queues: dict[str, _Queue] = {}
        self._heads: Agenda[_Callback] = Agenda()
        self._mailings: dict[tuple[str, str], _Mailing] = {}
        self._owing: Agenda[_Mailing] = Agenda()
        self._quiet: Agenda[_Mailing] = Agenda()
        self._leased: dict[int, _Mailing] = {}
        self._forgettable: Agenda[_Callback] = Agenda()
        # One counter for all locks and leases: a token can't repeat, not even for an id that was purged and came back.
        self._last_token = 0
        self._subscribers: dict[object, Callable[[], None]] = {}
        self._hint = False

    def open(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Keep everything: there is nothing to give back."""

    def now(self) -> datetime:
        return self._wall_at_start + timedelta(seconds=self._clock.monotonic() - self._monotonic_at_start)

    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        check_arguments(request=request, id=id)
        self._ask([(id, request)])
        return self._store(request, id)

    def store_callback_requests(
        self, requests: Sequence[CallbackRequest], *, ids: Sequence[str | None] | None = None
    ) -> list[CallbackStatus]:
        batch = list(zip(ids_for(requests, ids), requests, strict=True))
        self._ask(batch)
        return [self._store(request, id) for id, request in batch]

    def _ask(self, requests: Sequence[tuple[str | None, CallbackRequest]]) -> None:
        with self._mutex:
            stored = {id for id, _ in requests if id in self._callbacks}
        ask(self._accept, requests, stored=stored)

    def _store(self, request: CallbackRequest, id: str | None) -> CallbackStatus:
        id = str(uuid4()) if id is None else id
        with self._step() as now:
            callback = self._callbacks.get(id)
            if callback is None:
                callback = self._callbacks[id] = _Callback(id, request, due=now)
                self._join_queue(callback, now)
            elif callback.request != request:
                raise ConflictError(id)
            return callback.status()

    def get_callback_status(self, id: str) -> CallbackStatus:
        with self._mutex:
            return self._find(id).status()

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        acquired: list[Acquired] = []
        with self._step() as now:
            while len(acquired) < limit and (callback := self._heads.pop_due(now)):
                if callback.state is CallbackState.LOCKED:
                    self._abandon_lock(callback, now)
                if callback.state.is_open:
                    lock = CallbackLock(
                        acquired=now, timeout=now + lock_timeout, machine_name=machine_name, token=self._new_token()
                    )
                    acquired.append(self._lock(callback, lock))
        return acquired

    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        check_arguments(delay=delay)
        with self._step() as now:
            callback = self._find_by_lock(acquired)
            if not callback.is_held_by(acquired.lock):
                raise LockLostError(acquired.id, acquired.lock.token)
            callback.end_lock(now, completed=True)
            settled = callback.settle(Transition(state=CallbackState.WAITING, delay=delay))
            self._write(callback, settled, now)
            return settled

    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        with self._step() as now:
            callback = self._find_by_lock(acquired)
            if not callback.is_held_by(acquired.lock):
                return callback.repeat_or_keep_late(attempt, acquired.lock, transition)
            settled = callback.settle(transition)
            callback.keep_result(_Result(acquired.lock.token, attempt, settled))
            callback.end_lock(now, completed=True)
            callback.abandoned = 0
            self._write(callback, settled, now)
            return settled

    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        check_arguments(action=action)
        with self._step() as now:
            callback = self._find(id)
            effect = apply_action(
                action,
                id=id,
                state=callback.state,
                lock_is_live=callback.due > now,
                holds_queue=callback.holds or callback.queue is None,
            )
            match effect:
                case Effect.CANCEL:
                    self._cancel(callback, now)
                case Effect.NOTE_CANCEL:
                    callback.cancel_requested = True
                case Effect.REDELIVER_IN_PLACE:
                    self._revive(callback, now)
                    self._await_turn(callback, now)
                case Effect.REDELIVER_AT_TAIL:
                    self._revive(callback, now)
                    self._join_queue(callback, now)
                case Effect.OPEN_QUEUE:
                    self._stop_holding(callback, now)
            return callback.status()

    def next_due(self) -> datetime | None:
        with self._mutex:
            return self._heads.first()

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        subscription = object()
        with self._mutex:
            self._subscribers[subscription] = wake

        def unsubscribe() -> None:
            with self._mutex:
                self._subscribers.pop(subscription, None)

        return unsubscribe

    # E-mails that final failures owe.

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        check_arguments(lock_timeout=lock_timeout, limit=limit)
        leased: list[Notification] = []
        with self._mutex:
            now = self.now()
            self._forget_mailings(now)
            while len(leased) < limit and (mailing := self._owing.pop_due(now)):
                self._leased.pop(mailing.token, None)
                mailing.lease(self._new_token())
                self._leased[mailing.token] = mailing
                self._put(mailing, now + lock_timeout)
                leased.append(mailing.notification())
        return leased

    def record_notification(
        self, notification: Notification, *, retry_in: timedelta | None, quiet_for: timedelta = timedelta(0)
    ) -> None:
        check_arguments(retry_in=retry_in, quiet_for=quiet_for)
        with self._mutex:
            mailing = self._leased.pop(notification.token, None)
            if mailing is None:
                return
            self._owing.remove(mailing)
            if retry_in is not None:
                mailing.tries += 1
                self._put(mailing, self.now() + retry_in)
                return
            for callback in mailing.end():
                callback.debts -= 1
                self._offer_to_purge(callback)
            self._put(mailing, self.now() + quiet_for)

    # Looking and forgetting.

    def list_callbacks(
        self, *, state: CallbackState | None = None, queue_id: str | None = None, page_size: int = 100
    ) -> Iterator[CallbackStatus]:
        # Here, not with the first page: whoever calls wrongly should be told where.
        check_arguments(state=state, queue_id=queue_id, page_size=page_size)
        return self._pages(state, queue_id, page_size)

    def _pages(self, state: CallbackState | None, queue_id: str | None, page_size: int) -> Iterator[CallbackStatus]:
        with self._mutex:
            ids = list(self._callbacks)
        for start in range(0, len(ids), page_size):
            with self._mutex:
                there = [self._callbacks[id] for id in ids[start : start + page_size] if id in self._callbacks]
                page = [
                    callback.status()
                    for callback in there
                    if state in (None, callback.state) and queue_id in (None, callback.request.queue_id)
                ]
            yield from page

    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        check_arguments(finished_for=finished_for, limit=limit)
        deleted = 0
        with self._mutex:
            latest = self.now() - finished_for
            while deleted < limit and (callback := self._forgettable.pop_due(latest)):
                del self._callbacks[callback.id]
                deleted += 1
        return deleted

    @contextmanager
    def _step(self) -> Iterator[datetime]:
        """
        Do one indivisible step, and hint at work that it made due.

        The hint goes out without the mutex: a subscriber may have locks of its own, or call the store.
        """
        with self._mutex:
            self._hint = False
            yield self.now()
            wakes = tuple(self._subscribers.values()) if self._hint else ()
        for wake in wakes:
            wake()

    # Everything below is called with the mutex held.

    def _find(self, id: str) -> _Callback:
        callback = None if any(check_callback_id(id)) else self._callbacks.get(id)
        if callback is None:
            raise CallbackNotFoundError(id)
        return callback

    def _find_by_lock(self, acquired: Acquired) -> _Callback:
        callback = self._callbacks.get(acquired.id)
        # The id may have been purged and stored again since: only the token says whose result this is.
        if callback is None or not any(lock.token == acquired.lock.token for lock in reversed(callback.locks)):
            raise LockLostError(acquired.id, acquired.lock.token)
        return callback

    def _join_queue(self, callback: _Callback, now: datetime) -> None:
        if queue_id := callback.request.queue_id:
            callback.queue = self._queues.setdefault(queue_id, _Queue())
            callback.queue.append(callback)
        self._await_turn(callback, now)

    def _leave_queue(self, callback: _Callback, now: datetime) -> None:
        if callback.queue is None:
            return
        was_head = callback.is_head
        callback.queue.remove(callback)
        if was_head and callback.queue.head is not None:
            self._await_turn(callback.queue.head, now)

    def _await_turn(self, callback: _Callback, now: datetime) -> None:
        if callback.is_head:
            self._heads.put(callback, callback.due)
            self._hint = self._hint or callback.due <= now

    def _new_token(self) -> int:
        self._last_token += 1
        return self._last_token

    def _lock(self, callback: _Callback, lock: CallbackLock) -> Acquired:
        callback.state = CallbackState.LOCKED
        callback.due = lock.timeout
        callback.locks += (lock,)
        self._heads.put(callback, callback.due)
        return Acquired(
            id=callback.id,
            request=callback.request,
            queue_id=callback.request.queue_id,
            sequence=callback.sequence,
            lock=lock,
            attempts_made=callback.attempts_made,
            abandoned=callback.abandoned,
            on_exhausted=callback.request.on_exhausted,
        )

    def _abandon_lock(self, callback: _Callback, now: datetime) -> None:
        callback.end_lock(callback.due, completed=False)
        callback.abandoned += 1
        # The lock has ended: a cancel noted under it applies, and what was accepted late isn't sent once more.
        settled = callback.settle(Transition(state=CallbackState.WAITING))
        if not settled.state.is_open:
            self._write(callback, settled, now)

    def _write(self, callback: _Callback, transition: Transition, now: datetime) -> None:
        callback.attempts_made += transition.counted
        if transition.state is CallbackState.WAITING:
            callback.state = CallbackState.WAITING
            callback.due = now + transition.delay
            self._await_turn(callback, now)
            return
        if transition.notify:
            self._owe(callback, now)
        callback.failed_reason = transition.failed_reason
        callback.holds = transition.hold
        self._finish(callback, transition.state, now)

    def _owe(self, callback: _Callback, now: datetime) -> None:
        address, queue_id = callback.request.notification_email_address, callback.request.queue_id
        mailing = self._mailings.setdefault((address, queue_id), _Mailing(address, queue_id, due=now))
        mailing.debts.append(callback)
        callback.debts += 1
        if len(mailing.debts) == 1:
            self._quiet.remove(mailing)
            self._put(mailing, mailing.due)

    def _put(self, mailing: _Mailing, due: datetime) -> None:
        mailing.due = due
        (self._owing if mailing.debts else self._quiet).put(mailing, due)

    def _forget_mailings(self, now: datetime) -> None:
        for _ in range(_MAILINGS_FORGOTTEN_AT_ONCE):
            mailing = self._quiet.pop_due(now)
            if mailing is None:
                return
            del self._mailings[mailing.email_address, mailing.queue_id]

    def _finish(self, callback: _Callback, state: CallbackState, now: datetime) -> None:
        callback.state = state
        callback.finished_at = now
        self._heads.remove(callback)
        if not callback.holds:
            self._leave_queue(callback, now)
        self._offer_to_purge(callback)

    def _cancel(self, callback: _Callback, now: datetime) -> None:
        if callback.state is CallbackState.LOCKED:
            callback.end_lock(callback.due, completed=False)
        self._forgettable.remove(callback)
        callback.failed_reason = None
        callback.holds = False
        self._finish(callback, CallbackState.CANCELLED, now)

    def _revive(self, callback: _Callback, now: datetime) -> None:
        self._forgettable.remove(callback)
        callback.state = CallbackState.WAITING
        callback.due = now
        callback.attempts_made = callback.abandoned = 0
        callback.failed_reason = None
        callback.holds = False

    def _stop_holding(self, callback: _Callback, now: datetime) -> None:
        if callback.holds:
            callback.holds = False
            self._leave_queue(callback, now)
            self._offer_to_purge(callback)

    def _offer_to_purge(self, callback: _Callback) -> None:
        if not (callback.state.is_open or callback.holds or callback.debts):
            self._forgettable.put(callback, callback.finished_at)


@frozen(eq=False, weakref_slot=False)
class _Result:
    """What the holder of a lock recorded."""

    token: int
    attempt: CallbackAttempt | None
    written: Transition | None
    """What followed; ``None`` when it came late."""


@define(eq=False, weakref_slot=False)
class _Callback:
    """What is kept of one callback. ``entry`` is its place in the one agenda it may stand in."""

    id: str
    request: CallbackRequest
    due: datetime
    """While LOCKED: when the lock times out."""
    state: CallbackState = CallbackState.WAITING
    sequence: int = 1
    results: tuple[_Result, ...] = ()
    locks: tuple[CallbackLock, ...] = ()
    attempts_made: int = 0
    abandoned: int = 0
    accepted_late: bool = False
    cancel_requested: bool = False
    failed_reason: FailedReason | None = None
    holds: bool = False
    debts: int = 0
    finished_at: datetime = NEVER
    queue: _Queue | None = None
    previous: _Callback | None = None
    next: _Callback | None = None
    entry: Entry | None = None

    @property
    def is_head(self) -> bool:
        return self.queue is None or self.queue.head is self

    def is_held_by(self, lock: CallbackLock) -> bool:
        return self.state is CallbackState.LOCKED and self.locks[-1].token == lock.token

    def end_lock(self, ended: datetime, *, completed: bool) -> None:
        self.locks = (*self.locks[:-1], evolve(self.locks[-1], ended=ended, completed=completed))

    def settle(self, transition: Transition) -> Transition:
        return settle(transition, accepted_late=self.accepted_late, cancel_requested=self.cancel_requested)

    def keep_result(self, result: _Result) -> None:
        """Put a result between those of earlier and later locks, so that attempts stand in the order they began."""
        results = list(self.results)
        insort(results, result, key=lambda one: one.token)
        self.results = tuple(results)

    def repeat_or_keep_late(
        self, attempt: CallbackAttempt | None, lock: CallbackLock, transition: Transition
    ) -> Transition:
        earlier = next((result for result in self.results if result.token == lock.token), None)
        if earlier and earlier.written:
            return earlier.written
        if attempt and not earlier:
            self.keep_result(_Result(lock.token, evolve(attempt, late=True), None))
        if transition.state is CallbackState.SUCCEEDED:
            self.accepted_late = True
        raise LockLostError(self.id, lock.token)

    def status(self) -> CallbackStatus:
        waiting = self.state is CallbackState.WAITING
        blocking = self.queue.head if self.queue and self.state.is_open and not self.is_head else None
        return CallbackStatus(
            id=self.id,
            request=self.request,
            attempts=tuple(result.attempt for result in self.results if result.attempt),
            locks=self.locks,
            state=self.state,
            queue_id=self.request.queue_id,
            sequence=self.sequence,
            next_attempt_at=self.due if waiting else None,
            failed_reason=self.failed_reason,
            blocked_by=blocking.id if blocking else None,
        )


@define(eq=False, weakref_slot=False)
class _Queue:
    """
    A chain of a queue's open callbacks by number, with a FAILED one in front while that holds the queue.

    A chain, not a list: any member leaves it at once, however long it is, and it costs a short queue nothing.
    """

    last_number: int = 0
    head: _Callback | None = None
    tail: _Callback | None = None

    def append(self, callback: _Callback) -> None:
        """Give a callback the next number."""
        self.last_number += 1
        callback.sequence = self.last_number
        callback.previous = self.tail
        if self.tail is None:
            self.head = callback
        else:
            self.tail.next = callback
        self.tail = callback

    def remove(self, callback: _Callback) -> None:
        if callback.previous is None:
            self.head = callback.next
        else:
            callback.previous.next = callback.next
        if callback.next is None:
            self.tail = callback.previous
        else:
            callback.next.previous = callback.previous
        callback.previous = callback.next = None


@define(eq=False, weakref_slot=False)
class _Mailing:
    """What one address is owed about one queue."""

    email_address: str = field(repr=False)
    queue_id: str
    due: datetime
    debts: deque[_Callback] = field(factory=deque)
    covered: int = 0
    """How many of the debts the present e-mail tells of; 0 before its first lease."""
    tries: int = 0
    token: int = 0
    first_token: int = 0
    entry: Entry | None = None

    def lease(self, token: int) -> None:
        self.token = token
        if not self.covered:
            self.covered = len(self.debts)
            self.first_token = token

    def end(self) -> list[_Callback]:
        """Take out what the present e-mail tells of."""
        told = [self.debts.popleft() for _ in range(self.covered)]
        self.covered = self.tries = 0
        return told

    def notification(self) -> Notification:
        return Notification(
            email_address=self.email_address,
            queue_id=self.queue_id,
            callback_ids=tuple(callback.id for callback in islice(self.debts, min(self.covered, MOST_LISTED))),
            count=self.covered,
            tries=self.tries,
            token=self.token,
            first_token=self.first_token,
        )
