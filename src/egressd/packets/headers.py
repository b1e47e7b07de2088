"""What a packet attempted, read from its first bytes.

Rules of this file: any bytes give an `Attempt`, never an exception; what cannot be read is None, never a
guess. The bytes come from a sandbox that may have forged every one of them, so lengths in headers are
only believed as far as bytes are there, and the walk through IPv6 extension headers is bounded.

Shapes: RFC 791 (IPv4), RFC 8200 (IPv6), RFC 9293 (TCP), RFC 768 (UDP), RFC 792 and 4443 (ICMP).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

__all__ = ["ETHERTYPE_IPV4", "ETHERTYPE_IPV6", "Attempt", "Family", "parse"]

ETHERTYPE_IPV4, ETHERTYPE_IPV6 = 0x0800, 0x86DD  # linux/if_ether.h

_ICMP, _TCP, _UDP, _ICMPV6, _SCTP, _UDPLITE, _DCCP = 1, 6, 17, 58, 132, 136, 33
_WITH_PORTS = frozenset({_TCP, _UDP, _SCTP, _UDPLITE, _DCCP})
# linux/in.h; the rest is spelled "protocol-N"
_PROTOCOLS = {
    _ICMP: "icmp", 2: "igmp", 4: "ipip", _TCP: "tcp", _UDP: "udp", _DCCP: "dccp", 41: "sit", 47: "gre",
    50: "esp", 51: "ah", _ICMPV6: "icmpv6", 59: "no-next-header", 94: "ipip", 115: "l2tp", _SCTP: "sctp",
    _UDPLITE: "udplite",
}  # fmt: skip
# linux/if_ether.h; the rest is spelled "ethertype-0xNNNN"
_ETHERTYPES = {
    0x0806: "arp", 0x8035: "rarp", 0x8100: "vlan", 0x88A8: "vlan", 0x88CC: "lldp", 0x8847: "mpls",
    0x8863: "pppoe", 0x8864: "pppoe", 0x888E: "eapol", ETHERTYPE_IPV4: "ipv4", ETHERTYPE_IPV6: "ipv6",
}  # fmt: skip
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AH = 0, 43, 44, 51
_DESTINATION, _MOBILITY, _HIP, _SHIM6 = 60, 135, 139, 140
# RFC 8200 section 4 and the IANA list: extension headers whose length is in their second byte
_EXTENSIONS = frozenset({_HOP_BY_HOP, _ROUTING, _DESTINATION, _MOBILITY, _HIP, _SHIM6, _AH})
_MAX_EXTENSIONS = 16
_FLAGS = ("fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr")  # RFC 9293 3.1, lowest bit first


class Family(enum.StrEnum):
    """What the frame says it is."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one packet tried. None: not there, or not readable."""

    family: Family
    protocol: str  # "tcp", "protocol-200", "arp", "ethertype-0x1234", "unreadable"
    number: int | None = None  # IP protocol number
    source: IPv4Address | IPv6Address | None = None
    destination: IPv4Address | IPv6Address | None = None
    source_port: int | None = None
    destination_port: int | None = None
    tcp_flags: tuple[str, ...] = ()
    icmp_type: int | None = None
    icmp_code: int | None = None
    fragment: bool = False  # any fragment, the first one included
    options: bool = False  # IPv4 options or IPv6 extension headers
    truncated: bool = False  # a header ends before its end
    length: int | None = None  # bytes of the whole packet, as its IP header claims


_UNREADABLE = Attempt(family=Family.OTHER, protocol="unreadable", truncated=True)


def parse(packet: bytes, *, ethertype: int | None = None) -> Attempt:
    """Read a packet from its network header on.

    `ethertype` is what the frame was labelled (NFULA_PACKET_HDR.hw_protocol); without it, the version
    nibble decides. A label that contradicts the nibble is read as the label, and is unreadable.
    """
    version = packet[0] >> 4 if packet else None
    if ethertype is None:
        ethertype = {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}.get(version or 0)
    if ethertype is None:
        return _UNREADABLE
    if ethertype == ETHERTYPE_IPV4:
        return _ipv4(packet) if version == 4 else replace(_UNREADABLE, family=Family.IPV4)
    if ethertype == ETHERTYPE_IPV6:
        return _ipv6(packet) if version == 6 else replace(_UNREADABLE, family=Family.IPV6)
    return Attempt(
        family=Family.OTHER, protocol=_ETHERTYPES.get(ethertype, f"ethertype-0x{ethertype & 0xFFFF:04x}")
    )


