"""One of the stores: how it fares, and for how long it is left alone after a fault."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final, TypeVar

from callbackq.clock import Clock
from callbackq.core.planning import backoff
from callbackq.dataaccess import DataAccess
from callbackq.errors import TransientDataAccessError

__all__ = ["Shard"]

_LOG = logging.getLogger("callbackq.stores")

_FIRST_REST_SECONDS: Final = 0.25
_LONGEST_REST_SECONDS: Final = 30.0
# A call that took long to fail held up all other shards. With this, such faults take about a third of the time.
_REST_PER_SECOND_OF_FAULT: Final = 2.0
_LONGEST_REST_AFTER_SLOW_FAULT_SECONDS: Final = 60.0
# A dispatcher's results can't wait as long, since their locks time out: at first for a turn of the other shards, whose
# results are written in it. It doubles with each fault in a row, up to as long as the fault took.
_FIRST_RESULTS_REST_SECONDS: Final = 1.0
# A store that comes and goes must not flood the log.
_SECONDS_BETWEEN_LINES: Final = 60.0

_T = TypeVar("_T")


class Shard:
    """
    A store and its state in this object.

    Threads may race on the state. Then a rest ends early or late, and nothing else is decided by it; so there is no
    mutex that a fork would have to care for.

    Args:
        number: its place in the list, from 0.
        count: how many there are.
        store: the store.
        clock: what rests are measured with.
    """

    def __init__(self, number: int, count: int, store: DataAccess, clock: Clock) -> None:
        self.number = number
        self.store = store
        self.name = f"shard {number} of {count}"
        self._clock = clock
        self._failures = 0
        self._failing_call = ""
        self._rests_until = float("-inf")
        self._results_rest_until = float("-inf")
        self._results_failures = 0
        self._is_outage_told = False
        self._next_line_at: dict[str, float] = {}

    @property
    def is_resting(self) -> bool:
        """Whether it failed lately and is to be left alone."""
        return self._clock.monotonic() < self._rests_until

    def ask(self, call: Callable[[], _T], *, name: str, ended_by: str = "") -> _T:
        """
        Make a call on behalf of all shards, and note how it fared.

        A fault begins a rest, longer with each in a row, and any success ends it. Only the same call, or the one named
        by *ended_by*, can end the outage: a store that can't be written to may still be read.
        """
        began = self._clock.monotonic()
        try:
            result = call()
        except Exception as error:
            self._rest()
            self._rest_from_slow_fault(began)
            self._failing_call = ended_by or name
            if not self._is_outage_told and self._may_tell("outage"):
                self._is_outage_told = True
                _LOG.error("%s fails and is left alone for a while; the others go on", self.name, exc_info=error)
            raise
        self._end_rests()
        if name == self._failing_call:
            self._recover()
        return result

    def ask_for_results(self, call: Callable[[], _T]) -> _T:
        """
        Make one of the calls that a dispatcher repeats until they succeed.

        One that took long to fail held up the results for other shards. It isn't repeated until they had their turn.
        """
        began = self._clock.monotonic()
        if began < self._results_rest_until:
            raise TransientDataAccessError(f"{self.name} took long to fail just now; it is asked again in a moment")
        try:
            result = call()
        except Exception:
            self._results_failures += 1
            self._rest_from_slow_fault(began)
            raise
        self._results_failures = 0
        self._end_rests()
        return result

    def look(self) -> tuple[datetime | None, datetime]:
        """When something is next due here, and the present time, both by this store's own clock."""
        return self.ask(lambda: (self.store.next_due(), self.store.now()), name="next_due")

    def overdue(self) -> timedelta:
        """For how long something has been due here. Negative: nothing is."""
        due, now = self.look()
        return timedelta.min if due is None else now - due

    def tell_of_strangers(self, count: int) -> None:
        """Log that callbacks lie here that belong elsewhere."""
        if self._may_tell("strangers"):
            _LOG.error(
                "%s holds callbacks that belong to other shards; %d were put off just now. Were the stores listed in "
                "another order or number before? List them as they were, or deliver what is open in each by itself",
                self.name,
                count,
            )

    def _rest(self) -> None:
        self._failures += 1
        rest = backoff(
            self._failures,
            first=_FIRST_REST_SECONDS,
            longest=_LONGEST_REST_SECONDS,
            random=random.random(),  # noqa: S311 - no secret
        )
        self._rests_until = self._clock.monotonic() + rest

    def _rest_from_slow_fault(self, began: float) -> None:
        # From calls of both kinds: whoever met the one would be held up by the other right after.
        now = self._clock.monotonic()
        took = now - began
        rest = min(took * _REST_PER_SECOND_OF_FAULT, _LONGEST_REST_AFTER_SLOW_FAULT_SECONDS)
        self._rests_until = max(self._rests_until, now + rest)
        rest = min(took, _FIRST_RESULTS_REST_SECONDS * 2.0 ** min(max(self._results_failures - 1, 0), 32))
        self._results_rest_until = max(self._results_rest_until, now + rest)

    def _end_rests(self) -> None:
        self._rests_until = self._results_rest_until = float("-inf")

    def _recover(self) -> None:
        self._failures = 0
        self._failing_call = ""
        if self._is_outage_told:
            self._is_outage_told = False
            _LOG.warning("%s works again", self.name)

    def _may_tell(self, what: str) -> bool:
        now = self._clock.monotonic()
        if now < self._next_line_at.get(what, float("-inf")):
            return False
        self._next_line_at[what] = now + _SECONDS_BETWEEN_LINES
        return True
