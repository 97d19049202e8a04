"""
Stores that break one promise each, by the smallest change to the reference store.

`Sturdy` is the reference store with what a memory store can't have of itself: it can be opened again, copied and
kept from working. Every other class breaks the clause in whose section it stands.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

from attrs import evolve, frozen

from callbackq.core.lifecycle import Transition
from callbackq.core.models import (
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
)
from callbackq.dataaccess import (
    Acquired,
    Action,
    AttemptRecord,
    Notification,
    SupportsBackup,
    SupportsEnlist,
    SupportsHandover,
    check_arguments,
)
from callbackq.errors import (
    CallbackNotFoundError,
    ConflictError,
    DataAccessError,
    IllegalTransitionError,
    InvalidRequestError,
    LockLostError,
    TransientDataAccessError,
)
from callbackq.stores import memory
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock
from callbackq.testing.conformance import (
    AtomicRecord,
    Backup,
    Durable,
    Enlisting,
    Errors,
    Exclusive,
    Expiry,
    Fenced,
    Handover,
    HeadOnly,
    Hints,
    Idempotent,
    Notifications,
    OperatorActions,
    Purge,
    Reads,
    RoundTrip,
    SequenceNumbers,
    ThreadsAndForks,
    Tokens,
)

__all__ = ["MUTANTS", "Enlisted", "HandingOver", "Sturdy"]


class _BackendGone:
    """Stands in for the mutex during an outage: the first thing every call does is what fails."""

    def __enter__(self) -> None:
        raise TransientDataAccessError("the store does not answer") from OSError("backend gone")

    def __exit__(self, *_: object) -> None: ...


class Sturdy(InMemoryDataAccess, SupportsBackup):
    """The reference store, whole; its data outlives the object."""

    copies: ClassVar[dict[Path, dict[str, Any]]] = {}

    def reopened(self, clock: FakeClock) -> InMemoryDataAccess:
        other = object.__new__(type(self))
        other.__dict__ = self.__dict__
        return other

    def backup(self, path: str | PathLike[str]) -> None:
        with self._mutex:
            self.copies[self._free(path)] = self._copied()

    def _free(self, path: str | PathLike[str]) -> Path:
        check_arguments(path=path)
        if Path(path).exists():
            raise InvalidRequestError([("path", "must name nothing that exists")])
        return Path(path)

    def _copied(self) -> dict[str, Any]:
        shared = (self._mutex, self._clock)
        return copy.deepcopy(self.__dict__, {id(one): one for one in shared})

    @classmethod
    def from_backup(cls, path: Path) -> Self:
        other = object.__new__(cls)
        other.__dict__ = cls.copies.pop(path)
        return other

    @contextmanager
    def outage(self) -> Iterator[None]:
        mutex, self._mutex = self._mutex, _BackendGone()  # type: ignore[assignment]
        try:
            yield
        finally:
            self._mutex = mutex


MUTANTS: list[tuple[type, type[Sturdy]]] = []
"""Each with the clause it breaks."""


def breaks(clause: type) -> Callable[[type[Sturdy]], type[Sturdy]]:
    def note(mutant: type[Sturdy]) -> type[Sturdy]:
        MUTANTS.append((clause, mutant))
        return mutant

    return note


def _a_round_trip() -> None:
    """Take the time that another statement would take in a database. Others may look meanwhile."""
    threading.Event().wait(0.001)


# Clause 1


@breaks(Durable)
class ForgetsEverythingOnReopening(Sturdy):
    def reopened(self, clock: FakeClock) -> InMemoryDataAccess:
        return type(self)(clock=clock)


@breaks(Durable)
class ForgetsNotedCancelsOnReopening(Sturdy):
    def reopened(self, clock: FakeClock) -> InMemoryDataAccess:
        for callback in self._callbacks.values():
            callback.cancel_requested = False
        return super().reopened(clock)


@breaks(Durable)
class ForgetsCountsOnReopening(Sturdy):
    def reopened(self, clock: FakeClock) -> InMemoryDataAccess:
        for callback in self._callbacks.values():
            callback.attempts_made = 0
        return super().reopened(clock)


# Clause 2


@breaks(Idempotent)
class StoresTwice(Sturdy):
    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        first = super().store_callback_request(request, id=id)
        if first.state is CallbackState.SUCCEEDED:
            super().store_callback_request(request)
        return first


@breaks(Idempotent)
class IgnoresConflicts(Sturdy):
    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        try:
            return super().store_callback_request(request, id=id)
        except ConflictError as conflict:
            return self.get_callback_status(conflict.id)


@breaks(Idempotent)
class ComparesUrlsOnly(Sturdy):
    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        try:
            return super().store_callback_request(request, id=id)
        except ConflictError as conflict:
            stored = self.get_callback_status(conflict.id)
            if stored.request.url != request.url:
                raise
            return stored


# Clause 3


@breaks(SequenceNumbers)
class CountsAnewWhenAQueueRunsEmpty(Sturdy):
    def _leave_queue(self, callback: memory._Callback, now: datetime) -> None:
        super()._leave_queue(callback, now)
        if callback.queue and callback.queue.head is None:
            del self._queues[callback.request.queue_id]


@breaks(SequenceNumbers)
class FoldsTheCaseOfQueueNames(Sturdy):
    def _join_queue(self, callback: memory._Callback, now: datetime) -> None:
        folded = callback.request.queue_id.casefold()
        self._queues.setdefault(callback.request.queue_id, self._queues.setdefault(folded, memory._Queue()))
        super()._join_queue(callback, now)


@breaks(SequenceNumbers)
class NumbersBeforeItStores(Sturdy):
    """Reads the next number in one step and stores under it in another."""

    def _join_queue(self, callback: memory._Callback, now: datetime) -> None:
        queue = self._queues.setdefault(callback.request.queue_id, memory._Queue())
        read = queue.last_number
        self._mutex.release()
        _a_round_trip()
        self._mutex.acquire()
        queue.last_number = read
        super()._join_queue(callback, now)


# Clause 4


@breaks(RoundTrip)
class LosesTheCaseOfHeaders(Sturdy):
    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        headers = {name.lower(): value for name, value in request.post_data.headers.items()}
        return super().store_callback_request(
            evolve(request, post_data=evolve(request.post_data, headers=headers)), id=id
        )


@breaks(RoundTrip)
class ForgetsWhatAFinalFailureDoes(Sturdy):
    def _lock(self, callback: memory._Callback, lock: CallbackLock) -> Acquired:
        return evolve(super()._lock(callback, lock), on_exhausted="continue")


@breaks(RoundTrip)
class TruncatesBodies(Sturdy):
    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        data = request.post_data.data
        shorter = evolve(request.post_data, data=data and data[:65535])
        return super().store_callback_request(evolve(request, post_data=shorter), id=id)


@breaks(RoundTrip)
class TakesAnEmptyBodyForNone(Sturdy):
    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        post_data = CallbackData(headers=request.post_data.headers, data=request.post_data.data or None)
        return super().store_callback_request(evolve(request, post_data=post_data), id=id)


@breaks(RoundTrip)
class RoundsTimesToMilliseconds(Sturdy):
    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        if attempt:
            attempt = evolve(attempt, time=attempt.time.replace(microsecond=attempt.time.microsecond // 1000 * 1000))
        return super().record_attempt(acquired, attempt, transition)


# Clause 5


@breaks(Exclusive)
class HasNoMutex(Sturdy):
    def __init__(self, *, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self._mutex = nullcontext()  # type: ignore[assignment]


@breaks(Exclusive)
class LocksSeveralOfAQueue(Sturdy):
    def _lock(self, callback: memory._Callback, lock: Any) -> Acquired:
        acquired = super()._lock(callback, lock)
        if callback.next:
            self._heads.put(callback.next, callback.next.due)
        return acquired


# Clause 6


@breaks(HeadOnly)
class DeliversTheNewestFirst(Sturdy):
    def _join_queue(self, callback: memory._Callback, now: datetime) -> None:
        super()._join_queue(callback, now)
        if (queue := callback.queue) and (head := queue.head) and head is not callback and head.state.is_open:
            self._heads.remove(head)
            queue.remove(callback)
            callback.next, queue.head, head.previous = head, callback, callback
            self._await_turn(callback, now)


@breaks(HeadOnly)
class IgnoresDueTimes(Sturdy):
    def _await_turn(self, callback: memory._Callback, now: datetime) -> None:
        callback.due = min(callback.due, now)
        super()._await_turn(callback, now)


@breaks(HeadOnly)
class IgnoresHolds(Sturdy):
    def _write(self, callback: memory._Callback, transition: Transition, now: datetime) -> None:
        super()._write(callback, evolve(transition, hold=False), now)


@breaks(HeadOnly)
class IgnoresLimits(Sturdy):
    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        return super().acquire_locks(machine_name, lock_timeout=lock_timeout, limit=1000)


@breaks(HeadOnly)
class LetsANewHeadQueueUpAgain(Sturdy):
    def _leave_queue(self, callback: memory._Callback, now: datetime) -> None:
        if callback.next:
            callback.next.due = now
        super()._leave_queue(callback, now)


# Clause 7


@breaks(Tokens)
class ReusesTokens(Sturdy):
    def _new_token(self) -> int:
        return 1


@breaks(Tokens)
class CountsTokensAnewOnReopening(Sturdy):
    def reopened(self, clock: FakeClock) -> InMemoryDataAccess:
        self._last_token = 0
        return super().reopened(clock)


# Clause 8


@breaks(Fenced)
class RecordsUnderAnyLock(Sturdy):
    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        present = self._callbacks[acquired.id].locks[-1]
        return super().record_attempt(evolve(acquired, lock=present), attempt, transition)


@breaks(Fenced)
class ReleasesUnderAnyLock(Sturdy):
    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        present = self._callbacks[acquired.id].locks[-1]
        return super().release_lock(evolve(acquired, lock=present), delay=delay)


@breaks(Fenced)
class ReturnsTheWishOfARelease(Sturdy):
    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        super().release_lock(acquired, delay=delay)
        return Transition(state=CallbackState.WAITING, delay=delay)


@breaks(Fenced)
class DropsLateAttempts(Sturdy):
    def _find_by_lock(self, acquired: Acquired) -> memory._Callback:
        callback = super()._find_by_lock(acquired)
        if not callback.is_held_by(acquired.lock):
            raise LockLostError(acquired.id, acquired.lock.token)
        return callback


@breaks(Fenced)
class ForgetsLateAcceptances(Sturdy):
    def _write(self, callback: memory._Callback, transition: Transition, now: datetime) -> None:
        callback.accepted_late = False
        super()._write(callback, transition, now)

    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        self._callbacks[acquired.id].accepted_late = False
        return super().record_attempt(acquired, attempt, transition)


@breaks(Fenced)
class TakesARepeatedRecordForLate(Sturdy):
    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        if not self._callbacks[acquired.id].is_held_by(acquired.lock):
            super().record_attempt(acquired, attempt, transition)
            raise LockLostError(acquired.id, acquired.lock.token)
        return super().record_attempt(acquired, attempt, transition)


# Clause 9


@breaks(AtomicRecord)
class RecordsInTwoSteps(Sturdy):
    def _write(self, callback: memory._Callback, transition: Transition, now: datetime) -> None:
        # The attempt and the end of the lock are there, the state is not.
        self._mutex.release()
        _a_round_trip()
        self._mutex.acquire()
        super()._write(callback, transition, now)


@breaks(AtomicRecord)
class ForgetsWhyItFailed(Sturdy):
    def _write(self, callback: memory._Callback, transition: Transition, now: datetime) -> None:
        super()._write(callback, evolve(transition, failed_reason=None), now)


@breaks(AtomicRecord)
class LeavesLocksUncompleted(Sturdy):
    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        written = super().record_attempt(acquired, attempt, transition)
        self._callbacks[acquired.id].end_lock(self.now(), completed=False)
        return written


@breaks(AtomicRecord)
class HoldsByItsOwnPolicy(Sturdy):
    def _write(self, callback: memory._Callback, transition: Transition, now: datetime) -> None:
        hold = transition.state is CallbackState.FAILED and callback.request.on_exhausted == "hold"
        super()._write(callback, evolve(transition, hold=hold), now)


@breaks(Notifications)
class LosesTheEmail(Sturdy):
    def _write(self, callback: memory._Callback, transition: Transition, now: datetime) -> None:
        super()._write(callback, evolve(transition, notify=False), now)


@breaks(Notifications)
class OwesTheEmailAfterTheFailure(Sturdy):
    """Writes the debt in a second step, which a kill in between would lose."""

    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        written = super().record_attempt(acquired, attempt, evolve(transition, notify=False))
        if written.state is CallbackState.FAILED and transition.notify:
            _a_round_trip()
            with self._mutex:
                self._owe(self._callbacks[acquired.id], self.now())
        return evolve(written, notify=transition.notify)


@breaks(Notifications)
class SendsAnEmailForEachFailure(Sturdy):
    def _owe(self, callback: memory._Callback, now: datetime) -> None:
        super()._owe(callback, now)
        key = (callback.request.notification_email_address, callback.request.queue_id)
        self._mailings.pop(key)


@breaks(Notifications)
class MixesTheQueuesOfAnAddress(Sturdy):
    def _owe(self, callback: memory._Callback, now: datetime) -> None:
        address, queue_id = callback.request.notification_email_address, callback.request.queue_id
        mailing = self._mailings.setdefault((address, ""), memory._Mailing(address, queue_id, due=now))
        self._mailings[address, queue_id] = mailing
        super()._owe(callback, now)


@breaks(Notifications)
class MixesTheAddressesOfAQueue(Sturdy):
    def _owe(self, callback: memory._Callback, now: datetime) -> None:
        address, queue_id = callback.request.notification_email_address, callback.request.queue_id
        mailing = self._mailings.setdefault(("", queue_id), memory._Mailing(address, queue_id, due=now))
        self._mailings[address, queue_id] = mailing
        super()._owe(callback, now)


@breaks(Notifications)
class TellsOfCallbacksWithoutAQueueOneByOne(Sturdy):
    def _owe(self, callback: memory._Callback, now: datetime) -> None:
        super()._owe(callback, now)
        if not callback.request.queue_id:
            self._mailings.clear()


class _ChangesNotifications(Sturdy):
    def change(self, notification: Notification) -> Notification:
        raise NotImplementedError

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        return [self.change(one) for one in super().acquire_notifications(lock_timeout=lock_timeout, limit=limit)]


@breaks(Notifications)
class CountsOnlyWhatItLists(_ChangesNotifications):
    def change(self, notification: Notification) -> Notification:
        return evolve(notification, count=len(notification.callback_ids))


@breaks(Notifications)
class ListsTheNewest(_ChangesNotifications):
    def change(self, notification: Notification) -> Notification:
        return evolve(notification, callback_ids=notification.callback_ids[::-1])


@breaks(Notifications)
class ListsAll(_ChangesNotifications):
    def change(self, notification: Notification) -> Notification:
        debts = self._leased[notification.token].debts
        return evolve(notification, callback_ids=tuple(callback.id for callback in debts))


@breaks(Notifications)
class ForgetsTheTriesOfAnEmail(_ChangesNotifications):
    def change(self, notification: Notification) -> Notification:
        return evolve(notification, tries=0)


@breaks(Notifications)
class CallsEachLeaseAnEmailOfItsOwn(_ChangesNotifications):
    def change(self, notification: Notification) -> Notification:
        return evolve(notification, first_token=notification.token)


@frozen
class _End:
    """The arguments of a call of record_notification."""

    notification: Notification
    retry_in: timedelta | None
    quiet_for: timedelta


class _ChangesEnds(Sturdy):
    def change(self, end: _End, mailing: memory._Mailing | None) -> _End:
        """Change what is recorded, or the mailing that it is recorded of, if the lease is live."""
        raise NotImplementedError

    def record_notification(
        self, notification: Notification, *, retry_in: timedelta | None, quiet_for: timedelta = timedelta(0)
    ) -> None:
        end = self.change(_End(notification, retry_in, quiet_for), self._leased.get(notification.token))
        super().record_notification(end.notification, retry_in=end.retry_in, quiet_for=end.quiet_for)


@breaks(Notifications)
class PaysUnderAnyLease(_ChangesEnds):
    def change(self, end: _End, mailing: memory._Mailing | None) -> _End:
        for token in self._leased:
            return evolve(end, notification=evolve(end.notification, token=token))
        return end


@breaks(Notifications)
class PaysWhatWasNotTold(_ChangesEnds):
    """Takes all debts with a payment, also those that came after the lease."""

    def change(self, end: _End, mailing: memory._Mailing | None) -> _End:
        if mailing is not None:
            mailing.covered = len(mailing.debts)
        return end


@breaks(Notifications)
class PaysOnlyWhatItLists(_ChangesEnds):
    def change(self, end: _End, mailing: memory._Mailing | None) -> _End:
        if mailing is not None:
            mailing.covered = len(end.notification.callback_ids)
        return end


@breaks(Notifications)
class TellsOfMoreWithEachTry(Sturdy):
    """Adds the debts that came after the first lease, so that the last try may be the only one for some of them."""

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        for mailing in self._mailings.values():
            if mailing.covered and mailing.due <= self.now():
                mailing.covered = len(mailing.debts)
        return super().acquire_notifications(lock_timeout=lock_timeout, limit=limit)


@breaks(Notifications)
class KnowsNoQuietTime(_ChangesEnds):
    def change(self, end: _End, mailing: memory._Mailing | None) -> _End:
        return evolve(end, quiet_for=timedelta(0))


@breaks(Notifications)
class IsQuietByItsOwnPolicy(_ChangesEnds):
    def change(self, end: _End, mailing: memory._Mailing | None) -> _End:
        return evolve(end, quiet_for=max(end.quiet_for, timedelta(hours=1)))


@breaks(Notifications)
class IsQuietAfterAFailedTry(_ChangesEnds):
    def change(self, end: _End, mailing: memory._Mailing | None) -> _End:
        return end if end.retry_in is None else evolve(end, retry_in=end.retry_in + end.quiet_for)


@breaks(Notifications)
class ForgetsAQuietTimeInWhichNothingIsOwed(Sturdy):
    def _owe(self, callback: memory._Callback, now: datetime) -> None:
        key = (callback.request.notification_email_address, callback.request.queue_id)
        if (mailing := self._mailings.get(key)) and not mailing.debts:
            mailing.due = now
        super()._owe(callback, now)


@breaks(Notifications)
class ForgetsAQuietTimeInWhichSomethingIsOwed(Sturdy):
    def _owe(self, callback: memory._Callback, now: datetime) -> None:
        super()._owe(callback, now)
        key = (callback.request.notification_email_address, callback.request.queue_id)
        mailing = self._mailings[key]
        if not mailing.covered:
            self._owing.remove(mailing)
            self._put(mailing, now)


@breaks(Notifications)
class ProlongsTheQuietTimeWithEachFailure(Sturdy):
    def _owe(self, callback: memory._Callback, now: datetime) -> None:
        super()._owe(callback, now)
        key = (callback.request.notification_email_address, callback.request.queue_id)
        mailing = self._mailings[key]
        if mailing.due > now and not mailing.covered:
            self._owing.remove(mailing)
            self._put(mailing, now + timedelta(hours=1))


@breaks(Notifications)
class LosesDebtsOfQuietMailings(Sturdy):
    def _forget_mailings(self, now: datetime) -> None:
        for mailing in list(self._mailings.values()):
            if mailing.due > now and not mailing.covered and len(mailing.debts) == 1:
                self._owing.remove(mailing)


@breaks(Notifications)
class ForgetsQuietTimesOnReopening(Sturdy):
    def reopened(self, clock: FakeClock) -> InMemoryDataAccess:
        for mailing in self._mailings.values():
            if not mailing.covered:
                self._owing.remove(mailing)
                self._put(mailing, self.now())
        return super().reopened(clock)


@breaks(Notifications)
class LeasesTheNewestFirst(Sturdy):
    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        return super().acquire_notifications(lock_timeout=lock_timeout, limit=limit)[::-1]


# Clause 10


@breaks(Expiry)
class TellsTheWallTime(Sturdy):
    def now(self) -> datetime:
        return self._clock.now()


@breaks(Expiry)
class NeverLooksAtTimedOutLocks(Sturdy):
    def _lock(self, callback: memory._Callback, lock: Any) -> Acquired:
        acquired = super()._lock(callback, lock)
        self._heads.remove(callback)
        return acquired


@breaks(Expiry)
class TakesLiveLocksNearTheirEnd(Sturdy):
    def _lock(self, callback: memory._Callback, lock: Any) -> Acquired:
        acquired = super()._lock(callback, lock)
        self._heads.put(callback, callback.due - timedelta(seconds=5))
        return acquired


@breaks(Expiry)
class CountsAbandonedLocksAsAttempts(Sturdy):
    def _abandon_lock(self, callback: memory._Callback, now: datetime) -> None:
        super()._abandon_lock(callback, now)
        callback.attempts_made += 1


@breaks(Expiry)
class SendsACancelledCallbackOnceMore(Sturdy):
    def _abandon_lock(self, callback: memory._Callback, now: datetime) -> None:
        callback.end_lock(callback.due, completed=False)
        callback.abandoned += 1


# Clause 11


@breaks(Reads)
class ReadsInTwoSteps(Sturdy):
    def get_callback_status(self, id: str) -> CallbackStatus:
        first = super().get_callback_status(id)
        _a_round_trip()
        return evolve(super().get_callback_status(id), state=first.state)


@breaks(Reads)
class PagesByPosition(Sturdy):
    def list_callbacks(
        self, *, state: CallbackState | None = None, queue_id: str | None = None, page_size: int = 100
    ) -> Iterator[CallbackStatus]:
        position = 0
        while page := list(super().list_callbacks(state=state, queue_id=queue_id))[position : position + page_size]:
            yield from page
            position += page_size


# Clause 12


@breaks(Hints)
class WorksForSubscribersOnly(Sturdy):
    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        if not self._subscribers:
            return []
        return super().acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)


# Clause 13


@breaks(Errors)
class LetsTheDriversErrorsOut(Sturdy):
    @contextmanager
    def outage(self) -> Iterator[None]:
        mutex, self._mutex = self._mutex, None  # type: ignore[assignment]
        try:
            yield
        finally:
            self._mutex = mutex


@breaks(Errors)
class CallsAHalfDoneWriteTransient(Sturdy):
    @contextmanager
    def outage(self) -> Iterator[None]:
        self._write_then_fail = True
        try:
            yield
        finally:
            self._write_then_fail = False

    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        status = super().store_callback_request(request, id=id)
        if getattr(self, "_write_then_fail", False):
            raise TransientDataAccessError("the answer did not come") from OSError("connection lost")
        return status

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        if getattr(self, "_write_then_fail", False):
            raise TransientDataAccessError("the store does not answer") from OSError("connection lost")
        return super().acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)

    release_lock = record_attempt = request_transition = acquire_locks  # type: ignore[assignment]


@breaks(Errors)
class StoresUnderMalformedIds(Sturdy):
    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        return super().store_callback_request(request, id=id and id.replace(".", "-"))


@breaks(Errors)
class KnowsEveryId(Sturdy):
    def get_callback_status(self, id: str) -> CallbackStatus:
        try:
            return super().get_callback_status(id)
        except CallbackNotFoundError:
            return CallbackStatus(id="", request=CallbackRequest(url="https://host.example/"))


@breaks(Errors)
class TakesNoLimitForOne(Sturdy):
    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        return super().acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit or 1)


# Clause 14


@breaks(ThreadsAndForks)
class DiesInAForkedChild(Sturdy):
    def __init__(self, *, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self._process = os.getpid()

    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        if os.getpid() != self._process:
            raise DataAccessError("connection of another process")
        return super().store_callback_request(request, id=id)


@breaks(ThreadsAndForks)
class StaysClosed(Sturdy):
    def close(self) -> None:
        self._closed = True

    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        if getattr(self, "_closed", False):
            raise DataAccessError("closed")
        return super().store_callback_request(request, id=id)


# Clause 15


@breaks(Purge)
class PurgesWhatOwesAnEmail(Sturdy):
    def _owe(self, callback: memory._Callback, now: datetime) -> None:
        super()._owe(callback, now)
        callback.debts = 0


@breaks(Purge)
class PurgesWhatHoldsAQueue(Sturdy):
    def _offer_to_purge(self, callback: memory._Callback) -> None:
        if not callback.state.is_open:
            self._forgettable.put(callback, callback.finished_at)


@breaks(Purge)
class FreesNumbers(Sturdy):
    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        deleted = super().purge(finished_for=finished_for, limit=limit)
        self._queues = {name: queue for name, queue in self._queues.items() if queue.head}
        return deleted


@breaks(Purge)
class FreesTokens(Sturdy):
    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        deleted = super().purge(finished_for=finished_for, limit=limit)
        if not self._callbacks:
            self._last_token = 0
        return deleted


@breaks(Purge)
class PurgesWithoutBound(Sturdy):
    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        return super().purge(finished_for=finished_for)


@breaks(Purge)
class PurgesTheYoungToo(Sturdy):
    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        return super().purge(finished_for=timedelta(0), limit=limit)


@breaks(Purge)
class GivesOldResultsToANewCallback(Sturdy):
    def _find_by_lock(self, acquired: Acquired) -> memory._Callback:
        if acquired.id not in self._callbacks:
            raise LockLostError(acquired.id, acquired.lock.token)
        return self._find(acquired.id)


# Clause 16


@breaks(Backup)
class BacksUpAReference(Sturdy):
    def _copied(self) -> dict[str, Any]:
        return self.__dict__


@breaks(Backup)
class BacksUpOpenCallbacksOnly(Sturdy):
    def _copied(self) -> dict[str, Any]:
        copied = super()._copied()
        copied["_callbacks"] = {id: one for id, one in copied["_callbacks"].items() if one.state.is_open}
        return copied


@breaks(Backup)
class BacksUpInTwoSteps(Sturdy):
    """What changed between the steps is old in the copy, what is new is there."""

    def backup(self, path: str | PathLike[str]) -> None:
        with self._mutex:
            first = self._copied()
        for _ in range(10):
            _a_round_trip()
        with self._mutex:
            second = self._copied()
        self.copies[self._free(path)] = first | {"_callbacks": second["_callbacks"] | first["_callbacks"]}


@breaks(Backup)
class ReplacesAnEarlierBackup(Sturdy):
    def _free(self, path: str | PathLike[str]) -> Path:
        check_arguments(path=path)
        return Path(path)


# Section 4: what operators ask for


@breaks(OperatorActions)
class RedeliversInPlaceAlways(Sturdy):
    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        sequence = super().get_callback_status(id).sequence
        status = super().request_transition(id, action)
        self._callbacks[id].sequence = sequence
        return evolve(status, sequence=sequence)


@breaks(OperatorActions)
class CancelsUnderALiveLock(Sturdy):
    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        status = super().request_transition(id, action)
        if action is Action.CANCEL and status.state is CallbackState.LOCKED:
            with self._step() as now:
                self._cancel(self._find(id), now)
        return self.get_callback_status(id)


@breaks(OperatorActions)
class AllowsEverything(Sturdy):
    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        try:
            return super().request_transition(id, action)
        except IllegalTransitionError:
            return self.get_callback_status(id)


@breaks(OperatorActions)
class KeepsCountingAfterARedelivery(Sturdy):
    def _revive(self, callback: memory._Callback, now: datetime) -> None:
        made = callback.attempts_made
        super()._revive(callback, now)
        callback.attempts_made = made


# Storing in a transaction of the application's


_TURN = threading.RLock()
"""The one writer at a time."""


class Notebook:
    """A connection of the application's: a copy of the store, which takes its place at the commit."""

    def __init__(self, store: Sturdy) -> None:
        self._store = store
        self.rollback()

    def rollback(self) -> None:
        self.copy = object.__new__(type(self._store))
        self.copy.__dict__ = self._store._copied()

    def commit(self) -> None:
        vars(self._store).update(vars(self.copy))


