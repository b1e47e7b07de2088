"""The inspector: takes the connections the gateway steers here and relays those meant for local services.

A steered connection (TPROXY) keeps its original destination as the accepted socket's own address: a
synthetic address, so it says which rule of which workspace was meant. Who asks is the source address,
which the guard compared with the link's before the packet got here. Both must be known, and together be a
relay the controller has announced; anything else is reset at once and recorded.

The listeners live in the gateway; this process, and so every socket it dials with, in the host's namespace,
where 127.0.0.1 is the host's. It dials 127.0.0.1 and the announced port, nothing else.

While the controller is gone nothing changes. When a new one comes, what the old one said is void: flows
are closed and the new one says again who is who.
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
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from egressd.ipc import messages
from egressd.ipc.channel import Channel
from egressd.journal.floods import Flood, Floods
from egressd.journal.records import Scalar
from egressd.model.errors import ProtocolError
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.processes import ritual
from egressd.processes.flows import DESCRIPTORS, Flow, Poller, reset
from egressd.ruleset.layout import Pools

__all__ = ["Inspector", "Limits", "Relays", "main"]

log = logging.getLogger(__name__)

Address = IPv4Address | IPv6Address

_TICK = 0.25  # seconds
_DIAL = 3.0  # seconds: 127.0.0.1 answers at once, unless its backlog is full
_TOTALS = 60.0  # seconds between records of the totals of services in use
_ACCEPTS, _READS = 64, 64  # per wake-up, so that nobody holds the loop
_WANTED_DESCRIPTORS = 32_768
_OWN_DESCRIPTORS = 64  # listeners, channels, epoll, stderr, and room to spare
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Limits:
    """How many flows at once."""

    per_sandbox: int = 512
    total: int = 4096

    @classmethod
    def within(cls, descriptors: int) -> Limits:
        """As many as this number of descriptors carries."""
        return cls(total=max(1, min(cls().total, (descriptors - _OWN_DESCRIPTORS) // DESCRIPTORS)))


@dataclass(slots=True)
class Totals:
    """Of one service of one workspace, since the process started. Bytes of flows that have ended."""

    flows: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    told: bool = True


@dataclass(frozen=True, slots=True)
class _Denied:
    """What makes two denied connections equal."""

    event: str
    link: Link | None
    workspace: str | None
    source: str
    destination: str
    port: int
    reason: str


@dataclass(slots=True)
class _About:
    """Whose a flow is."""

    link: Link
    relay: messages.Relay
    source: str
    destination: str
    started: float


class Relays:
    """Who may reach which local service, and the flows that do."""

    def __init__(self, poller: Poller, *, pools: Pools, auditing: ritual.Auditing, limits: Limits) -> None:
        self._poller, self._pools, self._auditing, self._limits = poller, pools, auditing, limits
        self._sources: dict[Address, tuple[Link, str]] = {}
        self._services: dict[tuple[str, int, int], messages.Relay] = {}
        self._flows: dict[Flow, _About] = {}
        self._by_link: defaultdict[Link, set[Flow]] = defaultdict(set)
        self._denied: Floods[_Denied, None] = Floods()
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._listeners: list[socket.socket] = []
        self._paused: list[socket.socket] = []
        self._totals_at = time.monotonic()
        self.totals: defaultdict[tuple[str, str], Totals] = defaultdict(Totals)

    def __len__(self) -> int:
        return len(self._flows)

    # ---- what the controller says

    def bind(self, link: Link, workspace: str, *addresses: Address) -> None:
        """From now on these source addresses, and no others, are this sandbox; whoever had them before
        is gone."""
        for address in [a for a, (bound, _) in self._sources.items() if bound == link]:
            del self._sources[address]
        for address in addresses:
            if address in self._sources:
                self.unbind(self._sources[address][0])
            self._sources[address] = (link, workspace)

    def unbind(self, link: Link) -> None:
        """Forget the sandbox and close its flows on both sides."""
        for address in [a for a, (bound, _) in self._sources.items() if bound == link]:
            del self._sources[address]
        for flow in list(self._by_link.get(link, ())):
            flow.abort("unbound")

    def announce(self, relays: Iterable[messages.Relay]) -> int:
        """These relays and no others. Returns how many flows had to be closed."""
        self._services = {(relay.workspace, relay.block, relay.port): relay for relay in relays}
        gone = [flow for flow, about in self._flows.items() if not self._announced(about.relay)]
        for flow in gone:
            flow.abort("revoked")
        return len(gone)

    def _announced(self, relay: messages.Relay) -> bool:
        return self._services.get((relay.workspace, relay.block, relay.port)) == relay

    def forget_everything(self, how: str) -> None:
        self._sources.clear()
        self._services.clear()
        for flow in list(self._flows):
            flow.abort(how)

    # ---- connections

    def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listeners.append(listener)
        self._watch(listener)

    def _watch(self, listener: socket.socket) -> None:
        self._poller.watch(listener.fileno(), select.EPOLLIN, functools.partial(self._accept, listener))

    def _accept(self, listener: socket.socket, events: int) -> None:
        for _ in range(_ACCEPTS):
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # accept(2): errors of the new connection (ECONNABORTED, EPROTO, ...) come out here, too
                if error.errno in _EXHAUSTED:
                    self._shed(listener)
                    return
                continue
            client.setblocking(False)
            self._admit(client)

    def _shed(self, listener: socket.socket) -> None:
        """No descriptors left: use the spare one to reset the caller, rather than let it wait. Then stop
        listening until the next tick, since epoll would report the same connection at once."""
        os.close(self._reserve)
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            reset(client)
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._poller.forget(listener.fileno())
        self._paused.append(listener)
        self._note(_Denied("relay-denied", None, None, "", "", 0, Reason.LIMIT))

    def _admit(self, client: socket.socket) -> None:
        try:
            source, (target, port) = client.getpeername()[0], client.getsockname()[:2]
        except OSError:  # ENOTCONN: it has been reset meanwhile
            client.close()
            return
        address = _address(source)
        bound = None if address is None else self._sources.get(address)
        relay = self._relay(bound, target, port)
        reason = self._reason(bound, relay)
        if reason is not None:
            link, workspace = bound or (None, None)
            self._note(_Denied("relay-denied", link, workspace, source, target, port, reason))
            reset(client)
        elif bound is not None and relay is not None:
            self._dial(client, _About(bound[0], relay, source, target, time.monotonic()))

    def _relay(self, bound: tuple[Link, str] | None, target: str, port: int) -> messages.Relay | None:
        address = _address(target)
        place = None if address is None else self._pools.block_of(address)
        if bound is None or place is None:
            return None
        return self._services.get((bound[1], place[0], port))

    def _reason(self, bound: tuple[Link, str] | None, relay: messages.Relay | None) -> Reason | None:
        """Why not; None if it may."""
        if bound is None:
            return Reason.SOURCE
        if relay is None:
            return Reason.UNLISTED
        if len(self._by_link.get(bound[0], ())) >= self._limits.per_sandbox:
            return Reason.CONNECTIONS
        if len(self._flows) >= self._limits.total:
            return Reason.LIMIT
        return None

    def _dial(self, client: socket.socket, about: _About) -> None:
        try:
            flow = Flow(self._poller, client, ("127.0.0.1", about.relay.port), over=self._over)
        except OSError as error:
            self._failed(about, error.errno)
            reset(client)
            return
        self._flows[flow] = about
        self._by_link[about.link].add(flow)
        flow.dial()

    # ---- ends

    def _over(self, flow: Flow, how: str) -> None:
        about = self._flows.pop(flow)
        mates = self._by_link[about.link]
        mates.discard(flow)
        if not mates:
            del self._by_link[about.link]
        if flow.connecting:
            self._failed(about, flow.error, how)
            return
        sent, received = flow.outward.moved, flow.inward.moved
        total = self.totals[about.relay.workspace, about.relay.service]
        total.flows += 1
        total.bytes_out += sent
        total.bytes_in += received
        total.told = False
        self._auditing.record(
            "relay-closed",
            {
                "link": about.link.device,
                "workspace": about.relay.workspace,
                "service": about.relay.service,
                "port": about.relay.port,
                "source": about.source,
                "destination": about.destination,
                "bytes_out": sent,
                "bytes_in": received,
                "seconds": round(time.monotonic() - about.started, 6),
                "how": how,
            },
        )

    def _failed(self, about: _About, code: int | None, how: str = "") -> None:
        reason = errno.errorcode.get(code or 0, how or "unknown").lower()
        self._note(
            _Denied(
                "relay-failed",
                about.link,
                about.relay.workspace,
                about.source,
                about.destination,
                about.relay.port,
                reason,
            )
        )

    # ---- records

    def _note(self, denied: _Denied) -> None:
        for flood in self._denied.add(denied, None, now=time.monotonic()):
            self._record(flood)

    def _record(self, flood: Flood[_Denied, None]) -> None:
        denied = flood.key
        fields: dict[str, Scalar] = {
            "link": denied.link.device if denied.link else None,
            "workspace": denied.workspace,
            "source": denied.source,
            "destination": denied.destination,
            "port": denied.port,
            "reason": str(denied.reason),
            "connections": flood.count,
        }
        self._auditing.record(denied.event, fields)

    def tick(self, now: float) -> None:
        """What time brings: floods that are over, dials that took too long, listeners to try again."""
        for flood in self._denied.due(now=now):
            self._record(flood)
        late = [f for f, about in self._flows.items() if f.connecting and now - about.started > _DIAL]
        for flow in late:
            flow.error = errno.ETIMEDOUT
            flow.abort("timeout")
        while self._paused:
            self._watch(self._paused.pop())
        if now - self._totals_at >= _TOTALS:
            self._totals_at = now
            self.tell_totals()

    def tell_totals(self) -> None:
        for (workspace, service), total in self.totals.items():
            if not total.told:
                total.told = True
                self._auditing.record(
                    "relay-totals",
                    {
                        "workspace": workspace,
                        "service": service,
                        "flows": total.flows,
                        "bytes_out": total.bytes_out,
                        "bytes_in": total.bytes_in,
                    },
                )

    def close(self) -> None:
        self.forget_everything("stopping")
        for listener in self._listeners:
            self._poller.forget(listener.fileno())
            listener.close()
        for flood in self._denied.drain():
            self._record(flood)
        self.tell_totals()
        os.close(self._reserve)


def _address(text: str) -> Address | None:
    """An address as a socket spells it; a scope is cut off. None for what is neither family's."""
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None


