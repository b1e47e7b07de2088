"""warden: the one process that may change the gateway, and the list of what it can be asked.

It lives in the gateway's namespace with CAP_NET_ADMIN and nothing else, never enters another, and reads
typed messages from the controller, one at a time (HANDLERS is the whole list; ipc/messages.py says why
each is safe though the asker be hostile). A message ends in Done, Failed, Payload or the counters of a link;
one that is no message ends its sender's connection. An error of the kernel is an answer, never the end.

It keeps in memory what should stand. When somebody else changes the ruleset, the rules or the routes, it
hears of it (kernel/monitor.py), reads back, restores, and tells. After its own restart it knows nothing:
it leaves what stands as it stands, takes the controller's account of it (SetWorkspaces, KeepLink, SetNat),
and with Settle removes what was not named.

Last counters of what goes are told, and gone from the kernel. So each such report is kept, under a number,
until the controller has it in its books on disk (`Heard`): the one that is told may end before that.

The loop is one thread, without timers finer than its tick: the kernel's events wake it. A second one does
nothing but delete the devices of links that are closed already (kernel/eraser.py).
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

import msgspec

from egressd.ipc import messages
from egressd.ipc.channel import Channel, Received, payload
from egressd.kernel import gateway, namespaces, netlink, sysctl
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.dumps import Dumps
from egressd.kernel.eraser import Eraser
from egressd.kernel.ledger import Ledger
from egressd.kernel.links import Links
from egressd.kernel.monitor import Batch, Count, GoneElement, Monitor
from egressd.kernel.namespaces import Identity
from egressd.kernel.netlink import Netlink, NetlinkError
from egressd.kernel.nft import Nft
from egressd.kernel.routing import Device
from egressd.kernel.spellings import Spellings
from egressd.kernel.tallies import Tallies
from egressd.model.errors import EgressdError, KernelError, ProtocolError, Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.processes.ritual import Auditing, begin, introduced
from egressd.ruleset import build, diff, grants, observe
from egressd.ruleset.build import Desired, LinkWant
from egressd.ruleset.grants import Change
from egressd.ruleset.layout import BLOCKS, SLOTS, TABLE, WORKSPACES, Kind, Mark, Pools
from egressd.ruleset.objects import FAMILIES, Chain, Key, Objects, Set, string
from egressd.ruleset.observe import Observed
from egressd.ruleset.wants import NatEntry, WorkspaceWant

__all__ = ["HANDLERS", "Warden", "main"]

log = logging.getLogger("egressd")

_TICK = 1.0  # seconds: how often everything cheap is looked at, heard of or not
_PATIENCE = 0.2  # seconds between two looks at the routing tables, which our own work changes too
_REST = 10  # times as long as the last look took; with a thousand links that is a good part of a second
_INTERRUPTED = 20  # looks in a row that found the tables changing, after which that is a fault
_SEND_WITHIN = 2.0  # seconds; a controller that does not read its answers for so long is gone
_LONELY = 20.0  # seconds without a controller after which this process begins anew, to be introduced again
_TEXT = 4000  # characters of messages.Text
_REPORTS = 65_536  # kept; a controller hears thousands a second

NatKey = tuple[int, str]  # mark, synthetic address
Reply = (
    messages.Done
    | messages.Failed
    | messages.LinkClosed
    | messages.LinkSpent
    | tuple[messages.Payload, bytes]
)


@dataclass(frozen=True, slots=True)
class Lease:
    want: LinkWant
    namespace: Identity | None  # None: kept over a restart of ours, and not resumed since


@dataclass(slots=True)
class Standing:
    """What should be in the kernel."""

    wants: dict[str, WorkspaceWant] = field(default_factory=dict)
    nat: dict[NatKey, NatEntry] = field(default_factory=dict)
    leases: dict[Link, Lease] = field(default_factory=dict)
    _addresses: dict[IPv4Address, Link] = field(default_factory=dict)  # who has them

    def hold(self, link: Link, lease: Lease, pools: Pools) -> None:
        self.leases[link] = lease
        self._addresses[pools.sandbox(link)[0]] = link

    def release(self, link: Link, pools: Pools) -> None:
        self.leases.pop(link, None)
        if self._addresses.get(address := pools.sandbox(link)[0]) == link:
            del self._addresses[address]

    def taken(self, link: Link, pools: Pools) -> bool:
        """Is it, or another link of the same addresses, held? Both families are counted alike."""
        return pools.sandbox(link)[0] in self._addresses

    def desired(self, pools: Pools) -> Desired:
        links = tuple(lease.want for lease in self.leases.values())
        return Desired(pools=pools, wants=self.wants, links=links, nat=self.nat)

    def links_of(self, workspace: str) -> list[LinkWant]:
        return [lease.want for lease in self.leases.values() if lease.want.workspace == workspace]


_Report = messages.LinkLost | messages.Retired | messages.Tampered


@dataclass(slots=True)
class Reports:
    """What was counted and is gone, by number; until it is heard. Numbers begin with the time since boot, in
    microseconds: above all that a warden before this one has used."""

    _kept: dict[int, _Report] = field(default_factory=dict)
    _next: int = field(default_factory=lambda: time.monotonic_ns() // 1000)

    def keep(self, report: _Report) -> _Report:
        """The same with its number."""
        self._next += 1
        numbered = msgspec.structs.replace(report, report=self._next)
        self._kept[self._next] = numbered
        while len(self._kept) > _REPORTS:
            del self._kept[next(iter(self._kept))]
        return numbered

    def heard(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._kept.pop(number, None)

    def all(self) -> list[_Report]:
        return list(self._kept.values())

    def of(self, link: Link) -> messages.LinkLost | None:
        for report in reversed(self._kept.values()):
            if isinstance(report, messages.LinkLost) and report.link == link.number:
                return report
        return None


class Warden:
    """Must be made inside the gateway's namespace."""

    def __init__(
        self, *, pools: Pools, auditing: Auditing | None = None, forbidden: Iterable[Identity] = ()
    ) -> None:
        """`forbidden`: namespaces that are nobody's sandbox, beside the gateway itself."""
        self.pools, self.auditing = pools, auditing or Auditing("warden")
        self._forbidden = frozenset(forbidden)
        self._route, self._dumps = Netlink(netlink.ROUTE), Dumps()
        self._spellings = Spellings(self._dumps)
        self._nft, self._conntrack, self._tallies = Nft(), Conntrack(), Tallies(self._dumps)
        self._eraser = Eraser(pools)
        self.monitor = Monitor(ignore=(self._route.port, self._eraser.port))
        self._ledger = Ledger(self._nft, self.monitor)
        self._links = Links(self._route, self._ledger, pools)
        self.standing = Standing()
        self._reports = Reports()
        self.adopted = False  # does `standing` describe the whole gateway?
        self._named: set[Link] = set()  # links and addresses this controller has spoken of
        self._named_nat: set[NatKey] = set()
        self.controller: Channel[messages.TO_WARDEN] | None = None
        self._looked = self._took = 0.0  # when the routing was looked at, monotonic; how long that took
        self._interrupted = 0  # looks in a row that found it changing
        self._told = ""  # the last fault that could not be mended, said once
        self._translations_found = False

    def while_listing(self, meanwhile: Callable[[], None]) -> None:
        """See `Nft`."""
        self._nft.meanwhile = self._dumps.meanwhile = meanwhile

    # ---- the controller's connection

    def connect(self, sock: socket.socket) -> None:
        """A controller, at the start or after its restart: it must name again what it keeps."""
        self.disconnect()
        sock.settimeout(_SEND_WITHIN)
        self.controller = Channel(sock, messages.TO_WARDEN)
        self._named, self._named_nat = set(), set()

    def disconnect(self) -> None:
        if self.controller is not None:
            self.controller.close()
            self.controller = None

    def hear(self) -> None:
        """One message, answered."""
        assert self.controller is not None
        try:
            received = self.controller.receive()
        except (EOFError, ProtocolError, OSError) as error:
            log.warning("the controller's connection ends: %s", error or "closed")
            self.disconnect()
            return
        try:
            self._answer(self.handle(received))
        finally:
            received.close()

    def handle(self, received: Received[Any]) -> Reply:
        """The reply to one message; never an exception, since nothing may stop the warden."""
        request = received.message.request
        try:
            return HANDLERS[type(received.message)](self, received)
        except Refused as refusal:
            return _failed(request, refusal.reason, str(refusal))
        except (ProtocolError, ValueError) as error:
            return _failed(request, Reason.PROTOCOL, str(error))
        except (KernelError, OSError) as error:
            log.error("%s: %s", type(received.message).__name__, error)  # noqa: TRY400
            return _failed(request, Reason.UNAVAILABLE, str(error))
        except Exception as error:
            log.exception("%s", type(received.message).__name__)
            return _failed(request, Reason.UNAVAILABLE, f"{type(error).__name__}: {error}")

    def _answer(self, reply: Reply) -> None:
        if isinstance(reply, tuple):
            message, data = reply
            with payload(data) as descriptor:
                self._send(message, descriptor=descriptor)
        else:
            self._send(reply)

    def _send(self, message: Any, *, descriptor: int | None = None) -> None:
        """EPIPE and a full buffer alike mean that this controller is gone."""
        if self.controller is None:
            return
        try:
            self.controller.send(message, descriptor=descriptor)
        except (OSError, ProtocolError) as error:
            log.warning("the controller cannot be answered: %s", error)
            self.disconnect()

    # ---- workspaces

    def set_workspaces(self, received: Received[messages.SetWorkspaces]) -> messages.Done:
        began = time.monotonic()
        request = received.message.request
        wants = _decode(received.payload())
        self._check_workspaces(wants)
        operations = self._operations(wants)
        removed, fresh = self._exchanged_marks(wants)
        self._conntrack.forget_marks(fresh)
        nat = [self.standing.nat[key] for key in self.standing.nat if key[0] in removed]
        taken = [NatEntry(e.mark, e.synthetic, None, e.comment) for e in nat]
        commands = [*build.nat(taken, self._leads(taken)), *diff.commands(operations)]
        batch = self._ledger.run(commands) if commands else Batch()
        self._conntrack.forget_ports(_turned(self.standing.wants, wants))
        names = self._names() | {want.index: name for name, want in wants.items()}
        self.standing.wants = wants
        for entry in nat:
            del self.standing.nat[_key(entry)]
        self._retire(batch, names)
        return messages.Done(request=request, changes=len(operations), microseconds=_since(began))

    def _check_workspaces(self, wants: Mapping[str, WorkspaceWant]) -> None:
        """Marks and addresses are checked one by one where commands are made of them (ruleset.build)."""
        indexes = {want.index for want in wants.values()}
        if len(indexes) < len(wants):
            raise ProtocolError("two workspaces share an index")
        for link, lease in list(self.standing.leases.items()):
            if lease.want.workspace not in wants and link not in self._named:
                self._lose(link)  # its controller is gone, and nobody has asked to keep it
            elif lease.want.workspace not in wants:
                raise Refused(
                    Reason.WORKSPACE, f"workspace {lease.want.workspace} cannot go: {link.device} is in it"
                )

    def _operations(self, wants: Mapping[str, WorkspaceWant]) -> list[diff.Operation]:
        try:
            if not self.adopted:
                return self._adopting(wants)
            before = self.standing.wants
            return [
                operation
                for name in sorted(before.keys() | wants.keys())
                if before.get(name) != wants.get(name)
                for operation in diff.changes(
                    before.get(name), wants.get(name), pools=self.pools, links=self.standing.links_of(name)
                )
            ]
        except ValueError as error:
            raise ProtocolError(str(error)) from error

    def _adopting(self, wants: Mapping[str, WorkspaceWant]) -> list[diff.Operation]:
        """Against what stands, leaving links, translations and workspaces in use for `settle`."""
        desired = Desired(pools=self.pools, wants=dict(wants))
        return list(diff.plan(_without_links(self._observe(), wants), desired))

    def _exchanged_marks(self, wants: Mapping[str, WorkspaceWant]) -> tuple[set[int], set[int]]:
        """Marks that go out of use, and marks that come into use. Connections of a revoked host stay in
        conntrack, so that its answers can be turned into resets; before their mark means anything again, they
        must be gone."""
        before = _marks_of(self.standing.wants) if self.adopted else _marks(self._observe().things)
        after = _marks_of(wants)
        return before - after, after - before

    def _names(self) -> dict[int, str]:
        return {want.index: name for name, want in self.standing.wants.items()}

    def _retire(self, batch: Batch, names: Mapping[int, str]) -> None:
        """Elements that left maps and sets, with their last counters. `names`: workspaces by index."""
        gone: dict[str, dict[str, dict[str, Count]]] = {kind: {} for kind in _RETIRED}
        for element in batch.elements:
            workspace, _, name = element.name.rpartition("_")
            owner = names.get(element.mark >> 14 & (WORKSPACES - 1))
            if name in _MAPS:
                _sum(gone["elements"], workspace, element.comment, element)
            elif owner is not None and element.name in _BY_MARK:
                host = element.comment.removeprefix(f"{owner} ") if element.name in _SETS else element.comment
                _sum(gone[_BY_MARK[element.name]], owner, host, element)
        for kind, workspaces in gone.items():
            for workspace, elements in workspaces.items():
                for part in _parts(elements):
                    counts: dict[str, Any] = {"elements": {}, kind: part}
                    self._report(messages.Retired(workspace=workspace, **counts))

    # ---- one name at a time

    def grant(self, received: Received[messages.Grant]) -> messages.Done:
        message = received.message
        change = grants.grant(self._workspace(message.workspace), message.elements)
        entries = [self._checked(entry) for entry in message.entries]
        owners = change.owners
        for entry in entries:
            if entry.mark & build.OWNER not in owners:
                raise ProtocolError(f"{entry.synthetic} ({entry.comment}) is not of what is granted")
        return self._exchange(message.request, change, entries)

    def withdraw(self, received: Received[messages.Withdraw]) -> messages.Done:
        message = received.message
        want = self._workspace(message.workspace)
        change = grants.withdraw(want, message.elements)
        entries = {_key(entry): self._without(entry, want) for entry in message.entries}
        for entry in self._ways(change.removed):
            entries[_key(entry)] = entry
        return self._exchange(message.request, change, list(entries.values()))

    def _without(self, entry: NatEntry, want: WorkspaceWant) -> NatEntry:
        if Mark.of(entry.mark).workspace != want.index:
            raise ProtocolError(f"mark {entry.mark:#010x} is not of workspace {want.workspace}")
        return self._checked(NatEntry(entry.mark, entry.synthetic, None, entry.comment))

    def _ways(self, marks: Iterable[int]) -> Iterable[NatEntry]:
        """What takes every translation of these marks away."""
        for mark in marks:
            for slot in range(SLOTS):
                for address in self.pools.synthetic(Mark.of(mark).block, slot):
                    if (mark, str(address)) in self.standing.nat:
                        yield NatEntry(mark, str(address), None, "withdrawn")

    def _workspace(self, name: str) -> WorkspaceWant:
        want = self.standing.wants.get(name)
        if want is None:
            raise Refused(Reason.WORKSPACE, Reason.WORKSPACE.text)
        return want

    def _exchange(self, request: int, change: Change, entries: list[NatEntry]) -> messages.Done:
        """One batch for both; what stands is changed when the kernel has."""
        began = time.monotonic()
        commands = build.nat(entries, self._leads(entries)) + diff.commands(change.operations(self.pools))
        self._forget(change)
        batch = self._ledger.run(commands) if commands else Batch()
        self.standing.wants[change.whole.workspace] = change.whole
        for entry in entries:
            self._note(entry)
        self._retire(batch, {change.whole.index: change.whole.workspace})
        return messages.Done(request=request, changes=len(commands), microseconds=_since(began))

    def _forget(self, change: Change) -> None:
        """Connections of marks that come into use, see `_exchanged_marks`. Each walk through the table costs,
        so a name that is new altogether takes one for all its kinds of marks."""
        fresh = change.fresh
        if not self.adopted:
            fresh -= _marks(self._observe().things)
        elif len(change.owners) == 1 and not change.before.elements:
            self._conntrack.forget_mark(change.owners.pop(), build.OWNER)
            return
        self._conntrack.forget_marks(fresh)

    # ---- where names lead

    def set_nat(self, received: Received[messages.SetNat]) -> messages.Done:
        began = time.monotonic()
        entries = [self._checked(entry) for entry in received.message.entries]
        commands = build.nat(entries, self._leads(entries))
        if commands:
            self._ledger.run(commands)
        for entry in entries:
            self._note(entry)
        return messages.Done(
            request=received.message.request, changes=len(commands), microseconds=_since(began)
        )

    def _note(self, entry: NatEntry) -> None:
        key = _key(entry)
        if entry.real is None:
            self.standing.nat.pop(key, None)
        else:
            self.standing.nat[key] = entry
        self._named_nat.add(key)

    def _checked(self, entry: NatEntry) -> NatEntry:
        """The entry in canonical spelling. ProtocolError if it leads where no rule may lead."""
        try:
            mark, synthetic = Mark.of(entry.mark), ip_address(entry.synthetic)
            real = None if entry.real is None else ip_address(entry.real)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        place = self.pools.block_of(synthetic)
        if place is None or place[0] != mark.block:
            raise ProtocolError(f"{synthetic} is not an address of mark {entry.mark:#010x}")
        if real is not None and (real.version != synthetic.version or self._unreachable(real)):
            raise Refused(Reason.ADDRESS, f"{real} ({entry.comment}): {Reason.ADDRESS.text}")
        return NatEntry(entry.mark, str(synthetic), None if real is None else str(real), entry.comment)

    def _unreachable(self, address: IPv4Address | IPv6Address) -> bool:
        networks: tuple[IPv4Network | IPv6Network, ...]
        four, six = build.unreachable(self.pools)
        networks = four if address.version == 4 else six
        return any(address in network for network in networks)

    def _leads(self, entries: Iterable[NatEntry]) -> dict[NatKey, str]:
        """Where these lead at present, (mark, synthetic) -> real; asked of the kernel once after a start."""
        if not self.adopted and not self._translations_found:
            for entry in _translations(self._observe().things):
                self.standing.nat.setdefault(_key(entry), entry)
            self._translations_found = True
        standing = self.standing.nat
        found = {key: standing[key].real for key in map(_key, entries) if key in standing}
        return {key: real for key, real in found.items() if real is not None}

    # ---- open connections to real addresses

    def read_flows(self, received: Received[messages.ReadFlows]) -> Reply:
        want = self._workspace(received.message.workspace)
        led = self._conntrack.led(*_hosts_of(want))
        found = sorted((mark, str(address)) for mark, address in led)
        return _payload(received.message.request, msgspec.json.encode(found))

    def cut_flows(self, received: Received[messages.CutFlows]) -> messages.Done:
        began = time.monotonic()
        message = received.message
        want = self._workspace(message.workspace)
        places = {_checked_flow(mark, address, want) for mark, address in message.flows}
        self._close_ways({(mark, str(address)) for mark, address in places})
        count = self._conntrack.cut(places, *_hosts_of(want))
        return messages.Done(request=message.request, changes=count, microseconds=_since(began))

    def _close_ways(self, places: Collection[tuple[int, str]]) -> None:
        """No name may lead there any more, or the next connection would. The controller has seen to it."""
        self._leads(())
        ways = [entry for entry in self.standing.nat.values() if (entry.mark, entry.real) in places]
        gone = [NatEntry(way.mark, way.synthetic, None, way.comment) for way in ways]
        if gone:
            self._ledger.run(build.nat(gone, self._leads(gone)))
        for entry in gone:
            self._note(entry)

    # ---- links

    def open_link(self, received: Received[messages.OpenLink]) -> messages.Done:
        began = time.monotonic()
        message = received.message
        link = Link(message.link)
        descriptor = received.take()
        try:
            want = self._check_link(link, message.workspace)
            identity = self._verified(descriptor, message.owner)
            if self._links.leading_into(descriptor):  # one that was kept, and of which we know no identity
                raise Refused(Reason.NAMESPACE, f"a link leads into that namespace; {Reason.NAMESPACE.text}")
            lease = _lease(message)
            self._links.open(lease, want, namespace=descriptor)
        finally:
            os.close(descriptor)
        self.standing.hold(link, Lease(lease, identity), self.pools)
        self._named.add(link)
        return messages.Done(request=message.request, changes=1, microseconds=_since(began))

    def _verified(self, descriptor: int, owner: int, *, of: Link | None = None) -> Identity:
        """The identity of a namespace of that user that no link but `of` leads into, as far as we know."""
        leased = {lease.namespace for link, lease in self.standing.leases.items() if link != of}
        forbidden = self._forbidden | {namespace for namespace in leased if namespace is not None}
        return namespaces.verify(descriptor, owner=owner, forbidden=forbidden)

    def _check_link(self, link: Link, workspace: str) -> WorkspaceWant:
        want = self._workspace(workspace)
        if self.standing.taken(link, self.pools) or self._eraser.busy(link):
            raise Refused(Reason.LIMIT, f"{link.device} or its addresses are in use")
        return want

    def keep_link(self, received: Received[messages.KeepLink]) -> messages.Done:
        message = received.message
        link = Link(message.link)
        known = self.standing.leases.get(link)
        if message.workspace not in self.standing.wants:
            raise Refused(Reason.WORKSPACE, Reason.WORKSPACE.text)
        if not self._links.is_present(link):
            raise Refused(Reason.NAMESPACE, f"{link.device} is gone, and its sandbox with it")
        identity = known.namespace if known else None
        if received.descriptor is not None:
            identity = self._resumed(link, received.descriptor, message.owner, identity)
        self.standing.hold(link, Lease(_lease(message), identity), self.pools)
        self._named.add(link)
        return messages.Done(request=message.request)

    def _resumed(self, link: Link, descriptor: int, owner: int, known: Identity | None) -> Identity:
        """The identity of the namespace that this link leads into, if the descriptor is of that one. Its
        number alone (st_ino) would not do: the kernel gives it to another when the namespace is gone."""
        identity = self._verified(descriptor, owner, of=link)
        if known not in (None, identity) or not self._links.leads_into(link, descriptor):
            text = f"{link.device} does not lead into that namespace; {Reason.NAMESPACE.text}"
            raise Refused(Reason.NAMESPACE, text)
        return identity

    def close_link(self, received: Received[messages.CloseLink]) -> messages.LinkClosed:
        link = Link(received.message.link)
        lease, told = self.standing.leases.get(link), self._reports.of(link)
        if lease is not None or told is None:  # else it is closed, and whoever asked did not hear of it
            workspace = lease.want.workspace if lease else ""
            told = self._lost(link, workspace, self._close(link))
        return messages.LinkClosed(
            request=received.message.request, link=link.number, counters=told.counters, report=told.report
        )

    def _lost(self, link: Link, workspace: str, counters: dict[str, Count]) -> messages.LinkLost:
        report = messages.LinkLost(link=link.number, workspace=workspace, counters=counters)
        kept = self._reports.keep(report)
        assert isinstance(kept, messages.LinkLost)
        return kept

    def _close(self, link: Link) -> dict[str, Count]:
        counters = self._links.silence(link)
        self._eraser.erase(link, unused=counters.get("ok") == (0, 0))
        self.standing.release(link, self.pools)
        self._named.discard(link)
        return counters

    def _lose(self, link: Link, *, workspace: str = "") -> None:
        """Take a link away that nobody holds. `workspace`: as its rules tell, where we do not know."""
        lease = self.standing.leases.get(link)
        counters = self._close(link)
        self._send(self._lost(link, lease.want.workspace if lease else workspace, counters))

    def settle(self, received: Received[messages.Settle]) -> messages.Done:
        """Remove what this controller did not name; from now on `standing` is the whole truth."""
        began = time.monotonic()
        things = self._observe().things
        stale = {*self._links.present(), *_link_chains(things), *self.standing.leases} - self._named
        for link in sorted(stale):
            self._lose(link, workspace=_workspace_of(things, link, self.standing.wants))
        for key in self.standing.nat.keys() - self._named_nat:
            del self.standing.nat[key]
        self.adopted = True
        self._conntrack.resume()
        operations = self._restore()
        self._ledger.settled()
        return messages.Done(
            request=received.message.request, changes=len(stale) + len(operations), microseconds=_since(began)
        )

    # ---- what is counted and gone

    def _report(self, report: _Report) -> None:
        """Tell it now; and again to whoever asks, until it is heard."""
        self._send(self._reports.keep(report))

    def heard(self, received: Received[messages.Heard]) -> messages.Done:
        self._reports.heard(received.message.reports)
        if received.message.again:
            for report in self._reports.all():
                self._send(report)
        return messages.Done(request=received.message.request)

    # ---- reading

    def read_link(self, received: Received[messages.ReadLink]) -> messages.LinkSpent:
        link = Link(received.message.link)
        if link not in self.standing.leases:
            raise Refused(Reason.NAMESPACE, f"nobody holds {link.device}")
        counters, spent = self._links.spent(link)
        return messages.LinkSpent(
            request=received.message.request, link=link.number, counters=counters, spent=spent
        )

    def read_counters(self, received: Received[messages.ReadCounters]) -> Reply:
        return _payload(received.message.request, msgspec.json.encode(self._tallies.read()))

    def read_ruleset(self, received: Received[messages.ReadRuleset]) -> Reply:
        if received.message.json:
            return _payload(received.message.request, msgspec.json.encode(self._nft.list_json()))
        return _payload(received.message.request, self._nft.list_text().encode())

    def read_drift(self, received: Received[messages.ReadDrift]) -> Reply:
        found = [operation.describe() for operation in self._differences()]
        return _payload(received.message.request, msgspec.json.encode(found))

    def _differences(self) -> tuple[diff.Operation, ...]:
        """From what should be; by libnftables only where that cannot be said without."""
        desired = self.standing.desired(self.pools)
        if self._spellings.right(desired):
            return ()
        generation = self._spellings.generation()
        operations = diff.plan(self._observe(), desired)
        if not operations:
            self._spellings.learn(desired, generation)
        return operations

    def _observe(self) -> Observed:
        self._wake()
        return observe.parse(self._nft.list_json(), self._nft.list_chains())

    def _wake(self) -> None:
        """A table of ours that is dormant guards nothing, and cannot be listed (see `Nft.list_json`)."""
        flagged = self._dumps.flagged()
        for operation in diff.tables({family: f"{family} {TABLE}" not in flagged for family in FAMILIES}):
            self._ledger.run(operation.commands())
            self._tell(operation.describe(), process=_authors(self._ledger.foreign))

    # ---- what others change

    def watch(self, *, tick: bool) -> None:
        """Take in the kernel's events; read back and restore when something is not ours. `tick`: look
        even if nothing was heard. Never raises: what cannot be mended is told, and tried again."""
        for link in self._eraser.erased():
            self.auditing.pass_on(messages.LinkErased(link=link.number))
        try:
            self._watch_ruleset(tick=tick)
            self._watch_routing(tick=tick)
        except (EgressdError, OSError, ValueError) as error:
            self._fault(f"the gateway cannot be put right: {error}")
        else:
            self._told = ""

    def _fault(self, text: str) -> None:
        if text != self._told:
            log.error("%s", text)
            self._tell(text, restored=False)
        self._told = text

    def _watch_ruleset(self, *, tick: bool) -> None:
        if not self._ledger.look() or not self.adopted:
            return
        operations = self._restore()
        foreign = self._ledger.settled()
        if operations:
            what = "; ".join(operation.describe() for operation in operations)
            self._tell(what, process=_authors(foreign), lost=_lost(foreign))

    def _restore(self) -> tuple[diff.Operation, ...]:
        """Make the ruleset the desired one, in one batch."""
        operations = diff.plan(self._observe(), self.standing.desired(self.pools))
        if operations:
            self._ledger.run(diff.commands(operations))
        return operations

    def _watch_routing(self, *, tick: bool) -> None:
        now = time.monotonic()
        late = self.monitor.unrest.due(now)
        if late and (not self.adopted or any(Link(number) in self.standing.leases for number in late)):
            self._ledger.routing = True
        soon = not self._ledger.routing or now - self._looked < max(_PATIENCE, _REST * self._took)
        if soon and not tick:
            return
        done = []
        if tick:
            settings = (*gateway.GATEWAY_SETTINGS, *gateway.UPLINK_SETTINGS)
            done += [f"{key} was {before}" for key, (before, _) in sysctl.ensure(settings).items()]
        if not soon:
            self._ledger.routing = False
            done += self._mend_routing()
            self._looked = time.monotonic()
            self._took = self._looked - now
        if done:
            self._tell("; ".join(done))

    def _mend_routing(self) -> list[str]:
        """A sandbox's namespace takes its link along when it dies, before its lease ends: nothing to mend.
        It may do so while we look; then we look again."""
        present: dict[Link, Device] = {}
        try:
            present = self._links.present()
            live = present.keys() & self.standing.leases.keys() if self.adopted else present.keys()
            done = gateway.run(self._route, gateway.gateway_steps(self._route, links=self._links, live=live))
        except KernelError as error:
            # Links that come and go as fast as they are listed are no fault, unless there is no end to it.
            busy = isinstance(error, NetlinkError) and error.number == errno.EINTR
            self._interrupted = self._interrupted + 1 if busy else 0
            if self._interrupted > _INTERRUPTED or not (
                busy or self._links.present().keys() != present.keys()
            ):
                raise
            self._ledger.routing = True
            return []
        self._interrupted = 0
        return done

    def _tell(
        self, what: str, *, restored: bool = True, process: str = "", lost: dict[str, Count] | None = None
    ) -> None:
        log.warning("changed by %s: %s", process or "somebody else", what[:_TEXT])
        parts = list(_parts(lost or {})) or [{}]
        for part in parts:
            tampered = messages.Tampered(
                what=what[:_TEXT], restored=restored, process=process[:_TEXT], lost=part
            )
            self._report(tampered) if part else self._send(tampered)


