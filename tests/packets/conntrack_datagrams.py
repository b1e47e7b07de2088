"""Datagrams as the kernel's connection tracking writes them at the end of a connection."""

from __future__ import annotations

import struct
from ipaddress import ip_address

__all__ = ["attribute", "destroy", "ended", "message", "nested", "tuple_of"]

DESTROY = 0x102
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | 0x8000, b"".join(parts))


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body + bytes(-len(body) % 4)


def destroy(*attributes: bytes, family: int = 2) -> bytes:
    return message(DESTROY, struct.pack("!BBH", family, 0, 0) + b"".join(attributes))


def tuple_of(kind: int, source: str, destination: str, protocol: int, *ports: int) -> bytes:
    one, other = ip_address(source).packed, ip_address(destination).packed
    first, second = (1, 2) if len(one) == 4 else (3, 4)
    if protocol in (ICMP, ICMPV6):
        base = 4 if protocol == ICMP else 7
        said = (attribute(base, struct.pack("!H", 7)), attribute(base + 1, bytes([ports[0]])),
                attribute(base + 2, b"\0"))  # fmt: skip
    else:
        said = tuple(attribute(2 + i, struct.pack("!H", port)) for i, port in enumerate(ports))
    return nested(
        kind,
        nested(1, attribute(first, one), attribute(second, other)),
        nested(2, attribute(1, bytes([protocol])), *said),
    )


def counters(kind: int, packets: int, octets: int) -> bytes:
    return nested(kind, attribute(1, struct.pack("!Q", packets)), attribute(2, struct.pack("!Q", octets)))


def ended(
    source: str,
    destination: str,
    port: int = 443,
    *,
    mark: int,
    real: str | None = None,
    source_port: int = 40000,
    protocol: int = TCP,
    out: tuple[int, int] | None = (3, 200),
    back: tuple[int, int] | None = (2, 5000),
    began: int | None = 1_700_000_000_000_000_000,
    lasted: int = 1_500_000_000,
) -> bytes:
    """One destroy event; times in nanoseconds."""
    real = real or destination
    ports = (8,) if protocol in (ICMP, ICMPV6) else (source_port, port)
    parts = [
        tuple_of(1, source, destination, protocol, *ports),
        tuple_of(2, real, "169.254.54.2" if "." in real else "fd53:2::2", protocol, *reversed(ports)),
        attribute(12, struct.pack("!I", 77)),
        attribute(3, struct.pack("!I", 0x2E)),
        attribute(8, struct.pack("!I", mark)),
    ]
    parts += [counters(9, *out)] if out else []
    parts += [counters(10, *back)] if back else []
    if began is not None:
        times = [attribute(1, struct.pack("!Q", began)), attribute(2, struct.pack("!Q", began + lasted))]
        parts.append(nested(20, *times))
    if protocol == TCP:
        parts.append(nested(4, nested(1, attribute(1, b"\7"))))
    return destroy(*parts, family=2 if "." in source else 10)
