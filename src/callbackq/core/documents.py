"""
What values, lists and objects look like in a document, and how strictly they are read.

A hook for reading takes what `parse_json` made of a stranger's text and refuses what it can't convert. Its faults
have paths below the value; the list or object around it puts its own place in front. What needs no converting passes
as it is: the check of its field judges it.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from itertools import chain, islice
from typing import Any, Final, NoReturn

from attrs import frozen

from callbackq.core import validation as v
from callbackq.core.jsontext import REPEATED
from callbackq.errors import InvalidRequestError

__all__ = [
    "Key",
    "ReadHook",
    "as_it_is",
    "enum_of",
    "headers_of",
    "list_of",
    "object_of",
    "read_body",
    "read_bool",
    "read_duration",
    "read_instant",
    "write_body",
    "write_duration",
    "write_headers",
    "write_instant",
]

ReadHook = Callable[[Any, Any], Any]
"""From a document's value (and the type it stands for, which cattrs passes along) to a model's."""

_MICROSECOND: Final = timedelta(microseconds=1)
# Days are left to datetime, hours are not: newer Pythons take 24:00 for midnight.
_HOUR_AND_MINUTE = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_RFC_3339 = re.compile(
    rf"[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}T{_HOUR_AND_MINUTE}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_HOUR_AND_MINUTE})"
)


def _refuse(reason: str) -> NoReturn:
    raise InvalidRequestError([("", reason)])


def as_it_is(value: Any, _: object) -> Any:
    """Leave all judging to the field's check."""
    return value


def read_bool(value: object, _: object) -> bool:
    if not isinstance(value, bool):
        _refuse("must be true or false")
    return value


def write_duration(value: timedelta) -> int:
    """Nanoseconds, as Go counts them."""
    return value // _MICROSECOND * 1000


def read_duration(value: object, _: object) -> timedelta:
    """Read nanoseconds and round them up to a microsecond: no wait may become shorter."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= v.MAX_INTEGER:
        _refuse(f"must be nanoseconds: a whole number from 0 to {v.MAX_INTEGER}")
    return timedelta(microseconds=-(-value // 1000))


def write_instant(value: datetime) -> str:
    """RFC 3339 as Go prints it: no trailing zeros in the fraction, ``Z`` for UTC."""
    text = datetime.isoformat(value.replace(tzinfo=None))
    return (text.rstrip("0") if value.microsecond else text) + "Z"


def read_instant(value: object, _: object) -> datetime:
    """Read RFC 3339 in any offset. What is finer than a microsecond is cut off: none may become later than it was."""
    if isinstance(value, str) and _RFC_3339.fullmatch(value):
        try:
            return datetime.fromisoformat(value).astimezone(UTC)
        except (ValueError, OverflowError):
            pass  # the 30th of February; before the year 1 in UTC
    _refuse("must be a time as RFC 3339 has it, such as 2016-01-02T03:04:05.678Z")


def write_body(value: bytes) -> str:
    """Standard base64, with padding."""
    return b64encode(value).decode("ascii")


def read_body(value: object, _: object) -> bytes:
    if isinstance(value, str):
        try:
            body = b64decode(value, validate=True)
        except ValueError:
            pass
        else:
            # Stray bits before the padding would be lost.
            if write_body(body) == value:
                return body
    _refuse("must be standard base64, or null for no body")


def write_headers(value: Mapping[str, str]) -> dict[str, str] | None:
    """Sorted, and null when there are none, as Go writes a map that was never made."""
    # Go sorts by the bytes of UTF-8, Python by code points: the same order.
    return dict(sorted(value.items())) or None


def headers_of(check: v.Check) -> ReadHook:
    """Make the hook that reads a header map; *check* is its field's."""

    def read(value: object, _: object) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            _refuse("must be an object of strings, or null for none")
        repeated = [name for name, text in value.items() if text is REPEATED]
        if repeated:
            twice = ((v.header_path(name), "must not be given twice") for name in repeated)
            others = {name: text for name, text in value.items() if text is not REPEATED}
            raise InvalidRequestError(islice(chain(twice, check(others)), v.MAX_FAULTS + 1))
        return value

    return read


def enum_of(kind: type[Enum]) -> ReadHook:
    """Make the hook that reads one word of a closed list."""
    members = {member.value: member for member in kind}

    def read(value: object, _: object) -> Enum:
        if not isinstance(value, str) or value not in members:
            _refuse(f"must be one of {', '.join(members)}")
        return members[value]

    return read


def list_of(item: type, read_item: ReadHook, *, max_items: int | None = None) -> ReadHook:
    """Make the hook that reads a list into a tuple."""

    def read(value: object, _: object) -> tuple[Any, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            _refuse("must be a list, or null for an empty one")
        if max_items is not None and len(value) > max_items:
            _refuse(f"must not hold more than {max_items} items")
        items = []
        faults: list[v.Fault] = []
        for index, document in enumerate(value):
            try:
                items.append(read_item(document, item))
            except InvalidRequestError as error:
                faults += [(f"[{index}]{path}", reason) for path, reason in error.errors]
                if len(faults) > v.MAX_FAULTS:
                    break
        if faults:
            raise InvalidRequestError(faults)
        return tuple(items)

    return read


_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@frozen
class Key:
    """
    What may stand under one key of an object.

    Attributes:
        argument: what the object's `build` calls it.
        type: the attribute's type, for the hook.
        read: the hook.
        check: the rules for what it has read.
        required: whether the key must be there.
    """

    argument: str
    type: Any
    read: ReadHook
    check: v.Check
    required: bool


def object_of(
    keys: Mapping[str, Key],
    build: Callable[..., Any],
    rule: Callable[[Mapping[str, Any]], Iterator[v.Fault]] = lambda _: iter(()),
) -> ReadHook:
    """
    Make the hook that reads an object.

    Only a document in which `build` finds a fault, or none was looked for because a value could not be read, is gone
    through a second time, to name all its faults in its own order and words.

    Args:
        keys: what may stand in it.
        build: makes the model of the arguments read, or refuses them by the keys' checks and by *rule*.
        rule: what must hold between arguments.
    """
    required = {key: known for key, known in keys.items() if known.required}.keys()

    def read(document: object, _: object) -> Any:
        if not isinstance(document, dict):
            _refuse("must be an object")
        arguments: dict[str, Any] = {}
        unread: dict[str, list[v.Fault]] = {}
        for key, value in document.items():
            if known := keys.get(key):
                try:
                    arguments[known.argument] = known.read(value, known.type)
                except InvalidRequestError as error:
                    unread[key] = error.errors
        if len(arguments) == len(document) and required <= document.keys():
            try:
                return build(**arguments)
            except InvalidRequestError:
                pass  # it names attributes, not keys, in their own order
        raise InvalidRequestError(islice(faults_in(document, arguments, unread), v.MAX_FAULTS + 1))

    def faults_in(
        document: Mapping[str, object], arguments: Mapping[str, Any], unread: Mapping[str, list[v.Fault]]
    ) -> Iterator[v.Fault]:
        for key, value in document.items():
            known = keys.get(key)
            if known is None:
                place = f".{key}" if _WORD.fullmatch(key) else v.header_path(key)
                yield place, f"is not known here; known are {', '.join(keys)}"
            elif value is REPEATED:
                yield f".{key}", "must not be given twice"
            else:
                faults = unread[key] if key in unread else known.check(arguments[known.argument])
                yield from ((f".{key}{path}", reason) for path, reason in faults)
        yield from ((f".{key}", "must be given") for key in required if key not in document)
        yield from rule(arguments)

    return read
