"""From the name to the connection: look-up, policy, TCP and TLS."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import trustme

from callbackq.core.delivery import Answer, NotSent, NotSentReason
from callbackq.core.models import AttemptFailure
from callbackq.targets import TargetPolicy
from callbackq.transport import HTTPTransport
from callbackq.transport.resolver import MAX_THREADS
from support.deliveries import Outcomes, make_delivery
from support.receivers import OK, Conversation, Receiver, full_listener

Receive = Callable[..., Receiver]
MakeTransport = Callable[..., HTTPTransport]
ServerTLS = Callable[..., ssl.SSLContext]
Resolver = Callable[[str, int], list[str]]

SHORT = timedelta(seconds=0.2)
LATEST = SHORT + timedelta(seconds=2)


def resolving(resolver: Resolver) -> TargetPolicy:
    return TargetPolicy(allow=["127.0.0.0/8", "::1"], resolver=resolver)


def answer_of(transport: HTTPTransport, url: str) -> Answer:
    outcome = transport.send(make_delivery(url))
    assert isinstance(outcome, Answer), outcome
    return outcome


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class Names:
    """A resolver under the test's control: names that hang until they are let go, and others."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.let_go = threading.Event()
        self._changed = threading.Condition()

    def __call__(self, host: str, port: int) -> list[str]:
        with self._changed:
            self.asked.append((host, port))
            self._changed.notify_all()
        if host.startswith("hang"):
            self.let_go.wait(20)
        return ["127.0.0.1"]

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= count, 10)


@pytest.fixture
def names() -> Iterator[Names]:
    names = Names()
    yield names
    names.let_go.set()


# Look-up.


def test_every_attempt_looks_its_host_up_exactly_once(
    receive: Receive, make_transport: MakeTransport, names: Names
) -> None:
    receiver = receive()
    transport = make_transport(target_policy=resolving(names))

    statuses = [answer_of(transport, receiver.url(host="a.example")).status_code for _ in range(3)]

    assert statuses == [200] * 3
    assert names.asked == [("a.example", receiver.port)] * 3
    assert {request.fields["host"] for request in receiver.requests} == {f"a.example:{receiver.port}"}


def test_literal_addresses_are_not_looked_up(receive: Receive, make_transport: MakeTransport, names: Names) -> None:
    answer_of(make_transport(target_policy=resolving(names)), receive().url())

    assert not names.asked


