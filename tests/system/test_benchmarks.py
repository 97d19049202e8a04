"""Benchmarks run to their end, with counts so tiny that their figures mean nothing: `speed.py --quick` runs all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.thorough]

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed.py"
# Some seconds each, beside what is like them.
LONG = {"slow receivers", "a slow disk", "storing, PostgreSQL", "delays, PostgreSQL"}
NAMES = re.findall(r'^    Part\("([^"]+)"', SPEED.read_text(encoding="utf-8"), re.MULTILINE)


def test_parts_were_found() -> None:
    assert set(NAMES) > LONG


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LONG])
def test_part_runs_and_gives_figures(name: str) -> None:
    command = [sys.executable, str(SPEED), "--quick", "--only", name]

    done = subprocess.run(command, capture_output=True, text=True, timeout=180)

    assert done.returncode == 0, done.stderr
    found = re.search(r"^(\d+) figures, \d+ of \d+ targets met$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    assert int(found[1]) > 0
