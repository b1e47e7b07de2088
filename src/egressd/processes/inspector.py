"""The inspector: lets a TLS connection through only if it asks for the host whose address it was sent to.

How connections arrive, and who they are from: `steered.py`. Workspace, block and port must together be a
*site*, which says the one name that is expected. The ClientHello is read (`tls/hello.py`); if it names that
host and hides nothing, the inspector dials and passes on what it has read, byte for byte. Otherwise the
connection is reset, nothing having been sent anywhere, and what was asked for is recorded. Until the server
has answered, a second ClientHello is watched for (`tls/retry.py`). Nothing is decrypted.

It knows no real address. It dials the synthetic addresses of the site's block, from the workspace's own
source address; the kernel looks that up again, and translates. So this process can reach nothing that policy
does not permit, whatever the bytes it reads make of it.

Must not: send a byte upstream before the name is known; log what was asked unescaped; hold more for one
sandbox than the limits say.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import select
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import msgspec

from egressd.ipc import messages
from egressd.ipc.channel import Received
from egressd.journal.records import Scalar
from egressd.model.errors import ProtocolError
from egressd.model.identities import Link
from egressd.model.names import quoted
from egressd.model.verdicts import Reason
from egressd.processes import ritual
from egressd.processes.dialing import Target
from egressd.processes.flows import Poller, Stop, keep_alive
from egressd.processes.steered import Denied, House, Limits, Program, Visit, spelled
from egressd.ruleset.layout import SLOTS, Pools, dial_source
from egressd.tls.hello import HelloReader, Named, Objection, read
from egressd.tls.retry import Ruling, Watch

__all__ = ["IDLE", "Inspector", "Sites", "main"]

log = logging.getLogger(__name__)

IDLE = 7200.0  # seconds without a byte after which a flow is reset, where the rule does not say
HELLO_WITHIN = 10.0  # seconds from accepting a connection to the last byte of its hello
DIAL_WITHIN = 10.0  # seconds for all attempts to connect
_HELLOS = 128  # of one sandbox, begun and not complete
_TOTAL = 8192
_CHUNK = 16_384  # bytes per read of a hello; nearly all come whole
_GROWN_UP = 5.0  # seconds: most connections are over before it pays to ask whether the peer is still there
_INCOMPLETE = Objection(Reason.HELLO_MALFORMED, "it ends in the middle")
_TOO_SLOW = Objection(Reason.HELLO_TOO_SLOW, "it is not complete in time")

Key = tuple[str, int, int]  # workspace, block, port


class _Visit(Visit):
    """First the hello, then as every visit."""

    __slots__ = (
        "_reader",
        "_said",
        "block",
        "counted",
        "grown_up",
        "named",
        "objection",
        "quiet_since",
        "site",
    )

    house: Sites

    def __init__(
        self,
        house: Sites,
        client: socket.socket,
        *,
        caller: tuple[Link, str],
        ends: tuple[str, str, int],
        block: int,
        site: messages.Site,
    ) -> None:
        source, destination, port = ends
        super().__init__(
            house, client, caller=caller, source=source, destination=destination, port=port, label=site.host
        )
        self.site, self.block = site, block
        self.named: Named | None = None
        self.objection: Objection | None = None
        self._said = bytearray()  # the hello so far, if it does not come in one piece
        self._reader: HelloReader | None = None  # if it does not come in one piece
        self.quiet_since, self.counted, self.grown_up = self.started, 0, False

    @property
    def key(self) -> Key:
        return self.workspace, self.block, self.port

    # ---- the hello

    def hear(self) -> None:
        """Read, perhaps, the whole hello."""
        try:
            data = self.client.recv(_CHUNK)
        except BlockingIOError:
            self.house.poller.watch(self.client.fileno(), select.EPOLLIN, self._client_hello)
            return
        except OSError:
            self.end("reset")
            return
        if not data:
            self._hung_up()
            return
        verdict = read(data) if self._reader is None else self._reader.feed(data)
        if isinstance(verdict, Objection):
            self.refuse(verdict)
        elif isinstance(verdict, Named):
            self._judge(verdict, bytes(self._said + data) if self._said else data)
        else:
            self._await_more(data)

    def _client_hello(self, events: int) -> None:
        if self.named is None:
            self.hear()
        else:
            self.client_event(events)

    def _await_more(self, data: bytes) -> None:
        if self._reader is None:
            self._reader = HelloReader()
            self._reader.feed(data)
        self._said += data
        self.house.poller.watch(self.client.fileno(), select.EPOLLIN, self._client_hello)

    def _hung_up(self) -> None:
        """A client that leaves before it has said anything wants nothing: not refused, and no error."""
        if self._said:
            self.refuse(_INCOMPLETE)
        else:
            self.end("unused")

    def _judge(self, named: Named, said: bytes) -> None:
        if named.name != self.site.host:
            self.refuse(Objection(Reason.SNI_OTHER, "it names another server", quoted(named.name)))
        elif named.ech and not self.site.ech:
            self.refuse(Objection(Reason.ECH, "it may hide another name", quoted(named.name)))
        else:
            self._let_through(named, said)

    def _let_through(self, named: Named, said: bytes) -> None:
        self.named, self._reader = named, None
        self._said.clear()
        self.house.hello_over(self)
        self.gate = gate = _Gate(self, named)
        rest = said[named.length :]
        try:
            self.first = said[: named.length] + gate.client(rest) if rest else said
        except Stop:
            self.end("refused")
            return
        self.dial(self.house.targets(self.site, self.destination))

    def refuse(self, objection: Objection) -> None:
        """Reset it, and say why."""
        self.house.refused(self, objection)
        self.end("refused")

    # ---- what time brings

    def look(self, now: float) -> None:
        """Once joined: is anything said at all?"""
        flow = self.flow
        if flow is None:
            return
        moved = flow.moved
        if moved != self.counted:
            self.counted, self.quiet_since = moved, now
        elif now - self.quiet_since > (self.site.idle or IDLE):
            self.end("idle")
            return
        if not self.grown_up and now - self.started > _GROWN_UP:
            self.grown_up = True
            with contextlib.suppress(OSError):  # whatever is wrong with it, epoll will say
                keep_alive(flow.client)
                keep_alive(flow.upstream)


class _Gate:
    """Holds back what might be a second hello, until the server has said that there is none."""

    __slots__ = ("_visit", "_watch", "over")

    def __init__(self, visit: _Visit, named: Named) -> None:
        self._visit, self._watch = visit, Watch(named)
        self.over = False

    def client(self, data: bytes) -> bytes:
        return self._pass(self._watch.client(data))

    def server(self, data: bytes) -> bytes:
        return self._pass(self._watch.server(data))

    def _pass(self, ruling: Ruling | Objection) -> bytes:
        if isinstance(ruling, Objection):
            self._visit.house.refused(self._visit, ruling)
            raise Stop("refused")
        self.over = ruling.over
        return ruling.forward


class Sites(House):
    """Which workspace may ask for which host where, and the flows that do."""

    dial_within: ClassVar[float] = DIAL_WITHIN
    denied_event: ClassVar[str] = "flow-refused"
    failed_event: ClassVar[str] = "flow-failed"
    closed_event: ClassVar[str] = "flow-closed"
    label: ClassVar[str] = "host"
    visits: set[_Visit]  # type: ignore[assignment]

    def __init__(self, poller: Poller, *, pools: Pools, auditing: ritual.Auditing, limits: Limits) -> None:
        super().__init__(poller, pools=pools, auditing=auditing, limits=limits)
        self._sites: dict[Key, messages.Site] = {}
        self._hellos: dict[_Visit, None] = {}  # in the order of their arrival
        self._hellos_of: defaultdict[Link, int] = defaultdict(int)
        self._targets = lru_cache(1 << 14)(lambda *key: list(_targets(pools, *key)))
        self.counts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))

    # ---- what the controller says

    def set_sites(self, sites: Iterable[messages.Site]) -> int:
        """These and no others. Returns how many connections had to be closed."""
        self._sites = {_key(site): site for site in sites}
        return self._revise(self.visits)

    def add_sites(self, sites: Iterable[messages.Site]) -> int:
        added = {_key(site): site for site in sites}
        changed = {key for key, site in added.items() if self._sites.get(key, site) != site}
        self._sites.update(added)
        return self._revise(v for v in self.visits if v.key in changed) if changed else 0

    def remove_sites(self, sites: Iterable[messages.Site]) -> int:
        """A site that has become another host's meanwhile is not the one that is meant."""
        gone = set()
        for site in sites:
            known = self._sites.get(_key(site))
            if known is not None and (known.host, known.index) == (site.host, site.index):
                del self._sites[_key(site)]
                gone.add(_key(site))
        return self._revise(v for v in self.visits if v.key in gone)

    def _revise(self, visits: Iterable[_Visit]) -> int:
        """Close those whose permission has ended; the others are under the new terms."""
        closed = 0
        for visit in list(visits):
            site = self._sites.get(visit.key)
            if site is not None and _permits(site, visit):
                visit.site = site
            else:
                visit.end("revoked")
                closed += 1
        return closed

    # ---- connections

    def _receive(
        self, client: socket.socket, caller: tuple[Link, str], block: int, ends: tuple[str, str, int]
    ) -> Reason | None:
        link, workspace = caller
        site = self._sites.get((workspace, block, ends[2]))
        if site is None:
            return Reason.UNLISTED
        full = self.no_room(link, workspace)
        if full is not None or self._hellos_of.get(link, 0) >= _HELLOS:
            return full or Reason.CONNECTIONS
        visit = _Visit(self, client, caller=caller, ends=ends, block=block, site=site)
        self.enter(visit)
        self._hellos[visit] = None
        self._hellos_of[link] += 1
        visit.hear()
        return None

    def hello_over(self, visit: _Visit) -> None:
        if visit in self._hellos:
            del self._hellos[visit]
            self._hellos_of[visit.link] -= 1
            if not self._hellos_of[visit.link]:
                del self._hellos_of[visit.link]

    def targets(self, site: messages.Site, asked: str) -> list[Target]:
        """The address that was asked for, then the block's others, the families taking turns."""
        return self._targets(site.index, site.block, asked, site.port)

    def leave(self, visit: Visit, how: str) -> None:
        assert isinstance(visit, _Visit)
        self.hello_over(visit)
        super().leave(visit, how)

    def _left(self, visit: Visit, how: str) -> None:
        assert isinstance(visit, _Visit)
        if visit.objection is None and visit.flow is None and visit.race is None:
            self.failed(visit, how)  # it ended before it had said what it wants
        else:
            super()._left(visit, how)

    # ---- records

    def refused(self, visit: _Visit, objection: Objection) -> None:
        visit.objection = objection
        self.counts[visit.workspace][str(objection.reason)] += 1
        details = {"host": visit.site.host, "asked": objection.asked, "detail": objection.detail}
        self.note(_denied(visit, objection.reason), details)

    def _deny(
        self,
        client: socket.socket,
        caller: tuple[Link, str] | None,
        ends: tuple[str, str, int],
        reason: Reason,
    ) -> None:
        if caller is not None:
            self.counts[caller[1]][str(reason)] += 1
        super()._deny(client, caller, ends, reason)

    def _details(self, visit: Visit) -> Mapping[str, Scalar]:
        return {"host": visit.label}

    def _asked(self, visit: Visit) -> Mapping[str, Scalar]:
        assert isinstance(visit, _Visit)
        assert visit.named is not None
        return {"asked": visit.named.name, "ech": visit.named.ech}

    def tell_totals(self) -> None:
        """Hosts that are no site any more are told once more, then forgotten: names that wildcards cover come
        and go, and nobody may fill the memory with them."""
        current = {(site.workspace, site.host) for site in self._sites.values()}
        for (workspace, host), total in list(self.totals.items()):
            if not total.told:
                total.told = True
                self.auditing.record(
                    "flow-totals",
                    {
                        "workspace": workspace,
                        "host": host,
                        "flows": total.flows,
                        "bytes_out": total.bytes_out,
                        "bytes_in": total.bytes_in,
                    },
                )
            if (workspace, host) not in current:
                del self.totals[workspace, host]

    # ---- what time brings

    def _look(self, now: float) -> None:
        late = []
        for visit in self._hellos:
            if now - visit.started <= HELLO_WITHIN:
                break
            late.append(visit)
        for visit in late:
            visit.refuse(_TOO_SLOW)
        for visit in list(self.visits):
            visit.look(now)