# Everything this process can be asked to do.
HANDLERS: dict[type, Callable[[Warden, Received[Any]], Reply]] = {
    messages.SetWorkspaces: Warden.set_workspaces,
    messages.SetNat: Warden.set_nat,
    messages.Grant: Warden.grant,
    messages.Withdraw: Warden.withdraw,
    messages.OpenLink: Warden.open_link,
    messages.KeepLink: Warden.keep_link,
    messages.CloseLink: Warden.close_link,
    messages.ReadLink: Warden.read_link,
    messages.Settle: Warden.settle,
    messages.Heard: Warden.heard,
    messages.ReadCounters: Warden.read_counters,
    messages.ReadRuleset: Warden.read_ruleset,
    messages.ReadDrift: Warden.read_drift,
    messages.ReadFlows: Warden.read_flows,
    messages.CutFlows: Warden.cut_flows,
}

_MAPS = ("out4", "out6", "cidr4", "cidr6")
# Map or set that all share, whose elements' marks tell whose they are -> field of messages.Retired
_SETS = {"in": "replies", "opened": "opened"}
_BY_MARK = {"dial4": "dialled", "dial6": "dialled", **_SETS}
_RETIRED = ("elements", "dialled", "replies", "opened")
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_ELEMENTS_PER_MESSAGE = 300  # MAX_MESSAGE holds that many comments of the largest size


