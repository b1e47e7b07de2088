"""Policy documents: what is accepted as what, and every way of getting it wrong."""

from __future__ import annotations

import time
from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import PUBLIC, allowing, policy, problems

from egressd.model.errors import PolicyError
from egressd.policy.compile import MAX_RULES
from egressd.policy.compiled import (
    Budget,
    Budgets,
    CidrRule,
    Ech,
    Guard,
    HostRule,
    Limits,
    LocalRule,
    Member,
    MemberKind,
    Policy,
    Port,
    Protocol,
    Verify,
)
from egressd.policy.document import KNOWN_SERVICES, MAX_MEMBERS, MAX_PORTS, MAX_PROBLEMS, load
from egressd.ruleset import layout

TCP, UDP = Protocol.TCP, Protocol.UDP


def sni(*numbers: int) -> tuple[tuple[Port, Verify], ...]:
    return tuple((Port(number, TCP), Verify.SNI) for number in numbers)


FULL = """\
# the whole grammar in one file
workspace: acme
guard: enforce
members: [user:infer, group:research, user:4001]
residency: {jurisdictions: [EEA, CH]}
allow:
  - host: EU.api.openai.com.
  - host: db.internal.example
    ports: [5432/tcp, 53/udp, 8443]
    verify: address
    private: true
  - host: "**.search.example.com"
    ports: [443, 8443/tls, 80]
    ech: allow
  - local: ollama
  - local: vllm
    ports: [8000]
  - cidr: 10.20.0.0/16
    ports: [5432/tcp]
    vouch: our own machines, in Bonn
  - cidr: 2001:db8:1::/48
    ports: [443]
    vouch: our own machines, in Bonn
limits: {wall: 120s, memory: 4GiB, processes: 128, egress_bytes: 50MiB, connections: 200, idle: 10m}
wildcards:
  sandbox: {names: 16, bytes: 1KiB, rate: 2}
  workspace: {names: 512, bytes: 64KiB, rate: 10}
"""


def test_the_whole_grammar() -> None:
    made = policy(FULL)
    assert made.workspace == "acme"
    assert made.guard is Guard.ENFORCE
    assert made.members == (
        Member(MemberKind.GROUP, "research"),
        Member(MemberKind.USER, "4001"),
        Member(MemberKind.USER, "infer"),
    )
    assert made.residency == ("CH", "EEA")
    assert made.rules == (
        HostRule("eu.api.openai.com", (Port(443, TCP),), sni(443), private=False, line=7),
        HostRule("db.internal.example", (Port(53, UDP), Port(5432, TCP), Port(8443, TCP)), (), True, 8),
        HostRule(
            "**.search.example.com",
            (Port(80, TCP), Port(443, TCP), Port(8443, TCP)),
            sni(443, 8443),
            private=False,
            line=12,
            ech=Ech.ALLOW,
        ),
        LocalRule("ollama", (Port(11434, TCP),), 15),
        LocalRule("vllm", (Port(8000, TCP),), 16),
        CidrRule(ip_network("10.20.0.0/16"), (Port(5432, TCP),), 18, "our own machines, in Bonn"),
        CidrRule(ip_network("2001:db8:1::/48"), (Port(443, TCP),), 21, "our own machines, in Bonn"),
    )
    assert (made.barred, made.providers, made.routes, made.local_only) == ((), (), (), False)
    assert made.limits == Limits(120.0, 4 << 30, 128, 50 << 20, 200, 600.0)
    assert made.wildcards == Budgets(Budget(16, 1 << 10, 2.0), Budget(512, 64 << 10, 10.0))
    assert made.digest.startswith("sha256:") and len(made.digest) == 71


def test_the_smallest_policy_is_unrestricted_and_open_to_nobody() -> None:
    made = policy("workspace: acme")
    assert made == Policy("acme", Guard.OFF, (), (), (), Limits(), Budgets(), made.digest)


@pytest.mark.parametrize("guard", list(Guard))
def test_off_is_a_word_and_not_a_truth_value(guard: Guard) -> None:
    assert policy(f"workspace: acme\nguard: {guard}\n").guard is guard


def test_norway_is_a_country() -> None:
    assert policy("workspace: acme\nresidency: {jurisdictions: [NO, UK]}\n").residency == ("NO", "UK")


def test_no_rules_is_a_policy() -> None:
    assert policy("workspace: acme\nguard: enforce\nallow: []\n").rules == ()


def test_a_host_in_two_rules_is_one_rule() -> None:
    made = policy(allowing("host: a.example", "host: b.example", "{host: A.example., ports: [80, 53/udp]}"))
    assert [(rule.key, rule.ports, rule.line) for rule in made.rules] == [
        ("a.example", (Port(53, UDP), Port(80, TCP), Port(443, TCP)), 4),
        ("b.example", (Port(443, TCP),), 5),
    ]


def test_the_same_port_number_over_both_protocols() -> None:
    (rule,) = policy(allowing("{host: a.example, ports: [443/tcp, 443/udp], verify: address}")).rules
    assert rule.ports == (Port(443, TCP), Port(443, UDP))


def test_networks_may_overlap_on_different_ports_and_families() -> None:
    made = policy(
        allowing(
            "{cidr: 10.0.0.0/8, ports: [80]}",
            "{cidr: 10.1.0.0/16, ports: [443, 80/udp]}",
            "{cidr: 10.2.0.0/16, ports: [443]}",
            '{cidr: "2a00::/16", ports: [80]}',
        )
    )
    assert len(made.cidrs) == 4


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("wall: 2m", Limits(wall=120)),
        ("wall: 1h", Limits(wall=3600)),
        ("wall: 1s", Limits(wall=1)),
        ("memory: 512MiB", Limits(memory=512 << 20)),
        ("egress_bytes: 1B", Limits(egress_bytes=1)),
        ("egress_bytes: 64KiB", Limits(egress_bytes=65536)),
        ("egress_bytes: 2TiB", Limits(egress_bytes=2 << 40)),
        ("connections: 1", Limits(connections=1)),
        ("idle: 1s", Limits(idle=1)),
        ("idle: 24h", Limits(idle=86400)),
        ("processes: 4194304", Limits(processes=4194304)),
    ],
)
def test_limits(text: str, limits: Limits) -> None:
    assert policy(f"workspace: acme\nlimits: {{{text}}}\n").limits == limits


