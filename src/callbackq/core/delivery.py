"""
What a dispatcher hands to a transport, and what it gets back.

An attempt has exactly one outcome: an `Answer` (which may be "no answer, and why"), or `NotSent`, which says
that no byte of the request left this machine and that nothing about the receiver is known.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from enum import Enum

from attrs import field, frozen

from callbackq.core.models import AttemptFailure, CallbackData, CallbackRequest
from callbackq.core.validation import MAX_DETAIL_LENGTH

__all__ = ["Answer", "Delivery", "NotSent", "NotSentReason", "Outcome"]

_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


def _fit_for_a_record(detail: str) -> str:
    # A transport of the host's may say anything here; that must not cost the answer.
    return _UNPRINTABLE.sub("?", detail[:MAX_DETAIL_LENGTH])


@frozen(kw_only=True, eq=False)
class Delivery:
    """
    One attempt to be made.

    Attributes:
        callback_id: goes out as ``webhook-id``.
        request: what to send.
        sequence: the callback's number in its queue.
        attempt: the number of this attempt, from 1, since the callback was stored or redelivered.
        token: the fencing token of the lock under which it is sent.
        ends_at: reading of the clock's ``monotonic()`` at which the attempt must be over, whatever happened.
            The transport's own deadline ends it earlier as a rule. When there is no useful time left before
            the first byte goes out, nothing is sent.
    """

    callback_id: str
    request: CallbackRequest
    sequence: int
    attempt: int
    token: int
    ends_at: float


@frozen(kw_only=True)
class Answer:
    """
    What came of a request that was sent, or that the receiver's side kept from being sent.

    Attributes:
        status_code: the status of a complete answer head; 0 when there was none.
        response: its headers and the body as far as it was read, raw.
        time: wall time at which the attempt began.
        duration: until the answer was complete, or given up.
        failure: why there was no answer; ``None`` when there was one.
        truncated: the body was longer than the transport's limit, or broke off.
        detail: the cause of *failure* or *truncated* in a few words, for the record, the log and the e-mail about a
            final failure: none of the receiver's, nor of the URL, a header or a body. Cut to 120 characters; what is
            no visible ASCII becomes a question mark.
    """

    status_code: int
    response: CallbackData = field(factory=CallbackData)
    time: datetime
    duration: timedelta
    failure: AttemptFailure | None = None
    truncated: bool = False
    detail: str = field(default="", converter=_fit_for_a_record)


class NotSentReason(Enum):
    """Why nothing was sent. None of these says anything about the receiver, so none is an attempt."""

    TIME_IS_UP = "time is up"
    """The lock would not have lasted."""
    STOPPED = "stopped"
    """The transport was asked to stop before the request began."""
    LOCAL_FAULT = "local fault"
    """
    This machine has no descriptors, memory or ports left, or can't reach its operator's proxy: rest before trying
    anything else.
    """
    NO_SECRETS = "no secrets"
    """
    The secrets of this callback are out of reach for the moment, which says nothing about those of others: it alone
    waits, for 15 to 30 seconds.
    """


@frozen(kw_only=True)
class NotSent:
    """
    No byte of the request left this machine.

    Attributes:
        reason: why.
        detail: words for the log, kept to the rules of `Answer.detail`.
    """

    reason: NotSentReason
    detail: str = field(default="", converter=_fit_for_a_record)


Outcome = Answer | NotSent
