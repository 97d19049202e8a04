"""
How users call callbackq. Checked by mypy --strict and basedpyright, never run.

Every public name stands here once, the way a reader of the documentation would write it. What stops type-checking here
breaks somebody's build.
"""

from __future__ import annotations

import logging
import sqlite3
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, assert_type

import psycopg
from psycopg_pool import ConnectionPool

import callbackq
from callbackq import (
    Action,
    AttemptFailure,
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackNotFoundError,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    Clock,
    DataAccess,
    Dispatcher,
    FailedReason,
    FailureNotice,
    Health,
    HTTPTransport,
    InMemoryDataAccess,
    InvalidRequestError,
    LoggingObserver,
    NotAcceptedError,
    Notifier,
    Observer,
    RequestLimits,
    ResponsePolicy,
    RetryPhase,
    Signer,
    SMTPNotifier,
    SQLiteDataAccess,
    StopReport,
    TargetNotAllowedError,
    TargetPolicy,
    Transport,
)
from callbackq.codec import dumps, loads
from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.lifecycle import Effect, apply_action, settle
from callbackq.dataaccess import (
    Acquired,
    AttemptRecord,
    Durability,
    Notification,
    SupportsBackup,
    SupportsEnlist,
    SupportsHandover,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
    SupportsShards,
    Transition,
)
from callbackq.events import EventKind, ObservedEvent
from callbackq.signing import Verified, public_key_of, verify
from callbackq.stores.postgres import PostgreSQLDataAccess, migrate, migration_sql
from callbackq.stores.sharded import ShardedDataAccess
from callbackq.testing import DataAccessConformance, FakeClock, RecordingNotifier, ScriptedTransport
from callbackq.testing.history import Arrival, History, Judgement
from callbackq.transport import SupportsSubmit

# Requests, as applications build them.


def requests() -> None:
    CallbackRequest(url="https://receiver.example/hook")
    request = CallbackRequest(
        url="https://receiver.example/hook",
        method="PUT",
        post_data=CallbackData(headers={"Content-Type": "text/plain"}, data=b"paid"),
        retry_phases=[RetryPhase(retries=5, delay=timedelta(seconds=10))],
        application_id="shop",
        queue_id="order-1042",
        notification_email_address="ops@shop.example",
        on_exhausted="hold",
    )
    assert_type(request.method, Literal["GET", "POST", "PUT"])
    assert_type(request.retry_phases, tuple[RetryPhase, ...])
    assert_type(request.post_data.data, bytes | None)
    headers: Mapping[str, str] = request.post_data.headers
    print(headers, request.target.host)
    try:
        CallbackRequest(url="x")
    except InvalidRequestError as error:
        assert_type(error.errors, list[tuple[str, str]])


def statuses(status: CallbackStatus) -> None:
    assert_type(status.state, CallbackState)
    assert_type(status.success, bool)
    assert_type(status.next_attempt_at, datetime | None)
    assert_type(status.failed_reason, FailedReason | None)
    assert_type(status.blocked_by, str | None)
    for attempt in status.attempts:
        assert_type(attempt, CallbackAttempt)
        assert_type(attempt.failure, AttemptFailure | None)
        assert_type(attempt.duration, timedelta)
    for lock in status.locks:
        assert_type(lock, CallbackLock)
        assert_type(lock.ended, datetime | None)


# Stores.


def accept(request: CallbackRequest) -> None:
    RequestLimits()(request)
    if request.application_id not in {"shop", "warehouse"}:
        raise NotAcceptedError("no such application")


def stores(path: Path) -> None:
    limits = RequestLimits(max_body_bytes=64 * 1024, max_attempts=20, max_total_delay=timedelta(days=3))
    SQLiteDataAccess(path, accept=limits)
    SQLiteDataAccess(path, accept=accept)
    with SQLiteDataAccess(path, durability="process", busy_timeout=timedelta(seconds=5)) as store:
        assert_type(store, SQLiteDataAccess)
        status = store.store_callback_request(CallbackRequest(url="https://receiver.example"), id="order-1042-paid")
        assert_type(status, CallbackStatus)
        assert_type(store.store_callback_requests([status.request]), list[CallbackStatus])
        assert_type(store.request_transition(status.id, Action.REDELIVER), CallbackStatus)
        assert_type(store.list_callbacks(state=CallbackState.FAILED, queue_id="order-1042"), Iterator[CallbackStatus])
        assert_type(store.purge(finished_for=timedelta(days=30), limit=500), int)
        assert_type(store.next_due(), datetime | None)
        store.backup(path.with_suffix(".backup"))
        try:
            store.get_callback_status("unknown")
        except CallbackNotFoundError as error:
            assert_type(error.id, str)
    anywhere: list[DataAccess] = [
        SQLiteDataAccess("callbacks.db"),
        InMemoryDataAccess(),
        InMemoryDataAccess(clock=FakeClock()),
        InMemoryDataAccess(accept=limits),
    ]
    for one in anywhere:
        if isinstance(one, SupportsListing):
            one.list_callbacks()
        if isinstance(one, SupportsPurge):
            one.purge(finished_for=timedelta(days=1))
        if isinstance(one, SupportsBackup):
            one.backup(path)
        if isinstance(one, SupportsNotifications):
            assert_type(one.acquire_notifications(lock_timeout=timedelta(minutes=1), limit=1), list[Notification])