class Enlisted(Sturdy, SupportsEnlist[Notebook]):
    """`Sturdy`, with what a transaction of the application's asks for."""

    def store_callback_request(
        self, request: CallbackRequest, *, id: str | None = None, connection: Notebook | None = None
    ) -> CallbackStatus:
        if connection is not None:
            return self.store_callback_requests([request], ids=[id], connection=connection)[0]
        with _TURN:
            return super().store_callback_request(request, id=id)

    def store_callback_requests(
        self,
        requests: Sequence[CallbackRequest],
        *,
        ids: Sequence[str | None] | None = None,
        connection: Notebook | None = None,
    ) -> list[CallbackStatus]:
        if connection is None:
            return super().store_callback_requests(requests, ids=ids)
        if not isinstance(connection, Notebook):
            raise InvalidRequestError([("connection", "must be a Notebook")])
        before = connection.copy._copied()
        try:
            return connection.copy.store_callback_requests(requests, ids=ids)
        except Exception:
            self._take_back(connection, before)
            raise

    def _take_back(self, connection: Notebook, before: dict[str, Any]) -> None:
        connection.copy.__dict__ = before

    def hint(self) -> None:
        for wake in tuple(self._subscribers.values()):
            wake()

    @contextmanager
    def transaction(self) -> Iterator[Notebook]:
        with _TURN:
            yield Notebook(self)


