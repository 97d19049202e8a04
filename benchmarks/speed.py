"""
Measures everything that has to do with speed, and writes it into the pages.

    python benchmarks/speed.py [--quick] [--only NAME]

Each part runs in a process of its own, at least five rounds in turns with what it is compared with. It prints figures
beside their targets and writes JSON, chart and pages (see `publish`); takes about half an hour. With --quick the counts
are tiny, the figures mean nothing, and nothing is written: it shows that all works. With --only nothing is written
either. Files of SQLite go to TMPDIR: let that be on the disk that you want to know about.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Final

import publish
import runs
from attrs import evolve, frozen
from figures import Figure, show


@frozen
class Part:
    """
    Attributes:
        name: what people call it.
        module: the benchmark.
        options: what it is given.
        quick: what it is given besides for a run that only shows that it works.
    """

    name: str
    module: str
    options: str = ""
    quick: str = "--rounds 1"


PARTS: Final = [
    Part("transport", "transport", quick="--requests 200 --rounds 1"),
    Part("drain, SQLite", "drain", quick="--callbacks 100 --rounds 1"),
    Part("drain, PostgreSQL", "drain", "--store postgres", quick="--callbacks 100 --rounds 1"),
    Part("one strict queue", "strict_queue", quick="--callbacks 20 --rounds 1"),
    Part("a slow disk", "slow_disk", quick="--callbacks 100 --rounds 1"),
    Part("storing, SQLite", "enqueue", quick="--callbacks 20 --batches 1 --rounds 1"),
    Part("storing, PostgreSQL", "enqueue", "--store postgres", quick="--callbacks 20 --batches 1 --rounds 1"),
    Part("claims", "claim", quick="--backlog 2000 --blocked 50 --rounds 2"),
    Part("memory", "memory", quick="--backlog 2000 --seconds 1 --callbacks 1000 --rounds 1"),
    Part("slow receivers", "slow_receivers", quick="--receivers 20 --seconds 1 --rounds 1"),
    Part("delays, SQLite", "latency", quick="--callbacks 3 --rounds 1 --idle 0.2"),
    Part("delays, PostgreSQL", "latency", "--store postgres", quick="--callbacks 3 --rounds 1 --idle 0.2"),
]


def figures_of(module: str, arguments: list[str]) -> list[Figure]:
    logging.disable()
    benchmark = importlib.import_module(module)
    found: list[Figure] = benchmark.figures(benchmark.parser().parse_args(arguments))
    return found


def measure(parts: list[Part], quick: bool) -> list[Figure]:
    """Run parts one after another, each in a process of its own, and print what they find."""
    found: list[Figure] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for part in parts:
            arguments = [*part.options.split(), *(part.quick.split() if quick else ())]
            print(f"\n{part.name}: python benchmarks/{part.module}.py {' '.join(arguments)}", flush=True)
            figures = processes.submit(figures_of, part.module, arguments).result()
            show(figures)
            found += figures
    assert len({figure.name for figure in found}) == len(found), "two figures share a name"
    return [runs.rounded(figure) for figure in found]


def summarise(figures: list[Figure]) -> None:
    judged = [figure for figure in figures if figure.met is not None]
    met = [figure for figure in judged if figure.met]
    print(f"\n{len(figures)} figures, {len(met)} of {len(judged)} targets met")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], metavar="NAME")
    options = parser.parse_args()
    if options.quick or options.only:
        chosen = [part for part in PARTS if not options.only or part.name in options.only]
        summarise(measure(chosen, options.quick))
        return 0
    beginning = runs.begin()
    print(f"{beginning.machine}\nload {beginning.load:.1f}", flush=True)
    figures = measure(PARTS, quick=False)
    summarise(figures)
    publish.write(evolve(runs.load(publish.ROOT / publish.JSON), speed=beginning.run(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
