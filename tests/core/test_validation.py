"""The rules for single fields: what is accepted up to which edge, and that looking costs little."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbackq.core import validation as v
from callbackq.errors import InvalidRequestError
from support import generated

YEAR = timedelta(days=365)
MICROSECOND = timedelta(microseconds=1)

Edges = tuple[v.Check, list[Any], list[Any]]

EDGES: dict[str, Edges] = {
    "url": (v.check_url, ["http://a.example", "HTTPS://a.example:65535/?#"], ["", "a", "ftp://a.example", None]),
    "method": (v.check_method, ["GET", "POST", "PUT"], ["get", "DELETE", "", None, ["GET"]]),
    "on_exhausted": (v.check_on_exhausted, ["continue", "hold"], ["", "Hold", None, True]),
    "text": (
        v.check_text,
        ["", "a" * 255, "漢字 🎈", " \u00a0\u200d", "'; DROP TABLE x; --", "%_\\", "\u202e"],
        ["a" * 256, "\x00", "a\n", "\r", "\t", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u2029", "\ud800", b"a", None],
    ),
    "detail": (
        v.check_detail,
        ["", "ECONNRESET", " ~" * 60],
        ["a" * 121, "a\n", "\t", "\x1b[31m", "\x7f", "\u00a0", "ä", "\ud800", b"a", None],
    ),
    "callback id": (
        v.check_callback_id,
        ["a", "!" * 255, "'\"%_-~,", "0"],
        ["", "a.b", "a b", "a\n", "ä", "!" * 256, "\x00", "\x7f", b"a", None, 5],
    ),
    "email address": (
        v.check_email_address,
        [
            *("", "a@b", "a@example.com", "first.last+tag@sub.example.co.uk", "!#$%&'*+/=?^_`{|}~@x.y"),
            *("a-b@x-y.example", f"a@{'b' * 63}.de", "a" * 242 + "@example.com", "1@1.1"),
        ],
        [
            *("a", "@", "a@", "@a", "a@@b", "a@b@c", ".a@b", "a.@b", "a..b@c", "a@.b", "a@b.", "a@b..c", "-a@b"),
            *("a@-b", "a@b-", "a b@c", "a@b c", " a@b", "a@b ", "a@b\n", "a@b\r\nBcc: c@d", "a\x00@b", "a,b@c"),
            *("a@b,c@d", "a@b;c@d", "A <a@b>", "<a@b>", '"a"@b', "a(b)@c", "a@[127.0.0.1]", "ä@b", "a@ä"),
            *("a" * 243 + "@example.com", "=?utf-8?q?a?=@b\t", "a@b_c", None, b"a@b"),
        ],
    ),
    "body": (v.check_body, [None, b"", bytes(2**24)], [bytes(2**24 + 1), "a", bytearray(), memoryview(b""), 5]),
    "headers": (
        v.check_headers,
        [{}, {"": "", "ä\r\n": "\x00\n"}, {"Host": "x"}, {str(n): "x" * 100 for n in range(500)}],
        [None, [], "a", [("a", "b")], {"a": 5}, {5: "a"}, {"a": None}, {"\ud800": "a"}, {"a": "\udfff"}],
    ),
    "request headers": (
        v.check_request_headers,
        [
            *({}, {"a": ""}, {"X-" + "a" * 254: "x"}, {"!#$%&'*+.^_`|~09azAZ-": "a"}, {"a": "x \t y"}),
            *({"a": "!~" * 4096}, {f"{n}": "x" for n in range(100)}, {"hostname": "x", "te-x": "x"}),
            *({"Authorization": "x", "Cookie": "x", "Accept": "x", "User-Agent": "x", "Date": "x"},),
            {f"X{n}": "a" * 8190 for n in range(8)},
        ],
        [
            *(None, [], {"a": 5}, {5: "a"}, {"": "a"}, {"a b": "c"}, {"a:": "b"}, {"a\n": "b"}, {"ä": "b"}),
            *({"X-" + "a" * 255: "x"}, {"a": " b"}, {"a": "b "}, {"a": "\tb"}, {"a": "b\n"}, {"a": "b\r\n c"}),
            *({"a": "\x00"}, {"a": "\x7f"}, {"a": "ä"}, {"a": "a" * 8193}, {"a": "b", "A": "c"}, {"\ud800": "a"}),
            *({f"{n}": "x" for n in range(101)}, {f"X{n}": "a" * 8190 for n in range(8)} | {"x": ""}),
            *({"HOST": "x"}, {"Te": "x"}, {"content-length": "0"}, {"Proxy-Anything": "x"}, {"Trailer": "x"}),
            *({"Webhook-": "x"}, {"webhook-id": "x"}, {"CALLBACKQ-TOKEN": "x"}, {"accept-encoding": "x"}),
        ],
    ),
    "retries": (v.check_retries, [0, 1, 10_000], [-1, 10_001, True, False, 1.0, "1", None]),
    "delay": (
        v.check_delay,
        [timedelta(0), MICROSECOND, YEAR],
        [-MICROSECOND, YEAR + MICROSECOND, timedelta.max, timedelta.min, 1, None],
    ),
    "phase total": (
        v.check_phase_total,
        [(), ((10, YEAR),), ((10_000, timedelta(0)),), ((5, YEAR), (5, YEAR))],
        [((11, YEAR),), ((10, YEAR), (1, MICROSECOND)), ((10_000, YEAR),) * 100],
    ),
    "status code": (v.check_status_code, [0, 100, 200, 999], [-1, 1, 99, 1000, True, False, 200.0, "200", None]),
    "instant": (
        v.check_instant,
        [datetime(1, 1, 1, tzinfo=UTC), datetime.max.replace(tzinfo=UTC)],
        [datetime(2026, 1, 1), datetime(2026, 1, 1).date(), 0, "2026-01-01T00:00:00Z", None],
    ),
    "duration": (
        v.check_duration,
        [timedelta(0), v.MAX_DURATION],
        [-MICROSECOND, v.MAX_DURATION + MICROSECOND, 1.0, None],
    ),
    "token": (v.check_token, [0, 1, 2**63 - 1], [-1, 2**63, True, 1.0, "1", None]),
    "bool": (v.check_bool, [True, False], [0, 1, None, "true"]),
}


@pytest.mark.parametrize("rule", EDGES)
def test_a_rule_accepts_up_to_its_edge_and_not_beyond(rule: str) -> None:
    check, accepted, refused = EDGES[rule]

    assert [value for value in accepted if list(check(value))] == []
    assert [value for value in refused if not list(check(value))] == []


@pytest.mark.parametrize("rule", EDGES)
def test_a_reason_says_what_must_be_in_plain_words(rule: str) -> None:
    check, _, refused = EDGES[rule]

    for value in refused:
        for path, reason in check(value):
            assert reason.startswith("must ")
            assert path.isprintable()
            assert path.isascii()


def test_every_check_has_edges() -> None:
    checks = {getattr(v, name) for name in v.__all__ if name.startswith("check_")}

    assert {check for check, _, _ in EDGES.values()} == checks


# Header maps


def test_every_faulty_header_is_named_once_for_name_and_once_for_value() -> None:
    headers = {"Host": "a\n", "x": "fine", "X": "b ", "a b": "fine", 5: "c", "y": 5, "ok": "fine", "\r\n": "\r\n"}

    faults = [path for path, _ in v.check_request_headers(headers)]

    assert faults == ["['Host']", "['Host']", "['X']", "['X']", "['a'...]", "", "['y']", "[''...]", "[''...]"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("X-A", "['X-A']"),
        ("it's", '["it\'s"]'),
        ("Authorization: Bearer c4n4ry", "['Authorization'...]"),
        ("a\r\nb\x00\x1b", "['a'...]"),
        ("\u202eä🎈", "[''...]"),
        ("\ud800", "[''...]"),
        ("n" * 1000, f"['{'n' * 64}'...]"),
    ],
)
def test_a_header_name_is_shown_as_far_as_it_can_be_one(name: str, path: str) -> None:
    assert v.header_path(name) == path
    assert [place for place, _ in v.check_headers({name: 5})] == [path]


@generated.FEW
@given(
    st.dictionaries(st.text(max_size=5) | st.integers(), st.text(max_size=5) | st.none() | st.integers(), max_size=5)
)
def test_headers_that_pass_can_always_be_put_on_the_wire(headers: dict[Any, Any]) -> None:
    if not list(v.check_request_headers(headers)):
        wire = "".join(f"{name}: {text}\r\n" for name, text in headers.items()).encode("ascii")

        lines = wire.split(b"\r\n")
        assert len(lines) == len(headers) + 1
        assert [line.split(b": ", 1)[0].decode() for line in lines[:-1]] == list(headers)
        assert all(line.rstrip(b"\r\n\t ") == line or line.endswith(b": ") for line in lines)


# Refusing


def test_refuse_lets_pass_what_has_no_fault() -> None:
    v.refuse([])
    v.refuse(iter(()))


def test_refuse_reads_no_more_faults_than_it_lists() -> None:
    read = 0

    def endless() -> Iterator[v.Fault]:
        nonlocal read
        while True:
            read += 1
            yield "a", "must not be"

    with pytest.raises(InvalidRequestError) as caught:
        v.refuse(endless())

    assert caught.value.errors == [("a", "must not be")] * v.MAX_FAULTS + [
        ("", "there are more faults than are listed here")
    ]
    assert read == v.MAX_FAULTS + 1


def test_refuse_says_that_there_are_more_only_when_there_are() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        v.refuse([("a", "must not be")] * v.MAX_FAULTS)

    assert caught.value.errors == [("a", "must not be")] * v.MAX_FAULTS


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (v.check_url, "http://" + "a." * 1_000_000),
        (v.check_text, "a" * 2_000_000),
        (v.check_callback_id, "a" * 2_000_000),
        (v.check_email_address, "a." * 1_000_000 + "@b"),
        (v.check_email_address, "a@" + "b-" * 120),
        (v.check_request_headers, {"a": "b" + " " * 2_000_000 + "\n"}),
        (v.check_request_headers, {"a" * 2_000_000: "b"}),
        (v.check_request_headers, {"a": "b" + " " * 8000 + "\n"}),
        (v.check_request_headers, dict.fromkeys(map(str, range(200_000)), "")),
    ],
)
def test_refusing_the_largest_value_takes_no_time(check: v.Check, value: object) -> None:
    began = time.process_time()
    faults = list(check(value))
    took = time.process_time() - began

    assert faults
    assert took < 0.2
