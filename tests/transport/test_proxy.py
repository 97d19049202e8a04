"""Through an operator's forward proxy: what it is told, what it may not do, and whose fault is whose."""

from __future__ import annotations

import base64
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import Mock

import pytest
import trustme

from callbackq import CallbackRequest, Dispatcher, InMemoryDataAccess
from callbackq.core.delivery import Answer, NotSent, NotSentReason
from callbackq.core.models import AttemptFailure
from callbackq.errors import InvalidRequestError
from callbackq.events import EventKind
from callbackq.signing import Signer, verify
from callbackq.targets import TargetPolicy
from callbackq.testing import FakeClock
from callbackq.transport import HTTPTransport
from callbackq.transport.proxy import Proxy
from support.deliveries import Outcomes, make_delivery
from support.dispatching import Witness
from support.egress import connections_of_this_process
from support.proxies import ESTABLISHED, forward
from support.receivers import OK, Conversation, Receiver, full_listener

Receive = Callable[..., Receiver]
MakeTransport = Callable[..., HTTPTransport]
ServerTLS = Callable[..., ssl.SSLContext]
Script = Callable[[Conversation], object]

DEADLINE = timedelta(seconds=0.3)
# The machine may be busy; a proxy that got its way would take the twenty seconds its script is given.
LATEST = DEADLINE + timedelta(seconds=2)
USER, PASSWORD = "shop", "yranac"[::-1]
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


def never_asked(host: str, port: int) -> list[str]:
    raise AssertionError("the target was looked up")


PUBLIC = TargetPolicy(resolver=never_asked)


@pytest.fixture
def through(make_transport: MakeTransport) -> MakeTransport:
    """Build a transport for public names that sends through a proxy, which is a receiver."""

    def build(proxy: Receiver, **settings: Any) -> HTTPTransport:
        return make_transport(**{"target_policy": PUBLIC, "proxy": proxy.url(""), **settings})

    return build


def answer_of(transport: HTTPTransport, url: str) -> Answer:
    outcome = transport.send(make_delivery(url))
    assert isinstance(outcome, Answer), outcome
    return outcome


def gist(answer: Answer) -> tuple[int, AttemptFailure | None, str]:
    return answer.status_code, answer.failure, answer.detail


def lines_of(receiver: Receiver) -> list[str]:
    return [request.line for request in receiver.requests]


def after_connect(data: bytes, *, then: Script = lambda conversation: conversation.hang()) -> Script:
    """A proxy that answers CONNECT with *data*, whatever was asked for, and then does something else."""

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(data)
        then(conversation)

    return script


