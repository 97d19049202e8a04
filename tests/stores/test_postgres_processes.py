"""Several processes on one PostgreSQL database, forks, and the ends of processes and threads."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from callbackq.core.models import CallbackState
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing.conformance.base import DELIVERED, LOCK_TIMEOUT, a_request, an_attempt
from callbackq.testing.conformance.concurrency import Child
from support.postgres import PostgreSQL, until
from support.postgres_faults import CuttingProxy
from support.processes import LIMIT, running

LISTENER = "callbackq-postgres-listener"

STORE_ONE = """
import sys
from callbackq import CallbackRequest
from callbackq.stores.postgres import PostgreSQLDataAccess
with PostgreSQLDataAccess(sys.argv[1]) as store:
    print("ready")
    while input():
        store.store_callback_request(CallbackRequest(url="http://receiver.example/"))
        print("stored")
"""


@pytest.fixture
def conninfo(postgres: PostgreSQL, migrated_database: str) -> str:
    return postgres.conninfo(migrated_database)


@pytest.fixture
def store(conninfo: str) -> Iterator[PostgreSQLDataAccess]:
    with PostgreSQLDataAccess(conninfo) as store:
        yield store


class Ear:
    """A subscriber."""

    def __init__(self) -> None:
        self._heard = threading.Semaphore(0)

    def __call__(self) -> None:
        self._heard.release()

    def wait(self) -> None:
        assert self._heard.acquire(timeout=LIMIT), "nothing was heard"

    def forget(self) -> None:
        while self._heard.acquire(blocking=False):
            pass


def listeners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == LISTENER]


def backends(conninfo: str, query: str = "%") -> list[int]:
    """The store's sessions."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'callbackq' AND query LIKE %s",
            [query],
        )
        return [pid for (pid,) in rows]


def terminate(conninfo: str, pids: list[int]) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for pid in pids:
            connection.execute("SELECT pg_terminate_backend(%s)", [pid])


# Hints.


def test_a_hint_comes_from_another_process(store: PostgreSQLDataAccess, conninfo: str) -> None:
    ear = Ear()
    unsubscribe = store.subscribe(ear)
    ear.wait()  # the listener is there
    with running(STORE_ONE, conninfo) as process:
        assert process.read_line() == "ready"
        for _ in range(3):
            ear.forget()
            process.write_line("store")
            ear.wait()
            assert process.read_line() == "stored"
    unsubscribe()


def test_a_hint_comes_with_the_commit_of_the_applications_transaction(
    store: PostgreSQLDataAccess, conninfo: str
) -> None:
    ear = Ear()
    unsubscribe = store.subscribe(ear)
    ear.wait()
    with psycopg.connect(conninfo) as connection:
        store.store_callback_request(a_request(), connection=connection)
        ear.forget()
    ear.wait()
    unsubscribe()


def test_schemas_do_not_hear_each_other(store: PostgreSQLDataAccess, conninfo: str) -> None:
    ear, other_ear = Ear(), Ear()
    with PostgreSQLDataAccess(conninfo, schema="another") as other, PostgreSQLDataAccess(conninfo) as writer:
        for one, its_ear in ((store, ear), (other, other_ear)):
            one.subscribe(its_ear)
            its_ear.wait()
        writer.store_callback_request(a_request())
        ear.wait()
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("SELECT pg_notify(%s, '')", [other._channel])
        other_ear.wait()
        assert not other_ear._heard.acquire(blocking=False)


