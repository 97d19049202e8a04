"""
What was measured last, on which machine: `docs/_static/benchmarks.json`.

It says nothing of the machine but what figures depend on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import receiver
from attrs import evolve, field, frozen
from cattrs.preconf.json import make_converter
from figures import Figure

_DIGITS = 4
_CONVERTER = make_converter(omit_if_default=True)


@frozen
class Machine:
    """
    Attributes:
        receiver: what answered the requests, on the same machine.
    """

    cores: int
    cpu: str
    system: str
    python: str
    sqlite: str
    postgresql: str
    receiver: str


@frozen
class Run:
    """
    What one run of a command found out.

    Attributes:
        date: of its end, YYYY-MM-DD.
        load: what wanted a core when it began and when it ended, of itself and of others: the average of a minute.
    """

    date: str
    machine: Machine
    load: tuple[float, float]
    figures: list[Figure]

    def value(self, name: str) -> float:
        """Give the value of the figure of that name."""
        return next(one.value for one in self.figures if one.name == name)


@frozen
class Results:
    """
    Attributes:
        speed: of ``make bench``.
        peers: of ``make bench-peers``.
    """

    speed: Run | None = None
    peers: Run | None = None


@frozen
class Beginning:
    """What is to be known before a run begins."""

    machine: Machine
    load: float = field(factory=lambda: os.getloadavg()[0])

    def run(self, figures: list[Figure]) -> Run:
        """Give the run that ends now and found *figures*."""
        loads = (round(self.load, 1), round(os.getloadavg()[0], 1))
        return Run(datetime.now(UTC).date().isoformat(), self.machine, loads, figures)


def begin() -> Beginning:
    """Find out what machine this is."""
    return Beginning(
        Machine(
            cores=len(os.sched_getaffinity(0)),
            cpu=_cpu(),
            system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
            python=platform.python_version(),
            sqlite=sqlite3.sqlite_version,
            postgresql=_postgresql(),
            receiver=receiver.kind(),
        )
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _postgresql() -> str:
    # What spawns processes is imported again in each of them: they need no driver because of this.
    import psycopg

    import stores

    options = argparse.Namespace(store="postgres", conninfo=None)
    with stores.ground(options) as ground, psycopg.connect(str(ground.where)) as connection:
        return f"{connection.info.server_version // 10_000}.{connection.info.server_version % 10_000}"


def load(file: Path) -> Results:
    """Read results; there are none without the file."""
    if not file.exists():
        return Results()
    return _CONVERTER.structure(json.loads(file.read_text(encoding="utf-8")), Results)


def dump(results: Results) -> str:
    """Write results as JSON, a figure in each line."""
    found: dict[str, Any] = _CONVERTER.unstructure(results)
    runs = []
    for name, run in found.items():
        figures = ",\n".join(f"   {json.dumps(one)}" for one in run.pop("figures"))
        about = json.dumps(run)[1:-1]
        runs.append(f' {json.dumps(name)}: {{{about}, "figures": [\n{figures}\n ]}}')
    return "{\n" + ",\n".join(runs) + "\n}\n"


def rounded(figure: Figure) -> Figure:
    """Give a figure without the digits that mean nothing."""
    least_and_most = figure.spread and (_rounded(figure.spread[0]), _rounded(figure.spread[1]))
    target = figure.target if figure.target is None else float(figure.target)
    return evolve(figure, value=_rounded(figure.value), target=target, spread=least_and_most)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
