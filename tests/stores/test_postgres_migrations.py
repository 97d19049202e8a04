"""How a PostgreSQL database gets its tables: by itself, by hand, by several at a time, in any schema."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from typing import Any

import psycopg
import pytest
from psycopg import sql

from callbackq.errors import DataAccessError, InvalidRequestError, SchemaVersionError
from callbackq.stores.postgres import PostgreSQLDataAccess, migrate, migration_sql
from callbackq.stores.postgres import schema as schemas
from callbackq.stores.postgres.connections import Waits
from callbackq.stores.postgres.schema import NEWEST_VERSION
from callbackq.stores.postgres.transaction import Profile
from callbackq.testing.conformance.base import DELIVERED, LOCK_TIMEOUT, a_request, an_attempt
from callbackq.testing.conformance.concurrency import Child
from support.postgres import PostgreSQL
from support.postgres_faults import CuttingProxy
from support.processes import LIMIT

ODD_NAMES = [
    "Callbacks",
    'quo"ted',
    "with space",
    "order",
    "ä" * 31,
    "x" * 63,
    "{schema}",
    "%s",
    "a.b",
    "'; --",
    ":now",
]


@pytest.fixture
def conninfo(postgres: PostgreSQL, database: str) -> str:
    return postgres.conninfo(database)


def works(store: PostgreSQLDataAccess) -> bool:
    id = store.store_callback_request(a_request(queue_id="queue")).id
    (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=10)
    store.record_attempt(acquired, an_attempt(200), DELIVERED)
    return store.get_callback_status(id).success


def description(conninfo: str, schema: str) -> list[tuple[object, ...]]:
    """Tables, columns, indexes, constraints and settings of a schema, without its name."""
    with psycopg.connect(conninfo) as connection:
        columns = connection.execute(
            "SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name, is_identity "
            "FROM information_schema.columns WHERE table_schema = %s ORDER BY 1, 2",
            [schema],
        ).fetchall()
        indexes = connection.execute(
            "SELECT indexname, replace(indexdef, quote_ident(%s) || '.', '') FROM pg_indexes WHERE schemaname = %s "
            "ORDER BY 1",
            [schema, schema],
        ).fetchall()
        tables = connection.execute(
            "SELECT relname, reloptions FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'r' "
            "ORDER BY 1",
            [sql.Identifier(schema).as_string(None)],
        ).fetchall()
        versions = connection.execute(
            sql.SQL("SELECT version, profile FROM {}.version").format(sql.Identifier(schema))
        ).fetchall()
    return [*columns, *indexes, *tables, *versions]


PROFILES: tuple[Profile, Profile] = ("postgres", "distributed")


@pytest.mark.parametrize("profile", PROFILES)
def test_processes_that_migrate_at_the_same_time_all_succeed(conninfo: str, profile: Profile) -> None:
    all_at_once = get_context("fork").Barrier(4)

    def work(migrates: bool) -> None:
        all_at_once.wait(LIMIT)
        if migrates:
            migrate(conninfo, profile=profile)
        else:
            PostgreSQLDataAccess(conninfo, profile=profile).open()

    for child in [Child(lambda _, number=number: work(number == 0)) for number in range(4)]:  # type: ignore[misc]
        child.finish()

    with PostgreSQLDataAccess(conninfo, profile=profile, may_migrate=False) as store:
        assert works(store)


def test_a_server_that_says_nothing_holds_up_no_migration_for_ever(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "Waits", partial(Waits, 0.1, 0.1))
    migrate(conninfo)
    with psycopg.connect(conninfo) as holder:
        holder.execute("LOCK TABLE callbackq.version IN ACCESS EXCLUSIVE MODE")

        with pytest.raises(DataAccessError, match="gives no answer"):
            migrate(conninfo)


def test_whoever_is_at_the_steps_of_a_migration_is_waited_for_as_long_as_it_takes(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "Waits", partial(Waits, 0.1, 0.1))
    with psycopg.connect(conninfo, autocommit=True) as other:
        other.execute("CREATE SCHEMA callbackq")
        for statement in schemas._VERSION_TABLE:
            other.execute(statement.replace("{schema}", "callbackq").encode())
        other.execute("BEGIN; SELECT FROM callbackq.version FOR UPDATE")
        migrating = threading.Thread(target=migrate, args=[conninfo])
        migrating.start()
        migrating.join(0.7)
        assert migrating.is_alive()
        other.execute("COMMIT")
        migrating.join(LIMIT)

    with PostgreSQLDataAccess(conninfo, may_migrate=False) as store:
        assert works(store)


def test_who_freezes_while_migrating_keeps_nobody_waiting_for_ever(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "_LIMIT_IDLENESS", "SET LOCAL idle_in_transaction_session_timeout = 300")
    run, has_frozen, may_go_on = schemas._run, threading.Event(), threading.Event()
    outcomes: list[BaseException | None] = []

    def freezing(connection: Any, statement: str, *args: Any) -> Any:
        cursor = run(connection, statement, *args)
        if statement == schemas._LOCK_VERSION and threading.current_thread() is frozen:
            has_frozen.set()
            assert may_go_on.wait(LIMIT)
        return cursor

    def migrate_and_freeze() -> None:
        try:
            migrate(conninfo)
        except DataAccessError as error:
            outcomes.append(error)

    monkeypatch.setattr(schemas, "_run", freezing)
    frozen = threading.Thread(target=migrate_and_freeze)
    frozen.start()
    assert has_frozen.wait(LIMIT)

    migrate(conninfo)
    may_go_on.set()
    frozen.join(LIMIT)

    assert len(outcomes) == 1, "the server has ended its session"
    with PostgreSQLDataAccess(conninfo, may_migrate=False) as store:
        assert store.store_callback_request(a_request()).sequence == 1


# What PostgreSQL says to the second of two that create the same thing: a schema, a table, its type, an index's row.
@pytest.mark.parametrize("sqlstate", ["42P06", "42P07", "42710", "23505"])
def test_who_comes_second_to_create_a_table_finds_it(conninfo: str, sqlstate: str) -> None:
    with CuttingProxy(conninfo) as proxy:
        fault = proxy.fail(sqlstate, "^CREATE TABLE IF NOT EXISTS")
        migrate(proxy.conninfo)
        fault.wait()

    with PostgreSQLDataAccess(conninfo, may_migrate=False) as store:
        assert works(store)


@pytest.mark.parametrize("made_by", ["opening", "migrating", "hand"])
@pytest.mark.parametrize(("profile", "other"), [PROFILES, PROFILES[::-1]])
def test_tables_of_the_other_profile_are_refused_and_left_alone(
    conninfo: str, profile: Profile, other: Profile, made_by: str
) -> None:
    with psycopg.connect(conninfo, autocommit=True) as by_hand:
        if made_by == "opening":
            with PostgreSQLDataAccess(conninfo, profile=profile):
                pass
        elif made_by == "migrating":
            migrate(conninfo, profile=profile)
        else:
            by_hand.execute(migration_sql(profile=profile))
        before = description(conninfo, "callbackq")

        for may_migrate in (True, False):
            confused = PostgreSQLDataAccess(conninfo, profile=other, may_migrate=may_migrate)
            for call in (confused.open, confused.next_due, partial(confused.store_callback_request, a_request())):
                with pytest.raises(DataAccessError, match=f"profile='{profile}'"):
                    call()
            confused.close()
        with pytest.raises(DataAccessError, match=f"profile='{profile}'"):
            migrate(conninfo, profile=other)
        by_hand.execute(migration_sql(since=NEWEST_VERSION, profile=other))
        with pytest.raises(psycopg.errors.DuplicateTable):
            by_hand.execute(migration_sql(profile=other))

    assert description(conninfo, "callbackq") == before
    with PostgreSQLDataAccess(conninfo, profile=profile, may_migrate=False) as store:
        assert works(store)


def test_of_two_profiles_that_begin_at_the_same_time_one_is_refused(conninfo: str) -> None:
    all_at_once = get_context("fork").Barrier(4)

    def work(profile: Profile) -> None:
        store = PostgreSQLDataAccess(conninfo, profile=profile)
        all_at_once.wait(LIMIT)
        with suppress(DataAccessError):
            store.open()

    for child in [Child(lambda _, profile=profile: work(profile)) for profile in PROFILES * 2]:  # type: ignore[misc]
        child.finish()

    fitting = []
    for profile in PROFILES:
        store = PostgreSQLDataAccess(conninfo, profile=profile, may_migrate=False)
        with suppress(DataAccessError), store:
            assert works(store)
            fitting.append(profile)
    assert len(fitting) == 1


def test_who_could_not_make_the_tables_has_no_say_in_their_profile(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA callbackq; CREATE TABLE callbackq.debts (in_the_way TEXT)")
        with pytest.raises(DataAccessError, match="refused a statement"):
            migrate(conninfo, profile="distributed")
        connection.execute("DROP TABLE callbackq.debts")

    with PostgreSQLDataAccess(conninfo) as store:
        assert works(store)


@pytest.mark.parametrize("schema", ["callbackq", 'quo"ted %s'])
def test_the_printed_sql_does_the_same(conninfo: str, schema: str) -> None:
    migrate(conninfo, schema="by itself")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(migration_sql(schema=schema))

    assert description(conninfo, schema) == description(conninfo, "by itself")
    with PostgreSQLDataAccess(conninfo, schema=schema, may_migrate=False) as store:
        assert works(store)


def test_migrating_again_changes_nothing(conninfo: str) -> None:
    migrate(conninfo)
    with PostgreSQLDataAccess(conninfo) as store:
        store.store_callback_request(a_request(), id="kept")
    before = description(conninfo, "callbackq")

    migrate(conninfo)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(migration_sql(since=NEWEST_VERSION))

    assert description(conninfo, "callbackq") == before
    with PostgreSQLDataAccess(conninfo) as store:
        assert store.get_callback_status("kept").id == "kept"


def test_a_newer_schema_is_refused_and_left_alone(conninfo: str) -> None:
    migrate(conninfo)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("UPDATE callbackq.version SET version = version + 1")
    before = description(conninfo, "callbackq")

    for may_migrate in (True, False):
        store = PostgreSQLDataAccess(conninfo, may_migrate=may_migrate)
        for call in (store.open, store.now, lambda store=store: store.store_callback_request(a_request())):
            with pytest.raises(SchemaVersionError):
                call()
        store.close()
    with pytest.raises(SchemaVersionError):
        migrate(conninfo)

    assert description(conninfo, "callbackq") == before


def test_a_store_that_may_not_migrate_says_who_should(conninfo: str) -> None:
    with pytest.raises(DataAccessError, match=r"call migrate\(\), or run the SQL of migration_sql\(\)"):
        PostgreSQLDataAccess(conninfo, may_migrate=False).open()
    with psycopg.connect(conninfo) as connection:
        assert connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'callbackq'").fetchall() == []

    migrate(conninfo)

    with PostgreSQLDataAccess(conninfo, may_migrate=False) as store:
        assert works(store)


def test_a_migration_that_fails_leaves_no_half_of_itself(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA callbackq; CREATE TABLE callbackq.mailings (somebody TEXT, elses TEXT)")

    with pytest.raises(DataAccessError, match="refused a statement"):
        PostgreSQLDataAccess(conninfo).open()

    with psycopg.connect(conninfo, autocommit=True) as connection:
        tables = {
            name for (name,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'callbackq'")
        }
        assert tables == {"mailings", "version"}
        connection.execute("DROP TABLE callbackq.mailings")
    with PostgreSQLDataAccess(conninfo) as store:
        assert works(store)


def test_a_user_without_rights_is_told(postgres: PostgreSQL, database: str) -> None:
    if postgres.admin_conninfo() == postgres.conninfo():
        pytest.skip("needs a second user, which only a server of our own has")
    migrate(postgres.admin_conninfo(database), schema="theirs")

    with pytest.raises(DataAccessError, match="refused a right"):
        PostgreSQLDataAccess(postgres.conninfo(database), schema="theirs").open()


def test_stores_in_two_schemas_know_nothing_of_each_other(conninfo: str) -> None:
    with PostgreSQLDataAccess(conninfo, schema="one") as one, PostgreSQLDataAccess(conninfo, schema="two") as two:
        assert one.store_callback_request(a_request(queue_id="queue"), id="a").sequence == 1
        assert two.store_callback_request(a_request(queue_id="queue", method="PUT"), id="a").sequence == 1
        (acquired,) = one.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=10)
        assert acquired.request is not None
        assert acquired.request.method == "POST"
        one.record_attempt(acquired, an_attempt(200), DELIVERED)
        assert one.get_callback_status("a").success
        assert not two.get_callback_status("a").success
        assert len(two.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=10)) == 1


@pytest.fixture(scope="module")
def shared_conninfo(postgres: PostgreSQL) -> Iterator[str]:
    with postgres.database() as name:
        yield postgres.conninfo(name)


def test_what_is_no_profile_is_refused(conninfo: str) -> None:
    odd: Any = "citus"
    for act in lambda: migrate(conninfo, profile=odd), lambda: migration_sql(profile=odd):
        with pytest.raises(InvalidRequestError, match="profile: must be 'postgres' or 'distributed'"):
            act()


@pytest.mark.parametrize("schema", ODD_NAMES)
def test_a_schema_may_have_any_name(shared_conninfo: str, schema: str) -> None:
    with PostgreSQLDataAccess(shared_conninfo, schema=schema) as store:
        assert works(store)

    with psycopg.connect(shared_conninfo) as connection:
        found = connection.execute(
            "SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = 'callbacks'", [schema]
        )
        assert found.fetchall() == [(1,)]


@pytest.mark.parametrize("schema", ["", "x" * 64, "ä" * 32, "a\nb", "a\x00b", "\ud800", None, b"callbackq"])
def test_what_is_no_schemas_name_is_refused(schema: str) -> None:
    for call in (
        lambda: PostgreSQLDataAccess("", schema=schema),
        lambda: migrate("", schema=schema),
        lambda: migration_sql(schema=schema),
    ):
        with pytest.raises(InvalidRequestError) as raised:
            call()
        assert [path for path, _ in raised.value.errors] == ["schema"]