class Inspector:
    """The process: channels in, one loop."""

    def __init__(self, start: ritual.Start, *, limits: Limits) -> None:
        self._poller = Poller()
        self._auditing = ritual.Auditing.over("inspector", start.take("audit"))
        self.relays = Relays(
            self._poller, pools=start.config.pools.pools(), auditing=self._auditing, limits=limits
        )
        self._supervisor: Channel[Any] = Channel(start.take("supervisor"), messages.TO_CHILD)
        self._controller: Channel[Any] | None = None
        self._ended: str | None = None
        self._next_beat = 0.0
        self._supervisor.socket.setblocking(False)
        self._poller.watch(self._supervisor.fileno(), select.EPOLLIN, self._from_supervisor)
        self._connect(start.take("controller"))
        for name in ("tproxy4", "tproxy6"):
            self.relays.listen(start.take(name))

    def run(self) -> str:
        """Serve until told to stop; returns why."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._finish(signal.Signals(number).name))
        self._tell(messages.Ready())
        while self._ended is None:
            self._poller.turn(_TICK)
            now = time.monotonic()
            self.relays.tick(now)
            if now >= self._next_beat:
                self._next_beat = now + messages.HEARTBEAT
                self._tell(messages.Heartbeat())
        self.relays.close()
        self._poller.close()
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
            self.relays.forget_everything("controller-replaced")
            self._connect(sock)
        elif received.message.name == "audit":
            self._auditing.connect(sock)
        else:
            sock.close()

    # ---- the controller

    def _connect(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._controller = Channel(sock, messages.TO_INSPECTOR)
        self._poller.watch(sock.fileno(), select.EPOLLIN, self._from_controller)

    def _disconnect(self, why: str) -> None:
        if self._controller is not None:
            log.info("the connection to the controller ended: %s", why)
            self._poller.forget(self._controller.fileno())
            self._controller.close()
            self._controller = None

    def _from_controller(self, events: int) -> None:
        for _ in range(_READS):
            if self._controller is None:
                return
            try:
                message = self._controller.receive().message
            except BlockingIOError:
                return
            except (EOFError, OSError, ProtocolError) as error:
                self._disconnect(str(error) or "end of file")
                return
            self._reply(messages.Done(request=message.request, changes=self._apply(message)))

    def _apply(self, message: messages.TO_INSPECTOR) -> int:
        if isinstance(message, messages.SetRelays):
            return self.relays.announce(message.relays)
        if isinstance(message, messages.BindSource):
            self.relays.bind(Link(message.link), message.workspace, message.source4, message.source6)
        else:
            self.relays.unbind(Link(message.link))
        return 0

    def _reply(self, message: messages.Done) -> None:
        if self._controller is None:
            return
        try:
            self._controller.send(message)
        except OSError as error:
            self._disconnect(f"it stopped reading: {error}")


def raise_descriptor_limit() -> int:
    """The soft limit, raised as far as the hard one lets us; select(2) is not used anywhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_WANTED_DESCRIPTORS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when told to stop, 1 when it could not begin."""
    try:
        start = ritual.begin("inspector", arguments)
        limits = Limits.within(raise_descriptor_limit())
        inspector = Inspector(start, limits=limits)
    except ProtocolError as error:
        print(f"egressd[inspector]: {error}", file=sys.stderr)
        return 1
    log.info("ending: %s", inspector.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
