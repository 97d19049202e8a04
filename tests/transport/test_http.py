"""What goes out, and what is kept of what comes back."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
import trustme

from callbackq.core.delivery import Answer, NotSent, NotSentReason
from callbackq.core.models import AttemptFailure
from callbackq.core.validation import MAX_BODY_BYTES
from callbackq.errors import InvalidRequestError
from callbackq.signing import Signer
from callbackq.targets import TargetPolicy
from callbackq.testing import FakeClock
from callbackq.transport import HTTPTransport, SupportsSubmit
from callbackq.transport.tls import CHEAP_CIPHERS, verifying_context
from support.deliveries import Outcomes, make_delivery
from support.receivers import Conversation, Receiver

Receive = Callable[..., Receiver]
MakeTransport = Callable[..., HTTPTransport]


def answering(data: bytes) -> Callable[[Conversation], None]:
    """A script that answers every request with these bytes and keeps the connection."""

    def script(conversation: Conversation) -> None:
        while conversation.read_request():
            conversation.send(data)

    return script


def test_answer_is_kept_with_status_headers_and_body(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive(answering(b"HTTP/1.1 404 Nope\r\nX-Why: none here\r\nContent-Length: 4\r\n\r\ngone"))
    before = datetime.now(UTC)

    answer = transport.send(make_delivery(receiver.url()))

    assert isinstance(answer, Answer)
    assert answer.status_code == 404
    assert answer.response.headers == {"X-Why": "none here", "Content-Length": "4"}
    assert answer.response.data == b"gone"
    assert answer.failure is None
    assert not answer.truncated
    assert before <= answer.time <= datetime.now(UTC)
    assert timedelta(0) < answer.duration < timedelta(seconds=5)


def test_request_goes_out_as_the_callback_says(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()
    delivery = make_delivery(
        receiver.url("/a/b?c=%20d&e"),
        headers={"X-MiXed": "one", "content-TYPE": "a/b"},
        data=b"\0\xffbody",
        queue_id="q",
    )

    transport.send(delivery)

    [request] = receiver.requests
    assert request.line == "POST /a/b?c=%20d&e HTTP/1.1"
    assert request.body == b"\0\xffbody"
    assert "\r\nX-MiXed: one\r\ncontent-TYPE: a/b\r\n" in request.raw_head
    assert set(request.fields) == {
        *("host", "accept-encoding", "user-agent", "content-length", "x-mixed", "content-type"),
        *("webhook-id", "webhook-timestamp"),
        *("callbackq-queue", "callbackq-sequence", "callbackq-attempt", "callbackq-token"),
    }
    assert request.fields["host"] == f"127.0.0.1:{receiver.port}"
    assert request.fields["accept-encoding"] == "identity"
    assert request.fields["user-agent"].startswith("callbackq/")
    assert request.fields["webhook-id"] == delivery.callback_id
    assert abs(int(request.fields["webhook-timestamp"]) - datetime.now(UTC).timestamp()) < 60
    assert request.fields["callbackq-queue"] == "q"
    assert request.fields["callbackq-sequence"] == "7"
    assert request.fields["callbackq-attempt"] == "2"
    assert request.fields["callbackq-token"] == "3"


@pytest.mark.parametrize(
    ("method", "data", "length"),
    [("POST", b"x", "1"), ("PUT", b"xy", "2"), ("POST", None, "0"), ("POST", b"", "0"), ("GET", b"ignored", None)],
)
def test_body_goes_out_with_post_and_put_only(
    receive: Receive,
    transport: HTTPTransport,
    method: Literal["GET", "POST", "PUT"],
    data: bytes | None,
    length: str | None,
) -> None:
    receiver = receive()

    answer = transport.send(make_delivery(receiver.url(), method=method, data=data))

    assert isinstance(answer, Answer)
    assert answer.status_code == 200
    [request] = receiver.requests
    assert request.line.startswith(method)
    assert request.fields.get("content-length") == length
    assert request.body == (data if length and data else b"")


def test_large_body_arrives_whole(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()
    body = bytes(range(256)) * 4096

    transport.send(make_delivery(receiver.url(), data=body))

    assert receiver.requests[0].body == body


def test_queue_id_beyond_visible_ascii_is_percent_encoded(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()

    transport.send(make_delivery(receiver.url(), queue_id="a b%/ä"))

    assert receiver.requests[0].fields["callbackq-queue"] == "a%20b%25/%C3%A4"


def test_callback_without_a_queue_sends_none(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()

    transport.send(make_delivery(receiver.url()))

    assert "callbackq-queue" not in receiver.requests[0].fields
    assert receiver.requests[0].fields["callbackq-sequence"] == "7"


def test_queue_can_be_sent_as_a_keyed_hash(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    one, other = (make_transport(order_headers="hashed", queue_key=bytes([n]) * 16) for n in (1, 2))

    for transport, queue_id in ((one, "secret"), (one, "secret"), (one, "another"), (other, "secret")):
        transport.send(make_delivery(receiver.url(), queue_id=queue_id))

    sent = [request.fields["callbackq-queue"] for request in receiver.requests]
    assert sent[0] == sent[1]
    assert len(set(sent)) == 3
    assert not any("secret" in request.raw_head for request in receiver.requests)


def test_order_headers_can_be_left_out(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()

    make_transport(order_headers="none").send(make_delivery(receiver.url(), queue_id="q"))

    assert not [name for name in receiver.requests[0].fields if name.startswith("callbackq-")]


def test_user_agent_of_the_callback_wins(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    transport = make_transport(user_agent="shop/1")

    transport.send(make_delivery(receiver.url()))
    transport.send(make_delivery(receiver.url(), headers={"USER-agent": "mine"}))

    assert [request.fields["user-agent"] for request in receiver.requests] == ["shop/1", "mine"]
    assert receiver.requests[1].raw_head.lower().count("user-agent") == 1


def test_redirect_is_recorded_and_not_followed(receive: Receive, transport: HTTPTransport) -> None:
    canary = receive()
    receiver = receive(answering(f"HTTP/1.1 307 Go\r\nLocation: {canary.url()}\r\nContent-Length: 0\r\n\r\n".encode()))

    answer = transport.send(make_delivery(receiver.url()))

    assert isinstance(answer, Answer)
    assert answer.status_code == 307
    assert answer.response.headers["Location"] == canary.url()
    assert not canary.requests


def test_proxy_in_the_environment_is_ignored(
    receive: Receive, transport: HTTPTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = receive()
    monkeypatch.setenv("HTTP_PROXY", canary.url(""))
    monkeypatch.setenv("http_proxy", canary.url(""))

    answer = transport.send(make_delivery(receive().url()))

    assert isinstance(answer, Answer)
    assert answer.status_code == 200
    assert not canary.connections


def test_answer_is_never_decoded(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive(answering(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\njunk"))

    answer = transport.send(make_delivery(receiver.url()))

    assert isinstance(answer, Answer)
    assert (answer.status_code, answer.response.data) == (200, b"junk")


@pytest.mark.parametrize(
    "body",
    [b"Content-Length: 1000000000000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n7fffffff\r\n", b"\r\n"],
    ids=["known length", "chunked", "until the end"],
)
def test_endless_body_ends_at_the_limit(receive: Receive, make_transport: MakeTransport, body: bytes) -> None:
    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(b"HTTP/1.1 200 OK\r\n" + body)
        conversation.send_for_ever(b"x" * 65536)

    answer = make_transport(response_limit=1000).send(make_delivery(receive(script).url()))

    assert isinstance(answer, Answer)
    assert (answer.status_code, answer.response.data, answer.truncated) == (200, b"x" * 1000, True)


def test_endless_trailers_end(receive: Receive, transport: HTTPTransport) -> None:
    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        conversation.send_for_ever(b"A: b\r\n")

    answer = transport.send(make_delivery(receive(script).url()))

    assert isinstance(answer, Answer)
    assert (answer.status_code, answer.truncated) == (200, True)


def test_refusal_during_the_upload_is_the_answer(receive: Receive, transport: HTTPTransport) -> None:
    def script(conversation: Conversation) -> None:
        conversation.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        conversation.hang()

    answer = transport.send(make_delivery(receive(script).url(), data=b"x" * 1024 * 1024))

    assert isinstance(answer, Answer)
    assert answer.status_code == 413


def test_the_largest_body_arrives_whole(receive: Receive, transport: HTTPTransport) -> None:
    body = bytes(range(256)) * (MAX_BODY_BYTES // 256)
    receiver = receive()

    answer = transport.send(make_delivery(receiver.url(), data=body))

    assert isinstance(answer, Answer)
    assert (answer.status_code, answer.failure) == (200, None)
    (request,) = receiver.requests
    assert request.body == body


def test_the_largest_body_holds_up_no_other_attempt(receive: Receive, transport: HTTPTransport) -> None:
    outcomes = Outcomes()
    stuck = make_delivery(
        receive(lambda conversation: conversation.wait()).url(), data=bytes(MAX_BODY_BYTES), ends_in=0.7
    )

    transport.submit(stuck, outcomes)
    other = transport.send(make_delivery(receive().url()))
    answers = outcomes.answers(1)

    assert isinstance(other, Answer)
    assert other.status_code == 200
    assert [answer.failure for answer in answers] == [AttemptFailure.TIMEOUT], "its time was up"


def test_with_no_useful_time_left_nothing_is_sent(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()

    outcome = transport.send(make_delivery(receiver.url(), ends_in=0.2))

    assert outcome == NotSent(reason=NotSentReason.TIME_IS_UP)
    assert not receiver.requests


def test_attempt_ends_with_its_lock_when_that_is_earlier_than_the_deadline(
    receive: Receive, transport: HTTPTransport
) -> None:
    receiver = receive(lambda conversation: conversation.hang())

    answer = transport.send(make_delivery(receiver.url(), ends_in=0.5))

    assert isinstance(answer, Answer)
    assert answer.failure is AttemptFailure.TIMEOUT
    assert answer.duration < timedelta(seconds=5)


def test_submit_returns_at_once_and_calls_back(receive: Receive, transport: HTTPTransport) -> None:
    receiver = receive()
    outcomes = Outcomes()

    transport.submit(make_delivery(receiver.url()), outcomes)

    assert [answer.status_code for answer in outcomes.answers(1)] == [200]


def test_transport_has_the_abilities_it_claims(transport: HTTPTransport) -> None:
    assert isinstance(transport, SupportsSubmit)
    assert transport.deadline == timedelta(seconds=15)
    assert repr(transport) == "<HTTPTransport 0 attempts under way>"


def _insecure_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return context


def _old_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    return context


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"target_policy": None}, ["target_policy"]),
        ({"target_policy": 5, "signer": "secret", "clock": object()}, ["target_policy", "signer", "clock"]),
        ({"target_policy": TargetPolicy}, ["target_policy"]),
        ({"signer": Signer}, ["signer"]),
        ({"signer": [Signer(b"s" * 32)]}, ["signer"]),
        ({"clock": FakeClock}, ["clock"]),
        ({"deadline": timedelta(0)}, ["deadline"]),
        ({"deadline": 15, "connect_timeout": timedelta(seconds=-1)}, ["deadline", "connect_timeout"]),
        ({"response_limit": -1}, ["response_limit"]),
        ({"response_limit": True}, ["response_limit"]),
        ({"idle_timeout": timedelta(seconds=-1)}, ["idle_timeout"]),
        ({"max_connection_age": 1}, ["max_connection_age"]),
        ({"order_headers": "some"}, ["order_headers"]),
        ({"order_headers": "hashed"}, ["queue_key"]),
        ({"order_headers": "hashed", "queue_key": b"short"}, ["queue_key"]),
        ({"user_agent": "a\r\nb"}, ["user_agent"]),
        ({"ssl_context": "tls"}, ["ssl_context"]),
        ({"ssl_context": _insecure_context()}, ["ssl_context"]),
        ({"ssl_context": _old_context()}, ["ssl_context"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, object], fields: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        HTTPTransport(**settings)  # type: ignore[arg-type]

    assert [field for field, _ in refusal.value.errors] == fields


def test_own_tls_context_offers_nothing_whose_cost_a_receiver_chooses() -> None:
    context = verifying_context()

    assert {cipher["kea"] for cipher in context.get_ciphers()} == {"kx-any", "kx-ecdhe"}
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_own_tls_context_asks_for_http_1(authority: trustme.CA, server_tls: Callable[..., ssl.SSLContext]) -> None:
    client, server = verifying_context(), server_tls("a.example")
    authority.configure_trust(client)
    server.set_alpn_protocols(["h2", "http/1.1"])
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="a.example"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]

    for _ in range(3):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()

    assert [end.selected_alpn_protocol() for end in ends] == ["http/1.1"] * 2


def test_transport_without_a_context_of_the_hosts_uses_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = verifying_context()
    monkeypatch.setattr("callbackq.transport.http.verifying_context", lambda: made)

    assert HTTPTransport()._settings.ssl_context is made


@pytest.mark.parametrize(("ciphers", "times"), [("ECDHE+AESGCM:DHE+AESGCM", 1), (CHEAP_CIPHERS, 0)])
def test_context_that_lets_receivers_choose_the_cost_is_told_once(
    receive: Receive, make_transport: MakeTransport, caplog: pytest.LogCaptureFixture, ciphers: str, times: int
) -> None:
    receiver, context = receive(), ssl.create_default_context()
    context.set_ciphers(ciphers)
    transport = make_transport(ssl_context=context)

    for _ in range(2):
        transport.send(make_delivery(receiver.url()))

    told = [record.getMessage() for record in caplog.records if "set_ciphers" in record.getMessage()]
    assert len(told) == times
    assert all(CHEAP_CIPHERS in line for line in told)
