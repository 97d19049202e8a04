"""
The promises of a store, as tests that its author runs.

One class per clause of the contract, so that a failure names the promise that was broken; the docstring of each
test is the sentence it proves. Nothing is assumed about a store but what `callbackq.dataaccess` says. The suite
imports no test framework and runs under pytest and unittest alike.
"""

from __future__ import annotations

from callbackq.testing.conformance.enlisting import Enlisting
from callbackq.testing.conformance.expiring import Expiry
from callbackq.testing.conformance.failing import Errors, ThreadsAndForks
from callbackq.testing.conformance.handing_over import Handover
from callbackq.testing.conformance.keeping import Backup, Purge
from callbackq.testing.conformance.locking import Exclusive, HeadOnly, Tokens
from callbackq.testing.conformance.notifying import Notifications
from callbackq.testing.conformance.operating import OperatorActions
from callbackq.testing.conformance.reading import Hints, Reads
from callbackq.testing.conformance.recording import AtomicRecord, Fenced
from callbackq.testing.conformance.round_trip import RoundTrip
from callbackq.testing.conformance.storing import Durable, Idempotent, SequenceNumbers

__all__ = [
    "CLAUSES",
    "AtomicRecord",
    "Backup",
    "DataAccessConformance",
    "Durable",
    "Enlisting",
    "Errors",
    "Exclusive",
    "Expiry",
    "Fenced",
    "Handover",
    "HeadOnly",
    "Hints",
    "Idempotent",
    "Notifications",
    "OperatorActions",
    "Purge",
    "Reads",
    "RoundTrip",
    "SequenceNumbers",
    "ThreadsAndForks",
    "Tokens",
]

CLAUSES = {
    1: Durable,
    2: Idempotent,
    3: SequenceNumbers,
    4: RoundTrip,
    5: Exclusive,
    6: HeadOnly,
    7: Tokens,
    8: Fenced,
    9: AtomicRecord,
    10: Expiry,
    11: Reads,
    12: Hints,
    13: Errors,
    14: ThreadsAndForks,
    15: Purge,
    16: Backup,
}
"""The contract's clauses by number, each as the class that tests it."""


class DataAccessConformance(
    Durable,
    Idempotent,
    SequenceNumbers,
    RoundTrip,
    Exclusive,
    HeadOnly,
    Tokens,
    Fenced,
    AtomicRecord,
    Notifications,
    Expiry,
    Reads,
    Hints,
    Errors,
    ThreadsAndForks,
    Purge,
    Backup,
    OperatorActions,
    Enlisting,
    Handover,
):
    """
    Test a store: subclass this, say how to make one, and run it.

    ::

        class TestMyStore(DataAccessConformance):
            def make_data_access(self, clock):
                return MyDataAccess("...", clock=clock)

    Under unittest add `unittest.TestCase` as the last base class. Override also, where the store can do it,
    `reopen` (its data outlives the object), `open_backup` (it is a `SupportsBackup`), `outage` (its backend can be kept
    from working) and `application_transaction` (it is a `SupportsEnlist`); tests that need one that is missing are
    reported as skipped, as are those of abilities that the store doesn't have. The clock is a `FakeClock`: nothing
    sleeps.
    """
