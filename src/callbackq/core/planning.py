"""What a dispatcher does next, and how long it may rest. Plain numbers in, plain numbers out."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from attrs import frozen

__all__ = ["Plan", "backoff", "margin_of", "plan"]

_LEAST_MARGIN: Final = timedelta(seconds=2)


@frozen(kw_only=True)
class Plan:
    """
    A dispatcher's next step.

    Attributes:
        acquire: how many locks to ask the store for now; 0 for none.
        wait: seconds to rest unless something happens first.
    """

    acquire: int
    wait: float


def plan(
    *,
    free_slots: int,
    seconds_to_look: float,
    poll_interval: float,
    paused_for: float,
    draining: bool,
) -> Plan:
    """
    Decide the next step.

    Args:
        free_slots: how many more requests may be under way.
        seconds_to_look: until the store may have something due; 0 or less for now.
        poll_interval: the longest rest, for work that comes without a hint.
        paused_for: seconds until a fault (of the store, or of this machine) allows another try; 0 for none.
        draining: no new locks: the dispatcher is stopping.
    """
    if paused_for > 0:
        return Plan(acquire=0, wait=min(poll_interval, paused_for))
    if free_slots <= 0 or draining:
        return Plan(acquire=0, wait=poll_interval)
    if seconds_to_look > 0:
        return Plan(acquire=0, wait=min(poll_interval, seconds_to_look))
    return Plan(acquire=free_slots, wait=0.0)


def backoff(failures: int, *, first: float, longest: float, random: float) -> float:
    """
    How long to rest after so many failures in a row, in seconds.

    Doubles each time up to *longest*; chance takes off up to half, so that many machines don't come back in step.
    """
    full = min(first * 2.0 ** min(failures - 1, 32), longest)
    return full * (1 - random / 2)


def margin_of(lock_timeout: timedelta) -> timedelta:
    """The end of a lock's life that is kept free for recording: 2 seconds or a tenth of it, whichever is longer."""
    return max(_LEAST_MARGIN, lock_timeout / 10)
