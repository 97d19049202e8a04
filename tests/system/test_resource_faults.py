"""
The machine runs out of something while a dispatcher is at work.

It goes on by itself when there is some again: nothing is lost, nothing is sent twice, no attempt is used up by what is
no receiver's fault, and the log says so in a few lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from callbackq import CallbackData, CallbackRequest, CallbackState, RetryPhase, SQLiteDataAccess
from callbackq.core.models import AttemptFailure
from callbackq.errors import DataAccessError
from callbackq.stores.postgres import PostgreSQLDataAccess
from support.postgres import PostgreSQL, PostgreSQLServer
from support.postgres_faults import COMMIT, CuttingProxy
from support.processes import LIMIT, Process, running
from support.receivers import Conversation, Receiver

pytestmark = pytest.mark.system
TESTS = Path(__file__).parents[1]
HOST = f"""
import runpy, sys
sys.path.insert(0, {str(TESTS)!r})
runpy.run_module("support.starved_host", run_name="__main__")
"""
Store = SQLiteDataAccess | PostgreSQLDataAccess
FAULTS = [
    "disk full",
    "disk that does not write",
    "disk that does not sync",
    "read-only file",
    "no descriptors",
    "no memory",
    "no threads",
]
MOST_LINES = 12
AGAIN = [RetryPhase(retries=5, delay=timedelta(milliseconds=50))]


class Answers:
    """200, or 410 where the path wants it; to /held only when told. Each on a connection of its own."""

    def __init__(self, body: bytes = b"") -> None:
        self.may_answer = threading.Event()
        self._body = body
        self.accepted: list[str] = []

    def __call__(self, conversation: Conversation) -> None:
        request = conversation.read_request()
        if request is None:
            return
        if "/held" in request.line:
            assert self.may_answer.wait(LIMIT)
        if "/gone" not in request.line:
            self.accepted.append(request.fields["webhook-id"])
        status = "410 Gone" if "/gone" in request.line else "200 OK"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(self._body)}\r\nConnection: close\r\n\r\n"
        conversation.send(head.encode() + self._body)


@pytest.fixture
def path() -> Iterator[Path]:
    """A file that a host of another user can get at."""
    with tempfile.TemporaryDirectory(prefix="callbackq-starved-") as name:
        if os.geteuid() == 0:
            os.chown(name, 65534, 65534)
        yield Path(name, "callbacks.db")


def store_some(store: Store, url: str, prefix: str) -> list[str]:
    """Store a queue, some alone, and one that fails and has somebody told."""
    requests = {f"{prefix}-q{number}": CallbackRequest(url=url, queue_id="q") for number in range(4)}
    body = CallbackData(data=bytes(300_000))
    requests |= {f"{prefix}-alone{number}": CallbackRequest(url=url, post_data=body) for number in range(4)}
    gone = url.replace("/hook", "/gone")
    requests[f"{prefix}-gone"] = CallbackRequest(url=gone, notification_email_address="people@example.com")
    store.store_callback_requests(list(requests.values()), ids=list(requests))
    return list(requests)


@contextmanager
def at_work(fault: str, where: object) -> Iterator[Process]:
    """A host, which has opened its store, and whose user therefore owns what files there are."""
    with running(HOST, fault, where) as host:
        assert host.read_line() == "at work"
        yield host


class Ordeal:
    """
    A host of which the answers to three requests come when something is wrong, and whose store then gets more.

    Args:
        store: the host's, seen from a process with which all is well.
        receiver: where the callbacks go.
        answers: what it says.
    """

    def __init__(self, store: Store, receiver: Receiver, answers: Answers) -> None:
        self._store = store
        self._url = receiver.url
        self._receiver = receiver
        self._answers = answers
        self.ids: list[str] = []
        self.held: list[str] = []

    def prepare(self, host: Process, *, held: int = 3) -> None:
        self.held = [f"held{number}" for number in range(held)]
        for id in self.held:
            self._store.store_callback_request(CallbackRequest(url=self._url("/held"), retry_phases=AGAIN), id=id)
        self._receiver.wait_for_requests(held)
        host.write_line()
        assert host.read_line() == "begun"

    def answer(self) -> None:
        self._answers.may_answer.set()

    def store_more(self) -> None:
        self.ids = [*self.held, *store_some(self._store, self._url(), "b")]

    def judge(self, host: Process, *, loses_answers: bool = False) -> None:
        """
        Let the fault end, and look at what has become of all.

        Args:
            host: the process.
            loses_answers: there was no memory for what the held requests were answered.
        """
        host.write_line()
        report: dict[str, Any] = json.loads(host.read_line())
        statuses = {id: self._store.get_callback_status(id) for id in self.ids}
        assert report["drained"], report
        failed = {id for id, status in statuses.items() if status.state is CallbackState.FAILED}
        assert failed == {"b-gone"}, report
        ids = self.ids
        if loses_answers:
            # What was sent can't be unsent. Without its answer it was an attempt, as any without answer.
            found = {attempt.failure for id in self.held for attempt in statuses[id].attempts}
            assert found <= {None, AttemptFailure.INTERNAL}
            ids = [id for id in ids if id not in self.held]
        assert [len(statuses[id].attempts) for id in ids] == [1] * len(ids), report
        accepted = self._answers.accepted
        assert sorted(id for id in accepted if id in ids) == sorted(set(ids) - failed), "each once"
        queued = [id for id in accepted if id.startswith("b-q")]
        assert queued == sorted(queued)
        assert report["told"]
        assert report["unrecorded"] == 0
        assert len(report["lines"]) <= MOST_LINES, report["lines"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dispatcher_goes_on_by_itself_when_its_machine_can_again(
    path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise each thread has address space in reserve, and none of them ever lacks memory.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    answers = Answers()
    with (
        closing(Receiver(answers)) as receiver,
        at_work(fault, path) as host,
        SQLiteDataAccess(path) as store,
    ):
        ordeal = Ordeal(store, receiver, answers)
        ordeal.prepare(host, held=0 if fault == "no threads" else 3)
        ordeal.answer()
        ordeal.store_more()
        assert host.read_line() == "met"
        ordeal.judge(host, loses_answers=fault == "no memory")


@pytest.mark.parametrize("lost", [False, True], ids=["", "connections lost, too"])
def test_a_dispatcher_on_postgresql_goes_on_by_itself_when_there_are_descriptors_again(
    postgres: PostgreSQL, migrated_database: str, lost: bool
) -> None:
    answers = Answers()
    conninfo = postgres.conninfo(migrated_database)
    with (
        closing(Receiver(answers)) as receiver,
        at_work("no descriptors", conninfo) as host,
        PostgreSQLDataAccess(conninfo) as store,
    ):
        ordeal = Ordeal(store, receiver, answers)
        ordeal.prepare(host)
        if lost:
            postgres.terminate_backends(migrated_database)
        ordeal.answer()
        ordeal.store_more()
        assert host.read_line() == "met"
        ordeal.judge(host)


@pytest.mark.parametrize(
    "refused",
    [
        pytest.param(r"INSERT INTO|UPDATE |DELETE FROM", id="writes"),
        pytest.param(COMMIT, id="commits", marks=pytest.mark.thorough),
    ],
)
def test_a_dispatcher_goes_on_by_itself_when_postgresqls_disk_has_room_again(
    postgres: PostgreSQL, migrated_database: str, refused: str
) -> None:
    answers = Answers()
    conninfo = postgres.conninfo(migrated_database)
    with (
        closing(Receiver(answers)) as receiver,
        CuttingProxy(conninfo) as proxy,
        at_work("elsewhere", proxy.conninfo) as host,
        PostgreSQLDataAccess(conninfo) as store,
    ):
        ordeal = Ordeal(store, receiver, answers)
        ordeal.prepare(host)
        proxy.fail("53100", refused, times=sys.maxsize)
        ordeal.answer()
        ordeal.store_more()
        assert host.read_line() == "met"
        proxy.forget()
        ordeal.judge(host)


def test_a_dispatcher_goes_on_by_itself_when_a_disk_of_postgresql_that_really_was_full_has_room_again(
    start_postgres: Callable[[], PostgreSQLServer],
) -> None:
    server = start_postgres()
    answers = Answers(body=os.urandom(15_000))  # which takes room to record
    with (
        small_disk(server) as disk,
        closing(Receiver(answers)) as receiver,
        PostgreSQLDataAccess(server.conninfo()) as store,
        at_work("elsewhere", server.conninfo()) as host,
    ):
        ordeal = Ordeal(store, receiver, answers)
        ordeal.prepare(host)
        fill(disk / "filler")
        ordeal.answer()
        with pytest.raises(DataAccessError, match="full disk"):
            ordeal.store_more()
        assert host.read_line() == "met"
        (disk / "filler").unlink()
        ordeal.store_more()
        ordeal.judge(host)


@contextmanager
def small_disk(server: PostgreSQLServer) -> Iterator[Path]:
    """Let the server keep its database, not its log, on a disk of 24 MiB."""
    disk = server.folder / "disk"
    disk.mkdir()
    owner = server.folder.stat().st_uid
    options = f"size=24m,mode=700,uid={owner}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        space = disk / "space"
        space.mkdir(mode=0o700)
        os.chown(space, owner, -1)
        server.execute(f"CREATE TABLESPACE small LOCATION '{space}'")
        server.execute("ALTER DATABASE postgres SET TABLESPACE small", dbname="template1")
        yield disk
        server.stop("immediate")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    stream.write(bytes(size))
