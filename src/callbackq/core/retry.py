"""When the next attempt is due: retry phases, Retry-After, jitter."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

from callbackq.core.models import RetryPhase

__all__ = ["attempts_allowed", "delay_before_retry", "parse_retry_after", "postpone"]

_LEAST_RETRY_AFTER_CAP: Final = timedelta(hours=1)
_GREATEST_RETRY_AFTER: Final = timedelta(hours=24)
# The longest HTTP date, "Wednesday, 09-Nov-94 08:49:37 GMT", has 34 characters.
_MAX_LENGTH: Final = 64


def attempts_allowed(phases: Sequence[RetryPhase]) -> int:
    """One, and every retry of every phase."""
    return 1 + sum(phase.retries for phase in phases)


def delay_before_retry(phases: Sequence[RetryPhase], retry: int) -> timedelta | None:
    """
    Find the delay that comes before a retry.

    Args:
        phases: the request's retry phases.
        retry: which retry, counted from 1.

    Returns:
        The delay of the phase the retry falls in; ``None`` when the phases are used up.
    """
    for phase in phases:
        if retry <= phase.retries:
            return phase.delay
        retry -= phase.retries
    return None


def parse_retry_after(value: str, now: datetime) -> timedelta | None:
    """
    Read a Retry-After field (RFC 9110, section 10.2.3): whole seconds or an HTTP date.

    Args:
        value: the field's value as the receiver sent it: hostile text.
        now: the time the answer came.

    Returns:
        How long to wait from *now*, never negative and at most 24 hours; ``None`` when it can't be read.
    """
    value = value.strip()
    if len(value) > _MAX_LENGTH or not value.isascii():
        return None
    if value.isdigit():
        return timedelta(seconds=min(int(value), _GREATEST_RETRY_AFTER.total_seconds()))
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    # An HTTP date is always GMT, also where it doesn't say so.
    wait = date.replace(tzinfo=UTC) - now if date.tzinfo is None else date - now
    return min(max(wait, timedelta(0)), _GREATEST_RETRY_AFTER)


def postpone(
    delay: timedelta, *, retry_after: timedelta | None = None, jitter: float = 0.0, random: float = 0.0
) -> timedelta:
    """
    Move a phase's delay later, never earlier.

    Args:
        delay: the phase's delay.
        retry_after: what the receiver asked for. Granted up to twice the phase's delay or an hour,
            whichever is longer, and never beyond 24 hours.
        jitter: the greatest share of the delay that chance may add, 0 to 1.
        random: a number from 0 to 1 that decides how much of it is added.
    """
    wait = delay
    if retry_after is not None:
        cap = min(max(2 * delay, _LEAST_RETRY_AFTER_CAP), _GREATEST_RETRY_AFTER)
        wait = max(delay, min(retry_after, cap))
    return wait + wait * (jitter * random)
