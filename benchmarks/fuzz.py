"""
Fuzzing of everything that strangers write: URLs, answers, Retry-After fields, documents.

    python benchmarks/fuzz.py --urls 400000 --answers 400000 --retry-after 50000 --documents 200000

Each case is made from the seed and its own number alone, so that a crash can be repeated (``--only answers:1234``).
A crash is an exception that is not in the contract, or a broken promise; some promises are judged by parsers that are
not ours. A case that takes longer than half a minute ends the process with a traceback.

Prints one JSON document; exits 0 only if nothing crashed.
"""

from __future__ import annotations

import argparse
import faulthandler
import http.client
import io
import json
import re
import socket
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from urllib.parse import urlsplit

import urllib3.util

from callbackq import CallbackRequest, CallbackStatus, TargetNotAllowedError, TargetPolicy
from callbackq.codec import SEED_KEYS, dumps, loads
from callbackq.core.delivery import Delivery
from callbackq.core.exchange import Exchange
from callbackq.core.retry import parse_retry_after
from callbackq.core.url import Target, UrlFault, parse_url
from callbackq.errors import InvalidRequestError
from callbackq.transport.request import RequestWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from core.malformed_documents import CANARY, MALFORMED, REQUEST, STATUS

TESTS = Path(__file__).parents[1] / "tests"
CASE_SECONDS = 30
CASES_BETWEEN_SIGNS_OF_LIFE = 500
RESPONSE_LIMIT = 100
NOW = datetime(2026, 11, 24, tzinfo=UTC)


def must(promise: bool, broken: str) -> None:
    """Crash, with a word for what is broken, unless the promise holds."""
    if not promise:
        raise AssertionError(broken)


T = TypeVar("T", str, bytes)


def damaged(random: Random, whole: T, pieces: list[T]) -> T:
    """*whole* with a few pieces left out, put in, doubled or exchanged."""
    for _ in range(random.randint(0, 3)):
        start = random.randint(0, len(whole))
        end = min(len(whole), start + random.choice((0, 0, 1, 1, 2, 8)))
        middle = random.choice((whole[:0], random.choice(pieces), random.choice(pieces), whole[start:end] * 2))
        whole = whole[:start] + middle + whole[end:]
    return whole


# URLs.

URL_TABLE = tomllib.loads((TESTS / "core" / "urls.toml").read_text(encoding="utf-8"))
KNOWN_URLS = [
    *(row[0] for row in URL_TABLE["accepted"]["urls"]),
    *(url for kind in URL_TABLE["refused"].values() for url in kind["urls"]),
]
URL_PIECES = [*URL_TABLE["pieces"], *"aAzZ09.-:/?#@[]%\\ \t\n\x00\x7f", "\ud800", "é", "Ａ", "。", "0x", "::ffff:"]
PATH_PIECES = [*"aZ0-._~:/?#@!$&'()*+,;=%[]{}|^`<>", "%2e", "..", "//", "%0d%0a", "%zz", "http://b.test/"]
HOSTS = [
    "a.test",
    "A.B.TEST.",
    "127.0.0.1",
    "8.8.8.8",
    "[::1]",
    "[2606:4700::1111]",
    "[::ffff:8.8.8.8]",
    "xn--fiqs8s.a",
]
POLICY = TargetPolicy(resolver=lambda host, port: ["8.8.8.8"])
WRITER = RequestWriter(user_agent="fuzz", order_headers="none", queue_key=b"", signer=None, close=False)


def a_url(random: Random) -> str:
    chance = random.random()
    if chance < 0.1:
        return "".join(random.choices(URL_PIECES, k=random.randint(0, 12)))
    if chance < 0.4:
        return damaged(random, random.choice(KNOWN_URLS), URL_PIECES)
    host = random.choice([*HOSTS, ".".join(str(random.randint(0, 300)) for _ in range(4))])
    if chance < 0.7:
        host = damaged(random, host, URL_PIECES)
    port = random.choice(["", "", f":{random.randint(0, 70000)}"])
    path = "".join(random.choices(URL_PIECES if chance < 0.5 else PATH_PIECES, k=random.randint(0, 4)))
    return f"{random.choice(('http', 'https', 'HTTPS'))}://{host}{port}/{path}"


