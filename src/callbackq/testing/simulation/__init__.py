"""
The real dispatcher and the real stores in a simulated world.

Time, chance, network, receivers, mail server, faults and deaths come from a seed. No thread, no socket, no waiting:
minutes of trouble take milliseconds, and the same seed does the same again, to the last byte of its log.
"""

from __future__ import annotations

from callbackq.testing.simulation.run import Report, run
from callbackq.testing.simulation.scenario import Scenario, draw
from callbackq.testing.simulation.shrink import shrink
from callbackq.testing.simulation.story import story

__all__ = ["Report", "Scenario", "draw", "run", "shrink", "simulate", "story"]


def simulate(seed: int, *, store: str = "memory") -> Report:
    """
    Draw a scenario from a seed and run it.

    Args:
        seed: any whole number.
        store: ``"memory"`` or ``"sqlite"``.
    """
    return run(draw(seed, store))
