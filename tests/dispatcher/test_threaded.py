"""A blocking transport of the user's, run on a pool of threads."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure
from callbackq.testing import FakeClock
from callbackq.transport.threaded import ThreadedSender
from support.dispatching import LIMIT, a_request


def a_delivery(id: str = "c", *, ends_at: float = FakeClock().monotonic() + 27) -> Delivery:
    return Delivery(callback_id=id, request=a_request(), sequence=1, attempt=1, token=1, ends_at=ends_at)


class Gate:
    """Blocks every send until it is opened."""

    deadline = timedelta(seconds=1)

    def __init__(self) -> None:
        self.open = threading.Event()
        self.began = threading.Semaphore(0)

    def send(self, delivery: Delivery) -> Outcome:
        self.began.release()
        assert self.open.wait(LIMIT)
        return Answer(status_code=200, time=FakeClock().now(), duration=timedelta(0))

    def close(self) -> None:
        pass


class Outcomes:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.all: list[Outcome] = []

    def take(self, outcome: Outcome) -> None:
        with self._changed:
            self.all.append(outcome)
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[Outcome]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all) >= count, LIMIT)
        return self.all


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


def test_as_many_are_under_way_as_there_are_threads_and_the_rest_wait(gate: Gate, outcomes: Outcomes) -> None:
    sender = ThreadedSender(gate, threads=3, clock=FakeClock())
    for number in range(5):
        sender.submit(a_delivery(str(number)), outcomes.take)

    assert all(gate.began.acquire(timeout=LIMIT) for _ in range(3))
    assert not gate.began.acquire(blocking=False)
    gate.open.set()

    assert [outcome.status_code for outcome in outcomes.wait_for(5)] == [200] * 5  # type: ignore[union-attr]
    sender.close()


def test_an_interrupt_takes_back_who_waits_and_lets_the_begun_go_on(gate: Gate, outcomes: Outcomes) -> None:
    sender = ThreadedSender(gate, threads=1, clock=FakeClock())
    begun, waiting = a_delivery("begun"), a_delivery("waiting")
    sender.submit(begun, outcomes.take)
    assert gate.began.acquire(timeout=LIMIT)
    sender.submit(waiting, outcomes.take)

    sender.interrupt([begun, waiting])

    assert outcomes.wait_for(1) == [NotSent(reason=NotSentReason.STOPPED)]
    gate.open.set()
    assert [type(outcome) for outcome in outcomes.wait_for(2)] == [NotSent, Answer]
    sender.close()


def test_what_has_waited_too_long_for_a_thread_is_not_sent(gate: Gate, outcomes: Outcomes) -> None:
    clock = FakeClock()
    sender = ThreadedSender(gate, threads=1, clock=clock)
    fits, too_late = clock.monotonic() + gate.deadline.total_seconds(), clock.monotonic() - 1

    gate.open.set()
    sender.submit(a_delivery("fits", ends_at=fits), outcomes.take)
    sender.submit(a_delivery("too late", ends_at=too_late), outcomes.take)

    sent, not_sent = outcomes.wait_for(2)
    assert isinstance(sent, Answer)
    assert not_sent == NotSent(reason=NotSentReason.TIME_IS_UP)
    sender.close()


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_a_thread_survives_whatever_a_transport_raises(error: BaseException, outcomes: Outcomes) -> None:
    class Raising(Gate):
        def send(self, delivery: Delivery) -> Outcome:
            raise error

    sender = ThreadedSender(Raising(), threads=1, clock=FakeClock())
    for _ in range(2):
        sender.submit(a_delivery(), outcomes.take)

    for outcome in outcomes.wait_for(2):
        assert isinstance(outcome, Answer)
        assert (outcome.failure, outcome.detail) == (AttemptFailure.INTERNAL, type(error).__name__)
    sender.close()


def test_its_threads_end_when_it_is_closed(gate: Gate, outcomes: Outcomes) -> None:
    sender = ThreadedSender(gate, threads=2, clock=FakeClock())
    gate.open.set()
    for number in range(2):
        sender.submit(a_delivery(str(number)), outcomes.take)
    outcomes.wait_for(2)
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("callbackq-send")]

    sender.close()

    for thread in ours:
        thread.join(LIMIT)
        assert not thread.is_alive()


def test_a_machine_without_threads_left_is_a_local_fault(
    gate: Gate, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    sender = ThreadedSender(gate, threads=2, clock=FakeClock())

    sender.submit(a_delivery(), outcomes.take)

    assert outcomes.wait_for(1) == [NotSent(reason=NotSentReason.LOCAL_FAULT, detail="RuntimeError")]