def try_url(random: Random) -> None:
    url = a_url(random)
    try:
        target = parse_url(url)
    except UrlFault:
        return
    must(parse_url(target.origin + target.path_and_query) == target, "not read as itself")
    assert_others_agree(url, target)
    assert_policy_is_sound(url, target)
    if random.random() < 0.2:  # it takes as long as all the rest
        assert_request_says(url, target)


def assert_others_agree(url: str, target: Target) -> None:
    theirs, split = urllib3.util.parse_url(url), urlsplit(url)
    for host, port in ((theirs.host, theirs.port), (split.hostname, split.port)):
        must(canonical(host or "") == target.host, "another host to other parsers")
        must((port or {"http": 80, "https": 443}[target.scheme]) == target.port, "another port to other parsers")
    must((theirs.auth, split.username) == (None, None), "user information")


def canonical(host: str) -> str:
    bare = host.strip("[]").lower()
    try:
        address = ip_address(bare)
    except ValueError:
        return bare.removesuffix(".")
    return str(getattr(address, "ipv4_mapped", None) or address)


def assert_policy_is_sound(url: str, target: Target) -> None:
    if not target.is_literal_address:
        try:
            socket.inet_aton(target.host)
        except OSError:
            pass
        else:
            raise AssertionError("a name that resolvers read as an address")
    try:
        POLICY.check_url(url)
    except TargetNotAllowedError:
        return
    if target.is_literal_address:
        address = ip_address(target.host)
        is_special = address.is_private or address.is_loopback or address.is_link_local or address.is_reserved
        must(not (is_special or address.is_multicast or address.is_unspecified), "let through")


def assert_request_says(url: str, target: Target) -> None:
    request = CallbackRequest(url=url)
    delivery = Delivery(callback_id="id", request=request, sequence=1, attempt=1, token=1, ends_at=0.0)
    head, _, body = WRITER.write(delivery, request.target, NOW).partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    must(request.target == target, "another target to the request")
    must(lines[0] == f"POST {target.path_and_query} HTTP/1.1", "another request line")
    must(len([line for line in lines if line.lower().startswith("host:")]) == 1, "not one Host")
    must(head.count(b"\n") == head.count(b"\r") == 6, "another number of line breaks")
    must(body == b"", "a body from nowhere")


# Answers.

