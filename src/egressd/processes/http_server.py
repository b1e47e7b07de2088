"""HTTP for strangers: one request per connection, within bounds of time, bytes and connections.

Whoever reaches the socket is a stranger: a request has `head_within` seconds and `max_head` bytes in all, an
answer `body_within` seconds, and there are at most `max_connections`. When all are taken, the one that has
waited longest without a whole request makes room, so that connections held open keep nobody out.

What is answered is `answer`'s business. It is never given a body: no request here has one.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import http
import logging
import re
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from egressd.ipc import messages
from egressd.ipc.channel import Received
from egressd.ipc.peer import Peer
from egressd.processes.ritual import Start

__all__ = ["Answer", "Bounds", "Exchange", "Request", "Server", "accepts", "parse", "serve"]

log = logging.getLogger("http")

_HEAD_END = b"\r\n\r\n"
_PIECE = 1 << 16
_ACCEPTS = 8  # connections per turn of the loop
_BACKLOG = 1024  # connections that wait to be accepted: a full queue costs a client a second (SYN again)
_LINGER = 1.0  # seconds for what a client still sends when its answer is out
# RFC 9110, 5.6.2 and 5.5: a name is a token, a value has no control characters but tabs
_LINE = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.[01]")
_FIELD = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds, bytes, connections."""

    head_within: float = 5.0
    body_within: float = 10.0
    max_head: int = 8192
    max_connections: int = 64


@dataclass(frozen=True, slots=True)
class Request:
    """`path` and `query` as they came, still encoded; `fields` in their order, names in lower case."""

    method: str
    path: str
    query: str = ""
    fields: tuple[tuple[str, str], ...] = ()

    def values(self, name: str) -> tuple[str, ...]:
        return tuple(value for found, value in self.fields if found == name)

    def header(self, name: str) -> str:
        """The last one; empty if there is none."""
        return next(iter(self.values(name)[::-1]), "")


@dataclass(frozen=True, slots=True)
class Answer:
    status: http.HTTPStatus
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Exchange:
    """One connection's question. `held` is let go when the answer is sent, or cannot be."""

    sock: socket.socket
    held: contextlib.ExitStack


def parse(head: bytes) -> Request | http.HTTPStatus:
    """A request line and headers, without the empty line at the end; what is wrong with it."""
    line, *lines = head.decode("latin-1").split("\r\n")
    found = _LINE.fullmatch(line)
    fields = [_FIELD.fullmatch(text) for text in lines]
    if found is None or not all(fields):
        return http.HTTPStatus.BAD_REQUEST
    path, _, query = found[2].partition("?")
    return Request(
        method=found[1],
        path=path,
        query=query,
        fields=tuple((field[1].lower(), field[2]) for field in fields if field),
    )


def accepts(header: str, wanted: str) -> bool:
    """Whether it stands there, and not with weight 0 (RFC 9110, 12.4.2)."""
    for entry in header.lower().split(","):
        name, *parameters = (word.strip() for word in entry.split(";"))
        if name == wanted:
            return not any(re.fullmatch(r"q=0(\.0{0,3})?", word) for word in parameters)
    return False


