"""Things by the time they are due, for a store in memory."""

from __future__ import annotations

from datetime import datetime
from heapq import heapify, heappop, heappush
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Agenda", "Dated", "Entry"]


class Dated(Protocol):
    """What can stand in an agenda, in one at a time. It keeps its entry, and does nothing with it."""

    entry: Entry | None


Entry = list[Any]
"""When it is due, the order of entering among equals, and the thing itself, or ``None`` when it has left."""

_Item = TypeVar("_Item", bound=Dated)


class Agenda(Generic[_Item]):
    """
    A heap of things by the time they are due, those put in first before others of the same time.

    Finding an entry in the middle of a heap would mean to walk over it. So what moves or leaves empties its entry,
    which stays until it comes to the top, or until more than half of them are empty.
    """

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._entered = 0
        self._inside = 0

    def put(self, item: _Item, due: datetime) -> None:
        """Put in, or move."""
        self.remove(item)
        self._entered += 1
        item.entry = [due, self._entered, item]
        heappush(self._heap, item.entry)
        self._inside += 1

    def remove(self, item: _Item) -> None:
        """Take out, if it is in."""
        if item.entry is None:
            return
        item.entry[2] = None
        item.entry = None
        self._inside -= 1
        if len(self._heap) > 2 * self._inside + 64:
            self._heap = [entry for entry in self._heap if entry[2] is not None]
            heapify(self._heap)

    def first(self) -> datetime | None:
        """When the first one is due."""
        while self._heap and self._heap[0][2] is None:
            heappop(self._heap)
        due: datetime | None = self._heap[0][0] if self._heap else None
        return due

    def pop_due(self, now: datetime) -> _Item | None:
        """Take out the one that has been due for longest."""
        due = self.first()
        if due is None or due > now:
            return None
        item: _Item = heappop(self._heap)[2]
        item.entry = None
        self._inside -= 1
        return item
