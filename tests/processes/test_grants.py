"""Names of wildcards: recorded, then admitted, then answered; and taken back again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_lab import World, world

from egressd.ipc import messages
from egressd.ruleset.layout import Kind, Mark

FOUR, SIX = IPv4Address("11.22.33.40"), IPv6Address("2a10:5353::40")
POLICY = """\
guard: enforce
members: [user:4001]
wildcards: {workspace: {names: 3}}
allow:
  - {host: '*.search.test', ports: [443/tcp, 8080/tcp]}
  - {host: '**.deep.test', ports: [7/tcp, 7/udp], verify: address}
  - {host: exact.search.test, ports: [443/tcp]}
"""
numbers = itertools.count(1)
Dialogue = Callable[[World, Any], Coroutine[Any, Any, None]]


def slots(address: Any) -> Any:
    return (address,) * 4


def grant(
    host: str, *, link: int, wildcard: str = "*.search.test", workspace: str = "acme", four: Any = FOUR
) -> messages.GrantName:
    return messages.GrantName(
        request=next(numbers),
        workspace=workspace,
        link=link,
        host=host,
        wildcard=wildcard,
        slots4=slots(four),
        slots6=slots(SIX),
    )


def release(*hosts: str) -> messages.ReleaseNames:
    return messages.ReleaseNames(request=next(numbers), workspace="acme", hosts=hosts)


def play(directory: Path, dialogue: Dialogue, policy: str = POLICY) -> None:
    """A world with a sandbox in it, and what happens there."""

    async def scene() -> None:
        async with world(directory, acme=policy, beta=policy) as made:
            await made.start()
            await dialogue(made, made.sandbox())

    asyncio.run(scene())


def test_recorded_then_admitted_then_inspected_then_answered(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await w.ask(grant("a.search.test", link=sandbox.link.number))
        assert isinstance(answer, messages.Granted), answer
        assert w.order() == ["journal name-granted", "warden Grant", "inspector AddSites"]
        (said,) = w.of(messages.Grant)
        marks = {Mark.of(e.mark) for e in said.elements}
        assert {mark.block for mark in marks} == {answer.block}
        assert {(e.port, e.protocol, Mark.of(e.mark).kind) for e in said.elements} == {
            (443, "tcp", Kind.INSPECT),
            (8080, "tcp", Kind.FORWARD),
        }
        assert len(said.elements) == 4 and {e.comment for e in said.elements} == {"a.search.test"}
        assert {(Mark.of(e.mark).block, e.real) for e in said.entries} == {
            (answer.block, str(FOUR)),
            (answer.block, str(SIX)),
        }
        assert len(said.entries) == 8
        (sites,) = (m.sites for m in w.of(messages.AddSites))
        assert [(s.host, s.block, s.port) for s in sites] == [("a.search.test", answer.block, 443)]
        (record,) = w.records("name-granted")
        assert record["name"] == "a.search.test" and record["wildcard"] == "*.search.test"
        assert record["link"] == sandbox.link.device and str(FOUR) in record["addresses"]

    play(tmp_path, dialogue)


def test_what_nobody_inspects_is_not_told_to_the_inspector(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        message = grant("a.b.deep.test", link=sandbox.link.number, wildcard="**.deep.test")
        assert isinstance(await w.ask(message), messages.Granted)
        assert w.order() == ["journal name-granted", "warden Grant"]

    play(tmp_path, dialogue)


REFUSED = [
    ({"host": "a.other.test"}, "name"),
    ({"host": "a.b.search.test"}, "name"),
    ({"host": "exact.search.test"}, "name"),  # has a rule of its own
    ({"host": "a.deep.test"}, "name"),  # is covered, but by another wildcard than said
    ({"host": "A.search.test"}, "name"),
    ({"host": "a_b.search.test"}, "name"),
    ({"host": "*.search.test"}, "name"),
    ({"host": "search.test"}, "name"),
    ({"host": "a.search.test", "link": 99}, "workspace"),
    ({"host": "a.search.test", "workspace": "beta"}, "workspace"),
    ({"host": "a.search.test", "workspace": "gamma"}, "workspace"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=[str(f) for f, _ in REFUSED])
def test_what_no_wildcard_gives_is_not_granted(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await w.ask(grant(**{"link": sandbox.link.number, **fields}))
        assert isinstance(answer, messages.Failed) and answer.reason == reason, answer
        assert w.told == []

    play(tmp_path, dialogue)


def test_no_more_names_are_held_than_the_workspace_may(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        link = sandbox.link.number
        for name in "abc":
            assert isinstance(await w.ask(grant(f"{name}.search.test", link=link)), messages.Granted)
        answer = await w.ask(grant("d.search.test", link=link))
        assert isinstance(answer, messages.Failed) and answer.reason == "budget-names"
        # what one workspace holds is not another's loss
        other = w.sandbox("beta").link.number
        assert isinstance(await w.ask(grant("d.search.test", link=other, workspace="beta")), messages.Granted)
        assert isinstance(await w.ask(release("a.search.test")), messages.Done)
        assert isinstance(await w.ask(grant("d.search.test", link=link)), messages.Granted)

    play(tmp_path, dialogue)


@pytest.mark.parametrize("refuses", [messages.Grant, messages.AddSites])
def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, refuses: type) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        w.refusing.add(refuses)
        answer = await w.ask(grant("a.search.test", link=sandbox.link.number))
        assert isinstance(answer, messages.Failed)
        (withdrawn,) = w.of(messages.Withdraw)
        assert withdrawn.elements == w.of(messages.Grant)[0].elements
        assert {e.real for e in withdrawn.entries} == {None}
        assert {(e.mark, e.synthetic) for e in withdrawn.entries} == {
            (e.mark, e.synthetic) for e in w.of(messages.Grant)[0].entries
        }
        (released,) = w.records("name-released")
        assert "not granted" in released["text"]
        assert not list(w.controller.grants.all()) and not w.controller.addresses.learned
        assert "a.search.test" not in w.controller.blocks("acme")
        # and it is not for ever
        w.refusing.clear()
        assert isinstance(await w.ask(grant("a.search.test", link=sandbox.link.number)), messages.Granted)

    play(tmp_path, dialogue)


def test_without_a_warden_nothing_is_granted_and_without_an_inspector_the_rest_is(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        w.disconnect("inspector")
        await w.settle()
        assert isinstance(await w.ask(grant("a.search.test", link=sandbox.link.number)), messages.Granted)
        w.disconnect("warden")
        await w.settle()
        w.told.clear()
        answer = await w.ask(grant("b.search.test", link=sandbox.link.number))
        assert isinstance(answer, messages.Failed) and answer.reason == "unavailable"
        assert w.told == []
        w.connect("inspector")
        await w.settle()
        assert {s.host for s in w.payload(messages.SetSites)} == {"exact.search.test", "a.search.test"}

    play(tmp_path, dialogue)


def test_a_name_given_back_goes_from_the_kernel_first(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        link = sandbox.link.number
        first = await w.ask(grant("a.search.test", link=link))
        await w.ask(grant("b.search.test", link=link))
        w.told.clear()
        assert isinstance(await w.ask(release("a.search.test", "never.search.test")), messages.Done)
        assert w.order() == ["warden Withdraw", "inspector RemoveSites", "journal name-released"]
        (withdrawn,) = w.of(messages.Withdraw)
        assert {Mark.of(e.mark).block for e in withdrawn.elements} == {first.block}
        assert {(Mark.of(e.mark).block, e.real) for e in withdrawn.entries} == {(first.block, None)}
        assert set(w.controller.grants.of("acme")) == {"b.search.test"}
        # and its number waits for it
        again = await w.ask(grant("a.search.test", link=link))
        assert again.block == first.block

    play(tmp_path, dialogue)


def test_a_name_that_the_kernel_keeps_stays_in_the_table(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        await w.ask(grant("a.search.test", link=sandbox.link.number))
        w.refusing.add(messages.Withdraw)
        assert isinstance(await w.ask(release("a.search.test")), messages.Failed)
        assert set(w.controller.grants.of("acme")) == {"a.search.test"}
        assert w.of(messages.RemoveSites) == []

    play(tmp_path, dialogue)


def test_asking_twice_gives_the_same_and_follows_the_addresses(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        first = await w.ask(grant("a.search.test", link=sandbox.link.number))
        w.told.clear()
        moved = IPv4Address("11.22.33.41")
        again = await w.ask(grant("a.search.test", link=sandbox.link.number, four=moved))
        assert again.block == first.block
        assert w.order() == ["warden SetNat"]
        assert {e.real for e in w.of(messages.SetNat)[0].entries} == {str(moved)}

    play(tmp_path, dialogue)


def test_refreshes_of_a_granted_name_reach_the_kernel(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await w.ask(grant("a.search.test", link=sandbox.link.number))
        w.told.clear()
        moved = IPv4Address("11.22.33.41")
        done = await w.ask(
            messages.Resolved(
                request=next(numbers),
                host="a.search.test",
                private=False,
                slots4=slots(moved),
                slots6=slots(SIX),
            )
        )
        assert isinstance(done, messages.Admitted)
        (said,) = w.of(messages.SetNat)
        assert {(Mark.of(e.mark).block, e.real) for e in said.entries} == {(answer.block, str(moved))}

    play(tmp_path, dialogue)


def test_a_resolver_a_warden_and_an_inspector_that_start_again_are_told(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await w.ask(grant("a.search.test", link=sandbox.link.number))
        w.told.clear()
        for name in ("warden", "resolver", "inspector"):
            w.disconnect(name)
        await w.settle()
        for name in ("warden", "resolver", "inspector"):
            w.connect(name)
        await w.settle()
        names = {n.workspace: n for n in w.payload(messages.SetNames)}
        assert names["acme"].granted == {"a.search.test": (answer.block, False)}
        assert names["acme"].wildcards == {"*.search.test": False, "**.deep.test": False}
        assert names["acme"].budgets.workspace.names == 3
        assert names["beta"].granted == {}
        wants = {want.workspace: want for want in w.payload(messages.SetWorkspaces)}
        assert [e.port for e in wants["acme"].elements if e.comment == "a.search.test"] == [
            443,
            443,
            8080,
            8080,
        ]
        assert not [e for e in wants["beta"].elements if e.comment == "a.search.test"]
        assert str(FOUR) in {e.real for m in w.of(messages.SetNat) for e in m.entries}
        assert ("a.search.test", answer.block) in {(s.host, s.block) for s in w.payload(messages.SetSites)}
        # what is served is confirmed by the sources, so these come first
        inspector = [what for what in w.order() if what.startswith("inspector ")]
        assert inspector == ["inspector BindSource", "inspector SetSites"]

    play(tmp_path, dialogue)


SEARCH = "{host: '*.search.test', ports: [443/tcp, 8080/tcp]}"
EXACT = "{host: exact.search.test, ports: [443/tcp]}"
CHANGES: list[tuple[str, str, str, str | None]] = [
    # what is replaced, by what; then why the name is released, or on which ports it stays
    (SEARCH, "{host: other.test, ports: [443/tcp]}", "no wildcard", None),
    (EXACT, "{host: a.search.test, ports: [443/tcp]}", "rule of its own", None),
    (SEARCH, SEARCH.replace("}", ", private: true}"), "may lead", None),
    (SEARCH, "{host: '**.search.test', ports: [443/tcp]}", "", "443"),
    (SEARCH, "{host: '*.search.test', ports: [443/tcp], verify: address}", "", "443"),
    ("guard: enforce", "guard: observe", "", "443 8080"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "why", "ports"), CHANGES)
def test_a_change_of_policy_judges_granted_names_anew(
    tmp_path: Path, before: str, after: str, why: str, ports: str | None
) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await w.ask(grant("a.search.test", link=sandbox.link.number))
        w.told.clear()
        assert before in POLICY
        w.write("acme", POLICY.replace(before, after))
        assert (await w.controller.apply())["problems"] == []
        (want,) = (e for e in w.payload(messages.SetWorkspaces) if e.workspace == "acme")
        mine = [e for e in want.elements if e.comment == "a.search.test"]
        names = next(n for n in w.payload(messages.SetNames) if n.workspace == "acme")
        sites = {s.port for s in w.payload(messages.SetSites) if s.host == "a.search.test"}
        if ports is not None:
            assert {str(e.port) for e in mine} == set(ports.split())
            assert {Mark.of(e.mark).block for e in mine} == {answer.block}
            assert names.granted == {"a.search.test": (answer.block, False)}
            assert sites == (set() if "address" in after or "observe" in after else {443})
            assert w.records("name-released") == []
            return
        assert names.granted == {}
        assert [why in r["text"] for r in w.records("name-released")] == [True]
        order = w.order()
        assert order.index("warden SetWorkspaces") < order.index("journal name-released")
        assert order.index("warden SetWorkspaces") < order.index("inspector SetSites")
        assert order.index("inspector SetSites") < order.index("resolver SetNames")
        if "rule of its own" in why:  # the same name, so the same addresses
            assert {Mark.of(e.mark).block for e in mine} == {answer.block}
            assert names.hosts["a.search.test"] == (answer.block, False) and sites == {443}
        else:
            assert mine == [] and sites == set()

    play(tmp_path, dialogue)


def test_a_change_that_the_kernel_refuses_keeps_what_was_granted(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        await w.ask(grant("a.search.test", link=sandbox.link.number))
        w.refusing.add(messages.SetWorkspaces)
        w.write("acme", POLICY.replace("*.search.test", "*.other.test"))
        with pytest.raises(Exception, match="no"):
            await w.controller.apply()
        assert set(w.controller.grants.of("acme")) == {"a.search.test"}
        assert w.records("name-released") == []

    play(tmp_path, dialogue)


def test_nobody_gets_the_block_of_a_granted_name(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await w.ask(grant("a.search.test", link=sandbox.link.number))
        many = "".join(f"  - {{host: h{n}.test, verify: address}}\n" for n in range(200))
        w.write("acme", POLICY + many)
        await w.controller.apply()
        blocks = w.controller.blocks("acme")
        assert blocks["a.search.test"] == answer.block
        assert len(set(blocks.values())) == len(blocks)

    play(tmp_path, dialogue)


def test_a_name_that_two_workspaces_use_leads_to_the_same_place_for_both(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        one = await w.ask(grant("a.search.test", link=sandbox.link.number))
        w.told.clear()
        moved = IPv4Address("11.22.33.41")
        other = w.sandbox("beta").link.number
        two = await w.ask(grant("a.search.test", link=other, workspace="beta", four=moved))
        await w.settle()
        ways = {(Mark.of(e.mark).block, e.real) for m in w.of(messages.SetNat) for e in m.entries}
        assert ways == {(one.block, str(moved))}
        assert {e.real for e in w.of(messages.Grant)[0].entries} == {str(moved), str(SIX)}
        assert isinstance(two, messages.Granted)

    play(tmp_path, dialogue)


def test_a_grant_for_a_resolver_that_is_gone_is_taken_back(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        async with w.controller.changing:  # something else is going on
            w.peers["resolver"].send(grant("a.search.test", link=sandbox.link.number))
            await w.settle()
            w.disconnect("resolver")
            await w.settle()
        await w.settle()
        assert w.order()[-3:] == ["warden Withdraw", "inspector RemoveSites", "journal name-released"]
        assert not list(w.controller.grants.all())

    play(tmp_path, dialogue)


def test_last_counters_of_a_name_go_under_its_wildcard(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        await w.ask(grant("a.search.test", link=sandbox.link.number))
        w.peers["warden"].send(messages.Retired(workspace="acme", elements={"a.search.test": (3, 180)}))
        w.peers["warden"].send(messages.Retired(workspace="acme", elements={"exact.search.test": (1, 60)}))
        await w.settle()
        retired = w.controller.remembered.account("acme").retired
        assert {host: (t.packets, t.bytes) for host, t in retired.items()} == {
            "*.search.test": (3, 180),
            "exact.search.test": (1, 60),
        }
        assert [r["host"] for r in w.records("host-retired")] == ["a.search.test", "exact.search.test"]

    play(tmp_path, dialogue)


def test_many_names_go_in_messages_that_can_be_sent(tmp_path: Path) -> None:
    long = "x" * 60 + "." + "y" * 60 + "." + "z" * 60
    policy = POLICY.replace("names: 3", "names: 300")

    async def dialogue(w: World, sandbox: Any) -> None:
        hosts = [f"n{n}.{long}.deep.test" for n in range(256)]
        for host in hosts:
            message = grant(host, link=sandbox.link.number, wildcard="**.deep.test")
            assert isinstance(await w.ask(message), messages.Granted)
        assert isinstance(await w.ask(release(*hosts)), messages.Done)
        withdrawn = w.of(messages.Withdraw)
        assert len(withdrawn) == 8
        assert sum(len(m.elements) for m in withdrawn) == 256 * 4
        assert sum(len(m.entries) for m in withdrawn) == 256 * 8
        assert len(w.records("name-released")) == 256

    play(tmp_path, dialogue, policy)


def test_a_grant_costs_little_beside_many_rules(tmp_path: Path) -> None:
    """Ten thousand rules, and each grant is well below what the kernel takes for it."""
    rules = "".join(f"  - {{host: h{n}.test, verify: address}}\n" for n in range(10_000))
    policy = POLICY.replace("names: 3", "names: 300") + rules

    async def dialogue(w: World, sandbox: Any) -> None:
        loop = asyncio.get_running_loop()
        spent = []
        for number in range(50):
            began = loop.time()
            answer = await w.ask(grant(f"a{number}.search.test", link=sandbox.link.number))
            assert isinstance(answer, messages.Granted)
            spent.append(loop.time() - began)
        assert sorted(spent)[25] < 0.02, spent

    async def scene() -> None:
        async with world(tmp_path, acme=policy) as made:
            await made.start()
            await dialogue(made, made.sandbox())

    asyncio.run(scene())


def test_the_numbers_of_granted_names_are_no_part_of_any_message_by_mistake() -> None:
    """A site travels as an array: its fields must stay in this order."""
    site = messages.Site(workspace="acme", index=1, host="a.test", block=2, port=443)
    assert msgspec.json.encode(site) == b'["acme",1,"a.test",2,443,false,null]'
