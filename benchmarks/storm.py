"""
A crash storm: dispatcher processes on one SQLite file are killed at random moments, and others take their place.

    python benchmarks/storm.py --kills 1000 --processes 3 --queues 200

An enqueuer keeps storing callbacks; a receiver answers some with errors, some late, some never. In the end
`callbackq.testing.history` judges from the receiver's log and the final dump alone. Prints one JSON document;
exits 0 only if no promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from callbackq import CallbackRequest, Dispatcher, HTTPTransport, RetryPhase, SQLiteDataAccess, TargetPolicy
from callbackq.events import EventKind, ObservedEvent
from callbackq.testing.history import Arrival, History

DEADLINE = timedelta(seconds=1)
LOCK_TIMEOUT = timedelta(seconds=4)
CONCURRENCY = 16
RETRIES = (RetryPhase(retries=1000, delay=timedelta(milliseconds=20)),)
# Stop storing more while so many wait, so that the storm hits a moderate backlog.
BACKLOG = 400
BATCH = 50
DRAIN_SECONDS = 120.0


class Receiver:
    """Answers from an event loop in a thread of its own; 10 % errors, 4 % slow, 1 % never. Keeps a log."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.arrivals: list[Arrival] = []
        self.accepted: set[str] = set()
        self.answers: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="storm-receiver", daemon=True)
        self.url = ""

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        self._ready.set()
        self._loop.run_forever()

    def start(self) -> None:
        self._thread.start()
        self._ready.wait(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lines = head.split("\r\n")[1:-2]
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer(headers, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        started = time.monotonic()
        chance = self._random.random()
        status = 500 if chance < 0.10 else 200
        accepted = None
        if chance > 0.99:
            self.answers["never"] += 1
            status = 0
        elif chance > 0.95:
            self.answers["slow"] += 1
            await asyncio.sleep(0.05)
        else:
            self.answers[str(status)] += 1
        if status == 200:
            accepted = time.monotonic()
            self.accepted.add(headers["webhook-id"])
        self.arrivals.append(Arrival.from_headers(headers, started=started, accepted=accepted))
        if status == 0:
            # Past the dispatcher's deadline: it hangs up first.
            await asyncio.sleep(DEADLINE.total_seconds() * 2)
            raise ConnectionError
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)
        await writer.drain()


class TellsWhenItWorks:
    """Says so after the first callback was locked: from then on a kill hits something."""

    def __init__(self, storm: Connection) -> None:
        self._storm = storm
        self._told = False

    def observe(self, event: ObservedEvent) -> None:
        if event.kind is EventKind.LOCKED and not self._told:
            self._told = True
            self._storm.send("working")


def work(path: Path, machine_name: str, storm: Connection) -> None:
    """Dispatch until told to stop, or until the storm itself is gone (its end of the pipe closes)."""
    logging.getLogger("callbackq.stores").setLevel(logging.ERROR)
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]), deadline=DEADLINE)
    with SQLiteDataAccess(path) as store:
        dispatcher = Dispatcher(
            store,
            machine_name=machine_name,
            transport=transport,
            concurrency=CONCURRENCY,
            host_concurrency=CONCURRENCY,
            lock_timeout=LOCK_TIMEOUT,
            poll_interval=timedelta(milliseconds=50),
            # Kills, not the callbacks, are what abandons these locks, again and again.
            max_abandoned=1_000_000,
            observer=TellsWhenItWorks(storm),
        )
        signal.signal(signal.SIGTERM, lambda *_: dispatcher.stop())
        threading.Thread(target=lambda: (storm.poll(None), dispatcher.stop()), daemon=True).start()
        dispatcher.run()


# Forked from a process that has imported everything and opened nothing: a new dispatcher costs milliseconds.
_PROCESSES = multiprocessing.get_context("forkserver")


