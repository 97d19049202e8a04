"""One time line for all processes of a boot: stepping the wall clock changes nothing, a reboot ends all locks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from attrs import evolve

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackState
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock
from callbackq.testing.conformance.base import DUE_AGAIN, EXHAUSTED, LOCK_TIMEOUT, MOMENT, a_request, an_attempt

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(path: Path, clock: FakeClock) -> Iterator[SQLiteDataAccess]:
    with SQLiteDataAccess(path, clock=clock) as store:
        yield store


def acquire(store: SQLiteDataAccess) -> list[str]:
    acquired = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=10)
    return [one.id for one in acquired]


def postpone(store: SQLiteDataAccess, id: str, delay: timedelta) -> datetime:
    """Store a callback that waits for a retry, and say until when."""
    store.store_callback_request(a_request(), id=id)
    (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
    store.record_attempt(acquired, an_attempt(500), evolve(DUE_AGAIN, delay=delay))
    due = store.get_callback_status(id).next_attempt_at
    assert due is not None
    return due


@pytest.mark.parametrize("step", [DAY, -DAY])
def test_stepping_the_wall_clock_moves_neither_locks_nor_due_times(
    store: SQLiteDataAccess, path: Path, clock: FakeClock, step: timedelta
) -> None:
    due = postpone(store, "retried", HOUR)
    store.store_callback_request(a_request(), id="locked")
    assert acquire(store) == ["locked"]
    now = store.now()

    clock.step_wall(step)

    with SQLiteDataAccess(path, clock=clock) as later_opened:
        assert store.now() == later_opened.now() == now
        assert acquire(later_opened) == [], "a live lock never ends before its time"
        clock.advance(LOCK_TIMEOUT - MOMENT)
        assert acquire(later_opened) == []
        clock.advance(MOMENT)
        assert acquire(later_opened) == ["locked"]
        clock.advance(due - later_opened.now() - MOMENT)
        assert acquire(later_opened) == ["locked"]
        clock.advance(MOMENT)
        assert acquire(later_opened) == ["retried"]


def test_all_openers_of_a_boot_see_one_time(store: SQLiteDataAccess, path: Path, clock: FakeClock) -> None:
    store.open()
    clock.step_wall(timedelta(seconds=-90))
    clock.advance(timedelta(milliseconds=1))

    with SQLiteDataAccess(path, clock=clock) as other:
        assert other.now() == store.now() == datetime(2026, 1, 1, 0, 0, 0, 1000, tzinfo=UTC)


def test_a_reboot_ends_every_lock_at_once_and_keeps_due_times(path: Path, clock: FakeClock) -> None:
    with SQLiteDataAccess(path, clock=clock) as before:
        due = postpone(before, "retried", HOUR)
        before.store_callback_request(a_request(), id="locked")
        (lost,) = before.acquire_locks("machine", lock_timeout=DAY, limit=10)

    clock.reboot()

    with SQLiteDataAccess(path, clock=clock) as after:
        (again,) = after.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=10)
        assert (again.id, again.abandoned) == ("locked", 1)
        assert again.lock.token > lost.lock.token
        (ended, _) = after.get_callback_status("locked").locks
        assert ended.ended is not None
        assert not ended.completed
        assert after.get_callback_status("retried").next_attempt_at == due


def test_a_reboot_with_a_wall_clock_that_went_back_does_not_turn_time_back(path: Path, clock: FakeClock) -> None:
    with SQLiteDataAccess(path, clock=clock) as before:
        due = postpone(before, "retried", HOUR)
        clock.advance(HOUR / 2)
        before.store_callback_request(a_request(), id="last-seen")
        assert acquire(before) == ["last-seen"]
        last_seen = before.now()

    # A machine without a battery for its clock.
    clock.step_wall(-365 * DAY)
    clock.reboot()

    with SQLiteDataAccess(path, clock=clock) as after:
        assert after.now() >= last_seen
        clock.advance(HOUR / 2)
        assert after.now() >= due
        assert "retried" in acquire(after)


def test_a_reboot_frees_leased_notifications(path: Path, clock: FakeClock) -> None:
    with SQLiteDataAccess(path, clock=clock) as before:
        before.store_callback_request(a_request(notification_email_address="someone@host.example"), id="failed")
        (acquired,) = before.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
        before.record_attempt(acquired, an_attempt(500), evolve(EXHAUSTED, notify=True))
        (leased,) = before.acquire_notifications(lock_timeout=DAY, limit=1)

    clock.reboot()

    with SQLiteDataAccess(path, clock=clock) as after:
        (again,) = after.acquire_notifications(lock_timeout=DAY, limit=1)
        assert (again.callback_ids, again.tries) == (("failed",), 0)
        assert again.token > leased.token


def test_a_reboot_removes_the_signs_of_life_of_the_boot_before(path: Path, clock: FakeClock) -> None:
    before = SQLiteDataAccess(path, clock=clock)
    before.store_callback_request(a_request())
    acquire(before)
    assert list(path.parent.glob("*-holder-*"))

    clock.reboot()

    with SQLiteDataAccess(path, clock=clock) as after:
        assert not list(path.parent.glob("*-holder-*"))
        assert len(acquire(after)) == 1
    before.close()


class ClockWithoutBoots(FakeClock):
    """A system that doesn't name its boots."""

    def boot_id(self) -> str:
        return ""


def test_where_boots_have_no_names_wall_time_decides(path: Path) -> None:
    clock = ClockWithoutBoots()
    with SQLiteDataAccess(path, clock=clock) as store:
        store.store_callback_request(a_request(), id="locked")
        assert acquire(store) == ["locked"]

        clock.step_wall(LOCK_TIMEOUT)

        assert store.now() == clock.now()
        assert acquire(store) == ["locked"]


def test_what_lies_beyond_the_calendar_is_due_at_its_end(store: SQLiteDataAccess) -> None:
    store.store_callback_request(a_request(), id="postponed")

    (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
    store.record_attempt(acquired, None, Transition(state=CallbackState.WAITING, delay=timedelta.max))

    assert store.next_due() == datetime.max.replace(tzinfo=UTC)
    assert store.get_callback_status("postponed").next_attempt_at == store.next_due()
