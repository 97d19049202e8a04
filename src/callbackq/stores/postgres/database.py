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
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar, cast

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from callbackq.clock import Clock
from callbackq.errors import DataAccessError, InvalidRequestError, TransientDataAccessError
from callbackq.stores.postgres import faults
from callbackq.stores.postgres.transaction import PostgreSQLTransaction, Profile, Statement, load
from callbackq.stores.sql.instants import microseconds

__all__ = ["CONNECTION_SETTINGS", "Database", "Enlisted"]

_T = TypeVar("_T")

CONNECTION_SETTINGS: Final[dict[str, Any]] = {
    "autocommit": True,
    "prepare_threshold": None,  # see _let_prepare
    "application_name": "callbackq",
    "connect_timeout": 10,
    # A server that vanishes without a word is noticed after half a minute, not after the system's two hours.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

_TRIES: Final = 10
# Where the time of a clock for tests begins: no wall time, which such a clock steps.
_TEST_ERA_US: Final = microseconds(datetime(2026, 1, 1, tzinfo=UTC))
_POOLS_OF_PARENTS: Final[list[ConnectionPool[Any]]] = []
_BEGIN: Final[dict[Profile, str]] = {
    "postgres": "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {patience}; ",
    "distributed": "BEGIN ISOLATION LEVEL SERIALIZABLE; ",
}


class Database:
    """
    Run operations in transactions.

    Args:
        conninfo: where the server is.
        pool: connections to use instead of a pool of our own, which are then the host's to close.
        schema: where our tables are.
        profile: what the server understands.
        connections: how many a pool of our own holds at most.
        patience: how long to wait for a connection, or for other transactions.
        clock: where time comes from; ``None`` for the server's.
        prepare: called once, before the first transaction.
    """

    def __init__(
        self,
        *,
        conninfo: str,
        pool: ConnectionPool[Any] | None,
        schema: str,
        profile: Profile,
        connections: int,
        patience: timedelta,
        clock: Clock | None,
        prepare: Callable[[psycopg.Connection[Any]], None],
    ) -> None:
        self.conninfo = conninfo
        self._given_pool = pool
        self.profile = profile
        self._connections = connections
        self.patience_ms = max(patience // timedelta(milliseconds=1), 1)
        self._clock = clock
        self._prepare = prepare
        self.statements = load(schema, profile)
        self._begin = _BEGIN[profile].format(patience=self.patience_ms) + self.statements["now"].text
        self._forget()

    def _forget(self) -> None:
        self._pool: ConnectionPool[Any] | None = None
        self._is_prepared = False
        # Two threads that open at the same time would leave one of two pools behind.
        self._opening = threading.Lock()
        self._pid = os.getpid()

    def open(self) -> None:
        """Connect, and prepare the database, unless that has been done."""
        self._ready_pool()

    def _ready_pool(self) -> ConnectionPool[Any]:
        pool = self._open_pool()
        if not self._is_prepared:
            self._prepare_once()
        return pool

    def _prepare_once(self) -> None:
        with self._opening:
            if self._is_prepared:
                return
            try:
                with self._first_connection() as connection:
                    self._prepare(connection)
            except psycopg.Error as error:
                raise faults.translate(error, nothing_written=True) from error
            self._is_prepared = True

    @contextmanager
    def _first_connection(self) -> Iterator[psycopg.Connection[Any]]:
        # Not from a pool of ours, which would only say that no connection came in time, and not why.
        if self._given_pool is not None:
            with self._from_pool(self._given_pool) as connection:
                yield connection
        else:
            with psycopg.connect(self.conninfo, **CONNECTION_SETTINGS) as connection:
                yield connection

    def close(self) -> None:
        """Close the connections of our own pool."""
        self._notice_fork()
        with self._opening:
            pool, self._pool = self._pool, None
            self._is_prepared = False
        if pool is not None and pool is not self._given_pool:
            pool.close()

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
                    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", prepare=False)
                    result = operation(self._transaction(connection, constants))
                    connection.execute("COMMIT", prepare=False)
                except BaseException as error:
                    _roll_back(connection)
                    if isinstance(error, psycopg.Error):
                        raise faults.translate(error, nothing_written=True) from error
                    raise
                return result

        return self._persistently(read_once)

    def at_once(self, operation: Callable[[PostgreSQLTransaction], _T]) -> _T:
        """
        Run an operation of one statement, which is a transaction in itself and may be run again.

        When the connection breaks, nobody knows whether it was written: the error is no TransientDataAccessError.
        """

        def run_once() -> _T:
            with self._connection() as connection:
                try:
                    return operation(self._transaction(connection, {}))
                except psycopg.Error as error:
                    # A server that answers has undone the statement.
                    raise faults.translate(error, nothing_written=error.sqlstate is not None) from error

        return self._persistently(run_once, is_repeatable=True)

    def within(self, connection: psycopg.Connection[Any]) -> Enlisted:
        """Run operations on a connection of the application's, as part of its transaction."""
        return Enlisted(connection, self.statements, is_prepared=self._is_prepared)

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

    @contextmanager
    def lent_connection(self) -> Iterator[psycopg.Connection[Any]]:
        """Lend a connection for something else than these transactions."""
        with self._connection() as connection:
            yield connection

    def _write_once(self, operation: Callable[[PostgreSQLTransaction, int], _T], constants: Mapping[str, object]) -> _T:
        with self._connection() as connection:
            try:
                began = self._start(connection)
                transaction = self._transaction(connection, constants, began=began)
                given = self.given_now_us()
                result = operation(transaction, began if given is None else given)
            except BaseException as error:
                _roll_back(connection)
                if isinstance(error, psycopg.Error):
                    raise faults.translate(error, nothing_written=True) from error
                raise
            try:
                connection.execute("COMMIT", prepare=False)
            except psycopg.Error as error:
                _roll_back(connection)
                # A server that answers has undone it. One that doesn't may have committed before the line broke.
                raise faults.translate(error, nothing_written=error.sqlstate is not None) from error
            return result

    def _transaction(
        self, connection: psycopg.Connection[Any], constants: Mapping[str, object], *, began: int = 0
    ) -> PostgreSQLTransaction:
        # A given pool may be anything.
        prepares = self._given_pool is None
        return PostgreSQLTransaction(connection, self.statements, constants, prepares=prepares, began=began)

    def _start(self, connection: psycopg.Connection[Any]) -> int:
        # Several statements without values are one round trip.
        cursor = connection.execute(self._begin, prepare=False)
        while cursor.nextset():
            pass
        (now,) = cursor.fetchone() or (0,)
        return now

    def _persistently(self, action: Callable[[], _T], *, is_repeatable: bool = False) -> _T:
        """
        Do something again that others were in the way of.

        Args:
            action: raises our errors.
            is_repeatable: it may be done again also when nobody knows whether it was done.
        """

        def passes(error: BaseException) -> bool:
            return faults.passes_at_once(error) and (is_repeatable or isinstance(error, TransientDataAccessError))

        try:
            return action()
        except DataAccessError as error:
            if not passes(error):
                raise
        return Retrying(
            retry=retry_if_exception(passes),
            wait=wait_random_exponential(multiplier=0.005, max=0.2),
            stop=stop_after_attempt(_TRIES),
            reraise=True,
        )(action)

    @contextmanager
    def _connection(self) -> Iterator[psycopg.Connection[Any]]:
        with self._from_pool(self._ready_pool()) as connection:
            yield connection

    @contextmanager
    def _from_pool(self, pool: ConnectionPool[Any]) -> Iterator[psycopg.Connection[Any]]:
        try:
            connection = pool.getconn(timeout=self.patience_ms / 1000)
        except psycopg.Error as error:  # PoolTimeout and PoolClosed among them
            raise faults.translate(error, nothing_written=True) from error
        begins_by_itself = not connection.autocommit
        try:
            if begins_by_itself:
                connection.autocommit = True
            yield connection
        except DataAccessError as error:
            if faults.is_forgotten_statement(error):
                connection.prepare_threshold = None
            raise
        finally:
            if begins_by_itself and not connection.closed:
                connection.autocommit = False
            pool.putconn(connection)

    def _open_pool(self) -> ConnectionPool[Any]:
        self._notice_fork()
        with self._opening:
            if self._pool is None:
                self._pool = self._given_pool or ConnectionPool(
                    self.conninfo,
                    kwargs=CONNECTION_SETTINGS,
                    min_size=0,
                    max_size=self._connections,
                    open=True,
                    configure=_let_prepare,
                    name="callbackq-postgres",
                    num_workers=1,
                    reconnect_timeout=self.patience_ms / 1000,
                )
            return self._pool

    def _notice_fork(self) -> None:
        if self._pid == os.getpid():
            return
        if self._given_pool is not None:
            raise DataAccessError("a pool can't be used in a forked process: make another pool and store there")
        if self._pool is not None:
            # Its sessions and threads are the parent's: it must never be finalised here.
            _POOLS_OF_PARENTS.append(self._pool)
        self._forget()


class Enlisted:
    """
    Run operations within the application's transaction: when one raises, what it wrote is undone, and the rest of the
    transaction is as it was.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], statements: Mapping[str, Statement], *, is_prepared: bool
    ) -> None:
        if not isinstance(connection, psycopg.Connection):
            raise _unusable(
                "must be a psycopg.Connection; SQLAlchemy has it as session.connection().connection.driver_connection, "
                "Django as django.db.connection.connection"
            )
        if connection.closed:
            raise _unusable("must be open")
        status = connection.info.transaction_status
        if status is TransactionStatus.INERROR:
            raise _unusable("is in a transaction that has failed: roll it back")
        if connection.autocommit and status is TransactionStatus.IDLE:
            raise _unusable("has no transaction under way, and begins none by itself: begin one")
        if not is_prepared:
            raise DataAccessError("the store is not open: open it before you store in a transaction of your own")
        self._connection = connection
        self._statements = statements

    def __call__(self, operation: Callable[[PostgreSQLTransaction], _T], /) -> _T:
        # Otherwise the end of what follows would be a commit.
        if self._connection.info.transaction_status is TransactionStatus.IDLE:
            self._connection.execute("SELECT 1")
        try:
            with self._connection.transaction():  # a savepoint
                return operation(PostgreSQLTransaction(self._connection, self._statements, {}))
        except psycopg.Error as error:
            raise faults.translate(error, nothing_written=True) from error


def _let_prepare(connection: psycopg.Connection[Any]) -> None:
    """
    Let a connection keep statements, if it leads to one session.

    A pooler may change that between two transactions, and then a statement's name means nothing there, or what another
    client has prepared. It shows by its answer at the start of a connection: it can't name one backend to all.
    """
    (backend,) = connection.execute("SELECT pg_backend_pid()").fetchone() or (0,)
    if backend == connection.info.backend_pid:
        connection.prepare_threshold = 0


def _unusable(reason: str) -> InvalidRequestError:
    return InvalidRequestError([("connection", reason)])


def _roll_back(connection: psycopg.Connection[Any]) -> None:
    with suppress(psycopg.Error):
        connection.execute("ROLLBACK", prepare=False)