def test_constants_agree_with_the_kernel_picture() -> None:
    reserved = {layout.RESOLVER_BLOCK, layout.UNLISTED_BLOCK}
    assert layout.BLOCKS - len(reserved) == MAX_RULES
    assert KNOWN_SERVICES["ollama"] == Port(11434, TCP)


# ---- the digest


def test_the_digest_is_of_the_meaning() -> None:
    same = """\
limits: {connections: 200, egress_bytes: 51200KiB, idle: 600s, processes: 128, memory: 4096MiB, wall: 2m}
wildcards: {workspace: {rate: 10, names: 512, bytes: 65536B}, sandbox: {names: 16, rate: 2, bytes: 1024B}}
allow:
  - {cidr: 2001:db8:1::/48, ports: [443/tcp], vouch: "our own machines, in Bonn"}
  - {cidr: 10.20.0.0/16, ports: [5432], vouch: "our own machines, in Bonn "}
  - {local: vllm, ports: [8000/tcp]}
  - {local: ollama, ports: [11434]}
  - {host: "**.Search.example.com", ports: [8443], verify: sni, ech: allow}
  - {host: db.internal.example, ports: [8443, 5432], private: true}
  - {host: "**.search.example.com", ports: [80]}
  - {host: "**.search.example.com", ech: allow}
  - {host: db.internal.example, ports: [53/udp], private: true}
  - host: eu.api.openai.com
residency: {jurisdictions: [CH, EEA]}
members: ["user:4001", "group:research", "user:infer"]
guard: "enforce"
workspace: acme
"""
    assert policy(same).digest == policy(FULL).digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("enforce", "observe"),
        ("group:research", "group:other"),
        ("[EEA, CH]", "[EEA]"),
        ("eu.api.openai.com", "us.api.openai.com"),
        ("53/udp", "53/tcp"),
        ("private: true", "private: false"),
        ("10.20.0.0/16", "10.20.0.0/17"),
        ("[8000]", "[8001]"),
        ("50MiB", "51MiB"),
        (", connections: 200", ""),
        (", idle: 10m", ""),
        ("verify: address", "verify: sni"),
        ("8443/tls", "8443/tcp"),
        ("ech: allow", "ech: refuse"),
        ("names: 16", "names: 17"),
        ("rate: 10", "rate: 11"),
        ("EU.api.openai.com.", "eu.api.openai.org"),
    ],
)
def test_any_change_of_meaning_changes_the_digest(old: str, new: str) -> None:
    text = FULL.replace("EU.api.openai.com.", "eu.api.openai.com") if "eu.api" in old else FULL
    assert old in text
    if new == "verify: sni":
        text = text.replace("53/udp, ", "")
    assert policy(text.replace(old, new)).digest != policy(text).digest


def test_the_workspace_is_part_of_the_digest() -> None:
    assert policy(FULL.replace("acme", "beta"), name="beta").digest != policy(FULL).digest


# ---- refusals: the document, the line, what is said, and the remedy

