"""Clauses 15 and 16: what may be forgotten, and what a copy holds."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from callbackq.core.models import CallbackState
from callbackq.dataaccess import Acquired, Action, DataAccess
from callbackq.errors import CallbackNotFoundError, InvalidRequestError, LockLostError
from callbackq.testing.conformance.base import (
    DELIVERED,
    LOCK_TIMEOUT,
    MOMENT,
    Conformance,
    an_attempt,
    check_whole,
    raises,
    refuses,
)
from callbackq.testing.conformance.concurrency import while_threads_run

__all__ = ["Backup", "Purge"]

_NOW = timedelta(0)


class Purge(Conformance):
    """Clause 15: purging takes finished callbacks only, in bounded batches, and frees nothing for reuse."""

    def test_finished_callbacks_are_deleted(self) -> None:
        """Delete callbacks that have been finished for that long, with their attempts and locks."""
        succeeded, failed, cancelled = self.stored(), self.stored(), self.stored()
        self.store.request_transition(cancelled, Action.CANCEL)
        for acquired in self.acquire():
            (self.succeed if acquired.id == succeeded else self.give_up)(acquired)

        assert self.purging.purge(finished_for=_NOW) == 3, "the number of deleted callbacks must be returned"

        for id in (succeeded, failed, cancelled):
            with raises(CallbackNotFoundError, "the status of a purged callback"):
                self.status(id)
            with raises(CallbackNotFoundError, "a wish for a purged callback"):
                self.store.request_transition(id, Action.REDELIVER)
        assert self.purging.purge(finished_for=_NOW) == 0, "what is gone can't be deleted again"

    def test_open_callbacks_are_kept(self) -> None:
        """Never an open callback, however old."""
        retried = self.stored("retried")
        self.retry(self.acquire_one(), delay=timedelta(days=99))
        locked = self.stored("locked")
        self.acquire_one()
        behind = self.stored("locked")
        waiting = self.stored()
        self.clock.advance(timedelta(days=30))

        assert self.purging.purge(finished_for=_NOW) == 0, "an open callback must not be purged"

        for id in (retried, locked, behind, waiting):
            assert self.state(id).is_open, "an open callback must be kept"

    def test_a_redelivered_callback_is_kept(self) -> None:
        """What is open again is not finished."""
        for queue in ("", "queue"):
            id = self.stored(queue)
            self.give_up(self.acquire_only(id))
            self.store.request_transition(id, Action.REDELIVER)

            assert self.purging.purge(finished_for=_NOW) == 0, "a redelivered callback must not be purged"
            self.succeed(self.acquire_only(id))
            assert self.purging.purge(finished_for=_NOW) == 1, "a redelivered callback can be purged when finished"

    def test_a_callback_that_holds_its_queue_is_kept(self) -> None:
        """Nor one that holds its queue."""
        for queue in ("queue", ""):
            id = self.stored(queue)
            self.give_up(self.acquire_one(), hold=True)
            self.clock.advance(timedelta(days=30))
            assert self.purging.purge(finished_for=_NOW) == 0, "a callback that holds its queue must not be purged"

            self.store.request_transition(id, Action.SKIP)

            assert self.purging.purge(finished_for=_NOW) == 1, "a skipped callback can be purged"

    def test_a_callback_whose_email_is_owed_is_kept(self) -> None:
        """Nor one whose e-mail is still owed."""
        purging, notifications = self.purging, self.notifications
        id = self.stored(notification_email_address="someone@host.example")
        self.give_up(self.acquire_one(), notify=True)
        self.clock.advance(timedelta(days=30))
        assert purging.purge(finished_for=_NOW) == 0, "a callback whose e-mail is owed must not be purged"
        (owed,) = notifications.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=9)
        assert purging.purge(finished_for=_NOW) == 0, "a callback whose e-mail is being sent must not be purged"

        later = self.stored(notification_email_address="someone@host.example")
        self.give_up(self.acquire_one(), notify=True)

        notifications.record_notification(owed, retry_in=None)

        assert purging.purge(finished_for=_NOW) == 1, "a callback whose e-mail was sent can be purged, and no other"
        assert self.status(later).id == later, "a callback must be kept until the e-mail that tells of it is sent"
        with raises(CallbackNotFoundError, "the status of a purged callback"):
            self.status(id)

    def test_only_those_finished_for_long_enough_are_deleted(self) -> None:
        """finished_for: how long ago they must have finished, by the store's clock."""
        old = self.stored()
        self.clock.advance(timedelta(days=1))
        self.succeed(self.acquire_one())
        self.clock.advance(timedelta(hours=1))
        young = self.stored()
        self.succeed(self.acquire_one())
        self.clock.step_wall(timedelta(days=9))
        self.clock.advance(timedelta(hours=1))

        assert self.purging.purge(finished_for=timedelta(hours=2) + MOMENT) == 0, "neither has finished so long ago"
        assert self.purging.purge(finished_for=timedelta(hours=2) - MOMENT) == 1, "one has finished so long ago"

        with raises(CallbackNotFoundError, "the status of a purged callback"):
            self.status(old)
        assert self.status(young).success, "one that finished later must be kept"

    def test_a_purge_deletes_no_more_than_its_limit(self) -> None:
        """At most limit, so that delivery isn't held up."""
        for _ in range(5):
            self.succeed(self.acquire_only(self.stored()))

        deleted = [self.purging.purge(finished_for=_NOW, limit=2) for _ in range(4)]

        assert deleted == [2, 2, 1, 0], "a purge must delete no more than its limit, and all in the end"

    def test_a_purge_of_the_impossible_is_refused(self) -> None:
        """A wrong argument is refused with InvalidRequestError, which names it; nothing is deleted."""
        purging = self.purging
        id = self.stored()
        self.succeed(self.acquire_one())

        refuses("finished_for", lambda it: purging.purge(finished_for=it), None, 0, -MOMENT, timedelta.max)
        refuses("limit", lambda it: purging.purge(finished_for=_NOW, limit=it), None, 0, -1, 1.5, "1", True)

        assert self.status(id).success, "a purge that was refused must delete nothing"

    def test_a_purge_is_not_held_up_by_what_it_must_keep(self) -> None:
        """However many must be kept, the others are found."""
        for number in range(5):
            self.stored(f"queue {number}")
            self.give_up(self.acquire_one(), hold=True)
        self.clock.advance(MOMENT)
        self.succeed(self.acquire_only(self.stored()))

        assert self.purging.purge(finished_for=_NOW, limit=1) == 1, "what must be kept must not hide what may go"

    def test_the_rest_of_a_queue_stays_as_it_is(self) -> None:
        """Purging a queue's finished callbacks changes nothing for its open ones."""
        first, second, third = (self.stored("queue") for _ in range(3))
        self.succeed(self.acquire_one())
        self.acquire_one()
        before = [self.status(id) for id in (second, third)]

        assert self.purging.purge(finished_for=_NOW) == 1, "the finished one must be deleted"

        assert [self.status(id) for id in (second, third)] == before, "open callbacks must stay as they are"
        assert first not in {status.blocked_by for status in before}, "a purged callback closes nothing"

    def test_numbers_are_not_used_again(self) -> None:
        """No number becomes free for another use, also when nothing of the queue is left."""
        for number in (1, 2, 3):
            assert self.status(self.stored("queue")).sequence == number, "a purged number must not be used again"
            self.succeed(self.acquire_one())
            assert self.purging.purge(finished_for=_NOW) == 1, "the finished one must be deleted"

    def test_a_purged_id_can_be_stored_anew_under_new_tokens(self) -> None:
        """No token becomes free for another use."""
        self.purging  # noqa: B018 - skips the test where there is none
        tokens = []
        for _ in range(3):
            status = self.store.get_callback_status(self.stored("queue", id="again"))
            assert status.state is CallbackState.WAITING, "an id that was purged is free for a new callback"
            assert (status.attempts, status.locks) == ((), ()), "a new callback has no history"
            acquired = self.acquire_one()
            tokens.append(acquired.lock.token)
            self.succeed(acquired)
            assert self.purging.purge(finished_for=_NOW) == 1, "the finished one must be deleted"

        assert tokens == sorted(set(tokens)), "a purged token must not be used again"

    def test_numbers_and_tokens_are_not_used_again_after_reopening(self) -> None:
        """What was used is remembered as long as the store."""
        tokens = []
        for number in (1, 2, 3):
            acquired = self.acquire_only(self.stored("queue", id="again"))
            assert acquired.sequence == number, "a purged number must not be used again after reopening"
            tokens.append(acquired.lock.token)
            self.succeed(acquired)
            self.purging.purge(finished_for=_NOW)
            self.start_again()

        assert tokens == sorted(set(tokens)), "a purged token must not be used again after reopening"

    def test_a_stale_holder_of_a_purged_callback_is_told_that_its_lock_is_lost(self) -> None:
        """LockLostError also when the callback is gone; a new callback under its id is left alone."""
        purging = self.purging
        self.stored(id="purged")
        stale = self.acquire_one()
        self.succeed(self.take_over())
        purging.purge(finished_for=_NOW)

        for stored_anew in (False, True):
            if stored_anew:
                self.stored(id="purged")
            with raises(LockLostError, "a record for a purged callback"):
                self.store.record_attempt(stale, an_attempt(200), DELIVERED)
            with raises(LockLostError, "a release of a purged callback"):
                self.store.release_lock(stale)

        assert self.status("purged").attempts == (), "a result for a purged callback must not go to a new one"
        self.retry(self.acquire_one())
        assert self.state("purged") is CallbackState.WAITING, "nothing was delivered under the new callback"