def test_literal_ipv6_address_is_reached(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive(family=socket.AF_INET6)

    assert answer_of(transport, receiver.url(host="[::1]")).status_code == 200
    assert receiver.requests[0].fields["host"] == f"[::1]:{receiver.port}"


@pytest.mark.parametrize(
    "fault",
    [socket.gaierror(socket.EAI_NONAME, "no such name"), OSError("odd")],
    ids=["unknown name", "fault of the resolver"],
)
def test_name_that_cant_be_looked_up_is_a_dns_failure(make_transport: MakeTransport, fault: Exception) -> None:
    def resolver(host: str, port: int) -> list[str]:
        raise fault

    answer = answer_of(make_transport(target_policy=resolving(resolver)), "http://a.example/")

    assert (answer.status_code, answer.failure) == (0, AttemptFailure.DNS)


def test_name_without_addresses_is_a_dns_failure(make_transport: MakeTransport) -> None:
    transport = make_transport(target_policy=resolving(lambda host, port: []))

    assert answer_of(transport, "http://a.example/").failure is AttemptFailure.DNS


@pytest.mark.parametrize("fault", [ZeroDivisionError(), SystemExit()], ids=["exception", "exit"])
def test_resolver_that_breaks_fails_its_attempt_and_no_other(
    receive: Receive, make_transport: MakeTransport, fault: BaseException
) -> None:
    receiver = receive()
    broken = True

    def resolver(host: str, port: int) -> list[str]:
        if broken:
            raise fault
        return ["127.0.0.1"]

    transport = make_transport(target_policy=resolving(resolver))

    failures = {answer_of(transport, receiver.url(host="a.example")).failure for _ in range(10)}
    broken = False

    assert failures == {AttemptFailure.INTERNAL}
    assert answer_of(transport, receiver.url(host="a.example")).status_code == 200


def test_machine_without_descriptors_for_a_look_up_is_a_local_fault(make_transport: MakeTransport) -> None:
    def resolver(host: str, port: int) -> list[str]:
        raise OSError(errno.EMFILE, "too many open files")

    outcome = make_transport(target_policy=resolving(resolver)).send(make_delivery("http://a.example/"))

    assert outcome == NotSent(reason=NotSentReason.LOCAL_FAULT, detail="EMFILE")


def test_look_up_that_hangs_ends_with_the_deadline(make_transport: MakeTransport, names: Names) -> None:
    answer = answer_of(make_transport(target_policy=resolving(names), deadline=SHORT), "http://hang.example/")

    assert answer.failure is AttemptFailure.TIMEOUT
    assert SHORT <= answer.duration < LATEST


def test_host_whose_look_ups_hang_doesnt_stop_other_hosts(
    receive: Receive, make_transport: MakeTransport, names: Names
) -> None:
    receiver = receive()
    transport = make_transport(target_policy=resolving(names))
    for _ in range(20):
        transport.submit(make_delivery("http://hang.example/"), lambda outcome: None)
    names.wait_for(2)

    assert answer_of(transport, receiver.url(host="a.example")).status_code == 200
    assert [host for host, _ in names.asked].count("hang.example") == 2


def test_attempt_whose_look_up_never_began_because_of_others_was_not_made(
    receive: Receive, make_transport: MakeTransport, names: Names
) -> None:
    receiver = receive()
    transport = make_transport(target_policy=resolving(names), deadline=timedelta(seconds=1))
    outcomes = Outcomes()
    for number in range(MAX_THREADS):
        transport.submit(make_delivery(f"http://hang{number}.example/"), outcomes)
    names.wait_for(MAX_THREADS)

    innocent = transport.send(make_delivery(receiver.url(host="a.example")))
    names.let_go.set()

    assert isinstance(innocent, NotSent)
    assert innocent.reason is NotSentReason.TIME_IS_UP
    assert {answer.failure for answer in outcomes.answers(MAX_THREADS)} == {AttemptFailure.TIMEOUT}
    assert answer_of(make_transport(), receiver.url()).status_code == 200


def test_second_look_up_of_a_hanging_host_is_that_hosts_fault(make_transport: MakeTransport, names: Names) -> None:
    transport = make_transport(target_policy=resolving(names), deadline=SHORT)
    outcomes = Outcomes()

    for _ in range(5):
        transport.submit(make_delivery("http://hang.example/"), outcomes)

    assert {answer.failure for answer in outcomes.answers(5)} == {AttemptFailure.TIMEOUT}


def test_look_ups_share_a_bounded_number_of_threads(
    receive: Receive, make_transport: MakeTransport, names: Names
) -> None:
    receiver = receive()
    transport = make_transport(target_policy=resolving(names))
    outcomes = Outcomes()
    for number in range(100):
        transport.submit(make_delivery(receiver.url(host=f"n{number}.example")), outcomes)

    assert {answer.status_code for answer in outcomes.answers(100)} == {200}
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("callbackq-dns-")]
    assert 1 <= len(threads) <= MAX_THREADS
    transport.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


# Policy.


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "http://a.example:{port}/"], ids=["literal", "name"])
def test_target_the_policy_refuses_is_not_connected_to(
    receive: Receive, make_transport: MakeTransport, url: str
) -> None:
    receiver = receive()
    transport = make_transport(target_policy=TargetPolicy(resolver=lambda host, port: ["127.0.0.1"]))

    answer = answer_of(transport, url.format(port=receiver.port))

    assert (answer.status_code, answer.failure) == (0, AttemptFailure.TARGET_NOT_ALLOWED)
    assert not receiver.connections


