"""The HTTP API: read-only, on this machine. It runs only where `api` is configured.

It knows nothing but the journal's files. Everything else it asks the controller at the control socket, over
a connection for each question, on which it first says for whom (`ForUser`): what that user may not see, it is
not told. Who asks is never taken from the request (`askers`); a request that a web page could have made --
with an Origin, to a Host that is no name of this machine -- is refused, since a browser would speak for
whoever sits before it.

Whoever reaches the socket is a stranger, and bounded as `http_server` says. Questions, proofs and searches of
the journal run in threads, few at a time, of each user one, and whoever has waited longest next.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import http
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, ip_address
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec

from egressd.journal import dsse, testimony
from egressd.journal.records import stamp
from egressd.model.errors import ProtocolError, Refused
from egressd.model.verdicts import Reason
from egressd.processes import askers, http_server
from egressd.processes.api_table import ENDPOINTS, JSON, NDJSON, PROBLEM, Endpoint, Malformed, openapi, read
from egressd.processes.askers import Asker, Unknown
from egressd.processes.http_server import Answer, Exchange, Request, Server, accepts
from egressd.processes.journal_pages import Page, TooLong, page
from egressd.processes.journal_search import Query, host_of
from egressd.processes.ritual import Start, begin
from egressd.processes.turns import Turns
from egressd.sandbox.control import Control

__all__ = ["Api", "Bounds", "Questions", "main"]

log = logging.getLogger("api")
T = TypeVar("T")
Status = http.HTTPStatus

_ROUTING = frozenset({"route-selected", "route-refused"})
_LIMIT = 100  # records, where none is said
_NOBODY = -1  # whose turn it is when nobody need be known
# A reader of this is no page, and a page may not show it either.
_SECURITY = (
    ("Content-Security-Policy", "default-src 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


@dataclass(frozen=True, slots=True)
class Bounds(http_server.Bounds):
    """Seconds; `most` are questions of one user, waiting ones included, of each kind."""

    body_within: float = 60.0
    max_connections: int = 256
    ask_within: float = 30.0
    prove_within: float = 120.0
    search_within: float = 5.0
    at_once: int = 4
    dear_at_once: int = 2  # proofs; searches
    most: int = 8


class Problem(Exception):
    """An answer that is no document (RFC 9457). `detail` says what is wrong and what to do."""

    def __init__(self, status: Status, detail: str, **more: Any) -> None:
        self.status, self.detail, self.more = status, detail, more
        super().__init__(detail)

    def answer(self) -> Answer:
        document = {"type": "about:blank", "title": self.status.phrase, "status": self.status.value}
        body = msgspec.json.encode(document | {"detail": self.detail} | self.more) + b"\n"
        headers = [*_SECURITY]
        if self.status in (Status.SERVICE_UNAVAILABLE, Status.TOO_MANY_REQUESTS):
            headers.append(("Retry-After", "1"))
        if self.status == Status.METHOD_NOT_ALLOWED:
            headers.append(("Allow", "GET, HEAD"))
        return Answer(self.status, body, PROBLEM, tuple(headers))


# ---- asking


class Questions:
    """At the control socket, in threads. Each over a connection of its own: a controller that was started
    again is met like any."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._asking: set[Control] | None = set()

    def ask(self, asker: Asker | None, question: Callable[[Control], T], *, within: float) -> T:
        """`asker` None: as who we are, who may see nothing."""
        with self._connected() as control:
            control.channel.socket.settimeout(within)
            if asker is not None:
                control.for_user(asker.uid, asker.gids or ())
            return question(control)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Control]:
        with Control(self._run_dir) as control:
            with self._lock:
                if self._asking is None:
                    raise Refused(Reason.UNAVAILABLE, "egressd is stopping")
                self._asking.add(control)
            try:
                yield control
            finally:
                with self._lock:
                    if self._asking is not None:
                        self._asking.discard(control)

    def close(self) -> None:
        """End those that wait for an answer, so that nobody waits for them."""
        with self._lock:
            asking, self._asking = self._asking or set(), None
            for control in asking:
                with contextlib.suppress(OSError):
                    control.channel.socket.shutdown(2)


