"""PURE: frames that no socket of a sandbox would send, but whoever owns its network namespace may.

A caller is root of the user namespace that its own bubblewrap made: it can enter its sandbox's network from
outside, where no filter holds, and write any bytes to the link. So each frame here is lawful in all but one
thing, and would reach the resolver if that one thing went unnoticed; or it is what no link of ours carries.

Built with `struct` from the RFCs named beside them; tests compare them with scapy's.
"""

# ruff: noqa: S104 - 0.0.0.0 is a source here, and nothing is bound
from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from egressd.ruleset.layout import GATEWAY_MAC, NEXT_HOP6, RESOLVER4, RESOLVER6, SANDBOX_MAC
from egressd.selftest.shown.attacks import RAW4, RAW6, UNLISTED, question

__all__ = ["FRAMES", "Ends", "Frame", "checksum", "ethernet", "ipv4", "ipv6", "tcp", "udp"]

IPV4, ARP, VLAN, QINQ, IPV6, MPLS, PPPOE, LLDP, EAPOL = (
    0x0800, 0x0806, 0x8100, 0x88A8, 0x86DD, 0x8847, 0x8864, 0x88CC, 0x888E,
)  # fmt: skip
_ICMP, _IGMP, _IPIP, _TCP, _UDP, _SIT, _GRE, _ESP, _ICMP6, _SCTP = 1, 2, 4, 6, 17, 41, 47, 50, 58, 132
_EVERYBODY = "ff:ff:ff:ff:ff:ff"


@dataclass(frozen=True, slots=True)
class Ends:
    """The sandbox's own addresses, and another's."""

    own4: IPv4Address
    own6: IPv6Address
    other4: IPv4Address
    other6: IPv6Address


@dataclass(frozen=True, slots=True)
class Frame:
    name: str
    family: str  # "v4", "v6", or "-"
    counted: str  # "denied", or "other": not plain IP
    build: Callable[[Ends], bytes]


# --------------------------------------------------------------------------------------------------
# layers


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(kind: int, body: bytes, *, to: str = GATEWAY_MAC, source: str = SANDBOX_MAC) -> bytes:
    return _mac(to) + _mac(source) + struct.pack("!H", kind) + body


def checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def ipv4(
    source: IPv4Address, to: IPv4Address, protocol: int, body: bytes, *,
    flags: int = 0, options: bytes = b"", wrong: bool = False,
) -> bytes:  # fmt: skip
    """RFC 791. `flags`: the 16 bits of flags and offset; `options` in whole words; `wrong`: the checksum."""
    words = 5 + len(options) // 4
    head = struct.pack(
        "!BBHHHBBH4s4s", 4 << 4 | words, 0, words * 4 + len(body), 1, flags, 64, protocol, 0,
        source.packed, to.packed,
    )  # fmt: skip
    total = checksum(head + options) ^ (0x5555 if wrong else 0)
    return head[:10] + struct.pack("!H", total) + head[12:] + options + body


def ipv6(source: IPv6Address, to: IPv6Address, following: int, body: bytes) -> bytes:
    """RFC 8200."""
    return struct.pack("!IHBB", 6 << 28, len(body), following, 64) + source.packed + to.packed + body


def _pseudo(source: IPv4Address | IPv6Address, to: IPv4Address | IPv6Address, kind: int, size: int) -> bytes:
    if source.version == 4:
        return source.packed + to.packed + struct.pack("!BBH", 0, kind, size)
    return source.packed + to.packed + struct.pack("!II", size, kind)


def udp(source: IPv4Address | IPv6Address, to: IPv4Address | IPv6Address, port: int, data: bytes) -> bytes:
    """RFC 768, from port 5353 to `port`."""
    head = struct.pack("!HHHH", 5353, port, 8 + len(data), 0)
    total = checksum(_pseudo(source, to, _UDP, len(head) + len(data)) + head + data) or 0xFFFF
    return head[:6] + struct.pack("!H", total) + data


