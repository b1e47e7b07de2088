"""What the guard logged, as records: whose packet it was, and many equal ones as one.

A denial is attributed to a link by the interface it came in on, else by its validated source address. A
forged source attributes nothing.

Floods: equal denials within a second are one record with the count of logged packets. The guard logs at a
bounded rate, so that count is a lower bound; the exact totals are the kernel's counters.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from egressd.journal import records
from egressd.journal.floods import Flood, Floods
from egressd.journal.records import Scalar
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.packets import headers, nflog
from egressd.processes.flow_accounts import Hosts
from egressd.processes.journal_file import Draft, timestamp
from egressd.ruleset.layout import ADMITTED, LINK_INDEX

__all__ = ["Attribution", "Denial", "PacketLog"]

Address = IPv4Address | IPv6Address
# Rules that a packet only meets after the guard has compared its source with the link's own addresses.
_SOURCE_VALIDATED = frozenset(
    {
        Reason.UNLISTED,
        Reason.PORT,
        Reason.ADDRESS,
        Reason.UNRESOLVED,
        Reason.CONNECTIONS,
        Reason.BUDGET_CONNECTIONS,
        Reason.INVALID,
    }
)
_REMEMBERED = 65_536  # links, and addresses of ended ones, kept for late log messages


@dataclass(frozen=True, slots=True)
class Denial:
    """What makes two denials equal."""

    event: str  # "denied", or "observed" where the packet went on
    workspace: str | None
    reason: Reason
    indev: int | None
    source: Address | None  # None where it is not validated: it may be another one in every packet
    destination: Address | None
    port: int | None
    protocol: str


class Attribution:
    """Which link a packet belongs to: by the interface it came in on, which nobody in a sandbox can choose;
    where that is not known, by a source address that the guard has validated."""

    def __init__(self) -> None:
        self._sources: dict[Address, tuple[Link, str]] = {}
        self._ended: OrderedDict[Address, tuple[Link, str]] = OrderedDict()
        self._workspaces: OrderedDict[Link, str] = OrderedDict()

    def bind(self, link: Link, workspace: str, *addresses: Address) -> None:
        self._workspaces[link] = workspace
        self._workspaces.move_to_end(link)
        _bound(self._workspaces)
        for address in addresses:
            self._sources[address] = (link, workspace)
            self._ended.pop(address, None)

    def unbind(self, link: Link) -> None:
        """The link is gone; what it did last may still be under way, so it is remembered as ended."""
        for address in [a for a, (bound, _) in self._sources.items() if bound == link]:
            self._ended[address] = self._sources.pop(address)
            _bound(self._ended)

    def unbind_all(self) -> None:
        for link in {link for link, _ in self._sources.values()}:
            self.unbind(link)

    def owner(self, address: Address) -> tuple[Link, str] | None:
        """The link, and its workspace, whose source address this is, or was until lately."""
        return self._sources.get(address) or self._ended.get(address)

    def workspace_of(self, denial: Denial) -> str | None:
        """What was lost past the guard was logged by a rule that knows no workspace: its link's."""
        link = self.link_of(denial) if denial.workspace is None else None
        return denial.workspace if link is None else self._workspaces.get(link)

    def link_of(self, denial: Denial) -> Link | None:
        """None where nothing says whose it was, or where what is known of the link contradicts the rule
        that logged it."""
        link = _link_at(denial.indev)
        if link is not None:
            known = self._workspaces.get(link, denial.workspace)
            return link if denial.workspace in (None, known) else None
        if denial.source is None:
            return None
        found = self.owner(denial.source)
        return found[0] if found is not None and found[1] == denial.workspace else None


def _link_at(index: int | None) -> Link | None:
    try:
        return None if index is None else Link(index - LINK_INDEX)
    except ValueError:
        return None


def _bound(mapping: OrderedDict[Any, Any]) -> None:
    while len(mapping) > _REMEMBERED:
        mapping.popitem(last=False)


