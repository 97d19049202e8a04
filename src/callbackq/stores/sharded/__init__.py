"""Queues spread over several stores, so that an application outgrows one database."""

from __future__ import annotations

from callbackq.stores.sharded.store import ShardedDataAccess

__all__ = ["ShardedDataAccess"]
