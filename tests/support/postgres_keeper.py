"""
Keeps servers from outliving the tests, however those end: run by the tests, which hold the other end of its input.

It reads one JSON list a line (a file for the output, a program, arguments), runs that, and prints ``started PID``; and
``ended PID`` once the program and everything it forked are gone. When its input ends, because the tests closed it or
because they were killed, it stops what still runs and removes the folders. So an orderly end of the tests and their
being killed take the same way.

Arguments: the user to run programs as (empty: whoever runs this), the folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_PATIENCE_SECONDS = 10.0
_IPC_RMID = 0


class Keeper:
    def __init__(self, user: str, folders: list[Path]) -> None:
        self._folders = folders
        self._rights = rights_of(user)
        # The second line of defence, where there is one: if somebody kills this process, too, its servers quit.
        setpriv = shutil.which("setpriv")
        self._front = [setpriv, "--pdeathsig", "QUIT"] if setpriv else []
        self._printing = threading.Lock()
        self._running: dict[subprocess.Popen[bytes], threading.Thread] = {}

    def start(self, program: list[str], log: Path) -> None:
        # The program and what it forks hold the only ends for writing, so reading ends when the last of them has ended.
        alive, held = os.pipe()
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self._front, *program],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[held],
                cwd="/",
                **self._rights,
            )
        os.close(held)
        waiter = threading.Thread(target=self._await_end, args=(process, alive), daemon=True)
        self._running[process] = waiter
        self._say(f"started {process.pid}")
        waiter.start()

    def _await_end(self, process: subprocess.Popen[bytes], alive: int) -> None:
        os.read(alive, 1)
        os.close(alive)
        process.wait()
        self._say(f"ended {process.pid}")

    def _say(self, line: str) -> None:
        # Whom it would tell may have been killed.
        with self._printing, contextlib.suppress(BrokenPipeError):
            print(line, flush=True)

    def end(self) -> None:
        # PostgreSQL's "immediate shutdown": it takes down its children and its shared memory, and writes nothing more.
        for sent in (signal.SIGQUIT, signal.SIGKILL):
            for process in self._running:
                process.send_signal(sent)  # does nothing to one that has ended
            for waiter in self._running.values():
                waiter.join(_PATIENCE_SECONDS)
        for folder in self._folders:
            for leftover in folder.glob("*/data/postmaster.pid"):
                _free_shared_memory(leftover)
            shutil.rmtree(folder, ignore_errors=True)


def rights_of(user: str) -> dict[str, Any]:
    """Give what ``subprocess`` needs to run something as *user*, with no more rights than that one has."""
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


def _free_shared_memory(lock_file: Path) -> None:
    """A server that was killed, and not started again, leaves a segment behind. Its lock file says which."""
    lines = lock_file.read_text().splitlines()
    if len(lines) > 6 and len(words := lines[6].split()) == 2:
        ctypes.CDLL(None).shmctl(int(words[1]), _IPC_RMID, None)


def main() -> None:
    # It goes when the tests have gone, not before. (No SIG_IGN: servers would inherit that.)
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sent, lambda *_: None)
    keeper = Keeper(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
    for line in sys.stdin:
        log, *program = json.loads(line)
        keeper.start(program, Path(log))
    keeper.end()


if __name__ == "__main__":
    main()
