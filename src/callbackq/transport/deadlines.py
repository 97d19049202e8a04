"""When each attempt is to be woken, whatever its receiver does: one heap of clock readings."""

from __future__ import annotations

import heapq
import itertools
from typing import Final, Generic, TypeVar

__all__ = ["Deadlines"]

T = TypeVar("T")
_SMALL: Final = 64


class Deadlines(Generic[T]):
    """One deadline for each of many things. Belongs to one thread."""

    def __init__(self) -> None:
        # Entries are never taken out of the middle of the heap. One is good while it is its owner's latest; the
        # number tells entries of one instant apart, so that owners need no order.
        self._heap: list[tuple[float, int, T]] = []
        self._latest: dict[T, int] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """How many entries are held, those included that nobody waits for any more."""
        return len(self._heap)

    def set(self, owner: T, at: float) -> None:
        """Give *owner* a deadline, in place of the one it may have."""
        number = next(self._numbers)
        self._latest[owner] = number
        heapq.heappush(self._heap, (at, number, owner))

    def clear(self, owner: T) -> None:
        """Take *owner*'s deadline away."""
        self._latest.pop(owner, None)
        # Most attempts end long before their deadline. Without this the heap would hold all requests of the last
        # fifteen seconds, bodies included.
        if len(self._heap) > 2 * len(self._latest) + _SMALL:
            self._heap = [entry for entry in self._heap if self._is_good(entry)]
            heapq.heapify(self._heap)

    def next(self) -> float | None:
        """Return the earliest deadline; ``None`` without any."""
        while self._heap and not self._is_good(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_passed(self, now: float) -> list[T]:
        """Take out the deadlines that have passed; return whose they were, earliest first."""
        passed = []
        while (at := self.next()) is not None and at <= now:
            owner = heapq.heappop(self._heap)[2]
            del self._latest[owner]
            passed.append(owner)
        return passed

    def _is_good(self, entry: tuple[float, int, T]) -> bool:
        return self._latest.get(entry[2]) == entry[1]
