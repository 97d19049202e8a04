"""What an operator lets into a store: numbers below the ceilings that protect the library itself."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from attrs import asdict, frozen

from callbackq.core import validation as v
from callbackq.core.models import CallbackRequest

__all__ = ["RequestLimits"]

_CEILINGS: Final = {
    "max_body_bytes": (0, v.MAX_BODY_BYTES),
    "max_headers": (0, v.MAX_HEADERS),
    "max_headers_bytes": (0, v.MAX_HEADERS_TOTAL),
    "max_attempts": (1, v.MAX_ATTEMPTS),
}


@frozen(kw_only=True)
class RequestLimits:
    """
    Limit what a store accepts. An instance is called with a request and refuses one that is too much.

    Only what is about to be stored is asked about. What is stored already stays what it is when limits are lowered.

    Attributes:
        max_body_bytes: the longest body, at most 16 MiB.
        max_headers: the most headers of one request, at most 100.
        max_headers_bytes: the most bytes of all names and values together, at most 64 KiB.
        max_attempts: the most attempts the retry phases may allow, the first one included.
        max_total_delay: the longest the delays of all retries may be together, at most 3,650 days. A receiver's
            ``Retry-After`` and jitter come on top.

    Raises:
        InvalidRequestError: with every limit that is of another type or out of its bounds.
    """

    max_body_bytes: int = 1024 * 1024
    max_headers: int = v.MAX_HEADERS
    max_headers_bytes: int = v.MAX_HEADERS_TOTAL
    max_attempts: int = v.MAX_ATTEMPTS
    max_total_delay: timedelta = v.MAX_TOTAL_DELAY

    def __attrs_post_init__(self) -> None:
        v.refuse(self._faults())

    def __call__(self, request: CallbackRequest) -> None:
        """
        Refuse a request that is too much, before it is stored.

        Raises:
            InvalidRequestError: with everything in it that is beyond a limit.
        """
        v.refuse(self._excesses(request))

    def _faults(self) -> Iterator[v.Fault]:
        given: dict[str, object] = asdict(self, recurse=False)
        for name, (least, most) in _CEILINGS.items():
            number = given[name]
            if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
                yield name, f"must be a whole number from {least} to {most}"
        delay = given["max_total_delay"]
        if not isinstance(delay, timedelta) or not timedelta(0) <= delay <= v.MAX_TOTAL_DELAY:
            yield "max_total_delay", f"must be a timedelta from 0 to {v.MAX_TOTAL_DELAY.days} days"

    def _excesses(self, request: CallbackRequest) -> Iterator[v.Fault]:
        headers, body = request.post_data.headers, request.post_data.data
        if len(headers) > self.max_headers:
            yield "post_data.headers", f"must not hold more than {self.max_headers} headers (max_headers)"
        # The models have seen to it that all of it is ASCII.
        if sum(len(name) + len(text) for name, text in headers.items()) > self.max_headers_bytes:
            reason = f"must not be larger than {self.max_headers_bytes} bytes in all (max_headers_bytes)"
            yield "post_data.headers", reason
        if body is not None and len(body) > self.max_body_bytes:
            yield "post_data.data", f"must not be longer than {self.max_body_bytes} bytes (max_body_bytes)"
        if 1 + sum(phase.retries for phase in request.retry_phases) > self.max_attempts:
            yield "retry_phases", f"must not allow more than {self.max_attempts} attempts in all (max_attempts)"
        # No overflow: the models allow ten years in all.
        if sum((phase.retries * phase.delay for phase in request.retry_phases), timedelta(0)) > self.max_total_delay:
            yield "retry_phases", f"must not wait longer than {self.max_total_delay} in all (max_total_delay)"
