"""Deliveries to hand to a transport, and a place to collect what comes of them."""

from __future__ import annotations

import itertools
import threading
from typing import Literal

from callbackq.clock import SystemClock
from callbackq.core.delivery import Answer, Delivery, NotSent, Outcome
from callbackq.core.models import CallbackData, CallbackRequest

__all__ = ["Outcomes", "make_delivery", "seconds_from_now"]

_numbers = itertools.count(1)


def seconds_from_now(seconds: float) -> float:
    """A reading of the system's clock, for `Delivery.ends_at`."""
    return SystemClock().monotonic() + seconds


def make_delivery(
    url: str,
    *,
    method: Literal["GET", "POST", "PUT"] = "POST",
    headers: dict[str, str] | None = None,
    data: bytes | None = b"{}",
    queue_id: str = "",
    application_id: str = "",
    ends_in: float = 60.0,
) -> Delivery:
    """A first attempt, with a new id."""
    number = next(_numbers)
    return Delivery(
        callback_id=f"callback-{number}",
        request=CallbackRequest(
            url=url,
            method=method,
            post_data=CallbackData(headers=headers or {}, data=data),
            queue_id=queue_id,
            application_id=application_id,
        ),
        sequence=7,
        attempt=2,
        token=3,
        ends_at=seconds_from_now(ends_in),
    )


class Outcomes:
    """Collects outcomes from any thread. Each is a `done` callback's argument."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._outcomes: list[Outcome] = []

    def __call__(self, outcome: Outcome) -> None:
        with self._changed:
            self._outcomes.append(outcome)
            self._changed.notify_all()

    def wait_for(self, count: int, *, seconds: float = 20.0) -> list[Outcome]:
        """Wait until there are so many; return all."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._outcomes) >= count, seconds), (
                f"{len(self._outcomes)} of {count} outcomes after {seconds} s"
            )
            return list(self._outcomes)

    def answers(self, count: int) -> list[Answer]:
        outcomes = self.wait_for(count)
        assert all(isinstance(outcome, Answer) for outcome in outcomes), outcomes
        return [outcome for outcome in outcomes if isinstance(outcome, Answer)]

    def not_sent(self, count: int) -> list[NotSent]:
        outcomes = self.wait_for(count)
        assert all(isinstance(outcome, NotSent) for outcome in outcomes), outcomes
        return [outcome for outcome in outcomes if isinstance(outcome, NotSent)]
