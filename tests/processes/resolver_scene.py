"""A stage for the resolver process: a throw-away namespace with everything on its loopback.

198.19.0.1, fd53:1::1        sandbox 1 of workspace acme (and .2, .3 for others)
169.254.53.53, fd53:53::53   the resolver's sockets, made here, handed to the process
127.0.0.53 port 5300 ...     upstream servers, threads of the test
controller, audit, supervisor   socket pairs, the other ends are the test's
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import queue
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dnslib
import msgspec

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.ipc.channel import Channel, pair, payload
from egressd.ruleset.layout import RESOLVER4, RESOLVER6

SANDBOX4, SANDBOX6 = "198.19.0.1", "fd53:1::1"
STRANGER4, STRANGER6 = "198.19.0.9", "fd53:1::9"
UPSTREAM = "127.0.0.53"
UID = 4001
_ADDRESSES = (
    f"{RESOLVER4}/32", f"{RESOLVER6}/128", "198.19.0.1/32", "198.19.0.2/32", "198.19.0.9/32",
    "fd53:1::1/128", "fd53:1::2/128", "fd53:1::9/128", "127.0.0.54/32",
)  # fmt: skip
_numbers = itertools.count(1)


def able() -> bool:
    return os.getuid() == 0 and shutil.which("ip") is not None and shutil.which("dig") is not None


def eventually(check: Callable[[], Any], *, within: float = 5.0) -> Any:
    """The first true result of `check`; fails the test when there is none in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        result = check()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


