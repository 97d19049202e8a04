"""The store in memory keeps every promise of a store, at a cost that doesn't grow, and forgets what has gone."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from attrs import define, evolve

from callbackq.core.lifecycle import Action, Transition
from callbackq.core.models import CallbackAttempt, CallbackRequest, CallbackState, FailedReason
from callbackq.dataaccess import Acquired, DataAccess, Durability, Notification
from callbackq.errors import InvalidRequestError
from callbackq.stores._agenda import Agenda, Entry
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import DataAccessConformance, FakeClock

MINUTE = timedelta(minutes=1)
DELIVERED = Transition(state=CallbackState.SUCCEEDED, counted=True)
HELD = Transition(state=CallbackState.FAILED, counted=True, hold=True, failed_reason=FailedReason.EXHAUSTED)
OWING = Transition(state=CallbackState.FAILED, counted=True, notify=True, failed_reason=FailedReason.EXHAUSTED)


class TestInMemoryConformance(DataAccessConformance):
    def make_data_access(self, clock: FakeClock) -> DataAccess:
        return InMemoryDataAccess(clock=clock)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> InMemoryDataAccess:
    return InMemoryDataAccess(clock=clock)


def request(queue_id: str = "") -> CallbackRequest:
    return CallbackRequest(url="https://receiver.example/hook", queue_id=queue_id)


def attempt(store: InMemoryDataAccess) -> CallbackAttempt:
    return CallbackAttempt(status_code=200, time=store.now(), duration=timedelta(0))


def acquire(store: InMemoryDataAccess, limit: int = 10) -> list[Acquired]:
    return store.acquire_locks("machine", lock_timeout=MINUTE, limit=limit)


def fail(store: InMemoryDataAccess, queue_id: str = "") -> None:
    store.store_callback_request(evolve(request(queue_id), notification_email_address="a@host.example"))
    end(store, acquire(store)[0], OWING)


def lease(store: InMemoryDataAccess, limit: int = 10) -> list[Notification]:
    return store.acquire_notifications(lock_timeout=MINUTE, limit=limit)


def pay(store: InMemoryDataAccess, *, quiet_for: timedelta) -> None:
    for owed in lease(store):
        store.record_notification(owed, retry_in=None, quiet_for=quiet_for)


def end(store: InMemoryDataAccess, acquired: Acquired, transition: Transition = DELIVERED) -> None:
    store.record_attempt(acquired, attempt(store), transition)


# What it is.


def test_it_declares_that_callbacks_are_gone_with_the_process(store: InMemoryDataAccess) -> None:
    assert store.durability is Durability.MEMORY


def test_two_stores_in_one_process_know_nothing_of_each_other(clock: FakeClock) -> None:
    one, other = InMemoryDataAccess(clock=clock), InMemoryDataAccess(clock=clock)
    one.store_callback_request(request("queue"), id="same")

    status = other.store_callback_request(request("queue"), id="same")

    assert status.sequence == 1
    assert [len(acquire(store)) for store in (one, other)] == [1, 1]


def test_without_a_clock_it_takes_the_machines() -> None:
    before = datetime.now(UTC)
    now = InMemoryDataAccess().now()

    assert before - MINUTE < now < before + MINUTE


def test_closing_keeps_everything(store: InMemoryDataAccess) -> None:
    store.store_callback_request(request(), id="kept")

    with store:
        pass

    assert store.get_callback_status("kept").state is CallbackState.WAITING


def test_a_refused_machine_name_locks_nothing(store: InMemoryDataAccess) -> None:
    store.store_callback_request(request())

    with pytest.raises(InvalidRequestError):
        store.acquire_locks("line\nbreak", lock_timeout=MINUTE, limit=1)

    assert len(acquire(store)) == 1


# Hints.


def hints_of(store: InMemoryDataAccess) -> list[datetime | None]:
    """What each hint found to be due. It asks the store, which a hint that is given under its mutex could not."""
    hints: list[datetime | None] = []
    store.subscribe(lambda: hints.append(store.next_due()))
    return hints


def test_storing_gives_a_hint_and_storing_behind_another_gives_none(store: InMemoryDataAccess) -> None:
    hints = hints_of(store)

    store.store_callback_request(request("queue"))
    store.store_callback_request(request("queue"))
    store.store_callback_request(request())

    assert hints == [store.now(), store.now()]


@pytest.mark.parametrize(
    "make_due",
    [
        lambda store, acquired: end(store, acquired),
        lambda store, acquired: end(store, acquired, Transition(state=CallbackState.WAITING)),
        lambda store, acquired: store.release_lock(acquired),
    ],
    ids=["the next one follows", "a retry at once", "a release"],
)
def test_the_end_of_a_lock_gives_a_hint_when_something_is_due(
    store: InMemoryDataAccess, make_due: Callable[[InMemoryDataAccess, Acquired], None]
) -> None:
    for _ in range(2):
        store.store_callback_request(request("queue"))
    (acquired,) = acquire(store)
    hints = hints_of(store)

    make_due(store, acquired)

    assert hints == [store.now()]


@pytest.mark.parametrize("action", Action)
def test_an_operator_who_opens_a_queue_gives_a_hint(store: InMemoryDataAccess, action: Action) -> None:
    for _ in range(2):
        store.store_callback_request(request("queue"))
    (acquired,) = acquire(store)
    end(store, acquired, HELD)
    hints = hints_of(store)

    store.request_transition(acquired.id, action)

    assert hints == [store.now()]


def test_what_makes_nothing_due_gives_no_hint(store: InMemoryDataAccess) -> None:
    for _ in range(2):
        store.store_callback_request(request())
    first, second = acquire(store)
    hints = hints_of(store)

    end(store, first)
    end(store, second, Transition(state=CallbackState.WAITING, delay=MINUTE))

    assert hints == []


def test_an_ended_subscription_gives_no_more_hints(store: InMemoryDataAccess) -> None:
    ended: list[None] = []
    unsubscribe = store.subscribe(lambda: ended.append(None))
    hints = hints_of(store)

    unsubscribe()
    unsubscribe()
    store.store_callback_request(request())

    assert (len(ended), len(hints)) == (0, 1)


# Cost. Counted in calls, so that a busy machine can't disturb it.


def calls_of(work: Callable[[], object]) -> int:
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    # Whoever is told of each collection (pytest's plugins are) would be counted, too.
    gc.disable()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls


def deep_queue(store: InMemoryDataAccess, clock: FakeClock, size: int) -> None:
    for _ in range(size):
        store.store_callback_request(request("deep"))


def a_queue_each(store: InMemoryDataAccess, clock: FakeClock, size: int) -> None:
    for number in range(size):
        store.store_callback_request(request(str(number)))


def waiting_queues(store: InMemoryDataAccess, clock: FakeClock, size: int) -> None:
    for number in range(size):
        for _ in range(2):
            store.store_callback_request(request(str(number)))
    for acquired in acquire(store, limit=size):
        end(store, acquired, Transition(state=CallbackState.WAITING, delay=timedelta(days=1)))
    store.store_callback_request(request("ready"))


def finished_callbacks(store: InMemoryDataAccess, clock: FakeClock, size: int) -> None:
    for _ in range(size):
        store.store_callback_request(request("queue"))
        end(store, acquire(store)[0])
    store.store_callback_request(request("queue"))


@pytest.mark.parametrize("shape", [deep_queue, a_queue_each, waiting_queues, finished_callbacks])
def test_the_cost_of_a_delivery_does_not_grow_with_what_is_stored(
    shape: Callable[[InMemoryDataAccess, FakeClock, int], None],
) -> None:
    def cost(size: int) -> int:
        clock = FakeClock()
        store = InMemoryDataAccess(clock=clock)
        shape(store, clock, size)
        return calls_of(lambda: end(store, acquire(store, limit=1)[0]))

    assert cost(2000) <= cost(20) + 5


def test_leaving_a_long_queue_costs_no_more_than_leaving_a_short_one() -> None:
    def cost(size: int) -> int:
        store = InMemoryDataAccess(clock=FakeClock())
        ids = [store.store_callback_request(request("queue")).id for _ in range(size)]
        return calls_of(lambda: store.request_transition(ids[size // 2], Action.CANCEL))

    assert cost(2000) <= cost(20)


def many_debts(store: InMemoryDataAccess, clock: FakeClock, size: int) -> None:
    for _ in range(size):
        fail(store)


def many_mailings(store: InMemoryDataAccess, clock: FakeClock, size: int) -> None:
    for number in range(size):
        fail(store, str(number))


def quiet_mailings(store: InMemoryDataAccess, clock: FakeClock, size: int) -> None:
    for number in range(size):
        fail(store, str(number))
        pay(store, quiet_for=timedelta(minutes=1 + number % 7))
    clock.advance(timedelta(minutes=4))
    fail(store)


@pytest.mark.parametrize("shape", [many_debts, many_mailings, quiet_mailings])
def test_the_cost_of_leasing_an_email_does_not_grow_with_what_is_owed(
    shape: Callable[[InMemoryDataAccess, FakeClock, int], None],
) -> None:
    def cost(size: int) -> int:
        clock = FakeClock()
        store = InMemoryDataAccess(clock=clock)
        shape(store, clock, size)
        return calls_of(lambda: lease(store, limit=1))

    assert cost(1000) <= cost(250)


# Memory.


def test_mailings_that_owe_nothing_do_not_pile_up(store: InMemoryDataAccess, clock: FakeClock) -> None:
    quiet_mailings(store, clock, 700)
    clock.advance(timedelta(minutes=10))

    for _ in range(8):
        pay(store, quiet_for=timedelta(hours=1))

    assert len(store._mailings) == 1


def test_what_was_purged_is_gone_from_memory(store: InMemoryDataAccess) -> None:
    stored = request("queue")
    kept = weakref.ref(stored)
    store.store_callback_request(stored)
    store.store_callback_request(request("queue"))
    end(store, acquire(store)[0])
    del stored

    store.purge(finished_for=timedelta(0))
    gc.collect()

    assert kept() is None


@define(eq=False)
class Item:
    entry: Entry | None = None


def test_an_agenda_forgets_what_has_left_it() -> None:
    agenda: Agenda[Item] = Agenda()
    now = datetime(2026, 1, 1, tzinfo=UTC)
    gone = weakref.WeakSet[Item]()
    stays = Item()
    agenda.put(stays, now)

    for number in range(1000):
        item = Item()
        gone.add(item)
        agenda.put(item, now + timedelta(seconds=number))
        agenda.remove(item)
    del item
    gc.collect()

    assert len(gone) == 0
    assert len(agenda._heap) < 100
    assert agenda.pop_due(now) is stays


def test_an_agenda_moves_what_is_put_in_again() -> None:
    agenda: Agenda[Item] = Agenda()
    now = datetime(2026, 1, 1, tzinfo=UTC)
    items = [Item() for _ in range(3)]
    for item in items:
        agenda.put(item, now)

    agenda.put(items[0], now + MINUTE)
    agenda.put(items[1], now - MINUTE)

    assert agenda.first() == now - MINUTE
    assert [agenda.pop_due(now) for _ in range(3)] == [items[1], items[2], None]
    assert agenda.first() == now + MINUTE