class SystemNames:
    """Stands in for the system's look-ups, and knows no names but the proxy's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.fault: Exception | None = None
        self.addresses = ["127.0.0.1"]
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._changed = threading.Condition()
        self._system = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "proxy.internal":
            return self._system(host, port, *args, **kwargs)
        with self._changed:
            self.asked.append(host)
            self._changed.notify_all()
        self.may_answer.wait(20)
        if self.fault is not None:
            raise self.fault
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= count, 10)


@pytest.fixture
def system_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[SystemNames]:
    names = SystemNames(monkeypatch)
    yield names
    names.may_answer.set()


def named(proxy: Receiver) -> str:
    return f"http://proxy.internal:{proxy.port}"


# What the proxy is asked.


def test_plain_http_goes_to_the_proxy_in_absolute_form(receive: Receive, through: MakeTransport) -> None:
    receiver, proxy = receive(), receive(forward)

    answer = answer_of(through(proxy), receiver.url("/hook?a=%20b", host="a.example"))

    assert (answer.status_code, answer.response.data) == (200, b"ok")
    assert lines_of(proxy) == [f"POST http://a.example:{receiver.port}/hook?a=%20b HTTP/1.1"]
    assert lines_of(receiver) == ["POST /hook?a=%20b HTTP/1.1"]
    assert receiver.requests[0].fields["host"] == f"a.example:{receiver.port}"


def test_https_goes_through_a_tunnel_with_the_targets_name_in_tls(
    receive: Receive, through: MakeTransport, server_tls: ServerTLS
) -> None:
    names: list[str | None] = []
    context = server_tls("a.example")
    context.sni_callback = lambda _, name, __: names.append(name)
    receiver, proxy = receive(tls=context), receive(forward)

    answer = answer_of(through(proxy), receiver.url("/hook?secret", host="a.example"))

    assert (answer.status_code, answer.response.data) == (200, b"ok")
    assert names == ["a.example"]
    assert lines_of(proxy) == [f"CONNECT a.example:{receiver.port} HTTP/1.1"]
    assert lines_of(receiver) == ["POST /hook?secret HTTP/1.1"]
    assert set(proxy.requests[0].fields) == {"host", "user-agent"}


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("https://a.example/x", "CONNECT a.example:443 HTTP/1.1"),
        ("https://[2606:4700:4700::1111]/x", "CONNECT [2606:4700:4700::1111]:443 HTTP/1.1"),
        ("http://A.example./x", "POST http://a.example/x HTTP/1.1"),
        ("http://[2606:4700:4700::1111]:8000/x", "POST http://[2606:4700:4700::1111]:8000/x HTTP/1.1"),
        ("http://8.8.8.8", "POST http://8.8.8.8/ HTTP/1.1"),
    ],
)
def test_proxy_gets_the_one_canonical_spelling_of_the_target(
    receive: Receive, through: MakeTransport, url: str, line: str
) -> None:
    proxy = receive(after_connect(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"))

    answer_of(through(proxy), url)

    assert lines_of(proxy) == [line]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_signature_and_order_arrive_as_without_a_proxy(
    receive: Receive, through: MakeTransport, server_tls: ServerTLS, scheme: str
) -> None:
    receiver = receive(tls=server_tls("a.example") if scheme == "https" else None)
    secret = b"s" * 32
    delivery = make_delivery(receiver.url(host="a.example"), data=b"signed" * 10_000, queue_id="q")

    through(receive(forward), signer=Signer(secret)).send(delivery)

    [request] = receiver.requests
    assert verify(request.fields, request.body, secret, now=datetime.now(UTC)).id == delivery.callback_id
    order = {name: value for name, value in request.fields.items() if name.startswith("callbackq-")}
    assert order == {
        "callbackq-queue": "q",
        "callbackq-sequence": "7",
        "callbackq-attempt": "2",
        "callbackq-token": "3",
    }


def test_proxy_by_name_is_looked_up_by_the_system(receive: Receive, make_transport: MakeTransport) -> None:
    proxy = receive(after_connect(OK))

    transport = make_transport(target_policy=PUBLIC, proxy=f"http://localhost:{proxy.port}")

    assert answer_of(transport, "http://a.example/").status_code == 200


def test_nothing_but_the_proxy_is_connected_to_and_no_target_looked_up(receive: Receive) -> None:
    proxy = receive(after_connect(b"HTTP/1.1 403 No\r\n\r\n", then=lambda conversation: None))

    with (
        connections_of_this_process() as seen,
        closing(HTTPTransport(target_policy=PUBLIC, proxy=proxy.url(""))) as transport,
    ):
        for url in ("http://a.example/", "https://a.example/", "https://8.8.8.8/"):
            answer_of(transport, url)

    assert set(seen) == {("127.0.0.1", proxy.port)}


def test_proxies_of_the_environment_are_ignored_also_beside_one_of_the_operators(
    receive: Receive, through: MakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary, proxy = receive(), receive(after_connect(OK))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, canary.url(""))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")

    assert answer_of(through(proxy), "http://a.example/").status_code == 200
    assert (proxy.connections, canary.connections) == (1, 0)


# What may be reached.


@pytest.mark.parametrize(
    ("policy", "url"),
    [
        ({}, "http://127.0.0.1/"),
        ({}, "https://[::1]/"),
        ({}, "https://169.254.169.254/"),
        ({}, "http://localhost/"),
        ({}, "https://vault.internal/"),
        ({}, "http://metadata.google.internal/"),
        ({}, "http://a.example:25/"),
        ({"https_only": True}, "http://a.example/"),
        ({"deny": [".a.example"]}, "https://b.a.example/"),
        ({"deny": ["8.8.8.0/24"]}, "https://8.8.8.8/"),
        ({"allow": ["10.0.0.0/8"]}, "https://vault.internal/"),
        ({"allow": ["127.0.0.0/8"]}, "http://localhost/"),
    ],
)
def test_what_the_policy_refuses_without_a_look_up_the_proxy_never_hears_of(
    receive: Receive, through: MakeTransport, policy: dict[str, Any], url: str
) -> None:
    proxy = receive(forward)

    answer = answer_of(through(proxy, target_policy=TargetPolicy(resolver=never_asked, **policy)), url)

    assert (answer.status_code, answer.failure) == (0, AttemptFailure.TARGET_NOT_ALLOWED)
    assert not proxy.connections


@pytest.mark.parametrize("url", ["http://vault.internal/", "http://10.1.2.3/"])
def test_what_the_policy_allows_by_name_or_as_a_literal_the_proxy_is_asked_for(
    receive: Receive, through: MakeTransport, url: str
) -> None:
    policy = TargetPolicy(allow=["vault.internal", "10.0.0.0/8"], resolver=never_asked)
    proxy = receive(after_connect(OK))

    assert answer_of(through(proxy, target_policy=policy), url).status_code == 200


# Credentials.


def test_credentials_go_to_the_proxy_and_to_nobody_else(
    receive: Receive, through: MakeTransport, server_tls: ServerTLS
) -> None:
    encrypted, plain, proxy = receive(tls=server_tls("a.example")), receive(), receive(forward)
    transport = through(proxy, proxy_credentials=(USER, PASSWORD))

    for receiver in (encrypted, plain):
        assert answer_of(transport, receiver.url(host="a.example")).status_code == 200

    assert [request.fields["proxy-authorization"] for request in proxy.requests] == [BASIC] * 2
    assert not [
        name for receiver in (encrypted, plain) for name in receiver.requests[0].fields if name.startswith("proxy-")
    ]


def test_without_a_proxy_no_credentials_are_sent_and_none_accepted(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()

    answer_of(transport, receiver.url())

    assert "proxy-authorization" not in receiver.requests[0].fields
    with pytest.raises(InvalidRequestError, match="proxy_credentials: must not be given without a proxy"):
        HTTPTransport(proxy_credentials=(USER, PASSWORD))


def test_credentials_are_in_no_log_repr_or_detail(
    receive: Receive, through: MakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    scripts = [
        after_connect(b"HTTP/1.1 407 %s\r\nX: %s\r\n\r\n" % (BASIC.encode(), PASSWORD.encode())),
        after_connect(BASIC.encode()),
        after_connect(b"", then=lambda conversation: conversation.reset()),
    ]
    transports = [through(receive(script), proxy_credentials=(USER, PASSWORD)) for script in scripts]

    answers = [answer_of(transport, "https://a.example/") for transport in transports]
    with full_listener() as port:
        unreachable = HTTPTransport(
            proxy=f"http://127.0.0.1:{port}", proxy_credentials=(USER, PASSWORD), connect_timeout=DEADLINE
        )
        outcome = unreachable.send(make_delivery("https://a.example/"))
        unreachable.close()

    shown = [caplog.text, repr(answers), repr(outcome), *(repr(vars(transport)) for transport in transports)]
    assert "through the proxy" in caplog.text
    assert not [text for text in shown for secret in (USER + ":", PASSWORD, BASIC[6:]) if secret in text]


# Through the tunnel.


def test_certificate_must_be_the_targets_also_through_a_proxy(
    receive: Receive, through: MakeTransport, server_tls: ServerTLS
) -> None:
    wrong, proxy = receive(tls=server_tls("b.example")), receive(forward)

    answer = answer_of(through(proxy), wrong.url(host="a.example"))

    assert gist(answer) == (0, AttemptFailure.TLS, "CERTIFICATE_VERIFY_FAILED: Hostname mismatch")
    assert not wrong.requests


def test_proxy_that_leads_to_somebody_else_gets_no_request(
    receive: Receive, through: MakeTransport, server_tls: ServerTLS
) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("a.example").configure_cert(stranger)
    elsewhere = receive(tls=stranger)
    proxy = receive(after_connect(ESTABLISHED, then=lambda conversation: conversation.relay_to(elsewhere.port)))

    assert answer_of(through(proxy), "https://a.example/").failure is AttemptFailure.TLS
    assert not elsewhere.requests


def test_tunnel_is_kept_for_its_host_and_for_no_other(
    receive: Receive, through: MakeTransport, server_tls: ServerTLS
) -> None:
    receiver, proxy = receive(tls=server_tls("a.example", "b.example")), receive(forward)
    transport = through(proxy)

    for host in ("a.example", "a.example", "b.example", "a.example", "b.example"):
        assert answer_of(transport, receiver.url(host=host)).status_code == 200

    assert lines_of(proxy) == [f"CONNECT {host}:{receiver.port} HTTP/1.1" for host in ("a.example", "b.example")]
    assert [request.connection for request in receiver.requests] == [1, 1, 2, 1, 2]


def test_two_hosts_share_no_connection_to_the_proxy_over_plain_http_either(
    receive: Receive, through: MakeTransport
) -> None:
    receiver, proxy = receive(), receive(forward)
    transport = through(proxy)

    for host in ("a.example", "b.example", "a.example", "b.example"):
        assert answer_of(transport, receiver.url(host=host)).status_code == 200

    assert [request.connection for request in proxy.requests] == [1, 2, 1, 2]


# Refusals of the proxy are not the receiver's answers.


@pytest.mark.parametrize("status", [302, 400, 403, 407, 410, 429, 502, 503, 504])
def test_tunnel_that_the_proxy_refuses_is_no_answer(receive: Receive, through: MakeTransport, status: int) -> None:
    proxy = receive(after_connect(b"HTTP/1.1 %d No\r\nRetry-After: 9\r\nContent-Length: 2\r\n\r\nno" % status))

    answer = answer_of(through(proxy), "https://a.example/")

    assert gist(answer) == (0, AttemptFailure.CONNECT, f"the proxy refused the tunnel: {status}")
    assert (answer.response.headers, answer.response.data) == ({}, None)


@pytest.mark.parametrize("status", [403, 407, 502])
def test_refusal_of_a_plain_request_cant_be_told_from_the_receivers_as_the_documentation_says(
    receive: Receive, through: MakeTransport, status: int
) -> None:
    proxy = receive(after_connect(b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % status))

    assert gist(answer_of(through(proxy), "http://a.example/")) == (status, None, "")


ANSWER = "the proxy's answer to CONNECT: "
AFTER_CONNECT: dict[str, tuple[Script, AttemptFailure, str]] = {
    "garbage": (after_connect(b"220 mail ESMTP\r\n"), AttemptFailure.PROTOCOL, ANSWER + "no status line of HTTP/1"),
    "bytes into the tunnel": (
        after_connect(ESTABLISHED + b"x"),
        AttemptFailure.PROTOCOL,
        "the proxy sent more than its answer to CONNECT",
    ),
    "body": (
        after_connect(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
        AttemptFailure.PROTOCOL,
        "the proxy sent more than its answer to CONNECT",
    ),
    "switching protocols": (
        after_connect(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
        AttemptFailure.PROTOCOL,
        ANSWER + "switches protocols",
    ),
    "flood of interim answers": (
        after_connect(b"", then=lambda conversation: conversation.send_for_ever(b"HTTP/1.1 100 Continue\r\n\r\n")),
        AttemptFailure.PROTOCOL,
        ANSWER + "more than 10 interim answers",
    ),
    "endless head": (
        after_connect(b"HTTP/1.1 200 OK\r\n", then=lambda conversation: conversation.send_for_ever(b"A: b\r\n" * 99)),
        AttemptFailure.TOO_LARGE,
        ANSWER + "head longer than 65536 bytes",
    ),
    "close": (
        after_connect(b"", then=lambda conversation: None),
        AttemptFailure.CONNECTION_LOST,
        ANSWER + "closed while waiting for the head",
    ),
    "close in the middle": (
        after_connect(ESTABLISHED[:-2], then=lambda conversation: None),
        AttemptFailure.CONNECTION_LOST,
        ANSWER + "closed while waiting for the head",
    ),
    "reset": (
        after_connect(b"", then=lambda conversation: conversation.reset()),
        AttemptFailure.CONNECTION_LOST,
        ANSWER + "ECONNRESET",
    ),
    "lie: no tunnel but plain http": (
        after_connect(ESTABLISHED, then=lambda conversation: (conversation.read_something(), conversation.send(OK))),
        AttemptFailure.TLS,
        "WRONG_VERSION_NUMBER",
    ),
    "lie: a tunnel to nobody": (
        after_connect(ESTABLISHED, then=lambda conversation: conversation.read_something()),
        AttemptFailure.TLS,
        "",
    ),
}


@pytest.mark.parametrize("name", AFTER_CONNECT)
def test_whatever_a_proxy_does_with_connect_the_attempt_has_failed_in_honest_words(
    receive: Receive, through: MakeTransport, name: str
) -> None:
    script, failure, detail = AFTER_CONNECT[name]

    answer = answer_of(through(receive(script)), "https://a.example/")

    assert (answer.status_code, answer.failure) == (0, failure)
    assert answer.detail == detail or not detail


WAITING = "waiting for the proxy's answer to CONNECT"
FOR_EVER: dict[str, tuple[Script, str]] = {
    "silence": (after_connect(b""), WAITING),
    "dripped status line": (after_connect(b"", then=lambda c: c.drip(b"HTTP/1.1 200 O" + b"K" * 999)), WAITING),
    "dripped fields": (after_connect(b"HTTP/1.1 200 OK\r\n", then=lambda c: c.drip(b"A: b\r\n" * 99)), WAITING),
    "dripped interim answer": (
        after_connect(b"HTTP/1.1 100 Continue\r\n", then=lambda c: c.drip(b"A: b\r\n" * 99)),
        WAITING,
    ),
    "tunnel into silence": (after_connect(ESTABLISHED), "TLS handshake"),
    "dripped handshake": (
        after_connect(
            ESTABLISHED,
            then=lambda c: c.read_something() and c.drip(b"\x16\x03\x03\x40\x00" + b"\x02" * 999),
        ),
        "TLS handshake",
    ),
}


@pytest.mark.parametrize("name", FOR_EVER)
def test_attempt_ends_with_its_deadline_whatever_the_proxy_drips(
    receive: Receive, through: MakeTransport, name: str
) -> None:
    script, detail = FOR_EVER[name]

    answer = answer_of(through(receive(script), deadline=DEADLINE), "https://a.example/")

    assert gist(answer) == (0, AttemptFailure.TIMEOUT, detail)
    assert DEADLINE <= answer.duration < LATEST


def test_stop_while_the_proxy_is_asked_is_no_attempt(receive: Receive, through: MakeTransport) -> None:
    proxy = receive(after_connect(b""))
    transport, delivery, outcomes = through(proxy), make_delivery("https://a.example/"), Outcomes()
    transport.submit(delivery, outcomes)
    proxy.wait_for_requests(1)

    transport.interrupt([delivery])

    assert outcomes.not_sent(1) == [NotSent(reason=NotSentReason.STOPPED)]


# A proxy that can't be reached.


def unreachable(transport: HTTPTransport) -> str:
    """Why nothing was sent, which must be this machine's fault and no attempt."""
    outcome = transport.send(make_delivery("https://a.example/"))
    assert isinstance(outcome, NotSent), outcome
    assert outcome.reason is NotSentReason.LOCAL_FAULT
    return outcome.detail.removeprefix("the proxy can't be reached: ")


