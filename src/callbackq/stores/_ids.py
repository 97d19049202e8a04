"""Ids for callbacks that are given none."""

from __future__ import annotations

import secrets

__all__ = ["any_id", "rising_id"]


def any_id() -> str:
    """Draw an id at random: for engines that part their tables by keys, where all new ones must not go to one part."""
    return secrets.token_hex(16)


def rising_id(time_us: int) -> str:
    """
    Draw an id that lies behind those drawn earlier.

    So new ids land side by side in a database's index. All random, each of a million would write a page of its own.

    Args:
        time_us: microseconds since 1970, by any clock.
    """
    return f"{time_us:014x}{secrets.token_hex(9)}"
