"""Where names lead: what has to change in the kernel, and who is told when it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

import pytest

from egressd.ipc import messages
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Budgets, Ech, Guard, HostRule, Limits, Policy, Port, Protocol, Verify
from egressd.processes.names import Addresses, Admitting, Use, sites_of
from egressd.ruleset.layout import Kind, Mark, Pools
from egressd.ruleset.wants import NatEntry

ONE, TWO = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
SIX = IPv6Address("2001:db8::1")


def rule(host: str, *, private: bool = False) -> HostRule:
    return HostRule(host=host, ports=(), inspected=(), private=private, line=1)


def resolved(host: str, *addresses: IPv4Address, six: IPv6Address | None = SIX) -> messages.Resolved:
    slots = [addresses[i % len(addresses)] if addresses else None for i in range(4)]
    return messages.Resolved(request=1, host=host, private=False, slots4=tuple(slots), slots6=(six,) * 4)  # type: ignore[arg-type]


def ways(entries: Iterable[NatEntry]) -> dict[tuple[int, str], str | None]:
    return {(Mark.of(e.mark).workspace, e.synthetic): e.real for e in entries}


def test_a_name_nobody_uses_changes_nothing() -> None:
    assert Addresses(Pools()).learn(resolved("a.example", ONE)) == ()


def test_each_user_of_a_name_gets_its_own_ways() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example")), Use(2, 9, rule("a.example"))])
    entries = addresses.learn(resolved("a.example", ONE))
    assert len(entries) == 2 * 2 * 4
    assert ways(entries)[1, "198.18.0.20"] == ways(entries)[2, "198.18.0.36"] == "192.0.2.1"
    assert {Mark.of(e.mark).kind for e in entries} == {Kind.FORWARD}


def test_what_the_kernel_knows_is_not_said_again() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example"))])
    addresses.acknowledged(addresses.learn(resolved("a.example", ONE)))
    assert addresses.learn(resolved("a.example", ONE)) == ()
    changed = addresses.learn(resolved("a.example", ONE, TWO))
    assert ways(changed) == {(1, "198.18.0.21"): "192.0.2.2", (1, "198.18.0.23"): "192.0.2.2"}


def test_what_was_not_acknowledged_is_said_again() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example"))])
    first = addresses.learn(resolved("a.example", ONE))
    assert addresses.learn(resolved("a.example", ONE)) == first


def test_a_family_without_addresses_has_no_way() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example"))])
    entries = addresses.learn(resolved("a.example", ONE, six=None))
    assert all(":" not in e.synthetic for e in entries)
    addresses.acknowledged(entries)
    assert {e.real for e in addresses.learn(resolved("a.example", six=SIX)) if "." in e.synthetic} == {None}


def test_a_rule_that_goes_takes_its_ways_and_only_those() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example")), Use(1, 6, rule("b.example"))])
    for name in ("a.example", "b.example"):
        addresses.acknowledged(addresses.learn(resolved(name, ONE)))
    gone = addresses.use([Use(1, 6, rule("b.example"))])
    assert {e.real for e in gone} == {None} and len(gone) == 8
    assert all(Mark.of(e.mark).block == 5 for e in gone)
    addresses.acknowledged(gone)
    assert {Mark.of(e.mark).block for e in addresses.entries()} == {6}


def test_a_rule_that_comes_for_a_known_name_gets_its_ways_at_once() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example"))])
    addresses.acknowledged(addresses.learn(resolved("a.example", ONE)))
    fresh = addresses.use([Use(1, 5, rule("a.example")), Use(2, 7, rule("a.example"))])
    assert {Mark.of(e.mark).workspace for e in fresh} == {2} and len(fresh) == 8


def test_private_and_public_rules_of_one_name_do_not_mix() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example", private=True))])
    assert addresses.learn(resolved("a.example", ONE)) == ()


def test_a_name_joins_with_its_addresses_and_leaves_with_all_its_ways() -> None:
    addresses = Addresses(Pools())
    slots = ((ONE,) * 4, (SIX,) * 4)
    own, others = addresses.join((1, 5), rule("a.search.test"), slots)
    assert others == () and len(own) == 8 and {Mark.of(e.mark).block for e in own} == {5}
    addresses.acknowledged(own)
    assert addresses.join((1, 5), rule("a.search.test"), slots) == ((), ())
    nowhere = addresses.nowhere((1, 5), rule("a.search.test"))
    assert {(e.mark, e.synthetic) for e in nowhere} == {(e.mark, e.synthetic) for e in own}
    assert {e.real for e in nowhere} == {None}
    addresses.leave((1, 5), rule("a.search.test"))
    assert addresses.entries() == () and addresses.learned == {}
    assert addresses.learn(resolved("a.search.test", ONE)) == ()


def test_who_shares_a_name_follows_whoever_looked_last() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.search.test"))])
    addresses.acknowledged(addresses.learn(resolved("a.search.test", ONE)))
    own, others = addresses.join((2, 9), rule("a.search.test"), ((TWO,) * 4, (SIX,) * 4))
    assert {Mark.of(e.mark).workspace for e in own} == {2} and len(own) == 8
    assert {(Mark.of(e.mark).workspace, e.real) for e in others} == {(1, str(TWO))} and len(others) == 4
    addresses.acknowledged((*own, *others))
    addresses.leave((2, 9), rule("a.search.test"))
    assert {Mark.of(e.mark).workspace for e in addresses.entries()} == {1}
    assert addresses.of(rule("a.search.test")) == [str(TWO), str(SIX)]


def test_the_inspector_hears_of_ports_that_it_reads_and_of_no_others() -> None:
    read, unread = Port(443, Protocol.TCP), Port(8080, Protocol.TCP)
    inspected = HostRule(
        host="a.test",
        ports=(read, unread),
        inspected=((read, Verify.SNI),),
        private=False,
        line=1,
        ech=Ech.ALLOW,
    )
    policy = Policy(
        workspace="acme", guard=Guard.ENFORCE, members=(), residency=(), rules=(), limits=Limits(idle=600.0),
        wildcards=Budgets(), digest="",
    )  # fmt: skip
    assert list(sites_of(policy, 3, [(inspected, 5), (rule("b.test"), 6)])) == [
        messages.Site(workspace="acme", index=3, host="a.test", block=5, port=443, ech=True, idle=600.0)
    ]


def entry(number: int) -> NatEntry:
    mark = int(Mark(kind=Kind.FORWARD, workspace=1, block=number % 16_000))
    return NatEntry(mark, f"198.18.{number // 256}.{number % 256}", "192.0.2.1", "a.example")


def test_changes_that_arrive_together_travel_together() -> None:
    batches: list[int] = []

    async def write(entries: tuple[NatEntry, ...]) -> None:
        batches.append(len(entries))
        await asyncio.sleep(0)

    async def run() -> None:
        admitting = Admitting(write, lambda _: None)
        await asyncio.gather(*(admitting.admit((entry(number),)) for number in range(1000)))

    asyncio.run(run())
    assert sum(batches) == 1000 and len(batches) <= 4 and max(batches) <= 512


def test_a_refused_batch_is_told_to_all_who_wait_and_not_taken_for_granted() -> None:
    done: list[NatEntry] = []

    async def write(entries: tuple[NatEntry, ...]) -> None:
        raise Refused(Reason.UNAVAILABLE, "no warden")

    async def run() -> list[BaseException | None]:
        admitting = Admitting(write, done.extend)
        return await asyncio.gather(*(admitting.admit((entry(n),)) for n in range(3)), return_exceptions=True)

    outcomes = asyncio.run(run())
    assert [type(outcome) for outcome in outcomes] == [Refused] * 3
    assert done == []


@pytest.mark.parametrize("count", [1, 512, 513, 2000])
def test_no_batch_is_larger_than_a_message_may_be(count: int) -> None:
    batches: list[int] = []

    async def write(entries: tuple[NatEntry, ...]) -> None:
        batches.append(len(entries))

    asyncio.run(Admitting(write, lambda _: None).admit(tuple(entry(n) for n in range(count))))
    assert sum(batches) == count and max(batches) <= 512
