"""Start `worker.py`, a process that dispatches from an SQLite file, and ask it how it does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

_LONGEST_SECONDS = 30.0


@frozen
class Report:
    """
    How a worker does; `worker.py` says what each means.

    Attributes:
        at: when it was asked, in seconds.
    """

    at: float
    delivered: int
    cpu_seconds: float
    resident_mib: float
    most_mib: float


class Worker:
    """A worker that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def report(self) -> Report:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Report(at=time.perf_counter(), **json.loads(self._process.stdout.readline()))

    def rate(self, seconds: float) -> float:
        """Say how many callbacks per second it delivers in that time."""
        before = self.report()
        time.sleep(seconds)
        after = self.report()
        return (after.delivered - before.delivered) / (after.at - before.at)


@contextmanager
def worker(file: Path, *options: str) -> Iterator[Worker]:
    """Have one dispatch from *file* while the block runs."""
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(file), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        try:
            yield Worker(process)
        finally:
            process.stdin.close()
            process.wait(_LONGEST_SECONDS)
