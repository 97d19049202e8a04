"""
Secrets and keys, as hosts give them, made into what signs and verifies.

The prefix of a text says what it is, so that nothing is used for what it isn't: ``whsec_`` a shared secret, ``whsk_``
a private key, which only the sender may have, ``whpk_`` its public key, for receivers.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Final, Protocol, TypeVar

from attrs import frozen

from callbackq.errors import InvalidRequestError

__all__ = [
    "KeyFault",
    "Secret",
    "Secrets",
    "SigningKey",
    "VerifyingKey",
    "public_key_of",
    "signed_content",
    "signing_keys",
    "verifying_keys",
]

Secret = str | bytes
"""
A shared secret: 24 to 64 random bytes, or the same as text, ``whsec_`` and their base64. Or a key for ed25519, which
is always text: ``whsk_`` to sign, ``whpk_`` to verify, and base64.
"""

Secrets = Secret | Sequence[Secret]
"""One secret, or several: the newest first."""

_SHARED: Final = "whsec_"
_PRIVATE: Final = "whsk_"
_PUBLIC: Final = "whpk_"
_SHARED_SIZES: Final = range(24, 65)
_SHARED_FAULT: Final = (
    f"must be {_SHARED_SIZES[0]} to {_SHARED_SIZES[-1]} bytes, or '{_SHARED}' and the base64 of as many"
)
_NO_ED25519: Final = "needs a package for ed25519: pip install 'callbackq[ed25519]'"


class KeyFault(Exception):
    """Why a secret can't be used; never quotes it."""


class SigningKey(Protocol):
    """Signs."""

    def sign(self, content: bytes) -> str:
        """Return one item of a ``webhook-signature`` header: version, comma, base64."""
        ...


class VerifyingKey(Protocol):
    """Verifies."""

    def has_signed(self, content: bytes, items: Iterable[str]) -> bool:
        """Whether one of a header's *items*, which can be anything, is this key's signature of *content*."""
        ...


def signed_content(id: str, timestamp: str, body: bytes) -> bytes:
    """What a signature vouches for. Neither *id* nor *timestamp* may hold a dot, or it could be cut elsewhere."""
    return f"{id}.{timestamp}.".encode("ascii") + body


def signing_keys(secrets: object) -> list[SigningKey]:
    """
    Read what a sender gives.

    Raises:
        InvalidRequestError: naming every one that won't do by its place.
    """
    return _read_all(secrets, _signing_key)


def verifying_keys(secrets: object) -> list[VerifyingKey]:
    """
    Read what a receiver gives.

    Raises:
        InvalidRequestError: naming every one that won't do by its place.
    """
    return _read_all(secrets, _verifying_key)


def public_key_of(private_key: str) -> str:
    """
    Derive the public key, which receivers need to verify, from a private one.

    Needs the extra ``ed25519``.

    Args:
        private_key: ``whsk_`` and the base64 of 32 random bytes, or of these and the public key.

    Returns:
        ``whpk_`` and base64. It is no secret, but must reach receivers in a way that nobody can tamper with.

    Raises:
        InvalidRequestError: it is no private key, or the extra is missing.
    """
    try:
        raw = _decoded(_PRIVATE, private_key)
        public: bytes = _ed25519().PrivateKey(raw).public_bytes()
    except KeyFault as fault:
        reason = str(fault)
    else:
        return _PUBLIC + base64.b64encode(public).decode("ascii")
    raise InvalidRequestError([("private_key", reason)])


_Key = TypeVar("_Key")


def _read_all(secrets: object, read: Callable[[object], _Key]) -> list[_Key]:
    given = [secrets] if isinstance(secrets, (str, bytes)) else secrets
    # Bytes that can change are a sequence, too: of numbers.
    if not isinstance(given, Sequence) or isinstance(given, bytearray | memoryview) or not given:
        raise InvalidRequestError([("secrets", "must be a secret or a sequence of at least one")])
    keys: list[_Key] = []
    faults = []
    for index, secret in enumerate(given):
        try:
            keys.append(read(secret))
        except KeyFault as fault:
            faults.append((f"secrets[{index}]", str(fault)))
    if faults:
        raise InvalidRequestError(faults)
    return keys


def _signing_key(secret: object) -> SigningKey:
    if _has_prefix(secret, _PUBLIC):
        raise KeyFault(f"must not be a public key: to sign takes the private one, '{_PRIVATE}'")
    if _has_prefix(secret, _PRIVATE):
        key: SigningKey = _ed25519().PrivateKey(_decoded(_PRIVATE, secret))
        return key
    return _shared(secret, f"{_SHARED_FAULT}, or '{_PRIVATE}' and the base64 of a private key")


def _verifying_key(secret: object) -> VerifyingKey:
    if _has_prefix(secret, _PRIVATE):
        raise KeyFault(f"must not be a private key, which is the sender's alone: ask for the public one, '{_PUBLIC}'")
    if _has_prefix(secret, _PUBLIC):
        key: VerifyingKey = _ed25519().PublicKey(_decoded(_PUBLIC, secret))
        return key
    return _shared(secret, f"{_SHARED_FAULT}, or '{_PUBLIC}' and the base64 of a public key")


@frozen(repr=False)
class _SharedSecret:
    """HMAC-SHA256, the version ``v1``: both sides have the secret, and each could have signed."""

    _secret: bytes

    def sign(self, content: bytes) -> str:
        digest = hmac.digest(self._secret, content, "sha256")
        return f"v1,{base64.b64encode(digest).decode('ascii')}"

    def has_signed(self, content: bytes, items: Iterable[str]) -> bool:
        # As bytes, because compare_digest() refuses text beyond ASCII.
        expected = self.sign(content).encode("ascii")
        return any(hmac.compare_digest(expected, item.encode("utf-8", "replace")) for item in items)


def _shared(secret: object, fault: str) -> _SharedSecret:
    raw = _decoded(_SHARED, secret, fault) if isinstance(secret, str) else secret
    if not isinstance(raw, bytes) or len(raw) not in _SHARED_SIZES:
        raise KeyFault(fault)
    return _SharedSecret(raw)


def _ed25519() -> ModuleType:
    # Not before it is needed: the core does without.
    try:
        from callbackq.signing import ed25519
    except ModuleNotFoundError:
        raise KeyFault(_NO_ED25519) from None
    return ed25519


def _has_prefix(secret: object, prefix: str) -> bool:
    return isinstance(secret, str) and secret.startswith(prefix)


def _decoded(prefix: str, text: object, fault: str = "") -> bytes:
    fault = fault or f"must be '{prefix}' and base64"
    if not isinstance(text, str) or not text.startswith(prefix):
        raise KeyFault(fault)
    # Some who hand out secrets leave the padding away.
    unpadded = text.removeprefix(prefix).rstrip("=")
    try:
        return base64.b64decode(unpadded + "=" * (-len(unpadded) % 4), validate=True)
    except ValueError:
        raise KeyFault(fault) from None
