"""What a PostgreSQL database gets: tables, their settings, a view for people; and with which rights that works."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql

from callbackq.core.lifecycle import Action
from callbackq.dispatcher import Dispatcher
from callbackq.errors import DataAccessError
from callbackq.stores.postgres import PostgreSQLDataAccess, migrate, migration_sql
from callbackq.stores.postgres.transaction import Profile
from callbackq.testing import RecordingNotifier, ScriptedTransport
from callbackq.testing.conformance.base import DELIVERED, LOCK_TIMEOUT, a_request, an_attempt
from support.pages import DOCS, blocks_of
from support.postgres import PostgreSQL

SEVERAL_MACHINES = DOCS / "howto" / "several-machines.md"
VACUUM = {
    "autovacuum_vacuum_scale_factor=0.01",
    "autovacuum_vacuum_threshold=500",
    "autovacuum_vacuum_cost_delay=0",
}


@pytest.fixture
def conninfo(postgres: PostgreSQL, database: str) -> str:
    return postgres.conninfo(database)


@pytest.fixture
def user(postgres: PostgreSQL, database: str) -> Iterator[str]:
    """One who may connect, and nothing else."""
    name = f"app_{secrets.token_hex(6)}"
    identifier = sql.Identifier(name)
    postgres.execute(sql.SQL("CREATE ROLE {} LOGIN").format(identifier))
    yield name
    postgres.execute(sql.SQL("DROP OWNED BY {}").format(identifier), dbname=database)
    postgres.execute(sql.SQL("DROP ROLE {}").format(identifier))


def settings_of_tables(conninfo: str) -> dict[str, set[str]]:
    with closing(psycopg.connect(conninfo)) as connection:
        rows = connection.execute(
            "SELECT relname, reloptions FROM pg_class WHERE relnamespace = 'callbackq'::regnamespace AND relkind = 'r'"
        )
        return {name: set(options or ()) for name, options in rows}


def test_hot_tables_are_vacuumed_early_and_without_pauses(conninfo: str) -> None:
    migrate(conninfo)

    settings = settings_of_tables(conninfo)

    assert settings["callbacks"] == settings["queues"] == VACUUM | {"fillfactor=70"}


def test_other_engines_are_spared_settings_of_tables(conninfo: str) -> None:
    with PostgreSQLDataAccess(conninfo, profile="distributed") as store:
        store.open()

    assert settings_of_tables(conninfo)["callbacks"] == set()
    assert not any(settings_of_tables(conninfo).values())
    assert "autovacuum" in migration_sql()
    assert "SET (" not in migration_sql(profile="distributed")


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
def test_the_overview_says_in_words_and_times_what_there_is(conninfo: str, profile: Profile) -> None:
    with PostgreSQLDataAccess(conninfo, profile=profile) as store:
        store.store_callback_requests([a_request(queue_id="queue")] * 2, ids=["first", "second"])
        (first,) = store.acquire_locks("alpha", lock_timeout=LOCK_TIMEOUT, limit=9)
        store.store_callback_requests([a_request(), a_request()], ids=["done", "cancelled"])
        store.request_transition("cancelled", Action.CANCEL)
        (done,) = store.acquire_locks("beta", lock_timeout=LOCK_TIMEOUT, limit=9)
        store.record_attempt(done, an_attempt(), DELIVERED)
        statuses = {one.id: one for one in store.list_callbacks()}

    columns = "id, queue, number, state, due, behind, machine, attempts, failed_reason"
    with closing(psycopg.connect(conninfo)) as connection:
        seen = {row[0]: row[1:] for row in connection.execute(f"SELECT {columns} FROM callbackq.overview")}
        finished = dict(connection.execute("SELECT id, finished IS NOT NULL FROM callbackq.overview").fetchall())

    waiting = statuses["second"]
    assert seen == {
        "first": ("queue", 1, "locked", first.lock.timeout, None, "alpha", 0, None),
        "second": ("queue", 2, "waiting", waiting.next_attempt_at, "first", None, 0, None),
        "done": (None, 1, "succeeded", None, None, None, 1, None),
        "cancelled": (None, 1, "cancelled", None, None, None, 0, None),
    }
    assert finished == {"first": False, "second": False, "done": True, "cancelled": True}


def test_a_user_without_the_right_to_create_is_told_so_and_told_what_to_do(
    postgres: PostgreSQL, database: str, user: str
) -> None:
    with pytest.raises(DataAccessError, match=r"refused a right: .* open\(\) to create them"):
        PostgreSQLDataAccess(postgres.conninfo(database, user=user)).open()
    with pytest.raises(DataAccessError, match=r"call migrate\(\), or run the SQL of migration_sql\(\)"):
        PostgreSQLDataAccess(postgres.conninfo(database, user=user), may_migrate=False).open()


def test_the_documented_rights_are_enough(postgres: PostgreSQL, database: str, user: str) -> None:
    (rights,) = [block.text for block in blocks_of(SEVERAL_MACHINES) if block.kind == "sql" and "GRANT" in block.text]
    with closing(psycopg.connect(postgres.conninfo(database), autocommit=True)) as connection:
        connection.execute(migration_sql())
        connection.execute(rights.replace("shop_app", user))

    with PostgreSQLDataAccess(postgres.conninfo(database, user=user), may_migrate=False) as store:
        store.store_callback_request(a_request(queue_id="queue", notification_email_address="ops@example.com"))
        Dispatcher(store, transport=ScriptedTransport([500]), notifier=RecordingNotifier()).run_until_idle()
        assert store.purge(finished_for=timedelta(0)) == 1


def test_what_the_how_to_asks_the_database_can_be_asked(conninfo: str) -> None:
    questions = [block.text for block in blocks_of(SEVERAL_MACHINES) if block.kind == "sql" and "SELECT" in block.text]
    questions = [text for text in questions if "GRANT" not in text]
    migrate(conninfo)

    with closing(psycopg.connect(conninfo, autocommit=True)) as connection:
        found = [connection.execute(question).fetchall() for question in questions]

    assert len(found) == 3
    assert {"callbacks", "queues"} <= {row[0] for row in found[-1]}


def test_tables_can_be_created_in_a_schema_that_is_there_without_the_right_to_create_schemas(
    postgres: PostgreSQL, database: str, user: str
) -> None:
    with closing(psycopg.connect(postgres.admin_conninfo(database), autocommit=True)) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA hooks AUTHORIZATION {}").format(sql.Identifier(user)))

    with PostgreSQLDataAccess(postgres.conninfo(database, user=user), schema="hooks") as store:
        store.store_callback_request(a_request(), id="stored")

        assert [status.id for status in store.list_callbacks()] == ["stored"]


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
def test_sizes_may_be_larger_than_any_number_of_the_database(conninfo: str, profile: Profile) -> None:
    with PostgreSQLDataAccess(conninfo, profile=profile) as store:
        store.store_callback_request(a_request(queue_id="queue"), id="stored")

        for queue in (None, "queue"):
            assert [one.id for one in store.list_callbacks(queue_id=queue, page_size=10**30)] == ["stored"]
        assert [one.id for one in store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=10**30)] == ["stored"]
        assert store.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=10**30) == []
        assert store.purge(finished_for=timedelta(0), limit=10**30) == 0
