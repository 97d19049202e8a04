"""Signatures with key pairs: the RFC's own, those of an independent implementation, and no way past the verifier."""

from __future__ import annotations

import base64
import json
import secrets as chance
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import nacl.signing
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook

from callbackq.errors import InvalidRequestError, SignatureError
from callbackq.signing import Signer, Verified, public_key_of, verify
from callbackq.signing.keys import signing_keys, verifying_keys

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
TIMESTAMP = int(NOW.timestamp())
BODY = b'{"ok": true}'


def private(raw: bytes) -> str:
    return "whsk_" + base64.b64encode(raw).decode()


def public(raw: bytes) -> str:
    return "whpk_" + base64.b64encode(raw).decode()


SEED = bytes(range(32))
PRIVATE, PUBLIC = private(SEED), public(bytes(nacl.signing.SigningKey(SEED).verify_key))
OTHER_PRIVATE, OTHER_PUBLIC = private(b"o" * 32), public(bytes(nacl.signing.SigningKey(b"o" * 32).verify_key))
SHARED = "whsec_" + base64.b64encode(bytes(range(100, 132))).decode()


def signed(body: bytes = BODY, *, secrets: Any = PRIVATE, id: str = "cb_1", at: int = TIMESTAMP) -> dict[str, str]:
    return with_signature(Signer(secrets).sign(id, at, body), id=id, at=at)


def with_signature(signature: str, *, id: str = "cb_1", at: int = TIMESTAMP) -> dict[str, str]:
    return {"webhook-id": id, "webhook-timestamp": str(at), "webhook-signature": signature}


def by_libsodium(seed: bytes, body: bytes, *, id: str = "cb_1", at: int = TIMESTAMP) -> str:
    signature = nacl.signing.SigningKey(seed).sign(f"{id}.{at}.".encode() + body).signature
    return "v1a," + base64.b64encode(signature).decode()


def reason_against(headers: Any, body: bytes = BODY, secrets: Any = PUBLIC) -> str:
    try:
        verify(headers, body, secrets, now=NOW)
    except SignatureError as error:
        return str(error)
    return "verified"


# Against what isn't ours

# RFC 8032, section 7.1: secret key, public key, message, signature.
RFC_8032 = {
    "TEST 1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    "TEST 2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        ),
    ),
    "TEST 3": (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
    "TEST SHA(abc)": (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        (
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
            "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f"
        ),
        (
            "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
            "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704"
        ),
    ),
}


@pytest.mark.parametrize(("key", "its_public", "message", "signature"), RFC_8032.values(), ids=RFC_8032)
def test_signatures_are_those_of_rfc_8032(key: str, its_public: str, message: str, signature: str) -> None:
    content = bytes.fromhex(message)
    [signing] = signing_keys(private(bytes.fromhex(key)))
    [verifying] = verifying_keys(public(bytes.fromhex(its_public)))

    item = signing.sign(content)

    assert item == "v1a," + base64.b64encode(bytes.fromhex(signature)).decode()
    assert public_key_of(private(bytes.fromhex(key))) == public(bytes.fromhex(its_public))
    assert verifying.has_signed(content, [item])
    assert not verifying.has_signed(content + b"x", [item])


def test_the_published_example_comes_out() -> None:
    # The key of the tests of Svix's server; the Standard Webhooks specification shows the signature.
    key = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="

    signature = Signer(key).sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')

    assert signature == "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="
    assert public_key_of(key) == "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=100))
@settings(max_examples=50, deadline=None)
def test_libsodium_and_we_always_make_the_same_signature(seed: bytes, body: bytes) -> None:
    headers = signed(body, secrets=private(seed))

    assert headers["webhook-signature"] == by_libsodium(seed, body)
    assert verify(headers, body, public_key_of(private(seed)), now=NOW) == Verified(id="cb_1", timestamp=NOW)


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=100))
@settings(max_examples=50, deadline=None)
def test_libsodium_accepts_what_we_sign_and_we_what_it_signs(seed: bytes, body: bytes) -> None:
    theirs = nacl.signing.SigningKey(seed)
    signature = base64.b64decode(signed(body, secrets=private(seed))["webhook-signature"].removeprefix("v1a,"))

    theirs.verify_key.verify(f"cb_1.{TIMESTAMP}.".encode() + body, signature)
    assert (
        reason_against(with_signature(by_libsodium(seed, body)), body, public(bytes(theirs.verify_key))) == "verified"
    )