HEAD = "workspace: acme\n"
LONG = ".".join(["a" * 63, "a" * 62, "a" * 62, "a" * 62])  # 252 characters: a name, but none fits below it
REFUSED = [
    # the whole document
    ("", 0, "the document is empty", "begin with workspace"),
    ("- a\n", 1, "the document is a list", "begin with workspace"),
    ("just text", 1, "the document is text", "begin with workspace"),
    ("guard: off\n", 1, "workspace is missing", "add workspace: NAME"),
    ("workspace: beta\n", 1, "is beta but the file is named for 'acme'", "agree"),
    ("workspace: Acme\n", 1, "'Acme' is not a workspace name", "lower-case"),
    ("workspace: a_b\n", 1, "not a workspace name", "lower-case"),
    ("workspace: ../acme\n", 1, "not a workspace name", "lower-case"),
    ("workspace: acme-\n", 1, "not a workspace name", "lower-case"),
    ("workspace: 1\n", 1, "this is a number", "as text"),
    ("workspace:\n", 1, "this is empty", "as text"),
    (HEAD + "workspace: acme\n", 2, "stands here again, first on line 1", "remove"),
    (HEAD + "gaurd: enforce\n", 2, "'gaurd' is not a key of this section", "did you mean guard?"),
    (HEAD + "deny: []\n", 2, "'deny' is not a key", "the keys here are workspace, guard"),
    (HEAD + '"a\\0b": 1\n', 2, r"'a\x00b' is not a key", "the keys here are"),
    (HEAD + "guard: Off\n", 2, "'Off' is not a guard", "off, observe, enforce"),
    (HEAD + "guard: true\n", 2, "this is a truth value", "off, observe, enforce"),
    (HEAD + "guard:\n", 2, "this is empty", "off, observe, enforce"),
    # members
    (HEAD + "members:\n", 2, "this is empty", "remove the line"),
    (HEAD + "members: user:a\n", 2, "this is text", "a list"),
    (HEAD + "members:\n  - user: infer\n", 3, "this is a mapping", "no space after the colon"),
    (HEAD + "members: [infer]\n", 2, "'infer' is not a member", "user:NAME"),
    (HEAD + "members: [users:infer]\n", 2, "is not a member", "user:NAME"),
    (HEAD + "members: ['user:']\n", 2, "does not name an account", "user:NAME"),
    (HEAD + "members: ['user:a b']\n", 2, "does not name an account", "user:NAME"),
    (HEAD + "members: ['user:-1']\n", 2, "does not name an account", "user:NAME"),
    (HEAD + "members: ['user:4294967295']\n", 2, "does not name an account", "user:NAME"),
    (HEAD + "members: ['user:007']\n", 2, "does not name an account", "user:NAME"),
    (HEAD + "members: ['user:*']\n", 2, "does not name an account", "user:NAME"),
    (HEAD + "members: [4001]\n", 2, "this is a number", "user:NAME"),
    (HEAD + "members: ['user:a', 'user:a']\n", 2, "user:a is a member twice", "remove"),
    # residency
    (HEAD + "residency: [EEA]\n", 2, "this is a list", "a mapping"),
    (HEAD + "residency:\n", 2, "this is empty", "remove the line"),
    (HEAD + "residency: {}\n", 2, "jurisdictions is missing", "add jurisdictions"),
    (HEAD + "residency: {jurisdictions: []}\n", 2, "the list is empty", "at least one"),
    (HEAD + "residency: {jurisdictions: EEA}\n", 2, "this is text", "a list"),
    (HEAD + "residency: {jurisdictions: [eea]}\n", 2, "not a jurisdiction", "did you mean EEA?"),
    (HEAD + "residency: {jurisdictions: [GB]}\n", 2, "not a jurisdiction", "did you mean UK?"),
    (HEAD + "residency: {jurisdictions: [XX]}\n", 2, "not a jurisdiction", "two letters"),
    (HEAD + "residency: {jurisdictions: [false]}\n", 2, "this is a truth value", "two letters"),
    (HEAD + "residency: {jurisdictions: [CH, CH]}\n", 2, "CH is listed twice", "remove"),
    (HEAD + "residency: {jurisdiction: [CH]}\n", 2, "not a key", "did you mean jurisdictions?"),
    # rules
    (HEAD + "allow:\n", 2, "this is empty", "allow: []"),
    (HEAD + "allow: {host: a.example}\n", 2, "this is a mapping", "a list of rules"),
    (HEAD + "allow: all\n", 2, "this is text", "a list of rules"),
    (allowing("a.example"), 4, "this is text", "host: api.example.com"),
    (HEAD + "allow:\n  -\n", 3, "this is empty", "remove the dash"),
    (allowing("{}"), 4, "and this is none", "write host: NAME"),
    (allowing("{ports: [443]}"), 4, "and this is none", "write host: NAME"),
    (allowing("{hots: a.example}"), 4, "and this is none", "did you mean host?"),
    (allowing("{host: a.example, cidr: 10.0.0.0/8}"), 4, "this is host and cidr", "two rules"),
    (allowing("{host: a.example, port: 443}"), 4, "'port' is not a key", "did you mean ports?"),
    (allowing("{host: a.example, host: b.example}"), 4, "stands here again", "remove"),
    (
        allowing("{provider: bedrock, region: eu-central-1}"),
        4,
        "there is no provider 'bedrock'",
        "define it under providers:",
    ),
    # hosts
    (allowing("{host: }"), 4, "this is empty", "a host name"),
    (allowing("host: 1"), 4, "this is a number", "a host name"),
    (allowing("host: [a.example]"), 4, "this is a list", "a host name"),
    (allowing('host: "*"'), 4, "covers every name", "name the hosts"),
    (allowing('host: "*.com"'), 4, "whole top-level domain", "more of the name"),
    (allowing('host: "**.co.uk"'), 4, "public suffix", "more of the name"),
    (allowing('host: "a.*.example.com"'), 4, "asterisk where none may stand", "first label"),
    (allowing('host: "*.github.io"'), 4, "public suffix", "more of the name"),
    (allowing('host: "*.localhost"'), 4, "top-level domain", "more of the name"),
    (allowing('host: "**.db.localhost"'), 4, "this machine itself", "local rule"),
    (allowing('host: "*example.com"'), 4, "asterisk where none may stand", "first label"),
    (allowing('host: "***.example.com"'), 4, "asterisk where none may stand", "first label"),
    (allowing('host: "*.*.example.com"'), 4, "asterisk where none may stand", "first label"),
    (allowing('host: "*.b\u00fccher.example"'), 4, "is not ASCII", "write xn--bcher-kva.example"),
    (allowing('host: "*.10.20.0.1"'), 4, "as an IPv4 address", "cidr"),
    (allowing(f'host: "*.{LONG}"'), 4, "leaves no room for a label", "at most 253"),
    (allowing('host: "*.a.example"', 'host: "*.A.EXAMPLE."'), 5, "twice, first on line 4", "remove"),
    (allowing('host: "a\\0.example"'), 4, "contains a NUL", "letters"),
    (allowing("host: a b.example"), 4, "contains a space", "letters"),
    (allowing('host: "a\'.example"'), 4, "contains a quote", "letters"),
    (allowing("host: 'a\".example'"), 4, "contains a quote", "letters"),
    (allowing("host: 'a{.example'"), 4, "contains a brace", "letters"),
    (allowing("host: 'a}.example'"), 4, "contains a brace", "letters"),
    (allowing(f"host: {'a' * 64}.example"), 4, "label of 64 characters", "at most 63"),
    (allowing("host: xn--zzzzzzzz.example"), 4, "stands for no word", "check"),
    (allowing("host: ab--c.example"), 4, "third place", "check"),
    (allowing("host: b\u00fccher.example"), 4, "is not ASCII", "write xn--bcher-kva.example"),
    (allowing("host: 10.0.0.1"), 4, "as an IPv4 address", "cidr"),
    (allowing("host: '2001:db8::1'"), 4, "IPv6 address", "cidr"),
    (allowing("host: localhost"), 4, "this machine itself", "local rule"),
    (allowing("host: db.localhost"), 4, "this machine itself", "local rule"),
    (allowing("host: intranet"), 4, "is a single label", "local rule"),
    (allowing("host: https://a.example/"), 4, "is a URL", "only the host name"),
    (allowing("host: a.example:443"), 4, "has a port in it", "ports: [443/tcp]"),
    (allowing("{host: a.example, verify: none}"), 4, "'none' is not a way to verify", "sni or address"),
    (allowing("{host: a.example, verify: false}"), 4, "this is a truth value", "sni or address"),
    (allowing("{host: a.example, verify: }"), 4, "this is empty", "sni or address"),
    (allowing("{host: a.example, verify: http-host}"), 4, "http-host is not available", "verify: address"),
    (allowing("{host: a.example, ports: [443/udp]}"), 4, "443/udp is QUIC", "verify: address"),
    (allowing("{host: a.example, ports: [443, 443/udp]}"), 4, "443/udp is QUIC", "fall back to TCP"),
    (allowing('{host: "*.a.example", ports: [443/udp]}'), 4, "443/udp is QUIC", "verify: address"),
    (
        allowing("{host: a.example, ports: [53/udp], verify: sni}"),
        4,
        "53/udp cannot be verified by sni",
        "a rule of its own",
    ),
    (
        allowing("{host: a.example, ports: [443/udp], verify: sni}"),
        4,
        "cannot be verified",
        "verify: address",
    ),
    (allowing("{host: a.example, ports: [8443/tls], verify: address}"), 4, "the contrary", "write 8443/tcp"),
    (allowing("{host: a.example, ports: [443/tls, 443]}"), 4, "allowed on 443/tcp twice", "remove"),
    (
        allowing("{host: a.example, ports: [80/tls]}", "{host: a.example, ports: [80], verify: address}"),
        5,
        "allowed on 80/tcp twice, first on line 4",
        "remove",
    ),
    (allowing("{host: a.example, ech: deny}"), 4, "'deny' is not a way to treat ECH", "refuse or allow"),
    (allowing("{host: a.example, ech: true}"), 4, "this is a truth value", "refuse or allow"),
    (allowing("{host: a.example, ech: allow, verify: address}"), 4, "ECH is not seen", "leave ech out"),
    (allowing("{host: a.example, ech: refuse, ports: [80]}"), 4, "ECH is not seen", "leave ech out"),
    (
        allowing("{host: a.example, ech: allow}", "{host: a.example, ports: [8443/tls]}"),
        5,
        "another value for ech on line 4",
        "one value",
    ),
    (allowing("{host: a.example, private: yes}"), 4, "this is text", "true or false"),
    (allowing("{host: a.example, private: 1}"), 4, "this is a number", "true or false"),
    (allowing("{host: a.example, private: }"), 4, "this is empty", "true or false"),
    # ports
    (allowing("{host: a.example, ports: 443}"), 4, "this is a number", "a list"),
    (allowing("{host: a.example, ports: }"), 4, "this is empty", "write []"),
    (allowing("{host: a.example, ports: []}"), 4, "the list is empty", "at least one port"),
    (allowing("{host: a.example, ports: [0]}"), 4, "'0' is not a port", "1 to 65535"),
    (allowing("{host: a.example, ports: [0/tcp]}"), 4, "'0/tcp' is not a port", "1 to 65535"),
    (allowing("{host: a.example, ports: [70000]}"), 4, "'70000' is not a port", "1 to 65535"),
    (allowing("{host: a.example, ports: [65536/udp]}"), 4, "is not a port", "1 to 65535"),
    (allowing("{host: a.example, ports: [-1]}"), 4, "'-1' is not a port", "443/tcp"),
    (allowing("{host: a.example, ports: [https]}"), 4, "'https' is not a port", "443/tcp"),
    (allowing("{host: a.example, ports: ['443 /tcp']}"), 4, "is not a port", "443/tcp"),
    (allowing("{host: a.example, ports: [0443]}"), 4, "'0443' is not a port", "443/tcp"),
    (allowing("{host: a.example, ports: [\u0661\u0662]}"), 4, "is not a port", "443/tcp"),
    (allowing("{host: a.example, ports: [true]}"), 4, "this is a truth value", "443/tcp"),
    (allowing("{host: a.example, ports: [8000-8010/tcp]}"), 4, "is not a port", "list each port"),
    (allowing("{host: a.example, ports: [443/sctp]}"), 4, "unknown protocol", "tcp, tls or udp"),
    (allowing("{host: a.example, ports: [443/TCP]}"), 4, "unknown protocol", "lower case"),
    (allowing("{host: a.example, ports: [443, 443/tcp]}"), 4, "allowed on 443/tcp twice", "remove"),
    (allowing("host: a.example", "host: a.example"), 5, "twice, first on line 4", "remove"),
    (allowing("host: a.example", "host: A.EXAMPLE."), 5, "twice, first on line 4", "remove"),
    ("workspace: acme\nallow: [{host: a.example}, {host: a.example}]", 2, "twice, first on line 2", "remove"),
    (
        allowing("host: a.example", "{host: a.example, ports: [80], private: true}"),
        5,
        "another value for private on line 4",
        "one value",
    ),
    (
        allowing(f"{{host: a.example, ports: [{', '.join(map(str, range(1, MAX_PORTS + 2)))}]}}"),
        4,
        "65 entries, 64 are the most",
        "list fewer",
    ),
    (allowing("{cidr: 10.0.0.0/8, ports: [443/x]}"), 4, "unknown protocol", "tcp or udp"),
    (allowing("{cidr: 10.0.0.0/8, ports: [443/tls]}"), 4, "443/tls is for host rules", "write 443/tcp"),
    (allowing("{local: vllm, ports: [8000/tls]}"), 4, "8000/tls is for host rules", "write 8000/tcp"),
    # networks
    (allowing("cidr: 10.0.0.0/8"), 4, "ports is missing", "add ports"),
    (allowing("{cidr: 10.0.0.0/8, ports: []}"), 4, "the list is empty", "at least one port"),
    (allowing("{cidr: 10.0.0.1/8, ports: [1]}"), 4, "bits set beyond its prefix", "write 10.0.0.0/8"),
    (allowing("{cidr: '2001:db8::1/64', ports: [1]}"), 4, "bits set beyond", "write 2001:db8::/64"),
    (allowing("{cidr: 10.0.0.1, ports: [1]}"), 4, "is not a network", "write 10.0.0.1/32"),
    (allowing("{cidr: '2001:db8::1', ports: [1]}"), 4, "is not a network", "write 2001:db8::1/128"),
    (allowing("{cidr: 10.0.0.0/33, ports: [1]}"), 4, "is not a network", "such as"),
    (allowing("{cidr: 10.0.0.0/255.0.0.0, ports: [1]}"), 4, "is not a network", "such as"),
    (allowing("{cidr: 010.0.0.0/8, ports: [1]}"), 4, "is not a network", "such as"),
    (allowing("{cidr: 'fe80::%eth0/64', ports: [1]}"), 4, "is not a network", "such as"),
    (allowing("{cidr: example.com, ports: [1]}"), 4, "is not a network", "such as"),
    (allowing("{cidr: 10, ports: [1]}"), 4, "this is a number", "a network such as"),
    (allowing("{cidr: 0.0.0.0/0, ports: [1]}"), 4, "every address there is", "guard: off"),
    (allowing("{cidr: '::/0', ports: [1]}"), 4, "every address there is", "guard: off"),
    (allowing("{cidr: 127.0.0.0/8, ports: [1]}"), 4, "loopback", "local rule"),
    (allowing("{cidr: 169.254.169.254/32, ports: [80]}"), 4, "metadata", "leave it out"),
    (allowing("{cidr: '::ffff:0:0/96', ports: [80]}"), 4, "ipv4-mapped", "leave it out"),
    (allowing("{cidr: '4000::/16', ports: [80]}"), 4, "not allocated", "check the address"),
    (allowing("{cidr: 10.0.0.0/8, ports: [1], private: true}"), 4, "'private' is not a key", "keys here"),
    (
        allowing("{cidr: 10.1.0.0/16, ports: [1]}", "{cidr: 10.0.0.0/8, ports: [2, 1]}"),
        4,
        "10.1.0.0/16 lies inside 10.0.0.0/8 (line 5), both on 1/tcp",
        "keep one",
    ),
    (
        allowing("{cidr: 10.0.0.1/32, ports: [1]}", "{cidr: 10.0.0.0/31, ports: [1]}"),
        4,
        "10.0.0.1/32 lies inside 10.0.0.0/31 (line 5)",
        "keep one",
    ),
    (
        allowing("{cidr: '2a00::/16', ports: [1]}", "{cidr: '2a00:1::/32', ports: [1]}"),
        5,
        "lies inside 2a00::/16 (line 4)",
        "keep one",
    ),
    (
        allowing("{cidr: 10.0.0.0/8, ports: [1]}", "{cidr: 10.0.0.0/8, ports: [1]}"),
        5,
        "10.0.0.0/8 is allowed on 1/tcp twice, first on line 4",
        "remove",
    ),
    # local services
    (allowing("local: vllm"), 4, "the service has no usual port", "add ports"),
    (allowing("local: localhost"), 4, "meaning of its own", "another word"),
    (allowing("local: Ollama.Example"), 4, "is not a single label", "one word"),
    (allowing("local: 127.0.0.1"), 4, "as an IPv4 address", "cidr"),
    (allowing("{local: ollama, ports: [11434/udp]}"), 4, "11434/udp is not TCP", "TCP only"),
    (allowing("{local: ollama, verify: address}"), 4, "'verify' is not a key", "keys here"),
    (
        allowing("local: ollama", "{local: other, ports: [11434]}"),
        5,
        "port 11434/tcp of the loopback is already ollama's (line 4)",
        "one service",
    ),
    (allowing("local: ollama", "local: OLLAMA"), 5, "twice, first on line 4", "remove"),
    # limits
    (HEAD + "limits: 5\n", 2, "this is a number", "a mapping"),
    (HEAD + "limits:\n", 2, "this is empty", "remove the line"),
    (HEAD + "limits: {time: 5s}\n", 2, "'time' is not a key", "did you mean|the keys here"),
    (HEAD + "limits: {wall: 120}\n", 2, "this is a number", "its unit"),
    (HEAD + "limits: {wall: 0s}\n", 2, "is not a duration", "its unit"),
    (HEAD + "limits: {wall: -1s}\n", 2, "is not a duration", "its unit"),
    (HEAD + "limits: {wall: 1.5h}\n", 2, "is not a duration", "its unit"),
    (HEAD + "limits: {wall: 5min}\n", 2, "is not a duration", "write 5m"),
    (HEAD + "limits: {wall: inf}\n", 2, "is not a duration", "its unit"),
    (HEAD + "limits: {wall: 9999999h}\n", 2, "is too long", "8784h is the most"),
    (HEAD + "limits: {memory: 4GB}\n", 2, "is not a size", "write 4GiB"),
    (HEAD + "limits: {memory: 4 GiB}\n", 2, "is not a size", "its unit"),
    (HEAD + "limits: {memory: 4096}\n", 2, "this is a number", "its unit"),
    (HEAD + "limits: {memory: 4B}\n", 2, "is too little", "1MiB is the least"),
    (HEAD + "limits: {egress_bytes: 50mb}\n", 2, "is not a size", "write 50MiB"),
    (HEAD + "limits: {egress_bytes: 0B}\n", 2, "is not a size", "its unit"),
    (HEAD + "limits: {egress_bytes: 99999999999TiB}\n", 2, "is too much", "4194304TiB is the most"),
    (HEAD + "limits: {processes: 0}\n", 2, "0 is out of range", "1 to 4194304"),
    (HEAD + "limits: {processes: many}\n", 2, "this is text", "a whole number"),
    (HEAD + "limits: {processes: true}\n", 2, "this is a truth value", "a whole number"),
    (HEAD + "limits: {connections: 1000001}\n", 2, "1000001 is out of range", "1 to 1000000"),
    (HEAD + "limits: {connections: -5}\n", 2, "-5 is out of range", "1 to 1000000"),
    (HEAD + "limits: {connections: }\n", 2, "this is empty", "a whole number"),
    (HEAD + "limits: {idle: 25h}\n", 2, "is too long", "24h is the most"),
    (HEAD + "limits: {idle: 600}\n", 2, "this is a number", "its unit"),
    # budgets of wildcards
    (HEAD + "wildcards:\n", 2, "this is empty", "remove the line"),
    (HEAD + "wildcards: [1]\n", 2, "this is a list", "a mapping"),
    (HEAD + "wildcards: {names: 5}\n", 2, "'names' is not a key", "sandbox, workspace"),
    (HEAD + "wildcards: {sandbox: }\n", 2, "this is empty", "remove the line"),
    (HEAD + "wildcards: {sandbox: {name: 5}}\n", 2, "'name' is not a key", "did you mean names?"),
    (HEAD + "wildcards: {sandbox: {names: 0}}\n", 2, "0 is out of range", "1 to 8192"),
    (HEAD + "wildcards: {sandbox: {names: true}}\n", 2, "this is a truth value", "a whole number"),
    (HEAD + "wildcards: {workspace: {names: 8193}}\n", 2, "8193 is out of range", "1 to 8192"),
    (HEAD + "wildcards: {workspace: {bytes: 100}}\n", 2, "this is a number", "its unit"),
    (HEAD + "wildcards: {workspace: {bytes: 2GiB}}\n", 2, "is too much", "1GiB is the most"),
    (HEAD + "wildcards: {workspace: {rate: 0}}\n", 2, "0 is out of range", "1 to 1000"),
    (HEAD + "wildcards: {sandbox: {rate: 5/s}}\n", 2, "this is text", "a whole number"),
    # YAML itself
    (HEAD + "allow: [\n", 3, "not YAML", "indentation"),
    (HEAD + "allow: *everything\n", 2, "aliases", "write the value out"),
    (HEAD + "guard: !!str off\n", 2, "tags", "remove the tag"),
    (HEAD + "---\nworkspace: beta\n", 2, "a second document", "one document"),
]


