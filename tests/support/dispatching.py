"""A dispatcher's surroundings under a test's control: transports that obey, an observer that remembers, time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta

from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure, CallbackData, CallbackRequest
from callbackq.core.verdict import ResponsePolicy
from callbackq.dataaccess import DataAccess
from callbackq.engine import Engine
from callbackq.events import EventKind, ObservedEvent
from callbackq.reporting import Reporter
from callbackq.settings import Settings
from callbackq.testing import FakeClock
from callbackq.transport.protocol import SupportsSubmit, Transport

LIMIT = 10.0
"""Seconds a test waits for what must happen; none ever waits that long when all is well."""


class HeldTransport:
    """Has requests in flight until the test answers them."""

    deadline = timedelta(seconds=15)

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self.under_way: dict[str, tuple[Delivery, Callable[[Outcome], None]]] = {}
        self.deliveries: list[Delivery] = []

    def send(self, delivery: Delivery) -> Outcome:
        raise AssertionError("the dispatcher must use submit")

    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        with self._changed:
            assert delivery.callback_id not in self.under_way, "sent twice at a time"
            self.under_way[delivery.callback_id] = (delivery, done)
            self.deliveries.append(delivery)
            self._changed.notify_all()

    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            self.answer(delivery.callback_id, AttemptFailure.INTERRUPTED)

    def close(self) -> None:
        pass

    def answer(
        self, id: str, what: int | AttemptFailure | NotSentReason, headers: dict[str, str] | None = None
    ) -> None:
        with self._changed:
            _, done = self.under_way.pop(id)
        if isinstance(what, NotSentReason):
            done(NotSent(reason=what, detail="test"))
            return
        status, failure = (what, None) if isinstance(what, int) else (0, what)
        done(
            Answer(
                status_code=status,
                response=CallbackData(headers=headers or {}),
                time=self._clock.now(),
                duration=timedelta(milliseconds=5),
                failure=failure,
            )
        )

    def wait_for(self, count: int) -> None:
        """Wait until so many have been sent in all."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.deliveries) >= count, LIMIT), "nothing was sent"


class InlineSender:
    """Sends within `submit`, so that an engine can be stepped without any thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        done(self._transport.send(delivery))

    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        assert not list(deliveries), "nothing is ever under way"


class Witness:
    """An observer that remembers, and lets a test wait for what it wants to see."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.events: list[ObservedEvent] = []

    def observe(self, event: ObservedEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def kinds(self, id: str | None = None) -> list[EventKind]:
        return [event.kind for event in self.events if id is None or event.callback_id == id]

    def wait_for(self, kind: EventKind, count: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.kinds().count(kind) >= count, LIMIT), f"no {kind}"


def a_request(queue_id: str = "", **fields: object) -> CallbackRequest:
    """A request to nowhere in particular."""
    return CallbackRequest(**{"url": "http://receiver.test/path", "queue_id": queue_id, **fields})  # type: ignore[arg-type]


def an_engine(
    data_access: DataAccess,
    sender: SupportsSubmit,
    clock: FakeClock,
    witness: Witness,
    *,
    concurrency: int = 64,
    host_concurrency: int = 64,
) -> Engine:
    """An engine with ordinary settings, to be stepped by hand."""
    settings = Settings(
        machine_name="one",
        concurrency=concurrency,
        host_concurrency=host_concurrency,
        lock_timeout=timedelta(seconds=30),
        poll_interval=timedelta(seconds=1),
        max_abandoned=5,
        retry_jitter=0.0,
        response_policy=ResponsePolicy(),
        deadline=timedelta(seconds=15),
    )
    return Engine(
        data_access,
        sender,
        settings=settings,
        reporter=Reporter(witness, "one"),
        clock=clock,
        random=lambda: 0.5,
        on_notification_owed=lambda: None,
    )


def drive(engine: Engine, clock: FakeClock, until: Callable[[], bool]) -> None:
    """Step the engine, and let exactly the time pass that it wants to rest."""
    for _ in range(10_000):
        if until():
            return
        clock.advance(engine.step())
    raise AssertionError("it did not happen")
