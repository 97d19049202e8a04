"""Models as JSON and back."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbackq.codec import DEFAULT_LIMIT_BYTES, SEED_KEYS, dumps, loads
from callbackq.core import validation as v
from callbackq.core.limits import RequestLimits
from callbackq.core.models import (
    NEVER,
    AttemptFailure,
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
    RetryPhase,
)
from callbackq.errors import InvalidRequestError
from core.malformed_documents import CANARY, MALFORMED, REQUEST, STATUS, expensive_documents, with_value
from support import generated
from support.work import Work, work_of

# The document that the Go package's own tests expect.
STATUS_OF_2016 = (
    b'{"id":"id_value","request":{"url":"http://example.com/callback","method":"GET","postdata":{"headers":'
    b'{"x-header-one":"x-header-one-value"},"data":null},"retryphases":[{"retries":1,"delay":300000000000}],'
    b'"applicationid":"test","queueid":"queueid value","notificationemailaddress":"a@example.com"},'
    b'"attempts":[{"statuscode":404,"response":{"headers":null,"data":null},"time":"2016-01-01T00:00:00Z",'
    b'"duration":400000000}],"locks":[{"acquired":"0001-01-01T00:00:00Z","timeout":"0001-01-01T00:00:00Z",'
    b'"completed":false,"machinename":""}],"success":true}'
)

DOCUMENTS_OF_2016 = [
    (CallbackStatus, STATUS_OF_2016),
    (
        CallbackRequest,
        (
            b'{"url":"http://example.com","method":"POST","postdata":{"headers":null,"data":null},"retryphases":null,'
            b'"applicationid":"","queueid":"","notificationemailaddress":""}'
        ),
    ),
    (
        CallbackRequest,
        (
            b'{"url":"https://example.com/?a=1\\u0026b=\\u003c2\\u003e","method":"PUT","postdata":{"headers":'
            b'{"A":"\\u003c\\u003e\\u0026\\"\\\\/","a-1":"","b":"~"},"data":""},'
            b'"retryphases":[{"retries":5,"delay":10000000000},{"retries":12,"delay":300000000000},{"retries":0,"delay":0}],'
            b'"applicationid":"\xc3\xa4 \xf0\x9f\x8e\x88","queueid":"\xe6\xbc\xa2","notificationemailaddress":""}'
        ),
    ),
    (
        CallbackStatus,
        (
            b'{"id":"","request":{"url":"http://example.com","method":"GET","postdata":{"headers":null,"data":"AAECAw=="},'
            b'"retryphases":null,"applicationid":"","queueid":"","notificationemailaddress":""},"attempts":[],"locks":[],'
            b'"success":false}'
        ),
    ),
    (
        CallbackStatus,
        (
            b'{"id":"7","request":{"url":"http://example.com","method":"GET","postdata":{"headers":null,"data":null},'
            b'"retryphases":null,"applicationid":"","queueid":"q","notificationemailaddress":""},"attempts":['
            b'{"statuscode":0,"response":{"headers":null,"data":null},"time":"2016-05-06T07:08:09.12Z","duration":1000},'
            b'{"statuscode":200,"response":{"headers":{"Date":"\\u0008\\u000c\\n\\r\\t\\u0000\\u001f\x7f\\u2028\\u2029"},'
            b'"data":"T0s="},"time":"2016-05-06T07:08:10.000001Z","duration":0}],"locks":['
            b'{"acquired":"2016-05-06T07:08:09Z","timeout":"2016-05-06T08:08:09Z","completed":true,"machinename":"m"}],'
            b'"success":true}'
        ),
    ),
]


def faults_of(document: bytes | str, kind: type = CallbackRequest, **options: int) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequestError) as caught:
        loads(document, kind, **options)
    return caught.value.errors


# The documents of 2016


@pytest.mark.parametrize(("kind", "document"), DOCUMENTS_OF_2016)
def test_a_document_of_2016_comes_back_byte_for_byte(kind: type, document: bytes) -> None:
    model = loads(document, kind)

    assert dumps(model) == document
    assert dumps(model, seed=True) == document


def test_the_status_of_2016_is_read_as_what_it_said() -> None:
    status = loads(STATUS_OF_2016, CallbackStatus)

    assert status == CallbackStatus(
        id="id_value",
        request=CallbackRequest(
            url="http://example.com/callback",
            method="GET",
            post_data=CallbackData(headers={"x-header-one": "x-header-one-value"}),
            retry_phases=[RetryPhase(retries=1, delay=timedelta(minutes=5))],
            application_id="test",
            queue_id="queueid value",
            notification_email_address="a@example.com",
        ),
        attempts=[
            CallbackAttempt(
                status_code=404,
                time=datetime(2016, 1, 1, tzinfo=UTC),
                duration=timedelta(milliseconds=400),
            )
        ],
        locks=[CallbackLock(acquired=NEVER, timeout=NEVER)],
        state=CallbackState.SUCCEEDED,
        queue_id="queueid value",
    )


@generated.FEW
@given(generated.models)
def test_a_document_with_the_seed_keys_alone_always_comes_back_byte_for_byte(model: Any) -> None:
    document = dumps(model, seed=True)

    assert dumps(loads(document, type(model)), seed=True) == document
    assert list(json.loads(document)) == list(SEED_KEYS[type(model)])


# Round trips


@generated.FEW
@given(generated.models)
def test_what_was_written_is_always_read_back_equal_and_written_the_same(model: Any) -> None:
    document = dumps(model)

    read = loads(document, type(model))

    assert read == model
    assert dumps(read) == document
    assert loads(document.decode(), type(model)) == model


@generated.FEW
@given(generated.models)
def test_the_order_of_keys_never_matters(model: Any) -> None:
    def backwards(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: backwards(inner) for key, inner in reversed(value.items())}
        return [backwards(inner) for inner in value] if isinstance(value, list) else value

    document = json.dumps(backwards(json.loads(dumps(model))))

    assert loads(document, type(model)) == model


def largest_request(body_bytes: int) -> CallbackRequest:
    return CallbackRequest(
        url="http://example.com/" + "a" * (8192 - 19),
        post_data=CallbackData(headers={f"X-{n}": "<" * 8000 for n in range(8)}, data=bytes(body_bytes)),
        retry_phases=[RetryPhase(retries=1, delay=timedelta(microseconds=n)) for n in range(v.MAX_PHASES)],
    )


def test_the_largest_request_that_a_store_ordinarily_accepts_can_be_written_and_read() -> None:
    request = largest_request(RequestLimits().max_body_bytes)

    document = dumps(request)

    assert len(document) <= DEFAULT_LIMIT_BYTES
    assert loads(document, CallbackRequest) == request


def test_the_largest_request_of_all_can_be_read_by_who_raises_the_limit() -> None:
    request = largest_request(v.MAX_BODY_BYTES)

    document = dumps(request)

    assert faults_of(document, CallbackRequest) == [("", f"must not be longer than {DEFAULT_LIMIT_BYTES} bytes")]
    assert loads(document, CallbackRequest, limit_bytes=len(document)) == request


def test_no_raised_limit_lets_a_body_beyond_the_ceiling_in() -> None:
    body = "AAAA" * (v.MAX_BODY_BYTES // 3) + "AAAA"
    document = json.dumps({"url": "http://example.com", "postdata": {"data": body}})

    assert faults_of(document, CallbackRequest, limit_bytes=len(document)) == [
        ("postdata.data", f"must not be longer than {v.MAX_BODY_BYTES} bytes")
    ]


# What is newer than 2016


def test_new_keys_come_after_the_old_ones_and_only_when_they_say_something() -> None:
    request = CallbackRequest(url="http://example.com", queue_id="q", on_exhausted="hold")
    attempt = CallbackAttempt(
        status_code=0,
        time=NEVER,
        duration=timedelta(0),
        failure=AttemptFailure.CONNECTION_LOST,
        machine_name="m",
        late=True,
        truncated=True,
        detail="ECONNRESET",
    )
    lock = CallbackLock(acquired=NEVER, timeout=NEVER, token=7, ended=datetime(2026, 1, 2, 3, 4, 5, 670_000, UTC))
    status = CallbackStatus(
        id="a",
        request=request,
        state=CallbackState.FAILED,
        queue_id="other",
        sequence=3,
        next_attempt_at=NEVER,
        failed_reason=FailedReason.EXHAUSTED,
        blocked_by="b",
    )

    assert dumps(request).endswith(b'"notificationemailaddress":"","onexhausted":"hold"}')
    assert dumps(attempt).endswith(
        b'"duration":0,"failure":"connection_lost","machinename":"m","late":true,"truncated":true,'
        b'"detail":"ECONNRESET"}'
    )
    assert dumps(lock).endswith(b'"machinename":"","token":7,"ended":"2026-01-02T03:04:05.67Z"}')
    assert dumps(status).endswith(
        b'"success":false,"state":"failed","queueid":"other","sequence":3,"nextattemptat":"0001-01-01T00:00:00Z",'
        b'"failedreason":"exhausted","blockedby":"b"}'
    )


def test_seed_leaves_out_every_new_key() -> None:
    status = loads(json.dumps(STATUS), CallbackStatus)

    document = json.loads(dumps(status, seed=True))

    assert tuple(document) == SEED_KEYS[CallbackStatus]
    assert tuple(document["request"]) == SEED_KEYS[CallbackRequest]
    assert tuple(document["request"]["postdata"]) == SEED_KEYS[CallbackData]
    assert [tuple(phase) for phase in document["request"]["retryphases"]] == [SEED_KEYS[RetryPhase]] * 2
    assert [tuple(attempt) for attempt in document["attempts"]] == [SEED_KEYS[CallbackAttempt]]
    assert [tuple(lock) for lock in document["locks"]] == [SEED_KEYS[CallbackLock]]


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ({"success": True}, CallbackState.SUCCEEDED),
        ({"success": False}, CallbackState.WAITING),
        ({}, CallbackState.WAITING),
        ({"state": "succeeded"}, CallbackState.SUCCEEDED),
        ({"state": "cancelled"}, CallbackState.CANCELLED),
        ({"state": "succeeded", "success": True}, CallbackState.SUCCEEDED),
        ({"state": "locked", "success": False}, CallbackState.LOCKED),
    ],
)
def test_success_says_the_state_where_nothing_else_does(said: dict[str, Any], state: CallbackState) -> None:
    document = json.dumps({"id": "a", "request": {"url": "http://example.com"}, **said})

    assert loads(document, CallbackStatus).state is state


@pytest.mark.parametrize(
    ("state", "written"),
    [
        (CallbackState.SUCCEEDED, '"success":true}'),
        (CallbackState.WAITING, '"success":false}'),
        (CallbackState.LOCKED, '"success":false,"state":"locked"}'),
        (CallbackState.FAILED, '"success":false,"state":"failed"}'),
        (CallbackState.CANCELLED, '"success":false,"state":"cancelled"}'),
    ],
)
def test_the_state_is_written_where_success_does_not_say_it(state: CallbackState, written: str) -> None:
    status = CallbackStatus(id="a", request=CallbackRequest(url="http://example.com"), state=state)

    assert dumps(status).decode().endswith(f'"locks":[],{written}')


@pytest.mark.parametrize(("queue_id", "written"), [("q", b""), ("", b',"queueid":""'), ("r", b',"queueid":"r"')])
def test_a_status_has_its_requests_queue_unless_it_says_otherwise(queue_id: str, written: bytes) -> None:
    status = CallbackStatus(id="a", request=CallbackRequest(url="http://a.example", queue_id="q"), queue_id=queue_id)

    assert dumps(status).endswith(b'"success":false' + written + b"}")
    assert loads(dumps(status), CallbackStatus) == status


# Values


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain", b"plain"),
        ('"\\/', rb"\"\\/"),
        ("<a href='b'>&amp;</a>", rb"\u003ca href='b'\u003e\u0026amp;\u003c/a\u003e"),
        ("\u2028\u2029", rb"\u2028\u2029"),
        ("\n\r\t", rb"\n\r\t"),
        ("\b", rb"\u0008"),
        ("\f", rb"\u000c"),
        ("\b\f", rb"\u0008\u000c"),
        ("\\b\\f\b", rb"\\b\\f\u0008"),
        ("\\\b\\\\f", rb"\\\u0008\\\\f"),
        ("\x00\x01\x1f\x7f", b"\\u0000\\u0001\\u001f\x7f"),
        ("ä漢🎈\ufeff\u2027", "ä漢🎈\ufeff\u2027".encode()),
    ],
)
def test_text_is_escaped_as_go_escapes_it(text: str, written: bytes) -> None:
    answer = CallbackData(headers={"A": text})

    document = dumps(answer)

    assert document == b'{"headers":{"A":"' + written + b'"},"data":null}'
    assert loads(document, CallbackData) == answer


def test_header_names_are_sorted_by_their_bytes() -> None:
    names = ["b", "B", "a-b", "a", "ä", "z", "\U0001f388", "\ufb00", "A1", "A10"]

    document = dumps(CallbackData(headers=dict.fromkeys(names, "")))

    assert list(json.loads(document)["headers"]) == sorted(names, key=str.encode)


@pytest.mark.parametrize(
    ("body", "written"),
    [(None, "null"), (b"", '""'), (b"\x00", '"AA=="'), (b"\xfb\xff", '"+/8="'), (b"abc", '"YWJj"')],
)
def test_a_body_is_standard_base64_and_none_is_not_empty(body: bytes | None, written: str) -> None:
    document = f'{{"headers":null,"data":{written}}}'.encode()

    assert dumps(CallbackData(data=body)) == document
    assert loads(document, CallbackData).data == body


@pytest.mark.parametrize(
    ("nanoseconds", "microseconds"),
    [
        (0, 0),
        (1, 1),
        (999, 1),
        (1000, 1),
        (1001, 2),
        (300_000_000_000, 300_000_000),
        (9_007_199_254_740_993_001, 9_007_199_254_740_994),
        (2**63 - 1000, 9_223_372_036_854_775),
    ],
)
def test_a_duration_is_read_exactly_and_rounded_up_to_a_microsecond(nanoseconds: int, microseconds: int) -> None:
    document = f'{{"statuscode": 0, "time": "2016-01-01T00:00:00Z", "duration": {nanoseconds}}}'

    assert loads(document, CallbackAttempt).duration == timedelta(microseconds=microseconds)


def test_a_duration_longer_than_go_can_count_is_refused() -> None:
    document = f'{{"statuscode": 0, "time": "2016-01-01T00:00:00Z", "duration": {2**63 - 1}}}'

    assert [path for path, _ in faults_of(document, CallbackAttempt)] == ["duration"]


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2016-01-01T00:00:00Z", datetime(2016, 1, 1, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", NEVER),
        ("9999-12-31T23:59:59.999999Z", datetime.max.replace(tzinfo=UTC)),
        ("2016-02-29T12:34:56.1Z", datetime(2016, 2, 29, 12, 34, 56, 100_000, UTC)),
        ("2016-02-29T12:34:56.000001Z", datetime(2016, 2, 29, 12, 34, 56, 1, UTC)),
    ],
)
def test_an_instant_is_written_as_go_prints_it(text: str, instant: datetime) -> None:
    lock = CallbackLock(acquired=instant, timeout=instant)

    document = dumps(lock)

    assert json.loads(document)["acquired"] == text
    assert loads(document, CallbackLock) == lock


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("2016-01-01T00:00:00.500Z", "2016-01-01T00:00:00.5Z"),
        ("2016-01-01T00:00:00.000000Z", "2016-01-01T00:00:00Z"),
        ("2016-01-01T00:00:00.123456789Z", "2016-01-01T00:00:00.123456Z"),
        ("2016-01-01T00:00:00.000000999Z", "2016-01-01T00:00:00Z"),
        ("2016-01-01T01:30:00+01:30", "2016-01-01T00:00:00Z"),
        ("2015-12-31T16:00:00-08:00", "2016-01-01T00:00:00Z"),
        ("2016-01-01T00:00:00-00:00", "2016-01-01T00:00:00Z"),
        ("9999-12-31T23:59:59.999999999Z", "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_an_instant_is_read_in_any_offset_and_cut_to_microseconds(text: str, written: str) -> None:
    lock = loads(f'{{"acquired": "{text}", "timeout": "{text}"}}', CallbackLock)

    assert json.loads(dumps(lock))["acquired"] == written


def test_an_instant_of_another_class_is_written_like_any_other() -> None:
    class Stamp(datetime):
        def isoformat(self, *_: Any, **__: Any) -> str:
            return CANARY

    stamp = Stamp(2016, 1, 1, tzinfo=UTC)

    assert json.loads(dumps(CallbackLock(acquired=stamp, timeout=stamp)))["acquired"] == "2016-01-01T00:00:00Z"


@pytest.mark.parametrize("document", ['{"headers": {}}', '{"headers": null}', "{}", ' \r\n{ "data" :\tnull }\n'])
def test_an_empty_header_map_may_be_written_in_every_way(document: str) -> None:
    assert loads(document, CallbackData) == CallbackData()


def test_empty_lists_may_be_null_or_missing_or_empty() -> None:
    lists = ("attempts", "locks")
    start = {"id": "a", "request": {"url": "http://example.com"}}

    read = [
        loads(json.dumps(start | more | {"request": start["request"] | phases}), CallbackStatus)  # type: ignore[operator]
        for more, phases in [
            ({}, {}),
            (dict.fromkeys(lists, None), {"retryphases": None}),
            ({key: [] for key in lists}, {"retryphases": []}),
        ]
    ]

    assert read == [CallbackStatus(id="a", request=CallbackRequest(url="http://example.com"))] * 3


def test_only_what_has_no_default_must_be_given() -> None:
    for kind, minimal in (
        (CallbackRequest, {"url": "http://example.com"}),
        (CallbackData, {}),
        (RetryPhase, {"retries": 1, "delay": 0}),
        (CallbackAttempt, {"statuscode": 200, "time": "2016-01-01T00:00:00Z", "duration": 0}),
        (CallbackLock, {"acquired": "2016-01-01T00:00:00Z", "timeout": "2016-01-01T00:00:00Z"}),
        (CallbackStatus, {"id": "a", "request": {"url": "http://example.com"}}),
    ):
        assert isinstance(loads(json.dumps(minimal), kind), kind)
        for key in minimal:
            rest = {other: value for other, value in minimal.items() if other != key}
            assert faults_of(json.dumps(rest), kind) == [(key, "must be given")]


# Refusals


def test_every_malformed_document_is_refused_at_the_right_places_and_never_quoted() -> None:
    wrong = {}
    for name, kind, document, paths in MALFORMED:
        try:
            wrong[name] = repr(loads(document, kind))
        except InvalidRequestError as error:
            text = f"{error} {error!r} {error.errors}"
            if [path for path, _ in error.errors] != paths:
                wrong[name] = f"expected {paths}, got {error.errors}"
            elif CANARY in text or "7331" in text or not text.isprintable():
                wrong[name] = f"quotes the document: {text}"
            elif error.__context__ or error.__cause__:
                wrong[name] = "holds another error, which may hold the document"

    assert wrong == {}


def test_the_table_is_as_large_as_it_is_meant_to_be() -> None:
    assert len(MALFORMED) >= 400
    assert len({malformed.name for malformed in MALFORMED}) > len(MALFORMED) * 0.98


def test_the_documents_from_which_malformed_ones_are_made_are_sound() -> None:
    assert loads(json.dumps(REQUEST), CallbackRequest).on_exhausted == "hold"
    assert loads(json.dumps(STATUS), CallbackStatus).failed_reason is FailedReason.EXHAUSTED


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"[" * 17, "must not be nested deeper than 16 levels"),
        (b"[" + b"[]," * 20 + b"[" * 15, "must be JSON, which it stops being at line 1, column 77"),
        (b"[" * 16, "must be JSON, which it stops being at line 1, column 17"),
        (b'{"data":\n  nul}', "must be JSON, which it stops being at line 2, column 3"),
        (b"\xff", "must be UTF-8"),
        ("\ud800", "must be UTF-8"),
        ("\ufeff{}", "must not begin with a byte order mark"),
        (None, "must be JSON as bytes or str"),
        (bytearray(b"{}"), "must be JSON as bytes or str"),
        (memoryview(b"{}"), "must be JSON as bytes or str"),
        ({}, "must be JSON as bytes or str"),
    ],
)
def test_what_is_no_json_is_told_what_would_be(document: Any, reason: str) -> None:
    assert faults_of(document) == [("", reason)]


@pytest.mark.parametrize("document", ['{"data": "ä🎈"}', '{"data": "ä🎈"}'.encode()])
def test_the_limit_counts_bytes_and_is_inclusive(document: bytes | str) -> None:
    size = len(document.encode() if isinstance(document, str) else document)

    assert faults_of(document, CallbackData, limit_bytes=size - 1) == [
        ("", f"must not be longer than {size - 1} bytes")
    ]
    assert [path for path, _ in faults_of(document, CallbackData, limit_bytes=size)] == ["data"]


def test_a_key_or_header_given_twice_is_told_so() -> None:
    faults = faults_of('{"x": 1, "x": 1, "url": 1, "url": 1, "postdata": {"headers": {"A": "", "A": "", "Host": 1}}}')

    assert [(path, reason.split(";")[0]) for path, reason in faults] == [
        ("x", "is not known here"),
        ("url", "must not be given twice"),
        ("postdata.headers['A']", "must not be given twice"),
        ("postdata.headers['Host']", "must not be set: callbackq or the connection controls this header"),
        ("postdata.headers['Host']", "must be a string"),
    ]


def test_brackets_in_text_are_no_depth() -> None:
    headers = {"a": '[{"' * 100, "b": "\\" * 3, "c": '\\"' + "[" * 50}

    assert loads(json.dumps({"headers": headers}), CallbackData).headers == headers


def test_no_error_lists_more_faults_than_anybody_reads() -> None:
    documents = {
        CallbackStatus: with_value(STATUS, ("attempts",), [5] * 1000),
        CallbackRequest: REQUEST | dict.fromkeys(map(str, range(1000)), None),
        CallbackData: {"headers": dict.fromkeys(map(str, range(1000)), 5)},
    }

    for kind, document in documents.items():
        faults = faults_of(json.dumps(document), kind)

        assert len(faults) == v.MAX_FAULTS + 1
        assert faults[-1] == ("", "there are more faults than are listed here")
        assert "" not in [path for path, _ in faults[:-1]]


# What reading costs, counted: with four times the text, four times the work. Sixteen times would be quadratic.

SIZE = DEFAULT_LIMIT_BYTES // 256
MOST_GROWTH = 5.0


@pytest.fixture
def strict_int() -> Iterator[None]:
    """Have int() refuse long numbers, as no host can forbid: within it, nothing can be counted."""
    usual = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(sys.int_info.str_digits_check_threshold)
    yield
    sys.set_int_max_str_digits(usual)


def growth(read: Callable[[str], object], small: str, large: str) -> float:
    return work_of(lambda: read(large)).steps / work_of(lambda: read(small)).steps


def may_go_back(work: Work) -> set[str]:
    """The patterns that texts of any length are searched with, less those that are but one class of characters."""
    longer = {pattern for pattern, length in work.longest_searched.items() if length > v.MAX_HEADER_VALUE + 100}
    return {pattern for pattern in longer if not re.fullmatch(r"\[[^]]+\][*+]?", pattern)}


@pytest.mark.parametrize("name", expensive_documents(100))
def test_no_document_costs_more_than_in_proportion_to_its_length(name: str, strict_int: None) -> None:
    kind, small = expensive_documents(SIZE)[name]
    _, large = expensive_documents(4 * SIZE)[name]

    def read(document: str) -> None:
        faults_of(document, kind)

    assert growth(read, small, large) < MOST_GROWTH
    # It finds the strings of a document. What it has taken it never gives back: its repetitions are possessive.
    assert may_go_back(work_of(lambda: read(large))) <= {r'"(?:[^"\\]++|\\.)*+"?'}


def test_a_reader_that_is_quadratic_would_be_caught(strict_int: None) -> None:
    def slice_by_slice(text: str) -> None:
        while text:
            text = text[1:]

    def each_with_all_before(text: str) -> None:
        seen: list[str] = []
        for word in text.split():
            for other in seen:
                if other == word:
                    break
            else:
                seen += [word]

    def error_by_error(text: str) -> None:
        for place in range(len(text)):
            with suppress(ValueError):
                text.index("?", place)

    def going_back(text: str) -> None:
        re.compile("[0-9 ]+?x").search(text[:100])  # all of it would take too long, of course

    small, large = (" ".join(map(str, range(size // 5))) for size in (SIZE // 32, SIZE // 8))

    assert growth(slice_by_slice, small, large) > 2 * MOST_GROWTH
    assert growth(each_with_all_before, small, large) > 2 * MOST_GROWTH
    assert growth(error_by_error, small, large) > 2 * MOST_GROWTH
    assert may_go_back(work_of(lambda: going_back("7" * 2 * SIZE))) == {"[0-9 ]+?x"}
    with pytest.raises(ValueError, match="Exceeds the limit"):
        int("7" * SIZE)


def test_a_reader_that_is_linear_passes() -> None:
    def length_of(word: str) -> int:
        return len(word)

    def line_by_line(text: str) -> list[int]:
        # Not in a comprehension: from Python 3.12 on it has no frame of its own, and the whole text in its sight.
        return list(map(length_of, text.split()))

    small, large = (" ".join(map(str, range(size // 5))) for size in (SIZE, 4 * SIZE))

    assert growth(line_by_line, small, large) < MOST_GROWTH


def test_only_models_are_written_and_read() -> None:
    class Request(CallbackRequest):
        pass

    for write in (None, 5, {}, CallbackState.WAITING, Request(url="http://example.com"), CallbackRequest):
        with pytest.raises(InvalidRequestError, match="model: must be one of CallbackData, RetryPhase"):
            dumps(write)  # type: ignore[arg-type]
    for read in (None, dict, CallbackState, Request):
        with pytest.raises(InvalidRequestError, match="type: must be one of CallbackData, RetryPhase"):
            loads(b"{}", read)  # type: ignore[type-var]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("2016-01-01T00:00:00Z"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from([*REQUEST, *STATUS]), inner, max_size=4)
    ),
    max_leaves=8,
)


@generated.FEW
@given(st.binary(max_size=50), st.sampled_from(list(SEED_KEYS)))
def test_bytes_are_never_anything_but_read_or_refused(data: bytes, kind: type) -> None:
    with suppress(InvalidRequestError):
        loads(data, kind)


@generated.FEW
@given(st.data(), json_values)
def test_json_in_any_place_is_never_anything_but_read_or_refused(data: st.DataObject, value: object) -> None:
    place: list[str | int] = []
    inner: Any = STATUS
    while isinstance(inner, (dict, list)) and inner and (not place or data.draw(st.booleans())):
        step = data.draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
        place.append(step)
        inner = inner[step]

    with suppress(InvalidRequestError):
        status = loads(json.dumps(with_value(STATUS, tuple(place), value)), CallbackStatus)
        assert loads(dumps(status), CallbackStatus) == status


def test_many_threads_may_read_and_write_at_once() -> None:
    status = loads(json.dumps(STATUS), CallbackStatus)
    document = dumps(status)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(30):
            if loads(document, CallbackStatus) != status or dumps(status) != document:
                wrong.append("differs")
            if len(faults_of('{"a": 1, "a": 2}')) != 2:
                wrong.append("faults differ")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    finally:
        sys.setswitchinterval(interval)

    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)
