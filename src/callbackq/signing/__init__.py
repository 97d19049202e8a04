"""
Proof of who called: signatures in the manner of Standard Webhooks 1.0.0, and their check for receivers.

What is signed is ``id.timestamp.body``: the callback's id, the whole seconds of the attempt and the raw bytes of the
body. There are two schemes: ``v1``, HMAC-SHA256 with a secret that both sides hold, and ``v1a``, ed25519 with a
private key that only the sender holds. No clock is read here, and no secret is shown, stored or logged.
"""

from __future__ import annotations

from callbackq.signing.keys import Secret, Secrets, public_key_of
from callbackq.signing.signer import Signer
from callbackq.signing.verifier import Verified, verify

__all__ = ["Secret", "Secrets", "Signer", "Verified", "public_key_of", "verify"]
