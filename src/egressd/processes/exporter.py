"""The exporter: metrics over HTTP, for Prometheus. It runs only where `metrics` is configured.

It holds nothing of its own: a scrape asks the controller, at the control socket like anybody who may read,
and the controller reads the kernel's counters then. Scrapes that come together share one reading, and one
that comes soon after gets that one again: within `fresh` seconds, or within `share` times as long as the
reading took, so that whoever reaches the socket cannot keep the kernel, and the warden, busy with reading.

Whoever reaches the socket is a stranger, and bounded as `http_server` says.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gzip
import http
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from egressd.model.errors import EgressdError
from egressd.processes import http_server
from egressd.processes.http_server import Answer, Exchange, Request, Server, accepts, parse
from egressd.processes.metric_families import Document, Families, Rows, read, tell
from egressd.processes.ritual import Start, begin
from egressd.sandbox.control import Control

__all__ = ["Bounds", "Exporter", "Request", "ask_controller", "main", "parse"]

log = logging.getLogger("exporter")

_PATIENCE = 8.0  # seconds


@dataclass(frozen=True, slots=True)
class Bounds(http_server.Bounds):
    """Seconds. Prometheus waits ten by default, so an answer takes less."""

    fresh: float = 1.0
    share: float = 10.0
    most_stale: float = 15.0  # however long reading took: as often as Prometheus comes by
    read_within: float = 8.0


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


# ---- answers


class Exporter(Server):
    """`ask` gets the controller's document, in a thread."""

    def __init__(self, ask: Callable[[], Any], *, bounds: Bounds | None = None) -> None:
        bounds = bounds or Bounds()
        super().__init__(bounds)
        self.readings = Readings(ask, bounds)
        self._rows = Rows()
        self._render = concurrent.futures.ThreadPoolExecutor(1, "render")

    async def answer(self, request: Request | http.HTTPStatus, exchange: Exchange) -> Answer:
        if isinstance(request, http.HTTPStatus):
            return self.problem(request)
        if request.path not in ("/metrics", "/healthz"):
            return self.problem(http.HTTPStatus.NOT_FOUND)
        if request.method not in ("GET", "HEAD"):
            return self.problem(http.HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        reading = await self.readings.reading()
        if request.path == "/healthz":
            return _health(reading)
        as_openmetrics = accepts(request.header("accept"), "application/openmetrics-text")
        compressed = accepts(request.header("accept-encoding"), "gzip")
        text = await self._text(reading, as_openmetrics, compressed)
        kind = openmetrics.CONTENT_TYPE_LATEST if as_openmetrics else CONTENT_TYPE_PLAIN_0_0_4
        headers = (("Content-Encoding", "gzip"),) if compressed else ()
        return Answer(http.HTTPStatus.OK, text, kind, (*headers, ("Vary", "Accept, Accept-Encoding")))

    async def _text(self, reading: Reading, as_openmetrics: bool, compressed: bool) -> bytes:
        form = as_openmetrics, compressed
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
    run_dir = start.config.run_dir
    await http_server.serve(start, Exporter(lambda: ask_controller(run_dir)), role="metrics")


def main() -> int:
    asyncio.run(run(begin("exporter")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