@pytest.mark.parametrize(("text", "line", "says", "remedy"), REFUSED, ids=range(len(REFUSED)))
def test_refused(text: str, line: int, says: str, remedy: str) -> None:
    found = problems(text)
    assert len(found) == 1, "one mistake, one problem"
    (problem,) = found
    assert (problem.source, problem.line) == ("acme.yaml", line)
    assert says in problem.text
    assert any(part in problem.remedy for part in remedy.split("|"))
    assert str(problem).isprintable() and str(problem).isascii()


def test_every_problem_at_once_each_at_its_line() -> None:
    found = problems(
        """\
workspace: beta
gaurd: enforce
members: [infer, 'user:ok']
residency: {jurisdictions: [XX]}
allow:
  - host: "*.com"
  - host: a b
    ports: [0, 443, 70000]
    private: maybe
  - host: a.example
  - &anchor host: *alias
  - cidr: 0.0.0.0/0
  - local: other
  - hots: b.example
  - provider: bedrock
  - host: a.example
limits: {wall: 5, memory: 4GB}
limits: {}
"""
    )
    assert [(problem.line, problem.where) for problem in found] == [
        (1, "workspace"),
        (2, "gaurd"),
        (3, "members[0]"),
        (4, "residency.jurisdictions[0]"),
        (6, "allow[0].host"),
        (7, "allow[1].host"),
        (8, "allow[1].ports[0]"),
        (8, "allow[1].ports[2]"),
        (9, "allow[1].private"),
        (11, "allow[3]"),
        (11, "allow[3].host"),
        (12, "allow[4]"),
        (12, "allow[4].cidr"),
        (13, "allow[5]"),
        (14, "allow[6].hots"),
        (15, "allow[7].provider"),
        (16, "allow[8]"),
        (17, "limits.memory"),
        (17, "limits.wall"),
        (18, "limits"),
    ]
    assert all(problem.remedy for problem in found)


