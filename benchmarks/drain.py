"""
How fast a backlog is drained, as a ratio to a bare urllib3 loop against the same receiver.

    python benchmarks/drain.py [--store postgres] [--callbacks 10000] [--rounds 5]

Each round sends 1 KiB POSTs through one dispatcher, then through two in processes of their own, on a SQLite file
(synchronous=FULL) or a PostgreSQL server, every outcome recorded: callbacks without a queue, then over 100 queues.
Before and after each, the same requests go out by ``PoolManager.request`` in one thread: their mean is 1.00. The CPU is
that of the processes that send; a server's own is not in it.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
from contextlib import closing
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import urllib3
from figures import Figure, figure_of, show
from receiver import receiver

import stores
from callbackq import CallbackData, CallbackRequest, Dispatcher, HTTPTransport, TargetPolicy
from callbackq.events import ObservedEvent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from stores import Ground, MakeStore

BODY = b"x" * 1024
HEADERS = {"Content-Type": "application/octet-stream"}
LONGEST_SECONDS = 300
POLL_SECONDS = 0.01
QUEUES = 100

RAW = "PoolManager.request in one thread"
CPU = "s CPU per 1,000"
TARGETS = {("sqlite", 1): 1.30, ("sqlite", 2): 1.60, ("postgres", 2): 1.30}
MOST_CPU = 0.32


class Silence:
    def observe(self, event: ObservedEvent) -> None:
        pass


def send_all(url: str, number: int) -> None:
    with urllib3.PoolManager() as pool:
        for _ in range(number):
            pool.request("POST", url, body=BODY, headers=HEADERS, retries=False)


class Took(NamedTuple):
    """What some work took: time, and CPU of the processes that send, both in seconds."""

    seconds: float
    cpu: float


def raw(url: str, number: int) -> Took:
    """Send so many by the bare loop."""
    began, cpu = time.perf_counter(), time.process_time()
    send_all(url, number)
    return Took(time.perf_counter() - began, time.process_time() - cpu)


def mean(one: Took, other: Took) -> Took:
    return Took((one.seconds + other.seconds) / 2, (one.cpu + other.cpu) / 2)


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


def drained(make_store: MakeStore, processes: int, *, watch: MakeStore | None = None) -> Took:
    """
    Drain a store with so many processes.

    Args:
        make_store: makes it in each of them.
        processes: how many.
        watch: makes it in this process, to see when it is empty; the same way if not given.
    """
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
    with (watch or make_store)() as store:
        store.next_due()
        began = time.perf_counter()
        for line in lines:
            line.send(None)
        while store.next_due() is not None:
            assert time.perf_counter() - began < LONGEST_SECONDS
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - began
    for line in lines:
        line.send(None)
    cpu = sum(line.recv() for line in lines)
    for worker in workers:
        worker.join()
    return Took(seconds, cpu)


class Way:
    """What the rounds of one way to send took."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.rates: list[float] = []
        self.ratios: list[float] = []
        self.cpu: list[float] = []
        self.cpu_ratios: list[float] = []

    def add(self, took: Took, raw_took: Took) -> None:
        self.rates.append(self._number / took.seconds)
        self.ratios.append(raw_took.seconds / took.seconds)
        self.cpu.append(took.cpu / self._number * 1000)
        self.cpu_ratios.append(took.cpu / raw_took.cpu)


def measure(ground: Ground, url: str, number: int, rounds: int) -> dict[tuple[int, int], Way]:
    """Give what each round took, by the number of processes and queues; that of the bare loop with no process."""
    ways = {(0, 0): Way(number)} | {(processes, queues): Way(number) for processes in (1, 2) for queues in (0, QUEUES)}
    names = (f"store {nth}" for nth in count())
    for _ in range(rounds):
        before = raw(url, number)
        for processes, queues in list(ways)[1:]:
            make_store = ground.maker(next(names))
            fill(make_store, url, number, queues)
            took = drained(make_store, processes)
            after = raw(url, number)
            ways[processes, queues].add(took, mean(before, after))
            ways[0, 0].add(after, after)
            before = after
    return ways


def figures(options: argparse.Namespace) -> list[Figure]:
    with stores.ground(options) as ground, receiver() as url:
        ways = measure(ground, url, options.callbacks, options.rounds)
    store = stores.NAMES[options.store]
    found = [
        figure_of(ways[0, 0].rates, f"{RAW}, beside {store}", "requests/s"),
        figure_of(ways[0, 0].cpu, f"{RAW}, beside {store}: CPU", CPU, better="less"),
    ]
    for (processes, queues), way in list(ways.items())[1:]:
        name = f"{'one process' if processes == 1 else 'two processes'}, {store}"
        if queues:
            relative = [queued / free for queued, free in zip(way.ratios, ways[processes, 0].ratios, strict=True)]
            found.append(
                figure_of(
                    relative, f"drain of {queues} queues, {name}", "x no queues", target=0.95, baseline="no queues"
                )
            )
        else:
            target = TARGETS.get((options.store, processes))
            most = MOST_CPU if (options.store, processes) == ("sqlite", 1) else None
            found += [
                figure_of(way.ratios, f"drain, {name}", "x raw", target=target, baseline=RAW),
                figure_of(way.rates, f"drain, {name}: rate", "callbacks/s"),
                figure_of(way.cpu, f"drain, {name}: CPU", CPU, target=most, better="less"),
                figure_of(way.cpu_ratios, f"drain, {name}: CPU to raw", "x raw CPU", better="less", baseline=RAW),
            ]
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    stores.add_options(parser)
    return parser


if __name__ == "__main__":
    show(figures(parser().parse_args()))
