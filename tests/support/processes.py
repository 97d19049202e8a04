"""Python processes that run a piece of code and talk with the test over their standard streams."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

LIMIT = 30.0
"""Seconds a test waits for what must happen; none ever waits that long when all is well."""


def judged(program: Path, *arguments: object, seconds: float) -> dict[str, Any]:
    """Run a program that prints a judgement as JSON, whose ``ok`` is its exit status, too."""
    finished = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert finished.stdout, finished.stderr
    judgement: dict[str, Any] = json.loads(finished.stdout)
    assert finished.returncode == (0 if judgement["ok"] else 1)
    return judgement


class Process:
    """
    A process of its own. ``read_line`` gives what it prints, ``write_line`` what its ``input()`` returns.
    """

    def __init__(self, code: str, *arguments: object) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-u", "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid
        self._lines: Queue[str | None] = Queue()
        self._reader = Thread(target=self._read, name="process-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout
        for line in self._popen.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def read_line(self) -> str:
        try:
            line = self._lines.get(timeout=LIMIT)
        except Empty:
            raise AssertionError(f"the process said nothing for {LIMIT} s") from None
        assert line is not None, "the process ended instead of answering"
        return line

    def remaining_lines(self) -> list[str]:
        """What it has said that was not read, up to its end."""
        return list(iter(lambda: self._lines.get(timeout=LIMIT), None))

    def write_line(self, line: str = "") -> None:
        assert self._popen.stdin
        print(line, file=self._popen.stdin, flush=True)

    def kill(self) -> None:
        """``kill -9``."""
        self._popen.kill()
        self._popen.wait(LIMIT)

    def wait(self) -> int:
        return self._popen.wait(LIMIT)

    def send_signal(self, signal: int) -> None:
        self._popen.send_signal(signal)

    def dispose(self) -> None:
        self.kill()
        self._reader.join(LIMIT)
        for stream in (self._popen.stdin, self._popen.stdout):
            assert stream
            stream.close()


@contextmanager
def running(code: str, *arguments: object) -> Iterator[Process]:
    """Run *code*, with *arguments* in ``sys.argv[1:]``, and see to its end."""
    process = Process(code, *arguments)
    try:
        yield process
    finally:
        process.dispose()


def sqlite_files(path: Path) -> dict[str, bytes]:
    """Everything that lies beside a database, to compare."""
    return {one.name: one.read_bytes() for one in path.parent.iterdir()}
