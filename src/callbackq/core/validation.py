"""
What a callback may contain: one check per field, shared by the models and by the JSON codec.

A check takes whatever was given and yields every fault as ``(path below the field, reason)``. Reasons say
what would be accepted and never quote the value, which may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from callbackq.core.url import UrlFault, parse_url

__all__ = [
    "MAX_BODY_BYTES",
    "MAX_DELAY",
    "MAX_PHASES",
    "MAX_RETRIES",
    "MAX_TEXT_LENGTH",
    "MAX_TOTAL_DELAY",
    "METHODS",
    "Check",
    "Fault",
    "check_body",
    "check_bool",
    "check_callback_id",
    "check_delay",
    "check_duration",
    "check_email_address",
    "check_headers",
    "check_instant",
    "check_method",
    "check_on_exhausted",
    "check_phase_total",
    "check_request_headers",
    "check_retries",
    "check_status_code",
    "check_text",
    "check_token",
    "check_url",
]

Fault = tuple[str, str]
Check = Callable[[object], Iterator[Fault]]

METHODS: Final = ("GET", "POST", "PUT")
ON_EXHAUSTED: Final = ("continue", "hold")

MAX_TEXT_LENGTH: Final = 255
MAX_BODY_BYTES: Final = 1024 * 1024
MAX_HEADERS: Final = 100
MAX_HEADER_NAME: Final = 256
MAX_HEADER_VALUE: Final = 8 * 1024
MAX_HEADERS_TOTAL: Final = 64 * 1024
MAX_PHASES: Final = 100
MAX_RETRIES: Final = 10_000
MAX_DELAY: Final = timedelta(days=365)
MAX_TOTAL_DELAY: Final = timedelta(days=3650)
MAX_EMAIL_LENGTH: Final = 254

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# RFC 9110, section 5.6.2: token.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Visible ASCII with inner blanks and tabs. RFC 9110, section 5.5 also has obs-text, which receivers read differently.
_HEADER_VALUE = re.compile(r"(?:[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?")
# Visible ASCII without the dot, which separates id, timestamp and body in a Standard Webhooks signature.
_CALLBACK_ID = re.compile(r"[\x21-\x2d\x2f-\x7e]{1,255}")
_EMAIL = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~][A-Za-z0-9!#$%&'*+/=?^_`{|}~-]*(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
)

# Headers that callbackq or the connection itself must control (the fetch standard's forbidden request headers, less
# those that only matter to browsers) and those that prove where a callback came from.
_FORBIDDEN_HEADERS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate"}
    | {"proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
_RESERVED_PREFIXES = ("webhook-", "callbackq-")


def check_url(value: object) -> Iterator[Fault]:
    if not isinstance(value, str):
        yield "", "must be a string"
        return
    try:
        parse_url(value)
    except UrlFault as fault:
        yield "", str(fault)


def check_method(value: object) -> Iterator[Fault]:
    if value not in METHODS or not isinstance(value, str):
        yield "", "must be GET, POST or PUT"


def check_on_exhausted(value: object) -> Iterator[Fault]:
    if value not in ON_EXHAUSTED or not isinstance(value, str):
        yield "", "must be 'continue' or 'hold'"


def check_text(value: object) -> Iterator[Fault]:
    """Labels: application id, queue id, machine name."""
    if not isinstance(value, str):
        yield "", "must be a string"
    elif len(value) > MAX_TEXT_LENGTH:
        yield "", f"must not be longer than {MAX_TEXT_LENGTH} characters"
    elif _CONTROL.search(value):
        yield "", "must not contain control characters or line breaks"
    elif _SURROGATE.search(value):
        yield "", "must not contain lone surrogates"


def check_callback_id(value: object) -> Iterator[Fault]:
    if not isinstance(value, str) or not _CALLBACK_ID.fullmatch(value):
        yield "", "must be 1 to 255 visible ASCII characters other than the dot"


def check_email_address(value: object) -> Iterator[Fault]:
    if not isinstance(value, str):
        yield "", "must be a string"
    elif value and (len(value) > MAX_EMAIL_LENGTH or not _EMAIL.fullmatch(value)):
        yield "", f"must be empty or one plain ASCII address (name@host) of at most {MAX_EMAIL_LENGTH} characters"


def check_body(value: object) -> Iterator[Fault]:
    if value is not None and not isinstance(value, bytes):
        yield "", "must be bytes or None"
    elif value is not None and len(value) > MAX_BODY_BYTES:
        yield "", f"must not be longer than {MAX_BODY_BYTES} bytes"


def check_headers(value: object) -> Iterator[Fault]:
    """What any header map must be, a receiver's included: text to text."""
    if not isinstance(value, Mapping):
        yield "", "must be a mapping of strings to strings"
        return
    for name, text in value.items():
        if not isinstance(name, str):
            yield "", "must have strings as names"
        elif not isinstance(text, str):
            yield header_path(name), "must be a string"
        elif _SURROGATE.search(name) or _SURROGATE.search(text):
            yield header_path(name), "must not contain lone surrogates"


