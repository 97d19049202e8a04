"""A process's way to the store: each call can fail, be the last, or be heard by nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from callbackq.core.lifecycle import Action, Transition
from callbackq.core.models import CallbackAttempt, CallbackRequest, CallbackStatus
from callbackq.dataaccess import (
    Acquired,
    AttemptRecord,
    DataAccess,
    Notification,
    SupportsHandover,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
)
from callbackq.errors import (
    CallbackNotFoundError,
    DataAccessError,
    IllegalTransitionError,
    LockLostError,
    TransientDataAccessError,
)
from callbackq.testing.simulation.ledger import Ledger
from callbackq.testing.simulation.world import Actor, microseconds

__all__ = ["RealStore", "WayToTheStore", "WayWithHandover"]

_T = TypeVar("_T")


class RealStore(DataAccess, SupportsNotifications, SupportsListing, SupportsPurge, Protocol):
    """What a store must be able to do for a simulation."""


class WayToTheStore(DataAccess, SupportsNotifications):
    """
    Calls a real store on behalf of a process, and shows the ledger what was committed.

    One call at a time: the next begins when the last has returned. Between two calls anything may happen.

    Args:
        store: the real one.
        actor: the process.
        ledger: who watches.
        in_batches: the store writes several results in one transaction.
    """

    def __init__(self, store: RealStore, actor: Actor, ledger: Ledger, *, in_batches: bool) -> None:
        self.durability = store.durability
        self.store = store
        self._actor = actor
        self._ledger = ledger
        self._in_batches = in_batches

    def _call(
        self, name: str, call: Callable[[], _T], note: Callable[[_T], None], *, about: str = "", writes: bool = True
    ) -> _T:
        actor, world = self._actor, self._actor.world
        try:
            actor.reach("before", name, about)
            if world.store_fails_until_us > world.now_us:
                world.counts["call during an outage"] += 1
                raise TransientDataAccessError("simulated: the store is out of reach")
            if writes and world.disk_full_until_us > world.now_us:
                world.counts["write on a full disk"] += 1
                raise TransientDataAccessError("simulated: the disk is full")
            result = call()
            note(result)
            actor.reach("after", name, about)
        except DataAccessError:
            actor.met_store(failed=True)
            raise
        except (IllegalTransitionError, CallbackNotFoundError):
            raise
        except Exception as error:
            # No store may raise this. (Nor may the ledger; an engine would survive both, and hide them.)
            self._ledger.break_rule("raised", about, f"{name}: {type(error).__name__}: {error}")
            raise
        actor.met_store(failed=False)
        return result

    def open(self) -> None:
        self.store.open()

    def close(self) -> None:
        self.store.close()

    def now(self) -> datetime:
        return self.store.now()

    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        return self.store_callback_requests([request], ids=[id])[0]

    def store_callback_requests(
        self, requests: Sequence[CallbackRequest], *, ids: Sequence[str | None] | None = None
    ) -> list[CallbackStatus]:
        if not self._in_batches and len(requests) > 1:
            names = ids or [None] * len(requests)
            return [self.store_callback_request(one, id=id) for id, one in zip(names, requests, strict=True)]
        pairs = [(id or "", request) for id, request in zip(ids or (), requests, strict=True)]
        return self._call(
            "store_callback_requests",
            lambda: self.store.store_callback_requests(requests, ids=ids),
            lambda statuses: self._ledger.stored(pairs, statuses),
            about=",".join(id for id, _ in pairs),
        )

    def get_callback_status(self, id: str) -> CallbackStatus:
        return self._call(
            "get_callback_status", lambda: self.store.get_callback_status(id), _nothing, about=id, writes=False
        )

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        return self._acquire(
            "acquire_locks",
            lambda: self.store.acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit),
            lambda found: self._note_locks(found, lock_timeout, limit),
        )

    def _acquire(self, name: str, call: Callable[[], _T], note: Callable[[_T], list[int]], *, about: str = "") -> _T:
        tokens: list[int] = []
        try:
            return self._call(name, call, lambda result: tokens.extend(note(result)), about=about)
        except DataAccessError:
            self._ledger.excuses.never_told(tokens)
            raise

    def _note_locks(self, found: list[Acquired], lock_timeout: timedelta, limit: int) -> list[int]:
        actor, world = self._actor, self._actor.world
        self._ledger.acquired(actor, limit, found, self._pass)
        for one in found:
            world.tell(
                actor.name,
                "locked",
                one.id,
                f"queue {one.queue_id!r} number {one.sequence} token {one.lock.token} until "
                f"{world.now_us / 1e6 + lock_timeout.total_seconds():.6f}, abandoned {one.abandoned}",
            )
        return [one.lock.token for one in found]

    def _pass(self, id: str) -> None:
        self._ledger.passed(id, self.store.get_callback_status(id))

    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        (outcome,) = self.release_locks([(acquired, delay)])
        if isinstance(outcome, LockLostError):
            raise outcome
        return outcome

    def release_locks(self, locks: Sequence[tuple[Acquired, timedelta]]) -> list[Transition | LockLostError]:
        parts = [locks] if self._in_batches else [[one] for one in locks]
        return [outcome for part in parts for outcome in self._release(part)]

    def _release(self, locks: Sequence[tuple[Acquired, timedelta]]) -> list[Transition | LockLostError]:
        def note(outcomes: list[Transition | LockLostError]) -> None:
            for (acquired, delay), outcome in zip(locks, outcomes, strict=True):
                self._ledger.released(acquired, microseconds(delay.total_seconds()), outcome)
                self._tell("released", acquired, outcome, f"due again after {delay.total_seconds():.3f} s")

        return self._call("release_lock", lambda: self.store.release_locks(locks), note, about=locks[0][0].id)

    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        (outcome,) = self.record_attempts([AttemptRecord(acquired=acquired, attempt=attempt, transition=transition)])
        if isinstance(outcome, LockLostError):
            raise outcome
        return outcome

    def record_attempts(self, records: Sequence[AttemptRecord]) -> list[Transition | LockLostError]:
        parts = [records] if self._in_batches else [[one] for one in records]
        return [outcome for part in parts for outcome in self._record(part)]

    def _record(self, records: Sequence[AttemptRecord]) -> list[Transition | LockLostError]:
        return self._call(
            "record_attempt",
            lambda: self.store.record_attempts(records),
            lambda outcomes: self._note_results(records, outcomes),
            about=records[0].acquired.id,
        )

    def _note_results(self, records: Sequence[AttemptRecord], outcomes: Sequence[Transition | LockLostError]) -> None:
        for record, outcome in zip(records, outcomes, strict=True):
            self._ledger.recorded(self._actor, record, outcome)
            attempt = record.attempt
            words = "unsent" if attempt is None else f"{attempt.status_code} {_name(attempt.failure)}"
            self._tell("recorded", record.acquired, outcome, words)

    def _tell(self, what: str, acquired: Acquired, outcome: Transition | LockLostError, words: str) -> None:
        end = "the lock was lost" if isinstance(outcome, LockLostError) else outcome.state.value
        self._actor.world.tell(
            self._actor.name, what, acquired.id, f"token {acquired.lock.token}: {words.strip()} -> {end}"
        )

    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        def act() -> CallbackStatus | IllegalTransitionError:
            try:
                return self.store.request_transition(id, action)
            except IllegalTransitionError as error:
                return error

        def note(result: CallbackStatus | IllegalTransitionError) -> None:
            self._ledger.acted(action, id, result)
            end = "refused" if isinstance(result, IllegalTransitionError) else result.state.value
            self._actor.world.counts[f"{action.value}{' refused' if end == 'refused' else ''}"] += 1
            self._actor.world.tell(self._actor.name, action.value, id, f"-> {end}")

        result = self._call("request_transition", act, note, about=id)
        if isinstance(result, IllegalTransitionError):
            raise result
        return result

    def next_due(self) -> datetime | None:
        return self._call("next_due", self.store.next_due, _nothing, writes=False)

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        world = self._actor.world

        def hint() -> None:
            if world.hints_lost_until_us > world.now_us:
                world.counts["hint lost"] += 1
            elif not self._actor.is_dead:
                wake()

        return self.store.subscribe(hint)

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        return self._call(
            "acquire_notifications",
            lambda: self.store.acquire_notifications(lock_timeout=lock_timeout, limit=limit),
            lambda leased: self._ledger.mails.leased(self._actor, leased),
        )

    def record_notification(
        self, notification: Notification, *, retry_in: timedelta | None, quiet_for: timedelta = timedelta(0)
    ) -> None:
        def note(_: None) -> None:
            self._ledger.mails.ended(notification, is_over=retry_in is None)

        try:
            self._call(
                "record_notification",
                lambda: self.store.record_notification(notification, retry_in=retry_in, quiet_for=quiet_for),
                note,
            )
        except DataAccessError:
            self._ledger.mails.excuse(notification.first_token)
            raise


class WayWithHandover(WayToTheStore, SupportsHandover):
    """The way to a store that records and acquires in one transaction."""

    def record_and_acquire(
        self, records: Sequence[AttemptRecord], machine_name: str, *, lock_timeout: timedelta, limit: int
    ) -> tuple[list[Transition | LockLostError], list[Acquired]]:
        store = self.store
        assert isinstance(store, SupportsHandover)

        def note(both: tuple[list[Transition | LockLostError], list[Acquired]]) -> list[int]:
            results, found = both
            self._note_results(records, results)
            return self._note_locks(found, lock_timeout, limit)

        return self._acquire(
            "record_and_acquire",
            lambda: store.record_and_acquire(records, machine_name, lock_timeout=lock_timeout, limit=limit),
            note,
            about=records[0].acquired.id,
        )


def _nothing(_: object) -> None:
    pass


def _name(failure: object) -> str:
    return "" if failure is None else str(getattr(failure, "value", failure))
