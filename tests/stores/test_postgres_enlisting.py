"""Callbacks stored on a psycopg connection of the application's, whatever it has set there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from callbackq.errors import ConflictError, DataAccessError, InvalidRequestError, TransientDataAccessError
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing.conformance.base import a_request
from support.postgres import PostgreSQL


@pytest.fixture
def conninfo(postgres: PostgreSQL, database: str) -> str:
    return postgres.conninfo(database)


@pytest.fixture
def store(conninfo: str) -> Iterator[PostgreSQLDataAccess]:
    with PostgreSQLDataAccess(conninfo, patience=timedelta(milliseconds=200)) as store:
        yield store


@pytest.fixture
def connection(store: PostgreSQLDataAccess, conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """The application's, which begins transactions by itself."""
    with closing(psycopg.connect(conninfo)) as connection:
        yield connection


def ids(store: PostgreSQLDataAccess) -> list[str]:
    return [status.id for status in store.list_callbacks()]


MODES: dict[str, Callable[[psycopg.Connection[Any]], None]] = {
    "rows as dictionaries": lambda connection: setattr(connection, "row_factory", dict_row),
    "values bound by the client": lambda connection: setattr(connection, "cursor_factory", psycopg.ClientCursor),
    "PostgreSQL's own placeholders": lambda connection: setattr(connection, "cursor_factory", psycopg.RawCursor),
    "everything prepared": lambda connection: setattr(connection, "prepare_threshold", 0),
    "begun by hand": lambda connection: (setattr(connection, "autocommit", True), connection.execute("BEGIN"))[0],
}


@pytest.mark.parametrize("mode", MODES)
def test_a_connection_may_be_set_as_one_likes(
    store: PostgreSQLDataAccess, connection: psycopg.Connection[Any], mode: str
) -> None:
    MODES[mode](connection)

    for id in ("a", "b", "a"):
        store.store_callback_request(a_request(queue_id="queue"), id=id, connection=connection)
    connection.execute("COMMIT")

    assert ids(store) == ["a", "b"]


@pytest.mark.parametrize("patience", ["0", "7s"])
def test_storing_changes_no_setting_of_the_transaction(
    store: PostgreSQLDataAccess, connection: psycopg.Connection[Any], patience: str
) -> None:
    store.store_callback_request(a_request(), id="taken")
    connection.execute(f"SET LOCAL lock_timeout = '{patience}'")
    before = connection.execute("SELECT name, setting FROM pg_settings ORDER BY name").fetchall()

    store.store_callback_request(a_request(queue_id="queue"), connection=connection)
    with pytest.raises(ConflictError):
        store.store_callback_request(a_request(method="PUT"), id="taken", connection=connection)

    assert connection.execute("SELECT name, setting FROM pg_settings ORDER BY name").fetchall() == before


def test_waiting_for_another_transaction_in_a_queue_ends_and_leaves_the_transaction_usable(
    store: PostgreSQLDataAccess, connection: psycopg.Connection[Any], conninfo: str
) -> None:
    with closing(psycopg.connect(conninfo)) as other:
        store.store_callback_request(a_request(queue_id="queue"), id="theirs", connection=other)

        with pytest.raises(TransientDataAccessError, match="locked by another transaction for too long"):
            store.store_callback_request(a_request(queue_id="queue"), id="ours", connection=connection)
        store.store_callback_request(a_request(queue_id="another"), id="elsewhere", connection=connection)
        other.commit()
    store.store_callback_request(a_request(queue_id="queue"), id="ours", connection=connection)
    connection.commit()

    assert [(one.id, one.sequence) for one in store.list_callbacks()] == [("theirs", 1), ("elsewhere", 1), ("ours", 2)]


def test_numbers_follow_the_order_of_commits(
    store: PostgreSQLDataAccess, connection: psycopg.Connection[Any], conninfo: str
) -> None:
    with closing(psycopg.connect(conninfo)) as other:
        other.execute("SELECT 1")  # begun first
        store.store_callback_request(a_request(queue_id="queue"), id="first", connection=connection)
        connection.commit()
        store.store_callback_request(a_request(queue_id="queue"), id="second", connection=other)
        store.store_callback_request(a_request(queue_id="queue"), id="third", connection=other)
        other.commit()

    assert [(one.id, one.sequence) for one in store.list_callbacks()] == [("first", 1), ("second", 2), ("third", 3)]


def test_a_connection_is_refused_with_the_reason(
    store: PostgreSQLDataAccess, connection: psycopg.Connection[Any], conninfo: str
) -> None:
    def refused(words: str) -> None:
        with pytest.raises(InvalidRequestError, match=words):
            store.store_callback_request(a_request(), connection=connection)

    with connection.pipeline():
        refused("pipeline")
    connection.autocommit = True
    refused("begin one")
    connection.autocommit = False
    with pytest.raises(psycopg.errors.UndefinedTable):
        connection.execute("SELECT * FROM nowhere")
    refused("roll it back")
    connection.close()
    refused("must be open")

    assert ids(store) == []


def test_a_store_that_is_not_open_says_so(conninfo: str, connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(DataAccessError, match="open it before"):
        PostgreSQLDataAccess(conninfo).store_callback_request(a_request(), connection=connection)


def test_a_connection_to_another_database_finds_no_tables(store: PostgreSQLDataAccess, postgres: PostgreSQL) -> None:
    with (
        postgres.database() as another,
        closing(psycopg.connect(postgres.conninfo(another))) as connection,
        pytest.raises(DataAccessError, match=r"has no such table: .* the store's database"),
    ):
        store.store_callback_request(a_request(), connection=connection)


def test_a_connection_to_another_store_is_refused(store: PostgreSQLDataAccess, postgres: PostgreSQL) -> None:
    with (
        postgres.database() as another,
        PostgreSQLDataAccess(postgres.conninfo(another)) as other_store,
        closing(psycopg.connect(postgres.conninfo(another))) as connection,
    ):
        with pytest.raises(InvalidRequestError, match="must lead to the store's database"):
            store.store_callback_request(a_request(), id="lost", connection=connection)

        other_store.store_callback_request(a_request(), id="kept", connection=connection)
        connection.commit()
        assert ids(other_store) == ["kept"]
