"""Which version of the schema a database has, and how it gets the newest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import psycopg

from callbackq.core.validation import Fault, refuse
from callbackq.errors import DataAccessError, SchemaVersionError
from callbackq.stores.postgres import faults
from callbackq.stores.postgres.connections import Waits, connect, conninfo_faults, unlimited
from callbackq.stores.postgres.cursors import execute
from callbackq.stores.postgres.transaction import Profile, with_schema
from callbackq.stores.sql.scripts import load_migrations

__all__ = ["NEWEST_VERSION", "migrate", "migration_sql", "prepare", "profile_faults", "schema_faults"]

_Steps = tuple[tuple[str, ...], ...]

_PORTABLE: Final = load_migrations("callbackq.stores.postgres", "migrations.sql")
_TUNING: Final = load_migrations("callbackq.stores.postgres", "tuning.sql")


def _bytewise(steps: tuple[str, ...], collation: str) -> tuple[str, ...]:
    return tuple(step.replace(" {bytewise}", collation) for step in steps)


_MIGRATIONS: Final[dict[Profile, _Steps]] = {
    "postgres": tuple(
        (*_bytewise(steps, ' COLLATE "C"'), *tuning) for steps, tuning in zip(_PORTABLE, _TUNING, strict=True)
    ),
    # CockroachDB has no such columns, and compares bytes anyway. Elsewhere it is the database's order, everywhere.
    "distributed": tuple(_bytewise(steps, "") for steps in _PORTABLE),
}
NEWEST_VERSION: Final = len(_PORTABLE)

_CREATE_SCHEMA: Final = "CREATE SCHEMA IF NOT EXISTS {schema}"
_SCHEMA_EXISTS: Final = "SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = %(schema)s"
# `store` tells this store from any other; it is the same wherever the database is replicated to. `profile` is that of
# whoever made the tables, NULL before they are there.
_VERSION_TABLE: Final = (
    """CREATE TABLE IF NOT EXISTS {schema}.version (
    one SMALLINT PRIMARY KEY, version BIGINT NOT NULL, store UUID, profile TEXT
)""",
    "INSERT INTO {schema}.version (one, version, store) VALUES (1, 0, gen_random_uuid()) ON CONFLICT (one) DO NOTHING",
)
_TABLE_EXISTS: Final = "SELECT 1 FROM pg_catalog.pg_tables WHERE schemaname = %(schema)s AND tablename = 'version'"
# Locked, so that of several that migrate at the same time one works and the others wait.
_READ_VERSION: Final = "SELECT version, profile FROM {schema}.version WHERE one = 1"
_LOCK_VERSION: Final = _READ_VERSION + " FOR UPDATE"
_SET_VERSION: Final = (
    "UPDATE {schema}.version SET version = %(version)s, profile = coalesce(profile, %(profile)s) WHERE one = 1"
)
# Two that create the same table at the same time: one of them finds a name taken, however it asked.
_CREATED_MEANWHILE: Final = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.DuplicateSchema,
    psycopg.errors.DuplicateTable,
    psycopg.errors.DuplicateObject,  # a table's name is that of a type, too
    psycopg.errors.SerializationFailure,
)
_TRIES: Final = 5
_LIMIT_IDLENESS: Final = "SET LOCAL idle_in_transaction_session_timeout = 60000"


def schema_faults(schema: object) -> Iterator[Fault]:
    """Say what is wrong with a schema's name."""
    if not isinstance(schema, str) or not schema.isprintable() or not 1 <= len(schema.encode("utf-8", "replace")) <= 63:
        yield "schema", "must be a name of 1 to 63 bytes without control characters"


def profile_faults(profile: object) -> Iterator[Fault]:
    """Say what is wrong with a profile."""
    if not isinstance(profile, str) or profile not in _MIGRATIONS:
        yield "profile", "must be 'postgres' or 'distributed'"


