"""
What receivers do that mean harm: every way we know to answer a request badly, by name, with what must be recorded.

`behaviours` is the table, grouped by outcome. `support.hosts` has receivers that behave so.
"""

from __future__ import annotations

import base64
import datetime
import functools
import gzip
import ssl
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal, NamedTuple

import trustme
from attrs import frozen

from callbackq.core.models import AttemptFailure
from support.receivers import OK, Conversation

__all__ = ["DOMAIN", "RETRY_AFTER", "Behaviour", "Result", "behaviours", "cases", "wildcard"]

DOMAIN: Final = "hostile.example"
"""Behaviours are chosen by the host name below it."""

_MANY: Final = 9999
_KIB: Final = 1024
_MIB: Final = 1024 * 1024
_LARGE: Final = b"x" * _MIB

Act = Callable[[Conversation], object]
Beginning = Literal["connection", "head", "request"]


class Result(NamedTuple):
    """What of an attempt must be recorded: never anything else, whatever the machine is busy with."""

    status_code: int
    failure: AttemptFailure | None = None
    truncated: bool = False


@frozen(kw_only=True)
class Behaviour:
    """
    One way to treat a sender badly.

    Attributes:
        act: what it does.
        results: what may be recorded. More than one where the network decides, not the sender.
        results_over_tls: the same for https, where an end of the stream that nobody signed is not believed.
        lasts: it would go on for ever: the attempt ends with its deadline, not before.
        begins_with: what it waits for: the connection (then it has a port of its own), the head of a request, or a
            whole request.
        body: of the request that brings it out.
        schemes: over which it can be met.
        tls: its own context as a TLS server; the shared one's by default.
    """

    act: Act
    results: frozenset[Result]
    results_over_tls: frozenset[Result] | None = None
    lasts: bool = False
    begins_with: Beginning = "request"
    body: bytes = b"{}"
    schemes: tuple[str, ...] = ("http", "https")
    tls: Callable[[trustme.CA], ssl.SSLContext] | None = None

    def results_over(self, scheme: str) -> frozenset[Result]:
        """What may be recorded of an attempt over this scheme."""
        return self.results_over_tls if self.results_over_tls and scheme == "https" else self.results


def group(
    *results: Result,
    acts: Mapping[str, Act],
    over_tls: Iterable[Result] = (),
    lasts: bool = False,
    begins_with: Beginning = "request",
    body: bytes = b"{}",
    schemes: tuple[str, ...] = ("http", "https"),
) -> dict[str, Behaviour]:
    """Behaviours with the same outcome."""
    return {
        name: Behaviour(
            act=act,
            results=frozenset(results),
            results_over_tls=frozenset(over_tls) or None,
            lasts=lasts,
            begins_with=begins_with,
            body=body,
            schemes=schemes,
        )
        for name, act in acts.items()
    }


# What a receiver does after it has said something.


def stay(conversation: Conversation) -> None:
    """Keep the connection for the next request."""


def reset_when_heard(conversation: Conversation) -> None:
    # At once, the reset could overtake what was said before it: a pause lets the sender read that.
    conversation.wait(0.05)
    conversation.reset()


def drip(data: bytes) -> Act:
    return lambda conversation: conversation.drip(data)


def repeat(data: bytes) -> Act:
    return lambda conversation: conversation.send_for_ever(data)


def trickle(data: bytes, pause: float = 0.01) -> Act:
    """Send *data* again and again, with pauses."""

    def act(conversation: Conversation) -> None:
        while True:
            conversation.send(data)
            conversation.wait(pause)

    return act


def later(data: bytes) -> Act:
    def act(conversation: Conversation) -> None:
        conversation.wait(0.05)
        conversation.send(data)

    return act


def says(data: bytes, then: Act = stay) -> Act:
    def act(conversation: Conversation) -> None:
        conversation.send(data)
        then(conversation)

    return act


end, hang = Conversation.end, Conversation.hang

# What there is to say.

HEAD: Final = b"HTTP/1.1 200 OK\r\n"
CHUNKED: Final = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
POISON: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\npoisoned"


def ok(*fields: bytes, body: bytes = b"ok") -> bytes:
    """A proper answer with these fields besides."""
    return sized(len(body), *fields) + body


def sized(length: int | bytes, *fields: bytes) -> bytes:
    """The head of an answer that says it has a body of *length*."""
    said = length if isinstance(length, bytes) else b"%d" % length
    return HEAD + b"".join(one + b"\r\n" for one in fields) + b"Content-Length: " + said + b"\r\n\r\n"


