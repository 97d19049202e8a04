"""`SQLiteDataAccess`: the methods of a store over transactions. Arguments in, operations, results out."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

from callbackq.clock import Clock, SystemClock
from callbackq.core.lifecycle import Action, Transition
from callbackq.core.models import CallbackAttempt, CallbackRequest, CallbackState, CallbackStatus
from callbackq.core.validation import Fault, check_bool, refuse
from callbackq.dataaccess import (
    Acquired,
    AttemptRecord,
    DataAccess,
    Durability,
    Notification,
    SupportsBackup,
    SupportsEnlist,
    SupportsHandover,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
    check_arguments,
    ids_for,
)
from callbackq.errors import DataAccessError, LockLostError
from callbackq.settings import check_collaborator
from callbackq.stores._door import ORDINARY_LIMITS, ask, check_accept
from callbackq.stores.sql import forgetting, locking, mailings, reading
from callbackq.stores.sql.instants import instant
from callbackq.stores.sql.rows import code_of
from callbackq.stores.sqlite import claiming, file, storing, upkeep
from callbackq.stores.sqlite.backup import back_up
from callbackq.stores.sqlite.database import Database
from callbackq.stores.sqlite.enlisting import check_connection, run_enlisted
from callbackq.stores.sqlite.holders import Holders, remove_file
from callbackq.stores.sqlite.timeline import TimeLine
from callbackq.stores.sqlite.transaction import SQLiteTransaction

__all__ = ["SQLiteDataAccess"]

_LOG = logging.getLogger("callbackq.stores")

_PROBE_INTERVAL_US: Final = 200_000
_PURGE_BATCH: Final = 250
_MOST_LOCKS: Final = 10_000
_LONGEST_BUSY_TIMEOUT: Final = timedelta(days=1)

_DURABILITIES: Final = {"power": Durability.POWER, "process": Durability.PROCESS}

_T = TypeVar("_T")
_Claim = Callable[[SQLiteTransaction, int], list[locking.Claim]]
_HandedOver = tuple[list[Transition | LockLostError], list[locking.Claim]]


class SQLiteDataAccess(
    DataAccess,
    SupportsNotifications,
    SupportsListing,
    SupportsPurge,
    SupportsBackup,
    SupportsEnlist[sqlite3.Connection],
    SupportsHandover,
):
    """
    Keep callbacks in an SQLite file, for any number of threads and processes on one machine.

    The file is created, readable by its owner only, when it doesn't exist. The application may keep tables of its
    own in it; ours begin with ``callbackq_``.

    * Callbacks can be stored within a transaction of the application's, on a `sqlite3.Connection` of its own whose main
      database is the same file: see `SupportsEnlist`.
    * Threads that write at the same time share a commit. `DataAccess.store_callback_requests` stores all or none.
    * Locks of a process that died are free for others at their next look, some 0.2 s later at most; those of a process
      that is frozen, and those of a store that was closed, when they time out.
    * Subscribers hear of what becomes due by this object. What other objects and processes do is found by polling.
    * A callback whose stored request can't be read any more is acquired without a request, passed over by listings with
      a line in the log, and raises `DataAccessError` when asked for.

    Args:
        path: the file. Its directory must exist, on a local disk.
        clock: where time comes from; the machine's clock by default.
        durability: ``"power"``: what a call returned for survives the loss of power. ``"process"`` is faster, and
            survives the death of any process, but the last moments before a loss of power may be lost: callbacks
            stored then are gone, and those delivered then are sent again.
        allow_network_fs: use a file on a network file system all the same, with SQLite's slower and sturdier
            rollback journal, and with wall time as the only clock.
        busy_timeout: how long a call waits for other writers before it raises `TransientDataAccessError`.
        accept: the host's own rules for what may be stored: a function that is called with each request that isn't
            stored yet, before anything is written, in the thread that stores and without a lock. To refuse it raises,
            as a rule `NotAcceptedError`; that comes out as it is, and nothing of the call is stored. Who repeats a call
            with the same id is not asked again. By default the ordinary `RequestLimits`.

    Raises:
        InvalidRequestError: with every argument that is of another type or impossible: *path* is no path of a file,
            *clock* no `Clock`, *durability* neither of the two words, *busy_timeout* not from 0 to 1 day, *accept*
            nothing that can be called.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Clock | None = None,
        durability: Literal["power", "process"] = "power",
        allow_network_fs: bool = False,
        busy_timeout: timedelta = timedelta(seconds=10),
        accept: Callable[[CallbackRequest], None] = ORDINARY_LIMITS,
    ) -> None:
        self._clock = SystemClock() if clock is None else clock
        refuse(
            [
                *_check_path(path),
                *check_collaborator("clock", self._clock, "now", "monotonic", "boot_id"),
                *_check_durability(durability),
                *(("allow_network_fs", reason) for _, reason in check_bool(allow_network_fs)),
                *_check_busy_timeout(busy_timeout),
                *check_accept(accept),
            ]
        )
        self.durability = _DURABILITIES[durability]
        self._accept = accept
        # Links are resolved, since everything else lies beside the true file.
        self._path = Path(path).resolve()
        self._time = TimeLine(self._clock)
        self._allow_network_fs = allow_network_fs
        self._is_local = True
        self._was_located = False
        self._database = Database(
            self._path,
            locate=self._locate,
            prepare=self._prepare,
            forget=self._forget_parent,
            durable=self.durability is Durability.POWER,
            busy_timeout=busy_timeout,
        )
        self._holders = Holders(self._path)
        self._next_probe_us = 0
        self._subscribers: dict[object, Callable[[], None]] = {}

    def __repr__(self) -> str:
        return f"<SQLiteDataAccess {self._path}>"

    def open(self) -> None:
        self._database.open()

    def close(self) -> None:
        if (holder := self._holders.named()) is not None:
            try:
                # First: others that find its file unlocked, and the holder named, would take its locks over.
                self._write(lambda tx, now: tx.run("remove_holder", {"holder": holder}))
            except DataAccessError as error:
                _LOG.warning("a store was closed while it could not be written to: %s", error)
            self._holders.end()
        self._database.close()

    def _end_as_if_killed(self) -> None:
        """End as the death of the process does, with nothing told to others. For simulations."""
        self._holders.die()
        self._database.close()

    def now(self) -> datetime:
        self._database.open()
        return instant(self._time.now_us())

    # Storing and looking.

    def store_callback_request(
        self, request: CallbackRequest, *, id: str | None = None, connection: sqlite3.Connection | None = None
    ) -> CallbackStatus:
        check_arguments(request=request, id=id)
        return self._store([(id, request)], connection)[0]

    def store_callback_requests(
        self,
        requests: Sequence[CallbackRequest],
        *,
        ids: Sequence[str | None] | None = None,
        connection: sqlite3.Connection | None = None,
    ) -> list[CallbackStatus]:
        return self._store(list(zip(ids_for(requests, ids), requests, strict=True)), connection)

    def hint(self) -> None:
        for wake in tuple(self._subscribers.values()):
            wake()

    def get_callback_status(self, id: str) -> CallbackStatus:
        return self._database.read(lambda tx: reading.status_of(tx, reading.find(tx, id).callback))

    def list_callbacks(
        self, *, state: CallbackState | None = None, queue_id: str | None = None, page_size: int = 100
    ) -> Iterator[CallbackStatus]:
        # Here, not with the first page: whoever calls wrongly should be told where.
        check_arguments(state=state, queue_id=queue_id, page_size=page_size)
        return self._pages(state, queue_id, page_size)

    def _pages(self, state: CallbackState | None, queue_id: str | None, page_size: int) -> Iterator[CallbackStatus]:
        for keys in self._list_keys(state, queue_id):
            for start in range(0, len(keys), page_size):
                # All of a page at once: no transaction stays open while the caller looks at it.
                page = self._database.read(
                    partial(reading.readable_statuses, callbacks=keys[start : start + page_size])
                )
                yield from (status for status in page if state in (None, status.state))

    # Locks.

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        due = self._next_due_us()
        if due is None or due > self._time.now_us():
            self._database.checkpoint_when_idle()
            return []
        claims = self._write(self._claim(machine_name, lock_timeout, limit))
        return [locking.acquired(claim) for claim in claims]

    def record_and_acquire(
        self, records: Sequence[AttemptRecord], machine_name: str, *, lock_timeout: timedelta, limit: int
    ) -> tuple[list[Transition | LockLostError], list[Acquired]]:
        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        self._database.open()
        self._free_locks_of_the_dead()
        limit = min(limit, _MOST_LOCKS)
        claim = self._claim(machine_name, lock_timeout, limit)

        def hand_over(transaction: SQLiteTransaction, now: int) -> tuple[_HandedOver, bool]:
            outcomes, made_due = locking.end_locks(transaction, now, records)
            claims = claim(transaction, now)
            # With fewer than it asked for, it has all that is due, and there is nothing to hint at.
            return (outcomes, claims), made_due and len(claims) >= limit

        outcomes, claims = self._telling(hand_over)
        return outcomes, [locking.acquired(claim) for claim in claims]

    def _claim(self, machine_name: str, lock_timeout: timedelta, limit: int) -> _Claim:
        return partial(
            claiming.claim,
            machine_name=machine_name,
            lock_timeout=lock_timeout,
            limit=min(limit, _MOST_LOCKS),
            holder=self._holders.own() if self._is_local else None,
        )

    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        check_arguments(delay=delay)
        (outcome,) = self.release_locks([(acquired, delay)])
        if isinstance(outcome, LockLostError):
            raise outcome
        return outcome

    def release_locks(self, locks: Sequence[tuple[Acquired, timedelta]]) -> list[Transition | LockLostError]:
        return self._telling(partial(locking.end_locks, records=locking.releases(locks), released=True))

    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        (outcome,) = self.record_attempts([AttemptRecord(acquired=acquired, attempt=attempt, transition=transition)])
        if isinstance(outcome, LockLostError):
            raise outcome
        return outcome

    def record_attempts(self, records: Sequence[AttemptRecord]) -> list[Transition | LockLostError]:
        return self._telling(partial(locking.end_locks, records=records))

    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        check_arguments(action=action)
        return self._telling(partial(locking.act, id=id, action=action))

    def next_due(self) -> datetime | None:
        due = self._next_due_us()
        return None if due is None else instant(due)

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        subscription = object()
        self._subscribers[subscription] = wake

        def unsubscribe() -> None:
            self._subscribers.pop(subscription, None)

        return unsubscribe

    # E-mails that are owed.

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        check_arguments(lock_timeout=lock_timeout, limit=limit)

        # A look costs no place among the writers.
        if not self._database.read(lambda tx: tx.value("mailing_due", now=self._time.now_us())):
            return []
        return self._write(partial(mailings.lease_mailings, lock_timeout=lock_timeout, limit=min(limit, _MOST_LOCKS)))

    def record_notification(
        self, notification: Notification, *, retry_in: timedelta | None, quiet_for: timedelta = timedelta(0)
    ) -> None:
        check_arguments(retry_in=retry_in, quiet_for=quiet_for)
        mailing = self._write(
            partial(mailings.settle_mailing, notification=notification, retry_in=retry_in, quiet_for=quiet_for)
        )
        if mailing is None:
            return
        # In small transactions, so that none of them holds up a delivery. The payment is written: whoever is told of a
        # fault now sends the e-mail again. What is left over goes with the next payment, or with the mailing.
        with suppress(DataAccessError):
            while self._write(partial(mailings.forget_debts, mailing=mailing)):
                pass

    # Forgetting and copying.

    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        check_arguments(finished_for=finished_for, limit=limit)
        purged = 0
        while purged < limit:
            # In small transactions, so that none of them holds up a delivery.
            batch = min(_PURGE_BATCH, limit - purged)
            found = self._write(partial(forgetting.purge, finished_for=finished_for, limit=batch))
            purged += found
            if found < batch:
                break
        return purged

    def backup(self, path: str | os.PathLike[str]) -> None:
        check_arguments(path=path)
        back_up(self._database, Path(path))

    # Opening.

    def _locate(self) -> bool:
        kind = file.lies_on_network(self._path)
        if kind is not None and not self._allow_network_fs:
            raise file.on_network(self._path, kind)
        self._is_local = kind is None
        # Once: a file that vanishes later, with its disk perhaps, must not be replaced by an empty one.
        if not self._was_located:
            file.create(self._path)
            file.warn_of_wal_reset()
            self._was_located = True
        return self._is_local

    def _prepare(self, transaction: SQLiteTransaction) -> None:
        """Follow the time line of this boot, or begin one."""
        transaction.run("end_impossible_waits", {})
        _, boot_id, offset_us, latest_us = transaction.all("store")[0]
        # Machines that share a file share no boot, and so no clock but wall time.
        present_boot = self._clock.boot_id() if self._is_local else ""
        if present_boot == boot_id:
            self._time.follow(offset_us)
            return
        offset_us = self._time.offset_of_new_boot_us(latest_us=latest_us) if present_boot else None
        self._time.follow(offset_us)
        now = self._time.now_us()
        transaction.run("begin_boot", {"boot_id": present_boot, "offset_us": offset_us, "now": now})
        # Whoever held a lock under another boot is no more.
        transaction.run("end_all_locks", {"now": now})
        transaction.run("end_all_leases", {"now": now})
        for (holder,) in transaction.all("holders"):
            remove_file(self._path, holder)
        transaction.run("remove_all_holders", {})

    def _forget_parent(self) -> None:
        self._holders.end()
        self._next_probe_us = 0
        self._subscribers.clear()

    # Everyday steps.

    def _write(self, operation: Callable[[SQLiteTransaction, int], _T]) -> _T:
        # The time is read when the write lock is held, so that it rises in the order of commits.
        return self._database.write(lambda transaction: operation(transaction, self._time.now_us()))

    def _telling(self, operation: Callable[[SQLiteTransaction, int], tuple[_T, bool]]) -> _T:
        """Write, and hint at what became due. Subscribers are called when nothing is held any more."""
        result, made_due = self._write(operation)
        if made_due:
            self.hint()
        return result

    def _store(
        self, requests: Sequence[tuple[str | None, CallbackRequest]], connection: sqlite3.Connection | None
    ) -> list[CallbackStatus]:
        given = [id for id, _ in requests if id is not None]
        if connection is not None:
            return self._store_within(connection, requests, given)
        # Before the write lock: the host's rules may take their time, and may read this store.
        stored = self._database.read(partial(storing.stored_of, ids=given)) if given else frozenset[str]()
        ask(self._accept, requests, stored=stored)

        def store(transaction: SQLiteTransaction, now: int) -> tuple[list[CallbackStatus], bool]:
            statuses = storing.store(transaction, now, requests)
            return statuses, any(status.blocked_by is None for status in statuses)

        return self._telling(store)

    def _store_within(
        self, connection: sqlite3.Connection, requests: Sequence[tuple[str | None, CallbackRequest]], given: list[str]
    ) -> list[CallbackStatus]:
        def store(transaction: SQLiteTransaction) -> list[CallbackStatus]:
            # Here, since what the application has stored in its transaction can be seen nowhere else.
            ask(self._accept, requests, stored=storing.stored_of(transaction, given))
            return storing.store(transaction, self._time.now_us(), requests)

        check_connection(connection)
        self._database.check_open()
        return run_enlisted(connection, self._path, store)

    def _list_keys(self, state: CallbackState | None, queue_id: str | None) -> Iterator[list[int]]:
        code = None if state is None else code_of(state)
        after = 0
        if queue_id:
            while keys := self._database.read(partial(reading.keys_of_queue, name=queue_id, state=code, after=after)):
                yield keys
                after = keys[-1]
            return
        read_stretch = partial(reading.keys_of_all, state=code, alone=queue_id is not None)
        while (stretch := self._database.read(partial(read_stretch, after=after))) is not None:
            yield stretch
            after += reading.LIST_BATCH

    def _next_due_us(self) -> int | None:
        self._database.open()
        self._free_locks_of_the_dead()
        due: int | None = self._database.read(lambda transaction: transaction.value("next_due"))
        return due

    def _free_locks_of_the_dead(self) -> None:
        now = self._time.now_us()
        if now < self._next_probe_us:
            return
        self._next_probe_us = now + _PROBE_INTERVAL_US
        named = self._database.read(lambda transaction: transaction.all("holders"))
        dead = self._holders.find_dead(holder for (holder,) in named)
        if not dead:
            return
        try:
            self._write(partial(upkeep.end_locks_of, dead=[one.holder for one in dead]))
        except DataAccessError:
            # Only the fast way is closed for now: their locks end by their timeout, or with the next look.
            for one in dead:
                one.let_go()
        else:
            for one in dead:
                one.bury()


def _check_path(path: object) -> Iterator[Fault]:
    if not file.is_path(path):
        yield "path", "must be the path of a file; to keep callbacks in memory use InMemoryDataAccess"


def _check_durability(durability: object) -> Iterator[Fault]:
    if durability not in tuple(_DURABILITIES):
        yield "durability", "must be 'power' or 'process'"


def _check_busy_timeout(busy_timeout: object) -> Iterator[Fault]:
    if not isinstance(busy_timeout, timedelta) or not timedelta(0) <= busy_timeout <= _LONGEST_BUSY_TIMEOUT:
        yield "busy_timeout", "must be a timedelta from 0 to 1 day"
