"""
The proof in short: what every change must survive, and how long that takes.

    python benchmarks/proof.py
    python benchmarks/proof.py --seeds 20000 --kills 500

Runs simulated worlds, then a storm that kills dispatchers, each a command of its own, whose figures are shown. Exits 0
only if both found no broken promise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

STORM = Path(__file__).with_name("storm.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2000, help="simulated worlds")
    parser.add_argument("--kills", type=int, default=50, help="in a storm of real processes")
    parser.add_argument("--processes", type=int, default=2, help="that simulate at a time")
    options = parser.parse_args()
    simulate = ["-m", "callbackq.testing.simulation", "--seeds", options.seeds, "--processes", options.processes]
    storm = [STORM, "--kills", options.kills, "--queues", 100, "--pause", 0.01, 0.15]
    began = time.monotonic()
    broken = sum(
        subprocess.run([sys.executable, *map(str, one)], check=False).returncode != 0 for one in (simulate, storm)
    )
    outcome = f"{broken} OF THEM FAILED" if broken else "no promise was broken"
    print(
        f"proof: {options.seeds:,} simulated worlds and a storm of {options.kills:,} kills in "
        f"{time.monotonic() - began:.0f} s: {outcome}"
    )
    return broken


if __name__ == "__main__":
    sys.exit(main())
