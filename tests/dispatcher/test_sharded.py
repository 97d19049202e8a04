"""A dispatcher on several stores: what fails in one of them stays there."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from callbackq.core.delivery import Delivery
from callbackq.dispatcher import Dispatcher
from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.events import EventKind
from callbackq.stores.sharded import ShardedDataAccess
from callbackq.stores.sharded.routing import shard_of
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from support.dispatching import InlineSender, Witness, a_request, an_engine, drive
from support.outages import FrailStore

Build = Callable[..., Dispatcher]
SHARDS = 3
SICK = 1
QUEUES = [f"queue-{number}" for number in range(30)]


def queues_of(shard: int, shards: int = SHARDS) -> list[str]:
    return [queue for queue in QUEUES if shard_of(queue, shards) == shard]


@pytest.mark.parametrize("takes", [0.0, 10.0], ids=["fails at once", "fails after ten seconds"])
@pytest.mark.parametrize("error", [TransientDataAccessError("x"), DataAccessError("x"), KeyError("a bug")], ids=repr)
def test_a_shard_that_fails_under_way_holds_up_no_other_and_loses_and_repeats_nothing(
    error: Exception, takes: float, clock: FakeClock, witness: Witness
) -> None:
    shards = [FrailStore(clock) for _ in range(SHARDS)]
    store = ShardedDataAccess(shards, clock=clock)
    for _ in range(10):
        store.store_callback_requests([a_request(queue) for queue in QUEUES])
    sick, healthy = queues_of(SICK), [queue for queue in QUEUES if queue not in queues_of(SICK)]
    outage = shards[SICK].down(error, takes=timedelta(seconds=takes))

    def break_down(delivery: Delivery) -> int:
        # All that were acquired from it are under way; none of their results can be recorded.
        if shards[SICK].error is None and delivery.request.queue_id in sick:
            outage.__enter__()
        return 200

    transport = ScriptedTransport([break_down] * len(QUEUES), clock=clock)
    engine = an_engine(store, InlineSender(transport), clock, witness)
    began = clock.monotonic()

    def delivered(queues: list[str]) -> int:
        return sum(event.kind is EventKind.SUCCEEDED and event.queue_id in queues for event in witness.events)

    drive(engine, clock, until=lambda: delivered(healthy) == 10 * len(healthy))

    assert clock.monotonic() - began < (2 if takes == 0.0 else 100)
    assert delivered(sick) == 0
    assert engine.busy == len(sick)
    outage.__exit__(None, None, None)
    drive(engine, clock, until=lambda: delivered(QUEUES) == 10 * len(QUEUES))
    places = [(delivery.request.queue_id, delivery.sequence) for delivery in transport.deliveries]
    for queue in QUEUES:
        assert [sequence for name, sequence in places if name == queue] == list(range(1, 11))
    kinds = witness.kinds()
    assert kinds.count(EventKind.STORE_FAILED) == kinds.count(EventKind.STORE_RECOVERED) == 1


def test_the_rest_is_delivered_in_order_while_a_file_is_gone_and_all_when_it_is_back(
    build: Build, witness: Witness, tmp_path: Path
) -> None:
    homes = [tmp_path / str(number) for number in range(4)]
    for home in homes:
        home.mkdir()
    store = ShardedDataAccess([SQLiteDataAccess(home / "callbacks.db") for home in homes])
    with store:
        requests = [a_request(queue) for queue in QUEUES]
        store.store_callback_requests(requests)
        away = homes[2].rename(tmp_path / "away")
        healthy = [queue for queue in QUEUES if queue not in queues_of(2, 4)]
        transport = ScriptedTransport()
        dispatcher = build(data_access=store, transport=transport, clock=None, poll_interval=timedelta(seconds=0.02))
        dispatcher.start()
        store.store_callback_requests([a_request(queue) for queue in healthy])
        witness.wait_for(EventKind.SUCCEEDED, 2 * len(healthy))
        assert {delivery.request.queue_id for delivery in transport.deliveries} == set(healthy)

        away.rename(homes[2])
        witness.wait_for(EventKind.SUCCEEDED, 2 * len(healthy) + len(queues_of(2, 4)))

        report = dispatcher.stop()
        assert report.unrecorded == 0
        places = [(delivery.request.queue_id, delivery.sequence) for delivery in transport.deliveries]
        assert len(places) == len(set(places)) == len(healthy) + len(QUEUES)
        for queue in healthy:
            assert [sequence for name, sequence in places if name == queue] == [1, 2]
