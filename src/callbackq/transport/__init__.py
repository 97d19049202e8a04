"""Sending: the `Transport` protocol and `HTTPTransport`, its implementation on urllib3."""

from __future__ import annotations

from callbackq.transport.http import HTTPTransport
from callbackq.transport.protocol import SupportsSubmit, Transport

__all__ = ["HTTPTransport", "SupportsSubmit", "Transport"]
