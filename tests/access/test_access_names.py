"""Principals and identifiers: what is one, what is refused, and that no two spellings name the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.access.identifiers import MAX_IDENTIFIER, identifier, path_of, source_of
from egressd.access.principals import MAX_PRINCIPAL, Identity, group, principal, user
from egressd.model.errors import Unfit

GOOD = [
    "user:okta:00u1a2b3",
    "user:okta:auth0|123",
    "user:entra:6f1c0b6e-8f5e-4a59-8c0e-2b6c5a0d7e11",
    "group:okta:Finance and Legal",
    "group:keycloak:/staff/finance",
    "group:a:x:y:z",
    "group:okta:\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian, with a joiner
    "group:okta:" + "x" * (MAX_PRINCIPAL - 11),
]
BAD = [
    ("", "names nobody"),
    ("finance", "names nobody"),
    ("group:finance", "names nobody"),
    ("role:okta:admin", "names nobody"),
    ("User:okta:a", "names nobody"),
    ("user::a", "names nobody"),
    ("user:Okta:a", "names nobody"),
    ("user:-okta:a", "names nobody"),
    ("user:okta-:a", "names nobody"),
    ("user:okta:", "names nobody"),
    (" user:okta:a", "names nobody"),
    ("user:okta\n:a", "names nobody"),
    ("group:okta: finance", "no name"),
    ("group:okta:finance\u00a0", "no name"),
    ("group:okta:fin\nance", "no name"),
    ("group:okta:fin\0ance", "no name"),
    ("group:okta:fin\u2028ance", "no name"),
    ("group:okta:ecn\u202eanif", "no name"),
    ("group:okta:fin\u200bance", "no name"),
    ("group:okta:fin\u00adance", "no name"),
    ("group:okta:\ud800", "no name"),
    ("group:okta:" + "x" * MAX_PRINCIPAL, "longer"),
    (None, "not text"),
    (7, "not text"),
    (b"user:okta:a", "not text"),
    (["user:okta:a"], "not text"),
]


@pytest.mark.parametrize("text", GOOD)
def test_a_principal(text: str) -> None:
    assert principal(text) == text


@pytest.mark.parametrize(("text", "why"), BAD)
def test_no_principal(text: object, why: str) -> None:
    with pytest.raises(Unfit, match=why) as found:
        principal(text)
    assert str(found.value).isascii() and str(found.value).isprintable()


def test_one_name_however_it_was_composed() -> None:
    decomposed, composed = "group:okta:Re\u0301vision", "group:okta:R\u00e9vision"
    assert principal(decomposed) == principal(composed) == composed


def test_case_is_part_of_a_name() -> None:
    assert group("okta", "Finance") != group("okta", "finance")


def test_providers_do_not_share_users() -> None:
    assert user("okta", "7") != user("entra", "7")
    assert group("okta", "7") != user("okta", "7")


IMPOSSIBLE = [
    {"subject": ""},
    {"subject": " a"},
    {"issuer": "Okta"},
    {"groups": frozenset({"finance"})},
    {"groups": frozenset({"group:entra:finance"})},
    {"groups": frozenset({"user:okta:b"})},
    {"groups": frozenset({"group:okta:"})},
    {"groups": frozenset({"group:okta:Re\u0301vision"})},
    {"groups": frozenset({"group:okta:\u212aernel"})},
]


@pytest.mark.parametrize("fields", IMPOSSIBLE)
def test_no_identity_that_no_token_gives(fields: dict[str, object]) -> None:
    assert Identity("okta", "a").principals == {"user:okta:a"}
    with pytest.raises(Unfit):
        Identity(**({"issuer": "okta", "subject": "a"} | fields))  # type: ignore[arg-type]


# ---- identifiers

SPELT = [
    ("handbook", b"hr/leave.md", "handbook:hr/leave.md"),
    ("a", b"b", "a:b"),
    ("s-1", b"with space", "s-1:with%20space"),
    ("s", b"a\nb", "s:a%0Ab"),
    ("s", b"\xff\xfe", "s:%FF%FE"),
    ("s", "\u00e9".encode(), "s:%C3%A9"),
    ("s", b"100%", "s:100%25"),
    ("s", b"a:b", "s:a%3Ab"),
    ("s", b"...", "s:..."),
    ("s", b"-rf", "s:-rf"),
    ("s", b"x" * 255, "s:" + "x" * 255),
]
NO_PATHS = [
    b"",
    b"/",
    b"/etc/passwd",
    b"a/",
    b"a//b",
    b".",
    b"..",
    b"../x",
    b"a/../b",
    b"a/.",
    b"a\0b",
    b"x" * 256,
]
NO_IDENTIFIERS = [
    "", ":", "s", "s:", ":a", "S:a", "s-:a", "-s:a", "s:/a", "s:../a", "s:a/../b", "s:a//b", "s:a/", "s:a b",
    "s:%", "s:%2", "s:%2e%2e/a", "s:%2E", "s:%2F", "s:a%2Fb", "s:%00", "s:%61", "s:\u00e9", "s:a\n", "s\n:a",
    "s:a:b", "s:" + "a/" * 1200 + "a",
]  # fmt: skip


@pytest.mark.parametrize(("source", "path", "text"), SPELT)
def test_an_identifier(source: str, path: bytes, text: str) -> None:
    assert identifier(source, path) == text
    assert (source_of(text), path_of(text)) == (source, path)


@pytest.mark.parametrize("path", NO_PATHS)
def test_no_path_below_a_directory(path: bytes) -> None:
    with pytest.raises(Unfit):
        identifier("s", path)


@pytest.mark.parametrize("text", NO_IDENTIFIERS)
def test_no_identifier(text: str) -> None:
    with pytest.raises(Unfit):
        path_of(text)


@pytest.mark.parametrize("source", ["", "S", "a_b", "-a", "a-", "a" * 33, "a\n", "a:b", "a/b", ".."])
def test_no_source(source: str) -> None:
    with pytest.raises(Unfit):
        identifier(source, b"a")


def test_the_longest_identifier() -> None:
    fits = b"/".join([b"\xff" * 227] * 3)[: (MAX_IDENTIFIER - 2) // 3]
    assert len(identifier("s", fits)) <= MAX_IDENTIFIER
    with pytest.raises(Unfit, match="shorter"):
        identifier("s", fits + b"/" + b"\xff" * 2)


_NAMES = st.binary(min_size=1, max_size=24).filter(lambda b: b not in (b".", b"..") and not {0, 47} & set(b))
_PATHS = st.lists(_NAMES, min_size=1, max_size=5).map(b"/".join)


@settings(max_examples=200, deadline=None)
@given(_PATHS)
def test_identifiers_round_trip(path: bytes) -> None:
    text = identifier("src", path)
    assert path_of(text) == path
    assert source_of(text) == "src"
    assert text.isascii() and text.isprintable() and " " not in text


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("s:a/.%2EF0 \n\u00e9"), max_size=20))
def test_no_path_has_two_identifiers(text: str) -> None:
    try:
        path = path_of(text)
    except Unfit:
        return
    assert identifier(source_of(text), path) == text