def _key(site: messages.Site) -> Key:
    return site.workspace, site.block, site.port


def _permits(site: messages.Site, visit: _Visit) -> bool:
    """Whether what has been let through, or may yet be, is what this site permits."""
    before = visit.site
    hides = visit.named is not None and visit.named.ech
    return (site.host, site.index) == (before.host, before.index) and (site.ech or not hides)


def _denied(visit: _Visit, reason: Reason) -> Denied:
    return Denied(
        "flow-refused", visit.link, visit.workspace, visit.source, visit.destination, visit.port, reason
    )


def _targets(pools: Pools, index: int, block: int, asked: str, port: int) -> Iterator[Target]:
    """RFC 8305 section 4: the address that was chosen, then the families by turns."""
    sources = [(spelled(address), 0) for address in dial_source(index)]
    slots = [[(spelled(pools.synthetic(block, slot)[f]), port) for slot in range(SLOTS)] for f in (0, 1)]
    family = int(":" in asked)
    for addresses in slots:
        if (asked, port) in addresses:
            addresses.remove((asked, port))
            addresses.insert(0, (asked, port))
    kinds = (socket.AF_INET, socket.AF_INET6)
    for slot in range(SLOTS):
        for chosen in (family, 1 - family):
            yield Target(kinds[chosen], slots[chosen][slot], sources[chosen])


