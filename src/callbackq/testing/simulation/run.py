"""One run: builds the world of a scenario, lets everything happen, and judges it."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Final

from attrs import field, frozen

from callbackq.core.models import CallbackRequest, CallbackState, RetryPhase
from callbackq.dataaccess import Action
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing.history import History, Violation
from callbackq.testing.simulation.ledger import Ledger
from callbackq.testing.simulation.process import Process
from callbackq.testing.simulation.scenario import Behaviour, Command, CommandKind, Fault, FaultKind, Reaction, Scenario
from callbackq.testing.simulation.store import RealStore, WayToTheStore, WayWithHandover
from callbackq.testing.simulation.transport import MailServer, SimulatedNotifier, SimulatedTransport
from callbackq.testing.simulation.world import Actor, Entry, Killed, MachineClock, World, microseconds

__all__ = ["Report", "run"]

_UPTIME_US: Final = 1_000_000_000_000
_INTERVAL: Final = timedelta(seconds=60)
# Parked callbacks, Retry-After of two minutes, e-mails whose server failed: all are over by then.
_PATIENCE_US: Final = 3 * 3_600_000_000
_LOOK_US: Final = 20_000_000
_AFTER: Final = Behaviour(Reaction.ACCEPT, 0.02)


@frozen(kw_only=True)
class Report:
    """
    What came of a run.

    Attributes:
        scenario: what was run.
        violations: every broken promise.
        log: what happened, line by line: equal for equal scenarios, in every process.
        counts: what took effect, and how often.
        simulated_seconds: how long the run took in its own world.
    """

    scenario: Scenario = field(repr=False)
    violations: Sequence[Violation]
    log: Sequence[Entry] = field(repr=False)
    counts: Counter[str] = field(repr=False)
    simulated_seconds: float

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return not self.violations

    def text(self) -> str:
        """Write the log down, a line for each entry."""
        return "".join(f"{entry.line()}\n" for entry in self.log)


def run(scenario: Scenario) -> Report:
    """Simulate a scenario."""
    with _silence(), tempfile.TemporaryDirectory(dir=_memory_disk()) as directory:
        simulation = _Simulation(scenario, Path(directory) / "store.db")
        try:
            return simulation.run()
        finally:
            simulation.close()


@contextmanager
def _silence() -> Iterator[None]:
    # Faults by the thousand are logged by those who survive them.
    logger = logging.getLogger("callbackq")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _memory_disk() -> str | None:
    # What survives the death of a simulated process needs no disk.
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108


class _Simulation:
    def __init__(self, scenario: Scenario, path: Path) -> None:
        self._scenario = scenario
        self._path = path
        self._world = World(Random(scenario.seed))  # noqa: S311 - chance, not a secret
        self._is_sqlite = scenario.store == "sqlite"
        machines = len(scenario.machines)
        if self._is_sqlite:
            # One machine, so one set of clocks.
            self._clocks = [MachineClock(self._world, _UPTIME_US)] * (machines + 1)
        else:
            self._clocks = [MachineClock(self._world, _UPTIME_US + n * 7_000_000_000) for n in range(machines + 1)]
            self._shared: RealStore = InMemoryDataAccess(clock=self._clocks[-1])
        self._stores: dict[Actor, SQLiteDataAccess] = {}
        self._ledger = Ledger(
            lambda: self._world.now_us,
            lock_timeout_us=microseconds(scenario.lock_timeout),
            max_abandoned=scenario.max_abandoned,
            jitter=max(machine.retry_jitter for machine in scenario.machines),
            interval_us=microseconds(_INTERVAL.total_seconds()),
            may_be_taken=lambda holder: self._is_sqlite and (holder is None or holder.is_dead),
            give_up=self._world.give_up,
        )
        self._requests = [self._request(number) for number in range(len(scenario.callbacks))]
        self._behaviours = [list(one.behaviours) for one in scenario.callbacks]
        self._mail = MailServer()
        self._faults_of: list[list[Fault]] = [
            [fault for fault in scenario.faults if fault.place and fault.machine == number]
            for number in range(machines + 1)
        ]
        self._processes: list[Process | None] = [None] * machines
        self._lives = 0
        self._is_calm = False
        # Calls of the application that have not come to their end.
        self._unstored = 0
        self._was_rebooted = False
        self._application = Actor(self._world, "application", self._faults_of[-1])
        self._application_way = self._way(self._application)

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    def _request(self, number: int) -> CallbackRequest:
        plan = self._scenario.callbacks[number]
        return CallbackRequest(
            url=f"http://receiver-{plan.host}.test/",
            queue_id=plan.queue,
            retry_phases=[
                RetryPhase(retries=retries, delay=timedelta(seconds=delay)) for retries, delay in plan.phases
            ],
            notification_email_address="ops@example.org" if plan.is_told else "",
            on_exhausted="hold" if plan.hold else "continue",
        )

    # Who is there.

    def _way(self, actor: Actor) -> WayToTheStore:
        if self._is_sqlite:
            if self._was_rebooted and self._clocks[0].offset:
                self._ledger.time_has_jumped = self._ledger.mails.time_has_jumped = True
            store = self._stores[actor] = SQLiteDataAccess(self._path, clock=self._clocks[0], durability="process")
            return WayWithHandover(store, actor, self._ledger, in_batches=True)
        return WayToTheStore(self._shared, actor, self._ledger, in_batches=False)

    def _start(self, number: int) -> None:
        if self._processes[number] is not None:
            return
        self._lives += 1
        plan, clock = self._scenario.machines[number], self._clocks[number]
        process = Process(
            self._world,
            f"machine-{number}",
            self._faults_of[number],
            on_end=lambda one, after: self._ended(number, one, after),
        )
        self._processes[number] = process
        self._world.tell(process.name, "starts")
        transport = SimulatedTransport(
            process,
            clock,
            self._ledger,
            deadline=timedelta(seconds=self._scenario.deadline),
            lock_timeout=timedelta(seconds=self._scenario.lock_timeout),
            behaviour_of=self._behaviour_of,
        )
        process.begin(
            self._way(process),
            transport,
            SimulatedNotifier(process, self._ledger, self._mail, _INTERVAL),
            clock=clock,
            plan=plan,
            scenario=self._scenario,
            ledger=self._ledger,
            chance=self._world.random.random,
        )

    def _ended(self, number: int, process: Process, restart_after: float) -> None:
        self._processes[number] = None
        if self._is_sqlite:
            store = self._stores.pop(process)
            if process.has_stopped:
                store.close()
            else:
                store._end_as_if_killed()
        self._world.at(self._world.now_us + microseconds(restart_after), lambda: self._start(number))

    def _behaviour_of(self, id: str) -> Behaviour:
        planned = self._behaviours[int(id[1:])]
        return planned.pop(0) if planned and not self._is_calm else _AFTER

    # What happens.

    def run(self) -> Report:
        scenario, world = self._scenario, self._world
        for number in range(len(scenario.machines)):
            self._start(number)
        for command in scenario.commands:
            world.at(microseconds(command.at), lambda command=command: self._obey(command))  # type: ignore[misc]
        for fault in scenario.faults:
            if not fault.place:
                world.at(microseconds(fault.at), lambda fault=fault: self._strike(fault))  # type: ignore[misc]
        world.run_until(microseconds(scenario.horizon))
        self._calm_down()
        last_us = world.now_us + _PATIENCE_US
        while not self._is_drained() and world.now_us < last_us and not world.is_over:
            self._open_held_queues()
            world.run_until(world.now_us + _LOOK_US, self._is_drained)
        # What is still on its way to a receiver, or is said a second time.
        world.run_until(world.now_us + _LOOK_US)
        return self._judge()

    def _calm_down(self) -> None:
        """From here on nothing goes wrong any more."""
        world = self._world
        self._is_calm = True
        for faults in self._faults_of:
            faults.clear()
        world.store_fails_until_us = world.disk_full_until_us = world.hints_lost_until_us = 0
        self._mail.fails_until_us = self._mail.hangs_until_us = 0
        world.tell("world", "all is calm")

    def _is_drained(self) -> bool:
        accounts = self._ledger.accounts.values()
        return (
            not self._unstored
            and not self._ledger.mails.are_owed()
            and not any(one.is_open and not one.was_purged for one in accounts)
        )

    def _open_held_queues(self) -> None:
        for account in list(self._ledger.accounts.values()):
            if account.holds:
                self._ask(Action.SKIP, account.id)

    def _obey(self, command: Command) -> None:
        match command.kind:
            case CommandKind.STORE:
                self._unstored += 1
                self._store(command, repetitions=1 + command.is_repeated)
            case CommandKind.PURGE:
                self._purge(timedelta(seconds=5))
            case CommandKind.CANCEL:
                self._ask(Action.CANCEL, f"c{command.callbacks[0]}")
            case CommandKind.REDELIVER | CommandKind.SKIP:
                failed = [one.id for one in self._ledger.accounts.values() if one.state is CallbackState.FAILED]
                place = command.callbacks[0]
                action = Action.SKIP if command.kind is CommandKind.SKIP else Action.REDELIVER
                self._ask(action, failed[place % len(failed)] if failed else f"c{place}")

    def _store(self, command: Command, *, repetitions: int) -> None:
        if self._application.frozen_until_us > self._world.now_us:
            self._world.at(self._application.frozen_until_us, lambda: self._store(command, repetitions=repetitions))
            return
        ids = [f"c{number}" for number in command.callbacks]
        self._world.tell("application", "stores", ",".join(ids))
        try:
            for _ in range(repetitions):
                self._application_way.store_callback_requests([self._requests[n] for n in command.callbacks], ids=ids)
                self._ledger.acknowledged.update(ids)
        except Exception:
            # It doesn't know what was written, and repeats the call.
            again_us = self._world.now_us + 500_000
            self._world.at(again_us, lambda: self._store(command, repetitions=1))
            return
        except Killed:
            # Nobody repeats it; what was written is delivered all the same. The next process is a new one.
            self._application.is_dead = False
        self._unstored -= 1

    def _ask(self, action: Action, id: str) -> None:
        try:
            self._application_way.request_transition(id, action)
        except Exception:  # refused, or a fault; what must not be raised, the ledger has noted
            return
        except Killed:
            self._application.is_dead = False

    def _purge(self, finished_for: timedelta) -> None:
        store = self._application_way.store
        before = {id for id, one in self._ledger.accounts.items() if not one.was_purged}
        count = store.purge(finished_for=finished_for)
        left = {status.id for status in store.list_callbacks()}
        self._world.counts["purged"] += count
        self._world.tell("application", "purges", "", str(count))
        self._ledger.purged(microseconds(finished_for.total_seconds()), sorted(before - left), count)

    def _strike(self, fault: Fault) -> None:
        world, until_us = self._world, self._world.now_us + microseconds(fault.seconds)
        process = self._processes[fault.machine] if fault.machine < len(self._processes) else None
        world.counts[fault.kind.value] += 1
        world.tell(f"machine-{fault.machine}", fault.kind.value.upper(), "", f"{fault.seconds:g} s")
        match fault.kind:
            case FaultKind.KILL if process is not None:
                process.die(fault.seconds)
            case FaultKind.FREEZE if process is not None:
                process.freeze(microseconds(fault.seconds))
            case FaultKind.STOP if process is not None:
                process.stop(fault.seconds, restart_after=1.0)
            case FaultKind.SUSPEND:
                self._suspend(microseconds(fault.seconds))
            case FaultKind.REBOOT:
                self._reboot(fault.seconds)
            case FaultKind.DISK_FULL:
                world.disk_full_until_us = until_us
            case FaultKind.OUTAGE:
                world.store_fails_until_us = until_us
            case FaultKind.STEP_WALL:
                self._clocks[fault.machine].offset += timedelta(seconds=fault.seconds)
            case FaultKind.HINTS_LOST:
                world.hints_lost_until_us = until_us
            case FaultKind.MAIL_FAILS:
                self._mail.fails_until_us = until_us
            case FaultKind.MAIL_HANGS:
                self._mail.hangs_until_us = until_us
            case _:
                pass

    def _suspend(self, us: int) -> None:
        # The receivers' side goes on; so does the store's clock, which counts through it.
        for process in (*self._processes, self._application):
            if process is not None:
                process.freeze(us)

    def _reboot(self, seconds: float) -> None:
        for process in list(self._processes):
            if process is not None:
                process.die(seconds)
        if self._is_sqlite:
            self._stores.pop(self._application)._end_as_if_killed()
            self._clocks[0].reboot()
            self._was_rebooted = True
            self._application_way = self._way(self._application)

    # The end.

    def _judge(self) -> Report:
        world, ledger = self._world, self._ledger
        if world.is_spinning:
            ledger.break_rule("stuck", "", "somebody goes round in circles")
        for account in ledger.accounts.values():
            if (account.is_open or account.debts) and not account.was_purged:
                what = account.state.value if account.is_open else "its e-mail is owed"
                ledger.break_rule("stuck", account.id, f"hours after the last fault: {what}")
        statuses = list(self._application_way.store.list_callbacks())
        ledger.judge_end(statuses)
        gone = {id for id, one in ledger.accounts.items() if one.was_purged}
        arrivals = [
            one
            for place, one in enumerate(ledger.arrivals)
            if one.callback_id not in gone and place >= ledger.accounts[one.callback_id].first_arrival
        ]
        redelivered = [id for id, one in ledger.accounts.items() if one.redeliveries or ledger.time_has_jumped]
        judgement = History(
            arrivals,
            statuses,
            acknowledged=sorted(ledger.acknowledged - gone),
            redelivered=redelivered,
            stale_requests=ledger.stale_requests,
            cancelled=ledger.cancelled,
            excused=ledger.excused(),
        ).judge()
        world.counts["callbacks"] += len(ledger.accounts)
        world.counts["requests"] += len(ledger.arrivals)
        world.counts["second acceptances"] += judgement.duplicates
        world.counts["takeovers"] += judgement.takeovers
        for state in CallbackState:
            world.counts[f"ended {state.value}"] += sum(status.state is state for status in statuses)
        return Report(
            scenario=self._scenario,
            violations=[*ledger.violations, *judgement.violations],
            log=world.log,
            counts=world.counts,
            simulated_seconds=world.now_us / 1e6,
        )
