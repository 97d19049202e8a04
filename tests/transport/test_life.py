"""Threads, interruptions, forks and a machine that runs out of things."""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from attrs import evolve

from callbackq.core.delivery import Answer, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure
from callbackq.targets import TargetPolicy
from callbackq.testing import FakeClock
from callbackq.transport import HTTPTransport
from support.deliveries import Outcomes, make_delivery
from support.processes import LIMIT, Process, running
from support.receivers import OK, Conversation, Receiver

Receive = Callable[..., Receiver]
MakeTransport = Callable[..., HTTPTransport]


def hang(conversation: Conversation) -> None:
    """Read the request, and never answer."""
    conversation.read_request()
    conversation.hang()


def network_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "callbackq-network"]


def status_of(transport: HTTPTransport, url: str) -> int:
    outcome = transport.send(make_delivery(url))
    assert isinstance(outcome, Answer), outcome
    return outcome.status_code


# The thread.


def test_thread_starts_with_the_first_attempt_and_ends_with_close(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()
    before = len(network_threads())

    status_of(transport, receiver.url())
    during = len(network_threads())
    transport.close()

    assert (during, len(network_threads())) == (before + 1, before)


def test_transport_works_again_after_close(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()

    for _ in range(3):
        assert status_of(transport, receiver.url()) == 200
        transport.close()
        transport.close()

    assert receiver.connections == 3


def test_thread_that_nobody_uses_ends_by_itself_and_the_next_attempt_starts_another(
    receive: Receive, make_transport: MakeTransport
) -> None:
    receiver = receive()
    clock = FakeClock()
    transport = make_transport(clock=clock)
    delivery = evolve(make_delivery(receiver.url()), ends_at=clock.monotonic() + 3600)
    others = network_threads()
    transport.send(delivery)
    [thread] = [thread for thread in network_threads() if thread not in others]

    clock.advance(61)
    transport.interrupt([])  # wakes it

    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(outcome := transport.send(delivery), Answer)
    assert outcome.status_code == 200


def test_close_before_the_first_attempt_does_nothing(transport: HTTPTransport) -> None:
    transport.close()
    transport.interrupt([make_delivery("http://127.0.0.1:9/")])


def test_started_and_closed_from_many_threads_every_attempt_has_one_outcome(
    receive: Receive, transport: HTTPTransport
) -> None:
    receiver = receive()
    outcomes: list[Outcomes] = [Outcomes() for _ in range(8)]

    def work(mine: Outcomes) -> None:
        for _ in range(25):
            transport.submit(make_delivery(receiver.url()), mine)
            transport.close()

    threads = [threading.Thread(target=work, args=[mine]) for mine in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert [len(mine.wait_for(25)) for mine in outcomes] == [25] * 8
    assert not [thread for thread in threads if thread.is_alive()]


def test_five_hundred_slow_requests_take_one_thread(receive: Receive, transport: HTTPTransport) -> None:
    count = 500
    outcomes = Outcomes()
    with socket.create_server(("127.0.0.1", 0), backlog=count) as listener:
        listener.settimeout(10)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        before = set(threading.enumerate())

        for _ in range(count):
            transport.submit(make_delivery(url), outcomes)
        connections = [listener.accept()[0] for _ in range(count)]
        for connection in connections:
            connection.recv(65536)
        started = set(threading.enumerate()) - before
        for connection in connections:
            connection.sendall(OK)

        assert {answer.status_code for answer in outcomes.answers(count)} == {200}
        for connection in connections:
            connection.close()
    assert [thread.name for thread in started] == ["callbackq-network"]


def test_callback_that_raises_takes_no_other_along(
    receive: Receive, transport: HTTPTransport, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = receive()
    raised = threading.Event()

    def done(outcome: Outcome) -> None:
        raised.set()
        raise RuntimeError("yranac"[::-1])

    transport.submit(make_delivery(receiver.url()), done)
    assert raised.wait(10)

    assert status_of(transport, receiver.url()) == 200
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text


def test_callback_may_submit_the_next_and_close(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()
    outcomes = Outcomes()

    def done(outcome: Outcome) -> None:
        outcomes(outcome)
        transport.submit(make_delivery(receiver.url()), outcomes)
        transport.close()

    transport.submit(make_delivery(receiver.url()), done)

    assert len(outcomes.wait_for(2)) == 2


def test_nothing_secret_is_ever_logged(
    receive: Receive, make_transport: MakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    def failing_resolver(host: str, port: int) -> list[str]:
        raise RuntimeError(host)

    caplog.set_level(logging.DEBUG)
    canary = "yranac"[::-1]
    policy = TargetPolicy(allow=["127.0.0.0/8"], resolver=failing_resolver)
    transport = make_transport(target_policy=policy, deadline=timedelta(seconds=0.2))
    receivers = [receive(script) for script in (hang, lambda conversation: None)]
    urls = [receiver.url(f"/{canary}?{canary}") for receiver in receivers]

    for url in [*urls, f"http://{canary}.example/{canary}", f"https://127.0.0.1:1/{canary}"]:
        transport.send(make_delivery(url, headers={"Authorization": canary}, data=canary.encode()))

    assert caplog.records
    assert canary not in caplog.text


def opened_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        f"{record.name} {record.levelname}: {record.getMessage()}"
        for record in caplog.records
        if record.levelno >= logging.WARNING
    ]


def test_what_the_policy_opens_is_told_once_with_the_first_attempt(
    receive: Receive, transport: HTTPTransport, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = receive()
    before = opened_in(caplog)

    for _ in range(2):
        for _ in range(3):
            status_of(transport, receiver.url())
        transport.close()

    assert before == []
    [line] = opened_in(caplog)
    opened = line.removeprefix("callbackq.transport WARNING: callbacks may reach what is closed by default: ")
    assert opened == "127.0.0.0/8 (this host), ::1/128 (this host)"


def test_policy_that_opens_nothing_has_nothing_told(
    make_transport: MakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    make_transport(target_policy=TargetPolicy(deny=["10.0.0.0/8"])).send(make_delivery("http://127.0.0.1/"))

    assert opened_in(caplog) == []


def test_proxy_is_named_once_with_the_first_attempt(
    receive: Receive, make_transport: MakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    proxy = receive()
    transport = make_transport(target_policy=TargetPolicy(), proxy=proxy.url(""))

    for _ in range(2):
        status_of(transport, "http://a.example/")

    assert [record.getMessage() for record in caplog.records if record.levelno == logging.INFO] == [
        f"callbacks go out through the proxy 127.0.0.1:{proxy.port}, whose task it is to judge their addresses"
    ]


def test_handler_of_the_log_may_use_the_transport(receive: Receive, transport: HTTPTransport) -> None:
    receiver, outcomes = receive(), Outcomes()

    class Sends(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            transport.submit(make_delivery(receiver.url()), outcomes)

    handler = Sends(level=logging.WARNING)
    logging.getLogger("callbackq.transport").addHandler(handler)
    try:
        status = status_of(transport, receiver.url())
    finally:
        logging.getLogger("callbackq.transport").removeHandler(handler)

    assert status == 200
    assert [answer.status_code for answer in outcomes.answers(1)] == [200]


# Interruptions.


def test_interrupt_ends_what_is_named_and_nothing_else(receive: Receive, transport: HTTPTransport) -> None:
    may_answer = threading.Event()

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        may_answer.wait(10)
        conversation.send(OK)

    receiver = receive(script)
    under_way = [make_delivery(receiver.url()) for _ in range(3)]
    ended, others = Outcomes(), Outcomes()
    for delivery in under_way:
        transport.submit(delivery, ended if delivery is under_way[1] else others)
    receiver.wait_for_requests(3)

    transport.interrupt(under_way[1:2])

    [answer] = ended.answers(1)
    assert (answer.status_code, answer.failure) == (0, AttemptFailure.INTERRUPTED)
    may_answer.set()
    assert [answer.status_code for answer in others.answers(2)] == [200, 200]


def test_interrupted_before_anything_was_sent_is_not_sent(make_transport: MakeTransport) -> None:
    asked, let_go = threading.Event(), threading.Event()

    def resolver(host: str, port: int) -> list[str]:
        asked.set()
        let_go.wait(20)
        return ["127.0.0.1"]

    transport = make_transport(target_policy=TargetPolicy(allow=["127.0.0.0/8"], resolver=resolver))
    delivery = make_delivery("http://a.example/")
    outcomes = Outcomes()
    transport.submit(delivery, outcomes)
    assert asked.wait(10)

    transport.interrupt([delivery])

    assert outcomes.not_sent(1) == [NotSent(reason=NotSentReason.STOPPED)]
    let_go.set()


def test_answer_with_a_complete_head_stands_when_interrupted(receive: Receive, transport: HTTPTransport) -> None:
    """The head and its first body byte are read in one piece, so a second attempt's fate tells that they were."""
    head_is_out = threading.Event()

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhalf")
        head_is_out.set()
        conversation.hang()

    receiver = receive(script)
    delivery = make_delivery(receiver.url())
    outcomes = Outcomes()
    transport.submit(delivery, outcomes)
    assert head_is_out.wait(10)
    # Answered after the head above arrived, by the same thread: that one has been read by now.
    status_of(transport, receive().url())

    transport.interrupt([delivery])

    [answer] = outcomes.answers(1)
    assert (answer.status_code, answer.failure, answer.truncated) == (200, None, True)


def test_close_calls_back_for_everything_under_way_before_it_returns(
    receive: Receive, transport: HTTPTransport
) -> None:
    receiver = receive(hang)
    outcomes = Outcomes()
    for _ in range(10):
        transport.submit(make_delivery(receiver.url()), outcomes)
    receiver.wait_for_requests(10)

    transport.close()

    assert {answer.failure for answer in outcomes.answers(10)} == {AttemptFailure.INTERRUPTED}
    assert len(outcomes.wait_for(10, seconds=0)) == 10


# A process that stands still.

SEND = """
import sys
from datetime import timedelta
from callbackq import CallbackRequest, HTTPTransport, TargetPolicy
from support.deliveries import make_delivery

policy = TargetPolicy(allow=["127.0.0.1"])
outcome = HTTPTransport(target_policy=policy, deadline=timedelta(seconds=0.5)).send(make_delivery(sys.argv[1]))
print(outcome.status_code, outcome.failure)
"""


def test_answer_that_came_while_the_process_stood_still_counts_though_the_deadline_has_passed(
    receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()
    sender: list[Process] = []

    def answer_while_it_stands_still(conversation: Conversation) -> None:
        conversation.read_request()
        assert started.wait(LIMIT)
        sender[0].send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sender[0].pid, os.WSTOPPED)
        conversation.send(OK)
        conversation.wait(0.6)
        sender[0].send_signal(signal.SIGCONT)
        conversation.hang()

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with running(SEND, receive(answer_while_it_stands_still).url()) as process:
        sender.append(process)
        started.set()

        assert process.read_line() == "200 None"


# Forks.


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_sends_over_its_own_connections_and_leaves_the_parents_alone(
    receive: Receive, transport: HTTPTransport
) -> None:
    hanging = receive(hang)
    receiver = receive()
    outcomes = Outcomes()
    status_of(transport, receiver.url())
    transport.submit(make_delivery(hanging.url()), outcomes)
    hanging.wait_for_requests(1)

    in_child = _in_forked_child(lambda: [status_of(transport, receiver.url()), len(network_threads())])

    assert in_child == [200, 1]
    assert status_of(transport, receiver.url()) == 200
    assert [request.connection for request in receiver.requests] == [1, 2, 1]
    transport.close()
    assert outcomes.answers(1)[0].failure is AttemptFailure.INTERRUPTED


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_may_close_what_it_never_used(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()
    status_of(transport, receiver.url())

    def close_and_describe() -> str:
        transport.close()
        return repr(transport)

    assert _in_forked_child(close_and_describe) == "<HTTPTransport 0 attempts under way>"

    assert status_of(transport, receiver.url()) == 200
    assert receiver.connections == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_of_a_process_whose_thread_has_ended_starts_its_own(
    receive: Receive, make_transport: MakeTransport
) -> None:
    receiver = receive()
    clock = FakeClock()
    transport = make_transport(clock=clock)
    delivery = evolve(make_delivery(receiver.url()), ends_at=clock.monotonic() + 3600)
    others = network_threads()
    transport.send(delivery)
    [thread] = [thread for thread in network_threads() if thread not in others]
    clock.advance(61)
    transport.interrupt([])
    thread.join(10)

    assert _in_forked_child(lambda: type(transport.send(delivery)).__name__) == "Answer"


# A machine that runs out of things.


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let calls that need a new descriptor fail with EMFILE, after the first *count*."""
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]
    for descriptor in spare:
        os.close(descriptor)
    with descriptors_below(spare[-1]):
        yield


@contextmanager
def descriptors_below(limit: int) -> Iterator[None]:
    """Let calls that would get a descriptor from *limit* on fail with EMFILE."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def no_threads_left() -> Iterator[None]:
    """Let no thread start, for want of memory for its stack."""
    usual = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(usual)


def test_idle_connection_makes_room_when_all_descriptors_are_in_use(receive: Receive, transport: HTTPTransport) -> None:
    one, other = receive(), receive()
    status_of(transport, one.url())

    with descriptors_left(0):
        assert status_of(transport, other.url()) == 200


def test_machine_without_descriptors_for_a_connection_is_a_local_fault(
    receive: Receive, make_transport: MakeTransport
) -> None:
    one, other = receive(), receive()
    transport = make_transport(idle_timeout=timedelta(0))
    status_of(transport, one.url())

    # Those of the standard streams: none is free, whenever the receiver closes its end of the first connection.
    with descriptors_below(3):
        outcome = transport.send(make_delivery(other.url()))

    assert outcome == NotSent(reason=NotSentReason.LOCAL_FAULT, detail="EMFILE")
    assert status_of(transport, other.url()) == 200


@pytest.mark.parametrize("count", [0, 1])
def test_machine_without_descriptors_for_the_thread_is_a_local_fault(
    receive: Receive, transport: HTTPTransport, count: int
) -> None:
    receiver = receive()

    with descriptors_left(count):
        outcome = transport.send(make_delivery(receiver.url()))

    assert outcome == NotSent(reason=NotSentReason.LOCAL_FAULT, detail="no network thread: OSError")
    assert status_of(transport, receiver.url()) == 200


def test_machine_without_threads_is_a_local_fault(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()

    with no_threads_left():
        outcome = transport.send(make_delivery(receiver.url()))

    assert outcome == NotSent(reason=NotSentReason.LOCAL_FAULT, detail="no network thread: RuntimeError")
    assert status_of(transport, receiver.url()) == 200


def test_machine_without_threads_for_look_ups_is_a_local_fault(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    policy = TargetPolicy(allow=["127.0.0.0/8"], resolver=lambda host, port: ["127.0.0.1"])
    transport = make_transport(target_policy=policy)
    status_of(transport, receiver.url())

    with no_threads_left():
        outcome = transport.send(make_delivery(receiver.url(host="a.example")))

    assert isinstance(outcome, NotSent)
    assert outcome.reason is NotSentReason.LOCAL_FAULT
    assert status_of(transport, receiver.url(host="a.example")) == 200


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="finds the selector's descriptor by its Linux name")
def test_selector_that_breaks_ends_its_attempts_and_the_next_gets_a_new_one(
    receive: Receive, transport: HTTPTransport, caplog: pytest.LogCaptureFixture
) -> None:
    receiver, hanging = receive(), receive(hang)
    outcomes = Outcomes()
    before = _selectors()
    transport.submit(make_delivery(hanging.url()), outcomes)
    hanging.wait_for_requests(1)
    [selector] = _selectors() - before

    with open(os.devnull) as other:  # noqa: PTH123 - as a host does that closes and reopens all descriptors
        os.dup2(other.fileno(), selector)
    transport.submit(make_delivery(receiver.url()), outcomes)

    assert not [answer for answer in outcomes.answers(2) if answer.failure is None]
    assert "the network thread failed" in caplog.text
    assert status_of(transport, receiver.url()) == 200


def _selectors() -> set[int]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if "eventpoll" in os.readlink(link):  # noqa: PTH115 - it names no file
                found.add(int(link.name))
    return found


def _in_forked_child(work: Callable[[], object]) -> object:
    """Run *work* in a forked child; return its result, which must be JSON."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return json.loads(result)
