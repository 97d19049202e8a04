"""What an answer means for its callback."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import Enum
from typing import Any

from attrs import field, frozen

from callbackq.core import validation as v

__all__ = ["ResponsePolicy", "Verdict"]


class Verdict(Enum):
    """What follows from an attempt."""

    DELIVERED = "delivered"
    RETRY = "retry"
    REFUSED = "refused"


def _to_statuses(value: Collection[int]) -> Any:
    # What can't be a set of numbers passes through, so that the check can name it.
    if isinstance(value, (str, bytes)):
        return value
    try:
        return frozenset(value)
    except TypeError:
        return value


def _is_final_status(value: object) -> bool:
    return isinstance(value, int) and 300 <= value <= 599


@frozen(kw_only=True)
class ResponsePolicy:
    """
    Which answers count as delivered, retryable, final.

    2xx is delivered, always (Standard Webhooks). Everything else follows the request's retry phases,
    except the final statuses, which end it at once.

    Attributes:
        final_statuses: statuses after which no retry makes sense. Default: 410 Gone.
        honour_retry_after: whether a Retry-After field may move the next attempt later.

    Raises:
        InvalidRequestError: a final status is not from 300 to 599.
    """

    final_statuses: frozenset[int] = field(default=frozenset({410}), converter=_to_statuses)
    honour_retry_after: bool = True

    def __attrs_post_init__(self) -> None:
        v.refuse(self._faults())

    def _faults(self) -> Iterator[v.Fault]:
        if not isinstance(self.final_statuses, frozenset) or not all(map(_is_final_status, self.final_statuses)):
            yield "final_statuses", "must be whole numbers from 300 to 599: 2xx is always a delivery"
        for path, reason in v.check_bool(self.honour_retry_after):
            yield f"honour_retry_after{path}", reason

    def judge(self, status_code: int) -> Verdict:
        """Judge an answer's status; 0 stands for no answer."""
        if 200 <= status_code <= 299:
            return Verdict.DELIVERED
        if status_code in self.final_statuses:
            return Verdict.REFUSED
        return Verdict.RETRY
