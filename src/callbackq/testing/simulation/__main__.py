"""``python -m callbackq.testing.simulation``: runs many seeds, and tells the story of those that break a promise."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable

from callbackq.testing.simulation import shrink, simulate, story
from callbackq.testing.simulation.campaign import run_seeds
from callbackq.testing.simulation.small_scope import explore

_MOST_STORIES = 3


def _show(counts: Counter[str]) -> Iterable[str]:
    names = sorted(counts)
    width = max(map(len, names), default=0)
    cells = [f"{name:<{width}} {counts[name]:>9,}" for name in names]
    half = (len(cells) + 1) // 2
    for left, right in zip(cells, [*cells[half:], ""], strict=False):
        yield f"  {left}   {right}".rstrip()


def _try_small_scope(crashes: int, freezes: int) -> int:
    began = time.monotonic()
    scope = explore(crashes=crashes, freezes=freezes)
    print(
        f"2 dispatchers, 1 queue, 3 callbacks, at most {crashes} crashes and {freezes} freezes: "
        f"{scope.states:,} states, {scope.steps:,} steps, {scope.endings:,} endings "
        f"in {time.monotonic() - began:.0f} s: {len(scope.violations)} broken promises"
    )
    for violation, way in sorted(scope.violations, key=lambda one: len(one[1]))[:_MOST_STORIES]:
        print(f"\n{violation.rule} {violation.callback_id}: {violation.detail}", *way, sep="\n  ")
    return min(len(scope.violations), 100)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns how many promises or seeds were broken, at most 100."""
    parser = argparse.ArgumentParser(prog="python -m callbackq.testing.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many to run")
    parser.add_argument("--start", type=int, default=0, help="the first")
    parser.add_argument("--store", choices=("memory", "sqlite"), default="memory")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--log", action="store_true", help="print the whole log of each run")
    parser.add_argument(
        "--small-scope", type=int, metavar="CRASHES", help="instead of seeds: every order, with so many crashes at most"
    )
    parser.add_argument("--freezes", type=int, default=0, help="with --small-scope: so many freezes at most, too")
    options = parser.parse_args(arguments)
    if options.small_scope is not None:
        return _try_small_scope(options.small_scope, options.freezes)
    if options.log:
        for seed in range(options.start, options.start + options.seeds):
            print(simulate(seed, store=options.store).text(), end="")
        return 0
    began = time.monotonic()
    tally = run_seeds(options.start, options.seeds, store=options.store, processes=options.processes)
    took = time.monotonic() - began
    print("what took effect:")
    print("\n".join(_show(tally.counts)))
    print(
        f"{tally.schedules:,} schedules from seed {options.start} on {options.store}, {tally.seconds / 3600:,.1f} "
        f"simulated hours, {tally.schedules / took:.0f} schedules/s: {len(tally.failed)} broke a promise"
    )
    for seed, rule in tally.failed:
        print(f"  seed {seed}: {rule}")
    for seed, _ in tally.failed[:_MOST_STORIES]:
        print()
        print(story(shrink(simulate(seed, store=options.store))))
    return min(len(tally.failed), 100)


if __name__ == "__main__":
    sys.exit(main())
