"""A dispatcher on PostgreSQL goes on by itself after whatever becomes of the server, and nothing is sent twice."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import capabilities
from psycopg.waiting import Ready, Wait
from psycopg_pool import ConnectionPool

from callbackq import Dispatcher
from callbackq.core.lifecycle import Action
from callbackq.core.models import CallbackState
from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.events import EventKind
from callbackq.stores.postgres import PostgreSQLDataAccess, connections, listener
from callbackq.stores.postgres.connections import OwnConnections, Waits
from callbackq.stores.postgres.cursors import execute
from callbackq.stores.postgres.faults import SilenceError
from callbackq.testing import FakeClock, ScriptedTransport
from callbackq.testing.conformance.base import a_request
from support.dispatching import Witness
from support.postgres import PostgreSQL, PostgreSQLServer, failover_conninfo, until
from support.postgres_faults import CuttingProxy
from support.processes import LIMIT

QUEUES = 4
MOST_LINES = 12
"""In the log, of one outage, whatever it is."""


class Run:
    """A dispatcher at work."""

    def __init__(self, store: PostgreSQLDataAccess) -> None:
        self.store = store
        self.witness = Witness()
        self.transport = ScriptedTransport()
        self._number = 0

    @contextmanager
    def dispatching(self) -> Iterator[None]:
        with Dispatcher(
            self.store, transport=self.transport, observer=self.witness, poll_interval=timedelta(milliseconds=50)
        ):
            yield

    def enqueue(self, rounds: int = 5) -> None:
        """Store, as an application does that repeats with the same id what may have failed."""
        for _ in range(rounds * QUEUES):
            self._number += 1
            until(self._try_to_store, "the store to work again")

    def _try_to_store(self) -> bool:
        request = a_request(queue_id=f"queue {self._number % QUEUES}")
        try:
            self.store.store_callback_request(request, id=f"callback-{self._number}")
        except DataAccessError:
            return False
        return True

    def wait_until_delivered(self) -> None:
        self.witness.wait_for(EventKind.SUCCEEDED, self._number)

    def check(self) -> None:
        statuses = {one.id: one for one in self.store.list_callbacks()}
        assert len(statuses) == self._number
        for status in statuses.values():
            assert status.state is CallbackState.SUCCEEDED
            assert len(status.attempts) == 1, "no fault of the store is an attempt"
        sent = Counter(one.callback_id for one in self.transport.deliveries)
        assert sent == dict.fromkeys(statuses, 1), "nothing is sent twice without a kill"
        for queue in range(QUEUES):
            name = f"queue {queue}"
            order = [one.sequence for one in self.transport.deliveries if one.request.queue_id == name]
            assert order == list(range(1, len(order) + 1))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("accident", ["restart", "crash", "kill", "terminate"])
def test_a_dispatcher_goes_on_when_the_server_is_back(
    start_postgres: Callable[[], PostgreSQLServer], accident: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = start_postgres()
    with PostgreSQLDataAccess(server.conninfo()) as store:
        run = Run(store)
        with run.dispatching():
            run.enqueue()
            enqueuer = threading.Thread(target=run.enqueue, args=[20])
            enqueuer.start()
            match accident:
                case "restart":
                    server.restart()
                case "crash":
                    server.restart("immediate")
                case "kill":
                    server.kill()
                    server.start()
                case "terminate":
                    server.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'callbackq'"
                    )
            enqueuer.join()
            run.enqueue()
            run.wait_until_delivered()
        run.check()
    assert len(lines(caplog)) <= MOST_LINES, lines(caplog)


def test_a_dispatcher_follows_to_the_standby_that_took_over(
    start_postgres: Callable[[], PostgreSQLServer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    primary = start_postgres()
    standby = primary.standby(synchronous=True)
    with PostgreSQLDataAccess(failover_conninfo(primary, standby, dbname="postgres")) as store:
        run = Run(store)
        with run.dispatching():
            run.enqueue()
            enqueuer = threading.Thread(target=run.enqueue, args=[20])
            enqueuer.start()
            primary.kill()
            # It has no standby of its own, which a commit would wait for.
            standby.promote()
            enqueuer.join()
            run.wait_until_delivered()
        run.check()
    assert len(lines(caplog)) <= MOST_LINES, lines(caplog)


def test_nothing_is_written_to_a_server_that_has_become_a_standby(postgres: PostgreSQL, migrated_database: str) -> None:
    """The connection still works. The next one finds, by the conninfo, which server takes writes."""
    with (
        CuttingProxy(postgres.conninfo(migrated_database)) as proxy,
        PostgreSQLDataAccess(proxy.conninfo) as store,
    ):
        before = proxy.connections
        proxy.fail("25006", "INSERT INTO")

        with pytest.raises(TransientDataAccessError, match="standby"):
            store.store_callback_request(a_request(), id="a")
        store.store_callback_request(a_request(), id="a")

        assert proxy.connections == before + 1


def test_a_server_that_is_away_is_told_at_once_and_in_few_lines(
    postgres: PostgreSQL, migrated_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with (
        CuttingProxy(postgres.conninfo(migrated_database)) as proxy,
        PostgreSQLDataAccess(proxy.conninfo, patience=timedelta(hours=1)) as store,
    ):
        proxy.refuse()
        proxy.cut_all()
        for _ in range(100):
            # (The first of them may have been written, for all one knows, when its connection broke.)
            with pytest.raises(DataAccessError, match="can't be reached"):
                store.store_callback_request(a_request())
        proxy.accept()
        store.store_callback_request(a_request())

    assert lines(caplog) == []


@pytest.mark.parametrize("last", ["connecting", "waiting for a lock", "looking at what is there"])
def test_no_later_try_says_that_nothing_was_stored_when_an_earlier_one_may_have(
    postgres: PostgreSQL, migrated_database: str, last: str
) -> None:
    with (
        CuttingProxy(postgres.conninfo(migrated_database)) as proxy,
        PostgreSQLDataAccess(proxy.conninfo) as store,
    ):
        store.now()
        fault = proxy.cut_after("INSERT INTO")
        match last:
            case "connecting":
                proxy.refuse()
            case "waiting for a lock":
                proxy.fail("55P03", "INSERT INTO")
            case _:
                proxy.fail("53200", "= ANY", nth=2)  # the first asks whether it is new

        with pytest.raises(DataAccessError, match="earlier try may have been written") as raised:
            store.store_callback_request(a_request(), id="a")

        assert not isinstance(raised.value, TransientDataAccessError)
        fault.wait()
        if last == "connecting":
            proxy.accept()
        assert store.get_callback_status("a").id == "a"


def test_one_lost_connection_is_reason_enough_to_use_none_of_the_others(
    postgres: PostgreSQL, migrated_database: str
) -> None:
    with (
        CuttingProxy(postgres.conninfo(migrated_database)) as proxy,
        PostgreSQLDataAccess(proxy.conninfo, connections=31) as store,
    ):
        with ExitStack() as lent:
            for _ in range(30):
                lent.enter_context(store._database._connection())
        before = proxy.connections
        proxy.cut_all()

        assert store.now()

        assert proxy.connections == before + 1


def test_calls_wait_for_each_others_connections_for_all_their_patience(
    postgres: PostgreSQL, migrated_database: str
) -> None:
    with (
        CuttingProxy(postgres.conninfo(migrated_database)) as proxy,
        PostgreSQLDataAccess(proxy.conninfo, connections=2, patience=timedelta(milliseconds=50)) as store,
    ):
        proxy.stall()
        stuck = threading.Thread(target=store.now)
        stuck.start()
        until(lambda: store._database._connections._places._value == 0, "the first call to have the connection")

        with pytest.raises(TransientDataAccessError, match="number of connections"):
            store.now()
        proxy.resume()
        stuck.join(LIMIT)

        assert store.now()


@pytest.mark.parametrize("call", ["look", "write"])
def test_a_server_that_stands_still_holds_up_no_call_for_ever(
    postgres: PostgreSQL, migrated_database: str, call: str
) -> None:
    patience, answer_timeout = timedelta(milliseconds=100), timedelta(seconds=1)
    with (
        CuttingProxy(postgres.conninfo(migrated_database)) as proxy,
        PostgreSQLDataAccess(proxy.conninfo, patience=patience, answer_timeout=answer_timeout) as store,
    ):
        store.store_callback_request(a_request(), id="stored")
        calls: dict[str, Callable[[], object]] = {
            "look": store.next_due,
            "write": lambda: store.request_transition("stored", Action.CANCEL),
        }
        raised: list[BaseException] = []

        def work() -> None:
            with pytest.raises(DataAccessError, match="gives no answer") as caught:
                calls[call]()
            raised.append(caught.value)

        proxy.stall()
        caller = threading.Thread(target=work, daemon=True)
        caller.start()
        caller.join(LIMIT)
        proxy.resume()

        assert len(raised) == 1
        assert store.get_callback_status("stored").state is CallbackState.WAITING


@pytest.mark.skipif(not capabilities.has_cancel_safe(), reason="an older libpq can't ask for it within a limit")
def test_a_statement_that_is_given_up_is_broken_off_in_the_server(postgres: PostgreSQL, migrated_database: str) -> None:
    conninfo = postgres.conninfo(migrated_database)
    waits = {"patience": timedelta(milliseconds=50), "answer_timeout": timedelta(milliseconds=50)}
    with (
        PostgreSQLDataAccess(conninfo, connections=2, **waits) as store,
        psycopg.connect(conninfo) as holder,
    ):
        store.store_callback_request(a_request())
        holder.execute("LOCK TABLE callbackq.callbacks IN ACCESS EXCLUSIVE MODE")
        for _ in range(4):
            with pytest.raises(DataAccessError, match="gives no answer"):
                store.next_due()

        theirs = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'callbackq'"
        )
        until(lambda: len(postgres.execute(theirs, dbname=migrated_database)) <= 1, "their sessions to end")


@pytest.mark.parametrize("call", ["store", "act"])
def test_a_commit_that_waits_for_a_standby_is_given_up_and_not_broken_off(
    start_postgres: Callable[[], PostgreSQLServer], call: str
) -> None:
    """It would be seen by others then, who would rely on what may still be lost."""
    primary = start_postgres()
    standby = primary.standby(synchronous=True)
    waits = {"patience": timedelta(milliseconds=100), "answer_timeout": timedelta(milliseconds=100)}
    with PostgreSQLDataAccess(primary.conninfo()) as beside, PostgreSQLDataAccess(primary.conninfo(), **waits) as store:
        request = a_request(queue_id="queue")
        beside.store_callback_request(request, id="there")
        calls: dict[str, Callable[[], object]] = {
            "store": lambda: store.store_callback_request(request, id="new"),
            "act": lambda: store.request_transition("there", Action.CANCEL),
        }
        with standby.frozen():
            for _ in range(2):
                with pytest.raises(DataAccessError):
                    calls[call]()
            assert [(one.id, one.state) for one in beside.list_callbacks()] == [("there", CallbackState.WAITING)]

        seen = {"store": ("new", CallbackState.WAITING), "act": ("there", CallbackState.CANCELLED)}[call]
        until(lambda: seen in [(one.id, one.state) for one in beside.list_callbacks()], "the commit to end")


def test_a_client_that_stood_still_itself_looks_once_more_whether_there_is_an_answer(
    postgres: PostgreSQL, migrated_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(connections, "time", clock)

    def answer() -> Generator[Wait, Ready, str]:
        while not (yield Wait.R):
            pass
        return "answer"

    with connections.connect(postgres.conninfo(migrated_database), Waits(1.0, 1.0)) as connection:
        late = connection._until_silent(answer())
        next(late)
        clock.advance(100.0)  # frozen, between the end of a wait and the look at the clock
        late.send(Ready.NONE)
        with pytest.raises(StopIteration) as stop:
            late.send(Ready.R)
        assert stop.value.value == "answer"

        silent = connection._until_silent(answer())
        next(silent)
        clock.advance(100.0)
        silent.send(Ready.NONE)
        with pytest.raises(SilenceError):
            silent.send(Ready.NONE)
        assert connection.closed


@pytest.mark.parametrize("call", ["now", "open", "close"])
def test_nobody_waits_without_a_limit_for_one_that_opens_the_store(
    postgres: PostgreSQL, migrated_database: str, call: str
) -> None:
    opening, may_go_on = threading.Event(), threading.Event()
    store = PostgreSQLDataAccess(postgres.conninfo(migrated_database), patience=timedelta(milliseconds=50))
    prepare = store._database._prepare

    def slowly(connection: psycopg.Connection[Any]) -> None:
        opening.set()
        assert may_go_on.wait(LIMIT)
        prepare(connection)

    store._database._prepare = slowly
    opener = threading.Thread(target=store.open)
    opener.start()
    assert opening.wait(LIMIT)

    with pytest.raises(TransientDataAccessError, match="opening the store for too long"):
        getattr(store, call)()

    may_go_on.set()
    opener.join(LIMIT)
    assert store.now()
    store.close()


@pytest.mark.thorough
def test_a_server_that_takes_long_and_says_so_is_waited_for(postgres: PostgreSQL, migrated_database: str) -> None:
    own = OwnConnections(postgres.conninfo(migrated_database), most=1, waits=Waits(1.0, 1.0))
    # More than the server keeps before it sends.
    slowly = "SELECT repeat('x', 20000), pg_sleep(0.25) FROM generate_series(1, 12)"

    with own.lend() as connection:
        assert len(execute(connection, slowly).fetchall()) == 12
    own.close()


@pytest.mark.parametrize("kind", ["its own", "a pool's"])
def test_a_listener_notices_a_server_that_says_nothing_any_more(
    postgres: PostgreSQL,
    migrated_database: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "callbackq.stores")
    monkeypatch.setattr(listener, "_PROBE_SECONDS", 0.05)
    heard = threading.Semaphore(0)
    with ExitStack() as stack:
        proxy = stack.enter_context(CuttingProxy(postgres.conninfo(migrated_database)))
        where: str | ConnectionPool[Any] = proxy.conninfo
        if kind == "a pool's":
            where = stack.enter_context(ConnectionPool(proxy.conninfo, min_size=1, open=True))
        store = stack.enter_context(
            PostgreSQLDataAccess(where, answer_timeout=timedelta(milliseconds=100), patience=timedelta(seconds=1))
        )
        unsubscribe = store.subscribe(heard.release)
        assert heard.acquire(timeout=LIMIT), "it listens"
        proxy.stall()
        until(lambda: "hints from PostgreSQL are interrupted" in caplog.text, "the listener to notice")
        proxy.resume()

        assert heard.acquire(timeout=LIMIT), "it listens again, and hints may have been missed"
        unsubscribe()