def _decode(data: bytes) -> dict[str, WorkspaceWant]:
    """ProtocolError for anything but a list of wants, each workspace once."""
    try:
        wants = msgspec.json.decode(data, type=list[WorkspaceWant])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ProtocolError(f"not a list of workspaces: {error}") from error
    found = {want.workspace: want for want in wants}
    if len(found) < len(wants):
        raise ProtocolError("a workspace is named twice")
    return found


def _lease(message: messages.OpenLink | messages.KeepLink) -> LinkWant:
    return LinkWant(
        link=Link(message.link),
        workspace=message.workspace,
        quota=message.quota,
        connections=message.connections,
        closed=message.closed,
    )


def _hosts_of(want: WorkspaceWant) -> tuple[int, int]:
    """(mark, mask) of every connection of hosts of this workspace, on the way to their real addresses."""
    first = int(Mark(kind=Kind.FORWARD, workspace=want.index, block=0))
    return first, 0xFFFF_FFFF & ~(BLOCKS - 1)


def _checked_flow(value: int, text: str, want: WorkspaceWant) -> tuple[int, IPv4Address | IPv6Address]:
    try:
        mark, address = Mark.of(value), ip_address(text)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
    if mark.workspace != want.index or mark.kind is not Kind.FORWARD:
        raise ProtocolError(f"mark {value:#010x} is not of a host of workspace {want.workspace}")
    return value, address


