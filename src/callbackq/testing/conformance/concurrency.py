"""Threads that begin at the same moment, and forked children that can be killed. Nothing here waits for ever."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar
from unittest import SkipTest

__all__ = ["Child", "race", "while_threads_run"]

_LIMIT_SECONDS: Final = 30.0
# Python refuses two threads that set their profile functions at a time, which an audit hook in the process lets happen.
_setting_profile: Final = threading.Lock()
_Result = TypeVar("_Result")


@contextmanager
def _switching_often() -> Iterator[None]:
    # A thread that gives way must wait for the next switch before it can go on: 5 ms each time by default.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _giving_way() -> Iterator[None]:
    """Let other threads go first at every tenth call or so that this thread makes, a hundred times."""
    left = 100

    def give_way(*_: object) -> None:
        # Left alone, a thread finishes most calls undisturbed: 30 rounds of a race on a store without a mutex showed
        # nothing. Giving way each time takes seconds, and at exactly every tenth call it may never be the one that
        # matters. A hundred times reach over a few calls of a store in memory; a slower store needs no such help.
        nonlocal left
        if left and random.random() < 0.1:  # noqa: S311 - no secret
            time.sleep(1e-6)
            left -= 1

    before = sys.getprofile()
    with _setting_profile:
        sys.setprofile(give_way)
    try:
        yield
    finally:
        with _setting_profile:
            sys.setprofile(before)


class _Runner(threading.Thread):
    """A thread that keeps what its function returned or raised."""

    def __init__(self, number: int, work: Callable[[], object]) -> None:
        super().__init__(name=f"callbackq-conformance-{number}", daemon=True)
        self._work = work
        self._has_begun = threading.Event()
        self.result: object = None
        self.error: BaseException | None = None

    def start(self) -> None:
        super().start()
        # One thread after another: Python can't begin to trace two at the same moment, as measuring coverage does.
        self._has_begun.wait(_LIMIT_SECONDS)

    def run(self) -> None:
        self._has_begun.set()
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error


def _join(threads: Sequence[_Runner]) -> None:
    deadline = time.monotonic() + _LIMIT_SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
        assert not thread.is_alive(), f"a call did not return within {_LIMIT_SECONDS:.0f} s"
    for thread in threads:
        if thread.error is not None:
            raise thread.error


def race(work: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """Run each function in a thread of its own, all at the same moment; return the results or raise the first error."""
    ready: list[None] = []

    def from_the_start(one: Callable[[], _Result]) -> Callable[[], _Result]:
        def run() -> _Result:
            ready.append(None)
            # Awake, not on a barrier: that wakes its threads one by one, and the first has done when the last begins.
            deadline = time.monotonic() + _LIMIT_SECONDS
            while len(ready) < len(work):
                assert time.monotonic() < deadline, "the threads of a race did not all begin"
            with _giving_way():
                return one()

        return run

    threads = [_Runner(number, from_the_start(one)) for number, one in enumerate(work)]
    with _switching_often():
        for thread in threads:
            thread.start()
        _join(threads)
    return [thread.result for thread in threads]  # type: ignore[misc]


@contextmanager
def while_threads_run(work: Callable[[], object], *, threads: int = 1) -> Iterator[None]:
    """Call *work* over and over in threads while the block runs, slowly; raise the first error."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            work()

    runners = [_Runner(number, run) for number in range(threads)]
    with _switching_often():
        for runner in runners:
            runner.start()
        try:
            with _giving_way():
                yield
        finally:
            over.set()
        _join(runners)


class Child:
    """
    A forked process that runs a function, tells its progress, and ends without running anything of its parent.

    Args:
        work: is given a function that tells the parent a byte.
    """

    def __init__(self, work: Callable[[Callable[[], None]], object]) -> None:
        if not hasattr(os, "fork"):
            raise SkipTest("this system has no fork")
        self._progress, progress = os.pipe()
        self._fault, fault = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 and newer warn of a fork beside threads, which is what some of these tests are about.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            try:
                work(lambda: _tell(progress))
            except BaseException:
                os.write(fault, traceback.format_exc().encode())
            finally:
                # Not sys.exit: the parent's test run must not go on in here.
                os._exit(0)
        os.close(progress)
        os.close(fault)

    def hear(self, times: int) -> None:
        """Wait until the child has told its progress so many times, or has ended."""
        for _ in range(times):
            if not self._read(self._progress, 1):
                return

    def kill(self) -> None:
        """Kill it, as ``kill -9`` does."""
        os.kill(self._pid, signal.SIGKILL)
        self._bury()

    def finish(self) -> None:
        """Wait until it has ended; raise what went wrong in it."""
        fault = b""
        while part := self._read(self._fault, 65536):
            fault += part
        self._bury()
        assert not fault, f"a call failed in a forked child: {fault.decode()}"

    def _read(self, pipe: int, size: int) -> bytes:
        readable, _, _ = select.select([pipe], [], [], _LIMIT_SECONDS)
        if not readable:
            self.kill()
            raise AssertionError(f"a call did not return within {_LIMIT_SECONDS:.0f} s in a forked child")
        return os.read(pipe, size)

    def _bury(self) -> None:
        os.waitpid(self._pid, 0)
        os.close(self._progress)
        os.close(self._fault)


def _tell(pipe: int) -> None:
    os.write(pipe, b".")
