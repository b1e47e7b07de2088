"""Asking the broker from Python.

>>> from egressd.broker.client import Broker                                            # doctest: +SKIP
>>> with Broker("unix:/run/egressd-broker/broker.sock", token=token) as broker:          # doctest: +SKIP
...     result = broker.ask(workspace="acme", inference="default", candidates=found, input="Who may leave?")
...     print(result.stdout, result.receipt["files"])
"""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from egressd.model.errors import EgressdError

__all__ = ["DEFAULT_BROKER", "Answered", "Broker", "NotAnswered", "Piece", "Result", "Running"]

DEFAULT_BROKER = "unix:/run/egressd-broker/broker.sock"
_CONNECT, _READ = 10.0, 330.0  # seconds; the service holds an answer back for 300 at most
_POLL = 300  # seconds that one question for the end may wait
_MOST = 256 << 20  # bytes of one line of a stream, or of an answer


class NotAnswered(EgressdError):
    """The broker cannot be reached, or what answers is none."""


class Answered(EgressdError):
    """The broker's no: a problem (RFC 9457). `problems` are what is wrong with the request."""

    def __init__(self, document: Mapping[str, Any], status: int, *, retry_after: float | None = None) -> None:
        self.status, self.retry_after = status, retry_after
        self.problems: list[dict[str, str]] = list(document.get("problems") or [])
        said = [
            f"{one.get('where') or 'request'}: {one.get('text')} ({one.get('remedy')})"
            for one in self.problems
        ]
        super().__init__("; ".join([str(document.get("detail") or f"HTTP status {status}"), *said]))


@dataclass(frozen=True, slots=True)
class Piece:
    """Of what the command writes: `stream` is "stdout" or "stderr"."""

    stream: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """How it ended. `state` is "ended", or "refused" if it never ran; then `status` is 125."""

    id: str
    state: str
    status: int
    why: str = ""
    hit: tuple[str, ...] = ()
    output: bytes = b""  # standard output
    errors: bytes = b""  # standard error
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stdout(self) -> str:
        return self.output.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        return self.errors.decode("utf-8", "replace")


class Running:
    """An inference whose output is read as it comes: iterate, then look at `result`."""

    def __init__(self, id: str, response: httpx.Response) -> None:
        self.id = id
        self.result: Result | None = None
        self._response = response

    def __iter__(self) -> Iterator[Piece]:
        pieces: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        for document in _documents(self._response):
            if "state" in document:
                self.result = _result(document, {name: b"".join(all) for name, all in pieces.items()})
                return
            piece = Piece(str(document["stream"]), _bytes(document))
            pieces.setdefault(piece.stream, []).append(piece.data)
            yield piece
        raise NotAnswered("the broker stopped before the end was told")

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        """The broker ends an inference whose reader goes before its end."""
        self._response.close()


