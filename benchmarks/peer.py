"""
What the scripts for other libraries share. They run in an environment of their own, without callbackq.

    python benchmarks/peer_huey.py fill WHERE NUMBER
    python benchmarks/peer_huey.py work WHERE URL CONCURRENCY

WHERE is a file or the conninfo of a database. The first stores so many POSTs of 1 KiB; the second prints a line when it
is connected, begins when it is given one, and ends, with all its processes, when its standard input does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

BODY = b"x" * 1024
HEADERS = {"Content-Type": "application/octet-stream"}
BATCH = 1000


def main(fill: Callable[[str, int], None], work: Callable[[str, str, int], None]) -> None:
    verb, where, *arguments = sys.argv[1:]
    if verb == "fill":
        fill(where, int(arguments[0]))
    else:
        work(where, arguments[0], int(arguments[1]))


def wait_for_start() -> None:
    """Say that all is ready, and wait. From then on this process ends with its standard input."""
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)  # it was started as the first of a group of its own
