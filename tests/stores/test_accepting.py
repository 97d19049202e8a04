"""What a host gives its store as `accept` decides at the door, about new callbacks only, before anything is written."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from callbackq import (
    CallbackData,
    CallbackNotFoundError,
    CallbackRequest,
    ConflictError,
    Dispatcher,
    InMemoryDataAccess,
    InvalidRequestError,
    NotAcceptedError,
    RequestLimits,
    SQLiteDataAccess,
)
from callbackq.core.validation import MAX_BODY_BYTES
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing import ScriptedTransport

OurStore = InMemoryDataAccess | SQLiteDataAccess | PostgreSQLDataAccess
MakeStore = Callable[..., OurStore]

MINUTE = timedelta(minutes=1)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    opened: list[OurStore] = []

    def make(**settings: Any) -> OurStore:
        store: OurStore
        if request.param == "memory":
            store = InMemoryDataAccess(**settings)
        elif request.param == "postgres":
            server, database = request.getfixturevalue("postgres"), request.getfixturevalue("database")
            store = PostgreSQLDataAccess(server.conninfo(database), **settings)
        else:
            store = SQLiteDataAccess(tmp_path / "callbacks.db", durability="process", **settings)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


def a_request(application_id: str = "", size: int = 0) -> CallbackRequest:
    return CallbackRequest(
        url="https://receiver.example/hook", application_id=application_id, post_data=CallbackData(data=bytes(size))
    )


def refuse_all(request: CallbackRequest) -> None:
    raise NotAcceptedError("not today")


class Quota:
    """A host's own counter, which refuses an application's third callback."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.counts: Counter[str] = Counter()

    def __call__(self, request: CallbackRequest) -> None:
        self.asked.append(request.application_id)
        if self.counts[request.application_id] == 2:
            raise NotAcceptedError("too many are pending")
        self.counts[request.application_id] += 1


# Limits.


def test_by_default_a_store_accepts_a_body_of_a_mebibyte_and_no_more(make_store: MakeStore) -> None:
    store = make_store()

    store.store_callback_request(a_request(size=2**20), id="fits")
    with pytest.raises(InvalidRequestError, match=r"post_data\.data: must not be longer than 1048576 bytes"):
        store.store_callback_request(a_request(size=2**20 + 1), id="too-long")

    assert [status.id for status in store.list_callbacks()] == ["fits"]


