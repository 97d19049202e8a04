"""Rows that can't be read spoil nothing but themselves."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackData, CallbackState, FailedReason, RetryPhase
from callbackq.dispatcher import Dispatcher
from callbackq.errors import ConflictError, DataAccessError
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from callbackq.testing.conformance.base import LOCK_TIMEOUT, a_request, an_attempt

UNDECODABLE = Transition(state=CallbackState.FAILED, failed_reason=FailedReason.UNDECODABLE)

REQUEST = a_request(
    post_data=CallbackData(headers={"X-Name": "value"}, data=b"body"),
    retry_phases=(RetryPhase(retries=1, delay=timedelta(seconds=1)),),
)

# What somebody, or a release with other rules, may have written.
DAMAGES = {
    "no row": "DELETE FROM callbackq_requests WHERE callback = 1",
    "no URL": "UPDATE callbackq_requests SET url = 'nowhere' WHERE callback = 1",
    "text that is no UTF-8": "UPDATE callbackq_requests SET url = CAST(x'ff' AS TEXT) WHERE callback = 1",
    "a number": "UPDATE callbackq_requests SET application_id = x'00' WHERE callback = 1",
    "a method that isn't allowed": "UPDATE callbackq_requests SET method = 'DELETE' WHERE callback = 1",
    "broken JSON": "UPDATE callbackq_requests SET headers = '{' WHERE callback = 1",
    "JSON deeper than the stack": "UPDATE callbackq_requests SET headers = printf('%.20000c', '[') WHERE callback = 1",
    "JSON of another shape": "UPDATE callbackq_requests SET headers = '[1]' WHERE callback = 1",
    "a header that smuggles another": """
        UPDATE callbackq_requests SET headers = '{"X-Name": "value\\r\\nX-Other: value"}' WHERE callback = 1
    """,
    "phases of another shape": "UPDATE callbackq_requests SET retry_phases = '[[1]]' WHERE callback = 1",
    "phases beyond all bounds": "UPDATE callbackq_requests SET retry_phases = '[[1, 1e300]]' WHERE callback = 1",
    "a body that is text": "UPDATE callbackq_requests SET body = 'text' WHERE callback = 1",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteDataAccess]:
    with SQLiteDataAccess(path, clock=FakeClock()) as store:
        yield store


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")  # a disk asks nobody
        assert connection.execute(statement).rowcount > 0


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damaged(store: SQLiteDataAccess, path: Path, request: pytest.FixtureRequest) -> SQLiteDataAccess:
    """A store with an unreadable callback in front of a sound one."""
    store.store_callback_request(REQUEST, id="damaged")
    store.store_callback_request(REQUEST, id="sound")
    execute(path, request.param)
    return store


def test_an_unreadable_request_is_acquired_as_none_so_that_it_can_fail(damaged: SQLiteDataAccess) -> None:
    one, other = damaged.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=10)
    assert (one.id, one.request) == ("damaged", None)
    assert (other.id, other.request) == ("sound", REQUEST)

    damaged.record_attempt(one, None, UNDECODABLE)

    assert damaged.next_due() == other.lock.timeout, "it is out of the way"
    assert damaged.purge(finished_for=timedelta(0)) == 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("UPDATE callbackq_requests SET method = 'PATCH'", "hold"),
        ("UPDATE callbackq_requests SET method = 'PATCH', on_exhausted = 'continue'", "continue"),
        ("UPDATE callbackq_requests SET on_exhausted = 'wait'", "continue"),
        ("UPDATE callbackq_requests SET on_exhausted = CAST('hold' AS BLOB)", "continue"),
        ("DELETE FROM callbackq_requests", "continue"),
    ],
)
def test_what_an_unreadable_callback_does_to_its_queue_is_known_if_it_can_be(
    store: SQLiteDataAccess, path: Path, damage: str, expected: str
) -> None:
    store.store_callback_request(a_request(queue_id="queue", on_exhausted="hold"))
    execute(path, damage)

    (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)

    assert (acquired.request, acquired.on_exhausted) == (None, expected)


def test_an_unreadable_request_is_named_when_asked_for(damaged: SQLiteDataAccess) -> None:
    with pytest.raises(DataAccessError, match="request of callback 'damaged' can't be read"):
        damaged.get_callback_status("damaged")
    with pytest.raises(DataAccessError, match="request of callback 'damaged' can't be read"):
        damaged.store_callback_request(REQUEST, id="damaged")

    assert damaged.get_callback_status("sound").request == REQUEST


def test_a_listing_passes_over_what_it_cannot_read_and_says_so(
    damaged: SQLiteDataAccess, caplog: pytest.LogCaptureFixture
) -> None:
    assert [status.id for status in damaged.list_callbacks()] == ["sound"]

    assert [record.message for record in caplog.records if "left out of a listing" in record.message]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE callbackq_history SET failure = 'unheard of'",
        "UPDATE callbackq_history SET headers = '{'",
        "UPDATE callbackq_history SET headers = printf('%.20000c', '[')",
        "UPDATE callbackq_history SET status_code = 'no number'",
        "UPDATE callbackq_callbacks SET failed_reason = 'unheard of', state = 3",
        "UPDATE callbackq_history SET token = 0, duration = -1",
    ],
)
def test_an_unreadable_record_is_named_when_asked_for(store: SQLiteDataAccess, path: Path, damage: str) -> None:
    store.store_callback_request(REQUEST, id="damaged")
    (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
    store.record_attempt(acquired, an_attempt(500), Transition(state=CallbackState.WAITING))
    execute(path, damage)

    with pytest.raises(DataAccessError, match="record of callback 'damaged' can't be read"):
        store.get_callback_status("damaged")


def test_a_thousand_unreadable_requests_do_not_keep_a_sound_one_from_being_found(
    store: SQLiteDataAccess, path: Path
) -> None:
    store.store_callback_requests([REQUEST] * 1000)
    execute(path, "UPDATE callbackq_requests SET url = ''")
    store.store_callback_request(REQUEST, id="sound")

    found = [one.id for one in store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1001) if one.request]

    assert found == ["sound"]


def test_other_content_under_a_taken_id_is_a_conflict_of_requests_not_of_rows(store: SQLiteDataAccess) -> None:
    headers = {"X-One": "1", "X-Two": "2"}
    store.store_callback_request(a_request(post_data=CallbackData(headers=headers)), id="taken")

    turned = dict(reversed(headers.items()))

    assert store.store_callback_request(a_request(post_data=CallbackData(headers=turned)), id="taken").id == "taken"
    with pytest.raises(ConflictError):
        store.store_callback_request(a_request(), id="taken")


def test_an_unreadable_callback_fails_and_keeps_its_queue_closed_if_it_was_to_hold(
    store: SQLiteDataAccess, path: Path
) -> None:
    for queue_id, on_exhausted in (("held", "hold"), ("open", "continue")):
        store.store_callback_request(a_request(queue_id=queue_id, on_exhausted=on_exhausted), id=f"damaged-{queue_id}")
        store.store_callback_request(a_request(queue_id=queue_id), id=f"behind-{queue_id}")
    execute(path, "UPDATE callbackq_requests SET method = 'PATCH' WHERE callback IN (1, 3)")
    transport = ScriptedTransport()

    Dispatcher(store, transport=transport).run_until_idle()

    assert [delivery.callback_id for delivery in transport.deliveries] == ["behind-open"]
    behind = store.get_callback_status("behind-held")
    assert (behind.state, behind.blocked_by) == (CallbackState.WAITING, "damaged-held")
    # Their status can't be read; their rows can.
    with closing(sqlite3.connect(path)) as connection:
        failed = connection.execute("SELECT id, failed_reason FROM callbackq_callbacks WHERE state = 3 ORDER BY id")
        assert failed.fetchall() == [("damaged-held", "undecodable"), ("damaged-open", "undecodable")]


def test_a_row_that_does_not_change_holds_up_no_claim_for_ever(store: SQLiteDataAccess, path: Path) -> None:
    store.store_callback_request(REQUEST, id="nameless")
    store.store_callback_request(REQUEST, id="sound")
    execute(path, "UPDATE callbackq_callbacks SET id = 'no.id' WHERE id = 'nameless'")
    with closing(sqlite3.connect(path)) as connection:
        # As with an index that is damaged: what the claim writes is not what it reads.
        connection.execute(
            "CREATE TRIGGER deaf BEFORE UPDATE ON callbackq_callbacks WHEN old.id = 'no.id' "
            "BEGIN SELECT raise(IGNORE); END"
        )

    acquired = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=3)

    assert [one.id for one in acquired] == ["sound"]
