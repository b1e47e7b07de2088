"""Providers as broker.yaml names them: what is read, and every problem at its line."""

from __future__ import annotations

import pytest

from egressd.access.claims import Provider
from egressd.broker.identity import issuers
from egressd.broker.identity.issuers import DEFAULT_ALGORITHMS, Issuer, Nonce
from egressd.model import tree
from egressd.model.errors import Problem

TENANT = "6f1c1e0a-3c2b-4d5e-8f90-a1b2c3d4e5f6"


def parse(text: str) -> tuple[tuple[Issuer, ...], list[Problem]]:
    found = tree.read(text.encode(), source="broker.yaml")
    assert found.readable, found.problems
    assert isinstance(found.value, dict)
    return issuers.parse(found.value.get("issuers"), found)


def one(extra: str, *, base: str = "{issuer: https://op.example, audience: egressd}") -> list[str]:
    """What is wrong with an issuer that has these keys, too: `where: text`."""
    inner = base.strip("{}")
    keys = {part.partition(":")[0].strip() for part in extra.split(";")}
    kept = [part for part in inner.split(", ") if part.partition(":")[0] not in keys]
    lines = [*kept, *extra.split(";")]
    text = "issuers:\n  op:\n" + "".join(f"    {line.strip()}\n" for line in lines if line.strip())
    found, problems = parse(text)
    assert bool(found) != bool(problems)
    assert all(problem.remedy for problem in problems), problems
    return [f"{problem.where}: {problem.text}" for problem in problems]


def test_the_least_that_is_needed_and_what_it_means() -> None:
    found, problems = parse("issuers:\n  op:\n    issuer: https://op.example/\n    audience: egressd\n")
    assert problems == []
    assert found == (Issuer(name="op", issuer="https://op.example/", audiences=("egressd",)),)
    (issuer,) = found
    assert issuer.provider is Provider.OIDC
    assert issuer.algorithms == DEFAULT_ALGORITHMS == ("RS256", "PS256", "ES256", "EdDSA")
    assert issuer.nonce is Nonce.MATCH
    assert (issuer.skew, issuer.max_age) == (60, 86_400)
    assert issuer.authorised_parties == ("egressd",)
    assert issuer.discovery_url == "https://op.example/.well-known/openid-configuration"


def test_everything_that_can_be_said() -> None:
    found, problems = parse(f"""
issuers:
  okta:
    issuer: https://acme.okta.example/oauth2/default
    audience: [0oa1, 42]
    provider: okta
    algorithms: [RS256, ES512]
    groups: https://acme.example/groups
    optional_groups: true
    discovery: https://acme.okta.example/d?appid=7
    ca_file: /etc/ca.pem
    skew: 0
    nonce: once
    max_age: 3600
    azp: [console, phone]
    typ: [application/ID+JWT, jwt]
  entra:
    issuer: https://login.microsoftonline.example/{TENANT}/v2.0
    audience: egressd
    provider: entra
    tenant: {TENANT.upper()}
    names_file: /etc/egressd/names.yaml
    jwks_file: /etc/egressd/entra.json
  google:
    issuer: https://accounts.google.example
    audience: egressd
    provider: google
    domain: Acme.example
    members_file: /etc/egressd/members.yaml
""")
    assert problems == []
    okta, entra, google = found
    assert okta == Issuer(
        name="okta",
        issuer="https://acme.okta.example/oauth2/default",
        audiences=("0oa1", "42"),
        provider=Provider.OKTA,
        algorithms=("RS256", "ES512"),
        groups="https://acme.example/groups",
        optional_groups=True,
        discovery="https://acme.okta.example/d?appid=7",
        ca_file="/etc/ca.pem",
        skew=0,
        nonce=Nonce.ONCE,
        max_age=3600,
        parties=("console", "phone"),
        types=("id+jwt", "jwt"),
    )
    assert okta.discovery_url == "https://acme.okta.example/d?appid=7"
    assert (entra.tenant, entra.jwks_file) == (TENANT, "/etc/egressd/entra.json")
    assert entra.group_claims(names={}).tenant == TENANT
    assert google.group_claims(members={"anna": frozenset({"board"})}).domain == "acme.example"


@pytest.mark.parametrize(
    "algorithm",
    [
        "none",
        "None",
        "HS256",
        "HS384",
        "HS512",
        "hs256",
        "RS1",
        "ES256K",
        "RSA-OAEP",
        "dir",
        "''",
        "1",
        "[ES256]",
    ],
)
def test_an_algorithm_without_a_public_key_cannot_be_configured(algorithm: str) -> None:
    assert "no algorithm with a public key" in one(f"algorithms: [RS256, {algorithm}]")[0]
    assert "no algorithm with a public key" in one(f"algorithms: [{algorithm}]")[0]


