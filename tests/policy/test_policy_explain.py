"""Explanations and remarks: a person reads them and knows which line to change."""

from __future__ import annotations

import time
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import allowing, policy, problems

from egressd.model.errors import Unfit
from egressd.policy.compiled import Protocol
from egressd.policy.explain import Subject, explain_policy, why
from egressd.policy.remarks import remarks

TEXT = allowing(
    "host: api.example.com",
    "{host: db.internal.example, ports: [5432], private: true}",
    "local: ollama",
    "{cidr: 10.20.0.0/16, ports: [5432], vouch: our own machines}",
    more="""\
members: [user:infer, group:research]
residency: {jurisdictions: [EEA, CH]}
limits: {wall: 90s, memory: 4096MiB, processes: 128, egress_bytes: 50MiB, connections: 200, idle: 600s}
""",
)
POLICY = policy(TEXT)


def test_a_policy_in_words() -> None:
    assert explain_policy(POLICY).splitlines()[1:] == [
        "guard: enforce: only what is listed is reachable",
        "members: group:research, user:infer",
        "residency: CH, EEA (31 countries)",
        "limit: wall 90s",
        "limit: memory 4GiB",
        "limit: processes 128",
        "limit: egress_bytes 50MiB",
        "limit: connections 200",
        "limit: idle 10m",
        "allowed: host api.example.com on 443/tcp, verified by SNI (line 4)",
        "allowed: host db.internal.example on 5432/tcp, also in private ranges (line 5)",
        "allowed: local service ollama on 11434/tcp of this machine's loopback (line 6)",
        'allowed: cidr 10.20.0.0/16 on 5432/tcp, vouched for: "our own machines" (line 7)',
    ]
    assert explain_policy(POLICY).startswith(f"workspace acme ({POLICY.digest[:19]})\n")


WILD = policy(
    allowing(
        '{host: "*.example.com", ports: [443, 8443/tls, 80], ech: allow}',
        "{host: a.example.com, ports: [443, 443/udp], verify: address}",
        "{host: a.example.com, ports: [8443/tls, 22]}",
        '{host: "**.deep.example.com", ports: [22]}',
    )
)


def test_a_policy_with_wildcards_in_words() -> None:
    assert explain_policy(WILD).splitlines()[3:] == [
        "names of wildcards: 64 names, 4KiB of labels, 5 a second for a sandbox, "
        "1024 names, 256KiB of labels, 20 a second for the workspace",
        "allowed: host *.example.com on 80/tcp, 443/tcp, 8443/tcp, of which 443/tcp, 8443/tcp verified by SNI"
        ", ECH allowed (line 4)",
        "allowed: host a.example.com on 22/tcp, 443/tcp, 443/udp, 8443/tcp, of which 8443/tcp verified by SNI"
        " (line 5)",
        "allowed: host **.deep.example.com on 22/tcp (line 7)",
    ]


WHY_WILD = [
    ("b.example.com:443", "as *.example.com, if its TLS asks", "may hide another in it"),
    ("b.example.com", "as *.example.com", "a sandbox has a budget: 64 names, 4KiB of labels, 5 a second"),
    ("b.example.com:22", "not on 22/tcp [port]", "the rule is: host *.example.com"),
    (
        "a.example.com:80",
        "not on 80/tcp [port]",
        "line 4 allows it to names under *.example.com; but a name has",
    ),
    ("a.example.com:25", "not on 25/tcp [port]", "the rule is: host a.example.com"),
    ("example.com", "[name]", "*.example.com (line 4) does not cover example.com itself: add a rule for it"),
    ("deep.example.com:443", "allowed in acme", "as *.example.com"),
    ("x.deep.example.com:22", "allowed in acme", "as **.deep.example.com"),
    (
        "x.y.example.com",
        "[name]",
        "*.example.com (line 4) covers one label and no more; **.example.com is for",
    ),
    ("x.y.unrelated.com", "[name]", "is not on the list"),
]


@pytest.mark.parametrize(("subject", "first", "also"), WHY_WILD)
def test_why_with_wildcards(subject: str, first: str, also: str) -> None:
    explanation = why(WILD, subject)
    assert first in explanation.sentences[0]
    assert also in str(explanation)
    assert "None" not in str(explanation)


def test_a_port_that_no_rule_around_has_is_not_said_to_be_set_aside() -> None:
    assert "a name has one rule" not in str(why(WILD, "a.example.com:25"))
    assert "its TLS ClientHello" not in str(why(WILD, "a.example.com:443")), "that port goes by address"


