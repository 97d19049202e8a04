"""
Crash points: a dispatcher's process ends at every boundary between store, transport, notifier and statement.

    python benchmarks/crash_points.py
    python benchmarks/crash_points.py --store postgres

For each story (all accepted, a retry, a final failure with its e-mail, a stop, an operator's wish, …) a process that is
not ended lists the boundaries it passes: before and after each call of the store, each SQL statement (in PostgreSQL
also when it is sent and not answered), each request, each e-mail. Then one process for each of them ends there, without
a word to anybody, and another one finds what it left: it stores and asks again what it doesn't know to be done, drains,
and judges. Time is given, so no retry is waited for. Prints one JSON document; exits 0 only if every point was hit, no
promise was broken, and all stories together make every call that `support.boundaries` knows.

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
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from attrs import asdict, evolve, field, frozen

import stores
from callbackq import AttemptFailure, CallbackRequest, CallbackState, CallbackStatus, RetryPhase, SQLiteDataAccess
from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.verdict import ResponsePolicy
from callbackq.dataaccess import Acquired, Action, Notification
from callbackq.draining import Drain, StopReport
from callbackq.engine import Engine
from callbackq.errors import CallbackNotFoundError, CallbackqError, IllegalTransitionError
from callbackq.events import ObservedEvent
from callbackq.notifier import FailureNotice
from callbackq.outbox import Outbox
from callbackq.reporting import Reporter
from callbackq.settings import Settings
from callbackq.testing import FakeClock
from callbackq.testing.history import Arrival, History

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.boundaries import CALLS, ENDED, Boundaries, watch_postgres, watch_sqlite, watched

if TYPE_CHECKING:
    from stores import Store

URL = "http://receiver.test/"
RETRY = (RetryPhase(retries=1, delay=timedelta(seconds=2)),)
LEASE = timedelta(minutes=2)
QUEUE_SIZE = 3
MOST_STEPS = 1000
# How long a dispatcher rests at most while requests are under way: it must see who stands in line for too long.
LONGEST_REST_SECONDS = 1.0
# Real seconds for one process; it needs some hundredths.
LIMIT_SECONDS = 30
# On a busy machine what a thread does may come a boundary earlier or later: then the process ended at another one. That
# end is judged, too, and the point is tried again.
_MOST_TRIES = 4
TOO_EARLY, TOO_HASTY, MISCOUNTED = FAULTS = ("acknowledged-early", "e-mail-recorded-early", "crash-counted-as-attempt")


@frozen
class Wish:
    """What an operator asks: to cancel, while a request is under way; anything else, when told of the failure."""

    action: Action
    id: str


@frozen
class Story:
    """
    What is stored, what the receiver answers, and what people do.

    Attributes:
        answer: from a callback's id and the attempt's number to a status.
        email: whom to tell of failures.
        is_first_opening: there is nothing of the store yet, not even its tables.
        alone: callbacks beside those of the queue.
        holds: a failure holds the queue.
        not_sent: why the first request for a callback in each process is not sent.
        takes: seconds until a callback's request is answered.
        host_concurrency: how many requests may be under way; others stand in line, locked.
        stops_after: the dispatcher is asked to stop as soon as it is at work, with so many seconds for what is under
            way, and is started again.
        wish: what an operator asks. What is redelivered is accepted.
        shows: the call of the store that the story is told for.
    """

    answer: Callable[[str, int], int] = lambda id, attempt: 200
    email: str = ""
    is_first_opening: bool = False
    alone: Sequence[str] = ("alone",)
    holds: bool = False
    not_sent: Mapping[str, NotSentReason] = field(factory=dict)
    takes: Mapping[str, float] = field(factory=dict)
    host_concurrency: int = QUEUE_SIZE
    stops_after: float | None = None
    wish: Wish | None = None
    shows: str = "acquire_locks"

    def requests(self) -> dict[str, CallbackRequest]:
        request = partial(
            CallbackRequest,
            url=URL,
            retry_phases=RETRY,
            notification_email_address=self.email,
            on_exhausted="hold" if self.holds else "continue",
        )
        queue = {f"q{number}": request(queue_id="q") for number in range(1, QUEUE_SIZE + 1)}
        return queue | {id: request() for id in self.alone}


EMAIL = "people@example.com"


def _refused_first(action: Action, *, holds: bool) -> Story:
    """The queue's first callback is refused, and whoever is told so asks for something."""
    return Story(
        lambda id, attempt: 410 if id == "q1" else 200,
        email=EMAIL,
        holds=holds,
        wish=Wish(action, "q1"),
        shows="request_transition",
    )


