"""Providers, routes and rules for them: what a document may say, and every way of getting it wrong."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import BROKEN, KNOWN, PUBLIC, policy, problems

from egressd.model.errors import PolicyError
from egressd.policy.compiled import (
    CidrRule,
    HostRule,
    LocalRule,
    Policy,
    Port,
    Protocol,
    Provider,
    Route,
    Verify,
)
from egressd.policy.document import load
from egressd.policy.profiles import MAX_MODELS, MAX_PROVIDERS
from egressd.residency.judge import Code
from egressd.residency.places import Declared, Scope

TCP = Protocol.TCP
FULL = """\
workspace: acme
guard: enforce
providers:
  azure-frc:
    type: azure-openai
    base_url: https://acme.openai.azure.com/openai
    api_key: secret://env/AZURE_KEY
    residency:
      region: francecentral
      jurisdiction: FR
      source_url: "https://learn.microsoft.com/azure/reliability/regions-list"
  bedrock_fra:
    type: aws-bedrock
    base_url: https://bedrock-runtime.eu-central-1.amazonaws.com
    api_key: secret://file/etc/keys/bedrock
    models: [anthropic.claude-3-haiku-20240307-v1:0]
  gateway:
    type: openai-compatible
    base_url: http://llm.example.com:8080/v1
  bonn:
    type: openai-compatible
    base_url: https://203.0.113.7/v1
  here:
    type: ollama
    base_url: http://127.0.0.1:11434
routes:
  default: {providers: [azure-frc, bedrock_fra]}
  cheap: {provider: here}
allow:
  - {provider: azure-frc, vouch: "contract 4711: France Central"}
  - {provider: bedrock_fra, verify: address}
  - provider: gateway
  - provider: bonn
  - provider: here
  - {provider: aws-bedrock, region: eu-west-3}
"""


def profile(made: Policy, name: str) -> Provider:
    found = made.provider(name)
    assert found is not None
    return found


def test_the_whole_grammar() -> None:
    made = policy(FULL, registry=KNOWN)
    azure = profile(made, "azure-frc")
    assert (azure.type, azure.line) == ("azure-openai", 4)
    assert azure.base_url == "https://acme.openai.azure.com/openai"
    assert (azure.endpoint.host, azure.endpoint.port, azure.endpoint.path) == (
        "acme.openai.azure.com", 443, "/openai",
    )  # fmt: skip
    assert azure.api_key == "secret://env/AZURE_KEY"
    assert azure.declared == Declared(
        "francecentral", "FR", "https://learn.microsoft.com/azure/reliability/regions-list"
    )
    assert azure.region == "francecentral (FR)"
    assert azure.placement.scope is Scope.UNPLACED
    bedrock = profile(made, "bedrock_fra")
    assert bedrock.models == ("anthropic.claude-3-haiku-20240307-v1:0",)
    assert (bedrock.declared, bedrock.region) == (None, "eu-central-1 (DE)")
    assert [one.is_local for one in made.providers] == [False, False, False, False, True]
    assert {one.finding.code for one in made.providers} == {Code.UNPINNED}
    assert made.routes == (Route("default", ("azure-frc", "bedrock_fra"), 27), Route("cheap", ("here",), 28))


def test_rules_for_providers() -> None:
    made = policy(FULL, registry=KNOWN)
    https, sni = Port(443, TCP), ((Port(443, TCP), Verify.SNI),)
    vouch = "contract 4711: France Central"
    assert made.rules == (
        HostRule("acme.openai.azure.com", (https,), sni, False, 30, vouch=vouch, providers=("azure-frc",)),
        HostRule(
            "bedrock-runtime.eu-central-1.amazonaws.com", (https,), (), False, 31, providers=("bedrock_fra",)
        ),
        HostRule("llm.example.com", (Port(8080, TCP),), (), False, 32, providers=("gateway",)),
        CidrRule(ip_network("203.0.113.7/32"), (https,), 33, providers=("bonn",)),
        LocalRule("ollama", (Port(11434, TCP),), 34, ("here",)),
        HostRule("bedrock-runtime.eu-west-3.amazonaws.com", (https,), sni, False, 35),
    )
    assert [one.key for one in made.providers] == [rule.key for rule in made.rules[:5]]


def test_what_is_declared_for_a_host() -> None:
    made = policy(FULL, registry=KNOWN)
    assert made.declared("acme.openai.azure.com", KNOWN) == "francecentral (FR)"
    assert made.declared("bedrock-runtime.eu-central-1.amazonaws.com", KNOWN) == "eu-central-1 (DE)"
    assert made.declared("bedrock-runtime.eu-west-2.amazonaws.com", KNOWN) == "eu-west-2 (UK)"
    assert made.declared("eu.api.openai.com", KNOWN) == "eu (CH, EEA)"
    assert made.declared("llm.example.com", KNOWN) == ""
    assert made.declared("*.example.com", KNOWN) == ""


# ---- one host, several rules

TWO = """\
workspace: acme
providers:
  one: {type: openai-compatible, base_url: "https://llm.example.com/one"}
  two: {type: openai-compatible, base_url: "https://llm.example.com/two"}
  three: {type: openai-compatible, base_url: "https://llm.example.com:8443/three"}
  here: {type: openai-compatible, base_url: "http://localhost:8000"}
  there: {type: openai-compatible, base_url: "http://127.0.0.1:8001"}
