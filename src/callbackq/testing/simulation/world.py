"""Virtual time, what happens in it, and who can be killed or stand still."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from math import ceil
from random import Random
from typing import Final, Literal

from attrs import frozen, mutable

from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.testing.simulation.scenario import Fault, FaultKind

__all__ = ["Actor", "Entry", "Killed", "MachineClock", "Strand", "World", "microseconds"]

_START: Final = datetime(2026, 1, 1, tzinfo=UTC)
# Whoever stands still inside a call does so on the stack of our own.
_DEEPEST: Final = 8
# Far more than any run needs; a dispatcher that spins meets it.
_MOST_EVENTS: Final = 30_000


class Killed(BaseException):
    """The process ends here. Nothing but the simulation catches it."""


@frozen
class Entry:
    """A line of the run's log: when, who, what, about which callback, and more."""

    at_us: int
    who: str
    what: str
    about: str = ""
    detail: str = ""

    def line(self) -> str:
        """Write it down."""
        return f"{self.at_us / 1e6:13.6f}  {self.who:<11} {self.what:<26} {self.about:<5} {self.detail}".rstrip()


def microseconds(seconds: float) -> int:
    """Turn seconds into whole microseconds, rounded up."""
    return ceil(seconds * 1e6)


class World:
    """
    The simulated world: one line of time, and a heap of what will happen.

    Attributes:
        now_us: the time since the run began.
        log: what has happened.
        counts: which faults and reactions took effect, and how often.
    """

    def __init__(self, random: Random) -> None:
        self.now_us = 0
        self.log: list[Entry] = []
        self.counts: Counter[str] = Counter()
        self.random = random
        self.is_over = False
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._depth = 0
        self._events = 0
        self.store_fails_until_us = 0
        self.disk_full_until_us = 0
        self.hints_lost_until_us = 0

    def at(self, us: int, happen: Callable[[], None]) -> None:
        """Let something happen at a time, after what was put in for that time before."""
        self._order += 1
        heappush(self._heap, (max(us, self.now_us), self._order, happen))

    def tell(self, who: str, what: str, about: str = "", detail: str = "") -> None:
        """Write a line into the log."""
        self.log.append(Entry(self.now_us, who, what, about, detail))

    def run_until(self, until_us: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, with all that happens in it."""
        while self._heap and self._heap[0][0] <= until_us and not self.is_over and not is_over():
            at_us, _, happen = heappop(self._heap)
            self.now_us = max(self.now_us, at_us)
            self._events += 1
            if self._events > _MOST_EVENTS:
                self.give_up()
                return
            happen()
        if not is_over():
            self.now_us = max(self.now_us, until_us)

    def give_up(self) -> None:
        """Let nothing more happen."""
        self.is_over = True

    @property
    def is_spinning(self) -> bool:
        """Whether so much happened that somebody must be going round in circles."""
        return self._events > _MOST_EVENTS

    def can_nest(self) -> bool:
        """Whether one more may stand still inside a call."""
        return self._depth < _DEEPEST

    def stand_still(self, until_us: Callable[[], int]) -> None:
        """Let the rest of the world go on while whoever calls this stands still."""
        self._depth += 1
        try:
            while (until := until_us()) > self.now_us and not self.is_over:
                self.run_until(until)
        finally:
            self._depth -= 1


class MachineClock:
    """
    A machine's clocks. Its monotonic clock began at some moment; its wall clock may be stepped.

    Args:
        world: whose time it shows.
        uptime_us: how long it had been up when the run began.
    """

    def __init__(self, world: World, uptime_us: int) -> None:
        self._world = world
        self._uptime_us = uptime_us
        self._boot = 1
        self.offset = timedelta(0)

    def now(self) -> datetime:
        return _START + timedelta(microseconds=self._world.now_us) + self.offset

    def monotonic(self) -> float:
        return (self._world.now_us + self._uptime_us) / 1e6

    def boot_id(self) -> str:
        return f"boot-{self._boot}"

    def us_at(self, reading: float) -> int:
        """Say when the monotonic clock shows a reading."""
        return round(reading * 1e6) - self._uptime_us

    def reboot(self) -> None:
        """Begin a new boot."""
        self._boot += 1
        self._uptime_us = 1_000_000 - self._world.now_us


class Actor:
    """
    A process: something that can be killed, can stand still, and meets faults at its calls.

    Args:
        world: where it lives.
        name: in the log.
        faults: those that strike at its calls, by time. What has struck is taken out.

    Attributes:
        is_dead: it does nothing any more: it was killed, or has stopped in order.
        was_killed: the first of both.
        is_stopping: it knows that it is to stop.
    """

    def __init__(self, world: World, name: str, faults: list[Fault]) -> None:
        self.world = world
        self.name = name
        self.is_dead = False
        self.was_killed = False
        self.is_stopping = False
        self.frozen_until_us = 0
        self._faults = faults
        self._hindered_us = 0
        self._store_failed_at_us: int | None = None
        self._pausing_since_us: int | None = None

    def reach(self, place: Literal["before", "after"], call: str, about: str = "") -> None:
        """
        Come to a boundary of store or transport.

        Raises:
            Killed: the process has ended.
            DataAccessError: the store fails here.
        """
        if self.is_dead:
            raise Killed
        if self.frozen_until_us > self.world.now_us and self.world.can_nest():
            self.world.stand_still(lambda: self.frozen_until_us)
        if self._faults and self._faults[0].at * 1e6 <= self.world.now_us and (fault := self._take(place, call)):
            self._suffer(fault, place, call, about)
        if self.is_dead:
            raise Killed

    def _take(self, place: str, call: str) -> Fault | None:
        now = self.world.now_us
        for fault in self._faults:
            if fault.at * 1e6 > now:
                return None
            if fault.place == place and fault.call in ("", call):
                if fault.kind is FaultKind.PAUSE and not self.world.can_nest():
                    continue
                if fault.kind in (FaultKind.REFUSED, FaultKind.UNKNOWN, FaultKind.LOST_REPLY) and call in _NO_STORE:
                    continue
                self._faults.remove(fault)
                return fault
        return None

    def _suffer(self, fault: Fault, place: str, call: str, about: str) -> None:
        world = self.world
        world.counts[f"{fault.kind.value} {place}"] += 1
        world.tell(self.name, fault.kind.value.upper(), about, f"{place} {call}, {fault.seconds:g} s")
        match fault.kind:
            case FaultKind.KILL:
                self.die(fault.seconds)
                raise Killed
            case FaultKind.PAUSE:
                since, outer_us = world.now_us, self._pausing_since_us
                self._pausing_since_us = since if outer_us is None else outer_us
                until = since + microseconds(fault.seconds)
                world.stand_still(lambda: max(until, self.frozen_until_us))
                # Longer than planned, if something else stood still within it that ended later.
                self._pausing_since_us = outer_us
                if outer_us is None:
                    self.hinder(world.now_us - since)
                world.tell(self.name, "goes on", about, call)
            case FaultKind.REFUSED:
                raise TransientDataAccessError("simulated: nothing was written")
            case FaultKind.UNKNOWN:
                raise DataAccessError("simulated: nothing was written, though nobody says so")
            case FaultKind.LOST_REPLY:
                raise DataAccessError("simulated: it was written, and the reply was lost")
            case _:
                raise AssertionError(fault)

    def die(self, restart_after: float) -> None:
        """End as after a kill."""
        self.is_dead = self.was_killed = True

    def freeze(self, us: int) -> None:
        """Stand still, with all threads, from the next moment on."""
        self.hinder(us)
        self.frozen_until_us = max(self.frozen_until_us, self.world.now_us + us)

    def hinder(self, us: int) -> None:
        """Count time in which it could not do its work."""
        self._hindered_us += us

    @property
    def hindered_us(self) -> int:
        """How long it has been kept from its work so far, by standing still or by a store that fails."""
        under_way = (since for since in (self._store_failed_at_us, self._pausing_since_us) if since is not None)
        return self._hindered_us + sum(self.world.now_us - since for since in under_way)

    @property
    def meets_failing_store(self) -> bool:
        """Whether the store has failed it, and not worked for it since."""
        return self._store_failed_at_us is not None

    def met_store(self, *, failed: bool) -> None:
        """Note how the store fared."""
        if failed and self._store_failed_at_us is None:
            self._store_failed_at_us = self.world.now_us
        elif not failed and self._store_failed_at_us is not None:
            self._hindered_us += self.world.now_us - self._store_failed_at_us
            self._store_failed_at_us = None


_NO_STORE: Final = ("submit", "first byte", "notify")


@mutable(eq=False)
class Strand:
    """
    A thread of a process: steps, and rests for as long as the step says.

    Attributes:
        actor: whose thread.
        step: does what can be done, and says after how many seconds it wants to be called again; ``None``: never.
    """

    actor: Actor
    step: Callable[[], float | None]
    is_running: bool = False
    _again: bool = False
    _next_us: int | None = None

    def wake(self, at_us: int) -> None:
        """Step at a time, or earlier if that was the plan."""
        if self._next_us is None or at_us < self._next_us:
            self._next_us = at_us
            self.actor.world.at(at_us, lambda: self._fire(at_us))

    def _fire(self, at_us: int) -> None:
        actor, world = self.actor, self.actor.world
        if self._next_us != at_us or actor.is_dead:
            return
        self._next_us = None
        if self.is_running:
            self._again = True
        elif actor.frozen_until_us > world.now_us:
            self.wake(actor.frozen_until_us)
        else:
            self._run()

    def _run(self) -> None:
        actor, world = self.actor, self.actor.world
        self.is_running, self._again = True, False
        try:
            wait = self.step()
        except Killed:
            return
        finally:
            self.is_running = False
        if wait is None or actor.is_dead:
            return
        # At least a microsecond: time must pass between two steps.
        self.wake(world.now_us + (1 if self._again else max(microseconds(min(wait, 1e6)), 1)))
