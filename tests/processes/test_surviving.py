"""What one controller leaves to the next: leases, books, names; and whom it lets come back."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_lab import Client, World, world
from test_controller_claims import until
from test_grants import FOUR, SIX, grant, slots
from test_testifying import ASKED

from egressd.ipc import messages
from egressd.model.identities import Link
from egressd.processes import controller as controller_module
from egressd.processes.ended_links import EndedLinks
from egressd.processes.leases import Leases, LinkNumbers, Sandbox
from egressd.processes.leases_file import LeaseFiles
from egressd.processes.members import Caller
from egressd.processes.remembered_names import NamesFile
from egressd.processes.testifying import Said
from egressd.ruleset import allocate
from egressd.ruleset.allocate import Allocation
from egressd.ruleset.layout import Pools

POLICY = """\
guard: enforce
members: [user:4001, user:4002]
allow:
  - {host: api.test, ports: [8080/tcp]}
  - {host: '*.search.test', ports: [8080/tcp]}
"""
COUNTERS = {"in": (5, 500), "ok": (3, 300), "denied": (2, 200), "other": (0, 0)}
GATEWAY = (4, 4026531840)
PLACE4, PLACE6 = IPv4Address("11.22.33.44"), IPv6Address("2a10:5353::44")


# ---- files


def files(directory: Path, *, boot: str = "b1", gateway: Any = GATEWAY) -> LeaseFiles:
    return LeaseFiles(directory, boot=boot, gateway=gateway)


def sandbox(tmp_path: Path, **more: Any) -> Sandbox:
    leases = Leases(Pools(), LinkNumbers(tmp_path / "next-link"))
    caller = Caller(pid=7, uid=4001, groups=frozenset({4001, 27}), gid=4001)
    return leases.open(
        workspace="acme", caller=caller, command="a b", since=12.5, quota=99, namespace=(4, 77), **more
    )


def test_a_lease_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = sandbox(tmp_path, digest="d", policy="p", guard="enforce", connections=3, closed=True)
    said = Said("r-1", {"request-asked"})
    files(tmp_path / "leases").write(made, said)
    (record,), lost = files(tmp_path / "leases").load()
    assert (record.sandbox(Pools()), record.said, lost) == (made, said, [])
    assert (tmp_path / "leases").stat().st_mode & 0o777 == 0o700
    files(tmp_path / "leases").remove(made.link)
    assert files(tmp_path / "leases").load() == ([], [])


def test_another_boot_or_gateway_adopts_nothing(tmp_path: Path) -> None:
    for other in ({"boot": "b2"}, {"gateway": (4, 1)}, {"gateway": None}):
        files(tmp_path / "leases").write(sandbox(tmp_path), Said())
        records, (lost,) = files(tmp_path / "leases", **other).load()
        assert records == [] and lost.link is not None and "another" in lost.text
        assert list((tmp_path / "leases").iterdir()) == []  # told once


BROKEN: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "nothing": lambda path, good: path.write_bytes(b""),
    "half": lambda path, good: path.write_text(json.dumps(good)[:40]),
    "no object": lambda path, good: path.write_text("[]"),
    "an unknown field": lambda path, good: path.write_text(json.dumps(good | {"more": 1})),
    "a missing field": lambda path, good: path.write_text(json.dumps({**good, "uid": None})),
    "a workspace that is none": lambda path, good: path.write_text(json.dumps(good | {"workspace": "../x"})),
    "another link": lambda path, good: path.write_text(json.dumps(good | {"link": 2})),
    "an unbelievable link": lambda path, good: path.write_text(json.dumps(good | {"link": 1 << 40})),
    "too much": lambda path, good: path.write_bytes(b" " * (1 << 17)),
    "not text": lambda path, good: path.write_bytes(b"\xff\x00" * 99),
    "brackets": lambda path, good: path.write_bytes(b"[" * 60_000),
    "a link elsewhere": lambda path, good: path.symlink_to("/etc/passwd"),
    "a FIFO": lambda path, good: os.mkfifo(path),
    "everybody's": lambda path, good: (path.write_text(json.dumps(good)), path.chmod(0o666)),
    "another account's": lambda path, good: (path.write_text(json.dumps(good)), os.chown(path, 4009, 4009)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_file_is_refused_and_the_good_one_beside_it_is_not(tmp_path: Path, what: str) -> None:
    if what == "another account's" and os.geteuid():
        pytest.skip("only root can give a file away")
    store, directory = files(tmp_path / "leases"), tmp_path / "leases"
    first, second = sandbox(tmp_path), sandbox(tmp_path)
    for each in (first, second):
        store.write(each, Said())
    path = directory / f"{first.link.device}.json"
    good = json.loads(path.read_text())
    path.unlink()
    BROKEN[what](path, good)
    records, (lost,) = store.load()
    assert [record.link for record in records] == [second.link.number]
    assert lost.link == first.link and lost.text
    assert store.load()[1] == []


def test_what_is_no_lease_at_all_is_refused_by_name(tmp_path: Path) -> None:
    directory = tmp_path / "leases"
    directory.mkdir()
    for name in ("eg0.json", "x.json", "eg1", "eg01.json"):
        (directory / name).write_text("{}")
    (directory / "eg7.new").write_text("{")  # left by one that was killed while it wrote
    (directory / "eg9.json").mkdir()
    records, lost = files(directory).load()
    assert records == []
    assert sorted(str(each.link.device if each.link else None) for each in lost) == ["None"] * 4 + ["eg9"]
    assert [path.name for path in directory.iterdir()] == ["eg9.json"]


def test_ended_links_are_known_and_whose_they_are(tmp_path: Path) -> None:
    before = EndedLinks(tmp_path / "ended.jsonl")
    before.add(Link(1), "acme")
    before.add(Link(2), "acme", asker=4001)
    with (tmp_path / "ended.jsonl").open("ab") as stream:
        stream.write(b'[3,"ac')  # killed while it wrote
    for _ in range(2):
        after = EndedLinks(tmp_path / "ended.jsonl")
        after.load()
        assert (after.get(Link(1)), after.get(Link(2)), after.get(Link(3))) == ("acme", "acme", None)
        assert list(after.askers()) == [(Link(2), 4001)]


def test_names_are_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    learned = {
        ("a.test", False, ""): ((PLACE4, None, None, None), (PLACE6, None, None, None)),
        ("b.test", True, "DE x"): ((None,) * 4, (None,) * 4),
    }
    file = NamesFile(tmp_path)
    file.note_names(learned)
    file.note_names([("gone.test", False, "")])
    assert file.flush(learned, {}) is False
    assert NamesFile(tmp_path).load(Pools()).learned == learned
    path = tmp_path / "names.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = NamesFile(tmp_path).load(Pools()).learned
        assert found.items() <= learned.items()
    none = "[null,null,null,null]"
    for bad in (
        f'["a","m.test",false,"",["127.0.0.1",null,null,null],{none}]',
        f'["a","m.test",false,"",["11.22.33.44"],{none}]',
        '["z"]',
        "{}",
        "7",
        '["g","acme"]',
        "[" * 60_000,
    ):
        path.write_bytes(whole + bad.encode() + b"\n")
        assert NamesFile(tmp_path).load(Pools()).learned == learned


def test_names_that_change_often_do_not_fill_the_directory(tmp_path: Path) -> None:
    file, key, long = NamesFile(tmp_path), ("a.test", False, ""), 0
    slots4 = (PLACE4, None, None, None)
    for _ in range(10_000):
        file.note_names([key])
        if file.flush({key: (slots4, (None,) * 4)}, {}):
            long += 1
            file.rewrite({key: (slots4, (None,) * 4)}, {})
    assert long == 2 and (tmp_path / "names.jsonl").stat().st_size < 1 << 20


def test_numbers_that_were_taken_and_given_back_since() -> None:
    before = Allocation(
        workspaces={"acme": 1}, blocks={"acme": {"a": 5, "old": 6}}, retired_blocks={"acme": {"x": 9}}
    )
    after = allocate.restore(
        before,
        {("acme", "new"): 7, ("acme", "x"): 9, ("acme", "thief"): 5, ("acme", "wild"): 1 << 20},
        {("acme", "old"): 6, ("acme", "short"): 8, ("acme", "a2"): 5},
    )
    assert after.blocks == {"acme": {"a": 5, "new": 7, "x": 9}}
    assert after.retired_blocks == {"acme": {"old": 6, "short": 8}}


# ---- one controller after the other


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "_HEARD_AFTER", 0.01)


def lives(directory: Path, *dialogues: Callable[[World], Awaitable[None]]) -> None:
    """Each with a controller of its own, which ends as if it were killed."""

    async def scene(number: int, dialogue: Callable[[World], Awaitable[None]]) -> None:
        async with world(directory, acme=POLICY) as made:
            made.last_counters = COUNTERS
            if number:
                await begun_again(made)
            else:
                await made.start()
            made.serve()
            await dialogue(made)
            assert made.controller.control is not None
            for client in made.controller.control.clients.values():
                client.sandbox = None  # nobody is told that they are gone

    for number, dialogue in enumerate(dialogues):
        asyncio.run(scene(number, dialogue))


async def begun_again(w: World) -> None:
    """As `start`, but what is said is kept."""
    await w.controller.begin()
    for name in ("warden", "resolver", "relay", "inspector", "evidence"):
        w.connect(name)
    await w.settle()


async def spawned(w: World, uids: list[int], uid: int = 4001) -> tuple[Client, messages.Lease]:
    uids.append(uid)
    client = w.client()
    return client, await client.spawn(command="x")


async def asks(w: World, uids: list[int], link: int, uid: int = 4001) -> Any:
    uids.append(uid)
    client = w.client()
    client.resume(link)
    answer = await client.hear()
    await w.settle()
    return answer


def on_disk(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "controller" / "leases").iterdir())


def test_a_lease_is_on_disk_from_before_its_link_until_after_its_account(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        seen: list[list[str]] = []
        write = w.journal.record

        def record(event: str, fields: Any) -> None:
            seen.append([event, *on_disk(tmp_path)])
            write(event, fields)

        w.journal.record = record  # type: ignore[method-assign]
        client, lease = await spawned(w, callers)
        client.close()
        await until(lambda: w.records("sandbox-closed"))
        name = f"eg{lease.link}.json"
        assert [line for line in seen if line[0].startswith("sandbox-")] == [
            ["sandbox-opening", name],
            ["sandbox-closed", name],
        ]
        assert on_disk(tmp_path) == []

    lives(tmp_path, dialogue)


def test_the_next_controller_keeps_the_link_and_its_account_comes_back_once(
    tmp_path: Path, callers: list[int]
) -> None:
    async def first(w: World) -> None:
        await spawned(w, callers)

    async def second(w: World) -> None:
        order = [
            line for line in w.order() if line.split()[0] in ("warden", "resolver", "inspector", "relay")
        ]
        assert order.index("warden KeepLink") < order.index("warden Settle")
        assert {line for line in order if line.endswith("BindSource")} == {
            "resolver BindSource", "relay BindSource", "inspector BindSource",
        }  # fmt: skip
        assert order.index("resolver BindSource") < order.index("resolver SetNames")
        w.told.clear()
        stranger = await asks(w, callers, 1, uid=4002)
        nobody = await asks(w, callers, 9, uid=4002)
        assert (stranger.reason, stranger.text) == ("member", nobody.text.replace("eg9:", "eg1:"))
        outsider = await asks(w, callers, 1, uid=4003)
        assert outsider.reason == "member"
        assert w.of(messages.KeepLink) == []
        lease = await asks(w, callers, 1)
        assert isinstance(lease, messages.Lease) and lease.link == 1
        assert [m.link for m in w.of(messages.KeepLink)] == [1]
        (record,) = w.records("sandbox-resumed")
        assert (record["link"], record["workspace"], record["uid"]) == ("eg1", "acme", 4001)
        assert record["seconds"] >= 0
        again = await asks(w, callers, 1)
        assert (again.reason, "once" in again.text) == ("member", True)
        (found,) = w.controller.leases.by_link.values()
        assert (found.command, found.caller.uid) == ("x", 4001)

    lives(tmp_path, first, second)


def test_a_namespace_that_the_kernel_does_not_confirm_resumes_nothing(
    tmp_path: Path, callers: list[int]
) -> None:
    async def first(w: World) -> None:
        await spawned(w, callers)

    async def second(w: World) -> None:
        w.refusing.add(messages.KeepLink)
        assert isinstance(await asks(w, callers, 1), messages.Refusal)
        w.refusing.clear()
        assert isinstance(await asks(w, callers, 1), messages.Lease)  # it still waits for who can

    lives(tmp_path, first, second)


def test_who_is_no_member_any_more_does_not_come_back(tmp_path: Path, callers: list[int]) -> None:
    async def first(w: World) -> None:
        await spawned(w, callers)
        w.write("acme", POLICY.replace("user:4001, ", ""))

    async def second(w: World) -> None:
        w.write("acme", POLICY.replace("user:4001, ", ""))
        await w.controller.apply()
        assert (await asks(w, callers, 1)).reason == "member"
        assert not w.records("sandbox-resumed")

    lives(tmp_path, first, second)


def test_what_nobody_comes_back_for_is_closed_accounted_and_recorded(
    tmp_path: Path, callers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first(w: World) -> None:
        await spawned(w, callers)
        await spawned(w, callers)

    async def second(w: World) -> None:
        assert isinstance(await asks(w, callers, 1), messages.Lease)
        monkeypatch.setattr(controller_module, "RESUME_GRACE", 0.01)
        await w.controller.give_up_waiting()
        (record,) = w.records("sandbox-lost")
        assert (record["link"], record["why"], record["ok_bytes"]) == ("eg2", "nobody came back for it", 300)
        assert on_disk(tmp_path) == ["eg1.json"]
        assert w.controller.remembered.accounts["acme"].ended.in_.packets == 5
        assert (await asks(w, callers, 2)).reason == "member"
        assert w.controller.ended.get(Link(2)) == "acme"

    lives(tmp_path, first, second)


def test_a_link_that_is_gone_is_accounted_and_says_why(tmp_path: Path, callers: list[int]) -> None:
    async def first(w: World) -> None:
        await spawned(w, callers)

    async def second(w: World) -> None:
        (record,) = w.records("sandbox-closed")
        assert record["why"] == "no" and record["in_packets"] == 5
        assert "warden Settle" in w.order() and w.controller.settled.is_set()
        assert on_disk(tmp_path) == []

    async def scene() -> None:
        async with world(tmp_path, acme=POLICY) as made:
            made.last_counters = COUNTERS
            made.refusing.add(messages.KeepLink)
            await begun_again(made)
            await second(made)

    lives(tmp_path, first)
    asyncio.run(scene())


def test_a_report_is_in_the_books_once_whoever_is_told_of_it(tmp_path: Path, callers: list[int]) -> None:
    report = messages.Retired(workspace="acme", elements={"api.test": (4, 400)}, report=77)

    async def first(w: World) -> None:
        w.slow.add(messages.Heard)
        w.peers["warden"].send(report)
        await until(lambda: w.of(messages.Heard))
        assert w.of(messages.Heard)[0].reports == (77,)

    async def second(w: World) -> None:
        (said,) = w.of(messages.Heard)
        assert (said.reports, said.again) == ((77,), True)
        assert w.order()[[o.startswith("warden") for o in w.order()].index(True)] == "warden Heard"
        w.controller.remembered.heard.add(77)  # told again all the same
        w.peers["warden"].send(report)
        await w.settle()
        account = w.controller.remembered.accounts["acme"]
        assert (account.retired["api.test"].packets, account.retired["api.test"].bytes) == (4, 400)

    lives(tmp_path, first, second)


def test_names_lead_on_and_grants_are_held(tmp_path: Path, callers: list[int]) -> None:
    blocks = []

    async def first(w: World) -> None:
        _, lease = await spawned(w, callers)
        await w.ask(
            messages.Resolved(
                request=1, host="api.test", private=False, slots4=slots(PLACE4), slots6=slots(PLACE6)
            )
        )
        assert str(PLACE4) in (tmp_path / "controller" / "names.jsonl").read_text()
        answer = await w.ask(grant("a.search.test", link=lease.link))
        blocks.append(answer.block)
        gone = await w.ask(grant("b.search.test", link=lease.link))
        await w.ask(messages.ReleaseNames(request=9, workspace="acme", hosts=("b.search.test",)))
        blocks.append(gone.block)

    async def second(w: World) -> None:
        before = w.order().index("warden Settle")
        ways = {e.real for m in w.of(messages.SetNat) for e in m.entries}
        assert ways == {str(PLACE4), str(PLACE6), str(FOUR), str(SIX)}
        assert max(i for i, o in enumerate(w.order()) if o == "warden SetNat") < before
        (wants,) = [payload for who, m, payload in w.told if isinstance(m, messages.SetWorkspaces)]
        assert {e.comment for e in wants[0].elements} >= {"a.search.test", "api.test"}
        assert "b.search.test" not in {e.comment for e in wants[0].elements}
        (names,) = w.payload(messages.SetNames)
        assert names.granted == {"a.search.test": (blocks[0], False)}
        assert w.records("name-released") == []
        numbers = w.controller.remembered.allocation
        assert numbers is not None and numbers.retired_blocks["acme"]["b.search.test"] == blocks[1]

    async def third(w: World) -> None:
        (released,) = w.records("name-released")
        assert released["name"] == "a.search.test"
        assert {e.real for m in w.of(messages.SetNat) for e in m.entries if e.real} == {
            str(PLACE4),
            str(PLACE6),
        }

    lives(tmp_path, first, second)

    async def narrowed() -> None:
        async with world(tmp_path, acme=POLICY.replace("*.search.test", "*.other.test")) as made:
            await begun_again(made)
            await third(made)

    asyncio.run(narrowed())


def test_a_lease_that_cannot_be_believed_is_an_alarm_and_no_sandbox(
    tmp_path: Path, callers: list[int]
) -> None:
    async def first(w: World) -> None:
        await spawned(w, callers)
        path = tmp_path / "controller" / "leases" / "eg1.json"
        path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | {"boot": "another"}))

    async def second(w: World) -> None:
        (record,) = w.records("lease-refused")
        assert record == {"link": "eg1", "text": "it is of another boot of the machine"}
        assert w.of(messages.KeepLink) == [] and w.controller.leases.by_link == {}
        assert (await asks(w, callers, 1)).reason == "member"

    lives(tmp_path, first, second)


def test_without_a_warden_a_lease_is_closed_when_there_is_one_again(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        client, _ = await spawned(w, callers)
        w.disconnect("warden")
        await until(lambda: w.controller.peers["warden"] is None)
        client.close()
        await w.settle()
        assert w.records("sandbox-closed") == [] and on_disk(tmp_path) == ["eg1.json"]
        w.connect("warden")
        (record,) = await until(lambda: w.records("sandbox-closed"))
        assert record["in_packets"] == 5 and on_disk(tmp_path) == []
        await w.settle()
        assert [m.link for m in w.of(messages.KeepLink)] == []

    lives(tmp_path, dialogue)


def test_what_is_left_of_a_link_that_is_accounted_is_nobodys_loss(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        client, lease = await spawned(w, callers)
        client.close()
        await until(lambda: w.records("sandbox-closed"))
        w.peers["warden"].send(messages.LinkLost(link=lease.link, workspace="", counters={}, report=5))
        w.peers["warden"].send(messages.LinkLost(link=99, workspace="", counters={}, report=6))
        await w.settle()
        assert [record["link"] for record in w.records("sandbox-lost")] == ["eg99"]

    lives(tmp_path, dialogue)


def test_whose_receipt_it_is_is_known_of_a_link_that_went_meanwhile(
    tmp_path: Path, callers: list[int]
) -> None:
    """Another member may not have it, though its controller was killed and its sandbox ended in the gap."""

    async def first(w: World) -> None:
        await spawned(w, callers)
        (sandbox,) = w.controller.leases.by_link.values()
        w.controller.save_lease(sandbox, Said("r-1", {"request-asked"}))

    async def scene() -> None:
        async with world(tmp_path, acme=POLICY) as made:
            made.last_counters = COUNTERS
            made.refusing.add(messages.KeepLink)
            made.serve()
            await begun_again(made)
            assert made.records("sandbox-closed")
            assert list(made.controller.ended.askers()) == [(Link(1), 4001)]

    lives(tmp_path, first)
    asyncio.run(scene())


def test_what_is_said_of_a_closed_sandbox_brings_no_lease_back(tmp_path: Path, callers: list[int]) -> None:
    """Its connection ends while its last word waits for the auditor."""

    async def dialogue(w: World) -> None:
        w.write("acme", POLICY.replace("user:4001", "user:0"))  # a broker
        await w.controller.apply()
        client = w.client()
        await client.spawn(command="x")
        w.journal.full = True
        client.say(messages.Testify(event="request-asked", fields=ASKED))  # type: ignore[arg-type]
        await w.settle()
        client.close()
        await until(lambda: w.records("sandbox-closed"))
        control = w.controller.control
        assert control is not None
        await until(lambda: control.testifying._lost)  # it is given up
        await w.settle()
        assert on_disk(tmp_path) == []

    lives(tmp_path, dialogue)
