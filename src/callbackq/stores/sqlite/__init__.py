"""The SQLite store: durable, for any number of threads and processes on one machine."""

from __future__ import annotations

from callbackq.stores.sqlite.store import SQLiteDataAccess

__all__ = ["SQLiteDataAccess"]
