"""A slow host can't take all slots."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from callbackq import Dispatcher
from callbackq.core.delivery import Answer, Delivery, Outcome
from callbackq.core.fairness import Admission, HostLimits
from callbackq.core.models import AttemptFailure, CallbackRequest
from callbackq.events import EventKind
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock
from support.dispatching import LIMIT, HeldTransport, Witness, an_engine, drive


def to(host: str) -> CallbackRequest:
    return CallbackRequest(url=f"http://{host}/")


def test_a_host_takes_as_many_slots_as_its_limit_and_others_go_on() -> None:
    hosts: HostLimits[int] = HostLimits(2, slots=100)

    admissions = [hosts.admit("slow", number, now=0.0) for number in range(4)]

    assert admissions == [Admission.SEND, Admission.SEND, Admission.WAIT, Admission.WAIT]
    assert hosts.admit("other", 9, now=0.0) is Admission.SEND


def test_whoever_stands_in_line_starts_when_a_place_is_free_in_the_order_of_arrival() -> None:
    hosts: HostLimits[int] = HostLimits(1, slots=100)
    for number in range(3):
        hosts.admit("busy", number, now=0.0)

    assert hosts.end("busy", 0, now=0.1) == 1
    assert hosts.end("busy", 1, now=0.2) == 2
    assert hosts.end("busy", 2, now=0.3) is None
    assert hosts.admit("busy", 3, now=0.4) is Admission.SEND


def test_a_line_that_stands_still_is_given_up() -> None:
    hosts: HostLimits[int] = HostLimits(1, slots=100)
    hosts.admit("stuck", 0, now=0.0)
    hosts.admit("stuck", 1, now=0.5)

    assert hosts.leave_lines(now=1.4) == []
    assert hosts.leave_lines(now=1.5) == [("stuck", 1)]
    assert hosts.admit("stuck", 2, now=1.6) is Admission.PARK


def test_all_leave_their_lines_when_told_to() -> None:
    hosts: HostLimits[int] = HostLimits(1, slots=100)
    for host in ("a", "b"):
        for number in range(3):
            hosts.admit(host, number, now=0.0)

    assert sorted(hosts.leave_lines()) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_parking_lasts_longer_the_more_are_parked_and_has_a_limit() -> None:
    hosts: HostLimits[int] = HostLimits(2, slots=100)
    hosts.admit("dead", 0, now=0.0)
    hosts.admit("dead", 1, now=0.0)

    waits = [hosts.parking_seconds("dead", now=10.0) for _ in range(200)]

    assert waits[:3] == [15.0, 20.0, 25.0]
    assert waits[-1] == 60.0


def test_parking_gets_shorter_again_as_places_become_free() -> None:
    hosts: HostLimits[int] = HostLimits(2, slots=100)
    hosts.admit("slow", 0, now=0.0)
    hosts.admit("slow", 1, now=0.0)
    first = [hosts.parking_seconds("slow", now=2.0) for _ in range(3)][-1]
    hosts.end("slow", 0, now=2.0)
    hosts.end("slow", 1, now=2.0)
    hosts.admit("slow", 2, now=2.0)

    assert hosts.parking_seconds("slow", now=4.0) < first


def test_hosts_of_which_nothing_is_known_share_half_of_the_slots() -> None:
    hosts: HostLimits[str] = HostLimits(2, slots=8)

    admissions = [hosts.admit(f"host {number}", f"{number}", now=0.0) for number in range(6)]

    assert admissions == [Admission.SEND] * 4 + [Admission.PARK] * 2
    hosts.end("host 0", "0", now=0.1, answered=True)
    assert hosts.admit("host 4", "again", now=0.1) is Admission.SEND


def test_a_single_host_may_have_its_limit_although_nothing_is_known_of_it() -> None:
    hosts: HostLimits[int] = HostLimits(8, slots=8)

    assert [hosts.admit("host", number, now=0.0) for number in range(8)] == [Admission.SEND] * 8


def test_a_host_that_has_answered_does_not_wait_for_those_that_have_not() -> None:
    hosts: HostLimits[str] = HostLimits(2, slots=8)
    hosts.admit("healthy", "first", now=0.0)
    hosts.end("healthy", "first", now=0.1, answered=True)
    for number in range(4):
        hosts.admit(f"unknown {number}", f"{number}", now=0.2)

    assert hosts.admit("healthy", "second", now=0.3) is Admission.SEND
    assert hosts.admit("unknown 5", "5", now=0.3) is Admission.PARK


def hang(hosts: HostLimits[str], host: str) -> None:
    hosts.admit(host, f"hung at {host}", now=0.0)
    hosts.end(host, f"hung at {host}", now=15.0, answered=False)


def test_a_host_that_hung_gets_one_request_at_a_time_until_it_answers() -> None:
    hosts: HostLimits[str] = HostLimits(2, slots=100)
    hang(hosts, "host")

    assert hosts.admit("host", "a", now=20.0) is Admission.SEND
    assert hosts.admit("host", "b", now=20.0) is Admission.PARK
    hosts.end("host", "a", now=20.1, answered=True)
    assert [hosts.admit("host", item, now=20.2) for item in "cd"] == [Admission.SEND] * 2


def test_hosts_that_hung_share_a_quarter_of_the_slots_and_leave_the_others_to_new_ones() -> None:
    hosts: HostLimits[str] = HostLimits(2, slots=16)
    for number in range(6):
        hang(hosts, f"dead {number}")

    admissions = [hosts.admit(f"dead {number}", f"{number}", now=20.0) for number in range(6)]

    assert admissions == [Admission.SEND] * 4 + [Admission.PARK] * 2
    assert hosts.admit("new", "new", now=20.0) is Admission.SEND


@pytest.mark.parametrize(("took", "answered"), [(0.5, False), (15.0, True), (15.0, None)])
def test_who_refuses_at_once_or_answers_late_has_not_hung(took: float, answered: bool | None) -> None:
    hosts: HostLimits[str] = HostLimits(2, slots=100)
    hosts.admit("host", "a", now=0.0)
    hosts.end("host", "a", now=took, answered=answered)

    assert [hosts.admit("host", item, now=20.0) for item in "bc"] == [Admission.SEND] * 2


def test_where_there_are_few_slots_none_is_kept_for_others() -> None:
    hosts: HostLimits[int] = HostLimits(1, slots=3)

    assert [hosts.admit(f"unknown {number}", number, now=0.0) for number in range(3)] == [Admission.SEND] * 3


def test_nobody_follows_in_the_line_of_a_host_that_hung() -> None:
    hosts: HostLimits[str] = HostLimits(2, slots=100)
    hosts.admit("host", "a", now=0.0)
    hosts.admit("host", "b", now=0.8)
    hosts.admit("host", "c", now=0.9)

    assert hosts.end("host", "a", now=1.1, answered=False) is None
    assert hosts.leave_lines(now=1.9) == [("host", "c")]


def test_who_is_refused_for_others_comes_back_the_later_the_more_there_are() -> None:
    hosts: HostLimits[str] = HostLimits(1, slots=4)
    for number in range(2):
        hosts.admit(f"unknown {number}", f"{number}", now=0.0)

    first = hosts.parking_seconds("unknown 3", now=0.0)
    waits = [hosts.parking_seconds("unknown 3", now=1.0) for _ in range(200)]

    assert first < 0.2  # they may be quick
    assert waits[:3] == [2.0, 2.5, 3.0]
    assert waits[-1] == 60.0
    assert hosts.parking_seconds("unknown 3", now=60.0) == 60.0 * 1.0
    hosts.end("unknown 0", "0", now=60.0, answered=False)
    assert hosts.admit("unknown 3", "3", now=60.0) is Admission.SEND


def test_a_callback_for_a_host_that_hung_is_not_acquired_again_at_once() -> None:
    hosts: HostLimits[str] = HostLimits(2, slots=100)
    hang(hosts, "host")
    hosts.admit("host", "a", now=20.0)

    assert hosts.parking_seconds("host", now=20.0) >= 15.0


def test_the_parked_are_forgotten_when_they_have_come_back() -> None:
    hosts: HostLimits[int] = HostLimits(2, slots=100)
    hosts.admit("slow", 0, now=9.0)
    hosts.admit("slow", 1, now=9.0)
    waits = [hosts.parking_seconds("slow", now=10.0) for _ in range(200)]
    hosts.end("slow", 0, now=11.0, answered=True)
    hosts.admit("slow", 2, now=69.0)
    hosts.end("slow", 1, now=69.0, answered=True)

    assert waits[-1] == 60.0
    assert hosts.parking_seconds("slow", now=70.0) < 20.0


def test_only_so_many_hosts_are_remembered() -> None:
    hosts: HostLimits[str] = HostLimits(1, slots=4)
    for number in range(10_001):
        hosts.admit(f"host {number}", "a", now=0.0)
        hosts.end(f"host {number}", "a", now=0.0, answered=True)
    for number in range(2):
        hosts.admit(f"unknown {number}", f"{number}", now=0.0)

    assert hosts.admit("host 0", "a", now=0.0) is Admission.PARK
    assert hosts.admit("host 1", "a", now=0.0) is Admission.SEND


def test_hanging_hosts_do_not_keep_healthy_ones_waiting_however_many_they_are(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    engine = an_engine(store, transport, clock, witness, concurrency=32, host_concurrency=8)
    healthy = set[str]()
    for _ in range(20):
        healthy |= {store.store_callback_request(to(f"healthy-{number}.test")).id for number in range(10)}
        for number in range(90):
            store.store_callback_request(to(f"hanging-{number}.test"))
    began = clock.monotonic()

    def answer_the_healthy() -> bool:
        for id, (delivery, _) in list(transport.under_way.items()):
            if id in healthy:
                transport.answer(id, 200)
            elif clock.monotonic() >= delivery.ends_at - 12:
                transport.answer(id, AttemptFailure.TIMEOUT)
        return all(store.get_callback_status(id).success for id in healthy)

    drive(engine, clock, until=answer_the_healthy)

    assert clock.monotonic() - began < 15


def test_a_dead_hosts_backlog_does_not_keep_a_healthy_host_waiting(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    engine = an_engine(store, transport, clock, witness, concurrency=8, host_concurrency=2)
    for _ in range(500):
        store.store_callback_request(to("dead.test"))
    healthy = store.store_callback_request(to("healthy.test")).id
    began = clock.monotonic()

    drive(engine, clock, until=lambda: healthy in transport.under_way)

    assert len(transport.under_way) == 3
    assert clock.monotonic() - began < 3


def test_a_host_has_its_places_once_however_many_ports_it_has(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    engine = an_engine(store, transport, clock, witness, concurrency=8, host_concurrency=2)
    for number in range(500):
        store.store_callback_request(to(f"dead.test:{8000 + number % 5}"))
    healthy = store.store_callback_request(to("healthy.test")).id

    drive(engine, clock, until=lambda: healthy in transport.under_way)

    assert len(transport.under_way) == 3


def test_parked_callbacks_are_delivered_when_the_host_answers_again(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    engine = an_engine(store, transport, clock, witness, concurrency=8, host_concurrency=2)
    ids = [store.store_callback_request(to("slow.test")).id for _ in range(20)]
    drive(engine, clock, until=lambda: clock.monotonic() > 1005)
    answered: set[str] = set()

    def answer_all() -> bool:
        for id in list(transport.under_way):
            transport.answer(id, 200)
            answered.add(id)
        return len(answered) == len(ids)

    drive(engine, clock, until=answer_all)
    drive(engine, clock, until=lambda: engine.busy == 0)

    assert all(store.get_callback_status(id).success for id in ids)
    assert all(len(store.get_callback_status(id).attempts) == 1 for id in ids)


def test_a_line_is_as_long_as_its_host_is_quick() -> None:
    hosts: HostLimits[int] = HostLimits(10, slots=100)
    for number in range(10):
        hosts.admit("steady", number, now=0.0)
    hosts.end("steady", 0, now=0.5)  # half a second each: ten at a time, one more every 50 ms
    hosts.admit("steady", 100, now=0.5)

    admissions = [hosts.admit("steady", number, now=0.5) for number in range(200, 206)]

    assert admissions == [Admission.WAIT] * 2 + [Admission.PARK] * 4


def test_a_busy_host_of_ordinary_speed_does_not_keep_a_healthy_one_waiting(
    store: InMemoryDataAccess, clock: FakeClock, transport: HeldTransport, witness: Witness
) -> None:
    engine = an_engine(store, transport, clock, witness, concurrency=256, host_concurrency=64)
    for _ in range(3000):
        store.store_callback_request(to("busy.test"))
    began = clock.monotonic()
    arrivals: dict[str, float] = {}
    waits: list[float] = []

    def world() -> bool:
        """Answer the busy host's requests after 0.9 s, the healthy one's at once; store one for it every second."""
        now = clock.monotonic()
        for id, (delivery, _) in list(transport.under_way.items()):
            arrived = arrivals.setdefault(id, now)
            if "healthy" in delivery.request.url:
                waits.append(now - int(id) / 1e6)
                transport.answer(id, 200)
            elif now >= arrived + 0.9:
                transport.answer(id, 200)
        if now > began + 3 + len(waits) and not any(id.isdigit() for id in arrivals if id in transport.under_way):
            store.store_callback_request(to("healthy.test"), id=str(int(now * 1e6)))
        return len(waits) >= 10

    for _ in range(20_000):
        if world():
            break
        clock.advance(min(max(engine.step(), 0.001), 0.05))

    assert len(waits) >= 10
    assert sorted(waits)[5] < 1, waits


class DeadAndHealthy:
    """A blocking transport to hosts of which only one answers."""

    deadline = timedelta(seconds=15)

    def __init__(self) -> None:
        self.is_over = threading.Event()

    def send(self, delivery: Delivery) -> Outcome:
        if delivery.request.target.host != "healthy.test":
            assert self.is_over.wait(LIMIT)
        return Answer(status_code=200, time=FakeClock().now(), duration=timedelta(0))

    def close(self) -> None:
        pass


def test_hanging_hosts_do_not_take_all_threads_of_a_transport_that_blocks(witness: Witness) -> None:
    store, transport = InMemoryDataAccess(), DeadAndHealthy()
    with Dispatcher(store, transport=transport, observer=witness) as dispatcher:
        store.store_callback_request(to("healthy.test"))
        witness.wait_for(EventKind.SUCCEEDED)
        store.store_callback_requests([to(f"dead-{number}.test") for number in range(100)])

        store.store_callback_request(to("healthy.test"))
        witness.wait_for(EventKind.SUCCEEDED, 2)

        transport.is_over.set()
        dispatcher.stop()
