"""What a host chose for its dispatcher, checked when the dispatcher is built."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from attrs import Factory, asdict, field, frozen

from callbackq.core.planning import margin_of
from callbackq.core.validation import Fault, check_text, refuse
from callbackq.core.verdict import ResponsePolicy

__all__ = ["Settings", "check_collaborator"]

_LONGEST: Final = timedelta(days=1)
# What a lock must leave for an attempt, however short its deadline: look-up, connection and a moment at the store.
_LEAST_LIFE: Final = timedelta(seconds=1)


@frozen(kw_only=True)
class Settings:
    """
    A dispatcher's numbers and durations; `callbackq.Dispatcher` says what each means.

    Attributes:
        deadline: the transport's.
        under_way: how many requests can be at a time: as many as there are slots, or fewer where each takes a thread.

    Raises:
        InvalidRequestError: with every setting that is of another type or impossible.
    """

    machine_name: str
    concurrency: int
    host_concurrency: int
    lock_timeout: timedelta
    poll_interval: timedelta
    max_abandoned: int
    retry_jitter: float
    response_policy: ResponsePolicy
    deadline: timedelta
    under_way: int = field(default=Factory(lambda self: self.concurrency, takes_self=True))

    def __attrs_post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[Fault]:
        # By name, and as objects: whatever the annotations say, a host may have given anything.
        given: dict[str, object] = asdict(self, recurse=False)
        for _, reason in check_text(given["machine_name"]):
            yield "machine_name", reason
        for name in ("concurrency", "host_concurrency", "max_abandoned"):
            number = given[name]
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                yield name, "must be a whole number, at least 1"
        for name in ("lock_timeout", "poll_interval"):
            duration = given[name]
            if not isinstance(duration, timedelta) or not timedelta(0) < duration <= _LONGEST:
                yield name, f"must be a timedelta, longer than nothing and at most {_LONGEST}"
        jitter = given["retry_jitter"]
        if not isinstance(jitter, (int, float)) or isinstance(jitter, bool) or not 0 <= jitter <= 1:
            yield "retry_jitter", "must be a number from 0 to 1"
        if not isinstance(given["response_policy"], ResponsePolicy):
            yield "response_policy", "must be a ResponsePolicy"
        yield from _times_that_fit(given["lock_timeout"], given["deadline"])


def _times_that_fit(lock_timeout: object, deadline: object) -> Iterator[Fault]:
    if not isinstance(deadline, timedelta) or not timedelta(0) < deadline:
        yield "transport", "must have a deadline, a timedelta longer than nothing"
    elif isinstance(lock_timeout, timedelta) and lock_timeout - margin_of(lock_timeout) < max(deadline, _LEAST_LIFE):
        # A lock could time out while its request is under way, and the callback would be sent twice.
        needs = "must be as long as the transport's deadline (1 s at least) and a margin of 2 s or a tenth of it"
        yield "lock_timeout", f"{needs}, whichever is longer; the deadline is {deadline.total_seconds():g} s"


def check_collaborator(name: str, given: object, *methods: str) -> Iterator[Fault]:
    """Judge whether *given* can play its part: a Protocol says what it must have, but not at run time."""
    missing = [method for method in methods if not callable(getattr(given, method, None))]
    if missing or isinstance(given, type):
        yield name, f"must be an object with {', '.join(f'{method}()' for method in methods)}"
