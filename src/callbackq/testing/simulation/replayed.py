"""
A dispatcher that stops at each call of the store, without a thread.

Its life is run again from its start, with the replies that it was given so far, up to the next call. An engine does the
same when it is told the same: that is what makes it a step function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from math import ceil, inf
from typing import Any, Final

from attrs import evolve, frozen, mutable

from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.verdict import ResponsePolicy
from callbackq.dataaccess import DataAccess
from callbackq.engine import Engine
from callbackq.errors import CallbackNotFoundError
from callbackq.events import ObservedEvent
from callbackq.reporting import Reporter
from callbackq.settings import Settings
from callbackq.stores.memory import InMemoryDataAccess

__all__ = ["HINT", "LOCK_TIMEOUT", "Clock", "Life", "Reply", "go_on"]

_START: Final = datetime(2026, 1, 1, tzinfo=UTC)
_UPTIME_US: Final = 1_000_000_000
HINT: Final = (-1, 0)
"""Among the answers that a life is told: the store's hint that something may be due."""
LOCK_TIMEOUT: Final = timedelta(seconds=30)
_SETTINGS: Final = Settings(
    machine_name="machine",
    concurrency=2,
    host_concurrency=2,
    lock_timeout=LOCK_TIMEOUT,
    # Longer than a lock: what becomes due is found because the store says when.
    poll_interval=timedelta(seconds=60),
    max_abandoned=5,
    retry_jitter=0.0,
    response_policy=ResponsePolicy(),
    deadline=timedelta(seconds=15),
)


class _Suspended(BaseException):
    """A dispatcher has come to a call of the store, or to a rest."""


class Clock:
    """Shows the time of the part of a life that is being run."""

    def __init__(self, now_us: int = 0) -> None:
        self.now_us = now_us

    def now(self) -> datetime:
        return _START + timedelta(microseconds=self.now_us)

    def monotonic(self) -> float:
        return (self.now_us + _UPTIME_US) / 1e6

    def boot_id(self) -> str:
        return "boot"


@frozen
class Reply:
    """What a dispatcher was given, and when."""

    at_us: int
    call: str
    value: Any


@mutable
class Life:
    """
    One life of a dispatcher.

    Attributes:
        machine_name: whose life it is.
        replies: what it was given so far.
        call: the call it waits for; ``None`` while it rests.
        wakes_us: when it wants to go on from its rest.
        sent: how many requests it has handed to the transport.
        answers: what came of those that have been answered, to be told at its next step.
        engine: its engine, as it stands at the call or rest.
        is_frozen: its process stands still.
    """

    machine_name: str
    replies: tuple[Reply, ...]
    call: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None
    wakes_us: float = 0.0
    sent: int = 0
    answers: tuple[tuple[int, int], ...] = ()
    engine: Engine | None = None
    is_frozen: bool = False

    def is_ready(self, now_us: int) -> bool:
        """Whether it would go on by itself now."""
        return not self.is_frozen and (self.call is not None or bool(self.answers) or self.wakes_us <= now_us)

    def key(self, now_us: int) -> tuple[object, ...]:
        """
        What tells this life from others: all that can make a difference from here on.

        Instants count from now, so that it doesn't matter how long ago something happened, only how long ago it is.
        """
        call = "" if self.call is None else self.call[0]
        wakes = max(self.wakes_us - now_us, 0.0) if self.call is None else 0.0
        told = sorted(self.answers)
        facts = () if self.engine is None else _facts_of(self.engine, now_us)
        return (call, wakes, tuple(told), facts, self.is_frozen)


def _facts_of(engine: Engine, now_us: int) -> tuple[object, ...]:
    now = (now_us + _UPTIME_US) / 1e6

    def from_now(reading: float) -> float:
        return max(round(reading - now, 6), -1e-6)

    slots = tuple(
        (
            slot.acquired.id,
            slot.acquired.lock.token,
            slot.acquired.abandoned,
            slot.acquired.attempts_made,
            slot.delivery and (slot.delivery.token, slot.delivery.attempt, round(slot.delivery.ends_at - now, 6)),
            slot.attempt and slot.attempt.status_code,
            slot.ends_unsent,
            slot.release_after,
            slot.is_overdue,
            slot.was_overtaken,
        )
        for slot in engine._slots.values()
    )
    lines = tuple(
        (tuple(slot.acquired.id for slot in line.slots), from_now(line.rest.until), line.suspects)
        for line in engine.recorder._lines()
    )
    return (
        slots,
        lines,
        engine.inbox.qsize(),
        from_now(engine._look_at),
        from_now(engine._parked_until),
        from_now(engine._look_for_overstaying_at),
    )


