"""The resolver's way to the upstream servers: sockets and clock for `dns.exchange`.

Every UDP question leaves from a socket of its own, whose port the kernel draws, connected to the server so
that the kernel drops what comes from elsewhere and reports unreachability at once. Streams (TCP, TLS) are
kept while they are used; questions on one are told apart by their ids. Nothing a sandbox sent goes out:
the message is built from the name alone.

With no servers configured nothing here ever opens a socket.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

from egressd.dns.exchange import Exchange, Finish, Question, Send, Server, Transport
from egressd.dns.keeper import Finding, Findings
from egressd.dns.replies import Failure, Rcode, Type
from egressd.dns.wire import Answer, Labels

__all__ = ["Upstream", "finding"]

_CONCURRENT = 64  # questions in flight
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
    _streams: dict[tuple[Server, Transport], _Stream] = field(default_factory=dict)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CONCURRENT))
    _tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        # Before the first question: a file that cannot be read should stop the start, not the first answer.
        if any(server.transport is Transport.TLS for server in self.servers):
            self._tls = ssl.create_default_context(cafile=self.ca_file)
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
            self._tls.set_alpn_protocols(["dot"])  # the name IANA keeps for RFC 7858

    async def addresses(self, labels: Labels) -> Findings:
        """Both families of a name."""
        v4, v6 = await asyncio.gather(self.ask(labels, Type.A), self.ask(labels, Type.AAAA))
        return finding(v4), finding(v6)

    async def ask(self, labels: Labels, qtype: int) -> Answer | Failure:
        """One question, until an answer counts or nobody is left to ask."""
        async with self._slots:
            finish = await self._run(Exchange(Question(labels, qtype), self.servers, draw=_draw))
        if finish.server is not None and finish.server is not self.servers[0]:
            # Whoever answers is asked first from now on: a dead first server costs its timeout once.
            rest = tuple(server for server in self.servers if server is not finish.server)
            self.servers = (finish.server, *rest)
        return finish.result

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
        try:
            async with asyncio.timeout_at(send.deadline):
                if send.transport is Transport.UDP:
                    return await _over_udp(exchange, send, clock)
                return await self._over_stream(exchange, send, clock)
        except TimeoutError:
            return exchange.expired(send.attempt, now=clock())
        except (OSError, ssl.SSLError, _StreamGone) as error:
            return exchange.broken(send.attempt, _words(error), now=clock())

    async def _over_stream(
        self, exchange: Exchange, send: Send, clock: Callable[[], float]
    ) -> Finish | Send | None:
        source = send.server.address, send.server.port
        while True:
            stream = await self._stream(send.server, send.transport)
            data = await stream.ask(send.message)
            command = exchange.received(send.attempt, data, source=source, now=clock())
            if command is not None:
                return command
            stream.close("it sent an answer to another question")
            raise _StreamGone("it answered another question")

    async def _stream(self, server: Server, transport: Transport) -> _Stream:
        key = server, transport
        stream = self._streams.get(key)
        if stream is None or stream.closed:
            stream = self._streams[key] = _Stream(server, self._tls if transport is Transport.TLS else None)
        await stream.opened()
        return stream

    async def close(self) -> None:
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

    async def opened(self) -> None:
        await asyncio.shield(self._open)

    async def ask(self, message: bytes) -> bytes:
        """The answer with the message's id; `_StreamGone` if the stream ends first."""
        number = message[:2]
        if self.closed or self._writer is None or number in self._waiting:
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