def test_proxy_that_refuses_connections_makes_no_attempt(make_transport: MakeTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    assert unreachable(make_transport(target_policy=PUBLIC, proxy=f"http://127.0.0.1:{port}")) == "ECONNREFUSED"


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"connect_timeout": DEADLINE}, "no answer in time"), ({"deadline": DEADLINE}, "timeout, connecting")],
    ids=["connect timeout", "deadline"],
)
def test_proxy_that_never_accepts_makes_no_attempt(
    make_transport: MakeTransport, settings: dict[str, timedelta], why: str
) -> None:
    with full_listener() as port:
        transport = make_transport(target_policy=PUBLIC, proxy=f"http://127.0.0.1:{port}", **settings)

        assert unreachable(transport) == why


def test_proxy_that_is_unknown_makes_no_attempt(make_transport: MakeTransport, system_names: SystemNames) -> None:
    system_names.fault = socket.gaierror(socket.EAI_NONAME, "no such name")

    assert unreachable(make_transport(target_policy=PUBLIC, proxy="http://proxy.internal:3128")) == "EAI_NONAME"


def test_machine_without_descriptors_blames_itself_and_remembers_where_the_proxy_is(
    receive: Receive, make_transport: MakeTransport, system_names: SystemNames
) -> None:
    transport = make_transport(target_policy=PUBLIC, proxy=named(receive(after_connect(OK))))
    assert answer_of(transport, "http://a.example/").status_code == 200

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("callbackq.transport.attempt.Connection", Mock(side_effect=OSError(errno.EMFILE, "none left")))
        outcome = transport.send(make_delivery("http://b.example/"))

    assert outcome == NotSent(reason=NotSentReason.LOCAL_FAULT, detail="EMFILE")
    assert answer_of(transport, "http://b.example/").status_code == 200
    assert len(system_names.asked) == 1


