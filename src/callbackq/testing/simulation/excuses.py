"""
For which requests the contract allows another: those whose dispatcher was killed, or was kept from its work (by
standing still, or by a store that failed) until their locks had timed out, and those whose answers were lost.
"""

from __future__ import annotations

from collections.abc import Iterable

from attrs import mutable

from callbackq.testing.simulation.world import Actor

__all__ = ["Excuses"]


@mutable(eq=False)
class _Hold:
    """
    What is known of a token.

    Attributes:
        holder: who was given it.
        hindered_us: how long the holder had been hindered by then.
        renews: the holder's own token that had timed out, and whose request goes on under this one.
        at_end: whether there was an excuse when it ended; ``None`` as long as it has not.
    """

    holder: Actor
    hindered_us: int
    renews: int | None = None
    at_end: bool | None = None


class Excuses:
    """
    Know what befell each token's request, and nothing that befell its holder before or afterwards.

    Args:
        lock_timeout_us: of all dispatchers.
    """

    def __init__(self, *, lock_timeout_us: int) -> None:
        # Dispatchers keep a tenth of the lock's time for what comes after an attempt.
        self._long_us = max(2_000_000, lock_timeout_us // 10) - 200_000
        self._holds: dict[int, _Hold] = {}
        self._lost: set[int] = set()
        self._untold: set[int] = set()

    def given(self, token: int, holder: Actor) -> None:
        """A token was given to a dispatcher."""
        self._holds[token] = _Hold(holder, holder.hindered_us)

    def renewed(self, old: int, new: int) -> None:
        """A dispatcher was given its own lock anew: its request goes on under another token."""
        self._holds[new].renews = old
        if old in self._untold:
            self._untold.add(new)

    def ended(self, token: int, *, timed_out: bool) -> None:
        """A token's lock was ended or taken over: whatever befalls its holder from now on is no excuse."""
        hold = self._holds.get(token)
        while hold is not None and hold.at_end is None:
            hindered_us = hold.holder.hindered_us - hold.hindered_us
            # In time, a result could be recorded all the same.
            hold.at_end = hold.holder.was_killed or (timed_out and hindered_us >= self._long_us)
            hold = None if hold.renews is None else self._holds[hold.renews]

    def lost_answer(self, token: int) -> None:
        """The dispatcher can't know whether a token's request was accepted."""
        self._lost.add(token)

    def never_told(self, tokens: Iterable[int]) -> None:
        """The dispatcher doesn't hear of these tokens, or of what came of their requests."""
        self._untold.update(tokens)

    def allow_another(self, token: int) -> bool:
        """Say whether what was accepted under a token may be sent again."""
        hold = self._holds[token]
        return token in self._lost or (hold.holder.was_killed if hold.at_end is None else hold.at_end)

    def allow_leaving(self, token: int) -> bool:
        """Say whether a stop may leave the lock with a token to time out, though the store works."""
        return token in self._untold