class Namespace:
    """A network namespace; `run` calls a function in a thread that lives there."""

    def __init__(self) -> None:
        self.name = f"rs-{os.getpid()}-{next(_numbers)}"
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")
        for address in _ADDRESSES:
            _ip(
                "-n",
                self.name,
                "address",
                "add",
                address,
                "dev",
                "lo",
                *(["nodad"] if ":" in address else []),
            )
        self._inside = ThreadPoolExecutor(1, initializer=self._enter)

    def _enter(self) -> None:
        with Path(f"/run/netns/{self.name}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x4000_0000) != 0:
                raise OSError(ctypes.get_errno(), "setns")

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._inside.submit(function, *args, **kwargs).result()

    def command(self, *words: str, timeout: float = 15) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.stdout

    def close(self) -> None:
        self._inside.shutdown()
        _ip("netns", "delete", self.name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def bound(kind: int, address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    if kind == socket.SOCK_DGRAM:
        sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE, as kernel/sockets.py does
    if kind == socket.SOCK_STREAM:
        sock.listen(128)
    return sock


# ---- upstream


@dataclass
class Authority:
    """A tiny upstream. `zone`: (name, type) -> records as zone text, or a code; unknown names do not exist.

    `asked` is every question with the port it came from. `tricks` run before the answer is sent over UDP.
    """

    namespace: Namespace
    port: int = 5300
    tls: ssl.SSLContext | None = None
    zone: dict[tuple[str, str], list[str] | int] = field(default_factory=dict)
    asked: list[tuple[str, str, int, int]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    tricks: list[Callable[[Authority, dnslib.DNSRecord, Any], None]] = field(default_factory=list)
    truncate: bool = False
    silent: bool = False
    connections: int = 0

    def __post_init__(self) -> None:
        self.udp = self.namespace.run(bound, socket.SOCK_DGRAM, UPSTREAM, self.port)
        self.tcp = self.namespace.run(bound, socket.SOCK_STREAM, UPSTREAM, self.port)
        for target in (self._serve_udp, self._serve_tcp):
            threading.Thread(target=target, daemon=True).start()

    def answer(self, data: bytes, port: int) -> dnslib.DNSRecord | None:
        asked = dnslib.DNSRecord.parse(data)
        name, qtype = str(asked.q.qname).rstrip("."), dnslib.QTYPE[asked.q.qtype]
        self.asked.append((name, qtype, port, asked.header.id))
        self.raw.append(data)
        if self.silent:
            return None
        reply = asked.reply(aa=0)
        found = self.zone.get((name, qtype))
        if found is None:
            reply.header.rcode = 0 if any(n == name for n, _ in self.zone) else 3
            reply.add_auth(*dnslib.RR.fromZone(". 60 SOA a. b. 1 2 3 4 60"))
        elif isinstance(found, int):
            reply.header.rcode = found
        else:
            for text in found:
                reply.add_answer(*dnslib.RR.fromZone(text))
        return reply

    def _serve_udp(self) -> None:
        while True:
            try:
                data, place = self.udp.recvfrom(4096)
            except OSError:
                return
            if place is None:  # shut down
                return
            reply = self.answer(data, place[1])
            if reply is None:
                continue
            for trick in self.tricks:
                trick(self, reply, place)
            self.udp.sendto((_cut(reply) if self.truncate else reply).pack(), place)

    def _serve_tcp(self) -> None:
        while True:
            try:
                sock, place = self.tcp.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve_stream, args=(sock, place[1]), daemon=True).start()

    def _serve_stream(self, sock: socket.socket, port: int) -> None:
        try:
            stream = self.tls.wrap_socket(sock, server_side=True) if self.tls else sock
            with stream, stream.makefile("rb") as reader:
                while len(head := reader.read(2)) == 2:
                    reply = self.answer(reader.read(int.from_bytes(head, "big")), port)
                    if reply is not None:
                        data = reply.pack()
                        stream.sendall(struct.pack("!H", len(data)) + data)
        except OSError:
            sock.close()

    def close(self) -> None:
        for sock in (self.udp, self.tcp):
            with contextlib.suppress(
                OSError
            ):  # wakes the thread that waits in it; a UDP socket says ENOTCONN
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def _cut(reply: dnslib.DNSRecord) -> dnslib.DNSRecord:
    short = dnslib.DNSRecord(dnslib.DNSHeader(id=reply.header.id, bitmap=reply.header.bitmap), q=reply.q)
    short.header.tc = 1
    return short


# ---- the process


Judged = messages.Resolved | messages.GrantName | messages.ReleaseNames
FIRST_BLOCK = 100  # of what is granted


class Controller:
    """The test's end of the controller's channel. `verdict` answers each `Resolved`, `GrantName` and
    `ReleaseNames`: True is Done (Granted), False is Failed, None is silence until `release`.

    `granted` is what the kernel of this stage admits by now: (workspace, host) -> block."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel: Channel[Any] = Channel(sock, messages.FROM_RESOLVER)
        self.resolved: list[messages.Resolved] = []
        self.grants: list[messages.GrantName] = []
        self.admitted: list[str] = []  # hosts of those that were answered `Granted`
        self.releases: list[str] = []
        self.granted: dict[tuple[str, str], int] = {}
        self._blocks: dict[tuple[str, str], int] = {}
        self.held: list[Judged] = []
        self.replies: queue.Queue[Any] = queue.Queue()
        self.verdict: Callable[[Any], bool | None] = lambda _: True
        self.refuses: dict[str, str] = {}  # addresses that are led nowhere, and why
        self._numbers = itertools.count(1)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                message = self.channel.receive().message
            except (OSError, EOFError):
                return
            if not isinstance(message, Judged):
                self.replies.put(message)
                continue
            match message:
                case messages.Resolved():
                    self.resolved.append(message)
                case messages.GrantName():
                    self.grants.append(message)
                case messages.ReleaseNames():
                    self.releases += message.hosts
            self._judge(message)

    def _judge(self, message: Judged) -> None:
        verdict = self.verdict(message)
        if verdict is None:
            self.held.append(message)
        else:
            self.say(message, good=verdict)

    def say(self, message: Judged, *, good: bool) -> None:
        self.channel.send(self._good(message) if good else _failed(message))

    def _good(self, message: Judged) -> Any:
        against = self._against(message)
        if isinstance(message, messages.GrantName):
            if against and len(against) == len(_shown(message)):
                text = next(iter(against.values()))
                return messages.Failed(request=message.request, reason="residency", text=text)
            key = message.workspace, message.host
            block = self._blocks.setdefault(key, FIRST_BLOCK + len(self._blocks))
            self.granted[key] = block
            self.admitted.append(message.host)
            return messages.Granted(request=message.request, block=block, refused=against)
        if isinstance(message, messages.Resolved):
            return messages.Admitted(request=message.request, refused=against)
        if isinstance(message, messages.ReleaseNames):
            for host in message.hosts:
                self.granted.pop((message.workspace, host), None)
        return messages.Done(request=message.request)

    def _against(self, message: Judged) -> dict[str, str]:
        return {a: self.refuses[a] for a in _shown(message) if a in self.refuses}

    def release(self) -> None:
        self.verdict = lambda _: True
        while self.held:
            self.say(self.held.pop(), good=True)

    def ask(self, message: Any, data: bytes | None = None) -> Any:
        if data is None:
            self.channel.send(message)
        else:
            with payload(data) as descriptor:
                self.channel.send(message, descriptor=descriptor)
        reply = self.replies.get(timeout=5)
        assert reply.request == message.request
        return reply

    def names(self, *workspaces: WorkspaceNames) -> Any:
        data = msgspec.json.encode(workspaces)
        return self.ask(messages.SetNames(request=next(self._numbers), payload_length=len(data)), data)

    def raw_names(self, data: bytes) -> Any:
        return self.ask(messages.SetNames(request=next(self._numbers), payload_length=len(data)), data)

    def bind(self, link: int = 1, workspace: str = "acme") -> Any:
        return self.ask(
            messages.BindSource(
                request=next(self._numbers),
                link=link,
                workspace=workspace,
                source4=ip_address(f"198.19.0.{link}"),  # type: ignore[arg-type]
                source6=ip_address(f"fd53:1::{link}"),  # type: ignore[arg-type]
            )
        )

    def unbind(self, link: int = 1) -> Any:
        return self.ask(messages.UnbindSource(request=next(self._numbers), link=link))


def _shown(message: Judged) -> set[str]:
    if isinstance(message, messages.ReleaseNames):
        return set()
    return {str(address) for address in (*message.slots4, *message.slots6) if address is not None}


def _failed(message: Judged) -> messages.Failed:
    return messages.Failed(request=message.request, reason="unavailable", text="no kernel")


class Scene:
    """A running resolver. `upstream`, `hosts`, `upstream_ca` as in the configuration."""

    def __init__(self, namespace: Namespace, **config: Any) -> None:
        self.namespace = namespace
        controller, its_controller = pair()
        self._audit, its_audit = pair()
        supervisor, its_supervisor = pair()
        self.events: list[messages.Event | messages.Losses] = []
        self.heartbeats = 0
        sockets = {
            "udp4": namespace.run(bound, socket.SOCK_DGRAM, str(RESOLVER4), 53),
            "udp6": namespace.run(bound, socket.SOCK_DGRAM, str(RESOLVER6), 53),
            "tcp4": namespace.run(bound, socket.SOCK_STREAM, str(RESOLVER4), 53),
            "tcp6": namespace.run(bound, socket.SOCK_STREAM, str(RESOLVER6), 53),
            "controller": its_controller,
            "audit": its_audit,
            "supervisor": its_supervisor,
        }
        words = [sys.executable, "-I", "-m", "egressd.processes.resolver"]
        for name, sock in sockets.items():
            words += ["--fd", f"{name}={sock.fileno()}"]
        words += ["--uid", str(UID), "--gid", str(UID), "--config-json", json.dumps(config)]
        self.process = namespace.run(
            subprocess.Popen,
            words,
            pass_fds=[s.fileno() for s in sockets.values()],
            stderr=subprocess.PIPE,
            text=True,
        )
        for sock in sockets.values():
            sock.close()
        self.supervisor: Channel[Any] = Channel(supervisor, messages.FROM_CHILD)
        self.controller = Controller(controller)
        self.ready = threading.Event()
        threading.Thread(target=self._hear, daemon=True).start()
        self._listen(self._audit)
        assert self.ready.wait(10), self.process.stderr and self.process.stderr.read()

    def _listen(self, sock: socket.socket) -> None:
        channel: Channel[Any] = Channel(sock, messages.TO_AUDITOR)

        def read() -> None:
            while True:
                try:
                    self.events.append(channel.receive().message)
                except (OSError, EOFError):
                    return

        threading.Thread(target=read, daemon=True).start()

    def _hear(self) -> None:
        while True:
            try:
                message = self.supervisor.receive().message
            except (OSError, EOFError):
                return
            if isinstance(message, messages.Ready):
                self.ready.set()
            else:
                self.heartbeats += 1

    def new_controller(self) -> Controller:
        mine, its = pair()
        with its:
            self.supervisor.send(messages.NewPeer(name="controller"), descriptor=its.fileno())
        self.controller.channel.close()
        self.controller = Controller(mine)
        return self.controller

    def named(self, event: str) -> list[dict[str, Any]]:
        return [e.fields for e in list(self.events) if isinstance(e, messages.Event) and e.event == event]

    def dig(self, name: str, qtype: str = "A", *options: str, source: str = SANDBOX4) -> Answered:
        server = RESOLVER6 if ":" in source else RESOLVER4
        words = ["dig", "-b", source, f"@{server}", "+time=6", "+tries=1", "+nocookie", *options, name, qtype]
        return Answered(self.namespace.command(*words))

    def open_outside_sockets(self) -> list[str]:
        """Sockets of the process that are neither the ones handed in nor unnamed pairs (the loop has one)."""
        output = self.namespace.command("ss", "-Hanp")
        mine = [line for line in output.splitlines() if f"pid={self.process.pid}," in line]
        return [
            line
            for line in mine
            if not re.search(r"169\.254\.53\.53:53|\[fd53:53::53\]:53|^u_(seq|str) .* \* ", line)
        ]

    def close(self) -> str:
        """End it as the supervisor's end would; returns what it wrote to stderr."""
        self.supervisor.socket.shutdown(socket.SHUT_RDWR)
        self.supervisor.close()
        try:
            _, errors = self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, errors = self.process.communicate()
        self.controller.channel.close()
        self._audit.close()
        return str(errors)


@dataclass
class Answered:
    """dig's words, taken apart."""

    text: str

    @property
    def status(self) -> str:
        match = re.search(r"status: ([A-Z]+)", self.text)
        return match[1] if match else "no answer"

    @property
    def flags(self) -> set[str]:
        match = re.search(r"^;; flags: ([a-z ]*);", self.text, re.M)
        return set(match[1].split()) if match else set()

    @property
    def extended(self) -> str:
        match = re.search(r"; EDE: (.*)", self.text)
        return match[1] if match else ""

    @property
    def data(self) -> list[str]:
        match = re.search(r";; ANSWER SECTION:\n(.*?)\n\n", self.text, re.S)
        return [line.split(None, 4)[4] for line in match[1].splitlines()] if match else []
