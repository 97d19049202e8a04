"""
A store of one's own: all callbacks in one JSON file, which several processes may share.

    python examples/custom_store.py

It keeps every promise of a store (the tests run the conformance suite on it) in the simplest way that is honest: each
call has the file to itself, and a change writes it anew. So a call costs as much as there is in the file. That does for
a few hundred callbacks; for more there is `SQLiteDataAccess`.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from attrs import asdict, define, evolve, field

from callbackq import (
    CallbackAttempt,
    CallbackLock,
    CallbackNotFoundError,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    ConflictError,
    DataAccess,
    DataAccessError,
    Dispatcher,
    LockLostError,
)
from callbackq.clock import Clock, SystemClock
from callbackq.codec import dumps, loads
from callbackq.core.lifecycle import Action, Effect, Transition, apply_action, settle
from callbackq.core.validation import check_callback_id
from callbackq.dataaccess import Acquired, Durability, check_arguments
from callbackq.testing import ScriptedTransport


@define
class Entry:
    """A callback, and what the file keeps of it beside its status."""

    status: CallbackStatus
    attempts_made: int = 0
    abandoned: int = 0
    holds: bool = False
    cancel_requested: bool = False
    accepted_late: bool = False
    attempt_tokens: list[int] = field(factory=list)  # of each attempt's lock
    written: dict[str, str] = field(factory=dict)  # what state followed, by the token of a lock that was recorded

    def queue(self) -> tuple[str, str]:
        return (self.status.queue_id, "" if self.status.queue_id else self.status.id)

    def due(self) -> datetime:
        return self.status.next_attempt_at or self.status.locks[-1].timeout

    def is_held_by(self, lock: CallbackLock) -> bool:
        return self.status.state is CallbackState.LOCKED and self.status.locks[-1].token == lock.token

    def change(self, state: CallbackState, **changes: Any) -> None:
        self.status = evolve(self.status, state=state, **{"next_attempt_at": None, "failed_reason": None, **changes})

    def end_lock(self, ended: datetime, *, completed: bool) -> None:
        *earlier, last = self.status.locks
        self.status = evolve(self.status, locks=(*earlier, evolve(last, ended=ended, completed=completed)))

    def add_attempt(self, attempt: CallbackAttempt, token: int) -> None:
        # By token: a late attempt began before those of later locks.
        place = bisect(self.attempt_tokens, token)
        self.attempt_tokens.insert(place, token)
        attempts = self.status.attempts
        self.status = evolve(self.status, attempts=(*attempts[:place], attempt, *attempts[place:]))

    def follow(self, transition: Transition, now: datetime) -> Transition:
        settled = settle(transition, accepted_late=self.accepted_late, cancel_requested=self.cancel_requested)
        due = now + settled.delay if settled.state is CallbackState.WAITING else None
        self.change(settled.state, next_attempt_at=due, failed_reason=settled.failed_reason)
        self.attempts_made += settled.counted
        self.holds = settled.hold
        return settled


@define
class Document:
    """All there is in the file."""

    boot: str
    started: str  # the wall time of this boot's first call,
    monotonic: float  # and what the clock that never steps said then
    last_token: int = 0
    last_numbers: dict[str, int] = field(factory=dict)
    entries: dict[str, Entry] = field(factory=dict)

    def find(self, id: str) -> Entry:
        if any(check_callback_id(id)) or id not in self.entries:
            raise CallbackNotFoundError(id)
        return self.entries[id]

    def find_by_lock(self, acquired: Acquired) -> Entry:
        entry = self.entries.get(acquired.id)
        if entry is None or all(lock.token != acquired.lock.token for lock in entry.status.locks):
            raise LockLostError(acquired.id, acquired.lock.token)
        return entry

    def heads(self) -> dict[tuple[str, str], Entry]:
        closing = [entry for entry in self.entries.values() if entry.status.state.is_open or entry.holds]
        closing.sort(key=lambda entry: -entry.status.sequence)
        return {entry.queue(): entry for entry in closing}

    def open_heads(self) -> list[Entry]:
        return sorted((head for head in self.heads().values() if head.status.state.is_open), key=Entry.due)

    def status(self, entry: Entry) -> CallbackStatus:
        head = self.heads().get(entry.queue())
        blocked = head is not None and head is not entry and entry.status.state.is_open
        return evolve(entry.status, blocked_by=head.status.id) if blocked and head else entry.status

    def next_number(self, queue_id: str) -> int:
        if not queue_id:
            return 1
        self.last_numbers[queue_id] = self.last_numbers.get(queue_id, 0) + 1
        return self.last_numbers[queue_id]

    def dump(self) -> bytes:
        plain = asdict(self, recurse=False)
        plain["entries"] = [
            asdict(entry, recurse=False) | {"status": dumps(entry.status).decode()} for entry in self.entries.values()
        ]
        return json.dumps(plain).encode()

    @classmethod
    def load(cls, data: bytes) -> Document:
        plain = json.loads(data)
        entries = [
            Entry(**one | {"status": loads(one["status"], CallbackStatus, limit_bytes=len(data))})
            for one in plain["entries"]
        ]
        return cls(**plain | {"entries": {entry.status.id: entry for entry in entries}})


class JSONFileDataAccess(DataAccess):
    """Keep callbacks in a JSON file. What happened in a call is on the disk when it returns."""

    durability = Durability.POWER

    def __init__(self, path: Path, *, clock: Clock | None = None) -> None:
        self._path = path
        self._clock = clock or SystemClock()

    def open(self) -> None:
        with self._document():
            pass

    def close(self) -> None:
        """Nothing stays open between calls, which is why threads and forks need no care."""

    def now(self) -> datetime:
        with self._document() as document:
            return self._now(document)

    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        check_arguments(request=request, id=id)
        id = str(uuid4()) if id is None else id
        with self._document() as document:
            entry = document.entries.get(id)
            if entry is None:
                status = CallbackStatus(
                    id=id,
                    request=request,
                    queue_id=request.queue_id,
                    sequence=document.next_number(request.queue_id),
                    next_attempt_at=self._now(document),
                )
                entry = document.entries[id] = Entry(status)
            elif entry.status.request != request:
                raise ConflictError(id)
            return document.status(entry)

    def get_callback_status(self, id: str) -> CallbackStatus:
        with self._document() as document:
            return document.status(document.find(id))

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        acquired: list[Acquired] = []
        with self._document() as document:
            now = self._now(document)
            for entry in document.open_heads():
                if len(acquired) == limit or entry.due() > now:
                    break
                if entry.status.state is CallbackState.LOCKED:
                    entry.end_lock(entry.due(), completed=False)
                    entry.abandoned += 1
                    # A cancel noted under the lock applies now, and what was accepted late isn't sent once more.
                    if not entry.follow(Transition(state=CallbackState.WAITING), now).state.is_open:
                        continue
                document.last_token += 1
                lock = CallbackLock(
                    acquired=now, timeout=now + lock_timeout, machine_name=machine_name, token=document.last_token
                )
                entry.change(CallbackState.LOCKED, locks=(*entry.status.locks, lock))
                status = entry.status
                acquired.append(
                    Acquired(
                        id=status.id,
                        request=status.request,
                        queue_id=status.queue_id,
                        sequence=status.sequence,
                        lock=lock,
                        attempts_made=entry.attempts_made,
                        abandoned=entry.abandoned,
                        on_exhausted=status.request.on_exhausted,
                    )
                )
        return acquired

    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        check_arguments(delay=delay)
        with self._document() as document:
            entry = document.find_by_lock(acquired)
            if not entry.is_held_by(acquired.lock):
                raise LockLostError(acquired.id, acquired.lock.token)
            now = self._now(document)
            entry.end_lock(now, completed=True)
            return entry.follow(Transition(state=CallbackState.WAITING, delay=delay), now)

    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        token = acquired.lock.token
        with self._document() as document:
            entry = document.find_by_lock(acquired)
            if entry.is_held_by(acquired.lock):
                now = self._now(document)
                entry.end_lock(now, completed=True)
                entry.abandoned = 0
                settled = entry.follow(transition, now)
                entry.written[str(token)] = settled.state.value
                if attempt:
                    entry.add_attempt(attempt, token)
                return settled
            if state := entry.written.get(str(token)):
                return Transition(state=CallbackState(state))
            if attempt and token not in entry.attempt_tokens:
                entry.add_attempt(evolve(attempt, late=True), token)
            entry.accepted_late |= transition.state is CallbackState.SUCCEEDED
        raise LockLostError(acquired.id, token)

    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        check_arguments(action=action)
        with self._document() as document:
            entry, now = document.find(id), self._now(document)
            locked = entry.status.state is CallbackState.LOCKED
            effect = apply_action(
                action,
                id=id,
                state=entry.status.state,
                lock_is_live=locked and entry.due() > now,
                holds_queue=entry.holds or not entry.status.queue_id,
            )
            if effect is Effect.NOTE_CANCEL:
                entry.cancel_requested = True
                return document.status(entry)
            entry.holds = False
            if effect is Effect.CANCEL:
                if locked:
                    entry.end_lock(entry.due(), completed=False)
                entry.change(CallbackState.CANCELLED)
            elif effect is not Effect.OPEN_QUEUE:
                entry.attempts_made = entry.abandoned = 0
                number = entry.status.sequence
                if effect is Effect.REDELIVER_AT_TAIL:
                    number = document.next_number(entry.status.queue_id)
                entry.change(CallbackState.WAITING, next_attempt_at=now, sequence=number)
            return document.status(entry)

    def next_due(self) -> datetime | None:
        with self._document() as document:
            return min((head.due() for head in document.open_heads()), default=None)

    def _now(self, document: Document) -> datetime:
        return datetime.fromisoformat(document.started) + timedelta(
            seconds=self._clock.monotonic() - document.monotonic
        )

    @contextmanager
    def _document(self) -> Iterator[Document]:
        """Have the file alone: read it, let the block change what it says, write it if that is something else."""
        try:
            with self._path.with_suffix(".lock").open("w") as lock:
                # Opened for each call, it keeps out other threads as well as other processes.
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    before = self._path.read_bytes() if self._path.exists() else b""
                    document = Document.load(before) if before else Document("", "", 0.0)
                    if document.boot != self._clock.boot_id():
                        document.boot = self._clock.boot_id()
                        document.started = self._clock.now().isoformat()
                        document.monotonic = self._clock.monotonic()
                    yield document
                    if (after := document.dump()) != before:
                        self._replace(after)
                finally:
                    # Closing is not enough: a child forked meanwhile has the file open too.
                    fcntl.flock(lock, fcntl.LOCK_UN)
        except OSError as error:
            raise DataAccessError(f"{self._path.name} can't be read or written") from error

    def _replace(self, content: bytes) -> None:
        # Whoever is killed, or loses power, in between leaves the old file or the new one, never half of either.
        new = self._path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "callbacks.json"
        store = JSONFileDataAccess(path)
        for number in (1, 2, 3):
            store.store_callback_request(
                CallbackRequest(url="https://receiver.example/hook", queue_id="orders"), id=f"order-{number}"
            )

        # The receiver refuses the second one for good.
        Dispatcher(store, transport=ScriptedTransport([200, 410, 200])).run_until_idle()

        for id in ("order-1", "order-2", "order-3"):
            status = JSONFileDataAccess(path).get_callback_status(id)  # as another process would read it
            answers = ", ".join(str(attempt.status_code) for attempt in status.attempts)
            print(f"{status.queue_id}, number {status.sequence}: {status.state.value} after {answers}")
        print(f"{path.name}: {len(path.read_bytes())} bytes")


if __name__ == "__main__":
    main()