_STATUSES = {
    # One answer for "there is none" and "not yours".
    Reason.MEMBER: Status.NOT_FOUND,
    Reason.WORKSPACE: Status.NOT_FOUND,
    Reason.UNLISTED: Status.NOT_FOUND,
    Reason.PROTOCOL: Status.BAD_REQUEST,
    Reason.LIMIT: Status.TOO_MANY_REQUESTS,
    Reason.UNAVAILABLE: Status.SERVICE_UNAVAILABLE,
}


def _refusal(refused: Refused) -> Problem:
    status = _STATUSES.get(refused.reason)
    if status is None:
        log.error("the controller: %s", refused)
        return Problem(Status.INTERNAL_SERVER_ERROR, _BY_BOUNDS[Status.INTERNAL_SERVER_ERROR])
    return Problem(status, str(refused), reason=refused.reason.value)


# ---- what a request must be like


def _check(request: Request, endpoint: Endpoint | None, *, unix: bool) -> Endpoint:
    _check_origin(request, unix=unix)
    if endpoint is None:
        raise Problem(Status.NOT_FOUND, f"there is no such path; there are {', '.join(ENDPOINTS)}")
    if request.method not in ("GET", "HEAD"):
        raise Problem(
            Status.METHOD_NOT_ALLOWED, "nothing is changed over HTTP: only GET and HEAD are answered"
        )
    if request.values("transfer-encoding") or request.header("content-length") not in ("", "0"):
        raise Problem(Status.REQUEST_ENTITY_TOO_LARGE, "no body is read here: put parameters into the query")
    return endpoint


def _check_origin(request: Request, *, unix: bool) -> None:
    """Nothing that a web page has a browser do: its requests to other places carry an Origin or say so in
    Sec-Fetch-Site, and one whose name was made to lead here (DNS rebinding) has that name as Host."""
    if request.values("origin") or request.header("sec-fetch-site") not in ("", "none"):
        raise Problem(Status.FORBIDDEN, "a web page asks here: use curl, or a program of yours")
    hosts = request.values("host")
    if len(hosts) > 1:
        raise Problem(Status.BAD_REQUEST, "there is more than one Host")
    host = "".join(hosts)
    if not _is_here(host) and not (unix and not host):
        text = "the Host is no name of this machine: use http://localhost, http://127.0.0.1 or http://[::1]"
        raise Problem(Status.FORBIDDEN, text)


def _is_here(host: str) -> bool:
    """On whatever port: it may have been carried here by ssh."""
    found = re.fullmatch(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[a-z0-9.]+))(?::[0-9]{0,5})?", host.lower())
    if found is None or found["name"] == "localhost":
        return found is not None
    try:
        address = ip_address(found["six"] or found["name"])
    except ValueError:
        return False
    return address == IPv6Address("::1") or address in IPv4Network("127.0.0.0/8")


# ---- answers


