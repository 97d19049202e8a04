"""The PostgreSQL store keeps every promise also as distributed engines want it, while others are in the way."""

from __future__ import annotations

from support.postgres_stores import ConflictingConformance


class TestDistributedConformance(ConflictingConformance):
    profile = "distributed"
