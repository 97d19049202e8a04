"""What users of callbackq need to test their own code. Imports no test framework."""

from __future__ import annotations

from callbackq.testing.conformance import DataAccessConformance
from callbackq.testing.doubles import FakeClock, RecordingNotifier, ScriptedTransport

__all__ = ["DataAccessConformance", "FakeClock", "RecordingNotifier", "ScriptedTransport"]