def test_proxy_whose_look_up_hangs_makes_no_attempt_and_the_deadline_holds(
    make_transport: MakeTransport, system_names: SystemNames
) -> None:
    system_names.may_answer.clear()

    transport = make_transport(target_policy=PUBLIC, proxy="http://proxy.internal:3128", deadline=DEADLINE)

    assert unreachable(transport) == "timeout, looking up the name"


def test_lock_that_ends_before_the_proxy_is_reached_is_not_the_proxys_fault(
    make_transport: MakeTransport, system_names: SystemNames
) -> None:
    system_names.may_answer.clear()
    transport = make_transport(target_policy=PUBLIC, proxy="http://proxy.internal:3128")

    outcome = transport.send(make_delivery("https://a.example/", ends_in=0.3))

    assert outcome == NotSent(reason=NotSentReason.TIME_IS_UP)


def test_proxy_is_looked_up_for_many_attempts_together(
    receive: Receive, make_transport: MakeTransport, system_names: SystemNames
) -> None:
    proxy, outcomes = receive(after_connect(OK)), Outcomes()
    transport = make_transport(target_policy=PUBLIC, proxy=named(proxy))
    system_names.may_answer.clear()

    for number in range(100):
        transport.submit(make_delivery(f"http://n{number}.example/"), outcomes)
    system_names.wait_for(2)
    system_names.may_answer.set()

    assert {answer.status_code for answer in outcomes.answers(100)} == {200}
    assert len(system_names.asked) == 2, "one for each of the threads that a name may have"


