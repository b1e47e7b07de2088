"""The service over HTTP (`openapi.py` describes it). One table of routes; who asks is known before anything
else is looked at.

Answers: 401 without a token that is believed; 404, the same bytes, for whatever is not there or may not be
seen; 403 only to members, for a right their role lacks; 422 with every problem of what was sent; 429 with
Retry-After; 503 where something that the service needs does not work.
"""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.broker.identity.tokens import PUBLIC_TEXT, Code, Unauthenticated
from egressd.broker.inferences import Inference
from egressd.broker.rates import TooMany
from egressd.broker.service import Ending, Found, NotAllowed, NotThere, NotYet, Service
from egressd.broker.store.administration import Administration
from egressd.broker.store.rows import Membership, Source
from egressd.broker.web import requests
from egressd.broker.web.answers import (
    NOT_THERE,
    Answer,
    Exactly,
    HttpProblem,
    Stream,
    body,
    lines,
    problem,
    token,
    wait,
)
from egressd.broker.web.openapi import document
from egressd.broker.web.requests import Fault, Faults
from egressd.model.errors import EgressdError, Refused, Unfit
from egressd.model.verdicts import Reason
from egressd.policy import values

__all__ = ["App"]

log = logging.getLogger("broker")
BODY_WITHIN = 60.0  # seconds
_NDJSON, _SSE = "application/x-ndjson", "text/event-stream"
_SMALL = 64 << 10  # bytes of a body that administers
_NONCE = re.compile(r"[\x21-\x7e]{0,256}")
Handler: TypeAlias = Callable[["App", Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class App:
    """`app.asgi()` is what a server runs."""

    service: Service
    administration: Administration

    def asgi(self) -> ASGIApp:
        app = Starlette(routes=[self._route(path, handlers) for path, handlers in ROUTES.items()])
        app.router.redirect_slashes = False
        app.add_exception_handler(HTTPException, _http)
        app.add_exception_handler(404, _http)
        return functools.partial(_one_length, app)

    def _route(self, path: str, handlers: Mapping[str, Handler]) -> Route:
        async def endpoint(request: Request) -> Response:
            return await answered(functools.partial(handlers[request.method], self), request)

        route = Route(path, endpoint, methods=list(handlers))
        route.methods = set(handlers)  # no HEAD by itself
        return route

    # ---- who asks

    async def identity(self, request: Request, *, reading: bool = False) -> Identity:
        nonce = request.headers.get("openid-nonce", "")
        if not _NONCE.fullmatch(nonce):
            raise HttpProblem(401, PUBLIC_TEXT, headers=_INVALID)
        identity = await self.service.identify(token(request), nonce)
        self.service.pace(identity, reading=reading)
        return identity

    # ---- inferences

    async def ask(self, request: Request) -> Response:
        identity = await self.identity(request)
        patience = wait(request)
        bounds = self.service.config.limits
        with self.service.place(identity) as place:
            data = await body(request, most=bounds.body, within=BODY_WITHIN)
            asked = await self.service.read(
                lambda: requests.new_inference(data, candidates=bounds.candidates, files=bounds.files)
            )
            inference = await self.service.begin(identity, asked, place)
        headers = {"Location": f"/v1/inferences/{inference.id}"}
        if asked.stream:
            return self._stream(request, inference, status=201, headers=headers, bound=True)
        if patience is not None:
            await inference.over(patience)
            headers["Preference-Applied"] = "wait"
        return Answer(inference.told(), 201, headers)

    async def list(self, request: Request) -> Response:
        identity = await self.identity(request, reading=True)
        own = await self.service.mine(identity)
        return Answer({"inferences": [inference.told(output=False) for inference in own]})

    async def show(self, request: Request) -> Response:
        found = await self._find(request, "show")
        patience = wait(request)
        if patience is not None:
            await found.inference.over(patience)
        return Answer(found.inference.told(reason=found.administers, readable=found.readable))

    async def cancel(self, request: Request) -> Response:
        found = await self._find(request, "cancel")
        inference, patience = found.inference, wait(request)
        self.service.stop(inference, "it was cancelled")
        await inference.over(patience or 0.0)
        told = inference.told(reason=found.administers, output=False, readable=found.readable)
        return Answer(told, 200 if inference.state.over else 202)

    async def output(self, request: Request) -> Response:
        found = await self._readable(request, "output")
        return self._stream(request, found.inference, offset=_offset(request), reason=found.administers)

    async def receipt(self, request: Request) -> Response:
        inference = (await self._readable(request, "receipt")).inference
        if request.query_params.get("proof", "0") not in ("0", ""):
            return Answer(await self.service.proof(inference))
        if not inference.state.over:
            raise NotYet("there is no receipt of what has not ended")
        return Answer(inference.receipt())

    async def manifest(self, request: Request) -> Response:
        inference = (await self._readable(request, "manifest")).inference
        return Exactly(await self.service.manifest(inference))

    async def _find(self, request: Request, action: str) -> Found:
        identity = await self.identity(request, reading=True)
        return await self.service.find(identity, request.path_params["id"], action)

    async def _readable(self, request: Request, action: str) -> Found:
        found = await self._find(request, action)
        if not found.readable:
            raise NotThere
        return found

    def _stream(
        self,
        request: Request,
        inference: Inference,
        *,
        offset: int = 0,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        reason: bool = False,
        bound: bool = False,
    ) -> Response:
        """`bound`: the inference ends with its reader."""
        sse = _SSE in request.headers.get("accept", "")
        pieces = lines(inference, offset, sse=sse, reason=reason)
        return Stream(
            pieces,
            status=status,
            media_type=_SSE if sse else _NDJSON,
            headers=headers,
            gone=(lambda: self.service.stop(inference, "who asked went away")) if bound else (lambda: None),
        )

    # ---- administration

    async def members(self, request: Request) -> Response:
        identity, workspace = await self._administers(request, reading=True)
        found = await self._do(lambda: self.administration.members(identity, workspace))
        return Answer({"members": [_member(member) for member in found]})

    async def member(self, request: Request) -> Response:
        identity, workspace = await self._administers(request, reading=True)
        found = await self._do(lambda: self.administration.members(identity, workspace))
        name = unicodedata.normalize("NFC", request.path_params["principal"])  # as access.principals keeps it
        for member in found:
            if member.principal == name:
                return Answer(_member(member))
        raise NotThere

    async def set_member(self, request: Request) -> Response:
        identity, workspace = await self._administers(request)
        sent = await self._sent(request)
        role, clearance = sent.text("role", required=True), sent.text("clearance")
        sent.end()
        name = request.path_params["principal"]
        was = await self._do(
            lambda: self.administration.set_member(identity, workspace, name, Role.of(role), clearance)
        )
        return Answer({"principal": name, "role": role, "before": _before(was)}, 201 if was is None else 200)

    async def remove_member(self, request: Request) -> Response:
        identity, workspace = await self._administers(request)
        name = request.path_params["principal"]
        was = await self._do(lambda: self.administration.remove_member(identity, workspace, name))
        return Answer({"principal": name, "before": _before(was)})

    async def sources(self, request: Request) -> Response:
        identity, workspace = await self._administers(request, reading=True)
        found = await self._do(lambda: self.administration.sources(identity, workspace))
        return Answer({"sources": [_source(source) for source in found]})

    async def set_trust(self, request: Request) -> Response:
        identity, workspace = await self._administers(request)
        sent = await self._sent(request)
        trust: dict[str, Any] = {
            "front_matter": sent.truth("front_matter"),
            **{name: sent.names(name) for name in ("read", "deny", "groups")},
            "clearance": sent.text("clearance") or None,
        }
        sent.end()
        name = request.path_params["source"]
        then = await self._do(lambda: self.administration.set_trust(identity, workspace, name, **trust))
        return Answer(_source(then))

    async def drop_source(self, request: Request) -> Response:
        identity, workspace = await self._administers(request)
        name = request.path_params["source"]
        documents = await self._do(lambda: self.administration.drop_source(identity, workspace, name))
        return Answer({"source": name, "documents": documents})

    async def barriers(self, request: Request) -> Response:
        identity, workspace = await self._administers(request, reading=True)
        found = await self._do(lambda: self.administration.barriers(identity, workspace))
        return Answer({"barriers": [list(pair) for pair in found]})

    async def add_barrier(self, request: Request) -> Response:
        return await self._barrier(request, "add_barrier", 201)

    async def remove_barrier(self, request: Request) -> Response:
        return await self._barrier(request, "remove_barrier", 200)

    async def _barrier(self, request: Request, what: str, changed: int) -> Response:
        identity, workspace = await self._administers(request)
        a, b = request.query_params.get("a", ""), request.query_params.get("b", "")
        change = getattr(self.administration, what)
        done = await self._do(lambda: change(identity, workspace, a, b))
        return Answer({"barrier": sorted((a, b)), "changed": done}, changed if done else 200)

    async def _administers(self, request: Request, *, reading: bool = False) -> tuple[Identity, str]:
        """What is no workspace's name is no workspace."""
        identity = await self.identity(request, reading=reading)
        workspace = request.path_params["workspace"]
        if not values.is_workspace(workspace):
            raise NotThere
        return identity, workspace

    async def _do(self, work: Callable[[], Any]) -> Any:
        return await self.service.decided(work)

    async def _sent(self, request: Request) -> _Sent:
        return _Sent(requests.document(await body(request, most=_SMALL, within=BODY_WITHIN)))

    # ---- of the service itself

    async def openapi(self, request: Request) -> Response:
        return Answer(document())

    async def health(self, request: Request) -> Response:
        """That it answers; what it needs from elsewhere is found out by asking."""
        return Answer({"status": "ok"})


ROUTES: dict[str, dict[str, Handler]] = {
    "/v1/inferences": {"POST": App.ask, "GET": App.list},
    "/v1/inferences/{id}": {"GET": App.show, "DELETE": App.cancel},
    "/v1/inferences/{id}/output": {"GET": App.output},
    "/v1/inferences/{id}/receipt": {"GET": App.receipt},
    "/v1/inferences/{id}/manifest": {"GET": App.manifest},
    "/v1/workspaces/{workspace}/members": {"GET": App.members},
    "/v1/workspaces/{workspace}/members/{principal:path}": {
        "GET": App.member, "PUT": App.set_member, "DELETE": App.remove_member,
    },
    "/v1/workspaces/{workspace}/sources": {"GET": App.sources},
    "/v1/workspaces/{workspace}/sources/{source}": {"PUT": App.set_trust, "DELETE": App.drop_source},
    "/v1/workspaces/{workspace}/barriers": {
        "GET": App.barriers, "PUT": App.add_barrier, "DELETE": App.remove_barrier,
    },
    "/v1/openapi.json": {"GET": App.openapi},
    "/healthz": {"GET": App.health},
}  # fmt: skip


# ---- what went wrong, in HTTP


_INVALID = {"WWW-Authenticate": 'Bearer realm="egressd", error="invalid_token"'}
_BROKEN = "something that this service needs does not work now; its log says what"


async def answered(handler: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    """Whatever the handler raises as the answer it stands for."""
    try:
        return await handler(request)
    except HttpProblem as error:
        return problem(error.status, error.detail, headers=error.headers, more=error.more)
    except NotThere:
        return NOT_THERE()
    except NotAllowed as error:
        return problem(403, str(error))
    except NotYet as error:
        return problem(409, str(error))
    except TooMany as error:
        return problem(429, str(error), headers={"Retry-After": str(error.retry_after)})
    except Faults as error:
        more = {"problems": [fault.told() for fault in error.found]}
        return problem(422, "the request is not one that can be done", more=more)
    except Unfit as error:
        fault = Fault("", error.text, error.remedy)
        return problem(422, "the request is not one that can be done", more={"problems": [fault.told()]})
    except Ending:
        return problem(503, "the service is ending", headers={"Retry-After": "10"})
    except EgressdError as error:
        return _refused(error)
    except Exception:
        log.exception("%s %s", request.method, request.scope["path"][:80].encode("ascii", "backslashreplace"))
        return problem(500, "the service failed; its log says why")


def _refused(error: EgressdError) -> Response:
    if isinstance(error, Unauthenticated) and error.code is not Code.UNAVAILABLE:
        log.info("a token was not believed: %s", error)
        return problem(401, PUBLIC_TEXT, headers=_INVALID)
    if isinstance(error, Refused) and error.reason is Reason.WORKSPACE:
        return NOT_THERE()
    if isinstance(error, Refused) and error.reason is Reason.MEMBER:
        return problem(403, str(error))
    log.warning("unavailable: %s", error)
    return problem(503, _BROKEN, headers={"Retry-After": "5"})


async def _one_length(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """A body whose end is told in two ways ends at another place for a proxy before us (RFC 9112, 6.1)."""
    names = [name for name, _ in scope.get("headers", ())]
    if b"transfer-encoding" in names and b"content-length" in names:
        told = problem(400, "the body has two lengths", headers={"Connection": "close"})
        await told(scope, receive, send)
        return
    await app(scope, receive, send)


async def _http(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, no such method."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        return problem(405, "this cannot be done here", headers=error.headers)
    return NOT_THERE()


def _offset(request: Request) -> int:
    """Bytes of output that the reader has already: `?offset=`, or an event stream's Last-Event-ID."""
    text = request.query_params.get("offset") or request.headers.get("last-event-id") or "0"
    if not re.fullmatch(r"[0-9]{1,15}", text):
        fault = {"where": "offset", "text": "this is not a whole number", "remedy": "send bytes, in digits"}
        raise HttpProblem(422, "offset is a whole number of bytes", problems=[fault])
    return int(text)


# ---- documents of administration


class _Sent:
    """A small document, field by field; `end` tells every fault of it."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._left, self._faults = dict(found), list[Fault]()

    def text(self, name: str, *, required: bool = False) -> str:
        value = self._left.pop(name, None)
        if isinstance(value, str) or (value is None and not required):
            return value or ""
        self._wrong(name, value, "send text")
        return ""

    def truth(self, name: str) -> bool | None:
        value = self._left.pop(name, None)
        if not isinstance(value, bool | None):
            self._wrong(name, value, "send true or false")
            return None
        return value

    def names(self, name: str) -> frozenset[str] | None:
        value = self._left.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self._wrong(name, value, "send a list of user:ISSUER:SUBJECT and group:ISSUER:NAME")
            return None
        return frozenset(value)

    def _wrong(self, name: str, value: object, remedy: str) -> None:
        self._faults.append(
            Fault(name, "missing" if value is None else f"this is {values.kind(value)}", remedy)
        )

    def end(self) -> None:
        self._faults += [
            Fault(ascii(name[:64])[1:-1], "this is not known here", "leave it out") for name in self._left
        ]
        if self._faults:
            raise Faults(self._faults)


def _member(member: Membership) -> dict[str, Any]:
    return {
        "principal": member.principal,
        "role": str(member.role),
        "clearance": member.clearance,
        "granted_by": member.granted_by,
        "at": member.at,
    }


def _before(member: Membership | None) -> dict[str, str] | None:
    return None if member is None else {"role": str(member.role), "clearance": member.clearance}


def _source(source: Source) -> dict[str, Any]:
    """Not its directory: where documents lie on the host is nobody's business but the host's."""
    return {
        "source": source.name,
        "front_matter": source.trust.front_matter,
        "read": sorted(source.trust.default.readers),
        "deny": sorted(source.trust.default.denied),
        "groups": sorted(source.trust.default_groups),
        "clearance": source.trust.default_clearance,
        "ingested_at": source.ingested_at,
    }