def test_the_message_names_file_line_place_and_remedy() -> None:
    (problem,) = problems("workspace: acme\nguard: on\n")
    assert str(problem) == "acme.yaml:2: guard: 'on' is not a guard (write one of off, observe, enforce)"


def test_a_network_may_not_touch_egressds_own_pools() -> None:
    text = allowing("{cidr: 'fd53:e9::/64', ports: [1]}")
    assert problems(text) == ()
    (problem,) = problems(text, own=(ip_network("fd53:e9::/64"),))
    assert "egressd's own pool" in problem.text


def test_any_file_name_when_none_is_expected() -> None:
    assert policy("workspace: beta", name=None).workspace == "beta"


# ---- wildcards


def test_wildcards() -> None:
    made = policy(allowing('host: "*.Search.example.com"', 'host: "**.example.org."', "host: a.example.org"))
    assert [(rule.host, rule.wildcard) for rule in made.hosts] == [
        ("*.search.example.com", True),
        ("**.example.org", True),
        ("a.example.org", False),
    ]


def test_a_wildcard_of_one_label_and_one_of_any_depth_are_two_rules() -> None:
    made = policy(allowing('host: "*.a.example"', '{host: "**.a.example", private: true}', "host: a.example"))
    assert len({rule.key for rule in made.rules}) == 3


