"""`lint`: documents whose lines say what is found on them, each rule with what it does not mean, secrets."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from datetime import date, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import PUBLIC

from egressd.model.errors import PolicyError
from egressd.policy import plain_secrets
from egressd.policy.compiled import Policy
from egressd.policy.document import load
from egressd.policy.lint import Report, lint
from egressd.policy.lint_rules import RULES, Level
from egressd.residency.catalogue import Catalogue
from egressd.residency.places import Pin
from egressd.residency.prefixes import Group, Prefixes, Source, Table
from egressd.residency.registry import Registry

TODAY = date(2026, 11, 21)
# A few shapes, so that the table below does not change with the catalogue that comes with egressd.
CATALOGUE = """\
clouds:
  aws:
    title: Amazon Web Services
    source: https://docs.example.com/aws
    domains: [amazonaws.com]
    regions: {eu-central-1: DE, eu-west-2: UK, us-east-1: US}
  azure:
    title: Azure
    source: https://docs.example.com/azure
    domains: [azure.com]
    regions: {francecentral: FR, eastus: US}
providers:
  openai:
    title: OpenAI
    source: https://docs.example.com/openai
    domains: [openai.com]
    regions: {eu: [EEA, CH]}
    endpoints:
      - {hosts: [api.openai.com], scope: global}
      - {hosts: [eu.api.openai.com], scope: multi-region, region: eu}
  azure-openai:
    title: Azure OpenAI
    source: https://docs.example.com/azure-openai
    cloud: azure
    endpoints:
      - {hosts: ["{resource}.openai.azure.com"], scope: unplaced, declarable: true}
  aws-bedrock:
    title: Amazon Bedrock
    also: [bedrock]
    source: https://docs.example.com/bedrock
    cloud: aws
    models: {segment: model, vendors: [anthropic], profiles: [eu, us, global]}
    endpoints:
      - {hosts: ["bedrock-runtime.{region}.amazonaws.com"], scope: region}
  google-vertex:
    title: Vertex AI
    source: https://docs.example.com/vertex
    domains: [googleapis.com]
    path_region: locations
    regions: {europe-west1: BE}
    endpoints:
      - {hosts: [aiplatform.googleapis.com], scope: global}
      - {hosts: ["{region}-aiplatform.googleapis.com"], scope: region}
  ollama:
    title: Ollama
    source: https://docs.example.com/ollama
    domains: [ollama.example]
    loopback: [11434]
    endpoints:
      - {hosts: [api.ollama.example], scope: unplaced}
"""


def table(*groups: tuple[str, str], name: str = "aws", published: date | None = TODAY) -> Table:
    """A table of (region, prefix) pairs."""
    return Table(
        name=name,
        provider="aws",
        format="aws",
        source=Source("ip-ranges.json", "sha256:" + "0" * 64, 1000),
        published=published,
        imported=published or TODAY,
        groups=tuple(Group(region, (), (prefix,)) for region, prefix in groups),
    )


@functools.cache
def catalogue() -> Catalogue:
    return Catalogue.load([("test.yaml", CATALOGUE.encode())])


def registry(*tables: Table) -> Registry:
    return Registry(catalogue(), Prefixes(tables, regions=catalogue().cloud_region))


FRESH = registry(table(("eu-central-1", "3.120.0.0/14"), ("us-east-1", "3.80.0.0/12")))


def read_as(data: bytes, known: Registry) -> Policy | PolicyError:
    try:
        return load(data, source="acme.yaml", expected_name=None, is_public_suffix=PUBLIC, registry=known)
    except PolicyError as error:
        return error


def linted(
    text: str | bytes, *, known: Registry = FRESH, pin: Pin | None = None, today: date = TODAY
) -> Report:
    data = text.encode() if isinstance(text, str) else text
    return lint(data, source="acme.yaml", read_as=read_as(data, known), registry=known, today=today, pin=pin)


def found(report: Report) -> set[tuple[str, int]]:
    return {(one.rule, one.line) for one in report.findings}


def said(text: str) -> set[tuple[str, int]]:
    """What the comments `#! rule-id, rule-id` of a document promise for their lines."""
    return {
        (rule, number)
        for number, line in enumerate(text.splitlines(), start=1)
        for rule in re.findall(r"[a-z-]+", line.partition("#!")[2])
    }


BARE = "workspace: acme\nguard: enforce\n"
PINNED = "workspace: acme\nguard: enforce\nresidency: {jurisdictions: [EU]}\n"
AZURE = """\
providers:
  azure:
    type: azure-openai
    base_url: https://acme.openai.azure.com/openai
    api_key: secret://env/AZURE_KEY
    residency: {region: francecentral, jurisdiction: FR, source_url: "https://learn.example.com/x"}
