"""Which version of the schema a database has, and how it gets the newest."""

from __future__ import annotations

from typing import Final

from callbackq.errors import DataAccessError, SchemaVersionError
from callbackq.stores.sql.scripts import load_migrations
from callbackq.stores.sqlite.transaction import SQLiteTransaction

__all__ = ["NEWEST_VERSION", "check_version", "migrate"]

_MIGRATIONS: Final = load_migrations("callbackq.stores.sqlite", "migrations.sql")
NEWEST_VERSION: Final = len(_MIGRATIONS)

_APPLICATION_ID: Final = int.from_bytes(b"cbkq")


def check_version(transaction: SQLiteTransaction) -> int:
    """
    Find the version of a database; 0 before its first migration.

    The version is kept in a table of ours, since the file, and with it ``PRAGMA user_version``, may be the
    application's.

    Raises:
        SchemaVersionError: a newer release has been at work.
    """
    if not transaction.value("schema_exists"):
        return 0
    version = transaction.value("store")
    if not isinstance(version, int):
        raise DataAccessError("the table callbackq_store has lost its row: restore a backup")
    if version > NEWEST_VERSION:
        raise SchemaVersionError(version, NEWEST_VERSION)
    return version


def migrate(transaction: SQLiteTransaction) -> None:
    """Bring a database to the newest version, within the caller's write transaction."""
    version = check_version(transaction)
    if version == NEWEST_VERSION:
        return
    # For tools that look at files. A database that the application keeps tables in is not ours to label.
    is_ours = (
        transaction.value("application_id") == _APPLICATION_ID if version else not transaction.value("other_tables")
    )
    if is_ours:
        transaction.script([f"PRAGMA application_id = {_APPLICATION_ID}", f"PRAGMA user_version = {NEWEST_VERSION}"])
    for statements in _MIGRATIONS[version:]:
        transaction.script(statements)
    transaction.run("set_schema_version", {"version": NEWEST_VERSION})
