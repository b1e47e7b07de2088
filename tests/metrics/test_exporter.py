"""The exporter's HTTP: what it answers, and that strangers at its socket cannot stop it."""

from __future__ import annotations

import asyncio
import gc
import gzip
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.processes.exporter import Bounds, Exporter, Request, parse
from http_speaker import Speaker
from metrics.metrics_scene import Samples, document, one, samples

GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
QUICK = Bounds(fresh=0.0, share=0.0, read_within=0.3, head_within=0.3, body_within=0.3, max_connections=4)


class Site(Speaker):
    """An exporter with a controller that can be made to wait or to fail."""

    patience = 5.0

    def __init__(self, exporter: Exporter, address: Any) -> None:
        super().__init__(address)
        self.exporter = exporter

    async def get(self, path: str = "/metrics", *headers: str, method: str = "GET") -> tuple[int, str, bytes]:
        """Status, headers, body."""
        lines = [f"{method} {path} HTTP/1.1", "Host: x", *headers]
        answer = await self.say("\r\n".join(lines).encode() + b"\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), head.decode(), body

    async def scrape(self) -> Samples:
        status, _, body = await self.get()
        assert status == 200
        return samples(body.decode())


def listener(where: str, tmp_path: Path | None = None) -> socket.socket:
    if where == "unix":
        assert tmp_path is not None
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / "metrics.sock"))
    else:
        sock = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET)
        sock.bind((where, 0))
    sock.listen()
    return sock


def serve(
    story: Callable[[Site], Awaitable[None]],
    *,
    ask: Callable[[], Any] = document,
    bounds: Bounds = QUICK,
    where: str = "127.0.0.1",
    tmp_path: Path | None = None,
) -> None:
    async def run() -> None:
        sock = listener(where, tmp_path)
        exporter = Exporter(ask, bounds=bounds)
        async with exporter.serving(sock):
            await story(Site(exporter, sock.getsockname()))

    asyncio.run(run())
    gc.collect()  # a task that nobody looked at would be told now


# ---- what it answers


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "unix"])
def test_a_scrape(where: str, tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        found = await site.scrape()
        assert one(found, "up") == 1
        assert one(found, "host_bytes_total", workspace="acme", host="api.example", direction="out") == 100

    serve(story, where=where, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/metrics", "GET", 200),
        ("/metrics?name[]=egressd_up", "GET", 200),
        ("/metrics", "HEAD", 200),
        ("/healthz", "GET", 200),
        ("/", "GET", 404),
        ("/metrics/", "GET", 404),
        ("/metrics/../healthz", "GET", 404),
        ("/favicon.ico", "GET", 404),
        ("/metrics", "POST", 405),
        ("/metrics", "OPTIONS", 405),
        ("/metrics", "DELETE", 405),
        ("http://elsewhere/metrics", "GET", 400),
        ("*", "OPTIONS", 400),
    ],
)
def test_two_paths_two_methods_and_no_more(path: str, method: str, status: int) -> None:
    async def story(site: Site) -> None:
        found, head, body = await site.get(path, method=method)
        assert found == status
        length = int(re.search(r"Content-Length: (\d+)", head)[1])  # type: ignore[index]
        assert length > 0
        assert len(body) == (0 if method == "HEAD" else length)

    serve(story)


def test_either_format_compressed_or_not() -> None:
    # what Prometheus 2.42 and 3 send
    old = "Accept: application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"  # noqa: E501
    new = "Accept: application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3"  # noqa: E501
    refusing = "Accept: application/openmetrics-text;q=0.0, text/plain"

    async def story(site: Site) -> None:
        for accept, is_open in ((old, True), (new, True), (refusing, False), ("Accept: */*", False)):
            for encoding in ("Accept-Encoding: gzip, br", "Accept-Encoding: gzip;q=0", "X: y"):
                _, head, body = await site.get("/metrics", accept, encoding)
                packed = encoding.endswith("br")
                assert ("Content-Encoding: gzip" in head) == packed
                text = gzip.decompress(body) if packed else body
                assert text.endswith(b"# EOF\n") == is_open
                assert ("application/openmetrics-text; version=1.0.0" in head) == is_open

    serve(story)


def test_nothing_that_was_sent_comes_back() -> None:
    async def story(site: Site) -> None:
        for line in ("X-Mark: mark", "Accept: text/mark; version=mark", "Accept-Encoding: mark"):
            status, head, body = await site.get("/metrics?mark", line)
            assert (status, "mark" in head, b"mark" in body) == (200, False, False)

    serve(story)


# ---- the controller


def test_a_controller_that_is_away_is_said_and_no_error() -> None:
    def ask() -> Any:
        raise Refused(Reason.UNAVAILABLE, "egressd is not running")

    async def story(site: Site) -> None:
        found = await site.scrape()
        assert one(found, "up") == 0
        assert {name for name, _ in found if not name.startswith("egressd_exporter_")} == {"egressd_up"}
        assert (await site.get("/healthz"))[0] == 503
        assert one(await site.scrape(), "exporter_failed_readings_total") == 3

    serve(story, ask=ask)


def test_a_controller_that_says_something_else_is_away() -> None:
    async def story(site: Site) -> None:
        assert one(await site.scrape(), "up") == 0

    serve(story, ask=lambda: {"status": "well"})


def test_a_controller_that_hangs_costs_the_bound_and_is_asked_once() -> None:
    release, asked = threading.Event(), []

    def ask() -> Any:
        asked.append(time.monotonic())
        release.wait(10)
        return document()

    async def story(site: Site) -> None:
        for _ in range(3):
            began = time.monotonic()
            assert one(await site.scrape(), "up") == 0
            assert time.monotonic() - began < 2
        release.set()
        await asyncio.sleep(0.1)
        assert len(asked) == 1, "nothing was put in a queue meanwhile"
        while one(await site.scrape(), "up") == 0:
            await asyncio.sleep(0.01)

    serve(story, ask=ask)