"""
BEDROCK = """\
providers:
  aws:
    type: bedrock
    base_url: https://bedrock-runtime.eu-central-1.amazonaws.com
    residency: {region: eu-central-1, jurisdiction: DE, source_url: "https://docs.example.com/x"}
"""

# Documents, each line with what is found on it.
CASES = {
    "a policy with nothing to say about": PINNED + AZURE + "routes: {default: {provider: azure}}\n"
    "allow:\n  - provider: azure\n  - local: ollama\n",
    "no pin": """\
workspace: acme
guard: enforce
providers:
  azure:
    type: azure-openai
    base_url: https://acme.openai.azure.com/openai #! unplaced-endpoint
  own: #! unused-provider
    type: openai-compatible
    base_url: https://llm.example.com/v1 #! unverifiable-host
    residency: {region: cellar, jurisdiction: DE} #! missing-source
allow:
  - provider: azure
  - host: api.openai.com #! global-endpoint
  - host: eu.api.openai.com
  - host: db.internal.example
  - host: "*.search.example.com"
""",
    "hosts under a pin": """\
workspace: acme
guard: enforce
residency: {jurisdictions: [EU]}
allow:
  - host: api.openai.com #! global-endpoint
  - host: eu.api.openai.com #! outside-pin
  - host: acme.openai.azure.com #! unplaced-endpoint
  - host: bedrock-runtime.eu-central-1.amazonaws.com #! sandbox-can-choose-model
  - host: bedrock-runtime.eu-west-2.amazonaws.com #! outside-pin
  - host: bedrock-runtime.eu-central-1.amazonaws.com.evil.io #! unverifiable-host
  - host: db.internal.example #! unverifiable-host
  - host: "*.search.example.com" #! wildcard-under-pin
  - host: cdn.example.com #! vouched
    vouch: "contract 4711: processed in the EEA"
  - local: ollama
""",
    "networks under a pin": """\
workspace: acme
guard: enforce
residency: {jurisdictions: [EU]}
allow:
  - {cidr: 3.120.0.0/16, ports: [443]}
  - {cidr: 3.80.0.0/16, ports: [443]} #! outside-pin
  - {cidr: 10.20.0.0/16, ports: [5432]} #! unplaced-network
  - {cidr: 10.30.0.0/16, ports: [5432], vouch: "our own rack in Vienna"} #! vouched
  - {cidr: "2001:db8:1::/48", ports: [443]} #! unplaced-network
""",
    "profiles under a pin": """\
workspace: acme
guard: observe #! open-guard
residency: {jurisdictions: [EU]}
providers:
  london:
    type: bedrock
    base_url: https://bedrock-runtime.eu-west-2.amazonaws.com #! outside-pin
    residency: {region: eu-west-2, jurisdiction: UK, source_url: "https://docs.example.com/x"}
  frankfurt: #! missing-residency
    type: bedrock
    base_url: https://bedrock-runtime.eu-central-1.amazonaws.com
    models:
      - anthropic.claude-3
      - eu.anthropic.claude-3 #! cross-region-profile
      - global.anthropic.claude-3 #! cross-region-profile
      - unheard-of #! unplaced-endpoint
  vertex:
    type: google-vertex
    base_url: https://aiplatform.googleapis.com/v1/projects/p/locations/global #! cross-region-profile
    residency: {region: global, jurisdiction: US, source_url: "https://docs.example.com/x"}
  azure: #! missing-residency
    type: azure-openai
    base_url: https://acme.openai.azure.com #! unplaced-endpoint
  own:
    type: openai-compatible
    base_url: http://llm.example.com/v1 #! http-base-url, unverifiable-host
    api_key: secret://env/KEY
    residency: {region: cellar, jurisdiction: DE, source_url: "https://docs.example.com/x"}
  here: #! unused-provider
    type: openai-compatible
    base_url: http://127.0.0.1:11434/v1
routes:
  default: {providers: [london, vertex]} #! route-without-compliant-provider
  good: {provider: own}
  lost: {providers: [azure, frankfurt]} #! route-without-compliant-provider
