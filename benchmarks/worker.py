"""
A process that dispatches and does nothing else, so that its memory is what an application has to add.

    python benchmarks/worker.py FILE [--concurrency 256] [--host-concurrency 64]

Dispatches from an SQLite file until standard input ends. Answers each line of it with one of JSON: how many callbacks
were delivered so far, what CPU that took, and what memory it holds and has held at most, in MiB (Linux only).
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
from contextlib import closing
from pathlib import Path

from callbackq import Dispatcher, HTTPTransport, SQLiteDataAccess, TargetPolicy
from callbackq.events import EventKind, ObservedEvent


class Deliveries:
    """An observer that counts."""

    count = 0

    def observe(self, event: ObservedEvent) -> None:
        self.count += event.kind is EventKind.SUCCEEDED


def memory_mib(line: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{line}:")[1].split()[0]) / 1024


def raise_open_files() -> None:
    """Each request under way is an open file. Many systems allow 1,024 at first, and far more for the asking."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--host-concurrency", type=int)
    options = parser.parse_args()
    logging.disable()
    raise_open_files()
    deliveries = Deliveries()
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
    with closing(transport), SQLiteDataAccess(options.file) as store:
        dispatcher = Dispatcher(
            store,
            concurrency=options.concurrency,
            host_concurrency=options.host_concurrency,
            transport=transport,
            observer=deliveries,
        )
        with dispatcher:
            for _ in sys.stdin:
                answer = {
                    "delivered": deliveries.count,
                    "cpu_seconds": time.process_time(),
                    "resident_mib": memory_mib("VmRSS"),
                    "most_mib": memory_mib("VmHWM"),
                }
                print(json.dumps(answer), flush=True)
            dispatcher.stop(timeout=0)


if __name__ == "__main__":
    main()
