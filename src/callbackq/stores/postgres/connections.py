"""
Connections to the server: a few of our own, kept for the next transaction, or those of a pool that the host has.

psycopg's pool is the host's choice, not ours: its threads connect again and again while the server is away, with a line
in the log each time, and whoever wants a connection waits for all its patience without learning why.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, NoReturn, Protocol, TypeVar, cast

import psycopg
from attrs import frozen
from psycopg import capabilities
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

from callbackq.core.validation import Fault
from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.stores.postgres import faults
from callbackq.stores.postgres.cursors import execute

__all__ = [
    "Connections",
    "OwnConnections",
    "PoolConnections",
    "Waits",
    "all_in_use",
    "committing",
    "connect",
    "conninfo_faults",
    "leads_to_one_session",
    "unlimited",
]

_T = TypeVar("_T")

_SETTINGS: Final[dict[str, Any]] = {
    "autocommit": True,
    "prepare_threshold": None,  # see leads_to_one_session
    "application_name": "callbackq",
    # A server that vanishes without a word is noticed after half a minute, not after the system's two hours.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
# libpq takes less than two for two.
_SHORTEST_CONNECT_SECONDS: Final = 2
_LONGEST_CONNECT_SECONDS: Final = 10
_CANCEL_SECONDS: Final = 1.0


@frozen
class Waits:
    """
    How long to wait for what.

    Attributes:
        patience_seconds: for others: their connections, their transactions.
        answer_seconds: for the server, beyond that.
    """

    patience_seconds: float = 10.0
    answer_seconds: float = 10.0

    @property
    def silence_seconds(self) -> float:
        """How long the server may leave a statement without an answer."""
        return self.patience_seconds + self.answer_seconds

    @property
    def connect_seconds(self) -> int:
        """How long connecting to one host may take."""
        return max(_SHORTEST_CONNECT_SECONDS, min(math.ceil(self.answer_seconds), _LONGEST_CONNECT_SECONDS))


def _settings(conninfo: str, waits: Waits) -> dict[str, Any]:
    """Give ours, where the host has not named its own."""
    named = conninfo_to_dict(conninfo)
    ours = {**_SETTINGS, "connect_timeout": waits.connect_seconds}
    return {name: value for name, value in ours.items() if name not in named}


class _Connection(psycopg.Connection[Any]):
    """
    A connection that is closed without a word when it is forgotten, in the process that made it.

    Attributes:
        longest_silence_seconds: how long the server may neither take nor give anything while an answer is due. The
            system would notice a server that has vanished, not one that stands still (stopped, or on a disk that
            hangs).
        is_committing: the statement under way commits.
    """

    longest_silence_seconds: float | None = None
    is_committing: bool = False

    def wait(self, gen: PQGen[_T], *args: Any, **kwargs: Any) -> _T:
        # The driver waits in short steps, and tells after each of them that nothing has come.
        return super().wait(self._until_silent(gen), *args, **kwargs)

    def _until_silent(self, gen: PQGen[_T]) -> PQGen[_T]:
        if self.longest_silence_seconds is None:
            return (yield from gen)
        limit = self.longest_silence_seconds
        try:
            wanted = next(gen)
            end = time.monotonic() + limit
            is_over = False
            while True:
                ready = yield wanted
                if ready:
                    end = time.monotonic() + limit
                    is_over = False
                elif is_over:
                    self._give_up()
                else:
                    # Once more: perhaps it was this process that stood still, and the answer is there.
                    is_over = time.monotonic() > end
                wanted = gen.send(ready)
        except StopIteration as stop:
            return cast(_T, stop.value)

    def _give_up(self) -> NoReturn:
        # Else the server goes on with the statement when it can, and keeps its session until then. Not so a commit: it
        # may be waiting for a standby, and others would see what is not safe yet. An older libpq can only ask without a
        # limit, which a server that stands still would keep waiting.
        if capabilities.has_cancel_safe() and not self.is_committing:
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=_CANCEL_SECONDS)
        self.pgconn.finish()
        raise faults.SilenceError("the server gives no answer")

    def __del__(self, _warn: Any = None) -> None:
        # The driver would warn: of a store that nobody closed before the process ended, and in a forked process of its
        # parent's connections. Its inner object ends the session, unless this is a forked process.
        pass


@contextmanager
def unlimited(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Let statements take what time they need: those that change tables."""
    if not isinstance(connection, _Connection):
        yield
        return
    limit, connection.longest_silence_seconds = connection.longest_silence_seconds, None
    try:
        yield
    finally:
        connection.longest_silence_seconds = limit