def test_the_emptiest_policy_in_words() -> None:
    assert explain_policy(policy("workspace: acme")).splitlines()[1:] == [
        "guard: off: nothing is restricted, only counted",
        "members: none, so nobody may spawn here",
        "allowed: nothing",
    ]


SUBJECTS = [
    ("api.example.com", Subject("api.example.com")),
    ("api.example.com:443", Subject("api.example.com", 443)),
    ("api.example.com:53/udp", Subject("api.example.com", 53, Protocol.UDP)),
    ("10.0.0.1", Subject(ip_address("10.0.0.1"))),
    ("10.0.0.1:80", Subject(ip_address("10.0.0.1"), 80)),
    ("2001:db8::1", Subject(ip_address("2001:db8::1"))),
    ("[2001:db8::1]", Subject(ip_address("2001:db8::1"))),
    ("[2001:db8::1]:443/tcp", Subject(ip_address("2001:db8::1"), 443)),
    ("::1", Subject(ip_address("::1"))),
    ("", Subject("")),
]
BAD_SUBJECTS = [
    "a.example:0", "a.example:70000", "a.example:https", "a.example:", "a.example/tcp", "a.example:1/sctp",
    "[::1]:x", "a:\u0661", "https://a.example", "https://a.example:443/tcp",
]  # fmt: skip


@pytest.mark.parametrize(("text", "subject"), SUBJECTS)
def test_subjects(text: str, subject: Subject) -> None:
    assert Subject.of(text) == subject


@pytest.mark.parametrize("text", BAD_SUBJECTS)
def test_bad_subjects(text: str) -> None:
    with pytest.raises(Unfit):
        Subject.of(text)


WHY = [
    (
        "api.example.com",
        "allowed in acme",
        "the rule is: host api.example.com on 443/tcp, verified by SNI (line 4)",
    ),
    (
        "api.example.com:443",
        "allowed in acme",
        "the rule is: host api.example.com on 443/tcp, verified by SNI (line 4)",
    ),
    (
        "api.example.com:443",
        "if its TLS asks for that name (line 4)",
        "it must ask for that very name, and may not",
    ),
    ("api.example.com:80", "is allowed on 443/tcp, not on 80/tcp [port]", "host api.example.com on 443/tcp"),
    ("api.exmaple.com", "not on the list of acme [name]", "did you mean api.example.com (line 4)?"),
    ("www.api.example.com", "[name]", "covers exactly the name it lists, and line 4 lists api.example.com"),
    ("example.com:443", "[name]", "covers exactly the name it lists, and line 4 lists api.example.com"),
    ("olama", "[name]", "did you mean ollama (line 6)?"),
    ("fe80::1%\x1b[2J", "denied", "%"),
    ("b\u00fccher.example", "is not ASCII [name]", "write xn--bcher-kva.example"),
    ("10.20.0.1", "allowed in acme: 10.20.0.0/16 is allowed on 5432/tcp (line 7)", "cidr 10.20.0.0/16"),
    ("10.20.0.1:22", "not on 22/tcp [port]", "cidr 10.20.0.0/16"),
    ("10.21.0.1", "no cidr rule contains 10.21.0.1", "hosts are reached by name"),
    ("169.254.169.254:80", "is metadata, which no rule may reach [address]", "denied"),
    ("[::1]:11434", "is loopback, which no rule may reach [address]", "denied"),
]


@pytest.mark.parametrize(("subject", "first", "also"), WHY)
def test_why(subject: str, first: str, also: str) -> None:
    explanation = why(POLICY, subject)
    assert first in explanation.sentences[0]
    assert also in str(explanation)
    assert all(sentence.isprintable() for sentence in explanation.sentences)


def test_a_far_name_has_no_near_miss() -> None:
    assert len(why(POLICY, "unrelated.test").sentences) == 1


def test_why_without_enforcement() -> None:
    loose = policy(TEXT.replace("enforce", "observe"))
    first, second = why(loose, "other.example:443").sentences
    assert first == "allowed in acme: guard: observe counts and does not restrict [unrestricted]"
    assert second.startswith("under guard: enforce it would be denied: other.example is not on the list")


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_any_subject_is_explained_or_unfit(text: str) -> None:
    try:
        explanation = why(POLICY, text)
    except Unfit as error:
        assert str(error).isprintable()
    else:
        assert all(sentence.isprintable() for sentence in explanation.sentences)
        assert explanation.sentences[0].startswith(str(explanation.decision.verdict))


def test_a_near_miss_among_many_is_found_quickly() -> None:
    many = policy(allowing(*(f"host: h{n}.example.com" for n in range(16_000))))
    began = time.process_time()
    assert "did you mean" in str(why(many, "h1234.exmaple.com"))
    assert time.process_time() - began < 1.0


