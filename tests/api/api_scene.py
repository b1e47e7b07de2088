"""The HTTP API before a controller of this process, and a journal; who asks is as the test says.

play(tmp_path, story)    # async def story(site: Site) -> None
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "processes"))
from controller_lab import World, world

from egressd.ipc import messages
from egressd.ipc.peer import Peer
from egressd.journal import records
from egressd.journal.records import Record
from egressd.processes import askers
from egressd.processes.api import Api, Bounds, Questions
from egressd.processes.api_table import ENDPOINTS
from egressd.processes.askers import Asker, Unknown
from http_speaker import Speaker

ACME = """\
guard: enforce
members: [user:4001]
allow:
  - {host: api.test, ports: [8080/tcp]}
"""
RIVAL = ACME.replace("4001", "4002").replace("api.test", "secret.rival.test")
PROOF = {"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []}
ROOT, MEMBER, OTHER, STRANGER = 0, 4001, 4002, 4003
# What belongs to the rival, and nobody of acme is to learn.
SECRETS = ("rival", "secret.rival.test", "4002", "eg77")


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        assert self.headers["content-type"] == "application/problem+json", self
        found = self.json
        assert (found["status"], found["type"]) == (self.status, "about:blank"), found
        return str(found["detail"])


class Site(Speaker):
    """`uid` is who asks next; None: nobody knows."""

    def __init__(self, world: World, api: Api, address: Any, journal: Path) -> None:
        super().__init__(address)
        self.world, self.api, self.journal = world, api, journal
        self.uid: int | None = ROOT

    async def get(
        self, target: str, *headers: str, method: str = "GET", uid: int | None = -1, host: str = "localhost"
    ) -> Reply:
        if uid != -1:
            self.uid = uid
        lines = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host else []), *headers]
        return self.reply(await self.say("\r\n".join(lines).encode() + b"\r\n\r\n"), target)

    def reply(self, data: bytes, target: str) -> Reply:
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        status = int(first.split()[1])
        endpoint = ENDPOINTS.get(target.partition("?")[0])
        assert endpoint is None or status in (*endpoint.statuses, 405), "it is documented"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Reply(status, headers, body)


def write_journal(directory: Path, story: list[tuple[str, str, dict[str, Any]]], *, start: int = 0) -> None:
    """(process, event, fields) each second of a morning, from number `start`."""
    directory.mkdir(exist_ok=True)
    with (directory / "0001.jsonl").open("ab") as stream:
        for seq, (process, event, fields) in enumerate(story, start):
            time = f"2026-11-21T10:{seq // 60 % 60:02}:{seq % 60:02}.000000Z"
            stream.write(records.encode(Record(seq, time, process, event, fields)))


def listener(where: str, directory: Path) -> socket.socket:
    if where == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(directory / "api.sock"))
    else:
        sock = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET)
        sock.bind((where, 0))
    sock.listen()
    return sock


async def _prove(world: World, peer: Peer, message: messages.MakeProof) -> None:
    if world.held is not None:
        await world.held.wait()
    value = json.dumps(PROOF).encode()
    peer.send_payload(messages.Payload(request=message.request, payload_length=len(value)), value)


@contextlib.asynccontextmanager
async def site(
    directory: Path, *, bounds: Bounds | None = None, where: str = "unix", **policies: str
) -> AsyncIterator[Site]:
    async with world(directory, **(policies or {"acme": ACME, "rival": RIVAL})) as made:
        await made.start()
        made.serve()
        made._prove = _prove.__get__(made)  # type: ignore[method-assign]
        journal = directory / "journal"
        journal.mkdir()
        sock = listener(where, directory)
        api = Api(Questions(str(directory)), str(journal), bounds=bounds)
        with contextlib.closing(api):
            async with api.serving(sock):
                yield Site(made, api, sock.getsockname(), journal)


def play(
    directory: Path, story: Callable[[Site], Awaitable[None]], *, monkey: bool = True, **options: Any
) -> None:
    """`monkey`: who asks is what the test says; else the kernel's word."""

    async def run() -> None:
        async with site(directory, **options) as made:
            with pytest.MonkeyPatch.context() as patch:
                if monkey:
                    patch.setattr(askers, "at", lambda _: _asker(made.uid))
                async with asyncio.timeout(60):  # what is waited for there may never come
                    await story(made)

    asyncio.run(run())
    gc.collect()  # a task that nobody looked at would be told now


def _asker(uid: int | None) -> Asker:
    if uid is None:
        raise Unknown("nobody knows who asks; use a Unix socket")
    return Asker(uid, (uid,))
