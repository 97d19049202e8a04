"""
huey on SQLite: see `peer`.

As its documentation has it: one consumer with processes as workers, the file in WAL mode, results kept. ``fsync`` makes
it as durable as callbackq. Other than callbackq it takes a task off the queue before it runs. A task is what one writes
with urllib3: a pool for each process, since connections can't be shared.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
from typing import Any

import peer
import urllib3
from huey import SqliteHuey

LONGEST_SECONDS = 60.0


def queue(where: str) -> SqliteHuey:
    return SqliteHuey("callbacks", filename=where, fsync=True, timeout=LONGEST_SECONDS)


def fill(where: str, number: int) -> None:
    send = task(queue(where), "")
    for _ in range(number):
        send(peer.BODY)


def work(where: str, url: str, processes: int) -> None:
    huey = queue(where)
    task(huey, url)
    ready = multiprocessing.Barrier(processes + 1)
    go = multiprocessing.Event()

    @huey.on_startup()
    def wait() -> None:
        ready.wait(LONGEST_SECONDS)
        go.wait()

    def start() -> None:
        ready.wait(LONGEST_SECONDS)
        peer.wait_for_start()
        go.set()

    threading.Thread(target=start, daemon=True).start()
    # It looks for tasks after 10 ms when there was none, not after 100: what waits is found sooner.
    huey.create_consumer(workers=processes, worker_type="process", initial_delay=0.01, periodic=False).run()


def task(huey: SqliteHuey, url: str) -> Any:
    pool = urllib3.PoolManager()

    @huey.task(name="send")
    def send(body: bytes) -> int:
        status = pool.request("POST", url, body=body, headers=peer.HEADERS, retries=False).status
        if status != 200:
            raise ValueError(status)
        return status

    return send


if __name__ == "__main__":
    logging.disable()
    peer.main(fill, work)
