"""The resolver's way to the sandboxes: datagrams and connections on sockets that were handed in.

UDP and TCP differ only in framing; both give `serve` the bytes and the source address, which is all that
identifies a sandbox. Nothing one source does may cost another more than its share: a connection too many
is closed at once, an idle or unread one after ten seconds, and a datagram socket that is full drops.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import TypeAlias

from egressd.model.addresses import Address

__all__ = ["Datagrams", "Serve", "Streams"]

# (message, source, whether it came over UDP) -> the answer now, later, or never
Serve: TypeAlias = Callable[[bytes, Address, bool], bytes | Awaitable[bytes | None] | None]

_BATCH = 64  # datagrams per wake-up, so that connections and the controller get their turn
_MAX_DATAGRAM = 4096  # bytes read; a query is never longer, and what is cut does not parse
_PER_SOURCE, _TOTAL = 16, 1024  # connections
_PIPELINED = 32  # questions of one connection being worked on
_IDLE = 10.0  # seconds (RFC 7766 section 6.2.3), also for reading what was asked for
_LENGTH = struct.Struct("!H")


class Datagrams:
    """One UDP socket."""

    def __init__(self, sock: socket.socket, serve: Serve) -> None:
        sock.setblocking(False)
        self._sock, self._serve = sock, serve
        self._tasks: set[asyncio.Task[None]] = set()
        self._sources: dict[str, Address] = {}
        asyncio.get_running_loop().add_reader(sock, self._readable)

    def _readable(self) -> None:
        for _ in range(_BATCH):
            try:
                data, place = self._sock.recvfrom(_MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error for something sent earlier (ip(7)); the socket itself is fine
                continue
            answer = self._serve(data, self._address(place[0]), True)
            if isinstance(answer, bytes):
                self._send(answer, place)
            elif answer is not None:  # how many of a sandbox may wait is the server's business
                self._later(answer, place)

    def _address(self, text: str) -> Address:
        """Parsing an address costs more than answering from the cache does."""
        known = self._sources.get(text)
        if known is None:
            if len(self._sources) >= 4096:
                self._sources.clear()
            known = self._sources[text] = ip_address(text.partition("%")[0])
        return known

    def _later(self, answer: Awaitable[bytes | None], place: tuple[object, ...]) -> None:
        async def wait() -> None:
            data = await answer
            if data is not None:
                self._send(data, place)

        task = asyncio.ensure_future(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, data: bytes, place: tuple[object, ...]) -> None:
        with contextlib.suppress(OSError):  # full or unreachable: a datagram may be lost
            self._sock.sendto(data, place)


class Streams:
    """One listening TCP socket. `connections` is shared by all of them: it counts per source."""

    def __init__(
        self,
        sock: socket.socket,
        serve: Serve,
        *,
        connections: collections.Counter[Address],
        refused: Callable[[Address], None],
    ) -> None:
        self._sock, self._serve = sock, serve
        self._connections, self._refused = connections, refused
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, sock=self._sock, limit=_MAX_DATAGRAM * 16)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if peer is None:  # reset before it was accepted
            writer.transport.abort()
            return
        source = ip_address(str(peer[0]).partition("%")[0])
        if self._connections[source] >= _PER_SOURCE or self._connections.total() >= _TOTAL:
            self._refused(source)
            writer.transport.abort()
            return
        self._connections[source] += 1
        try:
            await _Connection(reader, writer, source, self._serve).run()
        finally:
            writer.transport.abort()
            self._connections[source] -= 1
            if not self._connections[source]:
                del self._connections[source]


class _Connection:
    """Length-prefixed messages (RFC 1035 section 4.2.2), answered as each is ready (RFC 7766 section 7)."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: Address, serve: Serve
    ) -> None:
        self._reader, self._writer, self._source, self._serve = reader, writer, source, serve
        self._room = asyncio.Semaphore(_PIPELINED)
        self._tasks: set[asyncio.Task[None]] = set()
        # What a client does not read is kept by the kernel up to here, then it gets no more.
        writer.transport.set_write_buffer_limits(high=_MAX_DATAGRAM * 4)

    async def run(self) -> None:
        try:
            while (data := await self._message()) is not None:
                await asyncio.sleep(0)  # what is buffered already would be read without a pause for others
                answer = self._serve(data, self._source, False)
                if answer is None:
                    break  # what is not even a query ends the conversation
                if isinstance(answer, bytes):
                    await self._send(answer)
                else:
                    await self._room.acquire()
                    self._later(answer)
            await self._rest()
        except (OSError, EOFError, TimeoutError):
            pass
        finally:
            for task in self._tasks:
                task.cancel()

    async def _message(self) -> bytes | None:
        """The next message; None when the client has finished."""
        async with asyncio.timeout(_IDLE):
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            except asyncio.IncompleteReadError:
                return None
            return await self._reader.readexactly(length)

    def _later(self, answer: Awaitable[bytes | None]) -> None:
        async def wait() -> None:
            try:
                data = await answer
                if data is not None:
                    await self._send(data)
            except (OSError, TimeoutError):
                self._writer.transport.abort()
            finally:
                self._room.release()

        task = asyncio.ensure_future(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, data: bytes) -> None:
        self._writer.write(_LENGTH.pack(len(data)) + data)
        async with asyncio.timeout(_IDLE):
            await self._writer.drain()

    async def _rest(self) -> None:
        """A client may close its half and still read: answer what it asked, then close ours."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._writer.close()
        async with asyncio.timeout(_IDLE):
            await self._writer.wait_closed()
