"""The password of a connection, and what is in a callback, show nowhere when PostgreSQL fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool

from callbackq import Dispatcher
from callbackq.core.models import CallbackData, CallbackRequest
from callbackq.dataaccess import Action
from callbackq.errors import DataAccessError, InvalidRequestError
from callbackq.events import EventKind
from callbackq.stores.postgres import PostgreSQLDataAccess, migrate
from callbackq.stores.postgres.transaction import Profile
from callbackq.testing import ScriptedTransport
from support.canaries import HOSTILE_ID, Watch, canary
from support.dispatching import Witness
from support.postgres import PostgreSQL
from support.postgres_faults import CuttingProxy

PASSWORD = canary("password")


def a_request(**changes: str) -> CallbackRequest:
    """A request that has a canary or hostile text wherever text can be."""
    return CallbackRequest(
        url=f"http://receiver.example/{canary('url')}",
        post_data=CallbackData(headers={"Authorization": canary("header")}, data=canary("body").encode()),
        notification_email_address=f"{canary('address')}@ops.example",
        **{"queue_id": HOSTILE_ID, "application_id": HOSTILE_ID, **changes},  # type: ignore[arg-type]
    )


def unfit_lines(watch: Watch) -> list[str]:
    """Of ours. The driver writes as it likes, at its level DEBUG."""
    watch.records = [record for record in watch.records if record.name.startswith("callbackq")]
    return watch.unfit_lines()


@pytest.fixture
def proxy(postgres: PostgreSQL, migrated_database: str) -> Iterator[CuttingProxy]:
    with CuttingProxy(postgres.conninfo(migrated_database, password=PASSWORD)) as proxy:
        yield proxy


def unreachable(proxy: CuttingProxy) -> Iterator[str]:
    yield make_conninfo(proxy.conninfo, dbname="not-there")
    yield make_conninfo(proxy.conninfo, user="nobody-known")
    yield make_conninfo(proxy.conninfo, host="127.0.0.1,/nowhere", port="1,2")
    yield make_conninfo(proxy.conninfo, host="/nowhere")
    yield make_conninfo(proxy.conninfo, sslmode="verify-full", sslrootcert="/nowhere")


def test_no_failed_connection_shows_the_password(proxy: CuttingProxy) -> None:
    with Watch() as watch:
        for conninfo in unreachable(proxy):
            store = PostgreSQLDataAccess(conninfo)
            watch.show("the store", store)
            for call in (store.open, store.now, partial(store.store_callback_request, a_request())):
                assert isinstance(watch.raised_by("a call", call), DataAccessError)
            watch.raised_by("a migration", partial(migrate, conninfo))
            unsubscribe = store.subscribe(lambda: None)
            unsubscribe()
            store.close()
        for state in ("28P01", "28000", "53300", "57P03", "XX000"):
            proxy.refuse_with(state)
            assert isinstance(watch.raised_by("a login", PostgreSQLDataAccess(proxy.conninfo).open), DataAccessError)

    assert watch.leaks() == []
    assert unfit_lines(watch) == []


def test_no_lost_connection_shows_anything(proxy: CuttingProxy) -> None:
    witness, transport = Witness(), ScriptedTransport()
    with Watch() as watch, PostgreSQLDataAccess(proxy.conninfo) as store:
        with Dispatcher(store, transport=transport, observer=witness, poll_interval=timedelta(milliseconds=20)):
            store.store_callback_request(a_request(), id="a")
            witness.wait_for(EventKind.SUCCEEDED)
            for accident in ("57P01", "XX000", "22P02", "23514"):
                proxy.fail(accident, "INSERT INTO.*queues AS q")
                store_one = partial(store.store_callback_request, a_request())
                if accident == "57P01":
                    store_one()
                else:
                    watch.raised_by("storing", store_one)
            proxy.refuse()
            proxy.cut_all()
            witness.wait_for(EventKind.STORE_FAILED)
            watch.raised_by("a wish", partial(store.request_transition, "a", Action.REDELIVER))
            proxy.accept()
            witness.wait_for(EventKind.STORE_RECOVERED)
        watch.show("an event", [*witness.events])

    assert watch.leaks() == []
    assert unfit_lines(watch) == []


# What a host may have added to the tables. PostgreSQL quotes the whole row with what these refuse.
REFUSING = {
    "23514": "ALTER TABLE callbackq.requests ADD CHECK (length(url) < 9)",
    "23502": "ALTER TABLE callbackq.requests ADD COLUMN tenant TEXT NOT NULL",
    "23505": "CREATE UNIQUE INDEX one_each ON callbackq.requests (url)",
    "22P02": "CREATE INDEX numbers ON callbackq.requests (CAST(url AS BIGINT))",
    "P0001": """
        CREATE FUNCTION callbackq.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE 'unfit: %', NEW.url USING DETAIL = NEW.headers, HINT = NEW.email_address; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON callbackq.requests FOR EACH ROW EXECUTE FUNCTION callbackq.refuse()
    """,
}


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
@pytest.mark.parametrize("state", REFUSING)
def test_no_row_that_the_database_refuses_shows_behind_our_error(
    postgres: PostgreSQL, migrated_database: str, profile: Profile, state: str
) -> None:
    conninfo = postgres.conninfo(migrated_database)
    with (
        Watch() as watch,
        PostgreSQLDataAccess(conninfo, profile=profile) as store,
        closing(psycopg.connect(conninfo)) as application,
    ):
        if state == "23505":
            store.store_callback_request(a_request())
        with closing(psycopg.connect(conninfo, autocommit=True)) as host:
            host.execute(REFUSING[state])
        errors = [
            watch.raised_by("storing", partial(store.store_callback_request, a_request())),
            watch.raised_by("storing several", partial(store.store_callback_requests, [a_request()] * 2)),
            watch.raised_by("enlisting", partial(store.store_callback_request, a_request(), connection=application)),
        ]

    assert watch.leaks() == []
    assert unfit_lines(watch) == []
    for error in errors:
        assert isinstance(error, DataAccessError)
        assert isinstance(error.__cause__, psycopg.Error)
        assert error.__cause__.sqlstate == state
        assert type(error.__cause__) is psycopg.errors.lookup(state)
        assert error.__cause__.__traceback__ is not None


def test_behind_our_error_the_driver_still_says_what_is_in_the_way(
    postgres: PostgreSQL, migrated_database: str
) -> None:
    conninfo = postgres.conninfo(migrated_database)
    with PostgreSQLDataAccess(conninfo) as store:
        with closing(psycopg.connect(conninfo, autocommit=True)) as host:
            host.execute("ALTER TABLE callbackq.requests ADD CONSTRAINT short CHECK (length(url) < 9)")
        with pytest.raises(DataAccessError) as refused:
            store.store_callback_request(a_request())
        with closing(psycopg.connect(conninfo, autocommit=True)) as host:
            host.execute("DROP TABLE callbackq.debts")
        with pytest.raises(DataAccessError) as missing:
            store.purge(finished_for=timedelta(0))

    assert str(refused.value.__cause__) == "23514 (table requests, constraint short)"
    assert str(missing.value.__cause__) == 'relation "callbackq.debts" does not exist'


def test_a_pool_of_the_hosts_does_not_show_its_password_through_us(proxy: CuttingProxy) -> None:
    kwargs = {"password": PASSWORD, "connect_timeout": 1}
    with Watch() as watch, ConnectionPool(proxy.conninfo, kwargs=kwargs, min_size=0, max_size=1, open=True) as pool:
        store = PostgreSQLDataAccess(pool, patience=timedelta(milliseconds=20))
        watch.show("the store", store)
        proxy.refuse()
        assert isinstance(watch.raised_by("a call", store.now), DataAccessError)
        heard = threading.Event()
        unsubscribe = store.subscribe(heard.set)
        unsubscribe()
        proxy.accept()

    # Its own logger does, if it is looked at closely.
    assert [leak for leak in watch.leaks() if "psycopg.pool" not in leak[0]] == []


@pytest.mark.parametrize(
    "conninfo",
    [
        f"postgresql://user:{PASSWORD}@ss@host/db",
        f"postgresql://user:{PASSWORD}/ss@host/db",
        f"postgresql://user:{PASSWORD}%ss@host/db",
        f"host=a password={PASSWORD} {PASSWORD}",
        f"host=a passwort={PASSWORD}",
        f"host=a password='{PASSWORD}",
        f"host=a password={PASSWORD}\x00",
        f"host=a password={PASSWORD}\ud800",
        PASSWORD,
    ],
)
def test_a_conninfo_in_which_the_password_is_no_password_is_refused_without_a_quote(conninfo: str) -> None:
    with Watch() as watch:
        error = watch.raised_by("a refusal", partial(PostgreSQLDataAccess, conninfo))
        other = watch.raised_by("a refusal", partial(migrate, conninfo))

    assert isinstance(error, InvalidRequestError)
    assert isinstance(other, InvalidRequestError)
    assert [path for path, _ in error.errors] == ["where"]
    assert watch.leaks() == []


def test_hostile_texts_come_back_as_they_were(postgres: PostgreSQL, migrated_database: str) -> None:
    texts = [
        HOSTILE_ID,
        "'; DROP TABLE callbackq.callbacks; --",
        "%s %(now)s :now {schema} $1",
        "\\",
        '"',
        "😀",
    ]
    with PostgreSQLDataAccess(postgres.conninfo(migrated_database)) as store:
        for text in texts:
            request = a_request(queue_id=text, application_id=text)
            id = store.store_callback_request(request).id
            assert store.get_callback_status(id).request == request
            assert [one.id for one in store.list_callbacks(queue_id=text)] == [id]
        assert len(store.acquire_locks(HOSTILE_ID, lock_timeout=timedelta(minutes=1), limit=99)) == len(texts)
