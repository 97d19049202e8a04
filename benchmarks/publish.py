"""
Writes what was measured into the pages: chart, table and the sentence of the README, all from the JSON.

    python benchmarks/publish.py [--check]

After a run that happens by itself; by hand it is of use when the words or the chart have changed. With --check it
writes nothing, and exits with 1 when a file differs from what it would write.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from textwrap import fill

import chart
import runs
from figures import Figure, number
from runs import Results, Run

ROOT = Path(__file__).parents[1]
JSON = Path("docs", "_static", "benchmarks.json")
CHART = Path("docs", "_static", "benchmarks.svg")
PAGE = Path("docs", "explanation", "speed.md")
README = Path("README.md")

WIDTH = 120
ONE_PROCESS = "drain, one process, SQLite"


def texts(results: Results, root: Path) -> dict[Path, str]:
    """Give what each file that tells of results must hold."""
    page, readme = (root / PAGE).read_text(encoding="utf-8"), (root / README).read_text(encoding="utf-8")
    if results.speed:
        page = _with_part(page, "speed", table(results.speed))
        readme = _with_part(readme, "speed", claim(results.speed))
    if results.peers:
        page = _with_part(page, "peers", table(results.peers))
    return {
        root / JSON: runs.dump(results),
        root / CHART: chart.draw(results),
        root / PAGE: page,
        root / README: readme,
    }


def _with_part(text: str, name: str, part: str) -> str:
    """Replace what stands between two comments."""
    begin, end = f"<!-- {name}: written by benchmarks/publish.py -->", f"<!-- end of {name} -->"
    replaced, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{part}\n\n{end}", text, flags=re.DOTALL
    )
    assert count == 1, f"it has no place for {name}"
    return replaced


def table(run: Run) -> str:
    """Write a run as a table in Markdown, with a sentence about the machine."""
    machine = run.machine
    about = (
        f"{run.date}, {machine.cores} cores ({machine.cpu}), {machine.system}, Python {machine.python}, "
        f"SQLite {machine.sqlite}, PostgreSQL {machine.postgresql}, receiver: {machine.receiver}. "
        f"Load {run.load[0]} when it began, {run.load[1]} when it ended."
    )
    rows = ["| what | median | | rounds | target |", "|---|--:|---|---|---|", *map(_row, run.figures)]
    return f"{fill(about, WIDTH)}\n\n" + "\n".join(rows)


def _row(figure: Figure) -> str:
    spread = f"{number(figure.spread[0])} – {number(figure.spread[1])}" if figure.spread else ""
    target = ""
    if figure.target is not None:
        bound = f"{'≥' if figure.better == 'more' else '≤'} {figure.target:,g}"
        target = f"{bound}: met" if figure.met else f"{bound}: **not met**"
    unit = figure.unit.replace("x ", "× ", 1) if figure.unit.startswith("x ") else figure.unit
    return f"| {figure.name} | {number(figure.value)} | {unit} | {spread} | {target} |"


def claim(run: Run) -> str:
    """Write what the README says, true whatever the figures are."""
    rate, ratio = run.value(f"{ONE_PROCESS}: rate"), run.value(ONE_PROCESS)
    cpu = run.value(f"{ONE_PROCESS}: CPU")
    return fill(
        f"On {run.machine.cores} cores, shared with the receiver and with other work (a load of {run.load[0]} before "
        f"it began), one process on a SQLite file delivered and recorded {number(rate)} callbacks a second: "
        f"{ratio:.2f} times what urllib3 sends in a loop that stores nothing. Each cost "
        f"{cpu:.2f} ms of processor time.",
        WIDTH,
    )


def write(results: Results, root: Path = ROOT) -> None:
    """Write all files; first the figures, which took longest to get."""
    (root / JSON).write_text(runs.dump(results), encoding="utf-8")
    for file, text in texts(results, root).items():
        file.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of the project")
    options = parser.parse_args()
    results = runs.load(options.root / JSON)
    if not options.check:
        write(results, options.root)
        return 0
    differing = [
        file for file, text in texts(results, options.root).items() if file.read_text(encoding="utf-8") != text
    ]
    for file in differing:
        print(f"{file.relative_to(options.root)} differs from what {JSON} says; run python benchmarks/publish.py")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