# Keys


@pytest.mark.parametrize(
    "secret",
    [PRIVATE, PRIVATE.rstrip("="), [PRIVATE], lambda: PRIVATE, private(SEED + base64.b64decode(PUBLIC[5:]))],
    ids=["text", "unpadded", "list", "provider", "with its public key"],
)
def test_a_private_key_may_be_given_in_several_forms(secret: Any) -> None:
    assert signed(secrets=secret) == with_signature(by_libsodium(SEED, BODY))


def test_a_private_key_is_32_random_bytes() -> None:
    key = private(chance.token_bytes(32))

    assert reason_against(signed(secrets=key), secrets=public_key_of(key)) == "verified"


HALVES = base64.b64decode(PUBLIC[5:])
MALFORMED_PRIVATE = [
    "whsk_",
    "whsk_CANARY",
    "whsk_" + "CANARY_" * 8,
    "whsk_" + "é" * 44,
    private(b"CANARY".ljust(31)),
    private(b"CANARY".ljust(33)),
    private(b"CANARY".ljust(65)),
    private(SEED + bytes(32)),
    private(HALVES + SEED),
    PRIVATE + " ",
]
MALFORMED_PUBLIC = [
    "whpk_",
    "whpk_CANARY",
    "whpk_" + "CANARY_" * 8,
    public(b"CANARY".ljust(31)),
    public(b"CANARY".ljust(64)),
    PUBLIC + "\n",
]


@pytest.mark.parametrize("key", [*MALFORMED_PRIVATE, *MALFORMED_PUBLIC, PUBLIC], ids=range(17))
def test_what_cannot_sign_is_refused_by_index_and_never_quoted(key: str) -> None:
    for refused in (lambda: Signer([SHARED, key]), lambda: Signer(lambda: [SHARED, key]).sign("a", 1, b"")):
        with pytest.raises(InvalidRequestError) as caught:
            refused()
        [(path, reason)] = caught.value.errors
        assert path == "secrets[1]"
        assert reason.startswith("must ")
        assert not reason_quotes(caught.value, key)


