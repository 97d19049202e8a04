"""
Crash points: a dispatcher's process ends at every boundary between store, transport, notifier and statement.

    python benchmarks/crash_points.py
    python benchmarks/crash_points.py --store postgres

For each story (all accepted, a retry, a final failure with its e-mail, …) a process that is not ended lists the
boundaries it passes: before and after each call of the store, each SQL statement (in PostgreSQL also when it is sent
and not answered), each request, each e-mail. Then one process for each of them ends there, without a word to anybody,
and another one finds what it left: it stores again what it doesn't know to be stored, drains, and judges. Time is
given, so no retry is waited for. Prints one JSON document; exits 0 only if every point was hit and no promise was
broken.

``--fault`` plants one, to see that it is found.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from attrs import asdict, evolve, frozen

import stores
from callbackq import CallbackRequest, CallbackStatus, RetryPhase, SQLiteDataAccess
from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.verdict import ResponsePolicy
from callbackq.dataaccess import Acquired, Notification
from callbackq.engine import Engine
from callbackq.errors import CallbackNotFoundError, CallbackqError
from callbackq.events import ObservedEvent
from callbackq.notifier import FailureNotice
from callbackq.outbox import Outbox
from callbackq.reporting import Reporter
from callbackq.settings import Settings
from callbackq.testing import FakeClock
from callbackq.testing.history import Arrival, History

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.boundaries import ENDED, Boundaries, watch_postgres, watch_sqlite, watched

if TYPE_CHECKING:
    from stores import Store

URL = "http://receiver.test/"
RETRY = (RetryPhase(retries=1, delay=timedelta(seconds=2)),)
LEASE = timedelta(minutes=2)
QUEUE_SIZE = 3
MOST_STEPS = 1000
# Real seconds for one process; it needs some hundredths.
LIMIT_SECONDS = 30
TOO_EARLY, TOO_HASTY, MISCOUNTED = FAULTS = ("acknowledged-early", "e-mail-recorded-early", "crash-counted-as-attempt")


@frozen
class Story:
    """
    What is stored, and what the receiver answers.

    Attributes:
        answer: from a callback's id and the attempt's number to a status, or to why nothing is sent.
        email: whom to tell of failures.
        is_first_opening: there is nothing of the store yet, not even its tables.
    """

    answer: Callable[[str, int], int | NotSentReason]
    email: str = ""
    is_first_opening: bool = False

    def requests(self) -> dict[str, CallbackRequest]:
        request = partial(CallbackRequest, url=URL, retry_phases=RETRY, notification_email_address=self.email)
        return {f"q{number}": request(queue_id="q") for number in range(1, QUEUE_SIZE + 1)} | {"alone": request()}


STORIES: Mapping[str, Story] = {
    "success": Story(lambda id, attempt: 200),
    "retry": Story(lambda id, attempt: 500 if id in ("q1", "alone") and attempt == 1 else 200),
    "final failure": Story(lambda id, attempt: 500 if id == "q2" else 410 if id == "alone" else 200),
    "e-mail": Story(lambda id, attempt: 410 if id in ("q1", "q2", "alone") else 200, email="people@example.com"),
    "first opening": Story(lambda id, attempt: 200, is_first_opening=True),
}


class Log:
    """What happened, one JSON document a line, in a file that outlives the process."""

    def __init__(self, path: Path, clock: FakeClock) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._clock = clock

    def write(self, kind: str, **facts: object) -> None:
        line = json.dumps({"kind": kind, "at": self._clock.monotonic(), **facts})
        os.write(self._descriptor, f"{line}\n".encode())

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]


class World:
    """The receiver, and whoever is told by e-mail: at once, in the thread that calls, between boundaries."""

    deadline = timedelta(seconds=5)
    interval = timedelta(0)

    def __init__(self, story: Story, clock: FakeClock, log: Log, boundaries: Boundaries) -> None:
        self._story = story
        self._clock = clock
        self._log = log
        self.submit = boundaries.around("sending", self._submit)
        self.notify = boundaries.around("the e-mail", self._notify)

    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        assert not list(deliveries), "nothing is ever under way"

    def _submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        # A clock that stands still could not tell which of two requests came first.
        self._clock.advance(timedelta(milliseconds=1))
        answer = self._story.answer(delivery.callback_id, delivery.attempt)
        if isinstance(answer, NotSentReason):
            done(NotSent(reason=answer))
            return
        started = self._clock.monotonic()
        arrival = Arrival(
            callback_id=delivery.callback_id,
            queue_id=delivery.request.queue_id,
            sequence=delivery.sequence,
            token=delivery.token,
            started=started,
            accepted=started if answer < 300 else None,
        )
        self._log.write("arrival", **asdict(arrival))
        done(Answer(status_code=answer, time=self._clock.now(), duration=timedelta(0)))

    def _notify(self, notice: FailureNotice) -> None:
        self._log.write("e-mail", key=notice.key, ids=[status.id for status in notice.callbacks])


class Silence:
    def observe(self, event: ObservedEvent) -> None:
        pass


class HastyOutbox(Outbox):
    """A planted fault: what should be recorded after the e-mail is sent is recorded before."""

    def _handle(self, notification: Notification, lease_ends: float) -> None:
        notice = self._notice_of(notification)
        self._data_access.record_notification(notification, retry_in=None)  # type: ignore[attr-defined]
        if notice is not None:
            self._notifier.notify(notice)


def count_crashes(store: Store) -> None:
    """A planted fault: a lock that was abandoned uses up an attempt."""
    acquire_locks = store.acquire_locks

    def acquire(*args: Any, **kwargs: Any) -> list[Acquired]:
        return [evolve(one, attempts_made=one.attempts_made + one.abandoned) for one in acquire_locks(*args, **kwargs)]

    store.acquire_locks = acquire  # type: ignore[method-assign]


@frozen
class Place:
    """
    Where the stores of all stories are.

    Attributes:
        where: the folder of the files, or the conninfo of a database.
    """

    where: Path | str

    def prepare(self) -> None:
        """Make a store that is empty, to begin the stories with; in a process of its own."""
        with self.open(SQLiteDataAccess if isinstance(self.where, Path) else None, "template", FakeClock()):
            pass

    def begin(self, story: Story) -> None:
        """Forget what the story before has left."""
        if isinstance(self.where, Path):
            for file in self.where.glob("story*"):
                file.unlink()
            if not story.is_first_opening:
                shutil.copyfile(self.where / "template", self.where / "story")
            return
        import psycopg

        from support.postgres_stores import TABLES

        schema = '"story"' if story.is_first_opening else '"template"'
        with psycopg.connect(self.where, autocommit=True) as connection:
            if story.is_first_opening:
                connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
            else:
                # In one round trip, in one transaction.
                connection.execute("; ".join(f"DELETE FROM {schema}.{table}" for table in TABLES))

    def store(self, story: Story, clock: FakeClock, boundaries: Boundaries | None) -> Store:
        """Give the story's store, between boundaries if there are any."""
        if isinstance(self.where, Path):
            kind = SQLiteDataAccess
            if boundaries:
                watch_sqlite(boundaries)
                kind = watched(kind, boundaries)
            return self.open(kind, "story", clock)
        from callbackq.stores.postgres import PostgreSQLDataAccess, store

        # Which searches there are must not depend on how long those before took. The process is this story's own.
        store.time = SimpleNamespace(monotonic=clock.monotonic, time_ns=time.time_ns)  # type: ignore[assignment]
        kind = PostgreSQLDataAccess
        if boundaries:
            watch_postgres(boundaries)
            kind = watched(kind, boundaries)
        return self.open(kind, "story" if story.is_first_opening else "template", clock)

    def open(self, kind: Callable[..., Store] | None, name: str, clock: FakeClock) -> Store:
        if isinstance(self.where, Path):
            return (kind or SQLiteDataAccess)(self.where / name, clock=clock)
        from callbackq.stores.postgres import PostgreSQLDataAccess

        return (kind or PostgreSQLDataAccess)(self.where, schema=name, clock=clock)


