"""A controller in this process, with stand-ins for those it talks to: each writes down what it is told, in
one common list, so that a test can say in which order things happened."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.ipc.channel import Received, pair
from egressd.ipc.peer import Peer
from egressd.processes.cards import CARDS
from egressd.processes.config import Config
from egressd.processes.control import ControlSocket
from egressd.processes.controller import Controller
from egressd.processes.leases import Sandbox
from egressd.processes.members import Caller
from egressd.processes.ritual import Auditing, Start
from egressd.residency.prefixes import Group, Source, Table
from egressd.ruleset.observe import Counters
from egressd.ruleset.wants import WorkspaceWant

RECEIVES = {
    "warden": messages.TO_WARDEN,
    "relay": messages.TO_RELAY,
    "inspector": messages.TO_INSPECTOR,
    "evidence": messages.TO_EVIDENCE,
}
READING = (messages.ReadCounters, messages.ReadDrift, messages.ReadRuleset, messages.ReadJournal,
           messages.ReadRefused)  # fmt: skip
NOTHING = Counters(links={}, denied={}, unlisted={}, elements=(), replies={}, opened={}, late={})
STATE = messages.JournalState(
    request=1, records=7, octets=900, segments=1, queued=0, lag=0.0, lost={}, checkpoint_size=7,
    checkpoint_time=1.0,
)  # fmt: skip
PAYLOADS: dict[type, Any] = {
    messages.MakeProof: Any,
    messages.SetWorkspaces: list[WorkspaceWant],
    messages.SetSites: list[messages.Site],
    messages.SetNames: list[WorkspaceNames],
}


class Journal(Auditing):
    def __init__(self, process: str, told: list[tuple[str, Any, Any]]) -> None:
        super().__init__(process)
        self.told = told

        self.blocks: list[messages.NameBlocks] = []
        self.full = False  # there is no room for those who can wait

    def record(self, event: str, fields: Any) -> None:
        self.told.append(("journal", event, dict(fields)))

    def offer(self, message: Any) -> bool:
        if isinstance(message, messages.NameBlocks) and not self.full:
            self.blocks.append(message)
        elif isinstance(message, messages.BindSource) and not self.full:
            self.pass_on(message)
        elif not self.full:
            self.record(message.event, message.fields)
        return not self.full


def published(name: str, prefixes: Mapping[str, str]) -> Table:
    groups = tuple(
        Group(
            region="" if code == "anycast" else f"{code.lower()}-test-1",
            services=(),
            prefixes=tuple(text.split()),
            anycast=code == "anycast",
            countries=() if code == "anycast" else (code,),
        )
        for code, text in prefixes.items()
    )
    digest = hashlib.sha256(repr(prefixes).encode()).hexdigest()
    source = Source(name=f"{name}.txt", digest=f"sha256:{digest}", bytes=1)
    day = date(2026, 11, 1)
    return Table(
        name=name, provider="lab", format="cidr", source=source, published=day, imported=day, groups=groups
    )


class Client:
    """One connection to the control socket."""

    def __init__(self, directory: Path) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(directory / "control.sock"))
        self._heard: asyncio.Queue[Any] = asyncio.Queue()
        self.peer = Peer(sock, messages.TO_CLIENT, handler=lambda _, r: self._heard.put_nowait(r.message))

    def say(self, message: Any) -> None:
        self.peer.send(message)

    async def hear(self) -> Any:
        return await asyncio.wait_for(self._heard.get(), 15)

    async def ask(self, message: Any) -> Any:
        """The document; or the Refusal."""
        self.say(message)
        text = ""
        while isinstance(part := await self.hear(), messages.Part):
            text += part.text
            if part.last:
                return json.loads(text)
        return part

    def resume(self, link: int) -> None:
        descriptor = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.peer.send(messages.Resume(link=link), descriptor=descriptor)
        os.close(descriptor)

    async def spawn(self, workspace: str = "acme", **attach: Any) -> messages.Lease:
        self.say(messages.Enter(workspace=workspace))
        assert isinstance(await self.hear(), messages.Terms)
        descriptor = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.peer.send(messages.Attach(**attach), descriptor=descriptor)
        os.close(descriptor)
        lease = await self.hear()
        assert isinstance(lease, messages.Lease), lease
        return lease

    def close(self) -> None:
        self.peer.close()


class World:
    """`told`: (who, message, payload or None) in the order of arrival; events of the journal are there as
    ("journal", name, fields). What is in `refusing` is answered `Failed`; who is in `silent` says nothing."""

    def __init__(self, directory: Path, **policies: str) -> None:
        self.workspaces = directory / "workspaces"
        self.workspaces.mkdir(exist_ok=True)  # a controller before this one may have been here
        (directory / "controller").mkdir(exist_ok=True)
        for name, text in policies.items():
            self.write(name, text)
        self.tables = directory / "residency" / "tables"
        self.tables.mkdir(parents=True, exist_ok=True)
        config = Config(
            workspaces_dir=str(self.workspaces),
            run_dir=str(directory),
            residency_dir=str(directory / "residency"),
        )
        self._unused, self._audit = pair()
        self._listener: socket.socket | None = None
        self.controller = Controller(Start(CARDS["controller"], config, {"audit": self._unused}))
        self.told: list[tuple[str, Any, Any]] = []
        self.refusing: set[type] = set()
        self.silent: set[str] = set()
        self.slow: set[type] = set()  # what is not answered by itself
        self.peers: dict[str, Peer] = {}
        self.journal = Journal("controller", told=self.told)
        self.controller.auditing = self.journal
        # what is read of the kernel; reading is not written down
        self.counters = NOTHING
        self.drift: list[str] = []
        self.ruleset = ""
        self.flows: dict[str, list[tuple[int, str]]] = {}  # by workspace: (mark, real address)
        self.state = STATE
        self.refused: dict[str, dict[str, dict[str, int]]] = {}  # by who refused, workspace and reason
        self.last_counters: dict[str, tuple[int, int]] = {}  # of links that are closed, or read
        self.spent: tuple[str, ...] = ()  # budgets of them that have refused something
        self.directory = directory
        self.proving: list[asyncio.Future[None]] = []
        self.held: asyncio.Event | None = None  # until then, no proof is ready

    def serve(self) -> None:
        """Take clients in."""
        (self.directory / "control.sock").unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self.directory / "control.sock"))
        listener.listen()
        self.controller.control = ControlSocket(self.controller, listener)
        self.controller.control.listen()
        self._listener = listener

    def client(self) -> Client:
        return Client(self.directory)

    def write(self, workspace: str, text: str) -> None:
        (self.workspaces / f"{workspace}.yaml").write_text(f"workspace: {workspace}\n{text}")

    def table(self, name: str, **prefixes: str) -> None:
        """A table of published prefixes: code of the country, or `anycast`, -> prefixes."""
        (self.tables / f"{name}.json").write_bytes(published(name, prefixes).encode())

    def close(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        self._audit.close()
        self._unused.close()

    # ---- those it talks to

    def connect(self, name: str) -> None:
        ours, theirs = pair()
        self.controller.connect(name, ours)
        receives = RECEIVES.get(name, messages.TO_RESOLVER)
        replies = (
            (messages.Granted, messages.Admitted, messages.Done, messages.Failed)
            if name == "resolver"
            else ()
        )
        handler = self._requested if name == "resolver" else self._heard
        self.peers[name] = Peer(
            theirs, receives, handler=lambda peer, received: handler(name, peer, received), replies=replies
        )

    def disconnect(self, name: str) -> None:
        self.peers.pop(name).close()

    def _heard(self, name: str, peer: Peer, received: Received[Any]) -> None:
        message = received.message
        if type(message) in READING and name not in self.silent and type(message) not in self.refusing:
            received.close()
            self._read(name, peer, message)
            return
        payload = None
        if type(message) in PAYLOADS:
            payload = msgspec.json.decode(received.payload(), type=PAYLOADS[type(message)])
        received.close()
        self.told.append((name, message, payload))
        if name in self.silent or type(message) in self.slow:
            return
        if type(message) in self.refusing:
            peer.send(messages.Failed(request=message.request, reason="unavailable", text="no"))
        elif isinstance(message, messages.CloseLink):
            peer.send(
                messages.LinkClosed(request=message.request, link=message.link, counters=self.last_counters)
            )
        elif isinstance(message, messages.ReadLink):
            peer.send(
                messages.LinkSpent(
                    request=message.request,
                    link=message.link,
                    counters=self.last_counters,
                    spent=self.spent,
                )
            )
        elif isinstance(message, messages.ReadFlows):
            value = msgspec.json.encode(self.flows.get(message.workspace, []))
            peer.send_payload(messages.Payload(request=message.request, payload_length=len(value)), value)
        elif isinstance(message, messages.RotateKey):
            peer.send(msgspec.structs.replace(self.state, request=message.request))
        elif isinstance(message, messages.MakeProof):
            self.proving.append(asyncio.ensure_future(self._prove(peer, message)))
        else:
            peer.send(messages.Done(request=message.request))

    def _read(self, name: str, peer: Peer, message: Any) -> None:
        if isinstance(message, messages.ReadRefused):
            kind = messages.RefusedNames if name == "resolver" else messages.RefusedFlows
            peer.send(kind(request=message.request, counts=self.refused.get(name, {})))
            return
        if isinstance(message, messages.ReadJournal):
            peer.send(msgspec.structs.replace(self.state, request=message.request))
            return
        value = {
            messages.ReadCounters: msgspec.json.encode(self.counters),
            messages.ReadDrift: msgspec.json.encode(self.drift),
            messages.ReadRuleset: self.ruleset.encode(),
        }[type(message)]
        peer.send_payload(messages.Payload(request=message.request, payload_length=len(value)), value)

    async def _prove(self, peer: Peer, message: Any) -> None:
        if self.held is not None:
            await self.held.wait()
        value = b'{"payload": "proved"}'
        peer.send_payload(messages.Payload(request=message.request, payload_length=len(value)), value)

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
        for name in names or ("warden", "resolver", "relay", "inspector", "evidence"):
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