class Api(Server):
    """`questions` asks the controller; `journal` is the journal's directory."""

    def __init__(self, questions: Questions, journal: str, *, bounds: Bounds | None = None) -> None:
        self._limits = bounds or Bounds()
        super().__init__(self._limits)
        self._questions, self._journal = questions, journal
        limits = self._limits
        self._asking = Turns("questions", at_once=limits.at_once, most=limits.most)
        self._proving = Turns("proofs", at_once=limits.dear_at_once, most=limits.most)
        self._searching = Turns("searches", at_once=limits.dear_at_once, most=limits.most)
        # As many as have their turn, and those who look up groups: nothing waits here unseen.
        self._threads = concurrent.futures.ThreadPoolExecutor(limits.at_once + 2 * limits.dear_at_once, "ask")
        self._names = concurrent.futures.ThreadPoolExecutor(limits.dear_at_once, "names")
        self._ending = threading.Event()

    def close(self) -> None:
        """Threads that wait or search come back soon."""
        self._ending.set()
        self._questions.close()
        for executor in (self._threads, self._names):
            executor.shutdown(wait=False, cancel_futures=True)

    def problem(self, status: Status, *headers: tuple[str, str]) -> Answer:
        return Problem(status, _BY_BOUNDS.get(status, "the request is not HTTP/1.1")).answer()

    async def answer(self, request: Request | Status, exchange: Exchange) -> Answer:
        if isinstance(request, Status):
            return self.problem(request)
        try:
            unix = exchange.sock.family == socket.AF_UNIX
            endpoint = _check(request, ENDPOINTS.get(request.path), unix=unix)
            values = read(endpoint, request.query)
            asker = await self._asker(exchange) if endpoint.known else None
            method: Callable[..., Awaitable[Answer]] = getattr(self, f"_{endpoint.name}")
            return await method(_Asked(request, asker, values, exchange.held))
        except Malformed as error:
            return Problem(Status.BAD_REQUEST, str(error), parameters=error.wrong).answer()
        except Unknown as error:
            return Problem(Status.FORBIDDEN, str(error)).answer()
        except Refused as refused:
            return _refusal(refused).answer()
        except ProtocolError:
            return Problem(Status.SERVICE_UNAVAILABLE, "the controller said something unexpected").answer()
        except Problem as problem:
            return problem.answer()

    async def _asker(self, exchange: Exchange) -> Asker:
        asker = askers.at(exchange.sock)
        if asker.gids is not None:
            return asker
        with self._asking.asked(asker.uid):
            return await self._in_thread(self._names, lambda: askers.complete(asker))

    async def _in_thread(self, threads: concurrent.futures.Executor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    async def _ask(self, asked: _Asked, question: Callable[[Control], T]) -> T:
        return await self._in_turn(asked, self._asking, question, within=self._limits.ask_within)

    async def _in_turn(
        self, asked: _Asked, turns: Turns, question: Callable[[Control], T], *, within: float
    ) -> T:
        asked.held.enter_context(turns.asked(asked.uid))
        async with turns.turn(asked.uid):
            work = functools.partial(self._questions.ask, asked.asker, question, within=within)
            return await self._in_thread(self._threads, work)

    # ---- one for each endpoint

    async def _policy(self, asked: _Asked) -> Answer:
        workspace = asked.values["workspace"]
        return _document(await self._ask(asked, lambda c: c.ask("policy", workspace=workspace)))

    async def _counters(self, asked: _Asked) -> Answer:
        workspace = asked.values.get("workspace")
        return _document(await self._ask(asked, lambda c: c.ask("counters", workspace=workspace)))

    async def _status(self, asked: _Asked) -> Answer:
        return _document(await self._ask(asked, lambda c: c.ask("status")))

    async def _route(self, asked: _Asked) -> Answer:
        workspace, route = asked.values["workspace"], asked.values["route"]
        return _document(await self._ask(asked, lambda c: c.select_route(workspace, route)))

    async def _proof(self, asked: _Asked) -> Answer:
        values = asked.values
        since, until = (None if name not in values else stamp(values[name]) for name in ("since", "until"))

        def prove(control: Control) -> bytes:
            workspace, link = values["workspace"], values.get("sandbox")
            return dsse.encode(control.prove(workspace, link=link, since=since, until=until))

        within = self._limits.prove_within
        try:
            return _json(await self._in_turn(asked, self._proving, prove, within=within))
        except ValueError:
            raise Problem(Status.SERVICE_UNAVAILABLE, "what the auditor made is no envelope") from None

    async def _healthz(self, asked: _Asked) -> Answer:
        await self._ask(asked, lambda c: c.ask("workspaces"))
        return _document({"status": "ok"})

    async def _openapi(self, asked: _Asked) -> Answer:
        return _description()

    # ---- the journal

    async def _audit(self, asked: _Asked) -> Answer:
        may: dict[str, Any] = await self._ask(asked, lambda c: c.ask("workspaces"))
        query, limit = _query(asked.values, may), asked.values.get("limit", _LIMIT)
        asked.held.enter_context(self._searching.asked(asked.uid))
        async with self._searching.turn(asked.uid):
            found = await self._in_thread(self._threads, lambda: self._found(query, limit))
        headers = (("Vary", "Accept"), *_next(asked.request, found))
        if accepts(asked.request.header("accept"), NDJSON):
            return _json(b"".join(b"%s\n" % line for line in found.lines), NDJSON, *headers)
        return _json(b"[%s]\n" % b",\n".join(found.lines), JSON, *headers)

    def _found(self, query: Query, limit: int) -> Page:
        end = time.monotonic() + self._limits.search_within

        def over() -> bool:
            return self._ending.is_set() or time.monotonic() > end

        try:
            return page(self._journal, query, limit=limit, over=over)
        except TooLong:
            text = "the journal is too long to be searched from its end in time: say since= or after="
            raise Problem(Status.SERVICE_UNAVAILABLE, text) from None
        except OSError as error:
            log.warning("the journal cannot be read: %s", error)
            text = f"the journal cannot be read: {error.strerror or error}"
            raise Problem(Status.SERVICE_UNAVAILABLE, text) from error


@dataclass(frozen=True, slots=True)
class _Asked:
    request: Request
    asker: Asker | None
    values: dict[str, Any]
    held: contextlib.ExitStack

    @property
    def uid(self) -> int:
        return _NOBODY if self.asker is None else self.asker.uid


_BY_BOUNDS = {
    Status.REQUEST_TIMEOUT: "the request was not complete in time: send it at once",
    Status.REQUEST_HEADER_FIELDS_TOO_LARGE: "the request's head is too long: send fewer headers",
    Status.INTERNAL_SERVER_ERROR: "this is a defect of egressd; its log says more",
}


def _query(values: dict[str, Any], may: dict[str, Any]) -> Query:
    """Of what was asked, what the asker may see. Process records and losses have no workspace: only who may
    see all sees them; and what brokers say of requests, though that is of a workspace."""
    workspace, everything = values.get("workspace"), may["all"] is True
    if workspace is not None and not everything and workspace not in may["workspaces"]:
        raise Problem(Status.NOT_FOUND, f"there is no workspace {workspace} that you are a member of")
    events, route = values.get("event"), values.get("route")
    if route is not None:
        events = _ROUTING if events is None else events & _ROUTING
    host = values.get("host")
    return Query(
        workspace=workspace,
        workspaces=None if everything else frozenset(may["workspaces"]),
        unshown=frozenset() if everything else testimony.PRIVATE,
        host=None if host is None else host_of(host),
        events=events,
        reasons=values.get("reason"),
        route=route,
        since=values.get("since"),
        until=values.get("until"),
        after=values.get("after"),
    )


def _next(request: Request, found: Page) -> Iterator[tuple[str, str]]:
    """Where it goes on (RFC 8288)."""
    if found.after is not None:
        words = [
            word for word in request.query.split("&") if unquote(word.partition("=")[0]) not in ("", "after")
        ]
        query = "&".join([*words, f"after={found.after}"]).translate(_NO_BRACKETS)
        yield "Link", f'<{request.path}?{query}>; rel="next"'


_NO_BRACKETS = str.maketrans({"<": "%3C", ">": "%3E", '"': "%22"})


@functools.cache
def _description() -> Answer:
    return _document(openapi())


def _document(document: Any) -> Answer:
    return _json(msgspec.json.encode(document) + b"\n")


def _json(body: bytes, kind: str = JSON, *headers: tuple[str, str]) -> Answer:
    return Answer(Status.OK, body, kind, (*headers, *_SECURITY))


# ---- the process


async def run(start: Start) -> None:
    api = Api(Questions(start.config.run_dir), f"{start.config.state_dir}/journal")
    with contextlib.closing(api):
        await http_server.serve(start, api, role="api")


def main() -> int:
    asyncio.run(run(begin("api")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
