"""What several do to the same queues of PostgreSQL at the same time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from attrs import evolve
from psycopg_pool import ConnectionPool

from callbackq import Dispatcher
from callbackq.core.lifecycle import Action
from callbackq.core.models import CallbackState
from callbackq.dataaccess import Acquired, AttemptRecord
from callbackq.errors import TransientDataAccessError
from callbackq.events import EventKind
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.stores.postgres import database as databases
from callbackq.stores.postgres import transaction as transactions
from callbackq.stores.postgres.claiming import Mark
from callbackq.stores.postgres.transaction import PostgreSQLTransaction, Profile
from callbackq.stores.sql.rows import Key, Row
from callbackq.testing import FakeClock, RecordingNotifier, ScriptedTransport
from callbackq.testing.conformance.base import DELIVERED, EXHAUSTED, LOCK_TIMEOUT, a_request, an_attempt
from callbackq.testing.conformance.concurrency import race
from support.dispatching import Witness
from support.postgres import PostgreSQL, until
from support.processes import LIMIT


@pytest.fixture
def conninfo(postgres: PostgreSQL, migrated_database: str) -> str:
    return postgres.conninfo(migrated_database)


@pytest.fixture
def store(conninfo: str) -> Iterator[PostgreSQLDataAccess]:
    with PostgreSQLDataAccess(conninfo) as store:
        yield store


@contextmanager
def transaction(conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """One of the application's, rolled back unless it commits."""
    connection = psycopg.connect(conninfo)
    try:
        yield connection
    finally:
        connection.close()


WAITING_FOR_LOCKS = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def acquire(store: PostgreSQLDataAccess, limit: int = 100) -> list[Acquired]:
    return store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=limit)


def succeed(store: PostgreSQLDataAccess, acquired: list[Acquired]) -> None:
    store.record_attempts(
        [AttemptRecord(acquired=one, attempt=an_attempt(200), transition=DELIVERED) for one in acquired]
    )


# A transaction that stored, and stays open.


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
def test_an_open_transaction_holds_up_no_other_queue(conninfo: str, profile: Profile) -> None:
    with PostgreSQLDataAccess(conninfo, profile=profile) as store:
        _check_that_no_other_queue_is_held_up(store, conninfo)


def _check_that_no_other_queue_is_held_up(store: PostgreSQLDataAccess, conninfo: str) -> None:
    for queue in ("held", "other"):
        store.store_callback_requests([a_request(queue_id=queue)] * 2, ids=[f"{queue}-1", f"{queue}-2"])
    with transaction(conninfo) as connection:
        store.store_callback_request(a_request(queue_id="held"), id="held-3", connection=connection)

        succeed(store, acquire(store))  # in one batch, with that of the held queue
        assert store.get_callback_status("held-1").state is CallbackState.SUCCEEDED
        assert [one.id for one in acquire(store)] == ["other-2"]
        store.store_callback_request(a_request(queue_id="other"))
        store.store_callback_request(a_request())

        connection.commit()

    found: list[str] = []
    until(lambda: found.extend(one.id for one in acquire(store)) or "held-2" in found, "the held queue to go on")
    assert found.count("held-2") == 1
    assert "held-3" not in found


