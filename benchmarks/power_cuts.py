"""
Power cuts: what an SQLite store has acknowledged is there when the power is back, whatever the disk made of the rest.

    python benchmarks/power_cuts.py --cuts 10000
    python benchmarks/power_cuts.py --cuts 10000 --journal rollback
    python benchmarks/power_cuts.py --cuts 10000 --durability process

Stores at work are recorded, each with a chance of its own (``--workloads``): each write and sync of their files, and
each call that returned. Then the power is cut at as many moments of those records, the same number of each. The files
are those that were synced, with a random part of all later writes (whole or torn into sectors), truncations, creations
and deletions, in any order. They are opened after a reboot, and judged: with ``--durability power`` everything
acknowledged must be there; with ``process`` the last moments may be missing, but nothing in between. In both cases the
file is whole, queues are in order and their numbers without gaps, new numbers and tokens are higher than all that were
not lost, and failures owe their e-mails. Prints one JSON document; exits 0 only if all of that holds.

``--fault`` plants one, to see that it is found.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from callbackq import (
    CallbackData,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    DataAccessError,
    RetryPhase,
    SQLiteDataAccess,
)
from callbackq.core.lifecycle import after_attempt
from callbackq.core.models import CallbackAttempt
from callbackq.core.verdict import Verdict
from callbackq.dataaccess import Acquired, Action, AttemptRecord
from callbackq.testing import FakeClock

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.disk import Disk
from support.sqlite_vfs import Event, WatchedFiles

QUEUES = 5
LEASE = timedelta(minutes=1)
NAME = "callbacks.db"
LYING_DISK, WEAK_SYNC = FAULTS = ("lying-disk", "judged-too-strictly")


@frozen
class Fact:
    """
    A call that returned, or that began.

    Attributes:
        kind: ``stored``, ``locked``, ``ended`` (a lock) or ``paid`` (an e-mail), when the call had returned; ``paying``
            or ``purging``, when it began.
        token: of the lock.
        sequence: the callback's number.
        state: the callback's afterwards.
        attempts: how many it had then.
    """

    kind: str
    id: str
    token: int = 0
    sequence: int = 0
    state: CallbackState | None = None
    attempts: int = 0


Record = list[Event | Fact]


class Work:
    """Stores, locks, records, cancels, pays and purges on one store, and keeps a record of what returned."""

    def __init__(self, folder: Path, record: Record, options: argparse.Namespace, *, seed: int) -> None:
        self._folder = folder
        self._record = record
        self._options = options
        self._chance = random.Random(seed)
        self._clock = FakeClock()
        self._mutex = threading.Lock()
        self._attempts: Counter[str] = Counter()
        self._final: list[str] = []
        self.requests: dict[str, CallbackRequest] = {}

    def do(self) -> None:
        for round in range(self._options.rounds):
            # Now and then all connections are closed, which takes the log away.
            with SQLiteDataAccess(self._folder / NAME, clock=self._clock, durability=self._durability()) as store:
                for _ in range(self._options.callbacks // self._options.rounds // 2):
                    self._step(store)
                if self._options.durability == "power":
                    # Their commits are shared. Of a store that may lose the last ones nobody could say which those are.
                    self._store_from_threads(store, round)
                while self._deliver(store):
                    pass
                self._purge(store)

    def _durability(self) -> Any:
        return "process" if self._options.fault == WEAK_SYNC else self._options.durability

    def _step(self, store: SQLiteDataAccess) -> None:
        self._clock.advance(timedelta(milliseconds=100))
        self._enqueue(store, self._chance.choice([1, 1, 1, 4]))
        if self._chance.random() < 0.7:
            self._deliver(store)
        if self._chance.random() < 0.1 and (id := self._waiting(store)):
            status = store.request_transition(id, Action.CANCEL)
            self._final.append(id)
            self._record.append(Fact("ended", id, state=status.state))
        if self._chance.random() < 0.2:
            self._pay(store)
        if self._chance.random() < 0.03:
            self._purge(store)

    def _enqueue(self, store: SQLiteDataAccess, count: int) -> None:
        with self._mutex:
            requests = {f"c{len(self.requests) + number}": self._request() for number in range(count)}
            self.requests |= requests
        for status in store.store_callback_requests(list(requests.values()), ids=list(requests)):
            self._record.append(Fact("stored", status.id, sequence=status.sequence))

    def _request(self) -> CallbackRequest:
        return CallbackRequest(
            url="http://receiver.test/",
            queue_id=self._chance.choice(["", *(f"q{number}" for number in range(QUEUES))]),
            post_data=CallbackData(data=self._chance.randbytes(self._chance.choice([10, 1000, 9000]))),
            retry_phases=(RetryPhase(retries=1, delay=timedelta(milliseconds=100)),),
            notification_email_address="people@example.com",
        )

    def _store_from_threads(self, store: SQLiteDataAccess, round: int) -> None:
        threads = [threading.Thread(target=self._enqueue, args=(store, 2)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _waiting(self, store: SQLiteDataAccess) -> str | None:
        open_ones = [id for id in self.requests if id not in self._final]
        for id in self._chance.sample(open_ones, min(5, len(open_ones))):
            if store.get_callback_status(id).state is CallbackState.WAITING:
                return id
        return None

    def _deliver(self, store: SQLiteDataAccess) -> bool:
        acquired = store.acquire_locks("one", lock_timeout=LEASE, limit=6)
        self._record += [Fact("locked", one.id, token=one.lock.token) for one in acquired]
        ended = [one for one in acquired if self._chance.random() < 0.9]
        released = [one for one in acquired if one not in ended]
        records = [self._outcome(one) for one in ended]
        results = store.record_attempts(records) if records else []
        for one, result in zip(ended, results, strict=True):
            assert not isinstance(result, Exception)
            self._attempts[one.id] += 1
            self._end(one, result.state)
        for one, result in zip(released, store.release_locks([(one, timedelta(0)) for one in released]), strict=True):
            assert not isinstance(result, Exception)
            self._end(one, result.state)
        self._clock.advance(timedelta(milliseconds=100))
        return bool(acquired)

    def _end(self, one: Acquired, state: CallbackState) -> None:
        if not state.is_open:
            self._final.append(one.id)
        self._record.append(Fact("ended", one.id, token=one.lock.token, state=state, attempts=self._attempts[one.id]))

    def _outcome(self, one: Acquired) -> AttemptRecord:
        assert one.request
        accepted = self._chance.random() < 0.5
        attempt = CallbackAttempt(
            status_code=200 if accepted else 500,
            response=CallbackData(headers={"Server": "test"}, data=self._chance.randbytes(500)),
            time=self._clock.now(),
            duration=timedelta(milliseconds=5),
        )
        verdict = Verdict.DELIVERED if accepted else Verdict.RETRY
        transition = after_attempt(one.request, attempts_made=one.attempts_made, verdict=verdict)
        return AttemptRecord(acquired=one, attempt=attempt, transition=transition)

    def _pay(self, store: SQLiteDataAccess) -> None:
        for notification in store.acquire_notifications(lock_timeout=LEASE, limit=3):
            self._record += [Fact("paying", id) for id in notification.callback_ids]
            store.record_notification(notification, retry_in=None)
            self._record += [Fact("paid", id) for id in notification.callback_ids]

    def _purge(self, store: SQLiteDataAccess) -> None:
        self._record += [Fact("purging", id) for id in self._final]
        store.purge(finished_for=timedelta(seconds=2))


@define
class Known:
    """What the record says up to a moment."""

    returned: list[Fact] = field(factory=list)
    paying: set[str] = field(factory=set)
    purging: set[str] = field(factory=set)

    def apply(self, fact: Fact) -> None:
        match fact.kind:
            case "paying":
                self.paying.add(fact.id)
            case "purging":
                self.purging.add(fact.id)
            case _:
                self.returned.append(fact)


class Found:
    """A store as it was found after the power cut."""

    def __init__(
        self, path: Path, known: Known, requests: Mapping[str, CallbackRequest], *, may_lose_tail: bool
    ) -> None:
        self._path = path
        self._known = known
        self._requests = requests
        self._may_lose_tail = may_lose_tail
        self._clock = FakeClock()
        self._clock.advance(timedelta(days=1))
        self._clock.reboot()
        self.has_lost_tail = False

    def judge(self) -> list[str]:
        try:
            with SQLiteDataAccess(self._path, clock=self._clock) as store:
                self._statuses = {status.id: status for status in store.list_callbacks()}
                self._kept = self._facts_kept()
                broken = [*self._judge_acquiring(store), *self._judge_storing(store)]
                self._owed = owed(store)
                broken += [*self._judge_facts(), *self._judge_debts()]
        except DataAccessError as error:
            return [f"unusable: {error!r}"]
        with closing(sqlite3.connect(self._path)) as connection:
            (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            broken.append(f"damaged: {verdict}")
        return broken

    def _facts_kept(self) -> list[Fact]:
        """Give what can't be lost: everything, or what came before something that is there."""
        facts = self._known.returned
        if not self._may_lose_tail:
            return facts
        # Whether an e-mail was paid is not asked: that would take tokens.
        seen = [place for place, fact in enumerate(facts) if fact.kind != "paid" and self._holds(fact)]
        return facts[: seen[-1] + 1] if seen else []

    def _judge_facts(self) -> Iterator[str]:
        judged = [(fact, self._holds(fact)) for fact in self._known.returned]
        lost = [place for place, (_, holds) in enumerate(judged) if holds is False]
        self.has_lost_tail = bool(lost) and self._may_lose_tail
        if not self._may_lose_tail:
            yield from (f"lost: {judged[place][0]}" for place in lost)
        elif lost:
            # What came after the first that is missing must be missing, too.
            first = judged[lost[0]][0]
            later = (fact for fact, holds in judged[lost[0] :] if holds)
            yield from (f"not the tail: {first} is lost, {fact} isn't" for fact in later)

    def _holds(self, fact: Fact) -> bool | None:
        """Say whether it can be seen; ``None`` when it can't be known, because the callback may have been purged."""
        status = self._statuses.get(fact.id)
        if status is None:
            return None if fact.id in self._known.purging else False
        match fact.kind:
            case "stored":
                return (status.sequence, status.request) == (fact.sequence, self._requests[fact.id])
            case "locked":
                return any(lock.token == fact.token for lock in status.locks)
            case "ended":
                is_final = fact.state is not None and not fact.state.is_open
                return (
                    (not is_final or status.state is fact.state)
                    and len(status.attempts) >= fact.attempts
                    and (not fact.token or any(lock.token == fact.token and lock.completed for lock in status.locks))
                )
            case _:
                if fact.id in self._owed:
                    return False
                # Nobody is owed an e-mail about a failure that is lost itself.
                return True if status.state is CallbackState.FAILED else None

    def _judge_acquiring(self, store: SQLiteDataAccess) -> Iterator[str]:
        """Only heads are handed out, each under a token that is higher than all before."""
        heads: dict[str, CallbackStatus] = {}
        for status in self._statuses.values():
            if status.state.is_open:
                queue = status.queue_id or f"alone {status.id}"
                heads[queue] = min(heads.get(queue, status), status, key=lambda one: one.sequence)
        acquired = {one.id: one for one in store.acquire_locks("two", lock_timeout=LEASE, limit=1000)}
        if set(acquired) != {head.id for head in heads.values()}:
            yield f"order: {sorted(acquired)} are handed out, {sorted(head.id for head in heads.values())} are heads"
        tokens = [one.lock.token for one in acquired.values()]
        if len(set(tokens)) != len(tokens):
            yield "token: one was given twice"
        found = [lock.token for status in self._statuses.values() for lock in status.locks]
        last = max([*found, *(fact.token for fact in self._kept)], default=0)
        yield from (
            f"token: {id} gets {one.lock.token} after {last}" for id, one in acquired.items() if one.lock.token <= last
        )

    def _judge_storing(self, store: SQLiteDataAccess) -> Iterator[str]:
        """Numbers are without gaps, but for callbacks that may have been purged, and none is used a second time."""
        there: dict[str, list[int]] = defaultdict(list)
        for status in self._statuses.values():
            there[status.queue_id].append(status.sequence)
        purged: dict[str, set[int]] = defaultdict(set)
        for fact in self._known.returned:
            if fact.kind == "stored" and fact.id in self._known.purging and fact.id not in self._statuses:
                purged[self._requests[fact.id].queue_id].add(fact.sequence)
        kept: dict[str, int] = defaultdict(int)
        for fact in self._kept:
            queue = self._requests[fact.id].queue_id
            kept[queue] = max(kept[queue], fact.sequence)
        for queue in sorted(({*there} | {*purged} | {*kept}) - {""}):
            numbers = there[queue]
            if len(set(numbers)) != len(numbers):
                yield f"order: a number of {queue} was used twice"
            request = CallbackRequest(url="http://receiver.test/", queue_id=queue)
            sequence = store.store_callback_request(request).sequence
            if sequence <= max([*numbers, kept[queue]]):
                yield f"order: {queue} gives number {sequence} after {max([*numbers, kept[queue]])}"
            if gaps := {*range(1, sequence)} - {*numbers} - purged[queue]:
                yield f"order: {queue} is without the numbers {sorted(gaps)}"

    def _judge_debts(self) -> Iterator[str]:
        """A failure and its e-mail are written together."""
        for id, status in self._statuses.items():
            if status.state is CallbackState.FAILED and id not in self._known.paying and id not in self._owed:
                yield f"e-mail: nobody will be told of {id}"


