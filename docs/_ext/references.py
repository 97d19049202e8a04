"""
Finds what docstrings name.

The public names are documented as part of ``callbackq``, but live in modules below it, and docstrings use the short
ones. A name is looked for among everything documented, then among everything that can be imported (shown without a
link). What is neither is a mistake, and Sphinx says so.
"""

from __future__ import annotations

import builtins
import collections.abc
import datetime
import importlib
import pkgutil
import socket
import ssl
import types
import typing
from functools import cache
from typing import Any

from docutils import nodes

import callbackq

_STANDARD = (builtins, collections.abc, datetime, types, typing, socket, ssl)


def resolve(app: Any, env: Any, node: Any, content: nodes.Element) -> nodes.Node | None:
    """Answer Sphinx's event ``missing-reference``."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].lstrip(".")
    domain = env.get_domain("py")
    found = [full for full in domain.objects if f".{full}".endswith(f".{name}")] or _documented_elsewhere(domain, name)
    if len(found) == 1:
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)
    scope = _import(".".join(filter(None, (node.get("py:module"), node.get("py:class")))))
    return content if _has(scope, name) or exists(name) else None


def _documented_elsewhere(domain: Any, name: str) -> list[str]:
    """What is documented under another module than the one it is named after."""
    value = _import(name)
    last = name.rpartition(".")[2]
    return [
        full for full in domain.objects if full.endswith(f".{last}") and value is not None and _import(full) is value
    ]


def exists(name: str) -> bool:
    """Whether a name is something of the standard library, or anywhere in callbackq."""
    if _import(name) is not None:
        return True
    first, _, rest = name.partition(".")
    if any(hasattr(module, first) for module in _STANDARD):
        return True
    return any(_has(value, rest) for value in _values_named(first))


def _has(value: object, path: str) -> bool:
    for part in filter(None, path.split(".")):
        annotations = getattr(value, "__annotations__", {})
        if not hasattr(value, part):
            return part in annotations
        value = getattr(value, part)
    return True


def _import(name: str) -> object:
    """What a dotted name stands for; None for nothing."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            value = getattr(value, part, None)
        return value
    return None


def _values_named(name: str) -> list[object]:
    return [vars(module)[name] for module in _modules() if name in vars(module)]


@cache
def _modules() -> list[types.ModuleType]:
    names = (info.name for info in pkgutil.walk_packages(callbackq.__path__, "callbackq."))
    return [callbackq, *(importlib.import_module(name) for name in names if not name.endswith("__main__"))]


def setup(app: Any) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
