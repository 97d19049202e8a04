"""psycopg's errors in our words. The only place that reads SQLSTATEs (PostgreSQL manual, appendix A)."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, NoReturn, TypeVar

import psycopg
from psycopg_pool import PoolTimeout

from callbackq.errors import DataAccessError, TransientDataAccessError

__all__ = [
    "ConnectError",
    "Doubt",
    "SilenceError",
    "is_at_the_wrong_server",
    "is_forgotten_statement",
    "is_taken_id",
    "is_undone",
    "passes_at_once",
    "raise_enlisted",
    "raise_ours",
    "without_password",
]

_CONFLICTS: Final = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
    }
)
"""What others did at the same time was in the way: the transaction was undone, and can be run again at once."""

_FORGOTTEN: Final = frozenset(
    {
        "26000",  # invalid_sql_statement_name
        "42P05",  # duplicate_prepared_statement
    }
)
"""The session is not the one in which a statement was prepared, after all."""

_PASSING: Final[dict[str, str]] = {
    "40001": "found others changing the same at the same time",
    "40P01": "found others changing the same at the same time",
    # An id that others stored, in a transaction that sees an older state and so can't look at it.
    "23505": "found others storing the same at the same time",
    "25P03": "ended a transaction that stood still for too long",
    "26000": "has forgotten a prepared statement",
    "42P05": "has another prepared statement by that name",
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

_QUOTES_NO_VALUES: Final = ("08", "0A", "25", "26", "28", "3D", "40", "42", "53", "54", "55", "57", "58")
"""Classes of SQLSTATEs whose first line names things of the database at most."""


def raise_ours(error: psycopg.Error, *, nothing_written: bool) -> NoReturn:
    """Raise our error for one of the driver's, which is its cause, less what it quotes."""
    _raise_alone(_translate(error, nothing_written=nothing_written))


def raise_enlisted(error: psycopg.Error) -> NoReturn:
    """Raise our error for one of the driver's in a transaction of the application's."""
    ours = _translate(error, nothing_written=True)
    if isinstance(ours, TransientDataAccessError):
        told = TransientDataAccessError(f"{ours}: roll the transaction back and repeat it")
        told.__cause__ = ours.__cause__
        _raise_alone(told)
    _raise_alone(ours)


def _raise_alone(error: DataAccessError) -> NoReturn:
    try:
        raise error
    finally:
        # The driver's error, which is being handled, would stay as its context, with all that it quotes.
        error.__context__ = None


def _translate(error: psycopg.Error, *, nothing_written: bool) -> DataAccessError:
    state = error.sqlstate or ""
    lost = _is_lost_connection(error)
    passing = state in _PASSING or lost
    silent = isinstance(error, SilenceError) and "gives no answer"
    words = (
        _PASSING.get(state) or _LASTING.get(state) or silent or ("can't be reached" if lost else "refused a statement")
    )
    kind = TransientDataAccessError if nothing_written and passing else DataAccessError
    ours = kind(f"the PostgreSQL server {words} ({state or type(error).__name__})")
    ours.__cause__ = _without_values(error)
    return ours


def _without_values(error: psycopg.Error) -> psycopg.Error:
    """
    Give an error of the same class that quotes no row and no value of a statement.

    What the server sends with one may hold them: a row that a constraint refuses is quoted whole, and whoever prints a
    traceback of ours prints its cause, too.
    """
    diag = error.diag
    if diag.sqlstate is None:
        return error  # the driver's own words, or those of a connection that was lost
    if diag.sqlstate.startswith(_QUOTES_NO_VALUES):
        words = diag.message_primary or diag.sqlstate
    else:
        places = {"table": diag.table_name, "column": diag.column_name, "constraint": diag.constraint_name}
        named = ", ".join(f"{kind} {name}" for kind, name in places.items() if name)
        words = f"{diag.sqlstate} ({named})" if named else diag.sqlstate
    told = type(error)(words)
    told.sqlstate = error.sqlstate
    return told.with_traceback(error.__traceback__)


class Doubt:
    """
    Remember over several tries whether one of them may have written: no later one can say that nothing was.

    Each try is a ``with`` block.
    """

    def __init__(self) -> None:
        self._may_have_written = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not isinstance(error, DataAccessError):
            return
        if not isinstance(error, TransientDataAccessError):
            self._may_have_written = True
        elif self._may_have_written:
            raise DataAccessError(f"{error}; an earlier try may have been written") from error.__cause__


def passes_at_once(error: BaseException) -> bool:
    """Whether the same may go through now: others were in the way, or the connection was stale."""
    cause = error.__cause__
    if not isinstance(cause, psycopg.Error) or isinstance(cause, (ConnectError, PoolTimeout, SilenceError)):
        return False
    return cause.sqlstate in _CONFLICTS | _FORGOTTEN or _is_lost_connection(cause)


def is_forgotten_statement(error: DataAccessError) -> bool:
    """Whether statements must not be prepared on that connection."""
    return isinstance(error.__cause__, psycopg.Error) and error.__cause__.sqlstate in _FORGOTTEN


def is_undone(error: psycopg.Error) -> bool:
    """
    Whether an error surely means that the statement it answers, a COMMIT say, was undone.

    Not so when the line broke, nor when somebody says that it did: a pooler, of a server that may have committed.
    """
    return not _is_lost_connection(error)


def is_at_the_wrong_server(error: BaseException | None) -> bool:
    """Whether a connection works that another may come in place of: to the standby that has taken over."""
    return isinstance(error, psycopg.errors.ReadOnlySqlTransaction)


class ConnectError(psycopg.OperationalError):
    """The driver's error for a connection that could not be made, without all that it keeps: the password, too."""


class SilenceError(psycopg.OperationalError):
    """A server that can be reached has left a statement without an answer."""


_C = TypeVar("_C", bound=psycopg.Connection[Any])


def without_password(connect: Callable[[], _C]) -> _C:
    """Connect, or raise a `ConnectError`."""
    try:
        return connect()
    except psycopg.OperationalError as error:
        told = ConnectError(str(error))
        told.sqlstate = error.sqlstate
    # Out here it has no context, which would bring the password along.
    raise told


def is_taken_id(error: DataAccessError) -> bool:
    """Whether an insert found its key taken."""
    return isinstance(error.__cause__, psycopg.errors.UniqueViolation)


def _is_lost_connection(error: psycopg.Error) -> bool:
    state = error.sqlstate
    if state is None:
        # From the driver itself or from the network.
        return isinstance(error, psycopg.OperationalError)
    return state.startswith(("08", "57P")) or state == "25P03"
