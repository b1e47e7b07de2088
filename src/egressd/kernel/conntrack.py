"""The connection tracking table: what is open under a mark; forgetting connections, and cutting them.

Deleting an entry ends the flow for good: its next packet is looked up anew, and its replies belong to
nothing. Messages of linux/netfilter/nfnetlink_conntrack.h. A delete with a mark filter walks the table once
in the kernel; one with an address filter exists only since 6.8, so entries of an address are listed and
deleted by identity. The filter of a listing (since 5.8) is used for IPv4 only: for IPv6 it is the wrong way
round, and lists every connection but those of the address (seen on 6.18; ctnetlink_filter_match_tuple). What
is listed is compared here in either case. A listing by mark is right in both families.

Of TCP, the next packet of what was forgotten is dropped, and the sender hears nothing: a segment that
conntrack does not know could as well be of a connection that lives. What has to end at once and aloud is
*cut* instead. Its entry stays for a few seconds and bears a mark of no kind (layout.CUT), which nothing
admits, and from which the rules know whom to refuse (ruleset.build, chain cut). Should nobody be saying
anything, the client is made to (kernel/nudge.py), so that there is something to refuse. Datagrams need none
of this: without its entry the next one is looked up anew, and refused where its name leads nowhere.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple, TypeAlias

from egressd.kernel.netlink import DUMP, NETFILTER, Netlink, Request, attribute, attributes
from egressd.kernel.nudge import nudge
from egressd.model.errors import KernelError
from egressd.ruleset.layout import CUT, TOLD

__all__ = ["Conntrack"]

Address: TypeAlias = IPv4Address | IPv6Address

_CHANGE, _GET, _DELETE = 0x100, 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_STATISTICS, _GLOBAL_ENTRIES = 0x105, 1  # IPCTNL_MSG_CT_GET_STATS, CTA_STATS_GLOBAL_ENTRIES
# enum ctattr_type
_TUPLE_ORIG, _TUPLE_REPLY, _PROTOINFO, _TIMEOUT, _MARK = 1, 2, 4, 7, 8
_ID, _ZONE, _MARK_MASK, _FILTER = 12, 18, 21, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUM, _SRC_PORT, _DST_PORT = 1, 2, 3
_IP4_SRC, _IP4_DST, _IP6_SRC, _IP6_DST = 1, 2, 3, 4  # enum ctattr_ip
_INFO_TCP, _TCP_STATE = 1, 1  # enum ctattr_protoinfo, ctattr_protoinfo_tcp
_TIME_WAIT, _CLOSED = 7, 8  # enum tcp_conntrack (linux/netfilter/nf_conntrack_tcp.h)
_FILTER_ORIG_FLAGS = 1
_FILTER_IP_SRC = 1 << 0  # CTA_FILTER_FLAG(CTA_IP_SRC), net/netfilter/nf_conntrack_netlink.c
_FEW = 2  # marks, or addresses: up to here one walk in the kernel for each; above, one listing
_LARGE = 5000  # entries: to list them costs as much as another walk
_NOTHING = frozenset({errno.ENOENT})
_KINDS = 0xF000_0000  # what a connection's mark loses when it is cut
_LINGER = 10  # seconds: what the kernel gives to connections that were reset
_NUDGES = 2000  # of one cut, at 0.1 ms each; whom they leave out is told at the next packet
_LOOKS = 4


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
        what = f"forget connections with mark {mark:#x}/{mask:#x}"
        body = _header(socket.AF_UNSPEC) + _mark_filter(mark, mask)
        self._socket.run([Request(_DELETE, body, what, 0, _NOTHING)])

    def count(self) -> int:
        """How many entries there are."""
        for reply in self._socket.ask(Request(_STATISTICS, _header(socket.AF_UNSPEC), "count connections")):
            return int.from_bytes(dict(attributes(reply.body[4:]))[_GLOBAL_ENTRIES], "big")
        raise KernelError("the kernel does not say how many connections there are")

    def forget_sources(self, addresses: Collection[Address]) -> None:
        """Delete every entry that one of these addresses began: in one walk through the table for all of
        them, or, for a few in a large table, in one walk for each in which the kernel chooses."""
        sources = {address.packed for address in addresses}
        walks = [_EVERY]
        if len(sources) <= _FEW and self.count() > _LARGE:
            walks = [_from(address) for address in addresses]
        for walk in walks:
            bodies = (reply.body for reply in self._socket.ask(walk))
            # taking each apart costs more than the listing
            self._delete([_entry(body) for body in bodies if _source(body) in sources])

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

    def led(self, mark: int, mask: int) -> set[tuple[int, Address]]:
        """(mark, real address) of every connection under `mark`/`mask`, each once: where its answers come
        from."""
        listed = {_place(reply.body) for reply in self._socket.ask(_under(mark, mask))}
        return {(int.from_bytes(value, "big"), ip_address(source)) for value, source in listed}

    def cut(self, places: Collection[tuple[int, Address]], mark: int, mask: int) -> int:
        """End those under `mark`/`mask` that lead to one of these (mark, real address); how many there were.

        No data of theirs goes on when this returns. KernelError where new ones keep coming: close their way
        first.
        """
        wanted = {(value.to_bytes(4, "big"), address.packed) for value, address in places}
        count = 0
        for _ in range(_LOOKS):
            bodies = [reply.body for reply in self._socket.ask(_under(mark, mask))]
            found = [_entry(body) for body in bodies if _place(body) in wanted]
            if not found:
                return count
            self._end(found, nudges=max(0, _NUDGES - count))
            count += len(found)
        raise KernelError("connections are begun as fast as they are cut")

    def resume(self) -> None:
        """Go on with what a process that is gone has left half done."""
        bodies = [reply.body for reply in self._socket.ask(_under(CUT, _KINDS | TOLD))]
        self._end([_entry(body) for body in bodies], nudges=_NUDGES)

    def _end(self, found: list[_Entry], *, nudges: int) -> None:
        talking = [entry for entry in found if entry.talking]
        now, later = talking[:nudges], talking[nudges:]
        self._change(now, _CUT, "cut a connection")
        self._change(later, _CUT_TOLD, "cut a connection")
        self._delete([entry for entry in found if not entry.talking])
        nudged = [(entry, _nudged(entry)) for entry in now]
        self._change([entry for entry, done in nudged if done], _END, "end a connection")
        self._change([entry for entry, done in nudged if not done], _CUT_TOLD, "cut a connection")

    def _change(self, entries: list[_Entry], change: bytes, what: str) -> None:
        self._socket.run([Request(_CHANGE, entry.name + change, what, 0, _NOTHING) for entry in entries])

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
    source_port: int  # 0 where there are none
    destination: bytes  # towards which address, before any translation
    protocol: int
    port: int  # towards which; 0 where there are none
    talking: bool  # TCP that may still exchange data
    name: bytes  # the beginning of a request about whatever has this tuple
    identity: bytes  # the body of a request that names this entry and no later one of the same tuple


def _entry(body: bytes) -> _Entry:
    said = dict(attributes(body[4:]))
    name = _header(body[0]) + attribute(_TUPLE_ORIG, said[_TUPLE_ORIG], nested=True)
    if _ZONE in said:
        name += attribute(_ZONE, said[_ZONE])
    whence = dict(attributes(said[_TUPLE_ORIG]))
    ends, ports = dict(attributes(whence[_TUPLE_IP])), dict(attributes(whence[_TUPLE_PROTO]))
    protocol = ports[_PROTO_NUM][0]
    return _Entry(
        mark=int.from_bytes(said.get(_MARK, b""), "big"),
        source=ends.get(_IP4_SRC) or ends[_IP6_SRC],
        source_port=int.from_bytes(ports.get(_SRC_PORT, b""), "big"),
        destination=ends.get(_IP4_DST) or ends[_IP6_DST],
        protocol=protocol,
        port=int.from_bytes(ports.get(_DST_PORT, b""), "big"),
        talking=protocol == socket.IPPROTO_TCP and _tcp_state(said) not in (_TIME_WAIT, _CLOSED),
        name=name,
        identity=name + attribute(_ID, said[_ID]),
    )


def _tcp_state(said: dict[int, bytes]) -> int:
    info = dict(attributes(said.get(_PROTOINFO, b"")))
    return dict(attributes(info.get(_INFO_TCP, b""))).get(_TCP_STATE, b"\0")[0]


def _source(body: bytes) -> bytes:
    """Who began it: CTA_TUPLE_ORIG comes first, in it CTA_TUPLE_IP, and in that the source."""
    length = 16 if body[0] == socket.AF_INET6 else 4
    return body[16 : 16 + length]


def _place(body: bytes) -> tuple[bytes, bytes]:
    """(mark, real address) of an entry, as they are listed. A table may have 100,000 of them: nothing more is
    taken apart. CTA_TUPLE_IP comes first in a tuple, and in it the source (ctnetlink_dump_tuples)."""
    said = dict(attributes(body[4:]))
    length = 16 if body[0] == socket.AF_INET6 else 4
    return said.get(_MARK, b"\0\0\0\0"), said[_TUPLE_REPLY][8 : 8 + length]


def _nudged(entry: _Entry) -> bool:
    """False where its client cannot be made to say something: it hears of it with the next packet."""
    near, far = str(ip_address(entry.source)), str(ip_address(entry.destination))
    try:
        nudge(of=(far, entry.port), to=(near, entry.source_port))
    except OSError:
        return False
    return True


def _header(family: int) -> bytes:
    return struct.pack("=BBH", family, 0, 0)  # struct nfgenmsg


def _mark_filter(mark: int, mask: int) -> bytes:
    return attribute(_MARK, struct.pack(">I", mark)) + attribute(_MARK_MASK, struct.pack(">I", mask))


def _under(mark: int, mask: int) -> Request:
    what = f"list connections with mark {mark:#x}/{mask:#x}"
    return Request(_GET, _header(socket.AF_UNSPEC) + _mark_filter(mark, mask), what, DUMP)


def _from(address: Address) -> Request:
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
# The kernel clears the masked bits, then flips those of the value (ctnetlink_change_mark): whose it is stays.
_CUT, _CUT_TOLD = _mark_filter(CUT, _KINDS), _mark_filter(CUT | TOLD, _KINDS | TOLD)
_INFO = attribute(_INFO_TCP, attribute(_TCP_STATE, bytes([_CLOSED])), nested=True)
# Kernels that see their own resets (since 6.4) do this by themselves.
_END = _CUT_TOLD + attribute(_TIMEOUT, struct.pack(">I", _LINGER)) + attribute(_PROTOINFO, _INFO, nested=True)