class _Stage(DataAccess):
    """The store as a life that is run again meets it: replies as they were, and then the end."""

    durability = InMemoryDataAccess.durability

    def __init__(self, life: Life, clock: Clock, store: InMemoryDataAccess) -> None:
        self._life = life
        self._clock = clock
        self._store = store
        self._next = 0

    def take(self, call: str, *args: Any, **kwargs: Any) -> Any:
        if self._next == len(self._life.replies):
            self._life.call = None if call == "rest" else (call, args, kwargs)
            raise _Suspended
        reply = self._life.replies[self._next]
        assert reply.call == call, "a dispatcher did something else when it was run again"
        self._next += 1
        self._clock.now_us = reply.at_us
        return reply.value

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> Any:
        return self.take("acquire_locks", machine_name, lock_timeout=lock_timeout, limit=limit)

    def record_attempts(self, records: Any) -> Any:
        return self.take("record_attempts", records)

    def release_locks(self, locks: Any) -> Any:
        return self.take("release_locks", locks)

    def next_due(self) -> Any:
        # In one step with the call before it: it is a hint when to look again, and is not waited for.
        if self._next == len(self._life.replies):
            due = self._store.next_due()
            self._life.replies += (Reply(self._clock.now_us, "next_due", due),)
        return self.take("next_due")

    def now(self) -> datetime:
        return self._clock.now()

    def get_callback_status(self, id: str) -> Any:
        # It is read for the name of the machine in an event only; the takeover goes on without it.
        raise CallbackNotFoundError(id)

    def open(self) -> None: ...

    def close(self) -> None: ...

    def store_callback_request(self, request: Any, *, id: Any = None) -> Any:
        raise AssertionError("no engine calls this")

    def release_lock(self, acquired: Any, *, delay: Any = None) -> Any:
        raise AssertionError("no engine calls this")

    def record_attempt(self, acquired: Any, attempt: Any, transition: Any) -> Any:
        raise AssertionError("no engine calls this")

    def request_transition(self, id: Any, action: Any) -> Any:
        raise AssertionError("no engine calls this")


class _Sender:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.submitted: list[tuple[Delivery, Callable[[Outcome], None]]] = []

    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        if self._clock.monotonic() >= delivery.ends_at:
            done(NotSent(reason=NotSentReason.TIME_IS_UP))
        else:
            self.submitted.append((delivery, done))

    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        raise AssertionError("nobody stops here")


class _Deaf:
    def observe(self, event: ObservedEvent) -> None: ...


def go_on(life: Life, store: InMemoryDataAccess) -> list[Delivery]:
    """Run a life up to its next call or rest. Returns what it has sent since the last time."""
    clock = Clock()
    sender, stage = _Sender(clock), _Stage(life, clock, store)
    try:
        clock.now_us = stage.take("start")
        engine = Engine(
            stage,
            sender,
            settings=evolve(_SETTINGS, machine_name=life.machine_name),
            reporter=Reporter(_Deaf(), life.machine_name),
            clock=clock,
            random=lambda: 0.5,
            on_notification_owed=lambda: None,
        )
        life.engine = engine
        while True:
            wait = engine.step()
            life.wakes_us = inf if wait == inf else clock.now_us + max(ceil(wait * 1e6), 1)
            for number, status in stage.take("rest"):
                if (number, status) == HINT:
                    engine.wake()
                else:
                    sender.submitted[number][1](_answer(status, clock))
    except _Suspended:
        pass
    new = [delivery for delivery, _ in sender.submitted[life.sent :]]
    life.sent = len(sender.submitted)
    return new


def _answer(status: int, clock: Clock) -> Answer:
    return Answer(status_code=status, time=clock.now(), duration=timedelta(0))
