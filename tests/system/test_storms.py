"""Real dispatcher processes on one SQLite file, killed, stopped and frozen at random moments, judged from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes import judged

pytestmark = pytest.mark.system
STORM = Path(__file__).parents[2] / "benchmarks" / "storm.py"


@pytest.mark.thorough
@pytest.mark.timeout(180)
def test_kills_and_freezes_lose_nothing_reorder_nothing_and_keep_duplicates_within_the_bound() -> None:
    outcome = judged(
        STORM, "--kills", 50, "--freezes", 2, "--frozen", 2, "--processes", 4, "--lease", 3,
        "--queues", 100, "--pause", 0.01, 0.15, seconds=170,
    )  # fmt: skip

    assert outcome["ok"], outcome
    assert (outcome["kills"], outcome["freezes"]) == (50, 2)
    assert outcome["interruptions_with_work_in_flight"] > 10, "the storm must hit dispatchers at work"
    assert outcome["lost"] == outcome["misordered"] == outcome["overlapping_locks"] == 0
    assert outcome["duplicates_unexplained"] == 0


@pytest.mark.timeout(120)
def test_ten_graceful_stops_make_no_duplicate() -> None:
    outcome = judged(STORM, "--stops", 10, "--queues", 100, "--pause", 0.01, 0.15, seconds=110)

    assert outcome["ok"], outcome
    assert (outcome["stops"], outcome["duplicates"]) == (10, 0)
    assert outcome["stops_with_work_in_flight"] > 1, "some must have something to finish or to give back"
