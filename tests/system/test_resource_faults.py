"""
The machine runs out of something while a dispatcher is at work.

It goes on by itself when there is some again: nothing is lost, nothing is sent twice, no attempt is used up by what is
no receiver's fault, and the log says so in a few lines.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from callbackq import CallbackData, CallbackRequest, CallbackState, RetryPhase, SQLiteDataAccess
from callbackq.core.models import AttemptFailure
from support.processes import LIMIT, running
from support.receivers import Conversation, Receiver

pytestmark = pytest.mark.system
TESTS = Path(__file__).parents[1]
HOST = f"""
import runpy, sys
sys.path.insert(0, {str(TESTS)!r})
runpy.run_module("support.starved_host", run_name="__main__")
"""
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

    def __init__(self) -> None:
        self.may_answer = threading.Event()
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
        conversation.send(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())


@pytest.fixture
def path() -> Iterator[Path]:
    """A file that a host of another user can get at."""
    with tempfile.TemporaryDirectory(prefix="callbackq-starved-") as name:
        if os.geteuid() == 0:
            os.chown(name, 65534, 65534)
        yield Path(name, "callbacks.db")


def store_some(store: SQLiteDataAccess, url: str, prefix: str) -> list[str]:
    """Store a queue, some alone, and one that fails and has somebody told."""
    requests = {f"{prefix}-q{number}": CallbackRequest(url=url, queue_id="q") for number in range(4)}
    body = CallbackData(data=bytes(300_000))
    requests |= {f"{prefix}-alone{number}": CallbackRequest(url=url, post_data=body) for number in range(4)}
    gone = url.replace("/hook", "/gone")
    requests[f"{prefix}-gone"] = CallbackRequest(url=gone, notification_email_address="people@example.com")
    store.store_callback_requests(list(requests.values()), ids=list(requests))
    return list(requests)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dispatcher_goes_on_by_itself_when_its_machine_can_again(
    path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise each thread has address space in reserve, and none of them ever lacks memory.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    answers = Answers()
    held = [] if fault == "no threads" else [f"held{number}" for number in range(3)]
    with closing(Receiver(answers)) as receiver, running(HOST, fault, path) as host:
        assert host.read_line() == "at work"
        with SQLiteDataAccess(path) as store:
            # Their answers come when nothing can be recorded.
            for id in held:
                request = CallbackRequest(url=receiver.url("/held"), retry_phases=AGAIN)
                store.store_callback_request(request, id=id)
            receiver.wait_for_requests(len(held))
            host.write_line()
            assert host.read_line() == "begun"
            answers.may_answer.set()
            ids = [*held, *store_some(store, receiver.url(), "b")]
            assert host.read_line() == "met"
            host.write_line()
            report: dict[str, Any] = json.loads(host.read_line())
            statuses = {id: store.get_callback_status(id) for id in ids}

    assert report["drained"], report
    failed = {id for id, status in statuses.items() if status.state is CallbackState.FAILED}
    assert failed == {"b-gone"}, report
    if fault == "no memory":
        # What was sent can't be unsent. With no memory for its answer it was an attempt, as any without answer.
        assert {attempt.failure for id in held for attempt in statuses[id].attempts} <= {None, AttemptFailure.INTERNAL}
        ids = [id for id in ids if id not in held]
    assert [len(statuses[id].attempts) for id in ids] == [1] * len(ids), report
    assert sorted(id for id in answers.accepted if id in ids) == sorted(set(ids) - failed), "each once"
    queued = [id for id in answers.accepted if id.startswith("b-q")]
    assert queued == sorted(queued)
    assert report["told"]
    assert report["unrecorded"] == 0
    assert len(report["lines"]) <= MOST_LINES, report["lines"]