def status(code: int, *fields: bytes) -> bytes:
    """A proper answer with this status and no body."""
    return b"HTTP/1.1 %d Because\r\n" % code + b"".join(one + b"\r\n" for one in fields) + b"Content-Length: 0\r\n\r\n"


@functools.cache
def bomb(layers: int, size: int) -> bytes:
    """As many zeros, packed so many times over."""
    packed = gzip.compress(bytes(size))
    for _ in range(layers - 1):
        packed = gzip.compress(packed)
    return packed


def read_one_byte_at_a_time(conversation: Conversation) -> None:
    while conversation.read_something(at_most=1) and not conversation.wait(0.02):
        pass


def read_slowly_and_answer(conversation: Conversation) -> None:
    for _ in range(8):
        conversation.read_something(at_most=4 * _KIB)
        conversation.wait(0.02)
    conversation.read_body()
    conversation.send(OK)


def answer_late(conversation: Conversation) -> None:
    conversation.wait(0.3)
    if conversation.read_request():
        conversation.send(OK)


def garbage_record(conversation: Conversation) -> None:
    conversation.send_outside_tls(b"\x17\x03\x03\x00\x20" + b"garbage!" * 4)
    conversation.hang()


def drip_a_record(conversation: Conversation) -> None:
    conversation.send_outside_tls(b"\x17\x03\x03\x40\x00")
    for _ in range(_MANY):
        conversation.send_outside_tls(b"x")
        conversation.wait(0.02)


def hears_hello(then: Act) -> Act:
    """A script for a port of its own that waits for the first bytes."""

    def act(conversation: Conversation) -> None:
        conversation.read_something()
        then(conversation)

    return act


RETRY_AFTER: Final = {
    "huge": [b"9" * 4000],
    "century": [b"3153600000"],
    "negative": [b"-1"],
    "fraction": [b"1e9"],
    "nan": [b"NaN"],
    "infinity": [b"Infinity"],
    "zero": [b"0"],
    "past": [b"Thu, 01 Jan 1970 00:00:00 GMT"],
    "far": [b"Fri, 31 Dec 9999 23:59:59 GMT"],
    "year-zero": [b"Sat, 01 Jan 0000 00:00:00 GMT"],
    "wild-zone": [b"Fri, 31 Dec 9999 23:59:59 -9999"],
    "twice": [b"1", b"99999"],
    "digits-of-others": ["９９".encode()],
    "nul": [b"1\x002"],
    "empty": [b""],
}
"""What a 503 may ask for, field by field."""


# Contexts of TLS servers nobody should talk to.


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def wildcard(authority: trustme.CA) -> ssl.SSLContext:
    return server_context(authority.issue_cert(f"*.{DOMAIN}"))


def self_signed(_: trustme.CA) -> ssl.SSLContext:
    return wildcard(trustme.CA())


def wrong_host(authority: trustme.CA) -> ssl.SSLContext:
    return server_context(authority.issue_cert("*.elsewhere.example", DOMAIN, "127.0.0.1"))


def expired(authority: trustme.CA) -> ssl.SSLContext:
    year = datetime.timedelta(days=365)
    began = datetime.datetime.now(datetime.UTC) - 2 * year
    return server_context(authority.issue_cert(f"*.{DOMAIN}", not_before=began, not_after=began + year))