allow:
"""


def test_profiles_of_one_host_and_a_rule_for_it_are_one_rule() -> None:
    rules = "".join(f"  - provider: {name}\n" for name in ("two", "one", "three"))
    (rule,) = policy(TWO + rules + "  - {host: llm.example.com, ports: [443, 22]}\n").hosts
    assert rule.providers == ("one", "three", "two")
    assert [str(port) for port in rule.ports] == ["22/tcp", "443/tcp", "8443/tcp"]
    assert [str(port) for port, _ in rule.inspected] == ["443/tcp", "8443/tcp"]
    assert rule.line == 9


def test_profiles_of_this_machine_are_one_service_with_two_ports() -> None:
    (rule,) = policy(TWO + "  - provider: here\n  - provider: there\n").locals
    assert (rule.service, rule.providers) == ("openai-compatible", ("here", "there"))
    assert [port.number for port in rule.ports] == [8000, 8001]


def test_a_known_service_and_a_profile_for_it_are_one_rule() -> None:
    text = "workspace: acme\nproviders: {o: {type: ollama, base_url: 'http://localhost:11434'}}\n"
    (rule,) = policy(text + "allow: [{provider: o}, {local: ollama}]\n", registry=KNOWN).locals
    assert (rule.key, rule.providers) == ("ollama", ("o",))


# what stands under allow, the line, what is said, and the remedy
TOGETHER = [
    ("  - provider: one\n  - provider: one\n", 10, "is allowed on 443/tcp twice, first on line 9", "remove"),
    (
        "  - {provider: one, vouch: 'a good reason'}\n  - provider: two\n",
        10,
        "another value for vouch on line 9",
        "one value",
    ),
    (
        "  - {provider: one, vouch: 'a good reason'}\n  - host: llm.example.com\n",
        10,
        "another value for vouch",
        "one value",
    ),
    (
        "  - {provider: one, private: true}\n  - host: llm.example.com\n",
        10,
        "another value for private",
        "one",
    ),
    (
        "  - {provider: one, verify: address}\n  - provider: two\n",
        10,
        "verified otherwise on 443/tcp by line 9",
        "same verify",
    ),
    (
        "  - {cidr: 10.0.0.0/8, ports: [1], vouch: our own racks}\n  - {cidr: 10.0.0.0/8, ports: [2]}\n",
        10,
        "10.0.0.0/8 has another value for vouch on line 9",
        "a network has one value",
    ),
    (
        "  - {local: vllm, ports: [8000]}\n  - provider: here\n",
        10,
        "port 8000/tcp of the loopback is already vllm's",
        "one service",
    ),
]


@pytest.mark.parametrize(("rules", "line", "says", "remedy"), TOGETHER, ids=range(len(TOGETHER)))
def test_rules_that_cannot_stand_together(rules: str, line: int, says: str, remedy: str) -> None:
    (problem,) = problems(TWO + rules)
    assert problem.line == line
    assert says in problem.text and remedy in problem.remedy


# ---- what is refused


def of(**keys: str) -> str:
    """A document with one profile, `mine`, on line 3; its keys from line 4 on, in this order."""
    usual = {"type": "azure-openai", "base_url": "https://acme.openai.azure.com/openai"}
    lines = "".join(f"    {key}: {value}\n" for key, value in (usual | keys).items() if value != "-")
    return f"workspace: acme\nproviders:\n  mine:\n{lines}"


def declaring(region: str, jurisdiction: str, **keys: str) -> str:
    return of(**keys, residency=f"{{region: {region}, jurisdiction: {jurisdiction}}}")


BEDROCK = {"type": "aws-bedrock", "base_url": "https://bedrock-runtime.eu-central-1.amazonaws.com"}
OPENAI = {"type": "openai", "base_url": "https://api.openai.com/v1"}
FRANKFURT = "https://bedrock-runtime.eu-central-1.amazonaws.com"
ONE = of().replace("workspace: acme\n", "workspace: acme\nroutes: ROUTES\n")
RULE = of() + "allow:\n  - "
REFUSED = [
    # the section
    ("workspace: acme\nproviders:\n", 2, "this is empty", "remove the line"),
    ("workspace: acme\nproviders: [a]\n", 2, "this is a list", "providers: {NAME:"),
    ("workspace: acme\nproviders: {A: {}}\n", 2, "'A' is not a name", "lower-case"),
    ("workspace: acme\nproviders: {a.b: {}}\n", 2, "'a.b' is not a name", "lower-case"),
    ("workspace: acme\nproviders: {a-: {}}\n", 2, "'a-' is not a name", "lower-case"),
    ("workspace: acme\nproviders: {a: text}\n", 2, "this is text", "a mapping"),
    ("workspace: acme\nprovider: {}\n", 2, "'provider' is not a key", "did you mean providers?"),
    # type
    (of(type="-"), 3, "type is missing", "openai-compatible"),
    (
        of(type="azure-opneai"),
        4,
        "'azure-opneai' is no provider of the catalogue",
        "did you mean azure-openai?",
    ),
    (of(type="nobody"), 4, "'nobody' is no provider of the catalogue", "use one of openai-compatible"),
    (of(type="Azure"), 4, "'Azure' is not a type of provider", "openai-compatible"),
    (of(type="5"), 4, "this is a number", "the provider's type"),
    (
        of(type="aws-bedrock", base_url="https://api.openai.com/v1"),
        4,
        "the type is aws-bedrock, and the base URL is one of openai",
        "write type: openai",
    ),
    (of(type="openai"), 4, "the type is openai, and the base URL is one of azure-openai", "correct base_url"),
    # base_url
    (of(base_url="-"), 3, "base_url is missing", "https://"),
    (of(base_url="api.example.com"), 5, "the URL has no scheme", "https://"),
    (of(base_url="ftp://api.example.com"), 5, "the URL's scheme is neither", "https://"),
    (of(base_url="https://acme.openai.azure.com:0"), 5, "the URL's port is not a number", "8443"),
    (of(base_url="https://acme_openai.azure.com"), 5, "the URL's host is neither", "https://"),
    (of(base_url="https://llm/v1"), 5, "the URL's host is a single label", "the full name"),
    (of(base_url="https://a.localhost/v1"), 5, "the URL's host is this machine itself", "write localhost"),
    (of(base_url="http://127.0.0.2:8000"), 5, "the URL's address is this machine itself", "127.0.0.1"),
    (of(base_url="'http://[::1]:8000'"), 5, "the URL's address is this machine itself", "127.0.0.1"),
    (
        of(base_url="http://169.254.169.254/v1"),
        5,
        "the URL's address is metadata, which no rule may reach",
        "name",
    ),
    (of(base_url="https://key:word@api.example.com"), 5, "user-info", "secret://"),
    (of(base_url="https://api.example.com?key=abcdef"), 5, "a query", "secret://"),
    (of(base_url="[https://api.example.com]"), 5, "this is a list", "https://"),
    # api_key
    (of(api_key="sk-proj-abcdefghijklmn"), 6, "not a reference to a secret", "secret://env/NAME"),
    (of(api_key="secret://abcdefghijklmn"), 6, "not a reference to a secret", "secret://env/NAME"),
    (of(api_key="secret://env/not-a-name"), 6, "not a reference to a secret", "secret://env/NAME"),
    (of(api_key="secret://file/../etc/passwd"), 6, "not a reference to a secret", "ABSOLUTE/PATH"),
    (of(api_key="secret://file"), 6, "not a reference to a secret", "ABSOLUTE/PATH"),
    (of(api_key="12345678"), 6, "not a reference to a secret", "secret://env/NAME"),
    (of(api_key="[sk-proj-abc]"), 6, "not a reference to a secret", "secret://env/NAME"),
    (of(apikey="sk-proj-abcdefghijklmn"), 6, "'apikey' is not a key", "did you mean api_key?"),
    (
        "workspace: acme\nproviders:\n  p: {type: ollama, base_url: 'http://localhost:1', api_key:sk-abc}\n",
        3,
        "'api_key' and what follows its colon are one word",
        "a space after the colon",
    ),
    # residency
    (of(residency=""), 6, "this is empty", "remove the line"),
    (of(residency="francecentral"), 6, "this is text", "a mapping"),
    (of(residency="{region: francecentral}"), 6, "jurisdiction is missing", "EEA or FR"),
    (of(residency="{jurisdiction: FR}"), 6, "region is missing", "as the provider spells it"),
    (declaring("francecentral", "GDPR"), 6, "'GDPR' is not a jurisdiction", "EU, EEA"),
    (declaring("francecentral", "Europe"), 6, "'Europe' is not a jurisdiction", "EU"),
    (declaring("francecentral", "fr"), 6, "'fr' is not a jurisdiction", "did you mean FR?"),
    (declaring("francecentral", "[FR, GDPR]"), 6, "'GDPR' is not a jurisdiction", "EU, EEA"),
    (declaring("francecentral", "[]"), 6, "this is a list", "EU, EEA, UK"),
    (declaring("francecentral", "[DE, CH]"), 6, "it declares CH, DE, and francecentral is in FR", "correct"),
    (
        declaring("francecentrall", "FR"),
        6,
        "'francecentrall' is not a region of azure-openai",
        "did you mean francecentral?",
    ),
    (declaring("nowhere", "FR"), 6, "'nowhere' is not a region of azure-openai", "spells it"),
    (declaring("a b", "FR"), 6, "what is written here is not a region", "spells it"),
    (declaring("eastus", "FR"), 6, "it declares FR, and eastus is in US", "one of the two is wrong"),
    (declaring("switzerlandnorth", "EU"), 6, "it declares EU, and switzerlandnorth is in CH", "wrong"),
    (
        declaring("eu-west-1", "IE", **BEDROCK),
        6,
        "it declares eu-west-1, and its URL says eu-central-1",
        "wrong",
    ),
    (declaring("eu-central-1", "FR", **BEDROCK), 6, "it declares FR, and eu-central-1 is in DE", "wrong"),
    (declaring("eu", "EU", **OPENAI), 6, "it declares eu, and its URL is of a global endpoint", "wrong"),
    (
        of(residency="{region: francecentral, jurisdiction: FR, source_url: learn.microsoft.com}"),
        6,
        "not the https URL",
        "https://",
    ),
    (
        of(residency="{region: francecentral, jurisdiction: FR, source_url: 'http://learn.microsoft.com'}"),
        6,
        "not the https URL",
        "https://",
    ),
    (
        of(residency="{region: francecentral, jurisdiction: FR, url: 'https://a.example'}"),
        6,
        "'url' is not a key",
        "source_url",
    ),
    # models
    (of(models="claude"), 6, "this is text", "a list"),
    (of(models="['a b']"), 6, "not a model's id", "spells it"),
    (of(models="[../../secrets]"), 6, "not a model's id", "spells it"),
    # routes
    (ONE.replace("ROUTES", ""), 2, "this is empty", "remove the line"),
    (ONE.replace("ROUTES", "[p]"), 2, "this is a list", "routes: {default:"),
    (ONE.replace("ROUTES", "{default: mine}"), 2, "this is text", "a mapping"),
    (
        ONE.replace("ROUTES", "{default: {}}"),
        2,
        "a route has one of provider and providers",
        "provider: NAME",
    ),
    (
        ONE.replace("ROUTES", "{default: {provider: mine, providers: [mine]}}"),
        2,
        "a route has one of",
        "in the order",
    ),
    (ONE.replace("ROUTES", "{default: {providers: []}}"), 2, "the list is empty", "at least one"),
    (ONE.replace("ROUTES", "{default: {providers: [mine, mine]}}"), 2, "mine is listed twice", "remove one"),
    (ONE.replace("ROUTES", "{default: {provider: q}}"), 2, "there is no provider 'q'", "define it"),
    (
        ONE.replace("ROUTES", "{default: {provider: mien}}"),
        2,
        "there is no provider 'mien'",
        "did you mean mine?",
    ),
    (
        ONE.replace("ROUTES", "{default: {provide: mine}}"),
        2,
        "'provide' is not a key",
        "did you mean provider?",
    ),
    (ONE.replace("ROUTES", "{Default: {provider: mine}}"), 2, "'Default' is not a name", "lower-case"),
    # rules
    (RULE + "provider: q\n", 7, "there is no provider 'q'", "define it under providers:"),
    (RULE + "provider: mien\n", 7, "there is no provider 'mien'", "did you mean mine?"),
    (
        RULE + "{provider: aws-bedrok, region: eu-west-3}\n",
        7,
        "there is no provider 'aws-bedrok'",
        "aws-bedrock?",
    ),
    (RULE + "provider: aws-bedrock\n", 7, "there is no profile aws-bedrock", "add region: REGION"),
    (
        RULE + "{provider: aws-bedrock, region: eu-west-33}\n",
        7,
        "'eu-west-33' is not a region of aws-bedrock",
        "did you mean eu-west-3?",
    ),
    (
        RULE + "{provider: azure-ai-foundry, region: francecentral}\n",
        7,
        "azure-ai-foundry and francecentral alone do not make a host",
        "define it under providers:",
    ),
    (
        RULE + "{provider: mine, region: francecentral}\n",
        7,
        "mine is a profile, which says itself where it is",
        "leave region out",
    ),
    (RULE + "{provider: mine, ports: [443]}\n", 7, "'ports' is not a key", "provider, region, verify"),
    (RULE + "{provider: mine, host: a.example}\n", 7, "this is host and provider", "two rules"),
    (RULE + "{provider: mine, vouch: yes}\n", 7, "the reason has 3 characters", "8 to 200"),
    (RULE + f"{{provider: mine, vouch: {'x' * 201}}}\n", 7, "the reason has 201 characters", "8 to 200"),
    (RULE + "{provider: mine, vouch: true}\n", 7, "this is a truth value", "the reason, in quotes"),
    (RULE + '{provider: mine, vouch: "two\\nlines of it"}\n', 7, "cannot be shown", "one line"),
    (RULE + "{host: a.example, vouch: '        '}\n", 7, "the reason has 8 characters", "8 to 200"),
    (RULE + "{local: ollama, vouch: our own machine}\n", 7, "'vouch' is not a key", "local, ports"),
    (
        RULE + "{provider: mine, verify: address, ech: allow}\n",
        7,
        "no port of this rule is verified",
        "leave ech",
    ),
    (
        of(type="ollama", base_url="http://localhost:11434") + "allow: [{provider: mine, verify: sni}]\n",
        6,
        "verify is for hosts",
        "leave verify out",
    ),
    (
        of(type="ollama", base_url="http://localhost:11434")
        + "allow: [{provider: mine, vouch: our own one}]\n",
        6,
        "vouch is for hosts",
        "leave vouch out",
    ),
    (
        of(type="openai-compatible", base_url="https://203.0.113.7")
        + "allow: [{provider: mine, private: true}]\n",
        6,
        "private is for hosts",
        "leave private out",
    ),
    (
        of(type="openai-compatible", base_url="http://a.example")
        + "allow: [{provider: mine, verify: sni}]\n",
        6,
        "a URL of http:// has no TLS",
        "https://",
    ),
    # the rest
    ("workspace: acme\nlocal_only: maybe\n", 2, "this is text", "true or false"),
    ("workspace: acme\nlocal-only: true\n", 2, "'local-only' is not a key", "did you mean local_only?"),
    ("workspace: acme\nresidency: {jurisdictions: [GDPR]}\n", 2, "'GDPR' is not a jurisdiction", "EU, EEA"),
]


def test_a_vendor_may_name_several_jurisdictions() -> None:
    text = (
        "workspace: acme\nresidency: {jurisdictions: [EEA, CH]}\nproviders:\n  mine:\n    type: openai\n"
        "    base_url: https://eu.api.openai.com/v1\n    residency: {region: eu, jurisdiction: [EEA, CH]}\n"
    )
    (profile,) = policy(text, registry=KNOWN).providers
    assert profile.declared is not None
    assert profile.declared.jurisdiction == "CH, EEA"
    assert profile.finding.compliant


@pytest.mark.parametrize(("text", "line", "says", "remedy"), REFUSED, ids=range(len(REFUSED)))
def test_refused(text: str, line: int, says: str, remedy: str) -> None:
    found = problems(text, registry=KNOWN)
    assert len(found) == 1, "one mistake, one problem"
    (problem,) = found
    assert problem.line == line
    assert says in problem.text
    assert remedy in problem.remedy
    assert str(problem).isprintable() and str(problem).isascii()


ACCEPTED = [
    of(),
    of(base_url="https://ACME.openai.azure.com:443/openai?api-version=2024-10-21"),
    declaring("francecentral", "FR"),
    declaring("francecentral", "EU"),
    declaring("switzerlandnorth", "CH"),
    declaring("eu-central-1", "DE", **BEDROCK),
    declaring("eu-central-1", "EEA", **BEDROCK | {"type": "bedrock"}),
    declaring("eu-central-1", "EEA", **BEDROCK | {"type": "openai-compatible"}),
    declaring("global", "US", **OPENAI),
    declaring("bonn-1", "DE", type="openai-compatible", base_url="https://llm.example.com"),
    of(type="azure-openai", base_url="https://gateway.example.com/azure"),  # in front of it, perhaps
    of(models="[]"),
    of(api_key="secret://file/run/secrets/key"),
    of() + "allow: [{provider: mine, ech: allow, private: true, vouch: 'eight ch'}]\n",
    of() + f"allow: [{{provider: mine, vouch: '{'x' * 200}'}}]\n",
    of() + "allow: [{host: a.example, vouch: 'bücher, straße'}]\n",
    "workspace: acme\nproviders: {}\nroutes: {}\nlocal_only: false\n",
]


@pytest.mark.parametrize("text", ACCEPTED, ids=range(len(ACCEPTED)))
def test_accepted(text: str) -> None:
    assert problems(text, registry=KNOWN) == ()


def test_every_problem_at_once_each_at_its_line() -> None:
    found = problems(
        """\
