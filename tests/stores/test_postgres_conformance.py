"""The PostgreSQL store keeps every promise of a store."""

from __future__ import annotations

from support.postgres_stores import PostgreSQLConformance


class TestPostgreSQLConformance(PostgreSQLConformance):
    profile = "postgres"
