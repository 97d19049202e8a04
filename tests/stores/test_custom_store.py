"""The example of a store keeps every promise of a store."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from callbackq.dataaccess import DataAccess
from callbackq.testing import DataAccessConformance, FakeClock

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_store.py"


def example() -> type[DataAccess]:
    spec = importlib.util.spec_from_file_location("custom_store", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["custom_store"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.JSONFileDataAccess


JSONFileDataAccess = example()


@pytest.mark.thorough
class TestJSONFile(DataAccessConformance):
    def make_data_access(self, clock: FakeClock) -> DataAccess:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "callbacks.json"
        return self.reopen(None, clock)

    def teardown_method(self, method: object = None) -> None:
        super().teardown_method(method)
        self.directory.cleanup()

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        return JSONFileDataAccess(self.path, clock=clock)

    @contextmanager
    def outage(self, data_access: DataAccess) -> Iterator[None]:
        away = self.path.parent.rename(self.path.parent.with_suffix(".away"))
        try:
            yield
        finally:
            away.rename(self.path.parent)
