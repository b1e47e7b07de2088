"""What the relay and the inspector share: connections that the gateway steers to them.

A steered connection (TPROXY) keeps its original destination as the accepted socket's own address: a
synthetic address, so it says which rule of which workspace was meant. Who asks is the source address,
which the guard compared with the link's before the packet got here.

    House    the table of one process: who is who, who is here, how many may be, what was denied
    Visit    one connection, from its acceptance to its end
    Program  the process around it: channels to supervisor, controller and auditor, and one loop

While the controller is gone nothing changes. A new one says again who is who, then what there is; sandboxes
that it did not name until then have ended, and go. Flows of the others never notice.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import resource
import select
import signal
import socket
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, ClassVar

from egressd.ipc import messages
from egressd.ipc.channel import Channel, Received
from egressd.journal.floods import Flood, Floods
from egressd.journal.records import Scalar
from egressd.model.errors import ProtocolError
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.processes import ritual
from egressd.processes.closings import Closing, Closings, Many
from egressd.processes.dialing import Race, Target
from egressd.processes.flows import DESCRIPTORS, Flow, Gate, Poller, make_abrupt, reset
from egressd.ruleset.layout import Pools

__all__ = ["Address", "Denied", "House", "Limits", "Program", "Visit"]

log = logging.getLogger(__name__)

Address = IPv4Address | IPv6Address

_TICK, _TICK_DIALING = 0.25, 0.05  # seconds between looks at what time brings
_TOTALS = 60.0  # seconds between records of the totals of what is in use
_ACCEPTS, _READS = 64, 64  # per wake-up, so that nobody holds the loop
_OWN_DESCRIPTORS = 64  # listeners, channels, epoll, stderr, and room to spare
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PLACES = 1 << 14  # destinations remembered


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections at once. Beyond `per_sandbox` and `total`, a workspace may have no more than are
    still free: one alone gets half of the total, two get a third each, and a newcomer always finds room."""

    per_sandbox: int = 512
    total: int = 4096

    def of(self, descriptors: int) -> Limits:
        """As many as this number of descriptors carries."""
        carried = (descriptors - _OWN_DESCRIPTORS) // DESCRIPTORS
        return Limits(per_sandbox=self.per_sandbox, total=max(1, min(self.total, carried)))

    def within_process(self) -> Limits:
        """As many as this process's own descriptors carry."""
        return self.of(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@dataclass(slots=True)
class Totals:
    """Of one thing that a workspace uses, since the process started. Bytes of flows that have ended."""

    flows: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    told: bool = True


@dataclass(frozen=True, slots=True)
class Denied:
    """What makes two denied connections equal."""

    event: str
    link: Link | None
    workspace: str | None
    source: str
    destination: str
    port: int
    reason: str


class Visit:
    """One connection. It ends once, by `end` or by itself, and then the house hears of it.

    `label` is what it leads to, for records: a service, a host.
    """

    __slots__ = (
        "client", "destination", "first", "flow", "gate", "house", "label", "link", "port", "race", "source",
        "started", "workspace",
    )  # fmt: skip

    def __init__(
        self,
        house: House,
        client: socket.socket,
        *,
        caller: tuple[Link, str],
        source: str,
        destination: str,
        port: int,
        label: str,
    ) -> None:
        self.house, self.client = house, client
        self.link, self.workspace = caller
        self.source, self.destination, self.port, self.label = source, destination, port, label
        self.started = house.poller.now
        self.first = b""  # read already, to be sent on
        self.gate: Gate | None = None
        self.race: Race | None = None
        self.flow: Flow | None = None

    def dial(self, targets: Sequence[Target]) -> None:
        self.race = Race(self.house.poller, targets, done=self._dialed)
        self.house.dialing[self] = None
        self.race.step()

    def client_event(self, events: int) -> None:
        """While we dial. Bytes wait; an error means that the client went away."""
        self.house.poller.watch(self.client.fileno(), 0, self.client_event)
        if events & (select.EPOLLERR | select.EPOLLHUP):
            self.end("reset")

    def _dialed(self, upstream: socket.socket | None) -> None:
        assert self.race is not None
        if upstream is None:
            self.end("refused")
            return
        self.house.dialing.pop(self, None)
        self.race = None
        flow = Flow(
            self.house.poller, self.client, upstream, over=self._over, first=self.first, gate=self.gate
        )
        self.flow, self.first = flow, b""
        flow.begin()

    def end(self, how: str) -> None:
        """Reset both sides now."""
        if self.flow is not None:
            self.flow.abort(how)
            return
        if self.race is not None:
            self.race.abandon()
        self.house.poller.forget(self.client.fileno(), closing=True)
        reset(self.client)
        self.house.leave(self, how)

    def _over(self, how: str) -> None:
        self.house.leave(self, how)


class House(ABC):
    """Who may come from where, who is here, and what is recorded of it."""

    dial_within: ClassVar[float]  # seconds
    denied_event: ClassVar[str]
    failed_event: ClassVar[str]
    closed_event: ClassVar[str]
    label: ClassVar[str]  # what the records call what a visit leads to

    def __init__(self, poller: Poller, *, pools: Pools, auditing: ritual.Auditing, limits: Limits) -> None:
        self.poller, self.auditing = poller, auditing
        self._limits = limits
        # By the address as a socket spells it: no address is parsed for a connection.
        self._callers: dict[str, tuple[Link, str]] = {}
        self._unconfirmed: set[Link] = set()
        self.visits: set[Visit] = set()
        self.dialing: dict[Visit, None] = {}
        self._by_link: defaultdict[Link, set[Visit]] = defaultdict(set)
        self._by_workspace: defaultdict[str, int] = defaultdict(int)
        self._denied: Floods[Denied, Mapping[str, Scalar]] = Floods()
        self._closings = Closings()
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._listeners: list[socket.socket] = []
        self._paused: list[socket.socket] = []
        self._totals_at, self._look_at = poller.now, 0.0
        self.totals: defaultdict[tuple[str, str], Totals] = defaultdict(Totals)
        self._place = functools.lru_cache(_PLACES)(functools.partial(_place, pools))

    def __len__(self) -> int:
        return len(self.visits)

    # ---- who is who

    def bind(self, link: Link, workspace: str, *addresses: Address) -> None:
        """From now on these source addresses, and no others, are this sandbox; whoever had them before
        is gone, and so is what this link was before, if it was something else."""
        wanted = {spelled(address): (link, workspace) for address in addresses}
        had = {text: caller for text, caller in self._callers.items() if caller[0] == link}
        if had and had != wanted:
            self.unbind(link)
        for text in wanted:
            before = self._callers.get(text)
            if before is not None and before[0] != link:
                self.unbind(before[0])
        self._callers.update(wanted)
        self._unconfirmed.discard(link)

    def unbind(self, link: Link) -> None:
        """Forget the sandbox and close its flows on both sides. What waits to be told is told at once."""
        for text in [text for text, (bound, _) in self._callers.items() if bound == link]:
            del self._callers[text]
        self._unconfirmed.discard(link)
        for visit in list(self._by_link.get(link, ())):
            visit.end("unbound")
        for flood in self._denied.take(lambda denied: denied.link == link):
            self._record(flood)
        self._tell_closed(self._closings.take(lambda closing: closing.link == link))

    def new_controller(self) -> None:
        """Whoever is here stays, until `settle`."""
        self._unconfirmed = {link for link, _ in self._callers.values()}

    def settle(self) -> None:
        """The controller has named every sandbox there is: what only its predecessor knew has ended."""
        for link in sorted(self._unconfirmed):
            self.unbind(link)

    # ---- connections

    def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        # Accepted sockets inherit these (tcp(7), socket(7)): three calls for all of them.
        make_abrupt(listener)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._listeners.append(listener)
        self._watch(listener)

    def _watch(self, listener: socket.socket) -> None:
        self.poller.watch(listener.fileno(), select.EPOLLIN, functools.partial(self._accept, listener))

    def _accept(self, listener: socket.socket, events: int) -> None:
        for _ in range(_ACCEPTS):
            try:
                client, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # accept(2): errors of the new connection (ECONNABORTED, EPROTO, ...) come out here, too
                if error.errno in _EXHAUSTED:
                    self._shed(listener)
                    return
                continue
            client.setblocking(False)
            self._admit(client, peer[0])

    def _shed(self, listener: socket.socket) -> None:
        """No descriptors left: use the spare one to reset the caller, rather than let it wait. Then stop
        listening until the next look, since epoll would report the same connection at once."""
        os.close(self._reserve)
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            reset(client)
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.poller.forget(listener.fileno())
        self._paused.append(listener)
        self.note(Denied(self.denied_event, None, None, "", "", 0, Reason.LIMIT))

    def _admit(self, client: socket.socket, source: str) -> None:
        try:
            destination, port = client.getsockname()[:2]
        except OSError:  # ENOTCONN: it has been reset meanwhile
            client.close()
            return
        caller = self._callers.get(source)
        block = self._place(destination)
        if caller is None:
            reason: Reason | None = Reason.SOURCE
        elif block is None:
            reason = Reason.UNLISTED
        else:
            reason = self._receive(client, caller, block, (source, destination, port))
        if reason is not None:
            self._deny(client, caller, (source, destination, port), reason)

    @abstractmethod
    def _receive(
        self, client: socket.socket, caller: tuple[Link, str], block: int, ends: tuple[str, str, int]
    ) -> Reason | None:
        """Take the connection in, or say why not. `ends`: source, destination, port."""

    def _deny(
        self,
        client: socket.socket,
        caller: tuple[Link, str] | None,
        ends: tuple[str, str, int],
        reason: Reason,
    ) -> None:
        link, workspace = caller or (None, None)
        self.note(Denied(self.denied_event, link, workspace, *ends, reason))
        reset(client)

    def no_room(self, link: Link, workspace: str) -> Reason | None:
        """Why one more is too many."""
        here = self._by_link.get(link)
        if here is not None and len(here) >= self._limits.per_sandbox:
            return Reason.CONNECTIONS
        if self._by_workspace.get(workspace, 0) >= self._limits.total - len(self.visits):
            return Reason.LIMIT
        return None

    def enter(self, visit: Visit) -> None:
        self.visits.add(visit)
        self._by_link[visit.link].add(visit)
        self._by_workspace[visit.workspace] += 1

    def leave(self, visit: Visit, how: str) -> None:
        """Both its sockets are closed."""
        self.visits.discard(visit)
        self.dialing.pop(visit, None)
        mates = self._by_link[visit.link]
        mates.discard(visit)
        if not mates:
            del self._by_link[visit.link]
        self._by_workspace[visit.workspace] -= 1
        if not self._by_workspace[visit.workspace]:
            del self._by_workspace[visit.workspace]
        self._left(visit, how)
        visit.flow = visit.race = visit.gate = (
            None  # they refer to each other: leave nothing to the collector
        )

    def _left(self, visit: Visit, how: str) -> None:
        if visit.flow is not None:
            sent, received = visit.flow.outward.moved, visit.flow.inward.moved
            total = self.totals[visit.workspace, visit.label]
            total.flows += 1
            total.bytes_out += sent
            total.bytes_in += received
            total.told = False
            seconds = round(self.poller.now - visit.started, 6)
            closing = Closing(visit.link, visit.workspace, visit.label, visit.port, how)
            if self._closings.alone(closing, sent=sent, received=received, seconds=seconds):
                about = _closed(self.label, closing, source=visit.source, destination=visit.destination)
                carried = _carried(sent, received, seconds, how)
                self.auditing.record(self.closed_event, {**about, **self._asked(visit), **carried})
        elif visit.race is not None:
            code = visit.race.error if how == "refused" else None
            self.failed(visit, errno.errorcode.get(code or 0, how).lower())

    def _asked(self, visit: Visit) -> Mapping[str, Scalar]:
        """What else is recorded of a flow that has ended, if it is recorded by itself."""
        return {}

    def _tell_closed(self, closings: Sequence[tuple[Closing, Many]]) -> None:
        """Flows that ended like others in the same second: where each came from is not told."""
        for closing, many in closings:
            carried = _carried(many.bytes_out, many.bytes_in, many.seconds, closing.how)
            number = {"connections": many.connections}
            self.auditing.record(self.closed_event, {**_closed(self.label, closing), **number, **carried})

    def failed(self, visit: Visit, why: str) -> None:
        """Record a connection that never became a flow."""
        self.note(_about(self.failed_event, visit, why), self._details(visit))

    def _details(self, visit: Visit) -> Mapping[str, Scalar]:
        """What else is recorded of a connection that did not become a flow; the first of many equal ones."""
        return {}

    # ---- records

    def note(self, denied: Denied, details: Mapping[str, Scalar] | None = None) -> None:
        for flood in self._denied.add(denied, details or {}, now=self.poller.now):
            self._record(flood)

    def _record(self, flood: Flood[Denied, Mapping[str, Scalar]]) -> None:
        denied = flood.key
        fields: dict[str, Scalar] = {
            "link": denied.link.device if denied.link else None,
            "workspace": denied.workspace,
            "source": denied.source,
            "destination": denied.destination,
            "port": denied.port,
            "reason": str(denied.reason),
            "connections": flood.count,
            **flood.detail,
        }
        self.auditing.record(denied.event, fields)

    def tell_denied(self) -> None:
        """Record what would wait for the end of its second."""
        for flood in self._denied.drain():
            self._record(flood)
        self._tell_closed(self._closings.take())

    def tick(self) -> None:
        """What time brings: floods that are over, the next attempts, listeners to try again."""
        now = self.poller.now
        if now < self._look_at:
            return
        self._look_at = now + self.patience / 2
        for flood in self._denied.due(now=now):
            self._record(flood)
        self._tell_closed(self._closings.due(now=now))
        for visit in list(self.dialing):
            self._step(visit, now)
        self._look(now)
        while self._paused:
            self._watch(self._paused.pop())
        if now - self._totals_at >= _TOTALS:
            self._totals_at = now
            self.tell_totals()

    def _step(self, visit: Visit, now: float) -> None:
        if visit.race is None:
            return
        if now - visit.started > self.dial_within:
            visit.race.error = errno.ETIMEDOUT
            visit.end("refused")
        elif now >= visit.race.step_at:
            visit.race.step()

    @abstractmethod
    def _look(self, now: float) -> None:
        """Several times a second."""

    @property
    def patience(self) -> float:
        """How many seconds the loop may sleep."""
        return _TICK_DIALING if self.dialing else _TICK

    @abstractmethod
    def tell_totals(self) -> None:
        """Record the totals that have changed."""

    def close(self) -> None:
        for visit in list(self.visits):
            visit.end("stopping")
        for listener in self._listeners:
            self.poller.forget(listener.fileno())
            listener.close()
        self.tell_denied()
        self.tell_totals()
        os.close(self._reserve)


def _about(event: str, visit: Visit, reason: str) -> Denied:
    return Denied(event, visit.link, visit.workspace, visit.source, visit.destination, visit.port, reason)


def _closed(
    label: str, closing: Closing, *, source: str | None = None, destination: str | None = None
) -> dict[str, Scalar]:
    ends = {} if source is None else {"source": source, "destination": destination}
    return {
        "link": closing.link.device,
        "workspace": closing.workspace,
        label: closing.label,
        "port": closing.port,
        **ends,
    }


def _carried(sent: int, received: int, seconds: float, how: str) -> dict[str, Scalar]:
    return {"bytes_out": sent, "bytes_in": received, "seconds": seconds, "how": how}


def _place(pools: Pools, text: str) -> int | None:
    """The block of an address as a socket spells it; a scope is cut off. None if it is not synthetic."""
    try:
        place = pools.block_of(ip_address(text.partition("%")[0]))
    except ValueError:
        return None
    return None if place is None else place[0]


def spelled(address: Address) -> str:
    """As getpeername(2) gives it: Python's own spelling of IPv6 differs where IPv4 is embedded."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return socket.inet_ntop(family, address.packed)


class Program(ABC):
    """The process: channels in, one loop."""

    receives: ClassVar[Any]  # what the controller may say

    def __init__(self, start: ritual.Start, *, limits: Limits) -> None:
        self.poller = Poller()
        self.auditing = ritual.Auditing.over(start.card.name, start.take("audit"))
        self.house = self._open(start.config.pools.pools(), limits)
        self._supervisor: Channel[Any] = Channel(start.take("supervisor"), messages.TO_CHILD)
        self._controller: Channel[Any] | None = None
        self._ended: str | None = None
        self._next_beat = 0.0
        self._supervisor.socket.setblocking(False)
        self.poller.watch(self._supervisor.fileno(), select.EPOLLIN, self._from_supervisor)
        self._connect(start.take("controller"))

    @abstractmethod
    def _open(self, pools: Pools, limits: Limits) -> House: ...

    @abstractmethod
    def _apply(self, received: Received[Any]) -> Any:
        """Do what the controller says; returns the answer."""

    def run(self) -> str:
        """Serve until told to stop; returns why."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._finish(signal.Signals(number).name))
        self._tell(messages.Ready())
        while self._ended is None:
            self.poller.turn(self.house.patience)
            self.house.tick()
            if self.poller.now >= self._next_beat:
                self._next_beat = self.poller.now + messages.HEARTBEAT
                self.auditing.flush()
                self._tell(messages.Heartbeat())
        self.house.close()
        self.poller.close()
        return self._ended

    def _finish(self, why: str) -> None:
        self._ended = self._ended or why

    # ---- the supervisor

    def _tell(self, message: messages.FROM_CHILD) -> None:
        try:
            self._supervisor.send(message)
        except BlockingIOError:
            pass  # it will miss heartbeats, and draw its conclusion
        except OSError as error:
            self._finish(f"the supervisor is gone: {error}")

    def _from_supervisor(self, events: int) -> None:
        try:
            received = self._supervisor.receive()
        except BlockingIOError:
            return
        except (EOFError, OSError, ProtocolError) as error:
            self._finish(f"the supervisor is gone: {error or 'end of file'}")
            return
        sock = socket.socket(fileno=received.take())
        if received.message.name == "controller":
            self._disconnect("replaced")
            self.house.new_controller()
            self._connect(sock)
        elif received.message.name == "audit":
            self.auditing.connect(sock)
        else:
            sock.close()

    # ---- the controller

    def _connect(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._controller = Channel(sock, self.receives)
        self.poller.watch(sock.fileno(), select.EPOLLIN, self._from_controller)

    def _disconnect(self, why: str) -> None:
        if self._controller is not None:
            log.info("the connection to the controller ended: %s", why)
            self.poller.forget(self._controller.fileno())
            self._controller.close()
            self._controller = None

    def _from_controller(self, events: int) -> None:
        for _ in range(_READS):
            if self._controller is None:
                return
            try:
                answer = self._apply(self._controller.receive())
            except BlockingIOError:
                return
            except (EOFError, OSError, ProtocolError) as error:
                self._disconnect(str(error) or "end of file")
                return
            self._reply(answer)

    def _reply(self, message: Any) -> None:
        if self._controller is None:
            return
        try:
            self._controller.send(message)
        except (OSError, ProtocolError) as error:
            self._disconnect(f"it stopped reading: {error}")