@contextmanager
def committing(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Leave to the server what becomes of a statement that is given up: it commits."""
    if not isinstance(connection, _Connection):
        yield
        return
    connection.is_committing = True
    try:
        yield
    finally:
        connection.is_committing = False


def connect(conninfo: str, waits: Waits, **own: Any) -> _Connection:
    """
    Connect with the limits of a store.

    Args:
        conninfo: where the server is.
        waits: how long to wait for it.
        own: what the host has named beside.
    """
    settings = {**_settings(conninfo, waits), **own}
    connection = faults.without_password(lambda: _Connection.connect(conninfo, **settings))
    connection.longest_silence_seconds = waits.silence_seconds
    return connection


def conninfo_faults(name: str, conninfo: object) -> Iterator[Fault]:
    """Say what is wrong with an argument of that name."""
    if not isinstance(conninfo, str) or not _is_conninfo(conninfo):
        reason = (
            "must be a connection string as psycopg takes it: postgresql://user:password@host/database, with special "
            "characters of user and password in percent encoding"
        )
        yield name, reason


def _is_conninfo(text: str) -> bool:
    try:
        parts = psycopg.conninfo.conninfo_to_dict(text)
    except (psycopg.Error, ValueError):
        return False
    # A password with an @ or a / in it: the rest of it would be taken for a host or a port, and be named in errors.
    hosts, ports = str(parts.get("host") or ""), str(parts.get("port") or "")
    has_hosts = not any("@" in host[1:] for host in hosts.split(","))
    return has_hosts and not ports.replace(",", "").strip("0123456789") and "\x00" not in text


def all_in_use() -> TransientDataAccessError:
    """Build the error for a call that got no connection."""
    return TransientDataAccessError(
        "all connections of the store were in use for too long: raise its number of connections"
    )


class Connections(Protocol):
    """
    Where connections come from.

    Attributes:
        keep_statements: whether a connection says by its ``prepare_threshold`` that it may keep prepared ones.
        may_wait: places for calls that wait for others' transactions: one less than there are connections, if there are
            several. The last is for those that claim and end locks, which would have to wait with them.
    """

    keep_statements: bool
    may_wait: threading.Semaphore

    def lend(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """
        Lend a connection that begins no transactions by itself.

        Raises:
            TransientDataAccessError: there is none in time.
            DataAccessError: the server refuses us.
        """
        ...

    def connect(self) -> psycopg.Connection[Any]:
        """Connect once more, for whoever keeps the connection. May raise anything."""
        ...

    def close(self) -> None:
        """Close those that are ours. Those that are lent are closed when they come back."""
        ...

    def leave_to_parent(self) -> None:
        """
        Forget them in a forked process.

        Raises:
            DataAccessError: that can't be, since they are not ours.
        """
        ...


class OwnConnections(Connections):
    """
    Connect when there is no free connection, up to a number of them.

    A connection that breaks casts doubt on all that are free: the same accident has met them.

    Args:
        conninfo: where the server is.
        most: how many connections there may be.
        waits: how long to wait for one of them, and for the server.
    """

    keep_statements = True

    def __init__(self, conninfo: str, *, most: int, waits: Waits) -> None:
        self._conninfo = conninfo
        self._waits = waits
        self._places = threading.Semaphore(most)
        self.may_wait = threading.Semaphore(max(most - 1, 1))
        # A list's own operations are atomic: two threads never get the same connection.
        self._free: list[psycopg.Connection[Any]] = []
        self._is_closed = False

    @contextmanager
    def lend(self) -> Iterator[psycopg.Connection[Any]]:
        if not self._places.acquire(timeout=self._waits.patience_seconds):
            raise all_in_use()
        try:
            connection = self._take()
            try:
                yield connection
            except DataAccessError as error:
                if faults.is_at_the_wrong_server(error.__cause__):
                    connection.close()
                if faults.is_forgotten_statement(error):
                    connection.prepare_threshold = None
                raise
            finally:
                self._give_back(connection)
        finally:
            self._places.release()

    def connect(self) -> _Connection:
        return connect(self._conninfo, self._waits)

    def close(self) -> None:
        self._is_closed = True
        self._close_free()

    def leave_to_parent(self) -> None:
        pass  # what is forgotten here is not ended, since it was made there

    def _take(self) -> psycopg.Connection[Any]:
        try:
            return self._free.pop()
        except IndexError:
            pass
        try:
            connection = self.connect()
            if leads_to_one_session(connection):
                connection.prepare_threshold = 0
        except psycopg.Error as error:
            faults.raise_ours(error, nothing_written=True)
        return connection

    def _give_back(self, connection: psycopg.Connection[Any]) -> None:
        if connection.closed or connection.info.transaction_status is not TransactionStatus.IDLE:
            connection.close()
            self._close_free()
            return
        self._free.append(connection)
        if self._is_closed:  # since it was lent, or since the line above
            self._close_free()

    def _close_free(self) -> None:
        while True:
            try:
                self._free.pop().close()
            except IndexError:
                return


class PoolConnections(Connections):
    """Take connections from the host's pool. It is the host who opens, sizes and closes it."""

    keep_statements = False

    def __init__(self, pool: ConnectionPool[Any], *, waits: Waits) -> None:
        self._pool = pool
        self.may_wait = threading.Semaphore(max(pool.max_size - 1, 1))
        self._waits = waits

    @contextmanager
    def lend(self) -> Iterator[psycopg.Connection[Any]]:
        try:
            connection = self._pool.getconn(timeout=self._waits.patience_seconds)
        except psycopg.Error as error:  # PoolTimeout and PoolClosed among them
            faults.raise_ours(error, nothing_written=True)
        begins_by_itself = not connection.autocommit
        try:
            if begins_by_itself:
                _set_autocommit(connection)
            yield connection
        finally:
            if begins_by_itself and connection.autocommit:
                # The pool would end a transaction that is open, but leave the rest as it is to whoever comes next.
                if connection.info.transaction_status is TransactionStatus.IDLE:
                    connection.autocommit = False
                else:
                    connection.close()
            self._pool.putconn(connection)

    def connect(self) -> psycopg.Connection[Any]:
        pool = self._pool
        kwargs = pool.kwargs() if callable(pool.kwargs) else pool.kwargs
        conninfo = pool.conninfo() if callable(pool.conninfo) else pool.conninfo
        own = {**(kwargs or {}), "autocommit": True}
        if pool.connection_class is psycopg.Connection:
            return connect(conninfo, self._waits, **own)
        # Whatever the host's class does, it does here, too.
        return faults.without_password(
            lambda: pool.connection_class.connect(conninfo, **{**_settings(conninfo, self._waits), **own})
        )

    def close(self) -> None:
        pass

    def leave_to_parent(self) -> None:
        raise DataAccessError("a pool can't be used in a forked process: make another pool and store there")


def _set_autocommit(connection: psycopg.Connection[Any]) -> None:
    try:
        connection.autocommit = True
    except psycopg.Error as error:
        faults.raise_ours(error, nothing_written=True)


def leads_to_one_session(connection: psycopg.Connection[Any]) -> bool:
    """
    Whether what is kept in the session will be there, and nobody else's.

    A pooler may give each transaction another session. Then a prepared statement's name means nothing there, or what
    another client has prepared, and a LISTEN stays behind for whoever comes next. It shows by its answer at the start
    of a connection: it can't name one backend to all.
    """
    (backend,) = execute(connection, "SELECT pg_backend_pid()").fetchone() or (0,)
    return bool(backend == connection.info.backend_pid)
