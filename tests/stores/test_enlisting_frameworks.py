"""Storing in a transaction of SQLAlchemy's or Django's: the driver's connection below them, with their own ways."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from callbackq.errors import InvalidRequestError, TransientDataAccessError
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing.conformance.base import a_request

sqlalchemy = pytest.importorskip("sqlalchemy")
django = pytest.importorskip("django")

from django.conf import settings  # noqa: E402
from django.db import IntegrityError, connections, transaction  # noqa: E402
from sqlalchemy import event, text  # noqa: E402
from sqlalchemy.orm import Session  # noqa: E402


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteDataAccess]:
    with SQLiteDataAccess(path) as store:
        yield store


def ids(store: SQLiteDataAccess) -> list[str]:
    return [status.id for status in store.list_callbacks()]


# SQLAlchemy.


@pytest.fixture(params=["as it is", "as its documentation advises"])
def engine(request: pytest.FixtureRequest, store: SQLiteDataAccess, path: Path) -> Iterator[Any]:
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    if request.param == "as its documentation advises":

        @event.listens_for(engine, "connect")
        def leave_transactions_to_us(driver_connection: sqlite3.Connection, _: object) -> None:
            driver_connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (name TEXT PRIMARY KEY)"))
    yield engine
    engine.dispose()


def orders(engine: Any) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(text("SELECT name FROM orders ORDER BY name")))


def store_in(session: Session, store: SQLiteDataAccess, id: str, **changes: Any) -> None:
    driver_connection = session.connection().connection.driver_connection
    assert isinstance(driver_connection, sqlite3.Connection)
    store.store_callback_request(a_request(**changes), id=id, connection=driver_connection)


INSERT = text("INSERT INTO orders VALUES (:name)")


@pytest.mark.parametrize("rows_first", [False, True])
def test_a_session_commits_both_or_rolls_both_back(engine: Any, store: SQLiteDataAccess, rows_first: bool) -> None:
    for order, end in (("kept", Session.commit), ("dropped", Session.rollback), ("kept-too", Session.commit)):
        with Session(engine) as session:
            if rows_first:
                session.execute(INSERT, {"name": order})
            store_in(session, store, order)
            if not rows_first:
                session.execute(INSERT, {"name": order})
            end(session)

    assert ids(store) == orders(engine) == ["kept", "kept-too"]


def test_an_exception_in_a_session_takes_both_back(engine: Any, store: SQLiteDataAccess) -> None:
    with suppress(ZeroDivisionError), Session(engine) as session, session.begin():
        session.execute(INSERT, {"name": "dropped"})
        store_in(session, store, "dropped")
        print(1 / 0)

    assert ids(store) == orders(engine) == []


@pytest.mark.parametrize("engine", ["as its documentation advises"], indirect=True)
def test_a_nested_transaction_of_a_session_is_taken_back_alone(engine: Any, store: SQLiteDataAccess) -> None:
    with Session(engine) as session, session.begin():
        store_in(session, store, "outer", queue_id="queue")
        nested = session.begin_nested()
        session.execute(INSERT, {"name": "inner"})
        store_in(session, store, "inner", queue_id="queue")
        nested.rollback()
        with session.begin_nested():
            session.execute(INSERT, {"name": "outer"})
            store_in(session, store, "inner-kept", queue_id="queue")

    assert ids(store) == ["outer", "inner-kept"]
    assert [status.sequence for status in store.list_callbacks()] == [1, 2]
    assert orders(engine) == ["outer"]


def test_what_is_of_sqlalchemy_is_refused_with_the_way_to_the_drivers_connection(
    engine: Any, store: SQLiteDataAccess
) -> None:
    with Session(engine) as session:
        for wrong in (session, session.connection(), session.connection().connection):
            with pytest.raises(InvalidRequestError, match=r"session\.connection\(\)\.connection\.driver_connection"):
                store.store_callback_request(a_request(), connection=wrong)  # type: ignore[arg-type]


# Django.


@pytest.fixture(params=["DEFERRED", "IMMEDIATE"])
def django_connection(request: pytest.FixtureRequest, store: SQLiteDataAccess, path: Path) -> Iterator[Any]:
    if not settings.configured:
        databases = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
        settings.configure(DATABASES=databases, LOGGING_CONFIG=None)
        django.setup()
    connection = connections["default"]
    options = {"transaction_mode": request.param}
    connection.settings_dict.update(NAME=str(path), OPTIONS=options)
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE orders (name TEXT PRIMARY KEY)")
    yield connection
    connection.close()


def insert(connection: Any, name: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO orders VALUES (%s)", [name])


def names(connection: Any) -> list[str]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT name FROM orders ORDER BY name")
        return [name for (name,) in cursor]


@pytest.mark.parametrize("rows_first", [False, True])
def test_an_atomic_block_commits_both_or_rolls_both_back(
    django_connection: Any, store: SQLiteDataAccess, rows_first: bool
) -> None:
    for order in ("kept", "dropped", "kept-too"):
        with suppress(ZeroDivisionError), transaction.atomic():
            if rows_first:
                insert(django_connection, order)
            store.store_callback_request(a_request(), id=order, connection=django_connection.connection)
            if not rows_first:
                insert(django_connection, order)
            if order == "dropped":
                print(1 / 0)

    assert ids(store) == names(django_connection) == ["kept", "kept-too"]


def test_an_inner_atomic_block_is_taken_back_alone(django_connection: Any, store: SQLiteDataAccess) -> None:
    with transaction.atomic():
        store.store_callback_request(a_request(queue_id="queue"), id="a", connection=django_connection.connection)
        insert(django_connection, "a")
        with suppress(IntegrityError), transaction.atomic():
            store.store_callback_request(a_request(queue_id="queue"), id="b", connection=django_connection.connection)
            insert(django_connection, "a")
        with transaction.atomic():
            store.store_callback_request(a_request(queue_id="queue"), id="c", connection=django_connection.connection)

    assert [(status.id, status.sequence) for status in store.list_callbacks()] == [("a", 1), ("c", 2)]
    assert names(django_connection) == ["a"]


def test_a_hint_on_commit_comes_after_the_commit_and_not_after_a_rollback(
    django_connection: Any, store: SQLiteDataAccess
) -> None:
    hints: list[list[str]] = []
    store.subscribe(lambda: hints.append(ids(store)))

    for order in ("kept", "dropped"):
        with suppress(ZeroDivisionError), transaction.atomic():
            store.store_callback_request(a_request(), id=order, connection=django_connection.connection)
            transaction.on_commit(store.hint)
            print(1 / (order == "kept"))

    assert hints == [["kept"]]


def test_outside_of_an_atomic_block_it_is_refused(django_connection: Any, store: SQLiteDataAccess) -> None:
    with pytest.raises(InvalidRequestError, match="no transaction under way"):
        store.store_callback_request(a_request(), connection=django_connection.connection)
    with pytest.raises(InvalidRequestError, match=r"django\.db\.connection\.connection"):
        store.store_callback_request(a_request(), connection=django_connection)

    assert ids(store) == []


@pytest.mark.parametrize("django_connection", ["DEFERRED"], indirect=True)
def test_an_atomic_block_that_read_before_others_wrote_is_told_so(
    django_connection: Any, store: SQLiteDataAccess
) -> None:
    with transaction.atomic():
        names(django_connection)
        store.store_callback_request(a_request(), id="theirs")

        with pytest.raises(TransientDataAccessError, match="BEGIN IMMEDIATE"):
            store.store_callback_request(a_request(), id="ours", connection=django_connection.connection)

    assert ids(store) == ["theirs"]
