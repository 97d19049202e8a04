"""Whoever looks for the cause of a failure finds it in the attempt, and nothing that must not be there."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable
from datetime import timedelta

import pytest
import trustme

from callbackq.core.delivery import Answer
from callbackq.core.models import AttemptFailure
from callbackq.errors import TargetNotAllowedError
from callbackq.targets import TargetPolicy
from callbackq.transport import HTTPTransport
from callbackq.transport.details import detail_of
from support.deliveries import Outcomes, make_delivery
from support.receivers import Conversation, Receiver, Script, full_listener

Receive = Callable[..., Receiver]
MakeTransport = Callable[..., HTTPTransport]
ServerTLS = Callable[..., ssl.SSLContext]

SHORT = timedelta(seconds=0.2)
CANARY = "canary7331"


def causes(transport: HTTPTransport, url: str) -> tuple[AttemptFailure | None, str]:
    answer = transport.send(make_delivery(url))
    assert isinstance(answer, Answer), answer
    return answer.failure, answer.detail


def says(*data: bytes, then: Script = lambda conversation: None) -> Script:
    """A script that reads the request, answers with this and goes on with *then*."""

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(b"".join(data))
        then(conversation)

    return script


def hangs(conversation: Conversation) -> None:
    conversation.hang()


def resets(conversation: Conversation) -> None:
    conversation.read_something()
    conversation.reset()


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (TargetNotAllowedError(CANARY, "10.1.2.3", "10.0.0.0/8", CANARY), "10.0.0.0/8 (10.1.2.3)"),
        (TargetNotAllowedError(CANARY, None, ".localhost", CANARY), ".localhost"),
        (TargetNotAllowedError(CANARY, None, "port", CANARY), "port"),
        (socket.gaierror(socket.EAI_NONAME, CANARY), "EAI_NONAME"),
        (socket.gaierror(socket.EAI_AGAIN, CANARY), "EAI_AGAIN"),
        (socket.gaierror(7331, CANARY), "gaierror"),
        (socket.gaierror(CANARY), "gaierror"),
        (OSError(errno.ECONNREFUSED, CANARY), "ECONNREFUSED"),
        (OSError(errno.ENETUNREACH, CANARY), "ENETUNREACH"),
        (OSError(733_100, CANARY), "OSError"),
        (ConnectionError(CANARY), "ConnectionError"),
        # Its number would be that of EPERM.
        (ssl.SSLError(1, CANARY), "SSLError"),
        (ssl.SSLEOFError(8, CANARY), "SSLEOFError"),
        (ZeroDivisionError(CANARY), "ZeroDivisionError"),
        (SystemExit(CANARY), "SystemExit"),
    ],
)
def test_an_error_is_named_without_its_text(error: BaseException, detail: str) -> None:
    assert detail_of(error) == detail


# Before the connection.


@pytest.mark.parametrize(
    ("url", "resolved", "detail"),
    [
        ("http://127.0.0.1:8000/", "", "127.0.0.0/8 (127.0.0.1)"),
        ("http://a.example/", "10.1.2.3", "10.0.0.0/8 (10.1.2.3)"),
        ("http://a.example/", "::ffff:10.1.2.3", "10.0.0.0/8 (10.1.2.3)"),
        ("http://a.example:25/", "8.8.8.8", "port"),
        ("http://localhost:8000/", "127.0.0.1", ".localhost"),
        ("http://intranet/", "10.1.2.3", "single label"),
        ("http://metadata.google.internal/", "169.254.169.254", "metadata.google.internal"),
        ("http://a.example/", CANARY, "address"),
    ],
)
def test_refused_target_names_the_rule_and_the_address(
    make_transport: MakeTransport, url: str, resolved: str, detail: str
) -> None:
    transport = make_transport(target_policy=TargetPolicy(resolver=lambda host, port: [resolved]))

    assert causes(transport, url) == (AttemptFailure.TARGET_NOT_ALLOWED, detail)


@pytest.mark.parametrize(
    ("fault", "detail"), [(socket.gaierror(socket.EAI_AGAIN, CANARY), "EAI_AGAIN"), (OSError(CANARY), "OSError")]
)
def test_failed_look_up_names_the_resolvers_code(make_transport: MakeTransport, fault: OSError, detail: str) -> None:
    def resolver(host: str, port: int) -> list[str]:
        raise fault

    transport = make_transport(target_policy=TargetPolicy(resolver=resolver))

    assert causes(transport, "http://a.example/") == (AttemptFailure.DNS, detail)


def test_name_without_addresses_says_so(make_transport: MakeTransport) -> None:
    transport = make_transport(target_policy=TargetPolicy(resolver=lambda host, port: []))

    assert causes(transport, "http://a.example/") == (AttemptFailure.DNS, "no address")


def test_failed_connection_names_every_cause_once(make_transport: MakeTransport) -> None:
    addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    policy = TargetPolicy(allow=["127.0.0.0/8"], resolver=lambda host, port: addresses)
    transport = make_transport(target_policy=policy, connect_timeout=SHORT)

    with full_listener() as port:
        cause = causes(transport, f"http://a.example:{port}/")

    assert cause == (AttemptFailure.CONNECT, "no answer in time, ECONNREFUSED")


# TLS.


def test_refused_certificate_says_what_is_wrong_with_it(
    receive: Receive, make_transport: MakeTransport, server_tls: ServerTLS
) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(stranger)
    policy = TargetPolicy(allow=["127.0.0.0/8"], resolver=lambda host, port: ["127.0.0.1"])
    transport = make_transport(target_policy=policy)

    unknown = causes(transport, receive(tls=stranger).url())
    others = causes(transport, receive(tls=server_tls("b.example")).url(host=f"{CANARY}.example"))
    other_address = causes(transport, receive(tls=server_tls("b.example")).url())

    assert unknown[0] is others[0] is other_address[0] is AttemptFailure.TLS
    assert unknown[1].startswith("CERTIFICATE_VERIFY_FAILED: ")
    assert "certificate" in unknown[1].partition(" ")[2]
    assert others[1] == "CERTIFICATE_VERIFY_FAILED: Hostname mismatch"
    assert other_address[1] == "CERTIFICATE_VERIFY_FAILED: IP address mismatch"


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        (lambda conversation: conversation.send(b"\x15\x03\x01\x00\x02\x02\x28"), "HANDSHAKE_FAILURE"),
        (resets, "ECONNRESET"),
    ],
    ids=["alert", "reset"],
)
def test_failed_handshake_names_its_reason(
    receive: Receive, transport: HTTPTransport, script: Script, detail: str
) -> None:
    receiver = receive(script)

    failure, found = causes(transport, f"https://127.0.0.1:{receiver.port}/")

    assert failure is AttemptFailure.TLS
    assert detail in found


# The stage at which the time was up.


def test_deadline_names_the_stage(receive: Receive, make_transport: MakeTransport) -> None:
    transport = make_transport(deadline=SHORT)
    mute, silent = receive(hangs), receive(says(then=hangs))
    slow = receive(says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", then=hangs))

    with full_listener() as port:
        stages = [
            causes(transport, f"http://127.0.0.1:{port}/"),
            causes(transport, f"https://127.0.0.1:{mute.port}/"),
            causes(transport, silent.url()),
            causes(transport, slow.url()),
        ]

    assert stages == [
        (AttemptFailure.TIMEOUT, "connecting"),
        (AttemptFailure.TIMEOUT, "TLS handshake"),
        (AttemptFailure.TIMEOUT, "waiting for the head"),
        (None, "timeout: reading the body"),
    ]


def test_deadline_in_the_look_up_names_it(make_transport: MakeTransport, receive: Receive) -> None:
    receiver = receive()

    def resolver(host: str, port: int) -> list[str]:
        receiver.stopped.wait(1)
        return []

    transport = make_transport(target_policy=TargetPolicy(resolver=resolver), deadline=SHORT)

    assert causes(transport, "http://a.example/") == (AttemptFailure.TIMEOUT, "looking up the name")


def test_interruption_names_the_stage(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive(says(then=hangs))
    outcomes = Outcomes()
    delivery = make_delivery(receiver.url())
    transport.submit(delivery, outcomes)
    receiver.wait_for_requests(1)

    transport.interrupt([delivery])

    [answer] = outcomes.answers(1)
    assert (answer.failure, answer.detail) == (AttemptFailure.INTERRUPTED, "waiting for the head")


# What became of the answer. Which rule of HTTP was broken is tested where the rules are: tests/core/test_exchange.py.


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (says(), (AttemptFailure.CONNECTION_LOST, "closed while waiting for the head")),
        (resets, (AttemptFailure.CONNECTION_LOST, "ECONNRESET")),
        (says(f"220 {CANARY} ESMTP\r\n".encode()), (AttemptFailure.PROTOCOL, "no status line of HTTP/1")),
        (
            says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"),
            (None, "connection_lost: closed while reading the body"),
        ),
        (says(b"HTTP/1.1 500 Oops\r\n\r\n", b"x" * 20_000), (None, "longer than the limit of 16384 bytes")),
        (says(b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nok"), (None, "")),
    ],
    ids=["end", "reset", "banner", "half a body", "long body", "whole answer"],
)
def test_answer_that_fails_or_breaks_off_says_why(
    receive: Receive, transport: HTTPTransport, script: Script, expected: tuple[AttemptFailure | None, str]
) -> None:
    assert causes(transport, receive(script).url()) == expected
