"""Writers that come at the same time share a commit, and nothing else."""

from __future__ import annotations

import sqlite3
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from callbackq.core.models import CallbackStatus
from callbackq.errors import ConflictError, DataAccessError, TransientDataAccessError
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.stores.sqlite.groupcommit import MAX_GROUP, GroupCommit, Ticket
from callbackq.testing.conformance.base import LOCK_TIMEOUT, a_request
from support.processes import LIMIT


class Threads:
    """Calls, each in a thread of its own."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.outcomes: list[Any] = [None] * len(calls)
        self._threads = [
            threading.Thread(target=self._run, args=(number, call), daemon=True) for number, call in enumerate(calls)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, call: Callable[[], object]) -> None:
        try:
            self.outcomes[number] = call()
        except BaseException as error:
            self.outcomes[number] = error

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        return self.outcomes


def commits_in_wal(path: Path) -> int:
    """Count the transactions in a write-ahead log (sqlite.org/fileformat2.html, section 4)."""
    wal = path.with_name(f"{path.name}-wal").read_bytes()
    page_size, _, salt = struct.unpack(">8xII8s", wal[:24])
    frames = [wal[start : start + 24] for start in range(32, len(wal), 24 + page_size)]
    # Frames with another salt are left over from before the log was begun anew; a size marks the end of a commit.
    return sum(frame[8:16] == salt and frame[4:8] != bytes(4) for frame in frames)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


def store_while_locked(store: SQLiteDataAccess, path: Path, calls: Sequence[Callable[[], object]]) -> list[Any]:
    """Let threads call a store that can't write until all of them wait."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        threads = Threads(calls)
        waiting = store._database._group._waiting
        limit = threading.Event()
        # All but the one that leads and tries to begin.
        while len(waiting) < len(calls) - 1 and not limit.wait(0.001):
            pass
        other.execute("COMMIT")
    return threads.join()


def test_writers_that_come_at_the_same_time_share_a_commit(path: Path) -> None:
    with SQLiteDataAccess(path) as store:
        store.store_callback_request(a_request())
        before = commits_in_wal(path)

        statuses = store_while_locked(
            store, path, [lambda: store.store_callback_request(a_request(queue_id="queue"))] * 20
        )

        assert sorted(status.sequence for status in statuses) == list(range(1, 21))
        assert commits_in_wal(path) - before <= 2, "the leader found the others waiting, or left them to the next"


def test_a_conflict_in_a_group_hurts_nobody_else(path: Path) -> None:
    with SQLiteDataAccess(path) as store:
        store.store_callback_request(a_request(), id="taken")

        def conflict() -> CallbackStatus:
            return store.store_callback_request(a_request(method="PUT"), id="taken")

        def fine() -> CallbackStatus:
            return store.store_callback_request(a_request(queue_id="queue"))

        outcomes = store_while_locked(store, path, [fine, conflict] * 5)

        assert [type(one) for one in outcomes] == [CallbackStatus, ConflictError] * 5
        assert sorted(one.sequence for one in outcomes[::2]) == [1, 2, 3, 4, 5]
        assert len(list(store.list_callbacks())) == 6


def test_what_a_failing_operation_wrote_is_not_committed_with_the_others(path: Path) -> None:
    with SQLiteDataAccess(path) as store:
        store.store_callback_request(a_request())

        def fail() -> None:
            def operation(transaction: Any) -> None:
                transaction.add("add_queue", {"name": "from the failing one"})
                transaction.add("add_queue", {"name": "from the failing one"})

            store._database.write(operation)

        outcomes = store_while_locked(
            store, path, [fail, lambda: store.store_callback_request(a_request(queue_id="queue"))]
        )

        assert [type(one) for one in outcomes] == [DataAccessError, CallbackStatus]
        assert isinstance(outcomes[0].__cause__, sqlite3.IntegrityError)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM callbackq_queues").fetchall() == [("queue",)]


def test_a_store_that_others_keep_locked_gives_up_in_time_and_works_later(path: Path) -> None:
    with SQLiteDataAccess(path, busy_timeout=timedelta(milliseconds=50)) as store:
        store.store_callback_request(a_request(), id="before")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")

            with pytest.raises(TransientDataAccessError, match="SQLITE_BUSY"):
                store.store_callback_request(a_request(), id="during")
            assert store.get_callback_status("before").id == "before", "reading goes on"

        assert store.store_callback_request(a_request(), id="during").id == "during"


def test_a_store_that_is_closed_while_others_keep_it_locked_says_so_and_closes(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SQLiteDataAccess(path, busy_timeout=timedelta(milliseconds=20))
    store.store_callback_request(a_request())
    assert len(store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)) == 1
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        store.close()

    assert [record.message for record in caplog.records if "was closed while it could not be written" in record.message]
    assert not list(path.parent.glob("*-holder-*"))