PLAIN = "is no text of at most 512 plain characters"
UNUSED = "is not used where there is a jwks_file"
WRONG = [
    ("issuer: http://op.example", "issuers.op.issuer: 'http://op.example' is not https"),
    ("issuer: HTTPS://op.example", "issuers.op.issuer: 'HTTPS://op.example' is not https"),
    ("issuer: op.example", "issuers.op.issuer: 'op.example' is not https"),
    ("issuer: https://", "issuers.op.issuer: 'https://' names no host"),
    ("issuer: https://me@op.example", "issuers.op.issuer: 'https://me@op.example' names no host"),
    ("issuer: https://op.example?x", "issuers.op.issuer: 'https://op.example?x' has a query or a fragment"),
    ("issuer: 'https://op.example#x'", "issuers.op.issuer: 'https://op.example#x' has a query or a fragment"),
    ("issuer: 'https://x/{t}'", "issuers.op.issuer: 'https://x/{t}' has a placeholder in it"),
    ("issuer: https://op.example:99999", "issuers.op.issuer: 'https://op.example:99999' is no URL"),
    ("issuer: 'https://op .example'", f"issuers.op.issuer: 'https://op .example' {PLAIN}"),
    ("issuer: [https://op.example]", "issuers.op.issuer: this is not a text"),
    ("issuer: ''", "issuers.op.issuer: this is not a text"),
    ("audience: []", "issuers.op.audience: the list is empty, or too long"),
    ("audience: ''", "issuers.op.audience: this is not a text"),
    ("audience: [a, true]", "issuers.op.audience: this is not a text"),
    ("audience: 'a b'", f"issuers.op.audience: 'a b' {PLAIN}"),
    ("provider: keycloak", "issuers.op.provider: 'keycloak' is not known"),
    ("provider: entra", "issuers.op.provider: the tenant is not named, and tokens of others would pass"),
    ("provider: google", "issuers.op.provider: the domain is not named, and any Google account would pass"),
    ("tenant: common; provider: entra", "issuers.op.tenant: 'common' is no UUID"),
    (f"tenant: {TENANT}; provider: entra", "issuers.op.issuer: this is not the address of that tenant"),
    (f"tenant: {TENANT}", "issuers.op.tenant: tenant is for provider: entra only"),
    ("domain: acme.example", "issuers.op.domain: domain is for provider: google only"),
    ("domain: acme; provider: google", "issuers.op.domain: 'acme' is no domain"),
    ("members_file: /etc/m", "issuers.op.members_file: members_file is for provider: google only"),
    ("names_file: /etc/m", "issuers.op.names_file: names_file is for provider: entra only"),
    ("jwks_file: keys.json", "issuers.op.jwks_file: this is not an absolute path"),
    ("jwks_file: /k; ca_file: /c", f"issuers.op.ca_file: ca_file {UNUSED}"),
    ("jwks_file: /k; discovery: https://d", f"issuers.op.discovery: discovery {UNUSED}"),
    ("discovery: http://d", "issuers.op.discovery: 'http://d' is not https"),
    ("skew: 301", "issuers.op.skew: this is no number of seconds from 0 to 300"),
    ("skew: -1", "issuers.op.skew: this is no number of seconds from 0 to 300"),
    ("skew: true", "issuers.op.skew: this is no number of seconds from 0 to 300"),
    ("skew: 1m", "issuers.op.skew: this is no number of seconds from 0 to 300"),
    ("max_age: 0", "issuers.op.max_age: this is no number of seconds from 60 to 2592000"),
    ("nonce: maybe", "issuers.op.nonce: 'maybe' is not known"),
    ("groups: [a]", "issuers.op.groups: this is not a text"),
    ("optional_groups: sometimes", "issuers.op.optional_groups: this is neither true nor false"),
    ("azp: []", "issuers.op.azp: the list is empty, or too long"),
    ("typ: 1.5", ""),
    ("client_secret: x", "issuers.op.client_secret: there is no key 'client_secret' here"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "said"), WRONG, ids=[extra for extra, _ in WRONG])
def test_what_is_wrong_is_said_where_it_stands(extra: str, said: str) -> None:
    found = one(extra)
    assert found == ([said] if said else [])


def test_every_problem_at_once_with_its_line() -> None:
    found, problems = parse(
        "issuers:\n"
        "  Okta:\n"
        "    issuer: http://a\n"
        "    audience: []\n"
        "  empty: {}\n"
        "  text: x\n"
        "  good: {issuer: https://good.example, audience: a}\n"
        "  twin: {issuer: https://good.example, audience: b}\n"
    )
    assert [issuer.name for issuer in found] == ["good", "twin"]
    assert [(problem.line, problem.text) for problem in problems] == [
        (2, "'Okta' is no name"),
        (3, "'http://a' is not https"),
        (4, "the list is empty, or too long"),
        (5, "there is no issuer"),
        (5, "there is no audience"),
        (6, "this is not a mapping"),
        (8, "this is the issuer of good, too"),
    ]


@pytest.mark.parametrize(
    "text", ["issuers:\n", "issuers: {}\n", "issuers: []\n", "issuers: x\n", "other: 1\n"]
)
def test_no_issuers_is_a_problem(text: str) -> None:
    found, problems = parse(text)
    assert found == ()
    assert len(problems) == 1


def test_there_are_not_many_providers_in_the_world() -> None:
    text = "issuers:\n" + "".join(
        f"  n{number}: {{issuer: https://n{number}.example, audience: a}}\n" for number in range(33)
    )
    assert [problem.text for problem in parse(text)[1]] == ["there are more than 32 identity providers"]
