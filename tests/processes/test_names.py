"""Where names lead: what has to change in the kernel, and who is told when it has."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

import msgspec
import pytest

from egressd.ipc import messages
from egressd.ipc.peer import PeerGone
from egressd.model.errors import EgressdError, Refused
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
        admitting = Admitting(write, lambda _: lambda: None)
        await asyncio.gather(*(admitting.admit((entry(number),)) for number in range(1000)))

    asyncio.run(run())
    assert sum(batches) == 1000 and len(batches) <= 4 and max(batches) <= 512


def test_a_refused_batch_is_told_to_all_who_wait_and_not_taken_for_granted() -> None:
    done: list[NatEntry] = []

    async def write(entries: tuple[NatEntry, ...]) -> None:
        raise Refused(Reason.UNAVAILABLE, "no warden")

    async def run() -> list[BaseException | None]:
        admitting = Admitting(write, lambda entries: lambda: done.extend(entries))
        return await asyncio.gather(*(admitting.admit((entry(n),)) for n in range(3)), return_exceptions=True)

    outcomes = asyncio.run(run())
    assert [type(outcome) for outcome in outcomes] == [Refused] * 3
    assert done == []


def test_one_way_that_is_refused_fails_nobody_elses() -> None:
    """Nor does a way that is to be closed stay open because of it."""
    poison, closing = entry(1), NatEntry(entry(2).mark, entry(2).synthetic, None, "a.example")
    done: list[NatEntry] = []

    async def write(entries: tuple[NatEntry, ...]) -> None:
        await asyncio.sleep(0)
        if poison in entries:
            raise Refused(Reason.ADDRESS, "nowhere")

    async def run() -> list[BaseException | None]:
        admitting = Admitting(write, lambda entries: lambda: done.extend(entries))
        wanted = ((entry(0),), (poison,), (closing,), (entry(3), poison))
        return await asyncio.gather(*map(admitting.admit, wanted), return_exceptions=True)

    outcomes = asyncio.run(run())
    assert [type(outcome) for outcome in outcomes] == [type(None), Refused, type(None), Refused]
    assert done == [entry(0), closing]


def test_what_was_sent_and_not_acknowledged_is_taken_back_with_its_rule() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example"))])
    addresses.sending(addresses.learn(resolved("a.example", ONE)))
    assert addresses.in_doubt and addresses.entries() == ()
    gone = addresses.use([])
    assert len(gone) == 8 and {e.real for e in gone} == {None}
    addresses.sending(gone)()
    assert not addresses.in_doubt and addresses.use([]) == ()


def test_while_one_way_is_on_its_way_another_is_sent_behind_it_though_the_kernel_has_it() -> None:
    addresses = Addresses(Pools())
    addresses.use([Use(1, 5, rule("a.example"))])
    addresses.sending(addresses.learn(resolved("a.example", ONE)))()
    moved = addresses.sending(addresses.learn(resolved("a.example", TWO)))
    back = addresses.learn(resolved("a.example", ONE))
    assert {e.real for e in back} == {str(ONE)} and len(back) == 4
    done = addresses.sending(back)
    moved()
    assert addresses.in_doubt, "the first word is not the last one"
    done()
    assert not addresses.in_doubt and {e.real for e in addresses.entries()} == {str(ONE), str(SIX)}


class Moody:
    """A warden that does what it is told in the order it is told, or refuses it; and that is waited for, or
    given up on before it is done."""

    def __init__(self, dice: random.Random) -> None:
        self._dice, self._hung = dice, list[tuple[NatEntry, ...]]()
        self.led: dict[tuple[int, str], str] = {}
        self.good = False  # from now on

    async def write(self, entries: tuple[NatEntry, ...]) -> None:
        mood = 1.0 if self.good else self._dice.random()
        if mood < 0.2:
            self._hung.append(entries)
            raise PeerGone("no reply")
        await asyncio.sleep(0)
        if mood < 0.4:
            raise Refused(Reason.UNAVAILABLE, "no")
        for one in (*self._hung, entries):
            for each in one:
                self.led.pop((each.mark, each.synthetic), None)
                if each.real is not None:
                    self.led[each.mark, each.synthetic] = each.real
        self._hung.clear()


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_warden_does_what_is_acknowledged_of_a_change_is_so(seed: int) -> None:
    """A name leads to ONE on the one set of terms, to TWO on the other, and workspaces change between them.
    Nobody leads where his terms do not, once the kernel has acknowledged the change."""
    dice = random.Random(seed)
    leads = {"any": TWO, "EU": ONE}

    async def run() -> None:
        addresses, warden = Addresses(Pools()), Moody(dice)
        admitting = Admitting(warden.write, addresses.sending)
        terms = {1: "any", 2: "EU"}

        async def tried(entries: tuple[NatEntry, ...]) -> bool:
            try:
                await admitting.admit(entries)
            except EgressdError:
                return False
            return True

        def wrong() -> list[str]:
            known = {w: str(leads[on]) for w, on in terms.items()}
            return [real for (mark, _), real in warden.led.items() if real != known[Mark.of(mark).workspace]]

        looking: list[asyncio.Future[bool]] = []
        for _ in range(40):
            if dice.random() < 0.4:
                workspace = dice.choice([1, 2])
                terms[workspace] = dice.choice(["any", "EU"])
                uses = [Use(w, 5 * w, rule("a.example"), on) for w, on in terms.items()]
                if await tried(addresses.use(uses)):
                    assert not wrong()
            else:
                on = dice.choice(["any", "EU"])
                found = msgspec.structs.replace(resolved("a.example", leads[on], six=None), terms=on)
                looking.append(asyncio.ensure_future(tried(addresses.learn(found))))
                await asyncio.sleep(0)
        await asyncio.gather(*looking)
        warden.good = True
        assert await tried(addresses.corrections()) and not wrong() and not addresses.in_doubt
        assert warden.led == {(e.mark, e.synthetic): e.real for e in addresses.entries()}

    asyncio.run(run())


@pytest.mark.parametrize("count", [1, 512, 513, 2000])
def test_no_batch_is_larger_than_a_message_may_be(count: int) -> None:
    batches: list[int] = []

    async def write(entries: tuple[NatEntry, ...]) -> None:
        batches.append(len(entries))

    asyncio.run(Admitting(write, lambda _: lambda: None).admit(tuple(entry(n) for n in range(count))))
    assert sum(batches) == count and max(batches) <= 512