def _key(entry: NatEntry) -> NatKey:
    return entry.mark, entry.synthetic


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1e6)


def _failed(request: int, reason: Reason, text: str) -> messages.Failed:
    return messages.Failed(request=request, reason=str(reason), text=text[:_TEXT])


def _payload(request: int, data: bytes) -> tuple[messages.Payload, bytes]:
    return messages.Payload(request=request, payload_length=len(data)), data


def _add(one: Count, other: Count) -> Count:
    return one[0] + other[0], one[1] + other[1]


def _sum(sums: dict[str, dict[str, Count]], workspace: str, host: str, element: GoneElement) -> None:
    if element.count != (0, 0):
        kept = sums.setdefault(workspace, {})
        kept[host] = _add(kept.get(host, (0, 0)), element.count)


def _parts(counts: dict[str, Count]) -> Iterable[dict[str, Count]]:
    items = list(counts.items())
    for start in range(0, len(items), _ELEMENTS_PER_MESSAGE):
        yield dict(items[start : start + _ELEMENTS_PER_MESSAGE])


def _authors(batches: Iterable[Batch]) -> str:
    return ", ".join(sorted({batch.process for batch in batches if batch.process}))


def _lost(batches: Iterable[Batch]) -> dict[str, Count]:
    """Last counters of what others deleted: map and comment."""
    lost: dict[str, Count] = {}
    for batch in batches:
        for element in batch.elements:
            key = f"{element.name} {element.comment}".strip()
            lost[key] = _add(lost.get(key, (0, 0)), element.count)
    return {key: count for key, count in lost.items() if count != (0, 0)}


