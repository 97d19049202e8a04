"""
What memory a dispatcher's process takes, whatever the backlog, and what a callback takes in the store in memory.

    python benchmarks/memory.py [--backlog 5000000] [--seconds 10] [--callbacks 200000] [--directory DIRECTORY]

The dispatcher works on an SQLite file in a process of its own that does nothing else. What it holds is read when it
has drained 10,000 callbacks of 1 KiB, and, with the long backlog, after some seconds of draining it; so is the most it
has held. Then callbacks of 1 KiB are stored in memory, in a process of their own; each brings its own body, and headers
and phases that are the same for all. Linux only.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from drain import fill, receiver
from figures import Figure, figure_of, show
from worker import memory_mib
from workers import Report, worker

from callbackq import CallbackData, CallbackRequest, InMemoryDataAccess, RetryPhase, SQLiteDataAccess

SHORT_BACKLOG = 10_000
QUEUES = 100
LONGEST_SECONDS = 300.0
POLL_SECONDS = 0.25
WARM_UP = 1_000
"""Callbacks after which a store has what it needs but once."""

PHASES = (RetryPhase(retries=5, delay=timedelta(seconds=10)), RetryPhase(retries=12, delay=timedelta(minutes=5)))
HEADERS = {"Content-Type": "application/octet-stream"}


def drained(file: Path, backlog: int, url: str) -> Report:
    """Let a worker drain the short backlog to its end."""
    fill(partial(SQLiteDataAccess, file), url, backlog, QUEUES)
    began = time.perf_counter()
    with worker(file) as one:
        while (report := one.report()).delivered < backlog:
            assert report.at - began < LONGEST_SECONDS
            time.sleep(POLL_SECONDS)
    return report


def draining(file: Path, seconds: float) -> Report:
    """Let a worker drain a long backlog for a while."""
    with worker(file) as one:
        one.rate(seconds)
        return one.report()


def bytes_per_callback(callbacks: int, queues: int) -> float:
    """Store callbacks in memory, over so many queues; 0 for none."""
    store = InMemoryDataAccess()
    requests = (
        CallbackRequest(
            url="https://receiver.example/hook",
            post_data=CallbackData(headers=HEADERS, data=secrets.token_bytes(1024)),
            queue_id=f"queue {number % queues}" if queues else "",
            retry_phases=PHASES,
        )
        for number in range(WARM_UP + callbacks)
    )
    for request in islice(requests, WARM_UP):
        store.store_callback_request(request)
    before = memory_mib("VmRSS")
    for request in requests:
        store.store_callback_request(request)
    return (memory_mib("VmRSS") - before) * 2**20 / callbacks


def alone(callbacks: int, queues: int) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(bytes_per_callback, callbacks, queues).result()


def figures(options: argparse.Namespace) -> list[Figure]:
    return [*of_workers(options), *of_the_store_in_memory(options)]


def of_workers(options: argparse.Namespace) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="callbackq-bench-", dir=options.directory) as folder, receiver() as url:
        short = [drained(Path(folder) / f"short {nth}.db", SHORT_BACKLOG, url) for nth in range(options.rounds)]
        fill(partial(SQLiteDataAccess, Path(folder) / "long.db"), url, options.backlog, QUEUES)
        long = [draining(Path(folder) / "long.db", options.seconds) for _ in range(options.rounds)]
    for reports, backlog, target in (short, SHORT_BACKLOG, 45.0), (long, options.backlog, 55.0):
        held = [report.resident_mib for report in reports]
        most = [report.most_mib for report in reports]
        yield figure_of(held, f"a worker's memory, backlog of {backlog:,}", "MiB", target=target, better="less")
        yield figure_of(most, f"the most it held, backlog of {backlog:,}", "MiB", better="less")


def of_the_store_in_memory(options: argparse.Namespace) -> Iterator[Figure]:
    targets = {0: 2000.0, QUEUES: 2000.0, options.callbacks: None}
    for queues, target in targets.items():
        rounds = [alone(options.callbacks, queues) for _ in range(options.rounds)]
        name = f"a callback of 1 KiB in memory, {queues or 'no'} queues"
        yield figure_of(rounds, name, "bytes", target=target, better="less")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backlog", type=int, default=5_000_000, help="the long one")
    options.add_argument("--seconds", type=float, default=10.0, help="of draining it")
    options.add_argument("--callbacks", type=int, default=200_000, help="stored in memory")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--directory", type=Path, help="where the files of SQLite go")
    return options


if __name__ == "__main__":
    logging.disable()
    show(figures(parser().parse_args()))