def encoded(answer: Answer, *, body: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Content-Type: {answer.kind}",
        f"Content-Length: {len(answer.body)}",
        *(f"{name}: {value}" for name, value in answer.headers),
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    return "\r\n".join(lines).encode("ascii") + _HEAD_END + (answer.body if body else b"")


class Server:
    """Answers over a listener. A subclass says what: `answer`, and `problem` for what is wrong with a request
    that need not even be one."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.answered: collections.Counter[str] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self._waiting: dict[asyncio.StreamWriter, None] = {}  # without a whole request, the oldest first
        self._open = 0

    async def answer(self, request: Request | http.HTTPStatus, exchange: Exchange) -> Answer:
        raise NotImplementedError

    def problem(self, status: http.HTTPStatus, *headers: tuple[str, str]) -> Answer:
        return Answer(status, f"{status.phrase}\n".encode(), headers=headers)

    @contextlib.asynccontextmanager
    async def serving(self, listener: socket.socket) -> AsyncIterator[None]:
        start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
        # Only as far ahead as a head may be long: what comes after it is not read.
        # Few accepted per turn, so that one that sends its request at once is read before others push it out.
        server = await start(self._connected, sock=listener, limit=self.bounds.max_head, backlog=_ACCEPTS)
        listener.listen(_BACKLOG)  # `backlog` has set this, too
        try:
            yield
        finally:
            server.close()

    # ---- connections

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= self.bounds.max_connections and not self._make_room():
            self._drop(writer, "crowded")
            return
        self._open += 1
        try:
            await self._converse(reader, writer)
        except TimeoutError:
            self._drop(writer, "slow")
        except (OSError, EOFError):
            self._drop(writer, "gone")
        finally:
            self._open -= 1
            self._waiting.pop(writer, None)
            writer.close()

    def _make_room(self) -> bool:
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        del self._waiting[oldest]
        self._drop(oldest, "crowded")
        return True

    def _drop(self, writer: asyncio.StreamWriter, why: str) -> None:
        """At once: what has not been sent is not sent."""
        if not writer.transport.is_closing():
            self.dropped[why] += 1
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._waiting[writer] = None
        try:
            async with asyncio.timeout(self.bounds.head_within):
                request = await self._request(reader)
        except TimeoutError:
            self._reproach(writer)
            await self._let_it_finish(reader, writer)
            raise
        if self._waiting.pop(writer, self) is self:
            return  # it had to make room just now
        with contextlib.ExitStack() as held:
            answer = await self._answered(request, Exchange(writer.get_extra_info("socket"), held))
            body = not (isinstance(request, Request) and request.method == "HEAD")
            async with asyncio.timeout(self.bounds.body_within):
                await _send(writer, encoded(answer, body=body))
        await self._let_it_finish(reader, writer)

    def _reproach(self, writer: asyncio.StreamWriter) -> None:
        """Say why, if there is room for it."""
        self.answered[str(http.HTTPStatus.REQUEST_TIMEOUT.value)] += 1
        writer.write(encoded(self.problem(http.HTTPStatus.REQUEST_TIMEOUT), body=True))

    async def _answered(self, request: Request | http.HTTPStatus, exchange: Exchange) -> Answer:
        try:
            answer = await self.answer(request, exchange)
        except Exception:
            log.exception("a request could not be answered")
            answer = self.problem(http.HTTPStatus.INTERNAL_SERVER_ERROR)
        self.answered[str(answer.status.value)] += 1
        return answer

    async def _let_it_finish(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take, and throw away, what the client still sends: closing a socket with something unread in it
        resets the connection, and with it the answer that is on its way (RFC 9112, 9.6). It may be made room
        of meanwhile."""
        self._waiting[writer] = None
        with contextlib.suppress(TimeoutError, OSError):
            writer.write_eof()
            async with asyncio.timeout(_LINGER):
                while await reader.read(_PIECE):
                    pass

    async def _request(self, reader: asyncio.StreamReader) -> Request | http.HTTPStatus:
        try:
            head = await reader.readuntil(_HEAD_END)
        except asyncio.LimitOverrunError:
            return http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        return parse(head.removesuffix(_HEAD_END))


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """In pieces: what a slow reader has not taken is not copied for it. In the end the kernel has it all."""
    writer.transport.set_write_buffer_limits(high=0)
    view = memoryview(data)
    for place in range(0, len(data), _PIECE):
        writer.write(view[place : place + _PIECE])
        await writer.drain()


# ---- as a process


async def serve(start: Start, server: Server, *, role: str) -> None:
    """Over the listener of this role, until the supervisor is gone, or says so."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    supervisor = Peer(
        start.take("supervisor"), messages.TO_CHILD, handler=_unexpected, gone=lambda *_: ended.set()
    )
    async with server.serving(start.take(role)):
        supervisor.send(messages.Ready())
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), messages.HEARTBEAT)
            if not ended.is_set():
                supervisor.send(messages.Heartbeat())


def _unexpected(_: Peer, received: Received[Any]) -> None:
    """It has no neighbours: nothing is said to it."""
    received.close()
