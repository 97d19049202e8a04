"""
Models as rows and back.

Header maps and retry phases are small JSON texts of our own (no document anybody else reads); everything else is a
column. Rows come from a file that other programs can write to, so decoding trusts nothing: the models check again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from types import NoneType
from typing import Any, Final, Literal

from attrs import define, fields

from callbackq.core.models import (
    AttemptFailure,
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
    RetryPhase,
    unchecked,
)
from callbackq.core.validation import check_body, check_text
from callbackq.errors import DataAccessError
from callbackq.stores.sql.instants import LAST_US, instant, microseconds, span

__all__ = [
    "LOCKED",
    "ROW_COLUMNS",
    "STATES",
    "WAITING",
    "CallbackRow",
    "Key",
    "Row",
    "Values",
    "attempt_values",
    "code_of",
    "new_status",
    "read_on_exhausted",
    "read_request",
    "read_status",
    "request_values",
]

Key = int | str
"""What identifies a row of a table."""

Row = Sequence[Any]
"""What a statement gives."""

Values = dict[str, Any]
"""What a statement is given."""

STATES: Final = (
    CallbackState.WAITING,
    CallbackState.LOCKED,
    CallbackState.SUCCEEDED,
    CallbackState.FAILED,
    CallbackState.CANCELLED,
)
WAITING, LOCKED = 0, 1

# What rows that make no sense lead to. InvalidRequestError is a ValueError; JSON that is nothing but brackets recurses.
_REMEMBERED_REQUESTS: Final = 256
_UNREADABLE: Final = (ValueError, TypeError, OverflowError, RecursionError)


def code_of(state: CallbackState) -> int:
    """The number that stands for a state in the database."""
    return STATES.index(state)


_HIGHEST: Final = 2**62
_NUMBERS: Final = {
    "sequence": (1, _HIGHEST, 1),
    "state": (0, len(STATES) - 1, WAITING),
    "is_head": (0, 1, 0),
    "token": (0, _HIGHEST, 0),
    "attempts_made": (0, _HIGHEST, 0),
    "abandoned": (0, _HIGHEST, 0),
    "holds": (0, 1, 0),
    "cancel_requested": (0, 1, 0),
    "accepted_late": (0, 1, 0),
}
"""Columns of whole numbers: the least, the most, and what to go on with when the column holds anything else."""
_INSTANTS: Final = ("due", "acquired", "finished")


@define(slots=False)
class CallbackRow:
    """
    One row of callbackq_callbacks, to be read, changed and written back within a transaction.

    Without slots, so that ``vars(row)`` are the statement's values.
    """

    callback: Key
    id: str
    queue: Key | None
    sequence: int
    state: int
    is_head: int
    due: int | None
    token: int
    acquired: int | None
    machine: str | None
    attempts_made: int
    abandoned: int
    holds: int
    cancel_requested: int
    accepted_late: int
    finished: int | None
    failed_reason: str | None
    is_damaged: bool = False
    """Somebody else has written what we never would. What is sent under it would be a guess, so it must fail."""
    was_token: int | None = None
    """As it was read, for databases where nothing kept others from the row since; ``None`` when it was mended."""
    was_state: int | None = None

    def mended(self) -> CallbackRow:
        """Put something to go on with in place of what can't be ours; most rows are as they should be."""
        values: dict[str, object] = vars(self)
        wrong: dict[str, object] = {}
        for name, (least, most, instead) in _NUMBERS.items():
            number = values[name]
            if type(number) is not int or not least <= number <= most:
                wrong[name] = instead
        for name in _INSTANTS:
            moment = values[name]
            if moment is not None and (type(moment) is not int or not -_HIGHEST <= moment <= LAST_US):
                wrong[name] = 0
        wrong |= {name: None for name in ("machine", "failed_reason") if type(values[name]) not in (str, NoneType)}
        if type(values["queue"]) not in (int, str, NoneType):
            wrong["queue"] = None
        if wrong:
            values |= wrong
            self.is_damaged = True
        else:
            # What can't be ours is not in the database as we have it.
            self.was_token, self.was_state = self.token, self.state
        return self

    def owes_an_opening(self) -> bool:
        """Whether it has ended while its queue could not be locked, so that the next is still to be its head."""
        return self.state > LOCKED and self.due is not None

    def take(self, *, token: int, acquired: int, timeout: int, machine_name: str) -> None:
        """Be locked. The state that was is still needed until the end of the lock before is written."""
        self.token, self.acquired, self.due, self.machine = token, acquired, timeout, machine_name


