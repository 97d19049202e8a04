"""
An hour at a steady rate: does a dispatcher that lives on grow, leak or slow down, while others are killed beside it?

    python benchmarks/soak.py --minutes 60 --rate 200

So many callbacks a second are stored in an SQLite file; a receiver answers some with errors, some late, some never. One
dispatcher lives all the time and is measured every few seconds; another is killed with SIGKILL every minute and
replaced. Finished callbacks are written down, and purged a minute later. In the end `callbackq.testing.history` judges
all of them.

The first sixth of the time is warm-up. Prints one JSON document; exits 0 only if after it

* the resident memory grew by less than 1 MiB an hour (least squares over all samples),
* threads, and descriptors other than sockets, were as many in the last sixth as in the one after warm-up, at the least
  and most of the time (for a moment one more is open, to see whether another dispatcher is dead); sockets, which come
  and go with the load, not one more in the mean,
* the write-ahead log was never longer than 64 MiB,
* the 99th percentile of the time to claim in the last sixth was at most 1.2 times that of the one after warm-up,

and no promise was broken. Memory and descriptors are read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from statistics import fmean, linear_regression, quantiles
from typing import Any

from attrs import evolve, frozen
from evidence import Evidence, Interruption, Verdict, judge
from victims import PROCESSES, RETRIES, Setting, Worker, dispatch
from witness import Witness

from callbackq import CallbackData, CallbackRequest, SQLiteDataAccess
from callbackq.dataaccess import Acquired
from callbackq.events import ObservedEvent

LEASE = timedelta(seconds=4)
QUEUES = 200
# One in so many has no queue.
ALONE = 5
BODY = CallbackData(headers={"Content-Type": "application/octet-stream"}, data=b"x" * 256)
TICK_SECONDS = 0.05
SAMPLE_SECONDS = 3.0
KEPT = timedelta(seconds=60)
CLEANING_SECONDS = 15.0
DRAIN_SECONDS = 120.0
LONGEST_SECONDS = 120.0

MOST_GROWTH_MIB_PER_HOUR = 1.0
LONGEST_WAL_MIB = 64.0
MOST_SLOWER = 1.2
MOST_MORE_SOCKETS = 1.0
MIB = 2**20


@frozen
class Sample:
    """
    The dispatcher that lives on, at one moment.

    Attributes:
        claims: how many seconds each took since the sample before.
        cpu: how much CPU each took, of this process.
    """

    at: float
    rss_bytes: int
    files: int
    sockets: int
    threads: int
    wal_bytes: int
    claims: array[float]
    cpu: array[float]


class MeasuredStore(SQLiteDataAccess):
    """Takes the time of each claim that found something: of others nothing is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.claims, self.cpu = array("d"), array("d")

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        began, cpu = time.perf_counter(), time.thread_time()
        acquired = super().acquire_locks(machine_name, lock_timeout=lock_timeout, limit=limit)
        if acquired:
            self.claims.append(time.perf_counter() - began)
            self.cpu.append(time.thread_time() - cpu)
        return acquired


class Silence:
    def observe(self, event: ObservedEvent) -> None:
        pass


# Made once, so that the measuring makes no paths: their parts are interned.
STATM = Path("/proc/self/statm")


