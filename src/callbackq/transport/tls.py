"""
TLS towards receivers, which may be anybody.

The handshake is computed in the one network thread, so what it may cost must not be the receiver's choice.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Final

from urllib3.util.ssl_ import create_urllib3_context

from callbackq.core.validation import Fault

__all__ = ["CHEAP_CIPHERS", "check_ssl_context", "lets_receivers_choose_the_cost", "verifying_context"]

CHEAP_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""
For ``set_ciphers``: what every receiver of today offers for TLS 1.2, and without DHE. There the server sends the group,
and to compute in one of 10,000 bits takes a second, in which no other attempt goes on. TLS 1.3 is not touched.
"""


def verifying_context() -> ssl.SSLContext:
    """Make a context that trusts the system's authorities."""
    context = create_urllib3_context(ciphers=CHEAP_CIPHERS)
    context.load_default_certs()
    context.set_alpn_protocols(["http/1.1"])
    # A request for it in the middle of an answer could keep the network thread busy.
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def lets_receivers_choose_the_cost(context: ssl.SSLContext) -> bool:
    """Whether it offers key exchanges in groups that the server makes up (DHE)."""
    return any(cipher.get("kea") == "kx-dhe" for cipher in context.get_ciphers())


def check_ssl_context(context: object) -> Iterator[Fault]:
    """Yield what is wrong with a context of the host's."""
    if context is None:
        return
    if not isinstance(context, ssl.SSLContext):
        yield "ssl_context", "must be an ssl.SSLContext"
        return
    if context.verify_mode is not ssl.CERT_REQUIRED or not context.check_hostname:
        yield "ssl_context", "must verify certificates and host names; to trust one of your own, load it as a CA"
    if context.minimum_version < ssl.TLSVersion.TLSv1_2:
        yield "ssl_context", "must not go below TLS 1.2: set minimum_version"