allow:
  - provider: london
  - provider: vertex
  - provider: own
""",
    "a route to what no rule allows": PINNED + AZURE
    + "routes:\n  default: {provider: azure} #! unreachable-provider, route-without-compliant-provider\n",
    "the wrong port is not allowed either": PINNED + BEDROCK
    + "routes:\n  default: {provider: aws} #! unreachable-provider, route-without-compliant-provider\n"
    "allow:\n  - host: bedrock-runtime.eu-central-1.amazonaws.com #! sandbox-can-choose-model\n"
    "    ports: [8443]\n",
    "external routing is off": BARE + "local_only: true\n" + AZURE
    + "routes:\n  default: {provider: azure} #! route-without-compliant-provider\n"
    "allow:\n  - provider: azure\n",
    "without a pin a cross-region profile is a warning": BARE + BEDROCK
    + "    models: [us.anthropic.claude-3] #! cross-region-profile\nallow:\n  - provider: aws\n",
    "another region in the URL": PINNED
    + BEDROCK.replace("eu-central-1.amazonaws", "us-east-1.amazonaws").replace(
        "  residency: {region", "  residency: #! region-mismatch\n      {region"
    ),
    "a region, and the URL is global": BARE
    + """\
providers:
  open:
    type: openai
    base_url: https://api.openai.com/v1
    residency: {region: eu, jurisdiction: EEA} #! region-mismatch
""",
    "a region in another country": PINNED
    + BEDROCK.replace("jurisdiction: DE", "jurisdiction: FR").replace(
        "  residency: {", "  residency: #! jurisdiction-mismatch\n      {"
    ),
    "a region that the URL leaves open, in another country": PINNED
    + """\
providers:
  azure:
    type: azure-openai
    base_url: https://acme.openai.azure.com
    residency:
      region: eastus
      jurisdiction: EU #! jurisdiction-mismatch
""",
    "what is no policy": "workspace: acme\nguard: on #! invalid-policy\n"
    "allow:\n  - host: a b #! invalid-policy\n",
    "a key in clear": BARE
    + """\
providers:
  open:
    type: openai
    base_url: https://api.openai.com/v1
    api_key: hunter2-hunter2 #! secret-in-clear
""",
    "a key in clear, in other places": BARE
    + """\
# the old one was sk-Planted0Planted0Planted0 #! secret-in-clear
providers:
  open:
    type: openai
    base_url: https://planted:planted@api.openai.com/v1 #! secret-in-clear