class Inspector(Program):
    """The process."""

    receives: ClassVar[Any] = messages.TO_INSPECTOR

    def __init__(self, start: ritual.Start, *, limits: Limits) -> None:
        super().__init__(start, limits=limits)
        self._sites: msgspec.json.Decoder[list[messages.Site]] = msgspec.json.Decoder(list[messages.Site])
        for name in ("inspect4", "inspect6"):
            self.house.listen(start.take(name))

    def _open(self, pools: Pools, limits: Limits) -> Sites:
        self.sites = Sites(self.poller, pools=pools, auditing=self.auditing, limits=limits)
        return self.sites

    def _apply(self, received: Received[messages.TO_INSPECTOR]) -> messages.FROM_INSPECTOR:
        message, changes = received.message, 0
        if isinstance(message, messages.SetSites):
            changes = self._set(received.payload())
        elif isinstance(message, messages.AddSites):
            changes = self.sites.add_sites(message.sites)
        elif isinstance(message, messages.RemoveSites):
            changes = self.sites.remove_sites(message.sites)
        elif isinstance(message, messages.BindSource):
            self.sites.bind(Link(message.link), message.workspace, message.source4, message.source6)
        elif isinstance(message, messages.ReadRefused):  # a proof may be made of what was refused by now
            self.sites.tell_denied()
            counts = {workspace: dict(reasons) for workspace, reasons in self.sites.counts.items()}
            return messages.RefusedFlows(request=message.request, counts=counts)
        else:
            self.sites.unbind(Link(message.link))
        return messages.Done(request=message.request, changes=changes)

    def _set(self, payload: bytes) -> int:
        try:
            sites = self._sites.decode(payload)
        except (msgspec.DecodeError, ValueError) as error:
            raise ProtocolError(f"not a list of sites: {error}") from error
        self.sites.settle()
        return self.sites.set_sites(sites)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when told to stop, 1 when it could not begin."""
    try:
        start = ritual.begin("inspector", arguments)
        inspector = Inspector(start, limits=Limits(total=_TOTAL).within_process())
    except ProtocolError as error:
        print(f"egressd[inspector]: {error}", file=sys.stderr)
        return 1
    gc.freeze()  # what is imported stays: the collector need not look at it for every few connections
    log.info("ending: %s", inspector.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
