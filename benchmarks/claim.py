"""
What a claim of 100 and the record of those 100 cost, with a short and with a long backlog.

The promise: the cost doesn't grow with the backlog, in none of five shapes: one deep queue (where a claim takes one),
callbacks without a queue, a named queue for each, 1,000 queues, and 1,000 queues behind 100,000 blocked ones, each of
which holds a callback that waits for its retry and one that waits behind that. Times, and the CPU of this process,
which other work on the machine and its disk leave alone; on PostgreSQL the work is the server's.

    python benchmarks/claim.py [--store postgres] [--backlog 1000000] [--rounds 50] [--directory DIRECTORY]

Exits with 1 when a claim costs more than twice as much with a million callbacks as with 1,000; with more, 2.5 times.

    python benchmarks/claim.py --store postgres --old-snapshot 200000

measures in place of it what claims cost while so many callbacks are delivered and some other transaction stays open, so
that nothing dead can be removed: with a queue for each, and in 200 deep queues. Exits with 1 when claims in the last
tenth took more than twice as long as in the first.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from statistics import median
from typing import TYPE_CHECKING

from attrs import frozen
from figures import Figure, show

import stores
from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackAttempt, CallbackData, CallbackRequest, CallbackState
from callbackq.dataaccess import Acquired, AttemptRecord

if TYPE_CHECKING:
    from stores import Ground, MakeStore, Store

SHORT_BACKLOG = 1_000
BATCH = 1_000
MILLION = 1_000_000
DEEP_QUEUES = 200
BEHIND = 4_000
GREATEST_RISE = 2.0

DELIVERED = Transition(state=CallbackState.SUCCEEDED, counted=True)
WAIT_AN_HOUR = Transition(state=CallbackState.WAITING, counted=True, delay=timedelta(hours=1))
ATTEMPT = CallbackAttempt(
    status_code=200,
    response=CallbackData(headers={"Server": "receiver"}, data=b"ok"),
    time=datetime.now(UTC),
    duration=timedelta(milliseconds=20),
    machine_name="machine",
)

BEHIND_BLOCKED = "1,000 queues behind blocked ones"

# Shape to the queue of the nth callback.
SHAPES: dict[str, Callable[[int], str]] = {
    "1 queue, all deep": lambda number: "queue",
    "no queues": lambda number: "",
    "a queue each": lambda number: f"queue-{number}",
    "1,000 queues": lambda number: f"queue-{number % 1000}",
    BEHIND_BLOCKED: lambda number: f"queue-{number % 1000}",
}


def requests(queue_of: Callable[[int], str]) -> Iterator[CallbackRequest]:
    for number in count():
        yield CallbackRequest(
            url="https://receiver.example/hook",
            post_data=CallbackData(headers={"Content-Type": "application/json"}, data=b"x" * 100),
            queue_id=queue_of(number),
        )


def fill(store: Store, some: Iterator[CallbackRequest], number: int) -> None:
    for start in range(0, number, BATCH):
        store.store_callback_requests(list(islice(some, min(BATCH, number - start))))


def claim(store: Store, limit: int) -> list[Acquired]:
    return store.acquire_locks("machine", lock_timeout=timedelta(minutes=5), limit=limit)


def record(store: Store, claimed: list[Acquired], transition: Transition) -> None:
    store.record_attempts(
        [AttemptRecord(acquired=acquired, attempt=ATTEMPT, transition=transition) for acquired in claimed]
    )


def block_queues(store: Store, queues: int) -> None:
    fill(store, requests(lambda number: f"blocked-{number % queues}"), 2 * queues)
    while claimed := claim(store, BATCH):
        record(store, claimed, WAIT_AN_HOUR)
        if len(claimed) < BATCH:
            break


@frozen
class Cost:
    """Of a claim of 100, or of a record of those, in milliseconds: of time, and of this process's CPU."""

    time: float
    cpu: float

    @staticmethod
    @contextmanager
    def measured(costs: list[Cost]) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        yield
        costs.append(Cost((time.perf_counter() - began) * 1000, (time.process_time() - cpu) * 1000))


class Trial:
    """A store with a backlog, and what its rounds took."""

    def __init__(self, make_store: MakeStore, shape: str, backlog: int, blocked: int) -> None:
        self._store = make_store()
        self._store.open()
        self._requests = requests(SHAPES[shape])
        self._expected = 1 if shape.startswith("1 queue") else 100
        self.claims: list[Cost] = []
        self.records: list[Cost] = []
        if shape == BEHIND_BLOCKED:
            block_queues(self._store, blocked)
        began = time.perf_counter()
        fill(self._store, self._requests, backlog)
        self.stored_per_second = backlog / (time.perf_counter() - began)

    def run_round(self) -> None:
        with Cost.measured(self.claims):
            claimed = claim(self._store, 100)
        assert len(claimed) == self._expected
        with Cost.measured(self.records):
            record(self._store, claimed, DELIVERED)
        fill(self._store, self._requests, len(claimed))

    def close(self) -> None:
        self._store.close()


