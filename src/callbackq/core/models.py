"""
What a callback is: the request an application stores, and the record callbackq keeps of it.

All models are frozen values; a change is `attrs.evolve`. They are checked when they are built, and the error
names every faulty field. No repr shows a query string, header value, body or e-mail address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final, Literal, NoReturn, TypeVar

from attrs import field, frozen

from callbackq.core import validation as v
from callbackq.core.url import Target, parse_url

__all__ = [
    "CHECKS",
    "NEVER",
    "REQUEST_DATA_CHECKS",
    "AttemptFailure",
    "CallbackAttempt",
    "CallbackData",
    "CallbackLock",
    "CallbackRequest",
    "CallbackState",
    "CallbackStatus",
    "FailedReason",
    "Headers",
    "RetryPhase",
    "unchecked",
]

NEVER: Final = datetime(1, 1, 1, tzinfo=UTC)
"""Go's zero time, which documents of 2016 use for an instant that has not come."""


class CallbackState(Enum):
    """Where a callback stands. WAITING and LOCKED are *open*, the others *finished*."""

    WAITING = "waiting"
    LOCKED = "locked"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_open(self) -> bool:
        return self in (CallbackState.WAITING, CallbackState.LOCKED)


class FailedReason(Enum):
    """Why a FAILED callback failed for good."""

    EXHAUSTED = "exhausted"
    """The last retry of the last phase failed."""
    REFUSED = "refused"
    """The receiver gave an answer that `ResponsePolicy` holds to be final (410 Gone)."""
    ABANDONED = "abandoned"
    """Too many locks in a row timed out without a result: the request may kill its dispatcher."""
    UNDECODABLE = "undecodable"
    """The stored request can't be read."""


class AttemptFailure(Enum):
    """Why an attempt got no answer. A closed list: new words come with a new minor release."""

    DNS = "dns"
    TARGET_NOT_ALLOWED = "target_not_allowed"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    CONNECTION_LOST = "connection_lost"
    PROTOCOL = "protocol"
    TOO_LARGE = "too_large"
    INTERRUPTED = "interrupted"
    """Ended by our own shutdown. Not counted as a retry."""
    INTERNAL = "internal"
    """A fault in the transport or in a hook of the host."""


class Headers(dict[str, str]):
    """A header map that can't be changed: names as given, one value each."""

    __slots__ = ()

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __repr__(self) -> str:
        return f"<{len(self)} headers>"

    def __reduce__(self) -> tuple[object, ...]:
        return (Headers, (dict(self),))

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("headers of a callback can't be changed; build a new CallbackData")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


def _to_headers(value: Mapping[str, str]) -> Any:
    # Here and in _to_tuple: what has the wrong type passes through, so that its check can name it.
    if type(value) is Headers or not isinstance(value, Mapping):
        return value
    return Headers({_plain(name): _plain(text) for name, text in value.items()})


def _to_tuple(value: Sequence[Any]) -> Any:
    # Sequences only: an iterator may never end, and the items of a set have no order.
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else value


def _to_phases(value: Sequence[RetryPhase]) -> tuple[RetryPhase, ...]:
    phases: tuple[RetryPhase, ...] = _to_tuple(value)
    return phases


_Model = TypeVar("_Model")
# Most values are of one of these, and pass at the first look.
_PLAIN_TYPES: Final = frozenset({str, bytes, int, bool, type(None), datetime, timedelta, tuple, Headers})


def _plain(value: Any) -> Any:
    """Take text, bytes or a number out of a subclass, such as an enum, which may print as something else."""
    if type(value) in _PLAIN_TYPES:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return bytes.__bytes__(value)
    if isinstance(value, int):
        return int.__index__(value)
    return value


def _settle(model: object, checks: Mapping[str, v.Check]) -> None:
    """Bring the fields of a model that is being built to plain types, and refuse it if one has a fault."""
    has_faults = False
    for name, check in checks.items():
        given = getattr(model, name)
        value = _plain(given)
        if value is not given:
            object.__setattr__(model, name, value)
        has_faults = has_faults or any(check(value))
    if has_faults:
        v.refuse(_faults_of(model, checks))


def _faults_of(model: object, checks: Mapping[str, v.Check]) -> Iterator[v.Fault]:
    for name, check in checks.items():
        for below, reason in check(getattr(model, name)):
            yield f"{name}{below}", reason


def unchecked(model: type[_Model], /, **values: object) -> _Model:
    """
    Build a model without its checks, which cost ten times as much as the rest.

    Args:
        model: its class.
        values: all of its fields. Each is known to be as the model's checks would leave it: checked before, or made
            here.
    """
    built = object.__new__(model)
    for name, value in values.items():
        object.__setattr__(built, name, value)
    return built


