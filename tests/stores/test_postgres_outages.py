"""A dispatcher on PostgreSQL goes on by itself after whatever becomes of the server, and nothing is sent twice."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import pytest

from callbackq import Dispatcher
from callbackq.core.lifecycle import Action
from callbackq.core.models import CallbackState
from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.events import EventKind
from callbackq.stores.postgres import PostgreSQLDataAccess, listener
from callbackq.stores.postgres.connections import OwnConnections
from callbackq.stores.postgres.cursors import execute
from callbackq.testing import ScriptedTransport
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


@pytest.mark.thorough
def test_a_server_that_takes_long_and_says_so_is_waited_for(postgres: PostgreSQL, migrated_database: str) -> None:
    own = OwnConnections(postgres.conninfo(migrated_database), most=1, patience_seconds=LIMIT, silence_seconds=2.0)
    # More than the server keeps before it sends.
    slowly = "SELECT repeat('x', 20000), pg_sleep(0.25) FROM generate_series(1, 12)"

    with own.lend() as connection:
        assert len(execute(connection, slowly).fetchall()) == 12
    own.close()


def test_a_listener_notices_a_server_that_says_nothing_any_more(
    postgres: PostgreSQL, migrated_database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "callbackq.stores")
    monkeypatch.setattr(listener, "_PROBE_SECONDS", 0.05)
    heard = threading.Semaphore(0)
    with (
        CuttingProxy(postgres.conninfo(migrated_database)) as proxy,
        PostgreSQLDataAccess(
            proxy.conninfo, answer_timeout=timedelta(milliseconds=100), patience=timedelta(seconds=1)
        ) as store,
    ):
        unsubscribe = store.subscribe(heard.release)
        assert heard.acquire(timeout=LIMIT), "it listens"
        proxy.stall()
        until(lambda: "hints from PostgreSQL are interrupted" in caplog.text, "the listener to notice")
        proxy.resume()

        assert heard.acquire(timeout=LIMIT), "it listens again, and hints may have been missed"
        unsubscribe()