def compare(ground: Ground, shape: str, options: argparse.Namespace) -> tuple[Trial, Trial]:
    short = Trial(ground.maker("short"), shape, SHORT_BACKLOG, options.blocked)
    long = Trial(ground.maker("long"), shape, options.backlog, options.blocked)
    for _ in range(options.rounds):
        # In turns, so that whatever else the machine does meets both alike.
        short.run_round()
        long.run_round()
    short.close()
    long.close()
    return short, long


@contextmanager
def old_snapshot(conninfo: str) -> Iterator[None]:
    """A transaction that somebody has forgotten, of before anything was stored."""
    import psycopg

    with psycopg.connect(conninfo) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT count(*) FROM pg_class")
        yield
        connection.rollback()


def deliver_behind_old_snapshot(ground: Ground, name: str, queue_of: Callable[[int], str], number: int) -> float:
    claims: list[float] = []
    looks: list[float] = []
    records: list[float] = []
    some = requests(queue_of)
    with ground.maker(name)() as store, old_snapshot(str(ground.where)):
        fill(store, some, BEHIND)
        for _ in range(number // 100):
            began = time.perf_counter()
            claimed = claim(store, 100)
            claims.append(time.perf_counter() - began)
            assert len(claimed) == 100
            began = time.perf_counter()
            record(store, claimed, DELIVERED)
            records.append(time.perf_counter() - began)
            began = time.perf_counter()
            store.next_due()
            looks.append(time.perf_counter() - began)
            fill(store, some, 100)
    tenth = len(claims) // 10
    for what, took in ("claim", claims), ("next_due", looks), ("record", records):
        parts = [median(took[start : start + tenth]) * 1000 for start in range(0, len(took), tenth)]
        print(f"| {name} | {what} | {' / '.join(f'{part:.1f}' for part in parts)} | {parts[-1] / parts[0]:.2f} |")
    return median(claims[-tenth:]) / median(claims[:tenth])


def show_old_snapshot(options: argparse.Namespace) -> int:
    print("| shape | what | ms, median of each tenth | last / first |")
    print("| --- | --- | --- | --- |")
    shapes: dict[str, Callable[[int], str]] = {
        "alone": lambda number: "",
        "deep": lambda number: f"queue-{number % DEEP_QUEUES}",
    }
    with stores.ground(options) as ground:
        rises = [deliver_behind_old_snapshot(ground, name, shapes[name], options.old_snapshot) for name in shapes]
    return int(max(rises) > GREATEST_RISE)


def figures(options: argparse.Namespace) -> list[Figure]:
    return [figure for shape in SHAPES for figure in figures_of(shape, options)]


def figures_of(shape: str, options: argparse.Namespace) -> Iterator[Figure]:
    target = 2.0 if options.backlog <= MILLION else 2.5
    with stores.ground(options) as ground:
        short, long = compare(ground, shape, options)
    where = f"at a backlog of {options.backlog:,}, {shape}, {stores.NAMES[options.store]}"
    baseline = f"the same, {SHORT_BACKLOG:,} stored"
    for name, of_long, of_short, most in (
        (f"claim {where}", long.claims, short.claims, target),
        (f"record {where}", long.records, short.records, None),
    ):
        took, took_before = median(one.time for one in of_long), median(one.time for one in of_short)
        yield Figure(name, took / took_before, "x short backlog", most, "less", baseline=baseline)
        if options.store == "sqlite":
            cpu = median(one.cpu for one in of_long) / median(one.cpu for one in of_short)
            yield Figure(f"{name}: CPU", cpu, "x short backlog", most, "less", baseline=baseline)
        yield Figure(f"{name}: time", took, "ms", better="less")
    yield Figure(f"storing {where}", long.stored_per_second, "callbacks/s")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backlog", type=int, default=MILLION)
    options.add_argument("--blocked", type=int, default=100_000, metavar="QUEUES")
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--old-snapshot", type=int, metavar="CALLBACKS")
    stores.add_options(options)
    return options


def main() -> int:
    options = parser().parse_args()
    logging.disable()
    if options.old_snapshot:
        return show_old_snapshot(options)
    is_met = True
    for shape in SHAPES:
        found = list(figures_of(shape, options))
        show(found)
        is_met = is_met and all(one.met is not False for one in found)
    return int(not is_met)


if __name__ == "__main__":
    sys.exit(main())