ROW_COLUMNS: Final = [one.name for one in fields(CallbackRow)].index("is_damaged")
"""How many columns of a statement that gives more make up the row."""


def request_values(request: CallbackRequest) -> Values:
    """Take a request apart. Its queue is the callback's business."""
    return {
        "url": request.url,
        "method": request.method,
        "headers": _write_headers(request.post_data.headers),
        "retry_phases": _write_json([(phase.retries, span(phase.delay)) for phase in request.retry_phases]),
        "application_id": request.application_id,
        "email_address": request.notification_email_address,
        "on_exhausted": request.on_exhausted,
        "body": request.post_data.data,
    }


def read_request(row: Row) -> CallbackRequest | None:
    """
    Put a request together again.

    Args:
        row: queue name, url, method, headers, retry phases, application id, e-mail address, on_exhausted, body.

    Returns:
        ``None`` when that can't be done: somebody else wrote the row, or a release with other rules.
    """
    queue_id, *common, body = row
    queue_id = queue_id or ""
    try:
        alike = _read_common(*common)
    except _UNREADABLE:
        return None
    if any(check_text(queue_id)) or any(check_body(body)):
        return None
    return unchecked(
        CallbackRequest,
        url=alike.url,
        method=alike.method,
        post_data=unchecked(CallbackData, headers=alike.post_data.headers, data=body),
        retry_phases=alike.retry_phases,
        application_id=alike.application_id,
        queue_id=queue_id,
        notification_email_address=alike.notification_email_address,
        on_exhausted=alike.on_exhausted,
    )


# A customer's callbacks differ in queue and body only. To read all of it anew for each took 10 µs, and takes 3.
@lru_cache(maxsize=_REMEMBERED_REQUESTS)
def _read_common(
    url: Any, method: Any, headers: Any, phases: Any, application_id: Any, email_address: Any, on_exhausted: Any
) -> CallbackRequest:
    """Put a request together again, but for its queue and its body."""
    return CallbackRequest(
        url=url,
        method=method,
        post_data=CallbackData(headers=_read_json(headers, {})),
        retry_phases=_read_phases(phases),
        application_id=application_id,
        notification_email_address=email_address,
        on_exhausted=on_exhausted,
    )


def new_status(id: str, request: CallbackRequest, *, sequence: int, due: int, blocked_by: str | None) -> CallbackStatus:
    """
    Say what is known about a callback that has just been stored.

    Its parts have been checked or are the store's own. To check them again took half of the CPU that a batch cost.
    """
    return unchecked(
        CallbackStatus,
        id=id,
        request=request,
        attempts=(),
        locks=(),
        state=CallbackState.WAITING,
        queue_id=request.queue_id,
        sequence=sequence,
        next_attempt_at=instant(due),
        failed_reason=None,
        blocked_by=blocked_by,
    )


def read_on_exhausted(row: Row) -> Literal["continue", "hold"]:
    """Find out what to do with the queue, from the columns of a request that may be unreadable otherwise."""
    return "hold" if row[7] == "hold" else "continue"


def attempt_values(attempt: CallbackAttempt | None, *, lock_machine: str | None) -> Values:
    """Take an attempt apart; the columns are NULL when there was none."""
    if attempt is None:
        return _NO_ATTEMPT
    return {
        "status_code": attempt.status_code,
        "time": microseconds(attempt.time),
        "duration": span(attempt.duration),
        "failure": attempt.failure and attempt.failure.value,
        "attempt_machine": None if attempt.machine_name == lock_machine else attempt.machine_name,
        "late": int(attempt.late),
        "truncated": int(attempt.truncated),
        "detail": attempt.detail or None,
        "headers": _write_headers(attempt.response.headers),
        "body": attempt.response.data,
    }


