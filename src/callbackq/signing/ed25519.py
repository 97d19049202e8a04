"""
The version ``v1a`` of Standard Webhooks: ed25519 (RFC 8032), which the package cryptography computes.

The one module that needs the extra ``ed25519``. `callbackq.signing.keys` imports it when the first key is read.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from callbackq.signing.keys import KeyFault

__all__ = ["PrivateKey", "PublicKey"]

_VERSION: Final = "v1a,"
_KEY_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
# No sender has so many keys. Each try hashes the whole body, and a stranger's header may have room for hundreds.
_MAX_TRIES: Final = 16

# Keys for which everybody can sign: points whose multiples are at most eight, so that what should depend on the message
# hardly does. OpenSSL takes them. All zeros is one, the likeliest placeholder. By their y, whatever the sign of x.
_PRIME: Final = 2**255 - 19
_Y_OF_ORDER_EIGHT: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_Y_OF_SMALL_ORDER: Final = frozenset({0, 1, _PRIME - 1, _Y_OF_ORDER_EIGHT, _PRIME - _Y_OF_ORDER_EIGHT})


class PrivateKey:
    """
    Signs.

    Args:
        raw: the 32 bytes of RFC 8032, from which all else follows; or these and the 32 of the public key, as Go,
            libsodium and Svix keep it.

    Raises:
        KeyFault: it is neither.
    """

    def __init__(self, raw: bytes) -> None:
        if len(raw) not in (_KEY_BYTES, 2 * _KEY_BYTES):
            raise KeyFault("must be a private key of 32 bytes, or of 64 with its public key behind it")
        self._key = Ed25519PrivateKey.from_private_bytes(raw[:_KEY_BYTES])
        if raw[_KEY_BYTES:] not in (b"", self.public_bytes()):
            raise KeyFault("must hold the public key that belongs to its private one: one of them is damaged")

    def sign(self, content: bytes) -> str:
        """Return an item of a ``webhook-signature`` header. The same content always gets the same."""
        return _VERSION + base64.b64encode(self._key.sign(content)).decode("ascii")

    def public_bytes(self) -> bytes:
        """Return the public key."""
        return self._key.public_key().public_bytes_raw()


class PublicKey:
    """
    Verifies.

    Args:
        raw: its 32 bytes.

    Raises:
        KeyFault: it is too short or too long, or anybody could sign for it.
    """

    def __init__(self, raw: bytes) -> None:
        if len(raw) != _KEY_BYTES:
            raise KeyFault("must be a public key of 32 bytes")
        y = int.from_bytes(raw, "little") & (2**255 - 1)
        if y % _PRIME in _Y_OF_SMALL_ORDER:
            raise KeyFault("must not be a key for which anybody can sign, such as 32 zeros")
        self._key = Ed25519PublicKey.from_public_bytes(raw)

    def has_signed(self, content: bytes, items: Iterable[str]) -> bool:
        """Whether one of a header's *items* is this key's signature of *content*."""
        return any(self._verifies(signature, content) for signature in islice(_signatures(items), _MAX_TRIES))

    def _verifies(self, signature: bytes, content: bytes) -> bool:
        try:
            self._key.verify(signature, content)
        except InvalidSignature:
            return False
        return True


def _signatures(items: Iterable[str]) -> Iterator[bytes]:
    for item in items:
        if item.startswith(_VERSION):
            try:
                signature = base64.b64decode(item.removeprefix(_VERSION), validate=True)
            except ValueError:
                continue
            # Only what we would have written: one signature has one form.
            if len(signature) == _SIGNATURE_BYTES and _VERSION + base64.b64encode(signature).decode("ascii") == item:
                yield signature
