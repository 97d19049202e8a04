"""
Connections and transactions: how an operation becomes one transaction, and what happens when it can't.

A transaction is short, and keeps nothing in a session that another needs: no settings, no advisory locks. So it may run
on any connection, also behind a pooler that gives each transaction another one. Statements are prepared where a
connection leads to one session for certain, and only because that is quicker.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar, cast

import psycopg
from psycopg import sql
from psycopg.pq import PipelineStatus, TransactionStatus
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from callbackq.clock import Clock
from callbackq.errors import DataAccessError, InvalidRequestError, TransientDataAccessError
from callbackq.stores.postgres import faults
from callbackq.stores.postgres.connections import Connections, all_in_use, committing
from callbackq.stores.postgres.cursors import execute
from callbackq.stores.postgres.transaction import PostgreSQLTransaction, Profile, Statement, load, with_schema
from callbackq.stores.sql.instants import microseconds

__all__ = ["Database", "Enlisted"]

_T = TypeVar("_T")

_TRIES: Final = 10
# Where the time of a clock for tests begins: no wall time, which such a clock steps.
_TEST_ERA_US: Final = microseconds(datetime(2026, 1, 1, tzinfo=UTC))
_STORE: Final = "SELECT CAST(store AS TEXT), current_setting('lock_timeout') FROM {schema}.version WHERE one = 1"
_BEGIN: Final[dict[Profile, str]] = {
    "postgres": "BEGIN ISOLATION LEVEL READ COMMITTED; ",
    "distributed": "BEGIN ISOLATION LEVEL SERIALIZABLE; ",
}
# For a client that freezes in the middle: the server ends its session. Then others get its rows, and what it might have
# looked at can be cleaned up.
_IDLE_LIMIT: Final = "SET LOCAL idle_in_transaction_session_timeout = {idle}; "
_LIMITS: Final = "SET LOCAL lock_timeout = {patience}; " + _IDLE_LIMIT
_BEGIN_READING: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; " + _IDLE_LIMIT
_LEAST_IDLE_MS: Final = 1_000


class Database:
    """
    Run operations in transactions.

    Args:
        connect: makes where connections come from; called again after a close, and in a forked process.
        schema: where our tables are.
        profile: what the server understands.
        patience: how long to wait for other transactions.
        clock: where time comes from; ``None`` for the server's.
        prepare: called once, before the first transaction.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], Connections],
        schema: str,
        profile: Profile,
        patience: timedelta,
        clock: Clock | None,
        prepare: Callable[[psycopg.Connection[Any]], None],
    ) -> None:
        self._connect = connect
        self.patience_ms = max(patience // timedelta(milliseconds=1), 1)
        self._clock = clock
        self._prepare = prepare
        self.statements = load(schema, profile)
        self._which_store = with_schema(_STORE, schema)
        idle = max(self.patience_ms, _LEAST_IDLE_MS)
        limits = _LIMITS.format(patience=self.patience_ms, idle=idle)
        self._begin_reading = _BEGIN_READING.format(idle=idle)
        self._begin = _BEGIN[profile] + limits + self.statements["now"].text
        self._forget()

    def _forget(self) -> None:
        self._connections: Connections | None = None
        self._is_prepared = False
        self._store: str | None = None
        # Two threads that open at the same time would leave the connections of one behind.
        self._opening = threading.Lock()
        self._pid = os.getpid()

    def open(self) -> None:
        """Connect, and prepare the database, unless that has been done."""
        self._persistently(self._open, is_repeatable=True)

    def _open(self) -> Connections:
        self._notice_fork()
        with self._alone():
            if self._connections is None:
                self._connections = self._connect()
            if not self._is_prepared:
                with self._connections.lend() as connection:
                    try:
                        self._prepare(connection)
                        ((self._store, _),) = _execute_all(connection, self._which_store)
                    except psycopg.Error as error:
                        faults.raise_ours(error, nothing_written=True)
                self._is_prepared = True
            return self._connections

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads from opening and closing meanwhile."""
        if not self._opening.acquire(timeout=self.patience_ms / 1000):
            raise TransientDataAccessError(
                "another thread has been opening the store for too long: it waits for the server"
            )
        try:
            yield
        finally:
            self._opening.release()

    def close(self) -> None:
        """Close the connections that are ours."""
        self._notice_fork()
        with self._alone():
            connections, self._connections = self._connections, None
            self._is_prepared = False
        if connections is not None:
            connections.close()

    def connect(self) -> psycopg.Connection[Any]:
        """Connect once more, for whoever keeps the connection. May raise anything."""
        return self._open().connect()

    def write(self, operation: Callable[[PostgreSQLTransaction, int], _T], **constants: object) -> _T:
        """
        Run an operation in a transaction, with the time, and return when that is durable.

        An operation that others were in the way of is run again. It must do nothing but return what it found.
        """
        return self._persistently(lambda: self._write_once(operation, constants))

    def read(self, operation: Callable[[PostgreSQLTransaction], _T], **constants: object) -> _T:
        """Run an operation that sees the database as of one moment."""

        def read_once() -> _T:
            with self._connection() as connection:
                try:
                    execute(connection, self._begin_reading)
                    result = operation(self._transaction(connection, constants))
                    execute(connection, "COMMIT")
                except BaseException as error:
                    _roll_back(connection)
                    if isinstance(error, psycopg.Error):
                        faults.raise_ours(error, nothing_written=True)
                    raise
                return result

        return self._persistently(read_once)

    def at_once(self, operation: Callable[[PostgreSQLTransaction], _T], /, *, writes: bool = False) -> _T:
        """
        Run an operation of one statement, which is a transaction in itself and may be run again.

        When the connection breaks, nobody knows whether it was written: the error is no TransientDataAccessError.
        """

        def run_once() -> _T:
            with self._connection() as connection:
                try:
                    with committing(connection) if writes else nullcontext():
                        return operation(self._transaction(connection, {}))
                except psycopg.Error as error:
                    faults.raise_ours(error, nothing_written=faults.is_undone(error))

        return self._persistently(run_once, is_repeatable=True)

    def at_once_within_limits(self, operation: Callable[[PostgreSQLTransaction], _T]) -> _T:
        """As `at_once`, for a statement that may wait for others and can't say by itself how long."""

        def run_once() -> _T:
            return self._write_once(lambda transaction, _: operation(transaction), {})

        return self._persistently(run_once, is_repeatable=True)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Leave a connection to others, while operations are run that may have to wait for somebody's transaction."""
        places = self._persistently(self._open, is_repeatable=True).may_wait
        if not places.acquire(timeout=self.patience_ms / 1000):
            raise all_in_use()
        try:
            yield
        finally:
            places.release()

    def within(self, connection: psycopg.Connection[Any]) -> Enlisted:
        """Run operations on a connection of the application's, as part of its transaction."""
        return Enlisted(
            connection, self.statements, store=self._store if self._is_prepared else None, which_store=self._which_store
        )

    def now_us(self) -> int:
        """Read the time: the server's, unless there is a clock."""
        given = self.given_now_us()
        if given is not None:
            self.open()
            return given
        return self.at_once(lambda transaction: cast(int, transaction.value("now")))

    def given_now_us(self) -> int | None:
        """Read the clock, if there is one; a statement that is given ``None`` reads the server's."""
        if self._clock is None:
            return None
        return _TEST_ERA_US + round(self._clock.monotonic() * 1_000_000)

    def _write_once(
        self,
        operation: Callable[[PostgreSQLTransaction, int], _T],
        constants: Mapping[str, object],
    ) -> _T:
        with self._connection() as connection:
            try:
                ((began,),) = _execute_all(connection, self._begin)
                transaction = self._transaction(connection, constants, began=began)
                given = self.given_now_us()
                result = operation(transaction, began if given is None else given)
            except BaseException as error:
                _roll_back(connection)
                if isinstance(error, psycopg.Error):
                    faults.raise_ours(error, nothing_written=True)
                raise
            try:
                with committing(connection):
                    execute(connection, "COMMIT")
            except psycopg.Error as error:
                _roll_back(connection)
                faults.raise_ours(error, nothing_written=faults.is_undone(error))
            return result

    def _transaction(
        self, connection: psycopg.Connection[Any], constants: Mapping[str, object], *, began: int = 0
    ) -> PostgreSQLTransaction:
        prepares = self._connections is not None and self._connections.keep_statements
        return PostgreSQLTransaction(connection, self.statements, constants, prepares=prepares, began=began)

    def _persistently(self, action: Callable[[], _T], *, is_repeatable: bool = False) -> _T:
        """
        Do something again that others were in the way of.

        Args:
            action: raises our errors.
            is_repeatable: it may be done again also when nobody knows whether it was done.
        """

        def passes(error: BaseException) -> bool:
            return faults.passes_at_once(error) and (is_repeatable or isinstance(error, TransientDataAccessError))

        doubt = faults.Doubt()

        def try_once() -> _T:
            with doubt:
                return action()

        try:
            return try_once()
        except DataAccessError as error:
            if not passes(error):
                raise
        return Retrying(
            retry=retry_if_exception(passes),
            wait=wait_random_exponential(multiplier=0.005, max=0.2),
            stop=stop_after_attempt(_TRIES),
            reraise=True,
        )(try_once)

    @contextmanager
    def _connection(self) -> Iterator[psycopg.Connection[Any]]:
        with self._open().lend() as connection:
            yield connection

    def _notice_fork(self) -> None:
        if self._pid == os.getpid():
            return
        if self._connections is not None:
            self._connections.leave_to_parent()
        self._forget()


class Enlisted:
    """
    Run operations within the application's transaction: when one raises, what it wrote is undone, and the rest of the
    transaction is as it was. So are the connection's settings, in any case.

    Args:
        connection: the application's.
        statements: by name.
        store: which store's tables must be there; ``None`` for one that isn't open.
        which_store: the statement that tells it, and how long the transaction waits for locks.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        statements: Mapping[str, Statement],
        *,
        store: str | None,
        which_store: str,
    ) -> None:
        _check_connection(connection)
        if store is None:
            raise DataAccessError("the store is not open: open it before you store in a transaction of your own")
        self._connection = connection
        self._statements = statements
        self._store = store
        self._which_store = which_store

    def __call__(self, operation: Callable[[PostgreSQLTransaction], _T], /) -> _T:
        try:
            with self._savepoint():
                return operation(PostgreSQLTransaction(self._connection, self._statements, {}))
        except psycopg.Error as error:
            faults.raise_enlisted(error)

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        # A connection that begins transactions by itself does so here. What storing sets for the transaction, how long
        # it waits, a rollback to the savepoint takes back; its release would not.
        try:
            rows = _execute_all(self._connection, f"SAVEPOINT callbackq; {self._which_store}")
            patience = self._check_store(rows)
            yield
            restored = sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(patience)).as_string(None)
            _execute_all(self._connection, f"RELEASE callbackq; {restored}")
        except BaseException:
            with suppress(psycopg.Error):
                _execute_all(self._connection, "ROLLBACK TO callbackq; RELEASE callbackq")
            raise

    def _check_store(self, rows: list[tuple[Any, ...]]) -> object:
        for store, patience in rows:
            if store == self._store:
                return patience
        raise _unusable("must lead to the store's database: another store has its tables there, and would get them")


def _execute_all(connection: psycopg.Connection[Any], statements: str) -> list[tuple[Any, ...]]:
    """Execute several statements in one round trip, and give the rows of the last one."""
    cursor = execute(connection, statements)
    while cursor.nextset():
        pass
    return cursor.fetchall() if cursor.description else []


def _check_connection(connection: psycopg.Connection[Any]) -> None:
    if not isinstance(connection, psycopg.Connection):
        raise _unusable(
            "must be a psycopg.Connection (of psycopg 3); SQLAlchemy has it as "
            "session.connection().connection.driver_connection, Django as django.db.connection.connection"
        )
    if connection.closed:
        raise _unusable("must be open")
    if connection.info.pipeline_status is not PipelineStatus.OFF:
        raise _unusable("is in pipeline mode: store before or after the pipeline")
    status = connection.info.transaction_status
    if status is TransactionStatus.INERROR:
        raise _unusable("is in a transaction that has failed: roll it back")
    if connection.autocommit and status is TransactionStatus.IDLE:
        raise _unusable("has no transaction under way, and begins none by itself: begin one")


def _unusable(reason: str) -> InvalidRequestError:
    return InvalidRequestError([("connection", reason)])


def _roll_back(connection: psycopg.Connection[Any]) -> None:
    with suppress(psycopg.Error):
        execute(connection, "ROLLBACK")
