"""Several processes on one file: killed, frozen, forked, and at work at the same time."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from callbackq.core.models import CallbackState
from callbackq.dataaccess import Acquired
from callbackq.errors import DataAccessError
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock
from callbackq.testing.conformance.base import DELIVERED, LOCK_TIMEOUT, a_request, an_attempt
from support.processes import LIMIT, running

HOUR = timedelta(hours=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteDataAccess]:
    with SQLiteDataAccess(path) as store:
        yield store


def acquire(store: SQLiteDataAccess) -> list[Acquired]:
    return store.acquire_locks("machine", lock_timeout=HOUR, limit=1000)


def integrity(path: Path) -> object:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall()


PREAMBLE = """
import os, sys
from datetime import timedelta
from callbackq.core.models import CallbackRequest
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock
from callbackq.testing.conformance.base import DELIVERED, a_request, an_attempt

HOUR = timedelta(hours=1)
store = SQLiteDataAccess(sys.argv[1])
"""

HOLD = f"""{PREAMBLE}
(acquired,) = store.acquire_locks("holder", lock_timeout=HOUR, limit=1)
print(acquired.id)
input()
store.close()
"""


# On the time of a clock that doesn't move, which is a boot of its own.
BY_FAKE_CLOCK = PREAMBLE.replace("sys.argv[1])", "sys.argv[1], clock=FakeClock())")
HOLD_BY_FAKE_CLOCK = HOLD.replace(PREAMBLE, BY_FAKE_CLOCK)

LOOK = """
print(len(store.acquire_locks("other", lock_timeout=HOUR, limit=9)))
store.close()
"""


# Takeover from the dead.


def test_a_killed_holder_is_taken_over_at_once(store: SQLiteDataAccess, path: Path) -> None:
    store.store_callback_request(a_request(), id="held")
    with running(HOLD, path) as holder:
        assert holder.read_line() == "held"
        assert acquire(store) == [], "a live holder keeps its lock"
        signs = list(path.parent.glob("*-holder-*"))
        assert len(signs) == 1

        holder.kill()
        killed = time.monotonic()
        pause = threading.Event()
        while not (due := store.next_due()) or due > store.now():
            assert time.monotonic() - killed < 5
            pause.wait(0.02)
        (taken_over,) = acquire(store)
        took = time.monotonic() - killed

    print(f"taken over {took * 1000:.0f} ms after kill -9")
    assert took < 5, "it would have been an hour"
    assert taken_over.abandoned == 1
    lost, _ = store.get_callback_status("held").locks
    assert (lost.completed, lost.machine_name) == (False, "holder")
    assert not signs[0].exists()


def test_a_dead_holder_that_cannot_be_buried_now_is_buried_later(path: Path) -> None:
    clock = FakeClock()
    with SQLiteDataAccess(path, clock=clock, busy_timeout=timedelta(milliseconds=20)) as store:
        store.store_callback_request(a_request(), id="held")
        with running(HOLD_BY_FAKE_CLOCK, path) as holder:
            assert holder.read_line() == "held"
            holder.kill()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert store.next_due() == store.get_callback_status("held").locks[0].timeout, "only the fast way is closed"

        clock.advance(1)

        assert store.next_due() == store.now()
        assert len(acquire(store)) == 1


def test_a_frozen_holder_keeps_its_lock(store: SQLiteDataAccess, path: Path) -> None:
    store.store_callback_request(a_request(), id="held")
    with running(HOLD, path) as holder:
        assert holder.read_line() == "held"

        holder.send_signal(signal.SIGSTOP)

        assert acquire(store) == []


def test_a_neighbour_in_the_same_process_is_neither_taken_for_dead_nor_killed_by_the_look(path: Path) -> None:
    clock = FakeClock()
    with SQLiteDataAccess(path, clock=clock) as one, SQLiteDataAccess(path, clock=clock) as other:
        one.store_callback_request(a_request(), id="held")
        assert len(acquire(one)) == 1

        for _ in range(3):
            clock.advance(1)
            assert acquire(other) == []

        # A foreign process still sees that the holder lives.
        with running(f"{BY_FAKE_CLOCK}{LOOK}", path) as process:
            assert process.read_line() == "0"


def test_a_closed_holder_leaves_its_locks_to_their_timeout(path: Path) -> None:
    clock = FakeClock()
    with SQLiteDataAccess(path, clock=clock) as other:
        other.store_callback_request(a_request(), id="held")
        with SQLiteDataAccess(path, clock=clock) as holder:
            assert len(holder.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)) == 1
        assert not list(path.parent.glob("*-holder-*"))
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT * FROM callbackq_holders").fetchall() == []

        clock.advance(LOCK_TIMEOUT / 2)
        assert acquire(other) == []
        clock.advance(LOCK_TIMEOUT / 2)
        assert len(acquire(other)) == 1


@pytest.mark.parametrize("lost", ["the row", "the file"])
def test_without_the_sign_of_life_locks_end_by_their_timeout(path: Path, lost: str) -> None:
    clock = FakeClock()
    with SQLiteDataAccess(path, clock=clock) as other:
        other.store_callback_request(a_request(), id="held")
        with running(HOLD_BY_FAKE_CLOCK, path) as holder:
            assert holder.read_line() == "held"
            if lost == "the row":
                with closing(sqlite3.connect(path, isolation_level=None)) as connection:
                    connection.execute("DELETE FROM callbackq_holders")
            else:
                (sign,) = path.parent.glob("*-holder-*")
                sign.unlink()
            holder.kill()

        clock.advance(HOUR - timedelta(seconds=1))
        assert acquire(other) == []
        clock.advance(1)
        assert len(acquire(other)) == 1


# Kills and crowds.


def test_a_killed_writer_loses_nothing_it_was_told_is_stored(path: Path) -> None:
    write = f"""{PREAMBLE}
