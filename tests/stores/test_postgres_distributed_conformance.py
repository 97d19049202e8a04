"""The PostgreSQL store keeps every promise also as distributed engines want it, while others are in the way."""

from __future__ import annotations

import pytest

from callbackq.testing import DataAccessConformance
from support.postgres_stores import ConflictingHooks


@pytest.mark.thorough
class TestDistributedConformance(ConflictingHooks, DataAccessConformance):
    profile = "distributed"