def test_where_a_proxy_is_is_remembered_for_ten_seconds(system_names: SystemNames) -> None:
    proxy, clock = Proxy("http://proxy.internal:3128", None, "test"), FakeClock()
    system_names.addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.1"]

    found = proxy.look_up(clock)
    clock.advance(9.9)
    remembered = proxy.known_addresses(clock.monotonic())
    clock.advance(0.2)

    assert found == remembered == ["127.0.0.1", "127.0.0.2"]
    assert proxy.known_addresses(clock.monotonic()) == []


def test_proxy_by_address_takes_no_look_up_and_no_thread_for_one(receive: Receive, through: MakeTransport) -> None:
    before = set(threading.enumerate())

    answer_of(through(receive(after_connect(OK))), "http://a.example/")

    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("callbackq-dns")]


def test_proxy_that_has_moved_is_looked_up_again_after_one_fault(
    receive: Receive, make_transport: MakeTransport, system_names: SystemNames
) -> None:
    transport = make_transport(target_policy=PUBLIC, proxy=named(receive()))
    system_names.addresses = ["127.0.0.2"]  # nobody listens there

    assert unreachable(transport) == "ECONNREFUSED"
    system_names.addresses = ["127.0.0.2", "127.0.0.1"]
    assert [answer_of(transport, "http://a.example/").status_code for _ in range(2)] == [200, 200]

    assert len(system_names.asked) == 2