@breaks(Enlisting)
class StoresAtOnce(Enlisted):
    def store_callback_requests(
        self, requests: Sequence[CallbackRequest], *, connection: Notebook | None = None, **ids: Any
    ) -> list[CallbackStatus]:
        return super().store_callback_requests(requests, **ids)


@breaks(Enlisting)
class ForgetsWhatWasCommitted(Enlisted):
    def store_callback_requests(
        self, requests: Sequence[CallbackRequest], *, connection: Notebook | None = None, **ids: Any
    ) -> list[CallbackStatus]:
        return super().store_callback_requests(requests, connection=connection and Notebook(self), **ids)


@breaks(Enlisting)
class CommitsByItself(Enlisted):
    def store_callback_requests(
        self, requests: Sequence[CallbackRequest], *, connection: Notebook | None = None, **ids: Any
    ) -> list[CallbackStatus]:
        statuses = super().store_callback_requests(requests, connection=connection, **ids)
        if connection is not None:
            connection.commit()
        return statuses


@breaks(Enlisting)
class KeepsHalfOfWhatWasRefused(Enlisted):
    def _take_back(self, connection: Notebook, before: dict[str, Any]) -> None: ...


@breaks(Enlisting)
class RollsAllBackAfterARefusal(Enlisted):
    def _take_back(self, connection: Notebook, before: dict[str, Any]) -> None:
        connection.rollback()


