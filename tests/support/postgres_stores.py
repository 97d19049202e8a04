"""PostgreSQL stores for tests: databases that are migrated already, and the conformance suite's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import psycopg
import pytest

from callbackq.dataaccess import DataAccess
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.stores.postgres.transaction import Profile
from callbackq.testing import FakeClock
from callbackq.testing.conformance.base import Conformance
from support.postgres import PostgreSQL
from support.postgres_faults import CuttingProxy
from support.postgres_portable import unportable

__all__ = ["TABLES", "ConflictingHooks", "PostgreSQLHooks", "empty", "out_of_reach"]

TABLES = ("queues", "callbacks", "requests", "history", "mailings", "debts")


def empty(server: PostgreSQL, database: str) -> None:
    """Delete all rows: many times faster than making a database."""
    server.execute("; ".join(f"DELETE FROM callbackq.{table}" for table in TABLES), dbname=database)


@contextmanager
def out_of_reach(server: PostgreSQL, database: str) -> Iterator[None]:
    """Let nobody connect to a database, nor stay connected."""
    allow = f"ALTER DATABASE {database} ALLOW_CONNECTIONS"
    server.execute(f"{allow} false")
    server.terminate_backends(database)
    try:
        yield
    finally:
        server.execute(f"{allow} true")


class PostgreSQLHooks(Conformance):
    """For the suite, or a part of it, on a database of the shared server."""

    profile: ClassVar[Profile]
    server: ClassVar[PostgreSQL]
    database: ClassVar[str]

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _database(
        request: pytest.FixtureRequest, postgres: PostgreSQL, migrated: Callable[[Profile], str]
    ) -> Iterator[None]:
        # For the class: it is there before `setup_method`, and emptied many times faster than it is made.
        with postgres.database(migrated(request.cls.profile)) as name:
            request.cls.server, request.cls.database = postgres, name
            yield

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        empty(self.server, self.database)
        return self.reopen(None, clock)

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        return PostgreSQLDataAccess(self.server.conninfo(self.database), profile=self.profile, clock=clock)

    @contextmanager
    def application_transaction(self, data_access: DataAccess) -> Iterator[psycopg.Connection[Any]]:
        connection = psycopg.connect(self.server.conninfo(self.database))
        try:
            yield connection
        finally:
            # Not as its own context manager, which would commit.
            connection.close()

    @contextmanager
    def outage(self, data_access: DataAccess) -> Iterator[None]:
        with out_of_reach(self.server, self.database):
            yield


class ConflictingHooks(PostgreSQLHooks):
    """
    For the suite while others are in the way now and then, often early in a test, of whatever statement.

    Not on the application's connections: it is the application that repeats its transactions.
    """

    proxy: ClassVar[CuttingProxy]

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _proxy(request: pytest.FixtureRequest, _database: None) -> Iterator[None]:
        with CuttingProxy(request.cls.server.conninfo(request.cls.database)) as request.cls.proxy:
            yield
            # Also what is no named statement.
            executed = set(request.cls.proxy.statements)
            assert executed
            if request.cls.profile == "distributed":
                assert {statement: wrong for statement in executed if (wrong := unportable(statement))} == {}

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        store = super().make_data_access(clock)
        for nth in (2, 6, 13, 27, 55, 111, 223):
            self.proxy.fail("40001", nth=nth)
        return store

    def teardown_method(self, method: object = None) -> None:
        self.proxy.forget()
        super().teardown_method(method)

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        return PostgreSQLDataAccess(self.proxy.conninfo, profile=self.profile, clock=clock)
