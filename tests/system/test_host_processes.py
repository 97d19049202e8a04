"""What hosts a dispatcher: web servers that fork workers, scripts that just end, processes made in every way."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from callbackq import (
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    Dispatcher,
    HTTPTransport,
    SQLiteDataAccess,
    TargetPolicy,
)
from support.postgres import until
from support.processes import LIMIT, running
from support.receivers import OK, Conversation, Receiver, answer_ok

pytestmark = pytest.mark.system
HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "run-in-your-application.md"
ORDERS = 20
WORKERS = 2
# Built where modules are imported: before the fork under --preload, and after it otherwise.
MYAPP = """
import os

from callbackq import CallbackRequest, Dispatcher, HTTPTransport, SQLiteDataAccess, TargetPolicy

store = SQLiteDataAccess("callbacks.db")
transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
dispatcher = Dispatcher(store, machine_name=f"worker of {os.getppid()}", transport=transport)


def application(environ, start_response):
    request = CallbackRequest(url=os.environ["RECEIVER"], queue_id="orders")
    status = store.store_callback_request(request, id=environ["PATH_INFO"].strip("/"))
    start_response("200 OK", [("Content-Length", str(len(str(os.getpid()))))])
    return [str(os.getpid()).encode()]
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="callbackq-") as name:
        yield Path(name)


def snippet_with(words: str) -> str:
    """The how-to's block of code that has these words in it."""
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", HOWTO.read_text(), re.MULTILINE | re.DOTALL)
    [found] = [block for block in blocks if words in block]
    return found


@contextmanager
def gunicorn(folder: Path, receiver: Receiver, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """gunicorn with the how-to's configuration, serving; killed at the end, unless it has ended."""
    (folder / "myapp.py").write_text(MYAPP)
    (folder / "gunicorn.conf.py").write_text(snippet_with("post_worker_init"))
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--bind",
        "unix:web",
        "--workers",
        str(WORKERS),
        *options,
        "myapp:application",
    ]
    environment = {**os.environ, "RECEIVER": receiver.url(), "PYTHONPATH": ""}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            yield server
        finally:
            server.kill()
            server.wait(LIMIT)


def order(folder: Path, number: int) -> int:
    """Send a request to the application, as soon as it listens; give the id of the process that has served it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(LIMIT)
        until(lambda: connection.connect_ex(str(folder / "web")) == 0, "gunicorn to listen")
        connection.sendall(b"GET /order-%d HTTP/1.0\r\n\r\n" % number)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b" 200 OK" in answer.splitlines()[0], answer
    return int(answer.rsplit(b"\r\n", 1)[1])


def statuses(path: Path) -> list[CallbackStatus]:
    with SQLiteDataAccess(path) as store:
        return list(store.list_callbacks())


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_gunicorns_workers_deliver_what_they_store_and_stop_in_order(
    folder: Path, kind: str, preload: list[str]
) -> None:
    log = folder / "log"
    may_answer = threading.Event()

    def answer_the_last_one_later(conversation: Conversation) -> None:
        while request := conversation.read_request():
            assert request.fields["callbackq-sequence"] != str(ORDERS) or may_answer.wait(LIMIT)
            conversation.send(OK)

    with (
        closing(Receiver(answer_the_last_one_later)) as receiver,
        gunicorn(folder, receiver, "--worker-class", kind, *preload) as server,
    ):
        for number in range(ORDERS):
            order(folder, number)
        receiver.wait_for_requests(ORDERS)
        server.terminate()
        until(lambda: log.read_text().count("Worker exiting") == WORKERS, "the workers to begin to exit")
        may_answer.set()

        assert server.wait(LIMIT) == 0, log.read_text()
    found = statuses(folder / "callbacks.db")
    assert [status.id for status in found] == [request.fields["webhook-id"] for request in receiver.requests]
    assert all(status.success and len(status.attempts) == 1 for status in found)
    assert all(lock.completed for status in found for lock in status.locks)


def test_a_killed_worker_of_gunicorn_is_taken_over_from(folder: Path) -> None:
    may_answer = threading.Event()

    def answer_later(conversation: Conversation) -> None:
        while conversation.read_request():
            may_answer.wait(LIMIT)
            conversation.send(OK)

    with closing(Receiver(answer_later)) as receiver, gunicorn(folder, receiver) as server:
        workers = {order(folder, number) for number in range(ORDERS)}
        receiver.wait_for_requests(1)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        may_answer.set()
        receiver.wait_for_requests(ORDERS + 1)
        server.terminate()
        assert server.wait(LIMIT) == 0, (folder / "log").read_text()

    found = statuses(folder / "callbacks.db")
    assert all(status.success for status in found)
    arrived = [request.fields["webhook-id"] for request in receiver.requests]
    assert sorted(set(arrived)) == sorted(status.id for status in found)
    assert len(arrived) == ORDERS + 1, "only what was under way is sent a second time"


SCRIPT = """
import sys
from callbackq import CallbackRequest, Dispatcher, HTTPTransport, SQLiteDataAccess, TargetPolicy

store = SQLiteDataAccess(sys.argv[1])
store.store_callback_request(CallbackRequest(url=sys.argv[2]), id="c")
Dispatcher(store, transport=HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))).start()
input()
"""


def test_a_script_that_just_ends_ends_and_another_goes_on_at_once(folder: Path) -> None:
    may_answer = threading.Event()

    def answer_later(conversation: Conversation) -> None:
        if conversation.read_request() and may_answer.wait(LIMIT):
            conversation.send(OK)

    path = folder / "callbacks.db"
    with closing(Receiver(answer_later)) as receiver:
        with running(SCRIPT, path, receiver.url()) as script:
            receiver.wait_for_requests(1)
            script.write_line()
            assert script.wait() == 0
        may_answer.set()
        with running(SCRIPT, path, receiver.url()) as script:
            receiver.wait_for_requests(2)
            script.write_line()
            assert script.wait() == 0

    [first, second] = [int(request.fields["callbackq-token"]) for request in receiver.requests]
    assert first < second


def store_in_a_child(path: Path, url: str, ids: list[str]) -> None:
    with SQLiteDataAccess(path) as store:
        for id in ids:
            store.store_callback_request(CallbackRequest(url=url, queue_id="q"), id=id)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["spawn", "forkserver", pytest.param("fork", id="forked_while_threads")])
def test_what_children_of_every_kind_store_is_delivered_by_their_parent(folder: Path, method: str) -> None:
    path = folder / "callbacks.db"
    context = multiprocessing.get_context(method)
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
    with closing(Receiver(answer_ok)) as receiver, SQLiteDataAccess(path) as store, closing(transport):
        with Dispatcher(store, transport=transport):
            for number in range(2):
                ids = [f"{number}-{other}" for other in range(5)]
                child = context.Process(target=store_in_a_child, args=(path, receiver.url(), ids))
                child.start()
                child.join(LIMIT)
                assert child.exitcode == 0
            receiver.wait_for_requests(10)
        found = list(store.list_callbacks())

    assert [request.fields["webhook-id"] for request in receiver.requests] == [status.id for status in found]
    assert all(status.state is CallbackState.SUCCEEDED for status in found)