def test_the_listener_heals(store: PostgreSQLDataAccess, conninfo: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ear = Ear()
    unsubscribe = store.subscribe(ear)
    ear.wait()
    until(lambda: backends(conninfo, "LISTEN%"), "the listener")
    terminate(conninfo, backends(conninfo, "LISTEN%"))
    ear.wait()  # something may have been missed

    with PostgreSQLDataAccess(conninfo) as other:
        ear.forget()
        other.store_callback_request(a_request())
        ear.wait()
    unsubscribe()
    assert len([record for record in caplog.records if "hints" in record.getMessage()]) == 1


def test_the_listener_ends_with_the_last_subscription_or_the_store(store: PostgreSQLDataAccess, conninfo: str) -> None:
    assert listeners() == []
    first, second = store.subscribe(Ear()), store.subscribe(Ear())
    assert len(listeners()) == 1

    first()
    assert len(listeners()) == 1
    second()
    second()
    assert listeners() == []

    ear = Ear()
    store.subscribe(ear)
    ear.wait()
    store.close()
    assert listeners() == []
    until(lambda: not backends(conninfo), "the sessions to end")


def test_a_listener_that_cannot_connect_ends_all_the_same(conninfo: str) -> None:
    with CuttingProxy(conninfo) as proxy, PostgreSQLDataAccess(proxy.conninfo) as store:
        proxy.refuse()
        store.subscribe(Ear())
        assert len(listeners()) == 1
    assert listeners() == []


def test_two_sessions_are_all_a_store_has(store: PostgreSQLDataAccess, conninfo: str) -> None:
    ear = Ear()
    unsubscribe = store.subscribe(ear)
    ear.wait()
    threads = [threading.Thread(target=store.store_callback_request, args=[a_request()]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(backends(conninfo)) == 2
    unsubscribe()


# Forks.


def test_a_forked_process_has_sessions_of_its_own(store: PostgreSQLDataAccess, conninfo: str) -> None:
    ear = Ear()
    store.subscribe(ear)
    ear.wait()
    store.store_callback_request(a_request(), id="a")
    before = set(backends(conninfo))

    def child() -> None:
        assert store.get_callback_status("a").id == "a"
        own_ear = Ear()
        unsubscribe = store.subscribe(own_ear)
        own_ear.wait()
        with PostgreSQLDataAccess(conninfo) as other:
            other.store_callback_request(a_request())
        own_ear.wait()
        unsubscribe()
        assert listeners() == []
        store.close()

    Child(lambda _: child()).finish()

    until(lambda: set(backends(conninfo)) == before, "the child's sessions, and no others, to end")
    ear.forget()
    with PostgreSQLDataAccess(conninfo) as other:
        other.store_callback_request(a_request())
    ear.wait()


# The end of a process.

BEGINNING = """
import os, sys, threading
from callbackq import CallbackRequest, Dispatcher
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing import ScriptedTransport
store = PostgreSQLDataAccess(sys.argv[1])
store.store_callback_request(CallbackRequest(url="http://receiver.example/"))
"""
ENDINGS = {
    "used": "",
    "forgotten": "del store",
    "subscribed": "heard = threading.Event(); store.subscribe(heard.set); assert heard.wait(30)",
    "dispatching": "Dispatcher(store, transport=ScriptedTransport()).start()",
    "forked": "pid = os.fork()\nif pid: os.waitpid(pid, 0); store.now()",
    "forked and used": "pid = os.fork()\nstore.now()\nif pid: os.waitpid(pid, 0); store.now()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_that_forgets_to_close_ends_without_a_word(conninfo: str, ending: str) -> None:
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-X", "dev", "-c"]

    ended = subprocess.run(
        [*command, BEGINNING + ENDINGS[ending], conninfo], capture_output=True, text=True, timeout=LIMIT
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    until(lambda: not backends(conninfo), "the sessions to end")


def test_a_process_that_is_killed_leaves_its_locks_to_their_timeout(store: PostgreSQLDataAccess, conninfo: str) -> None:
    store.store_callback_request(a_request(queue_id="queue"), id="a")
    acquire = STORE_ONE.replace('print("ready")', 'store.acquire_locks("m", lock_timeout=T, limit=1); print("ready")')
    with running(f"from datetime import timedelta; T = timedelta(seconds=0.2)\n{acquire}", conninfo) as process:
        process.read_line()
        process.kill()

    found: list[Any] = []
    until(
        lambda: found.extend(store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)) or found,
        "the lock to time out",
    )
    assert found[0].abandoned == 1
    assert store.record_attempt(found[0], an_attempt(200), DELIVERED).state is CallbackState.SUCCEEDED
