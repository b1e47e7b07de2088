"""The decision: cases told one by one, then every sequence of changes against a rule written twice.

`plain_rule` below is the rule as a sentence would say it, on the world's own plain values, and shares nothing
with the code under test.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from egressd.access.authorise import Cleared, Finding, authorise, judge
from egressd.access.documents import LEVELS, Acl, Asker, Document, Rules
from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.model.errors import Unfit

M, L, S = "group:okta:money", "group:okta:legal", "group:okta:staff"
ANN = "user:okta:ann"


def who(*groups: str, role: Role = Role.VIEWER, level: str = "internal") -> Asker:
    return Asker(Identity("okta", "ann", frozenset(groups)), role, level)


def doc(*readers: str, denied: Iterable[str] = (), level: str = "internal", **more: Any) -> Document:
    acl = Acl(frozenset(readers), frozenset(denied))
    groups = frozenset(more.pop("groups", ()))
    return Document("s:a", "/srv/s", b"a", 1, "sha256:" + "0" * 64, acl, level, groups, **more)


F = Finding
OPEN = Rules()
WALLED = Rules(barriers=frozenset({frozenset({M, L})}))
WALLED_THREE = Rules(barriers=frozenset({frozenset({M, L, S})}))
TWO_LEVELS = Rules(levels=("low", "high"))
CASES = [
    ("listed by name", who(), doc(ANN), OPEN, F.CLEARED),
    ("listed by group", who(S), doc(S), OPEN, F.CLEARED),
    ("one of the groups is enough", who(S), doc(S, L), OPEN, F.CLEARED),
    ("no such document", who(S), None, OPEN, F.UNKNOWN),
    ("no member", who(S, role=Role.NONE), doc(S), OPEN, F.ROLE),
    ("an owner has no more documents than others", who(role=Role.OWNER), doc(S), OPEN, F.UNLISTED),
    ("nobody is listed", who(S), doc(), OPEN, F.UNLISTED),
    ("another group", who(S), doc(L), OPEN, F.UNLISTED),
    ("another provider's group", who(S), doc("group:entra:staff"), OPEN, F.UNLISTED),
    ("another provider's user", who(), doc("user:entra:ann"), OPEN, F.UNLISTED),
    ("a group called like a user", who(), doc("group:okta:ann"), OPEN, F.UNLISTED),
    ("denied by name", who(S), doc(S, denied=(ANN,)), OPEN, F.DENIED),
    ("denied by one group, listed by another", who(S, L), doc(S, denied=(L,)), OPEN, F.DENIED),
    ("denied and listed by the same", who(S), doc(S, denied=(S,)), OPEN, F.DENIED),
    ("others are denied", who(S), doc(S, denied=(L,)), OPEN, F.CLEARED),
    ("unreadable", who(S), doc(S, problem="line 3: ..."), OPEN, F.UNREADABLE),
    ("clearance above", who(S, level="secret"), doc(S), OPEN, F.CLEARED),
    ("clearance below", who(S, level="public"), doc(S), OPEN, F.CLEARANCE),
    ("no clearance", who(S, level=""), doc(S, level="public"), OPEN, F.CLEARANCE),
    ("the asker's level is unknown", who(S, level="cosmic"), doc(S, level="public"), OPEN, F.CLEARANCE),
    ("the document's level is unknown", who(S, level="secret"), doc(S, level="cosmic"), OPEN, F.CLEARANCE),
    ("both levels are unknown, and equal", who(S, level="x"), doc(S, level="x"), OPEN, F.CLEARANCE),
    ("the document has none", who(S, level="secret"), doc(S, level=""), OPEN, F.CLEARANCE),
    ("no levels at all", who(S), doc(S), Rules(levels=()), F.CLEARANCE),
    ("levels of one's own", who(S, level="high"), doc(S, level="low"), TWO_LEVELS, F.CLEARED),
    ("behind the barrier, by the list", who(M, S), doc(S, L), WALLED, F.BARRIER),
    ("behind it, in the other direction", who(L, S), doc(S, M), WALLED, F.BARRIER),
    ("behind it, by whose it is", who(M, S), doc(S, groups={L}), WALLED, F.BARRIER),
    ("behind it, though listed by name", who(M), doc(ANN, groups={L}), WALLED, F.BARRIER),
    ("on one's own side", who(M), doc(M), WALLED, F.CLEARED),
    ("on both sides: nothing of either", who(M, L), doc(M), WALLED, F.BARRIER),
    ("of both sides: closed to both", who(M), doc(M, L), WALLED, F.BARRIER),
    ("on neither side", who(S), doc(S, L), WALLED, F.CLEARED),
    ("a barrier of three, last two", who(S), doc(S, L), WALLED_THREE, F.BARRIER),
]  # fmt: skip


@pytest.mark.parametrize(
    ("asker", "what", "rules", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_case(asker: Asker, what: Document | None, rules: Rules, expected: Finding) -> None:
    assert judge(asker, what, rules) is expected
    documents = {"s:a": what} if what else {}
    found = authorise(asker, ["s:a"], documents, rules)
    assert found.documents == ((what,) if expected is Finding.CLEARED else ())
    assert found.discarded == (expected is not Finding.CLEARED)


def test_candidates_keep_their_order_and_count_once() -> None:
    documents = {f"s:{n}": replace(doc(S if n % 2 else L), id=f"s:{n}") for n in range(6)}
    found = authorise(who(S), ["s:5", "s:0", "s:1", "s:5", "gone:1", "gone:1"], documents, Rules())
    assert [one.id for one in found.documents] == ["s:5", "s:1"]
    assert found.discarded == 2, "s:0 and gone:1"


def test_a_document_under_anothers_name_is_not_shown() -> None:
    found = authorise(who(S), ["s:b"], {"s:b": doc(S)}, Rules())
    assert (found.documents, found.discarded) == ((), 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"levels": ("public", "secret", "public")},
        {"levels": ("", "public")},
        {"barriers": frozenset({frozenset({M})})},
        {"barriers": frozenset({frozenset()})},
    ],
)
def test_rules_that_bind_nobody_or_two_ways_are_none(fields: dict[str, object]) -> None:
    with pytest.raises(Unfit):
        Rules(**fields)  # type: ignore[arg-type]


# ---- every sequence of changes


@dataclass
class Paper:
    readers: set[str] = field(default_factory=set)
    denied: set[str] = field(default_factory=set)
    level: str = "public"
    groups: set[str] = field(default_factory=set)
    broken: bool = False


@dataclass
class World:
    members: dict[str, tuple[str, str]] = field(default_factory=dict)  # user -> role, clearance
    groups: dict[str, set[str]] = field(default_factory=dict)  # user -> groups
    papers: dict[str, Paper] = field(default_factory=dict)
    barriers: set[tuple[str, str]] = field(default_factory=set)


def plain_rule(world: World, who: str, id: str) -> bool:
    """May `who` read it? No, unless every sentence below lets them."""
    paper = world.papers.get(id)
    if paper is None or paper.broken:
        return False
    if who not in world.members:
        return False
    _, clearance = world.members[who]
    if clearance not in LEVELS or paper.level not in LEVELS:
        return False
    if LEVELS.index(clearance) < LEVELS.index(paper.level):
        return False
    mine = world.groups.get(who, set())
    if who in paper.denied or any(g in paper.denied for g in mine):
        return False
    if who not in paper.readers and not any(g in paper.readers for g in mine):
        return False
    theirs = [*paper.groups, *[name for name in paper.readers if name.split(":")[0] == "group"]]
    for a, b in world.barriers:
        if a in mine and b in theirs:
            return False
        if b in mine and a in theirs:
            return False
    return True


USERS = [f"user:okta:{name}" for name in ("ann", "bob", "cid")]
GROUPS = [f"group:okta:{name}" for name in ("red", "blue", "green")]
IDS = [f"s:{n}" for n in range(4)]
users, groups, ids = st.sampled_from(USERS), st.sampled_from(GROUPS), st.sampled_from(IDS)
levels = st.sampled_from([*LEVELS, "cosmic", ""])
names = st.sets(st.sampled_from([*USERS, *GROUPS]), max_size=4)
denied = st.sets(st.sampled_from([*USERS, *GROUPS]), max_size=1)
papers = st.builds(Paper, names, denied, levels, st.sets(groups, max_size=1), st.just(False))


class Changes(RuleBasedStateMachine):
    """Whatever changes, in whatever order: what is shown is what the plain rule permits, and all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(papers=st.lists(papers, min_size=4, max_size=4))
    def documents(self, papers: list[Paper]) -> None:
        self.world.papers = dict(zip(IDS, papers, strict=True))
        self.world.members = dict.fromkeys(USERS, ("viewer", "secret"))

    @rule(who=users, role=st.sampled_from(["viewer", "editor", "admin", "owner"]), level=levels)
    def becomes_member(self, who: str, role: str, level: str) -> None:
        self.world.members[who] = (role, level)

    @rule(who=users)
    def leaves_workspace(self, who: str) -> None:
        self.world.members.pop(who, None)

    @rule(who=users, group=groups)
    def joins(self, who: str, group: str) -> None:
        self.world.groups.setdefault(who, set()).add(group)

    @rule(who=users, group=groups)
    def leaves(self, who: str, group: str) -> None:
        self.world.groups.get(who, set()).discard(group)

    @rule(id=ids, paper=papers)
    def is_ingested(self, id: str, paper: Paper) -> None:
        self.world.papers[id] = paper

    @rule(id=ids)
    def is_deleted(self, id: str) -> None:
        self.world.papers.pop(id, None)

    @rule(id=ids, broken=st.booleans())
    def is_broken_or_mended(self, id: str, broken: bool) -> None:
        if id in self.world.papers:
            self.world.papers[id] = replace(self.world.papers[id], broken=broken)

    @rule(pair=st.tuples(groups, groups).filter(lambda pair: pair[0] != pair[1]))
    def a_barrier_rises(self, pair: tuple[str, str]) -> None:
        self.world.barriers.add(pair)

    @rule()
    def barriers_fall(self) -> None:
        self.world.barriers.clear()

    @invariant()
    def shown_is_permitted(self) -> None:
        for who in USERS:
            shown = [one.id for one in self.ask(who).documents]
            assert shown == [id for id in IDS if plain_rule(self.world, who, id)]

    def ask(self, who: str) -> Cleared:
        world = self.world
        role, clearance = world.members.get(who, ("none", "secret"))
        identity = Identity("okta", who.split(":")[2], frozenset(world.groups.get(who, ())))
        found = authorise(
            Asker(identity, Role.of(role), clearance),
            [*IDS, "s:never"],
            {id: _document(id, paper) for id, paper in world.papers.items()},
            Rules(barriers=frozenset(frozenset(pair) for pair in world.barriers)),
        )
        assert found.discarded == 1 + len(IDS) - len(found.documents)
        return found


def _document(id: str, paper: Paper) -> Document:
    acl = Acl(frozenset(paper.readers), frozenset(paper.denied))
    problem = "broken" if paper.broken else ""
    return Document(id, "/srv", b"x", 1, "sha256:", acl, paper.level, frozenset(paper.groups), problem)


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