class Backup(Conformance):
    """Clause 16: a backup taken under load opens at some commit point."""

    def test_a_backup_holds_what_was_stored_before_it(self) -> None:
        """Write a copy that opens at some commit point between the call and its return."""
        with TemporaryDirectory() as directory:
            path = Path(directory) / "backup"
            waiting, behind = self.stored("queue"), self.stored("queue")
            delivered = self.stored()
            self.succeed(next(one for one in self.acquire() if one.id == delivered))
            before = [self.status(id) for id in (waiting, behind, delivered)]

            self.backups.backup(path)
            self.stored("queue", id="later")

            copy = self.closed_later(self.open_backup(path, self.clock))
            for status in before:
                assert copy.get_callback_status(status.id) == status, "a backup must hold what was stored before it"
            with raises(CallbackNotFoundError, "what was stored after the backup"):
                copy.get_callback_status("later")
            copy.close()

    def test_a_backup_is_a_working_store(self) -> None:
        """The copy opens and goes on where the original was."""
        with TemporaryDirectory() as directory:
            path = Path(directory) / "backup"
            first, second = self.stored("queue"), self.stored("queue")
            stale = self.acquire_one()

            self.backups.backup(path)

            copy = self.closed_later(self.open_backup(path, self.clock))
            self.clock.advance(LOCK_TIMEOUT + MOMENT)
            (acquired,) = copy.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9)
            assert acquired.id == first, "a backup must keep heads and locks"
            assert acquired.lock.token > stale.lock.token, "tokens must rise in a backup too"
            assert copy.get_callback_status(second).blocked_by == first, "a backup must keep the order"
            assert self.state(first) is CallbackState.LOCKED, "working on a backup must not touch the original"
            copy.close()

    def test_a_backup_replaces_nothing(self) -> None:
        """InvalidRequestError: there is something under the path already; it was left as it is."""
        backups = self.backups
        with TemporaryDirectory() as directory:
            path = Path(directory) / "backup"
            path.write_bytes(b"an earlier backup")

            for there in (path, path.parent):
                with raises(
                    InvalidRequestError, f"a backup to where there is a {'file' if there is path else 'folder'}"
                ):
                    backups.backup(there)

            assert list(path.parent.iterdir()) == [path], "a backup that was refused must leave nothing behind"
            assert path.read_bytes() == b"an earlier backup", "a backup must replace nothing"

    def test_a_path_may_be_text(self) -> None:
        """A path is a string or a path-like object; anything else is refused."""
        backups = self.backups
        id = self.stored()
        with TemporaryDirectory() as directory:
            path = Path(directory) / "backup"

            backups.backup(str(path))
            refuses("path", backups.backup, None, 1, b"backup", "")

            copy = self.closed_later(self.open_backup(path, self.clock))
            assert copy.get_callback_status(id).id == id, "a backup whose path is text must be written there"
            copy.close()

    def test_a_backup_taken_under_load_shows_one_moment(self) -> None:
        """Taken under load it opens at some commit point: of each writer the first so many, and no half records."""
        with TemporaryDirectory() as directory:
            store, backups, written = self.backups, list[tuple[Path, int, int]](), 0
            taken = [threading.Event() for _ in range(5)]

            def back_up() -> None:
                for number, event in enumerate(taken):
                    if not event.is_set():
                        at_least, path = written, Path(directory) / f"backup-{number}"
                        store.backup(path)
                        backups.append((path, at_least, written))
                        event.set()

            with while_threads_run(back_up):
                under_way: Acquired | None = None
                for event in taken:
                    for _ in range(12):
                        if under_way:
                            self.succeed(under_way)
                        self.stored("queue", id=f"written-{written}")
                        written += 1
                        under_way = self.acquire_one()
                    assert event.wait(30), "a backup must come to its end while others write"

            for path, at_least, at_most in backups:
                copy = self.closed_later(self.open_backup(path, self.clock))
                there = [number for number in range(at_most + 2) if _holds(copy, f"written-{number}")]
                assert there == list(range(len(there))), "a backup must hold all that was stored before some moment"
                # What was being written as the count was read may be there already.
                assert at_least <= len(there) <= at_most + 1, "that moment must lie within the call"
                statuses = [copy.get_callback_status(f"written-{number}") for number in there]
                for status in statuses:
                    check_whole(status)
                assert all(status.success for status in statuses[:-1]), "a backup must not mix two moments"
                copy.close()


def _holds(copy: DataAccess, id: str) -> bool:
    try:
        copy.get_callback_status(id)
    except CallbackNotFoundError:
        return False
    return True
