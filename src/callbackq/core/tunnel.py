"""
A proxy's answer to CONNECT: the head of an answer, and nothing behind it.

Read within the bounds of every other answer: a limit for the head, another for interim answers. What the proxy says is
never the receiver's answer, so it has no status here, only a failure whose words name the proxy.
"""

from __future__ import annotations

from callbackq.core.exchange import Exchange
from callbackq.core.models import AttemptFailure

__all__ = ["TunnelExchange"]


class TunnelExchange(Exchange):
    """Reads the answer to one CONNECT."""

    def failure(self) -> tuple[AttemptFailure, str] | None:
        """Say, when it is over, why there is no tunnel, and in which words; ``None`` when there is one."""
        reply = self.reply
        if reply.failure is not None:
            return reply.failure, f"the proxy's answer to CONNECT: {reply.detail}"
        if not 200 <= reply.status_code < 300:
            return AttemptFailure.CONNECT, f"the proxy refused the tunnel: {reply.status_code}"
        if self._buffer:
            # Nobody speaks in a tunnel before the client of TLS does: these are not the receiver's.
            return AttemptFailure.PROTOCOL, "the proxy sent more than its answer to CONNECT"
        return None

    def _frame_body(self, fields: dict[str, str]) -> None:
        # RFC 9110, section 9.3.6: behind a 2xx the tunnel begins, whatever its fields say. A refusal may have a body;
        # it is not read, and the connection not used again.
        self._end(has_body=False)
