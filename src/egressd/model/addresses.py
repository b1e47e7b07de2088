"""What kind of address is this? The special-purpose registries as one table, and who may reach what.

Sources: the IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890 and its updates), the IPv6
address space registry (only 2000::/3 is allocated as global unicast), and the documentation of the clouds
for their metadata services. The most specific entry decides. An address that carries an IPv4 address
inside it (mapped, NAT64, 6to4, Teredo ...) belongs to its own class *and* is looked into: `classes`.

A name may resolve to, and a rule may reach, only what `USABLE` lists. It is a list of what is permitted:
a class that somebody adds and forgets here is denied.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_network,
)
from typing import TypeAlias

from egressd.model.errors import Unfit

__all__ = [
    "Address", "AddressClass", "Network", "check_network", "classes", "classify", "embedded", "objection",
    "usable",
]  # fmt: skip

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network


class AddressClass(enum.StrEnum):
    """The value is what messages and the journal spell."""

    RESERVED = "reserved"  # the zero of this table: nothing says what it is for
    GLOBAL = "global"
    PRIVATE = "private"
    UNIQUE_LOCAL = "unique-local"
    CGNAT = "carrier-grade-nat"
    DOCUMENTATION = "documentation"
    BENCHMARKING = "benchmarking"
    LOOPBACK = "loopback"
    LINK_LOCAL = "link-local"
    SITE_LOCAL = "site-local"
    METADATA = "metadata"
    MULTICAST = "multicast"
    BROADCAST = "broadcast"
    UNSPECIFIED = "unspecified"
    THIS_NETWORK = "this-network"
    PROTOCOL = "protocol-assignment"
    ANYCAST = "protocol-anycast"
    IPV4_MAPPED = "ipv4-mapped"
    IPV4_COMPATIBLE = "ipv4-compatible"
    IPV4_TRANSLATED = "ipv4-translated"
    NAT64 = "nat64"
    NAT64_LOCAL = "nat64-local"
    SIX_TO_FOUR = "6to4"
    TEREDO = "teredo"
    DISCARD = "discard"
    ORCHID = "orchid"
    DRONE_ID = "drone-remote-id"
    AMT = "amt"
    AS112 = "as112"
    SRV6 = "srv6"
    OWN = "egressd-pool"  # never from classify(): whoever asks says which networks are egressd's own


_C = AddressClass
# Classes a destination may have: for any name, and for names and networks marked private.
_PUBLIC = frozenset({_C.GLOBAL})
_PRIVATE = _PUBLIC | {_C.PRIVATE, _C.UNIQUE_LOCAL, _C.CGNAT, _C.DOCUMENTATION}

_TABLE: tuple[tuple[str, AddressClass], ...] = (
    # --- IPv4
    ("0.0.0.0/32", _C.UNSPECIFIED),  # RFC 1122 section 3.2.1.3; connect() to it means this host
    ("0.0.0.0/8", _C.THIS_NETWORK),
    ("10.0.0.0/8", _C.PRIVATE),  # RFC 1918
    ("172.16.0.0/12", _C.PRIVATE),
    ("192.168.0.0/16", _C.PRIVATE),
    ("100.64.0.0/10", _C.CGNAT),  # RFC 6598
    ("100.100.100.200/32", _C.METADATA),  # Alibaba Cloud
    ("127.0.0.0/8", _C.LOOPBACK),  # RFC 1122
    ("168.63.129.16/32", _C.METADATA),  # Azure's wire server, a global address
    ("169.254.0.0/16", _C.LINK_LOCAL),  # RFC 3927
    ("169.254.42.42/32", _C.METADATA),  # Scaleway
    ("169.254.169.123/32", _C.METADATA),  # Amazon time
    ("169.254.169.253/32", _C.METADATA),  # Amazon DNS
    ("169.254.169.254/32", _C.METADATA),  # Amazon, Google, Azure, OpenStack and others
    ("169.254.170.2/32", _C.METADATA),  # Amazon ECS task credentials
    ("169.254.170.23/32", _C.METADATA),  # Amazon EKS pod identity
    ("192.0.0.0/24", _C.PROTOCOL),  # RFC 6890 section 2.1
    ("192.0.0.9/32", _C.ANYCAST),  # Port Control Protocol, RFC 7723: talks to the nearest router
    ("192.0.0.10/32", _C.ANYCAST),  # TURN, RFC 8155
    ("192.0.0.192/32", _C.METADATA),  # Oracle Cloud, older instances
    ("192.0.2.0/24", _C.DOCUMENTATION),  # RFC 5737
    ("198.51.100.0/24", _C.DOCUMENTATION),
    ("203.0.113.0/24", _C.DOCUMENTATION),
    ("192.31.196.0/24", _C.AS112),  # RFC 7535
    ("192.175.48.0/24", _C.AS112),  # RFC 7534
    ("192.52.193.0/24", _C.AMT),  # RFC 7450
    ("192.88.99.0/24", _C.SIX_TO_FOUR),  # relay anycast, deprecated by RFC 7526
    ("198.18.0.0/15", _C.BENCHMARKING),  # RFC 2544; egressd's own pools by default
    ("224.0.0.0/4", _C.MULTICAST),  # RFC 5771
    ("240.0.0.0/4", _C.RESERVED),  # RFC 1112
    ("255.255.255.255/32", _C.BROADCAST),  # RFC 919
    # --- IPv6
    ("::/128", _C.UNSPECIFIED),  # RFC 4291
    ("::1/128", _C.LOOPBACK),
    ("::/96", _C.IPV4_COMPATIBLE),  # deprecated by RFC 4291
    ("::ffff:0:0/96", _C.IPV4_MAPPED),
    ("::ffff:0:0:0/96", _C.IPV4_TRANSLATED),  # RFC 2765
    ("64:ff9b::/96", _C.NAT64),  # RFC 6052
    ("64:ff9b:1::/48", _C.NAT64_LOCAL),  # RFC 8215
    ("100::/64", _C.DISCARD),  # RFC 6666
    ("100:0:0:1::/64", _C.DISCARD),  # dummy prefix, RFC 9780
    ("2000::/3", _C.GLOBAL),  # the only block IANA hands out as global unicast
    ("2001::/23", _C.PROTOCOL),  # RFC 2928
    ("2001::/32", _C.TEREDO),  # RFC 4380
    ("2001:1::1/128", _C.ANYCAST),  # Port Control Protocol, RFC 7723
    ("2001:1::2/128", _C.ANYCAST),  # TURN, RFC 8155
    ("2001:1::3/128", _C.ANYCAST),  # DNS service registration, RFC 9665
    ("2001:2::/48", _C.BENCHMARKING),  # RFC 5180
    ("2001:3::/32", _C.AMT),  # RFC 7450
    ("2001:4:112::/48", _C.AS112),  # RFC 7535
    ("2620:4f:8000::/48", _C.AS112),  # RFC 7534
    ("2001:10::/28", _C.ORCHID),  # RFC 4843, deprecated
    ("2001:20::/28", _C.ORCHID),  # ORCHIDv2, RFC 7343
    ("2001:30::/28", _C.DRONE_ID),  # RFC 9374
    ("2001:db8::/32", _C.DOCUMENTATION),  # RFC 3849
    ("3fff::/20", _C.DOCUMENTATION),  # RFC 9637
    ("2002::/16", _C.SIX_TO_FOUR),  # RFC 3056
    ("5f00::/16", _C.SRV6),  # RFC 9602
    ("fc00::/7", _C.UNIQUE_LOCAL),  # RFC 4193
    ("fd00:ec2::/32", _C.METADATA),  # Amazon: ::254 metadata, ::253 DNS, ::123 time, ::23 EKS
    ("fd00:c1::a9fe:a9fe/128", _C.METADATA),  # Oracle Cloud
    ("fd00:42::42/128", _C.METADATA),  # Scaleway
    ("fd20:ce::254/128", _C.METADATA),  # Google
    ("fe80::/10", _C.LINK_LOCAL),  # RFC 4291
    ("fe80::a9fe:a9fe/128", _C.METADATA),  # OpenStack
    ("fec0::/10", _C.SITE_LOCAL),  # deprecated by RFC 3879
    ("ff00::/8", _C.MULTICAST),  # RFC 4291
)
SPECIAL: tuple[tuple[Network, AddressClass], ...] = tuple(
    sorted(((ip_network(text), kind) for text, kind in _TABLE), key=lambda entry: -entry[0].prefixlen)
)


def _rows(version: int) -> tuple[tuple[int, int, AddressClass], ...]:
    """(shift, prefix, class), most specific first: an address matches when `address >> shift == prefix`."""
    rows = []
    for network, kind in SPECIAL:
        if network.version == version:
            shift = network.max_prefixlen - network.prefixlen
            rows.append((shift, int(network.network_address) >> shift, kind))
    return tuple(rows)


_ROWS = {4: _rows(4), 6: _rows(6)}
# An IPv4 address in no registry is ordinary; an IPv6 address outside 2000::/3 is not allocated.
_OTHERWISE = {4: AddressClass.GLOBAL, 6: AddressClass.RESERVED}


def classify(address: Address) -> AddressClass:
    """The class of `address` itself, most specific first."""
    value = int(address)
    for shift, prefix, kind in _ROWS[address.version]:
        if value >> shift == prefix:
            return kind
    return _OTHERWISE[address.version]


def embedded(address: Address) -> IPv4Address | None:
    """The IPv4 address that a translator or tunnel would reach for this IPv6 address."""
    if isinstance(address, IPv4Address):
        return None
    value = int(address)
    match classify(address):
        case _C.IPV4_MAPPED | _C.IPV4_COMPATIBLE | _C.IPV4_TRANSLATED | _C.NAT64:
            return IPv4Address(value & 0xFFFF_FFFF)
        case _C.NAT64_LOCAL:
            return _embedded_in_48(value)
        case _C.SIX_TO_FOUR:
            return IPv4Address(value >> 80 & 0xFFFF_FFFF)
        case _C.TEREDO:  # RFC 4380 section 4: the client's address, bits inverted
            return IPv4Address(~value & 0xFFFF_FFFF)
        case _:
            return None


def _embedded_in_48(value: int) -> IPv4Address:
    """RFC 6052 section 2.2, prefix length 48: bits 64 to 71 are skipped."""
    return IPv4Address((value >> 64 & 0xFFFF) << 16 | value >> 40 & 0xFFFF)


def classes(address: Address) -> frozenset[AddressClass]:
    """The class of the address and, where it carries an IPv4 address, that one's class as well."""
    inner = embedded(address)
    found = {classify(address)}
    return frozenset(found if inner is None else found | {classify(inner)})


