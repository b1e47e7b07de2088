"""Names of wildcards: patterns as a table, the machine as dialogues, and every interleaving as a game."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from egressd.dns import keeper, wildcards, wire
from egressd.dns.book import Book, Command
from egressd.dns.budgets import Spent
from egressd.dns.keeper import Family, Finding, Standing, State
from egressd.dns.replies import Failure, Reply
from egressd.dns.slots import EMPTY, assign
from egressd.dns.table import Denied, Wait, WorkspaceNames
from egressd.dns.wildcards import (
    INHERITED,
    LINGER,
    REMEMBERED,
    Absent,
    Admitted,
    Ask,
    Cover,
    Dropped,
    Failed,
    Grant,
    Patterns,
    Pending,
    Release,
    Settled,
    Wildcards,
)
from egressd.model.addresses import Address, ip_network
from egressd.model.names import covering
from egressd.policy.compiled import Budget, Budgets
from egressd.ruleset.layout import Pools

POOLS = Pools()
WIDE = Budget(names=10**6, bytes=10**9, rate=10**6)
REAL: Address = ip_address("93.184.215.14")
GOOD = Standing(State.KNOWN, Family(assign(EMPTY, [REAL])[0]), ttl=60)
GONE = Standing(State.KNOWN, exists=False, ttl=60)
LOST = Standing(State.FAILED, failure=Failure(22, "nobody answered"))


# ---- patterns

BOTH = {"*.a.example": False, "**.a.example": True, "**.example.org": False, "*.x.b.example.org": True}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("www.a.example", ("*.a.example", False, 3)),
        ("x.www.a.example", ("**.a.example", True, 5)),
        ("a.example", None),
        ("example", None),
        ("wwwa.example", None),
        ("www.a.example.evil.net", None),
        ("b.example.org", ("**.example.org", False, 1)),
        ("x.b.example.org", ("**.example.org", False, 3)),
        ("1.x.b.example.org", ("*.x.b.example.org", True, 1)),
        ("1.2.x.b.example.org", ("**.example.org", False, 7)),
        ("example.org", None),
        ("", None),
        ("_a.a.example", None),
        (".a.example", None),
        ("a..a.example", None),
        ("-a.a.example", None),
        ("a-.a.example", None),
        ("A.a.example", None),  # not canonical: nobody asks so
        (r"a\032b.a.example", None),
        ("x" * 63 + ".a.example", ("*.a.example", False, 63)),
        ("x" * 64 + ".a.example", None),
        (".".join(["x" * 61] * 4) + ".a.example", None),  # 257 characters
    ],
)
def test_the_most_specific_wildcard(name: str, expected: tuple[str, bool, int] | None) -> None:
    assert Patterns(BOTH).match(name) == (Cover(*expected) if expected else None)


LABEL = st.sampled_from("abc")


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["*", "**"]), st.lists(LABEL, min_size=2, max_size=3)).map(
            lambda parts: ".".join([parts[0], *parts[1]])
        ),
        st.booleans(),
    ),
    st.lists(LABEL, min_size=1, max_size=6).map(".".join),
)
def test_it_is_the_one_that_policy_means(listed: dict[str, bool], name: str) -> None:
    """`policy.decide.rule_for` walks `covering`: first the name itself, then wildcards."""
    expected = next((pattern for pattern in covering(name) if pattern in listed), None)
    cover = Patterns(listed).match(name)
    assert (cover.pattern if cover else None) == expected


# ---- the machine


class Talk:
    """The machine, a clock, and the serials it gave out."""

    def __init__(self, *, names: int = 100, granted: dict[str, tuple[int, bool]] | None = None) -> None:
        self.machine, self.now = Wildcards(), 1000.0
        self.budgets = Budgets(WIDE, Budget(names=names, bytes=10**9, rate=10**6))
        self.serials: dict[str, int] = {}
        self.list(granted=granted)

    def list(
        self,
        *,
        patterns: dict[str, bool] | None = None,
        granted: dict[str, tuple[int, bool]] | None = None,
        exact: frozenset[str] = frozenset(),
    ) -> list[Any]:
        self.patterns = {"*.example.com": False} if patterns is None else patterns
        return self.heard(
            self.machine.set_list(
                "acme",
                wildcards=self.patterns,
                budgets=self.budgets,
                granted=granted or {},
                exact=exact,
                now=self.now,
            )
        )

    def ask(self, host: str, link: int = 1) -> tuple[Any, list[Any]]:
        cover = Patterns(self.patterns).match(host)
        assert cover is not None
        verdict, commands = self.machine.asked("acme", link, host, cover, now=self.now)
        return verdict, self.heard(commands)

    def looked(self, host: str, standing: Standing = GOOD) -> list[Any]:
        return self.heard(self.machine.looked("acme", host, self.serials[host], standing, now=self.now))

    def granted(self, host: str, block: int = 7) -> list[Any]:
        return self.heard(self.machine.granted("acme", host, self.serials[host], block, now=self.now))

    def withheld(self, host: str) -> list[Any]:
        return self.heard(self.machine.withheld("acme", host, self.serials[host], "no kernel", now=self.now))

    def heard(self, commands: list[Any]) -> list[Any]:
        for command in commands:
            if isinstance(command, Ask | Grant):
                self.serials[command.host] = command.serial
        return commands

    def get(self, host: str, link: int = 1, block: int = 7) -> None:
        self.ask(host, link)
        self.looked(host)
        self.granted(host, block)


A, B, C = "a.example.com", "b.example.com", "c.example.com"


def settled(host: str) -> Settled:
    return Settled(Pending("acme", host))


def kinds(commands: list[Any]) -> list[type]:
    return [type(c) for c in commands]


@pytest.mark.parametrize("way", ["withheld", "barred"])
def test_what_was_granted_and_then_refused_because_it_was_asked_again_is_given_back(way: str) -> None:
    talk = Talk()
    talk.ask(A)
    talk.looked(A)
    talk.list()
    assert kinds(talk.granted(A)) == [Grant], "which list was that about?"
    serial = talk.serials[A]
    if way == "withheld":
        commands = talk.withheld(A)[1:]
    else:
        commands = talk.machine.barred("acme", A, serial, "it is in us-east-1 (US)", now=talk.now)
    assert commands == [Release("acme", (A,)), settled(A)]
    assert talk.machine.released("acme", [A]) == [settled(A)]
    assert talk.machine.sizes("acme")["held"] == 0


def test_from_question_to_answer() -> None:
    talk = Talk()
    assert talk.ask(A) == (Pending("acme", A), [Ask("acme", A, False, 1)])
    assert talk.ask(A, link=2) == (Pending("acme", A), [])  # shared
    assert talk.looked(A) == [Grant("acme", 1, A, "*.example.com", GOOD, 2)]
    assert talk.machine.granted_in("acme") == {}
    assert talk.ask(A, link=3) == (Pending("acme", A), [])
    assert talk.granted(A) == [Admitted("acme", A, 7, False, GOOD, 1000.0), settled(A)]
    assert talk.machine.granted_in("acme") == {A: (7, False, "")}


@pytest.mark.parametrize(
    ("standing", "outcome"),
    [
        (GONE, Absent(False, 60)),
        (Standing(State.KNOWN, ttl=30), Absent(True, 30)),
        (LOST, Failed(Failure(22, "nobody answered"))),
    ],
)
def test_no_address_is_remembered_and_nothing_granted(standing: Standing, outcome: object) -> None:
    talk = Talk()
    talk.ask(A)
    assert talk.looked(A, standing) == [settled(A)]
    assert talk.ask(A) == (outcome, [])
    assert talk.ask(A, link=2) == (outcome, [])
    assert talk.machine.sizes("acme")["held"] == 0


@pytest.mark.parametrize(("ttl", "kept"), [(0.0, 5.0), (30.0, 30.0), (10.0**9, 3600.0)])
def test_negative_ttls_are_bounded_both_ways(ttl: float, kept: float) -> None:
    talk = Talk()
    talk.ask(A)
    talk.looked(A, Standing(State.KNOWN, exists=False, ttl=ttl))
    assert talk.ask(A)[0] == Absent(False, kept)
    talk.now += kept
    assert kinds(talk.ask(A)[1]) == [Ask]


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    talk = Talk()
    for number in range(REMEMBERED + 50):
        host = f"n{number}.example.com"
        talk.ask(host)
        talk.looked(host, GONE)
    assert talk.machine.sizes("acme") == {"held": 0, "remembered": REMEMBERED, "queue": 0, "sandboxes": 1}
    assert kinds(talk.ask("n0.example.com")[1]) == [Ask]
    assert talk.ask("n60.example.com")[1] == []


def test_withheld_is_a_failure_for_a_second() -> None:
    talk = Talk()
    talk.ask(A)
    talk.looked(A)
    note, done = talk.withheld(A)
    assert (note.event, done) == ("dns-withheld", settled(A))
    assert talk.ask(A)[0] == Failed(Failure(14, f"{A} is not admitted: no kernel"))
    talk.now += 1
    assert kinds(talk.ask(A)[1]) == [Ask]


def test_answers_to_other_questions_change_nothing() -> None:
    talk = Talk()
    talk.ask(A)
    for serial in (0, 2):
        assert talk.machine.looked("acme", A, serial, GOOD, now=0) == []
    assert talk.machine.looked("zeta", A, 1, GOOD, now=0) == []
    assert talk.machine.granted("acme", A, 1, 7, now=0) == []
    assert talk.machine.withheld("acme", A, 1, "", now=0) == []
    assert talk.machine.released("acme", [A]) == []
    talk.looked(A)
    assert talk.looked(A) == []
    talk.granted(A)
    assert talk.granted(A) == []
    assert talk.withheld(A) == []


def test_nothing_is_granted_for_sandboxes_that_have_ended() -> None:
    talk = Talk()
    talk.ask(A)
    talk.ask(A, link=2)
    talk.machine.ended(1, now=talk.now)
    assert talk.looked(A)[0].link == 2
    talk.ask(B)
    talk.machine.ended(1, now=talk.now)
    assert talk.looked(B) == [settled(B)]
    assert talk.machine.sizes("acme")["held"] == 1


def test_the_last_one_out_starts_the_clock() -> None:
    talk = Talk()
    talk.get(A)
    talk.machine.used("acme", 2, A)
    talk.machine.ended(1, now=talk.now)
    assert talk.machine.next_due() is None
    talk.machine.ended(2, now=talk.now)
    assert talk.machine.next_due() == talk.now + LINGER
    assert talk.machine.tick(now=talk.now + LINGER - 0.1) == []
    assert talk.machine.tick(now=talk.now + LINGER) == [Dropped("acme", A, 7, False), Release("acme", (A,))]
    assert talk.machine.granted_in("acme") == {}
    assert talk.ask(A, link=3) == (Pending("acme", A), [])  # not before it has been taken back
    assert talk.machine.released("acme", [A]) == [settled(A)]
    assert kinds(talk.ask(A, link=3)[1]) == [Ask]


def test_used_again_it_lingers_no_more() -> None:
    talk = Talk()
    talk.get(A)
    talk.machine.ended(1, now=talk.now)
    talk.machine.used("acme", 2, A)
    assert talk.machine.tick(now=talk.now + LINGER) == []
    talk.machine.ended(2, now=talk.now + 1000)
    assert talk.machine.tick(now=talk.now + 1000 + LINGER - 1) == []
    assert kinds(talk.machine.tick(now=talk.now + 1000 + LINGER)) == [Dropped, Release]


def test_granted_after_its_sandbox_ended_it_lingers() -> None:
    talk = Talk()
    talk.ask(A)
    talk.looked(A)
    talk.machine.ended(1, now=talk.now)
    assert kinds(talk.granted(A)) == [Admitted, Settled]
    assert kinds(talk.machine.tick(now=talk.now + LINGER)) == [Dropped, Release]


def test_many_are_given_back_in_batches() -> None:
    talk = Talk(names=1000)
    for number in range(300):
        talk.get(f"n{number}.example.com", block=number + 1)
    talk.machine.ended(1, now=talk.now)
    given = [c for c in talk.machine.tick(now=talk.now + LINGER) if isinstance(c, Release)]
    assert [len(r.hosts) for r in given] == [256, 44]


def test_what_is_not_taken_back_is_tried_again() -> None:
    talk = Talk()
    talk.get(A)
    talk.machine.ended(1, now=talk.now)
    talk.machine.tick(now=talk.now + LINGER)
    talk.machine.kept("acme", [A], now=2000)
    assert talk.machine.granted_in("acme") == {}
    assert talk.machine.tick(now=2000 + LINGER) == [Release("acme", (A,))]


def test_room_is_made_by_who_has_lingered_longest_and_waited_for() -> None:
    talk = Talk(names=2)
    talk.get(A, link=1, block=7)
    talk.get(B, link=2, block=8)
    assert isinstance(talk.ask(C, link=3)[0], Spent)
    talk.machine.ended(2, now=talk.now)
    talk.machine.ended(1, now=talk.now)
    pending, commands = talk.ask(C, link=3)
    assert pending == Pending("acme", C)
    assert commands == [Dropped("acme", B, 8, False), Release("acme", (B,)), Ask("acme", C, False, 5)]
    assert talk.looked(C) == []  # the controller still has two
    assert talk.heard(talk.machine.released("acme", [B])) == [
        settled(B),
        Grant("acme", 3, C, "*.example.com", GOOD, 6),
    ]


# ---- another list


def test_a_list_that_says_the_same_changes_nothing() -> None:
    talk = Talk()
    talk.get(A)
    assert talk.list(granted={A: (7, False)}) == []
    assert talk.machine.granted_in("acme") == {A: (7, False, "")}


@pytest.mark.parametrize(
    ("patterns", "granted", "exact"),
    [
        ({}, {}, frozenset()),
        ({"*.example.com": False}, {}, frozenset()),  # the controller does not have it any more
        ({"*.example.com": True}, {A: (7, False)}, frozenset()),
        ({"*.example.com": False}, {A: (7, False)}, frozenset({A})),
    ],
)
def test_a_granted_name_that_is_no_more(patterns: Any, granted: Any, exact: Any) -> None:
    talk = Talk()
    talk.get(A)
    assert talk.list(patterns=patterns, granted=granted, exact=exact) == [
        Dropped("acme", A, 7, False),
        settled(A),
    ]
    assert talk.machine.granted_in("acme") == {}


def test_another_block_is_another_grant() -> None:
    talk = Talk()
    talk.get(A)
    assert talk.list(granted={A: (9, False)}) == [Dropped("acme", A, 7, False), settled(A), settled(A)]
    assert talk.machine.granted_in("acme") == {A: (9, False, "")}


def test_the_list_changes_while_upstream_is_asked() -> None:
    talk = Talk()
    talk.ask(A)
    assert talk.list(patterns={}) == [settled(A)]
    assert talk.looked(A) == []


@pytest.mark.parametrize("listed", [{}, {A: (7, False)}])
def test_the_list_changes_while_the_controller_is_asked_and_still_covers_it(listed: Any) -> None:
    talk = Talk()
    talk.ask(A)
    talk.looked(A)
    first = talk.serials[A]
    assert talk.list(granted=listed) == []
    (again,) = talk.granted(A)
    assert (type(again), again.serial > first) == (Grant, True)
    assert talk.machine.granted("acme", A, first, 7, now=talk.now) == []
    assert kinds(talk.granted(A)) == [Admitted, Settled]


def test_the_list_changes_while_the_controller_is_asked_and_covers_it_no_more() -> None:
    talk = Talk()
    talk.ask(A)
    talk.looked(A)
    talk.list(patterns={})
    assert talk.granted(A) == [Release("acme", (A,)), settled(A)]
    assert talk.machine.granted_in("acme") == {}
    assert talk.machine.released("acme", [A]) == [settled(A)]
    assert talk.machine.sizes("acme")["held"] == 0


def test_what_is_remembered_goes_with_the_wildcards_it_was_found_by() -> None:
    talk = Talk()
    talk.ask(A)
    talk.looked(A, GONE)
    talk.list()
    assert talk.ask(A)[1] == []
    talk.list(patterns={"*.example.com": True})
    assert kinds(talk.ask(A)[1]) == [Ask]


def test_a_new_process_learns_what_is_granted_and_keeps_it_for_a_day() -> None:
    talk = Talk(granted={A: (7, False), "x.other.example": (8, False), B: (9, True)})
    assert talk.machine.granted_in("acme") == {A: (7, False, "")}  # others no wildcard here covers
    assert talk.machine.next_due() == talk.now + INHERITED
    talk.machine.used("acme", 1, A)
    talk.machine.ended(1, now=talk.now)
    assert talk.machine.next_due() == talk.now + LINGER


def test_a_workspace_that_goes_takes_all_with_it() -> None:
    talk = Talk()
    talk.get(A)
    assert talk.machine.keep_only({"acme"}) == []
    assert talk.machine.keep_only({"zeta"}) == [Dropped("acme", A, 7, False), settled(A)]
    assert talk.machine.sizes("acme") == {}
    talk.machine.ended(1, now=0)
    assert talk.machine.next_due() is None


def test_one_workspace_cannot_push_out_anothers() -> None:
    talk = Talk(names=2)
    talk.get(A)
    machine = talk.machine
    other = {"*.example.com": False}
    machine.set_list("zeta", wildcards=other, budgets=talk.budgets, granted={}, exact=(), now=talk.now)
    for number in range(REMEMBERED * 2):
        host = f"n{number}.example.com"
        _, commands = machine.asked("zeta", 9, host, Cover("*.example.com", False, 3), now=talk.now)
        (ask,) = [c for c in commands if isinstance(c, Ask)]
        machine.looked("zeta", host, ask.serial, GONE, now=talk.now)
    assert machine.granted_in("acme") == {A: (7, False, "")}


def test_a_sandbox_that_ended_while_it_waited_asks_for_nothing() -> None:
    book = Book(pools=POOLS)
    book.set_names([WorkspaceNames(workspace="acme", guard="enforce", wildcards=COM)], now=0)
    book.began(1, "acme")
    query = wire.Query(1, wire.labels_of(A), A, 1, 1, True, False, None)
    book.ended(1, now=0)
    decision, commands = book.answer(1, "acme", query, now=0)
    assert isinstance(decision, Reply)
    assert (decision.rcode, commands) == (5, [])
    assert book.wildcards.sizes("acme")["sandboxes"] == 0


@pytest.mark.parametrize("qtype", [1, 28, 16, 255])
def test_answers_about_such_names_are_for_who_asked_alone(qtype: int) -> None:
    """Others who were given the same bytes unasked would not count as using the name."""
    book = Book(pools=POOLS)
    names = WorkspaceNames(workspace="acme", guard="enforce", wildcards=COM, granted={A: (7, False)})
    (ask,) = [c for c in book.set_names([names], now=0) if isinstance(c, keeper.Ask)]
    (admit,) = book.found(ask.target, (Finding((REAL,), 60), Finding(ttl=60)), now=0)
    assert isinstance(admit, keeper.Admit)
    book.admitted(admit.target, admit.serial)
    book.began(1, "acme")
    for host in (A, B):
        query = wire.Query(1, wire.labels_of(host), host, qtype, 1, True, False, None)
        decision, _ = book.answer(1, "acme", query, now=0)
        if isinstance(decision, Reply):
            assert not decision.shared
        else:
            assert (host, qtype in (1, 28)) == (B, True)


# ---- every interleaving

HOSTS = [A, B, C, "d.example.org", "e.example.org"]
COM, ORG = {"*.example.com": False}, {"**.example.org": False}
LISTS = [COM, ORG, COM | ORG]
TIGHT = Budgets(Budget(names=4, bytes=30, rate=50), Budget(names=2, bytes=200, rate=50))


class Game(RuleBasedStateMachine):
    """The book, with everything that is under way in a bag from which anything may happen next.

    The controller of the game has granted what it said so, whether or not that has been heard."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Book(pools=POOLS, own=(ip_network("198.18.0.0/16"),))
        self.now = 0.0
        self.bag: list[Command] = []
        self.acknowledgements: list[tuple[Grant, int]] = []
        self.held: dict[str, int] = {}
        self.blocks: dict[str, int] = {}
        self.live: set[int] = set()
        self.links = 0

    @initialize()
    def begin(self) -> None:
        self.relist(LISTS[2])
        self.start()

    def do(self, commands: list[Command]) -> None:
        self.bag += [
            c for c in commands if not isinstance(c, wildcards.Settled | keeper.Settled | keeper.Note)
        ]

    @rule()
    def start(self) -> None:
        self.links += 1
        self.live.add(self.links)
        self.book.began(self.links, "acme")

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from(sorted(self.live)))
        self.live.discard(link)
        self.do(self.book.ended(link, now=self.now))

    @rule(seconds=st.sampled_from([0.1, 3.0, 61.0, 601.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.book.tick(now=self.now))

    @rule(listed=st.sampled_from([{}, *LISTS]))
    def relist(self, listed: dict[str, bool]) -> None:
        patterns = Patterns(listed)
        self.held = {host: block for host, block in self.held.items() if patterns.match(host)}
        names = WorkspaceNames(
            workspace="acme",
            guard="enforce",
            wildcards=listed,
            granted={host: (block, False) for host, block in self.held.items()},
            budgets=TIGHT,
        )
        self.do(self.book.set_names([names], now=self.now))
        self.patterns = patterns

    @precondition(lambda self: self.live)
    @rule(data=st.data(), host=st.sampled_from(HOSTS))
    def ask(self, data: st.DataObject, host: str) -> None:
        link = data.draw(st.sampled_from(sorted(self.live)))
        labels = wire.labels_of(host)
        query = wire.Query(1, labels, host, 1, 1, True, False, None)
        decision, commands = self.book.answer(link, "acme", query, now=self.now)
        self.do(commands)
        assert isinstance(decision, Reply | Denied | Wait)
        if isinstance(decision, Reply) and decision.addresses:
            block = POOLS.block_of(decision.addresses[0])
            assert block is not None
            assert self.held.get(host) == block[0]  # answered, so granted and acknowledged

    @precondition(lambda self: self.bag)
    @rule(data=st.data(), good=st.booleans(), address=st.booleans())
    def happen(self, data: st.DataObject, good: bool, address: bool) -> None:
        command = self.bag.pop(data.draw(st.integers(0, len(self.bag) - 1)))
        found = Finding((REAL,) if address else (), 60, exists=address)
        match command:
            case keeper.Ask(target):
                self.do(self.book.found(target, (found, Finding(ttl=60)), now=self.now))
            case wildcards.Ask():
                self.do(self.book.looked(command, (found, Finding(ttl=60)), now=self.now))
            case keeper.Admit(target, serial=serial) if good:
                self.do(self.book.admitted(target, serial))
            case keeper.Admit(target, serial=serial):
                self.do(self.book.withheld(target, serial, "no", now=self.now))
            case wildcards.Release() if good:
                for host in command.hosts:
                    self.held.pop(host, None)
                self.do(self.book.released(command, now=self.now))
            case wildcards.Release():
                self.do(self.book.kept(command, now=self.now))
            case wildcards.Grant():
                self._grant(command, good)

    def _grant(self, grant: Grant, good: bool) -> None:
        if not good or not self.patterns.match(grant.host):
            self.do(self.book.refused(grant, "no", now=self.now))
            return
        block = self.blocks.setdefault(grant.host, len(self.blocks) + 1)
        self.held[grant.host] = block
        self.acknowledgements.append((grant, block))

    @precondition(lambda self: self.acknowledgements)
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.acknowledgements) - 1))
        grant, block = self.acknowledgements.pop(at)
        self.do(self.book.granted(grant, block, now=self.now))

    @invariant()
    def budgets_hold(self) -> None:
        sizes = self.book.wildcards.sizes("acme")
        if sizes:
            assert sizes["held"] <= TIGHT.workspace.names
            assert sizes["sandboxes"] <= len(self.live)
            assert sizes["remembered"] <= REMEMBERED
        assert len(self.held) <= TIGHT.workspace.names

    @invariant()
    def tables_agree(self) -> None:
        if "acme" in self.book.tables:
            table = self.book.tables["acme"]
            assert table.granted == self.book.wildcards.granted_in("acme")
            assert set(table.by_block) == {block for block, *_ in table.granted.values()}
            assert len(self.book.keeper) == len(table.granted)

    def teardown(self) -> None:
        """Nothing is left when the sandboxes have ended and everything under way has come to its end."""
        for link in sorted(self.live):
            self.do(self.book.ended(link, now=self.now))
        for _ in range(200):
            while self.acknowledgements:
                grant, block = self.acknowledgements.pop()
                self.do(self.book.granted(grant, block, now=self.now))
            if not self.bag and not self.acknowledgements:
                self.now += INHERITED
                self.do(self.book.tick(now=self.now))
            if not self.bag:
                break
            self._settle(self.bag.pop())
        assert (self.held, len(self.book.keeper)) == ({}, 0)
        assert self.book.wildcards.sizes("acme").get("held", 0) == 0

    def _settle(self, command: Command) -> None:
        found = (Finding((REAL,), 60), Finding(ttl=60))
        match command:
            case keeper.Ask(target):
                self.do(self.book.found(target, found, now=self.now))
            case wildcards.Ask():
                self.do(self.book.looked(command, found, now=self.now))
            case keeper.Admit(target, serial=serial):
                self.do(self.book.admitted(target, serial))
            case wildcards.Grant():
                self._grant(command, True)
            case wildcards.Release():
                for host in command.hosts:
                    self.held.pop(host, None)
                self.do(self.book.released(command, now=self.now))


TestGame = Game.TestCase
TestGame.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
