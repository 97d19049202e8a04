"""The PostgreSQL store keeps every promise in the way it works on distributed engines, too, while others are in the way."""

from __future__ import annotations

from support.postgres_stores import ConflictingConformance


class TestDistributedConformance(ConflictingConformance):
    profile = "distributed"
