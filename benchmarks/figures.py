"""
What benchmarks find out, in one form: a figure with its unit, its spread and, where there is one, its target.

Each module that measures speed has, beside its ``main()``,

* ``parser()``, its options: an `argparse.ArgumentParser`, and
* ``figures(options)``, which measures and gives a list of `Figure`.

`benchmarks/speed.py` runs them, each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from attrs import frozen


@frozen
class Figure:
    """
    One thing measured.

    Attributes:
        name: what was measured, such as "drain, one process, SQLite". It names the figure, so no two share it.
        value: the median of the rounds.
        unit: "x raw", "callbacks/s", "ms", "MiB", "s CPU per 1,000" and the like.
        target: what it should be at least, or at most.
        better: whether more of it is better, or less.
        spread: least and most of the rounds.
        baseline: what a ratio compares with, such as "PoolManager.request in one thread". Measured in the same run, in
            turns with the figure.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    better: Literal["more", "less"] = "more"
    spread: tuple[float, float] | None = None
    baseline: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "more" else self.value <= self.target


def figure_of(
    rounds: Sequence[float],
    name: str,
    unit: str,
    *,
    target: float | None = None,
    better: Literal["more", "less"] = "more",
    baseline: str = "",
) -> Figure:
    """Give the median of what some rounds found, with its spread."""
    return Figure(name, median(rounds), unit, target, better, (min(rounds), max(rounds)), baseline)


def show(figures: Iterable[Figure]) -> None:
    """Print a table: figure, unit, spread, target and whether it is met."""
    for one in figures:
        spread = f"{number(one.spread[0])} to {number(one.spread[1])}" if one.spread else ""
        bound = "" if one.target is None else f"{'>=' if one.better == 'more' else '<='} {one.target:,g}"
        verdict = {True: "met", False: "NOT MET", None: ""}[one.met]
        print(f"{one.name:60} {number(one.value):>9} {one.unit:16} {spread:20} {bound:10} {verdict}", flush=True)


def number(value: float) -> str:
    """Write a number with three digits, or with all that stand before the point: 12,345, 123, 12.3, 1.20, 0.123."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
