"""What a broker may ask its own sandbox to be held to, beside its workspace's limits; and what it is told of
what has been used of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_lab import Client, World, world

from egressd.ipc import messages
from egressd.processes import control
from egressd.processes.members import Caller

POLICY = """\
guard: {guard}
members: [user:4001]
allow:
  - {{host: api.test, ports: [8080/tcp]}}
limits: {limits}
"""
Dialogue = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "caller_of", lambda _: Caller(100, 4001, frozenset({4001}), 4001))


def play(directory: Path, dialogue: Dialogue, *, limits: str = "{}", guard: str = "enforce") -> None:
    async def scene() -> None:
        async with world(directory, acme=POLICY.format(limits=limits, guard=guard)) as made:
            await made.start()
            made.serve()
            await dialogue(made)

    asyncio.run(scene())


async def refusal(client: Client, message: Any) -> messages.Refusal:
    client.say(message)
    answer = await client.hear()
    assert isinstance(answer, messages.Refusal), answer
    return answer


def held(opened: Any) -> tuple[int | None, int | None, bool]:
    return opened.quota, opened.connections, opened.closed


KIB = 1024


@pytest.mark.parametrize(
    ("limits", "asked", "told"),
    [
        ("{}", {}, (None, None, False)),
        ("{egress_bytes: 64KiB}", {}, (64 * KIB, None, False)),
        ("{}", {"quota": 5}, (5, None, False)),
        ("{egress_bytes: 64KiB}", {"quota": 5}, (5, None, False)),
        ("{egress_bytes: 64KiB}", {"quota": 1 << 40}, (64 * KIB, None, False)),
        ("{egress_bytes: 64KiB}", {"quota": 64 * KIB}, (64 * KIB, None, False)),
        # open at a time, and opened ever: the one limit says nothing about the other
        ("{connections: 5}", {}, (None, None, False)),
        ("{connections: 5}", {"connections": 9}, (None, 9, False)),
        ("{connections: 5}", {"connections": 1}, (None, 1, False)),
        ("{}", {"closed": True}, (None, None, True)),
        ("{egress_bytes: 1KiB}", {"closed": True, "connections": 3}, (KIB, 3, True)),
    ],
)
def test_the_lower_bound_goes_to_the_kernel(
    tmp_path: Path, limits: str, asked: dict[str, Any], told: tuple[Any, ...]
) -> None:
    async def dialogue(w: World) -> None:
        client = w.client()
        await client.spawn(**asked)
        (opened,) = w.of(messages.OpenLink)
        assert held(opened) == told
        (record,) = w.records("sandbox-opening")
        recorded = {key: record[key] for key in ("quota", "connections", "closed") if key in record}
        names = zip(("quota", "connections", "closed"), told, strict=True)
        assert recorded == {name: value for name, value in names if value}
        client.close()

    play(tmp_path, dialogue, limits=limits)


@pytest.mark.parametrize(
    "asked",
    [
        {"quota": 0}, {"quota": -1}, {"quota": 1 << 63}, {"quota": "all"}, {"connections": 0},
        {"connections": messages.MOST_CONNECTIONS + 1}, {"connections": 1.5}, {"closed": None},
        {"open": True},
    ],
)  # fmt: skip
def test_what_is_no_bound_is_no_message(asked: dict[str, Any]) -> None:
    decoder = msgspec.json.Decoder(messages.FROM_CLIENT)
    assert decoder.decode(msgspec.json.encode({"type": "Attach"}))
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(msgspec.json.encode({"type": "Attach", **asked}))


@pytest.mark.parametrize("guard", ["off", "observe", "enforce"])
def test_a_warden_that_begins_anew_is_told_all_of_it(tmp_path: Path, guard: str) -> None:
    async def dialogue(w: World) -> None:
        client, bare = w.client(), w.client()
        await client.spawn(quota=700, connections=7)
        await bare.spawn(closed=True)
        w.disconnect("warden")
        await w.settle()
        w.told.clear()
        w.connect("warden")
        await w.settle()
        kept = {message.link: held(message) for message in w.of(messages.KeepLink)}
        assert kept == {1: (700, 7, False), 2: (None, None, True)}
        client.close()
        bare.close()

    play(tmp_path, dialogue, guard=guard)


# ---- what was used


def test_who_holds_a_sandbox_is_told_what_it_has_used(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        client = w.client()
        await client.spawn(connections=3)
        w.last_counters = {"in": (9, 900), "ok": (6, 600), "denied": (2, 200), "other": (1, 100)}
        w.spent = ("quota", "connections")
        for _ in range(3):
            client.say(messages.ReadSpent())
            spent = await client.hear()
            assert spent == messages.Spent(counters=w.last_counters, spent=("quota", "connections"))
        assert [message.link for message in w.of(messages.ReadLink)] == [1, 1, 1]
        client.close()

    play(tmp_path, dialogue)


def test_each_is_told_of_its_own_link(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        one, two = w.client(), w.client()
        await one.spawn()
        await two.spawn()
        for client in (two, one):
            client.say(messages.ReadSpent())
            assert isinstance(await client.hear(), messages.Spent)
        assert [message.link for message in w.of(messages.ReadLink)] == [2, 1]
        one.close()
        two.close()

    play(tmp_path, dialogue)


def test_who_holds_none_is_refused(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        client = w.client()
        assert (await refusal(client, messages.ReadSpent())).reason == "protocol"
        client.say(messages.Enter(workspace="acme"))
        assert isinstance(await client.hear(), messages.Terms)
        assert (await refusal(client, messages.ReadSpent())).reason == "protocol"
        assert w.of(messages.ReadLink) == []
        client.close()

    play(tmp_path, dialogue)


def test_without_a_warden_it_is_refused_and_the_sandbox_stays(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        client = w.client()
        await client.spawn()
        w.disconnect("warden")
        await w.settle()
        assert (await refusal(client, messages.ReadSpent())).reason == "unavailable"
        w.connect("warden")
        await w.settle()
        client.say(messages.ReadSpent())
        assert isinstance(await client.hear(), messages.Spent)
        client.close()

    play(tmp_path, dialogue)


# ---- what others see of it


def test_a_sandbox_is_shown_with_what_it_is_held_to(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        client, bare = w.client(), w.client()
        await client.spawn(quota=700, connections=7)
        await bare.spawn(closed=True)
        asker = w.client()
        shown = await asker.ask(messages.Ask(what="status", workspace="acme"))
        found = [
            {key: each[key] for key in ("quota", "connections", "closed")} for each in shown["sandboxes"]
        ]
        assert found == [
            {"quota": 700, "connections": 7, "closed": False},
            {"quota": None, "connections": None, "closed": True},
        ]
        why = await asker.ask(messages.Why(workspace="acme", subject="eg1"))
        assert why["details"][-2:] == [
            "it may send 700 bytes, denied ones included",
            "it may open 7 connections in all",
        ]
        why = await asker.ask(messages.Why(workspace="acme", subject="eg2"))
        assert "[closed]: the sandbox was started without a network" in why["details"][-1]
        for each in (client, bare, asker):
            each.close()

    play(tmp_path, dialogue)


def test_who_reads_without_end_keeps_the_warden_from_nobody(tmp_path: Path) -> None:
    """Of one account one reading at a time, however many sandboxes it has."""

    async def dialogue(w: World) -> None:
        clients = [w.client() for _ in range(5)]
        for client in clients:
            await client.spawn()
        w.silent.add("warden")
        for client in clients:
            client.say(messages.ReadSpent())
        await w.settle()
        assert len(w.of(messages.ReadLink)) == 1
        for client in clients:
            client.close()

    play(tmp_path, dialogue)
