"""Flow records: who talked to whom, from what the kernel tells at the end of each connection.

The kernel says addresses, a mark and counters. The mark names the rule (workspace and block), the source
address names the link, `NameBlocks` of the controller say which host a block is. Nothing here asks anybody.

What each kind means, and where its `out` packets are counted as well:

    host      forwarded and translated: a listed or granted name         the link's `ok`
    local     carried by the relay to a service of the host              the link's `ok`
    direct    forwarded as addressed: `cidr`, or an open guard           the link's `ok`
    read      the sandbox's half of what the inspector carries           the link's `ok`
    dialled   the inspector's half of it; belongs to no link             `dial4`, `dial6`
    unknown   a mark that is none of ours: somebody changed it           the link's `ok`

Questions to the resolver are counted per link and not recorded one by one.

**Flows against the guard's counter.** A packet is counted as `ok` at the ingress of its link, and by
connection tracking only when it has come to belong to a connection. So for a link that has ended, over all
its entries: recorded <= ok, in packets and bytes, always; and ok - recorded is exactly

* packets admitted that connection tracking calls invalid (`late_invalid`: of no connection, bad checksum,
  broken header), or that the kernel drops before it asks (a bad IP header);
* first packets of connections that were refused later (`late_connections`, `late_pace`, `late_inspector`,
  `late_unresolved`, `late_misrouted`): the entry was never confirmed, so there is no event;
* errors of ICMP about a connection, which belong to it and are not counted by it;
* of bytes alone: what trails the packet inside the frame (Ethernet padding), cut off after ingress;
* whatever was in events that this process did not get to read (`lost`, cause flows-enobufs).

Without any of these it is zero. tests/kernel/test_flow_facts.py shows each of them on a real kernel.

Many equal flows within a second (same link, host, protocol, destination, port) are recorded one by one up to
`_EACH` and then as one record with `flows`, exact sums, the longest duration, and no source port. More than
`_LINK` records a second of one link, or `_ALL` of all of them, are summed by host and protocol alone: who
begins connections without end is not to crowd out what others did.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Protocol, TypeAlias

from egressd.journal import records
from egressd.journal.records import Scalar
from egressd.model.identities import Link
from egressd.packets import conntrack_events
from egressd.packets.conntrack_events import ICMP, ICMPV6, TCP, UDP, Ended, Tally
from egressd.processes.journal_file import Draft, timestamp
from egressd.ruleset.layout import DIAL4, DIAL6, UNLISTED_BLOCK, Kind, Mark, Pools, begun_with

__all__ = ["FlowLog", "Hosts", "LinkSums", "Owner"]

Address: TypeAlias = IPv4Address | IPv6Address

_PROTOCOLS = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "icmpv6", 132: "sctp", 33: "dccp"}
_KINDS = {Kind.FORWARD: "host", Kind.RELAY: "local", Kind.INSPECT: "read", Kind.DIRECT: "direct"}
_EACH, _LINK, _ALL = 20, 200, 5000  # records a second: of equal flows, of one link, of all links
_WINDOW = 1.0  # seconds
_SLACK = 2_000_000_000  # nanoseconds: a name's news may reach us that much after its first connection
_FORMER = 4  # hosts remembered of one block
_MAX_LINKS = 65_536
_SETTLE_WITHIN = 10.0  # seconds to wait for a closed link's last events
_NONE = Tally(0, 0)


class Owner(Protocol):
    """Whose an address is, or lately was; see auditor.Attribution."""

    def owner(self, address: Address) -> tuple[Link, str] | None: ...


# ---- which host a block is


class Hosts:
    """What `NameBlocks` said. A name that is not said again still names what is under way; a block that
    becomes another host's keeps the former one for connections that began before."""

    def __init__(self, pools: Pools | None = None) -> None:
        self._pools = pools or Pools()
        self._workspaces: dict[int, str] = {}  # index -> workspace
        self._blocks: dict[str, dict[int, list[tuple[int, str]]]] = {}  # (since, host), the latest last

    def learn(self, workspace: str, index: int, hosts: Mapping[int, str], *, now: int) -> None:
        """`now`: nanoseconds since 1970, as the kernel stamps connections."""
        if self._workspaces.get(index) != workspace:
            self._blocks.pop(self._workspaces.get(index, ""), None)  # its number is another's now
            self._workspaces[index] = workspace
            self._blocks.pop(workspace, None)
        blocks = self._blocks.setdefault(workspace, {})
        for block, host in hosts.items():
            known = blocks.setdefault(block, [])
            if not known or known[-1][1] != host:
                known.append((now, host))
                del known[:-_FORMER]

    def workspace(self, index: int) -> str | None:
        return self._workspaces.get(index)

    def host(self, workspace: str | None, mark: Mark, *, began: int | None = None) -> str | None:
        """None where nobody said, or where what was said is of another workspace."""
        if workspace is None or self._workspaces.get(mark.workspace) != workspace:
            return None
        if mark.block == UNLISTED_BLOCK:
            return "(unlisted)"
        return self._at(workspace, mark.block, began)

    def named(self, workspace: str | None, address: Address) -> str | None:
        """The host that a synthetic address stands for in a workspace."""
        place = self._pools.block_of(address)
        return None if place is None or workspace is None else self._at(workspace, place[0], None)

    def _at(self, workspace: str, block: int, began: int | None) -> str | None:
        known = self._blocks.get(workspace, {}).get(block, [])
        for since, host in reversed(known):
            if began is None or began + _SLACK >= since:
                return host
        return known[0][1] if known else None


