"""
The process ends at the boundaries between store, transport, notifier and statement.

A spread of them; ``make crash-points`` ends one at each.
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
    return judged(CRASH_POINTS, *arguments, seconds=100)


@pytest.mark.timeout(120)
def test_a_crash_at_any_boundary_of_sqlite_loses_and_reorders_nothing_and_counts_no_attempt() -> None:
    outcome = crash_points("--every", 15)

    assert outcome["ok"], outcome["examples"]
    assert outcome["points"] > 2000
    assert outcome["hit"] >= outcome["points"] // 15


@pytest.mark.timeout(120)
def test_a_crash_at_any_boundary_of_postgresql_loses_and_reorders_nothing_and_counts_no_attempt(
    postgres: PostgreSQL, database: str
) -> None:
    outcome = crash_points("--store", "postgres", "--conninfo", postgres.conninfo(database), "--every", 40)

    assert outcome["ok"], outcome["examples"]
    assert outcome["points"] > 1300
    assert outcome["hit"] >= outcome["points"] // 40


@pytest.mark.thorough
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "found", "arguments"),
    [
        ("acknowledged-early", "lost", ["--stories", "success", "--every", 10]),
        ("crash-counted-as-attempt", "attempts", ["--stories", "retry", "--every", 10]),
        # There are three boundaries between its two steps.
        ("e-mail-recorded-early", "e-mail", ["--stories", "e-mail", "--every", 3, "--offset", 300]),
    ],
)
def test_what_is_wrong_in_the_code_is_found(fault: str, found: str, arguments: list[object]) -> None:
    outcome = crash_points("--fault", fault, *arguments)

    assert any(f": {found}: " in example for example in outcome["examples"]), outcome
