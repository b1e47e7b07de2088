"""An auditor under test: the real program, exec'd with socket pairs where its neighbours would be."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from egressd.ipc import messages
from egressd.ipc.channel import Channel, pair
from egressd.journal import records, segments
from egressd.journal.records import Record
from egressd.processes.config import Config

UID = 4002


def until(condition: Callable[[], Any], *, seconds: float = 10.0, what: str = "") -> Any:
    """Poll; the first true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {seconds:g} s: {what or condition}")


class Auditor:
    """`journal` must lie where uid `UID` can reach it."""

    def __init__(
        self,
        state: Path,
        *,
        names: tuple[str, ...] = ("controller", "warden"),
        environment=None,
        nflog: socket.socket | None = None,
        flows: socket.socket | None = None,
        credential: bytes | None = None,
    ) -> None:
        """`nflog`, `flows`: sockets to read from, instead of ones that the test writes to."""
        self.state, self.directory = state, state / "journal"
        ends: dict[str, socket.socket] = {}
        self.channels: dict[str, Channel[Any]] = {}
        self.nflog, ends["nflog"] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.flows, ends["flows"] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for name, kept in (("nflog", nflog), ("flows", flows)):
            if kept is not None:
                ends[name].close()
                ends[name] = kept.dup()
        for name in ("supervisor", "evidence", *(f"audit-{name}" for name in names)):
            mine, ends[name] = pair()
            receives = messages.FROM_EVIDENCE if name == "evidence" else messages.FROM_CHILD
            self.channels[name.removeprefix("audit-")] = Channel(mine, receives)
        if credential is not None:
            mine, ends["credential"] = socket.socketpair()
            with mine:
                mine.sendall(credential)
        command = [sys.executable, "-m", "egressd.processes.auditor", "--uid", str(UID), "--gid", str(UID)]
        for name, end in ends.items():
            command += ["--fd", f"{name}={end.fileno()}"]
        self.stderr = state / "stderr"
        with self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*command, "--config-json", Config(state_dir=str(state)).encode()],
                pass_fds=[end.fileno() for end in ends.values()],
                stderr=stderr,
                env={**os.environ, **(environment or {})},
            )
        for end in ends.values():
            end.close()

    def __enter__(self) -> Auditor:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def ready(self) -> Auditor:
        self.channels["supervisor"].socket.settimeout(20)
        if not self.channels["supervisor"].socket.recv(1, socket.MSG_PEEK):
            raise AssertionError(self.said())
        assert self.channels["supervisor"].receive().message == messages.Ready()
        return self

    def event(self, event: str, *, by: str = "controller", claims: str | None = None, **fields: Any) -> None:
        self.channels[by].send(messages.Event(process=claims or by, event=event, fields=fields))

    def bind(self, link: int, workspace: str, source4: str, source6: str, *, by: str = "controller") -> None:
        self.channels[by].send(
            messages.BindSource(request=1, link=link, workspace=workspace, source4=source4, source6=source6)  # type: ignore[arg-type]
        )

    def name(self, workspace: str, index: int, hosts: dict[int, str], *, by: str = "controller") -> None:
        self.channels[by].send(messages.NameBlocks(workspace=workspace, index=index, hosts=hosts))

    def erased(self, link: int, *, by: str = "warden") -> None:
        self.channels[by].send(messages.LinkErased(link=link))

    def introduce(self, name: str) -> Channel[Any]:
        mine, its = pair()
        with its:
            self.channels["supervisor"].send(messages.NewPeer(name=name), descriptor=its.fileno())
        return Channel(mine, messages.FROM_CHILD)

    def records(self) -> list[Record]:
        return read(self.directory)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [dict(r.fields) for r in self.records() if r.event == event]

    def wait_for(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        return until(
            lambda: found if len(found := self.of(event)) >= count else None, what=f"{count} x {event}"
        )

    def said(self) -> str:
        return self.stderr.read_text()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(10)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for channel in self.channels.values():
            channel.close()
        self.nflog.close()
        self.flows.close()


def read(directory: Path) -> list[Record]:
    """Every whole line of a journal; each must be a record."""
    lines = []
    for number in segments.numbers(entry.name for entry in directory.iterdir()):
        data = (directory / segments.name(number)).read_bytes()
        whole = data[: len(data) - segments.torn(data)]
        lines += whole.splitlines(keepends=True)
    return [records.decode(line) for line in lines]


# ---- datagrams as the kernel's packet log writes them


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def logged(packet: bytes, *, prefix: str, indev: int, ethertype: int, sequence: int, mark: int = 0) -> bytes:
    body = struct.pack("!BBH", 5, 0, 5) + b"".join(
        (
            attribute(1, struct.pack("!HBx", ethertype, 0)),
            attribute(10, prefix.encode() + b"\0"),
            attribute(2, struct.pack("!I", mark)),
            attribute(4, struct.pack("!I", indev)),
            attribute(9, packet),
            attribute(12, struct.pack("!I", sequence)),
        )
    )
    return struct.pack("=IHHII", 16 + len(body), 0x400, 0, 0, 0) + body