def test_scrapes_that_come_together_share_one_reading() -> None:
    asked = []

    def ask() -> Any:
        asked.append(1)
        time.sleep(0.1)
        return document()

    async def story(site: Site) -> None:
        found = await asyncio.gather(*(site.scrape() for _ in range(4)))
        assert [one(each, "up") for each in found] == [1] * 4
        assert len(asked) == 1
        await site.scrape()
        assert len(asked) == 2, "later comes another reading"

    serve(story, ask=ask)


def test_whoever_asks_without_end_has_the_kernel_read_once_a_second() -> None:
    asked = []

    def ask() -> Any:
        asked.append(1)
        return document()

    async def story(site: Site) -> None:
        for _ in range(20):
            await site.scrape()
        assert len(asked) == 1

    serve(story, ask=ask, bounds=Bounds(fresh=30.0))


# ---- strangers


def test_a_request_that_does_not_end_is_ended() -> None:
    async def story(site: Site) -> None:
        reader, writer = await site.connect()
        began = time.monotonic()
        ended = asyncio.ensure_future(reader.read(1))
        while not ended.done() and time.monotonic() - began < 3:
            writer.write(b"G")  # a byte at a time, each within the bound
            await asyncio.wait([ended], timeout=0.05)
        assert ended.done() and isinstance(ended.exception(), OSError | None)
        assert 0.2 < time.monotonic() - began < 2
        writer.close()
        assert one(await site.scrape(), "exporter_dropped_connections_total", why="slow") == 1

    serve(story)


def test_a_head_too_long_is_refused() -> None:
    async def story(site: Site) -> None:
        answer = await site.say(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 8300)
        assert answer.startswith(b"HTTP/1.1 431 "), answer

    serve(story)


def test_a_client_that_does_not_take_its_answer_is_ended(tmp_path: Path) -> None:
    """Over a Unix socket, where the kernel keeps little of it; TCP on the loopback takes megabytes."""
    hosts = [
        {**document()["counters"]["workspaces"][0]["hosts"][0], "host": f"{'h' * 60}{n}.example"}
        for n in range(1000)
    ]
    large = document({**document()["counters"]["workspaces"][0], "hosts": hosts})

    async def story(site: Site) -> None:
        _, writer = await site.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(GET)
        began = time.monotonic()
        while not site.exporter.dropped["slow"]:
            assert time.monotonic() - began < 3
            await asyncio.sleep(0.02)
        assert site.exporter._open == 0
        writer.close()

    serve(story, ask=lambda: large, where="unix", tmp_path=tmp_path)


def test_connections_held_open_keep_no_scraper_out() -> None:
    async def story(site: Site) -> None:
        held = [await site.connect() for _ in range(40)]
        for _ in range(10):
            assert one(await site.scrape(), "up") == 1
        assert site.exporter._open <= QUICK.max_connections + 1
        assert site.exporter.dropped["crowded"] >= 36
        for _, writer in held:
            writer.close()

    serve(story, bounds=Bounds(fresh=0.0, head_within=30.0, max_connections=4))


def test_when_all_wait_for_an_answer_the_next_is_turned_away() -> None:
    release = threading.Event()

    def ask() -> Any:
        release.wait(10)
        return document()

    async def story(site: Site) -> None:
        asking = [asyncio.ensure_future(site.scrape()) for _ in range(4)]
        while site.exporter._open < 4 or site.exporter._waiting:
            await asyncio.sleep(0.01)
        with pytest.raises((OSError, IndexError)):  # reset, or nothing at all
            await site.get()
        release.set()
        assert [one(found, "up") for found in await asyncio.gather(*asking)] == [1] * 4

    serve(story, ask=ask, bounds=Bounds(max_connections=4))


def test_who_asks_without_end_has_the_warden_for_a_small_part_of_its_time() -> None:
    """Reading ten thousand hosts holds it for half a second."""
    took: list[float] = []

    def ask() -> Any:
        time.sleep(0.1)
        took.append(0.1)
        return document()

    async def story(site: Site) -> None:
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            await site.scrape()
        assert sum(took) <= 0.2

    serve(story, ask=ask, bounds=Bounds(fresh=0.0))


def test_one_who_gives_up_ends_nobody_elses_reading() -> None:
    release = threading.Event()

    def ask() -> Any:
        release.wait(10)
        return document()

    async def story(site: Site) -> None:
        _, writer = await site.connect()
        writer.write(GET)
        other = asyncio.ensure_future(site.scrape())
        while site.exporter._waiting or site.exporter._open < 2:
            await asyncio.sleep(0.01)
        writer.transport.abort()
        release.set()
        assert one(await other, "up") == 1

    serve(story, ask=ask, bounds=Bounds())


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.from_regex(
            rb"\A(GET|HEAD|PRI) /[!-~]{0,20} HTTP/1\.[01]\r\n(.{0,30}:.{0,30}\r\n){0,5}", fullmatch=True
        ),
    )
)
def test_any_head_is_a_request_or_refused(head: bytes) -> None:
    found = parse(head)
    assert isinstance(found, Request) or found == 400
    if isinstance(found, Request):
        assert re.fullmatch(r"/[!-~]*", found.path) and "?" not in found.path


def test_an_error_of_ours_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    async def story(site: Site) -> None:
        async def broken(*_: object) -> bytes:
            raise ZeroDivisionError

        site.exporter._text = broken  # type: ignore[method-assign, assignment]
        assert (await site.get())[0] == 500

    serve(story)
    assert "could not be answered" in caplog.text