def read_status(row: Row, history: Iterable[Row]) -> CallbackStatus:
    """
    Put together all that is known about a callback.

    Args:
        row: what the statement ``status`` gives.
        history: what the statement ``history`` gives.

    Raises:
        DataAccessError: a part of it can't be read.
    """
    id, queue_id, rest = row[0], row[9], row[10:]
    request = read_request((queue_id, *rest))
    if request is None:
        raise DataAccessError(f"the stored request of callback {id!r} can't be read; the callback will fail by itself")
    try:
        return _build_status(row, request, history)
    except (*_UNREADABLE, LookupError) as error:
        kind = type(error).__name__
    # Raised out here, the error has no context: "'…' is not a valid FailedReason" quotes the row.
    raise DataAccessError(f"the stored record of callback {id!r} can't be read ({kind})")


def _build_status(row: Row, request: CallbackRequest, history: Iterable[Row]) -> CallbackStatus:
    id, sequence, state, due, token, acquired, machine, failed_reason, blocked_by, queue_id, *_ = row
    attempts, locks = [], []
    for entry in history:
        locks.append(_read_lock(entry))
        if entry[6] is not None:
            attempts.append(_read_attempt(entry))
    if state == LOCKED:
        locks.append(_live_lock(token, acquired, due, machine))
    return CallbackStatus(
        id=id,
        request=request,
        attempts=tuple(attempts),
        locks=tuple(locks),
        state=STATES[state],
        queue_id=queue_id or "",
        sequence=sequence,
        next_attempt_at=instant(due) if state == WAITING else None,
        failed_reason=FailedReason(failed_reason) if failed_reason else None,
        blocked_by=blocked_by,
    )


def _live_lock(token: int, acquired_us: int, due_us: int, machine: str) -> CallbackLock:
    return CallbackLock(acquired=instant(acquired_us), timeout=instant(due_us), machine_name=machine, token=token)


def _read_lock(entry: Row) -> CallbackLock:
    token, acquired, timeout, ended, completed, machine = entry[:6]
    return CallbackLock(
        acquired=instant(acquired),
        timeout=instant(timeout),
        completed=bool(completed),
        machine_name=machine,
        token=token,
        ended=instant(ended),
    )


def _read_attempt(entry: Row) -> CallbackAttempt:
    machine = entry[5]
    status_code, time, duration, failure, attempt_machine, late, truncated, detail, headers, body = entry[6:]
    return CallbackAttempt(
        status_code=status_code,
        response=CallbackData(headers=_read_json(headers, {}), data=body),
        time=instant(time),
        duration=timedelta(microseconds=duration),
        failure=AttemptFailure(failure) if failure else None,
        machine_name=machine if attempt_machine is None else attempt_machine,
        late=bool(late),
        truncated=bool(truncated),
        detail=detail or "",
    )


_NO_ATTEMPT: Final[Values] = dict.fromkeys(
    ("status_code", "time", "duration", "failure", "attempt_machine", "late", "truncated", "detail", "headers", "body")
)


# An application has few schedules and many callbacks: building them anew took a quarter of the time of a claim.
@lru_cache(maxsize=256)
def _read_phases(text: str | None) -> tuple[RetryPhase, ...]:
    return tuple(
        RetryPhase(retries=retries, delay=timedelta(microseconds=delay_us))
        for retries, delay_us in _read_json(text, ())
    )


def _write_headers(headers: Mapping[str, str]) -> str | None:
    return _write_header_items(tuple(headers.items())) if headers else None


# A customer's callbacks have the same, a receiver's answers for a second. Few, since those may be long. Saves 1.3 µs.
@lru_cache(maxsize=64)
def _write_header_items(items: tuple[tuple[str, str], ...]) -> str | None:
    return _write_json(dict(items))


def _write_json(value: object) -> str | None:
    return _ENCODE(value) if value else None


def _read_json(text: str | None, empty: Any) -> Any:
    return empty if text is None else json.loads(text)


_ENCODE: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
