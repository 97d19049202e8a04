"""
A dispatcher's stop as a step function: no thread, no waiting.

Nothing is begun any more, what has not been sent is given back, what is under way may end by itself until the stop's
time is up; then it is interrupted, and what came of that is recorded. Nothing here reaches a final state that a kill
would not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import frozen

from callbackq.clock import Clock
from callbackq.engine import Engine

__all__ = ["Drain", "StopReport"]

# After requests were interrupted, how long their outcomes may take to be recorded.
_INTERRUPT_GRACE_SECONDS: Final = 2.0
# How long to rest at most while they do.
_INTERRUPT_REST_SECONDS: Final = 0.1


@frozen(kw_only=True)
class StopReport:
    """
    What became of the callbacks a dispatcher held when it was stopped.

    Attributes:
        finished: attempts that ended by themselves during the stop, and were recorded.
        released: locks given back; nothing had been sent.
        interrupted: attempts that were ended by the stop, recorded and not counted as retries.
        unrecorded: callbacks of which nothing could be recorded: the store would not take it, or a request could
            not be ended. Their locks time out, and they are sent again.
    """

    finished: int
    released: int
    interrupted: int
    unrecorded: int


class Drain:
    """
    Brings an engine to rest.

    Args:
        engine: what works.
        clock: what the stop's time is measured by.
        grace: clock reading, in seconds, for the moment after an interruption. Outcomes of interrupted requests come
            from threads of the transport: they take real time, whatever *clock* says.
    """

    def __init__(self, engine: Engine, *, clock: Clock, grace: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._grace = grace
        self._has_begun = False
        self._gives_up_at: float | None = None
        self._is_giving_up = False
        recorder = engine.recorder
        self._before = (recorder.finished, recorder.released, recorder.interrupted)

    def step(self, stops_at: float) -> float | None:
        """
        Do what can be done now.

        Args:
            stops_at: clock reading at which requests under way are interrupted. It may change from step to step.

        Returns:
            Seconds after which it wants to be called again, unless something arrives first; ``None`` when it is over.
        """
        if not self._has_begun:
            # Whatever the time: what was not sent is given back, and what has ended already is recorded.
            self._has_begun = True
            self._engine.step(draining=True)
            return 0.0
        if not self._engine.busy:
            return None
        left = stops_at - self._clock.monotonic()
        if self._gives_up_at is None:
            if left > 0:
                return min(self._engine.step(draining=True), left)
            self._gives_up_at = self._grace() + _INTERRUPT_GRACE_SECONDS
            self._engine.interrupt()
        if self._grace() >= self._gives_up_at:
            return self._try_once_more()
        return min(self._engine.step(draining=True), _INTERRUPT_REST_SECONDS)

    def _try_once_more(self) -> float | None:
        """Go on only while the store takes something: it may work again, and what it refused be resting still."""
        if not self._is_giving_up:
            self._is_giving_up = True
            self._engine.recorder.end_rests(self._clock.monotonic())
        before = self._engine.busy
        self._engine.step(draining=True)
        return 0.0 if self._engine.busy < before else None

    def report(self) -> StopReport:
        """Say what has become of everything so far."""
        finished, released, interrupted = self._before
        recorder = self._engine.recorder
        return StopReport(
            finished=recorder.finished - finished,
            released=recorder.released - released,
            interrupted=recorder.interrupted - interrupted,
            unrecorded=self._engine.busy,
        )
