"""Every statement of the PostgreSQL store uses the index its comment names, whether the tables were analysed or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
import pytest

import callbackq.stores.postgres
import callbackq.stores.sql
from callbackq.stores.postgres.transaction import Profile, load
from support.postgres import PostgreSQL

NOW = 1_800_000_000_000_000

# As much as it takes for a table's own pages to cost more than its index. Of each queue's 100 callbacks the first ten
# have ended, the next is its head, and the others wait behind it; half of all heads are due.
FILL = f"""
INSERT INTO callbackq.callbacks (
    callback, shard, queue, sequence, state, is_head, due, ready, token, attempts_made, finished
)
SELECT 'callback ' || n, n % 16, 'queue ' || n / 100, n % 100, CASE WHEN n % 100 < 10 THEN 2 ELSE 0 END,
    CASE WHEN n % 100 = 10 THEN 1 ELSE 0 END, CASE WHEN n % 100 < 10 THEN NULL ELSE {NOW} + n % 7 - 3 END,
    CASE WHEN n % 100 < 10 THEN NULL ELSE {NOW} + n % 7 - 3 END, n, 0, CASE WHEN n % 100 < 10 THEN {NOW} - n END
FROM generate_series(0, 39999) AS n;
INSERT INTO callbackq.queues SELECT 'queue ' || n, 100, 'callback ' || n * 100 + 10 FROM generate_series(0, 9999) AS n;
INSERT INTO callbackq.requests
SELECT 'callback ' || n, {NOW} + n, 'queue ' || n / 100, 'https://receiver.example/', 'POST', NULL, NULL, '',
    'address ' || n % 100, 'continue', NULL