def migration_sql(*, schema: str = "callbackq", since: int = 0, profile: Profile = "postgres") -> str:
    """
    Write the SQL that `migrate` runs, for whoever must run it by hand.

    Args:
        schema: where the tables are to be.
        since: the version the database has; 0 for none.
        profile: the store's. It is kept with the tables, once and for all.

    Raises:
        InvalidRequestError: the schema can't have that name, or there is no such profile.
    """
    refuse([*schema_faults(schema), *profile_faults(profile)])
    steps = [_CREATE_SCHEMA, *_VERSION_TABLE] if since == 0 else []
    steps += [step for steps in _MIGRATIONS[profile][since:] for step in steps]
    steps.append(_SET_VERSION.replace("%(version)s", str(NEWEST_VERSION)).replace("%(profile)s", f"'{profile}'"))
    return "".join(f"{with_schema(step, schema)};\n\n" for step in steps)


def migrate(conninfo: str, *, schema: str = "callbackq", profile: Profile = "postgres") -> None:
    """
    Bring a database to the newest version of the schema. Idempotent; several may do it at the same time.

    `PostgreSQLDataAccess.open` does it by itself, unless told not to: for a user without the right to create tables.

    Args:
        conninfo: the database, and a user who may create tables in the schema, and the schema if there is none.
        schema: where the tables are to be.
        profile: the store's.

    Raises:
        InvalidRequestError: that is no connection string, the schema can't have that name, or there is no such profile.
        SchemaVersionError: a newer release has been at work; nothing was changed.
        DataAccessError: the server can't be reached, or refused a right; or the tables there are of the other profile.
    """
    refuse([*conninfo_faults("conninfo", conninfo), *schema_faults(schema), *profile_faults(profile)])
    try:
        with connect(conninfo, Waits()) as connection:
            prepare(connection, schema=schema, profile=profile, may_migrate=True)
    except psycopg.Error as error:
        faults.raise_ours(error, nothing_written=False)


def prepare(connection: psycopg.Connection[Any], *, schema: str, profile: Profile, may_migrate: bool) -> None:
    """
    See to it that a database has the newest version.

    Raises:
        SchemaVersionError: it has a newer one.
        DataAccessError: it has an older one, and may not be migrated; or its tables are of the other profile.
    """
    version, found = _version(connection, schema)
    if version > NEWEST_VERSION:
        raise SchemaVersionError(version, NEWEST_VERSION)
    _check_profile(found, profile)
    if version == NEWEST_VERSION:
        return
    if not may_migrate:
        raise DataAccessError(
            f"the schema has version {version}, this release needs {NEWEST_VERSION}: call migrate(), or run the SQL of "
            "migration_sql()"
        )
    for tries_left in reversed(range(_TRIES)):
        try:
            _migrate(connection, schema, profile)
            return
        except _CREATED_MEANWHILE:
            if not tries_left:
                raise


def _version(connection: psycopg.Connection[Any], schema: str) -> tuple[int, str | None]:
    if not execute(connection, _TABLE_EXISTS, {"schema": schema}).fetchone():
        return 0, None
    return _run(connection, _READ_VERSION, schema).fetchone() or (0, None)


def _check_profile(found: str | None, wanted: Profile) -> None:
    # One would search heads where the other has none, and take them by rules that the other doesn't keep.
    if found not in (None, wanted):
        raise DataAccessError(
            f"the tables there were made for another profile than {wanted!r}: open the store with profile={found!r}, "
            "or give it another schema"
        )


def _migrate(connection: psycopg.Connection[Any], schema: str, profile: Profile) -> None:
    # It says IF NOT EXISTS, and yet asks for the right to create schemas also when there is one.
    if not execute(connection, _SCHEMA_EXISTS, {"schema": schema}).fetchone():
        _run(connection, _CREATE_SCHEMA, schema)
    for statement in _VERSION_TABLE:
        _run(connection, statement, schema)
    with connection.transaction():
        # Whoever freezes here must not keep the others from opening the store for ever.
        _run(connection, _LIMIT_IDLENESS, schema)
        with unlimited(connection):  # others may be at their steps
            ((version, found),) = _run(connection, _LOCK_VERSION, schema).fetchall()
        _check_profile(found, profile)
        for steps in _MIGRATIONS[profile][version:]:
            for step in steps:
                with unlimited(connection):
                    _run(connection, step, schema)
        if version < NEWEST_VERSION:
            _run(connection, _SET_VERSION, schema, {"version": NEWEST_VERSION, "profile": profile})


def _run(
    connection: psycopg.Connection[Any], statement: str, schema: str, values: dict[str, object] | None = None
) -> psycopg.Cursor[Any]:
    return execute(connection, with_schema(statement, schema, with_values=True), values or {})
