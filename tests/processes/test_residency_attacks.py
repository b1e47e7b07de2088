"""Attempts to make a pinned workspace lead outside: by time, by a resolver that somebody has taken over, by a
warden that dies or hangs in the middle. What counts is what the kernel was told last of each way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from controller_lab import World, world

from egressd.ipc import messages
from egressd.ipc.peer import Peer

DE4, US4, NOWHERE4 = "11.22.33.1", "11.22.35.1", "11.22.37.1"
PREFIXES = {"DE": "11.22.33.0/24 2a10:1::/32", "US": "11.22.35.0/24 2a10:3::/32"}
HEAD = "guard: enforce\nmembers: [user:4001]\n"
HOSTS = """\
allow:
  - {host: api.example.com, ports: [443/tcp]}
  - {host: cdn.example.com, ports: [443/tcp], vouch: "contract 4711"}
  - {host: '*.search.example.com', ports: [443/tcp], vouch: "contract 4712"}
"""
OPEN = f"{HEAD}{HOSTS}"
PINNED = f"{HEAD}residency: {{jurisdictions: [EU]}}\n{HOSTS}"
HOST = "api.example.com"
numbers = itertools.count(1)
Dialogue = Callable[[World, Any], Coroutine[Any, Any, None]]


def play(directory: Path, dialogue: Dialogue, *, acme: str = OPEN, **policies: str) -> None:
    async def scene() -> None:
        async with world(directory, acme=acme, **policies) as made:
            made.table("lab", **PREFIXES)
            await made.start()
            await dialogue(made, made.sandbox())

    asyncio.run(scene())


def shown(*addresses: str) -> dict[str, Any]:
    four, six = ([ip_address(a) for a in addresses if (":" in a) == want] for want in (False, True))
    return {
        f"slots{digit}": tuple(found[n % len(found)] if found else None for n in range(4))
        for digit, found in ((4, four), (6, six))
    }


def say(w: World, *addresses: str, host: str = HOST, terms: str = "", private: bool = False) -> Any:
    number = next(numbers)
    message = messages.Resolved(request=number, host=host, private=private, terms=terms, **shown(*addresses))
    return asyncio.ensure_future(w.ask(message))


def terms(w: World, workspace: str = "acme", host: str = HOST) -> str:
    policy = w.controller.policies[workspace]
    return w.controller.residency.terms(policy, next(rule for rule in policy.hosts if rule.host == host))


def kernel(w: World, workspace: str = "acme") -> set[str]:
    """Where names of a workspace lead, if the warden did everything that it was sent, in that order."""
    allocation = w.controller.remembered.allocation
    assert allocation is not None
    index = allocation.workspaces[workspace]
    led: dict[tuple[int, str], str | None] = {}
    for message in (m for _, m, _ in w.told if isinstance(m, messages.SetNat)):
        led |= {(e.mark, e.synthetic): e.real for e in message.entries if e.mark >> 14 & 0x1FFF == index}
    return {real for real in led.values() if real is not None}


def pin(w: World, workspace: str = "acme") -> Any:
    w.write(workspace, PINNED)
    return asyncio.ensure_future(w.controller.apply(by="test"))


def answer(w: World, message: Any) -> None:
    w.peers["warden"].send(messages.Done(request=message.request))


def test_a_warden_that_dies_while_a_pin_comes_takes_the_old_ways_along(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await say(w, US4)
        assert kernel(w) == {US4}
        w.slow.add(messages.SetNat)
        changing = pin(w)
        await w.settle()
        assert w.of(messages.SetNat)[-1].entries[0].real is None, "it was just being told"
        w.told.clear()
        w.disconnect("warden")
        with pytest.raises(Exception, match="ended"):
            await changing
        assert [r["change"] for r in w.records("policy-changed")], "it is in force, and on record"
        (names,) = (n for n in w.payload(messages.SetNames) if n.workspace == "acme")
        assert names.terms[HOST].startswith("EU "), "and the resolver has heard of it"
        w.slow.clear()
        w.connect("warden")
        await w.settle()
        assert w.of(messages.Settle) and kernel(w) == set(), "the new one is not told to lead there again"

    play(tmp_path, dialogue)


@pytest.mark.parametrize("answered", [True, False], ids=["late", "never"])
def test_what_the_warden_did_without_a_word_is_taken_back_when_a_pin_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """It hung for longer than anybody waits for it; then it does what it was told."""
    ask = Peer.ask

    async def impatient(self: Peer, message: Any, **more: Any) -> Any:
        if isinstance(message, messages.SetNat):
            more["timeout"] = 0.05
        return await ask(self, message, **more)

    monkeypatch.setattr(Peer, "ask", impatient)

    async def dialogue(w: World, _: Any) -> None:
        w.slow.add(messages.SetNat)
        refused = await say(w, US4)
        assert isinstance(refused, messages.Failed)
        (slow,) = w.of(messages.SetNat)
        w.slow.clear()
        if answered:
            answer(w, slow)
        assert kernel(w) == {US4}
        await pin(w)
        assert kernel(w) == set()

    play(tmp_path, dialogue)


def test_a_way_under_way_gives_way_to_what_another_pinned_workspace_has_of_the_name(tmp_path: Path) -> None:
    """The name leads to DE4 in a workspace that is pinned; this one has just been led from there to US4, when
    it is pinned as well."""

    async def dialogue(w: World, _: Any) -> None:
        await say(w, DE4, terms=terms(w, "beta"))
        await say(w, DE4)
        w.slow.add(messages.SetNat)
        moving = say(w, US4)
        await w.settle()
        slow = w.of(messages.SetNat)[-1]
        changing = pin(w)
        await w.settle()
        w.slow.clear()
        answer(w, slow)
        await asyncio.gather(moving, changing)
        assert kernel(w) == kernel(w, "beta") == {DE4}

    play(tmp_path, dialogue, beta=PINNED)


@pytest.mark.parametrize(
    "poison", ["127.0.0.1", "169.254.169.254", "10.1.2.3", "198.18.0.9", "64:ff9b::b16:2301"]
)
def test_a_resolver_cannot_keep_ways_open_by_asking_for_impossible_ones(tmp_path: Path, poison: str) -> None:
    """What the warden would refuse is remembered nowhere: it would be refused with each change of policy, and
    the change with it."""

    async def dialogue(w: World, _: Any) -> None:
        await say(w, US4)
        refused = await say(w, poison, host="cdn.example.com")
        assert isinstance(refused, messages.Failed) and refused.reason == "address"
        await pin(w)
        assert kernel(w) == kernel(w, "beta") == set()

    play(tmp_path, dialogue, beta=PINNED)


@pytest.mark.parametrize(
    "disguise",
    ["64:ff9b::b16:2301", "2002:b16:2301::1", "::ffff:11.22.35.1", "2001:0:4136:e378:8000:63bf:f4e9:dcfe"],
    ids=["NAT64", "6to4", "mapped", "Teredo"],
)
def test_what_no_table_places_is_no_way_around_one_that_does(tmp_path: Path, disguise: str) -> None:
    """11.22.35.1, which a table places in the US, inside an IPv6 address, which none places: a rule that
    vouches would let it be."""

    async def dialogue(w: World, sandbox: Any) -> None:
        held = terms(w, host="cdn.example.com")
        assert "vouched" in held
        assert not (await say(w, NOWHERE4, host="cdn.example.com", terms=held)).refused
        found = await say(w, disguise, host="cdn.example.com", terms=held)
        assert isinstance(found, messages.Failed) and found.reason == "address"
        grant = messages.GrantName(
            request=next(numbers), workspace="acme", link=sandbox.link.number,
            host="a.search.example.com", wildcard="*.search.example.com", **shown(disguise),
        )  # fmt: skip
        found = await w.ask(grant)
        assert isinstance(found, messages.Failed) and found.reason == "address"
        assert kernel(w) == {NOWHERE4} and w.of(messages.Grant) == []

    play(tmp_path, dialogue, acme=PINNED)


def test_other_terms_other_names_and_other_rights_lead_nowhere(tmp_path: Path) -> None:
    """What a resolver in other hands can say of names of a pinned workspace."""

    async def dialogue(w: World, _: Any) -> None:
        plain, vouched = terms(w), terms(w, host="cdn.example.com")
        for said in (
            say(w, US4), say(w, US4, terms=plain), say(w, US4, terms=vouched),
            say(w, NOWHERE4, terms=vouched),
            say(w, US4, terms=plain.replace("EU", "US")), say(w, US4, terms=plain + " "),
            say(w, US4, private=True), say(w, NOWHERE4, terms=vouched, private=True),
            say(w, US4, host="*.search.example.com"), say(w, US4, host="x.search.example.com", terms=vouched),
            say(w, US4, host="10.0.0.0/8"), say(w, US4, "2a10:3::1", terms=vouched, host="cdn.example.com"),
        ):  # fmt: skip
            await said
        assert kernel(w) == set() and kernel(w, "open") == {US4}, "only of the one that has no pin"
        w.told.clear()
        await w.controller.apply()
        assert kernel(w) == set(), "nor with the next change"

    play(tmp_path, dialogue, acme=PINNED, open=OPEN)


@pytest.mark.parametrize("who", ["inspector", "relay", "resolver"])
def test_connections_are_cut_before_anybody_can_delay_it(tmp_path: Path, who: str) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await say(w, US4)
        mark = w.of(messages.SetNat)[0].entries[0].mark
        w.flows["acme"] = [(mark, US4)]
        w.silent.add(who)
        changing = pin(w)
        await w.settle()
        assert not changing.done()
        assert [cut.flows for cut in w.of(messages.CutFlows)] == [((mark, US4),)]
        w.disconnect(who)
        await changing

    play(tmp_path, dialogue)


def test_what_could_not_be_cut_or_closed_is_tried_again_with_the_same_warden(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await say(w, US4)
        mark = w.of(messages.SetNat)[0].entries[0].mark
        w.flows["acme"] = [(mark, US4)]
        w.refusing |= {messages.SetNat, messages.CutFlows}
        with pytest.raises(Exception, match="no"):
            await pin(w)
        with pytest.raises(Exception, match="no"):
            await w.controller.make_good()
        assert len(w.records("flows-not-cut")) == 1, "told once"
        w.refusing.clear()
        w.told.clear()
        await w.controller.make_good()
        assert {e.real for m in w.of(messages.SetNat) for e in m.entries} == {None}
        assert [cut.flows for cut in w.of(messages.CutFlows)] == [((mark, US4),)]
        w.told.clear()
        await w.controller.make_good()
        assert w.order() == [], "and then it is good"

    play(tmp_path, dialogue)


def test_a_warden_that_comes_while_names_move_has_what_they_moved_to(tmp_path: Path) -> None:
    """What it is told of the past must not overtake what is found meanwhile."""

    async def dialogue(w: World, _: Any) -> None:
        held = terms(w)
        await say(w, "11.22.33.2", terms=held)
        w.disconnect("warden")
        await w.settle()
        w.slow |= {messages.SetWorkspaces, messages.SetNat}
        w.connect("warden")
        moving = say(w, DE4, terms=held)
        await w.settle()
        (first,) = w.of(messages.SetNat)[-1:]
        workspaces = w.of(messages.SetWorkspaces)[-1]
        answer(w, workspaces)
        await w.settle()
        w.slow.clear()
        answer(w, first)
        await moving
        await w.settle()
        assert w.of(messages.Settle) and kernel(w) == {DE4}
        assert {e.real for e in w.controller.addresses.entries()} == {DE4}
        assert not w.controller.addresses.in_doubt

    play(tmp_path, dialogue, acme=PINNED)
