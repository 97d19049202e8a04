"""
What a callback may contain: one check per field, shared by the models and by the JSON codec.

A check takes whatever was given and gives every fault as ``(path below the field, reason)``. Reasons say
what would be accepted and never quote the value, which may be a secret. A check looks at a size before it looks
at what has that size, so that refusing costs little.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Final

from callbackq.core.url import UrlFault, parse_url
from callbackq.errors import InvalidRequestError

__all__ = [
    "MAX_ATTEMPTS",
    "MAX_BODY_BYTES",
    "MAX_DELAY",
    "MAX_DETAIL_LENGTH",
    "MAX_DURATION",
    "MAX_FAULTS",
    "MAX_HEADERS",
    "MAX_HEADERS_TOTAL",
    "MAX_INTEGER",
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
    "check_detail",
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
    "header_path",
    "is_path_text",
    "refuse",
]

Fault = tuple[str, str]
Check = Callable[[object], Iterable[Fault]]

METHODS: Final = ("GET", "POST", "PUT")
ON_EXHAUSTED: Final = ("continue", "hold")

MAX_TEXT_LENGTH: Final = 255
MAX_DETAIL_LENGTH: Final = 120
MAX_BODY_BYTES: Final = 16 * 1024 * 1024
"""What must still fit into memory many times over. What a store accepts is less: `callbackq.RequestLimits`."""
MAX_HEADERS: Final = 100
MAX_HEADER_NAME: Final = 256
MAX_HEADER_VALUE: Final = 8 * 1024
_MAX_SHOWN_NAME: Final = 64
MAX_HEADERS_TOTAL: Final = 64 * 1024
MAX_PHASES: Final = 100
MAX_RETRIES: Final = 10_000
MAX_ATTEMPTS: Final = 1 + MAX_PHASES * MAX_RETRIES
MAX_DELAY: Final = timedelta(days=365)
MAX_TOTAL_DELAY: Final = timedelta(days=3650)
MAX_EMAIL_LENGTH: Final = 254
MAX_INTEGER: Final = 2**63 - 1
"""What databases and Go's int64 can hold."""
MAX_DURATION: Final = timedelta(microseconds=MAX_INTEGER // 1000)
"""As many nanoseconds as fit into an int64, some 292 years."""
MAX_FAULTS: Final = 250
"""How many faults one error lists: a document of a megabyte may have a million, which nobody reads."""

_MICROSECOND: Final = timedelta(microseconds=1)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# What no system takes for a path. U+DC80 to U+DCFF stand for bytes that aren't UTF-8 (PEP 383).
_NOT_IN_A_PATH = re.compile(r"[\0\ud800-\udc7f\udd00-\udfff]")
_DETAIL = re.compile(rf"[\x20-\x7e]{{0,{MAX_DETAIL_LENGTH}}}")
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
    {"accept-encoding", "connection", "content-length", "expect", "host", "keep-alive"}
    | {"te", "trailer", "transfer-encoding", "upgrade"}
)
_RESERVED_PREFIXES = ("proxy-", "webhook-", "callbackq-")


def refuse(faults: Iterable[Fault]) -> None:
    """
    Refuse what has faults.

    Raises:
        InvalidRequestError: with all faults, or the first `MAX_FAULTS` and a word that there are more.
    """
    listed = list(islice(faults, MAX_FAULTS + 1))
    if len(listed) > MAX_FAULTS:
        listed[MAX_FAULTS] = ("", "there are more faults than are listed here")
    if listed:
        raise InvalidRequestError(listed)


def _one(reason: str) -> tuple[Fault]:
    return (("", reason),)


def check_url(value: object) -> Iterable[Fault]:
    try:
        parse_url(value)  # type: ignore[arg-type]  # it says so itself where the value is no text
    except UrlFault as fault:
        return _one(str(fault))
    return ()


def check_method(value: object) -> Iterable[Fault]:
    if not isinstance(value, str) or value not in METHODS:
        return _one("must be GET, POST or PUT")
    return ()


def check_on_exhausted(value: object) -> Iterable[Fault]:
    if not isinstance(value, str) or value not in ON_EXHAUSTED:
        return _one("must be 'continue' or 'hold'")
    return ()


def check_text(value: object) -> Iterable[Fault]:
    """Labels: application id, queue id, machine name."""
    if not isinstance(value, str):
        return _one("must be a string")
    if len(value) > MAX_TEXT_LENGTH:
        return _one(f"must not be longer than {MAX_TEXT_LENGTH} characters")
    if _CONTROL.search(value):
        return _one("must not contain control characters or line breaks")
    if _SURROGATE.search(value):
        return _one("must not contain lone surrogates")
    return ()


def check_detail(value: object) -> Iterable[Fault]:
    """Words about a failure, which end up in log lines and e-mails."""
    if not isinstance(value, str) or not _DETAIL.fullmatch(value):
        return _one(f"must be a string of at most {MAX_DETAIL_LENGTH} visible ASCII characters and blanks")
    return ()


def check_callback_id(value: object) -> Iterable[Fault]:
    if not isinstance(value, str) or not _CALLBACK_ID.fullmatch(value):
        return _one("must be 1 to 255 visible ASCII characters other than the dot")
    return ()


