"""The fixtures that tests of several folders share: PostgreSQL, started when the first test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # only tests of PostgreSQL should pay for importing its driver
    from callbackq.stores.postgres.transaction import Profile
    from support.postgres import PostgreSQL, PostgreSQLServer, PostgreSQLServers

_SERVERS = pytest.StashKey["PostgreSQLServers"]()


@pytest.fixture(scope="session")
def postgres_servers(pytestconfig: pytest.Config) -> Iterator[PostgreSQLServers]:
    """What starts servers. Each worker of pytest-xdist has its own, so that none can kill another's."""
    from support.postgres import PostgreSQLServers

    with PostgreSQLServers() as servers:
        pytestconfig.stash[_SERVERS] = servers
        yield servers


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> PostgreSQL:
    """The server that tests share, for as long as none harms it: they have databases of their own."""
    from support.postgres import EXTERNAL, PostgreSQL

    if named := os.environ.get(EXTERNAL):
        return PostgreSQL(named, named)
    servers: PostgreSQLServers = request.getfixturevalue("postgres_servers")
    return servers.start()


@pytest.fixture
def database(postgres: PostgreSQL) -> Iterator[str]:
    """The name of a fresh database on the shared server."""
    with postgres.database() as name:
        yield name


@pytest.fixture(scope="session")
def migrated(postgres: PostgreSQL) -> Iterator[Callable[[Profile], str]]:
    """Gives the name of a database with a profile's tables, to copy: much quicker than making them each time."""
    from callbackq.stores.postgres import migrate

    with ExitStack() as databases:

        @cache
        def migrated(profile: Profile) -> str:
            name = databases.enter_context(postgres.database())
            migrate(postgres.conninfo(name), profile=profile)
            return name

        yield migrated


@pytest.fixture
def profile() -> Profile:
    """The store's, unless a test has it as a parameter."""
    return "postgres"


@pytest.fixture
def migrated_database(postgres: PostgreSQL, migrated: Callable[[Profile], str], profile: Profile) -> Iterator[str]:
    """The name of a fresh database with the store's tables."""
    with postgres.database(migrated(profile)) as name:
        yield name


@pytest.fixture
def start_postgres(request: pytest.FixtureRequest) -> Iterator[Callable[..., PostgreSQLServer]]:
    """Start a server to stop, kill or copy; it and its standbys are gone at the end of the test."""
    from support.postgres import EXTERNAL

    if EXTERNAL in os.environ:
        pytest.skip(f"needs servers of its own to stop and kill: unset {EXTERNAL}")
    servers: PostgreSQLServers = request.getfixturevalue("postgres_servers")
    before = set(servers.started)
    yield servers.start
    for server in set(servers.started) - before:
        server.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the servers wrote that the test may have had to do with."""
    report = yield
    servers = item.config.stash.get(_SERVERS, None)
    if report.failed and servers and "postgres_servers" in getattr(item, "fixturenames", ()):
        report.sections += [(f"log of {server}", server.log_tail()) for server in servers.started]
    return report
