"""Snapshots of the books: complete or not used, in one epoch only growing, from one epoch to the next without
a gap; and what the auditor is told of names."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_lab import NOTHING, World, world

from egressd.ipc import messages
from egressd.ipc.channel import Channel, pair
from egressd.model.errors import Refused
from egressd.processes import snapshots
from egressd.processes.ritual import Auditing
from egressd.ruleset.layout import Kind, Mark
from egressd.ruleset.observe import ElementCount, LinkCounts, Tally

POLICY = """\
guard: enforce
members: [user:4001]
allow:
  - {host: api.test, ports: [8080/tcp]}
  - {host: idle.test, ports: [8080/tcp]}
  - {host: '*.search.test', ports: [8080/tcp]}
"""
WITHOUT_API = POLICY.replace("  - {host: api.test, ports: [8080/tcp]}\n", "")
numbers = itertools.count(1)
Dialogue = Callable[[World], Coroutine[Any, Any, None]]
FIELDS = {
    "workspace", "snapshot", "host", "kind", "out_packets", "out_bytes", "in_packets", "in_bytes",
    "connections", "dialled_packets", "dialled_bytes", "addresses",
}  # fmt: skip
CLOSING = {
    "workspace", "snapshot", "epoch", "rows", "full", "links", "in_packets", "in_bytes", "ok_packets",
    "ok_bytes", "denied_packets", "denied_bytes", "other_packets", "other_bytes", "balanced", "policy",
    "guard", "names_refused", "flows_refused",
}  # fmt: skip


def play(directory: Path, dialogue: Dialogue, **policies: str) -> None:
    async def scene() -> None:
        async with world(directory, **(policies or {"acme": POLICY})) as made:
            await made.start()
            await dialogue(made)

    asyncio.run(scene())


def counted(w: World, *, denied: int = 0, replies: dict[str, int] | None = None, **hosts: int) -> None:
    """The kernel now says this: packets of each host (dots as `_`), of 10 bytes each, on link eg1."""
    wants = w.controller.wants["acme"]
    names = {name.replace("_", "."): packets for name, packets in hosts.items()}
    elements = []
    marks: dict[str, int] = {}
    blocks = dict(w.controller.blocks("acme"))
    for name, packets in names.items():
        mark = int(Mark(Kind.FORWARD, wants.index, blocks[name]))
        marks[name] = mark
        elements.append(ElementCount("acme", "198.18.0.4", "tcp", 8080, mark, name, packets, 10 * packets))
    admitted = sum(names.values())
    gone = sum(t.packets for t in w.controller.remembered.account("acme").retired.values())
    ok = admitted + gone
    link = LinkCounts(
        in_=Tally(ok + denied, 10 * (ok + denied)), ok=Tally(ok, 10 * ok), denied=Tally(denied, 10 * denied)
    )
    w.counters = msgspec.structs.replace(
        NOTHING,
        links={"eg1": link},
        elements=tuple(elements),
        denied={"acme": {"unlisted": Tally(denied, 10 * denied), "shape": Tally()}},
        replies={marks[name]: Tally(n, 100 * n) for name, n in (replies or {}).items()},
        opened={marks[name]: Tally(n, 0) for name, n in (replies or {}).items()},
    )


def rows(w: World) -> list[dict[str, Any]]:
    return w.records("counted")


def last(w: World) -> dict[str, Any]:
    return w.records("snapshot")[-1]


def hosts(w: World) -> dict[str, int]:
    """Packets by host, as a reader of all snapshots of the last epoch knows them."""
    known: dict[str, int] = {}
    ids = {each["snapshot"] for each in w.records("snapshot") if each["epoch"] == last(w)["epoch"]}
    for row in rows(w):
        if row["snapshot"] in ids and "host" in row:
            assert row["out_packets"] >= known.get(row["host"], 0), "nothing shrinks within an epoch"
            known[row["host"]] = row["out_packets"]
    return known


async def take(w: World) -> str:
    return (await w.controller.snapshots.take("acme"))["acme"]


def test_a_row_for_each_that_counted_anything_then_the_totals(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3, idle_test=0, denied=2, replies={"api.test": 4})
        found = await take(w)
        api, denied = rows(w)
        assert set(api) == FIELDS and set(last(w)) == CLOSING
        assert (api["host"], api["kind"], api["out_packets"], api["out_bytes"]) == ("api.test", "host", 3, 30)
        assert (api["in_packets"], api["in_bytes"], api["connections"]) == (4, 400, 4)
        assert denied == {
            "workspace": "acme", "snapshot": found, "reason": "unlisted",
            "denied_packets": 2, "denied_bytes": 20,
        }  # fmt: skip
        closing = last(w)
        assert w.order()[-1] == "journal snapshot" and found == closing["snapshot"] == api["snapshot"]
        assert found == f"s{found.split('-')[0][1:]}-{closing['epoch']}"
        assert (closing["rows"], closing["full"], closing["links"], closing["balanced"]) == (2, True, 1, True)
        assert (closing["in_packets"], closing["ok_packets"], closing["denied_packets"]) == (5, 3, 2)
        policy = w.controller.policies["acme"]
        assert (closing["policy"], closing["guard"]) == (policy.digest, "enforce")

    play(tmp_path, dialogue)


def test_the_next_has_only_what_changed(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3, idle_test=1)
        await take(w)
        w.told.clear()
        counted(w, api_test=3, idle_test=2)
        await take(w)
        assert [row["host"] for row in rows(w)] == ["idle.test"]
        assert (last(w)["rows"], last(w)["full"]) == (1, False)
        w.told.clear()
        await take(w)  # asked for: there is one though nothing changed
        assert not rows(w) and last(w)["rows"] == 0

    play(tmp_path, dialogue)


def test_the_watch_records_at_first_then_what_changes_and_all_of_it_every_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3, idle_test=1)
        await w.controller.check_books()
        assert last(w)["full"] and len(rows(w)) == 2
        w.told.clear()
        counted(w, api_test=4, idle_test=1)
        await w.controller.check_books()
        assert not w.told, "it is not a minute yet"
        monkeypatch.setattr(snapshots, "EVERY", 0.0)
        await w.controller.check_books()
        assert not last(w)["full"] and [row["out_packets"] for row in rows(w)] == [4]
        w.told.clear()
        await w.controller.check_books()
        assert not w.told, "nothing has changed"
        monkeypatch.setattr(snapshots, "FULL_EVERY", 0.0)
        await w.controller.check_books()
        assert last(w)["full"] and len(rows(w)) == 2

    play(tmp_path, dialogue)


def test_one_reading_serves_the_books_and_the_snapshot(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3)
        readings = []
        read = w._read
        w._read = lambda *a: (readings.append(type(a[2])), read(*a))[1]  # type: ignore[assignment]
        await w.controller.check_books()
        assert readings.count(messages.ReadCounters) == 1 and last(w)["rows"] == 1

    play(tmp_path, dialogue)


def test_a_policy_that_changes_is_a_snapshot_and_a_row_that_goes_counts_on_when_it_returns(
    tmp_path: Path,
) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3, idle_test=1, replies={"api.test": 1})
        await take(w)
        w.told.clear()
        w.write("acme", WITHOUT_API)
        gone = {"elements": {"api.test": (3, 30)}, "replies": {"api.test": (6, 600)}}
        w.controller._retire(messages.Retired(workspace="acme", **gone, opened={"api.test": (2, 120)}))
        counted(w, idle_test=1)
        await w.controller.apply(by="test")
        await w.settle()
        (changed,) = w.records("policy-changed")
        assert changed["policy"] == last(w)["policy"] != changed["policy_before"]
        assert changed["policy_before"].startswith("sha256:")
        assert hosts(w) == {"api.test": 3} and rows(w)[0]["kind"] == "removed"
        w.write("acme", POLICY)
        await w.controller.apply(by="test")
        counted(w, api_test=5, idle_test=1, replies={"api.test": 1})
        await take(w)
        assert hosts(w)["api.test"] == 8
        back = rows(w)[-1]
        assert (back["in_packets"], back["connections"]) == (7, 3), "of both lives, and of after the snapshot"

    play(tmp_path, dialogue)


def test_a_host_of_which_one_port_goes_received_what_it_received(tmp_path: Path) -> None:
    """Its other mark counts on; what the one that went had counted is there once."""

    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3, replies={"api.test": 10})
        await take(w)
        w.controller._retire(
            messages.Retired(
                workspace="acme", elements={}, replies={"api.test": (7, 700)}, opened={"api.test": (7, 0)}
            )
        )
        counted(w, api_test=3, replies={"api.test": 3})
        first = last(w)["epoch"]
        await take(w)
        assert last(w)["epoch"] == first
        assert [row["in_packets"] for row in rows(w) if row.get("host") == "api.test"] == [10]
        counted(w, api_test=4, replies={"api.test": 5})
        await take(w)
        found = rows(w)[-1]
        assert (found["in_packets"], found["in_bytes"], found["connections"]) == (12, 1200, 12)

    play(tmp_path, dialogue)


def test_what_an_open_guard_received_is_not_lost_when_it_closes(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        w.controller._retire(
            messages.Retired(workspace="acme", elements={}, replies={"(unlisted)": (4, 400)})
        )
        w.counters = msgspec.structs.replace(NOTHING, unlisted={"acme": Tally(2, 20)})
        await take(w)
        [row] = [row for row in rows(w) if row.get("host") == "(unlisted)"]
        assert (row["kind"], row["out_packets"], row["in_packets"]) == ("unlisted", 2, 4)

    play(tmp_path, dialogue)


def test_what_somebody_deleted_from_the_shared_sets_is_not_lost(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3, replies={"api.test": 10})
        await take(w)
        w.controller._retire_lost({"in acme api.test": (10, 1000), "opened acme api.test": (10, 0)})
        counted(w, api_test=4, replies={"api.test": 1})
        await take(w)
        found = rows(w)[-1]
        assert (found["in_packets"], found["connections"]) == (11, 11)

    play(tmp_path, dialogue)


def test_a_workspace_that_goes_leaves_its_last_numbers_and_returns_in_another_epoch(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        counted(w, api_test=3)
        w.serve()
        path = w.workspaces / "acme.yaml"
        text = path.read_text()
        path.unlink()
        await w.controller.apply(by="test")
        await w.settle()
        first = last(w)
        assert hosts(w) == {"api.test": 3}
        assert w.records("policy-changed")[-1]["policy"] is None
        path.write_text(text)
        await w.controller.apply(by="test")
        counted(w, api_test=1)
        await take(w)
        assert last(w)["epoch"] != first["epoch"] and hosts(w) == {"api.test": 1}

    play(tmp_path, dialogue)


# ---- names of wildcards


def grant(host: str, link: int) -> messages.GrantName:
    return messages.GrantName(
        request=next(numbers), workspace="acme", link=link, host=host, wildcard="*.search.test",
        slots4=(IPv4Address("11.22.33.40"),) * 4, slots6=(IPv6Address("2a10:5353::40"),) * 4,
    )  # fmt: skip


async def release(w: World, host: str, packets: int, *, replies: int = 0) -> None:
    w.controller._retire(messages.Retired(workspace="acme", elements={host: (packets, 10 * packets)}))
    received, opened = {host: (replies, 100 * replies)}, {host: (replies, 0)}
    w.controller._retire(messages.Retired(workspace="acme", elements={}, replies=received, opened=opened))
    await w.ask(messages.ReleaseNames(request=next(numbers), workspace="acme", hosts=(host,)))


def test_a_name_keeps_its_row_when_it_is_given_back_and_counts_on_when_it_returns(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        link = w.sandbox().link.number
        await w.ask(grant("a.search.test", link))
        counted(w, a_search_test=5, api_test=1, replies={"a.search.test": 2})
        await take(w)
        (row,) = [row for row in rows(w) if row["host"] == "a.search.test"]
        assert (row["kind"], row["wildcard"], row["addresses"]) == (
            "granted", "*.search.test", "11.22.33.40 2a10:5353::40",
        )  # fmt: skip
        await release(w, "a.search.test", 6, replies=4)
        counted(w, api_test=1)
        await take(w)
        assert hosts(w) == {"a.search.test": 6, "api.test": 1}, "and nothing under the wildcard"
        assert rows(w)[-1]["in_packets"] == 4
        await w.ask(grant("a.search.test", link))
        counted(w, a_search_test=2, api_test=1)
        await take(w)
        assert hosts(w) == {"a.search.test": 8, "api.test": 1}
        assert last(w)["ok_packets"] == 9 and last(w)["balanced"]

    play(tmp_path, dialogue)


def test_refusals_are_added_up_over_the_lives_of_who_counts_them(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.refused = {"resolver": {"acme": {"name": 5, "type": 1}}, "inspector": {"acme": {"ech": 2}}}
        await take(w)
        assert (last(w)["names_refused"], last(w)["flows_refused"]) == (6, 2)
        w.refused = {"resolver": {"acme": {"name": 4}}, "inspector": {}}  # another one; and one that is gone
        await take(w)
        assert (last(w)["names_refused"], last(w)["flows_refused"]) == (10, 2)

    play(tmp_path, dialogue)


def test_too_many_names_given_back_begin_another_epoch_without_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dialogue(w: World) -> None:
        monkeypatch.setattr(snapshots, "MAX_RELEASED", 0)
        link = w.sandbox().link.number
        await w.ask(grant("a.search.test", link))
        counted(w, a_search_test=5)
        await take(w)
        before = last(w)["epoch"]
        await release(w, "a.search.test", 7)
        counted(w, api_test=1)
        await take(w)
        assert last(w)["epoch"] != before and last(w)["full"]
        # 5 of the 7 are in the epoch before
        assert hosts(w) == {"*.search.test": 2, "api.test": 1} and last(w)["ok_packets"] == 3

    play(tmp_path, dialogue)


# ---- epochs


def test_another_warden_is_another_epoch_that_begins_where_the_last_one_ended(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3, denied=1, replies={"api.test": 2})
        await take(w)
        before = last(w)
        w.disconnect("warden")
        await w.settle()
        w.connect("warden")
        await w.settle()
        counted(w, api_test=5, denied=1, replies={"api.test": 2})
        await take(w)
        assert last(w)["epoch"] > before["epoch"] and last(w)["full"]
        assert hosts(w) == {"api.test": 2}
        assert (last(w)["ok_packets"], last(w)["denied_packets"], rows(w)[-1]["in_packets"]) == (2, 0, 0)

    play(tmp_path, dialogue)


def test_another_controller_goes_on_from_the_last_snapshot_in_the_journal(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        link = w.sandbox().link.number
        await w.ask(grant("a.search.test", link))
        counted(w, api_test=3, a_search_test=5)
        await take(w)
        epoch = last(w)["epoch"]
        again = type(w.controller.remembered)(tmp_path / "controller")
        again.load()
        w.controller.remembered.counted = again.counted
        w.controller.snapshots = snapshots.Snapshots(w.controller)
        w.controller.grants.held = {}
        w.controller._retire(messages.Retired(workspace="acme", elements={"a.search.test": (6, 60)}))
        counted(w, api_test=4)
        await take(w)
        assert last(w)["epoch"] != epoch
        assert hosts(w) == {"api.test": 1, "*.search.test": 1} and last(w)["ok_packets"] == 2

    play(tmp_path, dialogue)


def test_lost_counters_are_another_epoch_from_nothing(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=300)
        await take(w)
        epoch = last(w)["epoch"]
        w.controller.remembered.account("acme").end(LinkCounts(in_=Tally(9, 90), ok=Tally(9, 90)))
        counted(w, api_test=2)
        await w.controller._reopen_books()
        assert w.records("books-restarted")
        await take(w)
        assert last(w)["epoch"] != epoch and hosts(w) == {"api.test": 2}

    play(tmp_path, dialogue)


def test_what_shrinks_unannounced_is_not_counted_twice(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=300, idle_test=1)
        await take(w)
        epoch = last(w)["epoch"]
        counted(w, api_test=2, idle_test=4)
        await take(w)
        assert last(w)["epoch"] != epoch and hosts(w) == {"idle.test": 3}

    play(tmp_path, dialogue)


# ---- the channel


def test_who_does_not_take_it_gets_no_closing_record_and_then_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dialogue(w: World) -> None:
        monkeypatch.setattr(snapshots, "_PATIENCE", 0.02)
        w.sandbox()
        counted(w, api_test=3)
        await take(w)
        w.told.clear()
        counted(w, api_test=4, idle_test=1)
        w.journal.full = True
        with pytest.raises(Refused, match="does not take records"):
            await take(w)
        assert not w.told and w.journal.lost == 3
        w.journal.full = False
        counted(w, api_test=4, idle_test=2)
        await take(w)
        assert last(w)["full"] and last(w)["rows"] == 2

    play(tmp_path, dialogue)


def test_one_whose_rows_went_to_two_auditors_is_followed_by_a_whole_one(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.sandbox()
        counted(w, api_test=3, denied=2)
        await take(w)
        counted(w, api_test=4, denied=3)
        w.journal.full = True
        taking = asyncio.ensure_future(take(w))
        await asyncio.sleep(0.05)  # it waits for room, on the channel of the first
        w.controller.snapshots.distrust()
        w.journal.full = False
        with pytest.raises(Refused, match="started again"):
            await taking
        await take(w)
        assert last(w)["full"] and last(w)["rows"] == 2
        assert hosts(w) == {"api.test": 4}

    play(tmp_path, dialogue)


def test_ten_thousand_rows_arrive_whole_and_leave_room_for_others(tmp_path: Path) -> None:
    """Over a real channel, to a reader that is slower than we are."""
    policy = "guard: enforce\nmembers: [user:4001]\nallow:\n" + "".join(
        f"  - {{host: host-{number}.many.test, ports: [8080/tcp]}}\n" for number in range(10_000)
    )

    async def dialogue(w: World) -> None:
        ours, theirs = pair()
        theirs.setblocking(False)
        auditing = Auditing.over("controller", ours)
        w.controller.auditing = auditing
        channel: Channel[Any] = Channel(theirs, messages.TO_AUDITOR)
        heard: list[Any] = []
        done = asyncio.Event()

        async def read() -> None:
            while not done.is_set() or _more(channel, heard):
                for _ in range(random.Random(len(heard)).randrange(1, 300)):
                    if not _more(channel, heard):
                        break
                await asyncio.sleep(0.004)

        async def others() -> None:
            for number in itertools.count():
                if done.is_set():
                    return
                auditing.record("sandbox-opening", {"link": f"eg{number + 1}"})
                await asyncio.sleep(0.002)

        reading = asyncio.create_task(read())
        speaking = asyncio.create_task(others())
        counted(w, **{f"host-{number}_many_test": number + 1 for number in range(10_000)})
        found = (await w.controller.snapshots.take("acme"))["acme"]
        done.set()
        await asyncio.gather(reading, speaking)
        mine = [
            m.fields for m in heard if isinstance(m, messages.Event) and m.fields.get("snapshot") == found
        ]
        assert len(mine) == 10_001 and mine[-1]["rows"] == 10_000
        assert auditing.lost == 0 and not [m for m in heard if isinstance(m, messages.Losses)]
        spoken = [m.fields["link"] for m in heard if getattr(m, "event", "") == "sandbox-opening"]
        assert spoken == [f"eg{n + 1}" for n in range(len(spoken))] and len(spoken) > 5
        theirs.close()

    play(tmp_path, dialogue, acme=policy)


def _more(channel: Channel[Any], heard: list[Any]) -> bool:
    try:
        heard.append(channel.receive().message)
    except BlockingIOError:
        return False
    return True


def test_a_policy_does_not_wait_for_a_journal_that_takes_nothing(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        w.serve()
        counted(w, api_test=3)
        w.journal.full = True
        (w.workspaces / "acme.yaml").unlink()
        await asyncio.wait_for(w.controller.apply(by="test"), 2)
        assert w.payload(messages.SetWorkspaces) == [] and not w.records("snapshot")
        w.journal.full = False
        await asyncio.sleep(0.05)
        assert hosts(w) == {"api.test": 3}, "and the journal has it when there is room"

    play(tmp_path, dialogue)


def test_an_older_reading_is_not_handed_over_after_a_newer_one(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        counted(w, api_test=3)
        older = await w.controller.snapshots.draft("acme")
        counted(w, api_test=4)
        await take(w)
        await w.controller.snapshots.hand_over(older)
        assert hosts(w) == {"api.test": 4} and len(w.records("snapshot")) == 1

    play(tmp_path, dialogue)


def test_half_of_the_channel_is_left_to_who_cannot_wait() -> None:
    ours, theirs = pair()
    auditing = Auditing.over("controller", ours)
    event = messages.Event(process="controller", event="counted", fields={"a": "b" * 100})
    offered = 0
    while auditing.offer(event):
        offered += 1
    assert offered > 50 and auditing.lost == 0
    for _ in range(offered // 2):
        auditing.record("sandbox-opening", {"a": "b" * 100})
    assert auditing.lost == 0
    while not auditing.lost:
        auditing.record("sandbox-opening", {"a": "b" * 100})
    assert not auditing.offer(event)
    for each in (ours, theirs):
        each.close()
    assert not Auditing("controller").offer(event), "nobody is there"


# ---- which host a block is


def blocks(w: World, workspace: str = "acme") -> dict[int, str]:
    """As the auditor knows them."""
    known: dict[int, str] = {}
    for message in w.journal.blocks:
        if message.workspace == workspace:
            known |= message.hosts
    return known


def test_the_auditor_is_told_of_every_block_at_the_start_and_when_the_policy_changes(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        numbers = w.controller.blocks("acme")
        own = {0: "(resolver)", 16383: "(unlisted)"}
        assert blocks(w) == own | {block: key for key, block in numbers.items()}
        assert {"api.test", "idle.test", "*.search.test"} == set(numbers)
        assert {m.index for m in w.journal.blocks} == {w.controller.wants["acme"].index}
        api = numbers["api.test"]
        w.write("acme", WITHOUT_API + "  - {host: new.test, ports: [7/tcp]}\n")
        await w.controller.apply(by="test")
        await w.settle()
        assert "new.test" in blocks(w).values()
        assert blocks(w)[api] == "api.test", "its last flows end now"

    play(tmp_path, dialogue)


def test_the_auditor_is_told_of_names_by_their_own_name_and_a_new_auditor_of_all(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        link = w.sandbox().link.number
        answer = await w.ask(grant("a.search.test", link))
        assert blocks(w)[answer.block] == "a.search.test"
        await release(w, "a.search.test", 1)
        w.journal.blocks.clear()
        ours, theirs = pair()
        w.controller.auditor_came(ours)
        await w.settle()
        assert blocks(w)[answer.block] == "a.search.test", "until another has its block"
        theirs.close()
        ours.close()

    play(tmp_path, dialogue)


def test_a_name_granted_while_all_are_told_is_told_too(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        link = w.sandbox().link.number
        w.journal.full = True
        w.controller.tell_names()
        await asyncio.sleep(0.02)
        answer = await w.ask(grant("a.search.test", link))
        w.journal.full = False
        await asyncio.sleep(0.05)
        assert blocks(w)[answer.block] == "a.search.test"

    play(tmp_path, dialogue)