FROM generate_series(0, 39999) AS n;
INSERT INTO callbackq.history SELECT 'callback ' || n / 2, n, {NOW}, {NOW}, {NOW}, 1, 'machine', 1, 500
FROM generate_series(0, 19999) AS n;
INSERT INTO callbackq.mailings (mailing, email_address, queue, due, last, paid)
SELECT n, 'address ' || n, 'queue', {NOW} + n, n % 3, 0 FROM generate_series(0, 9999) AS n;
INSERT INTO callbackq.debts SELECT n / 10, n % 10, 'callback ' || n FROM generate_series(0, 19999) AS n;
"""

# What a statement is given; what isn't named here is the number 1.
VALUES: dict[str, Any] = {
    "callback": "callback 10",
    "id": "callback 10",
    "ids": ["callback 10", "callback 110"],
    "candidates": ["callback 10", "callback 110"],
    "queue": "queue 3",
    "queue_id": "queue 3",
    "queues": ["queue 3", "queue 4"],
    "email_address": "address 5",
    "after": NOW + 20_000,
    "after_callback": "callback 20000",
    "now": NOW,
    "mark": NOW - 2,
    "before": NOW - 39_000,
    "limit": 10,
    "patience": "1000",
    "channel": "channel",
    "until": 5,
    **dict.fromkeys(("url", "method", "headers", "retry_phases", "application_id", "on_exhausted"), "text"),
    **dict.fromkeys(("machine", "failure", "attempt_machine", "detail", "failed_reason"), "text"),
    "body": b"body",
}

# Which sort more than a statement's own values, and why that is little.
SORTING = {
    "store": "as many rows as are stored",
    "history": "of one callback; never, once the table was analysed",
    "callbacks": "as many rows as ids were given",
    "free_queues": "as many rows as queues were given",
    "lock_queues": "as many rows as queues were given",
    "peek": "as many rows as may be returned, of each shard",
    "due_heads": "as many rows as ids were given",
    "told_callbacks": "a bounded stretch",
    "owe": "as many rows as debts were given",
    "quiet_mailings": "few, since they are forgotten; never, once the table was analysed",
}

PROFILES: tuple[Profile, ...] = ("postgres", "distributed")
OWN = {"postgres": "statements.sql", "distributed": "distributed.sql"}


def comments(profile: Profile) -> dict[str, str]:
    text = files("callbackq.stores.postgres").joinpath(OWN[profile]).read_text(encoding="utf-8")
    blocks = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(blocks[::2], ["\n".join(re.findall("--.*", block)) for block in blocks[1::2]], strict=True))


STATEMENTS = [(profile, name) for profile in PROFILES for name in comments(profile)]


@pytest.fixture(scope="module", params=["analysed", "never analysed"])
def connection(
    request: pytest.FixtureRequest, postgres: PostgreSQL, migrated: Callable[[Profile], str]
) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with (
        postgres.database(migrated("postgres")) as name,
        psycopg.connect(postgres.conninfo(name), autocommit=True) as connection,
    ):
        for table in ("queues", "callbacks", "requests", "history", "mailings", "debts"):
            connection.execute(f"ALTER TABLE callbackq.{table} SET (autovacuum_enabled = false)")
        connection.execute(FILL)
        if request.param == "analysed":
            connection.execute("ANALYZE")
        yield connection


class Plan:
    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]], profile: Profile, name: str) -> None:
        statement = load("callbackq", profile)[name]
        row = connection.execute(f"EXPLAIN (FORMAT JSON) {statement.text}", values_for(statement.text)).fetchone()
        assert row
        self.nodes = list(nodes_of(row[0][0]["Plan"]))
        self.indexes = {node["Index Name"] for node in self.nodes if "Index Name" in node}

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [node for node in self.nodes if node["Node Type"] == kind]


def nodes_of(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for part in node.get("Plans", []):
        yield from nodes_of(part)


def values_for(text: str) -> dict[str, Any]:
    arrays = set(re.findall(r"CAST\(%\((\w+)\)[sb] AS \w+\[\]\)", text))
    values = {name: VALUES.get(name, 1) for name in re.findall(r"%\((\w+)\)[sb]", text)}
    return {
        name: [value] if name in arrays and not isinstance(value, list) else value for name, value in values.items()
    }


@pytest.mark.parametrize(("profile", "name"), STATEMENTS)
def test_no_statement_reads_a_whole_table(
    connection: psycopg.Connection[tuple[Any, ...]], profile: Profile, name: str
) -> None:
    plan = Plan(connection, profile, name)

    assert [node["Relation Name"] for node in plan.of_kind("Seq Scan")] == []
    for node in plan.nodes:
        if node["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Index Scan"):
            whole = node["Index Name"] in ("mailings_quiet", "mailings_owing")
            assert whole or "Index Cond" in node, f"{node['Index Name']} is read from one end to the other"


@pytest.mark.parametrize(("profile", "name"), STATEMENTS)
def test_statements_use_the_indexes_their_comments_name(
    connection: psycopg.Connection[tuple[Any, ...]], profile: Profile, name: str
) -> None:
    comment = comments(profile)[name]
    known = {row[0] for row in connection.execute("SELECT indexname FROM pg_indexes WHERE schemaname = 'callbackq'")}
    named = {index for index in known if re.search(rf"\b{index}\b", comment)}

    plan = Plan(connection, profile, name)

    assert named <= plan.indexes
    by_key = {index for index in plan.indexes if index.endswith("_pkey")}
    assert bool(by_key) == bool(re.search(r"\bkey\b", comment)), (by_key, comment)
    others = plan.indexes - named - by_key
    assert not others or "unique" in comment


@pytest.mark.parametrize(("profile", "name"), STATEMENTS)
def test_no_statement_sorts_more_than_it_is_given(
    connection: psycopg.Connection[tuple[Any, ...]], profile: Profile, name: str
) -> None:
    plan = Plan(connection, profile, name)

    sorts = [node for kind in ("Sort", "Incremental Sort") for node in plan.of_kind(kind)]
    # What is given has no table under it.
    of_rows = [node for node in sorts if any("Relation Name" in one for one in nodes_of(node))]
    assert not of_rows or name in SORTING


def test_every_statement_is_used() -> None:
    folders = [Path(package.__file__ or "").parent for package in (callbackq.stores.postgres, callbackq.stores.sql)]
    code = "".join(file.read_text(encoding="utf-8") for folder in folders for file in folder.glob("*.py"))

    names = set(load("callbackq", "postgres")) | set(load("callbackq", "distributed"))
    assert [name for name in names if f'"{name}"' not in code and name != "now"] == []
