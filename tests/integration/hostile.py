"""Frames by the thousand, as the owner of a sandbox's network may send them."""

from __future__ import annotations

import struct

from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from egressd.ruleset.layout import GATEWAY_MAC, SANDBOX_MAC

__all__ = ["frames", "from_ports"]


def frames(family: int, source: str, to: str, bodies: list[Packet]) -> list[bytes]:
    header = IP(src=source, dst=to) if family == 4 else IPv6(src=source, dst=to)
    return [bytes(Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / header / body) for body in bodies]


def from_ports(family: int, source: str, to: str, body: Packet, ports: range) -> list[bytes]:
    """The same body, TCP or UDP, from each port. Only the first is computed; the checksums of the others
    follow from the difference (RFC 1624)."""
    [first] = frames(family, source, to, [body])
    where = 14 + (20 if family == 4 else 40)
    sum_ = where + (16 if body.name == "TCP" else 6)
    old, checksum = struct.unpack_from(">H", first, where)[0], struct.unpack_from(">H", first, sum_)[0]
    found = []
    for port in ports:
        total = (~checksum & 0xFFFF) + (~old & 0xFFFF) + port
        total = (total & 0xFFFF) + (total >> 16)
        frame = bytearray(first)
        struct.pack_into(">H", frame, where, port)
        struct.pack_into(">H", frame, sum_, ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
        found.append(bytes(frame))
    return found