workspace: acme
providers:
  one:
    type: openia
    base_url: ftp://a.example
    api_key: sk-abc
    residency: {region: eu, jurisdiction: XX}
    modles: []
  two:
    type: openai
    base_url: https://api.openai.com/v1
    residency: {region: eu, jurisdiction: EU}
routes:
  default: {providers: [one, tow]}
  other: {}
allow:
  - {provider: one, vouch: short}
  - provider: two
  - provider: three
""",
        registry=KNOWN,
    )
    assert [(problem.line, problem.where) for problem in found] == [
        (5, "providers.one.base_url"),
        (6, "providers.one.api_key"),
        (7, "providers.one.residency.jurisdiction"),
        (8, "providers.one.modles"),
        (12, "providers.two.residency"),
        (14, "routes.default.providers[1]"),
        (15, "routes.other"),
        (17, "allow[0].vouch"),
        (19, "allow[2].provider"),
    ]
    assert all(problem.remedy for problem in found)


CONTRADICTED = """\
workspace: acme
providers:
  a:
    type: azure-openai
    base_url: https://acme.openai.azure.com/a
    residency: {region: francecentral, jurisdiction: FR}
  b:
    type: azure-openai
    base_url: https://acme.openai.azure.com/b
    residency: {region: eastus, jurisdiction: US}
