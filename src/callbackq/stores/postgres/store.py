"""`PostgreSQLDataAccess`: the methods of a store over transactions. Arguments in, operations, results out."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
from psycopg_pool import ConnectionPool

from callbackq.clock import Clock
from callbackq.core.lifecycle import Action, Transition
from callbackq.core.models import CallbackAttempt, CallbackRequest, CallbackState, CallbackStatus
from callbackq.core.validation import Fault, check_bool, refuse
from callbackq.dataaccess import (
    Acquired,
    AttemptRecord,
    DataAccess,
    Durability,
    Notification,
    SupportsEnlist,
    SupportsHandover,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
    check_arguments,
    ids_for,
)
from callbackq.errors import DataAccessError, LockLostError, TransientDataAccessError
from callbackq.settings import check_collaborator
from callbackq.stores._door import ORDINARY_LIMITS, ask, check_accept
from callbackq.stores._ids import any_id, rising_id
from callbackq.stores.postgres import claiming, listing, storing
from callbackq.stores.postgres import schema as schemas
from callbackq.stores.postgres.connections import (
    Connections,
    OwnConnections,
    PoolConnections,
    Waits,
    conninfo_faults,
)
from callbackq.stores.postgres.database import Database
from callbackq.stores.postgres.listener import Hints
from callbackq.stores.postgres.transaction import PostgreSQLTransaction, Profile
from callbackq.stores.sql import forgetting, locking, mailings, reading
from callbackq.stores.sql.instants import instant

__all__ = ["PostgreSQLDataAccess"]

_MOST_LOCKS: Final = 10_000
_PURGE_BATCH: Final = 500
_LONGEST_WAIT: Final = timedelta(hours=1)

# As many as distributed.sql walks over.
_SHARDS: Final = 16
_SPREAD: Final = 4

_T = TypeVar("_T")
_Claim = Callable[[PostgreSQLTransaction, int], list[locking.Claim]]


class PostgreSQLDataAccess(
    DataAccess,
    SupportsNotifications,
    SupportsListing,
    SupportsPurge,
    SupportsEnlist[psycopg.Connection[Any]],
    SupportsHandover,
):
    """
    Keep callbacks in a PostgreSQL database, for any number of threads, processes and machines.

    * Numbers in a queue follow the order of commits. `store_callback_requests` stores all or none.
    * Time is the server's. A dispatcher's machine may have any time it likes.
    * Nothing is held open while a callback is sent, and nothing is kept in a session: it works behind a pooler that
      gives each transaction another one (pgbouncer's transaction mode).
    * Others hear of what becomes due by LISTEN and NOTIFY within milliseconds, or at their next poll.
    * Whoever keeps a transaction open that stored into a queue keeps that queue closed for others to join, and the next
      callback of it from being sent; no other queue waits.

    Args:
        where: the database as psycopg takes it (``postgresql://…`` or ``host=… dbname=…``), or a pool of connections,
            which stays the host's to close.
        schema: where the tables are; created by the first `open`.
        profile: ``"postgres"``, or ``"distributed"`` for engines that speak PostgreSQL's language but are distributed:
            without SKIP LOCKED and NOTIFY, with SERIALIZABLE transactions that are repeated.
        connections: how many the store holds at most, that of the listener included; with a pool of the host's, it
            holds that of the listener only. Calls that store, and that act on a callback, may have to wait for the
            application's transactions, and never take the last one; with fewer than three, deliveries wait with them.
            With a single one nobody listens, and polling finds what others store.
        patience: how long a call waits for a connection that other calls have, or for others' transactions, before it
            raises `TransientDataAccessError`. For a server that can't be reached it doesn't wait.
        answer_timeout: for how long, beyond *patience*, the server may take a statement and say nothing, before a call
            raises `DataAccessError` and its connection is closed: it is stopped, say, or its disk hangs. Connections
            of a pool of the host's have no such limit. Connecting may take so long, too, from 2 to 10 seconds, where
            the text has no ``connect_timeout``.
        may_migrate: whether `open` may create and change the tables. Otherwise that is done with `migrate` or by hand.
        durability: what a commit survives as the server is set up; it can't be asked.
        clock: for tests: where time comes from instead of the server.
        accept: called with each request that is about to be stored, before anything is written: it refuses by raising.
            A `RequestLimits`, or rules of your own. Ids that are stored already are not asked about.

    Raises:
        InvalidRequestError: with every argument that is of another type or impossible.
    """

    def __init__(
        self,
        where: str | ConnectionPool[Any],
        *,
        schema: str = "callbackq",
        profile: Profile = "postgres",
        connections: int = 3,
        patience: timedelta = timedelta(seconds=10),
        answer_timeout: timedelta = timedelta(seconds=10),
        may_migrate: bool = True,
        durability: Durability = Durability.POWER,
        clock: Clock | None = None,
        accept: Callable[[CallbackRequest], None] = ORDINARY_LIMITS,
    ) -> None:
        refuse(
            [
                *_faults(where, schema, profile, connections, may_migrate, durability, clock),
                *_time_faults(patience=patience, answer_timeout=answer_timeout),
                *check_accept(accept),
            ]
        )
        self._accept = accept
        self.durability = durability
        self._schema = schema
        self._is_distributed = profile == "distributed"
        listens = not self._is_distributed and (connections > 1 or not isinstance(where, str))
        self._database = Database(
            connect=partial(
                _connections,
                where,
                most=connections - listens,
                waits=Waits(patience.total_seconds(), answer_timeout.total_seconds()),
            ),
            schema=schema,
            profile=profile,
            patience=patience,
            clock=clock,
            prepare=partial(schemas.prepare, schema=schema, profile=profile, may_migrate=may_migrate),
        )
        self._channel = _channel(schema)
        self._mark = claiming.Mark()
        self._unsure: list[locking.Claim] = []
        self._hints = Hints(self._database.connect, channel=self._channel if listens else None)
        self._found_enough = False

    def __repr__(self) -> str:
        return f"<PostgreSQLDataAccess, schema {self._schema}>"

    def open(self) -> None:
        self._database.open()

    def close(self) -> None:
        self._hints.stop_listening()
        with suppress(DataAccessError):
            self._give_back_unsure()
        self._database.close()

    def now(self) -> datetime:
        return instant(self._database.now_us())

    # Storing and looking.

    def store_callback_request(
        self, request: CallbackRequest, *, id: str | None = None, connection: psycopg.Connection[Any] | None = None
    ) -> CallbackStatus:
        check_arguments(request=request, id=id)
        return self._store([(id, request)], connection)[0]

    def store_callback_requests(
        self,
        requests: Sequence[CallbackRequest],
        *,
        ids: Sequence[str | None] | None = None,
        connection: psycopg.Connection[Any] | None = None,
    ) -> list[CallbackStatus]:
        return self._store(list(zip(ids_for(requests, ids), requests, strict=True)), connection)

    def hint(self) -> None:
        # Others have heard by the commit itself.
        self._hints.tell()

    def _store(
        self, requests: Sequence[tuple[str | None, CallbackRequest]], connection: psycopg.Connection[Any] | None
    ) -> list[CallbackStatus]:
        within = None if connection is None else self._database.within(connection)
        read: storing.Run = within or self._database.read
        write: storing.Run = (
            self._database.at_once_within_limits
            if self._is_distributed
            else partial(self._database.at_once, writes=True)
        )
        given = [id for id, _ in requests if id is not None]
        # Where the application's transaction is, since what it has stored can be seen nowhere else.
        ask(self._accept, requests, stored=storing.stored_of(read, given))
        with self._database.patiently() if connection is None else nullcontext():
            statuses = storing.store(
                within or write,
                storing.drawn(requests, draw=self._draw_id),
                read=read,
                now=self._database.given_now_us(),
                patience_ms=self._database.patience_ms,
                channel=self._channel,
                shard_of=self._shard_of,
            )
        if connection is None and any(status.blocked_by is None for status in statuses):
            self.hint()
        return statuses

    def get_callback_status(self, id: str) -> CallbackStatus:
        return self._database.read(lambda tx: reading.status_of(tx, reading.find(tx, id).callback))

    def list_callbacks(
        self, *, state: CallbackState | None = None, queue_id: str | None = None, page_size: int = 100
    ) -> Iterator[CallbackStatus]:
        # Here, not with the first page: whoever calls wrongly should be told where.
        check_arguments(state=state, queue_id=queue_id, page_size=page_size)
        return listing.pages(self._database, state=state, queue_id=queue_id, page_size=page_size)

    # Locks.

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        self._give_back_unsure()
        limit = min(limit, _MOST_LOCKS)
        claim = partial(claiming.claim, machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        claims = self._claim_peeked(claim, limit) if self._is_distributed else self._claim_seen(claim, limit)
        return [locking.acquired(one) for one in claims]

    def record_and_acquire(
        self, records: Sequence[AttemptRecord], machine_name: str, *, lock_timeout: timedelta, limit: int
    ) -> tuple[list[Transition | LockLostError], list[Acquired]]:
        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        if self._is_distributed or any(record.transition.notify for record in records):
            # In that profile claims meet each other and are tried again, which results need not be. And a claim that
            # takes rows after those of what is owed to an address could stand across another recorder's way.
            recorded = self.record_attempts(records)
            with suppress(DataAccessError):
                return recorded, self.acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)
            return recorded, []
        self._give_back_unsure()
        if self._mark.wants_full_search(time.monotonic()):
            self._look()  # not in the transaction, where others would wait for a search from the beginning
        limit = min(limit, _MOST_LOCKS)
        claim = partial(claiming.claim, machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        results: list[Transition | LockLostError] = []
        made_due = False

        def record_and_claim(transaction: PostgreSQLTransaction, now: int) -> list[locking.Claim]:
            nonlocal results, made_due
            results, made_due = locking.end_locks(transaction, now, records)
            return self._search(transaction, now, claim)

        claims = self._claim(record_and_claim)
        self._found_enough = len(claims) == limit
        # With fewer than it asked for, it has all that is due, and there is nothing to hint at.
        if made_due and self._found_enough:
            self.hint()
        return results, [locking.acquired(one) for one in claims]

    def _claim_seen(self, claim: _Claim, limit: int) -> list[locking.Claim]:
        # To look first costs less than a transaction that finds nothing; where the last one found all it could take,
        # there is more.
        may_skip_it = self._found_enough and not self._mark.wants_full_search(time.monotonic())
        if not may_skip_it and not self._is_due():
            return []
        claims = self._claim(partial(self._search, claim=claim))
        self._found_enough = len(claims) == limit
        return claims

    def _search(self, transaction: PostgreSQLTransaction, now: int, claim: _Claim) -> list[locking.Claim]:
        """Claim from where the mark is."""
        transaction.let(mark=self._mark.begin(now))
        return claim(transaction, now)

    def _claim_peeked(self, claim: _Claim, limit: int) -> list[locking.Claim]:
        due, now, mark = self._look()
        if due is None or due > now:
            return []

        def peek(most: int) -> list[str]:
            rows = self._database.at_once(lambda tx: tx.all("peek", now=now, mark=mark, limit=most))
            return [id for (id,) in rows]

        candidates = peek(limit)
        if claims := self._claim(claim, candidates=candidates):
            return claims
        # Others were faster. Not again those that everybody sees first.
        candidates = peek(_SPREAD * limit)
        return self._claim(claim, candidates=random.sample(candidates, min(limit, len(candidates))))

    def _claim(self, claim: _Claim, **constants: object) -> list[locking.Claim]:
        claims: list[locking.Claim] = []

        def noting(transaction: PostgreSQLTransaction, now: int) -> list[locking.Claim]:
            claims[:] = claim(transaction, now)
            return claims

        try:
            return self._database.write(noting, **constants)
        except TransientDataAccessError:
            raise
        except DataAccessError:
            self._unsure += claims
            raise

    def _give_back_unsure(self) -> None:
        """
        End locks that may have been committed when the line broke, and that nobody has: their queues would stand still
        until they time out. Not handed out: whoever asks now reckons with a lock that begins now.
        """
        unsure, self._unsure = self._unsure, []
        if unsure:
            try:
                self._database.write(partial(claiming.give_back, claims=unsure))
            except DataAccessError:
                self._unsure += unsure
                raise

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

        with self._database.patiently():
            return self._telling(partial(locking.act, id=id, action=action))

    def next_due(self) -> datetime | None:
        due, _, _ = self._look()
        return None if due is None else instant(due)

    # E-mails that are owed.

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        check_arguments(lock_timeout=lock_timeout, limit=limit)
        now = self._database.now_us()
        if not self._database.at_once(lambda tx: tx.value("mailing_due", now=now)):
            return []
        return self._database.write(
            partial(mailings.lease_mailings, lock_timeout=lock_timeout, limit=min(limit, _MOST_LOCKS))
        )

    def record_notification(
        self, notification: Notification, *, retry_in: timedelta | None, quiet_for: timedelta = timedelta(0)
    ) -> None:
        check_arguments(retry_in=retry_in, quiet_for=quiet_for)
        mailing = self._database.write(
            partial(mailings.settle_mailing, notification=notification, retry_in=retry_in, quiet_for=quiet_for)
        )
        if mailing is None:
            return
        # The payment is written: whoever is told of a fault now sends the e-mail again. What is left over goes with the
        # next payment, or with the mailing.
        with suppress(DataAccessError):
            while self._database.write(partial(mailings.forget_debts, mailing=mailing)):
                pass

    # Forgetting.

    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        check_arguments(finished_for=finished_for, limit=limit)
        purged = 0
        while purged < limit:
            # In small transactions, so that none of them holds up a delivery.
            batch = min(_PURGE_BATCH, limit - purged)
            found = self._database.write(partial(forgetting.purge, finished_for=finished_for, limit=batch))
            purged += found
            if found < batch:
                break
        return purged

    # Hints.

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        return self._hints.subscribe(wake)

    # Everyday steps.

    def _telling(self, operation: Callable[[PostgreSQLTransaction, int], tuple[_T, bool]]) -> _T:
        """Write, and hint at what became due: to others by the commit, to subscribers when nothing is held any more."""

        def write(transaction: PostgreSQLTransaction, now: int) -> tuple[_T, bool]:
            result, made_due = operation(transaction, now)
            if made_due:
                transaction.all("notify", channel=self._channel)
            return result, made_due

        # A dispatcher that stops acquires nothing more.
        with suppress(DataAccessError):
            self._give_back_unsure()
        result, made_due = self._database.write(write)
        if made_due:
            self.hint()
        return result

    def _is_due(self) -> bool:
        due, now, _ = self._look()
        return due is not None and due <= now

    def _look(self) -> tuple[int | None, int, int]:
        """Read when the earliest head is due, and say when that was and from where it was searched."""

        def look(transaction: PostgreSQLTransaction) -> tuple[int | None, int, int]:
            given = self._database.given_now_us()
            now: int = transaction.value("now") if given is None else given
            began = time.monotonic()
            begin = 0 if self._mark.wants_full_search(began) else self._mark.begin(now)
            due: int | None = transaction.value("next_due", mark=begin)
            if not begin:
                self._mark.found(due, now, began=began, ended=time.monotonic())
            return due, now, begin

        return self._database.at_once(look)

    def _draw_id(self) -> str:
        return any_id() if self._is_distributed else rising_id(time.time_ns() // 1000)

    def _shard_of(self, name: str) -> int:
        return hashlib.sha256(name.encode()).digest()[0] % _SHARDS if self._is_distributed else 0


def _connections(where: str | ConnectionPool[Any], *, most: int, waits: Waits) -> Connections:
    if isinstance(where, str):
        return OwnConnections(where, most=most, waits=waits)
    return PoolConnections(where, waits=waits)


def _channel(schema: str) -> str:
    # An identifier of PostgreSQL has at most 63 bytes.
    return f"callbackq_{hashlib.sha256(schema.encode()).hexdigest()[:16]}"


def _faults(
    where: object,
    schema: object,
    profile: object,
    connections: object,
    may_migrate: object,
    durability: object,
    clock: object,
) -> Iterator[Fault]:
    if isinstance(where, str):
        yield from conninfo_faults("where", where)
    elif not isinstance(where, ConnectionPool):
        yield "where", "must be a connection string or a psycopg_pool.ConnectionPool"
    yield from schemas.schema_faults(schema)
    yield from schemas.profile_faults(profile)
    if not isinstance(connections, int) or isinstance(connections, bool) or connections < 1:
        yield "connections", "must be a whole number, at least 1"
    yield from (("may_migrate", reason) for _, reason in check_bool(may_migrate))
    if not isinstance(durability, Durability):
        yield "durability", "must be a Durability"
    if clock is not None:
        yield from check_collaborator("clock", clock, "now", "monotonic", "boot_id")


def _time_faults(**given: object) -> Iterator[Fault]:
    for name, wait in given.items():
        if not isinstance(wait, timedelta) or not timedelta(0) < wait <= _LONGEST_WAIT:
            yield name, f"must be a timedelta, longer than nothing and at most {_LONGEST_WAIT}"
