"""The network thread with attempts that are none."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from callbackq.clock import SystemClock
from callbackq.core.delivery import Answer, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure
from callbackq.targets import TargetPolicy
from callbackq.transport.attempt import Attempt, AttemptSettings, Network
from callbackq.transport.connections import KeptConnections
from callbackq.transport.loop import NetworkLoop
from support.deliveries import Outcomes, make_delivery

DONE = Answer(status_code=200, time=datetime.now(UTC), duration=timedelta(0))


@pytest.fixture
def loop() -> Iterator[NetworkLoop]:
    settings = AttemptSettings(
        policy=TargetPolicy(),
        ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        deadline_seconds=15.0,
        connect_seconds=5.0,
        response_limit=100,
    )
    loop = NetworkLoop(settings, KeptConnections(idle_timeout=4.0, max_age=60.0), SystemClock())
    loop.start()
    yield loop
    loop.stop()


class Told(Attempt):
    """An attempt that does what it is told."""

    def __init__(
        self, what: Callable[[Network], Generator[None, None, Outcome]], done: Callable[[Outcome], object]
    ) -> None:
        super().__init__(make_delivery("http://127.0.0.1:9/"), done, request=b"", time=datetime.now(UTC), started=0.0)
        self._what = what

    def live(self, network: Network) -> Generator[None, None, Outcome]:
        return self._what(network)


def ends_at_once(network: Network) -> Generator[None, None, Outcome]:
    yield from ()
    return DONE


def raises(network: Network) -> Generator[None, None, Outcome]:
    yield from ()
    raise MemoryError


def test_attempt_that_breaks_is_told_and_takes_no_other_along(loop: NetworkLoop) -> None:
    outcomes = Outcomes()

    for what in (raises, ends_at_once):
        loop.submit(Told(what, outcomes))

    broken, good = outcomes.answers(2)
    assert (broken.status_code, broken.failure) == (0, AttemptFailure.INTERNAL)
    assert good is DONE


def test_outcome_is_told_again_to_whom_it_found_without_memory(loop: NetworkLoop) -> None:
    outcomes, faults = Outcomes(), [MemoryError()]

    def take(outcome: Outcome) -> None:
        if faults:
            raise faults.pop()
        outcomes(outcome)

    loop.submit(Told(ends_at_once, take))

    assert outcomes.answers(1) == [DONE]


def test_attempt_handed_over_while_the_thread_stops_is_not_sent(loop: NetworkLoop) -> None:
    outcomes = Outcomes()

    def stops(network: Network) -> Generator[None, None, Outcome]:
        loop.stop()
        loop.submit(Told(ends_at_once, outcomes))
        yield from ()
        return DONE

    loop.submit(Told(stops, outcomes))

    assert outcomes.wait_for(2)[1] == NotSent(reason=NotSentReason.STOPPED)


def test_ended_thread_takes_no_more_attempts(loop: NetworkLoop) -> None:
    outcomes = Outcomes()

    loop.stop()

    assert not loop.submit(Told(ends_at_once, outcomes))
    assert outcomes.wait_for(0) == []


def test_deadlines_are_thrown_into_attempts(loop: NetworkLoop) -> None:
    outcomes = Outcomes()

    def waits(network: Network) -> Generator[None, None, Outcome]:
        network.deadlines.set(attempt, network.clock.monotonic() + 0.01)
        try:
            yield
        except Exception as end:
            ends.append(type(end).__name__)
        return DONE

    ends: list[str] = []
    attempt = Told(waits, outcomes)
    loop.submit(attempt)

    assert outcomes.wait_for(1) == [DONE]
    assert ends == ["DeadlinePassed"]
