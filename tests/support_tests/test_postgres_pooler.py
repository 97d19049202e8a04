"""The pooler for tests takes away what pgbouncer takes away in transaction mode, and nothing more."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from itertools import pairwise

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from support.postgres import PostgreSQL, until
from support.postgres_pooler import SwappingPooler
from support.postgres_wire import Message
from support.processes import LIMIT


@pytest.fixture
def conninfo(postgres: PostgreSQL, database: str) -> Iterator[str]:
    with SwappingPooler(postgres.conninfo(database)) as pooler:
        yield pooler.conninfo


@pytest.fixture
def connection(conninfo: str) -> Iterator[psycopg.Connection]:
    """In which each statement is a transaction, and none is prepared unless a test says so."""
    with psycopg.connect(conninfo, autocommit=True, prepare_threshold=None) as connection:
        yield connection


def backend_of(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert row
    return int(row[0])


def test_each_transaction_has_another_backend_than_the_one_before(connection: psycopg.Connection) -> None:
    backends = [backend_of(connection) for _ in range(6)]

    assert all(one != next_one for one, next_one in pairwise(backends))


def test_all_of_a_transaction_has_one_backend(connection: psycopg.Connection) -> None:
    with connection.transaction():
        assert len({backend_of(connection) for _ in range(4)}) == 1
        with connection.pipeline(), connection.transaction():
            first = connection.execute("SELECT pg_backend_pid()")
            second = connection.execute("SELECT pg_backend_pid()")
        assert first.fetchall() == second.fetchall() == [(backend_of(connection),)]


def test_transactions_that_are_sent_at_once_are_all_answered(conninfo: str) -> None:
    parameters = conninfo_to_dict(conninfo)
    named = f"user\0{parameters['user']}\0database\0{parameters['dbname']}\0\0"
    startup = Message(b"", struct.pack("!I", 3 << 16) + named.encode())
    queries = [Message(b"Q", f"SELECT {number}\0".encode()) for number in range(5)]

    with socket.create_connection((str(parameters["host"]), int(parameters["port"] or 0)), timeout=LIMIT) as client:
        client.sendall(b"".join(message.encoded() for message in (startup, *queries)))
        answers = b""
        while answers.count(Message(b"Z", b"I").encoded()) <= len(queries):
            answers += client.recv(1 << 16)

    rows = [Message(b"D", b"\0\1\0\0\0\1" + str(number).encode()).encoded() for number in range(5)]
    assert all(row in answers for row in rows)


def test_what_is_set_in_one_transaction_is_not_seen_in_the_next(connection: psycopg.Connection) -> None:
    connection.execute("SET work_mem = '77MB'")

    assert connection.execute("SHOW work_mem").fetchone() == ("4MB",)


def test_a_lock_of_the_session_is_not_the_clients(connection: psycopg.Connection) -> None:
    connection.execute("SELECT pg_advisory_lock(1)")

    assert connection.execute("SELECT pg_try_advisory_lock(1)").fetchone() == (False,)


def test_a_temporary_table_is_gone_in_the_next_transaction(connection: psycopg.Connection) -> None:
    connection.execute("CREATE TEMPORARY TABLE noted (number integer)")

    with pytest.raises(psycopg.errors.UndefinedTable):
        connection.execute("SELECT * FROM noted")


def test_a_prepared_statement_is_gone_in_the_next_transaction(conninfo: str) -> None:
    # Outside a transaction, psycopg prepares in one and executes in another.
    with (
        psycopg.connect(conninfo, autocommit=True, prepare_threshold=0) as connection,
        pytest.raises(psycopg.errors.InvalidSqlStatementName),
    ):
        connection.execute("SELECT 1")


def test_who_listens_hears_nothing(connection: psycopg.Connection) -> None:
    connection.execute("LISTEN news")
    connection.execute("NOTIFY news")

    assert list(connection.notifies(timeout=0.05)) == []


def test_a_failed_transaction_keeps_its_backend_until_it_is_over(conninfo: str) -> None:
    with psycopg.connect(conninfo, prepare_threshold=None) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1/0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            connection.execute("SELECT 1")
        connection.rollback()

        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_transactions_of_several_clients_run_at_once(conninfo: str) -> None:
    with psycopg.connect(conninfo) as one, psycopg.connect(conninfo) as other:
        assert backend_of(one) != backend_of(other)


def test_a_client_that_leaves_in_a_transaction_rolls_it_back(conninfo: str, connection: psycopg.Connection) -> None:
    connection.execute("CREATE TABLE kept (number integer)")
    leaving = psycopg.connect(conninfo)
    leaving.execute("INSERT INTO kept VALUES (1)")

    leaving.close()

    # Waits until the table is free, which it is once the other transaction is over.
    connection.execute("BEGIN; LOCK TABLE kept; COMMIT")
    assert connection.execute("SELECT * FROM kept").fetchall() == []


def test_a_backend_that_ends_takes_its_client_along(postgres: PostgreSQL, database: str, conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        connection.execute("SELECT 1")

        postgres.terminate_backends(database)

        with pytest.raises(psycopg.errors.AdminShutdown):
            connection.execute("SELECT 1")
    with psycopg.connect(conninfo) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_statement_can_be_cancelled(postgres: PostgreSQL, database: str, conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        errors: list[BaseException] = []

        def wait_for_ever() -> None:
            try:
                connection.execute("SELECT pg_sleep(600)")
            except psycopg.Error as error:
                errors.append(error)

        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        thread = threading.Thread(target=wait_for_ever)
        thread.start()
        asleep = (
            "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND query LIKE '%%pg_sleep(6%%' AND state = 'active'"
        )
        until(lambda: postgres.execute(asleep, database), "the statement to run")

        connection.cancel_safe()

        thread.join()
        assert [type(error) for error in errors] == [psycopg.errors.QueryCanceled]


def test_options_at_the_start_of_a_connection_are_refused(conninfo: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="unsupported startup parameter: options"):
        psycopg.connect(conninfo, options="-c work_mem=77MB")


def test_a_refusal_of_the_server_reaches_the_client(conninfo: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(conninfo, dbname="nowhere")
