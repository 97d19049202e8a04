"""
How fast a backlog is drained, as a ratio to a bare urllib3 loop against the same receiver.

    python benchmarks/drain.py [--callbacks 3000] [--rounds 5]

Each round sends the same 1 KiB POSTs by ``PoolManager.request`` in one thread (= 1.00) and through a Dispatcher on a
SQLite file (synchronous=FULL, every outcome recorded): callbacks without a queue, then over 100 queues. Prints
medians.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3

from callbackq import CallbackData, CallbackRequest, Dispatcher, HTTPTransport, SQLiteDataAccess, TargetPolicy
from callbackq.events import ObservedEvent

BODY = b"x" * 1024
HEADERS = {"Content-Type": "application/octet-stream"}


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


def raw(url: str, count: int) -> Callable[[], None]:
    def send_all() -> None:
        with urllib3.PoolManager() as pool:
            for _ in range(count):
                pool.request("POST", url, body=BODY, headers=HEADERS, retries=False)

    return send_all


@contextmanager
def stored(url: str, count: int, queues: int) -> Iterator[Callable[[], None]]:
    data = CallbackData(headers=HEADERS, data=BODY)
    requests = [
        CallbackRequest(url=url, post_data=data, queue_id=f"q{number % queues}" if queues else "")
        for number in range(count)
    ]
    with (
        tempfile.TemporaryDirectory(prefix="callbackq-drain-") as folder,
        SQLiteDataAccess(Path(folder) / "drain.db") as store,
    ):
        for start in range(0, count, 1000):
            store.store_callback_requests(requests[start : start + 1000])
        transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
        dispatcher = Dispatcher(store, transport=transport, observer=Silence())

        def drain() -> None:
            assert dispatcher.run_until_idle(timeout=300)

        yield drain
        assert store.next_due() is None
        transport.close()


def timed(work: Callable[[], None]) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.getLogger("callbackq").setLevel(logging.ERROR)
    count = options.callbacks
    shapes = {"no queues": 0, "100 queues": 100}
    rates: dict[str, list[float]] = {name: [] for name in ("raw urllib3", *shapes)}
    ratios: dict[str, list[float]] = {name: [] for name in shapes}
    cpu: dict[str, list[float]] = {name: [] for name in rates}
    with receiver() as url:
        for _ in range(options.rounds):
            raw_seconds, raw_cpu = timed(raw(url, count))
            rates["raw urllib3"].append(count / raw_seconds)
            cpu["raw urllib3"].append(raw_cpu / count * 1000)
            for name, queues in shapes.items():
                with stored(url, count, queues) as drain:
                    seconds, spent = timed(drain)
                rates[name].append(count / seconds)
                ratios[name].append(raw_seconds / seconds)
                cpu[name].append(spent / count * 1000)
    print(
        f"{'':14} {'/s':>8} {'x raw':>6} {'CPU s/1,000':>12}   ({count} callbacks of 1 KiB, median of {options.rounds})"
    )
    for name in rates:
        ratio = statistics.median(ratios[name]) if name in ratios else 1.0
        print(f"{name:14} {statistics.median(rates[name]):8,.0f} {ratio:6.2f} {statistics.median(cpu[name]):12.3f}")


if __name__ == "__main__":
    main()
