"""What a callback must be, by what was committed."""

from __future__ import annotations

from typing import Final

from attrs import field, mutable

from callbackq.core.models import CallbackRequest, CallbackState, FailedReason
from callbackq.testing.simulation.world import Actor

__all__ = ["Account"]

_OPEN: Final = (CallbackState.WAITING, CallbackState.LOCKED)


@mutable(eq=False)
class Account:
    """
    What one callback must be.

    Attributes:
        first_arrival: the place, among all arrivals, from which on they can be its own: an id that was purged may have
            been stored anew.
    """

    id: str
    request: CallbackRequest
    sequence: int
    due_us: int
    first_arrival: int
    state: CallbackState = CallbackState.WAITING
    token: int = 0
    tokens: list[int] = field(factory=list)
    timeout_us: int = 0
    holder: Actor | None = None
    was_renewed: bool = False
    attempts_made: int = 0
    abandoned: int = 0
    attempts: int = 0
    accepted_late: bool = False
    cancel_requested: bool = False
    holds: bool = False
    failed_reason: FailedReason | None = None
    recorded: dict[int, CallbackState] = field(factory=dict)
    late: set[int] = field(factory=set)
    debts: int = 0
    finished_us: int = 0
    redeliveries: int = 0
    accepted_tokens: list[int] = field(factory=list)
    was_purged: bool = False

    @property
    def is_open(self) -> bool:
        return self.state in _OPEN