# ---- what the flows of a link come to


@dataclass(slots=True)
class LinkSums:
    """`out`, `back`: of all its entries, the resolver's included; `asked`, `answered`: of the resolver's."""

    flows: int = 0
    questions: int = 0
    out: Tally = _NONE
    back: Tally = _NONE
    asked: Tally = _NONE
    answered: Tally = _NONE
    uncounted: int = 0  # entries of which the kernel did not say what they carried

    def add(self, ended: Ended, *, question: bool) -> None:
        out, back = ended.out or _NONE, ended.back or _NONE
        self.uncounted += ended.out is None or ended.back is None
        self.out, self.back = _sum(self.out, out), _sum(self.back, back)
        if question:
            self.questions += 1
            self.asked, self.answered = _sum(self.asked, out), _sum(self.answered, back)
        else:
            self.flows += 1


@dataclass(slots=True)
class _Closing:
    """A link whose end was told, and whose last events may still come."""

    time: str
    workspace: Scalar
    ok: Tally | None
    until: float  # monotonic seconds
    whole: bool  # was this process there for all of the link's life?
    erased: bool = False


# ---- many equal flows


@dataclass(frozen=True, slots=True)
class _Key:
    """What makes two flows equal."""

    link: Link | None
    workspace: str | None
    host: str | None
    kind: str
    protocol: str
    source: Address
    destination: Address | None
    port: int | None
    address: Address | None
    address_port: int | None

    def broad(self) -> _Key:
        """The same without where it went: by host and protocol alone."""
        return _Key(
            self.link, self.workspace, self.host, self.kind, self.protocol, self.source,
            None, None, None, None,
        )  # fmt: skip


@dataclass(slots=True)
class _Many:
    flows: int = 0
    out: Tally = _NONE
    back: Tally = _NONE
    seconds: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class _Window:
    """One second of flows."""

    began: float = 0.0
    equal: Counter[_Key] = field(default_factory=Counter)
    of_link: Counter[tuple[Link | None, str | None]] = field(default_factory=Counter)
    of_all: int = 0
    sums: OrderedDict[_Key, _Many] = field(default_factory=OrderedDict)

    def place(self, key: _Key) -> _Key | None:
        """None: a record of its own; else what it is to be added to."""
        if key in self.sums:
            return key
        whose = (key.link, key.workspace)
        if self.of_link[whose] >= _LINK or self.of_all >= _ALL:
            return key.broad()
        self.of_link[whose] += 1
        self.of_all += 1
        self.equal[key] += 1
        return None if self.equal[key] <= _EACH else key


