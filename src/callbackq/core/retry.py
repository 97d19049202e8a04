"""When the next attempt is due: retry phases, Retry-After, jitter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

from callbackq.core.models import RetryPhase

__all__ = ["attempts_allowed", "delay_before_retry", "parse_retry_after", "postpone"]

_LEAST_RETRY_AFTER_CAP: Final = timedelta(hours=1)
_GREATEST_RETRY_AFTER: Final = timedelta(hours=24)
_SECONDS = re.compile(r"[0-9]{1,18}")


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
        How long to wait from *now*, never negative; ``None`` when it can't be read. An absurdly large
        number gives the longest wait that can be asked for.
    """
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return timedelta(seconds=min(int(value), int(_GREATEST_RETRY_AFTER.total_seconds())))
    try:
        date = parsedate_to_datetime(value)
        # "-0000" gives a naive date; an HTTP date is always GMT.
        return max(date.replace(tzinfo=date.tzinfo or UTC) - now, timedelta(0))
    except (ValueError, OverflowError):
        return None


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