class Life:
    """One process's engine and outbox on the story's store."""

    def __init__(
        self, story: Story, place: Place, clock: FakeClock, log: Log, boundaries: Boundaries | None, fault: str = ""
    ) -> None:
        self._story = story
        self._clock = clock
        self._log = log
        self._fault = fault
        self.store = place.store(story, clock, boundaries)
        if fault == MISCOUNTED:
            count_crashes(self.store)
        world = World(story, clock, log, boundaries or Boundaries())
        settings = Settings(
            machine_name="one",
            concurrency=QUEUE_SIZE,
            host_concurrency=QUEUE_SIZE,
            lock_timeout=timedelta(seconds=10),
            poll_interval=timedelta(seconds=20),
            max_abandoned=5,
            retry_jitter=0.0,
            response_policy=ResponsePolicy(),
            deadline=world.deadline,
        )
        self._engine = Engine(
            self.store,
            world,
            settings=settings,
            reporter=Reporter(Silence(), "one"),
            clock=clock,
            random=lambda: 0.5,
            on_notification_owed=lambda: None,
        )
        kind = HastyOutbox if fault == TOO_HASTY else Outbox
        self._outbox = kind(self.store, world, lock_timeout=LEASE, clock=clock, random=lambda: 0.5)

    def enqueue(self) -> None:
        """Store the story's callbacks, as one whose repetition is harmless, and keep a note of what was stored."""
        requests = self._story.requests()
        for ids in (["q1"], ["q2", "q3"], ["alone"]):
            if self._fault == TOO_EARLY:
                self._log.write("acknowledged", ids=ids)
            if len(ids) == 1:
                self.store.store_callback_request(requests[ids[0]], id=ids[0])
            else:
                self.store.store_callback_requests([requests[id] for id in ids], ids=ids)
            self._log.write("acknowledged", ids=ids)

    def drain(self, *, is_over: Callable[[], bool]) -> None:
        """Step until *is_over* says so between two rests, and let just the time pass that is to be rested."""
        for _ in range(MOST_STEPS):
            rest = self._engine.step()
            if rest > 0 and not self._engine.busy:
                self.send_emails()
                if is_over():
                    return
            self._clock.advance(rest)
        raise AssertionError("it is never over")

    def send_emails(self) -> None:
        while self._outbox.step() == 0:
            pass


