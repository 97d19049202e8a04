"""
Connections and transactions: who may write when, and how a write becomes durable.

One connection writes, another reads, both shared by all threads of the store object. Every write transaction begins
with BEGIN IMMEDIATE, because one that reads first and writes then can fail at once, however long it may wait. Many
threads' writes share a transaction (groupcommit.py).

Checkpoints are ours. SQLite's own would run beside other writers, and in the versions with the WAL-reset bug that can
lose a commit (file.py). So autocheckpoints are off, and a checkpoint runs while our write connection holds the
database's write lock: no writer of any process, of any program, is at work then.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from copy import copy
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.stores.sqlite import connections, faults, file, schema
from callbackq.stores.sqlite.checkpoints import CheckpointSchedule
from callbackq.stores.sqlite.forks import watch_forks
from callbackq.stores.sqlite.groupcommit import GroupCommit, Ticket
from callbackq.stores.sqlite.transaction import SQLiteTransaction

__all__ = ["Database"]

_LOG = logging.getLogger("callbackq.stores")

_T = TypeVar("_T")


class Database:
    """
    Run operations in transactions.

    Args:
        path: the file.
        locate: called at each opening: makes sure that the file exists and may be used, and says whether to write
            ahead (WAL); otherwise a rollback journal is used.
        prepare: called at each opening with a write transaction: brings the content up to date.
        forget: called in a forked child: what the caller keeps for its process isn't the child's.
        durable: whether a commit must survive the loss of power.
        busy_timeout: how long to wait for other writers.
    """

    def __init__(
        self,
        path: Path,
        *,
        locate: Callable[[], bool],
        prepare: Callable[[SQLiteTransaction], None],
        forget: Callable[[], None],
        durable: bool,
        busy_timeout: timedelta,
    ) -> None:
        self.path = path
        # Made once: it is asked for with each write, and the parts of a path are interned.
        self._wal = path.with_name(f"{path.name}-wal")
        self._locate = locate
        self._prepare = prepare
        self._forget = forget
        self._durable = durable
        self._busy_seconds = busy_timeout.total_seconds()
        # Of the file, from the first opening to `close`. A fork or a fault closes the connections only.
        self._identity: tuple[int, int] | None = None
        self._was_opened = False
        self._begin()
        watch_forks(self)

    def _begin(self) -> None:
        self._pid = 0
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._writes_ahead = False
        # Keeps threads from mixing their reads on one connection. Taken after the leadership of the group, never
        # before it, or two threads could wait for each other.
        self._reading = threading.Lock()
        # Keeps a fork from happening while a third connection is open. Taken last.
        self._lending = threading.Lock()
        self._group = GroupCommit(
            self._run_group, afterwards=self._checkpoint_if_due, patience_seconds=self._busy_seconds
        )

    def open(self) -> None:
        """Open and prepare the database, unless it is open."""
        self._check_process()
        if self._writer is not None:
            self._check_file()
            return
        with self._group.paused():
            try:
                self._open_writer()
            except sqlite3.Error as error:
                raise faults.translate(error, self.path, nothing_written=True) from error

    def close(self) -> None:
        """Close the connections, after the operations that are running."""
        if self._is_connected() and self._pid == os.getpid():
            with self._group.paused(), self._reading:
                self._close_reader()
                self._close_writer()
        self._identity = None
        self._was_opened = False

    def check_open(self) -> None:
        """Make sure, without waiting for writers, that what another connection writes to the file is found here."""
        self._check_process()
        if not self._was_opened:
            raise DataAccessError(
                f"{self.path} is not open, and can't be opened while a transaction of yours may be writing to it: call "
                "open() before the transaction begins"
            )
        self._check_file()

    def write(self, operation: Callable[[SQLiteTransaction], _T]) -> _T:
        """
        Run an operation in a write transaction, and return when that is durable.

        What it wrote is undone when it raises; other threads' operations in the same transaction are not touched.
        """
        self._check_process()
        return self._group.run(operation)

    def read(self, operation: Callable[[SQLiteTransaction], _T]) -> _T:
        """Run an operation that sees the database as of one moment."""
        self.open()
        with self._reading:
            try:
                reader = self._open_reader()
                try:
                    reader.execute("BEGIN")
                    return operation(SQLiteTransaction(reader))
                finally:
                    if reader.in_transaction:
                        reader.execute("COMMIT")
            except sqlite3.Error as error:
                if not faults.leaves_connection_sound(error):
                    self._close_reader()
                raise faults.translate(error, self.path, nothing_written=True) from error
            except MemoryError:
                # There may have been none to end the transaction, either.
                self._close_reader()
                raise

    def checkpoint_when_idle(self) -> None:
        """Copy what was written ahead into the database, if that would soon hold up somebody's write otherwise."""
        writer = self._writer
        if writer is not None and self._schedule.is_worth_it_when_idle(writer.total_changes):
            with self._group.paused():
                self._checkpoint()

    @contextmanager
    def lent_connection(self) -> Iterator[sqlite3.Connection]:
        """Lend one more connection, for a read that takes long."""
        self.open()
        with self._lending, closing(self._connect(self._busy_seconds)) as connection:
            yield connection

    # Forks (forks.py).

    def rest(self) -> None:
        """Close the connections, after the operations that are running, and keep others waiting until `resume`."""
        self._group.pause()
        self._reading.acquire()
        if not self._lending.acquire(timeout=self._busy_seconds):
            self._reading.release()
            self._group.resume()
            raise TransientDataAccessError(f"{self.path} is being copied")
        self._close_reader()
        self._close_writer()

    def resume(self) -> None:
        self._lending.release()
        self._reading.release()
        self._group.resume()

    def start_anew(self, *, rested: bool) -> None:
        if not rested:
            # Closing an inherited connection could damage the parent's database, so it must never be finalised.
            for connection in (self._writer, self._reader):
                if connection is not None:
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
            return
        self._begin()
        self._forget()

    def _is_connected(self) -> bool:
        return self._writer is not None or self._reader is not None

    def _check_process(self) -> None:
        # SQLite keeps count of its locks in the process's memory. A child that inherits the count takes no locks of
        # its own, also on new connections: measured, its commits are lost when the parent closes. Forks that Python
        # knows of close all connections first (forks.py).
        if self._is_connected() and self._pid != os.getpid():
            raise DataAccessError(
                f"{self.path} was open when this process was forked without Python's knowledge, and can't be used in "
                "it: close the store before such a fork"
            )

    def _check_file(self) -> None:
        # An open file lives on when its path leads elsewhere. Callbacks stored in it would be gone with the process.
        present = file.identity(self.path)
        known = self._identity = self._identity or present
        if present != known:
            raise file.lost(self.path)

    # Everything below is called by the leader of the group; what is about the reader, with its mutex held.

    def _run_group(self, tickets: Sequence[Ticket]) -> None:
        """Run all operations in one transaction."""
        try:
            writer = self._open_writer()
        except (sqlite3.Error, DataAccessError) as error:
            self._fail(tickets, error, nothing_written=True)
            return
        try:
            self._patiently(lambda: writer.execute("BEGIN IMMEDIATE"))
            for ticket in tickets:
                self._run_one(writer, ticket)
        except sqlite3.Error as error:
            self._roll_back(writer)
            self._fail(tickets, error, nothing_written=True)
            return
        except BaseException:
            self._roll_back(writer)
            raise
        try:
            self._patiently(lambda: writer.execute("COMMIT"))
        except sqlite3.Error as error:
            self._roll_back(writer)
            # Otherwise the commit's last page may have reached the disk although syncing it failed.
            nothing_written = faults.is_undone_commit(error)
            self._fail([ticket for ticket in tickets if ticket.error is None], error, nothing_written=nothing_written)
        except BaseException:
            self._roll_back(writer)
            raise

    def _run_one(self, writer: sqlite3.Connection, ticket: Ticket) -> None:
        # Without a savepoint, what an operation wrote before it failed would be committed with the others' work.
        writer.execute("SAVEPOINT operation")
        try:
            ticket.result = ticket.operation(SQLiteTransaction(writer))
        except sqlite3.Error as error:
            if not faults.is_refusal_of_one_operation(error):
                raise
            ticket.error = faults.translate(error, self.path, nothing_written=True)
        except Exception as error:
            ticket.error = error
        if ticket.error is not None:
            writer.execute("ROLLBACK TO operation")
        writer.execute("RELEASE operation")

    def _fail(self, tickets: Iterable[Ticket], error: Exception, *, nothing_written: bool) -> None:
        for ticket in tickets:
            # An error of its own for each: several threads raising the same one would mix their tracebacks.
            if isinstance(error, sqlite3.Error):
                ticket.error = faults.translate(error, self.path, nothing_written=nothing_written)
            else:
                ticket.error = copy(error)
                ticket.error.__cause__ = error.__cause__
        if isinstance(error, sqlite3.Error) and not faults.leaves_connection_sound(error):
            with self._reading:
                self._close_reader()
            self._close_writer()

    def _roll_back(self, writer: sqlite3.Connection) -> None:
        # Some errors have rolled back already.
        if writer.in_transaction:
            with suppress(sqlite3.Error, MemoryError):
                writer.execute("ROLLBACK")
        # Writers of all processes would wait for its end. To close it takes no memory, and ends it, since transactions
        # keep no cursors.
        if writer.in_transaction:
            self._close_writer()

    def _patiently(self, action: Callable[[], _T]) -> _T:
        """
        Do what other connections may keep from being done for a moment.

        Waits are short, random and growing. SQLite's own handler waits 1, 2, 5, 10 … ms, the same in all processes.
        Measured with two and with four processes that write without pause: as many writes with either, but the longest
        wait was 0.1 to 0.5 s this way, 0.5 to 1.9 s with SQLite's. The first try goes without tenacity, which would add
        12 µs to each statement.
        """
        try:
            return action()
        except sqlite3.OperationalError as error:
            if not faults.is_busy(error):
                raise
        return Retrying(
            retry=retry_if_exception(faults.is_busy),
            wait=wait_random_exponential(multiplier=0.0005, max=0.02),
            stop=stop_after_delay(self._busy_seconds),
            reraise=True,
        )(action)

    # Opening and closing.

    def _open_writer(self) -> sqlite3.Connection:
        if self._writer is not None:
            self._check_file()
            return self._writer
        self._writes_ahead = self._locate()
        writer = self._patiently(lambda: self._connect(0))
        try:
            # Now, not before: to open a file of a lower layer of an overlay for writing makes it another one.
            self._check_file()
            self._set_up_writer(writer)
        except BaseException:
            self._roll_back(writer)
            writer.close()
            raise
        self._writer = writer
        self._was_opened = True
        self._schedule = CheckpointSchedule()
        return writer

    def _set_up_writer(self, writer: sqlite3.Connection) -> None:
        transaction = SQLiteTransaction(writer)
        # First of all, so that a file of a newer release, or one that is no database, is left as it is.
        self._patiently(lambda: schema.check_version(transaction))
        self._writes_ahead = self._patiently(lambda: connections.set_journal(writer, write_ahead=self._writes_ahead))
        connections.set_syncing(writer, durable=self._durable, write_ahead=self._writes_ahead)
        self._patiently(lambda: writer.execute("BEGIN IMMEDIATE"))
        schema.migrate(transaction)
        self._prepare(transaction)
        self._patiently(lambda: writer.execute("COMMIT"))

    def _open_reader(self) -> sqlite3.Connection:
        if self._reader is None:
            reader = self._reader = self._connect(self._busy_seconds)
            reader.execute("PRAGMA query_only = 1")
            # It also runs the checkpoints, whose syncs must be as thorough as the writer's.
            connections.set_syncing(reader, durable=self._durable, write_ahead=self._writes_ahead)
        return self._reader

    def _connect(self, busy_seconds: float) -> sqlite3.Connection:
        connection = connections.connect(self.path, busy_seconds=busy_seconds)
        self._pid = os.getpid()
        return connection

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    # Checkpoints.

    def _checkpoint_if_due(self) -> None:
        writer = self._writer
        if writer is not None and self._writes_ahead and self._schedule.is_due(writer.total_changes, self._wal_bytes()):
            self._checkpoint()

    def _checkpoint(self) -> None:
        writer = self._writer
        if writer is None or not self._writes_ahead:
            return
        changes = writer.total_changes
        try:
            # No writer of any process can be at work while this holds the write lock: see above.
            self._patiently(lambda: writer.execute("BEGIN IMMEDIATE"))
            try:
                with self._reading:
                    _, pages, _ = self._open_reader().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            finally:
                self._roll_back(writer)
        except (sqlite3.Error, MemoryError) as error:
            # Nothing is lost by it, and whoever wrote before it has succeeded.
            self._schedule.put_off(changes, self._wal_bytes())
            if isinstance(error, sqlite3.Error):
                _LOG.warning("%s", faults.translate(error, self.path, nothing_written=True))
            else:
                with self._reading:
                    self._close_reader()
        else:
            self._schedule.done(changes, self._wal_bytes(), pages)

    def _wal_bytes(self) -> int:
        try:
            return self._wal.stat().st_size
        except OSError:
            return 0
