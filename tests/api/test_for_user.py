"""Asking for others at the control socket: who may, when, and what never."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from api_scene import ACME, MEMBER, OTHER, RIVAL, STRANGER, World, world

from egressd.ipc import messages
from egressd.processes import control
from egressd.processes.members import Caller

API = 4108
PROVES = messages.Prove(workspace="rival")


def play(directory: Path, caller: int, story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def scene() -> None:
        async with world(directory, acme=ACME, rival=RIVAL) as made:
            await made.start()
            made.serve()
            made.controller.control._api = API  # type: ignore[union-attr]
            await story(made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "caller_of", lambda _: Caller(1, caller, frozenset({caller}), caller))
        asyncio.run(scene())


def names(status: Any) -> set[str]:
    return {row["workspace"] for row in status["workspaces"]}


@pytest.mark.parametrize("caller", [0, API])
@pytest.mark.parametrize(
    ("uid", "gids", "sees"),
    [
        (MEMBER, (), {"acme"}),
        (OTHER, (), {"rival"}),
        (STRANGER, (), set()),
        (STRANGER, (MEMBER,), set()),  # acme's member is a user, not a group
        (0, (), {"acme", "rival"}),
    ],
)
def test_who_is_asked_for_sees_what_they_see(
    tmp_path: Path, caller: int, uid: int, gids: tuple[int, ...], sees: set[str]
) -> None:
    async def story(w: World) -> None:
        client = w.client()
        client.say(messages.ForUser(uid=uid, gids=gids))
        assert names(await client.ask(messages.Ask(what="status"))) == sees
        listed = await client.ask(messages.Ask(what="workspaces"))
        assert listed == {"all": uid == 0, "workspaces": sorted(sees)}
        proof = await client.ask(PROVES)
        assert isinstance(proof, messages.Refusal) == ("rival" not in sees)
        for what in ("ruleset", "diff", "metrics"):
            refused = await client.ask(messages.Ask(what=what))
            assert isinstance(refused, messages.Refusal) == (uid != 0), what
        client.close()

    play(tmp_path, caller, story)


@pytest.mark.parametrize("caller", [MEMBER, STRANGER, 4107])
def test_others_may_not_and_are_cut_off(tmp_path: Path, caller: int) -> None:
    """Not even for themselves; and nothing that was sent behind it is answered."""

    async def story(w: World) -> None:
        for uid in (0, caller, OTHER):
            client = w.client()
            client.say(messages.ForUser(uid=uid, gids=()))
            client.say(messages.Ask(what="status"))
            refused = await client.hear()
            assert isinstance(refused, messages.Refusal) and "HTTP API" in refused.text
            async with asyncio.timeout(5):
                while not client.peer.closed:
                    await asyncio.sleep(0.005)
            assert client._heard.empty()

    play(tmp_path, caller, story)


@pytest.mark.parametrize("caller", [0, API])
@pytest.mark.parametrize(
    "before",
    [
        messages.ForUser(uid=MEMBER, gids=()),
        messages.Ask(what="workspaces"),
        messages.Enter(workspace="acme"),
    ],
)
def test_it_is_said_once_and_first(tmp_path: Path, caller: int, before: Any) -> None:
    async def story(w: World) -> None:
        client = w.client()
        client.say(before)
        client.say(messages.ForUser(uid=0, gids=(0,)))
        client.say(messages.Ask(what="ruleset"))
        async with asyncio.timeout(5):
            while not client.peer.closed:
                await asyncio.sleep(0.005)
        heard = [client._heard.get_nowait() for _ in range(client._heard.qsize())]
        assert isinstance(heard[-1], messages.Refusal)
        assert "said once, before anything else" in heard[-1].text or "not asked for" in heard[-1].text

    play(tmp_path, caller, story)


@pytest.mark.parametrize(
    "message",
    [
        messages.Enter(workspace="acme"),
        messages.Apply(),
        messages.Apply(dry_run=True),
        messages.ChangeKey(),
    ],
)
@pytest.mark.parametrize("uid", [0, MEMBER])
def test_nothing_is_changed_or_begun_for_others(tmp_path: Path, message: Any, uid: int) -> None:
    async def story(w: World) -> None:
        client = w.client()
        client.say(messages.ForUser(uid=uid, gids=()))
        refused = await client.ask(message)
        assert isinstance(refused, messages.Refusal) and "not asked for somebody else" in refused.text
        assert isinstance(await client.ask(messages.Ask(what="workspaces")), dict), "it may go on reading"
        assert not w.records("policy-changed") and not w.of(messages.RotateKey)
        client.close()

    play(tmp_path, 0, story)


def test_a_namespace_is_not_attached_for_others(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        client = w.client()
        client.say(messages.ForUser(uid=MEMBER, gids=()))
        descriptor = os.open("/dev/null", os.O_RDONLY)
        client.peer.send(messages.Attach(), descriptor=descriptor)
        os.close(descriptor)
        assert isinstance(await client.hear(), messages.Refusal)
        client.say(messages.Ended(status=0))  # never answered, and of no sandbox: nothing comes of it
        assert not w.controller.leases.by_link and not w.of(messages.OpenLink)
        client.close()

    play(tmp_path, 0, story)


def test_every_message_of_a_client_is_of_one_kind_or_the_other() -> None:
    """A message that is new is refused for others until somebody says otherwise."""
    reading = {messages.Ask, messages.Why, messages.SelectRoute, messages.Prove}
    assert set(control._FOR_OTHERS.__args__) == reading
