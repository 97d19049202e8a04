"""Receivers that stall, drip and break off. Whatever they do, an attempt ends by its deadline with an honest word."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest

from callbackq.core.delivery import Answer
from callbackq.core.models import AttemptFailure
from callbackq.transport import HTTPTransport
from support.deliveries import make_delivery
from support.receivers import OK, Conversation, Receiver

Receive = Callable[..., Receiver]
MakeTransport = Callable[..., HTTPTransport]

DEADLINE = timedelta(seconds=0.2)
# The machine may be busy; a receiver that got its way would take the twenty seconds its script is given.
LATEST = DEADLINE + timedelta(seconds=2)

HEAD = b"HTTP/1.1 200 OK\r\n"


def after_request(data: bytes, *, dripped: bytes = b"", ends: bool = False) -> Callable[[Conversation], None]:
    """A script that answers with *data*, then byte by byte with *dripped*, and then hangs, or ends."""

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(data)
        if dripped:
            conversation.drip(dripped)
        elif not ends:
            conversation.hang()

    return script


def attempt(transport: HTTPTransport, receiver: Receiver, *, data: bytes = b"{}") -> Answer:
    answer = transport.send(make_delivery(receiver.url(), data=data))
    assert isinstance(answer, Answer)
    return answer


WITHOUT_A_HEAD = {
    "silence": after_request(b""),
    "dripped status line": after_request(b"", dripped=b"HTTP/1.1 200 O" + b"K" * 999),
    "dripped field": after_request(HEAD + b"A: ", dripped=b"b" * 999),
    "dripped fields": after_request(HEAD, dripped=b"A: b\r\n" * 99),
    "dripped interim answer": after_request(b"HTTP/1.1 100 Continue\r\n", dripped=b"A: b\r\n" * 99),
    "everything but the blank line": after_request(HEAD + b"Content-Length: 0\r\n"),
}


@pytest.mark.parametrize("name", WITHOUT_A_HEAD)
def test_receiver_that_never_completes_its_head_times_out(
    receive: Receive, make_transport: MakeTransport, name: str
) -> None:
    answer = attempt(make_transport(deadline=DEADLINE), receive(WITHOUT_A_HEAD[name]))

    assert (answer.status_code, answer.failure) == (0, AttemptFailure.TIMEOUT)
    assert DEADLINE <= answer.duration < LATEST


WITH_A_HEAD = {
    "no body": after_request(HEAD + b"Content-Length: 5\r\n\r\n"),
    "dripped body": after_request(HEAD + b"Content-Length: 999\r\n\r\n", dripped=b"x" * 999),
    "dripped body without end": after_request(HEAD + b"\r\n", dripped=b"x" * 999),
    "dripped chunk size": after_request(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", dripped=b"0" * 999),
    "dripped chunk": after_request(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3e7\r\n", dripped=b"x" * 999),
    "dripped trailers": after_request(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", dripped=b"A: b\r\n" * 99),
}


@pytest.mark.parametrize("name", WITH_A_HEAD)
def test_receiver_that_never_completes_its_body_has_answered(
    receive: Receive, make_transport: MakeTransport, name: str
) -> None:
    answer = attempt(make_transport(deadline=DEADLINE), receive(WITH_A_HEAD[name]))

    assert (answer.status_code, answer.failure, answer.truncated) == (200, None, True)
    assert DEADLINE <= answer.duration < LATEST


def test_receiver_that_doesnt_read_times_out(receive: Receive, make_transport: MakeTransport) -> None:
    over = threading.Event()

    def script(conversation: Conversation) -> None:
        over.wait(10)

    answer = attempt(make_transport(deadline=DEADLINE), receive(script), data=b"x" * 1024 * 1024)
    over.set()

    assert answer.failure is AttemptFailure.TIMEOUT
    assert answer.duration < LATEST


def test_head_cut_off_at_any_byte_is_never_a_success(receive: Receive, transport: HTTPTransport) -> None:
    head = HEAD + b"Content-Length: 0\r\n\r\n"
    cuts = iter(range(len(head)))

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(head[: next(cuts)])

    receiver = receive(script)

    answers = [attempt(transport, receiver) for _ in range(len(head))]

    assert {(answer.status_code, answer.failure) for answer in answers} == {(0, AttemptFailure.CONNECTION_LOST)}


def read_and_reset(conversation: Conversation) -> None:
    conversation.read_something()
    conversation.reset()


NO_ANSWERS = {
    "closes at once": (lambda conversation: None, AttemptFailure.CONNECTION_LOST),
    "reads and resets": (read_and_reset, AttemptFailure.CONNECTION_LOST),
    "reads and closes": (after_request(b"", ends=True), AttemptFailure.CONNECTION_LOST),
    "speaks another protocol": (after_request(b"220 mail ESMTP\r\n"), AttemptFailure.PROTOCOL),
    "switches protocols": (after_request(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), AttemptFailure.PROTOCOL),
    "floods with interim answers": (after_request(b"HTTP/1.1 100 Continue\r\n\r\n" * 11), AttemptFailure.PROTOCOL),
    "sends two lengths": (
        after_request(HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx"),
        AttemptFailure.PROTOCOL,
    ),
    "sends too many fields": (after_request(HEAD + b"A: b\r\n" * 20_000), AttemptFailure.TOO_LARGE),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_has_a_word_of_its_own(receive: Receive, transport: HTTPTransport, name: str) -> None:
    script, failure = NO_ANSWERS[name]

    answer = attempt(transport, receive(script))

    assert (answer.status_code, answer.failure) == (0, failure)
    assert answer.response.headers == {}
    assert answer.response.data is None


@pytest.mark.parametrize("last_word", ["end", "reset"])
def test_answer_whose_body_breaks_off_counts(receive: Receive, transport: HTTPTransport, last_word: str) -> None:
    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(HEAD + b"Content-Length: 9\r\n\r\nhalf")
        if last_word == "reset":
            conversation.reset()

    answer = attempt(transport, receive(script))

    assert (answer.status_code, answer.failure, answer.truncated) == (200, None, True)


def test_attempts_at_hostile_receivers_dont_hold_up_others(receive: Receive, make_transport: MakeTransport) -> None:
    transport = make_transport()
    hostile = receive(after_request(b""))
    friendly = receive(after_request(OK))
    for _ in range(50):
        transport.submit(make_delivery(hostile.url()), lambda outcome: None)

    answer = attempt(transport, friendly)

    assert answer.status_code == 200
    assert answer.duration < timedelta(seconds=2)
