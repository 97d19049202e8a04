"""
A receiver in a process of its own, which answers some requests with errors, some late, some never, and keeps a log.
"""

from __future__ import annotations

import asyncio
import ctypes
import random
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from evidence import Evidence
from victims import PROCESSES

from callbackq.testing.history import Arrival

_HEADER = re.compile(rb"\r\n(webhook-id|callbackq-(?:queue|sequence|token)|content-length): *([^\r]*)", re.IGNORECASE)
_SHARES = {"error": 0.10, "slow": 0.04, "never": 0.01}
_SLOW_SECONDS = 0.05
# Acceptances of one callback lie closer together than so many of others.
_REMEMBERED = 50_000
_LONGEST_SECONDS = 60


class Receiver(asyncio.Protocol):
    """One connection. Requests come one after another on each."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (head_end := self._buffer.find(b"\r\n\r\n")) >= 0:
            headers = {
                name.lower().decode(): value.decode() for name, value in _HEADER.findall(self._buffer[: head_end + 2])
            }
            request_end = head_end + 4 + int(headers.get("content-length", "0"))
            if len(self._buffer) < request_end:
                return
            self._buffer = self._buffer[request_end:]
            self._answer(headers)

    def _answer(self, headers: dict[str, str]) -> None:
        kind = self._log.choose()
        accepted = kind in ("accepted", "slow")
        started = time.monotonic()
        if kind == "slow":
            asyncio.get_running_loop().call_later(_SLOW_SECONDS, self._accept, headers, started)
        elif accepted:
            self._accept(headers, started)
        else:
            self._log.add(Arrival.from_headers(headers, started=started, accepted=None))
            if kind == "error":
                self._transport.write(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")
            # Otherwise the dispatcher hangs up, when its time is up.

    def _accept(self, headers: dict[str, str], started: float) -> None:
        self._log.add(Arrival.from_headers(headers, started=started, accepted=time.monotonic()))
        self._transport.write(b"HTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n")


class Log:
    """What the receiver answers, and what it remembers of it."""

    def __init__(self, evidence: Evidence, chance: random.Random, accepted: ctypes.c_ulonglong) -> None:
        self._evidence = evidence
        self._chance = chance
        self._accepted = accepted
        self._recent: dict[str, None] = {}
        self.answers: Counter[str] = Counter()

    def choose(self) -> str:
        chance = self._chance.random()
        kind = "accepted"
        for rare, share in _SHARES.items():
            if chance < share:
                kind = rare
                break
            chance -= share
        self.answers[kind] += 1
        return kind

    def add(self, arrival: Arrival) -> None:
        self._evidence.arrived(arrival)
        if arrival.accepted is not None and arrival.callback_id not in self._recent:
            self._accepted.value += 1
            self._recent[arrival.callback_id] = None
            if len(self._recent) > _REMEMBERED:
                del self._recent[next(iter(self._recent))]


async def _serve(line: Connection, log: Log) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Receiver(log), "127.0.0.1", 0, backlog=1024)
    line.send(server.sockets[0].getsockname()[1])
    # Until it is told to, or whoever started it is gone.
    await loop.run_in_executor(None, line.poll, None)


def _witness(folder: Path, seed: int, accepted: ctypes.c_ulonglong, line: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    evidence = Evidence(folder, "arrivals")
    log = Log(evidence, random.Random(seed), accepted)
    asyncio.run(_serve(line, log))
    evidence.close()
    with suppress(EOFError, OSError):
        line.recv()
        line.send(dict(log.answers))


class Witness:
    """
    The receiver, for those who send to it.

    Args:
        folder: for the evidence, its ``"arrivals"``.
        seed: of the chance by which it answers.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._accepted = PROCESSES.Value("Q", 0, lock=False)
        self._line, theirs = PROCESSES.Pipe()
        arguments = (folder, seed, self._accepted, theirs)
        self._process = PROCESSES.Process(target=_witness, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        if not self._line.poll(_LONGEST_SECONDS):
            raise TimeoutError("the receiver doesn't start")
        self.url = f"http://127.0.0.1:{self._line.recv()}/"
        self.answers: dict[str, int] = {}

    @property
    def accepted(self) -> int:
        """How many callbacks were accepted, each counted once."""
        return int(self._accepted.value)

    def close(self) -> None:
        """End it; its log is complete then."""
        self._line.send("end")
        if not self._line.poll(_LONGEST_SECONDS):
            raise TimeoutError("the receiver doesn't end")
        self.answers = self._line.recv()
        self._process.join(_LONGEST_SECONDS)
