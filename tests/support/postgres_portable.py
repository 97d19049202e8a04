"""What SQL must not hold that is to be understood by engines that speak PostgreSQL's language but are distributed."""

from __future__ import annotations

import re

__all__ = ["unportable"]

# CockroachDB, YugabyteDB and their like: each entry is refused, ignored or dear in one of them at least.
_FORBIDDEN = {
    "passing over locked rows": r"\bSKIP LOCKED\b|\bNOWAIT\b",
    "telling others": r"\b(UN)?LISTEN\b|\bNOTIFY\b|\bpg_notify\b",
    "advisory locks": r"advisory",
    "settings in a statement": r"\bset_config\b",
    "settings of a session": r"(^|;)\s*SET (?!LOCAL\b)",
    "sequences": r"\bnextval\b|\bcurrval\b|\b(BIG|SMALL)?SERIAL\b|\bCREATE SEQUENCE\b",
    "columns of PostgreSQL's own": r"\b(ctid|xmin|xmax|tableoid)\b",
    "collations": r"\bCOLLATE\b",
    "programs": r"\bDO \$|\bCREATE (OR REPLACE )?(FUNCTION|PROCEDURE|TRIGGER|RULE)\b",
    "types of one's own": r"\bCREATE (TYPE|DOMAIN)\b|\bENUM\b",
    "how tables are kept": r"\bSET \(|\bWITH \(|\bUNLOGGED\b|\bTABLESPACE\b|\bUSING (?!\()\w+",
    "partitions": r"\bPARTITION (OF|BY (RANGE|LIST|HASH))\b",
    "parts of indexes": r"\bINCLUDE\b",
    "late constraints": r"\bDEFERRABLE\b|\bEXCLUDE\b",
    "MERGE": r"\bMERGE INTO\b",
    "holding something beyond a statement": r"\b(DECLARE|TEMP|TEMPORARY|PREPARE|LOCK TABLE)\b",
}
_WRITES = re.compile(r"\b(?:INSERT INTO|(?<!DO )UPDATE|DELETE FROM) (?!SET\b)([\w\".{}]+)")
_VALUE = r"(?:%\(\w+\)[sb]|\$\d+)"
# Columns of values, and lists of keys: what psycopg binds as one value. Nothing is stored as an array.
_GIVEN_ARRAY = re.compile(rf"CAST\({_VALUE} AS \w+\[\]\)")


def unportable(statement: str) -> set[str]:
    """Say what is wrong with one statement."""
    found = {what for what, pattern in _FORBIDDEN.items() if re.search(pattern, statement, re.IGNORECASE)}
    written = _WRITES.findall(statement)
    if len(set(written)) < len(written):
        found.add("several writes of one table")
    if re.search(r"\[|\barray(_\w+)?\b", _GIVEN_ARRAY.sub("", statement), re.IGNORECASE):
        found.add("arrays")
    return found
