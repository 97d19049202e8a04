"""The imports between our own modules point one way, and the core stays pure."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import callbackq

SOURCE = Path(callbackq.__file__).parent

# A module may import only from modules of a lower rank. A folder's entry stands for all its files.
RANKS = {
    "errors": 0,
    "clock": 0,
    "core.addresses": 0,
    "core.url": 1,
    "core.jsontext": 1,
    "core.validation": 2,
    "core.documents": 3,
    "core.models": 3,
    "core.targets": 3,
    "core.limits": 4,
    "core.retry": 4,
    "core.verdict": 4,
    "core.planning": 4,
    "core.delivery": 4,
    "core.fairness": 0,
    "core.failure_email": 4,
    "core.exchange": 4,
    "core.tunnel": 5,
    "core.lifecycle": 5,
    "arguments": 6,
    "codec": 5,
    "signing": 5,
    "dataaccess": 7,
    "events": 7,
    "faultlog": 7,
    "notifier": 7,
    "targets": 7,
    "transport": 8,
    "stores": 8,
    "outbox": 8,
    "settings": 7,
    "judging": 8,
    "reporting": 8,
    "recorder": 9,
    "engine": 10,
    "draining": 11,
    "dispatcher": 12,
    "testing": 13,
    "demo": 14,
    "__main__": 15,
    "__init__": 16,
}

PURE = ("errors", "core.", "codec", "signing")
IMPURE_MODULES = {
    "logging",
    "os",
    "pathlib",
    "random",
    "secrets",
    "selectors",
    "smtplib",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "threading",
    "time",
    "urllib3",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def rank_of(module: str) -> int | None:
    """The rank of the longest entry the module falls under; None for a package that only holds others."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (rank := RANKS.get(".".join(parts[:end]))) is not None:
            return rank
    return None


def same_entry(one: str, other: str) -> bool:
    folder = one.split(".")[0]
    return folder == other.split(".")[0] and folder in RANKS


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if (SOURCE.parent / (name.replace(".", "/") + ".py")).exists()}
            found |= submodules or {node.module}
    return found


ALL = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", ALL, ids=module_name)
def test_imports_point_from_higher_to_lower_ranks(path: Path) -> None:
    module = module_name(path)
    if module == "core":
        return
    rank = rank_of(module)
    assert rank is not None, f"{module} has no rank: add it to the table"

    for imported in imports_of(path):
        if not imported.startswith("callbackq"):
            continue
        target = imported.removeprefix("callbackq").lstrip(".") or "__init__"
        target_rank = rank_of(target)
        assert target_rank is not None, f"{target} has no rank"
        assert target_rank < rank or same_entry(module, target), f"{module} must not import {target}"


@pytest.mark.parametrize("path", ALL, ids=module_name)
def test_the_core_reads_no_clock_chance_file_or_socket(path: Path) -> None:
    module = module_name(path)
    if module.startswith(PURE):
        assert not {name.split(".")[0] for name in imports_of(path)} & IMPURE_MODULES


def test_the_dispatcher_knows_no_store() -> None:
    assert not [name for name in imports_of(SOURCE / "dispatcher.py") if "stores" in name]


def test_importing_callbackq_needs_the_four_core_packages_only() -> None:
    # The first needs hypothesis, says so, and nothing imports it; the second is imported when there is a key for it.
    # The store on PostgreSQL is imported by those who use it.
    paths = [path for path in ALL if module_name(path) not in ("testing.stateful", "signing.ed25519")]
    paths = [path for path in paths if not module_name(path).startswith("stores.postgres")]
    third_party = {name.split(".")[0] for path in paths for name in imports_of(path)} - {"callbackq"}

    assert third_party - set(sys.stdlib_module_names) <= {"attrs", "attr", "cattrs", "urllib3", "tenacity"}
