"""Links, addresses, neighbours, routes and rules as values: each says what it is, and how to make and
remove it. `Tables` reads what a namespace has in the same values, so that want and have can be compared.

Everything egressd makes carries routing protocol number 53 (`proto 53` in `ip route` and `ip rule`).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Protocol, TypeAlias

from egressd.kernel.netlink import CREATE, DUMP, REPLACE, Netlink, Request, attribute, attributes, encode
from egressd.kernel.rtmessages import fibmsg, ifaddrmsg, ifinfmsg, ndmsg, rtmsg

__all__ = [
    "Address", "Device", "Indexes", "Neighbour", "Route", "Rule", "Tables", "Thing", "name_of", "other_end",
    "received",
]  # fmt: skip

AnyAddress: TypeAlias = IPv4Address | IPv6Address
AnyNetwork: TypeAlias = IPv4Network | IPv6Network
Indexes: TypeAlias = Mapping[str, int]  # device name -> ifindex

PROTOCOL = 53  # ours; linux/rtnetlink.h leaves 4 to 255 to user space
MAIN, LOCAL = 254, 255
IFF_UP, IFF_NOARP = 0x1, 0x80  # linux/if.h
# linux/rtnetlink.h
NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWRULE, DELRULE, GETRULE = 32, 33, 34
_IFLA_STATS64, _IFLA_LINK_NETNSID = 23, 37  # linux/if_link.h
_IFLA_EXT_MASK, _SKIP_STATS = 29, struct.pack("=I", 1 << 3)  # RTEXT_FILTER_SKIP_STATS: half of a device
_NUD_PERMANENT = 0x80  # linux/neighbour.h
_IFA_F_NODAD, _IFA_F_PERMANENT, _IFA_F_NOPREFIXROUTE = 0x02, 0x80, 0x200  # linux/if_addr.h
_TO_TABLE, _PROHIBIT = 1, 8  # linux/fib_rules.h
_ONLINK, _CLONED = 4, 0x200  # RTNH_F_ONLINK, RTM_F_CLONED
_KINDS = {"unicast": 1, "local": 2, "blackhole": 6, "unreachable": 7, "prohibit": 8}
_KIND_NAMES = {number: name for name, number in _KINDS.items()}
_KERNEL = 2  # RTPROT_KERNEL: routes that come and go with an address
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_HOST = 0, 253, 254
_NO_METRIC = 1024  # what IPv6 gives a route without one (IP6_RT_PRIO_USER)
_EXISTS = frozenset({errno.EEXIST})
_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL})


class Thing(Protocol):
    """What all values of this file can do."""

    def describe(self) -> str: ...
    def make(self, indexes: Indexes) -> Request: ...
    def remove(self, indexes: Indexes) -> Request: ...


@dataclass(frozen=True, slots=True, order=True)
class Rule:
    """`ip rule`: packets with this mark, from this device, look here. `table` None prohibits."""

    family: int
    preference: int
    table: int | None
    mark: int = 0  # value and mask both; 0: any
    device: str = ""  # "": any
    source: str = ""  # a network; "": any
    mask: int = 0  # of the mark, where it differs from it (only ever seen in foreign rules)
    odd: str = ""  # selectors and actions that ours never have, as the kernel showed them
    raw: bytes = field(default=b"", compare=False, repr=False)  # as the kernel showed it

    def describe(self) -> str:
        mark = f" fwmark {self.mark:#x}/{self.mask or self.mark:#x}" if self.mark or self.mask else ""
        device = f" iif {self.device}" if self.device else ""
        device = f" from {self.source}{device}" if self.source else device
        action = "prohibit" if self.table is None else f"lookup {_table_name(self.table)}"
        odd = f" ({self.odd})" if self.odd else ""
        return f"ip {_flag(self.family)} rule {self.preference}:{mark}{device} {action}{odd}"

    def make(self, indexes: Indexes) -> Request:
        # EXCLUSIVE: the kernel would otherwise accept the same rule twice (fib_newrule).
        return Request(NEWRULE, self._body(), f"add {self.describe()}", CREATE | 0x200, _EXISTS)

    def remove(self, indexes: Indexes) -> Request:
        return Request(DELRULE, self.raw or self._body(), f"delete {self.describe()}", 0, _GONE)

    def _body(self) -> bytes:
        attrs: list[tuple[str, object]] = [("FRA_PRIORITY", self.preference), ("FRA_PROTOCOL", PROTOCOL)]
        if self.mark or self.mask:
            attrs += [("FRA_FWMARK", self.mark), ("FRA_FWMASK", self.mask or self.mark)]
        if self.device:
            attrs.append(("FRA_IIFNAME", self.device))
        source = ipaddress.ip_network(self.source) if self.source else None
        if source is not None:
            attrs.append(("FRA_SRC", str(source.network_address)))
        if self.table is not None:
            attrs.append(("FRA_TABLE", self.table))
        action = _PROHIBIT if self.table is None else _TO_TABLE
        table = self.table if self.table is not None and self.table < 256 else 0
        length = 0 if source is None else source.prefixlen
        return encode(fibmsg, attrs, family=self.family, src_len=length, table=table, action=action)


@dataclass(frozen=True, slots=True)
class Route:
    """`ip route`. `via` None: on the link itself. `metric` 0: the family's default."""

    network: AnyNetwork
    device: str = ""
    table: int = MAIN
    kind: str = "unicast"
    via: AnyAddress | None = None
    metric: int = 0
    proto: int = PROTOCOL
    mtu: int = 0  # bytes; 0: the device's

    @property
    def family(self) -> int:
        return _family(self.network)

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two routes the same for us: not the protocol, and not the device the kernel shows
        for IPv6 routes that reject."""
        return *self.place, self.mtu

    @property
    def place(self) -> tuple[object, ...]:
        """The same without what can be changed in place: to make a route replaces the one there."""
        rejects = self.kind not in ("unicast", "local")
        device = "" if rejects else self.device
        return self.network, device, self.table, self.kind, self.via, self.metric

    def describe(self) -> str:
        via = f" via {self.via}" if self.via else ""
        device = f" dev {self.device}" if self.device else ""
        kind = "" if self.kind == "unicast" else f"{self.kind} "
        table = "" if self.table == MAIN else f" table {_table_name(self.table)}"
        mtu = f" mtu {self.mtu}" if self.mtu else ""
        return f"ip {_flag(self.family)} route {kind}{_prefix(self.network)}{via}{device}{table}{mtu}"

    def make(self, indexes: Indexes) -> Request:
        flags = CREATE | REPLACE
        return Request(NEWROUTE, self._body(indexes), f"add {self.describe()}", flags)

    def remove(self, indexes: Indexes) -> Request:
        return Request(DELROUTE, self._body(indexes), f"delete {self.describe()}", 0, _GONE)

    def _body(self, indexes: Indexes) -> bytes:
        attrs: list[tuple[str, object]] = [("RTA_TABLE", self.table)]
        if self.network.prefixlen:
            attrs.append(("RTA_DST", str(self.network.network_address)))
        if self.device:
            attrs.append(("RTA_OIF", indexes[self.device]))
        if self.via:
            attrs.append(("RTA_GATEWAY", str(self.via)))
        if self.metric:
            attrs.append(("RTA_PRIORITY", self.metric))
        if self.mtu:
            attrs.append(("RTA_METRICS", {"attrs": [("RTAX_MTU", self.mtu)]}))
        scope = _SCOPE_UNIVERSE
        if self.family == socket.AF_INET and self.kind == "local":
            scope = _SCOPE_HOST
        elif self.family == socket.AF_INET and self.kind == "unicast" and self.via is None:
            scope = _SCOPE_LINK
        return encode(
            rtmsg,
            attrs,
            family=self.family,
            dst_len=self.network.prefixlen,
            table=self.table if self.table < 256 else 0,
            proto=self.proto,
            scope=scope,
            type=_KINDS[self.kind],
            flags=_ONLINK if self.via is not None else 0,
        )


@dataclass(frozen=True, slots=True)
class Address:
    """`ip addr ... noprefixroute nodad`: routes are values of their own, so that each can be put back."""

    device: str
    address: AnyAddress
    prefix: int

    def describe(self) -> str:
        return f"ip addr {self.address}/{self.prefix} dev {self.device}"

    def make(self, indexes: Indexes) -> Request:
        flags = _IFA_F_NODAD | _IFA_F_PERMANENT | _IFA_F_NOPREFIXROUTE
        body = self._body(indexes, [("IFA_FLAGS", flags)])
        return Request(NEWADDR, body, f"add {self.describe()}", CREATE | REPLACE, _EXISTS)

    def remove(self, indexes: Indexes) -> Request:
        return Request(DELADDR, self._body(indexes, []), f"delete {self.describe()}", 0, _GONE)

    def _body(self, indexes: Indexes, more: list[tuple[str, object]]) -> bytes:
        text = str(self.address)
        attrs = [("IFA_LOCAL", text), ("IFA_ADDRESS", text), *more]
        return encode(
            ifaddrmsg,
            attrs,
            family=_family(self.address),
            prefixlen=self.prefix,
            index=indexes[self.device],
            scope=0,
        )


@dataclass(frozen=True, slots=True)
class Neighbour:
    """`ip neigh ... nud permanent`."""

    device: str
    address: AnyAddress
    mac: str

    def describe(self) -> str:
        return f"ip neigh {self.address} lladdr {self.mac} dev {self.device} permanent"

    def make(self, indexes: Indexes) -> Request:
        return Request(NEWNEIGH, self._body(indexes), f"add {self.describe()}", CREATE | REPLACE)

    def remove(self, indexes: Indexes) -> Request:
        return Request(DELNEIGH, self._body(indexes), f"delete {self.describe()}", 0, _GONE)

    def _body(self, indexes: Indexes) -> bytes:
        return encode(
            ndmsg,
            [("NDA_DST", str(self.address)), ("NDA_LLADDR", self.mac)],
            family=_family(self.address),
            ifindex=indexes[self.device],
            state=_NUD_PERMANENT,
        )


@dataclass(frozen=True, slots=True)
class Device:
    """A link as the kernel shows it."""

    name: str
    index: int
    flags: int
    group: int
    mac: str
    kind: str = ""

    @property
    def up(self) -> bool:
        return bool(self.flags & IFF_UP)

    @property
    def arp(self) -> bool:
        return not self.flags & IFF_NOARP


def change_link(
    index: int, what: str, *, up: bool | None = None, arp: bool = False, group: int | None = None
) -> Request:
    """Set a device up or down, with or without ARP, and into a group."""
    flags = (IFF_UP if up else 0) | (0 if arp else IFF_NOARP)
    change = (IFF_UP if up is not None else 0) | (0 if arp else IFF_NOARP)
    attrs: list[tuple[str, object]] = [] if group is None else [("IFLA_GROUP", group)]
    return Request(NEWLINK, encode(ifinfmsg, attrs, index=index, flags=flags, change=change), what)


def set_down(name: str) -> Request:
    """By name: one that is gone already is no error."""
    body = encode(ifinfmsg, [("IFLA_IFNAME", name)], flags=0, change=IFF_UP)
    return Request(NEWLINK, body, f"set {name} down", 0, _GONE)


def remove_link(name: str) -> Request:
    """By name: one that is gone already is no error."""
    return Request(DELLINK, encode(ifinfmsg, [("IFLA_IFNAME", name)]), f"delete {name}", 0, _GONE)


def received(sock: Netlink, index: int) -> int:
    """How many frames the device has received; 0 if there is none of that index. What a veth's other end
    sends counts at once, wherever it still waits."""
    request = Request(GETLINK, struct.pack("=BxHiII", 0, 0, index, 0, 0), f"read device {index}", 0, _GONE)
    for reply in sock.ask(request):
        stats = dict(attributes(reply.body[16:])).get(_IFLA_STATS64, b"")
        return int(struct.unpack_from("=Q", stats)[0]) if stats else 0  # struct rtnl_link_stats64: rx_packets
    return 0


def name_of(sock: Netlink, index: int) -> str:
    """The device of that index; "" if there is none."""
    request = Request(GETLINK, struct.pack("=BxHiII", 0, 0, index, 0, 0), f"read device {index}", 0, _GONE)
    for reply in sock.ask(request):
        return _text(dict(attributes(reply.body[16:])).get(3))  # IFLA_IFNAME
    return ""


def other_end(sock: Netlink, index: int, name: str) -> int | None:
    """The kernel's number for the network namespace in which the other end of this device lies
    (IFLA_LINK_NETNSID; rtnl_fill_link_netnsid). None if there is no such device, or both ends lie here."""
    request = Request(GETLINK, struct.pack("=BxHiII", 0, 0, index, 0, 0), f"read device {index}", 0, _GONE)
    for reply in sock.ask(request):
        said = dict(attributes(reply.body[16:]))
        number = said.get(_IFLA_LINK_NETNSID)
        if _text(said.get(3)) == name and number is not None:
            return _signed(number)
    return None


def _signed(value: bytes) -> int | None:
    """Negative: NETNSA_NSID_NOT_ASSIGNED (linux/net_namespace.h), and as good as none."""
    number = int(struct.unpack_from("=i", value)[0])
    return number if number >= 0 else None


class Tables:
    """What one namespace's routing holds, read through one socket."""

    def __init__(self, sock: Netlink) -> None:
        self._socket = sock

    def devices(self) -> dict[str, Device]:
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute(_IFLA_EXT_MASK, _SKIP_STATS)
        request = Request(GETLINK, body, "list links", DUMP)
        found = (_device(reply.body) for reply in self._socket.ask(request))
        return {device.name: device for device in found}

    def rules(self) -> list[Rule]:
        return [rule for family in _FAMILIES for rule in self._rules(family)]

    def _rules(self, family: int) -> Iterator[Rule]:
        request = Request(GETRULE, struct.pack("=B11x", family), "list rules", DUMP)
        for reply in self._socket.ask(request):
            yield _rule(reply.body)

    def routes(self, names: Mapping[int, str]) -> list[Route]:
        """All but those the kernel itself keeps (`proto kernel`, caches). `names`: ifindex -> device name."""
        return [route for body in self._routes() if (route := _route(body, names)) is not None]

    def locals(self) -> set[AnyAddress]:
        """The addresses that table local delivers to this namespace."""
        return {address for body in self._routes() if (address := _local(body)) is not None}

    def default_devices(self, names: Mapping[int, str]) -> list[str]:
        """Where the default routes of table main lead, several for a multipath route."""
        found = {name for body in self._routes() for name in _default_devices(body, names)}
        return sorted(found)

    def _routes(self) -> Iterator[bytes]:
        for family in _FAMILIES:
            request = Request(GETROUTE, struct.pack("=B11x", family), "list routes", DUMP)
            yield from (reply.body for reply in self._socket.ask(request))

    def addresses(self, names: Mapping[int, str]) -> set[Address]:
        request = Request(GETADDR, struct.pack("=BBBBI", 0, 0, 0, 0, 0), "list addresses", DUMP)
        return {_address(reply.body, names) for reply in self._socket.ask(request)}

    def neighbours(self, names: Mapping[int, str]) -> set[Neighbour]:
        """The permanent ones."""
        request = Request(GETNEIGH, struct.pack("=B11x", 0), "list neighbours", DUMP)
        found = (_neighbour(reply.body, names) for reply in self._socket.ask(request))
        return {neighbour for neighbour in found if neighbour is not None}


