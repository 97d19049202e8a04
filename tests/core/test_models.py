"""Models: values that are right or refused, that nobody can change, and that show no secrets."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict, UserDict
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from enum import Enum, IntEnum
from http import HTTPMethod, HTTPStatus
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from urllib3 import HTTPHeaderDict

from callbackq.core import validation as v
from callbackq.core.models import (
    CHECKS,
    NEVER,
    AttemptFailure,
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
    Headers,
    RetryPhase,
)
from callbackq.core.url import Target
from callbackq.errors import InvalidRequestError
from support import generated

CANARY = "canary7331"

NOW = datetime(2026, 1, 1, tzinfo=UTC)

SOUND: dict[type, dict[str, Any]] = {
    CallbackData: {},
    RetryPhase: {"retries": 1, "delay": timedelta(seconds=1)},
    CallbackRequest: {"url": "http://example.com"},
    CallbackAttempt: {"status_code": 200, "time": NOW, "duration": timedelta(seconds=1)},
    CallbackLock: {"acquired": NOW, "timeout": NOW},
    CallbackStatus: {"id": "a", "request": CallbackRequest(url="http://example.com")},
}


class Word(str, Enum):  # noqa: UP042 - of a StrEnum, the text is the value
    POST = "POST"
    HOLD = "hold"
    LABEL = "label"


class Loud(str):
    """Text of a template engine, say."""

    def __str__(self) -> str:
        return CANARY

    def __format__(self, _: str) -> str:
        return CANARY

    def __eq__(self, _: object) -> bool:
        raise RuntimeError(CANARY)

    __hash__ = str.__hash__


class Bytes(bytes):
    pass


class Number(IntEnum):
    FIVE = 5


class Stamp(datetime):
    pass


class Span(timedelta):
    pass


class Unfair:
    """Equal to everything, as true as false, and never to be iterated."""

    def __eq__(self, _: object) -> bool:
        raise RuntimeError(CANARY)

    def __bool__(self) -> bool:
        raise RuntimeError(CANARY)

    def __iter__(self) -> Any:
        raise RuntimeError(CANARY)

    def __repr__(self) -> str:
        raise RuntimeError(CANARY)

    __hash__ = None  # type: ignore[assignment]


class BrokenZone(tzinfo):
    def utcoffset(self, _: object) -> Any:
        raise RuntimeError(CANARY)


def faults_with(kind: type, changes: dict[str, object]) -> list[tuple[str, str]]:
    try:
        kind(**(SOUND[kind] | changes))
    except InvalidRequestError as error:
        return error.errors
    return []


def faults_of(kind: type, **changes: object) -> list[tuple[str, str]]:
    faults = faults_with(kind, changes)
    assert faults
    assert CANARY not in str(faults)
    return faults


# Wrong types

STRANGE: list[object] = [
    *(5, -1, 5.5, True, float("nan"), complex(1, 1), CANARY, b"canary7331", bytearray(b"canary7331")),
    *(memoryview(b"canary7331"), None, object(), object, len, [CANARY], (CANARY,), {CANARY}, {CANARY: CANARY}),
    *([[]], {1: 1}, iter([CANARY]), (item for item in [CANARY]), range(3), Unfair(), Word.LABEL, Number.FIVE),
    *(CallbackState.WAITING, CallbackState, NOW, NOW.replace(tzinfo=None), timedelta(1), timedelta(-1)),
    *(datetime(2026, 1, 1, tzinfo=BrokenZone()), CallbackData(), RetryPhase(retries=1, delay=timedelta(1))),
    *(CallbackRequest(url="http://example.com"), Headers(), 10**400, "\ud800", "\x00"),
]

RIGHT_TYPES: dict[tuple[type, str], tuple[type, ...]] = {
    (CallbackData, "headers"): (dict,),
    (CallbackData, "data"): (bytes, type(None)),
    (RetryPhase, "retries"): (int,),
    (RetryPhase, "delay"): (timedelta,),
    (CallbackRequest, "post_data"): (CallbackData,),
    (CallbackRequest, "retry_phases"): (tuple,),
    (CallbackAttempt, "status_code"): (int,),
    (CallbackAttempt, "response"): (CallbackData,),
    (CallbackAttempt, "time"): (datetime,),
    (CallbackAttempt, "duration"): (timedelta,),
    (CallbackAttempt, "failure"): (AttemptFailure, type(None)),
    (CallbackAttempt, "late"): (bool,),
    (CallbackAttempt, "truncated"): (bool,),
    (CallbackLock, "acquired"): (datetime,),
    (CallbackLock, "timeout"): (datetime,),
    (CallbackLock, "completed"): (bool,),
    (CallbackLock, "token"): (int,),
    (CallbackLock, "ended"): (datetime, type(None)),
    (CallbackStatus, "request"): (CallbackRequest,),
    (CallbackStatus, "attempts"): (tuple,),
    (CallbackStatus, "locks"): (tuple,),
    (CallbackStatus, "state"): (CallbackState,),
    (CallbackStatus, "sequence"): (int,),
    (CallbackStatus, "next_attempt_at"): (datetime, type(None)),
    (CallbackStatus, "failed_reason"): (FailedReason, type(None)),
    (CallbackStatus, "blocked_by"): (str, type(None)),
}

FIELDS = [(kind, name) for kind, checks in CHECKS.items() for name in checks]


def test_every_field_of_every_model_has_a_check() -> None:
    assert {kind: list(checks) for kind, checks in CHECKS.items()} == {
        kind: [field.name for field in attrs.fields(kind)] for kind in SOUND
    }


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_value_of_the_wrong_type_is_refused_by_its_field_and_nothing_else_happens(kind: type, name: str) -> None:
    right_types = RIGHT_TYPES.get((kind, name), (str,))

    for value in STRANGE:
        faults = list(faults_with(kind, {name: value}))
        if not faults:
            assert isinstance(getattr(kind(**(SOUND[kind] | {name: value})), name), right_types)
        assert all(path.startswith(name) for path, _ in faults)
        assert CANARY not in str(faults)


def test_every_fault_is_listed_in_the_order_of_the_fields() -> None:
    faults = faults_of(
        CallbackRequest,
        url=None,
        method="get",
        post_data=CallbackData(headers={"Host": CANARY, "X": " "}, data=bytes(v.MAX_BODY_BYTES + 1)),
        retry_phases=[RetryPhase(retries=1, delay=timedelta(0)), 5],
        application_id="\n",
        queue_id=b"q",
        notification_email_address="a",
        on_exhausted="stop",
    )

    assert [path for path, _ in faults] == [
        "url",
        "method",
        "post_data.headers['Host']",
        "post_data.headers['X']",
        "post_data.data",
        "retry_phases[1]",
        "application_id",
        "queue_id",
        "notification_email_address",
        "on_exhausted",
    ]


def test_reasons_say_what_would_be_accepted() -> None:
    assert faults_of(CallbackData, data=bytearray(b"a")) == [("data", "must be bytes, or None")]
    assert faults_of(CallbackData, headers=[("a", "b")]) == [("headers", "must be a mapping of strings to strings")]
    assert faults_of(CallbackRequest, retry_phases=5) == [("retry_phases", "must be a list or tuple of RetryPhase")]
    assert faults_of(CallbackRequest, retry_phases=[5] * 101) == [
        ("retry_phases", "must not hold more than 100 phases")
    ]
    assert faults_of(CallbackRequest, retry_phases=[5]) == [("retry_phases[0]", "must be a RetryPhase")]
    assert faults_of(CallbackRequest, post_data={"data": None}) == [("post_data", "must be a CallbackData")]
    assert faults_of(CallbackAttempt, failure="dns") == [("failure", "must be an AttemptFailure, or None")]
    assert faults_of(CallbackStatus, state="waiting") == [("state", "must be a CallbackState")]
    assert faults_of(CallbackLock, ended=NOW.astimezone(timezone(timedelta(hours=1)))) == [
        ("ended", "must be an aware datetime in UTC (datetime.timezone.utc), or None")
    ]


def test_an_endless_iterator_is_refused_and_not_read() -> None:
    def endless() -> Any:
        while True:
            yield RetryPhase(retries=1, delay=timedelta(0))

    phases = endless()

    faults = faults_of(CallbackRequest, retry_phases=phases)

    assert faults == [("retry_phases", "must be a list or tuple of RetryPhase")]
    assert inspect.getgeneratorstate(phases) == inspect.GEN_CREATED


def test_no_error_lists_more_faults_than_anybody_reads() -> None:
    many = v.MAX_FAULTS + 5

    for faults in (
        faults_of(CallbackData, headers=dict.fromkeys(map(str, range(many)), 5)),
        faults_of(CallbackData, headers=dict.fromkeys(range(many), "")),
        faults_of(CallbackStatus, attempts=[5] * many),
    ):
        assert len(faults) == v.MAX_FAULTS + 1
        assert faults[-1] == ("", "there are more faults than are listed here")

    assert len(faults_of(CallbackStatus, attempts=[5] * v.MAX_FAULTS)) == v.MAX_FAULTS


@generated.FEW
@given(generated.models, st.data())
def test_whatever_a_field_is_changed_to_is_always_accepted_or_refused_by_name(model: Any, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(attrs.fields(type(model))))
    value = data.draw(st.none() | st.integers() | st.text() | st.binary() | st.floats() | st.lists(st.none()))

    faults = []
    try:
        attrs.evolve(model, **{field.name: value})
    except InvalidRequestError as error:
        faults = error.errors

    assert all(path.startswith(field.name) for path, _ in faults)


# Plain values out of subclasses


def test_text_numbers_and_bytes_are_taken_out_of_subclasses() -> None:
    request = CallbackRequest(
        url=Loud("http://example.com"),
        method=Word.POST,  # type: ignore[arg-type]
        post_data=CallbackData(headers={Loud("a"): Loud("b")}, data=Bytes(b"c")),
        retry_phases=[RetryPhase(retries=Number.FIVE, delay=Span(seconds=1))],
        queue_id=Word.LABEL,
        application_id=Loud("d"),
        on_exhausted=Word.HOLD,  # type: ignore[arg-type]
    )

    values = [getattr(request, name) for name in ("url", "method", "queue_id", "application_id", "on_exhausted")]
    values += [*request.post_data.headers.items(), request.post_data.data, request.retry_phases[0].retries]
    assert values == ["http://example.com", "POST", "label", "d", "hold", ("a", "b"), b"c", 5]
    assert [type(value) for value in values] == [str, str, str, str, str, tuple, bytes, int]
    assert {type(part) for item in request.post_data.headers.items() for part in item} == {str}
    assert CANARY not in f"{request!r} {request.post_data.headers} {request.application_id}"


def test_the_standard_librarys_enums_are_as_good_as_what_they_stand_for() -> None:
    request = CallbackRequest(url="http://example.com", method=HTTPMethod.PUT)  # type: ignore[arg-type]
    attempt = CallbackAttempt(status_code=HTTPStatus.GONE, time=NOW, duration=timedelta(0))

    assert (type(request.method), request.method) == (str, "PUT")
    assert (type(attempt.status_code), attempt.status_code) == (int, 410)


def test_instants_and_durations_may_be_of_a_subclass() -> None:
    attempt = CallbackAttempt(status_code=200, time=Stamp(2026, 1, 1, tzinfo=UTC), duration=Span(seconds=1))

    assert attempt == CallbackAttempt(status_code=200, time=NOW, duration=timedelta(seconds=1))


def test_a_time_zone_that_only_happens_to_be_utc_is_refused() -> None:
    named = timezone(timedelta(0), "UTC")

    assert [path for path, _ in faults_of(CallbackLock, acquired=NOW.replace(tzinfo=named))] == ["acquired"]


def test_never_is_gos_zero_time() -> None:
    assert datetime(1, 1, 1, tzinfo=UTC) == NEVER
    assert CallbackLock(acquired=NEVER, timeout=NEVER).acquired is NEVER


# Immutability


def test_what_the_caller_does_to_its_own_lists_and_maps_afterwards_changes_nothing() -> None:
    headers = {"a": "b"}
    phases = [RetryPhase(retries=1, delay=timedelta(0))]
    attempts: list[CallbackAttempt] = []
    request = CallbackRequest(url="http://example.com", post_data=CallbackData(headers=headers), retry_phases=phases)
    status = CallbackStatus(id="a", request=request, attempts=attempts)

    headers["Host"] = "x"
    phases.clear()
    attempts.append(CallbackAttempt(**SOUND[CallbackAttempt]))

    assert request.post_data.headers == {"a": "b"}
    assert request.retry_phases == (RetryPhase(retries=1, delay=timedelta(0)),)
    assert status.attempts == ()


@pytest.mark.parametrize("kind", SOUND)
def test_no_field_can_be_set_or_added(kind: type) -> None:
    model: Any = kind(**SOUND[kind])

    for name in [*CHECKS[kind], "another"]:
        with pytest.raises(AttributeError):
            setattr(model, name, None)
    assert not hasattr(model, "__dict__")


@pytest.mark.parametrize(
    "change",
    [
        lambda headers: headers.__setitem__("a", "c"),
        lambda headers: headers.__delitem__("a"),
        lambda headers: headers.update(a="c"),
        lambda headers: headers.setdefault("c", "d"),
        lambda headers: headers.pop("a"),
        lambda headers: headers.popitem(),
        lambda headers: headers.clear(),
        lambda headers: headers.__ior__({"a": "c"}),
        lambda headers: type(headers).fromkeys("a"),
        lambda headers: setattr(headers, "x", 1),
    ],
)
def test_headers_can_not_be_changed(change: Any) -> None:
    headers = CallbackData(headers={"a": "b"}).headers

    with pytest.raises((TypeError, AttributeError)):
        change(headers)

    assert headers == {"a": "b"}


def test_every_method_of_a_dict_that_changes_it_is_refused() -> None:
    changing = {name for name in dir(dict) if name not in dir(tuple) and not name.startswith("__r")}
    harmless = {"copy", "fromkeys", "get", "items", "keys", "values", "__or__", "__reversed__"}

    assert {name for name in changing - harmless if getattr(Headers, name) is getattr(dict, name)} == set()


@pytest.mark.parametrize(
    "given", [{"a": "b"}, OrderedDict(a="b"), UserDict(a="b"), HTTPHeaderDict(a="b"), Headers(a="b")]
)
def test_headers_may_come_in_any_mapping(given: Any) -> None:
    data = CallbackData(headers=given)

    assert type(data.headers) is Headers
    assert data.headers == {"a": "b"}
    assert data.headers | {"c": "d"} == {"a": "b", "c": "d"}


def test_headers_that_are_immutable_already_are_not_copied() -> None:
    headers = Headers(a="b")

    assert CallbackData(headers=headers).headers is headers


@generated.FEW
@given(generated.models)
def test_models_always_hash_pickle_and_copy_to_equals(model: Any) -> None:
    copies = [
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(model, protocol=0)),
        copy.copy(model),
        copy.deepcopy(model),
        attrs.evolve(model),
    ]

    for one in copies:
        assert one == model
        assert hash(one) == hash(model)
        assert type(one) is type(model)


def test_copies_of_headers_stay_immutable() -> None:
    headers = CallbackData(headers={"a": "b"}).headers

    for one in (pickle.loads(pickle.dumps(headers)), copy.copy(headers), copy.deepcopy(headers)):
        assert type(one) is Headers
        assert one == headers
        assert hash(one) == hash(headers)


# Secrets


def canaries_everywhere() -> list[Any]:
    request = CallbackRequest(
        url=f"https://example.com/{CANARY}?{CANARY}#{CANARY}",
        post_data=CallbackData(headers={CANARY: CANARY}, data=CANARY.encode()),
        retry_phases=[RetryPhase(retries=3, delay=timedelta(seconds=7))],
        notification_email_address=f"{CANARY}@example.com",
    )
    answer = CallbackData(headers={CANARY: CANARY}, data=CANARY.encode())
    attempt = CallbackAttempt(status_code=500, response=answer, time=NOW, duration=timedelta(seconds=1))
    lock = CallbackLock(acquired=NOW, timeout=NOW)
    status = CallbackStatus(id="a", request=request, attempts=[attempt], locks=[lock])
    return [request, request.target, answer, answer.headers, attempt, lock, status, [status], {"a": request}]


def test_no_repr_shows_path_query_headers_body_or_address() -> None:
    for model in canaries_everywhere():
        for shown in (repr(model), str(model), f"{model}", f"{model!s:>300}", f"{(model,)!r}"):
            assert CANARY not in shown


def test_reprs_show_what_helps() -> None:
    request = CallbackRequest(
        url="https://user.example:8443/secret?a=b",
        queue_id="q",
        application_id="app",
        post_data=CallbackData(data=b"abc"),
    )

    assert repr(request) == ("<CallbackRequest POST https://user.example:8443 queue_id='q' application_id='app'>")
    assert repr(request.post_data) == "<CallbackData 0 headers, 3 bytes>"
    assert repr(CallbackData(headers={"a": "b"})) == "<CallbackData 1 headers, no body>"
    assert repr(CallbackData(headers={"a": "b"}).headers) == "<1 headers>"
    assert "status_code=200" in repr(CallbackAttempt(**SOUND[CallbackAttempt]))
    assert "state=<CallbackState.WAITING: 'waiting'>" in repr(CallbackStatus(**SOUND[CallbackStatus]))


# What models say


def test_a_request_has_the_defaults_of_the_contract() -> None:
    request = CallbackRequest(url="http://example.com")

    assert attrs.asdict(request, recurse=False) == {
        "url": "http://example.com",
        "method": "POST",
        "post_data": CallbackData(headers={}, data=None),
        "retry_phases": (),
        "application_id": "",
        "queue_id": "",
        "notification_email_address": "",
        "on_exhausted": "continue",
    }


def test_a_record_says_no_more_than_it_was_told() -> None:
    attempt = CallbackAttempt(**SOUND[CallbackAttempt])
    lock = CallbackLock(**SOUND[CallbackLock])
    status = CallbackStatus(**SOUND[CallbackStatus])

    said = (attempt.response, attempt.failure, attempt.machine_name, attempt.late, attempt.truncated, attempt.detail)
    assert said == (CallbackData(), None, "", False, False, "")
    assert (lock.completed, lock.machine_name, lock.token, lock.ended) == (False, "", 0, None)
    assert (status.attempts, status.locks, status.state, status.queue_id) == ((), (), CallbackState.WAITING, "")
    assert (status.sequence, status.next_attempt_at, status.failed_reason, status.blocked_by) == (0, None, None, None)


def test_fields_are_given_by_name_only() -> None:
    for kind, values in SOUND.items():
        with pytest.raises(TypeError, match="positional"):
            kind(*(values or {"headers": {}}).values())


def test_the_target_is_the_url_taken_apart() -> None:
    target = CallbackRequest(url="HTTPS://Example.COM/a?b#c").target

    assert target == Target(scheme="https", host="example.com", port=443, path_and_query="/a?b")


@pytest.mark.parametrize(
    ("state", "is_open", "success"),
    [
        (CallbackState.WAITING, True, False),
        (CallbackState.LOCKED, True, False),
        (CallbackState.SUCCEEDED, False, True),
        (CallbackState.FAILED, False, False),
        (CallbackState.CANCELLED, False, False),
    ],
)
def test_a_state_says_whether_the_callback_is_open_and_has_succeeded(
    state: CallbackState, is_open: bool, success: bool
) -> None:
    status = attrs.evolve(CallbackStatus(**SOUND[CallbackStatus]), state=state)

    assert (state.is_open, status.success) == (is_open, success)


@pytest.mark.parametrize("failure", [None, *AttemptFailure])
@pytest.mark.parametrize("late", [False, True])
def test_an_attempt_counts_unless_it_was_late_or_interrupted_by_ourselves(
    failure: AttemptFailure | None, late: bool
) -> None:
    attempt = CallbackAttempt(status_code=0, time=NOW, duration=timedelta(0), failure=failure, late=late)

    assert attempt.is_counted is (not late and failure is not AttemptFailure.INTERRUPTED)


def test_the_closed_lists_of_words_are_these() -> None:
    assert [state.value for state in CallbackState] == ["waiting", "locked", "succeeded", "failed", "cancelled"]
    assert [reason.value for reason in FailedReason] == ["exhausted", "refused", "abandoned", "undecodable"]
    assert [failure.value for failure in AttemptFailure] == [
        "dns",
        "target_not_allowed",
        "connect",
        "tls",
        "timeout",
        "connection_lost",
        "protocol",
        "too_large",
        "interrupted",
        "internal",
    ]