def check_request_headers(value: object) -> Iterator[Fault]:
    """What a header map must be to be sent: well-formed, unambiguous, and none of ours or the connection's."""
    if not isinstance(value, Mapping) or list(check_headers(value)):
        return  # the map's own check has said so
    if len(value) > MAX_HEADERS:
        yield "", f"must not hold more than {MAX_HEADERS} headers"
    if sum(len(name) + len(text) for name, text in value.items()) > MAX_HEADERS_TOTAL:
        yield "", f"must not be larger than {MAX_HEADERS_TOTAL} bytes in all"
    seen: set[str] = set()
    for name, text in value.items():
        lower = name.lower()
        path = header_path(name)
        if len(name) > MAX_HEADER_NAME or not _TOKEN.fullmatch(name):
            yield path, f"must be named by a token of at most {MAX_HEADER_NAME} characters (RFC 9110, section 5.6.2)"
        elif lower in _FORBIDDEN_HEADERS or lower.startswith(_RESERVED_PREFIXES):
            yield path, "must not be set: callbackq or the connection controls this header"
        elif lower in seen:
            yield path, "must not be given twice (names are compared without regard to case)"
        if len(text) > MAX_HEADER_VALUE or not _HEADER_VALUE.fullmatch(text):
            yield (
                path,
                f"must be at most {MAX_HEADER_VALUE} visible ASCII characters, blanks and tabs only between them",
            )
        seen.add(lower)


def header_path(name: str) -> str:
    """A header's place in a fault, safe to log whatever the name holds."""
    return f"[{name[:64]!a}]"


def check_retries(value: object) -> Iterator[Fault]:
    if not _is_int(value) or not 0 <= value <= MAX_RETRIES:  # type: ignore[operator]
        yield "", f"must be a whole number from 0 to {MAX_RETRIES}"


def check_delay(value: object) -> Iterator[Fault]:
    if not isinstance(value, timedelta):
        yield "", "must be a timedelta"
    elif not timedelta(0) <= value <= MAX_DELAY:
        yield "", f"must be from 0 to {MAX_DELAY.days} days"


def check_phase_total(phases: tuple[tuple[int, timedelta], ...]) -> Iterator[Fault]:
    """The plan as a whole: *phases* as (retries, delay)."""
    if len(phases) > MAX_PHASES:
        yield "", f"must not hold more than {MAX_PHASES} phases"
    # In whole microseconds: 100 phases of 10,000 retries of a year overflow a timedelta.
    total_us = sum(retries * (delay // timedelta(microseconds=1)) for retries, delay in phases)
    if total_us > MAX_TOTAL_DELAY // timedelta(microseconds=1):
        yield "", f"must not wait longer than {MAX_TOTAL_DELAY.days} days in all"


def check_status_code(value: object) -> Iterator[Fault]:
    if not _is_int(value) or not (value == 0 or 100 <= value <= 999):  # type: ignore[operator]
        yield "", "must be 0 (no answer) or from 100 to 999"


def check_instant(value: object) -> Iterator[Fault]:
    if not isinstance(value, datetime) or value.utcoffset() is None:
        yield "", "must be an aware datetime: give it a time zone"
    elif value.tzinfo is not UTC:
        yield "", "must be in UTC (datetime.timezone.utc)"


def check_duration(value: object) -> Iterator[Fault]:
    if not isinstance(value, timedelta):
        yield "", "must be a timedelta"
    elif value < timedelta(0):
        yield "", "must not be negative"


def check_token(value: object) -> Iterator[Fault]:
    if not _is_int(value) or value < 0:  # type: ignore[operator]
        yield "", "must be a whole number that is not negative"


def check_bool(value: object) -> Iterator[Fault]:
    if not isinstance(value, bool):
        yield "", "must be True or False"


def _is_int(value: object) -> bool:
    # True and False are ints to isinstance, and a mistake wherever a number is meant.
    return isinstance(value, int) and not isinstance(value, bool)
