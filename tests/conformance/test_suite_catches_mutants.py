"""The suite accuses a store that breaks a promise, by the promise's name, and no store that keeps them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import SkipTest

import pytest

from callbackq.dataaccess import DataAccess
from callbackq.testing import DataAccessConformance, FakeClock
from callbackq.testing.conformance import CLAUSES, Enlisting, Handover
from callbackq.testing.conformance.base import Conformance

from .mutants import MUTANTS, Enlisted, HandingOver, Sturdy


class Hooks(Conformance):
    kind: type[Sturdy] = Sturdy

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        return self.kind(clock=clock)

    def reopen(self, data_access: DataAccess, clock: FakeClock) -> DataAccess:
        assert isinstance(data_access, Sturdy)
        return data_access.reopened(clock)

    def open_backup(self, path: Path, clock: FakeClock) -> DataAccess:
        return self.kind.from_backup(path)

    def outage(self, data_access: DataAccess) -> AbstractContextManager[None]:
        assert isinstance(data_access, Sturdy)
        return data_access.outage()

    def application_transaction(self, data_access: DataAccess) -> AbstractContextManager[object]:
        assert isinstance(data_access, Enlisted)
        return data_access.transaction()


class TestTheStoreThatTheMutantsAreMadeOf(Hooks, DataAccessConformance):
    """It keeps every promise, so what a mutant is accused of is its own fault."""


class TestTheStoreThatTheMutantsOfTransactionsAreMadeOf(Hooks, Enlisting):
    kind = Enlisted


class TestTheStoreThatTheMutantsOfHandingOverAreMadeOf(Hooks, Handover):
    kind = HandingOver


_TRIES = 4


def broken_promises(clause: type[Conformance], mutant: type[Sturdy]) -> Iterator[str]:
    suite = type("Suite", (Hooks, clause), {"kind": mutant})
    for name in filter(lambda name: name.startswith("test_"), dir(suite)):
        test = suite()
        test.setup_method()
        try:
            getattr(test, name)()
        except SkipTest:
            pass
        except Exception:
            yield name
        finally:
            test.teardown_method()


@pytest.mark.thorough
@pytest.mark.parametrize(("clause", "mutant"), [pytest.param(*pair, id=pair[1].__name__) for pair in MUTANTS])
def test_a_broken_store_is_caught_by_the_clause_it_breaks(clause: type[Conformance], mutant: type[Sturdy]) -> None:
    # Some break their promise for a moment only, which a reader meets by chance.
    noticed = (next(broken_promises(clause, mutant), None) for _ in range(_TRIES))
    assert any(noticed), f"no test of {clause.__name__} has noticed"


def test_every_clause_has_a_store_that_breaks_it() -> None:
    assert set(CLAUSES.values()) <= {clause for clause, _ in MUTANTS}