ANSWER_PIECES = [
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 204 None\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 103 Hints\r\n", b"HTTP/1."),
    *(b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"A: b\r\n", b"A:", b" c\r\n"),
    *(b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\n\n", b":", b" ", b"\t", b",", b";", b"-", b"+", b"x", b"0x", b"_"),
    *(
        b"\0",
        b"\x0b",
        b"\x0c",
        b"\x1c",
        b"\x85",
        b"\xa0",
        b"\xff",
        b"0",
        b"1",
        b"2",
        b"a",
        b"ok",
        b"chunked",
        b"gzip, ",
    ),
    *(b"0\r\n\r\n", b"2\r\nok\r\n", b"3\r\nabc\r\n", b"f" * 17, b"x" * 70, b"A: " + b"b" * 300 + b"\r\n"),
]
FIELDS = [b"A: b\r\n", b"B: c\r\n", b"Server: x\r\n", b"A: " + b"b" * 40 + b"\r\n"]
BODIES = [
    (b"Content-Length: 2\r\n\r\n", b"ok"),
    (b"Content-Length: 0\r\n\r\n", b""),
    (b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n", b"ok"),
    (b"Transfer-Encoding: chunked\r\n\r\n", b"2\r\nok\r\n0\r\n\r\n"),
    (b"Transfer-Encoding: chunked\r\nTrailer: A\r\n\r\n", b"2;x=y\r\nok\r\n00\r\nA: b\r\n\r\n"),
    (b"\r\n", b"until the end"),
]


def an_answer(random: Random) -> bytes:
    if random.random() < 0.2:
        return b"".join(random.choices(ANSWER_PIECES, k=random.randint(0, 20)))
    interim = b"HTTP/1.1 103 Hints\r\nLink: a\r\n\r\n" * random.choice((0,) * 12 + (1, 2, 10, 11))
    status = random.choice((b"200 OK", b"200 OK", b"200", b"204 None", b"304 Same", b"404 No", b"500 Oops"))
    fields = b"".join(random.choices(FIELDS, k=random.randint(0, 3)))
    rest, body = random.choice(BODIES)
    more = random.choice((b"", b"", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"x"))
    whole = interim + b"HTTP/1.1 " + status + b"\r\n" + fields + rest + body + more
    return damaged(random, whole, ANSWER_PIECES) if random.random() < 0.7 else whole


def try_answer(random: Random) -> None:
    data, ends = an_answer(random), random.random() < 0.5
    cuts = sorted(random.randint(0, len(data)) for _ in range(random.choice((0, 1, 1, 2, 3, 8, len(data)))))
    pieces = [data[start:end] for start, end in pairwise([0, *cuts, len(data)]) if start < end]

    in_one, in_pieces = read([data] if data else [], ends), read(pieces, ends)

    must(in_one.is_over == in_pieces.is_over, "pieces make a difference to the end")
    if not in_one.is_over:
        must(not ends, "no end with the end of the stream")
        return
    must(in_one.reply == in_pieces.reply, "pieces make a difference to the answer")
    must(in_one.is_reusable == in_pieces.is_reusable, "pieces make a difference to the connection")
    assert_within_bounds(in_one)
    if in_one.is_reusable:
        assert_http_client_reads_the_same(in_one, data)


def read(pieces: list[bytes], ends: bool) -> Exchange:
    exchange = Exchange(response_limit=RESPONSE_LIMIT)
    exchange.request_written()
    for piece in pieces:
        exchange.receive(piece)
    if ends:
        exchange.receive_end()
    return exchange


def assert_within_bounds(exchange: Exchange) -> None:
    reply = exchange.reply
    must((reply.failure is None) == (200 <= reply.status_code <= 599), "neither an answer nor a failure")
    must(len(reply.body or b"") <= RESPONSE_LIMIT, "too much kept")
    must(len(reply.headers) <= 100, "too many headers kept")
    for name, value in reply.headers.items():
        must(not set("\r\n\0") & {*name, *value}, "a control character kept")


class Canned:
    """A socket with this to read."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def makefile(self, mode: str) -> io.BytesIO:
        return self.file


def assert_http_client_reads_the_same(exchange: Exchange, data: bytes) -> None:
    """Where we would use the connection again, a parser that is not ours must find the same answer and its same end."""
    head, blank, rest = data.partition(b"\r\n\r\n")
    # It reads neither every reason phrase nor blanks behind a value, which both may be there (RFC 9112, sections 4, 5).
    head = re.sub(rb"[ \t]+(?=\r\n|$)", b"", head)
    head = re.sub(rb"^HTTP/1.1 ([0-9]{3})[^\n]*(?=\r\n|$)", rb"HTTP/1.1 \1", head)
    canned = Canned(head + blank + rest)
    response = http.client.HTTPResponse(canned, method="POST")  # type: ignore[arg-type]
    response.begin()
    body = response.read()
    must(response.status == exchange.reply.status_code, "another status to http.client")
    must(body == (exchange.reply.body or b""), "another body to http.client")
    must(canned.file.closed or not canned.file.read(), "a later end than http.client's")


# Retry-After.

RETRY_AFTER_PIECES = [
    *("0", "1", "9", "60", "3600", "99999999999", "-", "+", ".", "e", "NaN", "Infinity", " ", ",", ":", "(", ")", '"'),
    *(
        "Fri, 31 Dec 9999 23:59:59",
        "06 Nov 1994 08:49:37",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
    ),
    *("Sun, ", "Nov", "Feb", "30", "0000", "10000", "24:61:61", "GMT", "UTC", "Z", "-9999", "+2400"),
    *("\0", "\t", "\xa0", "²", "٣"),
]


def try_retry_after(random: Random) -> None:
    value = "".join(random.choices(RETRY_AFTER_PIECES, k=random.randint(0, 8)))
    value = damaged(random, value, RETRY_AFTER_PIECES)
    wait = parse_retry_after(value, NOW)
    must(wait is None or timedelta(0) <= wait <= timedelta(hours=24), "beyond its bounds")


# Documents.

DOCUMENTS = [
    *[(CallbackRequest, json.dumps(REQUEST)), (CallbackStatus, json.dumps(STATUS))] * 100,
    *((one.type, one.document) for one in MALFORMED if len(one.document) < 4000),
]
JSON_PIECES = [
    *'{}[]:,"\\0123456789.eE+-tfn \n\t\0\x7f\ufeff\ud800é\u2028',
    *("null", "true", "false", "NaN", "Infinity", "1e9", "[" * 20, "]" * 20, "9" * 25, "\\u0000", "\\ud800", CANARY),
    *('""', "[]", "{}", '"url":', '"retries":', '"delay":', '"http://a.test/"', '"AA=="', '"2016-01-01T00:00:00Z"'),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 5.0, 1e400, 2**63, 10**30, "", CANARY, "AA==", "POST", "http://a.test/", "a@b.test"),
    *("2016-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "failed", "hold", "\ud800", "\0", [], {}, [[]], {"a": CANARY}),
    *([{"retries": 1, "delay": 1}], {"headers": {"A": "b"}, "data": "AA=="}, [None], ["" for _ in range(200)]),
]


def a_document(random: Random) -> tuple[type, bytes | str]:
    """A damaged document, and what it is to be read as: mostly what it once was."""
    kind: type
    if random.random() < 0.5:
        kind, base = random.choice(((CallbackRequest, REQUEST), (CallbackStatus, STATUS)))
        return kind, json.dumps(damaged_inside(random, deepcopy(base)))
    kind, document = random.choice(DOCUMENTS)
    text = document if isinstance(document, str) else document.decode("latin-1")
    text = damaged(random, text, JSON_PIECES)
    kind = kind if random.random() < 0.8 else random.choice(list(SEED_KEYS))
    return kind, text if random.random() < 0.5 else text.encode("utf-8", "surrogatepass")


def damaged_inside(random: Random, whole: Any) -> Any:
    for _ in range(random.randint(0, 3)):
        inner, above, step = whole, None, 0
        while isinstance(inner, (dict, list)) and inner and (above is None or random.random() < 0.7):
            above, step = inner, random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = above[step]
        if above is None:
            break
        if random.random() < 0.2:
            del above[step]
        elif random.random() < 0.2 and isinstance(above, dict):
            above[random.choice(["", CANARY, "url", "Host", "X-A", "__class__"])] = deepcopy(random.choice(VALUES))
        else:
            above[step] = deepcopy(random.choice(VALUES))
    return whole


def try_document(random: Random) -> None:
    kind, document = a_document(random)
    try:
        model = loads(document, kind)
    except InvalidRequestError as error:
        must(1 <= len(error.errors) <= 251, "no fault, or too many")
        # A path may hold a key of the document; no reason holds any part of it.
        must(not any(CANARY in reason for _, reason in error.errors), "quoted")
        must(error.__cause__ is error.__context__ is None, "an error that holds the document")
        return
    must(loads(dumps(model), kind) == model, "not read as it was written")


# All of it.

KINDS: dict[str, Callable[[Random], None]] = {
    "urls": try_url,
    "answers": try_answer,
    "retry_after": try_retry_after,
    "documents": try_document,
}


def fuzz(kind: str, numbers: range, seed: int) -> dict[str, Any]:
    crashes: list[str] = []
    slowest, slowest_number = 0.0, -1
    began = time.process_time()
    for number in numbers:
        if number % CASES_BETWEEN_SIGNS_OF_LIFE == 0:
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        random = Random(f"{seed} {kind} {number}")
        started = time.thread_time()
        try:
            KINDS[kind](random)
        except Exception:
            crashes.append(f"{kind}:{number}\n{traceback.format_exc()}")
        if (took := time.thread_time() - started) > slowest:
            slowest, slowest_number = took, number
    faulthandler.cancel_dump_traceback_later()
    for crash in crashes[:5]:
        print(crash, file=sys.stderr)
    return {
        "cases": len(numbers),
        "cpu_seconds": round(time.process_time() - began, 1),
        "crashes": len(crashes),
        "slowest_cpu_seconds": round(slowest, 4),
        "slowest_case": f"{kind}:{slowest_number}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind.replace('_', '-')}", type=int, default=0, metavar="CASES")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="repeat one case")
    arguments = parser.parse_args()
    if arguments.only:
        kind, _, number = arguments.only.partition(":")
        KINDS[kind](Random(f"{arguments.seed} {kind} {number}"))
        return 0
    kinds = {kind: fuzz(kind, range(getattr(arguments, kind)), arguments.seed) for kind in KINDS}
    crashes = sum(figures["crashes"] for figures in kinds.values())
    cases = sum(figures["cases"] for figures in kinds.values())
    print(json.dumps({"seed": arguments.seed, "cases": cases, "crashes": crashes, "kinds": kinds}, indent=2))
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
