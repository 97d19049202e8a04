"""
How fast callbacks are stored: one by one, as a ratio to a bare INSERT and its commit, from many threads, in batches.

    python benchmarks/enqueue.py [--store postgres] [--callbacks 2000] [--rounds 7]

The bare insert writes the same id, URL, headers and body of 1 KiB into one table with a primary key, through the
driver, in the same database, and is as durable. 16 threads that store one by one share commits on SQLite. All take
turns; prints medians, and the CPU that a callback costs this process and the PostgreSQL server, which differs less than
times do on a machine that has other work.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from figures import Figure, figure_of, show

import stores
from callbackq import CallbackData, CallbackRequest

if TYPE_CHECKING:
    from stores import Ground, Store
    from support.postgres import PostgreSQLServer

BATCH = 1_000
QUEUES = 100
THREADS = 16
URL = "https://receiver.example/hook"
DATA = CallbackData(headers={"Content-Type": "application/octet-stream"}, data=b"x" * 1024)
TABLE = "CREATE TABLE bare (id TEXT PRIMARY KEY, url TEXT, headers TEXT, body {bytes})"

BARE = "bare insert"
ONE_BY_ONE = "one by one, no queues"
FROM_THREADS = f"one by one, {THREADS} threads"

Work = Callable[[int], None]


def one_by_one(store: Store, queues: int) -> Work:
    def work(count: int) -> None:
        for number in range(count):
            store.store_callback_request(request(number, queues))

    return work


def from_threads(store: Store) -> Work:
    one_thread = one_by_one(store, 0)

    def work(count: int) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(one_thread, count // THREADS) for _ in range(THREADS)]:
                done.result()

    return work


def in_batches(store: Store, queues: int) -> Work:
    def work(count: int) -> None:
        for _ in range(count // BATCH):
            store.store_callback_requests([request(number, queues) for number in range(BATCH)])

    return work


def request(number: int, queues: int) -> CallbackRequest:
    return CallbackRequest(url=URL, post_data=DATA, queue_id=f"q{number % queues}" if queues else "")


def row() -> tuple[str, str, str, bytes | None]:
    return secrets.token_hex(16), URL, json.dumps(dict(DATA.headers)), DATA.data


@contextmanager
def bare(ground: Ground) -> Iterator[Work]:
    if isinstance(ground.where, Path):
        with closing(sqlite3.connect(ground.where / "bare.db")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(TABLE.format(bytes="BLOB"))

            def insert(count: int) -> None:
                for _ in range(count):
                    connection.execute("INSERT INTO bare VALUES (?, ?, ?, ?)", row())
                    connection.commit()

            yield insert
    else:
        import psycopg

        with psycopg.connect(ground.where) as session:
            session.execute(TABLE.format(bytes="BYTEA"))
            session.commit()

            def insert_there(count: int) -> None:
                for _ in range(count):
                    session.execute("INSERT INTO bare VALUES (%s, %s, %s, %s)", row())
                    session.commit()

            yield insert_there


def server_cpu_seconds(server: PostgreSQLServer | None) -> float:
    """What the server's processes have used, those that have ended included (Linux only)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat") if server else ():
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        own, of_children = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
        if server and int(stat.parent.name) == server.pid:
            ticks += own + of_children
        elif server and int(fields[1]) == server.pid:
            ticks += own
    return ticks / os.sysconf("SC_CLK_TCK")


class Measured:
    """What each round of some work took, for each callback."""

    def __init__(self, work: Work, count: int, server: PostgreSQLServer | None) -> None:
        self._work = work
        self._count = count
        self._server = server
        self.seconds: list[float] = []
        self.client_us: list[float] = []
        self.server_us: list[float] = []

    def run_round(self) -> None:
        server, client, began = server_cpu_seconds(self._server), time.process_time(), time.perf_counter()
        self._work(self._count)
        self.seconds.append((time.perf_counter() - began) / self._count)
        self.client_us.append((time.process_time() - client) / self._count * 1e6)
        self.server_us.append((server_cpu_seconds(self._server) - server) / self._count * 1e6)

    def ratios(self, baseline: Measured) -> list[float]:
        """Say how many times as fast as *baseline* it was, round by round."""
        return [other / own for other, own in zip(baseline.seconds, self.seconds, strict=True)]


def measure(options: argparse.Namespace) -> dict[str, Measured]:
    with ExitStack() as stack:
        ground = stack.enter_context(stores.ground(options))
        store = stack.enter_context(ground.maker("enqueue")())
        store.store_callback_requests([])
        few, many = options.callbacks, options.batches * BATCH
        # Apart: what many write at once goes on being written to the disk while others are at work.
        alternating: tuple[tuple[tuple[str, Work, int], ...], ...] = (
            (
                (BARE, stack.enter_context(bare(ground)), few),
                (ONE_BY_ONE, one_by_one(store, 0), few),
                (f"one by one, {QUEUES} queues", one_by_one(store, QUEUES), few),
                (FROM_THREADS, from_threads(store), few * 4),
            ),
            (
                (f"batches of {BATCH}, no queues", in_batches(store, 0), many),
                (f"batches of {BATCH}, {QUEUES} queues", in_batches(store, QUEUES), many),
            ),
        )
        measured: dict[str, Measured] = {}
        for part in alternating:
            own = {name: Measured(work, count, ground.server) for name, work, count in part}
            for _ in range(options.rounds):
                for one in own.values():
                    one.run_round()
            measured |= own
    return measured


def figures(options: argparse.Namespace) -> list[Figure]:
    return figures_of(measure(options), options.store)


def figures_of(measured: dict[str, Measured], store: str) -> list[Figure]:
    found = []
    for name, one in measured.items():
        label = f"enqueue, {name}, {stores.NAMES[store]}"
        rates = [1 / seconds for seconds in one.seconds]
        if name in (ONE_BY_ONE, f"one by one, {QUEUES} queues"):
            ratios = one.ratios(measured[BARE])
            found.append(figure_of(ratios, label, "x bare insert", target=0.85, baseline="INSERT and commit"))
        if name == FROM_THREADS:
            # In PostgreSQL it is the server that groups commits, and as many connections as the host allows.
            target = 3.0 if store == "sqlite" else None
            ratios = one.ratios(measured[ONE_BY_ONE])
            found.append(figure_of(ratios, label, "x one thread", target=target, baseline="one thread, one by one"))
        found.append(figure_of(rates, f"{label}: rate", "callbacks/s", target=least_rate(name, store)))
    return found


def least_rate(name: str, store: str) -> float | None:
    if name.startswith("batches"):
        return 35_000.0
    return 10_000.0 if name == FROM_THREADS and store == "sqlite" else None


def show_costs(measured: dict[str, Measured]) -> None:
    print(f"\n{'':28} {'CPU µs here':>12} {'in the server':>14}")
    for name, one in measured.items():
        print(f"{name:28} {median(one.client_us):12.0f} {median(one.server_us):14.0f}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--callbacks", type=int, default=2000, help="stored one by one in a round; by threads four times as many"
    )
    options.add_argument("--batches", type=int, default=10)
    options.add_argument("--rounds", type=int, default=7)
    stores.add_options(options)
    return options


def main() -> None:
    options = parser().parse_args()
    logging.disable()
    measured = measure(options)
    show(figures_of(measured, options.store))
    show_costs(measured)


if __name__ == "__main__":
    main()
