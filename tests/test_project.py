"""What the project says of itself: metadata, changelog, contributors' pages, make targets."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from datetime import date
from importlib.metadata import metadata, requires
from itertools import pairwise
from pathlib import Path

import pytest

import callbackq
from support.pages import PAGES, ROOT, blocks_of, name_of
from test_architecture import RANKS

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


# The package.


def test_core_needs_four_packages_and_no_more() -> None:
    core = [requirement for requirement in requires("callbackq") or [] if "extra ==" not in requirement]

    assert sorted(re.split(r"[<>=!~ ]", name)[0] for name in core) == ["attrs", "cattrs", "tenacity", "urllib3"]


def test_package_says_what_it_is_and_under_which_licence() -> None:
    package = metadata("callbackq")

    assert package["License-Expression"] == "MIT"
    assert package["Requires-Python"] == ">=3.11"
    assert package["Description-Content-Type"] == "text/markdown"
    assert package["Summary"].rstrip(".") in README


def test_package_is_typed_and_carries_its_sql() -> None:
    package = Path(callbackq.__file__).parent

    assert (package / "py.typed").exists()
    assert list((package / "stores" / "sqlite").glob("*.sql"))


# The two commands of the README, which .ci/run and newcomers rely on.


def test_readme_has_the_two_commands() -> None:
    commands = [block.text.strip() for block in blocks_of(ROOT / "README.md") if block.kind == "sh"]

    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/python -m callbackq demo" in commands
    assert (
        ".venv/bin/pip install -U pip && .venv/bin/pip install -e . --group dev && .venv/bin/python -m pytest -n 2"
        in commands
    )


def test_dev_group_holds_all_other_groups() -> None:
    groups = PYPROJECT["dependency-groups"]
    included = {entry["include-group"] for entry in groups["dev"]}

    assert included == set(groups) - {"dev"}


# The changelog.

RELEASE = re.compile(r"^## \[(?P<version>[^]]+)\](?: - (?P<date>\S+))?$", re.MULTILINE)
KINDS = ["Security", "Added", "Changed", "Deprecated", "Removed", "Fixed", "Known limits"]


def releases() -> list[tuple[str, str | None, str]]:
    """Give version, date and text of each entry of the changelog, newest first."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = list(RELEASE.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [(match["version"], match["date"], text[match.end() : end]) for match, end in zip(found, ends, strict=True)]


def test_changelog_begins_with_what_is_unreleased() -> None:
    version, day, _ = releases()[0]

    assert (version, day) == ("Unreleased", None)


def test_every_release_has_a_version_a_date_and_known_sections_security_first() -> None:
    for version, day, text in releases():
        assert version == "Unreleased" or re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert version == "Unreleased" or date.fromisoformat(day or "")
        sections = re.findall(r"^### (.+)$", text, re.MULTILINE)
        assert sections == sorted(sections, key=KINDS.index), f"{version}: order the sections as {KINDS}"
        assert len(set(sections)) == len(sections)


def test_releases_stand_newest_first_and_the_package_has_the_newest_version() -> None:
    versions = [tuple(map(int, version.split("."))) for version, _, _ in releases()[1:]]

    assert versions == sorted(versions, reverse=True)
    if versions:
        assert ".".join(map(str, versions[0])) == PYPROJECT["project"]["version"]


# Contributors' pages.


def test_contributors_are_told_the_ranks_that_the_architecture_test_holds() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    groups = [re.findall(r"`([\w.*]+)`", line) for line in re.findall(r"^\d\. (`errors`.*|`.*`)$", text, re.MULTILINE)]
    ranks = [[rank for module, rank in RANKS.items() if stands_for(names, module)] for names in groups]

    assert sorted(rank for group in ranks for rank in group) == sorted(RANKS.values())
    assert all(max(lower) < min(higher) for lower, higher in pairwise(ranks))


def stands_for(names: list[str], module: str) -> bool:
    return module in names or (module.startswith("core.") and "core.*" in names)


def targets() -> dict[str, str]:
    """Give each make target with what is said of it."""
    return dict(re.findall(r"^([a-z-]+):[^=\n]*?(?:## +(.+))?$", MAKEFILE, re.MULTILINE))


def test_make_alone_lists_every_target() -> None:
    # As if typed by hand, also when it is make that runs the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    listed = subprocess.run(
        ["make"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=10, check=True
    ).stdout

    assert [line.split(maxsplit=1)[0] for line in listed.splitlines()] == list(targets())
    assert all(targets().values()), "every target says what it does, behind ##"


def test_targets_that_pages_name_exist() -> None:
    named = {
        name
        for page in PAGES
        for block in blocks_of(page)
        for name in re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE)
    } | {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert "check" in named

    assert named - set(targets()) == set()


def test_scripts_that_make_runs_exist() -> None:
    scripts = re.findall(r"\$\(PYTHON\) (\S+\.py)", MAKEFILE)
    assert scripts

    assert [script for script in scripts if not (ROOT / script).exists()] == []


# What must not stand in any page.


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=name_of)
def test_pages_hold_nothing_of_the_machine_they_were_written_on(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    assert re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|opt)/\S*", text) == []
    assert re.findall(r"\b(?:TODO|FIXME|XXX)\b", text) == []