number = int(sys.argv[2])
while True:
    number += 1
    store.store_callback_request(a_request(queue_id="queue"), id=str(number))
    print(number)
    if number % 3 == 0:
        for acquired in store.acquire_locks("writer", lock_timeout=HOUR, limit=1):
            store.record_attempt(acquired, an_attempt(200), DELIVERED)
"""
    acknowledged = 0
    for lines in (40, 7, 25):
        with running(write, path, acknowledged) as writer:
            for _ in range(lines):
                writer.read_line()
            writer.kill()
            told = [int(line) for line in writer.remaining_lines()]
        with SQLiteDataAccess(path) as store:
            stored = [(int(status.id), status.sequence) for status in store.list_callbacks()]
        assert [number for number, _ in stored] == list(range(1, len(stored) + 1))
        assert [number for _, number in stored] == list(range(1, len(stored) + 1)), "numbers without a gap"
        assert len(stored) >= max([acknowledged + lines, *told])
        acknowledged = len(stored)
    assert integrity(path) == [("ok",)]


def test_two_processes_hammer_one_file(path: Path) -> None:
    work = f"""{PREAMBLE}
import threading

mine = []
errors = []

def work(thread):
    try:
        for number in range(40):
            store.store_callback_request(a_request(queue_id=f"queue {{number % 7}}"))
            for acquired in store.acquire_locks("machine", lock_timeout=HOUR, limit=3):
                store.record_attempt(acquired, an_attempt(200), DELIVERED)
                mine.append(acquired.id)
    except BaseException as error:
        errors.append(repr(error))

input()
threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(" ".join(mine))
print(errors)
store.close()
"""
    with running(work, path) as one, running(work, path) as other:
        for process in (one, other):
            process.write_line()
        delivered = [id for process in (one, other) for id in process.read_line().split()]
        assert [process.read_line() for process in (one, other)] == ["[]", "[]"]
        assert [process.wait() for process in (one, other)] == [0, 0]

    with SQLiteDataAccess(path) as store:
        while left := acquire(store):
            for acquired in left:
                store.record_attempt(acquired, an_attempt(200), DELIVERED)
                delivered.append(acquired.id)
        statuses = list(store.list_callbacks())
    assert len(delivered) == len(set(delivered)) == len(statuses) == 160, "each callback went to one holder"
    assert all(len(status.locks) == len(status.attempts) == 1 for status in statuses)
    assert all(status.state is CallbackState.SUCCEEDED for status in statuses)
    assert integrity(path) == [("ok",)]


# Forks.


def fork(child: Callable[[], object]) -> int:
    """Fork a child that runs a function and ends with 0 if that returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    deadline = time.monotonic() + LIMIT
    pause = threading.Event()
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        pause.wait(0.002)
    return os.waitstatus_to_exitcode(ended[1])


def test_a_forked_child_loses_nothing_when_its_parent_closes(store: SQLiteDataAccess, path: Path) -> None:
    # The accident: a child that inherits connections takes no locks of its own, so that the parent, closing as if it
    # were the last user, removes the write-ahead log under the child's feet.
    store.store_callback_request(a_request(queue_id="queue"))
    to_parent, to_child = os.pipe(), os.pipe()

    def child() -> None:
        store.store_callback_request(a_request(queue_id="queue"))
        os.write(to_parent[1], b".")
        os.read(to_child[0], 1)
        store.store_callback_request(a_request(queue_id="queue"))

    pid = fork(child)
    assert select.select([to_parent[0]], [], [], LIMIT)[0]
    store.get_callback_status(store.store_callback_request(a_request()).id)
    store.close()
    os.write(to_child[1], b".")

    assert exit_code(pid) == 0
    assert store.store_callback_request(a_request(queue_id="queue")).sequence == 4
    assert integrity(path) == [("ok",)]
    for descriptor in (*to_parent, *to_child):
        os.close(descriptor)


