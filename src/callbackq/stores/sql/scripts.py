"""
SQL kept in files: named statements and numbered migrations.

A file is a row of blocks. Each begins with a heading line, ``-- name: due_heads`` or ``-- migration: 1``; comments
below it explain the block and are dropped here. Python only binds values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

__all__ = ["load_migrations", "load_statements"]

_HEADING = re.compile(r"^-- (name|migration): (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"^[ \t]*--.*\n?", re.MULTILINE)
_END = re.compile(r";[ \t]*$", re.MULTILINE)


def load_statements(package: str, file: str) -> dict[str, str]:
    """Read the named statements of a package's file: name to SQL."""
    statements: dict[str, str] = {}
    for name, (statement,) in _blocks(package, file, "name"):
        if name in statements:
            raise ValueError(f"{file}: the name {name} appears twice")
        statements[name] = statement
    return statements


def load_migrations(package: str, file: str) -> tuple[tuple[str, ...], ...]:
    """Read the migrations of a package's file: entry n - 1 holds the statements that lead to version n."""
    migrations = list(_blocks(package, file, "migration"))
    if [number for number, _ in migrations] != [str(number + 1) for number in range(len(migrations))]:
        raise ValueError(f"{file}: migrations must be numbered 1, 2, 3 …")
    return tuple(statements for _, statements in migrations)


def _blocks(package: str, file: str, kind: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    text = files(package).joinpath(file).read_text(encoding="utf-8")
    _, *parts = _HEADING.split(text)
    for found, name, block in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if found != kind:
            raise ValueError(f"{file}: {name} is a {found}, not a {kind}")
        yield name, tuple(part.strip() for part in _END.split(_COMMENT.sub("", block)) if part.strip())
