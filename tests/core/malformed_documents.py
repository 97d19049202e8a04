"""
Documents that must be refused, each with the places its error must name, in order.

Wherever a value can hold text it holds the canary, which must not appear in the error.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

from callbackq.core.models import (
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackStatus,
    RetryPhase,
)
from callbackq.core.validation import header_path

CANARY = "canary7331"

DAY = 24 * 60 * 60 * 10**9

REQUEST: dict[str, Any] = {
    "url": "https://example.com/hook",
    "method": "POST",
    "postdata": {"headers": {"Content-Type": "text/plain"}, "data": "aGVsbG8="},
    "retryphases": [{"retries": 5, "delay": 10_000_000_000}, {"retries": 12, "delay": 300_000_000_000}],
    "applicationid": "application",
    "queueid": "queue",
    "notificationemailaddress": "a@example.com",
    "onexhausted": "hold",
}
STATUS: dict[str, Any] = {
    "id": "an id",
    "request": REQUEST,
    "attempts": [
        {
            "statuscode": 500,
            "response": {"headers": {"Server": "x"}, "data": ""},
            "time": "2016-01-01T00:00:00.5Z",
            "duration": 400_000_000,
            "failure": None,
            "machinename": "machine",
            "late": True,
            "truncated": True,
            "detail": "connection_lost: ECONNRESET",
        }
    ],
    "locks": [
        {
            "acquired": "2016-01-01T00:00:00Z",
            "timeout": "2016-01-01T00:01:00Z",
            "completed": True,
            "machinename": "machine",
            "token": 1,
            "ended": "2016-01-01T00:00:01Z",
        }
    ],
    "success": False,
    "state": "failed",
    "queueid": "queue",
    "sequence": 7,
    "nextattemptat": None,
    "failedreason": "exhausted",
    "blockedby": None,
}


class Malformed(NamedTuple):
    name: str
    type: type
    document: bytes | str
    paths: list[str]


Place = tuple[str | int, ...]


def path_of(place: Place) -> str:
    """``("postdata", "headers", "X")`` as an error writes it: ``postdata.headers['X']``."""
    path = ""
    for above, step in zip((None, *place), place, strict=False):
        if isinstance(step, int) or above == "headers":
            path += header_path(step) if isinstance(step, str) else f"[{step}]"
        else:
            path += f".{step}"
    return path.removeprefix(".")


def with_value(document: dict[str, Any], place: Place, value: object) -> dict[str, Any]:
    changed: Any = deepcopy(document)
    inner = changed
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return changed  # type: ignore[no-any-return]


def without(document: dict[str, Any], place: Place) -> dict[str, Any]:
    changed: Any = deepcopy(document)
    inner = changed
    for step in place[:-1]:
        inner = inner[step]
    del inner[place[-1]]
    return changed  # type: ignore[no-any-return]


NO_TEXT = (None, 5, 5.0, True, [CANARY], {"a": CANARY})
NO_NUMBER = (None, CANARY, "5", True, [5], {}, 5.0, 1e3, -1, 10**30)
NO_BOOL = (None, 0, 1, CANARY, "true", [])
NO_OBJECT = (None, 5, CANARY, True, [CANARY])
NO_LIST = (5, CANARY, True, {"a": CANARY})
NO_LABEL = (
    *NO_TEXT,
    CANARY + "\n",
    CANARY + "\x00",
    CANARY + "\x7f",
    CANARY + "\u2028",
    CANARY + "\ud800",
    CANARY * 26,
)
NO_INSTANT = (
    *(0, True, [], {}, "", CANARY, "2016-01-01", "2016-01-01 00:00:00Z", "2016-01-01T00:00:00"),
    *("2016-01-01t00:00:00z", "2016-1-1T0:0:0Z", "2016-02-30T00:00:00Z", "2016-01-01T24:00:00Z"),
    *("2016-01-01T00:60:00Z", "2016-01-01T00:00:60Z", "2016-01-01T00:00:00.Z", "2016-01-01T00:00:00,5Z"),
    *("2016-01-01T00:00:00.0123456789Z", "2016-01-01T00:00:00+0100", "2016-01-01T00:00:00+24:00"),
    *("2016-01-01T00:00:00+01:60", "2016-01-01T00:00:00Z\n", "２０１６-01-01T00:00:00Z", "0000-01-01T00:00:00Z"),
    *("0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "2016-W01-1T00:00:00Z", "20160101T000000Z"),
)

REQUEST_VALUES: list[tuple[Place, tuple[object, ...]]] = [
    (("url",), NO_TEXT),
    (("url",), ("", " ", CANARY, f"//{CANARY}/", f"/{CANARY}", f"ftp://{CANARY}/", f"file:///{CANARY}")),
    (("url",), (f"javascript:{CANARY}", "http://", f"http:///{CANARY}", f"http://user:{CANARY}@example.com/")),
    (("url",), (f"http://{CANARY}:0/", f"http://{CANARY}:65536/", f"http://{CANARY}:http/", f"http://{CANARY} /")),
    (
        ("url",),
        (f"http://{CANARY}/\r\nHost: x", f"http://{CANARY}/\x00", f"http://a\\@{CANARY}/", f"http://[{CANARY}/"),
    ),
    (
        ("url",),
        (f"http://{CANARY}.ä/", f"http://example.com/{CANARY}ä", f"http://{CANARY}/\ud800", f"http://127.1/{CANARY}"),
    ),
    (("url",), ("http://example.com/" + "a" * 8174, f"https:{CANARY}", f"\thttp://{CANARY}/")),
    (("method",), (*NO_TEXT, "", "get", "POST ", "POST\r\n", "DELETE", CANARY)),
    (("postdata",), NO_OBJECT),
    (("postdata", "headers"), (5, CANARY, True, [CANARY])),
    (("postdata", "headers", "X-A"), (*NO_TEXT, f"{CANARY}\r\nX-B: c", f"{CANARY}\n", f"{CANARY}\x00")),
    (
        ("postdata", "headers", "X-A"),
        (f" {CANARY}", f"{CANARY} ", f"{CANARY}\t", f"{CANARY}ä", f"{CANARY}\ud800", "a" * 8193),
    ),
    (("postdata", "headers", ""), (CANARY,)),
    (("postdata", "headers", "X A"), (CANARY,)),
    (("postdata", "headers", "X-A:"), (CANARY,)),
    (("postdata", "headers", "X\r\nY"), (CANARY,)),
    (("postdata", "headers", "Ä"), (CANARY,)),
    (("postdata", "headers", "X\ud800"), (CANARY,)),
    (("postdata", "headers", "X" * 257), (CANARY,)),
    *(
        (("postdata", "headers", name), (CANARY,))
        for name in (
            *("Host", "hOST", "Content-Length", "Transfer-Encoding", "Connection", "Keep-Alive", "TE", "Trailer"),
            *("Upgrade", "Expect", "Proxy-Authorization", "Proxy-Connection", "Accept-Encoding"),
            *("webhook-id", "Webhook-Signature", "callbackq-token"),
        )
    ),
    (("postdata", "headers", "content-type"), (CANARY,)),
    (("postdata", "headers"), ({f"X-{number}": CANARY for number in range(101)},)),
    (("postdata", "headers"), ({f"X-{number}": "a" * 8192 for number in range(9)},)),
    (("postdata", "data"), (5, True, [CANARY], {}, CANARY, "A", "AA", "AAA", "AAAA=", "AA==\n", " AA==")),
    (("postdata", "data"), ("AA==AA==", "AB==", "AAB=", "AA-_", "====", "ä", "\ud800", "AA=", "A A=")),
    (("retryphases",), (*NO_LIST, [{"retries": 1, "delay": 1}] * 101)),
    (("retryphases",), ([{"retries": 10_000, "delay": DAY}],)),
    (("retryphases", 1), (*NO_OBJECT, [])),
    (("retryphases", 0, "retries"), (*NO_NUMBER, 10_001)),
    (("retryphases", 1, "delay"), (*NO_NUMBER, "10s", 365 * DAY + 1, 2**63)),
    (("applicationid",), NO_LABEL),
    (("queueid",), NO_LABEL),
    (("notificationemailaddress",), NO_TEXT),
    (("notificationemailaddress",), (CANARY, f"{CANARY}@", f"@{CANARY}", f"{CANARY} @example.com", f"{CANARY}@ä.com")),
    (("notificationemailaddress",), (f"{CANARY}@example.com\r\nBcc: b@example.com", f"-{CANARY}@example.com")),
    (("notificationemailaddress",), (f"{CANARY}@example.com,b@example.com", f"A <{CANARY}@example.com>")),
    (("notificationemailaddress",), (f"{CANARY}@-example.com", f"{CANARY}@example.com\x00", "a" * 250 + "@b.de")),
    (("onexhausted",), (*NO_TEXT, "", "Hold", "stop", CANARY)),
]

STATUS_VALUES: list[tuple[Place, tuple[object, ...]]] = [
    (("id",), NO_LABEL),
    (("request",), NO_OBJECT),
    (("request", "url"), (CANARY, 5)),
    (("request", "retryphases", 0, "delay"), (-1,)),
    (("request", "postdata", "headers", "Host"), (CANARY,)),
    (("attempts",), NO_LIST),
    (("attempts", 0), (*NO_OBJECT, [])),
    (("attempts", 0, "statuscode"), (*NO_NUMBER, 99, 1000)),
    (("attempts", 0, "response"), NO_OBJECT),
    (("attempts", 0, "response", "headers", "X-A"), (*NO_TEXT, CANARY + "\ud800")),
    (("attempts", 0, "response", "data"), (5, "AB==", CANARY)),
    (("attempts", 0, "time"), (None, *NO_INSTANT)),
    (("attempts", 0, "duration"), (*NO_NUMBER, 2**63)),
    (("attempts", 0, "failure"), ("", "DNS", CANARY, 5, True, [])),
    (("attempts", 0, "machinename"), NO_LABEL),
    (("attempts", 0, "late"), NO_BOOL),
    (("attempts", 0, "truncated"), NO_BOOL),
    (("attempts", 0, "detail"), (*NO_TEXT, "x" * 121, "a\nb", "\u00e4", CANARY + "\x7f")),
    (("locks",), NO_LIST),
    (("locks", 0), (*NO_OBJECT, [])),
    (("locks", 0, "acquired"), (None, 5, CANARY)),
    (("locks", 0, "timeout"), (None, 5, CANARY)),
    (("locks", 0, "completed"), NO_BOOL),
    (("locks", 0, "machinename"), NO_LABEL),
    (("locks", 0, "token"), (*NO_NUMBER, 2**63)),
    (("locks", 0, "ended"), (5, "", CANARY)),
    (("success",), (*NO_BOOL, True)),
    (("state",), ("", "FAILED", CANARY, 5, None, True, [])),
    (("queueid",), NO_LABEL),
    (("sequence",), (*NO_NUMBER, 2**63)),
    (("nextattemptat",), (5, "soon", CANARY)),
    (("failedreason",), ("", "EXHAUSTED", CANARY, 5, [])),
    (("blockedby",), (5, CANARY + "\n", CANARY * 26, [])),
]


def one_faulty_value() -> Iterator[Malformed]:
    for kind, base, table in ((CallbackRequest, REQUEST, REQUEST_VALUES), (CallbackStatus, STATUS, STATUS_VALUES)):
        for place, values in table:
            for value in values:
                name = f"{kind.__name__} {path_of(place)} = {value!a:.40}"
                yield Malformed(name, kind, json.dumps(with_value(base, place, value)), [path_of(place)])


def one_missing_or_unknown_key() -> Iterator[Malformed]:
    for kind, base, places in (
        (CallbackRequest, REQUEST, [("url",), ("retryphases", 0, "retries"), ("retryphases", 1, "delay")]),
        (
            CallbackStatus,
            STATUS,
            [
                *(("id",), ("request",), ("request", "url"), ("attempts", 0, "statuscode"), ("attempts", 0, "time")),
                *(("attempts", 0, "duration"), ("locks", 0, "acquired"), ("locks", 0, "timeout")),
            ],
        ),
    ):
        for place in places:
            yield Malformed(f"no {path_of(place)}", kind, json.dumps(without(base, place)), [path_of(place)])

    for place in (
        *(
            ("URL",),
            ("postData",),
            ("retry_phases",),
            ("__class__",),
            ("postdata", "Data"),
            ("retryphases", 0, "dealy"),
        ),
        *(("success",), ("id",)),
    ):
        document = json.dumps(with_value(REQUEST, place, CANARY))
        yield Malformed(f"unknown {path_of(place)}", CallbackRequest, document, [path_of(place)])
    for key, shown in (
        ("", "['']"),
        (f"Authorization: Bearer {CANARY}", "['Authorization'...]"),
        ("py/object", "['py'...]"),
        ("a\r\nb", "['a'...]"),
        ("ä\x1b[31m", "[''...]"),
        ("x\ud800", "['x'...]"),
        ("k" * 70, f"['{'k' * 64}'...]"),
    ):
        yield Malformed(f"unknown {key!a}", CallbackRequest, json.dumps(REQUEST | {key: CANARY}), [shown])


RAW: list[tuple[str, type, bytes | str, list[str]]] = [
    ("nothing", CallbackRequest, b"", [""]),
    ("a blank", CallbackRequest, b" ", [""]),
    ("null", CallbackRequest, b"null", [""]),
    ("true", CallbackStatus, b"true", [""]),
    ("a number", CallbackAttempt, b"7331", [""]),
    ("text", CallbackLock, f'"{CANARY}"', [""]),
    ("a list", CallbackData, f'["{CANARY}"]', [""]),
    ("a list of lists", RetryPhase, b"[[]]", [""]),
    ("an empty object", CallbackRequest, b"{}", ["url"]),
    ("an empty phase", RetryPhase, b"{}", ["retries", "delay"]),
    (
        "more than may be read",
        CallbackRequest,
        json.dumps(with_value(REQUEST, ("postdata", "data"), b64encode(b"a" * 2 * 1024 * 1024).decode())),
        [""],
    ),
    ("an open object", CallbackRequest, f'{{"url": "{CANARY}"', [""]),
    ("a stray bracket", CallbackRequest, b"}", [""]),
    ("something after the end", CallbackData, f'{{"data": null}} {CANARY}', [""]),
    ("two documents", CallbackData, b'{"data": null}{"data": null}', [""]),
    ("a trailing comma", CallbackData, b'{"data": null,}', [""]),
    ("single quotes", CallbackData, f"{{'{CANARY}': null}}", [""]),
    ("a comment", CallbackData, f'{{"data": null /* {CANARY} */}}', [""]),
    ("bare keys", CallbackData, b"{data: null}", [""]),
    ("a missing value", CallbackData, b'{"data"}', [""]),
    ("a byte order mark", CallbackData, '\ufeff{"data": null}', [""]),
    ("UTF-16", CallbackData, f'{{"{CANARY}": null}}'.encode("utf-16"), [""]),
    ("UTF-16 without a mark", CallbackData, '{"data": null}'.encode("utf-16-le"), [""]),
    ("UTF-32", CallbackData, '{"data": null}'.encode("utf-32"), [""]),
    ("Latin-1", CallbackData, f'{{"{CANARY}ä": null}}'.encode("latin-1"), [""]),
    ("an overlong character", CallbackData, f'{{"{CANARY}'.encode() + b'\xc0\xaf": null}', [""]),
    ("an encoded surrogate", CallbackData, b'{"\xed\xa0\x80": null}', [""]),
    ("a surrogate in text", CallbackData, '{"\ud800": null}', [""]),
    ("a raw line break in text", CallbackData, f'{{"data": "{CANARY}\n"}}', [""]),
    ("a raw NUL in text", CallbackData, f'{{"data": "{CANARY}\x00"}}', [""]),
    ("an unknown escape", CallbackData, f'{{"data": "{CANARY}\\x41"}}', [""]),
    ("a broken escape", CallbackData, f'{{"data": "{CANARY}\\u12"}}', [""]),
    ("an open string", CallbackData, f'{{"data": "{CANARY}', [""]),
    ("NaN", RetryPhase, b'{"retries": NaN, "delay": 1}', ["retries"]),
    ("Infinity", RetryPhase, b'{"retries": 1, "delay": Infinity}', ["delay"]),
    ("-Infinity", RetryPhase, b'{"retries": -Infinity, "delay": 1}', ["retries"]),
    ("NaN for text", CallbackRequest, b'{"url": NaN}', ["url"]),
    ("a leading zero", RetryPhase, b'{"retries": 01, "delay": 1}', [""]),
    ("a plus", RetryPhase, b'{"retries": +1, "delay": 1}', [""]),
    ("a bare point", RetryPhase, b'{"retries": 1., "delay": 1}', [""]),
    ("a hexadecimal number", RetryPhase, b'{"retries": 0x1, "delay": 1}', [""]),
    ("5,000 digits", RetryPhase, b'{"retries": ' + b"7331" * 1250 + b', "delay": 1}', ["retries"]),
    ("20 digits", RetryPhase, b'{"retries": 1, "delay": 73317331733173317331}', ["delay"]),
    ("minus 5,000 digits", RetryPhase, b'{"retries": 1, "delay": -' + b"7" * 5000 + b"}", ["delay"]),
    ("a large exponent", RetryPhase, b'{"retries": 1, "delay": 1e400}', ["delay"]),
    ("a deep list", CallbackRequest, b"[" * 17 + b"]" * 17, [""]),
    ("deep objects", CallbackRequest, b'{"a":' * 17 + b"1" + b"}" * 17, [""]),
    ("depth behind flat lists", CallbackRequest, b"[" + b"[]," * 20 + b"[" * 17 + b"]" * 18, [""]),
    (
        "depth in an unknown key",
        CallbackRequest,
        b'{"url": "http://a.example/", "x": ' + b"[" * 16 + b"]" * 16 + b"}",
        [""],
    ),
    ("a key twice", CallbackRequest, f'{{"url": "http://a.example/", "url": "http://{CANARY}/"}}', ["url"]),
    ("the same twice", RetryPhase, b'{"retries": 1, "delay": 1, "retries": 1}', ["retries"]),
    ("a key twice, escaped", RetryPhase, b'{"retries": 1, "delay": 1, "\\u0064elay": 1}', ["delay"]),
    ("an unknown key twice", RetryPhase, b'{"retries": 1, "delay": 1, "x": 1, "x": 2}', ["x"]),
    (
        "success twice",
        CallbackStatus,
        b'{"id": "a", "request": {"url": "http://a.example/"}, "success": true, "success": true}',
        ["success"],
    ),
    ("a header twice", CallbackData, f'{{"headers": {{"A": "1", "B": "{CANARY}", "A": "2"}}}}', ["headers['A']"]),
    (
        "a nested key twice",
        CallbackRequest,
        f'{{"url": "http://a.ex/", "postdata": {{"data": 5, "headers": {{"X": "{CANARY}", "X": "", "Host": ""}}}}}}',
        ["postdata.data", "postdata.headers['X']", "postdata.headers['Host']"],
    ),
    (
        "success without state's agreement",
        CallbackStatus,
        b'{"id": "a", "request": {"url": "http://a.example/"}, "success": false, "state": "succeeded"}',
        ["success"],
    ),
    (
        "faults of type, rule and structure, in the document's order",
        CallbackRequest,
        f"""{{
            "queueid": 5,
            "{CANARY[:-4]}": 1,
            "retryphases": [{{"retries": 1, "delay": 1}}, 5, {{"delay": -1}}],
            "postdata": {{"data": "AB==", "headers": {{"Host": "{CANARY}", "X-A": 5}}}},
            "method": "{CANARY}",
            "applicationid": "{CANARY}\\n"
        }}""",
        [
            "queueid",
            CANARY[:-4],
            "retryphases[1]",
            "retryphases[2].delay",
            "retryphases[2].retries",
            "postdata.data",
            "postdata.headers['Host']",
            "postdata.headers['X-A']",
            "method",
            "applicationid",
            "url",
        ],
    ),
    (
        "a contradiction among other faults",
        CallbackStatus,
        b'{"success": true, "state": "failed", "request": {"url": 5}, "sequence": -1}',
        ["request.url", "sequence", "id", "success"],
    ),
]

MALFORMED = [*one_faulty_value(), *one_missing_or_unknown_key(), *(Malformed(*row) for row in RAW)]


def _repeated(before: str, item: str, after: str, size: int) -> str:
    return before + ",".join([item] * ((size - len(before + after)) // (len(item) + 1))) + after


def expensive_documents(size: int) -> dict[str, tuple[type, str]]:
    """Documents of about *size* bytes that are meant to cost as much as possible."""
    start = '{"id": "a", "request": {"url": "http://a.example/"}, '
    distinct = ",".join(f'"{number:07}":1' for number in range(size // 13))
    return {
        "open lists": (CallbackRequest, "[" * size),
        "open objects": (CallbackRequest, '{"a":' * (size // 5)),
        "short lists": (CallbackRequest, _repeated("[", "[]", "]", size)),
        "digits": (RetryPhase, '{"delay": 1, "retries": ' + "7" * (size - 30) + "}"),
        "decimals": (RetryPhase, '{"delay": 1, "retries": 0.' + "7" * (size - 30) + "}"),
        "backslashes": (RetryPhase, '"' + "\\" * size),
        "quotes": (RetryPhase, '"' * size),
        "one key": (CallbackRequest, _repeated("{", '"a":1', "}", size)),
        "a key of many twice": (CallbackRequest, "{" + distinct + ',"0000000":1}'),
        "unknown keys": (CallbackRequest, "{" + distinct + "}"),
        "request headers": (CallbackRequest, '{"postdata": {"headers": {' + distinct + "}}}"),
        "response headers": (CallbackData, '{"headers": {' + distinct + "}}"),
        "phases": (CallbackRequest, _repeated('{"retryphases": [', '{"retries":1,"delay":1}', "]}", size)),
        "no attempts": (CallbackStatus, _repeated(start + '"attempts": [', "5", "]}", size)),
        "locks and a fault": (
            CallbackStatus,
            _repeated(
                start + '"locks": [',
                '{"acquired":"0001-01-01T00:00:00Z","timeout":"0001-01-01T00:00:00Z"}',
                ", 5]}",
                size,
            ),
        ),
        "a long URL": (CallbackRequest, '{"url": "http://' + "a." * (size // 2 - 20) + '"}'),
        "a long address": (CallbackRequest, '{"notificationemailaddress": "' + "a." * (size // 2 - 20) + '"}'),
        "a long header": (CallbackRequest, '{"postdata": {"headers": {"a": "b' + " " * (size - 60) + '"}}}'),
        "long base64": (CallbackData, '{"data": "' + "A" * (size // 4 * 4 - 21) + '"}'),
        "escapes": (CallbackStatus, '{"id": "' + "\\ud800" * (size // 6 - 4) + '"}'),
    }
