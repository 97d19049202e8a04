from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.hosts import HostileHosts, HostileReceivers


@pytest.fixture(scope="session")
def receivers() -> Iterator[HostileReceivers]:
    """All hostile receivers, listening, and the canary."""
    with HostileReceivers() as receivers:
        yield receivers


@pytest.fixture
def hosts(receivers: HostileReceivers) -> HostileHosts:
    return receivers.hosts
