"""What an answer is, byte for byte, however it arrives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbackq.core.exchange import MAX_HEAD_BYTES, MAX_INTERIM_ANSWERS, Exchange, Reply
from callbackq.core.models import AttemptFailure
from callbackq.core.validation import check_detail

LIMIT = 100
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


def answer(head: bytes = b"", body: bytes = b"", status: bytes = b"200 OK") -> bytes:
    """An answer with these fields, one a line."""
    fields = head.replace(b"\n", b"\r\n") + b"\r\n" if head else b""
    return b"HTTP/1.1 " + status + b"\r\n" + fields + b"\r\n" + body


def exchange_of(*pieces: bytes, ends: bool = False, limit: int = LIMIT) -> Exchange:
    exchange = Exchange(response_limit=limit)
    exchange.request_written()
    for piece in pieces:
        exchange.receive(piece)
    if ends:
        exchange.receive_end()
    return exchange


def gist(exchange: Exchange) -> tuple[int, bytes | None, AttemptFailure | None, bool, bool]:
    reply = exchange.reply
    return reply.status_code, reply.body, reply.failure, reply.truncated, exchange.is_reusable


COMPLETE = {
    "known length": (OK, b"ok"),
    "empty": (answer(b"Content-Length: 0"), b""),
    "no reason phrase": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "reason phrase of any bytes": (b"HTTP/1.1 200 \xff\x00\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "no content": (answer(status=b"204 No Content"), None),
    "no content, and says how long it isn't": (answer(b"Content-Length: 0", status=b"204 No Content"), None),
    "not modified, with the length it would have had": (answer(b"Content-Length: 9", status=b"304 Not Modified"), None),
    "chunks": (answer(b"Transfer-Encoding: chunked", b"2\r\nok\r\n0\r\n\r\n"), b"ok"),
    "chunks with extensions": (answer(b"Transfer-Encoding: Chunked", b"2 ;a=b\r\nok\r\n000;x\r\n\r\n"), b"ok"),
    "chunks and trailers": (answer(b"Transfer-Encoding: chunked", b"2\r\nok\r\n0\r\nA: b\r\nC: d\r\n\r\n"), b"ok"),
    "no chunks": (answer(b"Transfer-Encoding: chunked", b"0\r\n\r\n"), b""),
    "exactly the limit": (answer(b"Content-Length: %d" % LIMIT, b"x" * LIMIT), b"x" * LIMIT),
    "a refusal": (answer(b"Content-Length: 0", status=b"500 Oops"), b""),
    "compressed: not decoded": (answer(b"Content-Encoding: gzip\nContent-Length: 4", b"junk"), b"junk"),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_answer_that_ends_beyond_doubt_leaves_a_reusable_connection(name: str) -> None:
    data, body = COMPLETE[name]

    exchange = exchange_of(data)

    status = int(data[9:12])
    assert gist(exchange) == (status, body, None, False, True)


DOUBTFUL = {
    "one length, said twice": (answer(b"Content-Length: 2\nContent-Length: 2", b"ok"), b"ok"),
    "one length, said twice in a list": (answer(b"Content-Length: 2, 2", b"ok"), b"ok"),
    "asked to close": (answer(b"Connection: keep-alive, Close\nContent-Length: 2", b"ok"), b"ok"),
    "older version": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "newer version": (b"HTTP/1.9 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "interim answer": (EARLY_HINTS + OK, b"ok"),
    "interim answer without fields": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
    "second answer": (OK + OK, b"ok"),
    "one byte too many": (OK + b"\n", b"ok"),
    "length and chunks": (
        answer(b"Transfer-Encoding: chunked\nContent-Length: 2", b"2\r\nok\r\n0\r\n\r\n"),
        b"ok",
    ),
    "chunked at the end of a list": (answer(b"Transfer-Encoding: gzip, chunked", b"2\r\nok\r\n0\r\n\r\n"), b"ok"),
    "chunks, then more": (answer(b"Transfer-Encoding: chunked", b"2\r\nok\r\n0\r\n\r\nx"), b"ok"),
    "no content with a length": (answer(b"Content-Length: 2", b"ok", status=b"204 No Content"), None),
    "no content with chunks": (answer(b"Transfer-Encoding: chunked", b"0\r\n\r\n", status=b"204 No Content"), None),
    "bare line feeds": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", b"ok"),
    "one bare line feed": (b"HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nok", b"ok"),
    "line that is no field": (answer(b"Content-Length: 2\nwhat is this", b"ok"), b"ok"),
    "folded line": (answer(b"Content-Length: 2\nA: b\n c", b"ok"), b"ok"),
    "blank before the colon": (answer(b"Content-Length: 2\nA : b", b"ok"), b"ok"),
    "NUL in a value": (answer(b"Content-Length: 2\nA: b\0c", b"ok"), b"ok"),
    "carriage return in a value": (answer(b"Content-Length: 2\nA: b\rc", b"ok"), b"ok"),
    "carriage return after a value": (answer(b"A: b\r\nContent-Length: 2", b"ok"), b"ok"),
    "carriage return in the reason": (answer(b"Content-Length: 2", b"ok", status=b"200 OK\r"), b"ok"),
    "bare line feed among the trailers": (
        answer(b"Transfer-Encoding: chunked", b"2\r\nok\r\n0\r\n\nA: b\r\n\r\n"),
        b"ok",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_answer_that_leaves_a_doubt_counts_but_its_connection_is_not_used_again(name: str) -> None:
    data, body = DOUBTFUL[name]

    exchange = exchange_of(data)

    status = 204 if b" 204 " in data else 200
    assert gist(exchange) == (status, body, None, False, False)


BROKEN_BODIES = {
    "longer than the limit": (answer(b"Content-Length: 999", b"x" * 101), b"x" * LIMIT),
    "length nobody can count": (answer(b"Content-Length: 10000000000000000000", b"x"), b""),
    "negative length": (answer(b"Content-Length: -5", b"hello"), b""),
    "length in other digits": (answer("Content-Length: ٣".encode(), b"abc"), b""),
    "length with a sign": (answer(b"Content-Length: +2", b"ok"), b""),
    "empty length": (answer(b"Content-Length:", b"ok"), b""),
    "length behind what only Python calls a blank": (answer(b"Content-Length: \xa02", b"ok"), b""),
    "length behind a control character": (answer(b"Content-Length: \x0b2", b"ok"), b""),
    "chunks longer than the limit": (answer(b"Transfer-Encoding: chunked", b"65\r\n" + b"x" * 101), b"x" * LIMIT),
    "endless chunk": (answer(b"Transfer-Encoding: chunked", b"ffffffffffffffff\r\n" + b"x" * 101), b"x" * LIMIT),
    "chunk size nobody can count": (answer(b"Transfer-Encoding: chunked", b"1" * 17 + b"\r\nx"), b""),
    "chunk size that is none": (answer(b"Transfer-Encoding: chunked", b"2\r\nok\r\nxyz\r\n"), b"ok"),
    "negative chunk size": (answer(b"Transfer-Encoding: chunked", b"-2\r\nok\r\n"), b""),
    "endless chunk extension": (answer(b"Transfer-Encoding: chunked", b"2;" + b"x" * 300), b""),
    "no line break after a chunk": (answer(b"Transfer-Encoding: chunked", b"2\r\nok0\r\n\r\n"), b"ok"),
    "endless trailers": (answer(b"Transfer-Encoding: chunked", b"2\r\nok\r\n0\r\n" + b"A: b\r\n" * 2000), b"ok"),
    "until the end, longer than the limit": (answer(b"", b"x" * 101), b"x" * LIMIT),
    "unknown coding, longer than the limit": (answer(b"Transfer-Encoding: gzip", b"x" * 101), b"x" * LIMIT),
}


@pytest.mark.parametrize("name", BROKEN_BODIES)
def test_complete_head_decides_whatever_becomes_of_the_body(name: str) -> None:
    data, kept = BROKEN_BODIES[name]

    assert gist(exchange_of(data)) == (200, kept, None, True, False)


PROTOCOL = {
    "banner of another protocol": b"220 mail ESMTP\r\n",
    "first byte of another protocol": b"S",
    "HTTP/0.9": b"<html>hello</html>",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another version": b"HTTP/2.0 200 OK\r\n\r\n",
    "lower case": b"http/1.1 200 OK\r\n\r\n",
    "line break first": b"\r\n" + OK,
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "status above 599": b"HTTP/1.1 600 OK\r\n\r\n",
    "negative status": b"HTTP/1.1 -200 OK\r\n\r\n",
    "status in other digits": "HTTP/1.1 ٢٠٠ OK\r\n\r\n".encode(),
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "too many interim answers": EARLY_HINTS * (MAX_INTERIM_ANSWERS + 1) + OK,
    "two lengths": answer(b"Content-Length: 2\nContent-Length: 3", b"ok"),
    "two lengths in a list": answer(b"Content-Length: 2, 3", b"ok"),
}


@pytest.mark.parametrize("name", PROTOCOL)
def test_what_is_not_http_is_no_answer(name: str) -> None:
    assert gist(exchange_of(PROTOCOL[name])) == (0, None, AttemptFailure.PROTOCOL, False, False)


BROKEN_RULES = {
    "HTTP/2.0 200 OK\r\n\r\n": "no status line of HTTP/1",
    "HTTP/1.1 101 x\r\n\r\n": "switches protocols",
    "HTTP/1.1 103 x\r\n\r\n" * 11: "more than 10 interim answers",
    "HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\n": "several content lengths",
    "HTTP/1.1 200 OK\r\n" + "A: b\r\n" * 20_000: "head longer than 65536 bytes",
    "HTTP/1.1 200 OK\r\n" + "A:\r\n" * 1001 + "\r\n": "more than 1000 header fields",
    "HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n": "unusable content length",
    "HTTP/1.1 200 OK\r\n\r\n" + "x" * 101: "longer than the limit of 100 bytes",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n": "malformed chunk",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + "x" * 300: "malformed chunk",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxyz": "malformed chunk",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + "1\r\n\r\r\n" * 1001: "more than 1000 chunks",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + "A: b\r\n" * 2000: "trailers longer than 8192 bytes",
}


@pytest.mark.parametrize(("data", "detail"), BROKEN_RULES.items(), ids=BROKEN_RULES.values())
def test_broken_rule_is_named(data: str, detail: str) -> None:
    limit = 2000 if "more than 1000 chunks" in detail else LIMIT

    assert exchange_of(data.encode(), limit=limit).reply.detail == detail


def test_as_many_interim_answers_as_allowed_are_skipped() -> None:
    assert exchange_of(EARLY_HINTS * MAX_INTERIM_ANSWERS + OK).reply.status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * MAX_HEAD_BYTES,
        b"HTTP/1.1 200 " + b"b" * MAX_HEAD_BYTES,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n",
        answer(b"A: " + b"b" * (MAX_HEAD_BYTES // 2), status=b"103 x") * 2 + OK,
        answer(b"Content-Length: 0" + b"\nA:" * 1000),
    ],
    ids=["many fields", "long field", "long reason", "complete", "interim answers count, too", "many small fields"],
)
def test_head_beyond_its_limit_is_too_large(data: bytes) -> None:
    assert gist(exchange_of(data)) == (0, None, AttemptFailure.TOO_LARGE, False, False)


def test_head_with_as_many_fields_as_allowed_is_read() -> None:
    assert exchange_of(answer(b"Content-Length: 0" + b"\nA:" * 999)).reply.status_code == 200


def test_head_of_exactly_the_limit_is_read() -> None:
    rest = len(answer(b"A: \nContent-Length: 0"))
    data = answer(b"A: " + b"b" * (MAX_HEAD_BYTES - rest) + b"\nContent-Length: 0")

    assert len(data) == MAX_HEAD_BYTES
    assert exchange_of(data).reply.status_code == 200


def test_head_cut_off_at_any_byte_is_never_an_answer() -> None:
    head = answer(b"Content-Length: 0\nServer: x")

    replies = [exchange_of(*([head[:cut]] if cut else []), ends=True).reply for cut in range(len(head))]

    lost = Reply(failure=AttemptFailure.CONNECTION_LOST, detail="closed while waiting for the head")
    assert replies == [lost] * len(head)


def test_body_cut_off_at_any_byte_is_a_truncated_answer() -> None:
    for data in (
        answer(b"Content-Length: 9", b"x" * 9),
        answer(b"Transfer-Encoding: chunked", b"3\r\nxxx\r\n3\r\nxxx\r\n0\r\nA: b\r\n\r\n"),
    ):
        head_end = data.index(b"\r\n\r\n") + 4
        for cut in range(head_end, len(data)):
            exchange = exchange_of(data[:cut], ends=True)

            assert (exchange.reply.status_code, exchange.reply.truncated, exchange.is_reusable) == (200, True, False)


@pytest.mark.parametrize("head", [b"Server: x", b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding: chunked\xa0"])
def test_body_without_framing_lasts_until_the_end_of_the_stream(head: bytes) -> None:
    exchange = exchange_of(answer(head, b"some"), b" text")
    assert not exchange.is_over

    exchange.receive_end()

    assert gist(exchange) == (200, b"some text", None, False, False)


@pytest.mark.parametrize("failure", [AttemptFailure.TIMEOUT, AttemptFailure.INTERRUPTED])
def test_giving_up_before_the_head_is_complete_is_the_failure(failure: AttemptFailure) -> None:
    exchange = exchange_of(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n")

    exchange.give_up(failure, "why")

    assert gist(exchange) == (0, None, failure, False, False)
    assert exchange.reply.detail == "why"


def test_giving_up_in_the_body_leaves_the_answer_truncated() -> None:
    exchange = exchange_of(answer(b"Content-Length: 9", b"half"))

    exchange.give_up(AttemptFailure.TIMEOUT, "why")

    assert gist(exchange) == (200, b"half", None, True, False)
    assert exchange.reply.detail == "timeout: why"


def test_giving_up_after_the_end_changes_nothing() -> None:
    exchange = exchange_of(OK)

    exchange.give_up(AttemptFailure.TIMEOUT, "why")

    assert gist(exchange) == (200, b"ok", None, False, True)
    assert exchange.reply.detail == ""


def test_end_of_the_stream_after_the_answer_leaves_nothing_to_reuse() -> None:
    assert gist(exchange_of(OK, ends=True)) == (200, b"ok", None, False, False)


def test_success_before_the_request_was_written_is_no_delivery() -> None:
    exchange = Exchange(response_limit=LIMIT)

    exchange.receive(OK)

    assert gist(exchange) == (0, None, AttemptFailure.PROTOCOL, False, False)
    assert exchange.reply.detail == "success before the request was sent"


def test_refusal_before_the_request_was_written_is_taken_at_its_word() -> None:
    exchange = Exchange(response_limit=LIMIT)

    exchange.receive(answer(b"Content-Length: 0", status=b"413 Too Large"))

    assert gist(exchange) == (413, b"", None, False, False)


def test_interim_answer_may_come_before_the_request_was_written() -> None:
    exchange = Exchange(response_limit=LIMIT)
    exchange.receive(b"HTTP/1.1 100 Continue\r\n\r\n")
    exchange.request_written()

    exchange.receive(OK)

    assert exchange.reply.status_code == 200


def test_headers_are_kept_as_sent_and_repeated_ones_joined() -> None:
    head = b"Content-Length: 0\nX-One:  a b \t\nx-one: c\nSet-Cookie: \xe9\nEmpty:"

    assert exchange_of(answer(head)).reply.headers == {
        "Content-Length": "0",
        "X-One": "a b, c",
        "Set-Cookie": "é",
        "Empty": "",
    }


def test_characters_no_store_could_hold_become_blanks() -> None:
    assert exchange_of(answer(b"Content-Length: 0\nA: b\0c\rd")).reply.headers["A"] == "b c d"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (b"\n".join(b"A%d: b" % n for n in range(500)), [f"A{n}" for n in range(100)]),
        (b"A: b\nB: " + b"b" * 20_000 + b"\nC: d", ["A"]),
    ],
    ids=["in number", "in size"],
)
def test_kept_headers_are_bounded(fields: bytes, kept: list[str]) -> None:
    assert list(exchange_of(answer(fields), ends=True).reply.headers) == kept


@pytest.mark.parametrize(("chunks", "truncated"), [(999, False), (1001, True)])
def test_body_in_more_chunks_than_any_server_needs_is_broken_off(chunks: int, truncated: bool) -> None:
    data = answer(b"Transfer-Encoding: chunked", b"1\r\nx\r\n" * chunks + b"0\r\n\r\n")

    assert exchange_of(data, limit=9999).reply.truncated is truncated


def test_limit_of_zero_keeps_no_body() -> None:
    assert gist(exchange_of(OK, limit=0)) == (200, b"", None, True, False)


# Whatever a receiver sends: one of the tables, damaged, or anything at all.
_KNOWN = [*PROTOCOL.values(), *(data for table in (COMPLETE, DOUBTFUL, BROKEN_BODIES) for data, _ in table.values())]
_PARTS = st.sampled_from(
    [
        *(b"HTTP/1.1 ", b"200 OK", b"103 x", b"\r\n", b"\n", b"\r", b":", b" ", b"\0", b"\xff", b"0", b"3", b"abc"),
        *(b"Content-Length: ", b"Transfer-Encoding: chunked", b"Connection: close", b"ffffffffffffffff"),
    ]
)
ANYTHING = st.one_of(
    st.binary(max_size=200),
    st.lists(_PARTS, max_size=30).map(b"".join),
    st.lists(_PARTS, max_size=20).map(lambda parts: b"HTTP/1.1 200 OK\r\n" + b"".join(parts)),
    st.sampled_from(_KNOWN),
)


@given(data=ANYTHING, cuts=st.lists(st.integers(0, 400), max_size=8), ends=st.booleans())
def test_pieces_in_which_an_answer_arrives_make_no_difference(data: bytes, cuts: list[int], ends: bool) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(edges) if start < end]

    in_one, in_pieces = (exchange_of(*given, ends=ends) for given in ([data] if data else [], pieces))

    assert in_one.is_over == in_pieces.is_over
    if in_one.is_over:
        assert gist(in_one) == gist(in_pieces)
        assert in_one.reply.headers == in_pieces.reply.headers


@pytest.mark.parametrize("data", _KNOWN)
def test_answer_that_arrives_byte_by_byte_is_the_same(data: bytes) -> None:
    assert gist(exchange_of(*(bytes([byte]) for byte in data), ends=True)) == gist(exchange_of(data, ends=True))


@given(data=ANYTHING)
def test_any_bytes_have_an_end_and_bounds(data: bytes) -> None:
    exchange = exchange_of(*([data] if data else []), ends=True, limit=10)

    reply = exchange.reply

    assert (reply.failure is None) == (200 <= reply.status_code <= 599)
    assert bool(reply.detail) == (reply.failure is not None or reply.truncated)
    assert not list(check_detail(reply.detail))
    assert len(reply.body or b"") <= 10
    assert not exchange.is_reusable  # the stream has ended
