"""The stores that benchmarks run on: files of SQLite, or a PostgreSQL server of their own."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from callbackq import SQLiteDataAccess

if TYPE_CHECKING:  # SQLite needs no driver for PostgreSQL
    from callbackq.stores.postgres import PostgreSQLDataAccess
    from support.postgres import PostgreSQLServer

    Store = SQLiteDataAccess | PostgreSQLDataAccess
    MakeStore = Callable[[], Store]
    """Makes the store anew, in other processes, too."""

NAMES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}
"""How people write what `--store` takes."""

# More than a server of tests is given, less than it gets anywhere else.
_SETTINGS = {"shared_buffers": "256MB", "max_wal_size": "4GB"}


@frozen
class Ground:
    """
    Attributes:
        where: the folder of the files, or the conninfo of the database.
        server: a PostgreSQL server of our own, which syncs to the disk.
    """

    where: Path | str
    server: PostgreSQLServer | None = None

    def maker(self, name: str) -> MakeStore:
        """Give what makes the store of that name, which is empty at first."""
        if isinstance(self.where, Path):
            return partial(SQLiteDataAccess, self.where / f"{name}.db")
        return partial(_postgres_store, self.where, name)


def _postgres_store(conninfo: str, schema: str) -> PostgreSQLDataAccess:
    from callbackq.stores.postgres import PostgreSQLDataAccess

    return PostgreSQLDataAccess(conninfo, schema=schema)


def clock_of(store: Store) -> Callable[[], datetime]:
    """Give the store's clock, without a question to a server: ours runs on this machine, and takes its time."""
    return store.now if isinstance(store, SQLiteDataAccess) else partial(datetime.now, UTC)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--conninfo", help="an empty PostgreSQL database, in place of a server of the benchmark's own")
    parser.add_argument("--directory", type=Path, help="where the files of SQLite go")


@contextmanager
def ground(options: argparse.Namespace) -> Iterator[Ground]:
    with ExitStack() as stack:
        if options.store == "sqlite":
            folder = tempfile.TemporaryDirectory(prefix="callbackq-bench-", dir=options.directory)
            yield Ground(Path(stack.enter_context(folder)))
        elif options.conninfo:
            yield Ground(options.conninfo)
        else:
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
            from support.postgres import PostgreSQLServers

            server = stack.enter_context(PostgreSQLServers()).start(durable=True, settings=_SETTINGS)
            yield Ground(server.conninfo(), server)