class Broker:
    """`address` is unix:PATH or https://HOST:PORT. The latter needs `ca`, and a certificate of one's own
    (paths of PEM files). Nothing of a proxy's, from the environment or elsewhere, is used."""

    def __init__(
        self,
        address: str = DEFAULT_BROKER,
        *,
        token: str,
        nonce: str = "",
        ca: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {token}", "User-Agent": "egressd"}
        if nonce:
            headers["OpenID-Nonce"] = nonce
        self.address = address
        base, chosen = _transport(address, ca, certificate, key)
        self._http = httpx.Client(
            base_url=base,
            headers=headers,
            transport=transport or chosen,
            timeout=httpx.Timeout(_READ, connect=_CONNECT),
            trust_env=False,
            follow_redirects=False,
        )

    def __repr__(self) -> str:
        return f"Broker({str(self._http.base_url)!r})"  # without the token

    def __enter__(self) -> Broker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ---- inferences

    def ask(self, **request: Any) -> Result:
        """Run it and wait for its end. Arguments as of `stream`."""
        document = self._call("POST", "/v1/inferences", body=_request(**request), params={"wait": _POLL})
        return self.wait(document)

    def start(self, **request: Any) -> str:
        """Run it; the number under which it is asked for."""
        return str(self._call("POST", "/v1/inferences", body=_request(**request))["id"])

    def wait(self, inference: str | Mapping[str, Any]) -> Result:
        """The end of an inference that was started."""
        document = self.show(inference) if isinstance(inference, str) else inference
        while "result" not in document:
            document = self._call("GET", f"/v1/inferences/{_id(document['id'])}", params={"wait": _POLL})
        return _result(document)

    def stream(
        self,
        *,
        workspace: str,
        inference: str | None = None,
        command: Sequence[str] | None = None,
        candidates: Sequence[str] = (),
        files: Sequence[str] = (),
        input: str | bytes = b"",
        network: str | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> Running:
        """Run it and read what it writes; leaving the block before its end cancels it."""
        body = _request(
            workspace=workspace, inference=inference, command=command, candidates=candidates, files=files,
            input=input, network=network, limits=limits,
        )  # fmt: skip
        request = self._http.build_request("POST", "/v1/inferences", json={**body, "stream": True})
        response = self._send(request, stream=True)
        return Running(response.headers.get("location", "").rpartition("/")[2], response)

    def show(self, id: str) -> dict[str, Any]:
        return self._call("GET", f"/v1/inferences/{_id(id)}")

    def list(self) -> list[dict[str, Any]]:
        return list(self._call("GET", "/v1/inferences")["inferences"])

    def cancel(self, id: str) -> dict[str, Any]:
        return self._call("DELETE", f"/v1/inferences/{_id(id)}")

    def receipt(self, id: str, *, proof: bool = False) -> dict[str, Any]:
        """What became of it; with `proof` the signed evidence, a DSSE envelope for `egressctl verify`."""
        return self._call("GET", f"/v1/inferences/{_id(id)}/receipt", params={"proof": "1"} if proof else {})

    def manifest(self, id: str) -> bytes:
        """MANIFEST.json as its sandbox had it, byte for byte: which files it was shown."""
        response = self._answer("GET", f"/v1/inferences/{_id(id)}/manifest")
        _document(response)
        return response.content

    # ---- HTTP

    def _call(self, method: str, path: str, *, body: Any = None, params: Any = None) -> dict[str, Any]:
        return _document(self._answer(method, path, body=body, params=params))

    def _answer(self, method: str, path: str, *, body: Any = None, params: Any = None) -> httpx.Response:
        return self._send(self._http.build_request(method, path, json=body, params=params))

    def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """What is no error of the broker's."""
        try:
            response = self._http.send(request, stream=stream)
        except httpx.HTTPError as error:
            why = str(error).removeprefix("[Errno 2] ") or type(error).__name__
            raise NotAnswered(f"the broker cannot be reached at {self.address}: {why}") from error
        if response.is_error:
            with contextlib.closing(response):
                raise _problem(response)
        return response


def _transport(
    address: str, ca: str | None, certificate: str | None, key: str | None
) -> tuple[str, httpx.BaseTransport]:
    if address.startswith("unix:/"):
        # Without TLS: a context that trusts nobody, since loading what the system trusts takes 20 ms.
        nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return "http://broker", httpx.HTTPTransport(verify=nobody, uds=address.removeprefix("unix:"))
    if not address.startswith("https://"):
        raise NotAnswered(f"{address!r} is no broker's address: write unix:PATH or https://HOST:PORT")
    try:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if certificate:
            context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise NotAnswered(
            f"{ca or ''} {certificate or ''} {key or ''}: {error.strerror or error}".strip()
        ) from error
    return address, httpx.HTTPTransport(verify=context)


def _request(
    *,
    workspace: str,
    inference: str | None = None,
    command: Sequence[str] | None = None,
    candidates: Sequence[str] = (),
    files: Sequence[str] = (),
    input: str | bytes = b"",
    network: str | None = None,
    limits: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "workspace": workspace, "inference": inference, "command": list(command) if command else None,
        "candidates": list(candidates), "files": list(files), "network": network,
        "limits": dict(limits) if limits else None, **_input(input),
    }  # fmt: skip
    return {name: value for name, value in body.items() if value not in (None, [])}


def _input(data: str | bytes) -> dict[str, str]:
    if isinstance(data, str):
        return {"input": data} if data else {}
    try:
        return {"input": data.decode()} if data else {}
    except UnicodeDecodeError:
        return {"input_base64": base64.b64encode(data).decode()}


def _id(id: object) -> str:
    return quote(str(id), safe="")


def _problem(response: httpx.Response) -> EgressdError:
    try:
        document = json.loads(response.read())
    except (ValueError, httpx.HTTPError):
        document = None
    if not isinstance(document, dict) or "detail" not in document:
        return NotAnswered(f"what answers is no broker: HTTP status {response.status_code}")
    retry = response.headers.get("retry-after", "")
    return Answered(document, response.status_code, retry_after=float(retry) if retry.isdecimal() else None)


def _document(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError as error:
        raise NotAnswered("what answers is no broker: its answer is not JSON") from error
    if not isinstance(document, dict):
        raise NotAnswered("what answers is no broker: its answer is no document")
    return document


def _documents(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """JSON, line by line."""
    left = b""
    try:
        for chunk in response.iter_bytes():
            *whole, left = (left + chunk).split(b"\n")
            if len(left) > _MOST:
                raise NotAnswered("what answers is no broker: its line does not end")
            for line in filter(None, whole):
                document = json.loads(line)
                if not isinstance(document, dict):
                    raise NotAnswered("what answers is no broker: a line is no document")
                yield document
    except httpx.HTTPError as error:
        raise NotAnswered(f"the broker stopped answering: {error or type(error).__name__}") from error
    except ValueError as error:
        raise NotAnswered("what answers is no broker: a line is not JSON") from error


def _bytes(document: Mapping[str, Any]) -> bytes:
    if "text" in document:
        return str(document["text"]).encode()
    return base64.b64decode(str(document.get("base64", "")))


def _result(document: Mapping[str, Any], output: Mapping[str, bytes] | None = None) -> Result:
    found = document.get("result") or {}
    if output is None:
        output = {
            name: _bytes(data) for name, data in (found.get("output") or {}).items() if isinstance(data, dict)
        }
    status = found.get("status")
    return Result(
        id=str(document.get("id")),
        state=str(document.get("state")),
        status=125 if status is None else int(status),
        why=str(found.get("refused") or found.get("why") or ""),
        hit=tuple(found.get("hit") or ()),
        output=output.get("stdout", b""),
        errors=output.get("stderr", b""),
        receipt=found.get("receipt") or {},
    )