@pytest.mark.parametrize("profile", ["distributed"])
def test_without_skip_locked_the_waits_for_held_queues_do_not_add_up(
    conninfo: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[bool] = []
    wait_a_moment = PostgreSQLTransaction._wait_a_moment

    def noting(self: PostgreSQLTransaction, queues: set[Key]) -> bool:
        waits.append(wait_a_moment(self, queues))
        return waits[-1]

    monkeypatch.setattr(PostgreSQLTransaction, "_wait_a_moment", noting)
    queues = [f"queue {number}" for number in range(20)]
    with PostgreSQLDataAccess(conninfo, profile=profile) as store, transaction(conninfo) as connection:
        for queue in queues:
            store.store_callback_requests([a_request(queue_id=queue)] * 2)
        acquired = acquire(store)
        for queue in queues[1:]:
            store.store_callback_request(a_request(queue_id=queue), connection=connection)
        waits.clear()
        succeed(store, acquired)
        assert waits.count(False) <= 6, "all together, and then five of them"
        connection.commit()
        found: set[str] = set()
        until(lambda: found.update(one.queue_id for one in acquire(store)) or found == set(queues), "all queues")


def test_claims_never_wait_for_a_held_queue_and_try_it_ever_more_seldom(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    rests: list[int] = []
    with PostgreSQLDataAccess(conninfo, clock=clock) as store, transaction(conninfo) as connection:
        store.store_callback_request(a_request(queue_id="queue"))
        acquired = acquire(store)
        store.store_callback_request(a_request(queue_id="queue"), id="next", connection=connection)
        succeed(store, acquired)

        # From here on it would wait for all of the test's time.
        monkeypatch.setattr(transactions, "_MOMENT_MS", 3_600_000)
        for _ in range(8):
            due = store.next_due()
            assert due is not None
            rest = due - store.now()
            rests.append(rest // timedelta(milliseconds=1))
            clock.advance(rest)
            assert acquire(store) == []
        connection.commit()
        clock.advance(timedelta(seconds=2))

        assert [one.id for one in acquire(store)] == ["next"]
    assert rests == [100, 100, 200, 400, 800, 1600, 2000, 2000]


def test_waiting_a_moment_for_one_queue_leaves_the_transaction_all_its_patience(
    store: PostgreSQLDataAccess, conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "_MOMENT_MS", 9_000)
    store.store_callback_request(a_request(queue_id="queue"))

    def operation(transaction: PostgreSQLTransaction, _: int) -> tuple[set[Key], Any]:
        locked = transaction.lock_queues({"queue"})
        return locked, transaction._connection.execute("SHOW lock_timeout").fetchone()

    def let_go_when_awaited() -> None:
        until(lambda: is_awaited(conninfo), "somebody to wait")
        connection.rollback()

    with transaction(conninfo) as connection:
        connection.execute("SELECT FROM callbackq.queues FOR UPDATE")
        letting_go = threading.Thread(target=let_go_when_awaited)
        letting_go.start()
        result = store._database.write(operation)
        letting_go.join(LIMIT)

    assert result == ({"queue"}, ("10s",))


def is_awaited(conninfo: str) -> bool:
    with psycopg.connect(conninfo) as connection:
        return bool(connection.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall())


@pytest.mark.parametrize("kind", ["its own", "a pool's"])
def test_calls_that_wait_for_a_held_queue_leave_a_connection_to_deliveries(conninfo: str, kind: str) -> None:
    with ExitStack() as stack:
        if kind == "its own":
            store = stack.enter_context(PostgreSQLDataAccess(conninfo))
        else:
            pool = stack.enter_context(ConnectionPool(conninfo, min_size=1, max_size=2, open=True))
            store = stack.enter_context(PostgreSQLDataAccess(pool))
        store.store_callback_requests([a_request(queue_id="other")] * 2, ids=["other-1", "other-2"])
        store.store_callback_request(a_request(queue_id="held"), id="held-1")
        connection = stack.enter_context(transaction(conninfo))
        store.store_callback_request(a_request(queue_id="held"), connection=connection)
        threads = [
            threading.Thread(target=store.store_callback_request, args=(a_request(queue_id="held"),)),
            threading.Thread(target=store.request_transition, args=("held-1", Action.CANCEL)),
        ]
        for thread in threads:
            stack.callback(thread.join, LIMIT)
        stack.callback(connection.rollback)
        for thread in threads:
            thread.start()
        with psycopg.connect(conninfo, autocommit=True) as observer:
            until(lambda: observer.execute(WAITING_FOR_LOCKS).fetchall(), "one of them to wait")

        found = acquire(store)
        succeed(store, [one for one in found if one.id == "other-1"])

        assert store.get_callback_status("other-1").success
        assert all(thread.is_alive() for thread in threads)


def test_the_next_goes_also_when_the_transaction_is_rolled_back(store: PostgreSQLDataAccess, conninfo: str) -> None:
    store.store_callback_requests([a_request(queue_id="queue")] * 2, ids=["first", "second"])
    with transaction(conninfo) as connection:
        store.store_callback_request(a_request(queue_id="queue"), id="never", connection=connection)
        succeed(store, acquire(store))
        assert acquire(store) == []

    found: list[str] = []
    until(lambda: found.extend(one.id for one in acquire(store)) or found, "the queue to go on")
    assert found == ["second"]


def test_a_callback_that_cannot_be_named_leaves_its_queue_only_while_nobody_joins(
    store: PostgreSQLDataAccess, conninfo: str
) -> None:
    store.store_callback_request(a_request(queue_id="queue"), id="bad")
    with psycopg.connect(conninfo) as connection:
        connection.execute("UPDATE callbackq.callbacks SET callback = 'no id'")
        connection.execute("UPDATE callbackq.queues SET head = 'no id'")
    with transaction(conninfo) as connection:
        store.store_callback_request(a_request(queue_id="queue"), id="behind", connection=connection)
        assert acquire(store) == []
        connection.commit()

    found: list[str] = []
    until(lambda: found.extend(one.id for one in acquire(store)) or found, "the queue to go on")
    assert found == ["behind"]


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
def test_whoever_joins_a_held_queue_is_told_after_all_patience(conninfo: str, profile: Profile) -> None:
    with (
        PostgreSQLDataAccess(conninfo, profile=profile) as store,
        PostgreSQLDataAccess(conninfo, profile=profile, patience=timedelta(milliseconds=50)) as impatient,
        transaction(conninfo) as connection,
    ):
        store.store_callback_request(a_request(queue_id="queue"), connection=connection)

        with pytest.raises(TransientDataAccessError, match="keep transactions that store callbacks short"):
            impatient.store_callback_request(a_request(queue_id="queue"), id="a")
        connection.commit()

        assert impatient.store_callback_request(a_request(queue_id="queue"), id="a").sequence == 2


@pytest.mark.parametrize("is_enlisted", [False, True])
@pytest.mark.parametrize("is_there", [False, True])
def test_patience_is_for_all_queues_of_a_batch_together(conninfo: str, is_there: bool, is_enlisted: bool) -> None:
    patience = timedelta(seconds=0.6)
    queues = [f"queue {number}" for number in range(6)]
    with PostgreSQLDataAccess(conninfo, patience=patience) as store, ExitStack() as held:
        if is_there:
            store.store_callback_requests([a_request(queue_id=queue) for queue in queues])
        holders = [held.enter_context(transaction(conninfo)) for _ in queues]
        for queue, holder in zip(queues, holders, strict=True):
            store.store_callback_request(a_request(queue_id=queue), connection=holder)
        done = threading.Event()

        def let_go_one_after_the_other() -> None:
            for holder in holders:
                if done.wait(0.4):
                    return
                holder.rollback()

        letting_go = threading.Thread(target=let_go_one_after_the_other)
        began = time.monotonic()
        letting_go.start()
        own = held.enter_context(transaction(conninfo)) if is_enlisted else None
        with pytest.raises(TransientDataAccessError, match="locked by another transaction"):
            store.store_callback_requests([a_request(queue_id=queue) for queue in queues], connection=own)
        waited = time.monotonic() - began
        done.set()
        letting_go.join(LIMIT)

        assert 0.5 < waited < 1.5, "not for each of them"
        if own is not None:
            assert own.execute("SHOW lock_timeout").fetchone() == ("0",)


# Storing again what is there.


@contextmanager
def between(
    monkeypatch: pytest.MonkeyPatch, statement: str, meanwhile: Callable[[], object], *, nth: int = 1
) -> Iterator[None]:
    """Let something happen once, after this statement of whoever executes it for the *nth* time."""
    original = PostgreSQLTransaction.all
    to_do: list[Callable[[], object]] = [meanwhile, *[lambda: None] * (nth - 1)]

    def with_event(transaction: PostgreSQLTransaction, name: str, /, **values: object) -> list[Row]:
        rows = original(transaction, name, **values)
        if name == statement and to_do:
            to_do.pop()()
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(PostgreSQLTransaction, "all", with_event)
        yield
    assert not to_do, "it never happened"


@pytest.mark.parametrize("is_enlisted", [False, True])
def test_what_is_purged_while_it_is_stored_again_is_either_there_or_new(
    store: PostgreSQLDataAccess, conninfo: str, monkeypatch: pytest.MonkeyPatch, is_enlisted: bool
) -> None:
    store.store_callback_request(a_request(), id="a")
    succeed(store, acquire(store))

    with PostgreSQLDataAccess(conninfo) as beside, transaction(conninfo) as connection:
        # The first time it only says whether the host's rules are to be asked.
        with between(monkeypatch, "taken_ids", lambda: beside.purge(finished_for=timedelta(0)), nth=2):
            status = store.store_callback_request(a_request(), id="a", connection=connection if is_enlisted else None)
        connection.commit()

    assert status.state is (CallbackState.WAITING if is_enlisted else CallbackState.SUCCEEDED)
    assert [one.id for one in store.list_callbacks()] == (["a"] if is_enlisted else [])


def test_what_ends_while_it_is_stored_again_is_told_as_of_one_moment(
    store: PostgreSQLDataAccess, conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.store_callback_request(a_request(), id="a")
    acquired = acquire(store)

    with (
        PostgreSQLDataAccess(conninfo) as beside,
        between(monkeypatch, "status", lambda: succeed(beside, acquired)),
    ):
        status = store.store_callback_request(a_request(), id="a")

    assert (status.state, status.attempts) == (CallbackState.LOCKED, ())


# A client that freezes.


def test_a_client_that_freezes_in_the_middle_of_a_claim_keeps_nothing_from_others(
    store: PostgreSQLDataAccess, conninfo: str
) -> None:
    store.store_callback_request(a_request(), id="a")
    goes_on = threading.Event()
    found: list[list[str]] = []

    def claim(transaction: PostgreSQLTransaction, now: int) -> list[str]:
        rows = list(transaction.all("due_heads", now=now, mark=0, limit=1))
        assert goes_on.wait(LIMIT)
        transaction.all("next_due", mark=0)
        found.append([row[0] for row in rows])
        return found[-1]

    with PostgreSQLDataAccess(conninfo, patience=timedelta(milliseconds=50)) as frozen:
        freezing = threading.Thread(target=frozen._database.write, args=[claim])
        freezing.start()
        until(lambda: held_rows(conninfo), "the claim to have its row")
        acquired: list[Acquired] = []
        until(lambda: acquired.extend(acquire(store)) or acquired, "the frozen claim to lose its row")
        goes_on.set()
        freezing.join(LIMIT)

        assert [one.id for one in acquired] == ["a"]
        assert found == [[]], "it began again by itself, and found what others had left"


def held_rows(conninfo: str) -> bool:
    with psycopg.connect(conninfo) as connection:
        return not connection.execute("SELECT 1 FROM callbackq.callbacks FOR UPDATE SKIP LOCKED").fetchall()


# Locks in an order.


def test_transactions_that_cross_are_told_to_repeat(store: PostgreSQLDataAccess, conninfo: str) -> None:
    both_have_one = threading.Barrier(2)

    def cross(first: str, second: str) -> bool:
        with transaction(conninfo) as connection:
            store.store_callback_request(a_request(queue_id=first), connection=connection)
            both_have_one.wait(10)
            try:
                store.store_callback_request(a_request(queue_id=second), connection=connection)
            except TransientDataAccessError:
                connection.rollback()
                return False
            connection.commit()
            return True

    committed = race([lambda: cross("a", "b"), lambda: cross("b", "a")])

    assert sorted(committed) == [False, True]
    assert sorted(one.queue_id for one in store.list_callbacks()) == ["a", "b"]


def test_batches_of_the_same_queues_never_meet_in_a_deadlock(store: PostgreSQLDataAccess, conninfo: str) -> None:
    names = [f"Queue {number}" if number % 2 else f"queue {number}" for number in range(20)]

    def store_batches(seed: int) -> None:
        shuffled = random.Random(seed)
        with PostgreSQLDataAccess(conninfo) as own:
            for _ in range(15):
                shuffled.shuffle(names_of_mine := [*names])
                own.store_callback_requests([a_request(queue_id=name) for name in names_of_mine])

    before = deadlocks(conninfo)
    race([lambda seed=seed: store_batches(seed) for seed in range(3)])

    assert deadlocks(conninfo) == before
    assert {one.sequence for one in store.list_callbacks(queue_id=names[0])} == set(range(1, 46))


def deadlocks(conninfo: str) -> int:
    with psycopg.connect(conninfo) as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
        row = connection.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert row
    return int(row[0])


# The lost wake-up: one joins a queue while its last callback ends.


def test_no_queue_is_left_without_its_head_and_none_gets_two(store: PostgreSQLDataAccess, conninfo: str) -> None:
    rounds, queues = 60, 20
    stored = threading.Event()
    left = threading.Semaphore(0)

    def enqueue(seed: int) -> None:
        chance = random.Random(seed)
        with PostgreSQLDataAccess(conninfo) as own:
            for _ in range(rounds):
                chosen = [a_request(queue_id=f"queue {chance.randrange(queues)}") for _ in range(3)]
                own.store_callback_requests(chosen)
        left.release()

    def complete() -> int:
        done = 0
        with PostgreSQLDataAccess(conninfo) as own:
            while True:
                is_last = stored.is_set()
                acquired = acquire(own, limit=5)
                succeed(own, acquired)
                done += len(acquired)
                if is_last and not acquired and own.next_due() is None:
                    return done

    def wait_for_enqueuers() -> int:
        assert left.acquire(timeout=25)
        assert left.acquire(timeout=25)
        stored.set()
        return 0

    workers: list[Callable[[], Any]] = [lambda: enqueue(1), lambda: enqueue(2), complete, complete, wait_for_enqueuers]
    results = race(workers)

    assert sum(result or 0 for result in results) == rounds * 3 * 2
    assert {one.state for one in store.list_callbacks()} == {CallbackState.SUCCEEDED}


# The order of commits.


def test_callbacks_are_delivered_in_the_order_of_commits(store: PostgreSQLDataAccess, conninfo: str) -> None:
    committed: dict[str, list[str]] = {"a": [], "b": []}

    def enqueue(seed: int) -> None:
        chance = random.Random(seed)
        for number in range(40):
            queue = chance.choice("ab")
            id = f"{seed}-{number}"
            with transaction(conninfo) as connection:
                store.store_callback_request(a_request(queue_id=queue), id=id, connection=connection)
                connection.execute("SELECT pg_sleep(%s)", [chance.random() * 0.003])
                # Nobody else can be between these two: who has stored into the queue has its row.
                committed[queue].append(id)
                connection.commit()

    race([lambda: enqueue(1), lambda: enqueue(2)])
    delivered: dict[str, list[str]] = {"a": [], "b": []}
    while acquired := acquire(store):
        for one in acquired:
            delivered[one.queue_id].append(one.id)
        succeed(store, acquired)

    assert delivered == committed


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_store_holds_no_more_connections_than_it_may(conninfo: str, most: int) -> None:
    with PostgreSQLDataAccess(conninfo, connections=most) as store, transaction(conninfo) as connection:
        unsubscribe = store.subscribe(lambda: None)
        race([lambda: store.store_callback_request(a_request())] * 8)
        race([lambda: acquire(store)] * 8)
        (held,) = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone() or (None,)
        unsubscribe()

    assert 1 <= held <= most


def test_a_dispatcher_needs_two_connections_and_opens_no_third(conninfo: str) -> None:
    with PostgreSQLDataAccess(conninfo) as enqueuer:
        enqueuer.store_callback_requests([a_request(queue_id=f"queue {number % 5}") for number in range(40)])
        enqueuer.store_callback_requests([a_request()] * 10)
    witness = Witness()
    with (
        PostgreSQLDataAccess(conninfo) as store,
        Dispatcher(store, transport=ScriptedTransport([500]), observer=witness),
        transaction(conninfo) as connection,
    ):
        witness.wait_for(EventKind.FAILED, 1)
        witness.wait_for(EventKind.SUCCEEDED, 49)
        (held,) = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone() or (None,)

    assert held == 2


def test_a_dispatcher_with_a_notifier_opens_a_third_connection_and_no_fourth(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = Witness()
    notifier = RecordingNotifier()
    held: list[int] = []
    with PostgreSQLDataAccess(conninfo) as enqueuer:

        def deliver_beside() -> None:
            # While the outbox has a connection, results are recorded on another, and the third listens.
            enqueuer.store_callback_requests([a_request(notification_email_address="to@them.example")] * 9)
            witness.wait_for(EventKind.FAILED, 9)
            held.append(connections_of("dispatcher", conninfo))

        enqueuer.open()
        with (
            PostgreSQLDataAccess(f"{conninfo} application_name=dispatcher") as store,
            between(monkeypatch, "mailing_due", deliver_beside),
            Dispatcher(store, transport=ScriptedTransport([404] * 9), observer=witness, notifier=notifier),
        ):
            until(lambda: sum(one.count for one in notifier.notified) == 9, "the e-mails")
            held.append(connections_of("dispatcher", conninfo))

    assert held == [3, 3]


def connections_of(name: str, conninfo: str) -> int:
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [name]).fetchone()
    assert row
    return int(row[0])


# Engines that are distributed.


@pytest.fixture
def careless(conninfo: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgreSQLDataAccess]:
    """A store on an engine that makes nothing of SERIALIZABLE, and nothing of FOR UPDATE."""

    def load(schema: str, profile: Profile) -> dict[str, transactions.Statement]:
        found = transactions.load(schema, profile)
        return {name: evolve(one, text=one.text.replace("FOR UPDATE", "")) for name, one in found.items()}

    with monkeypatch.context() as patch:
        patch.setitem(databases._BEGIN, "distributed", "BEGIN ISOLATION LEVEL READ COMMITTED; ")
        patch.setattr(databases, "load", load)
        store = PostgreSQLDataAccess(conninfo, profile="distributed")
    with store:
        yield store


@pytest.mark.parametrize("profile", ["distributed"])
def test_a_lock_is_given_once_also_by_an_engine_whose_transactions_are_not_serializable(
    careless: PostgreSQLDataAccess, conninfo: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[str] = []
    with PostgreSQLDataAccess(conninfo, profile=profile) as other:
        careless.store_callback_requests([a_request()] * 3)

        def let_others_be_faster() -> None:
            others.extend(one.id for one in acquire(other, limit=2))

        with between(monkeypatch, "due_heads", let_others_be_faster):
            ours = [one.id for one in acquire(careless)]

    assert len(others) == 2
    assert len(ours) == 1
    assert not set(ours) & set(others)


@pytest.mark.parametrize("profile", ["distributed"])
def test_a_result_that_comes_while_a_claim_ends_its_lock_stays(
    careless: PostgreSQLDataAccess, conninfo: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PostgreSQLDataAccess(conninfo, profile=profile) as other:
        other.store_callback_requests([a_request(queue_id="queue")] * 2, ids=["a", "b"])
        held = acquire(other)
        other.request_transition("a", Action.CANCEL)
        let_locks_time_out(conninfo)

        with between(monkeypatch, "due_heads", lambda: succeed(other, held)):
            acquired = acquire(careless) or acquire(careless)

        status = other.get_callback_status("a")
        assert (status.state, [lock.completed for lock in status.locks]) == (CallbackState.SUCCEEDED, [True])
        assert [one.id for one in acquired] == ["b"]


@pytest.mark.parametrize("profile", ["distributed"])
def test_a_redelivery_that_comes_while_a_claim_opens_the_queue_stays(
    careless: PostgreSQLDataAccess, conninfo: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PostgreSQLDataAccess(conninfo, profile=profile) as other:
        other.store_callback_request(a_request(queue_id="queue"), id="a")
        held = acquire(other)
        with transaction(conninfo) as connection:
            other.store_callback_request(a_request(queue_id="queue"), id="b", connection=connection)
            other.record_attempts([AttemptRecord(acquired=held[0], attempt=an_attempt(), transition=EXHAUSTED)])
            connection.commit()
        let_locks_time_out(conninfo)  # and so tries the claim again to open the queue

        redeliver = partial(other.request_transition, "a", Action.REDELIVER)
        with between(monkeypatch, "due_heads", redeliver):
            acquired = acquire(careless) or acquire(careless)

        status = other.get_callback_status("a")
        assert (status.state, status.blocked_by) == (CallbackState.WAITING, "b")
        assert [one.id for one in acquired] == ["b"]


def let_locks_time_out(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(
            "UPDATE callbackq.callbacks SET due = least(due, stored), ready = least(ready, stored) "
            "FROM callbackq.requests AS r WHERE r.callback = callbacks.callback"
        )


@pytest.mark.parametrize("profile", ["distributed"])
def test_a_claim_locks_rows_in_the_order_in_which_results_do_and_gives_the_oldest_first(
    conninfo: str, profile: Profile
) -> None:
    with (
        PostgreSQLDataAccess(conninfo, profile=profile) as store,
        transaction(conninfo) as connection,
        ThreadPoolExecutor(1) as threads,
    ):
        store.store_callback_request(a_request(), id="a")
        acquire(store)
        store.request_transition("a", Action.CANCEL)
        for id in ("z", "k"):
            store.store_callback_request(a_request(), id=id)
        let_locks_time_out(conninfo)

        connection.execute("SELECT 1 FROM callbackq.callbacks WHERE callback = 'a' FOR UPDATE")
        claim = threads.submit(acquire, store)
        until(lambda: connection.execute(WAITING_FOR_LOCKS).fetchall(), "the claim to wait")
        free = connection.execute("SELECT callback FROM callbackq.callbacks FOR UPDATE SKIP LOCKED").fetchall()
        connection.rollback()

        assert sorted(free) == [("a",), ("k",), ("z",)], "none was taken before the first key"
        assert [one.id for one in claim.result(LIMIT)] == ["z", "k"]
        assert store.get_callback_status("a").state is CallbackState.CANCELLED


# Who hears of what.


def test_other_dispatchers_hear_of_what_a_result_or_a_release_makes_due(
    store: PostgreSQLDataAccess, conninfo: str
) -> None:
    heard = threading.Semaphore(0)
    with PostgreSQLDataAccess(conninfo) as other:
        unsubscribe = other.subscribe(heard.release)
        assert heard.acquire(timeout=LIMIT)  # it listens from now on
        store.store_callback_requests([a_request(queue_id="queue")] * 3)
        assert heard.acquire(timeout=LIMIT)

        (first,) = acquire(store)
        succeed(store, [first])
        assert heard.acquire(timeout=LIMIT)
        (second,) = acquire(store)
        store.release_lock(second)
        assert heard.acquire(timeout=LIMIT)

        unsubscribe()


# Where a search begins.


@pytest.mark.parametrize(("took", "rest"), [(0.0003, 0.1), (0.02, 0.4), (0.09, 1.0)])
def test_searches_from_the_beginning_are_as_frequent_as_they_are_quick(took: float, rest: float) -> None:
    mark = Mark()
    assert mark.wants_full_search(0.0)

    mark.found(5_000_000, 9_000_000, began=100.0, ended=100.0 + took)

    assert not mark.wants_full_search(99.999 + took + rest)
    assert mark.wants_full_search(100.001 + took + rest)
    assert mark.begin(9_500_000) == 4_000_000
    assert mark.begin(3_900_000) == 0  # the clock was turned back


def test_what_was_committed_late_is_found_behind_the_mark(store: PostgreSQLDataAccess, conninfo: str) -> None:
    assert acquire(store) == []
    store.store_callback_request(a_request(), id="late")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("UPDATE callbackq.callbacks SET ready = ready - 10000000")  # as if stored ten seconds ago

    found: list[Acquired] = []
    until(lambda: found.extend(acquire(store)) or found, "what lies behind the mark")

    assert [one.id for one in found] == ["late"]
