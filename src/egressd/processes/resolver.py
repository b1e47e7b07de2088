"""The resolver: answers names for sandboxes, keeps real addresses fresh.

What it decides is decided in `dns` (keeper, table), without I/O; this file carries messages between that,
the sandboxes (listeners.py), the upstream servers (upstream.py), the controller and the auditor.

Who asks is known by the source address alone, which the guard has compared, packet by packet, with the
link it came over; no link, no binding, no answer. A query for a listed name never causes anything
upstream: names are looked up because they are on a list, when their time has come.

Sockets (`--fd`): udp4 udp6 tcp4 tcp6 made in the gateway; controller, supervisor, audit.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import random
import socket
from collections.abc import Awaitable, Coroutine, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import msgspec

from egressd.dns import keeper, replies, table, wire
from egressd.dns.exchange import Server
from egressd.dns.keeper import Keeper, Target
from egressd.dns.replies import Extended, Failure, Rcode, Reply, Type
from egressd.dns.sift import sift
from egressd.dns.table import Table, WorkspaceNames
from egressd.dns.tally import Happening, Tally
from egressd.dns.wire import Query
from egressd.ipc import messages
from egressd.ipc.channel import Received
from egressd.ipc.peer import Peer, PeerGone
from egressd.model.addresses import Address
from egressd.model.errors import ProtocolError, Refused
from egressd.model.verdicts import Reason
from egressd.processes.config import Config
from egressd.processes.listeners import Datagrams, Streams
from egressd.processes.ritual import Auditing, Start, begin
from egressd.processes.upstream import Upstream

__all__ = ["Resolver", "main"]

log = logging.getLogger("egressd")

PATIENCE = 4.0  # seconds a query waits for its name to be resolved; glibc and musl give up after five
_WAITING = 128  # queries of one sandbox that wait for something
_ADMITTING = 256  # requests to the controller at a time; ipc.peer ends a connection that queues 4096
_CACHE, _CACHED_QUERY = 4096, 320  # answers per workspace, and bytes of the longest query kept for it
_FLUSH = 0.25  # seconds between looks at the tally


@dataclass(frozen=True, slots=True)
class Sandbox:
    link: int
    workspace: str


NOBODY = Sandbox(0, "")


class Resolver:
    """The state of the process. `connect_controller` and `listen` give it something to do."""

    def __init__(self, config: Config, auditing: Auditing) -> None:
        self.pools = config.pools.pools()
        self.own = self.pools.own
        self.static = static_hosts(config)
        self.refused: collections.Counter[str] = collections.Counter()  # questions, by workspace
        self.upstream = Upstream(tuple(map(Server.parse, config.upstream)), ca_file=config.upstream_ca)
        # Spreading refreshes is no secret, so no source of secrets is spent on it.
        self.keeper = Keeper(
            own=self.own,
            static=self.static,
            upstream=bool(self.upstream.servers),
            jitter=random.random,
        )
        self.auditing, self.tally = auditing, Tally()
        self.tables: dict[str, Table] = {}
        self.sources: dict[Address, Sandbox] = {}
        self.controller: Peer | None = None
        self._answers: dict[
            str, dict[bytes, bytes]
        ] = {}  # workspace -> query after its id -> answer after it
        self._settled: dict[Target, asyncio.Event] = {}
        self._waiting: collections.Counter[int] = collections.Counter()  # by link
        self._forwarding: dict[tuple[str, int], asyncio.Task[Reply]] = {}
        self._admitting = asyncio.Semaphore(_ADMITTING)
        self._connections: collections.Counter[Address] = collections.Counter()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # ---- beginning

    async def listen(self, sockets: dict[str, socket.socket]) -> None:
        """`udp*` and `tcp*` of the gateway."""
        for name, sock in sockets.items():
            if name.startswith("udp"):
                Datagrams(sock, self.serve)
            else:
                await Streams(sock, self.serve, connections=self._connections, refused=self._too_many).start()
        self._spawn(self._flush())

    def connect_controller(self, sock: socket.socket) -> None:
        """Use this channel. A controller that is new knows no slots and has no sandboxes yet: it is told
        the slots; the sandboxes it will bind, and until then their queries are refused."""
        if self.controller is not None:
            self.controller.close("replaced")
        self.sources.clear()
        self.controller = Peer(
            sock,
            messages.TO_RESOLVER,
            handler=self._from_controller,
            gone=self._controller_gone,
            replies=(messages.Done, messages.Failed),
        )
        self._perform(self.keeper.readmit())

    def _controller_gone(self, peer: Peer, why: str) -> None:
        log.warning("the controller is gone: %s", why)
        if self.controller is peer:
            self.controller = None

    # ---- the controller's messages

    def _from_controller(self, peer: Peer, received: Received[Any]) -> None:
        message = received.message
        if isinstance(message, messages.ReadRefused):
            peer.send(messages.RefusedNames(request=message.request, counts=dict(self.refused)))
            return
        try:
            match message:
                case messages.SetNames():
                    self.set_names(received.payload())
                case messages.BindSource():
                    self._bind(message)
                case messages.UnbindSource():
                    self._unbind(message.link)
        except (msgspec.DecodeError, ProtocolError, ValueError) as error:
            log.error("refused %s: %s", type(message).__name__, error)  # noqa: TRY400
            peer.send(
                messages.Failed(request=message.request, reason=Reason.PROTOCOL, text=str(error)[:4096])
            )
        else:
            peer.send(messages.Done(request=message.request))

    def set_names(self, payload: bytes) -> None:
        """The names of every workspace from now on; as a whole, or an error and the old ones."""
        listed = msgspec.json.decode(payload, type=list[WorkspaceNames])
        self.tables = {names.workspace: Table.of(names, self.pools) for names in listed}
        self._answers = {workspace: {} for workspace in self.tables}
        self._perform(self.keeper.set_users(table.users_of(self.tables), now=self._loop.time()))

    def _bind(self, message: messages.BindSource) -> None:
        sandbox = Sandbox(message.link, message.workspace)
        pair = (message.source4, message.source6)
        for source in pair:
            if self.sources.get(source, sandbox).link != message.link:
                raise ProtocolError(f"{source} belongs to link {self.sources[source].link}")
        self._unbind(message.link)
        self.sources.update(dict.fromkeys(pair, sandbox))

    def _unbind(self, link: int) -> None:
        self.sources = {source: s for source, s in self.sources.items() if s.link != link}

    # ---- the keeper's commands

    def _perform(self, commands: Iterable[keeper.Command]) -> None:
        for command in commands:
            match command:
                case keeper.Ask():
                    self._spawn(self._look_up(command.target))
                case keeper.Admit():
                    self._spawn(self._admit(command))
                case keeper.Settled():
                    self._forget(command.target)
                case keeper.Note():
                    self.auditing.record(command.event, command.fields)
        self._arm()

    def _arm(self) -> None:
        """One timer, for whatever name is due first."""
        due = self.keeper.next_due()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due is None else self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._perform(self.keeper.tick(now=self._loop.time()))

    async def _look_up(self, target: Target) -> None:
        findings = await self.upstream.addresses(wire.labels_of(target.host))
        for text in dict.fromkeys(f.failure.text for f in findings if f.failure is not None):
            self.auditing.record("dns-upstream-failed", {"name": target.host, "reason": text})
        self._perform(self.keeper.found(target, findings, now=self._loop.time()))

    async def _admit(self, admit: keeper.Admit) -> None:
        """Record, then admit; answering begins with `admitted`."""
        target = admit.target
        leads = dict.fromkeys(str(a) for a in (*admit.slots4, *admit.slots6) if a is not None)
        self.auditing.record("dns-resolved", {"name": target.host, "addresses": " ".join(leads)})
        try:
            async with self._admitting:
                await self._ask_controller(admit)
        except (Refused, PeerGone) as error:
            commands = self.keeper.withheld(target, admit.serial, str(error), now=self._loop.time())
        else:
            commands = self.keeper.admitted(target, admit.serial)
        self._perform(commands)

    async def _ask_controller(self, admit: keeper.Admit) -> None:
        controller = self.controller
        if controller is None:
            raise PeerGone("the controller is not running")
        target = admit.target
        await controller.ask(
            messages.Resolved(
                request=controller.next_request(),
                host=target.host,
                private=target.private,
                slots4=admit.slots4,
                slots6=admit.slots6,
            )
        )

    def _forget(self, target: Target) -> None:
        """Cached answers about it are void; who waits for it may ask again."""
        for user in self.keeper.standing(target).users:
            self._answers.get(user.workspace, {}).clear()
        event = self._settled.pop(target, None)
        if event is not None:
            event.set()

    # ---- answering

    def serve(self, data: bytes, source: Address, udp: bool) -> bytes | Awaitable[bytes | None] | None:
        """The answer to one message, now or later; None is silence."""
        sandbox = self.sources.get(source, NOBODY)
        known = self._answers.get(sandbox.workspace)
        if udp and known is not None:
            answer = known.get(data[2:])
            if answer is not None:
                return data[:2] + answer
        asked = wire.read_query(data)
        if asked is None:
            return None
        if isinstance(asked, wire.Malformed):
            return wire.malformed(asked)
        decision = self._decide(asked, sandbox, source)
        if isinstance(decision, Reply):
            answer = wire.encode(asked, decision, udp=udp)
            if udp and known is not None and decision.addresses and len(data) <= _CACHED_QUERY:
                _keep(known, data[2:], answer[2:])
            return answer
        return self._later(asked, sandbox, decision, udp=udp)

    def _decide(self, asked: Query, sandbox: Sandbox, source: Address) -> Reply | table.Wait | table.Forward:
        names = self.tables.get(sandbox.workspace)
        if asked.edns is not None and asked.edns.version > 0:
            return replies.unknown_version()
        if sandbox is NOBODY:
            self._count("dns-unknown-source", NOBODY, str(source), asked, Reason.SOURCE)
            return replies.refused(f"{source} is not the address of a sandbox")
        if names is None:
            return replies.failure(Extended.NOT_READY, f"workspace {sandbox.workspace} has no list of names")
        if asked.qclass != 1 or asked.qtype in (Type.AXFR, Type.IXFR, Type.OPT):
            self._count("dns-denied", sandbox, asked.name, asked, Reason.TYPE)
            return replies.refused("only questions of class IN for records are answered")
        decision = table.answer(names, asked, self.keeper.standing)
        if isinstance(decision, table.Denied):
            self._count("dns-denied", sandbox, asked.name, asked, decision.reason)
            return decision.reply
        if isinstance(decision, table.Forward) and decision.record:
            self._count("dns-would-deny", sandbox, asked.name, asked, Reason.NAME)
        return decision

    def _later(
        self, asked: Query, sandbox: Sandbox, decision: table.Wait | table.Forward, *, udp: bool
    ) -> bytes | Awaitable[bytes]:
        if self._waiting[sandbox.link] >= _WAITING:
            text = f"{_WAITING} queries of this sandbox are waiting already"
            return wire.encode(asked, replies.failure(Extended.NOT_READY, text), udp=udp)
        self._waiting[sandbox.link] += 1
        task = asyncio.ensure_future(self._answer_later(asked, sandbox, decision, udp=udp))
        task.add_done_callback(lambda _: self._waited(sandbox.link))
        return task

    def _waited(self, link: int) -> None:
        self._waiting[link] -= 1
        if self._waiting[link] <= 0:
            del self._waiting[link]

    async def _answer_later(
        self, asked: Query, sandbox: Sandbox, decision: table.Wait | table.Forward, *, udp: bool
    ) -> bytes:
        try:
            async with asyncio.timeout(PATIENCE):
                reply = await self._settle(asked, sandbox, decision)
        except TimeoutError:
            reply = replies.failure(Extended.NOT_READY, f"{asked.name} has not been resolved yet")
        return wire.encode(asked, reply, udp=udp)

    async def _settle(
        self, asked: Query, sandbox: Sandbox, decision: table.Wait | table.Forward | Reply | table.Denied
    ) -> Reply:
        """Wait and ask again until there is something to say."""
        while isinstance(decision, table.Wait):
            await self._settled.setdefault(decision.target, asyncio.Event()).wait()
            names = self.tables.get(sandbox.workspace)
            if names is None:
                return replies.failure(Extended.NOT_READY, "the workspace is gone")
            decision = table.answer(names, asked, self.keeper.standing)
        if isinstance(decision, table.Denied):
            self._count("dns-denied", sandbox, asked.name, asked, decision.reason)
            return decision.reply
        if isinstance(decision, table.Forward):
            return await self._forward(asked)
        return decision

    # ---- guard off or observing: names that are not listed

    async def _forward(self, asked: Query) -> Reply:
        """The same question of many is asked once."""
        key = asked.name, asked.qtype
        task = self._forwarding.get(key)
        if task is None:
            task = self._forwarding[key] = self._spawn(self._ask_for(asked))
            task.add_done_callback(lambda _: self._forwarding.pop(key, None))
        return await asyncio.shield(task)

    async def _ask_for(self, asked: Query) -> Reply:
        version = 4 if asked.qtype == Type.A else 6
        if asked.name in self.static:
            answer = wire.Answer(
                Rcode.NOERROR,
                tuple(a for a in self.static[asked.name] if a.version == version),
                replies.ANSWER_TTL,
            )
        else:
            result = await self.upstream.ask(asked.labels, asked.qtype)
            if isinstance(result, Failure):
                return replies.failure(result.code, result.text)
            answer = result
        return self._unrestricted(asked, answer)

    def _unrestricted(self, asked: Query, answer: wire.Answer) -> Reply:
        """Real addresses, except those that no guard setting opens: egressd's own, loopback, link-local."""
        good, refused = sift(answer.addresses, private=True, own=self.own)
        for address, kind in refused:
            fields = {"name": asked.name, "address": str(address), "kind": kind.value}
            self.auditing.record("dns-refused-address", fields)
        if answer.rcode == Rcode.NXDOMAIN:
            return replies.no_name(ttl=min(answer.ttl, replies.ANSWER_TTL))
        if refused and not good:
            seen = ", ".join(f"{a} ({kind.value})" for a, kind in refused[:2])
            return replies.failure(Extended.BLOCKED, f"every address of {asked.name} is refused: {seen}")
        if not good:
            return replies.no_data(ttl=min(answer.ttl, replies.ANSWER_TTL))
        return replies.addresses(good, ttl=answer.ttl)

    # ---- events

    def _count(self, event: str, sandbox: Sandbox, name: str, asked: Query, reason: Reason) -> None:
        if event == "dns-denied":
            self.refused[sandbox.workspace] += 1
        happening = Happening(
            event, sandbox.link, sandbox.workspace, name, wire.type_name(asked.qtype), reason.value
        )
        self._record(self.tally.add(happening, now=self._loop.time()))

    def _too_many(self, source: Address) -> None:
        sandbox = self.sources.get(source, NOBODY)
        happening = Happening(
            "dns-connections", sandbox.link, sandbox.workspace, str(source), "", Reason.CONNECTIONS.value
        )
        self._record(self.tally.add(happening, now=self._loop.time()))

    def _record(self, over: Iterable[tuple[Happening, int]]) -> None:
        for happening, count in over:
            fields: dict[str, str | int] = {
                "link": happening.link,
                "workspace": happening.workspace,
                "name": happening.name,
                "type": happening.type,
                "reason": happening.reason,
                "count": count,
            }
            self.auditing.record(happening.event, fields)

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH)
            self._record(self.tally.due(now=self._loop.time()))

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A mistake of ours in one task: what it was to grant stays ungranted, the rest goes on.
            log.error("a task failed", exc_info=task.exception())


