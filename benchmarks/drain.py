"""
How fast a backlog is drained, as a ratio to a bare urllib3 loop against the same receiver.

    python benchmarks/drain.py [--store postgres] [--callbacks 3000] [--rounds 5]

Each round sends the same 1 KiB POSTs by ``PoolManager.request`` in one thread (= 1.00) and through one dispatcher, then
through two in processes of their own, on a SQLite file (synchronous=FULL) or a PostgreSQL server, every outcome
recorded: callbacks without a queue, then over 100 queues. Prints medians. The CPU is that of the processes that send;
a server's own is not in it.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import urllib3

import stores
from callbackq import CallbackData, CallbackRequest, Dispatcher, HTTPTransport, TargetPolicy
from callbackq.events import ObservedEvent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from stores import Ground, MakeStore

BODY = b"x" * 1024
HEADERS = {"Content-Type": "application/octet-stream"}
LONGEST_SECONDS = 300
POLL_SECONDS = 0.005


class Silence:
    def observe(self, event: ObservedEvent) -> None:
        pass


@contextmanager
def receiver() -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("receiver.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/"
        process.stdin.close()


def send_all(url: str, number: int) -> None:
    with urllib3.PoolManager() as pool:
        for _ in range(number):
            pool.request("POST", url, body=BODY, headers=HEADERS, retries=False)


def fill(make_store: MakeStore, url: str, number: int, queues: int) -> None:
    data = CallbackData(headers=HEADERS, data=BODY)
    requests = [
        CallbackRequest(url=url, post_data=data, queue_id=f"q{nth % queues}" if queues else "") for nth in range(number)
    ]
    with make_store() as store:
        for start in range(0, number, 1000):
            store.store_callback_requests(requests[start : start + 1000])


def drain(make_store: MakeStore, line: Connection) -> None:
    """Deliver when told to, and until told to stop, in a process of its own, and tell what CPU that took."""
    logging.getLogger("callbackq").setLevel(logging.ERROR)
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
    with closing(transport), make_store() as store:
        dispatcher = Dispatcher(store, transport=transport, observer=Silence())
        store.next_due()
        line.send(None)
        line.recv()
        cpu = time.process_time()
        with dispatcher:
            line.recv()
        line.send(time.process_time() - cpu)


def drained(make_store: MakeStore, processes: int) -> tuple[float, float]:
    """Drain a store with so many processes, and say how long that took, and how much CPU."""
    spawn = multiprocessing.get_context("spawn")
    lines, workers = [], []
    for _ in range(processes):
        ours, theirs = spawn.Pipe()
        worker = spawn.Process(target=drain, args=(make_store, theirs), daemon=True)
        worker.start()
        theirs.close()  # so that we notice its end
        lines.append(ours)
        workers.append(worker)
    for line in lines:
        line.recv()
    began = time.perf_counter()
    for line in lines:
        line.send(None)
    with make_store() as store:
        while store.next_due() is not None:
            assert time.perf_counter() - began < LONGEST_SECONDS
            time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - began
    for line in lines:
        line.send(None)
    cpu = sum(line.recv() for line in lines)
    for worker in workers:
        worker.join()
    return seconds, cpu


class Figures:
    """What the rounds of one way to send took."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.rates: list[float] = []
        self.ratios: list[float] = []
        self.cpu: list[float] = []

    def add(self, seconds: float, cpu: float, raw_seconds: float) -> None:
        self.rates.append(self._number / seconds)
        self.ratios.append(raw_seconds / seconds)
        self.cpu.append(cpu / self._number * 1000)


def measure(ground: Ground, url: str, number: int, rounds: int) -> dict[str, Figures]:
    shapes = {"no queues": 0, "100 queues": 100}
    figures = {"raw urllib3": Figures(number)}
    names = (f"store {nth}" for nth in count())
    for _ in range(rounds):
        began, cpu = time.perf_counter(), time.process_time()
        send_all(url, number)
        raw_seconds = time.perf_counter() - began
        figures["raw urllib3"].add(raw_seconds, time.process_time() - cpu, raw_seconds)
        for processes in 1, 2:
            for shape, queues in shapes.items():
                make_store = ground.maker(next(names))
                fill(make_store, url, number, queues)
                seconds, cpu = drained(make_store, processes)
                name = f"{shape}, {processes} process{'es' * (processes > 1)}"
                figures.setdefault(name, Figures(number)).add(seconds, cpu, raw_seconds)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    stores.add_options(parser)
    options = parser.parse_args()
    with stores.ground(options) as ground, receiver() as url:
        figures = measure(ground, url, options.callbacks, options.rounds)
    about = f"({options.store}, {options.callbacks} callbacks of 1 KiB, median of {options.rounds})"
    print(f"{'':24} {'/s':>8} {'x raw':>6} {'CPU s/1,000':>12}   {about}")
    for name, one in figures.items():
        print(f"{name:24} {median(one.rates):8,.0f} {median(one.ratios):6.2f} {median(one.cpu):12.3f}")


if __name__ == "__main__":
    main()
