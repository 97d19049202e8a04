"""Signatures that an independent implementation accepts, and a verifier that no junk can upset."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from callbackq.errors import CallbackqError, InvalidRequestError, SignatureError
from callbackq.signing import Signer, Verified, verify

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
OTHER = "whsec_" + base64.b64encode(bytes(range(100, 124))).decode()
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
TIMESTAMP = int(NOW.timestamp())
BODY = b'{"ok": true}'
BINARY = bytes(range(256))


def signed(
    body: bytes = BODY, *, secrets: Any = SECRET, id: str = "cb_1", timestamp: int = TIMESTAMP
) -> dict[str, str]:
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": Signer(secrets).sign(id, timestamp, body),
    }


def reason_against(headers: Any, body: bytes = BODY, secrets: Any = SECRET, **options: Any) -> str:
    try:
        verify(headers, body, secrets, **{"now": NOW, **options})
    except SignatureError as error:
        return str(error)
    return "verified"


# Against an implementation that isn't ours


@pytest.mark.parametrize("body", ["", "{}", '{"städte": ["Köln", "東京"]}', "a.b.c", "\n\0 x"])
def test_the_independent_verifier_accepts_our_signature(body: str) -> None:
    now = int(datetime.now(UTC).timestamp())

    Webhook(SECRET).verify(body, signed(body.encode(), timestamp=now), json_parse=False)


def test_the_independent_verifier_accepts_one_of_several_signatures() -> None:
    now = int(datetime.now(UTC).timestamp())
    headers = signed(secrets=[SECRET, OTHER], timestamp=now)

    for secret in (SECRET, OTHER):
        Webhook(secret).verify(BODY, headers, json_parse=False)
    with pytest.raises(WebhookVerificationError):
        Webhook(b"x" * 32).verify(BODY, headers, json_parse=False)


@pytest.mark.parametrize("body", ["", "{}", '{"städte": ["Köln", "東京"]}', "a.b.c"])
def test_we_accept_the_independent_signature(body: str) -> None:
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(TIMESTAMP),
        "webhook-signature": Webhook(SECRET).sign("msg_1", NOW, body),
    }

    assert verify(headers, body.encode(), SECRET, now=NOW) == Verified(id="msg_1", timestamp=NOW)


@pytest.mark.parametrize(
    "body", [BINARY, b"\xff\xfe", b"\xc3\x28", b"\x80" * 1000], ids=["all", "bom", "bad utf-8", "long"]
)
def test_a_body_is_signed_as_bytes_whatever_they_mean(body: bytes) -> None:
    # The independent package signs text only, so this is the definition itself.
    expected = hmac.new(KEY, b"cb_1." + str(TIMESTAMP).encode() + b"." + body, hashlib.sha256).digest()

    assert signed(body)["webhook-signature"] == "v1," + base64.b64encode(expected).decode()
    assert reason_against(signed(body), body) == "verified"


def test_the_published_example_comes_out() -> None:
    # From the Standard Webhooks documentation.
    signature = Signer("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").sign(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )

    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


# Signing


def test_every_secret_signs_the_newest_first() -> None:
    assert signed(secrets=[SECRET, OTHER])["webhook-signature"].split(" ") == [
        signed(secrets=SECRET)["webhook-signature"],
        signed(secrets=OTHER)["webhook-signature"],
    ]


@pytest.mark.parametrize(
    "secret",
    [SECRET, KEY, [KEY], (SECRET,), SECRET.rstrip("="), lambda: SECRET, lambda: [KEY]],
    ids=["text", "bytes", "list", "tuple", "unpadded", "provider", "provider of several"],
)
def test_a_secret_may_be_given_in_several_forms(secret: Any) -> None:
    assert Signer(secret).sign("cb_1", TIMESTAMP, BODY) == Signer(SECRET).sign("cb_1", TIMESTAMP, BODY)


def test_a_provider_is_asked_for_every_signature() -> None:
    answers = [SECRET, [OTHER, SECRET], OTHER]
    signer = Signer(lambda: answers.pop(0))

    made = [signer.sign("cb_1", TIMESTAMP, BODY) for _ in range(3)]

    assert made == [signed(secrets=secrets)["webhook-signature"] for secrets in (SECRET, [OTHER, SECRET], OTHER)]


def test_what_a_provider_raises_comes_out() -> None:
    def fail() -> str:
        raise ConnectionError("the vault can't be reached")

    with pytest.raises(ConnectionError):
        Signer(fail).sign("cb_1", TIMESTAMP, BODY)


def test_a_list_of_secrets_that_changes_later_changes_nothing() -> None:
    secrets = [SECRET]
    signer = Signer(secrets)
    secrets.clear()

    assert signer.sign("cb_1", TIMESTAMP, BODY) == Signer(SECRET).sign("cb_1", TIMESTAMP, BODY)


BAD_SECRETS = [
    ([], ["secrets"]),
    (None, ["secrets"]),
    (7, ["secrets"]),
    ({SECRET}, ["secrets"]),
    (bytearray(32), ["secrets"]),
    (memoryview(bytes(32)), ["secrets"]),
    ("", ["secrets[0]"]),
    ("CANARY" * 8, ["secrets[0]"]),
    (SECRET.removeprefix("whsec_"), ["secrets[0]"]),
    ("whsec_", ["secrets[0]"]),
    ("whsec_CANARY_CANARY_CANARY_CANARY_CANARY", ["secrets[0]"]),
    ("whsec_" + "CANARY+" * 7, ["secrets[0]"]),
    ("whsec_" + "NARY_" * 8, ["secrets[0]"]),
    ("whsec_äöü" + "CANARY" * 8, ["secrets[0]"]),
    (f" {SECRET}", ["secrets[0]"]),
    (b"CANARY".ljust(23), ["secrets[0]"]),
    (b"CANARY".ljust(65), ["secrets[0]"]),
    ([SECRET, b"short", OTHER, None, 24], ["secrets[1]", "secrets[3]", "secrets[4]"]),
]


@pytest.mark.parametrize(("secrets", "paths"), BAD_SECRETS, ids=range(len(BAD_SECRETS)))
def test_malformed_secrets_are_refused_by_index_and_never_quoted(secrets: Any, paths: list[str]) -> None:
    provider = Signer(lambda: secrets)
    for refused in (
        lambda: Signer(secrets),
        lambda: provider.sign("cb_1", TIMESTAMP, BODY),
        lambda: verify(signed(), BODY, secrets, now=NOW),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            refused()
        assert [path for path, _ in caught.value.errors] == paths
        assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("size", [24, 64])
def test_secrets_of_24_to_64_bytes_are_taken(size: int) -> None:
    assert signed(secrets=b"k" * size) == signed(secrets="whsec_" + base64.b64encode(b"k" * size).decode())


@pytest.mark.parametrize(
    ("id", "timestamp", "paths"),
    [
        ("a.b", TIMESTAMP, ["id"]),
        ("", TIMESTAMP, ["id"]),
        ("a b", TIMESTAMP, ["id"]),
        ("ä", TIMESTAMP, ["id"]),
        ("a\n", TIMESTAMP, ["id"]),
        ("x" * 256, TIMESTAMP, ["id"]),
        (None, -1, ["id", "timestamp"]),
        ("a", 1.5, ["timestamp"]),
        ("a", True, ["timestamp"]),
        ("a", "1", ["timestamp"]),
        ("a", 10**11, ["timestamp"]),
        ("a", 10**5000, ["timestamp"]),
    ],
    ids=range(12),
)
def test_what_could_be_read_in_two_ways_is_not_signed(id: Any, timestamp: Any, paths: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Signer(SECRET).sign(id, timestamp, BODY)

    assert [path for path, _ in caught.value.errors] == paths


def test_a_signer_shows_no_secret() -> None:
    for signer in (Signer(SECRET), Signer([KEY, OTHER]), Signer(lambda: SECRET)):
        assert (repr(signer), str(signer)) == ("<Signer>", "<Signer>")


# Verifying


def test_a_verified_request_tells_id_and_time() -> None:
    assert verify(signed(), BODY, SECRET, now=NOW) == Verified(id="cb_1", timestamp=NOW)


def test_any_secret_of_several_will_do_on_either_side() -> None:
    assert reason_against(signed(secrets=[OTHER, SECRET]), secrets=SECRET) == "verified"
    assert reason_against(signed(secrets=SECRET), secrets=[OTHER, KEY]) == "verified"
    assert "no signature matches" in reason_against(signed(secrets=SECRET), secrets=OTHER)


@pytest.mark.parametrize("change", [str.upper, str.title, str.lower])
def test_header_names_are_read_in_any_case(change: Any) -> None:
    headers = {change(name): value for name, value in signed().items()} | {"Content-Type": "text/plain", "X": "y"}

    assert reason_against(headers) == "verified"


@pytest.mark.parametrize("seconds", [-300, -299, 0, 299, 300])
def test_time_may_differ_by_the_tolerance_in_both_directions(seconds: int) -> None:
    assert reason_against(signed(timestamp=TIMESTAMP + seconds)) == "verified"


@pytest.mark.parametrize("seconds", [-(10**9), -301, 301, 10**9])
def test_what_is_too_old_or_too_new_is_refused(seconds: int) -> None:
    assert "too far from now" in reason_against(signed(timestamp=TIMESTAMP + seconds))


def test_the_tolerance_is_the_callers() -> None:
    headers = signed(timestamp=TIMESTAMP + 3600)

    assert reason_against(headers, tolerance=timedelta(hours=1)) == "verified"
    assert "too far" in reason_against(headers, tolerance=timedelta(minutes=59))
    assert reason_against(signed(), tolerance=timedelta(0)) == "verified"
    assert reason_against(signed(timestamp=0), tolerance=timedelta.max) == "verified"


def test_now_may_be_in_any_time_zone() -> None:
    assert reason_against(signed(), now=NOW.astimezone(timezone(timedelta(hours=9)))) == "verified"


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "v2,abc {}",
        "v1a,c2ln {}",
        "{} v1a,c2ln",
        "junk {}",
        ", {} ,",
        "v1 {}",
        "  {}  ",
        "v1, {}",
        "v1,x,y {}",
        "é {}",
        "\ud800 {}",
    ],
)
def test_signatures_of_other_versions_and_junk_beside_a_good_one_are_passed_over(around: str) -> None:
    headers = signed()
    headers["webhook-signature"] = around.format(headers["webhook-signature"])

    assert reason_against(headers) == "verified"


@pytest.mark.parametrize(
    "change",
    [
        lambda value: "",
        lambda value: " ",
        lambda value: "v1",
        lambda value: "v1,",
        lambda value: value.removeprefix("v1,"),
        lambda value: value.replace("v1,", "v1a,"),
        lambda value: value.replace("v1,", "V1,"),
        lambda value: value.rstrip("="),
        lambda value: value + "=",
        lambda value: value[:-2] + ("B" if value[-2] == "A" else "A") + "=",
        lambda value: value.replace(",", " "),
        lambda value: value + "\n",
        lambda value: "\ud800",
        lambda value: "é" * 50,
        lambda value: "v1,\0",
    ],
)
def test_a_changed_signature_is_refused(change: Any) -> None:
    headers = signed()
    headers["webhook-signature"] = change(headers["webhook-signature"])

    assert "no signature matches" in reason_against(headers)


def test_everything_that_is_signed_matters() -> None:
    assert "no signature" in reason_against(signed(), BODY + b" ")
    assert "no signature" in reason_against(signed() | {"webhook-id": "cb_2"})
    assert "no signature" in reason_against(signed() | {"webhook-timestamp": str(TIMESTAMP + 1)})


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_missing_header_is_named(name: str) -> None:
    headers: dict[str, Any] = signed()
    del headers[name]

    assert reason_against(headers) == f"there is no {name} header"
    assert reason_against(headers | {name: None}) == f"there is no {name} header"
    assert reason_against(headers | {name.encode(): b"x", 7: 7}) == f"there is no {name} header"


def test_a_header_that_is_there_twice_is_refused() -> None:
    assert "webhook-id header is there twice" in reason_against(signed() | {"Webhook-Id": "cb_1"})


@pytest.mark.parametrize(
    "value",
    ["", "x", "1.0", "-1", "+1", " 1", "1 ", "01", "1e9", "１", "1２", "nan", "9" * 12, "9" * 5000, "\ud800", "1\n"],
)
def test_a_malformed_timestamp_is_refused(value: str) -> None:
    assert "webhook-timestamp header is not" in reason_against(signed() | {"webhook-timestamp": value})


@pytest.mark.parametrize("value", ["", "a.b", "a b", "ä", "\ud800", "x" * 256, "a\0", "a\n"])
def test_a_malformed_id_is_refused(value: str) -> None:
    assert "webhook-id header is not" in reason_against(signed() | {"webhook-id": value})


def test_signed_text_cannot_be_cut_at_another_place() -> None:
    # "a.1.2" + "." + body is also id "a", timestamp 1, body "2." + body.
    headers = signed(b"1772366400.rest", id="a")
    moved = headers | {"webhook-id": f"a.{TIMESTAMP}", "webhook-timestamp": "1772366400"}

    assert "webhook-id header is not" in reason_against(moved, b"rest")


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        ({"body": "text"}, ["body"]),
        ({"body": json.loads(BODY)}, ["body"]),
        ({"now": NOW.replace(tzinfo=None)}, ["now"]),
        ({"now": TIMESTAMP}, ["now"]),
        ({"tolerance": 300}, ["tolerance"]),
        ({"tolerance": timedelta(seconds=-1)}, ["tolerance"]),
        ({"body": None, "now": None, "tolerance": None}, ["body", "now", "tolerance"]),
    ],
)
def test_unusable_arguments_of_the_receiver_are_named(arguments: dict[str, Any], paths: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        verify(**{"headers": signed(), "body": BODY, "secrets": SECRET, "now": NOW, **arguments})

    assert [path for path, _ in caught.value.errors] == paths


def test_a_signature_error_is_one_of_ours_and_quotes_nothing() -> None:
    for headers in (
        signed() | {"webhook-id": "CANARY."},
        {"webhook-id": "CANARY"},
        signed() | {"webhook-timestamp": "CANARY"},
    ):
        with pytest.raises(CallbackqError) as caught:
            verify(headers, BODY, SECRET, now=NOW)
        assert type(caught.value) is SignatureError
        assert "CANARY" not in str(caught.value)
        assert caught.value.__cause__ is None


JUNK = st.one_of(
    st.text("v1,= .0123456789ab\0\n\té８\ud800", max_size=20),
    st.sampled_from([str(TIMESTAMP), "cb_1", signed()["webhook-signature"], "v1," + "A" * 43 + "="]),
    st.none(),
    st.binary(max_size=4),
)


@given(
    st.dictionaries(st.sampled_from(["webhook-id", "Webhook-Id", "webhook-timestamp", "webhook-signature", "x"]), JUNK),
    st.binary(max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_junk_never_raises_anything_but_signature_error(headers: dict[str, Any], body: bytes) -> None:
    reason_against(headers, body)


@given(
    st.binary(max_size=50),
    st.from_regex(r"[!-\-/-~]{1,20}", fullmatch=True),
    st.integers(0, 10**10),
    st.binary(min_size=24, max_size=64),
)
@settings(max_examples=60, deadline=None)
def test_what_is_signed_always_verifies(body: bytes, id: str, timestamp: int, secret: bytes) -> None:
    now = datetime.fromtimestamp(timestamp, UTC)

    verified = verify(signed(body, secrets=secret, id=id, timestamp=timestamp), body, [KEY, secret], now=now)

    assert verified == Verified(id=id, timestamp=now)
