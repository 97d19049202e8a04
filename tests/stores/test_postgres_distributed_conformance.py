"""The PostgreSQL store keeps every promise also as distributed engines want it, while others are in the way."""

from __future__ import annotations

from callbackq.testing import DataAccessConformance
from support.postgres_stores import ConflictingHooks


class TestDistributedConformance(ConflictingHooks, DataAccessConformance):
    profile = "distributed"
