"""The ruleset as text: golden files, and what must never become text.

A golden file that differs is written beside it as `.new`: read the difference, then move it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import EXAMPLE, policy

from egressd.model.identities import Link
from egressd.policy.compiled import Guard
from egressd.ruleset import build, objects
from egressd.ruleset.allocate import Allocation
from egressd.ruleset.build import Desired, LinkWant
from egressd.ruleset.layout import Pools
from egressd.ruleset.plan import want
from egressd.ruleset.wants import Element, NatEntry, WorkspaceWant

GOLDEN = Path(__file__).parent / "golden"
POOLS = Pools()
NUMBERS = Allocation(
    workspaces={"acme": 1},
    blocks={
        "acme": {rule.key: number for number, rule in enumerate(EXAMPLE, 1)},
    },
)


def acme(guard: Guard = Guard.ENFORCE, connections: int | None = None) -> WorkspaceWant:
    return want(policy(*EXAMPLE, guard=guard, connections=connections), NUMBERS, POOLS)


MARK = next(e.mark for e in acme().elements if e.comment == "api.example.com")
LEADS = [
    NatEntry(MARK, "198.18.0.4", "192.0.2.1", "api.example.com"),
    NatEntry(MARK, "198.18.0.5", "192.0.2.2", "api.example.com"),
    NatEntry(MARK, "fd53:e9::4", "2001:db8::1", "api.example.com"),
]
LIMITED = LinkWant(Link(7), "acme", quota=50 << 20, connections=300)
LISTINGS = {
    "base": lambda: build.base(POOLS),
    "enforce": lambda: build.workspace(acme(), POOLS),
    "observe": lambda: build.workspace(acme(Guard.OBSERVE), POOLS),
    "off": lambda: build.workspace(acme(Guard.OFF), POOLS),
    "link": lambda: build.link(LinkWant(Link(7), "acme"), acme(), POOLS),
    "limits": lambda: build.link(LIMITED, acme(connections=200), POOLS),
    "closed": lambda: build.link(replace(LIMITED, closed=True), acme(connections=200), POOLS),
    "unlink": lambda: build.unlink(Link(7)),
    "drop": lambda: build.drop_workspace(acme()),
    "nat": lambda: build.nat(LEADS, {(MARK, "198.18.0.5"): "192.0.2.9"}),
    "host": lambda: build.host(POOLS),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_golden(name: str) -> None:
    file = GOLDEN / f"{name}.nft"
    text = "\n".join(LISTINGS[name]()) + "\n"
    if not file.exists() or file.read_text() != text:
        file.with_suffix(".new").write_text(text)
        pytest.fail(f"{file.name} differs: see {file.with_suffix('.new')}")


def test_the_same_arguments_give_the_same_text() -> None:
    for make in LISTINGS.values():
        assert make() == make()


def test_nothing_but_changes_is_said_about_nat() -> None:
    current = {(entry.mark, entry.synthetic): str(entry.real) for entry in LEADS}
    assert build.nat(LEADS, current) == []
    gone = [NatEntry(MARK, "198.18.0.4", None, "x")]
    assert build.nat(gone, current) == [f"delete element inet egressd real4 {{ {MARK:#010x} . 198.18.0.4 }}"]
    assert build.nat(gone, {}) == []


# ---- refused


def with_element(*fields: object) -> WorkspaceWant:
    return WorkspaceWant(workspace="acme", index=1, guard="enforce", elements=(Element(*fields),))  # type: ignore[arg-type]


FORWARD, DIRECT, RESOLVE = 0x8000_4001, 0x9000_4001, 0x2000_4000
BAD_ELEMENTS = {
    "another workspace's mark": ("198.18.0.4", "tcp", 80, 0x8000_8001, "x"),
    "a mark of no kind": ("198.18.0.4", "tcp", 80, 0x0000_4001, "x"),
    "two kinds": ("198.18.0.4", "tcp", 80, 0xC000_4001, "x"),
    "another block's address": ("198.18.0.8", "tcp", 80, FORWARD, "x"),
    "the second slot": ("198.18.0.5", "tcp", 80, FORWARD, "x"),
    "a real address to be translated": ("192.0.2.1", "tcp", 80, FORWARD, "x"),
    "a network to be translated": ("198.18.0.4/30", "tcp", 80, FORWARD, "x"),
    "a synthetic address as it is": ("198.18.0.4/32", "tcp", 80, DIRECT, "x"),
    "a sandbox": ("198.19.0.0/24", "tcp", 80, DIRECT, "x"),
    "loopback": ("127.0.0.0/8", "tcp", 80, DIRECT, "x"),
    "metadata": ("169.254.169.254/32", "tcp", 80, DIRECT, "x"),
    "everything": ("0.0.0.0/0", "tcp", 80, DIRECT, "x"),
    "everything, v6": ("::/0", "tcp", 80, DIRECT, "x"),
    "v4 in v6": ("::ffff:127.0.0.1/128", "tcp", 80, DIRECT, "x"),
    "link-local": ("fe80::/64", "tcp", 80, DIRECT, "x"),
    "not the resolver": ("169.254.53.54", "udp", 53, RESOLVE, "x"),
    "another port of the resolver": ("169.254.53.53", "udp", 54, RESOLVE, "x"),
    "another protocol": ("198.18.0.4", "icmp", 80, FORWARD, "x"),
    "port 0": ("198.18.0.4", "tcp", 0, FORWARD, "x"),
    "port 65536": ("198.18.0.4", "tcp", 65536, FORWARD, "x"),
    "syntax as address": ("198.18.0.4 . tcp . 80 : 1, 1.1.1.1", "tcp", 80, FORWARD, "x"),
    "syntax as comment": ("198.18.0.4", "tcp", 80, FORWARD, 'x" : 0x80000001, 1.1.1.1 . tcp . 1 comment "'),
    "a line break as comment": ("198.18.0.4", "tcp", 80, FORWARD, "x\nflush ruleset"),
}


@pytest.mark.parametrize("what", BAD_ELEMENTS)
def test_an_element_that_cannot_be_is_refused(what: str) -> None:
    with pytest.raises(ValueError):
        build.workspace(with_element(*BAD_ELEMENTS[what]), POOLS)


def test_control_one_that_can_is_not() -> None:
    assert build.workspace(with_element("198.18.0.4", "tcp", 80, FORWARD, "x"), POOLS)
    assert build.workspace(with_element("10.0.0.0/8", "tcp", 80, DIRECT, "x"), POOLS)
    assert build.workspace(with_element("169.254.53.53", "udp", 53, RESOLVE, "x"), POOLS)


@pytest.mark.parametrize("name", ["", "Acme", "a_b", "a b", "a;flush ruleset", "a\n", "a" * 40, "-a", "ä"])
def test_a_name_that_is_no_workspace_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        build.workspace(WorkspaceWant(workspace=name, index=1, guard="enforce"), POOLS)


BAD_LEADS = {
    "families mixed": (MARK, "198.18.0.4", "2001:db8::1"),
    "not to be translated": (DIRECT, "198.18.0.4", "192.0.2.1"),
    "no address": (MARK, "198.18.0.4", "1.2.3.4 }; flush ruleset"),
    "no synthetic address": (MARK, "x", "192.0.2.1"),
}


@pytest.mark.parametrize("what", BAD_LEADS)
def test_a_lead_that_cannot_be_is_refused(what: str) -> None:
    with pytest.raises(ValueError):
        build.nat([NatEntry(*BAD_LEADS[what], "x")], {})


def test_a_key_with_two_marks_is_refused() -> None:
    elements = tuple(Element("198.18.0.4", "tcp", 80, mark, "x") for mark in (FORWARD, 0x4000_4001))
    both = WorkspaceWant(workspace="acme", index=1, guard="enforce", elements=elements)
    with pytest.raises(ValueError, match="two marks"):
        build.workspace(both, POOLS)


def test_a_link_of_an_unknown_workspace_is_refused() -> None:
    with pytest.raises(ValueError, match="no workspace"):
        build.desired(Desired(pools=POOLS, wants={}, links=(LinkWant(link=Link(1), workspace="acme"),)))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=130))
def test_a_string_is_quoted_or_refused(text: str) -> None:
    try:
        quoted = objects.string(text)
    except ValueError:
        return
    assert quoted == f'"{text}"'
    assert re.fullmatch(r'"[^"\\\n{}$@]*"', quoted)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=70))
def test_an_identifier_is_one_word_or_refused(text: str) -> None:
    try:
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", objects.identifier(text))
    except ValueError:
        assert not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", text)


@pytest.mark.parametrize(
    "name", ["eg7", "late", "local", "in", "real4", "unreachable4", "steer", "refuse", "tcp"]
)
def test_a_workspace_may_be_called_like_something_of_ours(name: str) -> None:
    """Its objects end otherwise than the static ones and those of links."""
    wanted = WorkspaceWant(workspace=name, index=1, guard="off")
    things = build.desired(Desired(POOLS, {name: wanted}, (LinkWant(Link(7), name, 1, 1),)))
    static = build.desired(Desired(POOLS, {}))
    assert len(things) == len(static) + len(build.fragment(wanted, POOLS)) - 3 + 11
