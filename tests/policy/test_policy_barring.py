"""What residency and local_only let take part, and how the rest of the policy room tells of it."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import BROKEN, CATALOGUE, KNOWN, NO_TABLES, allowing, pinned, policy
from test_policy_document import FULL

from egressd.model.verdicts import Reason
from egressd.policy.compile import canonical
from egressd.policy.compiled import Guard, Policy, Protocol
from egressd.policy.decide import barred_for, decide_address, decide_flow, decide_name, governing, rule_for
from egressd.policy.diff import diff
from egressd.policy.explain import explain_policy, why
from egressd.policy.remarks import remarks
from egressd.residency.judge import Code
from egressd.residency.jurisdictions import EEA, EU, named
from egressd.residency.places import Pin
from egressd.residency.registry import Registry


def made(text: str, registry: Registry = KNOWN) -> Policy:
    return policy(text, registry=registry)


def standing(found: Policy) -> dict[str, Code | None]:
    """Every rule by its key, with the code by which it is barred."""
    return {rule.key: None for rule in found.rules} | {one.rule.key: one.finding.code for one in found.barred}


# ---- under a pin

HOSTS = [
    # host, pin, why it is barred
    ("bedrock-runtime.eu-central-1.amazonaws.com", "EU", None),
    ("bedrock-runtime.eu-central-1.amazonaws.com", "DE", None),
    ("bedrock-runtime.eu-central-1.amazonaws.com", "FR", Code.OUTSIDE),
    ("bedrock-runtime.eu-west-2.amazonaws.com", "EU", Code.OUTSIDE),  # London
    ("bedrock-runtime.eu-west-2.amazonaws.com", "EU, UK", None),
    ("bedrock-runtime.eu-central-2.amazonaws.com", "EEA", Code.OUTSIDE),  # Zurich
    ("bedrock-runtime.eu-central-2.amazonaws.com", "EEA, CH", None),
    ("bedrock-runtime.us-east-1.amazonaws.com", "EU", Code.OUTSIDE),
    ("bedrock-runtime.eu-central-1.amazonaws.com.evil.io", "EU", None),  # nobody's: its addresses decide
    ("eu.api.openai.com", "EU", Code.OUTSIDE),  # the EEA and Switzerland, by its vendor
    ("eu.api.openai.com", "EEA", Code.OUTSIDE),
    ("eu.api.openai.com", "EEA, CH", None),
    ("api.openai.com", "EU", Code.GLOBAL),
    ("api.openai.com", "EU, US", Code.GLOBAL),
    ("api.mistral.ai", "FR", Code.GLOBAL),
    ("acme.openai.azure.com", "EU", Code.UNPLACED),
    ("s3.us-east-1.amazonaws.com", "EU", Code.UNPLACED),
    ("llm.example.com", "EU", None),
    ("**.amazonaws.com", "EU", None),  # each name is judged when it is asked for
]


@pytest.mark.parametrize(("host", "pin", "code"), HOSTS)
def test_hosts(host: str, pin: str, code: Code | None) -> None:
    rule = f"host: '{host}'"
    assert standing(made(pinned(rule, pin=pin))) == {host: code}
    assert standing(made(allowing(rule))) == {host: None}, "without a pin everything takes part"
    vouched = made(pinned(f"{{{rule}, vouch: trust me please}}", pin=pin))
    assert standing(vouched) == {host: code}, "nobody can vouch for what a URL says"


def test_what_is_barred_is_in_no_list_of_what_takes_part() -> None:
    found = made(pinned("host: api.openai.com", "{cidr: 10.0.0.0/8, ports: [443]}", "host: a.example"))
    assert [rule.key for rule in found.rules] == ["a.example"]
    assert (len(found.hosts), len(found.cidrs)) == (1, 0)
    assert [(one.rule.key, one.rule.line, one.reason) for one in found.barred] == [
        ("api.openai.com", 4, Reason.RESIDENCY),
        ("10.0.0.0/8", 5, Reason.RESIDENCY),
    ]
    assert "api.openai.com is a global endpoint" in found.barred[0].finding.text


@pytest.mark.parametrize("guard", list(Guard))
def test_a_pin_and_a_guard_are_two_switches(guard: Guard) -> None:
    found = made(pinned("host: api.openai.com", "host: a.example", guard=guard.value))
    assert standing(found) == {"a.example": None, "api.openai.com": Code.GLOBAL}
    assert (found.guard, found.holding) == (guard, guard)


def test_this_machine_is_always_within() -> None:
    assert standing(made(pinned("local: ollama", pin="IS"))) == {"ollama": None}
    assert standing(made(pinned("local: ollama", pin="IS"), BROKEN)) == {"ollama": None}


def test_with_broken_files_nothing_takes_part() -> None:
    rules = (
        "host: a.example",
        "host: '*.b.example'",
        "{cidr: 3.64.0.0/16, ports: [1], vouch: our own racks}",
    )
    assert set(standing(made(pinned(*rules), BROKEN)).values()) == {Code.BROKEN}
    assert set(standing(made(allowing(*rules), BROKEN)).values()) == {None}, "nothing is asked without a pin"


# ---- networks

NETWORKS = [
    # network, why it is barred, and why although somebody vouches for it
    ("3.64.0.0/12", None, None),  # Frankfurt
    ("3.64.1.0/24", None, None),
    ("2a05:d014::/36", None, None),
    ("3.80.0.0/12", Code.OUTSIDE, Code.OUTSIDE),  # Virginia
    ("2600:1f18::/40", Code.OUTSIDE, Code.OUTSIDE),
    ("3.64.0.0/11", Code.OUTSIDE, Code.OUTSIDE),  # Frankfurt and Virginia
    ("3.60.0.0/14", Code.UNPUBLISHED, None),
    ("2a05:d014::/35", Code.UNPUBLISHED, None),  # half of it is Frankfurt
    ("13.32.0.0/16", Code.ANYCAST, None),
    ("10.20.0.0/16", Code.UNPUBLISHED, None),  # private: no table has it
    ("fd12:3456::/32", Code.UNPUBLISHED, None),
    ("2a05:d000::/28", Code.UNPUBLISHED, None),
]


@pytest.mark.parametrize(("network", "code", "vouched"), NETWORKS)
def test_networks(network: str, code: Code | None, vouched: Code | None) -> None:
    rule = f"cidr: '{network}', ports: [443]"
    assert standing(made(pinned(f"{{{rule}}}"))) == {network: code}
    assert standing(made(pinned(f"{{{rule}, vouch: our own racks}}"))) == {network: vouched}
    assert standing(made(allowing(f"{{{rule}}}"))) == {network: None}


@pytest.mark.parametrize("vouched", [True, False])
def test_the_reason_names_the_network_and_the_worst_part_of_it(vouched: bool) -> None:
    found = KNOWN.judge_network(ip_network("3.0.0.0/8"), vouched=vouched, pin=Pin(("EU",)))
    assert "in 3.0.0.0/8, 3.80.0.0 is in 3.80.0.0/12 of aws, us-east-1 (US)" in found.text


# ---- profiles

AZURE = """\
providers:
  frc:
    type: azure-openai
    base_url: https://acme.openai.azure.com/openai
    residency: {region: francecentral, jurisdiction: FR}
  fra: {type: aws-bedrock, base_url: "https://bedrock-runtime.eu-central-1.amazonaws.com", models: MODELS}
  us: {type: aws-bedrock, base_url: "https://bedrock-runtime.us-east-1.amazonaws.com"}
  gate: {type: openai-compatible, base_url: "https://llm.example.com/v1"}
  bonn: {type: openai-compatible, base_url: "https://llm.example.com/v2",
         residency: {region: bonn, jurisdiction: DE}}
  rack: {type: openai-compatible, base_url: "https://203.0.113.7/v1",
         residency: {region: bonn, jurisdiction: DE}}
  here: {type: ollama, base_url: "http://localhost:11434"}
