"""What a dispatcher does next, and how long it may rest. Plain numbers in, plain numbers out."""

from __future__ import annotations

from attrs import frozen

__all__ = ["Plan", "backoff", "plan"]


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
    pending_records: int,
    seconds_to_next_due: float | None,
    poll_interval: float,
    paused_for: float,
    draining: bool,
) -> Plan:
    """
    Decide the next step.

    Args:
        free_slots: how many more requests may be under way.
        pending_records: results that the store has not taken yet.
        seconds_to_next_due: when the store's next callback or expired lock is due, 0 or less for now; ``None``
            when it has none.
        poll_interval: the longest rest: work stored by others may come without a hint.
        paused_for: seconds until a fault (of the store, or of this machine) allows another try; 0 for none.
        draining: no new locks: the dispatcher is stopping.
    """
    # While a result can't be written, taking more locks would only make more results that can't be written.
    may_acquire = free_slots > 0 and not draining and paused_for <= 0 and pending_records == 0
    if may_acquire and seconds_to_next_due is not None and seconds_to_next_due <= 0:
        return Plan(acquire=free_slots, wait=0.0)
    wait = poll_interval
    if paused_for > 0:
        wait = min(wait, paused_for)
    elif may_acquire and seconds_to_next_due is not None:
        wait = min(wait, seconds_to_next_due)
    return Plan(acquire=0, wait=wait)


def backoff(failures: int, *, first: float, longest: float, random: float) -> float:
    """
    How long to rest after so many failures in a row, in seconds.

    Doubles each time up to *longest*; chance takes off up to half, so that many machines don't come back in step.
    """
    full = min(first * 2.0 ** min(failures - 1, 32), longest)
    return full * (1 - random / 2)
