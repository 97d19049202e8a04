"""The fixtures of a dispatcher's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from callbackq.dispatcher import Dispatcher
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock
from support.dispatching import HeldTransport, Witness


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> InMemoryDataAccess:
    return InMemoryDataAccess(clock=clock)


@pytest.fixture
def transport(clock: FakeClock) -> HeldTransport:
    return HeldTransport(clock)


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture
def build(store: InMemoryDataAccess, clock: FakeClock, witness: Witness) -> Iterator[Callable[..., Dispatcher]]:
    built: list[Dispatcher] = []

    def build(**settings: object) -> Dispatcher:
        settings.setdefault("machine_name", "one")
        settings.setdefault("observer", witness)
        settings.setdefault("clock", clock)
        dispatcher = Dispatcher(settings.pop("data_access", store), **settings)  # type: ignore[arg-type]
        built.append(dispatcher)
        return dispatcher

    yield build
    for dispatcher in built:
        dispatcher.stop(0)