""",
}  # fmt: skip


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_what_is_found_on_each_line(text: str) -> None:
    assert found(linted(text)) == said(text)


GOOD = ("eu-central-1", "3.120.0.0/14")
REGISTRY_CASES = {
    "no-tables": (registry(), {"no-tables"}),
    "stale-table": (registry(table(GOOD, published=TODAY - timedelta(31))), {"stale-table"}),
    "fresh on the thirtieth day": (registry(table(GOOD, published=TODAY - timedelta(30))), set()),
    "conflicting-table": (registry(table(GOOD, ("us-east-1", "3.0.0.0/8"))), {"conflicting-table"}),
    "side by side": (FRESH, set()),
    "unknown-region": (registry(table(("mars-1", "3.120.0.0/14"))), {"unknown-region"}),
    "broken-registry": (replace(FRESH, broken="aws.json: it was cut off"), {"broken-registry"}),
}


@pytest.mark.parametrize(("known", "rules"), REGISTRY_CASES.values(), ids=REGISTRY_CASES)
def test_what_the_tables_are_worth_matters_only_under_a_pin(known: Registry, rules: set[str]) -> None:
    rule = "allow:\n  - {host: a.example, vouch: our own machine in Graz}\n"
    pinned = found(linted(PINNED + rule, known=known))
    assert pinned - {("vouched", 5)} == {(name, 3) for name in rules}
    assert found(linted(BARE + rule, known=known)) == {("vouched", 4)}


def test_no_tables_matters_only_where_there_is_something_to_place() -> None:
    assert found(linted(PINNED + "allow:\n  - local: ollama\n", known=registry())) == set()


# For each rule, what is close to it and is not it.
NOT_IT = {
    "invalid-policy": BARE,
    "region-mismatch": BARE + BEDROCK,
    "jurisdiction-mismatch": BARE + BEDROCK.replace("jurisdiction: DE", "jurisdiction: EU"),
    "global-endpoint": PINNED + "allow:\n  - host: xapi.openai.com\n",
    "unplaced-endpoint": PINNED + AZURE + "allow:\n  - provider: azure\n",
    "unplaced-network": BARE + "allow:\n  - {cidr: 10.20.0.0/16, ports: [5432]}\n",
    "outside-pin": PINNED.replace("[EU]", "[EEA, CH]") + "allow:\n  - host: eu.api.openai.com\n",
    "unverifiable-host": BARE + "allow:\n  - host: db.internal.example\n",
    "cross-region-profile": PINNED + BEDROCK + "    models: [anthropic.claude-3]\n",
    "sandbox-can-choose-model": BARE + "allow:\n  - host: bedrock-runtime.eu-central-1.amazonaws.com\n",
    "missing-residency": PINNED + "providers:\n  a: {type: openai-compatible, base_url: 'http://127.0.0.1:8000/'}\n",
    "missing-source": PINNED + AZURE,
    "vouched": PINNED + "allow:\n  - host: db.internal.example\n",
    "wildcard-under-pin": BARE + "allow:\n  - host: '*.search.example.com'\n",
    "open-guard": PINNED.replace("enforce", "off") + "local_only: true\n",
    "no-tables": PINNED + "allow:\n  - host: db.internal.example\n",
    "stale-table": PINNED,
    "conflicting-table": PINNED,
    "unknown-region": PINNED,
    "broken-registry": PINNED,
    "secret-in-clear": BARE + "# see sk-bratislava-datacenter-1.example, task-force-2030-planning-Group\n"
    + AZURE,
    "http-base-url": BARE + "providers:\n  a: {type: openai-compatible, base_url: 'http://localhost:8000/'}\n",
    "unused-provider": BARE + AZURE + "routes: {default: {provider: azure}}\n",
    "unreachable-provider": BARE + AZURE
    + "routes: {default: {provider: azure}}\nallow:\n  - host: acme.openai.azure.com\n",
    "route-without-compliant-provider": PINNED + AZURE
    + "routes: {default: {provider: azure}}\nallow:\n  - provider: azure\n",
}  # fmt: skip


@pytest.mark.parametrize(("rule", "text"), NOT_IT.items(), ids=NOT_IT)
def test_what_a_rule_does_not_mean(rule: str, text: str) -> None:
    report = linted(text)
    assert rule not in {name for name, _ in found(report)}
    assert "invalid-policy" not in {name for name, _ in found(report)}


def test_every_rule_is_shown_to_be_found_and_not_to_be_found() -> None:
    shown = {rule for text in CASES.values() for rule, _ in said(text)}
    shown |= {rule for _, rules in REGISTRY_CASES.values() for rule in rules}
    assert shown == set(NOT_IT) == set(RULES)


# ---- levels


HTTP = "providers:\n  a: {type: openai-compatible, base_url: 'http://a.example/'"
LEVELS = [
    ("global-endpoint", BARE + "allow:\n  - host: api.openai.com\n", Level.NOTE),
    ("global-endpoint", PINNED + "allow:\n  - host: api.openai.com\n", Level.ERROR),
    ("unplaced-endpoint", BARE + "allow:\n  - host: a.openai.azure.com\n", Level.NOTE),
    ("unplaced-endpoint", PINNED + "allow:\n  - host: a.openai.azure.com\n", Level.ERROR),
    ("unverifiable-host", PINNED + "allow:\n  - host: a.example\n", Level.WARNING),
    ("cross-region-profile", BARE + BEDROCK + "    models: [us.anthropic.x]\n", Level.WARNING),
    ("cross-region-profile", PINNED + BEDROCK + "    models: [us.anthropic.x]\n", Level.ERROR),
    ("http-base-url", BARE + HTTP + "}\n", Level.WARNING),
    ("http-base-url", BARE + HTTP + ", api_key: 'secret://env/K'}\n", Level.ERROR),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "text", "level"), LEVELS)
def test_how_bad_it_is(rule: str, text: str, level: Level) -> None:
    assert {one.level for one in linted(text).findings if one.rule == rule} == {level}


def test_whatever_a_pin_bars_is_an_error_somewhere() -> None:
    """No rule silently takes no part: each has an error on its line, or on its profile's."""
    for text in CASES.values():
        policy = read_as(text.encode(), FRESH)
        if isinstance(policy, PolicyError) or policy.local_only:
            continue
        errors = {one.line for one in linted(text).findings if one.level is Level.ERROR}
        for barred in policy.barred:
            profiles = [one.line for one in policy.providers if one.name in barred.rule.providers]
            assert any(line in errors for line in (barred.rule.line, *(n + 2 for n in profiles)))


