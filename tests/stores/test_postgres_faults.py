"""Whatever statement of whatever call an accident happens to: nothing is lost, nothing is done twice."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from attrs import evolve, frozen

from callbackq.core.models import CallbackState
from callbackq.dataaccess import Acquired, Action, AttemptRecord, Notification
from callbackq.errors import DataAccessError, IllegalTransitionError, TransientDataAccessError
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.stores.postgres.claiming import Mark
from callbackq.stores.postgres.transaction import Profile, load
from callbackq.testing.conformance.base import (
    DELIVERED,
    DUE_AGAIN,
    EXHAUSTED,
    HELD,
    LOCK_TIMEOUT,
    a_request,
    an_attempt,
)
from support.postgres import PostgreSQL, until
from support.postgres_faults import COMMIT, CuttingProxy
from support.postgres_stores import TABLES

ADDRESS = "somebody@receiver.example"


@frozen
class World:
    """
    A database, met twice.

    Attributes:
        profile: both stores'.
        store: through the proxy.
        beside: past it.
    """

    profile: Profile
    proxy: CuttingProxy
    store: PostgreSQLDataAccess
    beside: PostgreSQLDataAccess
    connection: psycopg.Connection[tuple[Any, ...]]

    def contents(self) -> list[tuple[Any, ...]]:
        """Everything there is."""
        rows = " UNION ALL ".join(f"SELECT '{table}' || t::TEXT FROM callbackq.{table} AS t" for table in TABLES)
        return sorted(self.connection.execute(rows))

    def empty(self) -> None:
        self.connection.execute("; ".join(f"DELETE FROM callbackq.{table}" for table in TABLES))

    # Short words.

    def given(self, *ids: str, queue_id: str = "", **changes: Any) -> None:
        self.beside.store_callback_requests([a_request(queue_id=queue_id, **changes)] * len(ids), ids=ids)

    def given_lock(self) -> Acquired:
        (acquired,) = self.acquired_from(self.beside)
        return acquired

    def given_failure(self, *, hold: bool = False) -> None:
        self.beside.record_attempt(self.given_lock(), an_attempt(), HELD if hold else EXHAUSTED)

    def let_time_pass(self) -> None:
        """Let all locks and leases time out."""
        now = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"
        self.connection.execute(
            f"UPDATE callbackq.callbacks SET due = least(due, {now}), ready = least(ready, {now});"
            f"UPDATE callbackq.mailings SET due = least(due, {now})"
        )

    def acquired_from(self, store: PostgreSQLDataAccess) -> list[Acquired]:
        return store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=10)

    def state(self, id: str) -> CallbackState:
        return self.beside.get_callback_status(id).state

    def numbers(self) -> dict[str, int]:
        return {one.id: one.sequence for one in self.beside.list_callbacks()}

    def owed(self) -> list[tuple[tuple[str, ...], int]]:
        self.let_time_pass()
        owed = self.beside.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=9)
        return [(one.callback_ids, one.tries) for one in owed]


@pytest.fixture
def world(postgres: PostgreSQL, migrated_database: str, profile: Profile) -> Iterator[World]:
    conninfo = postgres.conninfo(migrated_database)
    with (
        CuttingProxy(conninfo) as proxy,
        PostgreSQLDataAccess(proxy.conninfo, profile=profile) as store,
        PostgreSQLDataAccess(conninfo, profile=profile) as beside,
        psycopg.connect(conninfo, autocommit=True) as connection,
    ):
        yield World(profile, proxy, store, beside, connection)


# What can be called. Each prepares what it needs, and gives the call, and what asserts what must be true after it.

Scenario = tuple[Callable[[], Any], Callable[[Any], None]]


def storing(world: World) -> Scenario:
    world.given("first", queue_id="queue")

    def check(_: object) -> None:
        assert world.numbers() == {"first": 1, "new": 2}

    return lambda: world.store.store_callback_request(a_request(queue_id="queue"), id="new"), check


def storing_several(world: World) -> Scenario:
    requests = [a_request(queue_id="one"), a_request(), a_request(queue_id="two"), a_request(queue_id="one")]

    def check(_: object) -> None:
        assert world.numbers() == {"a": 1, "b": 1, "c": 1, "d": 2}

    return lambda: world.store.store_callback_requests(requests, ids=["a", "b", "c", "d"]), check


def storing_again(world: World) -> Scenario:
    world.given("taken", queue_id="queue")

    def check(_: object) -> None:
        assert world.numbers() == {"taken": 1, "new": 2}

    requests = [a_request(queue_id="queue")] * 2
    return lambda: world.store.store_callback_requests(requests, ids=["taken", "new"]), check


def looking(world: World) -> Scenario:
    world.given("a", "b", queue_id="queue")

    def check(found: Any) -> None:
        assert found == world.beside.get_callback_status("b")

    return lambda: world.store.get_callback_status("b"), check


def looking_at_the_time(world: World) -> Scenario:
    before = world.beside.now()

    def check(now: Any) -> None:
        assert before < now < world.beside.now()

    return world.store.now, check


def asking_when(world: World) -> Scenario:
    world.given("a")

    def check(due: Any) -> None:
        assert due == world.beside.get_callback_status("a").next_attempt_at

    return world.store.next_due, check


def listing(world: World) -> Scenario:
    world.given("a")
    world.given("b", queue_id="queue")

    def check(found: Any) -> None:
        assert found == [["a", "b"], ["b"], ["a", "b"]]

    def call() -> list[list[str]]:
        pages = [{"page_size": 1}, {"queue_id": "queue"}, {"state": CallbackState.WAITING}]
        return [[one.id for one in world.store.list_callbacks(**page)] for page in pages]  # type: ignore[arg-type]

    return call, check


def acquiring(world: World) -> Scenario:
    world.given("a", "b", queue_id="queue")
    world.given("c")

    def check(acquired: list[Acquired]) -> None:
        assert sorted(one.id for one in acquired) == ["a", "c"]
        for one in acquired:
            newest = world.beside.get_callback_status(one.id).locks[-1]
            assert (newest.token, newest.ended) == (one.lock.token, None)
            assert one.abandoned == 0

    return lambda: acquired_in_the_end(world), check


def acquired_in_the_end(world: World) -> list[Acquired]:
    """Acquire, once the session whose line was lost has noticed: until then it keeps its rows locked."""
    found: list[Acquired] = []
    until(lambda: found.extend(world.acquired_from(world.store)) or found, "something that can be acquired")
    return found


def taking_over(world: World) -> Scenario:
    world.given("cancelled", "next", queue_id="queue")
    world.given("abandoned")
    world.acquired_from(world.beside)
    world.beside.request_transition("cancelled", Action.CANCEL)
    world.let_time_pass()

    def check(acquired: list[Acquired]) -> None:
        if world.profile == "distributed":
            # It claims only what it has peeked at: what that makes due is the next claim's.
            acquired = [*acquired, *world.acquired_from(world.beside)]
        assert {one.id: one.abandoned for one in acquired} == {"next": 0, "abandoned": 1}
        assert world.state("cancelled") is CallbackState.CANCELLED

    return lambda: acquired_in_the_end(world), check


def recording(world: World) -> Scenario:
    world.given("a", "b", queue_id="queue", notification_email_address=ADDRESS)
    record = AttemptRecord(acquired=world.given_lock(), attempt=an_attempt(), transition=evolve(EXHAUSTED, notify=True))

    def check(outcomes: Any) -> None:
        assert outcomes[0].state is CallbackState.FAILED
        assert len(world.beside.get_callback_status("a").attempts) == 1
        assert [one.id for one in world.acquired_from(world.beside)] == ["b"]
        assert world.owed() == [(("a",), 0)]

    return lambda: world.store.record_attempts([record]), check


def recording_late(world: World) -> Scenario:
    world.given("a")
    lost = AttemptRecord(acquired=world.given_lock(), attempt=an_attempt(200), transition=DELIVERED)
    world.let_time_pass()
    holder = world.given_lock()

    def check(_: object) -> None:
        assert [one.late for one in world.beside.get_callback_status("a").attempts] == [True]
        assert world.beside.record_attempt(holder, None, DUE_AGAIN).state is CallbackState.SUCCEEDED

    return lambda: world.store.record_attempts([lost]), check


def handing_over(world: World) -> Scenario:
    world.given("a", "b", queue_id="queue")
    record = AttemptRecord(acquired=world.given_lock(), attempt=an_attempt(200), transition=DELIVERED)

    def call() -> list[Acquired]:
        def found() -> list[Acquired]:
            world.store._mark = Mark()  # so that it searches from the beginning
            # Until the session whose line was lost has noticed, its rows are passed over.
            results, acquired = world.store.record_and_acquire([record], "machine", lock_timeout=LOCK_TIMEOUT, limit=9)
            assert [getattr(one, "state", None) for one in results] == [CallbackState.SUCCEEDED]
            return acquired

        handed_over: list[Acquired] = []
        until(lambda: handed_over.extend(found()) or handed_over, "the next of the queue")
        return handed_over

    def check(acquired: list[Acquired]) -> None:
        assert len(world.beside.get_callback_status("a").attempts) == 1
        assert [(one.id, one.abandoned) for one in acquired] == [("b", 0)]
        newest = world.beside.get_callback_status("b").locks[-1]
        assert (newest.token, newest.ended) == (acquired[0].lock.token, None)

    return call, check


def releasing(world: World) -> Scenario:
    world.given("a")
    acquired = world.given_lock()

    def check(_: object) -> None:
        status = world.beside.get_callback_status("a")
        assert (status.state, status.attempts, len(status.locks)) == (CallbackState.WAITING, (), 1)

    return lambda: world.store.release_locks([(acquired, timedelta(0))]), check


def wishing(world: World, id: str, action: Action, state: CallbackState) -> Scenario:
    def call() -> None:
        # Carried out already, if the accident came after that.
        with suppress(IllegalTransitionError):
            world.store.request_transition(id, action)

    def check(_: object) -> None:
        assert world.state(id) is state

    return call, check


def cancelling(world: World) -> Scenario:
    world.given("a", "b", queue_id="queue")
    call, check = wishing(world, "a", Action.CANCEL, CallbackState.CANCELLED)

    def check_next(_: object) -> None:
        check(_)
        assert [one.id for one in world.acquired_from(world.beside)] == ["b"]

    return call, check_next


def redelivering_in_place(world: World) -> Scenario:
    world.given("a", "b", queue_id="queue", on_exhausted="hold")
    world.given_failure(hold=True)
    return wishing(world, "a", Action.REDELIVER, CallbackState.WAITING)


def redelivering_at_the_tail(world: World) -> Scenario:
    world.given("a", "b", queue_id="queue")
    world.given_failure()
    call, check = wishing(world, "a", Action.REDELIVER, CallbackState.WAITING)

    def check_numbers(_: object) -> None:
        check(_)
        assert world.numbers() == {"a": 3, "b": 2}

    return call, check_numbers


def given_debts(world: World, *ids: str) -> None:
    world.given(*ids, queue_id="queue", notification_email_address=ADDRESS)
    for _ in ids:
        world.beside.record_attempt(world.given_lock(), an_attempt(), evolve(EXHAUSTED, notify=True))


def leased(world: World, store: PostgreSQLDataAccess) -> list[Notification]:
    return store.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=9)


def leasing(world: World) -> Scenario:
    given_debts(world, "a", "b")

    def check(_: object) -> None:
        # Which the first may have leased whose line was cut: then it comes when that lease has timed out.
        assert world.owed() == [(("a", "b"), 0)]

    return lambda: leased(world, world.store), check


def forgetting_whom_nothing_is_owed(world: World) -> Scenario:
    given_debts(world, "a")
    (notification,) = leased(world, world.beside)
    world.beside.record_notification(notification, retry_in=None)

    def check(_: object) -> None:
        assert not rows()

    def rows() -> list[str]:
        return [row for (row,) in world.contents() if row.startswith(("mailings", "debts"))]

    def call() -> None:
        # A session that has just lost its client may still hold rows, and those are passed over.
        until(lambda: leased(world, world.store) == [] and not rows(), "nothing to be left")

    return call, check


def telling(world: World) -> Scenario:
    given_debts(world, "a", "b")
    (notification,) = leased(world, world.beside)

    def check(_: object) -> None:
        assert world.owed() == []

    return lambda: world.store.record_notification(notification, retry_in=None), check


def failing_to_tell(world: World) -> Scenario:
    given_debts(world, "a")
    (notification,) = leased(world, world.beside)

    def check(_: object) -> None:
        assert world.owed() == [(("a",), 1)]

    return lambda: world.store.record_notification(notification, retry_in=timedelta(0)), check


def purging(world: World) -> Scenario:
    world.given("a", "b")
    world.given("kept", queue_id="queue")
    for one in world.acquired_from(world.beside):
        if one.id != "kept":
            world.beside.record_attempt(one, an_attempt(200), DELIVERED)

    def check(_: object) -> None:
        # A session that has just lost its client may still hold rows, and a purge passes over those.
        def all_is_gone() -> bool:
            return world.store.purge(finished_for=timedelta(0)) == 0 and world.numbers() == {"kept": 1}

        until(all_is_gone, "the purge of what that session held")
        assert len(world.contents()) == len(("its row", "its request", "its queue"))

    return lambda: world.store.purge(finished_for=timedelta(0)), check


SCENARIOS: list[Callable[[World], Scenario]] = [
    storing,
    storing_several,
    storing_again,
    looking,
    looking_at_the_time,
    asking_when,
    listing,
    acquiring,
    taking_over,
    recording,
    recording_late,
    handing_over,
    releasing,
    cancelling,
    redelivering_in_place,
    redelivering_at_the_tail,
    leasing,
    forgetting_whom_nothing_is_owed,
    telling,
    failing_to_tell,
    purging,
]
WRITING = [one for one in SCENARIOS if one not in (looking, looking_at_the_time, asking_when, listing)]
STORING = [storing, storing_several, storing_again]
COMMITTING = [one for one in WRITING if one not in STORING]


def on(
    profile: Profile, scenarios: list[Callable[[World], Scenario]], *in_short: Callable[[World], Scenario]
) -> Iterator[Any]:
    """Give cases of a test; those on the distributed profile are thorough, but for a few."""
    for scenario in scenarios:
        is_thorough = profile == "distributed" and scenario not in in_short
        marks = [pytest.mark.thorough] if is_thorough else []
        yield pytest.param(profile, scenario, id=f"{profile}-{scenario.__name__}", marks=marks)


IN_THE_WAY = ("40001", "40P01")
LINE_LOST = ("57P01", "08006")

ENDS_BADLY = re.compile("ROLLBACK", re.IGNORECASE)


def statements_of(world: World, scenario: Callable[[World], Scenario]) -> list[str]:
    """What a call executes when all is well."""
    call, check = scenario(world)
    before = len(world.proxy.statements)
    result = call()
    statements = world.proxy.statements[before:]
    check(result)
    return statements


def as_sent(text: str) -> str:
    """A statement as psycopg sends it: values have numbers, the same one for each name."""
    names: list[str] = []
    return re.sub(r"%\((\w+)\)[sb]", lambda name: f"${_number(names, name[1])}", text)


def _number(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name) + 1


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
def test_the_scenarios_meet_every_statement(world: World, profile: Profile) -> None:
    met = set()
    for scenario in SCENARIOS:
        world.empty()
        met |= set(statements_of(world, scenario))

    names = {name for name, one in load("callbackq", profile).items() if as_sent(one.text) in met}
    in_transactions = {name for name in ("now",) if any(one.startswith("BEGIN") and "clock" in one for one in met)}
    assert set(load("callbackq", profile)) - names - in_transactions == {"lock_queues"} - names


def re_all(pattern: str, statements: list[str]) -> list[str]:
    return [one for one in statements if re.search(pattern, one, re.IGNORECASE)]


def is_settled_by_itself(world: World, scenario: Callable[[World], Scenario], nth: int) -> bool:
    """
    Whether nobody hears that a commit may have been written: what was stored is found by its id when it is stored
    again, and in the distributed profile a claim is a transaction of its own behind the results, whose errors are
    nobody's.
    """
    return scenario in STORING or (scenario is handing_over and world.profile == "distributed" and nth > 1)


@contextmanager
def raises_doubtful() -> Iterator[None]:
    """Raises what does not say that nothing was written."""
    with pytest.raises(DataAccessError) as raised:
        yield
    assert not isinstance(raised.value, TransientDataAccessError)


@pytest.mark.parametrize(
    ("profile", "scenario"), [*on("postgres", SCENARIOS), *on("distributed", SCENARIOS, taking_over)]
)
def test_one_error_after_another_of_any_statement_is_survived(
    world: World, scenario: Callable[[World], Scenario]
) -> None:
    statements = dict.fromkeys(one for one in statements_of(world, scenario) if not re.match(COMMIT, one))

    for statement in statements:
        states = [*IN_THE_WAY, *LINE_LOST]
        # What only tidies up is not run again.
        for these in [[one] for one in states] if ENDS_BADLY.match(statement) else [states]:
            world.empty()
            call, check = scenario(world)
            faults = [world.proxy.fail(state, f"^{re.escape(statement)}$") for state in these]
            result = call()
            for fault in faults:
                fault.wait()
            check(result)


@pytest.mark.parametrize(("profile", "scenario"), [*on("postgres", SCENARIOS), *on("distributed", SCENARIOS, storing)])
def test_a_statement_that_somebody_breaks_off_has_written_nothing(
    world: World, scenario: Callable[[World], Scenario]
) -> None:
    # By pg_cancel_backend, or a statement_timeout of the host's. Not tried again at once: that might take as long.
    for statement in dict.fromkeys(statements_of(world, scenario)):
        world.empty()
        call, check = scenario(world)
        before = world.contents()
        fault = world.proxy.fail("57014", f"^{re.escape(statement)}$")
        try:
            result = call()
        except TransientDataAccessError:
            assert world.contents() == before
            result = call()
        fault.wait()
        check(result)


@pytest.mark.parametrize(
    ("profile", "scenario"), [*on("postgres", COMMITTING), *on("distributed", WRITING, taking_over)]
)
def test_an_error_of_any_commit_is_survived(world: World, scenario: Callable[[World], Scenario]) -> None:
    commits = re_all(COMMIT, statements_of(world, scenario))
    assert commits

    for nth, states in itertools.product(range(1, len(commits) + 1), (IN_THE_WAY, *([one] for one in LINE_LOST))):
        world.empty()
        call, check = scenario(world)
        before = world.contents()
        faults = [world.proxy.fail(state, COMMIT, nth=nth) for state in states]
        if states is not IN_THE_WAY and not is_settled_by_itself(world, scenario, nth):
            # Nobody knows what became of it, also when it is a pooler that says so.
            with raises_doubtful():
                call()
            assert world.contents() == before
        result = call()
        for fault in faults:
            fault.wait()
        check(result)


@pytest.mark.parametrize(("profile", "scenario"), [*on("postgres", WRITING), *on("distributed", WRITING, storing)])
@pytest.mark.parametrize("written", [False, True])
def test_a_line_that_is_lost_at_the_commit_loses_and_doubles_nothing(
    world: World, scenario: Callable[[World], Scenario], written: bool
) -> None:
    statements = statements_of(world, scenario)
    # Storing is, on PostgreSQL, one statement, which is its own transaction.
    patterns = [COMMIT, "INSERT INTO"] if scenario in STORING else [COMMIT]
    moments = [(one, nth) for one in patterns for nth in range(1, len(re_all(one, statements)) + 1)]
    assert moments

    for pattern, nth in moments:
        world.empty()
        call, check = scenario(world)
        before = world.contents()
        fault = (world.proxy.cut_after if written else world.proxy.cut_before)(pattern, nth=nth)
        if not is_settled_by_itself(world, scenario, nth):
            with raises_doubtful():
                call()
            fault.wait()
            assert (world.contents() != before) == written
            check(call())
        else:
            check(call())
            fault.wait()


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
@pytest.mark.parametrize("end", ["record_attempts", "close"])
def test_a_handover_that_was_committed_unheard_leaves_no_lock_behind_when_its_dispatcher_stops(
    world: World, end: str
) -> None:
    world.given("a", "b", queue_id="queue")
    record = AttemptRecord(acquired=world.given_lock(), attempt=an_attempt(200), transition=DELIVERED)
    is_distributed = world.profile == "distributed"
    fault = world.proxy.cut_after(nth=2 if is_distributed else 1)
    with nullcontext() if is_distributed else raises_doubtful():
        world.store.record_and_acquire([record], "machine", lock_timeout=LOCK_TIMEOUT, limit=9)
    fault.wait()
    assert world.state("b") is CallbackState.LOCKED

    if end == "close":
        world.store.close()
    else:
        world.store.record_attempts([record])

    assert world.state("b") is CallbackState.WAITING
    assert [one.abandoned for one in world.acquired_from(world.beside)] == [0]
