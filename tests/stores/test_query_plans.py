"""Every statement of the SQLite store uses an index, whatever statistics the database holds."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from attrs import evolve

import callbackq.stores.sql
import callbackq.stores.sqlite
from callbackq.dataaccess import AttemptRecord
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.stores.sqlite.enlisting import plainly
from callbackq.stores.sqlite.transaction import STATEMENTS
from callbackq.testing.conformance.base import DELIVERED, DUE_AGAIN, LOCK_TIMEOUT, a_request, an_attempt

# What a statement must read, besides the rows it looks up by key.
INDEXES = {
    "next_due": ["callbackq_heads (due<?)"],
    "due_heads": ["callbackq_heads (due<?)"],
    "queue": ["name=?", "callbackq_head_of_queue (queue=?)"],
    "queue_tail": ["callbackq_head_of_queue (queue=?)"],
    "status": ["callbackq_head_of_queue (queue=?)"],
    "history": ["callbackq_history_of_callback (callback=?)"],
    "callback": ["(id=?)"],
    "callback_of_id": ["(id=?)"],
    "open_queue": ["callbackq_numbers (queue=? and sequence>?)"],
    "list_queue": ["callbackq_numbers (queue=?)", "(name=?)"],
    "end_locks_of_holder": ["callbackq_locked (holder=?)"],
    "end_all_locks": ["callbackq_locked"],
    "number_debt": ["integer primary key (rowid=?)"],
    "add_debt": ["(email_address=? and queue=?)"],
    "mailing_due": ["callbackq_owing (due<?)", "callbackq_quiet (due<?)"],
    "due_mailings": ["callbackq_owing (due<?)"],
    "told_callbacks": ["primary key (mailing=? and number>? and number<?)"],
    "leased_mailing": ["(email_address=? and queue=?)", "(name=?)"],
    "forget_debts": ["primary key (mailing=? and number<?)"],
    "quiet_mailings": ["callbackq_quiet (due<?)"],
    "purgeable": ["callbackq_finished (finished>? and finished<?)", "callbackq_debts_of_callback (callback=?)"],
    "forget_history": ["callbackq_history_of_callback (callback=?)"],
}

# Statements that may read all of something, each of a table that is small whatever the backlog.
WHOLE = {
    "schema_exists": "sqlite_master",
    "main_file": "pragma_database_list",
    "other_tables": "sqlite_master",
    "end_all_locks": "callbackq_locked",
    "end_all_leases": "callbackq_mailings",
    "holders": "callbackq_holders",
    "remove_all_holders": "callbackq_holders",
}


def fill(path: Path) -> None:
    with SQLiteDataAccess(path) as store:
        store.store_callback_requests([a_request(queue_id=f"queue {number % 50}") for number in range(1000)])
        store.store_callback_requests([a_request()] * 500)
        for outcome in (DELIVERED, DUE_AGAIN, evolve(DELIVERED, notify=True)):
            acquired = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=100)
            store.record_attempts(
                [AttemptRecord(acquired=one, attempt=an_attempt(), transition=outcome) for one in acquired]
            )
        store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=20)


@pytest.fixture(scope="module", params=["empty", "filled", "filled and analysed"])
def connection(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[sqlite3.Connection]:
    path = tmp_path_factory.mktemp("plans") / "callbacks.db"
    with SQLiteDataAccess(path):
        pass
    if request.param != "empty":
        fill(path)
    with closing(sqlite3.connect(path)) as connection:
        if request.param == "filled and analysed":
            # The application may do that to its file.
            connection.execute("ANALYZE")
        yield connection


def plan_of(connection: sqlite3.Connection, name: str) -> list[str]:
    return plan_of_statement(connection, STATEMENTS[name])


def plan_of_statement(connection: sqlite3.Connection, statement: str) -> list[str]:
    values = dict.fromkeys(re.findall(r":(\w+)", statement), 1)
    return [str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_reads_a_whole_table(connection: sqlite3.Connection, name: str) -> None:
    scans = [step for step in plan_of(connection, name) if step.startswith("SCAN") and "CONSTANT ROW" not in step]

    assert all(WHOLE.get(name, "no whole table") in step for step in scans), scans


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_sorts_but_the_listing_of_a_queue(connection: sqlite3.Connection, name: str) -> None:
    sorts = [step for step in plan_of(connection, name) if "TEMP B-TREE" in step]

    assert name == "list_queue" or not sorts


@pytest.mark.parametrize("name", INDEXES)
def test_statements_use_the_index_that_was_made_for_them(connection: sqlite3.Connection, name: str) -> None:
    plan = "\n".join(plan_of(connection, name)).lower()

    for index in INDEXES[name]:
        assert index in plan


@pytest.mark.parametrize("name", ["last_callback", "callback_of_id", "queue", "status", "history"])
def test_statements_on_the_applications_connection_go_the_same_way(connection: sqlite3.Connection, name: str) -> None:
    statement = STATEMENTS[name]
    values = dict.fromkeys(re.findall(r":(\w+)", statement), 1)
    columns = len(connection.execute(statement, values).description)

    plan = plan_of_statement(connection, plainly(statement, columns))

    # A subquery may be searched for once for each time its column is named.
    assert searches(plan) == searches(plan_of(connection, name))
    assert not [step for step in plan if "TEMP B-TREE" in step]


def searches(plan: list[str]) -> set[str]:
    return {step for step in plan if step.startswith("SEARCH")}


def test_every_statement_is_used() -> None:
    folders = [Path(package.__file__ or "").parent for package in (callbackq.stores.sqlite, callbackq.stores.sql)]
    code = "".join(file.read_text(encoding="utf-8") for folder in folders for file in folder.glob("*.py"))

    assert [name for name in STATEMENTS if f'"{name}"' not in code] == []