def _keep(known: dict[bytes, bytes], query: bytes, answer: bytes) -> None:
    """Spelling a name in a new way costs its own workspace the cache, nobody else."""
    if len(known) >= _CACHE:
        known.clear()
    known[query] = answer


def static_hosts(config: Config) -> dict[str, tuple[Address, ...]]:
    return {
        name.lower().rstrip("."): tuple(ip_address(address) for address in found)
        for name, found in config.hosts.items()
    }


# ---- the process


async def run(start: Start) -> None:
    """Serve until the supervisor is gone."""
    ended = asyncio.Event()
    auditing = Auditing.over("resolver", start.take("audit"))
    resolver = Resolver(start.config, auditing)

    def from_supervisor(_: Peer, received: Received[Any]) -> None:
        message = received.message
        if not isinstance(message, messages.NewPeer):
            return
        sock = socket.socket(fileno=received.take())
        if message.name == "controller":
            resolver.connect_controller(sock)
        elif message.name == "audit":
            auditing.connect(sock)
        else:
            sock.close()

    supervisor = Peer(
        start.take("supervisor"), messages.TO_CHILD, handler=from_supervisor, gone=lambda *_: ended.set()
    )
    resolver.connect_controller(start.take("controller"))
    await resolver.listen({name: start.take(name) for name in ("udp4", "udp6", "tcp4", "tcp6")})
    supervisor.send(messages.Ready())
    while not ended.is_set():
        await _pause(ended)
        if not ended.is_set():
            supervisor.send(messages.Heartbeat())
    await resolver.upstream.close()


async def _pause(ended: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(ended.wait(), messages.HEARTBEAT)
    except TimeoutError:
        return


def main() -> None:
    start = begin("resolver")
    try:
        asyncio.run(run(start))
    except (OSError, ValueError) as error:  # an upstream or a file of the configuration that cannot be used
        log.error("cannot serve: %s", error)  # noqa: TRY400
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