def place_order(store: SupportsEnlist[sqlite3.Connection], connection: sqlite3.Connection) -> CallbackStatus:
    """What an application asks for that stores in its own transaction, whichever store it is given."""
    request = CallbackRequest(url="https://receiver.example")
    assert_type(store.store_callback_requests([request], ids=["a"], connection=connection), list[CallbackStatus])
    return store.store_callback_request(request, id="order-1042-paid", connection=connection)


def enlisting(anywhere: DataAccess, connection: sqlite3.Connection, maybe: sqlite3.Connection | None) -> None:
    store = SQLiteDataAccess("shop.db")
    place_order(store, connection)
    store.store_callback_request(CallbackRequest(url="https://receiver.example"), connection=maybe)
    place_order(InMemoryDataAccess(), connection)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    store.hint()
    if isinstance(anywhere, SupportsEnlist):
        anywhere.hint()


def on_postgres(pool: ConnectionPool[psycopg.Connection[Any]], connection: psycopg.Connection[Any]) -> None:
    store: SupportsEnlist[psycopg.Connection[Any]] = PostgreSQLDataAccess("dbname=shop", may_migrate=False)
    store.store_callback_request(CallbackRequest(url="https://receiver.example"), connection=connection)
    with PostgreSQLDataAccess(
        pool, schema="hooks", profile="distributed", answer_timeout=timedelta(seconds=5)
    ) as other:
        assert_type(other, PostgreSQLDataAccess)
    PostgreSQLDataAccess("dbname=shop", profile="mysql")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    migrate("dbname=shop", schema="hooks")
    assert_type(migration_sql(since=1, profile="distributed"), str)


class MyDataAccess(DataAccess):
    """What a store's author writes: the required methods and nothing else."""

    durability = Durability.PROCESS

    def open(self) -> None: ...

    def close(self) -> None: ...

    def now(self) -> datetime:
        return datetime.now(UTC)

    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        return CallbackStatus(id=id or "new", request=request, queue_id=request.queue_id, sequence=1)

    def get_callback_status(self, id: str) -> CallbackStatus:
        raise CallbackNotFoundError(id)

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        return []

    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        raise callbackq.LockLostError(acquired.id, acquired.lock.token)

    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        return settle(transition, accepted_late=False, cancel_requested=False)

    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        effect = apply_action(action, id=id, state=CallbackState.FAILED, lock_is_live=False, holds_queue=True)
        assert_type(effect, Effect)
        return self.get_callback_status(id)

    def next_due(self) -> datetime | None:
        return None


def a_custom_store(acquired: Acquired, attempt: CallbackAttempt, transition: Transition) -> None:
    store = MyDataAccess()
    record = AttemptRecord(acquired=acquired, attempt=attempt, transition=transition)
    assert_type(store.record_attempts([record]), list[Transition | callbackq.LockLostError])
    handing_over: SupportsHandover = callbackq.SQLiteDataAccess("callbacks.db")
    assert_type(
        handing_over.record_and_acquire([record], "worker", lock_timeout=timedelta(seconds=30), limit=10),
        tuple[list[Transition | callbackq.LockLostError], list[Acquired]],
    )
    unsubscribe: Callable[[], None] = store.subscribe(lambda: None)
    unsubscribe()
    several = ShardedDataAccess([store, callbackq.InMemoryDataAccess()])
    with_shards: SupportsShards = several
    assert_type(with_shards.shard_of(acquired), int)
    with several, Dispatcher(several):
        pass
    with store, Dispatcher(store):
        pass


class TestMyDataAccess(DataAccessConformance):
    def make_data_access(self, clock: FakeClock) -> DataAccess:
        return MyDataAccess()

    def reopen(self, data_access: DataAccess, clock: FakeClock) -> DataAccess:
        return MyDataAccess()


# The dispatcher and what it is given.


class MyObserver:
    def observe(self, event: ObservedEvent) -> None:
        if event.kind is EventKind.FAILED:
            assert_type(event.callback_id, str | None)
            assert_type(event.duration, timedelta | None)


class MyNotifier:
    def notify(self, notice: FailureNotice) -> None:
        assert_type(notice.callbacks, tuple[CallbackStatus, ...])
        assert_type(notice.count, int)
        print(notice.email_address, notice.queue_id, notice.unlisted, notice.key)


class MyTransport:
    def __init__(self) -> None:
        self.deadline = timedelta(seconds=5)

    def send(self, delivery: Delivery) -> Outcome:
        if delivery.attempt > 3:
            return NotSent(reason=NotSentReason.STOPPED)
        return Answer(
            status_code=200,
            response=CallbackData(data=b"ok"),
            time=datetime.now(UTC),
            duration=timedelta(milliseconds=5),
        )

    def close(self) -> None: ...