class FlowLog:
    """From datagrams of connection tracking to drafts of records. What it could not read is added up in
    `malformed` and `uncounted`, to be taken by the reader."""

    def __init__(self, owner: Owner, hosts: Hosts, *, submit: Callable[[Draft], object]) -> None:
        self._owner, self.hosts, self._submit = owner, hosts, submit
        self._sums: OrderedDict[Link, LinkSums] = OrderedDict()
        self._whole: set[Link] = set()
        self._closing: OrderedDict[Link, _Closing] = OrderedDict()
        self._erased: OrderedDict[Link, None] = OrderedDict()
        self._window = _Window()
        self.malformed = self.uncounted = 0

    # ---- events of the kernel

    def read(self, datagram: bytes, *, now: float) -> None:
        """`now` on a monotonic clock."""
        for event in conntrack_events.parse(datagram):
            if isinstance(event, Ended):
                self._ended(event, now)
            elif isinstance(event, conntrack_events.Malformed):
                self.malformed += 1

    def _ended(self, ended: Ended, now: float) -> None:
        mark, source = _mark(ended.mark), ended.original.source
        dialled = source in (DIAL4 if source.version == 4 else DIAL6)
        link, workspace = (None, None) if dialled else (self._owner.owner(source) or (None, None))
        if mark is None and link is None:
            return  # nothing of a sandbox's: the gateway's own
        question = mark is not None and mark.kind is Kind.RESOLVE
        if link is not None:
            self._of(link).add(ended, question=question)
        if question:
            return
        self.uncounted += ended.out is None or ended.back is None
        workspace = workspace or (self.hosts.workspace(mark.workspace) if mark else None)
        kind = "dialled" if dialled else _KINDS[mark.kind] if mark else "unknown"
        host = self.hosts.host(workspace, mark, began=ended.began) if mark else None
        self._flow(_key(ended, link, workspace, host, kind), ended, now)

    def _of(self, link: Link) -> LinkSums:
        sums = self._sums.get(link)
        if sums is None:
            sums = self._sums[link] = LinkSums()
            if len(self._sums) > _MAX_LINKS:
                self._sums.popitem(last=False)
        return sums

    def _flow(self, key: _Key, ended: Ended, now: float) -> None:
        self.due(now=now)
        seconds = _seconds(ended)
        together = self._window.place(key)
        if together is None:
            self._submit(_one(key, ended, seconds))
            return
        many = self._window.sums.setdefault(together, _Many())
        many.flows += 1
        many.out = _sum(many.out, ended.out or _NONE)
        many.back = _sum(many.back, ended.back or _NONE)
        many.seconds = max(many.seconds, seconds or 0.0)
        many.last = max(many.last, (ended.ended or 0) / 1e9)

    def due(self, *, now: float) -> None:
        """Hand out what was summed, once its second is over."""
        if now - self._window.began >= _WINDOW:
            self.drain()
            self._window.began = now

    def drain(self) -> None:
        """All of it, at an end."""
        for key, many in self._window.sums.items():
            self._submit(_several(key, many))
        self._window = _Window(began=self._window.began)

    # ---- links that begin and end

    def opening(self, link: Link) -> None:
        """This process hears of a link from its beginning."""
        self._whole.add(link)

    def erased(self, link: Link) -> None:
        """The kernel has forgotten its connections; the events of all of them are in the socket."""
        self._erased[link] = None
        while len(self._erased) > _MAX_LINKS:
            self._erased.popitem(last=False)

    def closed(self, link: Link, fields: Mapping[str, Any], *, at: str, now: float) -> None:
        """The controller has told a link's end and its last counters."""
        packets, octets = fields.get("ok_packets"), fields.get("ok_bytes")
        known = isinstance(packets, int) and isinstance(octets, int)
        self._closing[link] = _Closing(
            time=at,
            workspace=_scalar(fields.get("workspace")),
            ok=Tally(packets, octets) if known else None,  # type: ignore[arg-type]
            until=now + _SETTLE_WITHIN,
            whole=link in self._whole,
        )

    def awaits(self, link: Link) -> bool:
        """Its end was told, and more may come of it."""
        return link in self._closing

    def settle(self, *, now: float, empty: bool) -> None:
        """Write `link-flows` of every closed link of which no more is to come. `empty`: everything the
        kernel had told by now has been read."""
        if empty:
            for link in [link for link in self._closing if link in self._erased]:
                self._closing[link].erased = True
        for link in [link for link, closing in self._closing.items() if self._over(link, closing, now)]:
            self._compare(link, self._closing.pop(link))
            self._sums.pop(link, None)
            self._erased.pop(link, None)
            self._whole.discard(link)

    def _over(self, link: Link, closing: _Closing, now: float) -> bool:
        """Recorded never exceeds ok, so at equality nothing is missing."""
        complete = closing.ok is not None and self._sums.get(link, LinkSums()).out == closing.ok
        return complete or closing.erased or now >= closing.until

    def settle_all(self) -> None:
        """At an end: what is known now."""
        self.settle(now=float("inf"), empty=True)

    def _compare(self, link: Link, closing: _Closing) -> None:
        """`link-flows`; and an alarm, should the law above not hold."""
        sums = self._sums.get(link, LinkSums())
        short = None if closing.ok is None else _less(closing.ok, sums.out)
        self._submit(Draft(closing.time, "auditor", "link-flows", _link_flows(link, closing, sums, short)))
        if short is not None and min(short) < 0:
            text = (
                f"flows of {link.device}: {-short.packets} packets, {-short.bytes} bytes beyond its counter"
            )
            fields: dict[str, Scalar] = {
                "differences": text, "link": link.device, "workspace": closing.workspace,
            }  # fmt: skip
            self._submit(Draft(closing.time, "auditor", "books-unbalanced", records.bounded(fields)))


