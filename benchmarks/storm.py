"""
A storm: dispatcher processes on one store are killed, stopped and frozen at random moments; others take their place.

    python benchmarks/storm.py --kills 1000
    python benchmarks/storm.py --kills 1000 --store postgres --server-restarts 30
    python benchmarks/storm.py --stops 1000
    python benchmarks/storm.py --freezes 500 --frozen 4 --processes 6 --lease 3

A kill is SIGKILL. A stop is SIGTERM, on which a dispatcher stops as it should, and no duplicate may come of it. A
freeze is SIGSTOP for longer than locks live, then SIGCONT: what the dispatcher says then of attempts it has lost must
change nothing. All three may be had in one storm.

An enqueuer keeps storing callbacks; a receiver answers some with errors, some late, some never. A PostgreSQL server is
the storm's own, syncs to the disk, and is restarted in turns: stopped in order, told to quit at once, killed. In the
end `callbackq.testing.history` judges from the receiver's log and the final dump alone. Prints one JSON document; exits
0 only if no promise was broken, and each callback had no more duplicates than it was in flight at kills and freezes.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence import Evidence, Interruption, judge
from victims import PROCESSES, REST_SECONDS, RETRIES, Setting, Worker, let_orphans_go_on
from witness import Witness

import stores
from callbackq import CallbackRequest, DataAccessError

if TYPE_CHECKING:
    from stores import Store
    from support.postgres import PostgreSQLServer

BATCH = 50
STEP_SECONDS = 0.002
DRAIN_SECONDS = 120.0
# How much longer than locks live a dispatcher is frozen.
OVERSLEPT_SECONDS = (0.2, 1.5)


class Enqueuer:
    """Keeps storing callbacks while few wait. Its ids make it harmless to repeat what a broken connection left open."""

    def __init__(
        self, store: Store, evidence: Evidence, witness: Witness, chance: random.Random, options: argparse.Namespace
    ) -> None:
        self._store = store
        self._evidence = evidence
        self._witness = witness
        self._chance = chance
        self._options = options
        self._unsure: dict[str, CallbackRequest] = {}
        self.acknowledged = 0
        self.refused = 0

    def step(self) -> None:
        if not self._unsure and self.acknowledged - self._witness.accepted < self._options.backlog:
            self._unsure = {secrets.token_hex(16): self._request() for _ in range(BATCH)}
        if self._unsure:
            try:
                self._store.store_callback_requests(list(self._unsure.values()), ids=list(self._unsure))
            except DataAccessError:
                self.refused += 1
                return
            for id, request in self._unsure.items():
                self._evidence.acknowledged(id, request.queue_id)
            self.acknowledged += len(self._unsure)
            self._unsure = {}

    def finish(self) -> None:
        while self._unsure:
            self.step()
            time.sleep(REST_SECONDS)

    def _request(self) -> CallbackRequest:
        is_alone = self._chance.random() < self._options.alone
        queue = "" if is_alone else f"q{self._chance.randrange(self._options.queues)}"
        return CallbackRequest(url=self._witness.url, queue_id=queue, retry_phases=RETRIES)


class Crew:
    """The dispatchers of a storm, and what is done to them."""

    def __init__(
        self, setting: Setting, now: Callable[[], datetime], chance: random.Random, options: argparse.Namespace
    ) -> None:
        self._setting = setting
        self._now = now
        self._chance = chance
        self._begun = 0
        self._running = [self._begin() for _ in range(options.processes)]
        self._stopping: list[Worker] = []
        # Those who are frozen go on by themselves: whoever stores may be waiting for one who holds SQLite's write lock.
        self._frozen: dict[Worker, threading.Timer] = {}
        self._guard, theirs = PROCESSES.Pipe()
        PROCESSES.Process(target=let_orphans_go_on, args=(theirs,), daemon=True).start()
        theirs.close()
        self._most_frozen = options.frozen
        self._left = Counter(kill=options.kills, stop=options.stops, freeze=options.freezes)
        self._total = self._left.total()
        self.done: Counter[str] = Counter()
        self.ended_badly = 0
        self.interruptions: defaultdict[str, list[Interruption]] = defaultdict(list)
        self.stops: dict[str, datetime] = {}

    def _begin(self) -> Worker:
        self._begun += 1
        return Worker(self._setting, f"m{self._begun}", self._now)

    @property
    def progress(self) -> float:
        """How much has been done, from 0 to 1."""
        return self.done.total() / self._total if self._total else 1.0

    @property
    def is_done(self) -> bool:
        return not self._left.total() and not self._frozen

    def strike(self) -> bool:
        """Do something to somebody who is at work; tell whether there was something to do, and somebody."""
        kinds = [kind for kind in self._left.elements() if kind != "freeze" or len(self._frozen) < self._most_frozen]
        places = [place for place, worker in enumerate(self._running) if worker.works()]
        if not kinds or not places:
            return False
        kind, place = self._chance.choice(kinds), self._chance.choice(places)
        worker = self._running[place]
        if kind == "freeze":
            frozen_for = self._setting.lease.total_seconds() + self._chance.uniform(*OVERSLEPT_SECONDS)
            self._frozen[worker] = threading.Timer(frozen_for, self._thaw, [worker])
            self._guard.send(worker.pid)
            worker.freeze()
            self._frozen[worker].start()
        else:
            self._running[place] = self._begin()
            if kind == "kill":
                self.interruptions[worker.machine_name].append(worker.kill())
            else:
                self.stops[worker.machine_name] = self._now()
                worker.stop()
                self._stopping.append(worker)
        self._left[kind] -= 1
        self.done[kind] += 1
        return True

    def _thaw(self, worker: Worker) -> None:
        self.interruptions[worker.machine_name].append(worker.thaw())
        self._guard.send(worker.pid)
        del self._frozen[worker]

    def bury(self) -> None:
        """Forget those who have stopped."""
        for worker in [worker for worker in self._stopping if worker.has_ended()]:
            self._see_off(worker)
            self._stopping.remove(worker)

    def close(self) -> None:
        for timer in list(self._frozen.values()):
            timer.join()
        for worker in self._running:
            worker.stop()
        for worker in (*self._running, *self._stopping):
            self._see_off(worker)
        self._guard.close()

    def _see_off(self, worker: Worker) -> None:
        # One that was told to stop ends by itself, and says so by its exit code; while it starts it can't.
        self.ended_badly += worker.join() != 0 and worker.was_at_work


class Restarts:
    """Restarts a server so many times, spread over the storm, while the storm goes on."""

    def __init__(self, server: PostgreSQLServer | None, count: int, now: Callable[[], datetime]) -> None:
        self._server = server
        self._now = now
        self.outages: list[Interruption] = []
        self._count = count if server else 0
        self._ways = cycle(("fast", "immediate", "kill"))
        self._thread = threading.Thread()
        self.done: Counter[str] = Counter()

    def step(self, progress: float) -> None:
        """Restart when the storm, which is at *progress* between 0 and 1, has come so far."""
        is_time = progress * (self._count + 1) >= self.done.total() + 1
        if is_time and self.done.total() < self._count and not self._thread.is_alive():
            way = next(self._ways)
            self.done[way] += 1
            self._thread = threading.Thread(target=self._restart, args=(way,))
            self._thread.start()

    def _restart(self, way: str) -> None:
        assert self._server
        began = self._now()
        if way == "kill":
            self._server.kill()
        else:
            self._server.stop("fast" if way == "fast" else "immediate")
        self._server.start()
        self.outages.append(Interruption(began=began, ended=self._now()))

    def finish(self) -> None:
        if self._thread.is_alive():
            self._thread.join()


class Watch:
    """Notices when the machine itself stands still: then attempts time out whose answers were on their way."""

    def __init__(self) -> None:
        self.longest_stall_seconds = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._is_over.wait(STEP_SECONDS):
            now = time.monotonic()
            self.longest_stall_seconds = max(self.longest_stall_seconds, now - last)
            last = now

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


def rage(store: Store, dispatchers: Crew, enqueuer: Enqueuer, restarts: Restarts, options: argparse.Namespace) -> None:
    """Let the storm rage until all was done to dispatchers that had to be, and enough callbacks were stored."""
    chance = random.Random(options.seed)
    next_strike = time.monotonic()
    while not dispatchers.is_done or enqueuer.acknowledged < options.callbacks:
        enqueuer.step()
        restarts.step(dispatchers.progress)
        dispatchers.bury()
        is_time = time.monotonic() >= next_strike
        # Spread over the callbacks that are to be stored.
        if is_time and enqueuer.acknowledged >= dispatchers.progress * options.callbacks and dispatchers.strike():
            next_strike = time.monotonic() + chance.uniform(*options.pause)
        time.sleep(STEP_SECONDS)
    restarts.finish()
    enqueuer.finish()
    give_up = time.monotonic() + DRAIN_SECONDS
    while not is_drained(store) and time.monotonic() < give_up:
        time.sleep(REST_SECONDS)


def is_drained(store: Store) -> bool:
    try:
        return store.next_due() is None
    except DataAccessError:
        return False


def dump(store: Store, folder: Path) -> None:
    statuses = Evidence(folder, "statuses")
    for status in store.list_callbacks(page_size=1000):
        statuses.ended(status)
    statuses.close()


def storm(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chance = random.Random(options.seed)
    witness = Witness(folder, options.seed)
    acknowledged = Evidence(folder, "acknowledged")
    began = time.monotonic()
    with stores.ground(options) as place:
        setting = Setting(place.maker("storm"), timedelta(seconds=options.lease))
        with setting.make_store() as store:
            restarts = Restarts(place.server, options.server_restarts, stores.clock_of(store))
            enqueuer = Enqueuer(store, acknowledged, witness, chance, options)
            crew = Crew(setting, stores.clock_of(store), chance, options)
            with closing(crew) as dispatchers, closing(Watch()) as watch:
                rage(store, dispatchers, enqueuer, restarts, options)
            seconds = time.monotonic() - began
            dump(store, folder)
    acknowledged.close()
    witness.close()
    verdict = judge(
        folder,
        dispatchers.interruptions,
        restarts.outages,
        dispatchers.stops,
        lease=setting.lease,
        sees_deaths=options.store == "sqlite",
    )
    return {
        "store": options.store,
        "kills": dispatchers.done["kill"],
        "stops": dispatchers.done["stop"],
        "freezes": dispatchers.done["freeze"],
        "server_restarts": dict(restarts.done),
        "acknowledged": enqueuer.acknowledged,
        "storing_refused": enqueuer.refused,
        "answers": witness.answers,
        **verdict.figures(),
        "seconds": round(seconds, 1),
        "seconds_with_judgement": round(time.monotonic() - began, 1),
        "longest_stall_of_the_machine_seconds": round(watch.longest_stall_seconds, 3),
        "ended_badly": dispatchers.ended_badly,
        "ok": verdict.is_ok() and not dispatchers.ended_badly,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--freezes", type=int, default=0)
    parser.add_argument("--frozen", type=int, default=1, help="how many dispatchers may be frozen at a time")
    parser.add_argument("--callbacks", type=int, default=0, help="how many are stored at least, spread over the storm")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--queues", type=int, default=200)
    parser.add_argument("--alone", type=float, default=0.1, help="share of callbacks without a queue")
    parser.add_argument("--backlog", type=int, default=400, help="stop storing more while so many wait")
    parser.add_argument("--lease", type=float, default=4.0, help="seconds that a lock lives; 3 at least")
    parser.add_argument("--pause", type=float, nargs=2, default=(0.05, 0.5), metavar=("LEAST", "MOST"))
    parser.add_argument("--server-restarts", type=int, default=0, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=1)
    stores.add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="callbackq-storm-", dir=options.directory) as folder:
        outcome = storm(options, Path(folder))
    print(json.dumps(outcome, indent=1))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