def live_through(story: Story, place: Place, log_path: Path, end_at: int | None, fault: str) -> dict[str, Any]:
    """Be the process that ends at a boundary; or, if it doesn't, say which there were and how all ended."""
    clock = FakeClock()
    log = Log(log_path, clock)
    boundaries = Boundaries(end_at=end_at, last_words=lambda name: log.write("end", name=name))
    place.begin(story)
    life = Life(story, place, clock, log, boundaries, fault)
    life.store.open()
    life.enqueue()
    expected = story.requests()

    def is_over() -> bool:
        # By the log: asking the store would be more boundaries of its own.
        return len({line["callback_id"] for line in Log.read(log_path) if line["kind"] == "arrival"}) == len(expected)

    life.drain(is_over=is_over)
    # Retries that were waiting; then nothing is due any more for a long time.
    clock.advance(RETRY[0].delay)
    life.drain(is_over=lambda: True)
    life.store.close()
    passed = list(boundaries.passed)
    boundaries.passed.clear()
    statuses = {status.id: history_of(status) for status in life.store.list_callbacks()}
    life.store.close()
    return {"passed": passed, "statuses": statuses}


def succeed(story: Story, place: Place, log_path: Path, expected: Mapping[str, Any], fault: str) -> dict[str, Any]:
    """Be the process that finds what the ended one has left: drain, and judge."""
    before = Log.read(log_path)
    clock = FakeClock()
    clock.advance(max(before[-1]["at"] - clock.monotonic(), 0.0))
    log = Log(log_path, clock)
    life = Life(story, place, clock, log, None, fault)
    broken = []
    with life.store as store:
        acknowledged = [id for line in before if line["kind"] == "acknowledged" for id in line["ids"]]
        for id in acknowledged:
            with suppress(CallbackNotFoundError):
                store.get_callback_status(id)
                continue
            broken.append(f"lost: {id} was acknowledged and is not there")
        try:
            life.enqueue()
            life.drain(is_over=lambda: store.next_due() is None)
        except (CallbackqError, AssertionError) as error:
            broken.append(f"not drained: {error!r}")
        # E-mails that the ended process had leased.
        clock.advance(LEASE)
        life.send_emails()
        statuses = list(store.list_callbacks())
    lines = Log.read(log_path)
    arrivals = [
        Arrival(**{name: value for name, value in line.items() if name not in ("kind", "at")})
        for line in lines
        if line["kind"] == "arrival"
    ]
    # One crash: what was in flight may be sent a second time, nothing else.
    in_flight = {status.id: sum(not lock.completed for lock in status.locks) for status in statuses}
    judgement = History(
        arrivals, statuses, acknowledged=list(story.requests()), duplicates_bound=sum(in_flight.values())
    ).judge()
    broken += [f"{one.rule}: {one.callback_id} {one.detail}" for one in judgement.violations]
    sent = Counter((arrival.callback_id, arrival.token) for arrival in arrivals)
    broken += [f"sent twice under one lock: {id}" for (id, _), count in sent.items() if count > 1]
    for status in statuses:
        if history_of(status) != expected[status.id]:
            broken.append(f"attempts: {status.id} has {history_of(status)} instead of {expected[status.id]}")
        if in_flight[status.id] > 1:
            broken.append(f"abandoned: {status.id} by one crash more than once")
    emails = [line for line in lines if line["kind"] == "e-mail"]
    broken += judge_emails(emails, owed=[status.id for status in statuses if story.email and not status.success])
    return {
        "broken": broken,
        "duplicates": judgement.duplicates,
        "emails_twice": len(emails) - len({email["key"] for email in emails}),
        "ended_at": next((line["name"] for line in lines if line["kind"] == "end"), None),
    }


