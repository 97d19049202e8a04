"""The proof on each Python: which interpreters it finds, and what it says when one is missing or fails."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = "{}.{}".format(*sys.version_info[:2])


@pytest.fixture
def pythons(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module("pythons")
    monkeypatch.setattr(module, "candidates", lambda version: iter([Path("/no/such"), Path(sys.executable)]))
    return module


def said_and_status(
    pythons: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *versions: str
) -> tuple[list[str], int]:
    monkeypatch.setattr(sys, "argv", ["pythons.py", "--versions", *versions])
    status: int = pythons.main()
    return capsys.readouterr().out.splitlines(), status


def test_what_does_not_work_or_is_another_version_is_passed_over(pythons: ModuleType) -> None:
    found = pythons.find(OURS)

    assert found[:2] == (Path(sys.executable), platform.python_version())
    assert pythons.find("3.1") is None


def test_a_missing_python_has_its_line_and_does_no_harm_beside_one_that_passes(
    pythons: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pythons, "prove", lambda interpreter, folder, seeds: f"{seeds} seeds")

    lines, status = said_and_status(pythons, monkeypatch, capsys, OURS, "3.1")

    assert "1000 seeds" in lines[0]
    assert (lines[1], status) == ("python3.1: not on this machine", 0)


def test_without_any_python_or_with_one_that_fails_the_proof_fails(
    pythons: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> str:
        pythons.run([sys.executable, "-c", "raise SystemExit('why')"], seconds=30)
        raise AssertionError

    monkeypatch.setattr(pythons, "prove", fail)

    assert said_and_status(pythons, monkeypatch, capsys, "3.1")[1] == 1
    assert said_and_status(pythons, monkeypatch, capsys, OURS)[1] == 1
