"""The ends of connections: destroy events of the kernel's connection tracking, read.

A datagram of a netlink socket that is in the group NFNLGRP_CONNTRACK_DESTROY holds such events
(linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_netlink.c): both tuples of the entry, its mark, and,
with nf_conntrack_acct and nf_conntrack_timestamp, what it counted each way and when it began and ended.

Rules of this file: any bytes give values, never an exception. What does not parse is `Malformed`: to be
counted, since a connection ended and is now not told of.

A tuple names one direction. The reply's source is the address that the entry really led to: where there
was a translation it differs from the original's destination.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeAlias

from egressd.packets.netlink import DONE, ERROR, NOOP, OVERRUN, Malformed, Overrun, attributes, pieces

__all__ = ["ICMP", "ICMPV6", "TCP", "UDP", "Ended", "Ends", "Event", "Malformed", "Overrun", "Tally", "parse"]

Address: TypeAlias = IPv4Address | IPv6Address

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58  # linux/in.h
_DELETE = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
# enum ctattr_type
_ORIGINAL, _REPLY, _STATUS, _PROTOINFO, _MARK, _OUT, _IN, _TIMES = 1, 2, 3, 4, 8, 9, 10, 20
_IP, _PROTO = 1, 2  # ctattr_tuple
_SRC4, _DST4, _SRC6, _DST6 = 1, 2, 3, 4  # ctattr_ip
_NUMBER, _SRC_PORT, _DST_PORT, _ICMP_TYPE, _ICMP_CODE, _ICMP6_TYPE, _ICMP6_CODE = 1, 2, 3, 5, 6, 8, 9
_PACKETS, _BYTES = 1, 2  # ctattr_counters
_BEGAN, _ENDED = 1, 2  # ctattr_tstamp
_INFO_TCP, _TCP_STATE = 1, 1  # ctattr_protoinfo, ctattr_protoinfo_tcp
_U8, _U16, _U32, _U64 = (struct.Struct(f"!{letter}") for letter in "BHIQ")


@dataclass(frozen=True, slots=True)
class Ends:
    """One direction of an entry. Ports are None where the protocol has none."""

    source: Address
    destination: Address
    source_port: int | None = None
    destination_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None


class Tally(NamedTuple):
    packets: int
    bytes: int  # of the network layer, headers included


@dataclass(frozen=True, slots=True)
class Ended:
    """A connection that the kernel forgot. None: the kernel did not say, because it does not count
    (`out`, `back`) or does not note times (nanoseconds since 1970)."""

    protocol: int
    original: Ends
    reply: Ends
    mark: int = 0
    status: int = 0  # IPS_*, linux/netfilter/nf_conntrack_common.h
    out: Tally | None = None
    back: Tally | None = None
    began: int | None = None
    ended: int | None = None
    tcp_state: int | None = None  # enum tcp_conntrack, linux/netfilter/nf_conntrack_tcp.h


Event: TypeAlias = Ended | Overrun | Malformed


def parse(datagram: bytes) -> list[Event]:
    """All events of one datagram, in order."""
    found: list[Event] = []
    for piece in pieces(datagram):
        if isinstance(piece, Malformed):
            found.append(piece)
        elif piece.kind == _DELETE:
            found.append(_event(piece.body))
        elif piece.kind == OVERRUN:
            found.append(Overrun())
        elif piece.kind not in (NOOP, DONE, ERROR):
            found.append(Malformed(f"message type {piece.kind:#06x} is not the end of a connection"))
    return found


def _event(body: bytes) -> Ended | Malformed:
    if len(body) < _GENERIC.size:
        return Malformed("an event without its header")
    said = attributes(body[_GENERIC.size :])
    if body[1] != 0 or said is None:
        return Malformed("an event whose attributes do not add up")
    original, reply = _tuple(said.get(_ORIGINAL, b"")), _tuple(said.get(_REPLY, b""))
    if original is None or reply is None or original[0] != reply[0]:
        return Malformed("an event that does not say whose connection ended")
    times = attributes(said.get(_TIMES, b"")) or {}
    return Ended(
        protocol=original[0],
        original=original[1],
        reply=reply[1],
        mark=_number(said, _MARK, _U32) or 0,
        status=_number(said, _STATUS, _U32) or 0,
        out=_tally(said.get(_OUT, b"")),
        back=_tally(said.get(_IN, b"")),
        began=_number(times, _BEGAN, _U64),
        ended=_number(times, _ENDED, _U64),
        tcp_state=_tcp_state(said.get(_PROTOINFO, b"")),
    )


def _tuple(data: bytes) -> tuple[int, Ends] | None:
    parts = attributes(data) or {}
    ip, proto = attributes(parts.get(_IP, b"")), attributes(parts.get(_PROTO, b""))
    if ip is None or proto is None:
        return None
    source, destination = _addresses(ip)
    number = _number(proto, _NUMBER, _U8)
    if source is None or destination is None or number is None:
        return None
    kind, code = (_ICMP6_TYPE, _ICMP6_CODE) if number == ICMPV6 else (_ICMP_TYPE, _ICMP_CODE)
    ends = Ends(
        source=source,
        destination=destination,
        source_port=_number(proto, _SRC_PORT, _U16),
        destination_port=_number(proto, _DST_PORT, _U16),
        icmp_type=_number(proto, kind, _U8),
        icmp_code=_number(proto, code, _U8),
    )
    return number, ends


def _addresses(ip: dict[int, bytes]) -> tuple[Address, Address] | tuple[None, None]:
    """Source and destination, of one family."""
    for kind, source, destination, length in (
        (IPv4Address, _SRC4, _DST4, 4),
        (IPv6Address, _SRC6, _DST6, 16),
    ):
        one, other = ip.get(source, b""), ip.get(destination, b"")
        if len(one) == len(other) == length:
            return kind(one), kind(other)
    return None, None


def _tally(data: bytes) -> Tally | None:
    counts = attributes(data) or {}
    packets, octets = _number(counts, _PACKETS, _U64), _number(counts, _BYTES, _U64)
    return None if packets is None or octets is None else Tally(packets, octets)


def _tcp_state(data: bytes) -> int | None:
    info = attributes(data) or {}
    return _number(attributes(info.get(_INFO_TCP, b"")) or {}, _TCP_STATE, _U8)


def _number(said: dict[int, bytes], kind: int, shape: struct.Struct) -> int | None:
    """None where it is absent, or not exactly as long as it is to be."""
    data = said.get(kind, b"")
    if len(data) != shape.size:
        return None
    value: int = shape.unpack(data)[0]
    return value
