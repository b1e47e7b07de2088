"""The servers of the lab, in one process per namespace, and the handle that tests hold on them.

    port          on every address of lab-net
    53            DNS, over UDP and TCP; 853 DNS over TLS
    80 8080       HTTP           443 8443  HTTPS, certified by the lab's authority for whatever name is asked
    7 5432        TCP echo       9  discard      19  an endless stream
    7 443 5432    UDP echo       9  discard

All of them write down what reached them: `Internet.seen()`. As a program: `python -m lab.internet ROLE`,
where standard input is the control socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lab import topology, web

if TYPE_CHECKING:
    import ssl

    from lab.machine import Lab

__all__ = ["Internet", "Seen", "start_internet"]

_KEPT = 512  # bytes of each conversation that are written down
_MAX_SEEN = 100_000
IPV6_RECVPKTINFO = 49  # linux/in6.h; absent from the socket module of some builds
IP_PKTINFO = 8  # linux/in.h


@dataclass(slots=True)
class Seen:
    """One conversation, as a server saw it."""

    protocol: str  # "tcp" or "udp"
    address: str  # of the server, as the client addressed it
    port: int
    peer: str
    peer_port: int
    name: str = ""  # DNS: the name asked; TLS: the SNI; HTTP: the Host
    detail: str = ""  # DNS: the type; HTTP: the last method and path
    bytes: int = 0  # from the client; HTTP: of bodies
    data: str = ""  # the first of them, latin-1
    seconds: float = 0.0  # time.monotonic() of its beginning


# --------------------------------------------------------------------------------------------------
# the handle


class Internet:
    """What a test holds: change names, read what arrived. Calls block, each for well under a millisecond."""

    def __init__(self, lab: Lab, role: str, *, where: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-m", "lab.internet", role]
            self.process = lab.start(argv, where=where, stdin=theirs.fileno())
        lab.companions.append(self)
        self._control.settimeout(20.0)
        try:
            self.root = str(self._ask("hello")).encode()
        except (OSError, ValueError) as error:
            self.process.drain(1.0)
            raise RuntimeError(f"the lab's servers did not start: {self.process.err}") from error

    def _ask(self, op: str, **fields: Any) -> Any:
        self._control.send(json.dumps({"op": op, **fields}).encode())
        return json.loads(self._control.recv(1 << 20))

    def set(
        self,
        name: str,
        records: topology.Records | None = None,
        *,
        standing: bool = False,
        **types: list[str],
    ) -> None:
        """`set("x.test", A=["11.22.33.99"])`, or whole `Records`. Without either the name is gone.

        `standing`: it is so from the start on, and again after each `reset`. A name that is not there for
        a moment is asked for in just that moment, and remembered as absent for a minute."""
        if records is None and types:
            records = topology.Records(types)
        fields = None if records is None else dataclasses.asdict(records)
        self._ask("set", name=name, records=fields, standing=standing)

    def reset(self) -> None:
        """Names as they were at the start, and nothing seen."""
        self._ask("reset")

    def seen(self, *, port: int | None = None, address: object = None) -> list[Seen]:
        """What arrived since the last `reset` or `forget`, oldest first."""
        found: list[Seen] = []
        while batch := self._ask("seen", skip=len(found)):
            found += [Seen(**entry) for entry in batch]
        return [
            entry
            for entry in found
            if (port is None or entry.port == port) and (address is None or entry.address == str(address))
        ]

    def queries(self) -> list[tuple[str, str]]:
        """(name, type) of the DNS questions that arrived."""
        return [(entry.name, entry.detail) for entry in self.seen() if entry.port in (53, 853)]

    def forget(self) -> None:
        self._ask("forget")

    def close(self) -> None:
        """The servers end with the socket."""
        self._control.close()


def start_internet(lab: Lab) -> tuple[Internet, Internet]:
    """The internet's servers and the host's own services, ready to answer."""
    internet = Internet(lab, "internet", where=topology.NET)
    host = Internet(lab, "host", where=topology.HOST)
    lab.path("ca.pem").write_bytes(internet.root)
    return internet, host


# --------------------------------------------------------------------------------------------------
# the program


Streams: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Seen], Awaitable[None]]
Datagrams: TypeAlias = Callable[[bytes, Seen], Awaitable[bytes | None]]


class Servers:
    """Everything that listens in one namespace."""

    def __init__(self) -> None:
        self.zone = topology.zone()
        self.standing: dict[str, topology.Records] = {}
        self.seen: list[Seen] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    def note(self, entry: Seen) -> Seen:
        entry.seconds = time.monotonic()
        if len(self.seen) < _MAX_SEEN:
            self.seen.append(entry)
        return entry

    # ---- TCP

    async def tcp(self, handler: Streams, port: int, *hosts: str) -> None:
        """Listen at `hosts`, or at every address of both families."""
        for host in hosts or ("0.0.0.0", "::"):
            listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in host:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((host, port))
            server = await asyncio.start_server(self._accepting(handler), sock=listener, backlog=1024)
            self._servers.append(server)

    def _accepting(
        self, handler: Streams
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            here, there = writer.get_extra_info("sockname"), writer.get_extra_info("peername")
            if here is None or there is None:  # reset before we looked
                writer.close()
                return
            entry = self.note(Seen("tcp", here[0], here[1], there[0], there[1]))
            with contextlib.suppress(OSError, EOFError, asyncio.IncompleteReadError):
                await handler(reader, writer, entry)
            writer.close()

        return accepted

    # ---- UDP

    def udp(self, handler: Datagrams, port: int) -> None:
        """Every address of both families; answers leave from the address that was asked."""
        for family in (socket.AF_INET, socket.AF_INET6):
            sock = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            sock.setblocking(False)
            sock.bind(("", port))
            asyncio.get_running_loop().add_reader(sock, self._arrived, sock, handler, port)

    def _arrived(self, sock: socket.socket, handler: Datagrams, port: int) -> None:
        for _ in range(64):
            try:
                data, ancillary, _, peer = sock.recvmsg(65535, 256)
            except OSError:  # nothing left, or an ICMP error of an earlier answer
                return
            entry = self.note(Seen("udp", _asked_at(sock, ancillary), port, peer[0], peer[1]))
            _keep(entry, data)
            task = asyncio.ensure_future(self._reply(sock, handler, data, ancillary, peer, entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _reply(
        sock: socket.socket, handler: Datagrams, data: bytes, ancillary: list[Any], peer: Any, entry: Seen
    ) -> None:
        reply = await handler(data, entry)
        if reply is not None:
            with contextlib.suppress(OSError):
                sock.sendmsg([reply], _from_same(sock, ancillary), 0, peer)

    # ---- control

    async def obey(self, control: socket.socket, root: bytes) -> None:
        """Until the handle closes the socket."""
        loop = asyncio.get_running_loop()
        control.setblocking(False)
        while data := await loop.sock_recv(control, 1 << 17):
            await loop.sock_sendall(control, json.dumps(self._do(json.loads(data), root)).encode())

    def _do(self, request: dict[str, Any], root: bytes) -> Any:
        match request:
            case {"op": "hello"}:
                return root.decode()
            case {"op": "set", "name": name, "records": None}:
                self.zone.pop(name, None)
            case {"op": "set", "name": name, "records": records}:
                self.zone[name] = topology.Records(**records)
                if request["standing"]:
                    self.standing[name] = self.zone[name]
            case {"op": "seen", "skip": skip}:
                return [dataclasses.asdict(entry) for entry in self.seen[skip : skip + 64]]
            case {"op": "forget"}:
                self.seen.clear()
            case {"op": "reset"}:
                self.zone = topology.zone() | self.standing
                self.seen.clear()
        return True


def _asked_at(sock: socket.socket, ancillary: list[Any]) -> str:
    """The destination address out of IP_PKTINFO (struct in_pktinfo) or IPV6_PKTINFO (struct in6_pktinfo)."""
    for _, _, data in ancillary:
        if sock.family == socket.AF_INET:
            return socket.inet_ntop(socket.AF_INET, data[8:12])
        return socket.inet_ntop(socket.AF_INET6, data[:16])
    return ""


def _from_same(sock: socket.socket, ancillary: list[Any]) -> list[Any]:
    """Ancillary data that sends from that address, whatever the interface."""
    for level, kind, data in ancillary:
        if sock.family == socket.AF_INET:
            return [(level, kind, struct.pack("=i4s4s", 0, data[8:12], bytes(4)))]
        return [(level, kind, data[:16] + struct.pack("=i", 0))]
    return []


def _keep(entry: Seen, data: bytes) -> None:
    entry.bytes += len(data)
    if len(entry.data) < _KEPT:
        entry.data += data[: _KEPT - len(entry.data)].decode("latin-1")


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, entry: Seen) -> None:
    while data := await reader.read(1 << 16):
        _keep(entry, data)
        writer.write(data)
        await writer.drain()


async def _discard(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter, entry: Seen) -> None:
    while data := await reader.read(1 << 20):
        _keep(entry, data)


async def _stream(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _entry: Seen) -> None:
    """Bytes for as long as the client takes them."""
    block = bytes(range(33, 127)) * 512
    while True:
        writer.write(block)
        await writer.drain()


async def _datagram_echo(data: bytes, _entry: Seen) -> bytes | None:
    return data


async def _datagram_discard(_data: bytes, _entry: Seen) -> bytes | None:
    return None


def _http(handler: web.Handler) -> Streams:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, entry: Seen) -> None:
        def note(request: web.Request) -> None:
            entry.name = entry.name or request.host
            entry.detail = f"{request.method} {request.path}"
            _keep(entry, request.body)

        await web.serve(reader, writer, handler, note)

    return serve


def _over_tls(handler: Streams, choose: Callable[[Seen], ssl.SSLContext]) -> Streams:
    """The connection is written down before the handshake: a handshake that fails was still a connection.

    The upgrade must be the handler's first step: bytes read before it would be lost to it.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, entry: Seen) -> None:
        await writer.start_tls(choose(entry), ssl_handshake_timeout=10.0)
        await handler(reader, writer, entry)

    return serve