def test_an_operation_that_is_interrupted_writes_nothing(path: Path) -> None:
    def operation(transaction: Any) -> None:
        transaction.add("add_queue", {"name": "half done"})
        raise KeyboardInterrupt

    with SQLiteDataAccess(path) as store:
        with pytest.raises(KeyboardInterrupt):
            store._database.write(operation)

        assert store.store_callback_request(a_request(queue_id="half done")).sequence == 1


class Recorder:
    """Runs groups for a GroupCommit, and can be stopped in the middle of one."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.upkeep = 0
        self.may_go_on = threading.Event()
        self.is_running = threading.Event()
        self.interrupted_group = 0

    def run_group(self, tickets: Sequence[Ticket]) -> None:
        self.sizes.append(len(tickets))
        self.is_running.set()
        assert self.may_go_on.wait(LIMIT)
        if len(self.sizes) == self.interrupted_group:
            raise KeyboardInterrupt
        for ticket in tickets:
            ticket.result = ticket.operation(None)

    def afterwards(self) -> None:
        self.upkeep += 1


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def group(recorder: Recorder) -> GroupCommit:
    return GroupCommit(recorder.run_group, afterwards=recorder.afterwards, patience_seconds=LIMIT)


def queue_up(group: GroupCommit, recorder: Recorder, number: int) -> Threads:
    """Have one operation run and so many wait behind it."""
    first = Threads([lambda: group.run(lambda _: "first")])
    assert recorder.is_running.wait(LIMIT)
    waiting = Threads([lambda number=number: group.run(lambda _: number) for number in range(number)])
    tick = threading.Event()
    while len(group._waiting) < number and not tick.wait(0.001):
        pass
    waiting._threads += first._threads
    return waiting


def test_all_that_wait_make_the_next_group(group: GroupCommit, recorder: Recorder) -> None:
    threads = queue_up(group, recorder, 12)

    recorder.may_go_on.set()

    assert threads.join() == list(range(12)), "each caller gets the result of its own operation"
    assert recorder.sizes == [1, 12]
    assert recorder.upkeep == 2


def test_a_group_has_a_bound(group: GroupCommit, recorder: Recorder) -> None:
    threads = queue_up(group, recorder, 3)
    with group._mutex:
        group._waiting.extend(Ticket(lambda _: None) for _ in range(MAX_GROUP))

    recorder.may_go_on.set()
    threads.join()

    assert max(recorder.sizes) == MAX_GROUP


def test_an_interrupted_leader_tells_its_followers_and_leaves_the_turn_to_the_next(
    group: GroupCommit, recorder: Recorder
) -> None:
    threads = queue_up(group, recorder, 4)
    recorder.interrupted_group = 2

    recorder.may_go_on.set()
    outcomes = threads.join()

    assert sorted(type(one).__name__ for one in outcomes) == ["DataAccessError"] * 3 + ["KeyboardInterrupt"]
    assert group.run(lambda _: "later") == "later"


def test_a_caller_that_waits_too_long_takes_its_operation_back(recorder: Recorder) -> None:
    group = GroupCommit(recorder.run_group, afterwards=recorder.afterwards, patience_seconds=0.01)
    done: list[str] = []

    with group.paused(), pytest.raises(TransientDataAccessError, match=r"more than 0\.01 s"):
        group.run(lambda _: done.append("late"))
    recorder.may_go_on.set()
    group.run(lambda _: done.append("later"))

    assert done == ["later"]


def test_while_paused_nothing_runs(group: GroupCommit, recorder: Recorder) -> None:
    recorder.may_go_on.set()
    group.pause()
    threads = Threads([lambda: group.run(lambda _: "after the pause")] * 3)
    tick = threading.Event()
    while len(group._waiting) < 3 and not tick.wait(0.001):
        pass
    assert recorder.sizes == []

    group.resume()

    assert threads.join() == ["after the pause"] * 3
    assert recorder.sizes == [3]


def test_a_second_pause_has_its_turn_between_groups(group: GroupCommit, recorder: Recorder) -> None:
    recorder.may_go_on.set()
    group.pause()
    order: list[str] = []

    def pause() -> None:
        with group.paused():
            order.append("paused")

    tick = threading.Event()
    threads = []
    for number, call in enumerate([lambda: group.run(lambda _: order.append("before")), pause]):
        threads.append(Threads([call]))
        while len(group._waiting) <= number and not tick.wait(0.001):
            pass
    threads.append(Threads([lambda: group.run(lambda _: order.append("behind"))]))
    while len(group._waiting) < 3 and not tick.wait(0.001):
        pass
    group.resume()

    for one in threads:
        one.join()
    assert order == ["before", "paused", "behind"]
    assert recorder.sizes == [1, 1]
