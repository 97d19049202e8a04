"""The suite works in the hands of somebody who knows nothing but its documentation."""

from __future__ import annotations

import io
import subprocess
import sys
import unittest

from callbackq.dataaccess import DataAccess
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import DataAccessConformance, FakeClock
from callbackq.testing.conformance import (
    CLAUSES,
    Backup,
    Enlisting,
    Fenced,
    Handover,
    HeadOnly,
    Notifications,
    OperatorActions,
    Tokens,
)
from callbackq.testing.conformance.base import Conformance


def names_of(group: type) -> list[str]:
    return [name for name in dir(group) if name.startswith("test_")]


def run_under_unittest(case: type[unittest.TestCase]) -> unittest.TestResult:
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    return unittest.TextTestRunner(stream=io.StringIO()).run(tests)


def test_it_runs_under_unittest() -> None:
    class Case(HeadOnly, unittest.TestCase):
        def make_data_access(self, clock: FakeClock) -> DataAccess:
            return InMemoryDataAccess(clock=clock)

    result = run_under_unittest(Case)

    assert result.wasSuccessful()
    assert result.testsRun == len(names_of(HeadOnly)) >= 20


def test_what_a_store_cannot_do_is_reported_as_skipped() -> None:
    class Case(Tokens, Backup, unittest.TestCase):
        def make_data_access(self, clock: FakeClock) -> DataAccess:
            return InMemoryDataAccess(clock=clock)

    result = run_under_unittest(Case)

    reasons = {reason for _, reason in result.skipped}
    assert {"the store is no SupportsBackup", "the test class has no reopen()"} <= reasons
    assert len(result.skipped) >= len(names_of(Backup))


def test_a_broken_promise_is_named_in_words() -> None:
    class Forgetful(InMemoryDataAccess):
        def next_due(self) -> None:
            return None

    class Case(HeadOnly, unittest.TestCase):
        def make_data_access(self, clock: FakeClock) -> DataAccess:
            return Forgetful(clock=clock)

    result = run_under_unittest(Case)

    ((_, report),) = result.failures
    assert "AssertionError: a new callback is due when it was stored" in report


def test_every_store_it_made_is_closed() -> None:
    closed: list[DataAccess] = []

    class Closing(InMemoryDataAccess):
        def close(self) -> None:
            closed.append(self)

    class Case(Fenced, unittest.TestCase):
        def make_data_access(self, clock: FakeClock) -> DataAccess:
            return Closing(clock=clock)

    run_under_unittest(Case)

    assert len(set(closed)) == len(names_of(Fenced))


def test_importing_it_imports_no_test_framework() -> None:
    code = "import sys, callbackq.testing; print(sorted({'pytest', '_pytest', 'hypothesis'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)

    assert done.stdout.strip() == "[]"


def test_every_test_says_what_it_proves() -> None:
    for name in names_of(DataAccessConformance):
        assert getattr(DataAccessConformance, name).__doc__.endswith((".", "?")), name


def test_no_group_hides_a_test_of_another() -> None:
    groups: list[type[Conformance]] = [*CLAUSES.values(), Notifications, OperatorActions, Enlisting, Handover]

    names = [name for group in groups for name in names_of(group)]

    assert sorted(names) == sorted(set(names)) == sorted(names_of(DataAccessConformance))
