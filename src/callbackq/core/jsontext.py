"""
JSON text: written as Go writes it, read as strangers must be read.

What a document means is the codec's business; here it becomes plain lists, objects, text and numbers, or an error
that says where it stops being JSON and holds no part of it.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import accumulate
from typing import Final, NoReturn

from callbackq.errors import InvalidRequestError

__all__ = ["NOT_WHOLE", "REPEATED", "parse_json", "write_json"]

MAX_DEPTH: Final = 16
"""The deepest document that means something has 5 levels: headers of the answer to an attempt of a status."""
MAX_DIGITS: Final = 19
"""As many as an int64 has."""

REPEATED: Final = object()
"""Stands for the value of a key that an object has more than once."""
NOT_WHOLE: Final = object()
"""Stands for a number that is no integer, or has too many digits: fractions, exponents, NaN, Infinity."""


def write_json(document: object) -> bytes:
    """Write plain lists, objects, text and integers, byte for byte as Go's ``json.Marshal`` did in 2016."""
    text = _ENCODER.encode(document)
    # Only strings can hold these characters, so that the text may be treated as a whole.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Go had no short form for these two before 1.22. A match is an escape, or the first two characters of one.
    if "\\b" in text or "\\f" in text:
        text = re.sub(r"\\.", lambda escape: _LONG_ESCAPES.get(escape[0], escape[0]), text)
    return text.encode()


def parse_json(data: bytes | str, *, limit_bytes: int) -> object:
    """
    Read a document, in time linear in its length.

    Returns:
        Plain values, in which `REPEATED` and `NOT_WHOLE` stand for what JSON allows and no document of ours may hold,
        so that the reader, who knows the place, can refuse it there.

    Raises:
        InvalidRequestError: it is too long, too deep, not UTF-8 or not JSON.
    """
    # No more than one character too many: what is too long is not worth encoding.
    raw = data[: limit_bytes + 1].encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if not isinstance(raw, bytes):
        _refuse("must be JSON as bytes or str")
    if len(raw) > limit_bytes:
        _refuse(f"must not be longer than {limit_bytes} bytes")
    text = _decode(raw)
    if text is None:
        _refuse("must be UTF-8")
    if text.startswith("\ufeff"):
        _refuse("must not begin with a byte order mark")
    if _is_too_deep(raw):
        _refuse(f"must not be nested deeper than {MAX_DEPTH} levels")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
    # Not within the except clause, nor with the error's own words: they hold the document or parts of it.
    raise InvalidRequestError([("", f"must be JSON, which it stops being at {place}")])


def _refuse(reason: str) -> NoReturn:
    raise InvalidRequestError([("", reason)])


def _decode(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: one level down, one level up
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[{]}"))


def _is_too_deep(raw: bytes) -> bool:
    # Counted before parsing: the parser recurses on the C stack, and a host that has raised the recursion limit
    # would die of a document that is nothing but brackets.
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return False
    steps = array("b", _STRING.sub(b"", raw).translate(_STEPS, _NO_BRACKETS))
    return max(accumulate(steps), default=0) > MAX_DEPTH


def _object_from(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found[key] = REPEATED
            seen.add(key)
    return found


def _integer_from(digits: str) -> object:
    # Never int() of a megabyte of digits: it takes minutes or raises, as the host has set the interpreter's limit.
    return int(digits) if len(digits.removeprefix("-")) <= MAX_DIGITS else NOT_WHOLE


def _not_whole(_: str) -> object:
    return NOT_WHOLE


_LONG_ESCAPES: Final = {"\\b": "\\u0008", "\\f": "\\u000c"}
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"))
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object_from, parse_int=_integer_from, parse_float=_not_whole, parse_constant=_not_whole
)