def owed(store: SQLiteDataAccess) -> set[str]:
    ids: set[str] = set()
    while leased := store.acquire_notifications(lock_timeout=LEASE, limit=100):
        told = {id for notification in leased for id in notification.callback_ids}
        if told <= ids:
            break  # a damaged file may give the same for ever
        ids |= told
        for notification in leased:
            store.record_notification(notification, retry_in=None)
    return ids


def record_work(folder: Path, options: argparse.Namespace, *, seed: int) -> tuple[Record, dict[str, CallbackRequest]]:
    record: Record = []
    with WatchedFiles(tell=record.append, shares_memory=options.journal == "wal"):
        work = Work(folder, record, options, seed=seed)
        work.do()
    return record, work.requests


def moments(record: Record, count: int, chance: random.Random) -> Sequence[int]:
    """Choose when to cut: each moment once if there are enough cuts, and then some of them again."""
    wholes, rest = divmod(count, len(record))
    return sorted([*range(len(record))] * wholes + chance.sample(range(len(record)), rest))


@define
class Tally:
    """
    What came of one workload.

    Attributes:
        record: how often what happened in it.
        cuts: how often the power was cut.
        lost_tails: after how many cuts something was missing at the end.
        broken_cuts: how many broke a promise.
        broken: the promises that were broken.
        seconds: for the record, and for the cuts.
    """

    seed: int
    record: Mapping[str, int]
    cuts: int
    lost_tails: int = 0
    broken_cuts: int = 0
    broken: list[str] = field(factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)

    def count(self, found: Found, moment: int) -> None:
        faults = found.judge()
        self.lost_tails += found.has_lost_tail
        self.broken_cuts += bool(faults)
        self.broken += [f"workload {self.seed}, cut {moment}: {fault}" for fault in faults]

    def report(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "record": dict(self.record),
            "cuts": self.cuts,
            "cuts_with_a_lost_tail": self.lost_tails,
            "cuts_that_broke_a_promise": self.broken_cuts,
            "seconds": [round(seconds, 1) for seconds in self.seconds],
        }


