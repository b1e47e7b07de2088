"""Connections that the host still knows, and the gateway no longer.

What a sandbox leaves open has an entry in the gateway's table, which goes with its link, and one in the
host's, where all sandboxes are one address (layout.UPLINK_GATEWAY4, UPLINK_GATEWAY6). The host is not told
that the sandbox has ended: idle, it would stay for two hours (layout.IDLE_FOR), fill the table that the
host's own connections need, and lead a late answer to whoever gets the same port next.

Two ways to find them. `Departures` hears from the gateway of each that ends there, and forgets those that
did not end by themselves: nothing is listed, and nothing happens while nothing ends. `Orphans` compares the
two tables, for when nobody has listened: a connection passes the gateway first, so its entry there is the
older one. Hence: what is in the host's table, and not in the gateway's when that is listed *afterwards*, has
no sandbox any more.

Of a TCP connection that is forgotten the host's kernel knows nothing: it answers the server's next segment
with a reset, which ends it.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from egressd.kernel.netlink import DUMP, NETFILTER, Netlink, Request, attribute, attributes
from egressd.ruleset.layout import UPLINK_GATEWAY4, UPLINK_GATEWAY6

__all__ = ["Departures", "Orphans"]

_GET, _DELETE = 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
# enum ctattr_type
_TUPLE_ORIG, _TUPLE_REPLY, _PROTOINFO, _ID, _ZONE = 1, 2, 4, 12, 18
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
_INFO_TCP, _TCP_STATE = 1, 1  # enum ctattr_protoinfo, ctattr_protoinfo_tcp
_OVER = (b"\7", b"\x08")  # TIME_WAIT, CLOSE: enum tcp_conntrack (linux/netfilter/nf_conntrack_tcp.h)
_WITH_PORTS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)  # all that is forwarded and stays for long
_HEADER_SIZE = 16  # struct nlmsghdr
_EVENT_BYTES = 8192  # one event is a tenth of that
_WHAT = "forget a connection of a sandbox that has ended"


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
        alive = {_short(body, family, back=True) for body in _listed(self._gateway, family)}
        gone = [_identity(body) for way, body in there.items() if way not in alive]
        self._host.run([Request(_DELETE, body, _WHAT, 0, _NOTHING) for body in gone])
        return len(gone)

    def _of_gateway(self, family: int) -> Iterator[tuple[bytes, bytes]]:
        """(way, entry) of what the gateway has begun."""
        ours = _OURS[family]
        source, protocol = slice(16, 16 + len(ours)), 28 + 2 * len(ours)
        for body in _listed(self._host, family):
            if body[source] == ours and body[protocol] in _WITH_PORTS:
                yield _short(body, family, back=False), body


class Departures:
    """`told`: a socket of the gateway that hears of connections' ends (sockets.open_ended). `host`: a netlink
    socket of the host (NETFILTER)."""

    def __init__(self, told: socket.socket, *, host: Netlink | None = None) -> None:
        self.told, self._host = told, host or Netlink(NETFILTER)
        self.lost = 0  # how often more came than the kernel could keep for us

    def close(self) -> None:
        self._host.close()

    def forget(self, most: int) -> int:
        """Deal with up to `most` ends; how many there were. Never waits."""
        count = 0
        gone: list[bytes] = []
        for data in self._heard(most):
            count += 1
            # before anything is taken apart: most of what ends in the gateway never left it
            if _OURS[socket.AF_INET] in data or _OURS[socket.AF_INET6] in data:
                gone += _left_open(data)
        self._host.run([Request(_DELETE, body, _WHAT, 0, _NOTHING) for body in gone])
        return count

    def _heard(self, most: int) -> Iterator[bytes]:
        for _ in range(most):
            try:
                data, (sender, _) = self.told.recvfrom(_EVENT_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost += 1
            else:
                if sender == 0:  # the kernel, and no other process of the gateway (netlink(7))
                    yield data


class _Way(NamedTuple):
    """What went out of the gateway: protocol, its address and port, the far address and port."""

    protocol: int
    near: bytes
    port: bytes
    far: bytes
    far_port: bytes


def _left_open(event: bytes) -> Iterator[bytes]:
    """What names its entry in the host, if that is not about to go by itself: somebody deleted the
    gateway's, or it went while both sides could still talk (idle for too long, a full table). What was cut
    was reset, which the host's kernel saw."""
    _, kind, _, _, by = struct.unpack_from("=IHHII", event)
    family = event[_HEADER_SIZE]
    said = dict(attributes(event[_HEADER_SIZE + 4 :]))
    if kind != _DELETE or family not in _OURS or _TUPLE_REPLY not in said:
        return
    way = _way(said[_TUPLE_REPLY], family)
    if way.near != _OURS[family] or way.protocol not in _WITH_PORTS:
        return
    if by or (way.protocol == socket.IPPROTO_TCP and _tcp_state(said) not in _OVER):
        yield _HEADER[family] + attribute(_TUPLE_ORIG, _tuple(way, family), nested=True)


def _tcp_state(said: dict[int, bytes]) -> bytes:
    """Empty where the kernel does not say (before 5.10)."""
    info = dict(attributes(said.get(_PROTOINFO, b"")))
    return dict(attributes(info.get(_INFO_TCP, b""))).get(_TCP_STATE, b"")[:1]


def _tuple(way: _Way, family: int) -> bytes:
    ends = attribute(_IP_SRC[family], way.near) + attribute(_IP_DST[family], way.far)
    ports = attribute(_PROTO_NUM, bytes([way.protocol]))
    ports += attribute(_SRC_PORT, way.port) + attribute(_DST_PORT, way.far_port)
    return attribute(_TUPLE_IP, ends, nested=True) + attribute(_TUPLE_PROTO, ports, nested=True)


def _listed(table: Netlink, family: int) -> Iterator[bytes]:
    for reply in table.ask(Request(_GET, _HEADER[family], "list connections", DUMP)):
        yield reply.body


def _short(body: bytes, family: int, *, back: bool) -> bytes:
    """Of a listed entry: the way without the near end, to be compared. Both tuples come first, each as
    addresses, protocol, ports (ctnetlink_dump_tuples): a table may have 100,000 entries, and taking them
    apart costs ten times as much. Only for what has ports."""
    size = len(_OURS[family])
    length = 44 + 2 * size  # of a tuple
    at = 4 + length if back else 4
    source, destination, protocol = at + 12, at + 16 + size, at + 24 + 2 * size
    near, far = protocol + 8, protocol + 16
    if back:
        source, destination, near, far = destination, source, far, near
    address = body[destination : destination + size]
    return address + body[protocol : protocol + 1] + body[near : near + 2] + body[far : far + 2]


def _way(answers: bytes, family: int) -> _Way:
    """Of the tuple that the answers to it have."""
    parts = dict(attributes(answers))
    ends, ports = dict(attributes(parts[_TUPLE_IP])), dict(attributes(parts[_TUPLE_PROTO]))
    return _Way(
        protocol=ports[_PROTO_NUM][0],
        near=ends[_IP_DST[family]],
        port=ports.get(_DST_PORT, b""),
        far=ends[_IP_SRC[family]],
        far_port=ports.get(_SRC_PORT, b""),
    )


def _identity(body: bytes) -> bytes:
    """Of this entry, and no later one of the same tuple."""
    said = dict(attributes(body[4:]))
    name = _HEADER[body[0]] + attribute(_TUPLE_ORIG, said[_TUPLE_ORIG], nested=True)
    if _ZONE in said:
        name += attribute(_ZONE, said[_ZONE])
    return name + attribute(_ID, said[_ID])