def test_a_body_at_the_ceiling_is_stored_acquired_and_read_as_it_was(make_store: MakeStore) -> None:
    store = make_store(accept=RequestLimits(max_body_bytes=MAX_BODY_BYTES))
    largest = CallbackRequest(
        url="https://receiver.example/hook", post_data=CallbackData(data=bytes(range(256)) * (MAX_BODY_BYTES // 256))
    )

    stored = store.store_callback_request(largest, id="largest")
    (acquired,) = store.acquire_locks("machine", lock_timeout=MINUTE, limit=1)

    assert stored.request == largest
    assert acquired.request == largest
    assert store.get_callback_status("largest").request == largest
    assert store.store_callback_request(largest, id="largest").request == largest


def test_what_is_stored_is_delivered_when_the_limits_have_been_lowered(tmp_path: Path) -> None:
    path = tmp_path / "callbacks.db"
    with SQLiteDataAccess(path, accept=RequestLimits(max_body_bytes=2**21)) as store:
        store.store_callback_request(a_request(size=2**21), id="large")
    transport = ScriptedTransport()

    with SQLiteDataAccess(path, accept=RequestLimits(max_body_bytes=0)) as store:
        assert store.store_callback_request(a_request(size=2**21), id="large").id == "large"
        Dispatcher(store, transport=transport).run_until_idle()
        assert store.get_callback_status("large").success

    assert [delivery.callback_id for delivery in transport.deliveries] == ["large"]


# Rules of the host's own.


def test_a_refusal_comes_out_as_it_is_and_nothing_is_stored(make_store: MakeStore) -> None:
    refusal = NotAcceptedError("not today")

    def accept(request: CallbackRequest) -> None:
        raise refusal

    store = make_store(accept=accept)

    with pytest.raises(NotAcceptedError) as raised:
        store.store_callback_request(a_request(), id="refused")

    assert raised.value is refusal
    assert refusal.__cause__ is None
    with pytest.raises(CallbackNotFoundError):
        store.get_callback_status("refused")


def test_a_fault_in_the_hosts_rules_comes_out_as_it_is_and_nothing_is_stored(make_store: MakeStore) -> None:
    def accept(request: CallbackRequest) -> None:
        raise ZeroDivisionError

    store = make_store(accept=accept)

    with pytest.raises(ZeroDivisionError):
        store.store_callback_request(a_request())

    assert list(store.list_callbacks()) == []


def test_of_a_batch_all_are_stored_or_none(make_store: MakeStore) -> None:
    store = make_store(accept=Quota())
    two, three = [a_request("a")] * 2, [a_request("b")] * 3

    with pytest.raises(NotAcceptedError) as raised:
        store.store_callback_requests([*two, *three], ids=["1", "2", "3", "4", "5"])

    assert raised.value.__notes__ == ["requests[4]"]
    assert list(store.list_callbacks()) == []


def test_each_new_request_is_asked_about_once_in_the_order_of_storing(make_store: MakeStore) -> None:
    quota = Quota()
    store = make_store(accept=quota)

    store.store_callback_requests([a_request("a"), a_request("b"), a_request("b"), a_request("c")])
    store.store_callback_request(a_request("d"))

    assert quota.asked == ["a", "b", "b", "c", "d"]


def test_repeating_what_is_stored_is_never_refused_nor_counted(make_store: MakeStore) -> None:
    quota = Quota()
    store = make_store(accept=quota)
    first = store.store_callback_request(a_request("a"), id="first")
    store.store_callback_requests([a_request("a")] * 2, ids=["second", "second"])

    assert store.store_callback_request(a_request("a"), id="first") == first
    assert [status.id for status in store.store_callback_requests([a_request("a")] * 2, ids=["second", "first"])] == [
        "second",
        "first",
    ]

    assert quota.asked == ["a", "a"]
    with pytest.raises(NotAcceptedError):
        store.store_callback_request(a_request("a"), id="third")


def test_other_content_under_a_stored_id_is_a_conflict_whatever_the_quota_says(make_store: MakeStore) -> None:
    store = make_store(accept=Quota())
    store.store_callback_requests([a_request("a")] * 2, ids=["1", "2"])

    with pytest.raises(ConflictError):
        store.store_callback_request(a_request("a", size=1), id="1")


def test_the_hosts_rules_may_read_the_store_they_guard(make_store: MakeStore) -> None:
    def accept(request: CallbackRequest) -> None:
        pending = sum(status.request.application_id == request.application_id for status in store.list_callbacks())
        if pending >= 2:
            raise NotAcceptedError("too many are pending")

    store = make_store(accept=accept)

    for _ in range(2):
        store.store_callback_request(a_request("a"))
    with pytest.raises(NotAcceptedError):
        store.store_callback_request(a_request("a"))
    store.store_callback_request(a_request("b"))


def test_rules_that_hang_hold_up_nobody_else(make_store: MakeStore) -> None:
    asked, over = threading.Event(), threading.Event()

    def accept(request: CallbackRequest) -> None:
        if request.application_id == "slow":
            asked.set()
            assert over.wait(30)

    store = make_store(accept=accept)
    slow = threading.Thread(target=store.store_callback_request, args=[a_request("slow")])
    slow.start()
    assert asked.wait(30)

    store.store_callback_request(a_request("quick"))
    (acquired,) = store.acquire_locks("machine", lock_timeout=MINUTE, limit=10)
    over.set()
    slow.join(30)

    assert acquired.request is not None
    assert acquired.request.application_id == "quick"


def test_rules_run_in_the_thread_that_stores(make_store: MakeStore) -> None:
    threads: list[tuple[str, str]] = []
    store = make_store(accept=lambda request: threads.append((request.application_id, threading.current_thread().name)))

    def work() -> None:
        for _ in range(20):
            store.store_callback_request(a_request(threading.current_thread().name))

    workers = [threading.Thread(target=work, name=f"worker-{number}") for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)

    assert Counter(threads) == {(f"worker-{number}", f"worker-{number}"): 20 for number in range(4)}


def test_wrong_arguments_are_told_before_the_hosts_rules_are_asked(make_store: MakeStore) -> None:
    store = make_store(accept=refuse_all)

    with pytest.raises(InvalidRequestError, match="request: must be a CallbackRequest"):
        store.store_callback_request("a request")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"ids\[0\]"):
        store.store_callback_requests([a_request()], ids=["a.b"])


def test_an_answer_that_was_meant_to_refuse_refuses(make_store: MakeStore) -> None:
    async def never_awaited(request: CallbackRequest) -> None:
        """Has not begun, so it can't have refused anything."""

    coroutines: list[Any] = []
    for accept in (lambda request: False, lambda request: coroutines.append(never_awaited(request)) or coroutines[-1]):
        store = make_store(accept=accept)
        with pytest.raises(InvalidRequestError, match="accept: must return nothing"):
            store.store_callback_request(a_request())
        assert list(store.list_callbacks()) == []
    coroutines[0].close()


@pytest.mark.parametrize("accept", [None, 5, "a", RequestLimits, {}])
def test_what_can_not_be_asked_is_refused_when_the_store_is_built(make_store: MakeStore, accept: Any) -> None:
    with pytest.raises(InvalidRequestError, match="accept: must be a function of a CallbackRequest"):
        make_store(accept=accept)