BUDGETS = [
    ("", Budgets()),
    ("wildcards: {}\n", Budgets()),
    ("wildcards: {sandbox: {}}\n", Budgets()),
    ("wildcards: {sandbox: {names: 8192}}\n", Budgets(sandbox=Budget(8192, 4 << 10, 5.0))),
    ("wildcards: {workspace: {rate: 1000}}\n", Budgets(workspace=Budget(1024, 256 << 10, 1000.0))),
    ("wildcards: {workspace: {bytes: 1B}}\n", Budgets(workspace=Budget(1024, 1, 20.0))),
]


@pytest.mark.parametrize(("text", "budgets"), BUDGETS, ids=range(len(BUDGETS)))
def test_budgets(text: str, budgets: Budgets) -> None:
    assert policy("workspace: acme\n" + text).wildcards == budgets


def test_writing_the_usual_budgets_out_changes_nothing() -> None:
    usual = "wildcards:\n  sandbox: {names: 64, bytes: 4KiB, rate: 5}\n"
    usual += "  workspace: {names: 1024, bytes: 256KiB, rate: 20}\n"
    assert policy("workspace: acme\n" + usual) == policy("workspace: acme\n")


def test_rules_and_names_of_wildcards_share_the_blocks() -> None:
    rest = MAX_RULES - 1024 - 1
    crowd = hosts(rest) + b"- host: '*.a.example'\n"
    assert len(policy(crowd).rules) == rest + 1
    (problem,) = problems(crowd + b"- host: one.more.example\n")
    assert "15359 rules and 1024 names of wildcards are more than 16382 together" in problem.text
    fewer = b"wildcards: {workspace: {names: 1023}}\n"
    assert len(policy(crowd + b"- host: one.more.example\n" + fewer).rules) == rest + 2


