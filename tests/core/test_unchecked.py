"""Models that are built without their checks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from attrs import fields_dict

from callbackq.core import models
from callbackq.core.models import CallbackData, CallbackLock, CallbackRequest, RetryPhase, unchecked

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "model",
    [
        CallbackData(headers={"A": "b"}, data=b"body"),
        CallbackRequest(url="https://receiver.example/", retry_phases=[RetryPhase(retries=1, delay=timedelta(1))]),
        CallbackLock(acquired=MOMENT, timeout=MOMENT, machine_name="machine", token=7),
    ],
)
def test_a_model_built_without_checks_is_like_any_other(model: object) -> None:
    kind = type(model)

    built = unchecked(kind, **{name: getattr(model, name) for name in fields_dict(kind)})

    assert built == model
    assert repr(built) == repr(model)


def test_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CHECKS", {})

    assert unchecked(RetryPhase, retries=-1, delay=timedelta(0)).retries == -1
