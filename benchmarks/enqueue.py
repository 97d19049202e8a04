"""
How fast callbacks are stored: one by one, as a ratio to a bare INSERT and its commit, and in batches.

    python benchmarks/enqueue.py [--store postgres] [--callbacks 500] [--rounds 7]

The bare insert writes the same id, URL, headers and body of 1 KiB into one table with a primary key, through the
driver, in the same database, and is as durable. All take turns; prints medians, and the CPU that a callback costs this
process and the PostgreSQL server, which differs less than times do on a machine that has other work.
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
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import stores
from callbackq import CallbackData, CallbackRequest

if TYPE_CHECKING:
    from stores import Ground, Store
    from support.postgres import PostgreSQLServer

BATCH = 1_000
QUEUES = 100
URL = "https://receiver.example/hook"
DATA = CallbackData(headers={"Content-Type": "application/octet-stream"}, data=b"x" * 1024)
TABLE = "CREATE TABLE bare (id TEXT PRIMARY KEY, url TEXT, headers TEXT, body {bytes})"

Work = Callable[[int], None]


def one_by_one(store: Store, queues: int) -> Work:
    def work(count: int) -> None:
        for number in range(count):
            store.store_callback_request(request(number, queues))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", type=int, default=500, help="for each round of those stored one by one")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    stores.add_options(parser)
    options = parser.parse_args()
    logging.disable()
    with ExitStack() as stack:
        ground = stack.enter_context(stores.ground(options))
        store = stack.enter_context(ground.maker("enqueue")())
        store.store_callback_requests([])
        singles = {
            "bare insert": stack.enter_context(bare(ground)),
            "one by one, no queues": one_by_one(store, 0),
            f"one by one, {QUEUES} queues": one_by_one(store, QUEUES),
        }
        batches = {
            f"batches of {BATCH}, no queues": in_batches(store, 0),
            f"batches of {BATCH}, {QUEUES} queues": in_batches(store, QUEUES),
        }
        measured = {name: Measured(work, options.callbacks, ground.server) for name, work in singles.items()}
        measured |= {name: Measured(work, options.batches * BATCH, ground.server) for name, work in batches.items()}
        for _ in range(options.rounds):
            for one in measured.values():
                one.run_round()
    raw = measured["bare insert"]
    print(f"{'':28} {'/s':>8} {'x bare':>7} {'CPU µs here':>12} {'in the server':>14}")
    for name, one in measured.items():
        ratio = median(bare / own for bare, own in zip(raw.seconds, one.seconds, strict=True))
        print(
            f"{name:28} {1 / median(one.seconds):8,.0f} {ratio if name in singles else 0:7.2f} "
            f"{median(one.client_us):12.0f} {median(one.server_us):14.0f}"
        )


if __name__ == "__main__":
    main()
