"""
A crash storm: dispatcher processes on one store are killed at random moments, and others take their place.

    python benchmarks/storm.py --kills 1000 --processes 3 --queues 200
    python benchmarks/storm.py --kills 1000 --processes 3 --queues 200 --store postgres --server-restarts 30

An enqueuer keeps storing callbacks; a receiver answers some with errors, some late, some never. A PostgreSQL server is
the storm's own, syncs to the disk, and is restarted in turns: stopped in order, told to quit at once, killed. In the
end `callbackq.testing.history` judges from the receiver's log and the final dump alone. Prints one JSON document; exits
0 only if no promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import random
import secrets
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import cycle
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import stores
from callbackq import (
    CallbackRequest,
    DataAccessError,
    Dispatcher,
    HTTPTransport,
    RetryPhase,
    TargetPolicy,
)
from callbackq.events import EventKind, ObservedEvent
from callbackq.testing.history import Arrival, History

if TYPE_CHECKING:
    from stores import MakeStore, Store
    from support.postgres import PostgreSQLServer

DEADLINE = timedelta(seconds=1)
LOCK_TIMEOUT = timedelta(seconds=4)
CONCURRENCY = 16
RETRIES = (RetryPhase(retries=1000, delay=timedelta(milliseconds=20)),)
# Stop storing more while so many wait, so that the storm hits a moderate backlog.
BACKLOG = 400
BATCH = 50
DRAIN_SECONDS = 120.0
# A server that is away for a moment is asked again after so long.
REST_SECONDS = 0.05


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


def open_when_possible(make_store: MakeStore) -> Store:
    while True:
        store = make_store()
        try:
            store.open()
        except DataAccessError:
            store.close()
            time.sleep(REST_SECONDS)
        else:
            return store


def work(make_store: MakeStore, machine_name: str, storm: Connection) -> None:
    """Dispatch until told to stop, or until the storm itself is gone (its end of the pipe closes)."""
    for name in ("callbackq", "psycopg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]), deadline=DEADLINE)
    with open_when_possible(make_store) as store:
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

    def __init__(self, make_store: MakeStore, machine_name: str) -> None:
        self.machine_name = machine_name
        self._pipe, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=work, args=(make_store, machine_name, theirs))
        self._process.start()
        theirs.close()

    def works(self) -> bool:
        return self._pipe.poll()

    def end(self, how: signal.Signals) -> None:
        assert self._process.is_alive(), "a dispatcher has ended by itself"
        if self._process.pid is not None:
            os.kill(self._process.pid, how)
        self._process.join(60)
        self._process.close()
        self._pipe.close()


@contextmanager
def workers(make_store: MakeStore, count: int) -> Iterator[list[Worker]]:
    running = [Worker(make_store, f"m{number}") for number in range(count)]
    try:
        yield running
    finally:
        for worker in running:
            worker.end(signal.SIGTERM)


class Enqueuer:
    """Keeps storing callbacks while few wait. Its ids make it harmless to repeat what a broken connection left open."""

    def __init__(self, store: Store, receiver: Receiver, chance: random.Random, queues: int) -> None:
        self._store = store
        self._receiver = receiver
        self._chance = chance
        self._queues = queues
        self._unsure: dict[str, CallbackRequest] = {}
        self.acknowledged: list[str] = []
        self.refused = 0

    def step(self) -> None:
        if not self._unsure and len(self.acknowledged) - len(self._receiver.accepted) < BACKLOG:
            self._unsure = {secrets.token_hex(16): self._request() for _ in range(BATCH)}
        if self._unsure:
            try:
                self._store.store_callback_requests(list(self._unsure.values()), ids=list(self._unsure))
            except DataAccessError:
                self.refused += 1
            else:
                self.acknowledged += self._unsure
                self._unsure = {}

    def finish(self) -> None:
        while self._unsure:
            self.step()
            time.sleep(REST_SECONDS)

    def _request(self) -> CallbackRequest:
        queue = f"q{self._chance.randrange(self._queues)}"
        return CallbackRequest(url=self._receiver.url, queue_id=queue, retry_phases=RETRIES)


class Restarts:
    """Restarts a server so many times, spread over the storm, while the storm goes on."""

    def __init__(self, server: PostgreSQLServer | None, count: int) -> None:
        self._server = server
        self._count = count if server else 0
        self._ways = cycle(("fast", "immediate", "kill"))
        self._thread = threading.Thread()
        self.done: Counter[str] = Counter()

    def step(self, progress: float) -> None:
        """Restart when the storm, which is at *progress* between 0 and 1, has come so far."""
        if progress * (self._count + 1) >= self.done.total() + 1 and not self._thread.is_alive():
            way = next(self._ways)
            self.done[way] += 1
            self._thread = threading.Thread(target=self._restart, args=(way,))
            self._thread.start()

    def _restart(self, way: str) -> None:
        assert self._server
        if way == "kill":
            self._server.kill()
        else:
            self._server.stop("fast" if way == "fast" else "immediate")
        self._server.start()

    def finish(self) -> None:
        if self._thread.is_alive():
            self._thread.join()


def storm(options: argparse.Namespace) -> dict[str, object]:
    chance = random.Random(options.seed)
    receiver = Receiver(options.seed)
    receiver.start()
    how = signal.SIGKILL if options.signal == "kill" else signal.SIGTERM
    ended: list[str] = []
    began = time.monotonic()
    with stores.ground(options) as place:
        make_store = place.maker("storm")
        restarts = Restarts(place.server, options.server_restarts)
        with make_store() as store:
            enqueuer = Enqueuer(store, receiver, chance, options.queues)
            with workers(make_store, options.processes) as running:
                next_end = time.monotonic()
                while len(ended) < options.kills:
                    enqueuer.step()
                    restarts.step(len(ended) / options.kills)
                    if time.monotonic() >= next_end:
                        working = [place for place, worker in enumerate(running) if worker.works()]
                        if working:
                            place = chance.choice(working)
                            running[place].end(how)
                            ended.append(running[place].machine_name)
                            running[place] = Worker(make_store, f"m{options.processes + len(ended)}")
                            next_end = time.monotonic() + chance.uniform(*options.pause)
                    time.sleep(0.002)
                restarts.finish()
                enqueuer.finish()
                give_up = time.monotonic() + DRAIN_SECONDS
                while not is_drained(store) and time.monotonic() < give_up:
                    time.sleep(REST_SECONDS)
            seconds = time.monotonic() - began
            statuses = list(store.list_callbacks())
    ids = enqueuer.acknowledged
    killed = set(ended) if options.signal == "kill" else set()
    in_flight = sum(
        lock.ended is not None and not lock.completed and lock.machine_name in killed
        for status in statuses
        for lock in status.locks
    )
    judgement = History(receiver.arrivals, statuses, acknowledged=ids, duplicates_bound=in_flight).judge()
    return {
        "store": options.store,
        "signal": options.signal,
        "ended": len(ended),
        "server_restarts": dict(restarts.done),
        "storing_refused": enqueuer.refused,
        "callbacks": len(ids),
        "requests": judgement.arrivals,
        "answers": dict(receiver.answers),
        "in_flight_when_killed": in_flight,
        "abandoned_by_others": sum(
            lock.ended is not None and not lock.completed and lock.machine_name not in killed
            for status in statuses
            for lock in status.locks
        ),
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


def is_drained(store: Store) -> bool:
    try:
        return store.next_due() is None
    except DataAccessError:
        return False


def main() -> int:
    _PROCESSES.set_forkserver_preload(["callbackq", "callbackq.testing.history"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--queues", type=int, default=200)
    parser.add_argument("--pause", type=float, nargs=2, default=(0.05, 0.5), metavar=("LEAST", "MOST"))
    parser.add_argument("--signal", choices=["kill", "term"], default="kill")
    stores.add_options(parser)
    parser.add_argument("--server-restarts", type=int, default=0, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=1)
    outcome = storm(parser.parse_args())
    print(json.dumps(outcome, indent=1))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
