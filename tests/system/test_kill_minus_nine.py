"""Real dispatcher processes on one SQLite file, killed at random moments, judged from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
STORM = Path(__file__).parents[2] / "benchmarks" / "storm.py"


def storm(*arguments: str) -> dict[str, object]:
    finished = subprocess.run(
        [sys.executable, str(STORM), *arguments], capture_output=True, text=True, timeout=170, check=False
    )
    assert finished.stdout, finished.stderr
    outcome: dict[str, object] = json.loads(finished.stdout)
    assert outcome["ok"], outcome
    assert finished.returncode == 0
    return outcome


@pytest.mark.timeout(180)
def test_fifty_kills_lose_nothing_reorder_nothing_and_keep_duplicates_within_the_bound() -> None:
    outcome = storm("--kills", "50", "--queues", "100", "--pause", "0.01", "0.15")

    assert outcome["ended"] == 50
    assert outcome["kills_with_work_in_flight"] > 10, "the storm must hit dispatchers at work"  # type: ignore[operator]
    assert outcome["lost"] == outcome["misordered"] == outcome["overlapping_locks"] == 0


@pytest.mark.timeout(120)
def test_ten_graceful_stops_make_no_duplicate() -> None:
    outcome = storm("--kills", "10", "--signal", "term", "--queues", "100", "--pause", "0.01", "0.15")

    assert outcome["duplicates"] == 0
