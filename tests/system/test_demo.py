"""``python -m callbackq demo``, run as a newcomer runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from attrs import evolve

from callbackq.demo.screen import Screen
from callbackq.demo.show import show
from callbackq.testing.history import Judgement, Violation

pytestmark = pytest.mark.system


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "callbackq", *arguments], capture_output=True, text=True, timeout=50, check=False
    )


def test_the_demo_kills_a_dispatcher_and_every_promise_holds() -> None:
    finished = run("demo")

    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    assert "Killed alpha (SIGKILL) while it held locks" in finished.stdout
    assert "queues in order              24 of 24" in finished.stdout
    assert "Every promise held" in finished.stdout


def test_a_broken_promise_is_named_and_makes_the_exit_code_non_zero(capsys: pytest.CaptureFixture[str]) -> None:
    judgement = Judgement(
        callbacks=1,
        arrivals=3,
        takeovers=0,
        duplicates=2,
        duplicates_bound=1,
        violations=[Violation(rule="duplicates", callback_id="", detail="2 second acceptances, 1 allowed")],
    )

    code = show(Screen(colour=False), judgement, [], killed=True, in_flight=1, seconds=1.0)

    assert code == 1
    assert "✘ duplicates: broken 1 times" in capsys.readouterr().out
    assert evolve(judgement, violations=[]).ok


def test_the_version_is_told() -> None:
    from importlib.metadata import version

    assert run("--version").stdout == f"callbackq {version('callbackq')}\n"


def test_a_missing_command_is_explained() -> None:
    finished = run()

    assert finished.returncode == 2
    assert "demo" in finished.stderr