# ---- what is verified on which port

WHAT_IS_READ = [
    # ports, verify, the ports whose ClientHello is read
    (None, None, [443]),
    (None, "sni", [443]),
    (None, "address", []),
    ("[443, 80, 8443]", None, [443]),
    ("[443/tcp]", None, [443]),
    ("[443/tls, 8443/tls, 80]", None, [443, 8443]),
    ("[443, 80, 8443/tls]", "sni", [80, 443, 8443]),
    ("[80]", None, []),
    ("[80]", "sni", [80]),
    ("[5432, 53/udp, 853/tls]", None, [853]),
    ("[443, 443/udp, 80]", "address", []),
]


@pytest.mark.parametrize("host", ["a.example", "*.a.example", "**.a.example"])
@pytest.mark.parametrize(("ports", "verify", "read"), WHAT_IS_READ, ids=range(len(WHAT_IS_READ)))
def test_what_is_read(host: str, ports: str | None, verify: str | None, read: list[int]) -> None:
    keys = [f"host: '{host}'"]
    keys += [f"ports: {ports}"] * (ports is not None) + [f"verify: {verify}"] * (verify is not None)
    (rule,) = policy(allowing(f"{{{', '.join(keys)}}}")).hosts
    assert rule.inspected == sni(*read)
    for port in rule.ports:
        assert (rule.verify_on(port) is Verify.SNI) == (port.number in read and port.protocol is TCP)


def test_two_rules_for_a_host_each_verify_their_own_ports() -> None:
    made = policy(
        allowing(
            "{host: a.example, ports: [443/udp, 5432], verify: address}",
            "{host: A.example, ech: allow}",
            "{host: a.example., ports: [80, 8443], verify: sni, ech: allow}",
        )
    )
    (rule,) = made.hosts
    assert [str(port) for port in rule.ports] == ["80/tcp", "443/tcp", "443/udp", "5432/tcp", "8443/tcp"]
    assert rule.inspected == sni(80, 443, 8443)
    assert (rule.ech, rule.line) == (Ech.ALLOW, 4)


def test_the_order_of_a_hosts_rules_does_not_decide_what_is_verified() -> None:
    rules = ("{host: a.example, ports: [443/udp], verify: address}", "{host: a.example, ech: allow}")
    assert policy(allowing(*rules)).digest == policy(allowing(*rules[::-1])).digest
    assert policy(allowing(*rules[::-1])).hosts[0].inspected == sni(443)


def test_sni_is_what_https_gets_without_a_word() -> None:
    plain = policy(allowing("host: a.example"))
    assert plain.digest == policy(allowing("{host: a.example, verify: sni}")).digest
    assert plain.digest == policy(allowing("{host: a.example, ports: [443/tls]}")).digest
    assert plain.digest != policy(allowing("{host: a.example, verify: address}")).digest
    assert plain.digest == policy(allowing("{host: a.example, ech: refuse}")).digest


PORTS = st.lists(
    st.tuples(st.sampled_from([53, 80, 443, 8443]), st.sampled_from(["", "/tcp", "/udp", "/tls"])),
    min_size=1, max_size=4, unique_by=lambda port: (port[0], port[1] == "/udp"),
)  # fmt: skip
HOST_RULES = st.tuples(PORTS, st.sampled_from([None, "sni", "address"]), st.sampled_from([None, "allow"]))


@settings(max_examples=200)
@given(st.lists(HOST_RULES, min_size=1, max_size=3))
def test_nothing_is_read_less_than_was_written(
    written: list[tuple[list[tuple[int, str]], str | None, str | None]],
) -> None:
    """Whatever else stands in the file: TLS goes by address only where `verify: address` is written."""
    rules = []
    for ports, verify, ech in written:
        keys = [f"ports: [{', '.join(f'{number}{protocol}' for number, protocol in ports)}]"]
        keys += [f"verify: {verify}"] * (verify is not None) + [f"ech: {ech}"] * (ech is not None)
        rules.append(f"{{host: a.example, {', '.join(keys)}}}")
    text = allowing(*rules)
    if problems(text):
        return
    (rule,) = policy(text).hosts
    for ports, verify, _ in written:
        for number, protocol in ports:
            port = Port(number, UDP if protocol == "/udp" else TCP)
            tls = port == Port(443, TCP) or protocol == "/tls" or (verify == "sni" and port.protocol is TCP)
            expected = Verify.SNI if tls and verify != "address" else Verify.ADDRESS
            assert port in rule.ports and rule.verify_on(port) is expected
            assert port != Port(443, UDP) or verify == "address"
    assert (rule.ech is Ech.ALLOW) == any(ech for _, _, ech in written)


# ---- bounds


def hosts(count: int) -> bytes:
    return b"workspace: acme\nallow:\n" + b"".join(b"- host: h%d.example.com\n" % n for n in range(count))


def test_ten_thousand_hosts_load_quickly() -> None:
    data = hosts(10_000)
    began = time.process_time()
    made = policy(data)
    took = time.process_time() - began
    assert len(made.hosts) == 10_000
    assert took < 3.0, f"{took:.2f} s"


