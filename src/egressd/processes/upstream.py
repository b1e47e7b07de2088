"""The resolver's way to the upstream servers: sockets and clock for `dns.exchange`.

Every UDP question leaves from a socket of its own, whose port the kernel draws, connected to the server so
that the kernel drops what comes from elsewhere and reports unreachability at once. Streams (TCP, TLS) are
kept while they are used; questions on one are told apart by their ids, and a kept one that ended meanwhile
(RFC 7766 section 6.2.4) costs a new connection, not the attempt. Nothing a sandbox sent goes out: the message
is built from the name alone.

With no servers configured nothing here ever opens a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

from egressd.dns.exchange import Exchange, Finish, Question, Send, Server, Transport
from egressd.dns.health import Health
from egressd.dns.keeper import Finding, Findings
from egressd.dns.replies import Failure, Rcode, Type
from egressd.dns.wire import Answer, Labels

__all__ = ["Upstream", "finding"]

# Questions in flight: of our own accord; because one workspace's sandboxes want it; and because any do. So
# whoever asks for names whose servers are silent holds up nobody's refreshes, and little of its neighbours.
_CONCURRENT, _PER_WORKSPACE, _FOR_SANDBOXES = 64, 16, 256
_IDLE = 10.0  # seconds until an unused stream is closed (RFC 7766 section 6.2.3)
_MAX_MESSAGE = 65_535
_LENGTH = struct.Struct("!H")


class _StreamGone(Exception):
    """The stream ended before its answer came."""


@dataclass(slots=True)
class Upstream:
    """`servers` in order of preference; `ca_file` replaces the system's trust store for TLS."""

    servers: tuple[Server, ...]
    ca_file: str | None = None
    mixed_case: bool = False  # see dns.exchange
    health: Health = field(init=False)
    _streams: dict[tuple[Server, Transport], _Stream] = field(default_factory=dict)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CONCURRENT))
    _shared: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_FOR_SANDBOXES))
    _shares: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    _tls: ssl.SSLContext | None = None
    _probes: set[asyncio.Task[Finish]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.health = Health(self.servers)
        # Before the first question: a file that cannot be read should stop the start, not the first answer.
        if any(server.transport is Transport.TLS for server in self.servers):
            self._tls = ssl.create_default_context(cafile=self.ca_file)
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
            self._tls.set_alpn_protocols(["dot"])  # the name IANA keeps for RFC 7858

    async def addresses(self, labels: Labels, *, workspace: str = "") -> Findings:
        """Both families of a name."""
        v4, v6 = await asyncio.gather(
            self.ask(labels, Type.A, workspace=workspace), self.ask(labels, Type.AAAA, workspace=workspace)
        )
        return finding(v4), finding(v6)

    async def ask(self, labels: Labels, qtype: int, *, workspace: str = "") -> Answer | Failure:
        """One question, until an answer counts or nobody is left to ask. `workspace` is whose sandboxes
        want it; empty for what is looked up of our own accord."""
        async with self._turn(workspace):
            question, now = Question(labels, qtype), asyncio.get_running_loop().time()
            self._probe(question, now)
            return (await self._run(self._exchange(question, self.health.order(now=now)))).result

    @contextlib.asynccontextmanager
    async def _turn(self, workspace: str) -> AsyncIterator[None]:
        if not workspace:
            async with self._slots:
                yield
            return
        share = self._shares.setdefault(workspace, asyncio.Semaphore(_PER_WORKSPACE))
        async with share, self._shared:
            yield

    def _exchange(self, question: Question, servers: tuple[Server, ...]) -> Exchange:
        return Exchange(question, servers, draw=_draw, mixed_case=self.mixed_case)

    def _probe(self, question: Question, now: float) -> None:
        """Ask a server that was down the same, beside the others; only that it answers is of interest."""
        server = self.health.probe(now=now)
        if server is not None:
            task = asyncio.ensure_future(self._run(self._exchange(question, (server,))))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    async def _run(self, exchange: Exchange) -> Finish:
        clock = asyncio.get_running_loop().time
        command: Finish | Send | None = exchange.start(now=clock())
        while not isinstance(command, Finish):
            assert command is not None
            command = await self._attempt(exchange, command, clock)
        return command

    async def _attempt(
        self, exchange: Exchange, send: Send, clock: Callable[[], float]
    ) -> Finish | Send | None:
        begun = clock()
        try:
            async with asyncio.timeout_at(send.deadline):
                if send.transport is Transport.UDP:
                    command = await _over_udp(exchange, send, clock)
                else:
                    command = await self._over_stream(exchange, send, clock)
        except TimeoutError:
            self.health.failed(send.server, now=clock())
            return exchange.expired(send.attempt, now=clock())
        except (OSError, ssl.SSLError, _StreamGone) as error:
            self.health.failed(send.server, now=clock())
            return exchange.broken(send.attempt, _words(error), now=clock())
        self.health.answered(send.server, trip=clock() - begun, now=clock())
        return command

    async def _over_stream(
        self, exchange: Exchange, send: Send, clock: Callable[[], float]
    ) -> Finish | Send | None:
        source = send.server.address, send.server.port
        stream, kept = self._stream(send.server, send.transport)
        try:
            data = await stream.ask(send.message)
        except _StreamGone:
            if not kept:
                raise
            stream, _ = self._stream(send.server, send.transport)
            data = await stream.ask(send.message)
        command = exchange.received(send.attempt, data, source=source, now=clock())
        if command is None:
            stream.close("it sent an answer to another question")
            raise _StreamGone("it answered another question")
        return command

    def _stream(self, server: Server, transport: Transport) -> tuple[_Stream, bool]:
        """The connection to use, and whether it was one already."""
        key = server, transport
        stream = self._streams.get(key)
        if stream is not None and not stream.closed:
            return stream, stream.is_open
        stream = self._streams[key] = _Stream(server, self._tls if transport is Transport.TLS else None)
        return stream, False

    async def close(self) -> None:
        for task in self._probes:
            task.cancel()
        for stream in self._streams.values():
            stream.close("the resolver ends")


def finding(result: Answer | Failure) -> Finding:
    """What an exchange's result says about one family of a name."""
    if isinstance(result, Failure):
        return Finding(failure=result)
    return Finding(result.addresses, result.ttl, exists=result.rcode != Rcode.NXDOMAIN)


def _draw() -> int:
    return secrets.randbits(16)


def _words(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---- UDP


async def _over_udp(exchange: Exchange, send: Send, clock: Callable[[], float]) -> Finish | Send | None:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET if send.server.address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        sock.connect((str(send.server.address), send.server.port))
        await loop.sock_sendall(sock, send.message)
        while True:
            data, address = await loop.sock_recvfrom(sock, _MAX_MESSAGE)
            source = _address(address[0]), int(address[1])
            command = exchange.received(send.attempt, data, source=source, now=clock())
            if command is not None:
                return command


def _address(text: str) -> IPv4Address | IPv6Address:
    return ip_address(text.partition("%")[0])


# ---- TCP and TLS


class _Stream:
    """One connection to a server, questions told apart by their ids."""

    def __init__(self, server: Server, tls: ssl.SSLContext | None) -> None:
        self._server, self._tls = server, tls
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._task = asyncio.ensure_future(self._serve())
        self._open: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open.add_done_callback(lambda future: future.exception())  # seen, whoever still waits
        self.closed = False

    @property
    def is_open(self) -> bool:
        return self._open.done()

    async def ask(self, message: bytes) -> bytes:
        """The answer with the message's id; `_StreamGone` if the stream ends first."""
        await asyncio.shield(self._open)
        number = message[:2]
        while number in self._waiting:  # drawn twice among those in flight; the attempt's deadline holds
            await asyncio.sleep(0.01)
        if self.closed or self._writer is None:
            raise _StreamGone("the stream is not usable")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._writer.write(_LENGTH.pack(len(message)) + message)
            return await future
        finally:
            self._waiting.pop(number, None)

    def close(self, why: str) -> None:
        if self.closed:
            return
        self.closed = True
        self._task.cancel()
        if self._writer is not None:
            self._writer.transport.abort()
        if not self._open.done():
            self._open.set_exception(_StreamGone(why))
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_StreamGone(why))

    async def _serve(self) -> None:
        try:
            reader, self._writer = await asyncio.wait_for(
                asyncio.open_connection(
                    str(self._server.address),
                    self._server.port,
                    ssl=self._tls,
                    server_hostname=self._server.name if self._tls else None,
                ),
                timeout=_IDLE,
            )
            self._open.set_result(None)
            while True:
                await self._read(reader)
        except (OSError, ssl.SSLError, EOFError, TimeoutError) as error:
            self._end(error)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        async with asyncio.timeout(_IDLE):
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            data = await reader.readexactly(length)
        future = self._waiting.get(data[:2])
        if future is not None and not future.done():
            future.set_result(data)

    def _end(self, error: BaseException) -> None:
        if not self._open.done() and isinstance(error, OSError):
            self._open.set_exception(error)
        self.close("it closed the connection")
