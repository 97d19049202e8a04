"""The PostgreSQL store on a pool of the host's, whatever kinds of cursors and rows the host likes."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from attrs import evolve
from psycopg.rows import class_row, dict_row, namedtuple_row, scalar_row
from psycopg_pool import ConnectionPool

from callbackq.core.lifecycle import Action
from callbackq.core.models import CallbackState
from callbackq.errors import DataAccessError
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.stores.postgres.transaction import Profile
from callbackq.testing.conformance.base import DELIVERED, EXHAUSTED, LOCK_TIMEOUT, a_request, an_attempt
from callbackq.testing.conformance.concurrency import Child
from support.postgres import PostgreSQL
from support.processes import LIMIT


@pytest.fixture
def conninfo(postgres: PostgreSQL, migrated_database: str) -> str:
    return postgres.conninfo(migrated_database)


class Choosy:
    """Can be made of no row of the store's."""

    def __init__(self, *, column_of_the_hosts: object) -> None:
        pass


KINDS: dict[str, dict[str, Any]] = {
    "rows as dictionaries": {"row_factory": dict_row},
    "rows as named tuples": {"row_factory": namedtuple_row},
    "first columns only": {"row_factory": scalar_row},
    "rows as a class of the host's": {"row_factory": class_row(Choosy)},
    "values bound by the client": {"cursor_factory": psycopg.ClientCursor},
    "PostgreSQL's own placeholders": {"cursor_factory": psycopg.RawCursor},
}


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_may_have_any_kind_of_cursors_and_rows(
    postgres: PostgreSQL, database: str, kind: str, profile: Profile
) -> None:
    request = a_request(queue_id="queue", notification_email_address="somebody@receiver.example")
    with (
        ConnectionPool(postgres.conninfo(database), kwargs=KINDS[kind], min_size=1, max_size=2, open=True) as pool,
        PostgreSQLDataAccess(pool, profile=profile) as store,  # which makes the tables
    ):
        store.store_callback_requests([request] * 2, ids=["a", "b"])
        store.store_callback_request(request, id="a")
        (failing,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9)
        store.record_attempt(failing, an_attempt(), evolve(EXHAUSTED, notify=True))
        store.request_transition("a", Action.REDELIVER)
        for _ in range(2):
            (good,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9)
            store.record_attempt(good, an_attempt(200), DELIVERED)
        (owed,) = store.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=9)
        store.record_notification(owed, retry_in=None)
        store.store_callback_request(request, id="c")
        with pool.connection() as connection:
            store.store_callback_request(request, id="d", connection=connection)

        found = {one.id: (one.sequence, one.state, one.blocked_by) for one in store.list_callbacks()}
        assert found == {
            "a": (3, CallbackState.SUCCEEDED, None),
            "b": (2, CallbackState.SUCCEEDED, None),
            "c": (4, CallbackState.WAITING, None),
            "d": (5, CallbackState.WAITING, "c"),
        }
        assert store.next_due() == store.get_callback_status("c").next_attempt_at
        assert store.purge(finished_for=timedelta(0)) == 2
        with pool.connection() as connection:
            assert isinstance(connection.cursor(), KINDS[kind].get("cursor_factory", psycopg.Cursor))


def test_a_pool_of_the_hosts_is_used_and_left_as_it_was(conninfo: str) -> None:
    database = psycopg.conninfo.conninfo_to_dict(conninfo)
    # All that is needed to connect is in the keywords, also for the listener.
    with ConnectionPool("", kwargs=database, min_size=1, max_size=2, open=True) as pool:
        heard = threading.Event()
        with PostgreSQLDataAccess(pool) as store:
            store.subscribe(heard.set)
            assert heard.wait(LIMIT)
            store.store_callback_request(a_request(), id="a")
        with pool.connection() as connection:
            assert not connection.autocommit
            assert connection.execute("SELECT count(*) FROM callbackq.callbacks").fetchone() == (1,)


def test_a_pool_of_the_hosts_that_is_busy_or_closed_is_told(conninfo: str) -> None:
    with ConnectionPool(conninfo, min_size=1, max_size=1, open=True) as pool:
        with PostgreSQLDataAccess(pool, patience=timedelta(milliseconds=50)) as store:
            with pool.connection(), pytest.raises(DataAccessError, match="PoolTimeout"):
                store.now()
            assert store.now()
        pool.close()
        with pytest.raises(DataAccessError, match="PoolClosed"):
            store.now()


def test_a_connection_that_is_left_in_a_transaction_goes_to_nobody_else(conninfo: str) -> None:
    with ConnectionPool(conninfo, min_size=1, max_size=1, open=True) as pool, PostgreSQLDataAccess(pool) as store:
        with store._database._connection() as lent:
            lent.execute("BEGIN")

        with pool.connection() as connection:
            assert not connection.autocommit
        assert store.now()


def test_a_connection_that_the_pool_lends_in_a_transaction_is_told(conninfo: str) -> None:
    # One that the host checks by a statement, and doesn't end the transaction that this begins.
    with (
        ConnectionPool(
            conninfo,
            check=lambda connection: connection.execute("SELECT 1") and None,
            min_size=1,
            max_size=1,
            open=True,
        ) as pool,
        pytest.raises(DataAccessError, match="ProgrammingError"),
    ):
        PostgreSQLDataAccess(pool).now()


def test_a_pool_is_refused_in_a_forked_process(conninfo: str) -> None:
    with ConnectionPool(conninfo, min_size=1, open=True) as pool, PostgreSQLDataAccess(pool) as store:
        store.store_callback_request(a_request(), id="a")

        def child() -> None:
            for call in (store.now, store.open, store.close):
                with pytest.raises(DataAccessError, match="make another pool"):
                    call()

        Child(lambda _: child()).finish()
        assert store.get_callback_status("a").id == "a"


@pytest.mark.parametrize(
    ("own", "answer_timeout", "name", "connect_timeout"),
    [
        ("", 10, "callbackq", "10"),
        ("", 60, "callbackq", "10"),
        ("", 4.5, "callbackq", "5"),
        ("", 0.1, "callbackq", "2"),
        (" application_name=shop connect_timeout=3", 10, "shop", "3"),
    ],
)
def test_what_the_host_has_set_for_its_connections_counts(
    conninfo: str, own: str, answer_timeout: float, name: str, connect_timeout: str
) -> None:
    with PostgreSQLDataAccess(f"{conninfo}{own}", answer_timeout=timedelta(seconds=answer_timeout)) as store:
        status = store.store_callback_request(a_request())
        with psycopg.connect(conninfo) as connection:
            named = connection.execute(
                "SELECT DISTINCT application_name FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
        connections: Any = store._database._connections
        (one,) = {connection.info.get_parameters()["connect_timeout"] for connection in connections._free}

    assert named == [(name,)]
    assert one == connect_timeout
    assert status.state is CallbackState.WAITING