# ---- what stands, before the controller has said what should


def _link_chains(things: Objects) -> set[Link]:
    """Links whose guard chain stands, device or not."""
    named = (Link.of_device(key.name) for key in things if key.family == "netdev" and key.sort == "chain")
    return {link for link in named if link is not None}


def _workspace_of(things: Objects, link: Link, workspaces: Collection[str]) -> str:
    """Whose the link is, as its element in a shared set says, or the chains its guard jumps to; "" where that
    cannot be seen."""
    for thing in things.values():
        entry = thing.elements.get(string(link.device)) if isinstance(thing, Set) else None
        if entry is not None and entry.comment in workspaces:
            return entry.comment
    guards = [
        thing
        for key, thing in things.items()
        if isinstance(thing, Chain) and key.name.partition("_")[0] == link.device
    ]
    for name in workspaces:
        if any(guard.mentions(f"{name}_{digit}") for guard in guards for digit in "46"):
            return name
    return ""


def _translations(things: Objects) -> Iterable[NatEntry]:
    for name in ("real4", "real6"):
        found = things.get(Key("inet", "set", name))
        for text, entry in found.elements.items() if isinstance(found, Set) else ():
            mark, _, synthetic = text.partition(" . ")
            yield NatEntry(int(mark, 16), synthetic, entry.data, entry.comment)


