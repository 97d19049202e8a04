"""A dispatcher's process: the real engine, drain and outbox, stepped by hand."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Final

from callbackq.core.verdict import ResponsePolicy
from callbackq.draining import Drain
from callbackq.engine import Engine
from callbackq.events import ObservedEvent
from callbackq.outbox import Outbox
from callbackq.reporting import Reporter
from callbackq.settings import Settings
from callbackq.testing.simulation.ledger import Ledger
from callbackq.testing.simulation.scenario import Fault, MachinePlan, Scenario
from callbackq.testing.simulation.store import WayToTheStore
from callbackq.testing.simulation.transport import SimulatedNotifier, SimulatedTransport
from callbackq.testing.simulation.world import Actor, MachineClock, Strand, World

__all__ = ["Process"]


# How long it may take to record what a stop has interrupted, and a rest within.
_GRACE_SECONDS: Final = 2.2


class Process(Actor):
    """
    One life of a dispatcher, from its start to its kill or stop.

    Args:
        world: where it lives.
        name: of its machine.
        faults: those of its machine that have not struck yet.
        on_end: called when it is dead or has stopped, with the seconds until its machine starts another.
    """

    def __init__(
        self, world: World, name: str, faults: list[Fault], *, on_end: Callable[[Process, float], None]
    ) -> None:
        super().__init__(world, name, faults)
        self._on_end = on_end
        self._stops_at: float | None = None
        self._hindered_before_us = 0
        self._restart_after = 0.0
        self._drain: Drain | None = None
        self.has_stopped = False

    def begin(
        self,
        way: WayToTheStore,
        transport: SimulatedTransport,
        notifier: SimulatedNotifier,
        *,
        clock: MachineClock,
        plan: MachinePlan,
        scenario: Scenario,
        ledger: Ledger,
        chance: Callable[[], float],
    ) -> None:
        """Start, as `Dispatcher` does."""
        self._clock = clock
        self._ledger = ledger
        self.transport = transport
        outbox = Outbox(way, notifier, poll_interval=timedelta(seconds=15), clock=clock, random=chance)
        self.mail_strand = Strand(self, outbox.step)
        self.strand = transport.strand = Strand(self, self._step)
        settings = Settings(
            machine_name=self.name,
            concurrency=plan.concurrency,
            host_concurrency=plan.host_concurrency,
            lock_timeout=timedelta(seconds=scenario.lock_timeout),
            poll_interval=timedelta(seconds=plan.poll_interval),
            max_abandoned=scenario.max_abandoned,
            retry_jitter=plan.retry_jitter,
            response_policy=ResponsePolicy(),
            deadline=transport.deadline,
        )
        self.engine = Engine(
            way,
            transport,
            settings=settings,
            reporter=Reporter(self, self.name),
            clock=clock,
            random=chance,
            on_notification_owed=lambda: self.mail_strand.wake(self.world.now_us),
        )
        self._unsubscribe = way.subscribe(self._wake)
        self.strand.wake(self.world.now_us)
        self.mail_strand.wake(self.world.now_us)

    def observe(self, event: ObservedEvent) -> None:
        """Count what the dispatcher tells its observer."""
        self.world.counts[f"event: {event.kind.value}"] += 1

    def _wake(self) -> None:
        self.engine.wake()
        self.strand.wake(self.world.now_us)

    def _step(self) -> float | None:
        try:
            if self._stops_at is None:
                return self.engine.step()
            # From now on: a step that was under way when it was asked to stop may have acquired more.
            self.is_stopping = True
            self.transport.may_interrupt = self._clock.monotonic() >= self._stops_at
            if self._drain is None:
                self._drain = Drain(self.engine, clock=self._clock, grace=self._clock.monotonic)
            wait = self._drain.step(self._stops_at)
        except Exception as error:
            # No step may raise. (The dispatcher would survive it, and hide it.)
            self._ledger.break_rule("raised", "", f"{self.name}: {type(error).__name__}: {error}")
            return 1.0
        if wait is None:
            self._end_stop()
        return wait

    def stop(self, seconds: float, restart_after: float) -> None:
        """Ask for a stop, and let another begin some time after it is over."""
        self._stops_at = self._clock.monotonic() + seconds
        # A freeze is counted as a whole when it begins.
        self._hindered_before_us = self.hindered_us - max(self.frozen_until_us - self.world.now_us, 0)
        self._restart_after = restart_after
        self.strand.wake(self.world.now_us)

    def _end_stop(self) -> None:
        assert self._drain is not None
        report = self._drain.report()
        self.world.tell(
            self.name,
            "has stopped",
            "",
            f"finished {report.finished}, released {report.released}, interrupted {report.interrupted}, "
            f"unrecorded {report.unrecorded}",
        )
        self.has_stopped = True
        assert self._stops_at is not None
        hindered = (self.hindered_us - self._hindered_before_us) / 1e6
        late = self._clock.monotonic() - self._stops_at - hindered - _GRACE_SECONDS
        if late > 0:
            self._ledger.break_rule("stop", "", f"{self.name}: {late:.3f} s too late")
        self._ledger.stopped(self)
        self._put_away()
        self._on_end(self, self._restart_after)

    def die(self, restart_after: float) -> None:
        if not self.is_dead:
            super().die(restart_after)
            self._put_away()
            if not self.has_stopped:
                self._on_end(self, restart_after)

    def _put_away(self) -> None:
        self.is_dead = True
        self.transport.die()
        self._unsubscribe()
