"""What a soak is judged by: what grows, leaks or slows down must not pass."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = 3600.0
MIB = 2**20


@pytest.fixture(scope="module")
def soak() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("soak")


def held(soak: ModuleType, change: Callable[[float], dict[str, Any]] = lambda hours: {}) -> set[str]:
    """Give what did not hold in an hour of samples, changed by how many hours have passed."""
    samples = []
    for at in range(0, int(SECONDS), 3):
        quiet = {
            "rss_bytes": 40 * MIB,
            "files": 16 if at % 60 == 0 else 15,
            "sockets": 16 + at % 2,
            "threads": 4,
            "wal_bytes": MIB,
            "claims": array("d", [0.002] * 90 + [0.02] * 10),
            "cpu": array("d", [0.001] * 100),
        }
        samples.append(soak.Sample(**({"at": float(at)} | quiet | change(at / SECONDS))))
    _, judged = soak.judge_samples(samples, SECONDS)
    return {name for name, has_held in judged.items() if not has_held}


def test_a_quiet_hour_holds_in_everything(soak: ModuleType) -> None:
    assert held(soak) == set()


def test_what_happens_while_it_warms_up_is_not_judged(soak: ModuleType) -> None:
    slow = array("d", [1.0] * 10)

    assert held(soak, lambda hours: {"rss_bytes": 0, "files": 99, "claims": slow} if hours < 1 / 6 else {}) == set()


@pytest.mark.parametrize(("mib", "expected"), [(0.9, set()), (1.1, {"memory"})])
def test_memory_may_grow_by_one_mebibyte_an_hour(soak: ModuleType, mib: float, expected: set[str]) -> None:
    assert held(soak, lambda hours: {"rss_bytes": int((40 + mib * hours) * MIB)}) == expected


@pytest.mark.parametrize("kind", ["files", "threads"])
def test_one_that_stays_is_found(soak: ModuleType, kind: str) -> None:
    assert held(soak, lambda hours: {kind: 15 + (hours > 0.7)}) == {kind}


def test_sockets_that_become_more_are_found(soak: ModuleType) -> None:
    assert held(soak, lambda hours: {"sockets": 16 + int(hours * 60) // 20}) == {"sockets"}


@pytest.mark.parametrize(("mib", "expected"), [(64, set()), (65, {"wal"})])
def test_the_log_may_be_so_long_at_any_time(soak: ModuleType, mib: int, expected: set[str]) -> None:
    assert held(soak, lambda hours: {"wal_bytes": mib * MIB if 0.01 < hours < 0.02 else MIB}) == expected


@pytest.mark.parametrize(("times", "expected"), [(1.15, set()), (1.25, {"claim_p99"})])
def test_the_slowest_claims_may_become_a_fifth_slower(soak: ModuleType, times: float, expected: set[str]) -> None:
    slower = array("d", [0.002] * 90 + [0.02 * times] * 10)

    assert held(soak, lambda hours: {"claims": slower} if hours > 0.5 else {}) == expected
