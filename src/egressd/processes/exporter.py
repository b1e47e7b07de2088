"""The exporter: metrics over HTTP, for Prometheus. It runs only where `metrics` is configured.

It holds nothing of its own: a scrape asks the controller, at the control socket like anybody who may read,
and the controller reads the kernel's counters then. Scrapes that come together share one reading, and one
that comes soon after gets that one again: within `fresh` seconds, or within `share` times as long as the
reading took, so that whoever reaches the socket cannot keep the kernel, and the warden, busy with reading.

Whoever reaches the socket is a stranger: a request has `HEAD_WITHIN` seconds and `MAX_HEAD` bytes in all,
an answer `BODY_WITHIN` seconds, and there are at most `MAX_CONNECTIONS`. When all are taken, the one that
has waited longest without a whole request makes room, so that connections held open keep no scraper out.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import gzip
import http
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from egressd.ipc import messages
from egressd.ipc.channel import Received
from egressd.ipc.peer import Peer
from egressd.model.errors import EgressdError
from egressd.processes.metric_families import Document, Families, Rows, read, tell
from egressd.processes.ritual import Start, begin
from egressd.sandbox.control import Control

__all__ = ["Bounds", "Exporter", "Request", "ask_controller", "main", "parse"]

log = logging.getLogger("exporter")

_HEAD_END = b"\r\n\r\n"
_PIECE = 1 << 16
_PATIENCE = 8.0  # seconds
_ACCEPTS = 8  # connections per turn of the loop
_BACKLOG = 1024  # connections that wait to be accepted: a full queue costs a scraper a second (SYN again)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds, bytes, connections. Prometheus waits ten seconds by default, so an answer takes less."""

    fresh: float = 1.0
    share: float = 10.0
    most_stale: float = 15.0  # however long reading took: as often as Prometheus comes by
    read_within: float = 8.0
    head_within: float = 5.0
    body_within: float = 10.0
    max_head: int = 8192
    max_connections: int = 64


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    openmetrics: bool = False
    gzip: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    status: http.HTTPStatus
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


# ---- one reading


@dataclass(slots=True, eq=False)
class Reading:
    """What the controller said, and the texts made of it: one for each form that was asked for."""

    document: Document | None
    seconds: float
    at: float  # the loop's clock
    texts: dict[tuple[bool, bool], asyncio.Task[bytes]] = field(default_factory=dict)


class _Collected:
    """Families that are there already, as a collector of prometheus_client."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def rendered(families: Families, *, as_openmetrics: bool, compressed: bool) -> bytes:
    """In one of prometheus_client's formats."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families))
    text: bytes = (openmetrics.generate_latest if as_openmetrics else generate_latest)(registry)
    return gzip.compress(text, compresslevel=1) if compressed else text


def ask_controller(run_dir: str) -> Any:
    """The document, over a connection of its own: a controller that was started again is met like any."""
    with Control(run_dir) as control:
        control.channel.socket.settimeout(_PATIENCE)
        return control.ask("metrics")


class Readings:
    """One at a time, shared by all who ask meanwhile."""

    def __init__(self, ask: Callable[[], Any], bounds: Bounds) -> None:
        self.failed = 0
        self._ask, self._bounds = ask, bounds
        # Asking waits for another process, and so may not happen in the loop. One thread: a second question
        # while the first is not answered would not be answered either. What waits for the thread and is
        # given up is never asked: cancelling goes through to it.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "ask")
        self._current: asyncio.Task[Reading] | None = None
        self._said = ""

    async def reading(self) -> Reading:
        current = self._current
        if current is None or self._stale(current):
            current = self._current = asyncio.create_task(self._read())
        return await current  # nobody who waits here is ever cancelled, so neither is what others wait for

    def _stale(self, task: asyncio.Task[Reading]) -> bool:
        if not task.done():
            return False
        if task.cancelled() or task.exception() is not None:
            return True
        reading, bounds = task.result(), self._bounds
        rest = min(bounds.share * reading.seconds, bounds.most_stale) if reading.document is not None else 0.0
        return asyncio.get_running_loop().time() - reading.at > max(bounds.fresh, rest)

    async def _read(self) -> Reading:
        loop = asyncio.get_running_loop()
        began = loop.time()
        document = None
        try:
            asked = loop.run_in_executor(self._thread, self._ask)
            document = read(await asyncio.wait_for(asked, self._bounds.read_within))
            self._say("")
        except TimeoutError:
            self._say(f"no answer within {self._bounds.read_within:g} s")
        except (EgressdError, OSError, ValueError, msgspec.MsgspecError) as error:
            self._say(str(error))
        self.failed += document is None
        return Reading(document, loop.time() - began, loop.time())

    def _say(self, text: str) -> None:
        """Once, not at every scrape."""
        if text != self._said:
            self._said = text
            log.warning("the controller gives no metrics: %s", text) if text else log.info("metrics are back")


# ---- HTTP


