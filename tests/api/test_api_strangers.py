"""Whoever reaches the HTTP API's socket: slow, half, huge, pipelined, many. Nobody else notices."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import pytest
from api_scene import MEMBER, Site, play, write_journal

from egressd.processes.api import Bounds
from lab.machine import open_descriptors

QUICK = Bounds(head_within=0.3, body_within=0.4, max_connections=6)
GET = b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n"
WHERE = pytest.mark.parametrize("where", ["unix", "127.0.0.1", "::1"])


@WHERE
def test_a_request_that_does_not_end_is_ended_and_told_why(tmp_path: Path, where: str) -> None:
    async def story(site: Site) -> None:
        reader, writer = await site.connect()
        began = time.monotonic()
        answer = asyncio.ensure_future(reader.read())
        for byte in itertools.cycle(b"G"):
            if answer.done():
                break
            writer.write(bytes([byte]))  # each within the bound
            await asyncio.wait([answer], timeout=0.05)
        assert 0.2 < time.monotonic() - began < 2
        assert b" 408 " in (await answer) and b"send it at once" in await answer
        writer.close()
        assert (await site.get("/v1/status")).status == 200

    play(tmp_path, story, bounds=QUICK, where=where)


@WHERE
def test_what_is_no_request(tmp_path: Path, where: str) -> None:
    async def story(site: Site) -> None:
        for data, status in (
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
            (b"GET /v1/status HTTP/2.0\r\n\r\n", 400),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
            (b"get /v1/status HTTP/1.1\r\n\r\n", 400),
            (b"GET  /v1/status HTTP/1.1\r\n\r\n", 400),
            (b"GET http://localhost/v1/status HTTP/1.1\r\n\r\n", 400),
            (b"GET /v1/st\xc3\xa4tus HTTP/1.1\r\n\r\n", 400),
            (b"GET /v1/status HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
            (b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n", 400),
            (b"GET /v1/status HTTP/1.1\r\nHost: localhost\nOrigin: x\r\n\r\n", 400),
            (b"GET /v1/status HTTP/1.1\r\nX: " + b"x" * 9000, 431),
            (b"GET /v1/status?" + b"x" * 9000, 431),
            (
                b"POST /v1/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"
                + b"x" * 99999,
                405,
            ),
            (
                b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n"
                + b"x" * 300000,
                413,
            ),
            (
                b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                413,
            ),
        ):
            reply = site.reply(await site.say(data), "")
            assert (reply.status, bool(reply.detail)) == (status, True), data[:80]
        assert (await site.get("/v1/status")).status == 200

    play(tmp_path, story, where=where)


@WHERE
def test_of_requests_in_a_row_the_first_is_answered(tmp_path: Path, where: str) -> None:
    """And the answer arrives, though what comes behind is never read."""

    async def story(site: Site) -> None:
        for count in (2, 5000):
            answer = await site.say(GET * count)
            assert answer.count(b"HTTP/1.1 ") == 1
            assert site.reply(answer, "").json["enforcing"] is True

    play(tmp_path, story, where=where)


def test_one_who_does_not_take_an_answer_is_ended_and_holds_nothing(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, [("auditor", "denied", {"workspace": "acme", "name": "x" * 1000})] * 1000)
        site.uid = MEMBER
        _, writer = await site.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(GET.replace(b"status", b"audit?limit=1000"))
        began = time.monotonic()
        while not site.api.dropped["slow"]:
            assert time.monotonic() - began < 3
            await asyncio.sleep(0.02)
        assert site.api._open == 0
        assert not site.api._searching._asked, "its turn was given back"
        writer.close()

    play(tmp_path, story, bounds=QUICK)


@WHERE
def test_connections_that_are_held_keep_nobody_out_and_leave_nothing(tmp_path: Path, where: str) -> None:
    async def story(site: Site) -> None:
        before = open_descriptors()
        held = [await site.connect() for _ in range(60)]
        half = [await site.connect() for _ in range(20)]
        for _, writer in half:
            writer.write(GET[:20])
        for _ in range(5):
            assert (await site.get("/v1/status")).status == 200
        assert site.api._open <= QUICK.max_connections + 1
        assert site.api.dropped["crowded"] >= 60
        for _, writer in (*held, *half):
            writer.close()
        while open_descriptors() > before:
            await asyncio.sleep(0.01)

    play(tmp_path, story, bounds=Bounds(head_within=30.0, max_connections=6), where=where)


def test_one_who_stays_when_the_answer_is_out_makes_room(tmp_path: Path) -> None:
    """It is waited for, so that its answer arrives; but not before others."""

    async def story(site: Site) -> None:
        staying = []
        for _ in range(6):
            reader, writer = await site.connect()
            writer.write(GET)
            await reader.readuntil(b"}\n")
            staying.append(writer)
        began = time.monotonic()
        for _ in range(3):
            assert (await site.get("/v1/status")).status == 200
        assert time.monotonic() - began < 0.9
        for writer in staying:
            writer.close()

    play(tmp_path, story, bounds=QUICK)


def test_a_defect_is_an_answer_too_and_tells_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(site: Site) -> None:
        async def broken(*_: object) -> None:
            raise ZeroDivisionError("secret")

        site.api._status = broken  # type: ignore[method-assign, assignment]
        reply = await site.get("/v1/status")
        assert reply.status == 500 and b"secret" not in reply.body

    play(tmp_path, story)
    assert "could not be answered" in caplog.text
