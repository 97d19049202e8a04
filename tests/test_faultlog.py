"""An exception in the log: what it was and where it was raised, in one harmless line that quotes nobody."""

from __future__ import annotations

import logging

import pytest

from callbackq.errors import CallbackqError, DataAccessError
from callbackq.faultlog import in_words, log_fault
from support.canaries import ALL_CANARIES, canary, leaky


def caught(error: BaseException) -> BaseException:
    """The exception after it was raised, two functions deep."""

    def inner() -> None:
        raise error

    try:
        inner()
    except BaseException as raised:
        return raised
    raise AssertionError


def test_an_exception_is_named_with_the_places_it_came_by_the_innermost_first() -> None:
    words = in_words(caught(RuntimeError()))

    assert words.startswith(f"RuntimeError at {__file__}:")
    assert words.index(" in inner, ") < words.index(" in caught")


def test_only_the_types_of_others_are_told_along_the_whole_chain() -> None:
    words = in_words(caught(leaky(OSError)))

    assert [part.split(" ")[0] for part in words.split(", after ")] == ["OSError", "ValueError", "KeyError"]
    assert ALL_CANARIES not in words


def test_what_a_traceback_would_not_show_is_not_told() -> None:
    error = ValueError()
    error.__context__ = KeyError()
    error.__suppress_context__ = True

    assert in_words(error) == "ValueError"


def test_our_own_texts_are_told_escaped() -> None:
    error = DataAccessError("the file \u202e\r\nis full")
    error.__cause__ = OSError(canary("text"))

    assert in_words(error) == r"DataAccessError 'the file \u202e\r\nis full', after OSError"


def test_an_error_whose_text_raises_is_told_all_the_same() -> None:
    class Unspeakable(CallbackqError):
        def __str__(self) -> str:
            raise RuntimeError

    assert in_words(Unspeakable()) == "Unspeakable (its text can't be read)"


def test_chains_and_stacks_without_end_make_a_line_of_bearable_length() -> None:
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first

    def deeper() -> None:
        deeper()

    try:
        deeper()
    except RecursionError as error:
        first.__cause__.__cause__ = error
        error.__cause__ = first

    assert len(in_words(first)) < 5000


def test_names_that_python_takes_and_a_terminal_obeys_are_escaped(caplog: pytest.LogCaptureFixture) -> None:
    kind = type("Fehler\u202e\x1b[31m\n", (Exception,), {})

    log_fault(logging.getLogger("callbackq"), "it failed", caught(kind()), level=logging.WARNING)

    (record,) = caplog.records
    assert record.getMessage().startswith(r"it failed: Fehler\u202e\x1b[31m\n at ")
    assert record.getMessage().isprintable()
    assert (record.levelno, record.exc_info, record.stack_info) == (logging.WARNING, None, None)


def test_a_line_that_there_is_no_memory_for_is_left_out() -> None:
    class Starved(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise MemoryError

    logger = logging.Logger("starved")
    logger.addHandler(Starved())

    log_fault(logger, "it failed", caught(MemoryError()))