"""


def profiles(*rules: str, pin: str = "EU", models: str = "[]", more: str = "") -> Policy:
    return made(pinned(*rules, pin=pin, more=AZURE.replace("MODELS", models) + more))


JUDGED = [
    # profile, pin, models, the finding
    ("frc", "EU", "[]", Code.BY_ADDRESS),
    ("frc", "DE", "[]", Code.OUTSIDE),
    ("fra", "EU", "[]", Code.INSIDE),
    ("fra", "EU", "[anthropic.claude-3-haiku-20240307-v1:0]", Code.INSIDE),
    ("fra", "EU", "[eu.anthropic.claude-sonnet-4-20250514-v1:0]", Code.UNPLACED),
    ("fra", "EU", "[us.anthropic.claude-sonnet-4-20250514-v1:0]", Code.UNPLACED),
    (
        "fra",
        "EU",
        "[anthropic.claude-3-haiku-20240307-v1:0, global.anthropic.claude-sonnet-4-v1:0]",
        Code.UNPLACED,
    ),
    ("us", "EU", "[]", Code.OUTSIDE),
    ("us", "EU, US", "[]", Code.INSIDE),
    ("gate", "EU", "[]", Code.BY_ADDRESS),
    ("bonn", "EU", "[]", Code.BY_ADDRESS),
    ("bonn", "FR", "[]", Code.OUTSIDE),
    ("here", "EU", "[]", Code.LOOPBACK),
]


@pytest.mark.parametrize(("name", "pin", "models", "code"), JUDGED)
def test_profiles(name: str, pin: str, models: str, code: Code) -> None:
    found = profiles(f"provider: {name}", pin=pin, models=models)
    profile = found.provider(name)
    assert profile is not None and profile.finding.code is code
    assert standing(found) == {profile.key: None if profile.finding.compliant else code}


def test_a_declaration_settles_what_the_url_of_a_plain_rule_leaves_open() -> None:
    assert standing(profiles("host: acme.openai.azure.com")) == {"acme.openai.azure.com": Code.UNPLACED}
    both = profiles("host: acme.openai.azure.com", "provider: frc")
    assert standing(both) == {"acme.openai.azure.com": None}
    assert "list it as a provider" in profiles("host: acme.openai.azure.com").barred[0].finding.remedy


def test_of_two_profiles_of_a_host_both_have_to_comply() -> None:
    """Which of them a connection is for, nobody on the network can tell."""
    assert standing(profiles("provider: gate", "provider: bonn")) == {"llm.example.com": None}
    found = profiles("provider: gate", "provider: bonn", pin="FR")
    assert standing(found) == {"llm.example.com": Code.OUTSIDE}
    assert "provider bonn: llm.example.com is declared to be in DE" in found.barred[0].finding.text
    assert standing(profiles("provider: gate", pin="FR")) == {"llm.example.com": None}


def test_a_profile_by_address_is_a_network_and_judged_as_one() -> None:
    assert standing(profiles("provider: rack")) == {"203.0.113.7/32": Code.UNPUBLISHED}
    assert standing(profiles("{provider: rack, vouch: our own racks}")) == {"203.0.113.7/32": None}
    assert standing(profiles("{provider: rack, vouch: our own racks}", pin="FR")) == {
        "203.0.113.7/32": Code.OUTSIDE
    }


# ---- local_only

LOCAL = ("host: a.example", "host: '*.b.example'", "local: ollama", "{cidr: 10.0.0.0/8, ports: [443]}")


@pytest.mark.parametrize("guard", list(Guard))
def test_local_only(guard: Guard) -> None:
    found = made(allowing(*LOCAL, guard=guard.value, more="local_only: true\n"))
    assert [rule.key for rule in found.rules] == ["ollama", "10.0.0.0/8"]
    assert [(one.rule.key, one.reason) for one in found.barred] == [
        ("a.example", Reason.LOCAL_ONLY),
        ("*.b.example", Reason.LOCAL_ONLY),
    ]
    assert (found.guard, found.holding) == (guard, Guard.ENFORCE)
    assert not decide_flow(found, "8.8.8.8", port=53, protocol=Protocol.UDP).allowed
    assert not decide_name(found, "other.example").allowed
    assert decide_flow(found, "10.1.2.3", port=443, protocol=Protocol.TCP).allowed
    assert decide_name(found, "ollama").allowed


def test_local_only_under_a_pin_leaves_only_networks_inside() -> None:
    found = made(pinned(*LOCAL, "{cidr: 3.64.0.0/16, ports: [443]}", more="local_only: true\n"))
    assert [rule.key for rule in found.rules] == ["ollama", "3.64.0.0/16"]
    assert {one.rule.key: one.reason for one in found.barred} == {
        "a.example": Reason.LOCAL_ONLY, "*.b.example": Reason.LOCAL_ONLY, "10.0.0.0/8": Reason.RESIDENCY,
    }  # fmt: skip


def test_local_only_false_is_as_if_it_were_not_there() -> None:
    assert made(allowing(*LOCAL, more="local_only: false\n")).digest == made(allowing(*LOCAL)).digest


# ---- decisions

DECIDED = pinned(
    "host: '**.example.com'",  # line 4
    "host: bedrock-runtime.us-east-1.amazonaws.com",
    "host: '*.openai.azure.com'",
    "{cidr: 3.80.0.0/12, ports: [443]}",
    "{host: a.example, vouch: contract 4711}",
    "host: api.openai.com",
)


@pytest.mark.parametrize("guard", list(Guard))
def test_a_barred_host_is_denied_under_any_guard(guard: Guard) -> None:
    found = made(DECIDED.replace("enforce", guard.value))
    for name in ("api.openai.com", "API.OpenAI.com."):
        for decision in (
            decide_name(found, name),
            decide_flow(found, name, port=443, protocol=Protocol.TCP),
            decide_flow(found, name, port=80, protocol=Protocol.TCP),
        ):
            assert (decision.allowed, decision.reason, decision.enforced) == (False, Reason.RESIDENCY, None)
            assert decision.rule is not None and decision.rule.line == 9
            assert decision.text.startswith(
                "api.openai.com is listed (line 9) and barred: api.openai.com is a"
            )
            assert decision.remedy == "use a regional endpoint of the provider"
    assert decide_name(found, "a.example").allowed


@pytest.mark.parametrize("guard", list(Guard))
def test_local_only_denies_hosts_and_says_so(guard: Guard) -> None:
    found = made(allowing("host: a.example", guard=guard.value, more="local_only: true\n"))
    decision = decide_flow(found, "a.example", port=443, protocol=Protocol.TCP)
    assert (decision.allowed, decision.reason) == (False, Reason.LOCAL_ONLY)
    assert "local_only" in decision.remedy


def test_a_barred_network_is_denied_where_the_guard_denies() -> None:
    """An open guard forwards raw addresses that nothing lists: a remark says that no pin holds them."""
    strict, loose = made(DECIDED), made(DECIDED.replace("enforce", "observe"))
    address = ip_address("3.80.1.2")
    for decision in (
        decide_address(strict, address),
        decide_flow(strict, address, port=443, protocol=Protocol.TCP),
    ):
        assert (decision.allowed, decision.reason) == (False, Reason.RESIDENCY)
        assert "3.80.0.0/12 is listed (line 7) and barred: in 3.80.0.0/12" in decision.text
    open_decision = decide_flow(loose, address, port=443, protocol=Protocol.TCP)
    assert open_decision.reason is Reason.UNRESTRICTED
    assert open_decision.enforced is not None and open_decision.enforced.reason is Reason.RESIDENCY


def test_no_wildcard_takes_over_what_is_barred() -> None:
    text = pinned("host: '**.openai.com'", "host: api.openai.com", "host: '*.azure.com'", guard="off")
    found = made(text)
    assert standing(found)["api.openai.com"] is Code.GLOBAL
    assert rule_for(found, "api.openai.com") is None
    assert barred_for(found, "api.openai.com") == found.barred[0] == governing(found)["api.openai.com"]
    assert not decide_name(found, "api.openai.com").allowed
    assert rule_for(found, "eu.openai.com") == found.hosts[0] and barred_for(found, "eu.openai.com") is None


def test_a_barred_wildcard_bars_its_names_and_not_those_of_others() -> None:
    found = made(allowing("host: '*.b.example'", more="local_only: true\n"))
    assert barred_for(found, "a.b.example") == found.barred[0]
    assert barred_for(found, "b.example") is None and barred_for(found, "c.a.b.example") is None


def test_names_of_wildcards_are_judged_where_it_is_known_what_they_are() -> None:
    found = made(DECIDED)
    for name, reason in (
        ("a.example.com", Reason.ALLOWED),
        ("acme.openai.azure.com", Reason.RESIDENCY),
        ("bedrock-runtime.us-east-1.amazonaws.com", Reason.RESIDENCY),
    ):
        assert decide_name(found, name, registry=KNOWN).reason is reason
        assert decide_flow(found, name, port=443, protocol=Protocol.TCP, registry=KNOWN).reason is reason
    assert decide_name(found, "acme.openai.azure.com").allowed, "without a registry nothing can be said"


# ---- the digest

KEPT = {
    "workspace: acme": "4692a066eed0ccd91f88076be1a32bcff2183f0b5a4f115761b94979b8e7711b",
    FULL.replace("residency: {jurisdictions: [EEA, CH]}\n", "").replace(
        "    vouch: our own machines, in Bonn\n", ""
    ): "6bf4fe0c36fee58d1d82e5a36cd4d4942dadbfcc4958c67a255ac8dc0a29b3c1",
}


@pytest.mark.parametrize("text", KEPT)
def test_what_could_be_said_before_has_the_digest_it_had(text: str) -> None:
    """Journals and proofs of earlier versions name it."""
    assert policy(text).digest == "sha256:" + KEPT[text]
    assert json.loads(canonical(policy(text)))["format"] == 1


DIGESTS = [
    pinned("host: a.example"),
    allowing("host: a.example"),
    pinned("host: a.example", more="local_only: true\n"),
    pinned("{host: a.example, vouch: contract 4711}"),
    pinned("{host: a.example, vouch: contract 4712}"),
    pinned("host: api.openai.com"),
    pinned("host: api.openai.com", pin="FR"),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[]")),
    pinned("provider: gate", more=AZURE.replace("MODELS", "[]")),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[]") + "routes: {default: {provider: frc}}\n"),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[]") + "routes: {other: {provider: frc}}\n"),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[]") + "routes: {default: {provider: gate}}\n"),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[]").replace("FR}", "EU}")),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[]").replace("/v1", "/v3")),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[anthropic.claude-v2]")),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[], api_key: secret://env/A")),
    pinned("provider: frc", more=AZURE.replace("MODELS", "[], api_key: secret://env/B")),
]


def test_whatever_is_new_is_part_of_the_meaning() -> None:
    digests = [made(text).digest for text in DIGESTS]
    assert len(set(digests)) == len(digests)


def test_every_difference_in_digest_is_told() -> None:
    for old in DIGESTS:
        for new in DIGESTS:
            assert bool(diff(made(old), made(new))) == (old != new)


def test_a_policy_has_one_digest_whatever_is_known_where_it_is_read() -> None:
    text = pinned("host: a.example", "{cidr: 3.64.0.0/16, ports: [443]}", "host: api.openai.com")
    known, unknown, broken = (made(text, registry) for registry in (KNOWN, NO_TABLES, BROKEN))
    assert known.rules != unknown.rules
    assert known.digest == unknown.digest == broken.digest
    assert known.digest != made(pinned("host: a.example"), KNOWN).digest


def test_a_barred_rule_is_barred_for_another_reason_when_the_registry_breaks() -> None:
    text = pinned("host: api.openai.com")
    (change,) = diff(made(text, KNOWN), made(text, BROKEN))
    assert change.describe() == (
        "~ host api.openai.com: changed from barred (residency: global-endpoint)"
        " to barred (residency: broken-registry)"
    )


# ---- differences

PLAIN = allowing("host: a.example", "{cidr: 10.0.0.0/8, ports: [443]}")
PINNED = pinned("host: a.example", "{cidr: 10.0.0.0/8, ports: [443]}")
VOUCHED = PINNED.replace("[443]", "[443], vouch: our own racks")
ROUTED = (
    "providers:\n  p: {type: openai-compatible, base_url: 'https://b.example'}\nroutes: {r: {provider: p}}\n"
)
SHUT = allowing("host: '**.w.example'", more="local_only: true\n")
WIDE = pinned("host: '**.w.example'")
CHANGES = [
    (
        SHUT,
        allowing("host: '**.w.example'", "host: a.w.example", more="local_only: true\n"),
        ["~ host a.w.example: added (443/tls, barred by local-only)"],
    ),
    (
        WIDE,
        pinned("host: '**.w.example'", "{host: a.w.example, vouch: contract 4711}"),
        ["+ host a.w.example: added (443/tls, vouched for)"],
    ),
    (
        PLAIN,
        PINNED,
        [
            "- residency: changed from any to EU",
            "- cidr 10.0.0.0/8: changed from in force to barred (residency: no-prefix)",
        ],
    ),
    (
        PINNED,
        PLAIN,
        [
            "+ residency: changed from EU to any",
            "+ cidr 10.0.0.0/8: changed from barred (residency: no-prefix) to in force",
        ],
    ),
    (PINNED, PINNED.replace("[EU]", "[EU, DE]"), ["~ residency: changed from EU to DE, EU"]),
    (PINNED, PINNED.replace("[EU]", "[EEA]"), ["+ residency: changed from EU to EEA"]),
    (PINNED, PINNED.replace("[EU]", "[AT]"), ["- residency: changed from EU to AT"]),
    (
        PINNED,
        VOUCHED,
        [
            '~ cidr 10.0.0.0/8: vouch changed from none to "our own racks"',
            "+ cidr 10.0.0.0/8: changed from barred (residency: no-prefix) to in force",
        ],
    ),
    (
        VOUCHED,
        PINNED,
        [
            '~ cidr 10.0.0.0/8: vouch changed from "our own racks" to none',
            "- cidr 10.0.0.0/8: changed from in force to barred (residency: no-prefix)",
        ],
    ),
    (
        PINNED,
        PINNED.replace("host: a.example", "{host: a.example, vouch: contract 4711}"),
        ['+ host a.example: vouch changed from none to "contract 4711"'],
    ),
    (
        PINNED.replace("host: a.example", "{host: a.example, vouch: contract 4711}"),
        PINNED,
        ['- host a.example: vouch changed from "contract 4711" to none'],
    ),
    (
        VOUCHED,
        VOUCHED.replace("our own", "their own"),
        ['~ cidr 10.0.0.0/8: vouch changed from "our own racks" to "their own racks"'],
    ),
    (
        PLAIN,
        PLAIN + "local_only: true\n",
        [
            "- local_only: changed from false to true",
            "- host a.example: changed from in force to barred (local-only)",
        ],
    ),
    (
        PLAIN + "local_only: true\n",
        PLAIN,
        [
            "+ local_only: changed from true to false",
            "+ host a.example: changed from barred (local-only) to in force",
        ],
    ),
    (
        PINNED,
        pinned("host: a.example"),
        ["~ cidr 10.0.0.0/8: removed (443/tcp, barred by residency: no-prefix)"],
    ),
    (
        pinned("host: a.example"),
        PINNED,
        ["~ cidr 10.0.0.0/8: added (443/tcp, barred by residency: no-prefix)"],
    ),
    (
        PINNED,
        PINNED.replace("443", "444"),
        ["~ cidr 10.0.0.0/8: 443/tcp removed", "~ cidr 10.0.0.0/8: 444/tcp added"],
    ),
    (
        pinned("host: '**.openai.com'"),
        pinned("host: '**.openai.com'", "host: api.openai.com"),
        ["- host api.openai.com: added (443/tls, barred by residency: global-endpoint)"],
    ),
    (
        pinned("host: '**.openai.com'", "host: api.openai.com"),
        pinned("host: '**.openai.com'"),
        ["+ host api.openai.com: removed (443/tls, barred by residency: global-endpoint)"],
    ),
    (PLAIN, PLAIN + ROUTED, ["~ provider p: added (https://b.example)", "~ route r: added (p)"]),
    (PLAIN + ROUTED, PLAIN, ["~ provider p: removed (https://b.example)", "~ route r: removed (p)"]),
    (
        PLAIN + ROUTED,
        PLAIN + ROUTED.replace("b.ex", "c.ex").replace("{r:", "{s:"),
        [
            "~ provider p: base_url changed from https://b.example to https://c.example",
            "~ route r: removed (p)",
            "~ route s: added (p)",
        ],
    ),
    (
        allowing("host: b.example", more=ROUTED),
        allowing("host: b.example", "provider: p", more=ROUTED),
        ["~ host b.example: providers changed from none to p"],
    ),
]


@pytest.mark.parametrize(("old", "new", "lines"), CHANGES, ids=range(len(CHANGES)))
def test_changes(old: str, new: str, lines: list[str]) -> None:
    assert [change.describe() for change in diff(made(old), made(new))] == lines


@pytest.mark.parametrize(("old", "new", "lines"), CHANGES, ids=range(len(CHANGES)))
def test_a_change_and_its_reverse_mirror_each_other(old: str, new: str, lines: list[str]) -> None:
    there, back = diff(made(old), made(new)), diff(made(new), made(old))
    assert sorted((c.section, c.subject, c.detail, c.widens, c.narrows) for c in there) == sorted(
        (c.section, c.subject, c.detail, c.narrows, c.widens) for c in back
    )


LISTS = st.sets(
    st.tuples(
        st.sampled_from(["", "*.", "**."]),
        st.sampled_from(["openai.com", "api.openai.com", "eu.api.openai.com", "x.api.openai.com"]),
    ).map("".join),
    max_size=4,
)
TERMS = st.tuples(LISTS, st.sampled_from(["", "EU", "EEA, CH"]), st.booleans())
PROBES = ["openai.com", "api.openai.com", "eu.api.openai.com", "x.api.openai.com", "y.x.api.openai.com"]


def of_terms(terms: tuple[set[str], str, bool]) -> Policy:
    hosts, pin, local_only = terms
    more = f"residency: {{jurisdictions: [{pin}]}}\n" * bool(pin) + "local_only: true\n" * local_only
    return made(allowing(*(f"host: '{host}'" for host in sorted(hosts)), more=more))


@settings(max_examples=200)
@given(TERMS, TERMS)
def test_what_opens_or_closes_for_any_name_is_said(
    before: tuple[set[str], str, bool], after: tuple[set[str], str, bool]
) -> None:
    old, new = of_terms(before), of_terms(after)
    changes = diff(old, new)
    for name in PROBES:
        was, will_be = rule_for(old, name) is not None, rule_for(new, name) is not None
        assert will_be <= was or any(change.widens for change in changes)
        assert was <= will_be or any(change.narrows for change in changes)


# ---- in words

WORDS = pinned(
    "provider: frc",
    "{provider: gate, vouch: contract 4711}",
    "provider: us",
    "provider: here",
    more=AZURE.replace("MODELS", "[]") + "routes: {default: {providers: [us, frc]}, none: {provider: us}}\n",
)


def test_a_pinned_policy_in_words() -> None:
    found = made(WORDS)
    said = {one.name: one.finding.text for one in found.providers}
    bedrock = "aws-bedrock at https://bedrock-runtime"
    by_address = "its addresses have to show it [by-address]"
    assert explain_policy(found).splitlines()[1:] == [
        "guard: enforce: only what is listed is reachable",
        "members: none, so nobody may spawn here",
        "residency: EU (27 countries)",
        "allowed: host acme.openai.azure.com on 443/tcp, verified by SNI, for provider frc (line 4)",
        "allowed: host llm.example.com on 443/tcp, verified by SNI"
        ', vouched for: "contract 4711", for provider gate (line 5)',
        "allowed: local service ollama on 11434/tcp of this machine's loopback, for provider here (line 7)",
        "barred: host bedrock-runtime.us-east-1.amazonaws.com on 443/tcp, verified by SNI, for provider us"
        f" (line 6): provider us: {said['us']} [residency]",
        "provider frc: azure-openai at https://acme.openai.azure.com/openai, francecentral (FR) (line 10):"
        f" complies: acme.openai.azure.com is declared to be in FR (francecentral): {by_address}",
        f"provider fra: {bedrock}.eu-central-1.amazonaws.com, eu-central-1 (DE) (line 14):"
        f" complies: {said['fra']} [inside]",
        f"provider us: {bedrock}.us-east-1.amazonaws.com, us-east-1 (US) (line 15):"
        f" does not comply: {said['us']} [outside]",
        "provider gate: openai-compatible at https://llm.example.com/v1 (line 16): complies:"
        " llm.example.com is in no catalogue: its addresses have to show where it is [by-address]",
        "provider bonn: openai-compatible at https://llm.example.com/v2, bonn (DE) (line 17): complies:"
        f" llm.example.com is declared to be in DE (bonn): {by_address}",
        "provider rack: openai-compatible at https://203.0.113.7/v1, bonn (DE) (line 19): complies:"
        f" 203.0.113.7 is declared to be in DE (bonn): {by_address}",
        "provider here: ollama at http://localhost:11434 (line 21): complies:"
        " localhost is this machine itself [loopback]",
        "route default: us, frc (line 22): frc by its URL; egressctl route says by its addresses",
        f"route none: us (line 22): none is selected: no provider of route none complies: us: {said['us']}",
    ]
    assert "US is not in EU" in said["us"]


def test_without_a_pin_nothing_is_said_of_complying() -> None:
    text = explain_policy(made(WORDS.replace("residency: {jurisdictions: [EU]}\n", "")))
    assert "compl" not in text and "residency" not in text


def test_local_only_in_words() -> None:
    text = explain_policy(made(allowing("host: a.example", guard="off", more="local_only: true\n")))
    assert "local_only: external routing is off" in text
    assert "allowed: nothing\nbarred: host a.example on 443/tcp, verified by SNI (line 4): external" in text


WHY = [
    (
        "api.openai.com",
        "denied in acme: api.openai.com is listed (line 9) and barred",
        "[residency]",
        "pinned to EU (27 countries)",
        "line 9: use a regional endpoint",
    ),
    (
        "acme.openai.azure.com:443",
        "is listed as *.openai.azure.com (line 6) and barred",
        "[residency]",
        "look the same in every region",
        "line 6: list it as a provider",
    ),
    ("3.80.0.1:443", "denied", "[residency]", "us-east-1 (US)", "the rule is: cidr 3.80.0.0/12"),
    (
        "a.example:443",
        "allowed",
        "published for EU, or that nobody can place, for which line 8 vouches",
        '"contract 4711"',
        "read",
    ),
    ("a.example.com", "allowed", "it leads only to addresses that are published for EU", "budget", "line 4"),
    ("other.example", "denied", "[name]", "not on the list", "acme"),
]


@pytest.mark.parametrize(("subject", "parts"), [(row[0], row[1:]) for row in WHY])
def test_why(subject: str, parts: tuple[str, ...]) -> None:
    said = str(why(made(DECIDED), subject, registry=KNOWN))
    assert all(part in said for part in parts)
    assert all(line.isprintable() for line in said.splitlines())


def test_why_not_under_local_only() -> None:
    found = made(allowing("host: a.example", guard="off", more="local_only: true\n"))
    said = why(found, "a.example:443").sentences
    assert said[0].startswith(
        "denied in acme: a.example is listed (line 4) and barred: external routing is off"
    )
    assert said[0].endswith("[local-only]")
    assert "remove local_only" in said[2]


# ---- remarks

REMARKED = [
    # what is said, the lines it is said of, the document
    ("leaves open whatever is not listed", [0], pinned("host: a.example", guard="observe")),
    ("leaves open whatever is not listed", [], pinned("host: a.example")),
    (
        "leaves open whatever is not listed",
        [],
        pinned("host: a.example", guard="off", more="local_only: true\n"),
    ),
    (
        "is barred by residency",
        [4, 5],
        pinned("host: api.openai.com", "{cidr: 10.0.0.0/8, ports: [1]}", "host: a.b"),
    ),
    ("is barred by residency", [], allowing("host: api.openai.com")),
    (
        "2 of the rules are for hosts",
        [0],
        allowing("host: a.b", "host: b.b", "local: ollama", more="local_only: true\n"),
    ),
    ("nothing is allowed", [0], allowing("host: a.b", guard="off", more="local_only: true\n")),
    ("is vouched for: where its addresses", [4], pinned("{host: a.b, vouch: contract 4711}", "host: b.b")),
    ("and no residency is asked of it", [4], allowing("{host: a.b, vouch: contract 4711}", "host: b.b")),
    (
        "only its addresses can show",
        [5, 6],
        pinned(
            "{host: a.b, vouch: contract 4711}",
            "host: b.b",
            "provider: frc",
            more=AZURE.replace("MODELS", "[]"),
        ),
    ),
    ("only its addresses can show", [], pinned("provider: fra", more=AZURE.replace("MODELS", "[]"))),
    ("nothing is known until they are asked for", [4], pinned("host: '*.a.example'")),
    ("nothing is known until they are asked for", [], allowing("host: '*.a.example'")),
    ("no rule is for provider p", [6], allowing("host: a.b", more=ROUTED)),
    ("no rule is for provider p", [], allowing("provider: p", more=ROUTED)),
    ("is not encrypted", [6], allowing("provider: p", more=ROUTED.replace("https", "http"))),
    ("no provider of route r complies", [7], allowing("host: a.b", more=ROUTED)),
    ("no provider of route r complies", [], allowing("provider: p", more=ROUTED)),
]


@pytest.mark.parametrize(("says", "lines", "text"), REMARKED, ids=range(len(REMARKED)))
def test_remarks(says: str, lines: list[int], text: str) -> None:
    found = [remark for remark in remarks(made(text), source="f", registry=KNOWN) if says in remark.text]
    assert [remark.line for remark in found] == lines
    assert all(remark.remedy for remark in found)


def test_remarks_on_what_is_known() -> None:
    text = pinned("host: a.example")
    assert any("no published prefixes" in r.text for r in remarks(made(text, NO_TABLES), registry=NO_TABLES))
    assert not any("no published prefixes" in r.text for r in remarks(made(text), registry=KNOWN))
    assert any("everything under the pin is refused: tables/aws.json" in r.text
               for r in remarks(made(text, BROKEN), registry=BROKEN))  # fmt: skip
    assert not any("published" in r.text for r in remarks(made(text, NO_TABLES))), "nobody said what is known"


# ---- words for places


def test_countries_as_people_write_them() -> None:
    assert named(EU) == "EU"
    assert named(EEA | {"CH"}) == "CH, EEA"
    assert named(["FR", "DE"]) == "DE, FR"
    assert named(()) == ""
    assert CATALOGUE.regions("openai")["eu"] == tuple(sorted(EEA | {"CH"}))
