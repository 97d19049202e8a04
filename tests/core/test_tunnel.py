"""A proxy's answer to CONNECT, byte by byte."""

from __future__ import annotations

import pytest

from callbackq.core.exchange import MAX_HEAD_BYTES, MAX_INTERIM_ANSWERS
from callbackq.core.models import AttemptFailure
from callbackq.core.tunnel import TunnelExchange

ANSWER = "the proxy's answer to CONNECT: "


def tunnel_of(data: bytes, *, size: int | None = None) -> TunnelExchange:
    """Feed *data* in pieces of *size*, then the end of the stream if it isn't over by then."""
    tunnel = TunnelExchange()
    tunnel.request_written()
    for start in range(0, len(data), size or len(data) or 1):
        if not tunnel.is_over:
            tunnel.receive(data[start : start + (size or len(data))])
    if not tunnel.is_over:
        tunnel.receive_end()
    return tunnel


OPEN = {
    "usual": b"HTTP/1.1 200 Connection established\r\n\r\n",
    "older version": b"HTTP/1.0 200 Connection established\r\nProxy-Agent: x\r\n\r\n",
    "no reason": b"HTTP/1.1 200\r\n\r\n",
    "another success": b"HTTP/1.1 204 No Content\r\n\r\n",
    "length that means nothing here": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    "several lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "chunks that never come": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "interim answer first": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("size", [None, 1], ids=["in one piece", "byte by byte"])
@pytest.mark.parametrize("name", OPEN)
def test_tunnel_is_open_after_the_head_of_a_success(name: str, size: int | None) -> None:
    assert tunnel_of(OPEN[name], size=size).failure() is None


@pytest.mark.parametrize("status", [300, 302, 400, 403, 407, 410, 429, 500, 502, 503, 504])
def test_refusal_is_no_connection_and_names_the_proxy(status: int) -> None:
    tunnel = tunnel_of(b"HTTP/1.1 %d No\r\nContent-Length: 999\r\n\r\nwhy" % status)

    assert tunnel.failure() == (AttemptFailure.CONNECT, f"the proxy refused the tunnel: {status}")


NO_TUNNEL = {
    "bytes behind the head": (
        OPEN["usual"] + b"x",
        (AttemptFailure.PROTOCOL, "the proxy sent more than its answer to CONNECT"),
    ),
    "body": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        (AttemptFailure.PROTOCOL, "the proxy sent more than its answer to CONNECT"),
    ),
    "second answer": (
        OPEN["usual"] + OPEN["usual"],
        (AttemptFailure.PROTOCOL, "the proxy sent more than its answer to CONNECT"),
    ),
    "another protocol": (b"\x16\x03\x03", (AttemptFailure.PROTOCOL, ANSWER + "no status line of HTTP/1")),
    "switching protocols": (
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        (AttemptFailure.PROTOCOL, ANSWER + "switches protocols"),
    ),
    "interim answers without end": (
        b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INTERIM_ANSWERS + 1),
        (AttemptFailure.PROTOCOL, ANSWER + "more than 10 interim answers"),
    ),
    "head without end": (
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * MAX_HEAD_BYTES,
        (AttemptFailure.TOO_LARGE, ANSWER + "head longer than 65536 bytes"),
    ),
    "too many fields": (
        b"HTTP/1.1 200 OK\r\n" + b"A:\r\n" * 1001 + b"\r\n",
        (AttemptFailure.TOO_LARGE, ANSWER + "more than 1000 header fields"),
    ),
    "nothing": (b"", (AttemptFailure.CONNECTION_LOST, ANSWER + "closed while waiting for the head")),
    "half a head": (
        OPEN["usual"][:-1],
        (AttemptFailure.CONNECTION_LOST, ANSWER + "closed while waiting for the head"),
    ),
}


@pytest.mark.parametrize("name", NO_TUNNEL)
def test_what_is_no_answer_opens_no_tunnel_and_names_the_proxy(name: str) -> None:
    data, failure = NO_TUNNEL[name]

    assert tunnel_of(data).failure() == failure


def test_success_before_the_tunnel_was_asked_for_is_none() -> None:
    tunnel = TunnelExchange()

    tunnel.receive(OPEN["usual"])

    assert tunnel.failure() == (AttemptFailure.PROTOCOL, ANSWER + "success before the request was sent")
