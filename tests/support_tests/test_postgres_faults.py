"""The accidents that the proxy has happen as said, and leave on the server what they would leave in earnest."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator

import psycopg
import pytest

from support.postgres import PostgreSQL
from support.postgres_faults import CuttingProxy
from support.processes import LIMIT

pytestmark = pytest.mark.thorough

SSL_REQUEST = struct.pack("!II", 8, 80877103)


@pytest.fixture
def proxy(postgres: PostgreSQL, database: str) -> Iterator[CuttingProxy]:
    with psycopg.connect(postgres.conninfo(database), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (number integer)")
    with CuttingProxy(postgres.conninfo(database)) as proxy:
        yield proxy


@pytest.fixture
def connection(proxy: CuttingProxy) -> Iterator[psycopg.Connection]:
    with psycopg.connect(proxy.conninfo) as connection:
        yield connection


@pytest.fixture
def direct(postgres: PostgreSQL, database: str) -> Iterator[psycopg.Connection]:
    """A connection that nothing happens to."""
    with psycopg.connect(postgres.conninfo(database), autocommit=True) as connection:
        yield connection


def numbers(connection: psycopg.Connection) -> list[int]:
    return [number for (number,) in connection.execute("SELECT number FROM kept ORDER BY number")]


def insert(connection: psycopg.Connection, number: int) -> None:
    connection.execute("INSERT INTO kept VALUES (%s)", [number])


def test_without_a_fault_nothing_happens(
    proxy: CuttingProxy, connection: psycopg.Connection, direct: psycopg.Connection
) -> None:
    insert(connection, 1)
    connection.commit()

    assert numbers(direct) == [1]
    assert proxy.statements == ["BEGIN", "INSERT INTO kept VALUES ($1)", "COMMIT"]


# Lost connections.


def test_cut_before_commit_commits_nothing(
    proxy: CuttingProxy, connection: psycopg.Connection, direct: psycopg.Connection
) -> None:
    fault = proxy.cut_before()
    insert(connection, 1)

    with pytest.raises(psycopg.OperationalError):
        connection.commit()

    fault.wait()
    assert connection.broken
    assert numbers(direct) == []


def test_cut_after_commit_has_committed(
    proxy: CuttingProxy, connection: psycopg.Connection, direct: psycopg.Connection
) -> None:
    fault = proxy.cut_after()
    insert(connection, 1)

    with pytest.raises(psycopg.OperationalError):
        connection.commit()

    fault.wait()
    assert connection.broken
    assert numbers(direct) == [1]


def insert_in_pipeline(connection: psycopg.Connection, *all_numbers: int) -> None:
    with connection.pipeline(), connection.transaction():
        for number in all_numbers:
            insert(connection, number)


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_cut_finds_the_commit_of_a_pipeline(
    proxy: CuttingProxy, connection: psycopg.Connection, direct: psycopg.Connection, cut: str
) -> None:
    fault = getattr(proxy, cut)()

    with pytest.raises(psycopg.OperationalError):
        insert_in_pipeline(connection, 1, 2)

    fault.wait()
    assert numbers(direct) == ([] if cut == "cut_before" else [1, 2])


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_cut_finds_a_statement_that_commits_itself(proxy: CuttingProxy, direct: psycopg.Connection, cut: str) -> None:
    fault = getattr(proxy, cut)("INSERT", nth=2)

    with psycopg.connect(proxy.conninfo, autocommit=True) as connection:
        insert(connection, 1)
        with pytest.raises(psycopg.OperationalError):
            insert(connection, 2)

    fault.wait()
    assert numbers(direct) == ([1] if cut == "cut_before" else [1, 2])


def test_cut_finds_a_statement_that_was_prepared_before(proxy: CuttingProxy, direct: psycopg.Connection) -> None:
    with psycopg.connect(proxy.conninfo, autocommit=True, prepare_threshold=0) as connection:
        insert(connection, 1)
        fault = proxy.cut_before("INSERT")
        with pytest.raises(psycopg.OperationalError):
            insert(connection, 2)

    fault.wait()
    assert fault.statements == ["INSERT INTO kept VALUES ($1)"]
    assert numbers(direct) == [1]


def test_a_fault_happens_once_and_the_next_connection_is_well(
    proxy: CuttingProxy, connection: psycopg.Connection, direct: psycopg.Connection
) -> None:
    proxy.cut_before()
    insert(connection, 1)
    with pytest.raises(psycopg.OperationalError):
        connection.commit()

    with psycopg.connect(proxy.conninfo) as again:
        insert(again, 2)

    assert numbers(direct) == [2]


def test_all_connections_are_cut_at_once(proxy: CuttingProxy) -> None:
    with psycopg.connect(proxy.conninfo) as one, psycopg.connect(proxy.conninfo) as other:
        proxy.cut_all()

        for connection in (one, other):
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")


def test_new_connections_are_refused_until_they_are_accepted_again(
    proxy: CuttingProxy, connection: psycopg.Connection
) -> None:
    proxy.refuse()

    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(proxy.conninfo)
    assert connection.execute("SELECT 1").fetchone() == (1,)

    proxy.accept()
    psycopg.connect(proxy.conninfo).close()


@pytest.mark.parametrize("sqlstate", ["57P03", "53300"])
def test_new_connections_are_refused_with_an_error_as_a_full_or_starting_server_does(
    proxy: CuttingProxy, sqlstate: str
) -> None:
    proxy.refuse_with(sqlstate)

    with pytest.raises(psycopg.OperationalError, match="FATAL"):
        psycopg.connect(proxy.conninfo)

    proxy.accept()
    psycopg.connect(proxy.conninfo).close()


def test_nothing_passes_a_stalled_proxy_and_all_of_it_afterwards(
    proxy: CuttingProxy, connection: psycopg.Connection, direct: psycopg.Connection
) -> None:
    connection.execute("LISTEN news")
    connection.commit()

    proxy.stall()

    direct.execute("NOTIFY news")
    with socket.create_connection((connection.info.host, connection.info.port)) as new:
        new.sendall(SSL_REQUEST)
        assert select.select([connection.fileno(), new.fileno()], [], [], 0.1)[0] == []
        proxy.resume()
        assert select.select([new], [], [], LIMIT)[0] == [new]
    assert [heard.channel for heard in connection.notifies(timeout=LIMIT, stop_after=1)] == ["news"]


# Errors.


def test_failed_statement_was_not_executed_and_its_transaction_takes_no_more(
    proxy: CuttingProxy, connection: psycopg.Connection, direct: psycopg.Connection
) -> None:
    fault = proxy.fail("40001", "INSERT", nth=2)
    insert(connection, 1)

    with pytest.raises(psycopg.errors.SerializationFailure):
        insert(connection, 2)

    fault.wait()
    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        connection.execute("SELECT 1")
    connection.rollback()
    insert(connection, 3)
    connection.commit()
    assert numbers(direct) == [3]


@pytest.mark.parametrize(
    ("sqlstate", "error"),
    [("40001", psycopg.errors.SerializationFailure), ("40P01", psycopg.errors.DeadlockDetected)],
)
def test_failed_commit_has_rolled_back(
    proxy: CuttingProxy,
    connection: psycopg.Connection,
    direct: psycopg.Connection,
    sqlstate: str,
    error: type[psycopg.Error],
) -> None:
    fault = proxy.fail(sqlstate, "^COMMIT")
    insert(connection, 1)

    with pytest.raises(error):
        connection.commit()

    fault.wait()
    assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert numbers(direct) == []
    insert(connection, 2)
    connection.commit()
    assert numbers(direct) == [2]


def test_real_failed_commit_looks_the_same(direct: psycopg.Connection, connection: psycopg.Connection) -> None:
    direct.execute("CREATE TABLE once (number integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    connection.execute("INSERT INTO once VALUES (1), (1)")

    with pytest.raises(psycopg.errors.UniqueViolation):
        connection.commit()

    assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_failed_pipeline_is_rolled_back_as_a_whole(
    proxy: CuttingProxy, connection: psycopg.Connection, direct: psycopg.Connection
) -> None:
    for pattern in ("INSERT", "^COMMIT"):
        fault = proxy.fail("40001", pattern)

        with pytest.raises(psycopg.errors.SerializationFailure):
            insert_in_pipeline(connection, 1, 2)

        fault.wait()
        assert numbers(direct) == []
    insert_in_pipeline(connection, 3)
    assert numbers(direct) == [3]


def test_what_follows_a_failed_statement_in_its_pipeline_is_not_executed(
    proxy: CuttingProxy, connection: psycopg.Connection
) -> None:
    fault = proxy.fail("40001", "INSERT", times=2)

    for number in (1, 2):
        with pytest.raises(psycopg.errors.SerializationFailure):
            insert_in_pipeline(connection, number, 10)

    fault.wait()
    assert [statement for statement in proxy.statements if "INSERT" in statement] == fault.statements


def test_fault_happens_as_often_as_it_should(proxy: CuttingProxy, direct: psycopg.Connection) -> None:
    fault = proxy.fail("40P01", "INSERT", times=3)

    with psycopg.connect(proxy.conninfo, autocommit=True) as connection:
        for _ in range(3):
            with pytest.raises(psycopg.errors.DeadlockDetected):
                insert(connection, 1)
        insert(connection, 2)

    fault.wait()
    assert numbers(direct) == [2]


@pytest.mark.parametrize(
    ("sqlstate", "error"),
    [("57P01", psycopg.errors.AdminShutdown), ("08006", psycopg.errors.ConnectionFailure)],
)
def test_error_that_ends_the_session_ends_the_connection(
    proxy: CuttingProxy,
    connection: psycopg.Connection,
    direct: psycopg.Connection,
    sqlstate: str,
    error: type[psycopg.Error],
) -> None:
    fault = proxy.fail(sqlstate, "^COMMIT")
    insert(connection, 1)

    with pytest.raises(error):
        connection.commit()

    fault.wait()
    assert connection.broken
    assert numbers(direct) == []


def test_fault_that_never_happens_fails_the_test(proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = proxy.cut_before()
    monkeypatch.setattr("support.postgres_faults.LIMIT", 0)

    with pytest.raises(AssertionError, match="never happened"):
        fault.wait()