@frozen(kw_only=True, repr=False)
class CallbackData:
    """
    Headers and body of a request or of an answer.

    Attributes:
        headers: names to values. Names keep their case.
        data: the body, raw bytes; ``None`` is "no body", which documents keep apart from an empty one.

    Raises:
        InvalidRequestError: a header is not text, or the body is not bytes.
    """

    headers: Mapping[str, str] = field(factory=Headers, converter=_to_headers)
    data: bytes | None = None

    def __attrs_post_init__(self) -> None:
        _settle(self, CHECKS[CallbackData])

    def __repr__(self) -> str:
        size = "no body" if self.data is None else f"{len(self.data)} bytes"
        return f"<CallbackData {len(self.headers)} headers, {size}>"


@frozen(kw_only=True)
class RetryPhase:
    """
    So many retries, each after that delay.

    Attributes:
        retries: 0 to 10,000.
        delay: 0 to 365 days.

    Raises:
        InvalidRequestError: out of these bounds or of another type.
    """

    retries: int
    delay: timedelta

    def __attrs_post_init__(self) -> None:
        _settle(self, CHECKS[RetryPhase])


@frozen(kw_only=True, repr=False)
class CallbackRequest:
    """
    What to send, and what to do when it can't be delivered.

    Only syntax is judged here. Whether the target may be reached is the transport's `TargetPolicy`'s
    business, at each attempt.

    Attributes:
        url: absolute http or https URL, at most 8,192 characters, without user name or password.
        method: ``"GET"``, ``"POST"`` or ``"PUT"``.
        post_data: headers and body to send. The body goes out with POST and PUT only.
        retry_phases: when to try again. Attempts allowed = 1 + the sum of all retries.
        application_id: a label for the storing application.
        queue_id: callbacks with the same queue id are delivered strictly one after the other; empty gives
            the callback a queue of its own.
        notification_email_address: whom to tell when delivery has failed for good; empty for nobody.
        on_exhausted: what happens to the queue behind this callback once it has failed for good.
            ``"continue"``: the next one goes. ``"hold"``: the queue stays closed until somebody redelivers,
            skips or cancels this one.

    Raises:
        InvalidRequestError: with every fault found.
    """

    url: str
    method: Literal["GET", "POST", "PUT"] = "POST"
    post_data: CallbackData = field(factory=CallbackData)
    retry_phases: tuple[RetryPhase, ...] = field(default=(), converter=_to_phases)
    application_id: str = ""
    queue_id: str = ""
    notification_email_address: str = ""
    on_exhausted: Literal["continue", "hold"] = "continue"

    def __attrs_post_init__(self) -> None:
        _settle(self, CHECKS[CallbackRequest])

    @property
    def target(self) -> Target:
        """The URL, taken apart."""
        return parse_url(self.url)

    def __repr__(self) -> str:
        return (
            f"<CallbackRequest {self.method} {self.target.origin} "
            f"queue_id={self.queue_id!r} application_id={self.application_id!r}>"
        )


@frozen(kw_only=True)
class CallbackAttempt:
    """
    One request that was sent, or tried to be, and what came of it.

    Attributes:
        status_code: the answer's status; 0 when there was no answer.
        response: what the receiver answered, raw, bounded by the transport's limits.
        time: when it began.
        duration: how long it took.
        failure: why there was no answer; ``None`` when there was one.
        machine_name: the dispatcher's name.
        late: its lock had been lost when the result came; it changed no state.
        truncated: the answer's body was longer than what is kept, or broke off.
        detail: the cause of *failure* or *truncated*, for whoever looks for it: a few words of ours, such as
            ``"ECONNREFUSED"``; at most 120 visible ASCII characters and blanks. No part of the contract: don't
            decide by it.
    """

    status_code: int
    response: CallbackData = field(factory=CallbackData)
    time: datetime
    duration: timedelta
    failure: AttemptFailure | None = None
    machine_name: str = ""
    late: bool = False
    truncated: bool = False
    detail: str = ""

    def __attrs_post_init__(self) -> None:
        _settle(self, CHECKS[CallbackAttempt])

    @property
    def is_counted(self) -> bool:
        """Whether it uses up one of the attempts the request allows."""
        return not self.late and self.failure is not AttemptFailure.INTERRUPTED


@frozen(kw_only=True)
class CallbackLock:
    """
    A lease on one callback, held by one dispatcher for one attempt.

    Attributes:
        acquired: when it was taken, by the store's clock.
        timeout: when it ends by itself, by the store's clock.
        completed: its holder ended it, by recording a result or giving it back.
        machine_name: the holder's name: a label, never compared.
        token: the fencing token. Rises with every lock of a callback and never repeats for it.
        ended: when it stopped being live; ``None`` while it is. Ended and not completed = abandoned.
    """

    acquired: datetime
    timeout: datetime
    completed: bool = False
    machine_name: str = ""
    token: int = 0
    ended: datetime | None = None

    def __attrs_post_init__(self) -> None:
        _settle(self, CHECKS[CallbackLock])


