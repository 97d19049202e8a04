"""A store that can be kept from working, and tells what it was asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from callbackq.dataaccess import DataAccess
from callbackq.errors import DataAccessError
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock

_CALLS = {name for name in vars(DataAccess) if not name.startswith("_")} - {"close", "durability"} | {
    "acquire_notifications",
    "record_notification",
    "list_callbacks",
    "purge",
}


class FrailStore(InMemoryDataAccess):
    """
    The reference store, with a backend that may be down.

    Attributes:
        calls: the methods that were called, in this order.
        error: what every call raises; ``None`` while it works.
        takes: how long a call takes to fail.
        raises_after_writing: the call is carried out all the same.
    """

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.takes = timedelta(0)
        self.raises_after_writing = False
        self.fails_in = _CALLS

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in _CALLS:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if self.error is None or name not in self.fails_in:
                return found(*args, **kwargs)
            if self.raises_after_writing:
                found(*args, **kwargs)
            self._clock.advance(self.takes)  # type: ignore[attr-defined]
            raise self.error

        return call

    @contextmanager
    def down(
        self, error: Exception | None = None, *, takes: timedelta = timedelta(0), only: set[str] | None = None
    ) -> Iterator[None]:
        """Keep it from working while the block runs."""
        self.error, self.takes, self.fails_in = error or DataAccessError("gone"), takes, only or _CALLS
        try:
            yield
        finally:
            self.error = None
