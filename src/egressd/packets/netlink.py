"""Datagrams of netlink, taken apart: messages, and attributes inside them (linux/netlink.h).

Rules of this file: any bytes give values, never an exception. What does not add up is `Malformed`, and what
came before it is still told. Headers are in the machine's byte order; numbers inside attributes of
nfnetlink are in the network's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["ATTRIBUTE", "DONE", "ERROR", "HEADER", "NOOP", "OVERRUN", "Malformed", "Overrun", "Piece",
           "aligned", "attributes", "pieces"]  # fmt: skip

NOOP, ERROR, DONE, OVERRUN = 1, 2, 3, 4  # NLMSG_*
HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
ATTRIBUTE = struct.Struct("=HH")  # nlattr: length with this header, type
_TYPE_MASK = 0x3FFF  # NLA_TYPE_MASK: without the nested and byte-order flags


@dataclass(frozen=True, slots=True)
class Overrun:
    """NLMSG_OVERRUN: data were lost before this message."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message of the kernel's."""

    text: str


class Piece(NamedTuple):
    """One message without its header."""

    kind: int
    sequence: int
    body: bytes


def pieces(datagram: bytes) -> Iterator[Piece | Malformed]:
    """The messages of one datagram, in order."""
    offset, end = 0, len(datagram)
    while end - offset >= HEADER.size:
        length, kind, _, sequence, _ = HEADER.unpack_from(datagram, offset)
        if not HEADER.size <= length <= end - offset:
            yield Malformed(f"a message claims {length} bytes of {end - offset}")
            return
        yield Piece(kind, sequence, datagram[offset + HEADER.size : offset + length])
        offset += aligned(length)
    if offset < end:
        yield Malformed(f"{end - offset} bytes after the last message")


def attributes(data: bytes) -> dict[int, bytes] | None:
    """Attributes by type; None if their lengths do not add up. Of equal types the first counts."""
    found: dict[int, bytes] = {}
    offset, end = 0, len(data)
    while end - offset >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if not ATTRIBUTE.size <= length <= end - offset:
            return None
        found.setdefault(kind & _TYPE_MASK, data[offset + ATTRIBUTE.size : offset + length])
        offset += aligned(length)
    return found


def aligned(length: int) -> int:
    return (length + 3) & ~3  # NLMSG_ALIGN, NLA_ALIGN
