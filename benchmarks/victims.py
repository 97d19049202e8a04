"""Dispatchers in processes of their own, to be killed, stopped and frozen."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import closing, suppress
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from attrs import frozen
from evidence import DEADLINE, Interruption

from callbackq import DataAccessError, Dispatcher, HTTPTransport, RetryPhase, TargetPolicy
from callbackq.events import EventKind, ObservedEvent, Observer

if TYPE_CHECKING:
    from collections.abc import Callable

    from stores import MakeStore, Store

CONCURRENCY = 16
RETRIES = (RetryPhase(retries=1000, delay=timedelta(milliseconds=20)),)
# A server that is away for a moment is asked again after so long.
REST_SECONDS = 0.05
_LONGEST_SECONDS = 60

PROCESSES = multiprocessing.get_context("forkserver")
"""Forked from a process that has imported everything and opened nothing: a new dispatcher costs milliseconds."""
PROCESSES.set_forkserver_preload(["callbackq", "callbackq.testing.history", "victims", "witness"])


class TellsWhenItWorks:
    """Says so after the first callback was locked: from then on a kill hits something."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._told = False

    def observe(self, event: ObservedEvent) -> None:
        if event.kind is EventKind.LOCKED and not self._told:
            self._told = True
            self._line.send("working")


def open_when_possible(make_store: MakeStore) -> Store:
    while True:
        store = make_store()
        try:
            store.open()
        except DataAccessError:
            store.close()
            time.sleep(REST_SECONDS)
        else:
            return store


def dispatch(store: Store, machine_name: str, lease: timedelta, observer: Observer, line: Connection) -> None:
    """Deliver until told to stop, or until whoever began it is gone (its end of the line closes)."""
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]), deadline=DEADLINE)
    with closing(transport):
        dispatcher = Dispatcher(
            store,
            machine_name=machine_name,
            transport=transport,
            concurrency=CONCURRENCY,
            host_concurrency=CONCURRENCY,
            lock_timeout=lease,
            poll_interval=timedelta(milliseconds=50),
            # Kills, not the callbacks, are what abandons these locks, again and again.
            max_abandoned=1_000_000,
            observer=observer,
        )
        signal.signal(signal.SIGTERM, lambda *_: dispatcher.request_stop())

        def wait_for_the_end() -> None:
            line.poll(None)
            dispatcher.request_stop()

        threading.Thread(target=wait_for_the_end, name="line", daemon=True).start()
        dispatcher.run()


def work(setting: Setting, machine_name: str, line: Connection) -> None:
    # Until there is a dispatcher that can stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    for name in ("callbackq", "psycopg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with open_when_possible(setting.make_store) as store:
        dispatch(store, machine_name, setting.lease, TellsWhenItWorks(line), line)


def let_orphans_go_on(line: Connection) -> None:
    """Let those who are frozen go on when whoever froze them is gone: they see then that their own lines are closed."""
    frozen: set[int] = set()
    with suppress(EOFError):
        while True:
            # Told when one is frozen, and again when it goes on.
            frozen ^= {line.recv()}
    for pid in frozen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@frozen
class Setting:
    """
    What all dispatchers of a run have in common.

    Attributes:
        make_store: makes the store, in any process.
        lease: how long a lock lives.
    """

    make_store: MakeStore
    lease: timedelta


class Worker:
    """
    A dispatcher's process, and our end of a line to it.

    Args:
        setting: what it shares with others.
        machine_name: its name.
        now: the store's clock.

    Attributes:
        was_at_work: when it was asked to stop, it had locked something.
    """

    def __init__(self, setting: Setting, machine_name: str, now: Callable[[], datetime]) -> None:
        self._now = now
        self.machine_name = machine_name
        self._line, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=work, args=(setting, machine_name, theirs))
        self._process.start()
        theirs.close()
        self._frozen_at: datetime | None = None
        self.was_at_work = False

    def works(self) -> bool:
        """Tell whether it has locked something, and isn't frozen."""
        return self._frozen_at is None and self._line.poll()

    def kill(self) -> Interruption:
        began = self._now()
        self._signal(signal.SIGKILL)
        self.join()
        return Interruption(began=began)

    def stop(self) -> None:
        """Ask it to stop. It is over when it `has_ended`."""
        self.was_at_work = self._line.poll()
        self._signal(signal.SIGTERM)

    def freeze(self) -> None:
        self._frozen_at = self._now()
        self._signal(signal.SIGSTOP)

    def thaw(self) -> Interruption:
        assert self._frozen_at is not None
        began, self._frozen_at = self._frozen_at, None
        # Before it goes on: afterwards another might be the next to be let run.
        thawed = Interruption(began=began, ended=self._now(), resumed=time.monotonic())
        self._signal(signal.SIGCONT)
        return thawed

    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def join(self) -> int:
        """Wait for its end, and give its exit code."""
        self._process.join(_LONGEST_SECONDS)
        assert not self._process.is_alive(), "a dispatcher doesn't end"
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        self._line.close()
        return code

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _signal(self, how: signal.Signals) -> None:
        assert self._process.is_alive(), "a dispatcher has ended by itself"
        os.kill(self.pid, how)
