"""Decisions: what is listed is allowed, and nothing else is, in words a person can act on."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import allowing, policy

from egressd.model.verdicts import Reason, Verdict
from egressd.policy import values
from egressd.policy.compiled import Guard, Limits, Policy, Protocol
from egressd.policy.decide import Decision, decide_address, decide_flow, decide_name

RULES = (
    "host: api.example.com",  # line 4
    "{host: db.internal.example, ports: [5432, 53/udp], private: true}",
    "local: ollama",
    "{cidr: 10.20.0.0/16, ports: [5432]}",
    '{cidr: "fd12:3456::/32", ports: [443, 443/udp]}',
)
POLICY = policy(allowing(*RULES))
OFF = policy(allowing(*RULES, guard="off"))
OBSERVE = policy(allowing(*RULES, guard="observe"))
NOTHING = policy(allowing())


def test_a_decision_nobody_made_denies() -> None:
    decision = Decision()
    assert (decision.verdict, decision.reason, decision.allowed) == (Verdict.DENIED, Reason.UNKNOWN, False)
    assert decision.verdict == 0
    assert not decision.verdict


NAMES = [
    ("api.example.com", Reason.ALLOWED, 4),
    ("API.Example.com.", Reason.ALLOWED, 4),
    ("db.internal.example", Reason.ALLOWED, 5),
    ("ollama", Reason.ALLOWED, 6),
    ("example.com", Reason.NAME, None),
    ("a.api.example.com", Reason.NAME, None),
    ("api.example.com.evil.example", Reason.NAME, None),
    ("xapi.example.com", Reason.NAME, None),
    ("api.example.com\0.evil.example", Reason.NAME, None),
    ("localhost", Reason.NAME, None),
    ("metadata.google.internal", Reason.NAME, None),
    ("10.20.0.1", Reason.NAME, None),
    ("", Reason.NAME, None),
    ("*", Reason.NAME, None),
    ("b\u00fccher.example", Reason.NAME, None),
]


@pytest.mark.parametrize(("name", "reason", "line"), NAMES)
def test_names(name: str, reason: Reason, line: int | None) -> None:
    decision = decide_name(POLICY, name)
    assert decision.reason is reason
    assert decision.allowed is (reason is Reason.ALLOWED)
    assert (decision.rule.line if decision.rule else None) == line
    assert decision.text and decision.text.isprintable()
    assert decision.enforced is None


FLOWS = [
    # destination, port, protocol, reason, line of the rule or of the one that nearly allowed it
    ("api.example.com", 443, "tcp", Reason.ALLOWED, 4),
    ("api.example.com", 443, "udp", Reason.PORT, 4),
    ("api.example.com", 80, "tcp", Reason.PORT, 4),
    ("db.internal.example", 5432, "tcp", Reason.ALLOWED, 5),
    ("db.internal.example", 53, "udp", Reason.ALLOWED, 5),
    ("db.internal.example", 53, "tcp", Reason.PORT, 5),
    ("db.internal.example", 443, "tcp", Reason.PORT, 5),
    ("ollama", 11434, "tcp", Reason.ALLOWED, 6),
    ("ollama", 22, "tcp", Reason.PORT, 6),
    ("other.example", 443, "tcp", Reason.NAME, None),
    ("10.20.1.2", 5432, "tcp", Reason.ALLOWED, 7),
    ("10.20.1.2", 5432, "udp", Reason.PORT, 7),
    ("10.20.1.2", 443, "tcp", Reason.PORT, 7),
    ("10.21.0.0", 5432, "tcp", Reason.UNLISTED, None),
    ("10.19.255.255", 5432, "tcp", Reason.UNLISTED, None),
    ("fd12:3456::1", 443, "tcp", Reason.ALLOWED, 8),
    ("fd12:3456::1", 443, "udp", Reason.ALLOWED, 8),
    ("fd12:3457::1", 443, "tcp", Reason.UNLISTED, None),
    ("8.8.8.8", 53, "udp", Reason.UNLISTED, None),
    ("2001:4860:4860::8888", 53, "udp", Reason.UNLISTED, None),
    ("::ffff:10.20.1.2", 5432, "tcp", Reason.ADDRESS, None),
    ("127.0.0.1", 11434, "tcp", Reason.ADDRESS, None),
    ("::1", 11434, "tcp", Reason.ADDRESS, None),
    ("169.254.169.254", 80, "tcp", Reason.ADDRESS, None),
    ("fd00:ec2::254", 80, "tcp", Reason.ADDRESS, None),
    ("224.0.0.1", 5353, "udp", Reason.ADDRESS, None),
    ("api.example.com", 0, "tcp", Reason.PORT, None),
    ("api.example.com", 65536, "tcp", Reason.PORT, None),
    ("api.example.com", -1, "tcp", Reason.PORT, None),
]


@pytest.mark.parametrize(("destination", "port", "protocol", "reason", "line"), FLOWS)
def test_flows(destination: str, port: int, protocol: str, reason: Reason, line: int | None) -> None:
    decision = decide_flow(POLICY, destination, port=port, protocol=Protocol(protocol))
    assert decision.reason is reason
    assert decision.allowed is (reason is Reason.ALLOWED)
    assert (decision.rule.line if decision.rule else None) == line
    try:
        address = ip_address(destination)
    except ValueError:
        return
    assert decide_flow(POLICY, address, port=port, protocol=Protocol(protocol)) == decision


ADDRESSES = [
    ("10.20.0.1", Reason.ALLOWED),
    ("fd12:3456::1", Reason.ALLOWED),
    ("10.21.0.1", Reason.UNLISTED),
    ("8.8.8.8", Reason.UNLISTED),
    ("169.254.169.254", Reason.ADDRESS),
]


@pytest.mark.parametrize(("text", "reason"), ADDRESSES)
def test_addresses(text: str, reason: Reason) -> None:
    assert decide_address(POLICY, ip_address(text)).reason is reason


def test_egressds_own_pools_are_never_reachable() -> None:
    made = policy(allowing("{cidr: 'fd53::/16', ports: [443]}"))
    own = (ip_network("fd53:e9::/64"),)
    for guard in (made, policy(allowing("{cidr: 'fd53::/16', ports: [443]}", guard="off"))):
        inside = decide_flow(guard, "fd53:e9::1", port=443, protocol=Protocol.TCP, own=own)
        beside = decide_flow(guard, "fd53:ea::1", port=443, protocol=Protocol.TCP, own=own)
        assert (inside.reason, inside.allowed, beside.allowed) == (Reason.ADDRESS, False, True)


# ---- a guard that does not enforce


@pytest.mark.parametrize("loose", [OFF, OBSERVE], ids=["off", "observe"])
@pytest.mark.parametrize(("destination", "port", "protocol", "reason", "line"), FLOWS)
def test_without_enforcement_the_lists_own_word_is_kept(
    loose: Policy, destination: str, port: int, protocol: str, reason: Reason, line: int | None
) -> None:
    decision = decide_flow(loose, destination, port=port, protocol=Protocol(protocol))
    strict = decide_flow(POLICY, destination, port=port, protocol=Protocol(protocol))
    if decision.reason is Reason.UNRESTRICTED:
        assert decision.allowed
        assert decision.enforced == strict
        assert str(loose.guard) in decision.text
    else:
        assert decision == strict and not decision.allowed


NEVER = ["127.0.0.1", "::1", "224.0.0.1", "ff02::1", "0.0.0.0", "::", "255.255.255.255", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("loose", [OFF, OBSERVE], ids=["off", "observe"])
@pytest.mark.parametrize("text", NEVER)
def test_what_no_guard_forwards(loose: Policy, text: str) -> None:
    decision = decide_flow(loose, text, port=80, protocol=Protocol.TCP)
    assert (decision.verdict, decision.reason) == (Verdict.DENIED, Reason.ADDRESS)
    assert not decide_address(loose, ip_address(text)).allowed


def test_names_without_enforcement() -> None:
    for name in ("other.example", "r3---sn-x.example", "_dmarc.example", "api.example.com"):
        decision = decide_name(OFF, name)
        assert (decision.verdict, decision.reason) == (Verdict.ALLOWED, Reason.UNRESTRICTED)
        assert decision.enforced == decide_name(POLICY, name)
    for name in ("", "a..b", "a b", "a\0b", "x" * 64, "b\u00fccher.example", ".".join(["a" * 60] * 5)):
        assert not decide_name(OFF, name).allowed, "no DNS question can carry it"


# ---- wildcards


def test_wildcards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "WILDCARDS_AVAILABLE", True)
    made = policy(
        allowing(
            '{host: "**.example.com", ports: [443]}',  # line 4
            '{host: "*.b.example.com", ports: [80]}',
            "{host: a.b.example.com, ports: [22]}",
        )
    )
    cases = [
        ("a.b.example.com", 22, 6),
        ("a.b.example.com", 80, 5),
        ("a.b.example.com", 443, 4),
        ("x.b.example.com", 80, 5),
        ("x.y.b.example.com", 443, 4),
    ]
    for name, port, line in cases:
        decision = decide_flow(made, name, port=port, protocol=Protocol.TCP)
        assert decision.allowed and decision.rule is not None and decision.rule.line == line
    for name, port in (("example.com", 443), ("x.y.b.example.com", 80), ("a.c.example.com", 22)):
        assert not decide_flow(made, name, port=port, protocol=Protocol.TCP).allowed


# ---- the law: denied unless listed


@settings(max_examples=200)
@given(
    st.one_of(st.text(max_size=40), st.ip_addresses().map(str), st.sampled_from([flow[0] for flow in FLOWS])),
    st.integers(-10, 70_000),
    st.sampled_from(Protocol),
)
def test_denied_unless_listed(destination: str, port: int, protocol: Protocol) -> None:
    decision = decide_flow(POLICY, destination, port=port, protocol=protocol)
    assert decision.allowed is (decision.reason is Reason.ALLOWED)
    if decision.allowed:
        assert decision.rule in POLICY.rules
        assert any((p.number, p.protocol) == (port, protocol) for p in decision.rule.ports)
    assert not decide_flow(NOTHING, destination, port=port, protocol=protocol).allowed
    assert not decide_name(NOTHING, destination).allowed


@settings(max_examples=100)
@given(st.ip_addresses(), st.sampled_from(Guard))
def test_no_policy_at_all_allows_no_address(address: object, guard: Guard) -> None:
    made = Policy("acme", guard, (), (), (), Limits(), "sha256:0")
    decision = decide_address(made, address)  # type: ignore[arg-type]
    assert decision.allowed is (decision.reason is Reason.UNRESTRICTED)
    if guard is Guard.ENFORCE:
        assert not decision.allowed
