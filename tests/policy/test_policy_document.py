"""Policy documents: what is accepted as what, and every way of getting it wrong."""

from __future__ import annotations

import time
from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import PUBLIC, allowing, policy, problems

from egressd.model.errors import PolicyError
from egressd.policy import values
from egressd.policy.compile import MAX_RULES
from egressd.policy.compiled import (
    CidrRule,
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
  - local: ollama
  - local: vllm
    ports: [8000]
  - cidr: 10.20.0.0/16
    ports: [5432/tcp]
  - cidr: 2001:db8:1::/48
    ports: [443]
limits: {wall: 120s, memory: 4GiB, processes: 128, egress_bytes: 50MiB, connections: 200}
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
        HostRule("eu.api.openai.com", (Port(443, TCP),), Verify.ADDRESS, private=False, line=7),
        HostRule(
            "db.internal.example", (Port(53, UDP), Port(5432, TCP), Port(8443, TCP)), Verify.ADDRESS, True, 8
        ),
        LocalRule("ollama", (Port(11434, TCP),), 12),
        LocalRule("vllm", (Port(8000, TCP),), 13),
        CidrRule(ip_network("10.20.0.0/16"), (Port(5432, TCP),), 15),
        CidrRule(ip_network("2001:db8:1::/48"), (Port(443, TCP),), 17),
    )
    assert made.limits == Limits(120.0, 4 << 30, 128, 50 << 20, 200)
    assert made.digest.startswith("sha256:") and len(made.digest) == 71


def test_the_smallest_policy_is_unrestricted_and_open_to_nobody() -> None:
    made = policy("workspace: acme")
    assert made == Policy("acme", Guard.OFF, (), (), (), Limits(), made.digest)


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
    (rule,) = policy(allowing("{host: a.example, ports: [443/tcp, 443/udp]}")).rules
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
limits: {connections: 200, egress_bytes: 51200KiB, processes: 128, memory: 4096MiB, wall: 2m}   # reordered
allow:
  - {cidr: 2001:db8:1::/48, ports: [443/tcp]}
  - {cidr: 10.20.0.0/16, ports: [5432]}
  - {local: vllm, ports: [8000/tcp]}
  - {local: ollama, ports: [11434]}
  - {host: db.internal.example, ports: [8443, 5432], private: true}
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
        ("EU.api.openai.com.", "eu.api.openai.org"),
    ],
)
def test_any_change_of_meaning_changes_the_digest(old: str, new: str) -> None:
    text = FULL.replace("EU.api.openai.com.", "eu.api.openai.com") if "eu.api" in old else FULL
    assert old in text
    assert policy(text.replace(old, new)).digest != policy(FULL).digest


def test_the_workspace_is_part_of_the_digest() -> None:
    assert policy(FULL.replace("acme", "beta"), name="beta").digest != policy(FULL).digest


# ---- refusals: the document, the line, what is said, and the remedy

HEAD = "workspace: acme\n"
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
        "provider rules are not available",
        "host rules",
    ),
    # hosts
    (allowing("{host: }"), 4, "this is empty", "a host name"),
    (allowing("host: 1"), 4, "this is a number", "a host name"),
    (allowing("host: [a.example]"), 4, "this is a list", "a host name"),
    (allowing('host: "*"'), 4, "covers every name", "name the hosts"),
    (allowing('host: "*.com"'), 4, "whole top-level domain", "more of the name"),
    (allowing('host: "**.co.uk"'), 4, "public suffix", "more of the name"),
    (allowing('host: "a.*.example.com"'), 4, "asterisk where none may stand", "first label"),
    (allowing('host: "*.example.com"'), 4, "not available in this version", "one by one"),
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
    (allowing("{host: a.example, verify: sni}"), 4, "verify: sni is not available", "verify: address"),
    (allowing("{host: a.example, verify: none}"), 4, "'none' is not a way to verify", "write address"),
    (allowing("{host: a.example, verify: false}"), 4, "this is a truth value", "write address"),
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
    (allowing("{host: a.example, ports: [443/sctp]}"), 4, "unknown protocol", "tcp or udp"),
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


# ---- what this version cannot do yet is one switch away


def test_wildcards_are_complete_behind_their_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "WILDCARDS_AVAILABLE", True)
    made = policy(allowing('host: "*.Search.example.com"', 'host: "**.example.org"', "host: a.example.org"))
    assert [(rule.host, rule.wildcard) for rule in made.hosts] == [
        ("*.search.example.com", True),
        ("**.example.org", True),
        ("a.example.org", False),
    ]
    (problem,) = problems(allowing('host: "*.com"'))
    assert "whole top-level domain" in problem.text
    (problem,) = problems(allowing('host: "*.example.com"', 'host: "*.EXAMPLE.com."'))
    assert "twice" in problem.text


def test_sni_is_complete_behind_its_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "VERIFY_AVAILABLE", frozenset(Verify))
    (rule,) = policy(allowing("{host: a.example, verify: sni}")).hosts
    assert rule.verify is Verify.SNI
    by_address = policy(allowing("{host: a.example, verify: address}"))
    assert policy(allowing("{host: a.example, verify: sni}")).digest != by_address.digest
    assert policy(allowing("host: a.example")).digest == by_address.digest


# ---- bounds


def hosts(count: int) -> bytes:
    return b"workspace: acme\nallow:\n" + b"".join(b"- host: h%d.example.com\n" % n for n in range(count))


def test_ten_thousand_hosts_load_quickly() -> None:
    data = hosts(10_000)
    began = time.perf_counter()
    made = policy(data)
    took = time.perf_counter() - began
    assert len(made.hosts) == 10_000
    assert took < 3.0, f"{took:.2f} s"


def test_as_many_rules_as_there_are_blocks() -> None:
    assert len(policy(hosts(MAX_RULES)).rules) == MAX_RULES
    (problem,) = problems(hosts(MAX_RULES + 1))
    assert "16383 entries, 16382 are the most" in problem.text


def test_many_networks_are_compared_quickly() -> None:
    rules = (f"- {{cidr: 10.{n >> 8}.{n & 255}.0/24, ports: [1]}}\n" for n in range(16_000))
    data = "workspace: acme\nallow:\n" + "".join(rules)
    began = time.perf_counter()
    assert len(policy(data).cidrs) == 16_000
    assert time.perf_counter() - began < 5.0


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
    began = time.perf_counter()
    found = problems(data)
    assert time.perf_counter() - began < 10.0
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


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    judge(data)


WORDS = st.sampled_from(
    ["workspace", "acme", "guard", "off", "enforce", "allow", "host", "cidr", "local", "ollama", "ports",
     "443/tcp", "10.0.0.0/8", "a.example", "*.a.example", "members", "user:a", "limits", "wall", "2m",
     "private", "true", "null", "residency", "jurisdictions", "EEA", "verify", "provider", "443", "-1",
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
