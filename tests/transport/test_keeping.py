"""Which connections carry a second request, and which must not."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest

from callbackq.core.delivery import Answer
from callbackq.core.models import AttemptFailure
from callbackq.targets import TargetPolicy
from callbackq.transport import HTTPTransport
from support.deliveries import Outcomes, make_delivery
from support.receivers import OK, Conversation, Receiver

Receive = Callable[..., Receiver]
MakeTransport = Callable[..., HTTPTransport]


def status_of(transport: HTTPTransport, url: str) -> int:
    answer = transport.send(make_delivery(url))
    assert isinstance(answer, Answer)
    return answer.status_code


def first_answer(data: bytes) -> Callable[[Conversation], None]:
    """A script that answers the very first request with *data*, and every other with 500."""
    answers = iter([data])

    def script(conversation: Conversation) -> None:
        while conversation.read_request():
            conversation.send(next(answers, b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"))

    return script


@pytest.mark.parametrize(
    "data",
    [
        OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
    ids=["known length", "chunked", "no content"],
)
def test_connection_is_kept_after_an_answer_that_ended_beyond_doubt(
    receive: Receive, transport: HTTPTransport, data: bytes
) -> None:
    receiver = receive(first_answer(data))

    statuses = [status_of(transport, receiver.url()) for _ in range(3)]

    assert statuses == [int(data[9:12]), 500, 500]
    assert receiver.connections == 1


@pytest.mark.parametrize(
    "data",
    [
        OK + OK,
        OK + b"\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK,
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    ],
    ids=[
        *("second answer", "stray line break", "103 first", "100 first", "asked to close", "HTTP/1.0"),
        *("length and chunks", "bad length", "204 with a body", "bare line feeds"),
    ],
)
def test_next_request_gets_its_own_answer_whatever_came_before(
    receive: Receive, transport: HTTPTransport, data: bytes
) -> None:
    receiver = receive(first_answer(data))

    statuses = [status_of(transport, receiver.url()) for _ in range(2)]

    assert statuses == [int(data[9:12]) if b"204" in data else 200, 500]
    assert receiver.connections == 2


def test_connection_that_speaks_out_of_turn_is_not_used_again(receive: Receive, transport: HTTPTransport) -> None:
    may_speak = threading.Event()
    has_spoken = threading.Event()

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(OK)
        may_speak.wait(10)
        conversation.send(OK)
        has_spoken.set()
        conversation.hang()

    receiver = receive(script)
    assert status_of(transport, receiver.url()) == 200

    may_speak.set()
    assert has_spoken.wait(10)
    status_of(transport, receiver.url())

    assert receiver.connections == 2


def test_connection_the_receiver_has_closed_is_not_used_again(receive: Receive, transport: HTTPTransport) -> None:
    closed = threading.Event()

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(OK)
        conversation.reset()
        closed.set()

    receiver = receive(script)
    assert status_of(transport, receiver.url()) == 200
    assert closed.wait(10)

    assert status_of(transport, receiver.url()) == 200
    assert len(receiver.requests) == 2


def test_request_that_fails_on_a_kept_connection_is_lost_and_not_sent_again(
    receive: Receive, transport: HTTPTransport
) -> None:
    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(OK)
        conversation.read_request()
        conversation.reset()

    receiver = receive(script)
    status_of(transport, receiver.url())

    answer = transport.send(make_delivery(receiver.url()))

    assert isinstance(answer, Answer)
    assert (answer.status_code, answer.failure) == (0, AttemptFailure.CONNECTION_LOST)
    assert [request.connection for request in receiver.requests] == [1, 1]


@pytest.mark.parametrize("setting", ["idle_timeout", "max_connection_age"])
def test_connections_are_kept_for_no_longer_than_the_setting_says(
    receive: Receive, make_transport: MakeTransport, setting: str
) -> None:
    receiver = receive()
    transport = make_transport(**{setting: timedelta(0)})

    for _ in range(2):
        assert status_of(transport, receiver.url()) == 200

    assert receiver.connections == 2
    asked = {request.fields.get("connection") for request in receiver.requests}
    assert asked == ({"close"} if setting == "idle_timeout" else {None})


def test_idle_connection_is_closed_after_its_time(receive: Receive, make_transport: MakeTransport) -> None:
    ended = threading.Event()

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(OK)
        conversation.hang()
        ended.set()

    status_of(make_transport(idle_timeout=timedelta(seconds=0.1)), receive(script).url())

    assert ended.wait(10)


def test_two_names_of_one_address_share_no_connection(
    receive: Receive, make_transport: MakeTransport, server_tls: Callable[..., ssl.SSLContext]
) -> None:
    names: list[str | None] = []
    context = server_tls("one.example", "two.example")
    context.sni_callback = lambda _, name, __: names.append(name)
    receiver = receive(tls=context)
    policy = TargetPolicy(allow=["127.0.0.0/8"], resolver=lambda host, port: ["127.0.0.1"])
    transport = make_transport(target_policy=policy)

    for host in ("one.example", "two.example", "one.example"):
        assert status_of(transport, receiver.url(host=host)) == 200

    assert names == ["one.example", "two.example"]
    assert [request.connection for request in receiver.requests] == [1, 2, 1]


def test_kept_connection_to_an_address_the_name_no_longer_has_is_not_used(
    receive: Receive, make_transport: MakeTransport
) -> None:
    addresses = iter(["127.0.0.1", "127.0.0.2"])
    receiver = receive()
    policy = TargetPolicy(allow=["127.0.0.0/8"], resolver=lambda host, port: [next(addresses)])
    transport = make_transport(target_policy=policy)
    assert status_of(transport, receiver.url(host="moved.example")) == 200

    answer = transport.send(make_delivery(receiver.url(host="moved.example")))

    assert isinstance(answer, Answer)
    assert answer.failure is AttemptFailure.CONNECT  # the receiver listens at 127.0.0.1 only


def test_kept_connections_are_bounded(receive: Receive, transport: HTTPTransport) -> None:
    count = 300
    everybody = threading.Barrier(count)
    closed_by_sender = threading.Semaphore(0)

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        everybody.wait(20)
        conversation.send(OK)
        conversation.hang()
        closed_by_sender.release()

    receiver = receive(script)
    outcomes = Outcomes()

    for _ in range(count):
        transport.submit(make_delivery(receiver.url()), outcomes)
    outcomes.answers(count)

    for _ in range(count - 128):
        assert closed_by_sender.acquire(timeout=10)
    assert not closed_by_sender.acquire(blocking=False)
