"""The PostgreSQL store keeps every promise of a store."""

from __future__ import annotations

from callbackq.testing import DataAccessConformance
from support.postgres_stores import PostgreSQLHooks


class TestPostgreSQLConformance(PostgreSQLHooks, DataAccessConformance):
    profile = "postgres"
