"""Packets that the kernel holds until somebody has looked at them: NFQUEUE messages, read and answered.

Shapes: linux/netfilter/nfnetlink_queue.h. Headers of netlink are in the machine's byte order, numbers inside
attributes of nfnetlink in the network's.

Rules of this file: any bytes give values, never an exception. Who reads a packet answers it with `accept`,
or the kernel holds it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from egressd.packets.netlink import ATTRIBUTE, ERROR, HEADER, NOOP, OVERRUN, Malformed, attributes, pieces

__all__ = ["Held", "accept", "parse"]

_NLM_F_REQUEST = 1  # linux/netlink.h
_PACKET, _VERDICT = 3 << 8 | 0, 3 << 8 | 1  # NFNL_SUBSYS_QUEUE, NFQNL_MSG_*
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource (the queue's number)
_PACKET_HDR, _VERDICT_HDR, _PAYLOAD = 1, 2, 10  # enum nfqnl_attr_type
_ABOUT = struct.Struct("!IHB")  # nfqnl_msg_packet_hdr: number, ethertype, hook
_NF_ACCEPT = 1  # linux/netfilter.h


@dataclass(frozen=True, slots=True)
class Held:
    """A packet that waits. `payload` begins with the network header, cut off where the copy was bounded."""

    queue: int
    number: int
    ethertype: int
    payload: bytes


def parse(datagram: bytes) -> tuple[Held | Malformed, ...]:
    """All packets of one datagram, in order. Acknowledgements and errors are none."""
    found: list[Held | Malformed] = []
    for piece in pieces(datagram):
        if isinstance(piece, Malformed):
            found.append(piece)
        elif piece.kind == _PACKET:
            found.append(_held(piece.body))
        elif piece.kind not in (NOOP, ERROR, OVERRUN):
            found.append(Malformed(f"message type {piece.kind:#06x} is not one of the packet queue's"))
    return tuple(found)


def _held(body: bytes) -> Held | Malformed:
    if len(body) < _GENERIC.size:
        return Malformed("a packet without its header")
    _, _, queue = _GENERIC.unpack_from(body)
    said = attributes(body[_GENERIC.size :])
    about = b"" if said is None else said.get(_PACKET_HDR, b"")
    if said is None or len(about) < _ABOUT.size:
        return Malformed("a packet whose number is not told, and which nobody can let go")
    number, ethertype, _ = _ABOUT.unpack_from(about)
    return Held(queue=queue, number=number, ethertype=ethertype, payload=said.get(_PAYLOAD, b""))


def accept(held: Held) -> bytes:
    """Let it go on, as it is. The kernel does not answer."""
    attribute = ATTRIBUTE.pack(ATTRIBUTE.size + 8, _VERDICT_HDR) + struct.pack("!II", _NF_ACCEPT, held.number)
    body = _GENERIC.pack(0, 0, held.queue) + attribute
    return HEADER.pack(HEADER.size + len(body), _VERDICT, _NLM_F_REQUEST, 0, 0) + body
