"""
The process ends at the boundaries between store, transport, notifier and statement.

A few of each story; ``make crash-points`` ends one at each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.postgres import PostgreSQL
from support.processes import judged

pytestmark = pytest.mark.system
CRASH_POINTS = Path(__file__).parents[2] / "benchmarks" / "crash_points.py"


def crash_points(*arguments: object) -> dict[str, Any]:
    return judged(CRASH_POINTS, *arguments, seconds=220)


@pytest.mark.timeout(240)
def test_a_crash_at_any_boundary_of_sqlite_loses_and_reorders_nothing_and_counts_no_attempt() -> None:
    outcome = crash_points("--every", 30)

    assert outcome["ok"], outcome["examples"]
    assert outcome["points"] > 5000
    assert outcome["hit"] >= outcome["points"] // 30


@pytest.mark.thorough
@pytest.mark.timeout(240)
def test_a_crash_at_any_boundary_of_postgresql_loses_and_reorders_nothing_and_counts_no_attempt(
    postgres: PostgreSQL, database: str
) -> None:
    outcome = crash_points("--store", "postgres", "--conninfo", postgres.conninfo(database), "--every", 120)

    assert outcome["ok"], outcome["examples"]
    assert outcome["points"] > 3300
    assert outcome["hit"] >= outcome["points"] // 120


RELEASES_AND_WISHES = ["not sent", "parking", "stop", "cancel while locked", "redeliver in place", "skip"]


@pytest.mark.thorough
@pytest.mark.timeout(240)
def test_a_crash_while_locks_are_given_back_or_an_operator_asks_loses_and_repeats_nothing() -> None:
    outcome = crash_points("--stories", *RELEASES_AND_WISHES, "--every", 6, "--offset", 3)

    assert outcome["ok"], outcome["examples"]
    assert outcome["hit"] > 400
    assert outcome["stories"]["stop"]["duplicates"] > 0, "what was interrupted had been accepted"


@pytest.mark.thorough
@pytest.mark.timeout(240)
def test_a_crash_while_locks_are_given_back_or_an_operator_asks_loses_and_repeats_nothing_in_postgresql(
    postgres: PostgreSQL, database: str
) -> None:
    conninfo = postgres.conninfo(database)
    outcome = crash_points(
        "--store", "postgres", "--conninfo", conninfo, "--stories", *RELEASES_AND_WISHES, "--every", 20, "--offset", 3
    )

    assert outcome["ok"], outcome["examples"]
    assert outcome["hit"] > 80


@pytest.mark.thorough
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("fault", "found", "arguments"),
    [
        ("acknowledged-early", "lost", ["--stories", "success", "--every", 10]),
        # While the cancel that is said to be done is not.
        ("acknowledged-early", "attempts", ["--stories", "cancel while locked", "--every", 3, "--offset", 170]),
        ("crash-counted-as-attempt", "attempts", ["--stories", "retry", "--every", 10]),
        # There are three boundaries between its two steps.
        ("e-mail-recorded-early", "e-mail", ["--stories", "e-mail", "--every", 3, "--offset", 300]),
    ],
)
def test_what_is_wrong_in_the_code_is_found(fault: str, found: str, arguments: list[object]) -> None:
    outcome = crash_points("--fault", fault, *arguments)

    assert any(f": {found}: " in example for example in outcome["examples"]), outcome
