"""Stand-ins for the world: a clock that stands still, a transport that follows a script, a notifier that remembers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from math import ceil

from callbackq.core.delivery import Answer, Delivery, Outcome
from callbackq.core.models import AttemptFailure, CallbackData
from callbackq.notifier import STANDARD_INTERVAL, FailureNotice

__all__ = ["FakeClock", "RecordingNotifier", "ScriptedTransport"]


class FakeClock:
    """
    A clock that moves only when told to.

    Wall time and monotonic time move together with `advance`; `step_wall` moves wall time alone, `reboot` starts
    a new boot. Safe to use from several threads.
    """

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._wall = start
        self._microseconds = 1_000_000_000
        self._boot = 1
        self._mutex = threading.Lock()

    def now(self) -> datetime:
        return self._wall

    def monotonic(self) -> float:
        return self._microseconds / 1e6

    def boot_id(self) -> str:
        return f"boot-{self._boot}"

    def advance(self, by: timedelta | float) -> None:
        """Let time pass: a timedelta, or seconds, rounded up to a microsecond."""
        delta = by if isinstance(by, timedelta) else timedelta(microseconds=ceil(by * 1e6))
        with self._mutex:
            self._wall += delta
            self._microseconds += delta // timedelta(microseconds=1)

    def step_wall(self, by: timedelta) -> None:
        """Set the wall clock, as an operator or a time server does; monotonic time doesn't notice."""
        with self._mutex:
            self._wall += by

    def reboot(self) -> None:
        """Start a new boot: the monotonic clock begins again, wall time goes on."""
        with self._mutex:
            self._boot += 1
            self._microseconds = 1_000_000


class ScriptedTransport:
    """
    A transport that sends nothing and answers from a script.

    Args:
        script: what to answer to successive requests: a status code, an `AttemptFailure`, an outcome, or a
            function from delivery to one of these. When it is used up, everything is answered with *default*.
        default: the answer after the script.
        deadline: what to tell the dispatcher.
        clock: where the attempts' times come from.
    """

    def __init__(
        self,
        script: Iterable[int | AttemptFailure | Outcome | Callable[[Delivery], int | AttemptFailure | Outcome]] = (),
        *,
        default: int | AttemptFailure | Outcome | Callable[[Delivery], int | AttemptFailure | Outcome] = 200,
        deadline: timedelta = timedelta(seconds=15),
        clock: FakeClock | None = None,
    ) -> None:
        self.deadline = deadline
        self.deliveries: list[Delivery] = []
        """Every delivery so far, in the order in which they were sent."""
        self._script = list(script)
        self._default = default
        self._clock = clock or FakeClock()
        self._mutex = threading.Lock()

    def send(self, delivery: Delivery) -> Outcome:
        with self._mutex:
            self.deliveries.append(delivery)
            step = self._script.pop(0) if self._script else self._default
        answer = step(delivery) if callable(step) else step
        if isinstance(answer, int):
            return Answer(status_code=answer, time=self._clock.now(), duration=timedelta(0))
        if isinstance(answer, AttemptFailure):
            return Answer(
                status_code=0, response=CallbackData(), time=self._clock.now(), duration=timedelta(0), failure=answer
            )
        return answer

    def close(self) -> None:
        """Nothing to give back."""


class RecordingNotifier:
    """
    A notifier that sends nothing and keeps what it was given.

    Args:
        fail: how many of the first calls raise `ConnectionError`.
        interval: how long an address is left alone about a queue after it was told something.
    """

    def __init__(self, *, fail: int = 0, interval: timedelta = STANDARD_INTERVAL) -> None:
        self.notified: list[FailureNotice] = []
        """Every notice that was accepted so far."""
        self.interval = interval
        self._fail = fail

    def notify(self, notice: FailureNotice) -> None:
        if self._fail > 0:
            self._fail -= 1
            raise ConnectionError("the mail server can't be reached")
        self.notified.append(notice)