def take_sample(store: MeasuredStore, wal: Path) -> Sample:
    # The samples lie elsewhere: what is measured must not grow by them.
    claims, store.claims = store.claims, array("d")
    cpu, store.cpu = store.cpu, array("d")
    kinds = []
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 - a directory that changes while it is read
        with suppress(FileNotFoundError):
            kinds.append(os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"))  # noqa: PTH115
    return Sample(
        at=time.monotonic(),
        rss_bytes=int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        files=kinds.count(False),
        sockets=kinds.count(True),
        threads=threading.active_count(),
        wal_bytes=wal.stat().st_size if wal.exists() else 0,
        claims=claims,
        cpu=cpu,
    )


def live_on(path: Path, line: Connection) -> None:
    """Be the dispatcher that lives on, and tell every few seconds how it is."""
    store = MeasuredStore(path)
    wal = Path(f"{path}-wal")
    over = threading.Event()

    def tell() -> None:
        while not over.wait(SAMPLE_SECONDS):
            line.send(take_sample(store, wal))

    threading.Thread(target=tell, name="soak-samples", daemon=True).start()
    with store:
        dispatch(store, "steady", LEASE, Silence(), line)
    over.set()


def clean_up(path: Path, folder: Path, line: Connection) -> None:
    """Write down what is finished, and purge it when it has been for a while, until told to end."""
    evidence = Evidence(folder, "statuses")
    written: set[str] = set()
    with SQLiteDataAccess(path) as store:
        is_last = False
        while not is_last:
            began = time.monotonic()
            is_last = line.poll(CLEANING_SECONDS)
            finished = set()
            for status in store.list_callbacks(page_size=500):
                if is_last or not status.state.is_open:
                    finished.add(status.id)
                    if status.id not in written:
                        evidence.ended(status)
            written = finished
            # What is purged below had finished before it was listed above.
            assert time.monotonic() - began < KEPT.total_seconds(), "too slow to see everything before it is purged"
            while not is_last and store.purge(finished_for=KEPT):
                pass
    evidence.close()


class Enqueuer:
    """Stores callbacks at a steady rate."""

    def __init__(self, store: SQLiteDataAccess, folder: Path, url: str, rate: float) -> None:
        self._store = store
        self._evidence = Evidence(folder, "acknowledged")
        self._url = url
        self._rate = rate
        self.stored = 0
        self.ended_well = False

    def step(self, seconds: float) -> None:
        """Store what is to be stored *seconds* after the beginning."""
        numbers = range(self.stored, int(seconds * self._rate))
        if numbers:
            statuses = self._store.store_callback_requests([self._request(number) for number in numbers])
            for status in statuses:
                self._evidence.acknowledged(status.id, status.queue_id)
            self.stored += len(statuses)

    def _request(self, number: int) -> CallbackRequest:
        queue = "" if number % ALONE == 0 else f"q{number % QUEUES}"
        return CallbackRequest(url=self._url, post_data=BODY, queue_id=queue, retry_phases=RETRIES)

    def close(self) -> None:
        self._evidence.close()


@contextmanager
def beside(target: Any, *arguments: object) -> Iterator[Connection]:
    """Have a process do something until the end, when it is told so over the line that it is given."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    yield ours
    assert process.is_alive(), f"{target.__name__} has ended by itself"
    ours.send("end")
    process.join(LONGEST_SECONDS)
    assert process.exitcode == 0, f"{target.__name__} has not ended as it should"


class Soak:
    """One soak: its clock, its samples, its kills."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.seconds = options.minutes * 60
        self._kill_every = options.kill_every
        self._rate = options.rate
        self._folder = folder
        self.path = folder / "soak.db"
        self.samples: list[Sample] = []
        self.killed: dict[str, list[Interruption]] = {}
        self.stored = 0
        self.ended_well = False
        self.longest_delay = 0.0

    def run(self) -> Verdict:
        witness = Witness(self._folder, seed=1)
        with SQLiteDataAccess(self.path) as store:
            enqueuer = Enqueuer(store, self._folder, witness.url, self._rate)
            with beside(clean_up, self.path, self._folder), beside(live_on, self.path) as line:
                self._load(store, enqueuer, line)
                give_up = time.monotonic() + DRAIN_SECONDS
                while store.next_due() is not None and time.monotonic() < give_up:
                    time.sleep(TICK_SECONDS)
            enqueuer.close()
        self.stored = enqueuer.stored
        witness.close()
        return judge(self._folder, self.killed, lease=LEASE, sees_deaths=True)

    def _load(self, store: SQLiteDataAccess, enqueuer: Enqueuer, line: Connection) -> None:
        setting = Setting(partial(SQLiteDataAccess, self.path), LEASE)
        victim = Worker(setting, "victim 0", store.now)
        began = time.monotonic()
        while (now := time.monotonic() - began) < self.seconds:
            enqueuer.step(now)
            while line.poll():
                sample = line.recv()
                self.samples.append(evolve(sample, at=sample.at - began))
            if now >= (len(self.killed) + 1) * self._kill_every and victim.works():
                self.killed[victim.machine_name] = [victim.kill()]
                victim = Worker(setting, f"victim {len(self.killed)}", store.now)
            took = time.monotonic() - began - now
            self.longest_delay = max(self.longest_delay, took)
            time.sleep(max(TICK_SECONDS - took, 0))
        victim.stop()
        self.ended_well = victim.join() == 0 or not victim.was_at_work


def percentile(seconds: Iterable[array[float]], percent: int) -> float:
    """Give a percentile in milliseconds."""
    return quantiles(chain.from_iterable(seconds), n=100)[percent - 1] * 1000


def is_constant(before: Counter[int], after: Counter[int]) -> bool:
    return min(before) == min(after) and before.most_common(1)[0][0] == after.most_common(1)[0][0]


def judge_samples(samples: list[Sample], seconds: float) -> tuple[dict[str, Any], dict[str, bool]]:
    """Give the figures, and whether each is as it must be."""
    sixths = [[one for one in samples if nth <= one.at * 6 / seconds < nth + 1] for nth in range(6)]
    first, last, warm = sixths[1], sixths[-1], [one for part in sixths[1:] for one in part]
    slope = linear_regression([one.at for one in warm], [float(one.rss_bytes) for one in warm]).slope
    growth = slope * 3600 / MIB
    files, threads = [
        [Counter(count(one) for one in part) for part in (first, last)]
        for count in (attrgetter("files"), attrgetter("threads"))
    ]
    sockets = [fmean(one.sockets for one in part) for part in sixths]
    wal = max(one.wal_bytes for one in samples) / MIB
    p99 = [percentile((one.claims for one in part), 99) for part in sixths]
    figures = {
        "samples": len(samples),
        "rss_mib_in_each_sixth": [round(max(one.rss_bytes for one in part) / MIB, 2) for part in sixths],
        "rss_growth_mib_per_hour": round(growth, 3),
        "files_and_how_often": files,
        "threads_and_how_often": threads,
        "sockets_in_each_sixth": [round(one, 2) for one in sockets],
        "most_sockets": max(one.sockets for one in samples),
        "longest_wal_mib": round(wal, 2),
        "claims": sum(len(one.claims) for one in samples),
        "claim_p99_ms_in_each_sixth": [round(one, 2) for one in p99],
        "claim_p50_ms_in_each_sixth": [round(percentile((one.claims for one in part), 50), 2) for part in sixths],
        "claim_cpu_p99_ms_in_each_sixth": [round(percentile((one.cpu for one in part), 99), 2) for part in sixths],
        "claim_p99_ratio": round(p99[-1] / p99[1], 3),
    }
    held = {
        "memory": growth < MOST_GROWTH_MIB_PER_HOUR,
        "files": is_constant(*files),
        "threads": is_constant(*threads),
        "sockets": sockets[-1] - sockets[1] < MOST_MORE_SOCKETS,
        "wal": wal <= LONGEST_WAL_MIB,
        "claim_p99": p99[-1] <= MOST_SLOWER * p99[1],
    }
    return figures, held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=200.0, help="callbacks a second")
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--directory", type=Path, help="where the file of SQLite and the evidence go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="callbackq-soak-", dir=options.directory) as folder:
        soak = Soak(options, Path(folder))
        verdict = soak.run()
        database_bytes = soak.path.stat().st_size
    figures, held = judge_samples(soak.samples, soak.seconds)
    held["stop"] = soak.ended_well
    held["promises"] = verdict.is_ok() and verdict.callbacks >= soak.stored
    outcome = {
        "minutes": options.minutes,
        "rate": options.rate,
        "kills": len(soak.killed),
        "stored": soak.stored,
        "longest_delay_of_storing_seconds": round(soak.longest_delay, 3),
        "database_mib": round(database_bytes / MIB, 1),
        **verdict.figures(),
        **figures,
        "held": held,
        "ok": all(held.values()),
    }
    print(json.dumps(outcome, indent=1))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
