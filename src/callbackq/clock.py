"""
Time. The only place in callbackq that reads a clock.

Waits, deadlines and leases are measured on a clock that never steps and keeps counting while the machine
sleeps (``CLOCK_BOOTTIME`` where the system has it); wall time is for display and for instants that must
survive a reboot.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """
    Source of time, so that tests and simulations can bring their own.

    All three readings must be cheap and callable from any thread.
    """

    def now(self) -> datetime:
        """Wall time, aware, UTC. May step in both directions; nothing is decided by it within one boot."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment of this boot. Never steps; counts through suspend."""
        ...

    def boot_id(self) -> str:
        """A text that is equal in all processes of one boot of the machine and differs between boots."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    if hasattr(time, "CLOCK_BOOTTIME"):

        def monotonic(self) -> float:
            return time.clock_gettime(time.CLOCK_BOOTTIME)

    else:  # pragma: no cover - systems whose monotonic clock is the best there is

        def monotonic(self) -> float:
            return time.monotonic()

    def boot_id(self) -> str:
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:  # pragma: no cover - not Linux: stores then fall back to wall time
            return ""
