"""A provider's keys: which are read, which is meant, how long an answer holds, who is asked and when."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from identity_provider import WELL_KNOWN, Clock, Pages, ec_key, ed_key, jwk, key_set, rsa_key

from egressd.broker.identity import jwks, keyring
from egressd.broker.identity.fetching import Fetched
from egressd.broker.identity.issuers import ALGORITHMS, Issuer
from egressd.broker.identity.jwks import NoKey
from egressd.broker.identity.keyring import COOLDOWN, FRESH, RETRY, STALE, Keyring
from egressd.broker.identity.rereading import Unavailable
from egressd.model.errors import Unfit

ISSUER = Issuer(name="op", issuer="https://op.example", audiences=("egressd",), algorithms=ALGORITHMS)


def read(*keys: Any) -> dict[str | None, frozenset[str]]:
    return {key.kid: key.algorithms for key in jwks.read(key_set(*keys), ALGORITHMS)}


# ---- what is a key

RSA = frozenset(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"))


def test_a_key_fits_the_algorithms_of_its_type() -> None:
    assert read(
        jwk(rsa_key(), kid="r"),
        jwk(ec_key(), kid="256"),
        jwk(ec_key(0, ec.SECP384R1), kid="384"),
        jwk(ec_key(0, ec.SECP521R1), kid="521"),
        jwk(ed_key(), kid="ed"),
        jwk(rsa_key(), kid="ps", alg="PS384", use="sig", key_ops=["verify"]),
        jwk(rsa_key()),
    ) == {
        "r": RSA,
        "256": {"ES256"},
        "384": {"ES384"},
        "521": {"ES512"},
        "ed": {"EdDSA"},
        "ps": {"PS384"},
        None: RSA,
    }


def test_only_what_is_configured() -> None:
    keys = key_set(jwk(rsa_key(), kid="r"), jwk(ec_key(), kid="e"))
    assert [key.algorithms for key in jwks.read(keys, ("RS256", "ES512"))] == [{"RS256"}]


NO_KEYS: list[tuple[str, Any]] = [
    ("for encryption", jwk(rsa_key(), use="enc")),
    ("for something", jwk(rsa_key(), use=["sig"])),
    ("for signing, not verifying", jwk(rsa_key(), key_ops=["sign"])),
    ("operations that are no list", jwk(rsa_key(), key_ops="verify")),
    ("an algorithm of another type", jwk(rsa_key(), alg="ES256")),
    ("a symmetric algorithm", jwk(rsa_key(), alg="HS256")),
    ("no algorithm", jwk(rsa_key(), alg="none")),
    ("an algorithm that is a list", jwk(rsa_key(), alg=["RS256"])),
    ("weak", jwk(rsa_key(0, 1024))),
    ("a modulus that is missing", jwk(rsa_key(), n=None)),
    ("a modulus that is a number", jwk(rsa_key(), n=7)),
    ("a modulus that is empty", jwk(rsa_key(), n="")),
    ("an exponent of one", jwk(rsa_key(), e="AQ")),
    ("an even exponent", jwk(rsa_key(), e="Ag")),
    ("a huge exponent", jwk(rsa_key(), e="AQAB" * 40)),
    ("a huge modulus", jwk(rsa_key(), n="_" * 1400)),
    ("off the curve", jwk(ec_key(), x="A" * 43)),
    ("the wrong curve", jwk(ec_key(), crv="P-384")),
    ("a curve of Bitcoin's", jwk(ec_key(), crv="secp256k1")),
    ("no curve", jwk(ec_key(), crv=None)),
    ("an Edwards point that is short", jwk(ed_key(), x="AAAA")),
    ("Ed448", jwk(ed_key(), crv="Ed448")),
    ("for key agreement", jwk(ed_key(), crv="X25519")),
    ("symmetric", {"kty": "oct", "k": "c2VjcmV0", "kid": "s"}),
    ("symmetric in disguise", jwk(rsa_key(), k="c2VjcmV0")),
    ("private", jwk(rsa_key(), d="AQAB")),
    ("an unknown type", {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"}),
    ("no type", jwk(rsa_key(), kty=None)),
    ("a type that is a list", jwk(rsa_key(), kty=["RSA"])),
    ("a kid that is a number", jwk(rsa_key(), kid=1)),
    ("a kid that is endless", jwk(rsa_key(), kid="k" * 513)),
    ("text", "RSA"),
    ("nothing", None),
    ("a list", [jwk(rsa_key())]),
]


@pytest.mark.parametrize("what", [what for what, _ in NO_KEYS])
def test_what_is_no_key_is_left_out_and_the_others_stay(what: str) -> None:
    wrong = dict(NO_KEYS)[what]
    assert read(wrong, jwk(ec_key(), kid="good")) == {"good": {"ES256"}}


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b"null", b'{"keys": {}}', b'{"keys": 1}', b"[" * 100_000, b"\xff", b"<html>"],
)  # fmt: skip
def test_what_is_no_key_set(data: bytes) -> None:
    with pytest.raises(Unfit):
        jwks.read(data, ALGORITHMS)


def test_more_keys_than_anybody_has() -> None:
    assert len(jwks.read(key_set(*[jwk(ec_key())] * 100), ALGORITHMS)) == 1  # the same one counts once
    with pytest.raises(Unfit):
        jwks.read(key_set(*[jwk(ec_key())] * 101), ALGORITHMS)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_MEMBERS = st.sampled_from(("kty", "n", "e", "x", "y", "crv", "alg", "use", "kid", "key_ops", "d", "k"))


@settings(max_examples=150, deadline=None)
@given(
    which=st.sampled_from((rsa_key(), ec_key(), ed_key())),
    changed=st.dictionaries(_MEMBERS, _JSON, max_size=3),
)
def test_no_member_of_a_key_brings_the_reader_down(which: Any, changed: dict[str, Any]) -> None:
    for key in jwks.read(key_set(jwk(which) | changed), ALGORITHMS):
        assert key.algorithms <= set(ALGORITHMS)


# ---- which is meant


def choose(*keys: Any, kid: str | None, algorithm: str = "RS256") -> jwks.Key | None:
    return jwks.choose(jwks.read(key_set(*keys), ALGORITHMS), kid, algorithm)


def test_a_kid_means_its_key_and_no_other() -> None:
    one, two, nameless = jwk(rsa_key(), kid="1"), jwk(rsa_key(1), kid="2"), jwk(rsa_key(2))
    assert choose(one, two, nameless, kid="2").public == rsa_key(1).public_key()
    assert choose(one, two, nameless, kid="3") is None
    assert choose(nameless, kid="1") is None


def test_no_kid_means_the_only_key_that_fits() -> None:
    assert choose(jwk(rsa_key(), kid="1"), jwk(ec_key(), kid="2"), kid=None).kid == "1"
    assert choose(jwk(rsa_key()), kid=None).kid is None
    with pytest.raises(NoKey):
        choose(jwk(rsa_key(), kid="1"), jwk(rsa_key(1), kid="2"), kid=None)


def test_two_keys_of_one_kid() -> None:
    same = [jwk(rsa_key(), kid="1"), jwk(rsa_key(), kid="1")]
    assert choose(*same, kid="1").kid == "1"
    with pytest.raises(NoKey):
        choose(jwk(rsa_key(), kid="1"), jwk(rsa_key(1), kid="1"), kid="1")
    mixed = [jwk(rsa_key(), kid="1"), jwk(ec_key(), kid="1")]  # RFC 7517, section 4.5: equivalent ones may
    assert choose(*mixed, kid="1", algorithm="ES256").public == ec_key().public_key()


# ---- how long an answer holds


class Ring:
    """A keyring, its provider and its clock."""

    def __init__(self, *keys: Any, **options: Any) -> None:
        self.pages = Pages(ISSUER.issuer, list(keys or [jwk(ec_key(), kid="1")]), **options)
        self.clock = Clock(0.0)
        self.ring = Keyring(ISSUER, now=self.clock, fetch=self.pages)

    def finds(self, kid: str) -> bool:
        """None while nothing is known."""
        try:
            self.ring.find(kid, "ES256")
        except NoKey:
            return False
        return True

    @property
    def fetches(self) -> int:
        """Each begins with the description."""
        return sum(url.endswith(WELL_KNOWN) for url in self.pages.asked)


def test_the_provider_is_asked_once() -> None:
    one = Ring()
    for _ in range(20):
        assert one.finds("1")
    assert one.pages.asked == [ISSUER.issuer + WELL_KNOWN, ISSUER.issuer + "/keys"]


@pytest.mark.parametrize(
    ("max_age", "holds"),
    [(None, FRESH[1]), (0.0, FRESH[0]), (1.0, FRESH[0]), (600.0, 600.0), (10.0**8, FRESH[1])],
)
def test_an_answer_is_fresh_as_long_as_it_says_within_bounds(max_age: float | None, holds: float) -> None:
    one = Ring(max_age=max_age)
    assert one.finds("1")
    one.clock.now = holds - 1
    assert one.finds("1")
    assert one.fetches == 1
    one.clock.now = holds
    assert one.finds("1")
    assert one.fetches == 2


def test_rotation_is_seen_when_the_new_key_is_used() -> None:
    one = Ring()
    assert one.finds("1")
    one.clock.now += COOLDOWN
    one.pages.keys = [jwk(ec_key(1), kid="2")]
    assert one.finds("1"), "not known yet to be withdrawn"
    assert one.finds("2")
    assert not one.finds("1"), "withdrawn"
    assert one.fetches == 2


def test_a_withdrawn_key_is_believed_for_an_hour_at_most() -> None:
    one = Ring()
    assert one.finds("1")
    one.pages.keys = []
    one.clock.now += FRESH[1]
    assert not one.finds("1")


def test_unknown_kids_do_not_make_us_hammer_the_provider() -> None:
    one = Ring()
    assert one.finds("1")
    for number in range(200):
        assert not one.finds(f"random-{number}")
        one.clock.now += 1.0  # 200 seconds
    assert one.finds("1")
    assert one.fetches == 1 + 200 // COOLDOWN == 7


def test_an_outage_is_bridged_for_a_while_and_not_for_ever() -> None:
    one = Ring()
    assert one.finds("1")
    one.pages.down = True
    one.clock.now = STALE
    assert one.finds("1")
    assert not one.finds("2")
    one.clock.now = STALE + 1
    with pytest.raises(Unavailable, match="connection refused"):
        one.finds("1")
    one.pages.down = False
    one.clock.now += RETRY
    assert one.finds("1")


def test_a_provider_that_is_down_is_tried_again_now_and_then() -> None:
    one = Ring()
    one.pages.down = True
    for _ in range(10):
        with pytest.raises(Unavailable):
            one.finds("1")
    assert one.fetches == 1
    one.clock.now += RETRY
    with pytest.raises(Unavailable):
        one.finds("1")
    assert one.fetches == 2
    one.pages.down = False
    one.clock.now += RETRY
    assert one.finds("1")


@pytest.mark.parametrize(
    "description",
    [
        {"issuer": "https://op.example/"},
        {"issuer": "https://evil.example"},
        {"issuer": None},
        {"issuer": ["https://op.example"]},
        {"jwks_uri": "http://op.example/keys"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": None},
        {"jwks_uri": ["https://op.example/keys"]},
    ],
    ids=str,
)
def test_a_description_of_something_else_gives_no_keys(description: dict[str, Any]) -> None:
    one = Ring(description=description)
    with pytest.raises(Unavailable):
        one.finds("1")
    assert one.pages.asked == [ISSUER.issuer + WELL_KNOWN]


def test_an_answer_that_is_no_key_set_is_as_an_outage_and_an_empty_one_is_an_answer() -> None:
    one = Ring()
    assert one.finds("1")
    one.clock.now += FRESH[1]
    one.pages.raw = b"<html>maintenance</html>"
    assert one.finds("1")
    one.clock.now += RETRY
    one.pages.raw = json.dumps({"keys": []}).encode()
    assert not one.finds("1")


def test_many_ask_and_one_fetches() -> None:
    """Threads that come while a fetch is in flight wait for it, and none begins another."""
    arrived, go, asked = threading.Event(), threading.Event(), []
    pages = Pages(ISSUER.issuer, [jwk(ec_key(), kid="1")])

    def fetch(url: str, ca_file: str) -> Fetched:
        asked.append(url)
        arrived.set()
        assert go.wait(30)
        return pages(url, ca_file)

    ring = Keyring(ISSUER, now=Clock(0.0), fetch=fetch)
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(ring.find("1", "ES256").kid)) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert arrived.wait(30)
    go.set()
    for thread in threads:
        thread.join(30)
    assert found == ["1"] * 12
    assert len(asked) == 2


def test_with_old_keys_in_hand_nobody_waits_for_a_slow_provider() -> None:
    clock, arrived, go = Clock(0.0), threading.Event(), threading.Event()
    pages = Pages(ISSUER.issuer, [jwk(ec_key(), kid="1")])

    def fetch(url: str, ca_file: str) -> Fetched:
        if clock.now:
            arrived.set()
            assert go.wait(30)
        return pages(url, ca_file)

    ring = Keyring(ISSUER, now=clock, fetch=fetch)
    assert ring.find("1", "ES256")
    clock.now = FRESH[1]
    thread = threading.Thread(target=lambda: ring.find("1", "ES256"))
    thread.start()
    assert arrived.wait(30)
    assert ring.find("1", "ES256").kid == "1", "while the other thread is still fetching"
    go.set()
    thread.join(30)
    assert not thread.is_alive()


def test_a_slow_provider_takes_a_few_threads_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "MAX_WAITING", 1)
    arrived, go = threading.Event(), threading.Event()
    pages = Pages(ISSUER.issuer, [jwk(ec_key(), kid="1")])

    def fetch(url: str, ca_file: str) -> Fetched:
        arrived.set()
        assert go.wait(30)
        return pages(url, ca_file)

    ring = Keyring(ISSUER, now=Clock(0.0), fetch=fetch)
    thread = threading.Thread(target=lambda: ring.find("1", "ES256"))
    thread.start()
    assert arrived.wait(30)
    with pytest.raises(Unavailable):
        ring.find("1", "ES256")
    go.set()
    thread.join(30)
    assert ring.find("1", "ES256").kid == "1"
