"""Within a queue, strictly one after the other; between queues, nobody waits for anybody."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from callbackq.core.delivery import Delivery
from callbackq.core.models import CallbackState, RetryPhase
from callbackq.dispatcher import Dispatcher
from callbackq.events import EventKind
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from support.dispatching import HeldTransport, Witness, a_request

Build = Callable[..., Dispatcher]


def test_the_next_callback_of_a_queue_starts_only_after_the_result_of_the_one_before_is_stored(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    ids = [store.store_callback_request(a_request("q")).id for _ in range(3)]
    dispatcher = build(transport=transport)
    dispatcher.start()

    for count, id in enumerate(ids, start=1):
        transport.wait_for(count)
        assert list(transport.under_way) == [id]
        transport.answer(id, 200)
    dispatcher.stop()

    assert [delivery.callback_id for delivery in transport.deliveries] == ids


def test_a_callback_that_waits_for_its_retry_closes_its_own_queue_only(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    phases = [RetryPhase(retries=1, delay=timedelta(hours=1))]
    head = store.store_callback_request(a_request("closed", retry_phases=phases)).id
    behind = store.store_callback_request(a_request("closed")).id
    others = [store.store_callback_request(a_request(f"q{n}")).id for n in range(20)]
    dispatcher = build(transport=ScriptedTransport([500], clock=clock))

    dispatcher.run_until_idle()

    assert all(store.get_callback_status(id).success for id in others)
    assert store.get_callback_status(behind).blocked_by == head
    assert store.get_callback_status(behind).attempts == ()
    clock.advance(timedelta(hours=1))
    dispatcher.run_until_idle()
    assert store.get_callback_status(behind).success


def test_behind_a_failed_callback_the_queue_goes_on_or_holds_as_the_request_says(
    store: InMemoryDataAccess, clock: FakeClock, build: Build
) -> None:
    store.store_callback_request(a_request("goes-on"))
    going = store.store_callback_request(a_request("goes-on")).id
    store.store_callback_request(a_request("holds", on_exhausted="hold"))
    held = store.store_callback_request(a_request("holds")).id

    build(transport=ScriptedTransport([500, 500], clock=clock)).run_until_idle()

    assert store.get_callback_status(going).state is CallbackState.SUCCEEDED
    assert store.get_callback_status(held).state is CallbackState.WAITING


def test_a_hanging_receiver_slows_no_other_queue(
    store: InMemoryDataAccess, build: Build, transport: HeldTransport
) -> None:
    stuck = store.store_callback_request(a_request("stuck")).id
    dispatcher = build(transport=transport)
    dispatcher.start()
    transport.wait_for(1)

    for count in range(2, 12):
        id = store.store_callback_request(a_request("flows")).id
        transport.wait_for(count)
        transport.answer(id, 200)

    assert list(transport.under_way) == [stuck]


def test_two_dispatchers_on_one_store_never_work_on_one_queue_at_a_time(
    store: InMemoryDataAccess, clock: FakeClock, build: Build, witness: Witness
) -> None:
    ids = {q: [store.store_callback_request(a_request(f"q{q}")).id for _ in range(25)] for q in range(8)}
    log: list[str] = []

    def note(delivery: Delivery) -> int:
        log.append(delivery.callback_id)
        return 200

    for machine_name in ("one", "two"):
        build(transport=ScriptedTransport(default=note, clock=clock), machine_name=machine_name).start()
    witness.wait_for(EventKind.SUCCEEDED, 200)

    for queue_ids in ids.values():
        assert [id for id in log if id in set(queue_ids)] == queue_ids
    machines = {event.machine_name for event in witness.events}
    assert machines == {"one", "two"}