def objection(address: Address, *, private: bool, own: Iterable[Network] = ()) -> AddressClass | None:
    """The class that forbids reaching `address`; None when it may be reached.

    Public names reach only GLOBAL. `private` adds RFC 1918, unique local, carrier-grade NAT and the
    documentation ranges (laboratories use those). `own` are egressd's own pools: an answer pointing
    there would make the gateway talk to itself.
    """
    if any(address in network for network in own if network.version == address.version):
        return AddressClass.OWN
    kind = classify(address)
    return None if kind in (_PRIVATE if private else _PUBLIC) else kind


def usable(address: Address, *, private: bool, own: Iterable[Network] = ()) -> bool:
    return objection(address, private=private, own=own) is None


_LEAVE_OUT = "list smaller networks that leave it out"
_REMEDIES = {AddressClass.LOOPBACK: "for a service on this machine write a local rule"}


def check_network(network: Network, *, own: Iterable[Network] = ()) -> None:
    """`Unfit` if the network touches anything that no rule may reach. Private ranges are fine."""
    if network.prefixlen == 0:
        raise Unfit(
            f"{network} is every address there is",
            "name the hosts, or set guard: off if nothing is to be restricted",
        )
    for pool in own:
        if network.version == pool.version and network.overlaps(pool):
            raise Unfit(f"{network} overlaps egressd's own pool {pool}", "choose networks beside it")
    for special, kind in SPECIAL:
        if special.version == network.version and kind not in _PRIVATE and special.overlaps(network):
            raise Unfit(f"{network} touches {special} ({kind})", _REMEDIES.get(kind, _LEAVE_OUT))
    if not usable(network.network_address, private=True):
        kind = classify(network.network_address)
        raise Unfit(f"{network} is not allocated to anyone ({kind})", "check the address")
