"""A store in PostgreSQL, for any number of machines. Needs the extra: ``pip install 'callbackq[postgres]'``."""

try:
    import psycopg_pool  # noqa: F401
except ImportError as missing:  # also psycopg's own, when it finds no libpq
    raise type(missing)(
        "callbackq.stores.postgres needs psycopg, its pool, and libpq, of the system or in psycopg[binary]: "
        "pip install 'callbackq[postgres]' 'psycopg[binary]'",
        name=missing.name,
    ) from missing

from callbackq.stores.postgres.schema import migrate, migration_sql
from callbackq.stores.postgres.store import PostgreSQLDataAccess

__all__ = ["PostgreSQLDataAccess", "migrate", "migration_sql"]
