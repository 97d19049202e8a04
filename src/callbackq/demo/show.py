"""The demo's story: store, dispatch from two processes, kill one, judge, show."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

from callbackq.core.models import CallbackData, CallbackRequest, CallbackState, CallbackStatus, RetryPhase
from callbackq.demo.receiver import Receiver
from callbackq.demo.screen import Screen
from callbackq.dispatcher import Dispatcher
from callbackq.events import ObservedEvent
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.targets import TargetPolicy
from callbackq.testing.history import History, Judgement
from callbackq.transport import HTTPTransport

__all__ = ["run_demo", "run_dispatcher", "show"]

QUEUES: Final = 24
CALLBACKS: Final = 336
_DEADLINE: Final = timedelta(seconds=1)
_LOCK_TIMEOUT: Final = timedelta(seconds=4)
_PATIENCE_SECONDS: Final = 60.0
_RETRIES: Final = (
    RetryPhase(retries=2, delay=timedelta(milliseconds=100)),
    RetryPhase(retries=2, delay=timedelta(milliseconds=300)),
)


def run_demo(*, colour: bool | None = None) -> int:
    """
    Run the demo and print its table.

    Returns:
        0 if every promise held, judged from what the receiver saw; 1 otherwise.
    """
    _mute_advice()
    screen = Screen(colour=colour)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="callbackq-demo-") as folder, Receiver() as receiver:
        path = Path(folder) / "demo.db"
        with SQLiteDataAccess(path) as store:
            screen.say(f"Storing {CALLBACKS} callbacks over {QUEUES} queues in a SQLite file.")
            ids = [status.id for status in store.store_callback_requests(list(_requests(receiver.url)))]
            screen.say("Starting two dispatcher processes: alpha and beta.")
            with _dispatcher(path, "alpha") as alpha, _dispatcher(path, "beta"):
                killed = _kill_with_work_in_flight(store, alpha, receiver, screen)
                _watch(store, receiver, screen)
            screen.end_progress()
            statuses = list(store.list_callbacks())
        in_flight = _abandoned_by("alpha", statuses)
        judgement = History(receiver.arrivals(), statuses, acknowledged=ids, duplicates_bound=in_flight).judge()
    return show(screen, judgement, statuses, killed=killed, in_flight=in_flight, seconds=time.monotonic() - began)


def run_dispatcher(path: Path, machine_name: str) -> None:
    """What each of the two processes runs, until its standard input ends: they must not outlive the demo."""
    _mute_advice()
    policy = TargetPolicy(allow=["127.0.0.0/8"])
    with (
        SQLiteDataAccess(path) as store,
        Dispatcher(
            store,
            machine_name=machine_name,
            transport=HTTPTransport(target_policy=policy, deadline=_DEADLINE),
            concurrency=16,
            host_concurrency=16,
            lock_timeout=_LOCK_TIMEOUT,
            poll_interval=timedelta(milliseconds=50),
            observer=_Silence(),
        ),
    ):
        sys.stdin.read()


def _mute_advice() -> None:
    # The store's advice on old SQLite versions speaks of other programs that write to the file. There are none here.
    logging.getLogger("callbackq.stores").setLevel(logging.ERROR)
    # The transport's, that it may reach this machine: that is where the demo's receiver is.
    logging.getLogger("callbackq.transport").setLevel(logging.ERROR)


def _requests(url: str) -> Iterator[CallbackRequest]:
    for number in range(CALLBACKS):
        place = number // QUEUES
        yield CallbackRequest(
            url=f"{url}/{_behaviour(number % QUEUES, place)}",
            post_data=CallbackData(headers={"Content-Type": "application/json"}, data=b'{"place": %d}' % place),
            retry_phases=_RETRIES,
            application_id="demo",
            queue_id=f"car-{number % QUEUES:02d}",
        )


def _behaviour(queue: int, place: int) -> str:
    if place in (1, 9) and queue in (5, 17):
        return "timeout"
    if place == 6 and queue in (2, 9):
        return "down" if queue == 2 else "gone"
    if (queue + 3 * place) % 11 == 0:
        return "flaky"
    if (queue + place) % 4 == 0:
        return "slow"
    return "ok"


@contextmanager
def _dispatcher(path: Path, machine_name: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "callbackq", "demo-dispatcher", str(path), machine_name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def _kill_with_work_in_flight(
    store: SQLiteDataAccess, victim: subprocess.Popen[bytes], receiver: Receiver, screen: Screen
) -> bool:
    """Wait until a third is delivered and the victim holds locks, then kill it as a power cut would."""
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < give_up and victim.poll() is None:
        accepted = receiver.accepted()
        screen.progress(accepted, CALLBACKS)
        if accepted > CALLBACKS // 3 and _held_by("alpha", store) >= 2:
            victim.send_signal(signal.SIGKILL)
            victim.wait(timeout=10)
            screen.say("Killed alpha (SIGKILL) while it held locks. Beta takes over.")
            return True
        time.sleep(0.01)
    return False


def _watch(store: SQLiteDataAccess, receiver: Receiver, screen: Screen) -> None:
    """Show progress until every callback is finished."""
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < give_up and store.next_due() is not None:
        screen.progress(receiver.accepted(), CALLBACKS)
        time.sleep(0.05)


def _held_by(machine_name: str, store: SQLiteDataAccess) -> int:
    return sum(
        bool(status.locks) and status.locks[-1].machine_name == machine_name
        for status in store.list_callbacks(state=CallbackState.LOCKED)
    )


def _abandoned_by(machine_name: str, statuses: list[CallbackStatus]) -> int:
    return sum(
        lock.machine_name == machine_name and lock.ended is not None and not lock.completed
        for status in statuses
        for lock in status.locks
    )


def show(
    screen: Screen,
    judgement: Judgement,
    statuses: list[CallbackStatus],
    *,
    killed: bool,
    in_flight: int,
    seconds: float,
) -> int:
    states = [status.state for status in statuses]
    attempts = [attempt for status in statuses for attempt in status.attempts]
    broken = judgement.broken()
    disordered = {
        status.queue_id
        for violation in judgement.violations
        for status in statuses
        if violation.rule in ("order", "early start", "stale") and status.id == violation.callback_id
    }
    screen.table(
        [
            ("callbacks stored", str(len(statuses)), ""),
            ("delivered", str(states.count(CallbackState.SUCCEEDED)), ""),
            (
                "failed for good",
                str(states.count(CallbackState.FAILED)),
                "as scripted: one always answers 500, one 410",
            ),
            (
                "attempts",
                str(len(attempts)),
                f"{sum(attempt.status_code == 0 for attempt in attempts)} without an answer",
            ),
            ("requests the receiver saw", str(judgement.arrivals), ""),
            ("locks taken over from alpha", str(in_flight), "in flight when it was killed"),
            (
                "duplicates",
                str(judgement.duplicates),
                f"at most {judgement.duplicates_bound} allowed: one for each of those",
            ),
            ("queues in order", f"{QUEUES - len(disordered)} of {QUEUES}", ""),
            ("time", f"{seconds:.1f} s", ""),
        ]
    )
    complaints = [f"{rule}: broken {times} times" for rule, times in broken.items()]
    if not killed or not in_flight:
        complaints.append("the demo could not kill a dispatcher that held work")
    if states.count(CallbackState.FAILED) != 2:
        complaints.append("other callbacks failed than the script says")
    for complaint in complaints:
        screen.bad(complaint)
    if not complaints:
        screen.good("Every promise held, judged from what the receiver saw.")
    return 1 if complaints else 0


class _Silence:
    def observe(self, event: ObservedEvent) -> None:
        """The parent shows what happens."""