# ---- what if


def test_a_pin_that_is_not_written_is_asked_for() -> None:
    text = BARE + "allow:\n  - host: eu.api.openai.com\n  - {cidr: 3.80.0.0/16, ports: [443]}\n"
    assert found(linted(text)) == set()
    assert found(linted(text, pin=Pin(("EU",)))) == {("outside-pin", 4), ("outside-pin", 5)}
    assert found(linted(text, pin=Pin(("CH", "EEA")))) == {("outside-pin", 5)}
    assert found(linted(text, pin=Pin(("CH", "EEA", "US")))) == set()


def test_another_pin_than_the_one_that_is_written() -> None:
    text = PINNED + "allow:\n  - host: bedrock-runtime.us-east-1.amazonaws.com\n"
    assert found(linted(text)) == {("outside-pin", 5)}
    assert found(linted(text, pin=Pin(("US",)))) == {("sandbox-can-choose-model", 5)}
    assert found(linted(text, pin=Pin())) == set()


# ---- what could not be verified


def test_what_could_not_be_verified_is_told() -> None:
    text = PINNED + AZURE + "allow:\n  - provider: azure\n  - host: '*.a.example'\n  - host: b.example\n"
    assert [(end.line, end.text) for end in linted(text).unverified] == [
        (0, "where the addresses of 3 listed names are: nothing was looked up"),
        (9, "that acme.openai.azure.com is in francecentral, as azure declares: its URL does not say it"),
        (9, "that the source of azure says so: https://learn.example.com/x was not fetched"),
        (11, "of which type the deployments of acme.openai.azure.com are: Global and Data Zone ones"
         " answer elsewhere"),
        (12, "where the names that *.a.example covers are"),
        (13, "where b.example is: no catalogue has it"),
    ]  # fmt: skip


def test_of_a_file_that_is_refused_nothing_else_is_known() -> None:
    (end,) = linted("workspace: acme\ngaurd: off\n").unverified
    assert end.text == "anything else about the file: it is refused as it stands"


def test_of_local_services_there_is_nothing_open() -> None:
    assert linted(PINNED + "allow:\n  - local: ollama\n").unverified == ()


# ---- places and identities


def test_a_finding_says_where_in_the_document_it_stands() -> None:
    text = PINNED + "allow:\n  - local: ollama\n  - host: api.openai.com\n"
    (one,) = linted(text).findings
    assert (one.line, one.where, one.subject) == (6, "allow[1]", "api.openai.com")


def test_rules_that_share_a_line_have_no_number() -> None:
    text = PINNED + "allow: [{host: api.openai.com}, {host: eu.api.openai.com}]\n"
    assert [(one.line, one.where) for one in linted(text).findings] == [(4, "allow"), (4, "allow")]


def test_a_subject_stays_when_the_line_moves() -> None:
    before = linted(CASES["profiles under a pin"])
    after = linted("# moved\n\n" + CASES["profiles under a pin"])
    assert [(f.rule, f.subject) for f in before.findings] == [(f.rule, f.subject) for f in after.findings]
    assert [f.line + 2 for f in before.findings] == [f.line for f in after.findings]


# ---- secrets

