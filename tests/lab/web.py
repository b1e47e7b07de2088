"""Enough HTTP/1.1 to satisfy real SDKs: an OpenAI-compatible API, Ollama's, and a page that says who answers.

A `Handler` is a function from a request to a response; `serve` moves bytes. Answers are fixed or echo what
was asked, so that a test can compare them whole.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Handler", "Request", "Response", "ollama", "openai", "secret", "serve", "site"]

MODEL = "lab-1"
_MAX_BODY = 64 << 20


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    host: str  # the Host header
    body: bytes
    at: str  # the address it arrived at

    def json(self) -> dict[str, Any]:
        try:
            document = json.loads(self.body)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    kind: str
    body: bytes | tuple[bytes, ...]  # a tuple is streamed, one chunk each


Handler: TypeAlias = Callable[[Request], Response | None]


def _document(value: Any, *, status: int = 200) -> Response:
    return Response(status, "application/json", json.dumps(value).encode() + b"\n")


def _text(text: str, *, status: int = 200) -> Response:
    return Response(status, "text/plain", text.encode() + b"\n")


def _asked(document: dict[str, Any]) -> str:
    """The last thing the user said."""
    messages = document.get("messages") or [{"content": document.get("prompt", "")}]
    return str(messages[-1].get("content", ""))


def openai(request: Request) -> Response | None:
    """The OpenAI-compatible part, on https://eu.api.openai.test and on the fake Ollama."""
    if request.path == "/v1/models":
        return _document(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "lab"}]}
        )
    if request.path == "/v1/chat/completions" and request.method == "POST":
        asked = request.json()
        answer = f"You said: {_asked(asked)}"
        common = {"id": "chatcmpl-lab", "created": 0, "model": asked.get("model", MODEL)}
        if asked.get("stream"):
            return Response(200, "text/event-stream", _events(common, answer))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        return _document(common | {"object": "chat.completion", "choices": [choice], "usage": usage})
    return None


def _events(common: dict[str, Any], answer: str) -> tuple[bytes, ...]:
    deltas: list[dict[str, Any]] = [
        {"delta": {"content": word + " "}, "finish_reason": None} for word in answer.split()
    ]
    deltas.append({"delta": {}, "finish_reason": "stop"})
    events = [
        json.dumps(common | {"object": "chat.completion.chunk", "choices": [{"index": 0} | delta]})
        for delta in deltas
    ]
    return tuple(f"data: {event}\n\n".encode() for event in [*events, "[DONE]"])


def ollama(request: Request) -> Response | None:
    """Ollama's own API, then the OpenAI-compatible one that it has as well."""
    made = "2026-01-01T00:00:00Z"
    if request.path == "/":
        return _text("Ollama is running")
    if request.path == "/api/version":
        return _document({"version": "0.0.0-lab"})
    if request.path == "/api/tags":
        return _document({"models": [{"name": MODEL, "model": MODEL, "modified_at": made, "size": 1}]})
    if request.path in ("/api/chat", "/api/generate") and request.method == "POST":
        asked = request.json()
        parts = (
            f"You said: {_asked(asked)}".split(" ")
            if asked.get("stream", True)
            else [f"You said: {_asked(asked)}"]
        )
        lines = []
        for number, part in enumerate(parts):
            text = part if number == 0 else " " + part
            said = (
                {"message": {"role": "assistant", "content": text}}
                if request.path == "/api/chat"
                else {"response": text}
            )
            done = number == len(parts) - 1
            lines.append({"model": asked.get("model", MODEL), "created_at": made, "done": done} | said)
        return Response(
            200, "application/x-ndjson", tuple(json.dumps(line).encode() + b"\n" for line in lines)
        )
    return openai(request)


def site(request: Request) -> Response | None:
    """Any host of the lab's internet: the API, a page, an upload that is counted, a download of any size."""
    if (api := openai(request)) is not None:
        return api
    if request.path.startswith("/bytes/"):
        return Response(200, "application/octet-stream", bytes(min(int(request.path[7:] or 0), _MAX_BODY)))
    if request.method in ("POST", "PUT"):
        return _document({"received": len(request.body)})
    return _text(f"{request.host} at {request.at}")


def secret(text: bytes) -> Handler:
    """A service of the host that no sandbox may ever read."""
    return lambda _: Response(200, "text/plain", text + b"\n")


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    handler: Handler,
    note: Callable[[Request], None],
) -> None:
    """Requests of one connection, until its end. `note` is told each request."""
    while (request := await _read(reader, writer)) is not None:
        note(request)
        response = handler(request) or _text("not found", status=404)
        await _write(writer, response)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(min(int(headers.get("content-length", 0)), _MAX_BODY))
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
        return None
    at = writer.get_extra_info("sockname")[0]
    return Request(method, path, headers.get("host", ""), body, at)


async def _write(writer: asyncio.StreamWriter, response: Response) -> None:
    head = f"HTTP/1.1 {response.status} Lab\r\nContent-Type: {response.kind}\r\n"
    if isinstance(response.body, bytes):
        writer.write(f"{head}Content-Length: {len(response.body)}\r\n\r\n".encode() + response.body)
        await writer.drain()
        return
    writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    for chunk in (*response.body, b""):
        writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        await writer.drain()