def _link_flows(link: Link, closing: _Closing, sums: LinkSums, short: Tally | None) -> dict[str, Scalar]:
    fields: dict[str, Scalar] = {
        "link": link.device,
        "workspace": closing.workspace,
        "flows": sums.flows,
        "questions": sums.questions,
        **_counts("out", sums.out),
        **_counts("in", sums.back),
        **_counts("question", sums.asked),
        **_counts("answer", sums.answered),
        **_counts("ok", closing.ok),
        **_counts("unrecorded", short),
    }
    if not closing.whole or not (closing.erased or sums.out == closing.ok):
        # The link is older than this process, or nobody said that all had been told: not all is in the sums.
        fields["partial"] = True
    if sums.uncounted:
        fields["uncounted"] = sums.uncounted
    return records.bounded(fields)


def _mark(value: int) -> Mark | None:
    try:
        return Mark.of(begun_with(value))
    except ValueError:
        return None


def _key(ended: Ended, link: Link | None, workspace: str | None, host: str | None, kind: str) -> _Key:
    """`address` is the real one: where the entry led, if it led out."""
    original, reply = ended.original, ended.reply
    led_out = kind in ("host", "direct", "dialled")
    return _Key(
        link=link,
        workspace=workspace,
        host=host,
        kind=kind,
        protocol=_PROTOCOLS.get(ended.protocol, f"protocol-{ended.protocol}"),
        source=original.source,
        destination=original.destination,
        port=original.destination_port,
        address=reply.source if led_out else None,
        address_port=reply.source_port if led_out else None,
    )


def _one(key: _Key, ended: Ended, seconds: float | None) -> Draft:
    fields = _fields(key, source_port=ended.original.source_port)
    fields |= {**_counts("out", ended.out), **_counts("in", ended.back), "seconds": seconds}
    if ended.original.icmp_type is not None:
        fields["icmp_type"] = ended.original.icmp_type
    at = None if ended.ended is None else ended.ended / 1e9
    return Draft(timestamp(at), "auditor", "flow", records.bounded(fields))


def _several(key: _Key, many: _Many) -> Draft:
    fields = _fields(key, source_port=None)
    fields |= {**_counts("out", many.out), **_counts("in", many.back), "seconds": many.seconds}
    fields["flows"] = many.flows
    return Draft(timestamp(many.last or None), "auditor", "flow", records.bounded(fields))


def _fields(key: _Key, *, source_port: int | None) -> dict[str, Scalar]:
    return {
        "link": None if key.link is None else key.link.device,
        "workspace": key.workspace,
        "host": key.host,
        "kind": key.kind,
        "protocol": key.protocol,
        "source": str(key.source),
        "source_port": source_port,
        "destination": _text(key.destination),
        "port": key.port,
        "address": _text(key.address),
        "address_port": key.address_port,
    }


def _counts(name: str, tally: Tally | None) -> dict[str, Scalar]:
    packets, octets = tally or (None, None)
    return {f"{name}_packets": packets, f"{name}_bytes": octets}


def _seconds(ended: Ended) -> float | None:
    if ended.began is None or ended.ended is None:
        return None
    return round(max(0, ended.ended - ended.began) / 1e9, 6)


def _sum(one: Tally, other: Tally) -> Tally:
    return Tally(one.packets + other.packets, one.bytes + other.bytes)


def _less(one: Tally, other: Tally) -> Tally:
    return Tally(one.packets - other.packets, one.bytes - other.bytes)


def _text(address: Address | None) -> str | None:
    return None if address is None else str(address)


def _scalar(value: Any) -> Scalar:
    return value if isinstance(value, str) else None