STORIES: Mapping[str, Story] = {
    "success": Story(),
    "retry": Story(lambda id, attempt: 500 if id in ("q1", "alone") and attempt == 1 else 200),
    "final failure": Story(lambda id, attempt: 500 if id == "q2" else 410 if id == "alone" else 200),
    "e-mail": Story(lambda id, attempt: 410 if id in ("q1", "q2", "alone") else 200, email=EMAIL),
    "first opening": Story(is_first_opening=True),
    "not sent": Story(
        not_sent={
            "q1": NotSentReason.TIME_IS_UP,
            "q2": NotSentReason.LOCAL_FAULT,
            "q3": NotSentReason.STOPPED,
            "alone": NotSentReason.NO_SECRETS,
        },
        shows="release_locks",
    ),
    "parking": Story(takes={"q1": 3.0}, host_concurrency=1, shows="release_locks"),
    # One request ends by itself, one is interrupted, two are not sent yet.
    "stop": Story(
        alone=("alone", "second", "third"),
        takes={"q1": 2.0, "alone": 4.0},
        host_concurrency=2,
        stops_after=3.0,
        shows="release_locks",
    ),
    "cancel while locked": Story(
        lambda id, attempt: 500 if id == "q1" else 200, wish=Wish(Action.CANCEL, "q1"), shows="request_transition"
    ),
    "redeliver in place": _refused_first(Action.REDELIVER, holds=True),
    "redeliver at the tail": _refused_first(Action.REDELIVER, holds=False),
    "skip": _refused_first(Action.SKIP, holds=True),
}
STOPPED = StopReport(finished=1, interrupted=1, released=2, unrecorded=0)


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


class Operator:
    """Asks until there is a word that it was done; in the next process again."""

    def __init__(
        self,
        wish: Wish | None,
        store: Store,
        log: Log,
        *,
        before: Iterable[Mapping[str, Any]],
        wake: Callable[[], None],
        says_so_early: bool,
    ) -> None:
        self._wish = wish
        self._store = store
        self._log = log
        self._wake = wake
        self._says_so_early = says_so_early
        kinds = {line["kind"] for line in before}
        self._has_asked = "asking" in kinds
        self._is_done = "asked" in kinds

    def sees_a_request(self, id: str) -> None:
        if self._wish == Wish(Action.CANCEL, id):
            self._ask(self._wish)

    def is_told(self, ids: Iterable[str]) -> None:
        if self._wish and self._wish.action is not Action.CANCEL and self._wish.id in ids:
            self._ask(self._wish)

    def has_mended(self, id: str) -> bool:
        return self._has_asked and self._wish == Wish(Action.REDELIVER, id)

    def _ask(self, wish: Wish) -> None:
        if self._is_done:
            return
        self._has_asked = True
        self._log.write("asking", id=wish.id)
        if self._says_so_early:
            self._log.write("asked", id=wish.id)
        # Illegal is what was done already, by a call that a crash broke off.
        with suppress(IllegalTransitionError):
            self._store.request_transition(wish.id, wish.action)
        self._log.write("asked", id=wish.id)
        self._is_done = True
        self._wake()


