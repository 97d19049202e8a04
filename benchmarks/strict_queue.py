"""
How near one strict queue comes to what it can be at best.

    python benchmarks/strict_queue.py [--callbacks 2000] [--rounds 5] [--directory DIRECTORY]

In one queue no request begins before the result of the one before is durable, so no dispatcher can be faster than
one request and one durable commit in turns. Each round measures both of these apart, by ``PoolManager.request`` in one
thread and by `sqlite3` that inserts a row of 1 KiB (WAL, synchronous=FULL), before and after one dispatcher that drains
a queue on an SQLite file beside. All send the same 1 KiB POSTs. Prints medians.
"""

from __future__ import annotations

import argparse
import logging
import sqlite3
import time
from contextlib import closing
from functools import partial
from pathlib import Path

from drain import drained, fill, receiver, send_all
from figures import Figure, figure_of, show

import stores
from callbackq import SQLiteDataAccess

ROW = b"x" * 1024


def commit_all(file: Path, number: int) -> float:
    """Say how many seconds so many commits take."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE bare (number INTEGER PRIMARY KEY, body BLOB)")
        began = time.perf_counter()
        for nth in range(number):
            connection.execute("INSERT INTO bare VALUES (?, ?)", (nth, ROW))
            connection.commit()
        return time.perf_counter() - began


def at_best(file: Path, url: str, number: int) -> tuple[float, float]:
    """Say how many milliseconds a request takes, and a commit."""
    began = time.perf_counter()
    send_all(url, number)
    return (time.perf_counter() - began) / number * 1000, commit_all(file, number) / number * 1000


def figures(options: argparse.Namespace) -> list[Figure]:
    number, requests, commits, callbacks = options.callbacks, [], [], []
    with stores.ground(options) as ground, receiver() as url:
        assert isinstance(ground.where, Path)
        for nth in range(options.rounds):
            make_store = partial(SQLiteDataAccess, ground.where / f"queue {nth}.db")
            fill(make_store, url, number, queues=1)
            before = at_best(ground.where / f"before {nth}.db", url, number)
            seconds, _ = drained(make_store, processes=1)
            after = at_best(ground.where / f"after {nth}.db", url, number)
            requests.append((before[0] + after[0]) / 2)
            commits.append((before[1] + after[1]) / 2)
            callbacks.append(seconds / number * 1000)
    ratios = [
        (request + commit) / callback for request, commit, callback in zip(requests, commits, callbacks, strict=True)
    ]
    baseline = "PoolManager.request in one thread, and a durable commit of sqlite3"
    return [
        figure_of(ratios, "one strict queue", "x at best", target=0.80, baseline=baseline),
        figure_of(callbacks, "one strict queue: a callback", "ms", better="less"),
        figure_of(requests, "one strict queue: a request", "ms", better="less"),
        figure_of(commits, "one strict queue: a commit", "ms", better="less"),
    ]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--callbacks", type=int, default=2000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--directory", type=Path, help="where the files of SQLite go")
    options.set_defaults(store="sqlite")
    return options


if __name__ == "__main__":
    logging.disable()
    show(figures(parser().parse_args()))
