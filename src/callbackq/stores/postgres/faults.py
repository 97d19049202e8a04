"""psycopg's errors in our words. The only place that reads SQLSTATEs (PostgreSQL manual, appendix A)."""

from __future__ import annotations

from typing import Final

import psycopg
from psycopg_pool import PoolTimeout

from callbackq.errors import DataAccessError, TransientDataAccessError

__all__ = ["is_taken_id", "passes_at_once", "translate", "translate_enlisted"]

_CONFLICTS: Final = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
    }
)
"""What others did at the same time was in the way: the transaction was undone, and can be run again at once."""

_PASSING: Final[dict[str, str]] = {
    "40001": "found others changing the same at the same time",
    "40P01": "found others changing the same at the same time",
    # An id that others stored, in a transaction that sees an older state and so can't look at it.
    "23505": "found others storing the same at the same time",
    "55P03": "is locked by another transaction for too long: keep transactions that store callbacks short",
    "57014": "broke a statement off",
    "57P01": "is being shut down",
    "57P02": "has crashed and is starting again",
    "57P03": "is starting or stopping",
    "57P05": "closed an idle session",
    "53000": "is short of resources",
    "53100": "has a full disk: free some space on it",
    "53200": "is short of memory",
    "53300": "has too many connections: raise max_connections, or lower those of its clients",
    "58030": "could not be read or written: check its disk",
    "25006": "can't be written to: it is a standby, or read-only",
}
"""What may pass by itself. Class 08 (connection exceptions) belongs to it, too."""

_LASTING: Final[dict[str, str]] = {
    "28000": "refused the user",
    "28P01": "refused the password",
    "3D000": "has no such database",
    "42501": "refused a right: the user must be able to read and write the schema's tables, in open() to create them",
    "42P01": "has no such table: call open() or migrate first, and look whether it is the store's database and schema",
}


def translate(error: psycopg.Error, *, nothing_written: bool) -> DataAccessError:
    """
    Build our error for one of the driver's, which is its cause.

    Without the driver's text: it may quote the values of a statement.
    """
    state = error.sqlstate or ""
    lost = _is_lost_connection(error)
    passing = state in _PASSING or lost
    words = _PASSING.get(state) or _LASTING.get(state) or ("can't be reached" if lost else "refused a statement")
    kind = TransientDataAccessError if nothing_written and passing else DataAccessError
    ours = kind(f"the PostgreSQL server {words} ({state or type(error).__name__})")
    ours.__cause__ = error
    return ours


def translate_enlisted(error: psycopg.Error) -> DataAccessError:
    """Build our error for one of the driver's in a transaction of the application's."""
    ours = translate(error, nothing_written=True)
    if not isinstance(ours, TransientDataAccessError):
        return ours
    told = TransientDataAccessError(f"{ours}: roll the transaction back and repeat it")
    told.__cause__ = error
    return told


def passes_at_once(error: BaseException) -> bool:
    """Whether the same may go through now: others were in the way, or the connection was stale."""
    cause = error.__cause__
    if not isinstance(cause, psycopg.Error) or isinstance(cause, PoolTimeout):
        return False
    return cause.sqlstate in _CONFLICTS or _is_lost_connection(cause)


def is_taken_id(error: DataAccessError) -> bool:
    """Whether an insert found its key taken."""
    return isinstance(error.__cause__, psycopg.errors.UniqueViolation)


def _is_lost_connection(error: psycopg.Error) -> bool:
    state = error.sqlstate
    if state is None:
        # From the driver itself or from the network.
        return isinstance(error, psycopg.OperationalError)
    return state.startswith(("08", "57P"))