class World:
    """The receiver, and whoever is told by e-mail: in the thread that calls, between boundaries."""

    deadline = timedelta(seconds=5)
    interval = timedelta(0)

    def __init__(self, story: Story, clock: FakeClock, log: Log, boundaries: Boundaries, operator: Operator) -> None:
        self._story = story
        self._clock = clock
        self._log = log
        self._operator = operator
        self._not_sent = dict(story.not_sent)
        # When each is answered, whom to tell, and the status.
        self._under_way: dict[Delivery, tuple[float, Callable[[Outcome], None], int]] = {}
        self.submit = boundaries.around("sending", self._submit)
        self.interrupt = boundaries.around("interrupting", self._interrupt)
        self.notify = boundaries.around("the e-mail", self._notify)

    def seconds_to_rest(self) -> float:
        """Say how long the dispatcher may rest."""
        now = self._clock.monotonic()
        return min((min(at - now, LONGEST_REST_SECONDS) for at, _, _ in self._under_way.values()), default=inf)

    def answer(self) -> None:
        """Answer what it is time for."""
        for delivery, (at, done, status_code) in list(self._under_way.items()):
            if at <= self._clock.monotonic():
                del self._under_way[delivery]
                done(self._answer(status_code))

    def _interrupt(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            _, done, _ = self._under_way.pop(delivery)
            done(self._answer(0, AttemptFailure.INTERRUPTED))

    def _submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        # A clock that stands still could not tell which of two requests came first.
        self._clock.advance(timedelta(milliseconds=1))
        id = delivery.callback_id
        if (reason := self._not_sent.pop(id, None)) is not None:
            done(NotSent(reason=reason))
            return
        answer = 200 if self._operator.has_mended(id) else self._story.answer(id, delivery.attempt)
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
        self._operator.sees_a_request(id)
        self._under_way[delivery] = (started + self._story.takes.get(id, 0.0), done, answer)
        self.answer()

    def _answer(self, status_code: int, failure: AttemptFailure | None = None) -> Answer:
        return Answer(status_code=status_code, failure=failure, time=self._clock.now(), duration=timedelta(0))

    def _notify(self, notice: FailureNotice) -> None:
        ids = [status.id for status in notice.callbacks]
        self._log.write("e-mail", key=notice.key, ids=ids)
        self._operator.is_told(ids)


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
        self,
        story: Story,
        place: Place,
        clock: FakeClock,
        log: Log,
        boundaries: Boundaries | None,
        fault: str = "",
        before: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._story = story
        self._clock = clock
        self._log = log
        self._fault = fault
        self.store = place.store(story, clock, boundaries)
        if fault == MISCOUNTED:
            count_crashes(self.store)
        operator = Operator(
            story.wish,
            self.store,
            log,
            before=before,
            wake=lambda: self._engine.wake(),
            says_so_early=fault == TOO_EARLY,
        )
        self._world = World(story, clock, log, boundaries or Boundaries(), operator)
        self._engine = self._start()
        kind = HastyOutbox if fault == TOO_HASTY else Outbox
        self._outbox = kind(self.store, self._world, lock_timeout=LEASE, clock=clock, random=lambda: 0.5)

    def _start(self) -> Engine:
        settings = Settings(
            machine_name="one",
            concurrency=2 * QUEUE_SIZE,
            host_concurrency=self._story.host_concurrency,
            lock_timeout=timedelta(seconds=10),
            poll_interval=timedelta(seconds=20),
            max_abandoned=5,
            retry_jitter=0.0,
            response_policy=ResponsePolicy(),
            deadline=self._world.deadline,
        )
        return Engine(
            self.store,
            self._world,
            settings=settings,
            reporter=Reporter(Silence(), "one"),
            clock=self._clock,
            random=lambda: 0.5,
            on_notification_owed=lambda: None,
        )

    def enqueue(self) -> None:
        """Store the story's callbacks, as one whose repetition is harmless, and keep a note of what was stored."""
        requests = self._story.requests()
        for ids in (["q1"], ["q2", "q3"], *([id] for id in self._story.alone)):
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
                if self._engine.inbox.empty() and is_over():
                    return
            self._pass(rest)
        raise AssertionError("it is never over")

    def stop(self, seconds: float) -> StopReport:
        """Be asked to stop with work under way, which may go on for so long; and be started again."""
        self._engine.step()
        drain = Drain(self._engine, clock=self._clock, grace=self._clock.monotonic)
        stops_at = self._clock.monotonic() + seconds
        while (rest := drain.step(stops_at)) is not None:
            self._pass(rest)
        self._engine = self._start()
        return drain.report()

    def _pass(self, seconds: float) -> None:
        """Let time pass, as `Engine.rest` does: not beyond the next word that arrives."""
        if self._engine.inbox.empty():
            self._clock.advance(max(min(seconds, self._world.seconds_to_rest()), 0.0))
        self._world.answer()

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
    if story.stops_after is not None:
        report = life.stop(story.stops_after)
        assert report == STOPPED, report
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
    # Who was to end and is still here is tried again: what threads do has come in another order.
    assert end_at is not None or f"before {story.shows}" in passed, "the story doesn't show what it is told for"
    boundaries.passed.clear()
    statuses = list(life.store.list_callbacks())
    life.store.close()
    assert all(lock.completed for status in statuses for lock in status.locks), "a lock was abandoned without a crash"
    return {"passed": passed, "statuses": {status.id: history_of(status) for status in statuses}}


def succeed(story: Story, place: Place, log_path: Path, expected: Mapping[str, Any], fault: str) -> dict[str, Any]:
    """Be the process that finds what the ended one has left: drain, and judge."""
    before = Log.read(log_path)
    clock = FakeClock()
    clock.advance(max(before[-1]["at"] - clock.monotonic(), 0.0))
    log = Log(log_path, clock)
    life = Life(story, place, clock, log, None, fault, before)
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
            # E-mails that the ended process had leased; then what an operator asks who is told only now.
            clock.advance(LEASE)
            life.send_emails()
            life.drain(is_over=lambda: store.next_due() is None)
        except (CallbackqError, AssertionError) as error:
            broken.append(f"not drained: {error!r}")
        statuses = list(store.list_callbacks())
    lines = Log.read(log_path)
    arrivals = [
        Arrival(**{name: value for name, value in line.items() if name not in ("kind", "at")})
        for line in lines
        if line["kind"] == "arrival"
    ]
    # What was in flight at the crash, or was interrupted by a stop, may be accepted a second time, nothing else.
    in_flight = {status.id: sum(not lock.completed for lock in status.locks) for status in statuses}
    bounds = {status.id: in_flight[status.id] + interruptions_of(status) for status in statuses}
    judgement = History(
        arrivals,
        statuses,
        acknowledged=list(story.requests()),
        duplicates_bound=sum(bounds.values()),
        redelivered=wished_by(story, Action.REDELIVER),
        cancelled=[*wished_by(story, Action.CANCEL), *wished_by(story, Action.SKIP)],
    ).judge()
    broken += [f"{one.rule}: {one.callback_id} {one.detail}" for one in judgement.violations]
    sent = Counter((arrival.callback_id, arrival.token) for arrival in arrivals)
    broken += [f"sent twice under one lock: {id}" for (id, _), count in sent.items() if count > 1]
    accepted = Counter(arrival.callback_id for arrival in arrivals if arrival.accepted is not None)
    for status in statuses:
        if not is_as_expected(status, expected[status.id]):
            broken.append(f"attempts: {status.id} has {history_of(status)} instead of {expected[status.id]}")
        if in_flight[status.id] > 1:
            broken.append(f"abandoned: {status.id} by one crash more than once")
        if accepted[status.id] - 1 > bounds[status.id]:
            broken.append(f"duplicates: {status.id} was accepted {accepted[status.id]} times")
    broken += judge_cancels(lines, story.wish)
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


def wished_by(story: Story, action: Action) -> list[str]:
    """To which callbacks an operator does that."""
    return [story.wish.id] if story.wish and story.wish.action is action else []


def judge_cancels(lines: Iterable[Mapping[str, Any]], wish: Wish | None) -> Iterator[str]:
    """What was cancelled is sent no more."""
    is_cancelled = False
    for line in lines:
        if line["kind"] == "asked" and wish and wish.action is Action.CANCEL:
            is_cancelled = True
        elif line["kind"] == "arrival" and wish and line["callback_id"] == wish.id and is_cancelled:
            yield f"cancelled: {wish.id} was sent afterwards"


def history_of(status: CallbackStatus) -> list[object]:
    """What must be the same whatever crashed: how it ended, and each attempt that counts."""
    attempts = [
        [attempt.status_code, attempt.late]
        for attempt in status.attempts
        if attempt.failure is not AttemptFailure.INTERRUPTED
    ]
    reason = status.failed_reason.value if status.failed_reason else None
    return [status.sequence, status.state.value, reason, attempts]


def is_as_expected(status: CallbackStatus, expected: Sequence[object]) -> bool:
    history = history_of(status)
    if status.state is CallbackState.CANCELLED and any(not lock.completed for lock in status.locks):
        # Its answer may have died with the process, and nobody may ask for another.
        return history in (expected, [*expected[:-1], []])
    return history == expected


def interruptions_of(status: CallbackStatus) -> int:
    return sum(attempt.failure is AttemptFailure.INTERRUPTED for attempt in status.attempts)


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
    tries = [(point, _MOST_TRIES - 1) for point in reversed(points)]
    while tries:
        point, left = tries.pop()
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
        if judged["ended_at"] == whole["passed"][point]:
            outcome["hit"] += 1
        elif left:
            tries.append((point, left - 1))
        else:
            broken.append(f"{at}: it ended at another: {judged['ended_at']}")
        for count in ("duplicates", "emails_twice"):
            outcome[count] += judged[count]
        broken += [f"{at}: {one}" for one in judged["broken"]]
    log.unlink()
    if outcome["hit"] != len(points):
        broken.append(f"{name}: {len(points)} points were to be hit, {outcome['hit']} were")
    return {**outcome, "broken": broken, "passed": whole["passed"]}


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
    passed = {name for outcome in stories.values() for name in outcome.pop("passed")}
    if list(options.stories) == list(STORIES):
        broken += [f"no story calls {call}" for call in sorted(CALLS) if f"before {call}" not in passed]
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