def tcp(source: IPv4Address | IPv6Address, to: IPv4Address | IPv6Address, port: int, flags: int) -> bytes:
    """RFC 9293, from port 5353, without data."""
    head = struct.pack("!HHIIBBHHH", 5353, port, 1, 1 if flags & 0x10 else 0, 5 << 4, flags, 8192, 0, 0)
    total = checksum(_pseudo(source, to, _TCP, len(head)) + head)
    return head[:16] + struct.pack("!H", total) + head[18:]


def _icmp6(source: IPv6Address, to: IPv6Address, kind: int, body: bytes) -> bytes:
    """RFC 4443: type, code 0, checksum, body."""
    data = struct.pack("!BBH", kind, 0, 0) + body
    total = checksum(_pseudo(source, to, _ICMP6, len(data)) + data)
    return data[:2] + struct.pack("!H", total) + body


def _icmp4(kind: int, code: int, body: bytes) -> bytes:
    """RFC 792."""
    data = struct.pack("!BBH", kind, code, 0) + body
    return data[:2] + struct.pack("!H", checksum(data)) + body


# --------------------------------------------------------------------------------------------------
# what is sent

_ASKED = question(UNLISTED)
_RAW4, _RAW6 = IPv4Address(RAW4), IPv6Address(RAW6)


def _question4(source: IPv4Address, to: IPv4Address = RESOLVER4) -> bytes:
    return ipv4(source, to, _UDP, udp(source, to, 53, _ASKED))


def _question6(source: IPv6Address, to: IPv6Address = RESOLVER6) -> bytes:
    return ipv6(source, to, _UDP, udp(source, to, 53, _ASKED))


def _arp(operation: int, source: str, owner: IPv4Address, asked: IPv4Address) -> bytes:
    """RFC 826."""
    return (
        struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
        + _mac(source)
        + owner.packed
        + bytes(6)
        + asked.packed
    )


def _to_all(address: str) -> str:
    """RFC 2464 section 7, of an IPv6 group."""
    return "33:33:" + ":".join(f"{byte:02x}" for byte in IPv6Address(address).packed[-4:])


def _group6(e: Ends, group: str, kind: int, body: bytes, source: IPv6Address | None = None) -> bytes:
    own, to = source or e.own6, IPv6Address(group)
    return ethernet(IPV6, ipv6(own, to, _ICMP6, _icmp6(own, to, kind, body)), to=_to_all(group))


def _one6(e: Ends, to: IPv6Address, kind: int, body: bytes) -> bytes:
    return ethernet(IPV6, ipv6(e.own6, to, _ICMP6, _icmp6(e.own6, to, kind, body)))


def _with_header(e: Ends, kind: int, header: bytes) -> bytes:
    """An extension header between IPv6 and a lawful question. Its first byte, what follows, is put in."""
    return ethernet(
        IPV6, ipv6(e.own6, RESOLVER6, kind, bytes([_UDP]) + header + udp(e.own6, RESOLVER6, 53, _ASKED))
    )


def _source4(address: str) -> Callable[[Ends], bytes]:
    return lambda e: ethernet(IPV4, _question4(IPv4Address(address)))


def _source6(address: str) -> Callable[[Ends], bytes]:
    return lambda e: ethernet(IPV6, _question6(IPv6Address(address)))


def _carried4(protocol: int, body: bytes) -> Callable[[Ends], bytes]:
    return lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, protocol, body))


def _carried6(protocol: int, body: bytes) -> Callable[[Ends], bytes]:
    return lambda e: ethernet(IPV6, ipv6(e.own6, RESOLVER6, protocol, body))


def _kind(kind: int, body: bytes = bytes(46), *, to: str = GATEWAY_MAC) -> Callable[[Ends], bytes]:
    return lambda e: ethernet(kind, body, to=to)


_INNER4 = _question4(IPv4Address("192.0.2.9"), _RAW4)
_INNER6 = _question6(IPv6Address("2001:db8::9"), _RAW6)
_OPTION = struct.pack("!BB6s", 2, 1, _mac(SANDBOX_MAC))  # RFC 4861 section 4.6.1, target link-layer address
_SOLICITED = "ff02::1:ff00:53"

