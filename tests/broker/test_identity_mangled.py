"""Tokens that no provider made: each is refused, and nothing else happens."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from identity_provider import NOW, Clock, Pages, claims_of, ec_key, jwk, signer, token

from egressd.broker.identity.issuers import Issuer
from egressd.broker.identity.tokens import Unauthenticated, Verifier

ISSUER = Issuer(name="op", issuer="https://op.example", audiences=("egressd",))


@functools.cache
def verifier() -> Verifier:
    """Threads share one, and so do these."""
    pages = Pages(ISSUER.issuer, [jwk(ec_key(), kid="1")])
    return Verifier([ISSUER], clock=Clock(), elapsed=Clock(0.0), fetch=pages)


def made(header: Any, claims: Any) -> str:
    return token(header, claims, signer(ec_key(), "ES256"))


HEADER = {"alg": "ES256", "kid": "1", "typ": "JWT"}
CLAIMS = claims_of(ISSUER)
GOOD = made(HEADER, CLAIMS)


def verified(text: str, nonce: str = "") -> bool:
    """Anything but an identity and a refusal ends the test."""
    try:
        identity = verifier().verify(text, nonce=nonce)
    except Unauthenticated as refusal:
        assert refusal.text.isprintable()
        assert len(refusal.text) < 600
        return False
    assert identity.issuer == "op"
    assert identity.user.startswith("user:op:")
    assert identity.expires > NOW - 60
    return True


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def test_the_one_that_is_mangled_is_good() -> None:
    assert verified(GOOD)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200), nonce=st.text(max_size=5))
def test_any_text(text: str, nonce: str) -> None:
    assert not verified(text, nonce)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_good_one_with_characters_changed(data: st.DataObject) -> None:
    """The claims are signed as they stand, and base64url has one spelling of each: no other text is good."""
    text = list(GOOD)
    for place in data.draw(st.lists(st.integers(0, len(text) - 1), min_size=1, max_size=4)):
        text[place] = data.draw(st.sampled_from("Aa0_-.=+/ é\0"))
    assert verified("".join(text)) == ("".join(text) == GOOD)


@settings(max_examples=200, deadline=None)
@given(header=st.binary(max_size=60), claims=st.binary(max_size=60))
def test_signed_bytes(header: bytes, claims: bytes) -> None:
    assert not verified(made(HEADER, claims))
    assert not verified(made(header, CLAIMS))


@settings(max_examples=200, deadline=None)
@given(changed=st.dictionaries(st.sampled_from((*HEADER, "crit", "b64", "jwk", "x")), _JSON, max_size=2))
def test_headers_of_any_type(changed: dict[str, Any]) -> None:
    header = HEADER | changed
    if verified(made(header, CLAIMS)):
        assert header["alg"] == "ES256"
        assert not header.keys() & {"crit", "b64", "jwk"}


_CLAIMS = st.sampled_from(
    (*CLAIMS, "azp", "nbf", "nonce", "hasgroups", "_claim_names", "email_verified", "scp", "typ")
)


@settings(max_examples=200, deadline=None)
@given(changed=st.dictionaries(_CLAIMS, _JSON, max_size=2))
def test_signed_claims_of_any_type(changed: dict[str, Any]) -> None:
    claims = CLAIMS | changed
    if verified(made(HEADER, claims)):
        assert claims["iss"] == ISSUER.issuer
        assert claims["aud"] in ("egressd", ["egressd"])
        assert isinstance(claims["sub"], str)
        assert isinstance(claims["groups"], str | list)
        assert not claims.keys() & {"scp", "hasgroups"}