class PacketLog:
    """From datagrams of the kernel's packet log to drafts of records. `lost` is added up by the reader."""

    def __init__(self, attribution: Attribution, hosts: Hosts | None = None) -> None:
        self._attribution, self._hosts = attribution, hosts or Hosts()
        self._floods: Floods[Denial, tuple[nflog.Logged, headers.Attempt]] = Floods()
        self._sequence: dict[int, int] = {}
        self.lost = 0  # packets the kernel logged and could not hand over
        self.malformed = 0

    def read(self, datagram: bytes, *, now: float) -> list[Draft]:
        """`now` on a monotonic clock."""
        drafts = []
        for message in nflog.parse(datagram):
            if isinstance(message, nflog.Logged):
                drafts += self._logged(message, now)
            elif isinstance(message, nflog.Malformed):
                self.malformed += 1
        return drafts

    def _logged(self, logged: nflog.Logged, now: float) -> list[Draft]:
        self._count_lost(logged)
        attempt = headers.parse(logged.payload, ethertype=logged.ethertype)
        over = self._floods.add(_denial(logged, attempt), (logged, attempt), now=now)
        return [self._draft(flood) for flood in over]

    def _count_lost(self, logged: nflog.Logged) -> None:
        if logged.sequence is None:
            return
        expected = self._sequence.get(logged.group)
        self._sequence[logged.group] = (logged.sequence + 1) & 0xFFFF_FFFF
        if expected is not None:
            gap = (logged.sequence - expected) & 0xFFFF_FFFF
            if gap < 1 << 31:  # more is a group that was bound anew and counts from 0
                self.lost += gap

    def due(self, *, now: float) -> list[Draft]:
        return [self._draft(flood) for flood in self._floods.due(now=now)]

    def drain(self) -> list[Draft]:
        return [self._draft(flood) for flood in self._floods.drain()]

    def _draft(self, flood: Flood[Denial, tuple[nflog.Logged, headers.Attempt]]) -> Draft:
        denial, (logged, attempt) = flood.key, flood.detail
        link, workspace = self._attribution.link_of(denial), self._attribution.workspace_of(denial)
        fields: dict[str, Scalar] = {
            "link": link.device if link else None,
            "workspace": workspace,
            "reason": str(denial.reason),
            "protocol": denial.protocol,
            "source": _text(attempt.source),
            "destination": _text(denial.destination),
            "port": denial.port,
            "packets": flood.count,
        }
        if denial.destination is not None:
            host = self._hosts.named(workspace, denial.destination)
            if host is not None:  # a name's own address, on a port that no rule has
                fields["host"] = host
        if link is None:
            fields["interface_index"] = denial.indev
        if workspace is None:
            fields["prefix"] = logged.prefix
        if flood.count > 1:
            fields["seconds"] = round(flood.last - flood.first, 3)
            fields["note"] = "logged packets; exact totals are in the kernel's counters"
        fields.update(_details(attempt))
        return Draft(timestamp(logged.time), "auditor", denial.event, records.bounded(fields))


def _denial(logged: nflog.Logged, attempt: headers.Attempt) -> Denial:
    about = nflog.subject(logged.prefix)
    let_through = about.workspace is not None and logged.mark & ADMITTED  # past the guard, all have a mark
    return Denial(
        event="observed" if let_through else "denied",
        workspace=about.workspace,
        reason=about.reason,
        indev=logged.indev,
        source=attempt.source if about.reason in _SOURCE_VALIDATED else None,
        destination=attempt.destination,
        port=attempt.destination_port,
        protocol=attempt.protocol,
    )


def _details(attempt: headers.Attempt) -> dict[str, Scalar]:
    """Of the first packet, what is out of the ordinary."""
    found: dict[str, Scalar] = {}
    if attempt.tcp_flags and attempt.tcp_flags != ("syn",):
        found["tcp_flags"] = " ".join(attempt.tcp_flags)
    if attempt.icmp_type is not None:
        found["icmp_type"], found["icmp_code"] = attempt.icmp_type, attempt.icmp_code
    for name in ("fragment", "options", "truncated"):
        if getattr(attempt, name):
            found[name] = True
    return found


def _text(address: Address | None) -> str | None:
    return None if address is None else str(address)
