"""What an answer means for its callback."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from attrs import field, frozen

from callbackq.errors import InvalidRequestError

__all__ = ["ResponsePolicy", "Verdict"]


class Verdict(Enum):
    """What follows from an attempt."""

    DELIVERED = "delivered"
    RETRY = "retry"
    REFUSED = "refused"


def _to_frozenset(value: Collection[int]) -> frozenset[int]:
    return frozenset(value)


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

    final_statuses: frozenset[int] = field(default=frozenset({410}), converter=_to_frozenset)
    honour_retry_after: bool = True

    def __attrs_post_init__(self) -> None:
        if any(not 300 <= status <= 599 for status in self.final_statuses):
            raise InvalidRequestError([("final_statuses", "must be from 300 to 599: 2xx is always a delivery")])

    def judge(self, status_code: int) -> Verdict:
        """Judge an answer's status; 0 stands for no answer."""
        if 200 <= status_code <= 299:
            return Verdict.DELIVERED
        if status_code in self.final_statuses:
            return Verdict.REFUSED
        return Verdict.RETRY