def test_one_refused_address_among_several_refuses_the_name(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    transport = make_transport(target_policy=resolving(lambda host, port: ["127.0.0.1", "10.0.0.1"]))

    assert answer_of(transport, receiver.url(host="a.example")).failure is AttemptFailure.TARGET_NOT_ALLOWED
    assert not receiver.connections


def test_policy_is_asked_at_every_attempt(receive: Receive, make_transport: MakeTransport) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    receiver = receive()
    transport = make_transport(target_policy=resolving(lambda host, port: next(answers)))

    first, second = (answer_of(transport, receiver.url(host="a.example")) for _ in range(2))

    assert (first.status_code, second.failure) == (200, AttemptFailure.TARGET_NOT_ALLOWED)


# Connecting.


def test_refused_connection_is_a_connect_failure(transport: HTTPTransport) -> None:
    assert answer_of(transport, f"http://127.0.0.1:{free_port()}/").failure is AttemptFailure.CONNECT


def test_address_that_refuses_at_once_is_a_connect_failure(make_transport: MakeTransport) -> None:
    """No connection can lead to the broadcast address; the system says so without sending anything."""
    transport = make_transport(target_policy=TargetPolicy(allow=["255.255.255.255"]))

    assert answer_of(transport, "http://255.255.255.255:8000/").failure is AttemptFailure.CONNECT


def test_connection_that_leads_elsewhere_is_not_used(receive: Receive, make_transport: MakeTransport) -> None:
    """The address 0.0.0.0 leads to 127.0.0.1, which nobody checked."""
    receiver = receive()
    transport = make_transport(target_policy=TargetPolicy(allow=["0.0.0.0"]))

    assert answer_of(transport, receiver.url(host="0.0.0.0")).failure is AttemptFailure.CONNECT
    assert not receiver.requests


def test_addresses_are_tried_in_order_until_one_connects(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    addresses = ["127.0.0.3", "127.0.0.2", "127.0.0.1"]
    transport = make_transport(target_policy=resolving(lambda host, port: addresses))

    assert answer_of(transport, receiver.url(host="a.example")).status_code == 200


def test_only_the_first_eight_addresses_of_a_host_are_tried(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    refusing = [f"127.0.0.{number}" for number in range(2, 10)]

    failures = [
        answer_of(
            make_transport(target_policy=resolving(lambda host, port, found=found: [*found, "127.0.0.1"])),  # type: ignore[misc]
            receiver.url(host="a.example"),
        ).failure
        for found in (refusing[:7], refusing)
    ]

    assert failures == [None, AttemptFailure.CONNECT]


def test_addresses_that_are_not_tried_are_judged_all_the_same(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    addresses = [f"127.0.0.{number}" for number in range(1, 100)] + ["10.0.0.1"]

    answer = answer_of(
        make_transport(target_policy=resolving(lambda host, port: addresses)), receiver.url(host="a.example")
    )

    assert answer.failure is AttemptFailure.TARGET_NOT_ALLOWED
    assert not receiver.connections


@pytest.mark.parametrize(
    ("settings", "failure"),
    [({"connect_timeout": SHORT}, AttemptFailure.CONNECT), ({"deadline": SHORT}, AttemptFailure.TIMEOUT)],
    ids=["connect timeout", "deadline"],
)
def test_receiver_that_never_accepts_ends_in_time(
    make_transport: MakeTransport, settings: dict[str, timedelta], failure: AttemptFailure
) -> None:
    with full_listener() as port:
        answer = answer_of(make_transport(**settings), f"http://127.0.0.1:{port}/")

    assert answer.failure is failure
    assert SHORT <= answer.duration < LATEST


def test_address_that_doesnt_answer_leaves_time_for_the_others(make_transport: MakeTransport) -> None:
    with full_listener() as port, socket.create_server(("127.0.0.2", port)) as listener:
        listener.settimeout(10)
        transport = make_transport(
            target_policy=resolving(lambda host, port: ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]),
            connect_timeout=timedelta(seconds=1),
        )
        outcomes = Outcomes()
        transport.submit(make_delivery(f"http://a.example:{port}/"), outcomes)

        connection, _ = listener.accept()
        connection.close()

    # A quarter of the time went to the address that doesn't answer, and not all of it.
    assert outcomes.answers(1)[0].duration < timedelta(seconds=0.9)


def test_connect_timeout_covers_connecting_only(receive: Receive, make_transport: MakeTransport) -> None:
    def script(conversation: Conversation) -> None:
        conversation.read_request()
        receiver.stopped.wait(0.3)
        conversation.send(OK)

    receiver: Receiver = receive(script)

    assert answer_of(make_transport(connect_timeout=SHORT), receiver.url()).status_code == 200


# TLS.


def test_answer_comes_through_tls(receive: Receive, transport: HTTPTransport, server_tls: ServerTLS) -> None:
    receiver = receive(tls=server_tls("127.0.0.1"))

    answers = [answer_of(transport, receiver.url()) for _ in range(3)]

    assert [(answer.status_code, answer.response.data) for answer in answers] == [(200, b"ok")] * 3
    assert receiver.connections == 1


def test_large_request_and_answer_come_through_tls(
    receive: Receive, make_transport: MakeTransport, server_tls: ServerTLS
) -> None:
    def script(conversation: Conversation) -> None:
        request = conversation.read_request()
        assert request
        conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(request.body) + request.body)
        conversation.hang()

    receiver = receive(script, tls=server_tls("127.0.0.1"))
    body = bytes(range(256)) * 4096

    outcome = make_transport(response_limit=len(body)).send(make_delivery(receiver.url(), data=body))

    assert isinstance(outcome, Answer)
    assert outcome.response.data == body
    assert not outcome.truncated


def test_certificate_must_be_the_hosts_whatever_the_address(
    receive: Receive, make_transport: MakeTransport, server_tls: ServerTLS
) -> None:
    right, wrong = (receive(tls=server_tls(name)) for name in ("a.example", "b.example"))
    transport = make_transport(target_policy=resolving(lambda host, port: ["127.0.0.1"]))

    answers = [answer_of(transport, receiver.url(host="a.example")) for receiver in (right, wrong)]

    assert [(answer.status_code, answer.failure) for answer in answers] == [(200, None), (0, AttemptFailure.TLS)]
    assert not wrong.requests


def test_certificate_of_an_unknown_authority_is_refused(receive: Receive, transport: HTTPTransport) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    receiver = receive(tls=context)

    assert answer_of(transport, receiver.url()).failure is AttemptFailure.TLS
    assert not receiver.requests


def test_default_context_knows_no_authority_of_ours(receive: Receive, server_tls: ServerTLS) -> None:
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.1"]))
    receiver = receive(tls=server_tls("127.0.0.1"))

    answer = answer_of(transport, receiver.url())
    transport.close()

    assert answer.failure is AttemptFailure.TLS


def hello_and_reset(conversation: Conversation) -> None:
    conversation.read_something()
    conversation.reset()


@pytest.mark.parametrize(
    "script",
    [
        lambda conversation: conversation.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
        lambda conversation: conversation.send(b"\x15\x03\x01\x00\x02\x02\x28"),
        lambda conversation: None,
        hello_and_reset,
    ],
    ids=["plain http", "alert", "end of stream", "reset"],
)
def test_handshake_that_fails_is_a_tls_failure(
    receive: Receive, transport: HTTPTransport, script: Callable[[Conversation], None]
) -> None:
    receiver = receive(script)

    assert answer_of(transport, f"https://127.0.0.1:{receiver.port}/").failure is AttemptFailure.TLS


@pytest.mark.parametrize(
    "script",
    [
        lambda conversation: conversation.hang(),
        # A record of 16 KiB that never ends.
        lambda conversation: conversation.drip(b"\x16\x03\x03\x40\x00" + b"\x02" * 999),
    ],
    ids=["mute", "dripped"],
)
def test_handshake_that_never_ends_times_out(
    receive: Receive, make_transport: MakeTransport, script: Callable[[Conversation], None]
) -> None:
    receiver = receive(script)

    answer = answer_of(make_transport(deadline=SHORT), f"https://127.0.0.1:{receiver.port}/")

    assert answer.failure is AttemptFailure.TIMEOUT
    assert SHORT <= answer.duration < LATEST


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nA: ", (0, AttemptFailure.TIMEOUT)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", (200, None)),
    ],
    ids=["head", "body"],
)
def test_deadline_holds_against_drips_inside_tls(
    receive: Receive,
    make_transport: MakeTransport,
    server_tls: ServerTLS,
    data: bytes,
    expected: tuple[int, AttemptFailure | None],
) -> None:
    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(data)
        conversation.drip(b"x" * 999)

    receiver = receive(script, tls=server_tls("127.0.0.1"))

    answer = answer_of(make_transport(deadline=SHORT), receiver.url())

    assert (answer.status_code, answer.failure) == expected
    assert SHORT <= answer.duration < LATEST


def test_end_of_a_stream_that_tls_doesnt_vouch_for_may_be_somebody_elses_doing(
    receive: Receive, transport: HTTPTransport, server_tls: ServerTLS
) -> None:
    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")

    answer = answer_of(transport, receive(script, tls=server_tls("127.0.0.1")).url())

    assert (answer.status_code, answer.truncated) == (200, True)


def test_client_certificate_of_the_operator_is_shown(
    receive: Receive,
    make_transport: MakeTransport,
    server_tls: ServerTLS,
    authority: trustme.CA,
    client_tls: ssl.SSLContext,
) -> None:
    server = server_tls("127.0.0.1")
    server.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(server)
    with_certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(with_certificate)
    authority.issue_cert("client.example").configure_cert(with_certificate)
    receiver = receive(tls=server)

    answers = [
        answer_of(make_transport(ssl_context=context), receiver.url()) for context in (with_certificate, client_tls)
    ]

    # The server's reason may be lost when it closes, so the second failure is not always the same.
    assert [answer.status_code for answer in answers] == [200, 0]
    assert len(receiver.requests) == 1
