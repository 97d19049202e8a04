"""
Reads docstrings in Google's style (Args, Attributes, Returns, Raises).

Napoleon does it, but by itself it also takes the colon in an attribute's docstring for the end of a type; in ours it is
just a colon. Signatures are shown as they are meant, not as they are implemented.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

import attrs
from sphinx.ext.napoleon import Config, GoogleDocstring


def process(app: Any, what: str, name: str, value: object, options: Any, lines: list[str]) -> None:
    """Answer autodoc's event ``autodoc-process-docstring``."""
    if what not in ("attribute", "property"):
        config = Config(napoleon_use_ivar=True, napoleon_use_rtype=False)
        lines[:] = GoogleDocstring(list(lines), config, app, what, name, value, options).lines()


def tidy_signature(
    app: Any, what: str, name: str, value: Any, options: Any, arguments: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Answer autodoc's event ``autodoc-process-signature``: leave away what says nothing to a reader."""
    if what == "class" and (issubclass(value, Enum) or getattr(value, "_is_protocol", False)):
        return "", None
    if arguments is None:
        return None

    def default_of(match: re.Match[str]) -> str:
        return repr(attrs.fields_dict(value)[match[1]].default).removeprefix("datetime.")

    # attrs' words for a default, and for one that is made anew each time; and our own private constants.
    arguments = re.sub(r"attr_dict\['(\w+)'\]\.default", default_of, arguments)
    return re.sub(r"\bNOTHING\b|(?<=[= ])_[A-Z_]+", "...", arguments), returned


def setup(app: Any) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", tidy_signature)
    return {"parallel_read_safe": True}
