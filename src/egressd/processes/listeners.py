"""The resolver's way to the sandboxes: datagrams and connections on sockets that were handed in.

UDP and TCP differ only in framing; both give `serve` the bytes and the source address, which is all that
identifies a sandbox. Nothing one source does may cost another more than its share: a connection too many
is closed at once, an idle or unread one after ten seconds, and who fills a datagram socket loses datagrams.
"""

from __future__ import annotations

import asyncio
import collections
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from typing import TypeAlias

from egressd.dns.hot import Cache, shed, sweep
from egressd.model.addresses import Address
from egressd.processes.batches import COUNT, LONGEST, Batch

__all__ = ["Datagrams", "Serve", "Streams"]

# (message, source, whether it came over UDP) -> the answer now, later, or never
Serve: TypeAlias = Callable[[bytes, Address, bool], bytes | Awaitable[bytes | None] | None]

# Bytes of the kernel's queue, where a short question takes 1280: what is wanted, and what is too much.
_QUEUE, _CROWDED = 1 << 20, 256 << 10
_AT_ONCE = 2 * COUNT  # datagrams answered per wake-up, so that connections and the controller get their turn
_ROUNDS, _SHARE = 64, 32  # batches while it is too much, and answers of them to each source
_SO_MEMINFO = 55  # asm-generic/socket.h; SK_MEMINFO_RMEM_ALLOC and _RCVBUF come first (linux/sock_diag.h)
_MEMORY = struct.Struct("=II")
_PER_SOURCE, _TOTAL = 16, 1024  # connections
_PIPELINED = 32  # questions of one connection being worked on
_IDLE = 10.0  # seconds (RFC 7766 section 6.2.3), also for reading what was asked for
_LENGTH = struct.Struct("!H")


class Datagrams:
    """One UDP socket. What was asked before is answered from `cache`, the rest by `serve`."""

    def __init__(self, sock: socket.socket, serve: Serve, cache: Cache) -> None:
        sock.setblocking(False)
        # Whoever made the socket may have had the right to give it more room than net.core.rmem_max.
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < _QUEUE:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE)
        self._sock, self._serve, self._cache = sock, serve, cache
        self._batch = Batch(sock)
        self._tasks: set[asyncio.Task[None]] = set()
        self._sources: dict[bytes, Address] = {}
        asyncio.get_running_loop().add_reader(sock, self._readable)

    def _readable(self) -> None:
        answered = 0
        # While these are answered others arrive: looking again is cheaper than being woken again.
        while answered < _AT_ONCE and (count := self._batch.receive()):
            if count == COUNT and self._pressed():
                self._relieve(count)
                return
            self._answer(self._batch.senders(count))
            answered += count

    def _answer(self, senders: Sequence[tuple[int, bytes]]) -> None:
        batch, begin = self._batch, 0
        data = batch.data(len(senders))
        others = sweep(data, senders, self._cache.lanes, out=batch.out, lengths=batch.lengths)
        for number in others:
            size, source = senders[number]
            if not size or not self._answered(number, size, source):
                batch.send(begin, number)
                begin = number + 1
        batch.send(begin, len(senders))

    def _answered(self, number: int, size: int, source: bytes) -> bool:
        """Whether the answer is in its place now."""
        batch = self._batch
        answer = self._serve(batch.whole(number, size), self._address(source), True)
        if isinstance(answer, bytes):
            if batch.answer(number, answer):
                return True
            batch.send_alone(answer, batch.place(number))
        elif answer is not None:  # how many of a sandbox may wait is the server's business
            self._later(answer, batch.place(number))
        return False

    def _pressed(self) -> bool:
        """Whether so much waits that others wait for it, too, or will soon find no room."""
        used, _ = _MEMORY.unpack(self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMORY.size))
        return bool(used > _CROWDED)

    def _relieve(self, count: int) -> None:
        """Take out what waits, much of it unanswered: who sent more than a share loses the rest, and others
        find room in the queue. Looking at a datagram costs a tenth of answering it."""
        shares: dict[bytes, int] = {}
        for _ in range(_ROUNDS):
            senders, over = shed(self._batch.senders(count), shares, _SHARE)
            for source, dropped in over.items():
                if source in self._cache.lanes:
                    self._cache.lanes[source].drop(dropped)
            if sum(over.values()) < count:
                self._answer(senders)
            if count < COUNT or not (count := self._batch.receive()):
                return
        self._answer(self._batch.senders(count))

    def _address(self, packed: bytes) -> Address:
        """Making an address costs more than answering from the cache does."""
        known = self._sources.get(packed)
        if known is None:
            if len(self._sources) >= 4096:
                self._sources.clear()
            known = self._sources[packed] = ip_address(packed)
        return known

    def _later(self, answer: Awaitable[bytes | None], place: tuple[object, ...]) -> None:
        async def wait() -> None:
            data = await answer
            if data is not None:
                self._batch.send_alone(data, place)

        task = asyncio.ensure_future(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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
        self._server = await asyncio.start_server(self._connected, sock=self._sock, limit=LONGEST * 16)

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
        writer.transport.set_write_buffer_limits(high=LONGEST * 4)

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