def test_as_many_rules_as_there_are_blocks() -> None:
    assert len(policy(hosts(MAX_RULES)).rules) == MAX_RULES
    (problem,) = problems(hosts(MAX_RULES + 1))
    assert "16383 entries, 16382 are the most" in problem.text


def test_many_networks_are_compared_quickly() -> None:
    rules = (f"- {{cidr: 10.{n >> 8}.{n & 255}.0/24, ports: [1]}}\n" for n in range(16_000))
    data = "workspace: acme\nallow:\n" + "".join(rules)
    began = time.process_time()
    assert len(policy(data).cidrs) == 16_000
    assert time.process_time() - began < 5.0


HOSTILE = [
    b"workspace: acme\nmembers: [" + b"a," * 500_000 + b"]",
    b"workspace: acme\nallow: [" + b"a," * 500_000 + b"]",
    b"workspace: acme\nallow:\n" + b"- {a: 1}\n" * 16_000,
    b"workspace: acme\nallow:\n" + b"- {host: a.example}\n" * 16_000,
    b"workspace: acme\nallow:\n- {" + b",".join(b"k%d: 1" % n for n in range(90_000)) + b"}\n",
    b"workspace: acme\nallow:\n- {host: a.example, ports: [" + b"a," * 500_000 + b"]}\n",
    b"{" + b",".join(b"k%d: 1" % n for n in range(90_000)) + b"}",
    b"{" + b"a: 1," * 200_000 + b"}",
    b"\0" * 1_000_000,
    b"[" * 1_000_000,
    b"&a " * 300_000,
    b"x" * 100_000_000,
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_file_costs_little_and_says_little(data: bytes) -> None:
    began = time.process_time()
    found = problems(data)
    assert time.process_time() - began < 10.0
    assert 1 <= len(found) <= MAX_PROBLEMS + 1


def test_too_many_members() -> None:
    def members(count: int) -> str:
        return f"workspace: acme\nmembers: [{', '.join(f'user:{n}' for n in range(count))}]\n"

    assert len(policy(members(MAX_MEMBERS)).members) == MAX_MEMBERS
    (problem,) = problems(members(MAX_MEMBERS + 1))
    assert "1025 entries, 1024 are the most" in problem.text


# ---- one law: a policy or a PolicyError


def judge(data: bytes) -> None:
    try:
        made = load(data, source="f.yaml", expected_name=None, is_public_suffix=PUBLIC)
    except PolicyError as error:
        assert error.problems
        assert all(str(problem).isprintable() for problem in error.problems)
    else:
        assert isinstance(made, Policy)
        assert len({rule.key for rule in made.rules}) == len(made.rules), "a key owns its block"
        assert all(rule.ports for rule in made.rules)
        for rule in made.hosts:
            assert {port for port, _ in rule.inspected} <= set(rule.ports)
            assert all(port.protocol is TCP for port, _ in rule.inspected)
            assert rule.inspected or rule.ech is Ech.REFUSE


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    judge(data)


WORDS = st.sampled_from(
    ["workspace", "acme", "guard", "off", "enforce", "allow", "host", "cidr", "local", "ollama", "ports",
     "443/tcp", "10.0.0.0/8", "a.example", "*.a.example", "members", "user:a", "limits", "wall", "2m",
     "private", "true", "null", "residency", "jurisdictions", "EEA", "verify", "provider", "443", "-1",
     "sni", "address", "ech", "443/tls", "443/udp", "wildcards", "sandbox", "names", "**.a.example", "idle",
     "providers", "routes", "default", "vouch", "local_only", "base_url", "api_key", "type", "secret://env/K",
     "openai-compatible", "https://a.example/v1", "http://localhost:8000", "region", "jurisdiction", "models",
     "''", "\u00fc", "'\0'"]
)  # fmt: skip
VALUES = st.recursive(
    WORDS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(WORDS, inner, max_size=4).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200)
@given(st.dictionaries(WORDS, VALUES, max_size=6))
def test_any_shape(document: dict[str, str]) -> None:
    judge("".join(f"{key}: {value}\n" for key, value in document.items()).encode())


@settings(max_examples=200)
@given(st.data())
def test_any_slip_of_the_keyboard(data: st.DataObject) -> None:
    """A good document with one character replaced, or a piece cut out."""
    start = data.draw(st.integers(0, len(FULL) - 1))
    end = data.draw(st.integers(start, min(start + 20, len(FULL))))
    text = FULL[:start] + data.draw(st.text(max_size=3)) + FULL[end:]
    judge(text.encode("utf-8", "surrogatepass"))


KEY = "sk-Planted0Planted0Planted0"


@pytest.mark.parametrize(
    "text",
    [
        f"allow:\n  - host: {KEY}\n",
        f"allow:\n  - {{host: api.example.com, {KEY}: 1}}\n",
        f"allow:\n  - {{cidr: {KEY}, ports: [443]}}\n",
        f"routes: {{{KEY}: {{provider: x}}}}\n",
        f"providers: {{{KEY}: {{type: openai, base_url: 'https://a.example'}}}}\n",
        f"residency: {{jurisdictions: [{KEY}]}}\n",
        f"members: [{KEY}]\n",
        f"{KEY}: {KEY}\n",
        f"limits: {{wall: {KEY}, {KEY}: 1}}\n",
        f"api_key: {KEY[3:12]}\nallow:\n  - host: {KEY[3:12]}\n",
        f"allow: [\n{KEY}: ]: {KEY}\n",
    ],
)
def test_no_problem_repeats_a_key_that_stands_in_the_wrong_place(text: str) -> None:
    """Problems are recorded, and shown to whoever asks why."""
    with pytest.raises(PolicyError) as refused:
        load(f"workspace: acme\n{text}".encode(), source="f", expected_name="acme", is_public_suffix=PUBLIC)
    assert refused.value.problems
    assert all(KEY[3:12].lower() not in str(problem).lower() for problem in refused.value.problems)