@pytest.mark.parametrize("key", [*MALFORMED_PUBLIC, *MALFORMED_PRIVATE, PRIVATE], ids=range(17))
def test_what_cannot_verify_is_refused_by_index_and_never_quoted(key: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        verify(signed(), BODY, [PUBLIC, key], now=NOW)

    [(path, reason)] = caught.value.errors
    assert path == "secrets[1]"
    assert reason.startswith("must ")
    assert not reason_quotes(caught.value, key)


@pytest.mark.parametrize("key", [*MALFORMED_PRIVATE, PUBLIC, SHARED, "", None, SEED], ids=range(15))
def test_only_a_private_key_has_a_public_one(key: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        public_key_of(key)

    assert [path for path, _ in caught.value.errors] == ["private_key"]
    assert not reason_quotes(caught.value, key)


def reason_quotes(error: Exception, key: Any) -> bool:
    """Whether the key's own characters are in the error or in what led to it."""
    secret = str(key)[5:].strip() or "nothing to quote"
    return secret in str(error) or error.__cause__ is not None or error.__context__ is not None


def test_a_key_on_the_wrong_side_is_told_what_to_give_instead() -> None:
    with pytest.raises(InvalidRequestError, match="must not be a public key: to sign takes the private one, 'whsk_'"):
        Signer(PUBLIC)
    with pytest.raises(InvalidRequestError, match=r"must not be a private key.*ask for the public one, 'whpk_'"):
        verify(signed(), BODY, PRIVATE, now=NOW)


# The eight points of small order, in all their forms: y as it is or with the prime added, and either sign of x.
ANYBODYS_KEYS = [
    bytes.fromhex(y + last)
    for y, sign_of_x in [
        ("00" * 31, ("00", "80")),
        ("01" + "00" * 30, ("00", "80")),
        ("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc", ("05", "85")),
        ("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03", ("7a", "fa")),
        ("ec" + "ff" * 30, ("7f", "ff")),
        ("ed" + "ff" * 30, ("7f", "ff")),
        ("ee" + "ff" * 30, ("7f", "ff")),
    ]
    for last in sign_of_x
]


@pytest.mark.parametrize("key", ANYBODYS_KEYS, ids=bytes.hex)
def test_a_key_for_which_anybody_can_sign_is_refused(key: bytes) -> None:
    # R is the neutral element and S is zero: made without any key, and good for an eighth of all messages or more.
    forged = bytes([1]) + bytes(63)
    assert any(openssl_accepts(key, forged, f"message {number}".encode()) for number in range(200))

    with pytest.raises(InvalidRequestError, match="must not be a key for which anybody can sign"):
        verify(signed(), BODY, public(key), now=NOW)


def openssl_accepts(key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


# Several keys


def test_shared_secrets_and_private_keys_sign_together_one_signature_each() -> None:
    items = signed(secrets=[PRIVATE, SHARED, OTHER_PRIVATE])["webhook-signature"].split(" ")

    assert items == [signed(secrets=one)["webhook-signature"] for one in (PRIVATE, SHARED, OTHER_PRIVATE)]
    assert [item.split(",")[0] for item in items] == ["v1a", "v1", "v1a"]


def test_receivers_on_both_sides_of_a_migration_accept_the_same_request() -> None:
    now = int(datetime.now(UTC).timestamp())
    headers = signed(secrets=[PRIVATE, SHARED], at=now)

    Webhook(SHARED).verify(BODY, headers, json_parse=False)  # an independent one that knows only v1
    for secrets in (SHARED, PUBLIC, [SHARED, PUBLIC], [OTHER_PUBLIC, SHARED], [OTHER_PUBLIC, PUBLIC]):
        assert verify(headers, BODY, secrets, now=datetime.fromtimestamp(now, UTC)).id == "cb_1"


def test_a_signature_of_a_version_without_a_key_proves_nothing() -> None:
    assert "no signature matches" in reason_against(signed(secrets=PRIVATE), secrets=SHARED)
    assert "no signature matches" in reason_against(signed(secrets=SHARED), secrets=PUBLIC)
    assert "no signature matches" in reason_against(signed(secrets=PRIVATE), secrets=[SHARED, OTHER_PUBLIC])


def test_a_public_key_is_no_shared_secret() -> None:
    # Who knows the public key, which is everybody, must not be able to sign with it as with a secret.
    forged = Signer(HALVES).sign("cb_1", TIMESTAMP, BODY)

    assert "no signature matches" in reason_against(with_signature(forged))
    assert "no signature matches" in reason_against(with_signature(forged.replace("v1,", "v1a,")))


# Verifying


GOOD = signed()["webhook-signature"]


def unlike_ours(signature: str) -> str:
    """The same signature with S + L instead of S, which lax verifiers take for a second one."""
    raw = base64.b64decode(signature.removeprefix("v1a,"))
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(raw[32:], "little") + order
    return "v1a," + base64.b64encode(raw[:32] + s.to_bytes(32, "little")).decode()


@pytest.mark.parametrize(
    "signature",
    [
        "v1a,",
        "v1a",
        GOOD.removeprefix("v1a,"),
        GOOD.replace("v1a,", "v1,"),
        GOOD.replace("v1a,", "V1A,"),
        GOOD.replace("v1a,", "v1a,,"),
        GOOD.rstrip("="),
        GOOD + "=",
        GOOD + "\n",
        GOOD[:-3] + chr(ord(GOOD[-3]) + 1) + "==",  # stray bits: lax decoders read the same bytes
        GOOD[:-6] + "==",
        GOOD[:10] + "\n" + GOOD[10:],
        GOOD[:10] + ("A" if GOOD[10] != "A" else "B") + GOOD[11:],
        GOOD.replace("/", "_").replace("+", "-").replace("w", "_"),
        "v1a," + "A" * 86 + "==",
        "v1a," + "é" * 88,
        "v1a,\ud800",
        unlike_ours(GOOD),
    ],
)
def test_a_changed_signature_is_refused(signature: str) -> None:
    assert "no signature matches" in reason_against(with_signature(signature))


def test_everything_that_is_signed_matters() -> None:
    assert reason_against(signed()) == "verified"
    assert "no signature" in reason_against(signed(), BODY + b" ")
    assert "no signature" in reason_against(signed() | {"webhook-id": "cb_2"})
    assert "no signature" in reason_against(signed() | {"webhook-timestamp": str(TIMESTAMP + 1)})
    assert "too far from now" in reason_against(signed(at=TIMESTAMP - 301))


@pytest.mark.parametrize("around", ["{}", "v1,abc {}", "v2,abc {}", "junk {} v1a,", "v1a,c2ln {}", "é {}", "  {}  "])
def test_junk_beside_a_good_signature_is_passed_over(around: str) -> None:
    assert reason_against(with_signature(around.format(GOOD))) == "verified"


def test_a_header_full_of_signatures_costs_no_more_than_a_few_tries() -> None:
    wrong = "v1a," + base64.b64encode(bytes(64)).decode()

    assert reason_against(with_signature(" ".join([*[wrong] * 15, GOOD]))) == "verified"
    assert "no signature" in reason_against(with_signature(" ".join([*[wrong] * 16, GOOD])))
    assert reason_against(with_signature(" ".join([*["v1a,junk"] * 1000, GOOD]))) == "verified"


ITEMS = st.one_of(
    st.text("v1a,= .0123456789+/\0\n\té８\ud800", max_size=20),
    st.binary(min_size=60, max_size=66).map(lambda raw: "v1a," + base64.b64encode(raw).decode()),
    st.sampled_from([GOOD, GOOD.rstrip("="), signed(secrets=SHARED)["webhook-signature"]]),
)


@given(
    st.lists(ITEMS, max_size=4).map(" ".join),
    st.sampled_from([str(TIMESTAMP), "0", "１", "-1"]),
    st.sampled_from(["cb_1", "cb_2", "a.b", "\ud800"]),
    st.sampled_from([BODY, b"", b"other"]),
)
@settings(max_examples=200, deadline=None)
def test_junk_never_raises_anything_but_signature_error_nor_passes(
    signature: str, timestamp: str, id: str, body: bytes
) -> None:
    headers = {"webhook-id": id, "webhook-timestamp": timestamp, "webhook-signature": signature}

    verdict = reason_against(headers, body, [PUBLIC, OTHER_PUBLIC])

    is_ours = (id, timestamp, body) == ("cb_1", str(TIMESTAMP), BODY) and GOOD in signature.split(" ")
    assert (verdict == "verified") is is_ours


# Without the extra

WITHOUT_THE_EXTRA = """
import json, sys
sys.modules["cryptography"] = None  # as if it weren't installed
from callbackq import Signer
from callbackq.errors import InvalidRequestError
from callbackq.signing import public_key_of, verify
from datetime import UTC, datetime

now = datetime.now(UTC)
private, public, shared = sys.argv[1:]
signature = Signer(shared).sign("a", int(now.timestamp()), b"")
headers = {"webhook-id": "a", "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signature}
found = [verify(headers, b"", shared, now=now).id]
for use in (
    lambda: Signer([shared, private]),
    lambda: Signer(lambda: private).sign("a", 1, b""),
    lambda: verify(headers, b"", [shared, public], now=now),
    lambda: public_key_of(private),
):
    try:
        use()
    except InvalidRequestError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_without_the_extra_all_else_works_and_keys_are_refused_naming_it() -> None:
    command = [sys.executable, "-c", WITHOUT_THE_EXTRA, PRIVATE, PUBLIC, SHARED]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout

    needs = "needs a package for ed25519: pip install 'callbackq[ed25519]'"
    assert json.loads(printed) == [
        "a",
        f"secrets[1]: {needs}",
        f"secrets[0]: {needs}",
        f"secrets[1]: {needs}",
        f"private_key: {needs}",
    ]


def test_importing_callbackq_imports_no_cryptography() -> None:
    code = "import sys, callbackq, callbackq.signing; sys.exit('cryptography' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_keys_show_nothing_of_themselves() -> None:
    for key in (*signing_keys([PRIVATE, SHARED]), *verifying_keys([PUBLIC, SHARED])):
        shown = repr(key) + str(key)
        assert not [part for part in (PRIVATE[5:], SHARED[6:], repr(SEED)) if part in shown]