# ---- remarks


def test_a_complete_policy_earns_one_remark() -> None:
    (remark,) = remarks(POLICY, source="acme.yaml")
    assert (remark.source, remark.line) == ("acme.yaml", 7)
    assert "10.20.0.0/16 is vouched for" in remark.text


def test_the_emptiest_policy_is_told_what_it_means() -> None:
    found = {remark.where: remark.text for remark in remarks(policy("workspace: acme"))}
    assert set(found) == {"guard", "members", "limits"}
    assert "restricts nothing" in found["guard"]
    assert "nobody can spawn" in found["members"]
    assert "wall, memory, processes, egress_bytes, connections" in found["limits"]


def test_enforcing_an_empty_list() -> None:
    assert "allow" in {remark.where for remark in remarks(policy(allowing()))}


def test_wide_public_networks() -> None:
    made = policy(allowing("{cidr: 8.0.0.0/15, ports: [1]}", "{cidr: 10.0.0.0/8, ports: [1]}"))
    assert [remark.line for remark in remarks(made) if "wide" in remark.text] == [4]


# what the remark says about; the rules; the lines it is told of
REMARKED = [
    ("is QUIC", ("{host: a.example, ports: [443/udp], verify: address}", "host: a.example"), [4]),
    ("by address alone", ("{host: a.example, verify: address}", "host: b.example"), [4]),
    ("by address alone", ("{host: a.example, ports: [80]}", "{host: b.example, ports: [443/tls]}"), []),
    ("encrypted_client_hello", ("{host: a.example, ech: allow}", "{host: b.example, ech: refuse}"), [4]),
    ("any depth", ('host: "**.a.example"', 'host: "*.b.example"', "host: c.example"), [4]),
    ("allows more", ('{host: "*.a.example", ports: [80, 443]}', "host: b.a.example", "host: a.example"), [5]),
    ("allows more", ('host: "*.a.example"', "{host: b.a.example, ports: [80, 443]}"), []),
    (
        "allows more",
        ('host: "**.a.example"', '{host: "*.a.example", ports: [80]}', "host: x.b.a.example"),
        [5],
    ),
    ("no rule has a wildcard", ("host: a.example",), []),
]


@pytest.mark.parametrize(("says", "rules", "lines"), REMARKED, ids=range(len(REMARKED)))
def test_remarks_on_hosts(says: str, rules: tuple[str, ...], lines: list[int]) -> None:
    found = [remark for remark in remarks(policy(allowing(*rules))) if says in remark.text]
    assert [remark.line for remark in found] == lines
    assert all(remark.remedy for remark in found)


def test_budgets_without_a_wildcard() -> None:
    budgets = "wildcards: {sandbox: {names: 5}}\n"
    lonely, used = (
        policy(allowing("host: a.example", more=budgets)),
        policy(allowing('host: "*.a.example"', more=budgets)),
    )
    assert "wildcards" in {remark.where for remark in remarks(lonely)}
    assert "wildcards" not in {remark.where for remark in remarks(used)}


SHARED = [
    "*.s3.amazonaws.com", "*.s3.eu-central-1.amazonaws.com", "*.s3.dualstack.eu-south-9.amazonaws.com",
    "*.s3.eu-south-9.amazonaws.com", "*.s3-eu-south-9.amazonaws.com", "*.amazonaws.com", "**.amazonaws.com",
    "*.storage.googleapis.com", "*.googleapis.com", "*.blob.core.windows.net", "**.core.windows.net",
    "**.windows.net", "*.r2.cloudflarestorage.com", "**.cloudflarestorage.com", "*.github.io",
    "*.cloudfront.net", "*.azurewebsites.net", "*.run.app", "*.fastly.net",
]  # fmt: skip
OWN = [
    "*.example.com", "**.example.co.uk", "*.bucket.s3.eu-south-9.amazonaws.com", "*.openai.azure.com",
    "*.account.r2.cloudflarestorage.com", "*.anthropic.com", "*.nwindows.net", "*.project.github.io",
]  # fmt: skip


@pytest.mark.parametrize("host", SHARED)
def test_wildcards_on_shared_hosting_are_refused_or_remarked_on(host: str) -> None:
    text = allowing(f"host: '{host}'")
    refused = any("public suffix" in problem.text for problem in problems(text))
    assert refused or any("strangers" in remark.text for remark in remarks(policy(text)))


@pytest.mark.parametrize("host", OWN)
def test_wildcards_on_a_domain_of_ones_own_are_not(host: str) -> None:
    assert not any("strangers" in remark.text for remark in remarks(policy(allowing(f"host: '{host}'"))))
