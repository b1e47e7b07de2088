"""A token, and every field of it wrong in turn. A good one is believed; of others the record knows why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from identity_provider import (
    NOW,
    Clock,
    Pages,
    claims_of,
    ec_key,
    ed_key,
    jwk,
    key_set,
    pem,
    rsa_key,
    signer,
    spelt,
    token,
    written,
)

from egressd.access.claims import Provider
from egressd.access.principals import Identity
from egressd.broker.identity.issuers import ALGORITHMS, Issuer, Nonce
from egressd.broker.identity.tokens import MAX_TOKEN, PUBLIC_TEXT, Code, Unauthenticated, Verifier

CLIENT = "0oa-egressd"
TENANT = "6f1c1e0a-3c2b-4d5e-8f90-a1b2c3d4e5f6"
OKTA = Issuer(
    name="okta",
    issuer="https://acme.okta.example/oauth2/default",
    audiences=(CLIENT, "0oa-console"),
    provider=Provider.OKTA,
)
KEYS = {"r1": rsa_key(), "e1": ec_key(), "o1": ed_key()}
PUBLISHED = [jwk(key, kid=kid) for kid, key in KEYS.items()]


def verifier(*issuers: Issuer, pages: Pages | None = None, clock: Clock | None = None) -> Verifier:
    fetch = pages or Pages(OKTA.issuer, PUBLISHED)
    return Verifier(issuers or (OKTA,), clock=clock or Clock(), elapsed=Clock(0.0), fetch=fetch)


def signed(claims: Any, *, alg: str = "RS256", kid: str | None = "r1", key: Any = None, **header: Any) -> str:
    """A header member that is None is left out."""
    head = {"alg": alg, "kid": kid, "typ": "JWT"} | header
    head = {name: value for name, value in head.items() if value is not None}
    return token(head, claims, signer(key or KEYS.get(kid or "r1"), alg))


def good(**claims: Any) -> dict[str, Any]:
    return claims_of(OKTA, **claims)


def refusal(text: Any, *, by: Verifier | None = None, nonce: str = "") -> Code:
    with pytest.raises(Unauthenticated) as caught:
        (by or verifier()).verify(text, nonce=nonce)
    assert len(caught.value.text) < 500
    assert caught.value.text.isascii()
    assert caught.value.text.isprintable()
    return caught.value.code


def believed(text: str, *, by: Verifier | None = None, nonce: str = "") -> Identity:
    return (by or verifier()).verify(text, nonce=nonce)


def test_a_good_token_says_who_asks() -> None:
    assert believed(signed(good())) == Identity(
        issuer="okta",
        subject="00u1anna",
        groups=frozenset({"group:okta:finance"}),
        email="anna@acme.example",
        expires=NOW + 3600,
    )


def test_what_the_asker_is_told_says_nothing_of_why() -> None:
    assert PUBLIC_TEXT == "invalid token"
    assert not any(code in PUBLIC_TEXT.split() for code in Code)


@pytest.mark.parametrize(
    ("alg", "key"),
    [
        *((alg, rsa_key()) for alg in ALGORITHMS if alg[:2] in ("RS", "PS")),
        ("ES256", ec_key()),
        ("EdDSA", ed_key()),
    ],
)
def test_each_algorithm_is_verified_where_it_is_configured_and_refused_where_not(alg: str, key: Any) -> None:
    pages = Pages(OKTA.issuer, [jwk(key, kid="k")])
    text = signed(good(), alg=alg, kid="k", key=key)
    assert believed(text, by=verifier(replace(OKTA, algorithms=(alg,)), pages=pages)).subject == "00u1anna"
    others = tuple(other for other in ALGORITHMS if other != alg)
    assert refusal(text, by=verifier(replace(OKTA, algorithms=others), pages=pages)) is Code.ALGORITHM


# ---- claims, each wrong in turn. None: the claim is missing

WRONG_CLAIMS: list[tuple[str, Any, Code]] = [
    ("iss", None, Code.ISSUER),
    ("iss", "", Code.ISSUER),
    ("iss", OKTA.issuer + "/", Code.ISSUER),
    ("iss", OKTA.issuer.upper(), Code.ISSUER),
    ("iss", OKTA.issuer.replace("https", "http"), Code.ISSUER),
    ("iss", [OKTA.issuer], Code.ISSUER),
    ("iss", {"okta": 1}, Code.ISSUER),
    ("iss", "https://evil.example", Code.ISSUER),
    ("aud", None, Code.AUDIENCE),
    ("aud", "", Code.AUDIENCE),
    ("aud", [], Code.AUDIENCE),
    ("aud", "0oa-other", Code.AUDIENCE),
    ("aud", CLIENT.upper(), Code.AUDIENCE),
    ("aud", CLIENT + " ", Code.AUDIENCE),
    ("aud", [CLIENT, "0oa-other"], Code.AUDIENCE),
    ("aud", [CLIENT, 1], Code.AUDIENCE),
    ("aud", [[CLIENT]], Code.AUDIENCE),
    ("aud", {CLIENT: 1}, Code.AUDIENCE),
    ("aud", [CLIENT] * 33, Code.AUDIENCE),
    ("aud", [CLIENT, "0oa-console"], Code.PARTY),  # and no azp
    ("azp", "0oa-other", Code.PARTY),
    ("azp", "", Code.PARTY),
    ("azp", [CLIENT], Code.PARTY),
    ("azp", 0, Code.PARTY),
    ("exp", None, Code.EXPIRED),
    ("exp", int(NOW) - 60, Code.EXPIRED),
    ("exp", int(NOW) - 86_400, Code.EXPIRED),
    ("exp", int(NOW) - 10, Code.EXPIRED),  # when it was issued
    ("exp", str(int(NOW) + 3600), Code.EXPIRED),
    ("exp", True, Code.EXPIRED),
    ("exp", 0, Code.EXPIRED),
    ("exp", -1, Code.EXPIRED),
    ("exp", 10**40, Code.EXPIRED),
    ("exp", [int(NOW) + 3600], Code.EXPIRED),
    ("nbf", int(NOW) + 61, Code.EARLY),
    ("nbf", str(int(NOW)), Code.EARLY),
    ("nbf", False, Code.EARLY),
    ("nbf", {}, Code.EARLY),
    ("iat", None, Code.ISSUED),
    ("iat", int(NOW) + 61, Code.ISSUED),
    ("iat", str(int(NOW)), Code.ISSUED),
    ("iat", True, Code.ISSUED),
    ("iat", 0, Code.ISSUED),
    ("iat", int(NOW) - 86_400 - 61, Code.AGE),
    ("sub", None, Code.SUBJECT),
    ("sub", "", Code.SUBJECT),
    ("sub", 7, Code.SUBJECT),
    ("sub", ["00u1anna"], Code.SUBJECT),
    ("sub", "00u1\nanna", Code.CLAIMS),
    ("sub", "a" * 256, Code.CLAIMS),
    ("nonce", "n-1", Code.NONCE),  # the asker says none
    ("nonce", 1, Code.NONCE),
    ("nonce", "n" * 257, Code.NONCE),
    ("groups", None, Code.CLAIMS),
    ("groups", "finance", Code.CLAIMS),
    ("groups", {"finance": True}, Code.CLAIMS),
    ("groups", [1], Code.CLAIMS),
    ("groups", ["finance", None], Code.CLAIMS),
    ("groups", ["fin\nance"], Code.CLAIMS),
    ("groups", ["x" * 400], Code.CLAIMS),
    ("groups", True, Code.CLAIMS),
    ("_claim_names", {"groups": "src1"}, Code.CLAIMS),
    ("scp", ["openid"], Code.KIND),  # an access token of Okta or Entra
    ("scope", "openid groups", Code.KIND),  # RFC 9068
    ("events", {"http://schemas.openid.net/event/backchannel-logout": {}}, Code.KIND),
    ("token_use", "access", Code.KIND),
    ("typ", "Bearer", Code.KIND),
    ("typ", "Refresh", Code.KIND),
    ("typ", ["ID"], Code.KIND),
]


@pytest.mark.parametrize(("name", "value", "code"), WRONG_CLAIMS, ids=lambda x: str(x)[:40])
def test_a_claim_that_is_wrong(name: str, value: Any, code: Code) -> None:
    assert refusal(signed(good(**{name: value}))) is code


RIGHT_CLAIMS: list[tuple[str, Any]] = [
    ("aud", [CLIENT]),
    ("aud", "0oa-console"),
    ("azp", CLIENT),
    ("azp", "0oa-console"),
    ("exp", int(NOW) - 9),  # the skew is a minute
    ("exp", NOW + 0.5),
    ("iat", int(NOW) + 60),
    ("iat", int(NOW) - 86_400 - 60),
    ("nbf", int(NOW) + 60),
    ("nbf", int(NOW) - 1),
    ("nonce", ""),
    ("groups", []),
    ("email", None),
    ("at_hash", "it is of an access token that nobody has here"),
    ("typ", "ID"),
    ("token_use", "id"),
    ("scopes", "are not scope"),
]


@pytest.mark.parametrize(("name", "value"), RIGHT_CLAIMS, ids=lambda x: str(x)[:40])
def test_a_claim_that_is_right(name: str, value: Any) -> None:
    claims = good(**{name: value})
    if name == "exp":
        claims["iat"] = int(value) - 100
    assert believed(signed(claims)).subject == "00u1anna"


def test_several_audiences_need_a_party_and_all_of_them_trust() -> None:
    both = [CLIENT, "0oa-console"]
    assert believed(signed(good(aud=both, azp=CLIENT)))
    assert refusal(signed(good(aud=both, azp="0oa-other"))) is Code.PARTY
    assert refusal(signed(good(aud=[*both, "0oa-other"], azp=CLIENT))) is Code.AUDIENCE


def test_a_party_that_is_no_audience_is_believed_where_it_is_configured() -> None:
    """Google: an Android client asks for a token for the web client."""
    text = signed(good(azp="android"))
    assert refusal(text) is Code.PARTY
    assert believed(text, by=verifier(replace(OKTA, parties=("android",))))
    assert refusal(signed(good(azp=CLIENT)), by=verifier(replace(OKTA, parties=("android",)))) is Code.PARTY


def test_no_skew_is_no_skew() -> None:
    strict = verifier(replace(OKTA, skew=0))
    assert refusal(signed(good(exp=int(NOW))), by=strict) is Code.EXPIRED
    assert believed(signed(good(exp=int(NOW) + 1)), by=strict)
    assert refusal(signed(good(iat=int(NOW) + 1)), by=strict) is Code.ISSUED
    assert believed(signed(good(iat=int(NOW))), by=strict)


def test_time_goes_by() -> None:
    clock = Clock()
    one = verifier(clock=clock)
    text = signed(good())
    assert believed(text, by=one)
    clock.now += 3600 + 59
    assert believed(text, by=one)
    clock.now += 1
    assert refusal(text, by=one) is Code.EXPIRED


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
def test_a_time_that_is_no_number_is_no_time(name: str, number: str) -> None:
    text = json.dumps(good(**{name: 12345})).replace("12345", number).encode()
    assert refusal(signed(text)) in (Code.FORM, Code.EXPIRED, Code.ISSUED, Code.EARLY)


# ---- headers


@pytest.mark.parametrize(
    "alg", ["none", "None", "NONE", "nOnE", "", "HS256", "HS384", "HS512", "RS1", "ES256K", "rs256"]
)
@pytest.mark.parametrize("signature", [b"", b"x", b"\0" * 256])
def test_no_other_algorithm(alg: str, signature: bytes) -> None:
    assert refusal(token({"alg": alg, "kid": "r1"}, good(), lambda _: signature)) is Code.ALGORITHM


@pytest.mark.parametrize("alg", [None, 1, ["RS256"], {"RS256": 1}, True])
def test_an_algorithm_of_another_type(alg: Any) -> None:
    header = {"kid": "r1"} if alg is None else {"alg": alg, "kid": "r1"}
    assert refusal(token(header, good(), signer(rsa_key(), "RS256"))) is Code.ALGORITHM


@pytest.mark.parametrize("alg", ["HS256", "HS384", "HS512"])
@pytest.mark.parametrize(
    "secret",
    [pem(rsa_key()), pem(rsa_key()).strip(), json.dumps(jwk(rsa_key(), kid="r1")).encode(), b"", b"r1"],
)
def test_a_public_key_is_nobodys_secret(alg: str, secret: bytes) -> None:
    assert refusal(token({"alg": alg, "kid": "r1"}, good(), signer(secret, alg))) is Code.ALGORITHM
    careless = replace(OKTA, algorithms=(*OKTA.algorithms, alg))  # the configuration's parser would refuse it
    text = token({"alg": alg, "kid": "r1"}, good(), signer(secret, alg))
    assert refusal(text, by=verifier(careless)) is Code.KEY


@pytest.mark.parametrize(("alg", "kid"), [("ES256", "r1"), ("RS256", "e1"), ("EdDSA", "r1"), ("PS256", "o1")])
def test_an_algorithm_of_another_kind_of_key(alg: str, kid: str) -> None:
    other = {"RS": "r1", "PS": "r1", "ES": "e1", "Ed": "o1"}[alg[:2]]
    assert refusal(signed(good(), alg=alg, kid=kid, key=KEYS[other])) is Code.KEY


EVIL = rsa_key(66)
HEADERS: list[tuple[str, Any, Code]] = [
    ("jwk", jwk(EVIL), Code.HEADER),
    ("jku", "https://evil.example/keys", Code.HEADER),
    ("x5u", "https://evil.example/chain.pem", Code.HEADER),
    ("x5c", ["MIIB"], Code.HEADER),
    ("jwk", None, Code.SIGNATURE),  # the forger's key alone
    ("crit", ["exp"], Code.HEADER),
    ("crit", [], Code.HEADER),
    ("crit", "b64", Code.HEADER),
    ("crit", ["b64"], Code.HEADER),
    ("b64", False, Code.HEADER),
    ("zip", "DEF", Code.HEADER),
    ("enc", "A256GCM", Code.HEADER),
    ("typ", "at+jwt", Code.HEADER),
    ("typ", "application/at+jwt", Code.HEADER),
    ("typ", "logout+jwt", Code.HEADER),
    ("typ", "dpop+jwt", Code.HEADER),
    ("typ", "", Code.HEADER),
    ("typ", ["JWT"], Code.HEADER),
    ("kid", "r2", Code.KEY),
    ("kid", "", Code.KEY),
    ("kid", "R1", Code.KEY),
    ("kid", "../../dev/null", Code.KEY),
    ("kid", "r1' OR '1'='1", Code.KEY),
    ("kid", "r1\x00", Code.KEY),
    ("kid", 1, Code.HEADER),
    ("kid", ["r1"], Code.HEADER),
    ("kid", {"kid": "r1"}, Code.HEADER),
]


def _shown(value: Any) -> str:
    """The same in every process: keys are made anew in each."""
    return f"a {value['kty']} key" if isinstance(value, dict) and "kty" in value else str(value)[:30]


@pytest.mark.parametrize(("name", "value", "code"), HEADERS, ids=_shown)
def test_a_header_that_is_wrong(name: str, value: Any, code: Code) -> None:
    """Signed by a forger, who would like us to use the key that the header brings."""
    pages = Pages(OKTA.issuer, PUBLISHED)
    text = signed(good(), key=EVIL, **{name: value})
    assert refusal(text, by=verifier(pages=pages)) is code
    assert not any("evil" in url for url in pages.asked)


@pytest.mark.parametrize("typ", [None, "JWT", "jwt", "application/jwt", "application/JWT"])
def test_a_type_that_is_right(typ: str | None) -> None:
    assert believed(signed(good(), typ=typ))


def test_a_type_of_the_configuration_is_the_only_one() -> None:
    one = verifier(replace(OKTA, types=("id+jwt",)))
    assert believed(signed(good(), typ="id+jwt"), by=one)
    assert refusal(signed(good()), by=one) is Code.HEADER
    assert refusal(signed(good(), typ=None), by=one) is Code.HEADER


def test_a_thumbprint_in_the_header_decides_nothing() -> None:
    assert believed(signed(good(), x5t="AAAA"))  # Entra's version 1 has it


# ---- the form


def _exchanged(text: str) -> str:
    header, claims, signature = text.split(".")
    return f"{claims}.{header}.{signature}"


FORMS: list[tuple[str, Callable[[str], Any], set[Code]]] = [
    ("nothing", lambda _: "", {Code.FORM}),
    ("dots", lambda _: "..", {Code.FORM}),
    ("two parts", lambda t: t.rsplit(".", 1)[0], {Code.FORM}),
    ("four parts", lambda t: t + ".AAAA", {Code.FORM}),
    ("five parts, as an encrypted one has", lambda t: t + ".AAAA.AAAA", {Code.FORM}),
    ("a dot at the end", lambda t: t + ".", {Code.FORM}),
    ("a dot at the start", lambda t: "." + t, {Code.FORM}),
    ("no signature", lambda t: t.rsplit(".", 1)[0] + ".", {Code.SIGNATURE}),
    ("truncated", lambda t: t[:-1], {Code.SIGNATURE, Code.FORM}),
    ("half", lambda t: t[: len(t) // 2], {Code.FORM, Code.SIGNATURE}),
    ("padded", lambda t: t + "=", {Code.FORM}),
    ("a space before", lambda t: " " + t, {Code.FORM}),
    ("a line end behind", lambda t: t + "\n", {Code.FORM}),
    ("the scheme with it", lambda t: "Bearer " + t, {Code.FORM}),
    ("plus for minus", lambda t: t.replace("-", "+").replace("_", "/") + "+/", {Code.FORM}),
    ("letters that look alike", lambda t: "\u0435" + t[1:], {Code.FORM}),
    ("too long", lambda t: t + "A" * MAX_TOKEN, {Code.FORM}),
    ("bytes", lambda t: t.encode(), {Code.FORM}),
    ("none at all", lambda _: None, {Code.FORM}),
    ("header and claims exchanged", _exchanged, {Code.ISSUER}),
    ("JSON for JWS", lambda t: json.dumps({"payload": t.split(".")[1], "signature": "x"}), {Code.FORM}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "codes"), FORMS, ids=[form[0] for form in FORMS])
def test_a_form_that_is_wrong(what: str, change: Callable[[str], Any], codes: set[Code]) -> None:
    text = signed(good())
    assert believed(text)
    assert refusal(change(text)) in codes


NO_OBJECTS = [
    b"", b"null", b"[]", b"7", b'"x"', b"{",
    b"{}{}", b"\xff\xfe", b"[" * 6000, b'{"a":NaN}', b'{"a":"\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("content", NO_OBJECTS)
def test_parts_that_are_no_objects(content: bytes) -> None:
    sign = signer(rsa_key(), "RS256")
    assert refusal(token({"alg": "RS256", "kid": "r1"}, content, sign)) is Code.FORM
    assert refusal(token(content, good(), sign)) is Code.FORM


def test_as_long_as_a_token_may_be() -> None:
    """Entra names up to 200 groups by UUIDs."""
    uuids = [f"6f1c1e0a-3c2b-4d5e-8f90-{number:012}" for number in range(200)]
    text = signed(good(groups=uuids))
    assert 8 * 1024 < len(text) < MAX_TOKEN
    assert len(believed(text).groups) == 200


def test_every_letter_of_a_token_counts() -> None:
    one = verifier()
    text = signed(good(), alg="ES256", kid="e1")
    for place in range(0, len(text), 7):
        if text[place] != ".":
            swapped = "A" if text[place] != "A" else "B"
            refusal(text[:place] + swapped + text[place + 1 :], by=one)
    assert believed(text, by=one)


# ---- whose key, whose token


def test_a_token_of_one_provider_signed_by_another_ones_key() -> None:
    """Both call their key "1". `iss` selects, and the key of the other verifies nothing."""
    other = replace(OKTA, name="partner", issuer="https://partner.example", audiences=(CLIENT,))
    theirs = rsa_key(1)
    pages = {
        OKTA.issuer: Pages(OKTA.issuer, [jwk(rsa_key(), kid="1")]),
        other.issuer: Pages(other.issuer, [jwk(theirs, kid="1")]),
    }
    both = Verifier(
        (OKTA, other),
        clock=Clock(),
        elapsed=Clock(0.0),
        fetch=lambda url, ca: next(page for iss, page in pages.items() if url.startswith(iss))(url, ca),
    )
    assert believed(signed(good(), kid="1", key=rsa_key()), by=both).user == "user:okta:00u1anna"
    assert believed(signed(claims_of(other), kid="1", key=theirs), by=both).user == "user:partner:00u1anna"
    assert refusal(signed(good(), kid="1", key=theirs), by=both) is Code.SIGNATURE
    assert refusal(signed(claims_of(other), kid="1", key=rsa_key()), by=both) is Code.SIGNATURE
    pages[other.issuer].keys = [jwk(theirs, kid="only-theirs")]
    assert refusal(signed(good(), kid="only-theirs", key=theirs), by=both) is Code.KEY


def test_nobody_is_configured_and_nobody_is_believed() -> None:
    assert refusal(signed(good()), by=Verifier(())) is Code.ISSUER


def test_while_no_keys_are_to_be_had_nobody_is_believed() -> None:
    down = Pages(OKTA.issuer, PUBLISHED, down=True)
    assert refusal(signed(good()), by=verifier(pages=down)) is Code.UNAVAILABLE
    assert verifier(pages=down).troubles().keys() == {"okta"}
    assert verifier().troubles() == {}
    assert verifier(pages=Pages(OKTA.issuer, [])).troubles() == {
        "okta": "it publishes no key that could be used"
    }


# ---- habits of providers

ENTRA = Issuer(
    name="entra",
    issuer=f"https://login.microsoftonline.example/{TENANT}/v2.0",
    audiences=(CLIENT,),
    provider=Provider.ENTRA,
    tenant=TENANT,
)
OID, GROUP = "11111111-2222-3333-4444-555555555555", "99999999-8888-7777-6666-555555555555"
GOOGLE = Issuer(
    name="google",
    issuer="https://accounts.google.example",
    audiences=(CLIENT,),
    provider=Provider.GOOGLE,
    domain="acme.example",
)


def entra(**claims: Any) -> str:
    return signed(claims_of(ENTRA, **({"tid": TENANT, "oid": OID, "groups": [GROUP]} | claims)))


def test_entra_names_users_and_groups_by_their_objects() -> None:
    one = verifier(ENTRA, pages=Pages(ENTRA.issuer, PUBLISHED))
    found = believed(entra(), by=one)
    assert found.user == f"user:entra:{OID}"
    assert found.groups == {f"group:entra:{GROUP}"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tid": None},
        {"tid": "6f1c1e0a-3c2b-4d5e-8f90-000000000000"},
        {"oid": None},
        {
            "groups": None,
            "_claim_names": {"groups": "src1"},
            "_claim_sources": {"src1": {"endpoint": "https://graph"}},
        },
        {"groups": None, "hasgroups": True},
        {"groups": ["finance"]},
    ],
    ids=str,
)
def test_entra_of_another_tenant_or_with_too_many_groups(wrong: dict[str, Any]) -> None:
    one = verifier(ENTRA, pages=Pages(ENTRA.issuer, PUBLISHED))
    assert refusal(entra(**wrong), by=one) is Code.CLAIMS


def test_entra_groups_by_name_from_a_file_that_may_change(tmp_path: Any) -> None:
    file = written(tmp_path / "names.yaml", f"groups: {{{GROUP}: finance}}".encode())
    one = verifier(replace(ENTRA, names_file=str(file)), pages=Pages(ENTRA.issuer, PUBLISHED))
    assert believed(entra(), by=one).groups == {f"group:entra:{GROUP}", "group:entra:finance"}
    written(file, f"groups: {{{GROUP}: board}}".encode())
    assert believed(entra(), by=one).groups == {f"group:entra:{GROUP}", "group:entra:board"}
    file.unlink()
    assert refusal(entra(), by=one) is Code.UNAVAILABLE
    assert "No such file" in one.troubles()["entra"]


def test_google_of_another_domain_and_groups_from_a_file(tmp_path: Any) -> None:
    file = written(tmp_path / "members.yaml", b'members: {"00u1anna": [research]}')
    one = verifier(replace(GOOGLE, members_file=str(file)), pages=Pages(GOOGLE.issuer, PUBLISHED))
    claims = claims_of(GOOGLE, groups=None, hd="acme.example")
    assert believed(signed(claims), by=one).groups == {"group:google:research"}
    assert refusal(signed(claims | {"hd": "evil.example"}), by=one) is Code.CLAIMS
    assert refusal(signed(claims_of(GOOGLE, groups=None)), by=one) is Code.CLAIMS  # a private account
    written(file, b"members: [")
    assert refusal(signed(claims), by=one) is Code.UNAVAILABLE


# ---- nonces


def test_a_nonce_must_be_the_askers() -> None:
    text = signed(good(nonce="n-0S6"))
    assert believed(text, nonce="n-0S6")
    assert refusal(text, nonce="n-0S7") is Code.NONCE
    assert refusal(text) is Code.NONCE
    assert refusal(signed(good()), nonce="n-0S6") is Code.NONCE
    assert believed(text, by=verifier(replace(OKTA, nonce=Nonce.IGNORE)), nonce="other")
    assert believed(signed(good(nonce="n" * 256)), nonce="n" * 256)
    assert refusal(signed(good(nonce="n" * 257)), nonce="n" * 257) is Code.NONCE
    assert believed(text, nonce="n-0S6"), "a second time, where the configuration does not say once"


def test_once_is_once_until_the_token_has_expired() -> None:
    clock = Clock(NOW - 100)
    one = verifier(replace(OKTA, nonce=Nonce.ONCE), clock=clock)
    clock.now = NOW
    assert refusal(signed(good()), by=one) is Code.NONCE
    text = signed(good(nonce="n-1"))
    assert refusal(text, by=one, nonce="n-2") is Code.NONCE, "which uses nothing up"
    assert believed(text, by=one, nonce="n-1")
    assert refusal(text, by=one, nonce="n-1") is Code.REPLAYED
    assert refusal(signed(good(nonce="n-1", exp=int(NOW) + 99)), by=one, nonce="n-1") is Code.REPLAYED
    assert believed(signed(good(nonce="n-1", sub="00u2ben")), by=one, nonce="n-1"), "of another user"
    clock.now = NOW + 3600 + 59
    assert refusal(text, by=one, nonce="n-1") is Code.REPLAYED
    clock.now += 1
    assert refusal(text, by=one, nonce="n-1") is Code.EXPIRED


def test_what_was_issued_before_the_service_began_may_have_been_used() -> None:
    one = verifier(replace(OKTA, nonce=Nonce.ONCE))  # begins at NOW
    assert refusal(signed(good(nonce="n", iat=int(NOW) - 1)), by=one, nonce="n") is Code.REPLAYED
    assert believed(signed(good(nonce="n", iat=int(NOW))), by=one, nonce="n")


def test_nothing_is_forgotten_to_make_room() -> None:
    clock = Clock()
    one = verifier(replace(OKTA, nonce=Nonce.ONCE), clock=clock)

    def use(number: int, **claims: Any) -> Callable[[], Identity]:
        text = signed(good(nonce=f"n-{number}", iat=int(NOW), **claims), alg="EdDSA", kid="o1")
        return lambda: one.verify(text, nonce=f"n-{number}")

    for number in range(64):
        use(number)()
    with pytest.raises(Unauthenticated) as caught:
        use(64)()
    assert caught.value.code is Code.FULL
    assert use(64, sub="00u2ben")(), "another user has room of their own"
    with pytest.raises(Unauthenticated) as caught:
        use(0)()
    assert caught.value.code is Code.REPLAYED
    clock.now += 3600 + 60
    assert use(65, exp=int(NOW) + 9000)(), "when those have expired there is room again"


def test_where_all_the_room_is_taken_everybody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egressd.broker.identity.tokens._MOST", 2)
    clock = Clock()
    one = verifier(replace(OKTA, nonce=Nonce.ONCE), clock=clock)
    for user in ("anna", "ben"):
        assert believed(signed(good(nonce="n", sub=user, iat=int(NOW))), by=one, nonce="n")
    cleo = signed(good(nonce="n", sub="cleo", iat=int(NOW), exp=int(NOW) + 9000))
    assert refusal(cleo, by=one, nonce="n") is Code.FULL
    clock.now += 3600 + 60
    assert believed(cleo, by=one, nonce="n")


def test_keys_from_a_file_ask_no_network(tmp_path: Any) -> None:
    file = written(tmp_path / "keys.json", key_set(*PUBLISHED))
    pages = Pages(OKTA.issuer, [])
    one = verifier(replace(OKTA, jwks_file=str(file)), pages=pages)
    assert believed(signed(good()), by=one)
    written(file, key_set(*PUBLISHED[1:]))
    assert refusal(signed(good()), by=one) is Code.KEY
    assert believed(signed(good(), alg="ES256", kid="e1"), by=one)
    written(file, b"{")
    assert refusal(signed(good(), alg="ES256", kid="e1"), by=one) is Code.UNAVAILABLE
    written(file, key_set(*PUBLISHED).ljust(256 * 1024))
    assert believed(signed(good()), by=one)
    written(file, key_set(*PUBLISHED).ljust(256 * 1024 + 1))
    assert refusal(signed(good(), alg="ES256", kid="e1"), by=one) is Code.UNAVAILABLE
    file.unlink()
    assert refusal(signed(good(), alg="ES256", kid="e1"), by=one) is Code.UNAVAILABLE
    assert pages.asked == []


def test_a_token_tells_no_terminal_what_to_do() -> None:
    with pytest.raises(Unauthenticated) as caught:
        verifier().verify(signed(good(iss="\x1b]0;evil\x07" + "x" * 5000)))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_spelt_is_what_the_standard_spells() -> None:
    assert spelt(b"\xff\xfe") == "__4"