class MySubmittingTransport(MyTransport):
    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        done(self.send(delivery))

    def interrupt(self, deliveries: Iterable[Delivery]) -> None: ...


class MyClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return 0.0

    def boot_id(self) -> str:
        return ""


def dispatchers(store: DataAccess) -> None:
    Dispatcher(store).run()
    observer: Observer = MyObserver()
    notifier: Notifier = MyNotifier()
    transport: Transport = MySubmittingTransport()
    able: SupportsSubmit = MySubmittingTransport()
    clock: Clock = MyClock()
    dispatcher = Dispatcher(
        store,
        machine_name="web-3",
        concurrency=64,
        host_concurrency=8,
        lock_timeout=timedelta(seconds=30),
        poll_interval=timedelta(milliseconds=100),
        max_abandoned=3,
        retry_jitter=0.1,
        transport=transport,
        notifier=notifier,
        observer=observer,
        response_policy=ResponsePolicy(final_statuses={400, 410}, honour_retry_after=False),
        clock=clock,
        random=lambda: 0.5,
    )
    assert_type(dispatcher.run_until_idle(timeout=5), bool)
    assert_type(dispatcher.run_until_idle(timeout=timedelta(minutes=1)), bool)
    dispatcher.start()
    assert_type(dispatcher.health(), Health)
    assert_type(dispatcher.stop(timeout=2.5), StopReport)
    with dispatcher as running:
        assert_type(running, Dispatcher)
        assert_type(running.health().last_poll_age, timedelta | None)
    print(able, LoggingObserver(logging.getLogger("mine")))


# Sending.


def transports() -> None:
    policy = TargetPolicy(
        allow=["10.0.0.0/8", ".corp.example"],
        deny=["10.0.0.1"],
        ports=[443, range(8000, 9000)],
        https_only=True,
        resolver=lambda host, port: ["192.0.2.1"],
    )
    assert_type(policy.resolve("https://receiver.example"), list[str])
    try:
        policy.check_url("https://receiver.example")
    except TargetNotAllowedError as error:
        assert_type(error.rule, str)
        assert_type(error.address, str | None)
    HTTPTransport()
    HTTPTransport(
        target_policy=policy,
        deadline=timedelta(seconds=10),
        connect_timeout=timedelta(seconds=3),
        signer=Signer([b"x" * 32, "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="]),
        response_limit=0,
        order_headers="hashed",
        queue_key=b"k" * 32,
        user_agent="shop/1.0",
        ssl_context=ssl.create_default_context(),
    ).close()


def a_signer_for_each(keys: Mapping[str, Sequence[str]]) -> None:
    def signer_of(request: CallbackRequest) -> Signer | None:
        return Signer(keys[request.application_id]) if request.application_id in keys else None

    signers = {"shop": Signer(keys["shop"])}
    HTTPTransport(signer=signer_of).close()
    HTTPTransport(signer=lambda request: signers[request.application_id]).close()
    HTTPTransport(signer=lambda request: signers.get(request.application_id)).close()
    HTTPTransport(signer=lambda: signers["shop"]).close()  # type: ignore[arg-type, misc] # pyright: ignore
    HTTPTransport(signer=lambda request: request.application_id).close()  # type: ignore[arg-type, return-value] # pyright: ignore


def notifiers() -> None:
    SMTPNotifier(
        "mail.shop.example",
        port=587,
        sender="callbacks@shop.example",
        username="callbacks",
        password="secret",
        security="starttls",
        timeout=timedelta(seconds=20),
        interval=timedelta(hours=6),
        allowed_domains=["shop.example"],
    )


# Receiving, reading, testing.


def receivers(headers: Mapping[str, str], body: bytes) -> None:
    verified = verify(headers, body, [b"new" * 8, b"old" * 8], now=datetime.now(UTC), tolerance=timedelta(minutes=1))
    assert_type(verified, Verified)
    assert_type(verified.id, str)
    assert_type(public_key_of("whsk_…"), str)
    try:
        verify(headers, body, ["whsec_…", "whpk_…"], now=datetime.now(UTC))
    except callbackq.SignatureError as error:
        print(error)


def documents(status: CallbackStatus) -> None:
    assert_type(dumps(status, seed=True), bytes)
    assert_type(loads(b"{}", CallbackRequest), CallbackRequest)
    assert_type(loads("{}", CallbackStatus, limit_bytes=1000), CallbackStatus)


def doubles(statuses: Sequence[CallbackStatus], arrivals: Sequence[Arrival]) -> None:
    clock = FakeClock()
    clock.advance(5)
    clock.advance(timedelta(hours=1))
    transport = ScriptedTransport([200, AttemptFailure.TIMEOUT, lambda delivery: 200 + delivery.attempt], default=500)
    assert_type(transport.deliveries, list[Delivery])
    Dispatcher(
        InMemoryDataAccess(clock=clock), transport=transport, notifier=RecordingNotifier(fail=1), clock=clock
    ).run_until_idle()
    judgement = History(arrivals, statuses, acknowledged=[status.id for status in statuses]).judge()
    assert_type(judgement, Judgement)
    assert_type(judgement.ok, bool)
