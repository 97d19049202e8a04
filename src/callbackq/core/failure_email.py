"""
What the e-mail about final failures says: about one callback all that may be told, about many a list.

It may be read by people who must not see what a callback carries: it holds no header, no query string and no body,
neither of a request nor of an answer. Ids come from whoever stored the callback. They are shown as Python writes
strings, so that no line break, control character or change of direction is left in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from email import charset, policy
from email.mime.text import MIMEText
from email.utils import format_datetime
from typing import Final

from attrs import field, frozen

from callbackq.core.models import AttemptFailure, CallbackAttempt, CallbackState, CallbackStatus, FailedReason

__all__ = ["FailureNotice", "compose"]

_REASONS: Final = {
    FailedReason.EXHAUSTED: "every attempt its retry phases allow has failed",
    FailedReason.REFUSED: "the receiver's answer was final",
    FailedReason.ABANDONED: "too many attempts in a row ended with their dispatcher, without a result",
    FailedReason.UNDECODABLE: "the stored request can't be read",
}


@frozen(kw_only=True)
class FailureNotice:
    """
    What one e-mail tells: one final failure, or all that one address is owed about one queue.

    Attributes:
        email_address: whom to tell.
        queue_id: the queue of the callbacks; empty for callbacks without one.
        callbacks: those that failed first, oldest first, each once and as it is now, which may no longer be FAILED:
            somebody may have redelivered it. At most twenty; empty only if none of many can be read any more.
        count: how many final failures it tells of, at least 1. A callback that failed, was redelivered and failed again
            counts twice.
        unlisted: how many of them are failures of other callbacks than those listed.
        key: the same when this is told a second time, because it is not known whether it was accepted, and no other
            notice's. 32 hexadecimal digits.
    """

    email_address: str = field(repr=False)
    queue_id: str
    callbacks: tuple[CallbackStatus, ...]
    count: int
    unlisted: int = 0
    key: str


def compose(notice: FailureNotice, *, sender: str, date: datetime, interval: timedelta) -> bytes:
    """
    Write the e-mail about callbacks that failed for good.

    Args:
        notice: what it tells. Its address must have been checked.
        sender: who it comes from, checked as well.
        date: when.
        interval: how long the next e-mail about the same queue will be held back.

    Returns:
        The message as it goes over the wire: ASCII, lines of at most 998 characters that end in CR LF. A second one
        from the same notice has the same Message-ID.
    """
    utf8 = charset.Charset("utf-8")
    utf8.body_encoding = charset.QP
    text = "\n".join([*_body(notice), "", *_ending(notice, interval), ""])
    message = MIMEText(text, "plain", utf8)  # type: ignore[arg-type]  # typeshed knows only names here
    message["Subject"] = _subject(notice)
    message["From"] = sender
    message["To"] = notice.email_address
    message["Date"] = format_datetime(date)
    message["Message-ID"] = _message_id(notice, sender)
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834, section 5: no automatic answers
    return message.as_bytes(policy=policy.compat32.clone(linesep="\r\n", max_line_length=998))


def _message_id(notice: FailureNotice, sender: str) -> str:
    # Hashed, since a notice that somebody else made may hold as its key what a Message-ID can't.
    digest = hashlib.sha256(notice.key.encode()).hexdigest()[:32]
    return f"<callbackq.{digest}@{sender.rpartition('@')[2]}>"


def _is_single(notice: FailureNotice) -> bool:
    return notice.count == len(notice.callbacks) == 1


def _subject(notice: FailureNotice) -> str:
    # Nothing that whoever stored the callbacks has written: an id can be a sentence, and a subject an advertisement.
    what = "a callback" if _is_single(notice) else f"{notice.count} callbacks"
    return f"callbackq: {what} could not be delivered"


def _body(notice: FailureNotice) -> Iterator[str]:
    if _is_single(notice):
        yield from _about_one(notice.callbacks[0])
    else:
        yield from _about_many(notice)


def _ending(notice: FailureNotice, interval: timedelta) -> Iterator[str]:
    if interval:
        queue = "this queue" if notice.queue_id else "callbacks without a queue"
        yield f"The next e-mail about {queue} comes {interval} (h:mm:ss) after this one at the earliest. It will tell"
        yield "of all failures until then."
        yield ""
    yield f"This address was stored with the callback{'' if _is_single(notice) else 's'} as notification_email_address."


# About many.


def _about_many(notice: FailureNotice) -> Iterator[str]:
    yield "Callbacks could not be delivered."
    yield ""
    yield f"Failures: {notice.count}"
    yield f"Queue:    {repr(notice.queue_id) if notice.queue_id else 'each has one of its own'}"
    yield ""
    for status in notice.callbacks:
        yield from _in_brief(status)
    if notice.unlisted:
        yield f"and {notice.unlisted} more." if notice.callbacks else "None of them can be listed."
        yield ""
    if any(_holds(status) for status in notice.callbacks):
        yield "A failed callback that holds its queue does so until it is redelivered, skipped or cancelled."
    yield f"To see them all:  data_access.list_callbacks(state=CallbackState.FAILED, queue_id={notice.queue_id!r})"
    yield "To try one again: data_access.request_transition(id, Action.REDELIVER)"


def _in_brief(status: CallbackStatus) -> Iterator[str]:
    yield f"{status.id!r}, number {status.sequence}" if status.queue_id else repr(status.id)
    yield f"    {_request(status)}"
    if status.state is not CallbackState.FAILED:
        yield f"    taken up again since; its state is now: {status.state.value}"
    reason = f"{status.failed_reason.value}, " if status.failed_reason else ""
    yield f"    {reason}attempts: {len(status.attempts)}"
    if status.attempts:
        last = status.attempts[-1]
        yield f"    last attempt {_instant(last.time)}: {_answer(last)}"
    yield ""


# About one.


def _about_one(status: CallbackStatus) -> Iterator[str]:
    yield "A callback could not be delivered."
    yield ""
    yield from (f"{name + ':':<15}{value}" for name, value in _facts(status))
    yield ""
    yield from _advice(status)


def _facts(status: CallbackStatus) -> Iterator[tuple[str, str]]:
    request = status.request
    yield "Callback", repr(status.id)
    yield "Queue", f"{status.queue_id!r}, number {status.sequence}" if status.queue_id else "one of its own"
    yield "Application", repr(request.application_id) if request.application_id else "not named"
    yield "Request", _request(status)
    if status.failed_reason is not None:
        yield "Reason", f"{status.failed_reason.value}: {_REASONS[status.failed_reason]}"
    yield "Attempts", str(len(status.attempts))
    if status.attempts:
        first, last = status.attempts[0], status.attempts[-1]
        yield "First attempt", _instant(first.time)
        yield "Last attempt", _instant(last.time)
        yield "Last answer", _answer(last)


def _request(status: CallbackStatus) -> str:
    return f"{status.request.method} {status.request.target.origin}"


def _answer(attempt: CallbackAttempt) -> str:
    if attempt.failure is None:
        return f"status {attempt.status_code}"
    # Why a target was refused is for operators: whoever chooses URLs and addresses of e-mails could learn from it
    # what names inside the network lead to.
    if not attempt.detail or attempt.failure is AttemptFailure.TARGET_NOT_ALLOWED:
        return f"none ({attempt.failure.value})"
    return f"none ({attempt.failure.value}: {attempt.detail})"


def _advice(status: CallbackStatus) -> Iterator[str]:
    if status.state is not CallbackState.FAILED:
        yield f"Since then somebody has taken it up again. Its state is now: {status.state.value}."
        return
    if _holds(status):
        yield "Its queue is held: the callbacks behind it wait until this one is redelivered, skipped or cancelled."
    elif status.queue_id:
        yield "Its queue goes on with the callbacks behind it."
    yield f"To try it again:  data_access.request_transition({status.id!r}, Action.REDELIVER)"
    if _holds(status):
        yield f"To go on without: data_access.request_transition({status.id!r}, Action.SKIP)"


def _holds(status: CallbackStatus) -> bool:
    return status.state is CallbackState.FAILED and bool(status.queue_id) and status.request.on_exhausted == "hold"


def _instant(value: datetime) -> str:
    return value.isoformat(sep=" ", timespec="seconds")
