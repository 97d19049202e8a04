"""``python -m callbackq``: the demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from callbackq.demo import run_demo, run_dispatcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="callbackq", description="Deliver HTTP callbacks durably and in order.")
    parser.add_argument("--version", action="version", version=f"callbackq {version('callbackq')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("demo", help="watch order and delivery survive failures and a killed dispatcher")
    # What the demo starts; no command for people, so it has no help.
    dispatcher = commands.add_parser("demo-dispatcher")
    dispatcher.add_argument("path", type=Path)
    dispatcher.add_argument("machine_name")
    chosen = parser.parse_args(arguments)
    if chosen.command == "demo-dispatcher":
        run_dispatcher(chosen.path, chosen.machine_name)
        return 0
    if chosen.command == "demo":
        return run_demo()
    parser.print_help(sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
