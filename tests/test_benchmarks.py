"""What is said about speed is what was measured: pages, chart and JSON go together, and no benchmark is left out."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import urllib3

from support.pages import ROOT

BENCHMARKS = ROOT / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def module(name: str) -> Any:
    return importlib.import_module(name)


def results_of(speed: dict[str, float], peers: dict[str, float] | None = None) -> Any:
    """Give results with these ratios to raw urllib3."""
    figures, runs = module("figures"), module("runs")
    machine = runs.Machine(2, "cpu", "Linux", "3.11", "3.40", "18.4", "nginx")

    def run(ratios: dict[str, float]) -> Any:
        found = [figures.figure_of([value, value * 0.9, value * 1.1], name, "x raw") for name, value in ratios.items()]
        return runs.Run("2026-11-24", machine, (0.5, 1.5), found)

    return runs.Results(run(speed), run(peers) if peers else None)


# Figures.


@pytest.mark.parametrize(
    ("value", "target", "better", "met"),
    [
        (1.3, 1.3, "more", True),
        (1.2, 1.3, "more", False),
        (0.32, 0.32, "less", True),
        (0.33, 0.32, "less", False),
        (1.0, None, "more", None),
    ],
)
def test_figure_meets_its_target_or_not(value: float, target: float | None, better: str, met: bool | None) -> None:
    figure = module("figures").Figure("figure", value, "ms", target, better)

    assert figure.met is met


def test_figure_of_rounds_is_their_median_with_least_and_most() -> None:
    figure = module("figures").figure_of([3.0, 1.0, 2.0, 9.0, 2.5], "figure", "ms")

    assert (figure.value, figure.spread) == (2.5, (1.0, 9.0))


def test_results_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    runs = module("runs")
    results = results_of({"drain, one process, SQLite": 1.2}, {"huey": 0.3})
    file = tmp_path / "results.json"

    file.write_text(runs.dump(results), encoding="utf-8")

    assert runs.load(file) == results
    assert runs.dump(runs.load(file)) == file.read_text(encoding="utf-8")
    assert runs.load(tmp_path / "none.json") == runs.Results()


# The chart.


def test_chart_shows_drains_and_peers_as_long_as_they_are_fast_and_nothing_else() -> None:
    speed = {"drain, one process, SQLite": 1.2, "drain, two <processes>, SQLite": 1.6, "HTTPTransport": 2.9}

    svg = ElementTree.fromstring(module("chart").draw(results_of(speed, {"huey": 0.3, "callbackq": 1.5})))

    bars = [
        (bar.attrib["class"], float(bar.attrib["width"])) for bar in svg.iter(f"{SVG}rect") if "class" in bar.attrib
    ]
    assert [kind for kind, _ in bars] == ["raw", "callbackq", "callbackq", "raw", "peer", "callbackq"]
    raw = bars[0][1]
    assert [width / raw for _, width in bars] == pytest.approx([1, 1.2, 1.6, 1, 0.3, 1.5], abs=0.01)
    words = [text.text or "" for text in svg.iter(f"{SVG}text")]
    assert {"two <processes>, SQLite", "1.60", "huey", "0.30"} < set(words)
    assert not any("HTTPTransport" in word for word in words)


def test_chart_can_be_heard() -> None:
    svg = ElementTree.fromstring(module("chart").draw(results_of({"drain, one process, SQLite": 1.2})))
    told = {element.attrib["id"]: element.text or "" for element in svg if "id" in element.attrib}

    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-labelledby"].split() == list(told) == ["title", "desc"]
    assert "one process, SQLite 1.20" in told["desc"]


def test_chart_keeps_bars_and_words_inside() -> None:
    svg = ElementTree.fromstring(
        module("chart").draw(results_of({"drain, one process, SQLite": 7.3, "drain, two": 0.01}))
    )
    width, height = map(float, svg.attrib["viewBox"].split()[2:])

    for element in [*svg.iter(f"{SVG}rect"), *svg.iter(f"{SVG}text")]:
        right = float(element.attrib["x"]) + float(element.attrib.get("width", 0))
        assert 0 <= float(element.attrib["x"]) <= right < width
        assert 0 <= float(element.attrib["y"]) < height


# The pages.


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "publish.py"), "--check", "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_chart_page_and_readme_say_what_the_json_says() -> None:
    checked = check(ROOT)

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_pages_that_say_something_else_are_noticed(tmp_path: Path) -> None:
    publish = module("publish")
    for file in publish.JSON, publish.CHART, publish.PAGE, publish.README:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    results = json.loads((tmp_path / publish.JSON).read_text(encoding="utf-8"))
    for figure in results["speed"]["figures"]:
        figure["value"] *= 2
    (tmp_path / publish.JSON).write_text(json.dumps(results), encoding="utf-8")

    checked = check(tmp_path)

    assert checked.returncode == 1
    assert [line.split()[0] for line in checked.stdout.splitlines()] == [
        str(file) for file in (publish.JSON, publish.CHART, publish.PAGE, publish.README)
    ]


def test_results_hold_nothing_of_the_machine_but_what_figures_depend_on() -> None:
    publish = module("publish")
    text = (ROOT / publish.JSON).read_text(encoding="utf-8")

    for run in json.loads(text).values():
        assert set(run) == {"date", "machine", "load", "figures"}
        assert set(run["machine"]) == {"cores", "cpu", "system", "python", "sqlite", "postgresql", "receiver"}
    assert socket.gethostname() not in text
    assert re.findall(r"(?<![\w])/\w+/", text) == []


def test_no_two_figures_share_a_name() -> None:
    publish = module("publish")
    results = module("runs").load(ROOT / publish.JSON)

    for run in (results.speed, results.peers):
        names = [figure.name for figure in run.figures] if run else []
        assert len(set(names)) == len(names)


# The parts.


def test_every_benchmark_that_gives_figures_is_a_part_of_the_whole() -> None:
    gives_figures = {
        path.stem
        for path in BENCHMARKS.glob("*.py")
        if re.search(r"^def figures\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }

    assert {part.module for part in module("speed").PARTS} == gives_figures


# The receiver.


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("", id="python"),
        pytest.param(None, id="nginx", marks=pytest.mark.skipif(not shutil.which("nginx"), reason="not installed")),
    ],
)
@pytest.mark.parametrize("size", [0, 1024, 200_000])
def test_receiver_answers_all_requests_on_one_connection(
    path: str | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path is not None:
        monkeypatch.setenv("PATH", path)

    with module("receiver").receiver() as url, urllib3.PoolManager(timeout=10, retries=False) as pool:
        answers = [pool.request("POST", url, body=b"x" * size) for _ in range(30)]
        connections = pool.connection_from_url(url).num_connections

    assert {(answer.status, answer.data) for answer in answers} == {(200, b"ok")}
    assert connections == 1
