"""
The public names and how they are called. A change here is a change for users: it needs a line in the changelog.

To see a changed signature: ``python tests/test_public_api.py``.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
from pathlib import Path

import pytest

import callbackq

SNAPSHOT = Path(__file__).with_name("public_api.txt")
MODULES = [
    "callbackq",
    "callbackq.codec",
    "callbackq.core.delivery",
    "callbackq.core.lifecycle",
    "callbackq.dataaccess",
    "callbackq.errors",
    "callbackq.events",
    "callbackq.signing",
    "callbackq.stores.postgres",
    "callbackq.stores.sharded",
    "callbackq.testing",
    "callbackq.testing.history",
    "callbackq.testing.simulation",
    "callbackq.transport",
]


def describe() -> str:
    """One line per public name: its signature, for a class that of its constructor and of its public methods."""
    lines: list[str] = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            lines += describe_one(f"{module_name}.{name}", getattr(module, name))
    return re.sub(" at 0x[0-9a-f]+", "", "\n".join(lines)) + "\n"


def describe_one(name: str, what: object) -> list[str]:
    if not callable(what):
        return [name]
    if not inspect.isclass(what):
        return [f"{name}{inspect.signature(what)}"]
    if hasattr(what, "__members__"):
        return [f"{name}: {', '.join(what.__members__)}"]
    try:
        lines = [f"{name}{inspect.signature(what)}"]
    except ValueError:
        lines = [name]
    for method_name, method in sorted(vars(what).items()):
        if not method_name.startswith("_") and inspect.isfunction(method):
            lines.append(f"{name}.{method_name}{inspect.signature(method)}")
    return lines


def test_the_public_names_and_signatures_are_those_of_the_snapshot() -> None:
    expected = SNAPSHOT.read_text(encoding="utf-8")

    assert describe() == expected


def test_every_name_of_the_contract_can_be_imported() -> None:
    names = {
        "CallbackRequest",
        "CallbackData",
        "RetryPhase",
        "CallbackStatus",
        "CallbackAttempt",
        "CallbackLock",
        "CallbackState",
        "DataAccess",
        "InMemoryDataAccess",
        "SQLiteDataAccess",
        "Dispatcher",
        "HTTPTransport",
        "Transport",
        "TargetPolicy",
        "ResponsePolicy",
        "Signer",
        "Notifier",
        "SMTPNotifier",
        "Observer",
        "Clock",
        "SystemClock",
        "CallbackqError",
        "InvalidRequestError",
        "TargetNotAllowedError",
        "CallbackNotFoundError",
        "ConflictError",
        "IllegalTransitionError",
        "LockLostError",
        "DataAccessError",
        "TransientDataAccessError",
        "SchemaVersionError",
        "DispatcherStateError",
    }

    assert names - set(callbackq.__all__) == set()


def test_the_test_kit_can_be_imported_without_any_test_framework() -> None:
    import subprocess
    import sys

    code = (
        "import sys, callbackq.testing; "
        "found = {'pytest', 'hypothesis', '_pytest', 'unittest.mock'} & set(sys.modules); "
        "sys.exit(str(found) if found else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)

    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("name", sorted(callbackq.__all__))
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert (inspect.getdoc(getattr(callbackq, name)) or "").strip()


def test_models_survive_pickling() -> None:
    request = callbackq.CallbackRequest(
        url="http://receiver.test/", post_data=callbackq.CallbackData(headers={"A": "b"}, data=b"c")
    )

    assert pickle.loads(pickle.dumps(request)) == request


if __name__ == "__main__":
    SNAPSHOT.write_text(describe(), encoding="utf-8")
