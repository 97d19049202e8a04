"""The PostgreSQL store without what it needs: said at the import, with the remedy, and nobody else is bothered."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import sys

sys.modules["psycopg_pool"] = None  # as if it weren't installed
import callbackq.stores.postgres
"""
WITHOUT_LIBPQ = """
import sys


class NoLibpq:
    def find_spec(self, name, path=None, target=None):
        if name == "psycopg":
            raise ImportError("no pq wrapper available.")  # psycopg's own words


sys.meta_path.insert(0, NoLibpq())
import callbackq.stores.postgres
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(("code", "error"), [(WITHOUT, "ModuleNotFoundError"), (WITHOUT_LIBPQ, "ImportError")])
def test_what_is_missing_is_named_at_the_import(code: str, error: str) -> None:
    done = run(code)

    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith(f"{error}: callbackq.stores.postgres needs psycopg, its pool, and libpq")
    assert last_line.endswith("pip install 'callbackq[postgres]' 'psycopg[binary]'")


def test_importing_callbackq_imports_no_psycopg() -> None:
    done = run("import sys, callbackq; sys.exit('psycopg' in sys.modules)")

    assert done.returncode == 0
