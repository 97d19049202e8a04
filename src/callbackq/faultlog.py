"""
What the log says of an exception: what it was and where it was raised, never what a stranger's text says.

The text of an exception that isn't ours may quote anything: the URL that was parsed, the password of a connection,
a row. So no log line of callbackq holds it, nor a traceback, which would print it together with its causes, its notes
and lines of the host's source. Our own exceptions promise to quote no values, so their texts are logged, escaped.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from itertools import islice
from typing import Final

from callbackq.errors import CallbackqError

__all__ = ["in_words", "log_fault"]

_MOST_PLACES: Final = 12
_MOST_CAUSES: Final = 5


def log_fault(logger: logging.Logger, what: str, error: BaseException, *, level: int = logging.ERROR) -> None:
    """
    Log a fault in one line of visible ASCII, if there is memory for one.

    Args:
        logger: where to.
        what: what failed, in our words; ids in it must have been escaped.
        error: what was raised.
        level: how bad it is.
    """
    try:
        logger.log(level, "%s: %s", what, in_words(error))
    except MemoryError:
        # Whoever logs is surviving a fault, often this very one, and what it has in hand must not be lost over a line.
        return


def in_words(error: BaseException) -> str:
    """Name an exception, the places it came by (the innermost first), and the exceptions behind it."""
    return ", after ".join(_one_in_words(one) for one in islice(_chain(error), _MOST_CAUSES))


def _one_in_words(error: BaseException) -> str:
    words = [_visible(type(error).__name__)]
    if isinstance(error, CallbackqError):
        words.append(_text_of(error))
    if places := ", ".join(_places(error)):
        words.append(f"at {places}")
    return " ".join(words)


def _text_of(error: CallbackqError) -> str:
    try:
        return ascii(str(error))
    except Exception:
        # A subclass of the host's. Whoever logs is in the middle of surviving a fault, and must not meet another.
        return "(its text can't be read)"


def _places(error: BaseException) -> Iterator[str]:
    frames = list(traceback.walk_tb(error.__traceback__))
    for frame, line in frames[: -_MOST_PLACES - 1 : -1]:
        yield _visible(f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those a traceback would show with it. May go round for ever."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _visible(text: str) -> str:
    """Escape what can't stand in a line of visible ASCII. (``ascii()`` puts quotes around it.)"""
    return ascii(text)[1:-1]
