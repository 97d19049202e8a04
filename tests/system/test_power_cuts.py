"""
SQLite stores at work, recorded under their files; the power is cut, and what is left is opened and judged.

200 moments of two workloads each; ``make power-cuts`` takes 10,000 of five.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.processes import judged

pytestmark = pytest.mark.system
POWER_CUTS = Path(__file__).parents[2] / "benchmarks" / "power_cuts.py"


def power_cuts(*arguments: object) -> dict[str, Any]:
    return judged(POWER_CUTS, "--cuts", 200, "--workloads", 2, *arguments, seconds=50)


@pytest.mark.parametrize("journal", ["wal", pytest.param("rollback", marks=pytest.mark.thorough)])
def test_nothing_acknowledged_is_lost_to_a_power_cut(journal: str) -> None:
    outcome = power_cuts("--journal", journal)

    assert outcome["ok"], outcome["examples"]
    assert [workload["cuts"] for workload in outcome["workloads"]] == [100, 100]
    for workload in outcome["workloads"]:
        assert workload["record"]["sync"] > 100
        assert workload["record"]["stored"] > 100


@pytest.mark.thorough
@pytest.mark.parametrize("journal", ["wal", "rollback"])
def test_a_store_that_may_lose_the_last_moments_loses_nothing_else(journal: str) -> None:
    outcome = power_cuts("--journal", journal, "--durability", "process")

    assert outcome["ok"], outcome["examples"]
    assert outcome["cuts_with_a_lost_tail"] > 20, "otherwise it proves nothing"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--fault", "lying-disk"], "lost"),
        (["--fault", "lying-disk", "--durability", "process"], "unusable"),
        (["--fault", "judged-too-strictly"], "lost"),
    ],
)
def test_a_disk_that_does_not_sync_and_a_store_that_does_not_ask_it_to_are_found(
    arguments: list[str], found: str
) -> None:
    outcome = power_cuts(*arguments)

    assert any(f": {found}: " in example for example in outcome["examples"]), outcome