def test_while_the_proxy_is_away_no_retries_are_used_up_and_then_callbacks_go_out(
    receive: Receive, make_transport: MakeTransport, system_names: SystemNames
) -> None:
    store, witness = InMemoryDataAccess(), Witness()
    id = store.store_callback_request(CallbackRequest(url="http://a.example/")).id
    transport = make_transport(target_policy=PUBLIC, proxy=named(receive(after_connect(OK))))
    system_names.fault = socket.gaierror(socket.EAI_AGAIN, "not now")

    with Dispatcher(store, transport=transport, observer=witness):
        witness.wait_for(EventKind.LOCAL_FAULT)
        system_names.fault = None
        witness.wait_for(EventKind.SUCCEEDED)

    assert [attempt.status_code for attempt in store.get_callback_status(id).attempts] == [200]
    [fault] = [event for event in witness.events if event.kind is EventKind.LOCAL_FAULT]
    assert fault.detail == "the proxy can't be reached: EAI_AGAIN"


# Settings.

UNUSABLE: dict[str, tuple[dict[str, object], list[str]]] = {
    "no text": ({"proxy": 3128}, ["proxy"]),
    "no URL": ({"proxy": "proxy.internal:3128"}, ["proxy"]),
    "socks": ({"proxy": "socks5://proxy.internal:1080"}, ["proxy"]),
    "TLS to the proxy": ({"proxy": "https://proxy.internal:3128"}, ["proxy"]),
    "path": ({"proxy": "http://proxy.internal:3128/path"}, ["proxy"]),
    "query": ({"proxy": "http://proxy.internal:3128?a=b"}, ["proxy"]),
    "password in the URL": ({"proxy": f"http://{USER}:{PASSWORD}@proxy.internal:3128"}, ["proxy"]),
    "credentials alone": ({"proxy_credentials": (USER, PASSWORD)}, ["proxy_credentials"]),
    "credentials as text": (
        {"proxy": "http://proxy.internal", "proxy_credentials": f"{USER}:{PASSWORD}"},
        ["proxy_credentials"],
    ),
    "three credentials": (
        {"proxy": "http://proxy.internal", "proxy_credentials": (USER, PASSWORD, "")},
        ["proxy_credentials"],
    ),
    "colon in the user name": (
        {"proxy": "http://proxy.internal", "proxy_credentials": (f"{USER}:", PASSWORD)},
        ["proxy_credentials"],
    ),
    "line break in the password": (
        {"proxy": "http://proxy.internal", "proxy_credentials": (USER, f"{PASSWORD}\r\n")},
        ["proxy_credentials"],
    ),
    "lone surrogate": (
        {"proxy": "http://proxy.internal", "proxy_credentials": (USER, f"{PASSWORD}\ud800")},
        ["proxy_credentials"],
    ),
    "both": ({"proxy": "ftp://proxy.internal", "proxy_credentials": PASSWORD}, ["proxy", "proxy_credentials"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_proxies_are_refused_by_name_and_never_quoted(name: str) -> None:
    settings, fields = UNUSABLE[name]

    with pytest.raises(InvalidRequestError) as refusal:
        HTTPTransport(**settings)  # type: ignore[arg-type]

    assert [field for field, _ in refusal.value.errors] == fields
    assert PASSWORD not in str(refusal.value)