FRAMES: tuple[Frame, ...] = (
    # to be somebody else
    Frame("the source of the sandbox after", "v4", "denied", lambda e: ethernet(IPV4, _question4(e.other4))),
    Frame("the source of the sandbox after", "v6", "denied", lambda e: ethernet(IPV6, _question6(e.other6))),
    *(
        Frame(f"the source {name}", "v4", "denied", _source4(address))
        for name, address in (
            ("of a raw address", RAW4), ("of the resolver", str(RESOLVER4)),
            ("of the gateway", "169.254.54.2"),
            ("of the host", "169.254.54.1"), ("of the inspector", "169.254.64.1"), ("127.0.0.1", "127.0.0.1"),
            ("0.0.0.0", "0.0.0.0"), ("255.255.255.255", "255.255.255.255"),
        )
    ),
    *(
        Frame(f"the source {name}", "v6", "denied", _source6(address))
        for name, address in (
            ("of a raw address", RAW6), ("of the resolver", str(RESOLVER6)), ("of the gateway", "fd53:2::2"),
            ("of the host", "fd53:2::1"), ("of the inspector", "fd53:3::1"), ("::1", "::1"), ("::", "::"),
            ("fe80::53", "fe80::53"),
        )
    ),
    Frame("an IPv4-mapped source", "v6", "denied",
          lambda e: ethernet(IPV6, _question6(IPv6Address(f"::ffff:{e.own4}")))),
    # to the wrong machine of the link
    Frame("a lawful question to everybody's MAC", "v4", "denied",
          lambda e: ethernet(IPV4, _question4(e.own4), to=_EVERYBODY)),
    Frame("a lawful question to a group's MAC", "v6", "denied",
          lambda e: ethernet(IPV6, _question6(e.own6), to=_to_all("ff02::1"))),
    Frame("a lawful question to another MAC", "v4", "denied",
          lambda e: ethernet(IPV4, _question4(e.own4), to="02:53:00:00:00:99")),
    Frame("a lawful question to another MAC", "v6", "denied",
          lambda e: ethernet(IPV6, _question6(e.own6), to="02:53:00:00:00:99")),
    # neighbours
    Frame("ARP: who has the gateway", "-", "other",
          lambda e: ethernet(ARP, _arp(1, SANDBOX_MAC, e.own4, RESOLVER4), to=_EVERYBODY)),
    Frame("ARP: I am the gateway", "-", "other",
          lambda e: ethernet(ARP, _arp(2, SANDBOX_MAC, RESOLVER4, RESOLVER4))),
    Frame("ARP: I am the sandbox after (gratuitous)", "-", "other",
          lambda e: ethernet(ARP, _arp(2, SANDBOX_MAC, e.other4, e.other4), to=_EVERYBODY)),
    Frame("ARP: a probe of an address", "-", "other",
          lambda e: ethernet(ARP, _arp(1, SANDBOX_MAC, IPv4Address(0), e.other4), to=_EVERYBODY)),
    Frame("ND: who has the gateway", "v6", "denied",
          lambda e: _group6(e, _SOLICITED, 135, bytes(4) + NEXT_HOP6.packed)),
    Frame("ND: I am the gateway", "v6", "denied",
          lambda e: _group6(e, "ff02::1", 136, b"\xa0\0\0\0" + NEXT_HOP6.packed + _OPTION)),
    Frame("ND: I am the sandbox after", "v6", "denied",
          lambda e: _one6(e, NEXT_HOP6, 136, b"\x60\0\0\0" + e.other6.packed + _OPTION)),
    Frame("ND: is an address free", "v6", "denied",
          lambda e: _group6(e, _SOLICITED, 135, bytes(4) + e.other6.packed, IPv6Address(0))),
    Frame("ND: I am your router", "v6", "denied",
          lambda e: _group6(e, "ff02::1", 134, struct.pack("!BBHII", 64, 0, 1800, 0, 0))),
    Frame("ND: where is a router", "v6", "denied", lambda e: _group6(e, "ff02::2", 133, bytes(4))),
    Frame("ND: a better way (redirect)", "v6", "denied",
          lambda e: _one6(e, NEXT_HOP6, 137, bytes(4) + e.own6.packed + e.other6.packed)),
    Frame("MLD: I listen to a group", "v6", "denied",
          lambda e: _group6(e, "ff02::16", 143, struct.pack("!HHBBH", 0, 1, 4, 0, 0)
                            + IPv6Address("ff0e::db8:0:1").packed)),
    Frame("IGMP: I listen to a group", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, IPv4Address("224.0.0.22"), _IGMP,
                                        _icmp4(0x22, 0, struct.pack("!HHBBH", 0, 1, 4, 0, 0)[:4]
                                               + b"\x04\0\0\0" + b"\xe9\xfc\0\1")), to="01:00:5e:00:00:16")),
    # ICMP
    Frame("an echo with data, to a raw address", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, _RAW4, _ICMP, _icmp4(8, 0, b"\0\1\0\1selftest")))),
    Frame("an echo with data, to a raw address", "v6", "denied",
          lambda e: _one6(e, _RAW6, 128, b"\0\1\0\1selftest")),
    Frame("an echo to the resolver", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _ICMP, _icmp4(8, 0, b"\0\1\0\1selftest")))),
    Frame("an echo to the resolver", "v6", "denied", lambda e: _one6(e, RESOLVER6, 128, b"\0\1\0\1selftest")),
    Frame("ICMP: a better way (redirect)", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _ICMP,
                                        _icmp4(5, 1, e.own4.packed + _INNER4[:28])))),
    Frame("ICMP: another's connection is unreachable", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _ICMP,
                                        _icmp4(3, 3, bytes(4) + _question4(e.other4)[:28])))),
    Frame("ICMP: another's packets are too big", "v6", "denied",
          lambda e: _one6(e, RESOLVER6, 2, struct.pack("!I", 1280) + _question6(e.other6)[:48])),
    # disguises of a lawful question
    Frame("the first of two fragments", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _UDP, udp(e.own4, RESOLVER4, 53, _ASKED)[:24],
                                        flags=0x2000))),
    Frame("the last of two fragments", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _UDP, udp(e.own4, RESOLVER4, 53, _ASKED)[24:],
                                        flags=3))),
    Frame("a tiny first fragment", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _TCP, tcp(e.own4, RESOLVER4, 53, 2)[:8],
                                        flags=0x2000))),
    Frame("a fragment beyond the longest datagram", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _UDP, bytes(64), flags=0x1FFF))),
    Frame("a fragment header", "v6", "denied", lambda e: _with_header(e, 44, struct.pack("!BHI", 0, 1, 7))),
    Frame("a fragment header of a whole datagram", "v6", "denied",
          lambda e: _with_header(e, 44, struct.pack("!BHI", 0, 0, 7))),
    Frame("hop-by-hop options", "v6", "denied", lambda e: _with_header(e, 0, b"\0\1\4\0\0\0\0")),
    Frame("destination options", "v6", "denied", lambda e: _with_header(e, 60, b"\0\1\4\0\0\0\0")),
    Frame("a routing header", "v6", "denied",
          lambda e: _with_header(e, 43, struct.pack("!BBBI", 2, 0, 1, 0) + _RAW6.packed)),
    Frame("loose source routing", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _UDP, udp(e.own4, RESOLVER4, 53, _ASKED),
                                        options=b"\x83\x07\x04" + _RAW4.packed + b"\0"))),
    Frame("a router alert", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, RESOLVER4, _UDP, udp(e.own4, RESOLVER4, 53, _ASKED),
                                        options=b"\x94\x04\0\0"))),
    Frame("a wrong checksum of the header, to a raw address", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, _RAW4, _UDP, udp(e.own4, _RAW4, 53, _ASKED), wrong=True))),
    # connections of nobody's
    Frame("a SYN to a raw address", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, _RAW4, _TCP, tcp(e.own4, _RAW4, 443, 0x02)))),
    Frame("a SYN to a raw address", "v6", "denied",
          lambda e: ethernet(IPV6, ipv6(e.own6, _RAW6, _TCP, tcp(e.own6, _RAW6, 443, 0x02)))),
    Frame("an ACK of no connection, to a raw address", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, _RAW4, _TCP, tcp(e.own4, _RAW4, 443, 0x10)))),
    Frame("a reset for another's connection", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.other4, RESOLVER4, _TCP, tcp(e.other4, RESOLVER4, 53, 0x04)))),
    Frame("a SYN to oneself", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, e.own4, _TCP, tcp(e.own4, e.own4, 80, 0x02)))),
    Frame("a SYN to the sandbox after", "v4", "denied",
          lambda e: ethernet(IPV4, ipv4(e.own4, e.other4, _TCP, tcp(e.own4, e.other4, 80, 0x02)))),
    Frame("a SYN to the sandbox after", "v6", "denied",
          lambda e: ethernet(IPV6, ipv6(e.own6, e.other6, _TCP, tcp(e.own6, e.other6, 80, 0x02)))),
    # tunnels and rare protocols, to an address that is lawful for UDP
    *(
        Frame(f"{name} to the resolver", "v4", "denied", _carried4(number, body))
        for name, number, body in (
            ("IPv4 in IPv4 (IPIP)", _IPIP, _INNER4), ("IPv6 in IPv4 (SIT)", _SIT, _INNER6),
            ("GRE", _GRE, struct.pack("!HH", 0, IPV4) + _INNER4), ("ESP", _ESP, bytes(32)),
            ("SCTP", _SCTP, struct.pack("!HHI", 5353, 53, 0) + bytes(16)),
        )
    ),
    *(
        Frame(f"{name} to the resolver", "v6", "denied", _carried6(number, body))
        for name, number, body in (
            ("IPv4 in IPv6", _IPIP, _INNER4), ("IPv6 in IPv6", _SIT, _INNER6),
            ("GRE", _GRE, struct.pack("!HH", 0, IPV6) + _INNER6), ("ESP", _ESP, bytes(32)),
            ("SCTP", _SCTP, struct.pack("!HHI", 5353, 53, 0) + bytes(16)), ("nothing", 59, b""),
        )
    ),
    # what is not plain IP
    Frame("a VLAN's tag before a lawful question", "-", "other",
          lambda e: ethernet(VLAN, struct.pack("!HH", 7, IPV4) + _question4(e.own4))),
    Frame("the tag of VLAN 0 before a lawful question", "-", "other",
          lambda e: ethernet(VLAN, struct.pack("!HH", 0, IPV4) + _question4(e.own4))),
    Frame("two tags (QinQ)", "-", "other",
          lambda e: ethernet(QINQ, struct.pack("!HHHH", 1, VLAN, 2, IPV4) + _question4(e.own4))),
    Frame("MPLS", "-", "other", lambda e: ethernet(MPLS, b"\0\1\1\x40" + _question4(e.own4))),
    Frame("PPPoE", "-", "other", lambda e: ethernet(PPPOE, b"\x11\0\0\1\0\6\0\x21" + _question4(e.own4))),
    Frame("LLDP", "-", "other", _kind(LLDP, to="01:80:c2:00:00:0e")),
    Frame("EAPOL", "-", "other", _kind(EAPOL, to="01:80:c2:00:00:03")),
    Frame("a spanning tree's frame (802.3)", "-", "other", _kind(39, to="01:80:c2:00:00:00")),
    Frame("FCoE", "-", "other", _kind(0x8906)),
    Frame("AoE", "-", "other", _kind(0x88A2)),
    Frame("RoCE", "-", "other", _kind(0x8915)),
    Frame("PTP", "-", "other", _kind(0x88F7)),
    Frame("Wake-on-LAN", "-", "other", _kind(0x0842, b"\xff" * 6 + _mac(GATEWAY_MAC) * 16)),
    Frame("an experimental type", "-", "other", _kind(0x88B5)),
    # what only calls itself so
    Frame("IPv6 that is said to be IPv4", "v6", "denied", lambda e: ethernet(IPV4, _question6(e.own6))),
    Frame("IPv4 that is said to be IPv6", "v4", "denied", lambda e: ethernet(IPV6, _question4(e.own4))),
    Frame("nothing above Ethernet", "v4", "denied", lambda e: ethernet(IPV4, b"")),
    Frame("half a header", "v6", "denied", lambda e: ethernet(IPV6, _question6(e.own6)[:24])),
)  # fmt: skip
