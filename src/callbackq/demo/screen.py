"""What the demo prints: lines, a progress bar on a terminal, a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Final

__all__ = ["Screen"]

_WIDTH: Final = 40
_BOLD, _GREEN, _RED, _DIM, _RESET = "\x1b[1m", "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[0m"
_SECONDS_BETWEEN_LINES: Final = 1.0


class Screen:
    """
    Prints to standard output.

    Args:
        colour: whether to use colours and to redraw the progress bar in place; as the terminal allows by default.
    """

    def __init__(self, *, colour: bool | None = None) -> None:
        self._terminal = sys.stdout.isatty() if colour is None else colour
        self._drawn = False
        self._next_line_at = 0.0

    def say(self, text: str) -> None:
        self.end_progress()
        print(text, flush=True)

    def progress(self, done: int, total: int) -> None:
        bar = "█" * (_WIDTH * done // total)
        line = f"  {bar:░<{_WIDTH}} {done:>4} of {total} accepted"
        if self._terminal:
            print(f"\r{line}", end="", flush=True)
            self._drawn = True
        elif time.monotonic() >= self._next_line_at:
            # Into a file or a pipe: a line now and then.
            print(line, flush=True)
            self._next_line_at = time.monotonic() + _SECONDS_BETWEEN_LINES

    def end_progress(self) -> None:
        if self._drawn:
            print(flush=True)
            self._drawn = False

    def table(self, rows: Sequence[tuple[str, str, str]]) -> None:
        self.end_progress()
        names, figures = (max(len(row[column]) for row in rows) for column in (0, 1))
        print()
        for name, figure, remark in rows:
            print(f"  {name:<{names}}  {self._in(_BOLD, f'{figure:>{figures}}')}  {self._in(_DIM, remark)}".rstrip())
        print(flush=True)

    def good(self, text: str) -> None:
        print(self._in(_GREEN, f"✔ {text}"), flush=True)

    def bad(self, text: str) -> None:
        print(self._in(_RED, f"✘ {text}"), flush=True)

    def _in(self, style: str, text: str) -> str:
        return f"{style}{text}{_RESET}" if self._terminal and text else text
