"""
Tokens to plant where secrets are, and a watch over everything that is emitted, in which none may be found.

A canary is a word that occurs nowhere in the sources, so that neither a path nor a line of code can hold it by chance.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from types import TracebackType
from typing import Any, Final, Self

__all__ = ["ALL_CANARIES", "HOSTILE_ID", "Watch", "canary", "chain_of", "leaky", "text_of"]

ALL_CANARIES: Final = "-yranac"[::-1]
"""What all canaries begin with."""

HOSTILE_ID: Final = "order \u202e\u2066ä\u200b'\"%s{}"
"""An id that every check lets pass: text that turns around, hides, closes quotes and looks like a format."""

_UNWATCHED: Final = ("mail.",)
"""Loggers of the mail servers that tests run."""


def canary(place: str) -> str:
    """The token planted at *place*; a leak names it."""
    return ALL_CANARIES + place


def leaky(kind: type[BaseException] = RuntimeError, place: str = "exception") -> BaseException:
    """An exception as a library may raise it, whose text, notes, cause and context all quote something."""
    error, cause = kind(canary(f"{place}-text")), ValueError(canary(f"{place}-cause"))
    cause.__context__ = KeyError(canary(f"{place}-context"))
    error.__cause__ = cause
    error.add_note(canary(f"{place}-note"))
    return error


def chain_of(error: BaseException) -> list[BaseException]:
    """The exception and all behind it, also where a traceback would not show them."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in found:
            found.append(one)
            waiting += [one.__cause__, one.__context__]
            waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return found


def text_of(thing: object) -> str:
    """All that can be seen of a thing from outside."""
    if isinstance(thing, BaseException):
        return "\n".join(f"{one} {one!r} {vars(one)!r} {getattr(one, '__notes__', ())!r}" for one in chain_of(thing))
    return f"{thing} {thing!r} {thing:s}" if isinstance(thing, str) else f"{thing} {thing!r}"


class Watch(logging.Handler, AbstractContextManager["Watch"]):
    """
    Collects what is emitted while it is entered: log records of every logger at every level, warnings, what threads
    die of, names of threads; and whatever it is `shown`.
    """

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.records: list[logging.LogRecord] = []
        self._seen: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
        self._levels = {logger: logger.level for logger in (logging.root, *loggers)}
        for logger in self._levels:
            logger.setLevel(logging.DEBUG if logger is logging.root else logging.NOTSET)
        logging.root.addHandler(self)
        self._hooks = threading.excepthook, sys.unraisablehook
        threading.excepthook = lambda died: self.show("the end of a thread", died.exc_value)
        sys.unraisablehook = lambda ended: self.show("unraisable", ended.exc_value)
        start = self._start = threading.Thread.start

        def start_seen(thread: threading.Thread) -> None:
            self.show("the name of a thread", thread.name)
            start(thread)

        threading.Thread.start = start_seen  # type: ignore[method-assign]
        self._warnings = warnings.catch_warnings(record=True)
        self._warned = self._warnings.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for warned in self._warned or ():
            self.show("a warning", str(warned.message))
        self._warnings.__exit__(kind, error, traceback)
        threading.Thread.start = self._start  # type: ignore[method-assign]
        threading.excepthook, sys.unraisablehook = self._hooks
        logging.root.removeHandler(self)
        for logger, level in self._levels.items():
            logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(_UNWATCHED):
            self.records.append(record)

    def show(self, where: str, thing: object) -> None:
        """Look at a thing that a host may print."""
        self._seen.append((where, text_of(thing)))

    def raised_by(self, where: str, call: Callable[[], object]) -> BaseException:
        """Call what must raise, and look at what it raises."""
        try:
            call()
        except Exception as error:
            self.show(where, error)
            return error
        raise AssertionError(f"{where}: nothing was raised")

    def leaks(self, *, of: str = ALL_CANARIES) -> list[tuple[str, str]]:
        """Where a canary was seen, and what was seen there."""
        return [(where, text) for where, text in self._all() if of in text]

    def unfit_lines(self) -> list[str]:
        """The records that are not one line of visible ASCII, or bring a traceback."""
        return [
            text
            for record in self.records
            if not (text := record.getMessage()).isascii()
            or not text.isprintable()
            or record.exc_info
            or record.exc_text
            or record.stack_info
        ]

    def messages(self) -> str:
        """All messages."""
        return "\n".join(record.getMessage() for record in self.records)

    def _all(self) -> Iterator[tuple[str, str]]:
        yield from self._seen
        formatter = logging.Formatter("%(name)s %(threadName)s %(message)s")
        for record in self.records:
            yield f"a record of {record.name}", formatter.format(record)
            for name, value in vars(record).items():
                yield f"{name} of a record of {record.name}", text_of(value)
                for part in _parts_of(value):
                    yield f"{name} of a record of {record.name}", text_of(part)


def _parts_of(value: Any) -> Iterable[object]:
    return islice(value, 100) if isinstance(value, (tuple, list)) else ()
