"""
The project's pages as tests see them: what a reader may copy, run or follow.

How blocks are marked is for readers, too:

* ``python`` runs, in order, in one namespace for each page; an ``output`` block after it is what it prints;
* ``python no-run`` doesn't run;
* a page with ``DATABASE_URL`` in it finds one in its environment: of a PostgreSQL database of its own;
* ``python`` with a caption is a file that the reader saves under that name;
* ``console`` shows commands and what they print. ``console stays``: the command goes on in another terminal. Without a
  command it shows what that one prints next. ``^\\`` is the key that ends the command there and then.

``...`` in an output stands for anything.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(p for p in sorted(DOCS.rglob("*.md")) if "_build" not in p.parts),
]

LIMIT = 20.0
"""Seconds a test waits for what must happen; none ever waits that long when all is well."""

_FENCE = re.compile(r"^(?P<fence>```+)(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"\{code-block\} (?P<language>\w+)")
_OPTIONS = re.compile(r"\A(?::[\w-]+:[^\n]*\n)+\n*")
_CAPTION = re.compile(r"^:caption: *(.+)$", re.MULTILINE)


@frozen
class Block:
    """
    A fenced block of a page.

    Attributes:
        kind: the words after the fence, such as ``python`` or ``console stays``.
        text: what is inside.
        line: where it begins in the page.
        caption: the name of the file it is, if any.
    """

    kind: str
    text: str
    line: int
    caption: str = ""


def blocks_of(page: Path) -> list[Block]:
    """Give all fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(source):
        kind, text, start = match["info"].strip(), match["text"], match.start("text")
        caption = ""
        if directive := _DIRECTIVE.fullmatch(kind):
            kind = directive["language"]
            if options := _OPTIONS.match(text):
                found = _CAPTION.search(options[0])
                caption = found[1].strip() if found else ""
                text, start = text[options.end() :], start + options.end()
        blocks.append(Block(kind, text, source.count("\n", 0, start), caption))
    return blocks


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def matches(expected: str, printed: str) -> bool:
    """Whether an output is what a page shows, line by line."""
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, printed.strip()) is not None


# What a shell runs in the background, tests perhaps, ignores these two signals, and so does all that is started there.
_AS_IN_A_TERMINAL = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
os.execvp("bash", ["bash", "-c", sys.argv[1]])
"""


class Command:
    """A command in a terminal, and what it prints."""

    def __init__(self, command: str, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _AS_IN_A_TERMINAL, f"exec {command}"],
            cwd=folder,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._seen: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # On some versions of SQLite each process begins with a word about it.
            if "SQLite 3." not in line:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for_line(self) -> None:
        """Wait until it has printed another line, which stays to be read."""
        if not self._seen and (line := self._lines.get(timeout=LIMIT)) is not None:
            self._seen.append(line)

    def next_line(self) -> str | None:
        """Give the next line it prints; ``None`` when it has ended."""
        return self._seen.pop() if self._seen else self._lines.get(timeout=LIMIT)

    def press_ctrl_backslash(self) -> None:
        self._process.send_signal(signal.SIGQUIT)

    def end(self) -> int:
        """Wait until it has ended, and say how."""
        return self._process.wait(timeout=LIMIT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
