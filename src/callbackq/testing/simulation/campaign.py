"""Many runs, in one process or several."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Final

from attrs import field, mutable

from callbackq.testing.simulation.run import run
from callbackq.testing.simulation.scenario import draw

__all__ = ["Tally", "run_seeds"]

_CHUNK: Final = 100


@mutable
class Tally:
    """
    What came of some seeds.

    Attributes:
        schedules: how many were run.
        seconds: the time that passed in their worlds.
        counts: what took effect, and how often.
        failed: those that broke a promise, with the first rule.
    """

    schedules: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(factory=Counter)
    failed: list[tuple[int, str]] = field(factory=list)

    def add(self, other: Tally) -> None:
        """Take in what came of others."""
        self.schedules += other.schedules
        self.seconds += other.seconds
        self.counts += other.counts
        self.failed += other.failed


def _run_chunk(seeds: range, *, store: str) -> Tally:
    tally = Tally()
    for seed in seeds:
        report = run(draw(seed, store))
        tally.schedules += 1
        tally.seconds += report.simulated_seconds
        tally.counts += report.counts
        if not report.ok:
            tally.failed.append((seed, report.violations[0].rule))
    return tally


def run_seeds(start: int, seeds: int, *, store: str, processes: int) -> Tally:
    """Run so many seeds from *start* on, in so many processes."""
    chunks = [range(first, min(first + _CHUNK, start + seeds)) for first in range(start, start + seeds, _CHUNK)]
    total = Tally()
    if processes == 1:
        for chunk in chunks:
            total.add(_run_chunk(chunk, store=store))
        return total
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for tally in pool.map(partial(_run_chunk, store=store), chunks):
            total.add(tally)
    return total