def _ipv4(packet: bytes) -> Attempt:
    if len(packet) < 20:
        return Attempt(family=Family.IPV4, protocol="unreadable", truncated=True)
    length, flags_offset, number = struct.unpack_from("!2xHxxHxB", packet)
    header = (packet[0] & 0x0F) * 4
    attempt = Attempt(
        family=Family.IPV4,
        protocol=_protocol(number),
        number=number,
        source=IPv4Address(packet[12:16]),
        destination=IPv4Address(packet[16:20]),
        fragment=bool(flags_offset & 0x3FFF),  # more-fragments bit and offset; not don't-fragment
        options=header > 20,
        length=length,
    )
    if header < 20 or header > len(packet):
        return replace(attempt, truncated=True)
    if flags_offset & 0x1FFF:
        return attempt  # a later fragment: what follows is not a transport header
    return _transport(attempt, number, packet[header:])


def _ipv6(packet: bytes) -> Attempt:
    if len(packet) < 40:
        return Attempt(family=Family.IPV6, protocol="unreadable", truncated=True)
    payload_length, number = struct.unpack_from("!4xHB", packet)
    attempt = Attempt(
        family=Family.IPV6,
        protocol=_protocol(number),
        number=number,
        source=IPv6Address(packet[8:24]),
        destination=IPv6Address(packet[24:40]),
        length=40 + payload_length,
    )
    return _extensions(attempt, number, packet[40:])


def _extensions(attempt: Attempt, number: int, rest: bytes) -> Attempt:
    """Walk to the transport header (RFC 8200 section 4)."""
    for _ in range(_MAX_EXTENSIONS):
        if number == _FRAGMENT:
            if len(rest) < 8:
                return _at(attempt, number, truncated=True)
            attempt = replace(attempt, fragment=True, options=True)
            offset = struct.unpack_from("!2xH", rest)[0] >> 3
            number, rest = rest[0], rest[8:]
            if offset:
                return _at(attempt, number)
        elif number in _EXTENSIONS:
            attempt = replace(attempt, options=True)
            # RFC 4302 2.2: the authentication header counts 4-byte words minus 2, the others 8-byte ones
            size = 2 if len(rest) < 2 else (rest[1] + 2) * 4 if number == _AH else (rest[1] + 1) * 8
            if len(rest) < max(size, 8):
                return _at(attempt, number, truncated=True)
            number, rest = rest[0], rest[size:]
        else:
            return _transport(_at(attempt, number), number, rest)
    return _at(attempt, number, truncated=True)


def _at(attempt: Attempt, number: int, *, truncated: bool = False) -> Attempt:
    return replace(attempt, number=number, protocol=_protocol(number), truncated=truncated)


def _transport(attempt: Attempt, number: int, data: bytes) -> Attempt:
    if number in _WITH_PORTS:
        if len(data) < 4:
            return replace(attempt, truncated=True)
        source, destination = struct.unpack_from("!HH", data)
        attempt = replace(attempt, source_port=source, destination_port=destination)
        if number != _TCP:
            return attempt
        if len(data) < 14:
            return replace(attempt, truncated=True)
        return replace(attempt, tcp_flags=tuple(n for i, n in enumerate(_FLAGS) if data[13] >> i & 1))
    if number in (_ICMP, _ICMPV6):
        if len(data) < 2:
            return replace(attempt, truncated=True)
        return replace(attempt, icmp_type=data[0], icmp_code=data[1])
    return attempt


def _protocol(number: int) -> str:
    return _PROTOCOLS.get(number, f"protocol-{number}")
