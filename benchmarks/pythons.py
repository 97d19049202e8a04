"""
Does callbackq keep its promises on every Python that it promises to run on?

    python benchmarks/pythons.py
    python benchmarks/pythons.py --versions 3.13 --seeds 10000

For each version that is on this machine, on the path or among pyenv's: a virtual environment in a temporary folder, the
project installed into it with what its tests need, then the simulator, and the tests of the core, the dispatcher,
hosts and a machine that runs out of something. Prints a line for each version, also for those that are not there;
exits 0 only if there was one, and all passed on each.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
TESTS = (
    "tests/core",
    "tests/dispatcher",
    "tests/system/test_host_processes.py",
    "tests/system/test_resource_faults.py",
)
INSTALL_SECONDS = 900
RUN_SECONDS = 1800
ASKS = "import platform, ssl, sqlite3, venv; print(platform.python_version(), sqlite3.sqlite_version)"


class FailedError(Exception):
    """What was run has failed; the message is the end of what it said."""


def candidates(version: str) -> Iterator[Path]:
    """Give what may be an interpreter of this version."""
    if on_path := shutil.which(f"python{version}"):
        yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    # The newest first: 3.12.10 comes after 3.12.9.
    folders = sorted(
        pyenv.glob(f"versions/{version}.*"), key=lambda one: [int(n) for n in re.findall(r"\d+", one.name)]
    )
    yield from (folder / "bin" / "python" for folder in reversed(folders))


def find(version: str) -> tuple[Path, str, str] | None:
    """Give an interpreter that works, its whole version and that of its SQLite."""
    for path in candidates(version):
        try:
            asked = subprocess.run([path, "-c", ASKS], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if asked.returncode == 0 and asked.stdout.startswith(f"{version}."):
            whole, sqlite = asked.stdout.split()
            return path, whole, sqlite
    return None


def run(command: list[object], *, seconds: float) -> str:
    """Run a command to its end, on the installed package and not on the source beside it; give what it said last."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise FailedError(f"{' '.join(words)}\n{done.stdout[-6000:]}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


def prove(interpreter: Path, folder: Path, seeds: int) -> str:
    """Install and run all on one interpreter. Give what came of it, in some words."""
    run([interpreter, "-m", "venv", folder], seconds=INSTALL_SECONDS)
    python = folder / "bin" / "python"
    # Groups of dependencies are newer than the pip that comes with some of them.
    run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], seconds=INSTALL_SECONDS)
    run([python, "-m", "pip", "install", "--quiet", ROOT, "--group", "tests"], seconds=INSTALL_SECONDS)
    simulated = run([python, "-m", "callbackq.testing.simulation", "--seeds", seeds], seconds=RUN_SECONDS)
    tested = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], seconds=RUN_SECONDS)
    schedules = re.match(r"[\d,]+ schedules", simulated)
    outcome = re.search(r"\d+ passed(, \d+ skipped)?", tested)
    if schedules is None or outcome is None:
        raise FailedError(f"{simulated}\n{tested}")
    return f"{schedules[0]} broke no promise, {outcome[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--seeds", type=int, default=1000, help="simulated worlds for each")
    options = parser.parse_args()
    tried = failed = 0
    for version in options.versions:
        found = find(version)
        if found is None:
            print(f"python{version}: not on this machine", flush=True)
            continue
        interpreter, whole, sqlite = found
        tried += 1
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="callbackq-python-") as folder:
            try:
                said = prove(interpreter, Path(folder), options.seeds)
            except (FailedError, subprocess.TimeoutExpired) as error:
                failed += 1
                said = "FAILED"
                print(error, file=sys.stderr, flush=True)
        took = time.monotonic() - began
        print(f"python{version}: {whole}, SQLite {sqlite}: {said}; {took:.0f} s", flush=True)
    return 0 if tried and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
