"""Differences: what changed, in words, and whether it gives or takes."""

from __future__ import annotations

import pytest
from policy_texts import allowing, policy

from egressd.policy import values
from egressd.policy.compiled import Verify
from egressd.policy.diff import Action, Section, diff

BASE = allowing("host: a.example", "{host: b.example, ports: [80, 443]}", "local: ollama")


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
    (BASE, BASE.replace("a.example", "c.example"), ["- host a.example: removed (443/tcp)",
                                                    "+ host c.example: added (443/tcp)"]),
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
        "+ host a.example: added (443/tcp)",
        "+ host b.example: added (80/tcp, 443/tcp)",
        "+ local ollama: added (11434/tcp)",
    ]
    gone = diff(policy(BASE), None)
    assert (gone[0].action, gone[0].section) == (Action.REMOVED, Section.WORKSPACE)
    assert len(gone) == 4
    assert all(change.narrows and not change.widens for change in gone)


def test_turning_verification_on_narrows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "VERIFY_AVAILABLE", frozenset(Verify))
    strict = BASE.replace("[80, 443]", "[80, 443], verify: sni")
    assert described(BASE, strict) == ["- host b.example: verify changed from address to sni"]
    assert described(strict, BASE) == ["+ host b.example: verify changed from sni to address"]


def test_a_difference_in_digest_is_a_difference_in_words() -> None:
    for old, new, _ in CHANGES:
        assert policy(old).digest != policy(new).digest
