"""
The boundaries that a dispatcher's process passes between store, transport, notifier and statement, and its end at one.

Code that wants to know what a crash does runs once to count the boundaries, then once for each of them, in a process
that ends there as after ``kill -9``: nothing is closed, rolled back or flushed.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

__all__ = ["CALLS", "ENDED", "Boundaries", "watch_postgres", "watch_sqlite", "watched"]

ENDED = 77
"""The exit status of a process that ended at its boundary."""

CALLS = frozenset(
    {
        "open",
        "close",
        "store_callback_request",
        "store_callback_requests",
        "get_callback_status",
        "acquire_locks",
        "release_locks",
        "record_attempts",
        "record_and_acquire",
        "next_due",
        "acquire_notifications",
        "record_notification",
        "request_transition",
    }
)
"""The calls of a store that are put between boundaries."""
# What a driver's generator yields when all is sent and the answer is awaited.
_ANSWER_AWAITED = 1

_Store = TypeVar("_Store")


class Boundaries:
    """
    Counts.

    Args:
        end_at: the number, from 0, of the boundary at which the process ends; ``None``: it doesn't.
        last_words: called with its name right before.

    Attributes:
        passed: the names of all that were passed, in their order.
    """

    def __init__(self, *, end_at: int | None = None, last_words: Callable[[str], None] = lambda name: None) -> None:
        self.passed: list[str] = []
        self._end_at = end_at
        self._last_words = last_words

    def at(self, name: str) -> None:
        """Pass one, or end."""
        if len(self.passed) == self._end_at:
            self._last_words(name)
            os._exit(ENDED)
        self.passed.append(name)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Give a function that passes one before *call* and one after."""

        def passing(*args: Any, **kwargs: Any) -> Any:
            self.at(f"before {name}")
            result = call(*args, **kwargs)
            self.at(f"after {name}")
            return result

        return passing


def watched(kind: type[_Store], boundaries: Boundaries) -> type[_Store]:
    """Give a class of stores whose public calls are between boundaries."""

    class Watched(kind):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return boundaries.around(name, found) if name in CALLS else found

    return Watched


def watch_sqlite(boundaries: Boundaries) -> None:
    """Put every statement of this process's new connections to SQLite between boundaries, BEGIN and COMMIT included."""

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, /, *values: Any) -> sqlite3.Cursor:
            cursor: sqlite3.Cursor = boundaries.around(_in_short(sql), super().execute)(sql, *values)
            return cursor

        def executemany(self, sql: str, rows: Iterable[Mapping[str, object]], /) -> sqlite3.Cursor:
            # A statement for each row, and the crash between two of them.
            def each() -> Iterator[Mapping[str, object]]:
                for row in rows:
                    boundaries.at(f"before a row of {_in_short(sql)}")
                    yield row

            cursor: sqlite3.Cursor = boundaries.around(_in_short(sql), super().executemany)(sql, each())
            return cursor

        def close(self) -> None:
            boundaries.around("closing a connection", super().close)()

    sqlite3.connect = partial(sqlite3.connect, factory=Connection)  # type: ignore[assignment]


def watch_postgres(boundaries: Boundaries) -> None:
    """
    Put every round trip of this process to PostgreSQL between boundaries.

    There is a third one within: all is sent, and the server does it, but the answer was not read.
    """
    import psycopg

    execute, wait = psycopg.Cursor.execute, psycopg.Connection.wait
    statement = "a round trip"

    def named(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal statement
        statement = _in_short(query if isinstance(query, str) else query.as_string(None))
        try:
            return execute(cursor, query, *args, **kwargs)
        finally:
            statement = "a round trip"

    def waiting(connection: Any, generator: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        return boundaries.around(statement, partial(wait, connection))(between(generator, statement), *args, **kwargs)

    def between(generator: Generator[Any, Any, Any], name: str) -> Generator[Any, Any, Any]:
        was_sent = False
        try:
            wanted = next(generator)
            while True:
                if wanted == _ANSWER_AWAITED and not was_sent:
                    was_sent = True
                    boundaries.at(f"sent {name}")
                wanted = generator.send((yield wanted))
        except StopIteration as stop:
            return stop.value

    psycopg.Cursor.execute = named  # type: ignore[assignment]
    psycopg.Connection.wait = waiting  # type: ignore[assignment]


def _in_short(sql: str) -> str:
    return " ".join(sql.split())[:60]
