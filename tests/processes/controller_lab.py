"""A controller in this process, with stand-ins for those it talks to: each writes down what it is told, in
one common list, so that a test can say in which order things happened."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.ipc.channel import Received, pair
from egressd.ipc.peer import Peer
from egressd.processes.cards import CARDS
from egressd.processes.config import Config
from egressd.processes.controller import Controller
from egressd.processes.leases import Sandbox
from egressd.processes.members import Caller
from egressd.processes.ritual import Auditing, Start
from egressd.ruleset.wants import WorkspaceWant

RECEIVES = {
    "warden": messages.TO_WARDEN,
    "relay": messages.TO_RELAY,
    "inspector": messages.TO_INSPECTOR,
}
PAYLOADS: dict[type, Any] = {
    messages.SetWorkspaces: list[WorkspaceWant],
    messages.SetSites: list[messages.Site],
    messages.SetNames: list[WorkspaceNames],
}


class Journal(Auditing):
    def __init__(self, process: str, told: list[tuple[str, Any, Any]]) -> None:
        super().__init__(process)
        self.told = told

    def record(self, event: str, fields: Any) -> None:
        self.told.append(("journal", event, dict(fields)))


class World:
    """`told`: (who, message, payload or None) in the order of arrival; events of the journal are there as
    ("journal", name, fields). What is in `refusing` is answered `Failed`; who is in `silent` says nothing."""

    def __init__(self, directory: Path, **policies: str) -> None:
        self.workspaces = directory / "workspaces"
        self.workspaces.mkdir()
        (directory / "controller").mkdir()
        for name, text in policies.items():
            self.write(name, text)
        config = Config(workspaces_dir=str(self.workspaces), run_dir=str(directory))
        self._unused, self._audit = pair()
        self.controller = Controller(Start(CARDS["controller"], config, {"audit": self._unused}))
        self.told: list[tuple[str, Any, Any]] = []
        self.refusing: set[type] = set()
        self.silent: set[str] = set()
        self.peers: dict[str, Peer] = {}
        self.controller.auditing = Journal("controller", told=self.told)

    def write(self, workspace: str, text: str) -> None:
        (self.workspaces / f"{workspace}.yaml").write_text(f"workspace: {workspace}\n{text}")

    def close(self) -> None:
        self._audit.close()
        self._unused.close()

    # ---- those it talks to

    def connect(self, name: str) -> None:
        ours, theirs = pair()
        self.controller.connect(name, ours)
        receives = RECEIVES.get(name, messages.TO_RESOLVER)
        replies = (messages.Granted, messages.Done, messages.Failed) if name == "resolver" else ()
        handler = self._requested if name == "resolver" else self._heard
        self.peers[name] = Peer(
            theirs, receives, handler=lambda peer, received: handler(name, peer, received), replies=replies
        )

    def disconnect(self, name: str) -> None:
        self.peers.pop(name).close()

    def _heard(self, name: str, peer: Peer, received: Received[Any]) -> None:
        message = received.message
        payload = None
        if type(message) in PAYLOADS:
            payload = msgspec.json.decode(received.payload(), type=PAYLOADS[type(message)])
        received.close()
        self.told.append((name, message, payload))
        if name in self.silent:
            return
        if type(message) in self.refusing:
            peer.send(messages.Failed(request=message.request, reason="unavailable", text="no"))
        else:
            peer.send(messages.Done(request=message.request))

    def _requested(self, name: str, peer: Peer, received: Received[Any]) -> None:
        self._heard(name, peer, received)

    async def settle(self) -> None:
        """Until nobody has anything to say any more."""
        quiet = 0
        seen = -1
        while quiet < 3:
            await asyncio.sleep(0.005)
            quiet = quiet + 1 if len(self.told) == seen else 0
            seen = len(self.told)

    # ---- what a test does and sees

    async def start(self, *names: str) -> None:
        await self.controller.begin()
        for name in names or ("warden", "resolver", "relay", "inspector"):
            self.connect(name)
        await self.settle()
        self.told.clear()

    def sandbox(self, workspace: str = "acme") -> Sandbox:
        return self.controller.leases.open(
            workspace=workspace, caller=Caller(1, 1, frozenset()), command="", since=0.0, quota=None
        )

    def of(self, kind: type) -> list[Any]:
        """Messages of one kind, in order."""
        return [message for _, message, _ in self.told if isinstance(message, kind)]

    def payload(self, kind: type) -> Any:
        """What the last message of this kind carried."""
        return [payload for _, message, payload in self.told if isinstance(message, kind)][-1]

    def order(self) -> list[str]:
        """`journal name-granted`, `warden Grant`, ..."""
        return [
            f"{who} {what if isinstance(what, str) else type(what).__name__}" for who, what, _ in self.told
        ]

    def records(self, event: str) -> list[dict[str, Any]]:
        return [fields for who, what, fields in self.told if (who, what) == ("journal", event)]

    async def ask(self, message: Any) -> Any:
        """As the resolver: the answer, be it Failed."""
        peer = self.peers["resolver"]
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        peer._waiting[message.request] = future
        peer.send(message)
        return (await asyncio.wait_for(future, 15)).message


@contextlib.asynccontextmanager
async def world(directory: Path, **policies: str) -> AsyncIterator[World]:
    made = World(directory, **policies)
    try:
        yield made
    finally:
        for peer in list(made.peers.values()):
            peer.close()
        for theirs in made.controller.peers.values():
            if theirs is not None:
                theirs.close()
        made.close()
        await asyncio.sleep(0)