def make_all(sock: Netlink, things: Iterable[Thing], indexes: Indexes) -> None:
    sock.run([thing.make(indexes) for thing in things])


def remove_all(sock: Netlink, things: Iterable[Thing], indexes: Indexes) -> None:
    sock.run([thing.remove(indexes) for thing in things])


# ---- decoding (linux/rtnetlink.h, linux/fib_rules.h, linux/if_link.h)

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def _u32(value: bytes | None, default: int = 0) -> int:
    return int.from_bytes(value[:4], "little" if _LITTLE else "big") if value else default


_LITTLE = struct.pack("=H", 1) == b"\1\0"


def _text(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode("utf-8", "replace")


def _device(body: bytes) -> Device:
    index, flags = struct.unpack_from("=iI", body, 4)
    said = dict(attributes(body[16:]))
    kind = dict(attributes(said.get(18, b""))).get(1)  # IFLA_LINKINFO, IFLA_INFO_KIND
    mac = said.get(1, b"").hex(":")  # IFLA_ADDRESS
    return Device(_text(said.get(3)), index, flags, _u32(said.get(27)), mac, _text(kind))


_PLAIN = {2, 3, 6, 10, 15, 16, 21}  # FRA_SRC, IFNAME, PRIORITY, FWMARK, TABLE, FWMASK, PROTOCOL
_DETACHED = 0x8  # FIB_RULE_IIF_DETACHED: the device is not there just now


def _rule(body: bytes) -> Rule:
    family, table, action = body[0], body[4], body[7]
    said = dict(attributes(body[12:]))
    table = _u32(said.get(15), table)
    mark, mask = _u32(said.get(10)), _u32(said.get(16))
    return Rule(
        family=family,
        preference=_u32(said.get(6)),
        table=table if action == _TO_TABLE else None,
        mark=mark,
        device=_text(said.get(3)),
        source=f"{ipaddress.ip_address(said[2])}/{body[2]}" if 2 in said else "",
        mask=0 if mask == mark else mask,
        odd=_odd(body, said),
        raw=body,
    )


def _odd(body: bytes, said: Mapping[int, bytes]) -> str:
    """What this rule has that none of ours has: prefixes, tos, flags, another action, other attributes."""
    destination, source, tos, action = body[1], body[2], body[3], body[7]
    source = 0 if 2 in said else source
    flags = struct.unpack_from("=I", body, 8)[0] & ~_DETACHED
    unsuppressed = said.get(14) == b"\xff" * 4  # FRA_SUPPRESS_PREFIXLEN -1: not used
    others = sorted(set(said) - _PLAIN - ({14} if unsuppressed else set()))
    if not (destination or source or tos or flags or others) and action in (_TO_TABLE, _PROHIBIT):
        return ""
    return f"action {action} flags {flags:#x} from/{source} to/{destination} tos {tos} attributes {others}"


def _route(body: bytes, names: Mapping[int, str]) -> Route | None:
    family, length, _, _, table, proto, _, kind, flags = struct.unpack_from("=BBBBBBBBI", body)
    said = dict(attributes(body[12:]))
    table = _u32(said.get(15), table)  # RTA_TABLE
    if proto == _KERNEL or flags & _CLONED or kind not in _KIND_NAMES:
        return None
    width = 4 if family == socket.AF_INET else 16
    destination = ipaddress.ip_address(said.get(1, bytes(width)))
    metric = _u32(said.get(6))
    via = ipaddress.ip_address(said[5]) if 5 in said else None
    return Route(
        network=ipaddress.ip_network((destination, length)),
        device=names.get(_u32(said.get(4)), ""),
        table=table,
        kind=_KIND_NAMES[kind],
        via=via,
        metric=0 if family == socket.AF_INET6 and metric == _NO_METRIC else metric,
        proto=proto,
        mtu=_u32(dict(attributes(said.get(8, b""))).get(2)),  # RTA_METRICS, RTAX_MTU
    )


def _local(body: bytes) -> AnyAddress | None:
    said = dict(attributes(body[12:]))
    if _u32(said.get(15), body[4]) != LOCAL or body[7] != _KINDS["local"] or 1 not in said:
        return None
    return ipaddress.ip_address(said[1])


def _default_devices(body: bytes, names: Mapping[int, str]) -> Iterator[str]:
    said = dict(attributes(body[12:]))
    if body[1] != 0 or body[7] != _KINDS["unicast"] or _u32(said.get(15), body[4]) != MAIN:
        return
    indexes = [_u32(said[4])] if 4 in said else []
    hops, at = said.get(9, b""), 0  # RTA_MULTIPATH: struct rtnexthop
    while at + 8 <= len(hops):
        length, _, _, index = struct.unpack_from("=HBBi", hops, at)
        indexes.append(index)
        at += max(8, (length + 3) & ~3)
    yield from (names[index] for index in indexes if index in names)


def _address(body: bytes, names: Mapping[int, str]) -> Address:
    prefix, index = body[1], struct.unpack_from("=I", body, 4)[0]
    said = dict(attributes(body[8:]))
    raw = said.get(2) or said[1]  # IFA_LOCAL, IFA_ADDRESS
    return Address(names.get(index, ""), ipaddress.ip_address(raw), prefix)


def _neighbour(body: bytes, names: Mapping[int, str]) -> Neighbour | None:
    family, index, state = struct.unpack_from("=BxxxiH", body)
    said = dict(attributes(body[12:]))
    if family not in _FAMILIES or not state & _NUD_PERMANENT or 1 not in said:
        return None
    mac = said.get(2, b"").hex(":")
    return Neighbour(names.get(index, ""), ipaddress.ip_address(said[1]), mac)


def _family(value: AnyAddress | AnyNetwork) -> int:
    return socket.AF_INET if value.version == 4 else socket.AF_INET6


def _flag(family: int) -> str:
    return "-4" if family == socket.AF_INET else "-6"


def _prefix(network: AnyNetwork) -> str:
    return "default" if network.prefixlen == 0 else str(network)


def _table_name(table: int) -> str:
    return {MAIN: "main", LOCAL: "local"}.get(table, str(table))