@breaks(Enlisting)
class DrawsNumbersWithoutALock(Enlisted):
    @contextmanager
    def transaction(self) -> Iterator[Notebook]:
        yield Notebook(self)


@breaks(Enlisting)
class TakesAnythingForAConnection(Enlisted):
    def store_callback_requests(
        self, requests: Sequence[CallbackRequest], *, connection: Notebook | None = None, **ids: Any
    ) -> list[CallbackStatus]:
        usable = connection if isinstance(connection, Notebook) else None
        return super().store_callback_requests(requests, connection=usable, **ids)


@breaks(Enlisting)
class KeepsHintsToItself(Enlisted):
    def hint(self) -> None: ...


class HandingOver(Sturdy, SupportsHandover):
    """`Sturdy`, recording and acquiring in one call."""

    def record_and_acquire(
        self, records: Sequence[AttemptRecord], machine_name: str, *, lock_timeout: timedelta, limit: int
    ) -> tuple[list[Transition | LockLostError], list[Acquired]]:
        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        results = self.record_attempts(records)
        return results, self.acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)


@breaks(Handover)
class AcquiresBeforeItRecords(HandingOver):
    def record_and_acquire(
        self, records: Sequence[AttemptRecord], machine_name: str, *, lock_timeout: timedelta, limit: int
    ) -> tuple[list[Transition | LockLostError], list[Acquired]]:
        acquired = self.acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)
        return self.record_attempts(records), acquired


@breaks(Handover)
class RecordsWhatItIsWronglyAsked(HandingOver):
    def record_and_acquire(self, records: Sequence[AttemptRecord], machine_name: str, **rest: Any) -> Any:
        results = self.record_attempts(records)
        return results, self.acquire_locks(machine_name, **rest)


@breaks(Handover)
class HandsOverAsManyAsWereRecorded(HandingOver):
    def record_and_acquire(self, records: Sequence[AttemptRecord], *args: Any, **rest: Any) -> Any:
        rest["limit"] = len(records) or rest["limit"]
        return super().record_and_acquire(records, *args, **rest)


@breaks(Handover)
class LeavesOutWhatCameLate(HandingOver):
    def record_and_acquire(self, records: Sequence[AttemptRecord], *args: Any, **rest: Any) -> Any:
        results, acquired = super().record_and_acquire(records, *args, **rest)
        return [result for result in results if not isinstance(result, LockLostError)], acquired
