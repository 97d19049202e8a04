"""Storing in a transaction of SQLAlchemy's or Django's on PostgreSQL: the driver's connection below them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from callbackq.core.models import CallbackData
from callbackq.dispatcher import Dispatcher
from callbackq.errors import ConflictError, InvalidRequestError, TransientDataAccessError
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing import ScriptedTransport
from callbackq.testing.conformance.base import a_request
from support.postgres import PostgreSQL

sqlalchemy = pytest.importorskip("sqlalchemy")
django = pytest.importorskip("django")

from django.conf import settings  # noqa: E402
from django.db import DEFAULT_DB_ALIAS, IntegrityError, connections, transaction  # noqa: E402
from sqlalchemy import text  # noqa: E402
from sqlalchemy.orm import Session  # noqa: E402


@pytest.fixture
def conninfo(postgres: PostgreSQL, database: str) -> str:
    return postgres.conninfo(database)


@pytest.fixture
def store(conninfo: str) -> Iterator[PostgreSQLDataAccess]:
    with PostgreSQLDataAccess(conninfo) as store, closing(psycopg.connect(conninfo, autocommit=True)) as connection:
        connection.execute("CREATE TABLE orders (name TEXT PRIMARY KEY)")
        yield store


def ids(store: PostgreSQLDataAccess) -> list[str]:
    return [status.id for status in store.list_callbacks()]


def orders(conninfo: str) -> list[str]:
    with closing(psycopg.connect(conninfo)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM orders ORDER BY name")]


def delivered(store: PostgreSQLDataAccess) -> list[str]:
    transport = ScriptedTransport()
    Dispatcher(store, transport=transport).run_until_idle()
    return [sent.callback_id for sent in transport.deliveries]


# SQLAlchemy.


@pytest.fixture
def engine(store: PostgreSQLDataAccess, conninfo: str) -> Iterator[Any]:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", connect_args=conninfo_to_dict(conninfo))
    yield engine
    engine.dispose()


def driver_connection_of(session: Session) -> psycopg.Connection[Any]:
    driver_connection = session.connection().connection.driver_connection
    assert isinstance(driver_connection, psycopg.Connection)
    return driver_connection


def store_in(session: Session, store: PostgreSQLDataAccess, id: str, **changes: Any) -> None:
    store.store_callback_request(a_request(**changes), id=id, connection=driver_connection_of(session))


INSERT = text("INSERT INTO orders VALUES (:name)")


@pytest.mark.parametrize("rows_first", [False, True])
def test_a_session_commits_both_or_rolls_both_back(
    engine: Any, store: PostgreSQLDataAccess, conninfo: str, rows_first: bool
) -> None:
    for order, end in (("kept", Session.commit), ("dropped", Session.rollback), ("kept-too", Session.commit)):
        with Session(engine) as session:
            if rows_first:
                session.execute(INSERT, {"name": order})
            store_in(session, store, order)
            if not rows_first:
                session.execute(INSERT, {"name": order})
            end(session)

    assert ids(store) == orders(conninfo) == ["kept", "kept-too"]
    assert delivered(store) == ["kept", "kept-too"]


def test_an_exception_in_a_session_takes_both_back(engine: Any, store: PostgreSQLDataAccess, conninfo: str) -> None:
    with suppress(ZeroDivisionError), Session(engine) as session, session.begin():
        session.execute(INSERT, {"name": "dropped"})
        store_in(session, store, "dropped")
        print(1 / 0)

    assert ids(store) == orders(conninfo) == []


def test_a_nested_transaction_of_a_session_is_taken_back_alone(
    engine: Any, store: PostgreSQLDataAccess, conninfo: str
) -> None:
    with Session(engine) as session, session.begin():
        store_in(session, store, "outer", queue_id="queue")
        nested = session.begin_nested()
        session.execute(INSERT, {"name": "inner"})
        store_in(session, store, "inner", queue_id="queue")
        nested.rollback()
        with session.begin_nested():
            session.execute(INSERT, {"name": "outer"})
            store_in(session, store, "inner-kept", queue_id="queue")

    assert [(status.id, status.sequence) for status in store.list_callbacks()] == [("outer", 1), ("inner-kept", 2)]
    assert orders(conninfo) == ["outer"]


def test_an_id_is_stored_once_and_a_conflict_leaves_the_session_usable(
    engine: Any, store: PostgreSQLDataAccess, conninfo: str
) -> None:
    for _ in range(2):
        with Session(engine) as session, session.begin():
            store_in(session, store, "once", queue_id="queue")
    with Session(engine) as session, session.begin():
        session.execute(INSERT, {"name": "kept"})
        with pytest.raises(ConflictError):
            store_in(session, store, "once", queue_id="queue", method="PUT")
        store_in(session, store, "after", queue_id="queue")

    assert [(status.id, status.sequence) for status in store.list_callbacks()] == [("once", 1), ("after", 2)]
    assert orders(conninfo) == ["kept"]


def test_a_hint_after_the_commit_of_a_session_is_optional_and_wakes(engine: Any, store: PostgreSQLDataAccess) -> None:
    hints: list[list[str]] = []
    store.subscribe(lambda: hints.append(ids(store)))

    with Session(engine) as session, session.begin():
        store_in(session, store, "kept")
    store.hint()

    assert ["kept"] in hints


def test_a_session_that_commits_each_statement_is_refused(engine: Any, store: PostgreSQLDataAccess) -> None:
    with (
        Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session,
        pytest.raises(InvalidRequestError, match="no transaction under way"),
    ):
        store_in(session, store, "never")

    assert ids(store) == []


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_session_that_sees_an_older_state_than_others_wrote_is_told_to_repeat_all(
    engine: Any, store: PostgreSQLDataAccess, isolation_level: str
) -> None:
    with Session(engine.execution_options(isolation_level=isolation_level)) as session:
        session.execute(text("SELECT * FROM orders"))
        store.store_callback_request(a_request(queue_id="queue"), id="theirs")
        store.store_callback_request(a_request(), id="theirs-alone")

        with pytest.raises(TransientDataAccessError, match="roll the transaction back and repeat it"):
            store_in(session, store, "ours", queue_id="queue")
        with pytest.raises(TransientDataAccessError, match="roll the transaction back and repeat it"):
            store_in(session, store, "theirs-alone")
        session.rollback()
        store_in(session, store, "theirs-alone")
        store_in(session, store, "ours", queue_id="queue")
        session.commit()

    assert ids(store) == ["theirs", "theirs-alone", "ours"]


def test_what_is_of_sqlalchemy_is_refused_with_the_way_to_the_drivers_connection(
    engine: Any, store: PostgreSQLDataAccess
) -> None:
    with Session(engine) as session:
        for wrong in (session, session.connection(), session.connection().connection):
            with pytest.raises(InvalidRequestError, match=r"session\.connection\(\)\.connection\.driver_connection"):
                store.store_callback_request(a_request(), connection=wrong)  # type: ignore[arg-type]


# Django.

ALIAS = "shop"


@pytest.fixture(params=["values bound by the client", "values bound by the server"])
def django_connection(request: pytest.FixtureRequest, store: PostgreSQLDataAccess, conninfo: str) -> Iterator[Any]:
    if not settings.configured:
        databases = {DEFAULT_DB_ALIAS: {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
        settings.configure(DATABASES=databases, LOGGING_CONFIG=None)
        django.setup()
    options = conninfo_to_dict(conninfo)
    ours = {"ENGINE": "django.db.backends.postgresql", "NAME": options.pop("dbname"), "OPTIONS": options}
    options["server_side_binding"] = request.param == "values bound by the server"
    connections.settings[ALIAS] = connections.configure_settings({DEFAULT_DB_ALIAS: {}, ALIAS: ours})[ALIAS]
    yield connections[ALIAS]
    connections[ALIAS].close()
    del connections[ALIAS], connections.settings[ALIAS]


def insert(connection: Any, name: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO orders VALUES (%s)", [name])


@pytest.mark.parametrize("rows_first", [False, True])
def test_an_atomic_block_commits_both_or_rolls_both_back(
    django_connection: Any, store: PostgreSQLDataAccess, conninfo: str, rows_first: bool
) -> None:
    for order in ("kept", "dropped", "kept-too"):
        with suppress(ZeroDivisionError), transaction.atomic(using=ALIAS):
            if rows_first:
                insert(django_connection, order)
            store.store_callback_request(a_request(), id=order, connection=django_connection.connection)
            if not rows_first:
                insert(django_connection, order)
            if order == "dropped":
                print(1 / 0)

    assert ids(store) == orders(conninfo) == ["kept", "kept-too"]
    assert delivered(store) == ["kept", "kept-too"]


def test_an_inner_atomic_block_is_taken_back_alone(
    django_connection: Any, store: PostgreSQLDataAccess, conninfo: str
) -> None:
    with transaction.atomic(using=ALIAS):
        store.store_callback_request(a_request(queue_id="queue"), id="a", connection=django_connection.connection)
        insert(django_connection, "a")
        with suppress(IntegrityError), transaction.atomic(using=ALIAS):
            store.store_callback_request(a_request(queue_id="queue"), id="b", connection=django_connection.connection)
            insert(django_connection, "a")
        with transaction.atomic(using=ALIAS):
            store.store_callback_request(a_request(queue_id="queue"), id="c", connection=django_connection.connection)

    assert [(status.id, status.sequence) for status in store.list_callbacks()] == [("a", 1), ("c", 2)]
    assert orders(conninfo) == ["a"]


def test_an_id_is_stored_once_and_a_conflict_leaves_the_block_usable(
    django_connection: Any, store: PostgreSQLDataAccess, conninfo: str
) -> None:
    for _ in range(2):
        with transaction.atomic(using=ALIAS):
            store.store_callback_request(a_request(), id="once", connection=django_connection.connection)
    with transaction.atomic(using=ALIAS):
        with pytest.raises(ConflictError):
            store.store_callback_request(a_request(method="PUT"), id="once", connection=django_connection.connection)
        insert(django_connection, "kept")
        store.store_callback_request(a_request(), id="after", connection=django_connection.connection)

    assert ids(store) == ["once", "after"]
    assert orders(conninfo) == ["kept"]


def test_a_request_comes_back_as_it_was_whatever_django_sets_for_its_connection(
    django_connection: Any, store: PostgreSQLDataAccess
) -> None:
    data = CallbackData(headers={"X-Percent": "100 %s %%", "X-Quote": 'it\'s \\ "fine"'}, data=bytes(range(256)))
    requests = [a_request(queue_id="Größe %s 'q' {x} \\", post_data=data), a_request(post_data=CallbackData(data=b""))]

    with transaction.atomic(using=ALIAS):
        returned = store.store_callback_requests(requests, connection=django_connection.connection)

    assert list(store.list_callbacks()) == returned
    assert [status.request for status in returned] == requests


def test_a_hint_on_commit_comes_after_the_commit_and_not_after_a_rollback(
    django_connection: Any, store: PostgreSQLDataAccess
) -> None:
    hinted: list[str] = []

    for order in ("kept", "dropped"):
        with suppress(ZeroDivisionError), transaction.atomic(using=ALIAS):
            store.store_callback_request(a_request(), id=order, connection=django_connection.connection)
            transaction.on_commit(lambda order=order: (hinted.append(order), store.hint()), using=ALIAS)
            print(1 / (order == "kept"))

    assert hinted == ids(store) == ["kept"]


def test_outside_of_an_atomic_block_it_is_refused(django_connection: Any, store: PostgreSQLDataAccess) -> None:
    insert(django_connection, "connects")
    with pytest.raises(InvalidRequestError, match="no transaction under way"):
        store.store_callback_request(a_request(), connection=django_connection.connection)
    with pytest.raises(InvalidRequestError, match=r"django\.db\.connection\.connection"):
        store.store_callback_request(a_request(), connection=django_connection)

    assert ids(store) == []


def test_a_block_that_has_failed_is_told_to_roll_back(django_connection: Any, store: PostgreSQLDataAccess) -> None:
    with suppress(IntegrityError), transaction.atomic(using=ALIAS):
        insert(django_connection, "twice")
        with suppress(IntegrityError):
            insert(django_connection, "twice")
        with pytest.raises(InvalidRequestError, match="has failed: roll it back"):
            store.store_callback_request(a_request(), connection=django_connection.connection)
        raise IntegrityError

    assert ids(store) == []
