"""
What a claim of 100 and the record of those 100 cost, with a short and with a long backlog.

The promise: the cost doesn't grow with the backlog, in none of four shapes: one deep queue (where a claim takes one),
a queue for each callback, 1,000 queues, and 1,000 queues behind 100,000 blocked ones, each of which holds a callback
that waits for its retry and one that waits behind that.

    python benchmarks/claim.py [--backlog 1000000] [--rounds 50] [--directory DIRECTORY]

Exits with 1 when a shape costs more than 2.5 times as much with the long backlog as with 1,000 callbacks.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from pathlib import Path
from statistics import median

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackAttempt, CallbackData, CallbackRequest, CallbackState
from callbackq.dataaccess import Acquired, AttemptRecord
from callbackq.stores.sqlite import SQLiteDataAccess

SHORT_BACKLOG = 1_000
BLOCKED_QUEUES = 100_000
BATCH = 1_000
GREATEST_RATIO = 2.5

DELIVERED = Transition(state=CallbackState.SUCCEEDED, counted=True)
WAIT_AN_HOUR = Transition(state=CallbackState.WAITING, counted=True, delay=timedelta(hours=1))
ATTEMPT = CallbackAttempt(
    status_code=200,
    response=CallbackData(headers={"Server": "receiver"}, data=b"ok"),
    time=datetime.now(UTC),
    duration=timedelta(milliseconds=20),
    machine_name="machine",
)

# Shape to the queue of the nth callback.
SHAPES: dict[str, Callable[[int], str]] = {
    "1 queue, all deep": lambda number: "queue",
    "a queue each": lambda number: "",
    "1,000 queues": lambda number: f"queue-{number % 1000}",
    "1,000 queues behind 100k blocked": lambda number: f"queue-{number % 1000}",
}


def requests(queue_of: Callable[[int], str]) -> Iterator[CallbackRequest]:
    for number in count():
        yield CallbackRequest(
            url="https://receiver.example/hook",
            post_data=CallbackData(headers={"Content-Type": "application/json"}, data=b"x" * 100),
            queue_id=queue_of(number),
        )


def fill(store: SQLiteDataAccess, some: Iterator[CallbackRequest], number: int) -> None:
    for start in range(0, number, BATCH):
        store.store_callback_requests(list(islice(some, min(BATCH, number - start))))


def claim(store: SQLiteDataAccess, limit: int) -> list[Acquired]:
    return store.acquire_locks("machine", lock_timeout=timedelta(minutes=5), limit=limit)


def record(store: SQLiteDataAccess, claimed: list[Acquired], transition: Transition) -> None:
    store.record_attempts(
        [AttemptRecord(acquired=acquired, attempt=ATTEMPT, transition=transition) for acquired in claimed]
    )


def block_queues(store: SQLiteDataAccess) -> None:
    fill(store, requests(lambda number: f"blocked-{number % BLOCKED_QUEUES}"), 2 * BLOCKED_QUEUES)
    while claimed := claim(store, BATCH):
        record(store, claimed, WAIT_AN_HOUR)
        if len(claimed) < BATCH:
            break


class Store:
    """A store with a backlog, and what its rounds took."""

    def __init__(self, path: Path, shape: str, backlog: int) -> None:
        self._store = SQLiteDataAccess(path)
        self._requests = requests(SHAPES[shape])
        self._expected = 1 if shape.startswith("1 queue") else 100
        self._claims: list[float] = []
        self._records: list[float] = []
        if "blocked" in shape:
            block_queues(self._store)
        began = time.perf_counter()
        fill(self._store, self._requests, backlog)
        self.stored_per_second = backlog / (time.perf_counter() - began)

    def run_round(self) -> None:
        began = time.perf_counter()
        claimed = claim(self._store, 100)
        self._claims.append(time.perf_counter() - began)
        assert len(claimed) == self._expected
        began = time.perf_counter()
        record(self._store, claimed, DELIVERED)
        self._records.append(time.perf_counter() - began)
        fill(self._store, self._requests, len(claimed))

    def medians_ms(self) -> tuple[float, float]:
        return median(self._claims) * 1000, median(self._records) * 1000

    def close(self) -> None:
        self._store.close()


def compare(directory: Path, shape: str, backlog: int, rounds: int) -> tuple[Store, Store]:
    short = Store(directory / "short.db", shape, SHORT_BACKLOG)
    long = Store(directory / "long.db", shape, backlog)
    for _ in range(rounds):
        # In turns, so that whatever else the machine does meets both alike.
        short.run_round()
        long.run_round()
    short.close()
    long.close()
    return short, long


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--backlog", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--directory", type=Path, help="where the files go, about 1 GB for a million callbacks")
    options = parser.parse_args()
    logging.disable()
    worst = 0.0
    print(
        f"| shape | {SHORT_BACKLOG:,}: claim / record ms | {options.backlog:,}: claim / record ms | ratio | stored/s |"
    )
    print("| --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            stores = compare(Path(directory), shape, options.backlog, options.rounds)
        (short_claim, short_record), (long_claim, long_record) = (store.medians_ms() for store in stores)
        ratio = (long_claim + long_record) / (short_claim + short_record)
        worst = max(worst, ratio)
        print(
            f"| {shape} | {short_claim:.2f} / {short_record:.2f} | {long_claim:.2f} / {long_record:.2f} | {ratio:.2f} "
            f"| {stores[1].stored_per_second:,.0f} |",
            flush=True,
        )
    return int(worst > GREATEST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
