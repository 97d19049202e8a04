"""
``python -m callbackq demo``: the promises, seen.

A receiver on loopback that misbehaves by script, a few hundred callbacks in a SQLite file, two dispatcher processes,
one of them killed while it has work in flight. In the end `callbackq.testing.history` judges from what the receiver
saw.
"""

from __future__ import annotations

from callbackq.demo.show import run_demo, run_dispatcher

__all__ = ["run_demo", "run_dispatcher"]