@frozen(kw_only=True)
class CallbackStatus:
    """
    Everything callbackq knows about a callback.

    Attributes:
        id: the callback's id, the same on every attempt.
        request: what was stored.
        attempts: all attempts, oldest first.
        locks: all locks, oldest first.
        state: where it stands.
        queue_id: the queue it belongs to; empty when it has one of its own.
        sequence: its number in the queue, from 1; 0 when it was read from a document without one.
        next_attempt_at: when the next attempt is due; ``None`` unless the callback is WAITING.
        failed_reason: why it FAILED.
        blocked_by: id of the callback that closes the queue in front of this one; ``None`` when nothing
            does. That callback's own status says until when.
    """

    id: str
    request: CallbackRequest
    attempts: tuple[CallbackAttempt, ...] = field(default=(), converter=_to_tuple)
    locks: tuple[CallbackLock, ...] = field(default=(), converter=_to_tuple)
    state: CallbackState = CallbackState.WAITING
    queue_id: str = ""
    sequence: int = 0
    next_attempt_at: datetime | None = None
    failed_reason: FailedReason | None = None
    blocked_by: str | None = None

    def __attrs_post_init__(self) -> None:
        _settle(self, CHECKS[CallbackStatus])

    @property
    def success(self) -> bool:
        """Whether the receiver has accepted it."""
        return self.state is CallbackState.SUCCEEDED


def _instances(kind: type, text: str) -> v.Check:
    faults = (("", f"must be {text}"),)

    def check(value: object) -> Iterable[v.Fault]:
        return () if isinstance(value, kind) else faults

    return check


def _optional(check: v.Check) -> v.Check:
    def optional(value: object) -> Iterable[v.Fault]:
        return () if value is None else ((path, f"{reason}, or None") for path, reason in check(value))

    return optional


def _tuple_of(kind: type) -> v.Check:
    def check(value: object) -> Iterator[v.Fault]:
        if not isinstance(value, tuple):
            yield "", f"must be a list or tuple of {kind.__name__}"
            return
        for index, item in enumerate(value):
            if not isinstance(item, kind):
                yield f"[{index}]", f"must be a {kind.__name__}"

    return check


def check_post_data(value: object) -> Iterator[v.Fault]:
    """A CallbackData that is to be sent."""
    if not isinstance(value, CallbackData):
        yield "", "must be a CallbackData"
        return
    for name, check in REQUEST_DATA_CHECKS.items():
        for path, reason in check(getattr(value, name)):
            yield f".{name}{path}", reason


_check_items = _tuple_of(RetryPhase)


def check_retry_phases(value: object) -> Iterator[v.Fault]:
    if isinstance(value, tuple) and len(value) > v.MAX_PHASES:
        yield "", f"must not hold more than {v.MAX_PHASES} phases"
        return
    faults = list(_check_items(value))
    yield from faults
    if isinstance(value, tuple) and not faults:
        yield from v.check_phase_total(tuple((phase.retries, phase.delay) for phase in value))


REQUEST_DATA_CHECKS: Final[Mapping[str, v.Check]] = {"headers": v.check_request_headers, "data": v.check_body}
"""What `CallbackRequest.post_data` must be beyond what every `CallbackData` is."""

CHECKS: Final[Mapping[type, Mapping[str, v.Check]]] = {
    CallbackData: {
        "headers": v.check_headers,
        "data": _optional(_instances(bytes, "bytes")),
    },
    RetryPhase: {
        "retries": v.check_retries,
        "delay": v.check_delay,
    },
    CallbackRequest: {
        "url": v.check_url,
        "method": v.check_method,
        "post_data": check_post_data,
        "retry_phases": check_retry_phases,
        "application_id": v.check_text,
        "queue_id": v.check_text,
        "notification_email_address": v.check_email_address,
        "on_exhausted": v.check_on_exhausted,
    },
    CallbackAttempt: {
        "status_code": v.check_status_code,
        "response": _instances(CallbackData, "a CallbackData"),
        "time": v.check_instant,
        "duration": v.check_duration,
        "failure": _optional(_instances(AttemptFailure, "an AttemptFailure")),
        "machine_name": v.check_text,
        "late": v.check_bool,
        "truncated": v.check_bool,
        "detail": v.check_detail,
    },
    CallbackLock: {
        "acquired": v.check_instant,
        "timeout": v.check_instant,
        "completed": v.check_bool,
        "machine_name": v.check_text,
        "token": v.check_token,
        "ended": _optional(v.check_instant),
    },
    CallbackStatus: {
        "id": v.check_text,
        "request": _instances(CallbackRequest, "a CallbackRequest"),
        "attempts": _tuple_of(CallbackAttempt),
        "locks": _tuple_of(CallbackLock),
        "state": _instances(CallbackState, "a CallbackState"),
        "queue_id": v.check_text,
        "sequence": v.check_token,
        "next_attempt_at": _optional(v.check_instant),
        "failed_reason": _optional(_instances(FailedReason, "a FailedReason")),
        "blocked_by": _optional(v.check_text),
    },
}
"""One check for each field of each model, in the order of the fields."""
