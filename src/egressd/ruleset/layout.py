"""Where everything lies: names, marks, addresses. The numbers of the kernel picture, in one place.

A *mark* (32 bits, skb->mark) says two things about an admitted packet: what the gateway may do with it
(bits 28 to 31, what routing and NAT look at) and whose it is (bits 0 to 26: workspace and block).

    31        forward through the uplink
    30        steer to the relay of local services (TPROXY)
    29        deliver to the resolver
    28        with 31: forward as addressed, no synthetic address to translate;
              with 30: steer to the inspector instead
    14..26    workspace index, 1 to 8191
    0..13     block, 0 to 16383: which rule of the workspace

A *block* is four neighbouring synthetic addresses per family, the *slots* of one name. The guard's map is
keyed by the block's first address and looked up with the low two bits masked off, so one element per
name, port and family admits and counts all four; which slots lead anywhere is the NAT map's business.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from egressd.model.identities import Link

__all__ = ["Kind", "Mark", "Pools", "begun_with", "dial_source"]

TABLE = "egressd"  # both `table netdev egressd` and `table inet egressd`, in the gateway
HOST_TABLE = "egressd_host"  # `table inet egressd_host`, in the host
GATEWAY = "egressd"  # default name of the pinned gateway namespace
LINK_GROUP = 53  # IFLA_GROUP of every sandbox link's gateway end
LINK_INDEX = 1 << 20  # plus a link's number: its gateway end's interface index, which the log tells
NFLOG_GROUP = 5
UPLINK, HOST_LINK = "up0", "egw"  # the pair between gateway and host

RESOLVER4, RESOLVER6 = IPv4Address("169.254.53.53"), IPv6Address("fd53:53::53")
NEXT_HOP4, NEXT_HOP6 = RESOLVER4, IPv6Address("fe80::53")  # never answered for: neighbours are static
UPLINK_GATEWAY4, UPLINK_HOST4, UPLINK_PREFIX4 = IPv4Address("169.254.54.2"), IPv4Address("169.254.54.1"), 30
UPLINK_GATEWAY6, UPLINK_HOST6, UPLINK_PREFIX6 = IPv6Address("fd53:2::2"), IPv6Address("fd53:2::1"), 64
# Where the inspector's connections come from: a workspace's index is added. Local to the gateway as a whole
# (a `local` route on lo), so that an unprivileged socket may bind there.
DIAL4, DIAL6 = IPv4Network("169.254.64.0/19"), IPv6Network("fd53:3::/112")
INFRASTRUCTURE: tuple[IPv4Network | IPv6Network, ...] = (
    IPv4Network(RESOLVER4),
    IPv6Network(RESOLVER6),
    IPv4Network((UPLINK_HOST4, UPLINK_PREFIX4), strict=False),
    IPv6Network((UPLINK_HOST6, UPLINK_PREFIX6), strict=False),
    DIAL4,
    DIAL6,
)
# One pair of MAC addresses serves every link: each is a segment of two ends with static neighbours.
SANDBOX_MAC, GATEWAY_MAC = "02:53:00:00:00:01", "02:53:00:00:00:02"
# TPROXY targets on 127.0.0.1 and ::1 of the gateway: for hosts whose connections are read, for local services
INSPECTOR_PORT, RELAY_PORT = 8443, 8444
ROUTES_STEERED, ROUTES_DIALLED, ROUTES_FORWARD = 100, 101, 200  # routing tables
UPLINK_MTU = 1500  # what a veth pair has; what the inspector dials is routed to lo first, which has more

# Seconds that the tables of connections, in the gateway and of what comes from it in the host, keep a TCP
# connection that has ended: enough for a last segment to be sent again (RFC 6298: after a second, two, four),
# short enough that who opens and closes without end does not fill them. The kernel's own is two minutes.
CLOSED_FOR = 10
# ... and, in the host's, one over which nothing goes: two hours and four minutes are the least that a NAT may
# give (RFC 5382 REQ-5). The kernel's own is five days, for which what a sandbox leaves open would stay there.
IDLE_FOR = 7440

# Why a guard refuses the connection after the last of a link's budget: the one loss of what was admitted that
# happens at the link itself
SPENT = "budget-connections"

SLOTS = 4
BLOCKS = 1 << 14
RESOLVER_BLOCK, UNLISTED_BLOCK = 0, BLOCKS - 1  # not handed out to rules
WORKSPACES = 1 << 13  # index 0 is not handed out


class Kind(enum.IntFlag):
    """The part of a mark that routing looks at."""

    FORWARD = 1 << 31
    RELAY = 1 << 30
    INSPECT = (1 << 30) | (1 << 28)
    RESOLVE = 1 << 29
    DIRECT = (1 << 31) | (1 << 28)


ADMITTED = 0xE000_0000  # any of these bits: the guard let it pass
# The mark of a connection (conntrack) begins as that of its packets. One that was cut keeps whose it is; its
# kind becomes CUT, which nothing admits. TOLD: its host has got its reset, as far as that can be.
CUT, TOLD = 1 << 28, 1 << 27
# On a packet that the warden itself sends: one that no guard has judged has a number below 16.
NUDGE = 3


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    kind: Kind
    workspace: int
    block: int

    def __post_init__(self) -> None:
        if not (0 < self.workspace < WORKSPACES and 0 <= self.block < BLOCKS):
            raise ValueError(f"no such mark: workspace {self.workspace}, block {self.block}")

    def __int__(self) -> int:
        return int(self.kind) | self.workspace << 14 | self.block

    @classmethod
    def of(cls, value: int) -> Mark:
        """The inverse of int(); ValueError for a number that is not a mark."""
        kind, rest = Kind(value & 0xF000_0000), value & 0x0FFF_FFFF
        if kind not in (Kind.FORWARD, Kind.RELAY, Kind.INSPECT, Kind.RESOLVE, Kind.DIRECT):
            raise ValueError(f"{value:#010x} is not a mark")
        return cls(kind=kind, workspace=rest >> 14, block=rest & (BLOCKS - 1))


def begun_with(value: int) -> int:
    """The mark that a connection had before it was cut, if it was: those of hosts alone are cut."""
    return value & ~(CUT | TOLD) | Kind.FORWARD if value & 0xF000_0000 == CUT else value


def dial_source(workspace: int) -> tuple[IPv4Address, IPv6Address]:
    """The addresses from which the inspector dials for the workspace of this index."""
    if not 0 < workspace < WORKSPACES:
        raise ValueError(f"no such workspace: {workspace}")
    return DIAL4[workspace], DIAL6[workspace]


@dataclass(frozen=True, slots=True)
class Pools:
    """Address ranges egressd hands out; all configurable, none ever seen outside the gateway."""

    synthetic4: IPv4Network = IPv4Network("198.18.0.0/16")  # RFC 2544 benchmarking range, lower half
    synthetic6: IPv6Network = IPv6Network("fd53:e9::/64")  # RFC 4193
    sandbox4: IPv4Network = IPv4Network("198.19.0.0/16")
    sandbox6: IPv6Network = IPv6Network("fd53:1::/64")

    def __post_init__(self) -> None:
        for pool in (self.synthetic4, self.sandbox4):
            if pool.prefixlen != 16:
                raise ValueError(f"pool {pool} must be a /16")
        for pool6 in (self.synthetic6, self.sandbox6):
            if pool6.prefixlen != 64:
                raise ValueError(f"pool {pool6} must be a /64")
        if self.synthetic4.overlaps(self.sandbox4) or self.synthetic6.overlaps(self.sandbox6):
            raise ValueError("the synthetic and the sandbox pool overlap")

    @property
    def own(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Every network that is egressd's own: no rule may name one, no name may lead into one."""
        return (self.synthetic4, self.synthetic6, self.sandbox4, self.sandbox6, *INFRASTRUCTURE)

    def synthetic(self, block: int, slot: int = 0) -> tuple[IPv4Address, IPv6Address]:
        """Both synthetic addresses of a slot of a block."""
        if not (0 <= block < BLOCKS and 0 <= slot < SLOTS):
            raise ValueError(f"no such slot: block {block}, slot {slot}")
        offset = block * SLOTS + slot
        return self.synthetic4[offset], self.synthetic6[offset]

    def block_of(self, address: IPv4Address | IPv6Address) -> tuple[int, int] | None:
        """The inverse of `synthetic`: (block, slot), or None when the address is not synthetic."""
        pool = self.synthetic4 if address.version == 4 else self.synthetic6
        offset = int(address) - int(pool.network_address)
        if not 0 <= offset < BLOCKS * SLOTS:
            return None
        return divmod(offset, SLOTS)

    def sandbox(self, link: Link) -> tuple[IPv4Address, IPv6Address]:
        """A link's own addresses. Numbers 65,534 apart share them: the controller skips one in use."""
        offset = 1 + (link.number - 1) % 65_534
        return self.sandbox4[offset], self.sandbox6[offset]
