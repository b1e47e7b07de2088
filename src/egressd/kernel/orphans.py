"""Connections that the host still knows, and the gateway no longer.

What a sandbox leaves open has an entry in the gateway's table, which goes with its link, and one in the
host's, where all sandboxes are one address (layout.UPLINK_GATEWAY4, UPLINK_GATEWAY6). The host is not told
that the sandbox has ended: idle, it would stay for two hours (layout.IDLE_FOR), fill the table that the
host's own connections need, and lead a late answer to whoever gets the same port next.

A connection passes the gateway first, so its entry there is the older one. Hence: what is in the host's
table, and not in the gateway's when that is listed *afterwards*, has no sandbox any more. Of a TCP connection
that is forgotten the host's kernel knows nothing: it answers the server's next segment with a reset, which
ends it.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import NamedTuple

from egressd.kernel.netlink import DUMP, NETFILTER, Netlink, Request, attribute, attributes
from egressd.ruleset.layout import UPLINK_GATEWAY4, UPLINK_GATEWAY6

__all__ = ["Orphans"]

_GET, _DELETE = 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_TUPLE_ORIG, _TUPLE_REPLY, _ID, _ZONE = 1, 2, 12, 18  # enum ctattr_type
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_NOTHING = frozenset({errno.ENOENT})
_HEADER: dict[int, bytes] = {socket.AF_INET: b"\2\0\0\0", socket.AF_INET6: b"\n\0\0\0"}  # struct nfgenmsg
_OURS: dict[int, bytes] = {socket.AF_INET: UPLINK_GATEWAY4.packed, socket.AF_INET6: UPLINK_GATEWAY6.packed}
_IP_SRC: dict[int, int] = {
    socket.AF_INET: 1,
    socket.AF_INET6: 3,
}  # enum ctattr_ip; the destination is the next
_IP_DST: dict[int, int] = {socket.AF_INET: 2, socket.AF_INET6: 4}
_PROTO_NUM, _SRC_PORT, _DST_PORT = 1, 2, 3


class _Way(NamedTuple):
    """What went out of the gateway: protocol, its port, the far address and port."""

    protocol: bytes
    port: bytes
    far: bytes
    far_port: bytes


class Orphans:
    """`gateway` and `host`: netlink sockets of the two namespaces (NETFILTER)."""

    def __init__(self, *, host: Netlink | None = None, gateway: Netlink) -> None:
        self._host, self._gateway = host or Netlink(NETFILTER), gateway

    def forget(self) -> int:
        """Take them out of the host's table; how many there were."""
        return sum(self._forget(family) for family in _HEADER)

    def _forget(self, family: int) -> int:
        there = dict(self._of_gateway(family))
        if not there:
            return 0
        alive = {_way(said[_TUPLE_REPLY], family, back=True) for said in _listed(self._gateway, family)}
        gone = [body for way, body in there.items() if way not in alive]
        what = "forget a connection of a sandbox that has ended"
        self._host.run([Request(_DELETE, body, what, 0, _NOTHING) for body in gone])
        return len(gone)

    def _of_gateway(self, family: int) -> Iterator[tuple[_Way, bytes]]:
        """(way, what names the entry) of what the gateway has begun."""
        for said in _listed(self._host, family):
            ends = dict(attributes(dict(attributes(said[_TUPLE_ORIG]))[_TUPLE_IP]))
            if ends[_IP_SRC[family]] == _OURS[family]:
                yield _way(said[_TUPLE_ORIG], family, back=False), _identity(said, family)


def _listed(table: Netlink, family: int) -> Iterator[dict[int, bytes]]:
    for reply in table.ask(Request(_GET, _HEADER[family], "list connections", DUMP)):
        yield dict(attributes(reply.body[4:]))


def _way(tuple_: bytes, family: int, *, back: bool) -> _Way:
    """Of a tuple as it goes out, or (`back`) as its answers come."""
    parts = dict(attributes(tuple_))
    ends, ports = dict(attributes(parts[_TUPLE_IP])), dict(attributes(parts[_TUPLE_PROTO]))
    near, far = ports.get(_SRC_PORT, b""), ports.get(_DST_PORT, b"")
    if back:
        return _Way(ports[_PROTO_NUM], far, ends[_IP_SRC[family]], near)
    return _Way(ports[_PROTO_NUM], near, ends[_IP_DST[family]], far)


def _identity(said: dict[int, bytes], family: int) -> bytes:
    """Of this entry, and no later one of the same tuple."""
    name = _HEADER[family] + attribute(_TUPLE_ORIG, said[_TUPLE_ORIG], nested=True)
    if _ZONE in said:
        name += attribute(_ZONE, said[_ZONE])
    return name + attribute(_ID, said[_ID])