def check_email_address(value: object) -> Iterable[Fault]:
    if not isinstance(value, str):
        return _one("must be a string")
    if value and (len(value) > MAX_EMAIL_LENGTH or not _EMAIL.fullmatch(value)):
        return _one(f"must be empty or one plain ASCII address (name@host) of at most {MAX_EMAIL_LENGTH} characters")
    return ()


def check_body(value: object) -> Iterable[Fault]:
    if value is not None and not isinstance(value, bytes):
        return _one("must be bytes or None")
    if value is not None and len(value) > MAX_BODY_BYTES:
        return _one(f"must not be longer than {MAX_BODY_BYTES} bytes")
    return ()


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
    if not isinstance(value, Mapping):
        yield "", "must be a mapping of strings to strings"
        return
    if len(value) > MAX_HEADERS:
        yield "", f"must not hold more than {MAX_HEADERS} headers"
        return
    seen: set[str] = set()
    total = 0
    for name, text in value.items():
        if not isinstance(name, str):
            yield "", "must have strings as names"
            continue
        lower = name.lower()
        if len(name) > MAX_HEADER_NAME or not _TOKEN.fullmatch(name):
            yield (
                header_path(name),
                f"must be named by a token of at most {MAX_HEADER_NAME} characters (RFC 9110, section 5.6.2)",
            )
        elif lower in _FORBIDDEN_HEADERS or lower.startswith(_RESERVED_PREFIXES):
            yield header_path(name), "must not be set: callbackq or the connection controls this header"
        elif lower in seen:
            yield header_path(name), "must not be given twice (names are compared without regard to case)"
        seen.add(lower)
        if not isinstance(text, str):
            yield header_path(name), "must be a string"
        elif len(text) > MAX_HEADER_VALUE or not _HEADER_VALUE.fullmatch(text):
            yield (
                header_path(name),
                f"must be at most {MAX_HEADER_VALUE} visible ASCII characters, blanks and tabs only between them",
            )
        else:
            total += len(name) + len(text)
    if total > MAX_HEADERS_TOTAL:
        yield "", f"must not be larger than {MAX_HEADERS_TOTAL} bytes in all"


def header_path(name: str) -> str:
    """
    A header's place in a fault, safe to log whatever the name holds.

    Shown as far as it can be a name: a whole line given as one, ``Authorization: Bearer …``, goes on with a secret.
    """
    start = _TOKEN.match(name[:_MAX_SHOWN_NAME])
    shown = start[0] if start else ""
    return f"[{shown!a}]" if shown == name else f"[{shown!a}...]"


def is_path_text(value: object) -> bool:
    """Whether this can be the path of a file, as text."""
    return isinstance(value, str) and bool(value) and not _NOT_IN_A_PATH.search(value)


def check_retries(value: object) -> Iterable[Fault]:
    if not _is_int(value) or not 0 <= value <= MAX_RETRIES:  # type: ignore[operator]
        return _one(f"must be a whole number from 0 to {MAX_RETRIES}")
    return ()


def check_delay(value: object) -> Iterable[Fault]:
    if not isinstance(value, timedelta):
        return _one("must be a timedelta")
    if not timedelta(0) <= value <= MAX_DELAY:
        return _one(f"must be from 0 to {MAX_DELAY.days} days")
    return ()


def check_phase_total(phases: tuple[tuple[int, timedelta], ...]) -> Iterable[Fault]:
    """The plan as a whole: *phases* as (retries, delay)."""
    # In whole microseconds: 100 phases of 10,000 retries of a year overflow a timedelta.
    total = sum(retries * (delay // _MICROSECOND) for retries, delay in phases)
    if total > MAX_TOTAL_DELAY // _MICROSECOND:
        return _one(f"must not wait longer than {MAX_TOTAL_DELAY.days} days in all")
    return ()


def check_status_code(value: object) -> Iterable[Fault]:
    if not _is_int(value) or not (value == 0 or 100 <= value <= 999):  # type: ignore[operator]
        return _one("must be 0 (no answer) or from 100 to 999")
    return ()


def check_instant(value: object) -> Iterable[Fault]:
    # The time zone's own methods are not asked: a foreign one may raise anything.
    if not isinstance(value, datetime) or value.tzinfo is not UTC:
        return _one("must be an aware datetime in UTC (datetime.timezone.utc)")
    return ()


def check_duration(value: object) -> Iterable[Fault]:
    if not isinstance(value, timedelta):
        return _one("must be a timedelta")
    if not timedelta(0) <= value <= MAX_DURATION:
        return _one(f"must be from 0 to {MAX_DURATION.days} days")
    return ()


def check_token(value: object) -> Iterable[Fault]:
    if not _is_int(value) or not 0 <= value <= MAX_INTEGER:  # type: ignore[operator]
        return _one(f"must be a whole number from 0 to {MAX_INTEGER}")
    return ()


def check_bool(value: object) -> Iterable[Fault]:
    if not isinstance(value, bool):
        return _one("must be True or False")
    return ()


def _is_int(value: object) -> bool:
    # True and False are ints to isinstance, and a mistake wherever a number is meant.
    return isinstance(value, int) and not isinstance(value, bool)
