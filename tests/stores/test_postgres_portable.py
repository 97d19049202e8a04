"""The distributed profile's SQL keeps to what other engines understand, and the check of that finds what it should."""

from __future__ import annotations

import re

import pytest

from callbackq.stores.postgres import migration_sql
from callbackq.stores.postgres.transaction import load
from support.postgres_portable import unportable

STATEMENTS = {name: one.text for name, one in load("callbackq", "distributed").items()}
STEPS = [step for step in migration_sql(profile="distributed").split(";\n\n") if step]
TYPES = {"BIGINT", "SMALLINT", "TEXT", "BYTEA", "UUID"}

BAD = {
    "SELECT 1 FROM a FOR UPDATE SKIP LOCKED": "passing over locked rows",
    "SELECT pg_notify('a', '')": "telling others",
    "LISTEN a": "telling others",
    "SELECT pg_advisory_xact_lock(1)": "advisory locks",
    "SELECT set_config('lock_timeout', '1', true)": "settings in a statement",
    "SET lock_timeout = 1": "settings of a session",
    "SET SESSION lock_timeout TO 1": "settings of a session",
    "SELECT nextval('a')": "sequences",
    "CREATE TABLE a (b BIGSERIAL)": "sequences",
    "DELETE FROM a WHERE ctid = '(0,1)'": "columns of PostgreSQL's own",
    'CREATE TABLE a (b TEXT COLLATE "C")': "collations",
    "CREATE FUNCTION a() RETURNS INT LANGUAGE sql AS 'SELECT 1'": "programs",
    "CREATE TYPE a AS ENUM ('b')": "types of one's own",
    "ALTER TABLE a SET (fillfactor = 70)": "how tables are kept",
    "CREATE INDEX a ON b USING brin (c)": "how tables are kept",
    "CREATE TABLE a (b INT) PARTITION BY HASH (b)": "partitions",
    "CREATE INDEX a ON b (c) INCLUDE (d)": "parts of indexes",
    "CREATE TABLE a (b INT UNIQUE DEFERRABLE)": "late constraints",
    "MERGE INTO a USING (SELECT 1) AS b ON true WHEN MATCHED THEN DELETE": "MERGE",
    "CREATE TEMP TABLE a (b INT)": "holding something beyond a statement",
    "WITH b AS (UPDATE a SET c = 1 RETURNING c) DELETE FROM a": "several writes of one table",
    "WITH b AS (INSERT INTO a VALUES (1)) INSERT INTO a VALUES (2)": "several writes of one table",
    "CREATE TABLE a (b TEXT[])": "arrays",
    "SELECT array_agg(a) FROM b": "arrays",
    "SELECT (CAST(%(a)s AS TEXT[]))[1]": "arrays",
}


@pytest.mark.parametrize("statement", BAD)
def test_the_check_finds_what_is_not_portable(statement: str) -> None:
    assert BAD[statement] in unportable(statement)


def test_the_check_finds_what_postgresqls_own_profile_does() -> None:
    own = [one.text for one in load("callbackq", "postgres").values()]
    tables = migration_sql().split(";\n\n")

    assert set().union(*map(unportable, own + tables)) == {
        "passing over locked rows",
        "telling others",
        "settings in a statement",
        "collations",
        "how tables are kept",
    }


@pytest.mark.parametrize("name", STATEMENTS)
def test_statements_are_portable(name: str) -> None:
    assert unportable(STATEMENTS[name]) == set()


@pytest.mark.parametrize("step", STEPS)
def test_tables_are_portable(step: str) -> None:
    assert unportable(step) == set()
    assert step.count(";") == 0, "one at a time"
    if columns := re.search(r"CREATE TABLE [^(]*\((.*)\)", step, re.DOTALL):
        kinds = re.findall(r"(?:^|,)\s*[a-z_]+ ([A-Z]+)", columns[1])
        assert kinds
        assert set(kinds) <= TYPES