def old_protocol(authority: trustme.CA) -> ssl.SSLContext:
    context = wildcard(authority)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def no_common_cipher(authority: trustme.CA) -> ssl.SSLContext:
    context = wildcard(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA:@SECLEVEL=0")
    return context


def huge_group(authority: trustme.CA) -> ssl.SSLContext:
    """DHE in a group of 10,000 bits, the most that OpenSSL takes: a second of computing for either side."""
    context = server_context(authority.issue_cert(f"*.{DOMAIN}", key_type=trustme.KeyType.RSA))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("DHE+AESGCM")
    with tempfile.NamedTemporaryFile("w", encoding="ascii") as file:
        file.write(group_in_pem((1 << 10_000) - 1, 2))
        file.flush()
        context.load_dh_params(file.name)
    return context


def group_in_pem(modulus: int, generator: int) -> str:
    """Nobody checks that the modulus is a prime, so it needn't be."""
    numbers = b"".join(der(0x02, one.to_bytes(one.bit_length() // 8 + 1)) for one in (modulus, generator))
    encoded = base64.encodebytes(der(0x30, numbers)).decode("ascii")
    return f"-----BEGIN DH PARAMETERS-----\n{encoded}-----END DH PARAMETERS-----\n"


def der(tag: int, content: bytes) -> bytes:
    length = len(content)
    return bytes([tag]) + (b"%c" % length if length < 128 else b"\x82" + length.to_bytes(2)) + content


def asks_for_a_certificate(authority: trustme.CA) -> ssl.SSLContext:
    context = wildcard(authority)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def many_tickets(authority: trustme.CA) -> ssl.SSLContext:
    context = wildcard(authority)
    context.num_tickets = 255
    return context


def huge_certificate(authority: trustme.CA) -> ssl.SSLContext:
    names = [f"{number}.{'a' * 60}.{'b' * 60}.{DOMAIN}" for number in range(1500)]
    return server_context(authority.issue_cert(f"*.{DOMAIN}", *names))


def behaviours(canary: str) -> dict[str, Behaviour]:
    """
    The table, by name.

    Args:
        canary: a URL to which redirects and the like try to lead.
    """
    return {**_without_a_head(), **_with_a_head(), **_with_an_answer(canary), **_over_tls()}


def _without_a_head() -> dict[str, Behaviour]:
    failed = AttemptFailure
    two_heads = 2 * (b"HTTP/1.1 103 Early Hints\r\n" + b"A: " + b"b" * 33 * _KIB + b"\r\n\r\n")
    return {
        **group(
            Result(0, failed.TIMEOUT),
            lasts=True,
            acts={
                "hang": hang,
                "one-byte": says(b"H", hang),
                "drip-status": drip(b"HTTP/1.1 200 O" + b"K" * _MANY),
                "drip-header": says(HEAD + b"A: ", drip(b"b" * _MANY)),
                "drip-header-name": says(HEAD, drip(b"A" * _MANY)),
                "drip-header-lines": says(HEAD, drip(b"A: b\r\n" * _MANY)),
                "drip-1xx": drip(b"HTTP/1.1 100 Continue\r\n" + b"A: b\r\n" * _MANY),
                "drip-after-103": says(b"HTTP/1.1 103 Early Hints\r\n\r\n", drip(HEAD + b"A: b\r\n" * _MANY)),
                "103-then-hang": says(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", hang),
                "all-but-the-blank-line": says(HEAD + b"Content-Length: 0\r\n", hang),
                "lines-of-cr-only": says(b"HTTP/1.1 200 OK\rContent-Length: 0\r\r", hang),
                "half-a-line-break": says(HEAD + b"Content-Length: 0\r\n\r", hang),
            },
        ),
        **group(
            Result(0, failed.TIMEOUT),
            lasts=True,
            begins_with="head",
            body=_LARGE,
            acts={"slow-read": Conversation.wait, "drip-read": read_one_byte_at_a_time},
        ),
        **group(
            Result(0, failed.TIMEOUT),
            lasts=True,
            begins_with="connection",
            schemes=("http",),
            # There is nothing to do: the listener never accepts.
            acts={"accepts-and-mute": Conversation.wait, "never-accepts": stay},
        ),
        **group(
            Result(0, failed.TOO_LARGE),
            acts={
                "endless-headers": says(HEAD, repeat(b"A: b\r\n" * _KIB)),
                "endless-header": says(HEAD + b"A: ", repeat(b"b" * 64 * _KIB)),
                "endless-header-name": says(HEAD, repeat(b"A" * 64 * _KIB)),
                "endless-reason": says(b"HTTP/1.1 200 ", repeat(b"OK" * 32 * _KIB)),
                "endless-fold": says(HEAD + b"A: b\r\n", repeat(b" c\r\n" * _KIB)),
                "huge-header": says(HEAD + b"A: " + b"b" * _MIB + b"\r\n\r\n"),
                "huge-reason": says(b"HTTP/1.1 200 " + b"K" * _MIB + b"\r\n\r\n"),
                "fat-headers": says(HEAD + (b"A: " + b"b" * 60 * _KIB + b"\r\n") * 98 + b"\r\n"),
                "many-headers": says(HEAD + b"A: b\r\n" * 20_000 + b"\r\n"),
                "many-small-headers": says(
                    HEAD + b"Content-Length: 0\r\n" + b"".join(b"%x:\n" % number for number in range(10_000)) + b"\n"
                ),
                "two-large-heads": says(two_heads + OK),
            },
        ),
        **group(
            Result(0, failed.PROTOCOL),
            acts={
                "http09": says(b"<html>hello</html>\n", end),
                "bad-status-999": says(b"HTTP/1.1 999 What\r\n\r\n"),
                "bad-status-600": says(b"HTTP/1.1 600 What\r\n\r\n"),
                "bad-status-000": says(b"HTTP/1.1 000 What\r\n\r\n"),
                "bad-status-two-digits": says(b"HTTP/1.1 20 OK\r\n\r\n"),
                "bad-status-four-digits": says(b"HTTP/1.1 2000 OK\r\n\r\n"),
                "bad-status-negative": says(b"HTTP/1.1 -200 OK\r\n\r\n"),
                "bad-status-word": says(b"HTTP/1.1 OK 200\r\n\r\n"),
                "bad-status-missing": says(b"HTTP/1.1\r\n\r\n"),
                "bad-status-tab": says(b"HTTP/1.1\t200\tOK\r\n\r\n"),
                "bad-status-digits-of-others": says("HTTP/1.1 ２００ OK\r\n\r\n".encode()),
                "bad-version-2": says(b"HTTP/2.0 200 OK\r\n\r\n"),
                "bad-version-3": says(b"HTTP/3 200\r\n\r\n"),
                "bad-version-10": says(b"HTTP/1.10 200 OK\r\n\r\n"),
                "bad-version-case": says(b"http/1.1 200 OK\r\n\r\n"),
                "http2-preface": says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
                "http2-settings": says(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
                "icy-stream": says(b"ICY 200 OK\r\nicy-name: radio\r\n\r\n", repeat(b"music" * _KIB)),
                "a-request": says(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"),
                "line-break-first": says(b"\r\n" + OK),
                "blank-first": says(b" " + OK),
                "byte-order-mark-first": says(b"\xef\xbb\xbf" + OK),
                "nul-first": says(b"\0" + OK),
                "endless-nuls": repeat(bytes(64 * _KIB)),
                "garbage": says(bytes(range(128, 256)) * 8),
                "tls-alert-in-plain": says(b"\x15\x03\x01\x00\x02\x02\x28"),
                "101-switch": says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", hang),
                "101-then-ok": says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n" + OK),
                "1xx-flood": repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * _KIB),
                "1xx-trickle": trickle(b"HTTP/1.1 102 Processing\r\n\r\n"),
                "eleven-1xx-then-ok": says(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 11 + OK),
                "content-length-two": says(sized(5, b"Content-Length: 2") + b"hello"),
                "content-length-list": says(sized(b"2, 5") + b"hello"),
                "content-length-trailing-comma": says(sized(b"2,") + b"ok"),
            },
        ),
        **group(
            Result(0, failed.PROTOCOL),
            begins_with="connection",
            schemes=("http",),
            # Both speak before they have heard anything, as these protocols do.
            acts={
                "smtp-banner": says(b"220 mail.example ESMTP\r\n", hang),
                "ssh-banner": says(b"SSH-2.0-OpenSSH_9.9\r\n", hang),
            },
        ),
        **group(
            Result(0, failed.CONNECTION_LOST),
            acts={
                "close-at-once": end,
                "reset-at-once": Conversation.reset,
                "close-mid-status": says(b"HTTP/1.1 20", end),
                "close-after-status": says(HEAD, end),
                "close-mid-headers": says(HEAD + b"Content-Le", end),
                "close-before-the-blank-line": says(HEAD + b"Content-Length: 0\r\n", end),
                "close-mid-blank-line": says(HEAD + b"Content-Length: 0\r\n\r", end),
                "close-after-100": says(b"HTTP/1.1 100 Continue\r\n\r\n", end),
                "reset-mid-status": says(b"HTTP/1.1 20", reset_when_heard),
                "reset-mid-headers": says(HEAD + b"Content-Le", reset_when_heard),
                "reset-after-103": says(b"HTTP/1.1 103 Early Hints\r\n\r\n", reset_when_heard),
            },
        ),
        **group(
            Result(0, failed.CONNECTION_LOST),
            begins_with="connection",
            schemes=("http",),
            acts={"close-on-accept": end},
        ),
        **group(
            # The reset may come before the sender has noticed that it is connected.
            Result(0, failed.CONNECTION_LOST),
            Result(0, failed.CONNECT),
            begins_with="connection",
            schemes=("http",),
            acts={"reset-on-accept": Conversation.reset},
        ),
    }


def _with_a_head() -> dict[str, Behaviour]:
    """A complete head decides; the body never comes to its end."""
    return {
        **group(
            Result(200, truncated=True),
            lasts=True,
            acts={
                "no-body": says(sized(5), hang),
                "drip-body": says(sized(_MANY), drip(b"x" * _MANY)),
                "drip-body-until-close": says(HEAD + b"\r\n", drip(b"x" * _MANY)),
                "drip-gzip": says(sized(_MANY, b"Content-Encoding: gzip"), drip(bomb(1, 8 * _MIB))),
                "drip-chunk-size": says(CHUNKED, drip(b"0" * _MANY)),
                "drip-chunk": says(CHUNKED + b"fff\r\n", drip(b"x" * _MANY)),
                "drip-chunks": says(CHUNKED, drip(b"1\r\nx\r\n" * _MANY)),
                "drip-chunk-extension": says(CHUNKED + b"1;", drip(b"x" * _MANY)),
                "drip-trailers": says(CHUNKED + b"0\r\n", drip(b"A: b\r\n" * _MANY)),
                "content-length-huge": says(sized(10**15) + b"x", hang),
                "content-length-lie": says(sized(9) + b"half", hang),
                "chunk-of-16-digits": says(CHUNKED + b"ffffffffffffffff\r\nx", hang),
                "chunk-without-end": says(CHUNKED + b"2\r\nok\r\n", hang),
                "chunk-without-line-break": says(CHUNKED + b"2\r\nok", hang),
                "chunk-line-of-lf-only": says(CHUNKED + b"2\nok\n0\n\n", hang),
                "trailers-without-end": says(CHUNKED + b"2\r\nok\r\n0\r\nA: b\r\n", hang),
                "until-close-without-close": says(HEAD + b"\r\nok", hang),
            },
        ),
        **group(
            Result(200, truncated=True),
            acts={
                "endless-body": says(HEAD + b"\r\n", repeat(b"x" * 64 * _KIB)),
                "endless-chunks": says(CHUNKED, repeat(b"400\r\n" + b"x" * _KIB + b"\r\n")),
                "endless-chunk": says(CHUNKED + b"ffffffffffffffff\r\n", repeat(b"x" * 64 * _KIB)),
                "endless-tiny-chunks": says(CHUNKED, repeat(b"1\r\nx\r\n" * _KIB)),
                "endless-chunk-extension": says(CHUNKED + b"1;", repeat(b"x" * 64 * _KIB)),
                "endless-chunk-size": says(CHUNKED, repeat(b"0" * 64 * _KIB)),
                "endless-trailers": says(CHUNKED + b"0\r\n", repeat(b"A: b\r\n" * _KIB)),
                "huge-body": says(sized(200 * 10**6), repeat(b"x" * 64 * _KIB)),
                "endless-gzip": says(sized(10**12, b"Content-Encoding: gzip"), repeat(bomb(1, 8 * _MIB))),
                "transfer-coding-gzip-bomb": says(
                    HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\nffffff\r\n", repeat(bomb(1, 8 * _MIB))
                ),
                "content-length-negative": says(sized(b"-5") + b"hello"),
                "content-length-plus": says(sized(b"+2") + b"ok"),
                "content-length-hex": says(sized(b"0x2") + b"ok"),
                "content-length-fraction": says(sized(b"2.0") + b"ok"),
                "content-length-word": says(sized(b"two") + b"ok"),
                "content-length-empty": says(sized(b"") + b"ok"),
                "content-length-20-digits": says(sized(10**20) + b"x", hang),
                "content-length-digits-of-others": says(sized("２".encode()) + b"ok"),
                "content-length-underscore": says(sized(b"1_0") + b"0123456789"),
                "content-length-lie-and-close": says(sized(9) + b"half", end),
                "content-length-lie-and-reset": says(sized(9) + b"half", reset_when_heard),
                "chunk-of-17-digits": says(CHUNKED + b"1" * 17 + b"\r\nx", hang),
                "chunk-size-word": says(CHUNKED + b"xyz\r\nok\r\n0\r\n\r\n"),
                "chunk-size-negative": says(CHUNKED + b"-2\r\nok\r\n0\r\n\r\n"),
                "chunk-size-0x": says(CHUNKED + b"0x2\r\nok\r\n0\r\n\r\n"),
                "chunk-size-empty": says(CHUNKED + b"\r\nok\r\n0\r\n\r\n"),
                "chunk-longer-than-it-says": says(CHUNKED + b"2\r\nokay\r\n0\r\n\r\n"),
                "chunk-then-close": says(CHUNKED + b"2\r\nok\r\n", end),
                "chunk-then-reset": says(CHUNKED + b"2\r\nok\r\n", reset_when_heard),
                "trailers-then-close": says(CHUNKED + b"0\r\nA: b\r\n", end),
                "reset-after-head": says(sized(9), reset_when_heard),
                "transfer-coding-unknown": says(HEAD + b"Transfer-Encoding: gzip\r\n\r\n", repeat(b"x" * 64 * _KIB)),
            },
        ),
        **group(
            Result(200),
            over_tls=[Result(200, truncated=True)],
            acts={
                "until-close": says(HEAD + b"\r\nok", end),
                "transfer-coding-identity": says(HEAD + b"Transfer-Encoding: identity\r\n\r\nok", end),
                "transfer-coding-chunked-first": says(HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\nok", end),
                "transfer-coding-with-a-control": says(HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\nok", end),
                "until-close-then-what-looks-like-an-answer": says(HEAD + b"\r\nok" + POISON, end),
            },
        ),
    }


def _with_an_answer(canary: str) -> dict[str, Behaviour]:
    """Complete answers that try something all the same: above all, to be taken for the next one's."""
    chunks = b"2\r\nok\r\n0\r\n\r\n"
    leads_away = [b"Location: " + canary.encode(), b"Refresh: 0; url=" + canary.encode()]
    return {
        **group(
            Result(200),
            acts={
                "100-then-ok": says(b"HTTP/1.1 100 Continue\r\n\r\n" + OK),
                "102-then-ok": says(b"HTTP/1.1 102 Processing\r\n\r\n" + OK),
                "103-then-ok": says(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK),
                "103-then-ok-later": says(b"HTTP/1.1 103 Early Hints\r\n\r\n", later(OK)),
                "ten-1xx-then-ok": says(b"HTTP/1.1 100 Continue\r\n\r\n" * 10 + OK),
                "second-answer": says(OK + POISON),
                "second-answer-in-part": says(OK + POISON[:30]),
                "second-answer-in-the-body": says(sized(2) + b"ok" + POISON),
                "second-answer-after-chunks": says(CHUNKED + chunks + POISON),
                "second-answer-after-trailers": says(CHUNKED + b"0\r\nA: b\r\n\r\n" + POISON),
                "line-break-after": says(OK + b"\r\n"),
                "transfer-coding-and-length": says(
                    HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n" + chunks
                ),
                "length-and-transfer-coding": says(
                    HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + POISON
                ),
                "transfer-coding-twice": says(HEAD + b"Transfer-Encoding: x, chunked\r\n\r\n" + chunks),
                "transfer-coding-chunked-twice": says(
                    HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
                ),
                "transfer-coding-behind-a-blank": says(sized(2, b"Transfer-Encoding : chunked") + b"ok" + POISON),
                "transfer-coding-folded": says(sized(2, b"A: b", b" Transfer-Encoding: chunked") + b"ok" + POISON),
                "transfer-coding-after-a-nul": says(sized(2, b"\0Transfer-Encoding: chunked") + b"ok" + POISON),
                "content-length-twice": says(sized(2, b"Content-Length: 2") + b"ok"),
                "content-length-zeros": says(sized(b"0000000002") + b"ok"),
                "content-length-and-a-cr": says(sized(b"2\r") + b"ok"),
                "content-length-short": says(sized(2) + b"okay, what else"),
                "http10": says(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"),
                "http19": says(b"HTTP/1.9 200 OK\r\nContent-Length: 2\r\n\r\nok"),
                "lf-only": says(b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
                "no-reason": says(b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok"),
                "connection-close-and-stay": says(ok(b"Connection: close")),
                "bad-header-line": says(ok(b"what is this")),
                "nameless-header": says(ok(b": b")),
                "header-fold": says(ok(b"A: b", b"\tc")),
                "header-binary": says(ok(b"A: " + bytes(range(1, 10)) + bytes(range(14, 256)))),
                "header-nul": says(ok(b"A: b\0c")),
                "header-cr": says(ok(b"A: b\rSet-Cookie: c")),
                "header-ansi": says(ok(b"Server: \x1b]0;owned\x07\x1b[2J")),
                "headers-99": says(ok(*(b"A%d: %s" % (number, b"b" * 600) for number in range(99)))),
                "gzip-bomb": says(ok(b"Content-Encoding: gzip", body=bomb(1, 8 * _MIB))),
                "gzip-bomb-twice": says(ok(b"Content-Encoding: gzip, gzip", body=bomb(2, 16 * _MIB))),
                "deflate-bomb": says(ok(b"Content-Encoding: deflate", body=zlib.compress(bytes(8 * _MIB)))),
                "encoding-chain": says(ok(b"Content-Encoding: " + b", ".join([b"gzip"] * 500))),
                "encoding-unknown": says(ok(b"Content-Encoding: rot13, br, zstd")),
                "gzip-corrupt": says(ok(b"Content-Encoding: gzip", body=b"\x1f\x8b not gzip at all")),
                "gzip-truncated": says(ok(b"Content-Encoding: gzip", body=bomb(1, _KIB)[:-9])),
                "nasty-body": says(
                    ok(body=b"\0\x1b[31m<script>alert(1)</script>\xff\xfe\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
                ),
                "nasty-charset": says(ok(b"Content-Type: text/html; charset=idna", body=b"xn--" * _KIB)),
                "retry-after-on-success": says(ok(b"Retry-After: 86400")),
                "alternative-service": says(ok(b'Alt-Svc: h2="' + canary.encode() + b'"', *leads_away)),
            },
        ),
        **group(
            Result(200),
            begins_with="head",
            body=_LARGE,
            acts={"slow-read-to-the-end": read_slowly_and_answer},
        ),
        **group(
            Result(200),
            begins_with="connection",
            schemes=("http",),
            # To the sender a late accept() is this: the system has accepted long before.
            acts={"slow-accept": answer_late},
        ),
        **group(
            # It depends on the system's buffers whether the request was off our hands when the answer came.
            Result(200),
            Result(0, AttemptFailure.PROTOCOL),
            begins_with="head",
            body=_LARGE,
            acts={"early-200": says(OK, Conversation.read_body)},
        ),
        **group(
            Result(200),
            Result(0, AttemptFailure.PROTOCOL),
            begins_with="connection",
            schemes=("http",),
            acts={"answer-before-the-request": says(OK, hang)},
        ),
        **group(
            Result(413),
            begins_with="head",
            body=_LARGE,
            acts={"early-413": says(status(413), Conversation.read_body)},
        ),
        **group(
            Result(413),
            Result(0, AttemptFailure.CONNECTION_LOST),
            begins_with="head",
            body=_LARGE,
            # With unread bytes left, the close becomes a reset, which may overtake the answer.
            acts={"early-413-then-close": says(status(413), end)},
        ),
        **_by_status(
            {f"redirect-{code}": (code, status(code, *leads_away)) for code in (300, 301, 302, 303, 307, 308)}
        ),
        **_by_status(
            {
                "redirect-relative": (302, status(302, b"Location: /own")),
                "redirect-to-itself": (307, status(307, b"Location: ?")),
                "redirect-to-a-file": (301, status(301, b"Location: file:///etc/passwd")),
                "redirect-to-metadata": (301, status(301, b"Location: http://169.254.169.254/latest/meta-data/")),
                "redirect-to-nowhere": (301, status(301)),
                "redirect-twice": (302, status(302, b"Location: /", *leads_away)),
                "use-proxy": (305, status(305, *leads_away)),
                "not-modified-with-body": (304, status(304).replace(b": 0", b": 8") + b"poisoned"),
                "no-content-with-body": (204, status(204).replace(b": 0", b": %d" % len(POISON)) + POISON),
                "no-content-with-chunks": (204, b"HTTP/1.1 204 None\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks),
                "reset-content-with-body": (205, b"HTTP/1.1 205 Reset\r\nContent-Length: 2\r\n\r\nok" + POISON),
                "partial-content": (206, status(206, b"Content-Range: bytes 0-0/9999999999")),
                "asks-for-a-password": (401, status(401, b'WWW-Authenticate: Negotiate, Basic realm="a"')),
                "asks-for-a-proxy-password": (407, status(407, b"Proxy-Authenticate: Basic")),
                "misdirected": (421, status(421)),
                "asks-to-upgrade": (426, status(426, b"Upgrade: TLS/1.3, HTTP/2.0", b"Connection: Upgrade")),
            }
        ),
        **_by_status(
            {
                f"retry-after-{name}": (503, status(503, *(b"Retry-After: " + value for value in values)))
                for name, values in RETRY_AFTER.items()
            }
        ),
    }


def _by_status(answers: Mapping[str, tuple[int, bytes]]) -> dict[str, Behaviour]:
    return {
        name: Behaviour(act=says(data), results=frozenset({Result(code)})) for name, (code, data) in answers.items()
    }


def _over_tls() -> dict[str, Behaviour]:
    return {**_handshakes(), **_certificates(), **_records()}


def _handshakes() -> dict[str, Behaviour]:
    server_hello = b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03\x03"
    return {
        **group(
            Result(0, AttemptFailure.TLS),
            begins_with="connection",
            schemes=("https",),
            acts={
                "tls-plain-http": hears_hello(says(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", hang)),
                "tls-plain-ok": hears_hello(says(OK, hang)),
                "tls-garbage": hears_hello(says(bytes(range(256)) * 16, hang)),
                "tls-endless-garbage": hears_hello(repeat(b"\x16\x03\x03\x40\x00" + b"\x02" * 16384)),
                "tls-endless-alerts": hears_hello(repeat(b"\x15\x03\x03\x00\x02\x01\x00" * _KIB)),
                "tls-endless-cipher-changes": hears_hello(repeat(b"\x14\x03\x03\x00\x01\x01" * _KIB)),
                "tls-alert": hears_hello(says(b"\x15\x03\x01\x00\x02\x02\x28", hang)),
                "tls-banner": says(b"220 mail.example ESMTP\r\n", hang),
                "tls-close": hears_hello(end),
                "tls-close-on-accept": end,
                "tls-reset": hears_hello(Conversation.reset),
                "tls-close-in-the-middle": hears_hello(says(server_hello, end)),
                "tls-reset-in-the-middle": hears_hello(says(server_hello, reset_when_heard)),
            },
        ),
        **group(
            Result(0, AttemptFailure.TIMEOUT),
            lasts=True,
            begins_with="connection",
            schemes=("https",),
            acts={
                "tls-mute": Conversation.wait,
                "tls-hang": hears_hello(hang),
                "tls-drip": hears_hello(drip(b"\x16\x03\x03\x40\x00" + b"\x02" * _MANY)),
                "tls-drip-alerts": hears_hello(drip(b"\x15\x03\x03\x00\x02\x01\x5a" * 4)),
                "tls-hang-in-the-middle": hears_hello(says(server_hello, hang)),
            },
        ),
    }


def _certificates() -> dict[str, Behaviour]:
    refused = Result(0, AttemptFailure.TLS)
    servers: dict[str, tuple[Callable[[trustme.CA], ssl.SSLContext], set[Result]]] = {
        "tls-self-signed": (self_signed, {refused}),
        "tls-wrong-host": (wrong_host, {refused}),
        "tls-expired": (expired, {refused}),
        "tls-old": (old_protocol, {refused}),
        "tls-no-common-cipher": (no_common_cipher, {refused}),
        "tls-huge-certificate": (huge_certificate, {refused}),
        "tls-huge-group": (huge_group, {refused}),
        # TLS 1.3 refuses a client only after the client's handshake is over.
        "tls-asks-for-a-certificate": (asks_for_a_certificate, {refused, Result(0, AttemptFailure.CONNECTION_LOST)}),
        "tls-many-tickets": (many_tickets, {Result(200)}),
    }
    return {
        name: Behaviour(
            act=answer_late, results=frozenset(results), begins_with="connection", schemes=("https",), tls=context
        )
        for name, (context, results) in servers.items()
    }


def _records() -> dict[str, Behaviour]:
    """The handshake is over and all is well, until the answer."""
    half = sized(9) + b"half"
    answers: dict[str, tuple[Act, Result]] = {
        "tls-garbage-record": (garbage_record, Result(0, AttemptFailure.TLS)),
        "tls-garbage-record-in-the-body": (says(half, garbage_record), Result(200, truncated=True)),
        "tls-end-mid-headers": (
            says(HEAD + b"Content-Le", Conversation.end_tls),
            Result(0, AttemptFailure.CONNECTION_LOST),
        ),
        "tls-end-mid-body": (says(half, Conversation.end_tls), Result(200, truncated=True)),
        "tls-end": (says(HEAD + b"\r\nok", Conversation.end_tls), Result(200)),
    }
    return {
        **{
            name: Behaviour(act=act, results=frozenset({result}), schemes=("https",))
            for name, (act, result) in answers.items()
        },
        **group(
            Result(0, AttemptFailure.TIMEOUT), lasts=True, schemes=("https",), acts={"tls-drip-record": drip_a_record}
        ),
    }


def cases(table: Mapping[str, Behaviour], *, lasts: bool) -> list[tuple[str, str]]:
    """Every behaviour that lasts, or every one that doesn't, over every scheme: as (name, scheme)."""
    return [
        (name, scheme) for name, behaviour in table.items() for scheme in behaviour.schemes if behaviour.lasts is lasts
    ]
