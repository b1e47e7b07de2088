"""Claims of verified tokens, provider by provider; and every claim wrong in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from egressd.access.claims import MAX_GROUPS, GroupClaims, Provider, identity, read_members, read_names
from egressd.access.principals import Identity
from egressd.model.errors import PolicyError, Unfit

TENANT = "6f1c0b6e-8f5e-4a59-8c0e-2b6c5a0d7e11"
OID = "11111111-2222-3333-4444-555555555555"
FINANCE, BOARD = "aaaaaaaa-0000-0000-0000-000000000001", "aaaaaaaa-0000-0000-0000-000000000002"

OIDC = GroupClaims()
OKTA = GroupClaims(provider=Provider.OKTA)
ENTRA = GroupClaims(provider=Provider.ENTRA, tenant=TENANT)
NAMED = GroupClaims(provider=Provider.ENTRA, tenant=TENANT, names={FINANCE: "Finance"})
MEMBERS = {
    "104356120": frozenset({"finance"}),
    "bob@acme.example": frozenset({"research"}),
    "0": frozenset[str](),
}
GOOGLE = GroupClaims(provider=Provider.GOOGLE, domain="acme.example", members=MEMBERS)

EXP = {"exp": 1795000000}
OKTA_TOKEN = {"sub": "00u1", "groups": ["Everyone", "Finance"], "email": "ann@acme.example", **EXP}
ENTRA_TOKEN = {"sub": "pairwise", "oid": OID, "tid": TENANT, "groups": [FINANCE, BOARD], **EXP}
GOOGLE_TOKEN = {
    "sub": "104356120", "hd": "acme.example", "email": "ann@acme.example", "email_verified": True, **EXP,
}  # fmt: skip


def groups(claims: dict[str, Any], mapping: GroupClaims, name: str = "idp") -> set[str]:
    found = identity(claims, mapping, name).groups
    assert all(one.startswith(f"group:{name}:") for one in found)
    return {one.split(":", 2)[2] for one in found}


def test_a_whole_identity() -> None:
    assert identity(OKTA_TOKEN, OKTA, "okta") == Identity(
        issuer="okta",
        subject="00u1",
        groups=frozenset({"group:okta:Everyone", "group:okta:Finance"}),
        email="ann@acme.example",
        expires=1795000000.0,
    )


def test_entra_names_users_by_object_id() -> None:
    assert identity(ENTRA_TOKEN | {"oid": OID.upper()}, ENTRA, "entra").user == f"user:entra:{OID}"


GROUPS: list[tuple[str, dict[str, Any], GroupClaims, set[str]]] = [
    ("a list", OKTA_TOKEN, OIDC, {"Everyone", "Finance"}),
    ("one name", OKTA_TOKEN | {"groups": "a, b"}, OIDC, {"a, b"}),
    ("an empty list", OKTA_TOKEN | {"groups": []}, OIDC, set()),
    ("twice the same", OKTA_TOKEN | {"groups": ["a", "a"]}, OIDC, {"a"}),
    ("another claim", OKTA_TOKEN | {"roles": ["r"]}, GroupClaims(claim="roles"), {"r"}),
    ("no such claim in this provider's tokens", {"sub": "a", **EXP}, GroupClaims(claim=""), set()),
    ("left out, and said that it may be", {"sub": "a", **EXP}, GroupClaims(optional=True), set()),
    ("Okta", OKTA_TOKEN, OKTA, {"Everyone", "Finance"}),
    ("another claim is elsewhere", OKTA_TOKEN | {"_claim_names": {"x": "s"}}, OIDC, {"Everyone", "Finance"}),
    ("Entra, by id", ENTRA_TOKEN, ENTRA, {FINANCE, BOARD}),
    ("Entra, in capitals", ENTRA_TOKEN | {"groups": [FINANCE.upper()]}, ENTRA, {FINANCE}),
    ("Entra, by id and by name", ENTRA_TOKEN, NAMED, {FINANCE, "Finance", BOARD}),
    ("Google, by subject", GOOGLE_TOKEN, GOOGLE, {"finance"}),
    ("Google, by address", GOOGLE_TOKEN | {"sub": "7", "email": "Bob@ACME.example"}, GOOGLE, {"research"}),
    ("Google, listed as in no group", GOOGLE_TOKEN | {"sub": "0"}, GOOGLE, set()),
    ("Google, without a file", GOOGLE_TOKEN, replace(GOOGLE, members=None), set()),
    ("Google never reads a claim", GOOGLE_TOKEN | {"groups": ["board"]}, GOOGLE, {"finance"}),
]  # fmt: skip


@pytest.mark.parametrize("case", GROUPS, ids=[case[0] for case in GROUPS])
def test_groups(case: Any) -> None:
    _, claims, mapping, expected = case
    assert groups(claims, mapping) == expected


def without(claims: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in claims.items() if key not in names}


REFUSED: list[tuple[dict[str, Any], GroupClaims, str]] = [
    (without(OKTA_TOKEN, "groups"), OIDC, "says no groups"),
    (without(OKTA_TOKEN, "groups"), OKTA, "says no groups"),
    (OKTA_TOKEN | {"groups": None}, OIDC, "not a list"),
    (OKTA_TOKEN | {"groups": None}, GroupClaims(optional=True), "not a list"),
    (OKTA_TOKEN | {"groups": 7}, OIDC, "not a list"),
    (OKTA_TOKEN | {"groups": True}, OIDC, "not a list"),
    (OKTA_TOKEN | {"groups": {"a": 1}}, OIDC, "not a list"),
    (OKTA_TOKEN | {"groups": "Finance"}, OKTA, "not a list"),
    (OKTA_TOKEN | {"groups": ""}, OIDC, "not text"),
    (OKTA_TOKEN | {"groups": ["a", 7]}, OIDC, "not text"),
    (OKTA_TOKEN | {"groups": ["a", ["b"]]}, OIDC, "not text"),
    (OKTA_TOKEN | {"groups": ["a", None]}, OIDC, "not text"),
    (OKTA_TOKEN | {"groups": ["a", ""]}, OIDC, "not text"),
    (OKTA_TOKEN | {"groups": ["a\nb"]}, OIDC, "no name"),
    (OKTA_TOKEN | {"groups": ["\ud800"]}, OIDC, "no name"),
    (OKTA_TOKEN | {"groups": [" a"]}, OIDC, "no name"),
    (OKTA_TOKEN | {"groups": ["x" * 400]}, OIDC, "longer"),
    (OKTA_TOKEN | {"groups": [str(n) for n in range(MAX_GROUPS + 1)]}, OIDC, "names 2001 groups"),
    (OKTA_TOKEN | {"_claim_names": {"groups": "src1"}}, OIDC, "elsewhere"),
    (OKTA_TOKEN | {"_claim_names": ["groups"]}, OIDC, "elsewhere"),
    (OKTA_TOKEN | {"_claim_names": None}, OIDC, "elsewhere"),
    (OKTA_TOKEN | {"_claim_sources": {"src1": {}}}, OIDC, "elsewhere"),
    (
        without(ENTRA_TOKEN, "groups") | {"_claim_names": {"groups": "src1"}, "_claim_sources": {}},
        ENTRA,
        "elsewhere",
    ),
    (ENTRA_TOKEN | {"_claim_names": {"groups": "src1"}}, ENTRA, "elsewhere"),
    (without(ENTRA_TOKEN, "groups") | {"hasgroups": True}, ENTRA, "too many"),
    (without(ENTRA_TOKEN, "groups") | {"hasgroups": "true"}, ENTRA, "too many"),
    (ENTRA_TOKEN | {"hasgroups": False}, ENTRA, "too many"),
    (ENTRA_TOKEN | {"groups": ["Finance"]}, ENTRA, "object id"),
    (ENTRA_TOKEN | {"groups": FINANCE}, ENTRA, "not a list"),
    (ENTRA_TOKEN | {"tid": OID}, ENTRA, "another tenant"),
    (ENTRA_TOKEN | {"tid": [TENANT]}, ENTRA, "another tenant"),
    (without(ENTRA_TOKEN, "tid"), ENTRA, "another tenant"),
    (without(ENTRA_TOKEN, "oid"), ENTRA, "`oid` names no subject"),
    (ENTRA_TOKEN | {"oid": "ann"}, ENTRA, "not an object id"),
    (ENTRA_TOKEN | {"oid": 7}, ENTRA, "names no subject"),
    (without(GOOGLE_TOKEN, "hd"), GOOGLE, "another organisation"),
    (GOOGLE_TOKEN | {"hd": "evil.example"}, GOOGLE, "another organisation"),
    (GOOGLE_TOKEN | {"hd": "ACME.example"}, GOOGLE, "another organisation"),
    (GOOGLE_TOKEN | {"sub": "7"}, GOOGLE, "does not say which groups"),
    (
        GOOGLE_TOKEN | {"sub": "7", "email": "bob@acme.example", "email_verified": False},
        GOOGLE,
        "does not say",
    ),
    (
        without(GOOGLE_TOKEN, "email_verified") | {"sub": "7", "email": "bob@acme.example"},
        GOOGLE,
        "does not say",
    ),
    (GOOGLE_TOKEN | {"email": "bob@acme.example"}, GOOGLE, "contradicts itself"),
    (without(OKTA_TOKEN, "sub"), OIDC, "names no subject"),
    (OKTA_TOKEN | {"sub": ""}, OIDC, "names no subject"),
    (OKTA_TOKEN | {"sub": 7}, OIDC, "names no subject"),
    (OKTA_TOKEN | {"sub": None}, OIDC, "names no subject"),
    (OKTA_TOKEN | {"sub": ["a"]}, OIDC, "names no subject"),
    (OKTA_TOKEN | {"sub": "a b"}, OIDC, "names no subject"),
    (OKTA_TOKEN | {"sub": "a\n"}, OIDC, "names no subject"),
    (OKTA_TOKEN | {"sub": "\u00e9"}, OIDC, "names no subject"),
    (OKTA_TOKEN | {"sub": "x" * 256}, OIDC, "names no subject"),
    (without(OKTA_TOKEN, "exp"), OIDC, "no time"),
    (OKTA_TOKEN | {"exp": "1795000000"}, OIDC, "no time"),
    (OKTA_TOKEN | {"exp": True}, OIDC, "no time"),
    (OKTA_TOKEN | {"exp": float("nan")}, OIDC, "no time"),
    (OKTA_TOKEN | {"exp": float("inf")}, OIDC, "no time"),
    (OKTA_TOKEN | {"exp": -1}, OIDC, "no time"),
    (OKTA_TOKEN | {"email": 7}, OIDC, "not text"),
    (OKTA_TOKEN | {"email": ["a@b"]}, OIDC, "not text"),
    (OKTA_TOKEN | {"email": "a@b\nforged: line"}, OIDC, "no address"),
    (OKTA_TOKEN | {"email": "a\u202e@b"}, OIDC, "no address"),
    (OKTA_TOKEN | {"email": "a" * 400}, OIDC, "no address"),
]


@pytest.mark.parametrize(("claims", "mapping", "why"), REFUSED)
def test_refused(claims: dict[str, Any], mapping: GroupClaims, why: str) -> None:
    with pytest.raises(Unfit, match=why) as found:
        identity(claims, mapping, "idp")
    assert len(str(found.value)) < 500 and str(found.value).isprintable()


ADDRESSES = [
    ({}, "ann@acme.example"),
    ({"email_verified": True}, "ann@acme.example"),
    ({"email_verified": False}, ""),
    ({"email_verified": None}, ""),
    ({"email_verified": 1.5}, ""),
    ({"email": None}, ""),
]


@pytest.mark.parametrize(("more", "shown"), ADDRESSES)
def test_an_address_is_shown_unless_it_is_known_to_be_unverified(more: dict[str, Any], shown: str) -> None:
    assert identity(OKTA_TOKEN | more, OKTA, "okta").email == shown


def test_nothing_is_decided_by_an_address() -> None:
    one = identity(OKTA_TOKEN, OKTA, "okta")
    other = identity(OKTA_TOKEN | {"email": "root@acme.example"}, OKTA, "okta")
    assert one.principals == other.principals


UNSAFE: list[tuple[dict[str, Any], str]] = [
    ({"provider": Provider.ENTRA}, "tenant"),
    ({"provider": Provider.ENTRA, "tenant": "common"}, "tenant"),
    ({"provider": Provider.ENTRA, "tenant": TENANT.upper()}, "tenant"),
    ({"provider": Provider.GOOGLE}, "domain"),
    ({"members": {}}, "beside what tokens say"),
    ({"names": {"Finance": FINANCE}}, "object id"),
    ({"names": {FINANCE: BOARD}}, "called like an object id"),
    ({"names": {FINANCE: BOARD.upper()}}, "called like an object id"),
    ({"names": {FINANCE: "a", BOARD: "a"}}, "one name"),
    ({"names": {FINANCE: "\u00e9", BOARD: "e\u0301"}}, "one name"),
    ({"names": {FINANCE: "a\nb"}}, "no name"),
]


@pytest.mark.parametrize(("fields", "why"), UNSAFE)
def test_mappings_that_would_not_be_safe(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(Unfit, match=why):
        GroupClaims(**fields)


# ---- files


def test_a_file_of_members() -> None:
    data = b"members:\n  '104': [finance, board]\n  Ann@ACME.example: [research]\n  '105': []\n"
    assert read_members(data, source="f") == {
        "104": {"finance", "board"}, "ann@acme.example": {"research"}, "105": set(),
    }  # fmt: skip


def test_a_file_of_names() -> None:
    data = f"groups:\n  {FINANCE.upper()}: Finance\n  {BOARD}: The board\n".encode()
    assert read_names(data, source="f") == {FINANCE: "Finance", BOARD: "The board"}


BAD_MEMBERS = [
    (b"", "one section"),
    (b"members:", "one section"),
    (b"members: []", "one section"),
    (b"users: {}", "one section"),
    (b"members: {}\nmore: 1", "one section"),
    (b"members: {a: [x], a: [y]}", "stands here again"),
    (b"members: {a@b: [x], A@b: [y]}", "stands here already"),
    (b"members: {a: x}", "not a list"),
    (b"members: {a: }", "not a list"),
    (b"members: {a: [7]}", "not text"),
    (b"members: {a: ['x ']}", "no name"),
    (b"members: {a: &x [b], c: *x}", "anchors"),
    (b"\xff", "UTF-8"),
]
BAD_NAMES = [
    ("groups: []", "one section"),
    ("groups: {Finance: x}", "object id"),
    (f"groups: {{{FINANCE}: }}", "not text"),
    (f"groups: {{{FINANCE}: {BOARD}}}", "called like"),
    (f"groups: {{{FINANCE}: a, {BOARD}: a}}", "one name"),
]


@pytest.mark.parametrize(("data", "why"), BAD_MEMBERS)
def test_no_file_of_members(data: bytes, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        read_members(data, source="members.yaml")


@pytest.mark.parametrize(("data", "why"), BAD_NAMES)
def test_no_file_of_names(data: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        read_names(data.encode(), source="names.yaml")


# ---- anything

_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_VALUES = st.recursive(
    _PLAIN | st.sampled_from([FINANCE, OID, TENANT]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
_NAMES = st.sampled_from([
    "sub", "oid", "tid", "hd", "groups", "email", "email_verified", "exp",
    "_claim_names", "_claim_sources", "hasgroups",
])  # fmt: skip
_TOKENS = st.sampled_from(
    [(OKTA_TOKEN, OIDC), (OKTA_TOKEN, OKTA), (ENTRA_TOKEN, NAMED), (GOOGLE_TOKEN, GOOGLE)]
)


@settings(max_examples=200, deadline=None)
@given(_TOKENS, st.dictionaries(_NAMES, _VALUES, max_size=3))
@example((OKTA_TOKEN, OIDC), {"email": "\ud800"})
@example((OKTA_TOKEN, OIDC), {"exp": 10**400})
def test_any_claims_give_an_identity_or_unfit(token: Any, change: dict[str, Any]) -> None:
    claims, mapping = token
    try:
        found = identity(claims | change, mapping, "idp")
    except Unfit:
        return
    assert found.principals >= {found.user}