def judge_emails(emails: Sequence[Mapping[str, Any]], owed: Iterable[str]) -> Iterator[str]:
    """Each failure is told of, in one e-mail; and one crash repeats one e-mail at most."""
    keys_of: dict[str, set[str]] = {id: set() for id in owed}
    for email in emails:
        for id in email["ids"]:
            keys_of.setdefault(id, set()).add(email["key"])
    for id, keys in keys_of.items():
        if len(keys) != 1:
            yield f"e-mail: {id} was told of in {len(keys)} e-mails"
    if len(emails) - len({email["key"] for email in emails}) > 1:
        yield "e-mail: more than one was sent a second time"


def history_of(status: CallbackStatus) -> list[object]:
    """What must be the same whatever crashed: how it ended, and each attempt that counts."""
    attempts = [[attempt.status_code, attempt.late] for attempt in status.attempts]
    reason = status.failed_reason.value if status.failed_reason else None
    return [status.sequence, status.state.value, reason, attempts]


def in_a_process(result: Path, task: Callable[[], object]) -> int:
    """Run a task in a forked process, which writes what it returns to *result*; give its exit status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # Whatever hangs is ended by the system.
            signal.alarm(LIMIT_SECONDS)
            result.write_text(json.dumps(task()))
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def try_story(name: str, place: Place, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """End a process at every boundary of a story, or at every *n*th."""
    story, result, log = STORIES[name], folder / "result", folder / "log"
    code = in_a_process(result, lambda: live_through(story, place, log, None, options.fault))
    assert code == 0, f"the story {name!r} doesn't end well without any crash"
    whole = json.loads(result.read_text())
    points = range(options.offset, len(whole["passed"]), options.every)
    outcome: dict[str, Any] = {"points": len(whole["passed"]), "hit": 0, "duplicates": 0, "emails_twice": 0}
    broken: list[str] = []
    for point in points:
        log.unlink()
        at = f"{name}, point {point} ({whole['passed'][point]})"
        code = in_a_process(result, lambda point=point: live_through(story, place, log, point, options.fault))
        if code != ENDED:
            broken.append(f"{at}: exit status {code}")
            continue
        code = in_a_process(result, lambda: succeed(story, place, log, whole["statuses"], options.fault))
        if code != 0:
            broken.append(f"{at}: the next process had exit status {code}")
            continue
        judged = json.loads(result.read_text())
        outcome["hit"] += judged["ended_at"] == whole["passed"][point]
        for count in ("duplicates", "emails_twice"):
            outcome[count] += judged[count]
        broken += [f"{at}: {one}" for one in judged["broken"]]
    log.unlink()
    if outcome["hit"] != len(points):
        broken.append(f"{name}: {len(points)} points were to be hit, {outcome['hit']} were")
    return {**outcome, "broken": broken}


def crash_everywhere(options: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    logging.getLogger("callbackq").setLevel(logging.CRITICAL)
    if options.directory is None and Path("/dev/shm").is_dir():
        options.directory = Path("/dev/shm")  # the death of a process takes nothing from a file there
    with stores.ground(options) as ground, tempfile.TemporaryDirectory(prefix="callbackq-crash-") as folder:
        place = Place(ground.where)
        assert in_a_process(Path(folder) / "result", place.prepare) == 0, "no store could be made"
        if options.store == "postgres":
            import callbackq.stores.postgres  # noqa: F401 - once, not in each process
        stories = {name: try_story(name, place, Path(folder), options) for name in options.stories}
    broken = [one for outcome in stories.values() for one in outcome.pop("broken")]
    return {
        "store": options.store,
        "stories": stories,
        "points": sum(outcome["points"] for outcome in stories.values()),
        "hit": sum(outcome["hit"] for outcome in stories.values()),
        "broken": len(broken),
        "examples": broken[:10],
        "seconds": round(time.monotonic() - began, 1),
        "ok": not broken,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stores.add_options(parser)
    parser.add_argument("--stories", nargs="+", choices=STORIES, default=list(STORIES))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth point")
    parser.add_argument("--offset", type=int, default=0, metavar="N", help="begin with point N")
    parser.add_argument("--fault", choices=FAULTS, default="")
    outcome = crash_everywhere(parser.parse_args())
    print(json.dumps(outcome, indent=1))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
