"""Named statements on a connection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from random import shuffle
from typing import Any, Final, Literal

import psycopg
from attrs import define
from psycopg import sql

from callbackq.stores.postgres.arrays import literal
from callbackq.stores.postgres.cursors import execute
from callbackq.stores.sql.rows import CallbackRow, Key, Row
from callbackq.stores.sql.scripts import load_statements
from callbackq.stores.sql.transaction import Transaction, Wait

__all__ = ["PostgreSQLTransaction", "Profile", "Statement", "load", "with_schema"]

Profile = Literal["postgres", "distributed"]

_PACKAGE: Final = "callbackq.stores.postgres"
_VALUE: Final = re.compile(r"(?<!:):([a-z_]+)")
_BINARY: Final = frozenset({"body"})
# How long the callbacks of all queues may wait for one queue, whose row somebody's open transaction may hold.
_MOMENT_MS: Final = 100
# How many held queues a transaction waits for, one after another; what is left is opened later.
_MOST_HELD: Final = 5
# Those that only insert, so that no plan can become a bad one as tables grow. Planning them took 0.5 ms of the server's
# CPU for each callback that is stored alone, which is more than all the rest of storing it.
_PREPARED: Final = frozenset({"store", "store_one", "add_history"})


@define(frozen=True)
class Statement:
    """
    A statement as the driver takes it.

    Attributes:
        text: with the driver's placeholders.
        values: the names of the values it is given.
    """

    text: str
    values: tuple[str, ...]


@cache
def load(schema: str, profile: Profile) -> Mapping[str, Statement]:
    """Read the statements for a schema. Those of the profile come in place of PostgreSQL's own."""
    texts = load_statements(_PACKAGE, "statements.sql")
    if profile == "distributed":
        texts |= load_statements(_PACKAGE, "distributed.sql")
        del texts["free_queues"]  # it skips locked rows, which can't be done there
        del texts["store_one"]
    return {
        name: Statement(
            with_schema(_VALUE.sub(_placeholder, text), schema, with_values=True),
            tuple(dict.fromkeys(_VALUE.findall(text))),
        )
        for name, text in texts.items()
    }


def _placeholder(value: re.Match[str]) -> str:
    # Bodies go as they are: as text they would be twice as long, and read digit by digit.
    return f"%({value[1]}){'b' if value[1] in _BINARY else 's'}"


def with_schema(text: str, schema: str, *, with_values: bool = False) -> str:
    """
    Put a schema's quoted name into SQL.

    Args:
        text: the SQL.
        schema: the name.
        with_values: the driver will look for the places of values, which begin with a percent sign.
    """
    name = sql.Identifier(schema).as_string(None)
    return text.replace("{schema}", name.replace("%", "%%") if with_values else name)


class PostgreSQLTransaction(Transaction):
    """
    Args:
        connection: in a transaction.
        statements: by name.
        constants: values that are the same for all statements.
        prepares: whether the connection may keep statements between transactions.
        began: when it began, in microseconds on the server's clock, whatever the store's is.
    """

    __slots__ = ("_connection", "_constants", "_locked", "_prepares", "_statements", "began")

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        statements: Mapping[str, Statement],
        constants: Mapping[str, object],
        *,
        prepares: bool = False,
        began: int = 0,
    ) -> None:
        self.began = began
        self._prepares = prepares
        self._connection = connection
        self._statements = statements
        self._constants = constants
        self._locked: set[Key] = set()

    def let(self, **constants: object) -> None:
        """Give more values that are the same for all statements from now on."""
        self._constants = {**self._constants, **constants}

    def has(self, name: str) -> bool:
        """Whether there is such a statement in this profile."""
        return name in self._statements

    def all(self, name: str, /, **values: object) -> list[Row]:
        return self._execute(name, {**self._constants, **values}).fetchall()

    def run(self, name: str, values: Mapping[str, object]) -> int:
        return self._execute(name, values).rowcount

    def run_many(self, name: str, rows: Iterable[Mapping[str, object]]) -> int:
        # One array for each column: any number of rows is one statement.
        given = list(rows)
        names = self._statements[name].values
        changed = self._execute(name, {value: [row[value] for row in given] for value in names}).rowcount
        if "was_token" in names and changed != len(given):
            raise psycopg.errors.SerializationFailure("others have changed some of them since they were read")
        return changed

    def rows_to_change(self, ids: Iterable[str]) -> dict[str, CallbackRow]:
        return {row[1]: CallbackRow(*row).mended() for row in self.all("callbacks", ids=list(ids))}

    def lock_queues(self, queues: Iterable[Key], *, wait: Wait = "a moment") -> set[Key]:
        wanted = set(queues)
        missing = wanted - self._locked
        if missing and wait == "patiently":
            self._lock("lock_queues", missing)
        elif missing and "free_queues" in self._statements:
            missing -= self._lock("free_queues", missing)
            if missing and wait == "a moment":
                self._wait_a_moment(missing)
        elif missing and not self._wait_a_moment(missing):
            # Nothing tells which of them are held: each by itself, so that those don't hold up the rest. Not always the
            # same first, since the waits must not add up.
            queues = list(missing)
            shuffle(queues)
            held = 0
            while queues and held < _MOST_HELD:
                held += not self._wait_a_moment({queues.pop()})
        return wanted & self._locked

    def _wait_a_moment(self, queues: set[Key]) -> bool:
        """Lock all of them or none, and say which."""
        shorten = f"SHOW lock_timeout; SET LOCAL lock_timeout = {_MOMENT_MS}"
        try:
            with self._connection.transaction():
                # Reading the setting comes first: its row is the answer's first.
                (patience,) = execute(self._connection, shorten).fetchone() or ("0",)
                self._lock("lock_queues", queues)
                # The end of a savepoint takes no setting back.
                restored = sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(patience))
                execute(self._connection, restored)
        except psycopg.errors.LockNotAvailable:
            # Whoever holds one of them has not even let go for a moment. They are opened later.
            return False
        return True

    def _lock(self, statement: str, queues: set[Key]) -> set[Key]:
        locked = {queue for (queue,) in self.all(statement, queues=sorted(queues, key=str))}
        self._locked |= locked
        return locked

    def draw_tokens(self, count: int, now: int) -> int:
        return self.began

    def purgeable(self, *, before: int, limit: int) -> list[Key]:
        found = [id for (id,) in self.all("purgeable", before=before, limit=limit)]
        if not found:
            return []
        # What was found may have been redelivered before it was locked, and have failed again and owe an e-mail: so all
        # is looked at once more when it is locked.
        rows = self.rows_to_change(found)
        owing = {id for (id,) in self.all("owing", ids=found)}
        return [
            id
            for id, row in rows.items()
            if row.finished is not None and row.finished <= before and not row.is_head and id not in owing
        ]

    def owe(self, debts: Sequence[Mapping[str, object]]) -> None:
        self.run_many("owe", debts)

    def join_tail(self, row: CallbackRow) -> bool:
        ((sequence, is_head),) = self.all("join_tail", queue=row.queue, callback=row.callback)
        self.run("renumber", {"callback": row.callback, "sequence": sequence})
        return bool(is_head)

    def _execute(self, name: str, values: Mapping[str, object]) -> psycopg.Cursor[Any]:
        given = {
            name: literal(value) if type(value) is list and name not in _BINARY else value
            for name, value in values.items()
        }
        prepare = self._prepares and name in _PREPARED
        return execute(self._connection, self._statements[name].text, given, prepare=prepare)
