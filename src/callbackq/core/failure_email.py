"""
What the e-mail about a final failure says.

It may be read by people who must not see what the callback carries: it holds no header, no query string and no body,
neither of the request nor of an answer. Ids come from whoever stored the callback. They are shown as Python writes
strings, so that no line break, control character or change of direction is left in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from email import charset, policy
from email.header import Header
from email.mime.text import MIMEText
from email.utils import format_datetime
from typing import Final

from callbackq.core.models import AttemptFailure, CallbackAttempt, CallbackState, CallbackStatus, FailedReason

__all__ = ["compose"]

_REASONS: Final = {
    FailedReason.EXHAUSTED: "every attempt its retry phases allow has failed",
    FailedReason.REFUSED: "the receiver's answer was final",
    FailedReason.ABANDONED: "too many attempts in a row ended with their dispatcher, without a result",
    FailedReason.UNDECODABLE: "the stored request can't be read",
}


def compose(status: CallbackStatus, *, sender: str, date: datetime) -> bytes:
    """
    Write the e-mail about a callback that failed for good.

    Args:
        status: the callback, as it is now. Its address must have been checked.
        sender: who it comes from, checked as well.
        date: when.

    Returns:
        The message as it goes over the wire: ASCII, lines of at most 998 characters that end in CR LF. A second one
        about the same failure has the same Message-ID.
    """
    # Not EmailMessage: it loses blanks when it folds a long subject that isn't ASCII (264 of 3,000 on Python 3.11.7,
    # 131 on 3.13.0; Header none).
    utf8 = charset.Charset("utf-8")
    utf8.body_encoding = charset.QP
    message = MIMEText(_text(status), "plain", utf8)  # type: ignore[arg-type]  # typeshed knows only names here
    subject = f"callbackq: callback {status.id!r} could not be delivered"
    # A mail program would decode an id that looks like an encoded word (RFC 2047).
    is_plain = subject.isascii() and "=?" not in subject
    message["Subject"] = Header(subject, "us-ascii" if is_plain else "utf-8", header_name="Subject").encode()
    message["From"] = sender
    message["To"] = status.request.notification_email_address
    message["Date"] = format_datetime(date)
    message["Message-ID"] = _message_id(status, sender)
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834, section 5: no automatic answers
    return message.as_bytes(policy=policy.compat32.clone(linesep="\r\n", max_line_length=998))


def _message_id(status: CallbackStatus, sender: str) -> str:
    # The same for a second e-mail about one failure; another one when it is redelivered and fails again, which takes
    # a lock with a new token. Hashed, since an id may hold what a Message-ID can't.
    token = max((lock.token for lock in status.locks), default=0)
    digest = hashlib.sha256(f"{status.id}\n{token}".encode()).hexdigest()[:32]
    return f"<callbackq.{digest}@{sender.rpartition('@')[2]}>"


def _text(status: CallbackStatus) -> str:
    return "\n".join(
        [
            "A callback could not be delivered.",
            "",
            *(f"{name + ':':<15}{value}" for name, value in _facts(status)),
            "",
            *_advice(status),
            "",
            "This address was stored with the callback as its notification_email_address.",
            "",
        ]
    )


def _facts(status: CallbackStatus) -> Iterator[tuple[str, str]]:
    request = status.request
    yield "Callback", repr(status.id)
    yield "Queue", f"{status.queue_id!r}, number {status.sequence}" if status.queue_id else "one of its own"
    yield "Application", repr(request.application_id) if request.application_id else "not named"
    yield "Request", f"{request.method} {request.target.origin}"
    if status.failed_reason is not None:
        yield "Reason", f"{status.failed_reason.value}: {_REASONS[status.failed_reason]}"
    yield "Attempts", str(len(status.attempts))
    if status.attempts:
        first, last = status.attempts[0], status.attempts[-1]
        yield "First attempt", _instant(first.time)
        yield "Last attempt", _instant(last.time)
        yield "Last answer", f"none ({_cause(last)})" if last.failure else f"status {last.status_code}"


def _cause(attempt: CallbackAttempt) -> str:
    if attempt.failure is None:
        raise AssertionError
    # Why a target was refused is for operators: whoever chooses URLs and addresses of e-mails could learn from it
    # what names inside the network lead to.
    if not attempt.detail or attempt.failure is AttemptFailure.TARGET_NOT_ALLOWED:
        return attempt.failure.value
    return f"{attempt.failure.value}: {attempt.detail}"


def _advice(status: CallbackStatus) -> Iterator[str]:
    if status.state is not CallbackState.FAILED:
        yield f"Since then somebody has taken it up again. Its state is now: {status.state.value}."
        return
    is_held = bool(status.queue_id) and status.request.on_exhausted == "hold"
    if is_held:
        yield "Its queue is held: the callbacks behind it wait until this one is redelivered, skipped or cancelled."
    elif status.queue_id:
        yield "Its queue goes on with the callbacks behind it."
    yield f"To try it again:  data_access.request_transition({status.id!r}, Action.REDELIVER)"
    if is_held:
        yield f"To go on without: data_access.request_transition({status.id!r}, Action.SKIP)"


def _instant(value: datetime) -> str:
    return value.isoformat(sep=" ", timespec="seconds")