def cut_power(folder: Path, options: argparse.Namespace, *, seed: int, cuts: int) -> Tally:
    """Record one workload, and cut the power that often."""
    began = time.monotonic()
    record, requests = record_work(folder, options, seed=seed)
    recorded = time.monotonic()
    chance = random.Random(seed)
    disk = Disk(loses_syncs=options.fault == LYING_DISK)
    known = Known()
    tally = Tally(seed, Counter(entry.kind for entry in record), cuts)
    done = 0
    for cut in moments(record, cuts, chance):
        for entry in record[done : cut + 1]:
            disk.apply(entry) if isinstance(entry, Event) else known.apply(entry)
        done = cut + 1
        path = write(folder / "cut", disk.after_power_cut(chance))
        tally.count(Found(path, known, requests, may_lose_tail=options.durability == "process"), cut)
    tally.seconds = (recorded - began, time.monotonic() - recorded)
    return tally


def cut_power_of_all(options: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("callbackq").setLevel(logging.CRITICAL)
    memory = Path("/dev/shm")
    tallies: list[Tally] = []
    for number in range(options.workloads):
        with tempfile.TemporaryDirectory(prefix="callbackq-power-", dir=memory if memory.is_dir() else None) as name:
            # So that they add up.
            cuts = (options.cuts + number) // options.workloads
            tallies.append(cut_power(Path(name), options, seed=options.seed + number, cuts=cuts))
    broken = [one for tally in tallies for one in tally.broken]
    return {
        "durability": options.durability,
        "journal": options.journal,
        "workloads": [tally.report() for tally in tallies],
        "cuts": sum(tally.cuts for tally in tallies),
        "cuts_with_a_lost_tail": sum(tally.lost_tails for tally in tallies),
        "cuts_that_broke_a_promise": sum(tally.broken_cuts for tally in tallies),
        "examples": [one[:300] for one in broken[:10]],
        "ok": not broken,
    }


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / NAME


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=10_000)
    parser.add_argument("--callbacks", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3, help="how often the store is closed")
    parser.add_argument("--durability", choices=["power", "process"], default="power")
    parser.add_argument("--journal", choices=["wal", "rollback"], default="wal")
    parser.add_argument("--fault", choices=FAULTS, default="")
    parser.add_argument("--workloads", type=int, default=5, help="how many are recorded")
    parser.add_argument("--seed", type=int, default=1, help="of the first workload; each has the next")
    outcome = cut_power_of_all(parser.parse_args())
    print(json.dumps(outcome, indent=1))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
