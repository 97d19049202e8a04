"""
How much slower a backlog is drained when the disk needs 2 ms for a sync.

    python benchmarks/slow_disk.py [--callbacks 5000] [--rounds 5] [--sync-ms 2] [--directory DIRECTORY]

The disk is simulated: a layer under SQLite, of the dispatcher's process alone, waits after each sync. The layer is
there without a wait, too, since who gets into it and out again needs Python's lock, which other threads may have. The
files lie in memory (``/dev/shm``) where the system has that, so that the syncs of a real disk add nothing. Each round
drains 1 KiB POSTs, without queues and over 100 queues, with and without that wait. Prints medians, and how long such
waits really are on this machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from functools import cache, partial
from pathlib import Path

from drain import drained, fill, receiver
from figures import Figure, figure_of, show

import stores
from callbackq import SQLiteDataAccess

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.sqlite_vfs import Event, WatchedFiles

MEMORY = Path("/dev/shm")
SHAPES = {"no queues": 0, "100 queues": 100}


@cache
def slow_syncs(seconds: float) -> WatchedFiles:
    """Put the layer under this process's SQLite, once and for its life."""

    def wait(event: Event) -> None:
        if event.kind == "sync" and seconds:
            time.sleep(seconds)

    return WatchedFiles(tell=wait, watches_writes=False).__enter__()


def store_on_watched_disk(file: Path, seconds: float) -> SQLiteDataAccess:
    slow_syncs(seconds)
    return SQLiteDataAccess(file)


def wait_ms(seconds: float) -> float:
    began = time.perf_counter()
    time.sleep(seconds)
    return (time.perf_counter() - began) * 1000


def figures(options: argparse.Namespace) -> list[Figure]:
    seconds = options.sync_ms / 1000
    rates: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    ratios: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    waits = []
    with stores.ground(options) as ground, receiver() as url:
        assert isinstance(ground.where, Path)
        for nth in range(options.rounds):
            for shape, queues in SHAPES.items():
                file = ground.where / f"{nth} {shape}"
                took = {}
                for wait in (0.0, seconds) if nth % 2 else (seconds, 0.0):
                    plain = partial(SQLiteDataAccess, file.with_suffix(f".{wait}.db"))
                    fill(plain, url, options.callbacks, queues)
                    watched = partial(store_on_watched_disk, *plain.args, wait)
                    took[wait], _ = drained(watched, processes=1, watch=plain)
                rates[shape].append(options.callbacks / took[seconds])
                ratios[shape].append(took[0.0] / took[seconds])
            waits.append(wait_ms(seconds))
    found = []
    for shape in SHAPES:
        name = f"drain on a disk that syncs in {options.sync_ms:g} ms, {shape}"
        found.append(figure_of(ratios[shape], name, "x fast disk", target=0.8, baseline="the same without the wait"))
        found.append(figure_of(rates[shape], f"{name}: rate", "callbacks/s"))
    return [*found, figure_of(waits, "the wait for a simulated sync", "ms", better="less")]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--callbacks", type=int, default=5000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--sync-ms", type=float, default=2.0)
    options.add_argument("--directory", type=Path, default=MEMORY if MEMORY.is_dir() else None)
    options.set_defaults(store="sqlite")
    return options


if __name__ == "__main__":
    logging.disable()
    show(figures(parser().parse_args()))
