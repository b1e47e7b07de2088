"""Saying without libnftables that everything is as it should be: yes where it is, never where it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_network

import msgspec
import pytest
from guard_topology import ACME, POOLS, CidrRule, inspected, policy, tcp, udp

from egressd.kernel import namespaces
from egressd.kernel.dumps import Dumps
from egressd.kernel.nft import Nft
from egressd.kernel.spellings import Spellings
from egressd.model.errors import KernelError
from egressd.model.identities import Link
from egressd.ruleset import build, diff, observe, plan
from egressd.ruleset.allocate import allocate
from egressd.ruleset.build import Desired, LinkWant
from egressd.ruleset.layout import Kind, Mark
from egressd.ruleset.objects import Chain, Key
from egressd.ruleset.wants import NatEntry, WorkspaceWant

pytestmark = pytest.mark.kernel

RULES = (
    *ACME,
    inspected("read.test", tcp(443)),
    CidrRule(network=ip_network("10.9.0.0/16"), ports=(tcp(5), udp(5)), line=1),
    CidrRule(network=ip_network("2001:db8:9::7/128"), ports=(tcp(5),), line=1),
)
LINKS = (
    LinkWant(Link(1), "acme"),
    LinkWant(Link(2), "acme"),
    LinkWant(Link(3), "acme", quota=1000),
    LinkWant(Link(4), "acme", connections=5),
    LinkWant(Link(5), "acme", closed=True),
    LinkWant(Link(12), "acme", quota=7, connections=3),
)


@dataclass
class World:
    nft: Nft
    want: WorkspaceWant
    desired: Desired
    spellings: Spellings

    def right(self) -> bool:
        return self.spellings.right(self.desired)

    def planned(self) -> tuple[diff.Operation, ...]:
        return diff.plan(observe.parse(self.nft.list_json(), self.nft.list_chains()), self.desired)

    def learn(self) -> None:
        generation = self.spellings.generation()
        assert self.planned() == ()
        self.spellings.learn(self.desired, generation)

    def add(self, lease: LinkWant) -> None:
        self.nft.run(build.link(lease, self.want, POOLS))
        self.desired = dataclasses.replace(self.desired, links=(*self.desired.links, lease))


@pytest.fixture
def world() -> Iterator[World]:
    compiled = policy(*RULES)
    want = plan.want(compiled, allocate([compiled]), POOLS)
    element = next(each for each in want.elements if each.comment == "plain.test" and "." in each.address)
    mark = Mark.of(element.mark)
    assert mark.kind is Kind.FORWARD
    synthetic = str(POOLS.synthetic(mark.block, 0)[0])
    entry = NatEntry(element.mark, synthetic, "192.0.2.80", "plain.test")
    desired = Desired(pools=POOLS, wants={"acme": want}, nat={(element.mark, synthetic): entry})
    with namespaces.throw_away():
        nft = Nft()
        nft.run([*build.base(POOLS), *build.workspace(want, POOLS), *build.nat([entry], {})])
        made = World(nft, want, desired, Spellings(Dumps()))
        for lease in LINKS:
            made.add(lease)
        yield made


@pytest.fixture
def known(world: World) -> World:
    world.learn()
    return world


def test_nothing_is_known_before_libnftables_has_read_it(world: World) -> None:
    assert not world.right()
    world.learn()
    assert world.right()
    assert world.right(), "again"


def test_a_link_of_a_known_kind_is_known_and_another_is_not(known: World) -> None:
    known.add(LinkWant(Link(6), "acme", quota=99))
    assert known.right(), "as eg3, with another quota"
    known.add(LinkWant(Link(7), "acme", quota=1, connections=2))
    assert not known.right(), "as eg12, but nobody has read one whose name is as short"
    known.learn()
    known.add(LinkWant(Link(9), "acme", quota=1, connections=2))
    assert known.right()


def test_what_is_allowed_may_change_and_is_compared_with_what_it_should_be(known: World) -> None:
    less = msgspec.structs.replace(known.want, elements=known.want.elements[:-1])
    operations = diff.changes(known.want, less, pools=POOLS)
    known.nft.run(diff.commands(operations))
    assert not known.right()
    known.desired = dataclasses.replace(known.desired, wants={"acme": less})
    assert known.right()


def test_learnt_from_one_ruleset_is_not_said_of_another(world: World) -> None:
    generation = world.spellings.generation()
    assert world.planned() == ()
    world.nft.run(["add rule inet egressd forwarding accept"])
    world.spellings.learn(world.desired, generation)
    assert not world.right()


def test_a_ruleset_that_changes_while_it_is_read_is_not_known(
    known: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(100))
    monkeypatch.setattr(Dumps, "generation", lambda _: bytes([next(numbers)]))
    assert not known.right()


def guard_of(lease: LinkWant) -> tuple[str, ...]:
    compiled = policy(*RULES)
    things = build.link_objects(lease, plan.want(compiled, allocate([compiled]), POOLS), POOLS)
    guard = things[Key("netdev", "chain", lease.link.device)]
    assert isinstance(guard, Chain)
    return guard.rules


# What somebody may do who is root in the gateway: each is seen, by the one and by the other.
TAMPERED = {
    "a rule that lets everything through": ["insert rule netdev egressd eg1 accept"],
    "one more, behind": ["add rule netdev egressd eg2 accept"],
    "rules gone": ["flush chain netdev egressd eg3"],
    "all of a guard's rules of another link": [
        "flush chain netdev egressd eg1",
        *(f"add rule netdev egressd eg1 {rule}" for rule in guard_of(LINKS[1])),
    ],
    "a limit of connections gone": ["flush chain inet egressd eg2_connections"],
    "a rule of everybody's": ["insert rule inet egressd steer accept"],
    "a policy": ["add chain inet egressd forwarding { policy accept; }"],
    "a link's policy": ["add chain netdev egressd eg1 { policy accept; }"],
    "a chain nobody asked for": ["add chain inet egressd more"],
    "one that is called": ["add chain netdev egressd more", "add rule netdev egressd acme_4 jump more"],
    "a counter nobody asked for": ["add counter inet egressd more"],
    "a set nobody asked for": ["add set inet egressd more { type mark; }"],
    "another mark to be answered": ["add element inet egressd in { 0x80000001 }"],
    "a mark no longer answered": ["flush set inet egressd upstream"],
    "another way for a name": ["flush map inet egressd real4"],
    "a network no longer out of reach": ["delete element netdev egressd unreachable4 { 127.0.0.0/8 }"],
    "another network allowed": [
        "add element netdev egressd acme_cidr4 { 10.8.0.0/16 . tcp . 5 : 0x90000001 }"
    ],
    "networks no longer allowed": ["flush map netdev egressd acme_cidr4"],
    "a link that is not limited any more": ['delete element inet egressd connections { "eg4" }'],
    "a link that may be louder": [
        'delete element inet egressd noisy { "eg4" }',
        'add element inet egressd noisy { "eg4" limit rate over 51/second burst 200 packets comment "acme" }',
    ],
    "a quota": ["flush chain netdev egressd eg3", "delete quota netdev egressd eg3_quota"],
    "the table asleep": ["add table inet egressd { flags dormant; }"],
    "the guards asleep": ["add table netdev egressd { flags dormant; }"],
    "a whole table": ["delete table netdev egressd"],
    "everything": ["flush ruleset"],
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_what_somebody_changes_is_not_right(known: World, what: str) -> None:
    known.nft.run(TAMPERED[what])
    if "asleep" in what:
        with pytest.raises(KernelError, match="cannot be listed"):
            known.planned()
    else:
        assert known.planned(), "libnftables sees it"
    assert not known.right()


def test_what_stands_in_braces_is_part_of_a_rule(known: World) -> None:
    """Its set may get the name again that the one before it had, and the rule the same bytes."""
    known.nft.run(["flush chain inet egressd local_out"])
    assert not known.right()
    key = Key("inet", "chain", "local_out")
    chain = build.desired(known.desired)[key]
    assert isinstance(chain, Chain)
    for changed in (True, False):
        rules = [rule.replace("packet-too-big", "echo-request") if changed else rule for rule in chain.rules]
        assert (tuple(rules) != chain.rules) is changed
        known.nft.run(["flush chain inet egressd local_out"])
        known.nft.run([f"add rule inet egressd local_out {rule}" for rule in rules])
        assert bool(known.planned()) is changed
        if changed:
            assert not known.right()
    # the same rules again are right; whether that can be said depends on the names that the sets got


def test_another_quota_or_budget_is_seen(known: World) -> None:
    for number, changed in ((3, {"quota": 1001}), (4, {"connections": 6})):
        others = tuple(lease for lease in LINKS if lease.link.number != number)
        (one,) = (lease for lease in LINKS if lease.link.number == number)
        wanted = dataclasses.replace(one, **changed)  # type: ignore[arg-type]
        assert not known.spellings.right(dataclasses.replace(known.desired, links=(*others, wanted)))
    assert known.right()


def test_a_link_that_should_not_be_there_or_is_missing(known: World) -> None:
    assert not known.spellings.right(dataclasses.replace(known.desired, links=LINKS[1:]))
    more = dataclasses.replace(known.desired, links=(*LINKS, LinkWant(Link(8), "acme")))
    assert not known.spellings.right(more)
    other = dataclasses.replace(known.desired, links=(*LINKS[1:], LinkWant(Link(1), "acme", closed=True)))
    assert not known.spellings.right(other), "a link that should be closed"


def test_a_workspace_with_a_links_name_in_its_own_is_left_to_libnftables(world: World) -> None:
    compiled = policy(*ACME, workspace="leeg1")
    want = plan.want(compiled, allocate([policy(*RULES), compiled]), POOLS)
    world.nft.run(build.workspace(want, POOLS))
    lease = LinkWant(Link(1), "leeg1")
    world.nft.run([*build.unlink(Link(1)), *build.link(lease, want, POOLS)])
    wants = {**world.desired.wants, "leeg1": want}
    world.desired = dataclasses.replace(world.desired, wants=wants, links=(*LINKS[1:], lease))
    world.learn()
    assert not world.right()