def parse(head: bytes) -> Request | http.HTTPStatus:
    """A request line and headers, without the empty line at the end; what is wrong with it."""
    line, *fields = head.decode("latin-1").split("\r\n")
    found = re.fullmatch(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.[01]", line)
    if found is None:
        return http.HTTPStatus.BAD_REQUEST
    headers = {name.strip().lower(): value for name, _, value in (text.partition(":") for text in fields)}
    path, _, _ = found[2].partition("?")
    return Request(
        method=found[1],
        path=path,
        openmetrics=_accepts(headers.get("accept", ""), "application/openmetrics-text"),
        gzip=_accepts(headers.get("accept-encoding", ""), "gzip"),
    )


def _accepts(header: str, wanted: str) -> bool:
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


def _problem(status: http.HTTPStatus, *headers: tuple[str, str]) -> Answer:
    return Answer(status, f"{status.phrase}\n".encode(), headers=headers)


class Exporter:
    """Answers over `listener`; `ask` gets the controller's document, in a thread."""

    def __init__(self, ask: Callable[[], Any], *, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.readings = Readings(ask, self.bounds)
        self.answered: collections.Counter[str] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self._rows = Rows()
        self._render = concurrent.futures.ThreadPoolExecutor(1, "render")
        self._waiting: dict[asyncio.StreamWriter, None] = {}  # without a whole request, the oldest first
        self._open = 0

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
        async with asyncio.timeout(self.bounds.head_within):
            request = await self._request(reader)
        if self._waiting.pop(writer, self) is self:
            return  # it had to make room just now
        try:
            answer = await self.answer(request)
        except Exception:
            log.exception("a request could not be answered")
            answer = _problem(http.HTTPStatus.INTERNAL_SERVER_ERROR)
        self.answered[str(answer.status.value)] += 1
        method = request.method if isinstance(request, Request) else ""
        data = encoded(answer, body=method != "HEAD")
        async with asyncio.timeout(self.bounds.body_within):
            # In pieces: what a slow reader has not taken is not copied for it.
            for place in range(0, len(data), _PIECE):
                writer.write(data[place : place + _PIECE])
                await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader) -> Request | http.HTTPStatus:
        try:
            head = await reader.readuntil(_HEAD_END)
        except asyncio.LimitOverrunError:
            return http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        return parse(head.removesuffix(_HEAD_END))

    # ---- answers

    async def answer(self, request: Request | http.HTTPStatus) -> Answer:
        if isinstance(request, http.HTTPStatus):
            return _problem(request)
        if request.path not in ("/metrics", "/healthz"):
            return _problem(http.HTTPStatus.NOT_FOUND)
        if request.method not in ("GET", "HEAD"):
            return _problem(http.HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        reading = await self.readings.reading()
        if request.path == "/healthz":
            return _health(reading)
        text = await self._text(reading, request)
        kind = openmetrics.CONTENT_TYPE_LATEST if request.openmetrics else CONTENT_TYPE_PLAIN_0_0_4
        headers = (("Content-Encoding", "gzip"),) if request.gzip else ()
        return Answer(http.HTTPStatus.OK, text, kind, (*headers, ("Vary", "Accept, Accept-Encoding")))

    async def _text(self, reading: Reading, request: Request) -> bytes:
        form = request.openmetrics, request.gzip
        if form not in reading.texts:
            reading.texts[form] = asyncio.create_task(self._rendered(reading, *form))
        return await reading.texts[form]

    async def _rendered(self, reading: Reading, as_openmetrics: bool, compressed: bool) -> bytes:
        families = Families()
        families.tell("up", reading.document is not None)
        self._tell_of_itself(reading, families)
        rows, now = self._rows, time.time()

        def work() -> bytes:
            if reading.document is not None:
                tell(reading.document, rows, families, now=now)
            return rendered(families, as_openmetrics=as_openmetrics, compressed=compressed)

        return await asyncio.get_running_loop().run_in_executor(self._render, work)

    def _tell_of_itself(self, reading: Reading, families: Families) -> None:
        families.tell("exporter_reading_seconds", reading.seconds)
        families.tell("exporter_failed_readings_total", self.readings.failed)
        for code, count in sorted(self.answered.items()):
            families.tell("exporter_requests_total", count, code)
        for why, count in sorted(self.dropped.items()):
            families.tell("exporter_dropped_connections_total", count, why)


def _health(reading: Reading) -> Answer:
    """Whether there is something to scrape."""
    if reading.document is not None:
        return Answer(http.HTTPStatus.OK, b"ok\n")
    return Answer(http.HTTPStatus.SERVICE_UNAVAILABLE, b"the controller does not answer\n")


# ---- the process


async def run(start: Start) -> None:
    """Serve until the supervisor is gone, or says so."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    supervisor = Peer(
        start.take("supervisor"), messages.TO_CHILD, handler=_unexpected, gone=lambda *_: ended.set()
    )
    run_dir = start.config.run_dir
    exporter = Exporter(lambda: ask_controller(run_dir))
    async with exporter.serving(start.take("metrics")):
        supervisor.send(messages.Ready())
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), messages.HEARTBEAT)
            if not ended.is_set():
                supervisor.send(messages.Heartbeat())


def _unexpected(_: Peer, received: Received[Any]) -> None:
    """It has no neighbours: nothing is said to it."""
    received.close()


def main() -> int:
    asyncio.run(run(begin("exporter")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