"""


def test_two_profiles_that_place_one_host_differently() -> None:
    (problem,) = problems(CONTRADICTED, registry=KNOWN)
    assert (problem.line, problem.where) == (10, "providers.b.residency")
    assert "declared to be in francecentral (FR) on line 3, and in eastus (US) here" in problem.text
    same = CONTRADICTED.replace("eastus", "francecentral").replace("US", "FR")
    assert problems(same, registry=KNOWN) == ()


def test_with_a_broken_catalogue_types_are_taken_as_they_are() -> None:
    """Else a broken file of the catalogue would refuse every policy; under a pin nothing of it takes part."""
    made = policy(of(type="nobody"), registry=BROKEN)
    assert made.providers[0].type == "nobody"


def test_without_a_catalogue_only_compatible_ones_are_known() -> None:
    assert problems(of(type="openai-compatible")) == ()
    (problem,) = problems(of())
    assert "is no provider of the catalogue" in problem.text


def test_as_many_as_there_may_be() -> None:
    def many(count: int) -> str:
        entry = "{type: openai-compatible, base_url: 'https://a.example'}"
        return "workspace: acme\nproviders:\n" + "".join(f"  p{n}: {entry}\n" for n in range(count))

    assert len(policy(many(MAX_PROVIDERS)).providers) == MAX_PROVIDERS
    (problem,) = problems(many(MAX_PROVIDERS + 1))
    assert f"{MAX_PROVIDERS} are the most" in problem.text
    (problem,) = problems(of(models=f"[{', '.join(f'm{n}' for n in range(MAX_MODELS + 1))}]"))
    assert f"{MAX_MODELS} are the most" in problem.text


# ---- one law: a policy or a PolicyError, and no secret in either

SECRET = "sk-Live-4Qq7zZ0vXw9yT3rBn6Km"
PLACES = [
    "api_key: {s}",
    "api_key: '{s}'",
    "api_key: [{s}]",
    "api_key: {{key: {s}}}",
    "api_key: secret://{s}",
    "api_key: secret://env/{s}",
    "api_key: secret://file/{s}?x",
    "apikey: {s}",
    "api_key: |\n      {s}",
    "base_url: {s}",
    "base_url: https://{s}@api.example.com",
    "base_url: https://u:{s}@api.example.com/v1",
    "base_url: https://api.example.com/v1?key={s}",
    "base_url: https://api.example.com/#{s}",
    "base_url: https://{s}/v1",
    "base_url: https://api.example.com:{s}",
    "base_url: https://api_x.{s}.com",
    "base_url: '{s}://api.example.com'",
    "base_url: https:{s}",
    "base_url: https://[{s}]/",
    "base_url: 'https://api.example.com/ {s}'",
    "type: {s}",
    "models: [ {s} x ]",
    "models: ['{s} x']",
    "residency: {s}",
    "residency: {{region: '{s}*', jurisdiction: FR}}",
    "token: {s}",
    "residency: {{region: eu, jurisdiction: {s}}}",
    "api_key: !!str {s}",
    "api_key: &a {s}",
    "api_key: *{s}",
    "residency: {{region: eu, jurisdiction: FR, source_url: '{s}'}}",
    "api_key: {s}\n    api_key: {s}",
    "residency: {{region: eu, jurisdiction: FR, source_url: 'https://{s}@a.example'}}",
    "residency: {{region: {s}{s}, jurisdiction: FR}}",
]


def judge(text: str, *secrets: str) -> None:
    try:
        made = load(
            text.encode(), source="f.yaml", expected_name=None, is_public_suffix=PUBLIC, registry=KNOWN
        )
    except PolicyError as error:
        told = [str(error), repr(error.problems)]
        assert all(str(problem).isprintable() for problem in error.problems)
        causes = [error.__cause__, error.__context__]
        assert causes == [None, None], "a traceback would tell"
    else:
        told = [repr(made)]
    for secret in secrets:
        assert not any(secret.lower() in text.lower() for text in told)


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_in_clear_is_refused_and_not_repeated(place: str) -> None:
    key = place.partition(":")[0]
    usual = {"type": "type: openai-compatible", "base_url": "base_url: https://a.example"}
    lines = [text for name, text in usual.items() if name != key] + [place.format(s=SECRET)]
    text = "workspace: acme\nproviders:\n  p:\n" + "".join(f"    {line}\n" for line in lines)
    assert problems(text, registry=KNOWN)
    judge(text, SECRET)


SECRETS = st.text(alphabet="abcdefghijkLMNOPQRSTUVWXYZ0123456789-+/=.:@%", min_size=16, max_size=48).map(
    "Sk9-".__add__
)


@settings(max_examples=200)
@given(st.sampled_from(PLACES[:17]), SECRETS)
def test_no_secret_is_ever_repeated(place: str, secret: str) -> None:
    other = "type: openai-compatible" if not place.startswith("type") else "base_url: https://a.example"
    text = f"workspace: acme\nproviders:\n  p:\n    {other}\n    {place.format(s=secret)}\n"
    try:
        load(text.encode(), source="f", expected_name=None, is_public_suffix=PUBLIC, registry=KNOWN)
    except PolicyError as error:
        assert secret.lower() not in str(error).lower()


@settings(max_examples=200)
@given(st.data())
def test_any_slip_of_the_keyboard(data: st.DataObject) -> None:
    """A good document with one character replaced, or a piece cut out."""
    start = data.draw(st.integers(0, len(FULL) - 1))
    end = data.draw(st.integers(start, min(start + 20, len(FULL))))
    text = FULL[:start] + data.draw(st.text(max_size=3)) + FULL[end:]
    judge(text.encode("utf-8", "replace").decode())


WORDS = st.sampled_from(
    ["type", "base_url", "api_key", "residency", "region", "jurisdiction", "source_url", "models", "p", "q",
     "provider", "providers", "default", "aws-bedrock", "openai-compatible", "https://a.example", "eu-west-3",
     "http://localhost:1", "secret://env/K", "FR", "EU", "vouch", "a good reason", "host", "443", "true"]
)  # fmt: skip
VALUES = st.recursive(
    WORDS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(WORDS, inner, max_size=4).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
        )
    ),
    max_leaves=16,
)


@settings(max_examples=200)
@given(VALUES, VALUES, VALUES)
def test_any_shape(providers: str, routes: str, rule: str) -> None:
    judge(f"workspace: acme\nproviders: {{p: {providers}}}\nroutes: {routes}\nallow: [{rule}]\n")
