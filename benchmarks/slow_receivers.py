"""
What slow receivers cost a dispatcher, and what hanging ones take from the others.

    python benchmarks/slow_receivers.py [--receivers 1000] [--seconds 16] [--rounds 3] [--directory DIRECTORY]

The receivers are one process, and each has a loopback address of its own, since a dispatcher counts by host (Linux
only). First 1,000 of them that answer after a second, with a queue each, so that one request at a time is under way to
each: they can take 1,000 callbacks a second. Then 100 hosts, of which 10 answer at once. How many callbacks a second
those get is measured with the others' callbacks in the store, as many for each host, stored in turns, and without
them; the others accept every request and never answer. Once each host has a queue, once there are no queues.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from figures import Figure, figure_of, show
from worker import raise_open_files
from workers import Report, worker

from callbackq import CallbackData, CallbackRequest, SQLiteDataAccess

BODY = b"x" * 1024
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
BATCH = 1_000

SLOWNESS_SECONDS = 1.0
WARM_UP_SECONDS = 5.0
"""Until the slow receivers' connections are open and no longer begin together."""

HEALTHY_HOSTS = 10
HANGING_HOSTS = 90
# For each healthy host, more than it can get: by itself, and beside those that hang, which get as many.
ALONE_PER_SECOND = 1200
BESIDE_PER_SECOND = 700


class Patient(asyncio.Protocol):
    """One connection. Answers a request after *delay* seconds; never, if that is ``None``."""

    def __init__(self, delay: float | None) -> None:
        self._delay = delay
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(BODY):
            self._received = b""
            if self._delay is not None:
                asyncio.get_running_loop().call_later(self._delay, self._transport.write, ANSWER)


def addresses(first: str, number: int) -> list[str]:
    return [f"{first}.{nth // 250}.{nth % 250 + 1}" for nth in range(number)]


async def serve(delay: float | None, hosts: Sequence[str]) -> None:
    """Listen on one port of all these addresses, tell it, and answer until standard input ends."""
    loop = asyncio.get_running_loop()
    with socket.create_server((hosts[0], 0)) as taken:
        port = taken.getsockname()[1]
    for host in hosts:
        await loop.create_server(partial(Patient, delay), host, port, backlog=1024)
    print(port, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def receivers(delay: float | None, first: str, number: int) -> Iterator[list[str]]:
    """Start so many receivers in a process of their own; gives their URLs."""
    command = [sys.executable, __file__, "--serve", str(delay), first, str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        try:
            port = int(process.stdout.readline())
            yield [f"http://{address}:{port}/" for address in addresses(first, number)]
        finally:
            process.stdin.close()


def fill(file: Path, urls: Sequence[str], each: int, *, queues: bool) -> None:
    """Store so many callbacks for each URL, all URLs in turns."""
    data = CallbackData(headers={"Content-Type": "application/octet-stream"}, data=BODY)
    with SQLiteDataAccess(file) as store:
        requests = [CallbackRequest(url=url, post_data=data, queue_id=url if queues else "") for url in urls]
        for begin in range(0, len(urls) * each, BATCH):
            end = min(begin + BATCH, len(urls) * each)
            store.store_callback_requests([requests[nth % len(urls)] for nth in range(begin, end)])


def to_slow_ones(file: Path, number: int, seconds: float) -> tuple[float, Report]:
    """Give the callbacks per second, and how the dispatcher's process does in the end."""
    with receivers(SLOWNESS_SECONDS, "127.1", number) as urls:
        fill(file, urls, int(seconds + WARM_UP_SECONDS) + 5, queues=True)
        with worker(file, "--concurrency", str(number)) as one:
            one.rate(WARM_UP_SECONDS)
            return one.rate(seconds), one.report()


def to_healthy_ones(file: Path, seconds: float, *, queues: bool, hanging: int) -> float:
    """Give the callbacks per second that healthy hosts get beside so many that hang."""
    with receivers(0.0, "127.2", HEALTHY_HOSTS) as healthy, receivers(None, "127.3", hanging or 1) as others:
        each = int(seconds * (BESIDE_PER_SECOND if hanging else ALONE_PER_SECOND))
        fill(file, [*healthy, *others[:hanging]], each, queues=queues)
        with worker(file) as one:
            rate = one.rate(seconds)
            assert one.report().delivered < each * HEALTHY_HOSTS, "there were not enough for the healthy hosts"
            return rate


def figures(options: argparse.Namespace) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="callbackq-bench-", dir=options.directory) as folder:
        files = (Path(folder) / f"{nth}.db" for nth in count())
        slow = [to_slow_ones(next(files), options.receivers, options.seconds) for _ in range(options.rounds)]
        name = f"{options.receivers:,} receivers of 1 s each, one process"
        most = [report.most_mib for _, report in slow]
        cpu = median(report.cpu_seconds / report.delivered * 1000 for _, report in slow)
        found = [
            figure_of([rate for rate, _ in slow], name, "callbacks/s", target=0.9 * options.receivers),
            figure_of(most, f"{name}: memory", "MiB", target=100.0, better="less"),
            Figure(f"{name}: CPU", cpu, "s CPU per 1,000", better="less"),
        ]
        for shape, queues in ("a queue for each host", True), ("no queues", False):
            found += beside_hanging_ones(files, options, shape, queues=queues)
    return found


def beside_hanging_ones(
    files: Iterator[Path], options: argparse.Namespace, shape: str, *, queues: bool
) -> list[Figure]:
    alone, beside = [], []
    for _ in range(options.rounds):
        alone.append(to_healthy_ones(next(files), options.seconds, queues=queues, hanging=0))
        beside.append(to_healthy_ones(next(files), options.seconds, queues=queues, hanging=HANGING_HOSTS))
    ratios = [with_others / without for with_others, without in zip(beside, alone, strict=True)]
    name = f"healthy 10 % of hosts, the others hang, {shape}"
    return [
        figure_of(ratios, name, "x alone", target=0.9, baseline="the same without the hosts that hang"),
        figure_of(beside, f"{name}: rate", "callbacks/s"),
    ]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--receivers", type=int, default=1000)
    options.add_argument("--seconds", type=float, default=16.0, help="more than the 15 for which a request may hang")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--directory", type=Path, help="where the files of SQLite go")
    return options


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        raise_open_files()
        delay, first, number = sys.argv[2:]
        asyncio.run(serve(None if delay == "None" else float(delay), addresses(first, int(number))))
    else:
        logging.disable()
        show(figures(parser().parse_args()))


if __name__ == "__main__":
    main()
