"""What a call costs, counted instead of timed: the same on every machine, however busy it is."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from attrs import define, field

__all__ = ["Work", "work_of"]


@define
class Work:
    """
    What one call did in this thread.

    Attributes:
        steps: lines begun and functions entered, each with the characters of all text in its sight: an upper bound for
            what one line can do with text by slicing, searching, copying or converting it, as long as what it calls is
            linear. (What the interpreter does within one operator, such as ``in`` with a long list, isn't seen.)
        longest_searched: by pattern, the longest text in sight of a line that searched with it. A regular expression
            may be anything but linear, which nothing outside can see: so short texts only, unless it was looked at.
    """

    steps: int = 0
    longest_searched: dict[str, int] = field(factory=dict)

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        if event in ("call", "line"):
            self.steps += 1 + _characters_in_sight(frame)
        return self.trace

    def profile(self, frame: FrameType, event: str, what: Any) -> None:
        pattern = getattr(what, "__self__", None)
        if event == "c_call" and isinstance(pattern, re.Pattern):
            text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
            longest = self.longest_searched.get(text, 0)
            self.longest_searched[text] = max(longest, _characters_in_sight(frame))


def work_of(call: Callable[[], object]) -> Work:
    """Count what *call* does."""
    work = Work()
    # Whoever measures coverage traces too; it goes on afterwards.
    tracer, profiler = sys.gettrace(), sys.getprofile()
    # Whoever is told of each collection (pytest's plugins are) would be counted, too.
    gc.disable()
    sys.setprofile(work.profile)
    sys.settrace(work.trace)
    try:
        call()
    finally:
        sys.settrace(tracer)
        sys.setprofile(profiler)
        gc.enable()
    return work


def _characters_in_sight(frame: FrameType) -> int:
    return sum(len(value) for value in frame.f_locals.values() if isinstance(value, (str, bytes, bytearray)))