def _dns(servers: Servers) -> tuple[Streams, Datagrams]:
    from lab import names

    async def reply(query: bytes, entry: Seen, *, udp: bool) -> bytes | None:
        entry.name, entry.detail = names.question(query)
        records = names.find(servers.zone, entry.name)
        if records is not None and records.delay:
            await asyncio.sleep(records.delay)
        return names.answer(servers.zone, query, udp=udp)

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, entry: Seen) -> None:
        first = True
        while True:
            query = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            if not first:  # one entry per question
                entry = servers.note(dataclasses.replace(entry, bytes=0, data=""))
            first = False
            _keep(entry, query)
            answer = await reply(query, entry, udp=False)
            if answer is not None:
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()

    async def datagram(query: bytes, entry: Seen) -> bytes | None:
        return await reply(query, entry, udp=True)

    return stream, datagram


async def _internet(control: socket.socket) -> None:
    import ssl

    from lab.authority import Authority

    servers, authority = Servers(), Authority()

    def choose(entry: Seen) -> ssl.SSLContext:
        """A context whose certificate follows the SNI; without one, the address is certified."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

        def named(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            entry.name = name or ""
            connection.context = authority.context(name or entry.address)

        context.sni_callback = named
        return context

    stream, datagram = _dns(servers)
    await servers.tcp(stream, 53)
    await servers.tcp(_over_tls(stream, choose), 853)
    for port in (80, 8080):
        await servers.tcp(_http(web.site), port)
    for port in (443, 8443):
        await servers.tcp(_over_tls(_http(web.site), choose), port)
    for port, handler in ((7, _echo), (5432, _echo), (9, _discard), (19, _stream)):
        await servers.tcp(handler, port)
    servers.udp(datagram, 53)
    for port in (7, 443, 5432):
        servers.udp(_datagram_echo, port)
    servers.udp(_datagram_discard, 9)
    await servers.obey(control, authority.root)


async def _host(control: socket.socket) -> None:
    servers = Servers()
    await servers.tcp(_http(web.ollama), topology.OLLAMA_PORT, "127.0.0.1")
    for port, address in zip(topology.SECRET_PORTS, ("127.0.0.1", "0.0.0.0", "::"), strict=True):
        await servers.tcp(_http(web.secret(topology.SECRET)), port, address)
    await servers.obey(control, b"")


def main() -> None:
    control = socket.socket(fileno=0)
    roles = {"internet": _internet, "host": _host}
    asyncio.run(roles[sys.argv[1]](control))


if __name__ == "__main__":
    main()
