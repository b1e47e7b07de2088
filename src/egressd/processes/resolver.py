"""The resolver: answers names for sandboxes, keeps real addresses fresh.

What it decides is decided in `dns` (book), without I/O; this file carries messages between that, the
sandboxes (listeners.py), the upstream servers (upstream.py), the controller and the auditor.

Who asks is known by the source address alone, which the guard has compared, packet by packet, with the
link it came over; no link, no binding, no answer. A query for a listed name never causes anything
upstream: names are looked up because they are on a list, when their time has come. One for a name that only
a wildcard covers does, once, within its sandbox's and its workspace's budget; and it is answered when the
controller says that the kernel has it.

Sockets (`--fd`): udp4 udp6 tcp4 tcp6 made in the gateway; controller, supervisor, audit.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import random
import socket
from collections.abc import Awaitable, Coroutine, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar

import msgspec

from egressd.dns import keeper, replies, table, wildcards, wire
from egressd.dns.book import Book, Command
from egressd.dns.exchange import Server
from egressd.dns.hot import Cache, Denial, Lane
from egressd.dns.keeper import Standing, Target
from egressd.dns.replies import Extended, Failure, Rcode, Reply, Type
from egressd.dns.sift import sift
from egressd.dns.table import WorkspaceNames
from egressd.dns.tally import Happening, Tally
from egressd.dns.wildcards import Pending
from egressd.dns.wire import Query
from egressd.ipc import messages
from egressd.ipc.channel import Received
from egressd.ipc.peer import Peer, PeerGone
from egressd.model.addresses import Address
from egressd.model.errors import ProtocolError, Refused
from egressd.model.identities import Link
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
_PENDING = 256  # different denials of one source that are counted before they are recorded
# Reasons for which a list alone may deny. What it does is remembered, if the reply may be `shared`.
_BY_LIST = frozenset({Reason.NAME, Reason.RESIDENCY, Reason.LOCAL_ONLY})
T = TypeVar("T")
_NAMED_WITHIN = 15.0  # seconds for the first controller to say who is who
_FLUSH, _FOLD = 0.25, 4  # seconds between looks at the tally, and such looks between folds


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
        self.refused: dict[str, collections.Counter[str]] = {}  # questions: workspace -> reason -> count
        self.upstream = Upstream(
            tuple(map(Server.parse, config.upstream)),
            ca_file=config.upstream_ca,
            mixed_case=config.upstream_0x20,
        )
        # Spreading refreshes is no secret, so no source of secrets is spent on it.
        self.book = Book(
            pools=self.pools,
            own=self.own,
            static=self.static,
            upstream=bool(self.upstream.servers),
            jitter=random.random,
        )
        self.auditing, self.tally = auditing, Tally()
        self.sources: dict[Address, Sandbox] = {}
        self._unconfirmed: set[int] = set()  # links of which only a controller before this one has spoken
        self.controller: Peer | None = None
        self.named = asyncio.Event()  # a controller has said which sandboxes and names there are
        self._cache = Cache()
        self._settled: dict[Target | Pending, asyncio.Event] = {}
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
                Datagrams(sock, self.serve, self._cache)
            else:
                await Streams(sock, self.serve, connections=self._connections, refused=self._too_many).start()
        self._spawn(self._flush())

    def connect_controller(self, sock: socket.socket) -> None:
        """Use this channel. A controller that is new is told the slots. It binds the sandboxes there are, and
        then says which names; whoever it has not named until then has ended. Until then nothing changes."""
        if self.controller is not None:
            self.controller.close("replaced")
        self._unconfirmed = {sandbox.link for sandbox in self.sources.values()}
        self.controller = Peer(
            sock,
            messages.TO_RESOLVER,
            handler=self._from_controller,
            gone=self._controller_gone,
            replies=(messages.Done, messages.Failed, messages.Granted, messages.Admitted),
        )
        self._perform(self.book.new_controller())

    def _controller_gone(self, peer: Peer, why: str) -> None:
        log.warning("the controller is gone: %s", why)
        if self.controller is peer:
            self.controller = None

    # ---- the controller's messages

    def _from_controller(self, peer: Peer, received: Received[Any]) -> None:
        message = received.message
        if isinstance(message, messages.ReadRefused):  # a proof may be made of what was refused by now
            self._fold()
            self._record(self.tally.drain())
            counts = {name: dict(by_reason) for name, by_reason in self.refused.items()}
            peer.send(messages.RefusedNames(request=message.request, counts=counts))
            return
        try:
            match message:
                case messages.SetNames():
                    self.set_names(received.payload())
                case messages.BindSource():
                    self._bind(message)
                case messages.UnbindSource():
                    self._end(message.link)
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
        for link in sorted(self._unconfirmed):
            self._end(link)
        self._cache.forget()
        self._perform(self.book.set_names(listed, now=self._loop.time()))
        self.named.set()

    def _bind(self, message: messages.BindSource) -> None:
        sandbox = Sandbox(message.link, message.workspace)
        pair = (message.source4, message.source6)
        for source in pair:
            if self.sources.get(source, sandbox).link != message.link:
                raise ProtocolError(f"{source} belongs to link {self.sources[source].link}")
        self._unbind(message.link)
        self._unconfirmed.discard(message.link)
        self.sources.update(dict.fromkeys(pair, sandbox))
        self.book.began(message.link, message.workspace)

    def _end(self, link: int) -> None:
        self._unbind(link)
        self._unconfirmed.discard(link)
        self._perform(self.book.ended(link, now=self._loop.time()))

    def _unbind(self, link: int) -> None:
        """What it was denied is told now, so that it precedes what is said of its end in a receipt."""
        self._fold()
        self._record(self.tally.ended(link))
        self.sources = {source: s for source, s in self.sources.items() if s.link != link}
        self._cache.unbind()

    # ---- the book's commands

    def _perform(self, commands: Iterable[Command]) -> None:
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
                case wildcards.Ask():
                    self._spawn(self._look_up_covered(command))
                case wildcards.Grant():
                    self._spawn(self._grant(command))
                case wildcards.Release():
                    self._spawn(self._release(command))
                case wildcards.Settled():
                    self._wake(command.name)
        self._arm()

    def _arm(self) -> None:
        """One timer, for whatever name is due first."""
        due = self.book.next_due()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due is None else self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._perform(self.book.tick(now=self._loop.time()))

    async def _look_up(self, target: Target) -> None:
        findings = await self._ask_upstream(target.host, workspace="")
        self._perform(self.book.found(target, findings, now=self._loop.time()))

    async def _look_up_covered(self, ask: wildcards.Ask) -> None:
        findings = await self._ask_upstream(ask.host, workspace=ask.workspace)
        self._perform(self.book.looked(ask, findings, now=self._loop.time()))

    async def _ask_upstream(self, host: str, *, workspace: str) -> keeper.Findings:
        findings = await self.upstream.addresses(wire.labels_of(host), workspace=workspace)
        for text in dict.fromkeys(f.failure.text for f in findings if f.failure is not None):
            self.auditing.record("dns-upstream-failed", {"name": host, "reason": text})
        return findings

    async def _admit(self, admit: keeper.Admit) -> None:
        """Record, then admit; answering begins with `admitted`."""
        target = admit.target
        self._record_ways(target.host, (*admit.slots4, *admit.slots6))
        ask = messages.Resolved(
            request=0,
            host=target.host,
            private=target.private,
            slots4=admit.slots4,
            slots6=admit.slots6,
            terms=target.terms,
        )
        try:
            reply = _expected(await self._ask_controller(ask), messages.Admitted)
        except (Refused, PeerGone) as error:
            now = self._loop.time()
            self._perform(self.book.withheld(target, admit.serial, str(error), now=now))
        else:
            self._perform(self.book.admitted(target, admit.serial, refused=_refused(reply)))

    async def _grant(self, grant: wildcards.Grant) -> None:
        """The same for a name of a wildcard."""
        self._record_ways(grant.host, _ways(grant.standing))
        try:
            reply = await self._ask_for_grant(grant)
        except (Refused, PeerGone) as error:
            barred = isinstance(error, Refused) and error.reason is Reason.RESIDENCY
            report = self.book.barred if barred else self.book.refused
            self._perform(report(grant, str(error), now=self._loop.time()))
        else:
            now, refused = self._loop.time(), _refused(reply)
            self._perform(self.book.granted(grant, reply.block, now=now, refused=refused))

    async def _ask_for_grant(self, grant: wildcards.Grant) -> messages.Granted:
        ask = messages.GrantName(
            request=0,
            workspace=grant.workspace,
            link=grant.link,
            host=grant.host,
            wildcard=grant.wildcard,
            slots4=grant.standing.v4.slots,
            slots6=grant.standing.v6.slots,
        )
        return _expected(await self._ask_controller(ask), messages.Granted)

    async def _release(self, release: wildcards.Release) -> None:
        ask = messages.ReleaseNames(request=0, workspace=release.workspace, hosts=release.hosts)
        try:
            await self._ask_controller(ask)
        except (Refused, PeerGone) as error:
            log.warning("%d names of %s are not taken back: %s", len(release.hosts), release.workspace, error)
            self._perform(self.book.kept(release, now=self._loop.time()))
        else:
            self._perform(self.book.released(release, now=self._loop.time()))

    def _record_ways(self, host: str, leads: Iterable[Address | None]) -> None:
        found = dict.fromkeys(str(address) for address in leads if address is not None)
        self.auditing.record("dns-resolved", {"name": host, "addresses": " ".join(found)})

    async def _ask_controller(
        self, message: messages.Resolved | messages.GrantName | messages.ReleaseNames
    ) -> Any:
        """Its reply. Not too many at a time: ipc.peer ends a connection whose queue is too long."""
        async with self._admitting:
            controller = self.controller
            if controller is None:
                raise PeerGone("the controller is not running")
            numbered = msgspec.structs.replace(message, request=controller.next_request())
            return (await controller.ask(numbered)).message

    def _forget(self, target: Target) -> None:
        """Cached answers about it are void; who waits for it may ask again."""
        for user in self.book.keeper.standing(target).users:
            self._cache.void(user.workspace)
        self._wake(target)

    def _wake(self, settled: Target | Pending) -> None:
        event = self._settled.pop(settled, None)
        if event is not None:
            event.set()

    # ---- answering

    def serve(self, data: bytes, source: Address, udp: bool) -> bytes | Awaitable[bytes | None] | None:
        """The answer to one message, now or later; None is silence."""
        sandbox = self.sources.get(source, NOBODY)
        lane = self._lane(sandbox, source)
        if udp and lane is not None:
            known = lane.answer(data[2:])
            if known is not None:
                return data[:2] + known
        asked = wire.read_query(data)
        if asked is None:
            return None
        if isinstance(asked, wire.Malformed):
            return wire.malformed(asked)
        decision = self._decide(asked, sandbox, source)
        if isinstance(decision, table.Denied):
            return self._deny(asked, sandbox, lane, decision, data if udp else b"")
        if isinstance(decision, Reply):
            answer = wire.encode(asked, decision, udp=udp)
            if udp and lane is not None and decision.addresses and decision.shared:
                lane.keep(data[2:], answer[2:])
            return answer
        return self._later(asked, sandbox, decision, udp=udp)

    def _lane(self, sandbox: Sandbox, source: Address) -> Lane | None:
        if sandbox is NOBODY or sandbox.workspace not in self.book.tables:
            return None
        return self._cache.lane(source.packed, link=sandbox.link, workspace=sandbox.workspace)

    def _deny(
        self, asked: Query, sandbox: Sandbox, lane: Lane | None, denied: table.Denied, datagram: bytes
    ) -> bytes:
        """Count, and answer; what the list alone denies is remembered, and counted with the next `_fold`."""
        answer = wire.encode(asked, denied.reply, udp=bool(datagram))
        if lane is None or denied.reason not in _BY_LIST:
            self._count("dns-denied", sandbox, asked.name, asked, denied.reason)
            return answer
        denial = Denial(answer[2:], asked.name, wire.type_name(asked.qtype), denied.reason.value)
        # A reverse name may be some granted name's tomorrow.
        if datagram and denied.reply.shared and not asked.name.endswith(".arpa"):
            lane.keep_denial(datagram[2:], denial)
        lane.count(denial)
        if len(lane.pending) >= _PENDING:
            self._fold()
        return answer

    def _decide(
        self, asked: Query, sandbox: Sandbox, source: Address
    ) -> Reply | table.Wait | table.Forward | table.Denied:
        """A `Denied` is not counted yet."""
        if asked.edns is not None and asked.edns.version > 0:
            return replies.unknown_version()
        if sandbox is NOBODY:
            self._count("dns-unknown-source", NOBODY, str(source), asked, Reason.SOURCE)
            return replies.refused(f"{source} is not the address of a sandbox")
        if asked.qclass != 1 or asked.qtype in (Type.AXFR, Type.IXFR, Type.OPT):
            self._count("dns-denied", sandbox, asked.name, asked, Reason.TYPE)
            return replies.refused("only questions of class IN for records are answered")
        return self._consult(asked, sandbox)

    def _look_into_book(self, asked: Query, sandbox: Sandbox) -> Reply | table.Wait | table.Forward:
        decision = self._consult(asked, sandbox)
        if isinstance(decision, table.Denied):
            self._count("dns-denied", sandbox, asked.name, asked, decision.reason)
            return decision.reply
        return decision

    def _consult(self, asked: Query, sandbox: Sandbox) -> Reply | table.Wait | table.Forward | table.Denied:
        decision, commands = self.book.answer(sandbox.link, sandbox.workspace, asked, now=self._loop.time())
        if commands:
            self._perform(commands)
        if isinstance(decision, table.Forward) and decision.record:
            self._count("dns-would-deny", sandbox, asked.name, asked, decision.reason)
        assert not isinstance(decision, table.Covered)  # the book has seen to it
        return decision

    def _later(
        self, asked: Query, sandbox: Sandbox, decision: table.Wait | table.Forward, *, udp: bool
    ) -> bytes | Awaitable[bytes]:
        if self._waiting[sandbox.link] >= _WAITING:
            text = f"{_WAITING} queries of this sandbox are waiting already"
            return wire.encode(asked, replies.failure(Extended.NOT_READY, text), udp=udp)
        self._waiting[sandbox.link] += 1
        # Now, not when the task begins: in between it may settle, and would not be waited for any more.
        settled = self._event(decision.target) if isinstance(decision, table.Wait) else None
        task = asyncio.ensure_future(self._answer_later(asked, sandbox, settled, udp=udp))
        task.add_done_callback(lambda _: self._waited(sandbox.link))
        return task

    def _waited(self, link: int) -> None:
        self._waiting[link] -= 1
        if self._waiting[link] <= 0:
            del self._waiting[link]

    async def _answer_later(
        self, asked: Query, sandbox: Sandbox, settled: asyncio.Event | None, *, udp: bool
    ) -> bytes:
        try:
            async with asyncio.timeout(PATIENCE):
                reply = await self._settle(asked, sandbox, settled)
        except TimeoutError:
            reply = replies.failure(Extended.NOT_READY, f"{asked.name} has not been resolved yet")
        return wire.encode(asked, reply, udp=udp)

    async def _settle(self, asked: Query, sandbox: Sandbox, settled: asyncio.Event | None) -> Reply:
        """Wait and ask again until there is something to say; without anything to wait for, ask upstream."""
        while settled is not None:
            await settled.wait()
            decision = self._look_into_book(asked, sandbox)
            if isinstance(decision, Reply):
                return decision
            settled = self._event(decision.target) if isinstance(decision, table.Wait) else None
        return await self._forward(asked, sandbox)

    def _event(self, target: Target | Pending) -> asyncio.Event:
        return self._settled.setdefault(target, asyncio.Event())

    # ---- guard off or observing: names that are not listed

    async def _forward(self, asked: Query, sandbox: Sandbox) -> Reply:
        """The same question of many is asked once."""
        key = asked.name, asked.qtype
        task = self._forwarding.get(key)
        if task is None:
            task = self._forwarding[key] = self._spawn(self._ask_for(asked, sandbox.workspace))
            task.add_done_callback(lambda _: self._forwarding.pop(key, None))
        return await asyncio.shield(task)

    async def _ask_for(self, asked: Query, workspace: str) -> Reply:
        version = 4 if asked.qtype == Type.A else 6
        if asked.name in self.static:
            answer = wire.Answer(
                Rcode.NOERROR,
                tuple(a for a in self.static[asked.name] if a.version == version),
                replies.ANSWER_TTL,
            )
        else:
            result = await self.upstream.ask(asked.labels, asked.qtype, workspace=workspace)
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
            self.refused.setdefault(sandbox.workspace, collections.Counter())[reason.value] += 1
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
            fields: dict[str, str | int | None] = {
                "link": Link(happening.link).device if happening.link else None,
                "workspace": happening.workspace,
                "name": happening.name,
                "type": happening.type,
                "reason": happening.reason,
                "count": count,
            }
            self.auditing.record(happening.event, fields)

    async def _flush(self) -> None:
        for turn in itertools.count():
            await asyncio.sleep(_FLUSH)
            if turn % _FOLD == 0:
                self._fold()
            self._record(self.tally.due(now=self._loop.time()))

    def _fold(self) -> None:
        """Count and record what was denied, or not looked at, since the last time."""
        now = self._loop.time()
        for folded in self._cache.fold():
            denial = folded.denial
            if denial is None:
                event, what = "dns-dropped", ("", "", Reason.LIMIT.value)
            else:
                counts = self.refused.setdefault(folded.workspace, collections.Counter())
                counts[denial.reason] += folded.count
                event, what = "dns-denied", (denial.name, denial.type, denial.reason)
            happening = Happening(event, folded.link, folded.workspace, *what)
            self._record(self.tally.add(happening, now=now, count=folded.count))

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


def _expected(reply: Any, kind: type[T]) -> T:
    if not isinstance(reply, kind):
        raise PeerGone(f"the controller answered {type(reply).__name__}")
    return reply


def _refused(reply: messages.Admitted | messages.Granted) -> dict[Address, str]:
    """ValueError if they are no addresses."""
    return {ip_address(address): why for address, why in reply.refused.items()}


def _ways(standing: Standing) -> tuple[Address | None, ...]:
    return (*standing.v4.slots, *standing.v6.slots)


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
    sockets = {name: start.take(name) for name in ("udp4", "udp6", "tcp4", "tcp6")}
    supervisor.send(messages.Ready())
    listening = asyncio.create_task(_listen(resolver, sockets))
    while not ended.is_set():
        await _pause(ended)
        if not ended.is_set():
            supervisor.send(messages.Heartbeat())
    listening.cancel()
    await resolver.upstream.close()


async def _listen(resolver: Resolver, sockets: dict[str, socket.socket]) -> None:
    """What was asked while nobody was there waits in the sockets. Answered before it is known whose sandbox
    asks, it would be refused."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(resolver.named.wait(), _NAMED_WITHIN)
    await resolver.listen(sockets)


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
