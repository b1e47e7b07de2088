"""HTTP's side of what the service says: problems (RFC 9457), JSON, streams; and what is read of a request
before the service hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from egressd.broker.inferences import Inference

__all__ = [
    "MAX_WAIT",
    "NOT_THERE",
    "Answer",
    "Exactly",
    "HttpProblem",
    "Stream",
    "body",
    "lines",
    "problem",
    "token",
    "wait",
]

MAX_WAIT = 300.0  # seconds for which an answer is held back
log = logging.getLogger("broker")
_DETAIL = "there is nothing here that you may see"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
}
# RFC 6750, section 2.1: b64token. How long one may be is the verifier's business; headers are bounded anyway.
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)
_WAIT = re.compile(r"wait(?: *= *([0-9]{1,9}))?", re.IGNORECASE)


class HttpProblem(Exception):
    """An answer that is a problem."""

    def __init__(
        self, status: int, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        self.status, self.detail, self.headers, self.more = status, detail, dict(headers or {}), more
        super().__init__(detail)


class Answer(Response):
    """One JSON document."""

    media_type = "application/json"

    def __init__(self, document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(document, status, {**_HEADERS, **(headers or {})})

    def render(self, content: Any) -> bytes:
        return encoded(content)


class Exactly(Answer):
    """One JSON document whose bytes are given."""

    def render(self, content: Any) -> bytes:
        return bytes(content)


class _ProblemAnswer(Answer):
    media_type = "application/problem+json"


def encoded(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def problem(
    status: int,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Response:
    document = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail, **(more or {})}
    return _ProblemAnswer(document, status, headers)


def NOT_THERE() -> Response:  # noqa: N802 - the one answer for all of these
    """The same bytes and headers for what does not exist and what may not be seen."""
    return problem(404, _DETAIL)


# ---- what a request says


def token(request: Request) -> str:
    """The bearer token. In one header, and never in a URL, which is logged (RFC 6750, section 5.3)."""
    found = request.headers.getlist("authorization")
    match = _BEARER.fullmatch(found[0]) if len(found) == 1 else None
    if match is None:
        raise HttpProblem(
            401,
            "say who you are: Authorization: Bearer ID-TOKEN",
            headers={"WWW-Authenticate": 'Bearer realm="egressd"'},
        )
    return match[1]


def wait(request: Request) -> float | None:
    """Seconds for which the asker would wait: `?wait=30`, or RFC 7240's `Prefer: wait=30`. None: at once."""
    text = request.query_params.get("wait")
    if text is not None:
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise HttpProblem(422, "wait is a whole number of seconds", problems=[_fault("wait")])
        return min(float(text), MAX_WAIT)
    for header in request.headers.getlist("prefer"):
        for part in header.split(","):
            match = _WAIT.fullmatch(part.partition(";")[0].strip())
            if match:
                return min(float(match[1] or MAX_WAIT), MAX_WAIT)
    return None


def _fault(where: str) -> dict[str, str]:
    return {"where": where, "text": "this is not a whole number", "remedy": "send digits"}


async def body(request: Request, *, most: int, within: float) -> bytes:
    """All of it, as JSON is sent."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpProblem(415, "send application/json", headers={"Accept-Post": "application/json"})
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > most:
        raise _too_large(most)
    data = bytearray()
    try:
        async with asyncio.timeout(within):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise HttpProblem(408, f"the body did not arrive within {within:g} s") from None
    except ClientDisconnect:
        raise HttpProblem(400, "the body ended early") from None
    return bytes(data)


def _too_large(most: int) -> HttpProblem:
    return HttpProblem(413, f"the body may have {most} bytes")


# ---- streams


async def lines(inference: Inference, offset: int, *, sse: bool, reason: bool) -> AsyncIterator[bytes]:
    """What the command writes as it writes it, then how it ended: one JSON document each, as a line, or as an
    event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    def spelt(document: Mapping[str, Any], event: str, id: int) -> bytes:
        data = encoded(document)
        return b"event: %s\nid: %d\ndata: %s\n\n" % (event.encode(), id, data) if sse else data + b"\n"

    async for piece in inference.output(offset):
        yield spelt(piece.told(), "output", piece.at + len(piece.data))
    yield spelt(inference.told(reason=reason, output=False), "end", inference.written)


class Stream(Response):
    """Sends pieces as they come. `gone` is called if the reader is gone before the end."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        *,
        status: int = 200,
        media_type: str,
        headers: Mapping[str, str] | None = None,
        gone: Callable[[], None] = lambda: None,
    ) -> None:
        self.status_code, self.media_type, self.background = status, media_type, None
        self._pieces, self._gone = pieces, gone
        self.init_headers({**_HEADERS, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            whole = sending.done() and not sending.cancelled() and sending.exception() is None
            for task in (sending, leaving):
                task.cancel()
            failed, _ = await asyncio.gather(sending, leaving, return_exceptions=True)
            if isinstance(failed, Exception) and not isinstance(
                failed, OSError
            ):  # OSError: the reader has gone
                log.error("a stream broke off", exc_info=failed)
            with contextlib.suppress(RuntimeError):
                await self._pieces.aclose()  # type: ignore[attr-defined]
            if not whole:
                self._gone()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
