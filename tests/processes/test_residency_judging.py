"""Residency in the controller: where names of a pinned workspace may lead, and what is cut when that changes.

The tables are the tests' own: German, French and American prefixes, and one that is announced everywhere.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from controller_lab import World, published, world

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.processes.residency import Files
from egressd.ruleset.layout import Kind, Mark

DE4, FR4, US4, ANY4, NOWHERE4 = "11.22.33.1", "11.22.34.1", "11.22.35.1", "11.22.36.1", "11.22.37.1"
DE6, US6, ANY6, NOWHERE6 = "2a10:1::1", "2a10:3::1", "2a10:4::1", "2a10:5::1"
PREFIXES = {
    "DE": "11.22.33.0/24 2a10:1::/32",
    "FR": "11.22.34.0/24",
    "US": "11.22.35.0/24 2a10:3::/32",
    "anycast": "11.22.36.0/24 2a10:4::/32",
}
HEAD = "guard: enforce\nmembers: [user:4001]\n"
HOSTS = """\
allow:
  - {host: api.example.com, ports: [443/tcp]}
  - {host: cdn.example.com, ports: [443/tcp], vouch: "contract 4711"}
  - {host: '*.search.example.com', ports: [443/tcp]}
"""
PINNED = f"{HEAD}residency: {{jurisdictions: [EU]}}\n{HOSTS}"
OPEN = f"{HEAD}{HOSTS}"
numbers = itertools.count(1)
Dialogue = Callable[[World, Any], Coroutine[Any, Any, None]]


def play(directory: Path, dialogue: Dialogue, *, acme: str = PINNED, **policies: str) -> None:
    async def scene() -> None:
        async with world(directory, acme=acme, **policies) as made:
            made.table("lab", **PREFIXES)
            await made.start()
            await dialogue(made, made.sandbox())

    asyncio.run(scene())


def slots(addresses: Iterable[str]) -> Any:
    found = [ip_address(a) for a in addresses]
    return tuple(found[n % len(found)] if found else None for n in range(4))


def split(addresses: Iterable[str]) -> dict[str, Any]:
    listed = list(addresses)
    return {
        "slots4": slots(a for a in listed if "." in a),
        "slots6": slots(a for a in listed if ":" in a),
    }


async def told(w: World, workspace: str = "acme") -> WorkspaceNames:
    """What a resolver is told that starts now."""
    if "resolver" in w.peers:
        w.disconnect("resolver")
        await w.settle()
    w.connect("resolver")
    await w.settle()
    names: list[WorkspaceNames] = w.payload(messages.SetNames)
    return next(each for each in names if each.workspace == workspace)


async def resolve(w: World, host: str, *addresses: str, terms: str | None = None) -> Any:
    if terms is None:
        terms = (await told(w)).terms.get(host, "")
    w.told.clear()
    return await w.ask(
        messages.Resolved(request=next(numbers), host=host, private=False, terms=terms, **split(addresses))
    )


async def grant(w: World, sandbox: Any, host: str, *addresses: str) -> Any:
    return await w.ask(
        messages.GrantName(
            request=next(numbers),
            workspace=sandbox.workspace,
            link=sandbox.link.number,
            host=host,
            wildcard="*.search.example.com",
            **split(addresses),
        )
    )


def led(w: World) -> set[str | None]:
    """Where the last changes of ways led."""
    return {entry.real for message in w.of(messages.SetNat) for entry in message.entries}


def mark_of(w: World, host: str, workspace: str = "acme") -> int:
    allocation = w.controller.remembered.allocation
    assert allocation is not None
    index, block = allocation.workspaces[workspace], allocation.blocks[workspace][host]
    return int(Mark(kind=Kind.FORWARD, workspace=index, block=block))


def test_only_names_of_pinned_workspaces_have_terms(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        terms = (await told(w)).terms
        assert set(terms) == {"api.example.com", "cdn.example.com", "*.search.example.com"}
        assert terms["api.example.com"] == terms["*.search.example.com"] != terms["cdn.example.com"]
        assert terms["api.example.com"].startswith("EU ") and "vouched" in terms["cdn.example.com"]
        assert (await told(w, "open")).terms == {}

    play(tmp_path, dialogue, open=OPEN)


@pytest.mark.parametrize(
    ("shown", "goes", "refused"),
    [
        ([DE4, DE6], {DE4, DE6}, {}),
        ([FR4], {FR4}, {}),
        ([DE4, US4, DE6, US6], {DE4, DE6}, {US4: "US is not in EU", US6: "US is not in EU"}),
        ([US4, DE6], {DE6}, {US4: "US is not in EU"}),
        ([DE4, US6], {DE4}, {US6: "US is not in EU"}),
        ([US4, US6], set(), {US4: "US is not in EU", US6: "US is not in EU"}),
        ([NOWHERE4, DE6], {DE6}, {NOWHERE4: "no published prefix"}),
        ([NOWHERE6, DE4], {DE4}, {NOWHERE6: "no published prefix"}),
        ([ANY4, ANY6, DE4], {DE4}, {ANY4: "many places", ANY6: "many places"}),
    ],
)
def test_a_name_leads_to_what_is_published_inside_the_pin_and_nowhere_else(
    tmp_path: Path, shown: list[str], goes: set[str], refused: dict[str, str]
) -> None:
    async def dialogue(w: World, _: Any) -> None:
        answer = await resolve(w, "api.example.com", *shown)
        assert isinstance(answer, messages.Admitted), answer
        assert led(w) - {None} == goes
        assert set(answer.refused) == set(refused)
        assert all(text in answer.refused[address] for address, text in refused.items())
        assert sorted(r["address"] for r in w.records("residency-refused")) == sorted(refused)

    play(tmp_path, dialogue)


@pytest.mark.parametrize("address", [NOWHERE4, NOWHERE6, ANY4, ANY6])
def test_a_rule_that_vouches_reaches_what_no_table_can_place(tmp_path: Path, address: str) -> None:
    async def dialogue(w: World, _: Any) -> None:
        answer = await resolve(w, "cdn.example.com", address)
        assert answer.refused == {} and led(w) - {None} == {address}

    play(tmp_path, dialogue)


@pytest.mark.parametrize("address", [US4, US6])
def test_but_not_what_a_table_places_outside(tmp_path: Path, address: str) -> None:
    async def dialogue(w: World, _: Any) -> None:
        answer = await resolve(w, "cdn.example.com", address)
        assert "US is not in EU" in answer.refused[address] and led(w) <= {None}

    play(tmp_path, dialogue)


def test_the_record_says_what_was_refused_by_which_evidence(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "api.example.com", US4, DE4)
        (record,) = w.records("residency-refused")
        text = record.pop("text")
        assert US4 in text and "11.22.35.0/24" in text
        registry = w.controller.registry
        (table,) = registry.prefixes.names
        assert record == {
            "workspace": "acme", "host": "api.example.com", "address": US4, "code": "outside", "declared": "",
            "prefix": "11.22.35.0/24", "provider": "lab", "region": "us-test-1", "table": "lab",
            "table_digest": table.digest, "registry": registry.digest,
        }  # fmt: skip

    play(tmp_path, dialogue)


def test_what_was_found_is_recorded_before_the_kernel_leads_there(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "cdn.example.com", DE4, NOWHERE6)
        assert w.order() == [
            "journal residency-admitted",
            "journal residency-admitted",
            "warden SetNat",
        ]
        by_address = {r["address"]: r for r in w.records("residency-admitted")}
        inside, vouched = by_address[DE4], by_address[NOWHERE6]
        assert (inside["code"], inside["prefix"], inside["table"]) == ("inside", "11.22.33.0/24", "lab")
        assert (vouched["code"], vouched["prefix"], vouched["table"]) == ("vouched", "", "")
        await resolve(w, "cdn.example.com", FR4, DE4)
        assert [r["address"] for r in w.records("residency-admitted")] == [FR4], "each once"
        w.told.clear()
        w.write("late", PINNED)
        await w.controller.apply()
        told = {(r["workspace"], r["address"]) for r in w.records("residency-admitted")}
        assert told == {("late", FR4), ("late", DE4)}, "and not what it does not lead to any more"

    play(tmp_path, dialogue)


def test_each_address_is_told_once_and_counted_once(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        for shown, fresh in (([US4], [US4]), ([US4, DE4], []), ([US6, US4], [US6]), ([US4], [])):
            answer = await resolve(w, "api.example.com", *shown)
            assert set(answer.refused) == {a for a in shown if a != DE4}, "said each time"
            assert [r["address"] for r in w.records("residency-refused")] == fresh
        assert w.controller.residency.addresses_refused("acme") == {"api.example.com": 2}

    play(tmp_path, dialogue)


def test_told_for_every_workspace_that_uses_the_name_also_for_one_that_comes_later(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "api.example.com", US4, DE4)
        assert sorted(r["workspace"] for r in w.records("residency-refused")) == ["acme", "beta"]
        w.told.clear()
        w.write("late", PINNED)
        await w.controller.apply()
        assert [r["workspace"] for r in w.records("residency-refused")] == ["late"]
        assert w.controller.residency.addresses_refused("late") == {"api.example.com": 1}
        assert w.controller.residency.addresses_refused("open") == {}

    play(tmp_path, dialogue, beta=PINNED, open=OPEN)


@pytest.mark.parametrize("terms", ["EU 0000000000000000", "US", "EU vouched 0000000000000000"])
def test_on_terms_that_are_not_in_force_nothing_is_led(tmp_path: Path, terms: str) -> None:
    async def dialogue(w: World, _: Any) -> None:
        answer = await resolve(w, "api.example.com", DE4, terms=terms)
        assert isinstance(answer, messages.Failed) and answer.reason == "residency"
        assert w.of(messages.SetNat) == []

    play(tmp_path, dialogue)


def test_without_terms_a_pinned_name_is_led_nowhere(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "api.example.com", US4, terms="")
        assert w.of(messages.SetNat) == []

    play(tmp_path, dialogue)


def test_without_a_pin_nothing_is_judged(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        answer = await resolve(w, "api.example.com", US4, NOWHERE6)
        assert answer.refused == {} and led(w) - {None} == {US4, NOWHERE6}
        w.table("lab", US="11.0.0.0/8")
        w.told.clear()
        await w.controller.apply()
        assert w.of(messages.SetNat) == [] and w.of(messages.ReadFlows) == []
        assert [r["tables"].partition("@")[0] for r in w.records("registry-changed")] == ["lab"]

    play(tmp_path, dialogue, acme=OPEN)


# ---- changes


def change_of_table(w: World) -> None:
    w.table("lab", **(PREFIXES | {"DE": "11.22.33.128/25 2a10:1::/32", "US": "11.22.32.0/22 2a10:3::/32"}))


def change_of_pin(w: World) -> None:
    w.write("acme", PINNED.replace("[EU]", "[FR]"))


@pytest.mark.parametrize("change", [change_of_table, change_of_pin])
def test_other_terms_take_the_ways_first_then_cut_then_tell_the_resolver(
    tmp_path: Path, change: Callable[[World], None]
) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "api.example.com", DE4, FR4)
        old = (await told(w)).terms["api.example.com"]
        mark = mark_of(w, "api.example.com")
        w.flows["acme"] = [(mark, DE4), (mark, FR4), (mark_of(w, "cdn.example.com"), DE4)]
        w.told.clear()
        change(w)
        await w.controller.apply(by="test")
        order = [word for word in w.order() if word.split()[0] in ("warden", "resolver")]
        assert order == [
            f"warden {word}" if word != "SetNames" else f"resolver {word}"
            for word in ("SetWorkspaces", "SetNat", "ReadFlows", "CutFlows", "SetNames")
        ]
        assert led(w) == {None}
        names = next(n for n in w.payload(messages.SetNames) if n.workspace == "acme")
        assert names.terms["api.example.com"] != old
        (cut,) = w.of(messages.CutFlows)
        assert set(cut.flows) == {(mark, DE4), (mark_of(w, "cdn.example.com"), DE4)}, "the other one stays"
        assert {(r["host"], r["address"], r["code"]) for r in w.records("flows-cut")} == {
            ("api.example.com", DE4, "outside"),
            ("cdn.example.com", DE4, "outside"),
        }
        answer = await resolve(w, "api.example.com", DE4, FR4, terms=old)
        assert isinstance(answer, messages.Failed)
        answer = await resolve(w, "api.example.com", DE4, FR4, terms=names.terms["api.example.com"])
        assert set(answer.refused) == {DE4} and led(w) - {None} == {FR4}

    play(tmp_path, dialogue)


def test_a_pin_that_comes_cuts_and_one_that_goes_does_not(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "api.example.com", US4, terms="")
        mark = mark_of(w, "api.example.com")
        w.flows["acme"] = [(mark, US4)]
        w.write("acme", PINNED)
        await w.controller.apply()
        assert [cut.flows for cut in w.of(messages.CutFlows)] == [((mark, US4),)]
        w.told.clear()
        w.write("acme", OPEN)
        await w.controller.apply()
        assert w.of(messages.ReadFlows) == [] and w.of(messages.CutFlows) == []
        w.told.clear()
        await w.controller.apply()
        assert w.of(messages.SetNat) == [] and w.of(messages.ReadFlows) == []

    play(tmp_path, dialogue, acme=OPEN)


def test_vouching_for_a_host_changes_its_terms_and_no_others(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "cdn.example.com", NOWHERE4)
        await resolve(w, "api.example.com", DE4)
        mark = mark_of(w, "cdn.example.com")
        w.flows["acme"] = [(mark, NOWHERE4), (mark_of(w, "api.example.com"), DE4)]
        w.told.clear()
        w.write("acme", PINNED.replace(', vouch: "contract 4711"', ""))
        await w.controller.apply()
        (nat,) = w.of(messages.SetNat)
        assert {e.mark for e in nat.entries} == {mark} and {e.real for e in nat.entries} == {None}
        assert [cut.flows for cut in w.of(messages.CutFlows)] == [((mark, NOWHERE4),)]
        assert [r["code"] for r in w.records("flows-cut")] == ["no-prefix"]

    play(tmp_path, dialogue)


def test_a_way_that_was_under_way_while_the_terms_changed_does_not_stay(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        terms = (await told(w)).terms["api.example.com"]
        w.told.clear()
        w.slow.add(messages.SetNat)  # the kernel has it, and has not said so yet
        asking = asyncio.ensure_future(resolve(w, "api.example.com", FR4, terms=terms))
        await w.settle()
        (slow,) = w.of(messages.SetNat)
        w.slow.clear()
        w.write("acme", PINNED.replace("[EU]", "[DE]"))
        changing = asyncio.ensure_future(w.controller.apply())
        await w.settle()
        w.peers["warden"].send(messages.Done(request=slow.request))
        await asyncio.wait_for(asyncio.gather(asking, changing), 10)
        assert {entry.real for entry in slow.entries} == {FR4}
        assert w.controller.addresses.entries() == (), "and it was told to forget it"
        last = {(e.mark, e.synthetic): e.real for message in w.of(messages.SetNat) for e in message.entries}
        assert set(last.values()) == {None}

    play(tmp_path, dialogue)


def test_connections_that_could_not_be_judged_are_when_there_is_a_warden_again(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "api.example.com", DE4)
        mark = mark_of(w, "api.example.com")
        w.flows["acme"] = [(mark, DE4)]
        w.refusing.add(messages.ReadFlows)
        change_of_pin(w)
        await w.controller.apply()
        assert len(w.records("flows-not-cut")) == 1 and w.of(messages.CutFlows) == []
        assert any("could not be judged" in text for _, text in w.controller.alarms)
        w.refusing.clear()
        w.disconnect("warden")
        await w.settle()
        w.connect("warden")
        await w.settle()
        assert [cut.flows for cut in w.of(messages.CutFlows)] == [((mark, DE4),)]
        w.told.clear()
        await w.controller.apply()
        assert w.of(messages.ReadFlows) == [], "once"

    play(tmp_path, dialogue)


def test_a_registry_that_cannot_be_read_is_an_alarm_and_leads_nowhere(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "api.example.com", DE4)
        w.told.clear()
        (w.tables / "lab.json").write_bytes(b"{")
        await w.controller.apply()
        (alarm,) = w.records("registry-broken")
        assert "lab.json" in alarm["text"]
        assert led(w) <= {None} and w.controller.addresses.entries() == ()
        names = next(n for n in w.payload(messages.SetNames) if n.workspace == "acme")
        assert names.hosts == {} and names.barred["api.example.com"][0] == "residency"
        w.told.clear()
        await w.controller.apply()
        assert w.records("registry-broken") == [], "told once"
        w.table("lab", **PREFIXES)
        await w.controller.apply()
        assert (await resolve(w, "api.example.com", DE4)).refused == {}

    play(tmp_path, dialogue)


def test_a_policy_that_stays_because_its_file_broke_is_judged_by_what_is_known_now(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        before = w.controller.policies["acme"]
        w.write("acme", "allow: [")
        (w.tables / "lab.json").write_bytes(b"{")
        await w.controller.apply()
        after = w.controller.policies["acme"]
        assert after.hosts == () and len(after.barred) == 3 and after.digest == before.digest
        w.table("lab", **PREFIXES)
        await w.controller.apply()
        assert w.controller.policies["acme"] == before

    play(tmp_path, dialogue)


# ---- names of wildcards


def test_a_name_of_a_wildcard_leads_only_inside(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await grant(w, sandbox, "a.search.example.com", DE4, US4, US6)
        assert isinstance(answer, messages.Granted) and set(answer.refused) == {US4, US6}
        (said,) = w.of(messages.Grant)
        assert {entry.real for entry in said.entries} - {None} == {DE4}
        assert w.order().index("journal residency-admitted") < w.order().index("warden Grant")
        assert {r["host"] for r in w.records("residency-refused")} == {"a.search.example.com"}
        assert w.controller.residency.addresses_refused("acme") == {"*.search.example.com": 2}

    play(tmp_path, dialogue)


@pytest.mark.parametrize("shown", [(US4,), (US6,), (US4, NOWHERE6)])
def test_with_no_address_inside_it_is_not_granted(tmp_path: Path, shown: tuple[str, ...]) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await grant(w, sandbox, "a.search.example.com", *shown)
        assert isinstance(answer, messages.Failed) and answer.reason == "residency"
        assert w.of(messages.Grant) == [] and w.records("name-granted") == []
        assert {r["address"] for r in w.records("residency-refused")} == set(shown)

    play(tmp_path, dialogue)


def test_a_name_that_the_catalogue_places_outside_is_not_granted(tmp_path: Path) -> None:
    rule = "allow:\n  - {host: '**.amazonaws.com', ports: [443/tcp]}\n"
    policy = f"{HEAD}residency: {{jurisdictions: [EU]}}\n{rule}"

    async def dialogue(w: World, sandbox: Any) -> None:
        def ask(host: str) -> Any:
            return w.ask(
                messages.GrantName(
                    request=next(numbers), workspace="acme", link=sandbox.link.number, host=host,
                    wildcard="**.amazonaws.com", **split([DE4]),
                )
            )  # fmt: skip

        answer = await ask("bedrock-runtime.us-east-1.amazonaws.com")
        assert isinstance(answer, messages.Failed) and answer.reason == "residency", answer
        (record,) = w.records("residency-refused")
        assert (record["address"], record["code"]) == ("", "outside")
        assert isinstance(await ask("bedrock-runtime.eu-central-1.amazonaws.com"), messages.Granted)

    play(tmp_path, dialogue, acme=policy)


def test_what_is_granted_stays_granted_on_other_terms_and_is_looked_up_anew(tmp_path: Path) -> None:
    async def dialogue(w: World, sandbox: Any) -> None:
        answer = await grant(w, sandbox, "a.search.example.com", DE4, FR4)
        w.told.clear()
        mark = int(Mark(kind=Kind.FORWARD, workspace=1, block=answer.block))
        w.flows["acme"] = [(mark, DE4), (mark, FR4)]
        change_of_pin(w)
        await w.controller.apply()
        assert led(w) == {None} and w.records("name-released") == []
        assert [cut.flows for cut in w.of(messages.CutFlows)] == [((mark, DE4),)]
        names = next(n for n in w.payload(messages.SetNames) if n.workspace == "acme")
        assert names.granted == {"a.search.example.com": (answer.block, False)}
        terms = names.terms["a.search.example.com"]
        assert terms == names.terms["*.search.example.com"]
        again = await resolve(w, "a.search.example.com", DE4, FR4, terms=terms)
        assert set(again.refused) == {DE4} and led(w) - {None} == {FR4}

    play(tmp_path, dialogue)


# ---- local_only


@pytest.mark.parametrize("guard", ["off", "observe", "enforce"])
def test_local_only_bars_every_host_and_enforces_whatever_the_guard_says(tmp_path: Path, guard: str) -> None:
    text = f"guard: {guard}\nlocal_only: true\nmembers: [user:4001]\n{HOSTS}"

    async def dialogue(w: World, sandbox: Any) -> None:
        names = await told(w)
        assert (names.guard, names.hosts, names.wildcards) == ("enforce", {}, {})
        assert {reason for reason, _ in names.barred.values()} == {"local-only"} and len(names.barred) == 3
        assert w.controller.wants["acme"].guard == "enforce"
        assert [e for e in w.controller.wants["acme"].elements if e.comment != "(resolver)"] == []
        answer = await grant(w, sandbox, "a.search.example.com", DE4)
        assert isinstance(answer, messages.Failed) and w.of(messages.Grant) == []

    play(tmp_path, dialogue, acme=text)


# ---- what is shown


def test_status_why_and_counters_tell_of_it(tmp_path: Path) -> None:
    async def dialogue(w: World, _: Any) -> None:
        await resolve(w, "api.example.com", DE4, US4)
        w.serve()
        client = w.client()
        status = await client.ask(messages.Ask(what="status"))
        rows = {row["workspace"]: row for row in status["workspaces"]}
        registry = w.controller.registry
        assert rows["acme"]["residency"] == {
            "jurisdictions": ["EU"], "barred": 0, "addresses_refused": 1, "registry": registry.digest,
            "tables": [f"lab@{registry.prefixes.names[0].digest}"], "stale": [], "broken": None,
        }  # fmt: skip
        assert (rows["acme"]["local_only"], rows["open"]["residency"]) == (False, None)
        counters = await client.ask(messages.Ask(what="counters"))
        refused = {row["workspace"]: row["addresses_refused"] for row in counters["workspaces"]}
        assert refused == {"acme": {"api.example.com": 1}, "open": {}}
        why = await client.ask(messages.Why(workspace="acme", subject="api.example.com"))
        details = "\n".join(why["details"])
        assert f"it leads to {DE4}" in details and f"{DE4} is in 11.22.33.0/24" in details
        assert "[residency]" in details and f"{US4} is in 11.22.35.0/24" in details
        client.close()

    play(tmp_path, dialogue, open=OPEN)


def test_files_are_read_again_when_they_are_others(tmp_path: Path) -> None:
    files, table = Files(tmp_path), tmp_path / "tables" / "lab.json"
    empty = files.read()
    assert files.read() is empty and empty.prefixes.names == ()
    table.parent.mkdir()
    table.write_bytes(published("lab", PREFIXES).encode())
    first = files.read()
    assert [t.name for t in first.prefixes.names] == ["lab"] and files.read() is first
    fresh = tmp_path / "fresh"
    fresh.write_bytes(published("lab", {"US": "11.0.0.0/8"}).encode())
    fresh.rename(table)
    second = files.read()
    assert second.digest != first.digest and files.read() is second
    table.write_bytes(b"{")
    assert files.read().broken and "lab.json" in files.read().broken
    table.unlink()
    assert (files.read().broken, files.read().prefixes.names) == ("", ())