def _turned(
    before: Mapping[str, WorkspaceWant], after: Mapping[str, WorkspaceWant]
) -> set[tuple[int, int, int]]:
    """(mark, protocol, port) of what is still allowed and goes another way now: to the inspector instead of
    straight on, or back. Its connections were made under other terms; conntrack would let them live on."""
    turned: set[tuple[int, int, int]] = set()
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            now = {(e.address, e.protocol, e.port): e.mark for e in after[name].elements}
            turned |= {
                (e.mark, _PROTOCOLS[e.protocol], e.port)
                for e in before[name].elements
                if now.get((e.address, e.protocol, e.port), e.mark) != e.mark
            }
    return turned


def _marks_of(wants: Mapping[str, WorkspaceWant]) -> set[int]:
    return {mark for want in wants.values() for element in want.elements for mark in build.marks(element)}


def _marks(things: Objects) -> set[int]:
    """Every mark that some workspace admits."""
    sets = [things.get(Key("inet", "set", name)) for name in ("in", "upstream")]
    return {int(text, 16) for found in sets if isinstance(found, Set) for text in found.elements}


def _without_links(observed: Observed, wants: Mapping[str, WorkspaceWant]) -> Observed:
    """What stands, less links, their parts of shared sets, translations, and workspaces that links still
    jump to though nobody wants them."""
    guards = [thing for key, thing in observed.things.items() if _of_link(key) and isinstance(thing, Chain)]
    things: Objects = {}
    for key, thing in observed.things.items():
        workspace = key.name.partition("_")[0]
        used = any(guard.mentions(f"{workspace}_{digit}") for guard in guards for digit in "46")
        if _of_link(key) or (key.family == "netdev" and used and workspace not in wants):
            continue
        if isinstance(thing, Set) and key.name in ("real4", "real6", "connections", "noisy"):
            things[key] = dataclasses.replace(thing, elements={})
        else:
            things[key] = thing
    return Observed(tables=observed.tables, things=things)