PLANTED = {
    "openai": "sk-proj-Ab12Cd34Ef56Gh78Ij90Kl",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "google": "AIza" + "Sy0123456789abcdefghijklmnopqrstuvw",
    "hf": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "github": "ghp_0123456789abcdefghijklmnopqrstuvwxyz",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJl",
    "azure": "0123456789abcdef0123456789abcdef",
    "password": "correct horse battery staple",
    "foreign": "pässwörtpässwört",
}
PLACES = {
    "as the key": "providers:\n  a: {type: openai, base_url: 'https://api.openai.com', api_key: 'SECRET'}\n",
    "in a list": "providers:\n  a: {api_key: [SECRET]}\n",
    "as a token": "providers:\n  a: {token: 'SECRET'}\n",
    "without a space": "providers:\n  a: {type: openai, 'api_key:SECRET': 1}\n",
    "as user-info": "providers:\n  a: {type: openai, base_url: 'https://me:SECRET@api.openai.com'}\n",
    "in a query": "providers:\n  a: {type: openai, base_url: 'https://api.openai.com/?api_key=SECRET'}\n",
    "as a member, too": "members: ['SECRET']\nproviders:\n  a: {api_key: 'SECRET'}\n",
    "beside one": "providers: {SECRET: {api_key: 'SECRET'}}\n",
}
FORMS = {key: PLANTED[key] for key in ("openai", "aws", "google", "hf", "github", "jwt")}
ANYWHERE = {
    "as a region": "providers:\n  a: {type: openai, residency: {region: 'SECRET', jurisdiction: 'SECRET'}}\n",
    "as a type": "providers:\n  a: {type: 'SECRET', base_url: 'SECRET'}\n",
    "as a host": "allow:\n  - host: 'SECRET'\n",
    "as a key of its own": "SECRET: 1\nguard: 'SECRET'\n",
    "as a member": "members: ['SECRET', 'user:SECRET']\n",
    "as a reason": "allow:\n  - {host: a.example, vouch: 'because of SECRET'}\n",
    "as a comment": "# SECRET\nallow:\n  - host: api.openai.com\n",
}


def everything(report: Report) -> str:
    """All that any form of output could be made of."""
    return repr(report.findings) + repr(report.unverified)


def windows(secret: str) -> list[str]:
    """Pieces of it, also as a message would spell it."""
    spellings = (secret, ascii(secret)[1:-1])
    return [text[at : at + 8] for text in spellings for at in range(len(text) - 7)]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("secret", PLANTED.values(), ids=PLANTED)
def test_a_secret_where_secrets_are_put_is_never_repeated(secret: str, place: str) -> None:
    report = linted(BARE + place.replace("SECRET", secret))
    assert not [piece for piece in windows(secret) if piece.lower() in everything(report).lower()]
    assert {one.rule for one in report.findings} & {"secret-in-clear", "invalid-policy"}


@pytest.mark.parametrize("place", ANYWHERE.values(), ids=ANYWHERE)
@pytest.mark.parametrize("secret", FORMS.values(), ids=FORMS)
def test_what_has_the_form_of_a_secret_is_found_anywhere_and_never_repeated(secret: str, place: str) -> None:
    report = linted(PINNED + place.replace("SECRET", secret))
    assert "secret-in-clear" in {one.rule for one in report.findings}
    assert not [piece for piece in windows(secret) if piece.lower() in everything(report).lower()]


def test_a_secret_is_not_in_a_traceback() -> None:
    tree_of = plain_secrets.find(b"api_key: hunter2hunter2\n", plain_secrets.Tree("x"))
    assert tree_of.found == ()  # an unreadable tree has no keys
    (secret,) = plain_secrets.find(b"# Bearer abcdefghijklmnop0\n", plain_secrets.Tree("x")).found
    assert "abcdefgh" not in repr(secret)


def test_many_secrets_and_many_problems_are_told_in_time() -> None:
    text = "".join(f"  p{number}: {{api_key: 'planted-{number:06}', region: 7}}\n" for number in range(4000))
    report = linted("workspace: acme\nproviders:\n" + text)
    assert "planted-000007" not in everything(report)


# ---- whatever the bytes are

_WORDS = st.sampled_from(
    [
        *CATALOGUE.split(),
        *BEDROCK.split(),
        *AZURE.split(),
        "\n",
        "\n  ",
        "- ",
        ": ",
        "{",
        "}",
        "\x1b[2J",
        "\u202e",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300), st.lists(_WORDS, max_size=40).map(lambda words: " ".join(words).encode())
    )
)
def test_lint_never_raises(data: bytes) -> None:
    report = linted(data)
    assert all(one.rule in RULES and one.line >= 0 for one in report.findings)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=3), st.sampled_from(["EU", "US", "CH", ""])
)
def test_lint_of_any_policy_under_any_pin_names_lines_of_the_file(names: list[str], code: str) -> None:
    text = CASES[names[0]]
    report = linted(text, pin=Pin((code,)) if code else Pin())
    lines = len(text.splitlines())
    assert all(0 <= one.line <= lines for one in (*report.findings, *report.unverified))
    assert len(set(report.findings)) == len(report.findings)
