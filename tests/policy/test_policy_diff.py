"""Differences: what changed, in words, and whether it gives or takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import allowing, policy

from egressd.policy.compiled import Ech, Policy, Verify
from egressd.policy.decide import rule_for
from egressd.policy.diff import Action, Section, diff

BASE = allowing("host: a.example", "{host: b.example, ports: [80, 443]}", "local: ollama")
WILD = allowing('{host: "**.w.example", ports: [443]}')
ALONE = allowing('{host: "**.w.example", verify: address}')


def described(old: str | None, new: str | None) -> list[str]:
    changes = diff(policy(old) if old else None, policy(new) if new else None)
    return [change.describe() for change in changes]


def test_the_same_meaning_is_no_difference() -> None:
    assert described(BASE, BASE) == []
    reordered = allowing(
        "local: ollama", "{host: b.example, ports: [443/tcp, 80]}  # moved", "host: A.example."
    )
    assert described(BASE, reordered) == []
    assert diff(None, None) == ()


CHANGES = [
    (BASE, BASE.replace("a.example", "c.example"), ["- host a.example: removed (443/tls)",
                                                    "+ host c.example: added (443/tls)"]),
    (BASE, BASE.replace("[80, 443]", "[443, 8443]"), ["- host b.example: 80/tcp removed",
                                                      "+ host b.example: 8443/tcp added"]),
    (BASE, BASE.replace("[80, 443]", "[80, 443], private: true"),
     ["+ host b.example: private changed from false to true"]),
    (BASE.replace("[80, 443]", "[80, 443], private: true"), BASE,
     ["- host b.example: private changed from true to false"]),
    (BASE, BASE.replace("enforce", "observe"), ["+ guard: changed from enforce to observe"]),
    (BASE.replace("enforce", "off"), BASE, ["- guard: changed from off to enforce"]),
    (BASE.replace("enforce", "off"), BASE.replace("enforce", "observe"),
     ["~ guard: changed from off to observe"]),
    (BASE, BASE.replace("  - local: ollama\n", ""), ["- local ollama: removed (11434/tcp)"]),
    (BASE, BASE + "  - {cidr: 10.0.0.0/8, ports: [53/udp]}\n", ["+ cidr 10.0.0.0/8: added (53/udp)"]),
    (BASE, BASE + "members: [user:b, group:a]\n", ["+ member group:a: added", "+ member user:b: added"]),
    (BASE + "members: [user:b]\n", BASE, ["- member user:b: removed"]),
    (BASE, BASE + "residency: {jurisdictions: [EEA]}\n", ["- residency: changed from any to EEA"]),
    (BASE + "residency: {jurisdictions: [EEA]}\n", BASE, ["+ residency: changed from EEA to any"]),
    (BASE + "residency: {jurisdictions: [EEA]}\n", BASE + "residency: {jurisdictions: [EEA, CH]}\n",
     ["+ residency: changed from EEA to CH, EEA"]),
    (BASE + "residency: {jurisdictions: [EEA]}\n", BASE + "residency: {jurisdictions: [CH]}\n",
     ["~ residency: changed from EEA to CH"]),
    (BASE, BASE + "limits: {wall: 2m}\n", ["- limit wall: changed from none to 2m"]),
    (BASE + "limits: {wall: 2m}\n", BASE + "limits: {wall: 1h}\n", ["+ limit wall: changed from 2m to 1h"]),
    (BASE + "limits: {egress_bytes: 2MiB, connections: 9}\n", BASE + "limits: {egress_bytes: 1MiB}\n",
     ["- limit egress_bytes: changed from 2MiB to 1MiB", "+ limit connections: changed from 9 to none"]),
    (BASE, BASE + "limits: {idle: 5m}\n", ["~ limit idle: changed from none to 5m"]),
    (BASE + "limits: {idle: 5m}\n", BASE + "limits: {idle: 1h}\n", ["~ limit idle: changed from 5m to 1h"]),
    # how it is verified
    (BASE, BASE.replace("[80, 443]", "[80, 443], verify: sni"),
     ["- host b.example: verify on 80/tcp changed from address to sni"]),
    (BASE, BASE.replace("[80, 443]", "[80, 443], verify: address"),
     ["+ host b.example: verify on 443/tcp changed from sni to address"]),
    (BASE, BASE.replace("[80, 443]", "[80, 443, 443/udp], verify: address"),
     ["+ host b.example: 443/udp added", "+ host b.example: verify on 443/tcp changed from sni to address"]),
    (BASE, BASE.replace("[80, 443]", "[80, 443, 8443/tls]"), ["+ host b.example: 8443/tls added"]),
    (BASE, BASE.replace("[80, 443]", "[80, 443], ech: allow"),
     ["+ host b.example: ech changed from refuse to allow"]),
    (BASE.replace("[80, 443]", "[80, 443], ech: allow"), BASE.replace("[80, 443]", "[80]"),
     ["- host b.example: 443/tls removed"]),
    (BASE, BASE + "  - {host: c.example, ech: allow, private: true}\n",
     ["+ host c.example: added (443/tls, private, ech allowed)"]),
    # budgets
    (BASE, BASE + "wildcards: {sandbox: {names: 65, bytes: 2KiB}, workspace: {rate: 30}}\n",
     ["+ wildcards sandbox: names changed from 64 to 65",
      "- wildcards sandbox: bytes changed from 4KiB to 2KiB",
      "+ wildcards workspace: rate changed from 20 to 30"]),
    # a name has one rule, so one that comes takes its names out of a wildcard, and may close as well as open
    (WILD, WILD + "  - host: a.w.example\n", ["~ host a.w.example: added (443/tls)"]),
    (WILD, WILD + "  - {host: a.w.example, verify: address}\n", ["+ host a.w.example: added (443/tcp)"]),
    (WILD, WILD + "  - {host: a.w.example, ports: [22]}\n", ["~ host a.w.example: added (22/tcp)"]),
    (WILD, WILD + "  - {host: a.w.example, ports: [443, 22]}\n",
     ["+ host a.w.example: added (22/tcp, 443/tls)"]),
    (WILD, WILD + "  - {host: a.w.example, ech: allow}\n",
     ["+ host a.w.example: added (443/tls, ech allowed)"]),
    (WILD, WILD + "  - {host: w.example, ports: [22]}\n", ["+ host w.example: added (22/tcp)"]),
    (WILD, WILD + '  - {host: "*.w.example", ports: [80, 443]}\n',
     ["+ host *.w.example: added (80/tcp, 443/tls)"]),
    (WILD.replace("443", "443, 80"), WILD.replace("443", "443, 80") + '  - host: "*.b.w.example"\n',
     ["- host *.b.w.example: added (443/tls)"]),
    (ALONE, ALONE + "  - {host: a.w.example, ech: allow}\n",
     ["- host a.w.example: added (443/tls, ech allowed)"]),
    (ALONE, ALONE + "  - {host: a.w.example, verify: address, private: true}\n",
     ["+ host a.w.example: added (443/tcp, private)"]),
    (WILD + "  - host: a.w.example\n", WILD.replace("**.w", "**.v"),
     ["- host **.w.example: removed (443/tls)", "- host a.w.example: removed (443/tls)",
      "+ host **.v.example: added (443/tls)"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "lines"), CHANGES, ids=range(len(CHANGES)))
def test_changes(old: str, new: str, lines: list[str]) -> None:
    assert described(old, new) == lines


@pytest.mark.parametrize(("old", "new", "lines"), CHANGES, ids=range(len(CHANGES)))
def test_a_change_and_its_reverse_mirror_each_other(old: str, new: str, lines: list[str]) -> None:
    there, back = diff(policy(old), policy(new)), diff(policy(new), policy(old))
    assert sorted((c.section, c.subject, c.detail, c.widens, c.narrows) for c in there) == sorted(
        (c.section, c.subject, c.detail, c.narrows, c.widens) for c in back
    )


def test_a_workspace_comes_and_goes() -> None:
    assert described(None, BASE) == [
        "+ workspace acme: added (enforce)",
        "+ host a.example: added (443/tls)",
        "+ host b.example: added (80/tcp, 443/tls)",
        "+ local ollama: added (11434/tcp)",
    ]
    gone = diff(policy(BASE), None)
    assert (gone[0].action, gone[0].section) == (Action.REMOVED, Section.WORKSPACE)
    assert len(gone) == 4
    assert all(change.narrows and not change.widens for change in gone)


def test_a_difference_in_digest_is_a_difference_in_words() -> None:
    for old, new, _ in CHANGES:
        assert policy(old).digest != policy(new).digest


# ---- the law: whatever a name may do afterwards and not before, some line says that it opens

HOSTS = st.tuples(
    st.sampled_from(["", "*.", "**."]), st.sampled_from(["w.example", "a.w.example", "b.a.w.example"])
).map("".join)
TERMS = st.sampled_from(["ports: [443]", "ports: [443, 80]", "ports: [22]", "verify: address", "ech: allow"])
LISTS = st.dictionaries(HOSTS, TERMS, max_size=4)
PROBES = ["w.example", "a.w.example", "b.a.w.example", "x.w.example", "x.a.w.example", "y.x.a.w.example"]


def permissions(made: Policy, name: str) -> set[tuple[str, str]]:
    """What can be done with a name: reach a port with a name of its own, with ECH, or with any at all."""
    rule = rule_for(made, name)
    found = set()
    for port in rule.ports if rule else ():
        found.add((str(port), "named"))
        if rule and rule.verify_on(port) is Verify.ADDRESS:
            found |= {(str(port), "hidden"), (str(port), "any")}
        elif rule and rule.ech is Ech.ALLOW:
            found.add((str(port), "hidden"))
    return found


@settings(max_examples=200)
@given(LISTS, LISTS)
def test_what_opens_or_closes_for_any_name_is_said(before: dict[str, str], after: dict[str, str]) -> None:
    old, new = (
        policy(allowing(*(f"{{host: '{host}', {terms}}}" for host, terms in rules.items())))
        for rules in (before, after)
    )
    changes = diff(old, new)
    for name in PROBES:
        was, will_be = permissions(old, name), permissions(new, name)
        assert will_be <= was or any(change.widens for change in changes)
        assert was <= will_be or any(change.narrows for change in changes)
