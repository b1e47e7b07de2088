"""Forgetting connections: entries of the connection tracking table, by mark or by address.

Deleting an entry ends the flow for good: its next packet is looked up anew, and its replies belong to
nothing. Messages of linux/netfilter/nfnetlink_conntrack.h. A delete with a mark filter walks the table once
in the kernel; one with an address filter exists only since 6.8, so entries of an address are listed and
deleted by identity. The filter of a listing (since 5.8) is used for IPv4 only: for IPv6 it is the wrong way
round, and lists every connection but those of the address (seen on 6.18; ctnetlink_filter_match_tuple). What
is listed is compared here in either case.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from egressd.kernel.netlink import DUMP, NETFILTER, Netlink, Request, attribute, attributes

__all__ = ["Conntrack"]

_GET, _DELETE = 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_TUPLE_ORIG, _MARK, _ZONE, _ID, _MARK_MASK, _FILTER = 1, 8, 18, 12, 21, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUM, _DST_PORT = 1, 3
_IP4_SRC, _IP6_SRC = 1, 3  # CTA_IP_V4_SRC, CTA_IP_V6_SRC
_FILTER_ORIG_FLAGS = 1
_FILTER_IP_SRC = 1 << 0  # CTA_FILTER_FLAG(CTA_IP_SRC), net/netfilter/nf_conntrack_netlink.c
_FEW = 2  # marks: below, one walk in the kernel for each; above, one listing
_NOTHING = frozenset({errno.ENOENT})


class Conntrack:
    """The table of the namespace this was made in."""

    def __init__(self) -> None:
        self._socket = Netlink(NETFILTER)

    def close(self) -> None:
        self._socket.close()

    def forget_marks(self, marks: Collection[int]) -> None:
        """Delete every entry with one of these marks, both families."""
        if len(marks) <= _FEW:
            for mark in marks:
                self.forget_mark(mark, 0xFFFF_FFFF)
        else:
            self._forget_listed(set(marks))

    def forget_mark(self, mark: int, mask: int) -> None:
        value = attribute(_MARK, struct.pack(">I", mark)) + attribute(_MARK_MASK, struct.pack(">I", mask))
        what = f"forget connections with mark {mark:#x}/{mask:#x}"
        self._socket.run([Request(_DELETE, _header(socket.AF_UNSPEC) + value, what, 0, _NOTHING)])

    def forget_sources(self, addresses: Collection[IPv4Address | IPv6Address]) -> None:
        """Delete every entry that one of these addresses began."""
        for address in addresses:
            source = address.packed
            # of IPv6 everybody's are listed: taking each apart costs more than the listing
            bodies = (reply.body for reply in self._socket.ask(_from(address)) if source in reply.body)
            self._delete([entry for entry in map(_entry, bodies) if entry.source == source])

    def forget_ports(self, places: Collection[tuple[int, int, int]]) -> None:
        """Delete every entry of one of these (mark, IP protocol, port that it began towards)."""
        wanted = set(places)
        if wanted:
            found = self._entries(_EVERY)
            self._delete([entry for entry in found if (entry.mark, entry.protocol, entry.port) in wanted])

    def forget_all(self) -> None:
        """Empty the table."""
        self._socket.run([Request(_DELETE, _header(socket.AF_UNSPEC), "forget all connections")])

    def marks(self) -> list[int]:
        """The mark of every entry."""
        return [entry.mark for entry in self._entries(_EVERY)]

    def _forget_listed(self, marks: set[int]) -> None:
        self._delete([entry for entry in self._entries(_EVERY) if entry.mark in marks])

    def _delete(self, entries: list[_Entry]) -> None:
        what = "forget a connection"
        self._socket.run([Request(_DELETE, entry.identity, what, 0, _NOTHING) for entry in entries])

    def _entries(self, request: Request) -> list[_Entry]:
        return [_entry(reply.body) for reply in self._socket.ask(request)]


class _Entry(NamedTuple):
    mark: int
    source: bytes  # who began it
    protocol: int
    port: int  # towards which; 0 where there are none
    identity: bytes  # the body of a request that names this entry and no later one of the same tuple


def _entry(body: bytes) -> _Entry:
    said = dict(attributes(body[4:]))
    identity = _header(body[0])
    identity += attribute(_TUPLE_ORIG, said[_TUPLE_ORIG], nested=True) + attribute(_ID, said[_ID])
    if _ZONE in said:
        identity += attribute(_ZONE, said[_ZONE])
    whence = dict(attributes(said[_TUPLE_ORIG]))
    ends, ports = dict(attributes(whence[_TUPLE_IP])), dict(attributes(whence[_TUPLE_PROTO]))
    source = ends.get(_IP4_SRC) or ends[_IP6_SRC]
    (mark,) = struct.unpack(">I", said.get(_MARK, bytes(4)))
    return _Entry(
        mark, source, ports[_PROTO_NUM][0], int.from_bytes(ports.get(_DST_PORT, b""), "big"), identity
    )


def _header(family: int) -> bytes:
    return struct.pack("=BBH", family, 0, 0)  # struct nfgenmsg


def _from(address: IPv4Address | IPv6Address) -> Request:
    """What lists the connections of an address, and of IPv6 all the others as well."""
    what = f"list connections of {address}"
    if address.version == 6:
        return Request(_GET, _header(socket.AF_INET6), what, DUMP)
    source = attribute(_TUPLE_IP, attribute(_IP4_SRC, address.packed), nested=True)
    body = attribute(_TUPLE_ORIG, source, nested=True)
    flags = attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", _FILTER_IP_SRC))
    body += attribute(_FILTER, flags, nested=True)
    return Request(_GET, _header(socket.AF_INET) + body, what, DUMP)


_EVERY = Request(_GET, _header(socket.AF_UNSPEC), "list connections", DUMP)
