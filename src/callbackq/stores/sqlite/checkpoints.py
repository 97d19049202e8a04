"""When to copy what was written ahead into the database: often enough for a short log, rarely enough to be cheap."""

from __future__ import annotations

from typing import Final

__all__ = ["CheckpointSchedule"]

_PAGES: Final = 1000
_GROWTH_BYTES: Final = 4 * 1024 * 1024
_FEWEST_CHANGES: Final = 1
_FIRST_CHANGES: Final = 200
_MOST_CHANGES: Final = 50_000


class CheckpointSchedule:
    """
    Decide by what can be seen.

    SQLite doesn't tell how many pages have been written ahead. This goes by the number of changed rows that made a
    thousand pages the last time, and by the file's growth, which huge bodies cause.
    """

    def __init__(self) -> None:
        self._changes = 0
        self._wal_bytes = 0
        self._interval = _FIRST_CHANGES

    def is_due(self, changes: int, wal_bytes: int) -> bool:
        """
        Tell whether the log has grown long.

        Args:
            changes: rows that the write connection has changed since it was opened.
            wal_bytes: the size of the log's file.
        """
        return changes - self._changes >= self._interval or wal_bytes - self._wal_bytes >= _GROWTH_BYTES

    def is_worth_it_when_idle(self, changes: int) -> bool:
        """Tell whether it would soon be due, and hold up somebody's write then."""
        return changes - self._changes > self._interval // 4

    def done(self, changes: int, wal_bytes: int, pages: int) -> None:
        """Learn from a checkpoint that found so many pages."""
        interval = (changes - self._changes) * _PAGES // max(pages, 1)
        self._interval = min(max(interval, _FEWEST_CHANGES), _MOST_CHANGES)
        self.put_off(changes, wal_bytes)

    def put_off(self, changes: int, wal_bytes: int) -> None:
        """Try again after as many changes."""
        self._changes = changes
        self._wal_bytes = wal_bytes
