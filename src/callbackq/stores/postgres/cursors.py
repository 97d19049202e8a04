"""Executing on a connection that may be the host's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow, tuple_row

__all__ = ["execute"]


def execute(
    connection: psycopg.Connection[Any],
    statement: str | sql.Composed,
    values: Mapping[str, object] | None = None,
    *,
    prepare: bool = False,
) -> psycopg.Cursor[TupleRow]:
    """Execute with the driver's usual placeholders and rows, whatever kinds the host has set for its connection."""
    return psycopg.Cursor(connection, row_factory=tuple_row).execute(statement, values, prepare=prepare)
