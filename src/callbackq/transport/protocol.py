"""The seam between dispatcher and transport."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Protocol, runtime_checkable

from callbackq.core.delivery import Delivery, Outcome

__all__ = ["SupportsSubmit", "Transport"]


class Transport(Protocol):
    """
    Sends one request and reads its answer.

    Attributes:
        deadline: the longest time one attempt takes, everything included. The dispatcher refuses to be built
            when it doesn't fit into the lock timeout.
    """

    deadline: timedelta

    @abstractmethod
    def send(self, delivery: Delivery) -> Outcome:
        """
        Make one attempt, blocking.

        * Never takes longer than `deadline`, nor past ``delivery.ends_at``.
        * Sends the request once: no redirects, no retries of its own.
        * Doesn't raise: what goes wrong is an `Answer` with a failure, or `NotSent`. (The dispatcher survives
          an exception and records it as an attempt that failed with ``internal``.)
        """
        ...

    @abstractmethod
    def close(self) -> None:
        """End all connections and threads. Idempotent; the next `send` starts anew."""
        ...


@runtime_checkable
class SupportsSubmit(Protocol):
    """
    The transport has many requests in flight at a time without a thread for each.

    A dispatcher runs transports without this ability on a pool of threads.
    """

    @abstractmethod
    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        """
        Begin an attempt and return at once.

        *done* is called exactly once, from any thread, with what `Transport.send` would have returned. It must
        not block or raise. When this machine can't even begin, it may be called before this method returns.
        """
        ...

    @abstractmethod
    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        """
        End these attempts at once.

        Those that have not begun to send are `NotSent` (stopped), the others answers with the failure
        ``interrupted``, except when the head of their answer is complete already: then its status is known, and
        stands. *done* is called for each soon after. An attempt that can't be ended from outside goes on, and its
        *done* is called when it is over.
        """
        ...
