"""A store in PostgreSQL, for any number of machines. Needs the extra: ``pip install 'callbackq[postgres]'``."""

try:
    import psycopg_pool  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "callbackq.stores.postgres needs psycopg and its pool: pip install 'callbackq[postgres]'", name=missing.name
    ) from missing

from callbackq.stores.postgres.schema import migrate, migration_sql
from callbackq.stores.postgres.store import PostgreSQLDataAccess

__all__ = ["PostgreSQLDataAccess", "migrate", "migration_sql"]