def _of_link(key: Key) -> bool:
    return Link.of_device(key.name.partition("_")[0]) is not None


# ---- the process


@dataclass(slots=True)
class Loop:
    """select(2) over the controller, the supervisor and the kernel's events."""

    warden: Warden
    supervisor: Channel[messages.TO_CHILD]
    beat: float = 0.0
    ticked: float = 0.0
    met: float = field(default_factory=time.monotonic)  # when there last was a controller

    def run(self) -> None:
        self.supervisor.send(messages.Ready())
        self.warden.while_listing(self._beat)
        while self.turn():
            pass

    def turn(self) -> bool:
        """Wait for something and deal with it; False without a supervisor, or long without a controller."""
        ready = self._wait()
        peers = {"controller": self.warden.connect, "audit": self.warden.auditing.connect}
        if self.supervisor in ready and not introduced(self.supervisor, peers):
            return False
        if self.warden.controller in ready:
            self.warden.hear()
        now = time.monotonic()
        tick = now - self.ticked >= _TICK
        self.warden.watch(tick=tick)
        if tick:
            self.ticked = now
        if self.warden.controller is not None:
            self.met = now
        elif now - self.met > _LONELY:
            # A channel that broke while both its ends live: the supervisor joins processes when they start.
            log.error("no controller for %g s: starting anew", _LONELY)
            return False
        self._beat()
        return True

    def _beat(self) -> None:
        """Also while everything is listed: with many links that takes as long as a hang is waited for."""
        now = time.monotonic()
        if now - self.beat >= messages.HEARTBEAT:
            self.beat = now
            with suppress(OSError):
                self.supervisor.send(messages.Heartbeat())

    def _wait(self) -> list[Any]:
        with selectors.PollSelector() as selector:
            things = (
                self.supervisor,
                self.warden.controller,
                self.warden.monitor.tables,
                self.warden.monitor.routing,
            )
            for thing in things:
                if thing is not None:
                    selector.register(thing, selectors.EVENT_READ)
            return [key.fileobj for key, _ in selector.select(timeout=_PATIENCE)]


def _others() -> set[Identity]:
    """Namespaces of the processes we come from: the host's. Asked while still root; where that is not
    allowed, their user namespace refuses them all the same."""
    found = set()
    for process in (1, os.getppid()):
        with suppress(OSError):
            status = os.stat(f"/proc/{process}/ns/net")  # noqa: PTH116 -- a magic link, not a path
            found.add((status.st_dev, status.st_ino))
    return found


def main(arguments: list[str] | None = None) -> int:
    forbidden = _others()
    start = begin("warden", arguments)
    auditing = Auditing.over("warden", start.take("audit"))
    try:
        warden = Warden(pools=start.config.pools.pools(), auditing=auditing, forbidden=forbidden)
    except EgressdError as error:
        log.error("%s", error)  # noqa: TRY400
        return 1
    warden.connect(start.take("controller"))
    Loop(warden, Channel(start.take("supervisor"), messages.TO_CHILD)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
