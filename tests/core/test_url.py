"""One reading of a URL, or none."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3.util
from hypothesis import example, given, settings
from hypothesis import strategies as st

from callbackq.core.addresses import parse_address
from callbackq.core.models import CallbackRequest
from callbackq.core.url import MAX_URL_LENGTH, Target, UrlFault, parse_host, parse_url
from callbackq.errors import InvalidRequestError

TABLE: dict[str, Any] = tomllib.loads(Path(__file__).with_name("urls.toml").read_text(encoding="utf-8"))


def reason_against(url: str) -> str:
    try:
        parse_url(url)
    except UrlFault as fault:
        return str(fault)
    return "accepted"


@pytest.mark.parametrize("kind", TABLE["refused"])
def test_refuses_what_parsers_read_in_different_ways_and_says_why(kind: str) -> None:
    expected, urls = TABLE["refused"][kind]["reason"], TABLE["refused"][kind]["urls"]

    wrong = {url: reason for url in urls if expected not in (reason := reason_against(url))}

    assert wrong == {}


@pytest.mark.parametrize("row", TABLE["accepted"]["urls"], ids=lambda row: row[0])
def test_takes_a_url_apart_and_leaves_path_and_query_as_they_are(row: list[Any]) -> None:
    url, scheme, host, port, path_and_query = row

    assert parse_url(url) == Target(scheme=scheme, host=host, port=port, path_and_query=path_and_query)


def test_the_tables_are_as_large_as_they_are_meant_to_be() -> None:
    assert sum(len(kind["urls"]) for kind in TABLE["refused"].values()) >= 200
    assert len(TABLE["accepted"]["urls"]) >= 45


def test_refuses_what_is_no_text() -> None:
    for value in (None, 80, b"http://a.test/", ["http://a.test/"]):
        with pytest.raises(UrlFault, match="must be a string"):
            parse_url(value)  # type: ignore[arg-type]


def test_refuses_a_lone_surrogate() -> None:
    assert "ASCII" in reason_against("http://a.test/\ud800")


@pytest.mark.parametrize(
    ("length", "expected"), [(MAX_URL_LENGTH, "accepted"), (MAX_URL_LENGTH + 1, "longer than 8192")]
)
def test_bounds_the_length_of_a_url(length: int, expected: str) -> None:
    assert expected in reason_against("http://a.test/".ljust(length, "x"))


@pytest.mark.parametrize(("length", "expected"), [(253, "accepted"), (254, "longer than 253")])
@pytest.mark.parametrize("dot", ["", "."])
def test_bounds_the_length_of_a_host_name_without_its_trailing_dot(length: int, expected: str, dot: str) -> None:
    name = (
        ".".join(["a" * 63] * 4)[: length - 1].ljust(length, "b")
        if length == 253
        else ".".join(["a" * 49] * 5) + ".abcd"
    )

    assert len(name) == length
    assert expected in reason_against(f"http://{name}{dot}/")


def test_a_request_is_judged_by_the_same_parser() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        CallbackRequest(url="http://u:SECRET@a.test/")

    assert [path for path, _ in caught.value.errors] == ["url"]
    assert "SECRET" not in str(caught.value)


def test_a_target_shows_neither_path_nor_query() -> None:
    assert "SECRET" not in repr(parse_url("https://a.test/SECRET?SECRET"))


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://A.test./x", "https://a.test:443"),
        ("http://[2001:DB8::0]/", "http://[2001:db8::]:80"),
        ("http://[::ffff:8.8.8.8]:8080/", "http://8.8.8.8:8080"),
    ],
)
def test_the_origin_is_one_for_all_spellings_of_a_host(url: str, origin: str) -> None:
    assert parse_url(url).origin == origin


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://8.8.8.8/", True), ("http://[::1]/", True), ("http://a.test/", False), ("http://1.2.3.4.a1/", False)],
)
def test_knows_literal_addresses_from_names(url: str, expected: bool) -> None:
    assert parse_url(url).is_literal_address is expected


def test_no_refusal_quotes_the_url() -> None:
    urls = [url for kind in TABLE["refused"].values() for url in kind["urls"]]

    assert [url for url in urls if len(url) > 12 and url in reason_against(url)] == []


@pytest.mark.parametrize(
    "url",
    [
        "http://" + "a-" * 4000,
        "http://" + "a." * 4000,
        "http://[" + ":" * 8000 + "]",
        "http://[" + "1:" * 4000 + "]",
        "http://a.test:" + "1" * 8000,
        "http://" + "[" * 8000,
        "http://" + "xn--" * 2000,
        "http://" + "xn--" + "9" * 59 + ".xn--" + "9" * 59,
        "http://a.test/" + "#" * 8000,
        "http" * 2000 + "://",
        "http://" + "0" * 8000,
    ],
    ids=lambda url: url[:20],
)
def test_hostile_text_takes_no_time(url: str) -> None:
    began = time.perf_counter()

    reason_against(url)

    # Measured under 0.5 ms; the allowance is for a busy machine, a backtracking pattern takes seconds.
    assert time.perf_counter() - began < 0.1


PIECES = [*TABLE["pieces"], "\ud800"]
URLS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
LIKELY_HOSTS = st.one_of(
    st.from_regex(r"[A-Za-z0-9_.x-]{1,20}", fullmatch=True),
    st.from_regex(r"xn--[a-z0-9-]{1,12}(\.test)?", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
    st.ip_addresses(v=6).map(lambda address: f"[{address.exploded.upper()}]"),
    st.ip_addresses(v=4).map(lambda address: f"[::ffff:{address}]"),
)
LIKELY_URLS = st.builds(
    lambda scheme, host, port, rest: f"{scheme}://{host}{port}{rest}",
    st.sampled_from(["http", "https", "HTTPS"]),
    LIKELY_HOSTS,
    st.one_of(st.just(""), st.integers(0, 70000).map(lambda port: f":{port}")),
    st.one_of(st.just(""), st.text("/?#@:[]%a.&=~\\", max_size=12).map(lambda text: f"/{text}"), st.just("?a@b:1/#c")),
)


@given(URLS)
@settings(max_examples=80, deadline=None)
@example("http://xn--ls8h" + "-" * 30 + "a")
def test_always_returns_a_target_or_raises_url_fault(url: str) -> None:
    reason_against(url)


@given(st.one_of(LIKELY_URLS, URLS))
@settings(max_examples=150, deadline=None)
def test_other_parsers_always_find_the_same_host_and_port_in_what_is_accepted(url: str) -> None:
    try:
        target = parse_url(url)
    except UrlFault:
        return

    theirs, split = urllib3.util.parse_url(url), urlsplit(url)

    assert (theirs.scheme, split.scheme) == (target.scheme, target.scheme)
    assert (_canonical(theirs.host), _canonical(split.hostname)) == (target.host, target.host)
    assert (theirs.port or _default(target), split.port or _default(target)) == (target.port, target.port)
    assert (theirs.auth, split.username, split.password) == (None, None, None)
    assert target.path_and_query == (split.path or "/") + (f"?{split.query}" if "?" in url.partition("#")[0] else "")


@given(LIKELY_URLS)
@settings(max_examples=80, deadline=None)
def test_a_target_written_out_is_always_read_as_itself(url: str) -> None:
    try:
        target = parse_url(url)
    except UrlFault:
        return

    assert parse_url(target.origin + target.path_and_query) == target


@given(st.from_regex(r"[a-z0-9-]{0,40}", fullmatch=True))
@settings(max_examples=80, deadline=None)
def test_what_is_accepted_as_punycode_always_decodes_and_encodes_to_itself(label: str) -> None:
    try:
        name = parse_host(f"xn--{label}")
    except UrlFault:
        return

    text = name.removeprefix("xn--").encode().decode("punycode")
    assert not text.isascii()
    assert text.encode("punycode").decode() == label


def _canonical(host: str | None) -> str:
    assert host is not None
    bare = host.strip("[]").lower()
    return str(parse_address(bare) or bare.removesuffix("."))


def _default(target: Target) -> int:
    return {"http": 80, "https": 443}[target.scheme]
