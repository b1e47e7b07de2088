"""What a policy asks of the kernel."""

from __future__ import annotations

import dataclasses

import pytest
from policies import EXAMPLE, host, network, policy, tcp

from egressd.policy.compiled import Guard, Verify
from egressd.ruleset.allocate import allocate
from egressd.ruleset.layout import Kind, Mark, Pools
from egressd.ruleset.plan import want
from egressd.ruleset.wants import WorkspaceWant, comment

POOLS = Pools()


def wanted(*rules: object, **fields: object) -> WorkspaceWant:
    made = policy(*rules, **fields)  # type: ignore[arg-type]
    return want(made, allocate([made]), POOLS)


def keys(found: WorkspaceWant) -> set[tuple[str, str, str, int]]:
    return {(e.comment, Mark.of(e.mark).kind.name or "", e.protocol, e.port) for e in found.elements}


def test_every_rule_has_its_elements() -> None:
    assert keys(wanted(*EXAMPLE)) == {
        ("api.example.com", "FORWARD", "tcp", 443),
        ("api.example.com", "FORWARD", "udp", 443),
        ("10.20.0.0/16", "DIRECT", "tcp", 5432),
        ("10.9.9.9/32", "DIRECT", "tcp", 5432),
        ("2001:db8:9::/48", "DIRECT", "tcp", 5432),
        ("ollama", "RELAY", "tcp", 11434),
        ("pay.example.com", "INSPECT", "tcp", 443),
        ("pay.example.com", "FORWARD", "tcp", 80),
        ("(resolver)", "RESOLVE", "tcp", 53),
        ("(resolver)", "RESOLVE", "udp", 53),
    }


def test_names_and_services_have_both_families_and_networks_their_own() -> None:
    families: dict[str, set[bool]] = {}
    for element in wanted(*EXAMPLE).elements:
        families.setdefault(element.comment, set()).add(":" in element.address)
    assert {name for name, both in families.items() if len(both) == 2} == {
        "api.example.com", "pay.example.com", "ollama", "(resolver)"}  # fmt: skip


def test_a_wildcard_has_none_until_a_name_is_asked_for() -> None:
    assert {e.comment for e in wanted(host("*.x.test"), host("**.y.test")).elements} == {"(resolver)"}


def test_two_spellings_of_one_policy_want_the_same() -> None:
    assert wanted(*EXAMPLE) == wanted(*EXAMPLE[::-1])
    assert wanted(host("a.test"), host("a.test")) == wanted(host("a.test"))


def test_guard_and_limit_come_along() -> None:
    found = wanted(guard=Guard.OBSERVE, connections=7)
    assert (found.guard, found.connections) == ("observe", 7)


def test_a_rule_to_be_verified_by_sni_is_not_forwarded_unread() -> None:
    rule = dataclasses.replace(host("a.test", tcp(443)), inspected=((tcp(443)[0], Verify.SNI),))
    assert ("a.test", "INSPECT", "tcp", 443) in keys(wanted(rule))
    for guard in (Guard.OBSERVE, Guard.OFF):  # which restrict nothing, and so read nothing
        assert ("a.test", "FORWARD", "tcp", 443) in keys(wanted(rule, guard=guard))


def test_overlapping_networks_on_one_port_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/8 and 10\.2\.0\.0/16 overlap on 5432/tcp"):
        wanted(network("10.0.0.0/8"), network("10.2.0.0/16"))
    assert wanted(network("10.0.0.0/8"), network("10.2.0.0/16", tcp(80)))


def test_long_names_stay_apart_in_120_bytes() -> None:
    one, two = ("a" * 63 + "." + x * 60 + ".example.com" for x in "bc")
    assert comment("short.test") == "short.test"
    assert len({comment(one), comment(two)}) == 2
    assert len(comment(one)) == 120
    assert comment(one).endswith(".example.com")


@pytest.mark.parametrize("text", ["", 'a"b', "a\\b", "a\nb", "a{b", "a;b", "ä.test", "a\0b"])
def test_what_no_name_has_is_no_comment(text: str) -> None:
    with pytest.raises(ValueError):
        comment(text)


def test_elements_know_the_kind() -> None:
    assert {Mark.of(e.mark).kind for e in wanted(*EXAMPLE).elements} == {
        Kind.FORWARD, Kind.DIRECT, Kind.RELAY, Kind.INSPECT, Kind.RESOLVE}  # fmt: skip