def test_forks_while_the_store_is_in_use_corrupt_nothing(store: SQLiteDataAccess, path: Path) -> None:
    is_over = threading.Event()
    stored = [0, 0]

    def work(thread: int) -> None:
        while not is_over.is_set():
            store.store_callback_request(a_request(queue_id="queue"))
            stored[thread] += 1
            store.next_due()

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    codes = []
    for number in range(12):
        pid = fork(lambda number=number: store.store_callback_request(a_request(queue_id="queue"), id=f"child{number}"))
        codes.append(exit_code(pid))
    is_over.set()
    for thread in threads:
        thread.join(LIMIT)

    assert codes == [0] * 12
    assert store.store_callback_request(a_request(queue_id="queue")).sequence == sum(stored) + 12 + 1
    assert integrity(path) == [("ok",)]


def test_a_child_does_not_take_over_its_parents_locks_and_leaves_its_sign_of_life_alone(
    store: SQLiteDataAccess, path: Path
) -> None:
    store.store_callback_request(a_request(), id="held")
    (acquired,) = acquire(store)

    def child() -> None:
        assert acquire(store) == [], "the parent lives"
        store.store_callback_request(a_request())
        assert len(acquire(store)) == 1
        store.close()

    assert exit_code(fork(child)) == 0
    with running(f"{PREAMBLE}{LOOK}", path) as process:
        assert process.read_line() == "0"
    store.record_attempt(acquired, an_attempt(200), DELIVERED)


def test_a_fork_that_python_was_not_told_of_is_refused_in_the_child(store: SQLiteDataAccess) -> None:
    store.store_callback_request(a_request())
    # What a host written in C does. PyDLL keeps the interpreter's lock, which the child needs.
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        try:
            store.store_callback_request(a_request())
        except DataAccessError as error:
            os._exit(0 if "close the store before such a fork" in str(error) else 2)
        finally:
            os._exit(1)

    assert exit_code(pid) == 0
    assert store.store_callback_request(a_request(queue_id="queue")).sequence == 1


def test_a_forked_child_can_store_in_a_transaction_of_the_applications(store: SQLiteDataAccess, path: Path) -> None:
    def child() -> None:
        # The store has closed its connections for the fork, and opens none while this one may be writing.
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            store.store_callback_request(a_request(queue_id="queue"), id="by-the-child", connection=connection)
            connection.execute("COMMIT")
        assert store.get_callback_status("by-the-child").sequence == 1

    assert exit_code(fork(child)) == 0
    assert store.store_callback_request(a_request(queue_id="queue")).sequence == 2


def test_a_connection_is_refused_in_a_child_of_a_fork_that_python_was_not_told_of(
    store: SQLiteDataAccess, path: Path
) -> None:
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        connection = sqlite3.connect(path)  # takes no locks: the child has inherited the count of the parent's
        try:
            store.store_callback_request(a_request(), connection=connection)
        except DataAccessError as error:
            os._exit(0 if "close the store before such a fork" in str(error) else 2)
        finally:
            os._exit(1)

    assert exit_code(pid) == 0


def test_a_fork_during_a_copy_leaves_a_child_that_says_why_it_cannot_use_the_store(path: Path) -> None:
    # The copy's connection can't be closed beforehand, so the child must not open any.
    with SQLiteDataAccess(path, busy_timeout=timedelta(milliseconds=20)) as store:
        store.store_callback_request(a_request(queue_id="queue"))

        def child() -> None:
            with pytest.raises(DataAccessError, match="close the store before such a fork"):
                store.store_callback_request(a_request())
            store.close()

        with store._database.lent_connection():
            assert exit_code(fork(child)) == 0

        assert store.store_callback_request(a_request(queue_id="queue")).sequence == 2


def test_subscribers_of_the_parent_are_not_called_in_the_child(store: SQLiteDataAccess) -> None:
    calls: list[int] = []
    store.subscribe(lambda: calls.append(os.getpid()))

    def child() -> None:
        store.store_callback_request(a_request())
        assert calls == []

    assert exit_code(fork(child)) == 0
    store.store_callback_request(a_request())
    assert calls == [os.getpid()]