class Worker:
    """A dispatcher process, and our end of a pipe to it."""

    def __init__(self, path: Path, machine_name: str) -> None:
        self.machine_name = machine_name
        self._pipe, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=work, args=(path, machine_name, theirs))
        self._process.start()
        theirs.close()

    def works(self) -> bool:
        return self._pipe.poll()

    def end(self, how: signal.Signals) -> None:
        if self._process.pid is not None:
            os.kill(self._process.pid, how)
        self._process.join(60)
        self._process.close()
        self._pipe.close()


@contextmanager
def workers(path: Path, count: int) -> Iterator[list[Worker]]:
    running = [Worker(path, f"m{number}") for number in range(count)]
    try:
        yield running
    finally:
        for worker in running:
            worker.end(signal.SIGTERM)


def storm(options: argparse.Namespace) -> dict[str, object]:
    chance = random.Random(options.seed)
    receiver = Receiver(options.seed)
    receiver.start()
    how = signal.SIGKILL if options.signal == "kill" else signal.SIGTERM
    ids: list[str] = []
    ended: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="callbackq-storm-") as folder:
        path = Path(folder) / "storm.db"
        with SQLiteDataAccess(path) as store:
            with workers(path, options.processes) as running:
                next_end = time.monotonic()
                while len(ended) < options.kills:
                    if len(ids) - len(receiver.accepted) < BACKLOG:
                        ids += enqueue(store, receiver.url, chance, options.queues)
                    if time.monotonic() >= next_end:
                        working = [place for place, worker in enumerate(running) if worker.works()]
                        if working:
                            place = chance.choice(working)
                            running[place].end(how)
                            ended.append(running[place].machine_name)
                            running[place] = Worker(path, f"m{options.processes + len(ended)}")
                            next_end = time.monotonic() + chance.uniform(*options.pause)
                    time.sleep(0.002)
                give_up = time.monotonic() + DRAIN_SECONDS
                while store.next_due() is not None and time.monotonic() < give_up:
                    time.sleep(0.05)
            seconds = time.monotonic() - began
            statuses = list(store.list_callbacks())
    killed = set(ended) if options.signal == "kill" else set()
    in_flight = sum(
        lock.ended is not None and not lock.completed and lock.machine_name in killed
        for status in statuses
        for lock in status.locks
    )
    judgement = History(receiver.arrivals, statuses, acknowledged=ids, duplicates_bound=in_flight).judge()
    return {
        "signal": options.signal,
        "ended": len(ended),
        "callbacks": len(ids),
        "requests": judgement.arrivals,
        "answers": dict(receiver.answers),
        "in_flight_when_killed": in_flight,
        "kills_with_work_in_flight": len(
            {
                lock.machine_name
                for status in statuses
                for lock in status.locks
                if lock.ended and not lock.completed and lock.machine_name in killed
            }
        ),
        "duplicates": judgement.duplicates,
        "bound": judgement.duplicates_bound,
        "lost": judgement.broken().get("lost", 0) + judgement.broken().get("not drained", 0),
        "misordered": sum(judgement.broken().get(rule, 0) for rule in ("order", "early start", "stale")),
        "overlapping_locks": judgement.broken().get("lock overlap", 0),
        "broken": judgement.broken(),
        "examples": [str(violation) for violation in judgement.violations[:5]],
        "seconds": round(seconds, 1),
        "ok": judgement.ok,
    }


def enqueue(store: SQLiteDataAccess, url: str, chance: random.Random, queues: int) -> list[str]:
    requests = [
        CallbackRequest(url=url, queue_id=f"q{chance.randrange(queues)}", retry_phases=RETRIES) for _ in range(BATCH)
    ]
    return [status.id for status in store.store_callback_requests(requests)]


def main() -> int:
    _PROCESSES.set_forkserver_preload(["callbackq", "callbackq.testing.history"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--queues", type=int, default=200)
    parser.add_argument("--pause", type=float, nargs=2, default=(0.05, 0.5), metavar=("LEAST", "MOST"))
    parser.add_argument("--signal", choices=["kill", "term"], default="kill")
    parser.add_argument("--seed", type=int, default=1)
    outcome = storm(parser.parse_args())
    print(json.dumps(outcome, indent=1))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
