"""Decisions: what is listed is allowed, and nothing else is, in words a person can act on."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import allowing, policy

from egressd.model.names import covering, matches
from egressd.model.verdicts import Reason, Verdict
from egressd.policy.compiled import Budgets, Guard, Limits, Policy, Port, Protocol
from egressd.policy.decide import Decision, decide_address, decide_flow, decide_name, rule_for, written_among

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


# ---- wildcards: a name has one rule, its own, else that of the most specific wildcard around it

LAYERS = policy(
    allowing(
        '{host: "**.example.com", ports: [443]}',  # line 4
        '{host: "*.example.com", ports: [8080]}',
        '{host: "*.b.example.com", ports: [80]}',
        '{host: "**.c.b.example.com", ports: [90]}',
        "{host: a.b.example.com, ports: [22]}",
        "{host: example.com, ports: [25]}",
    )
)
GOVERNED = [
    # name, the rule's line, the one port that it allows
    ("x.y.example.com", 4, 443),  # by ** of example.com, two labels below
    ("w.x.y.example.com", 4, 443),
    ("x.example.com", 5, 8080),  # *. before **. of the same domain
    ("b.example.com", 5, 8080),
    ("x.b.example.com", 6, 80),  # a longer domain before a shorter one
    ("c.b.example.com", 6, 80),
    ("x.a.b.example.com", 4, 443),  # *.b.example.com covers one label only
    ("x.c.b.example.com", 7, 90),
    ("y.x.c.b.example.com", 7, 90),
    ("a.b.example.com", 8, 22),  # its own
    ("A.B.Example.com.", 8, 22),
    ("example.com", 9, 25),
]
PORTS = (22, 25, 80, 90, 443, 8080)


@pytest.mark.parametrize(("name", "line", "port"), GOVERNED)
def test_a_name_has_one_rule(name: str, line: int, port: int) -> None:
    rule = rule_for(LAYERS, name.lower().removesuffix("."))
    assert rule is not None and rule.line == line
    assert decide_name(LAYERS, name).rule == rule
    for asked in PORTS:
        decision = decide_flow(LAYERS, name, port=asked, protocol=Protocol.TCP)
        assert decision.reason is (Reason.ALLOWED if asked == port else Reason.PORT)
        assert decision.rule == rule, "the ports of other rules around it do not count"


UNCOVERED = ["com", "xexample.com", "example.com.evil.example", "example.org", "x.example.com.evil", "ollama"]


@pytest.mark.parametrize("name", [*UNCOVERED, "", "*.example.com", "**.example.com", "a..example.com",
                                  "_x.example.com", "x.example.com\0", "x y.example.com"])  # fmt: skip
def test_what_no_wildcard_covers(name: str) -> None:
    decision = decide_name(LAYERS, name)
    assert (decision.verdict, decision.reason, decision.rule) == (Verdict.DENIED, Reason.NAME, None)
    if name in UNCOVERED:
        assert rule_for(LAYERS, name) is None


def test_a_wildcard_alone_does_not_cover_its_domain() -> None:
    for stars in ("*", "**"):
        made = policy(allowing(f'host: "{stars}.example.com"'))
        assert rule_for(made, "example.com") is None
        assert not decide_name(made, "example.com").allowed
        assert decide_name(made, "a.example.com").allowed
        assert decide_name(made, "b.a.example.com").allowed is (stars == "**")


def test_a_wildcard_is_not_a_name_that_could_be_asked_for() -> None:
    made = policy(allowing('host: "*.example.com"'))
    assert not decide_flow(made, "*.example.com", port=443, protocol=Protocol.TCP).allowed


def test_a_service_stays_a_service_beside_wildcards() -> None:
    made = policy(allowing('host: "**.example.com"', "local: ollama"))
    decision = decide_flow(made, "ollama", port=11434, protocol=Protocol.TCP)
    assert decision.allowed and decision.rule == made.locals[0]


def test_the_text_names_the_wildcard_and_what_is_read() -> None:
    made = policy(allowing('{host: "*.example.com", ports: [443, 80]}'))
    read = decide_flow(made, "a.example.com", port=443, protocol=Protocol.TCP)
    unread = decide_flow(made, "a.example.com", port=80, protocol=Protocol.TCP)
    assert read.text == (
        "a.example.com is allowed on 443/tcp as *.example.com, if its TLS asks for that name (line 4)"
    )
    assert unread.text == "a.example.com is allowed on 80/tcp as *.example.com (line 4)"


LABELS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4)
NAMES_OF_LABELS = LABELS.map(lambda labels: ".".join([*labels, "example", "com"]))
WRITTEN = st.tuples(st.sampled_from(["", "*.", "**."]), NAMES_OF_LABELS).map("".join)


@settings(max_examples=200)
@given(st.sets(WRITTEN, max_size=8), NAMES_OF_LABELS)
def test_the_one_rule_against_a_plainer_statement_of_it(written: set[str], name: str) -> None:
    """Of all rules that match: the exact one; else most labels; else one asterisk before two."""
    made = policy(allowing(*(f"host: '{host}'" for host in sorted(written))))
    matching = [rule for rule in made.hosts if matches(rule.host, name)]
    best = max(
        matching, key=lambda r: (not r.wildcard, r.host.count("."), not r.host.startswith("**")), default=None
    )
    assert rule_for(made, name) == best
    assert written_among({rule.host: rule for rule in made.hosts}, name) == best
    assert {rule.host for rule in matching} == set(covering(name)) & written
    assert decide_name(made, name).rule == best
    for port in (Port(443, Protocol.TCP), Port(80, Protocol.TCP)):
        decision = decide_flow(made, name, port=port.number, protocol=port.protocol)
        assert decision.allowed is (best is not None and port in best.ports)


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
    made = Policy("acme", guard, (), (), (), Limits(), Budgets(), "sha256:0")
    decision = decide_address(made, address)  # type: ignore[arg-type]
    assert decision.allowed is (decision.reason is Reason.UNRESTRICTED)
    if guard is Guard.ENFORCE:
        assert not decision.allowed
