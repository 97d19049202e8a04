"""How Sphinx builds these pages. Warnings are errors: ``make docs``."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "callbackq"
author = "the callbackq authors"
copyright = author
version = release = installed_version("callbackq")

extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "lifecycle", "references"]
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# A word between single backticks in a docstring names a Python object; `references` finds it or complains.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"callbackq {version}"
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
