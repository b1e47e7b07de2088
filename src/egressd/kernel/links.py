"""A sandbox's link, the gateway's side of it: a veth pair whose other end is born in the sandbox's namespace.

The order is the safety. The device is made down; then the guard chain is bound to it (kernels before 6.x
refuse a chain for an absent device, later ones keep it for the next device of that name); only then it goes
up. On the way out the device goes first. Nothing here ever enters the sandbox's namespace: its inside is
the broker's business, and no security property rests on it.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import struct
import time
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from egressd.kernel import namespaces
from egressd.kernel.ledger import Ledger
from egressd.kernel.monitor import Count
from egressd.kernel.netlink import CREATE, EXCLUSIVE, Netlink, NetlinkError, Request, attribute, encode
from egressd.kernel.routing import (
    IFF_NOARP,
    NEWLINK,
    Device,
    Neighbour,
    Route,
    Tables,
    Thing,
    change_link,
    name_of,
    other_end,
    received,
    remove_link,
    set_down,
)  # fmt: skip
from egressd.kernel.rtmessages import ifinfmsg
from egressd.kernel.unrest import LINKS
from egressd.model.errors import KernelError, Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.ruleset import build, layout
from egressd.ruleset.build import LinkWant
from egressd.ruleset.layout import Pools
from egressd.ruleset.wants import WorkspaceWant

__all__ = ["Links"]

SANDBOX_DEVICE = "eth0"
# Our ends get the interface index this plus their number, so that one message can make a link and the
# next ones, sent along, can refer to it. Far above what the kernel hands out by itself.
_INDEX_BASE = LINKS
_MTU = 1500
_PARTS = ("in", "ok", "denied", "other")  # of what came, see ruleset.build
_OVER = {"over_quota": "quota", "over_budget": "connections"}
_DRAIN_LOOKS, _DRAIN_PAUSE = 20, 0.0005  # seconds


class Links:
    """The links of the gateway this thread is in."""

    def __init__(self, route: Netlink, ledger: Ledger | None, pools: Pools) -> None:
        """`ledger` None: to look and to repair, not to open or close."""
        self._route, self._ledger, self.pools = route, ledger, pools

    def open(self, lease: LinkWant, want: WorkspaceWant, *, namespace: int) -> None:
        """Make the link, guard first. `Refused` if the namespace cannot take it, KernelError if the
        kernel fails; either way nothing of it is left."""
        assert self._ledger is not None
        link = lease.link
        try:
            self._route.run([_create(link, namespace)])
        except NetlinkError as error:
            raise _told(error) from error
        try:
            self._ledger.run_link(
                lambda other: build.link(replace(lease, link=other), want, self.pools),
                link,
                self.pools.sandbox,
            )
            self._route.run(_raise(link, self.pools.sandbox(link)))
        except BaseException:
            self._route.run([remove_link(link.device)])
            self._unlink(link)
            raise

    def raise_device(self, device: Device) -> Request:
        """What brings an existing device back to where `sound` holds."""
        return _up(device.name, device.index)

    def things(self, link: Link) -> list[Thing]:
        """Neighbours and routes of the gateway's side."""
        return [thing for address in self.pools.sandbox(link) for thing in _reaching(address, link.device)]

    def silence(self, link: Link) -> dict[str, Count]:
        """From now on nothing passes: device down, chain and counters gone. Whatever is gone already is no
        error. Returns its last counters, by "in", "ok", "denied", "other"."""
        assert self._ledger is not None
        self._route.run([set_down(link.device)])  # waits until no packet is on its way through the chain
        counts = self._counts(link, _PARTS)
        self._unlink(link)
        return counts

    def _unlink(self, link: Link) -> None:
        assert self._ledger is not None
        self._ledger.run_link(build.unlink, link, self.pools.sandbox)

    def spent(self, link: Link) -> tuple[dict[str, Count], tuple[str, ...]]:
        """Its counters now, by "in", "ok", "denied", "other"; and which of its budgets have refused
        something, by the names of `messages.OpenLink`.

        What the sandbox has sent is in them, so they are final once its last process is gone.
        """
        self._drain(link)
        over = self._counts(link, _OVER)
        refused = tuple(name for part, name in _OVER.items() if over.get(part, (0, 0)) != (0, 0))
        return self._counts(link, _PARTS), refused

    def _counts(self, link: Link, parts: Iterable[str]) -> dict[str, Count]:
        assert self._ledger is not None
        counts = {part: self._ledger.count(f"{link.device}_{part}") for part in parts}
        return {part: count for part, count in counts.items() if count is not None}

    def _drain(self, link: Link) -> None:
        """A veth counts a frame when it is sent, its guard when a softirq takes it from that processor's
        backlog, a moment later. Not waited for long: a frame whose VLAN tag is cut short is dropped between
        the two (skb_vlan_untag), and anybody in a sandbox can send such."""
        sent = received(self._route, _INDEX_BASE + link.number)
        for _ in range(_DRAIN_LOOKS):
            if self._counts(link, ("in",)).get("in", (sent, 0))[0] >= sent:
                return
            time.sleep(_DRAIN_PAUSE)

    def leads_into(self, link: Link, namespace: int) -> bool:
        """Is the other end of this link in that network namespace (a descriptor)? The kernel's word: its
        number for the namespace the end is in, now, and its number for the one the descriptor is of."""
        wanted = namespaces.number(self._route, namespace)
        return wanted is not None and wanted == other_end(self._route, _INDEX_BASE + link.number, link.device)

    def leading_into(self, namespace: int) -> list[Link]:
        """The links whose other end is there."""
        wanted = namespaces.number(self._route, namespace)
        if wanted is None:  # what a link leads into has a number
            return []
        return [link for link in self.present() if self.leads_into(link, namespace)]

    def is_present(self, link: Link) -> bool:
        """Is there a device of that name, where a link's is?"""
        return name_of(self._route, _INDEX_BASE + link.number) == link.device

    def present(self) -> dict[Link, Device]:
        """Every device with a link's name."""
        devices = Tables(self._route).devices().values()
        return {link: device for device in devices if (link := Link.of_device(device.name)) is not None}

    def sound(self, device: Device) -> bool:
        """Up, without ARP, in the group that the ruleset looks at."""
        return device.up and not device.arp and device.group == layout.LINK_GROUP


def _up(name: str, index: int) -> Request:
    return change_link(index, f"set {name} up", up=True, group=layout.LINK_GROUP)


def _reaching(address: IPv4Address | IPv6Address, device: str) -> tuple[Neighbour, Route]:
    return (
        Neighbour(device, address, layout.SANDBOX_MAC),
        Route(network=ipaddress.ip_network(address), device=device),
    )


# ---- the messages of a link, encoded once; encoding them anew each time took 0.6 ms of a link's 2

_ANY_DEVICE, _ANY_INDEX, _ANY_DESCRIPTOR = "any", 0x7A5A_6B01, 0x7A5A_6B02
_ANY_ADDRESS: dict[int, IPv4Address | IPv6Address] = {
    4: IPv4Address("203.0.113.77"),
    6: IPv6Address("2001:db8:5a7a::6b03"),
}
_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg
_IFLA_IFNAME = 3


def _native(number: int) -> bytes:
    return struct.pack("=I", number)


@functools.cache
def _pair() -> bytes:
    """The attributes that make a veth pair, all but our end's name, with a descriptor to be filled in."""
    peer = {
        "attrs": [
            ("IFLA_IFNAME", SANDBOX_DEVICE),
            ("IFLA_NET_NS_FD", _ANY_DESCRIPTOR),
            ("IFLA_ADDRESS", layout.SANDBOX_MAC),
            ("IFLA_MTU", _MTU),
        ]
    }
    info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})]}
    attrs = [
        ("IFLA_ADDRESS", layout.GATEWAY_MAC),
        ("IFLA_MTU", _MTU),
        ("IFLA_GROUP", layout.LINK_GROUP),
        ("IFLA_LINKINFO", info),
    ]
    return encode(ifinfmsg, attrs)[_IFINFO.size :]


def _create(link: Link, namespace: int) -> Request:
    header = _IFINFO.pack(0, 0, _INDEX_BASE + link.number, IFF_NOARP, IFF_NOARP)
    name = attribute(_IFLA_IFNAME, link.device.encode() + b"\0")
    body = header + name + _pair().replace(_native(_ANY_DESCRIPTOR), _native(namespace))
    return Request(NEWLINK, body, f"make {link.device}", CREATE | EXCLUSIVE)


@functools.cache
def _raising(version: int) -> tuple[Request, ...]:
    """What makes an address of that family reachable, with index and address to be filled in."""
    indexes = {_ANY_DEVICE: _ANY_INDEX}
    return tuple(thing.make(indexes) for thing in _reaching(_ANY_ADDRESS[version], _ANY_DEVICE))


@functools.cache
def _up_any() -> Request:
    return _up(_ANY_DEVICE, _ANY_INDEX)


def _raise(link: Link, addresses: tuple[IPv4Address, IPv6Address]) -> list[Request]:
    """Up, then neighbours and routes (which need it up)."""
    index = _native(_INDEX_BASE + link.number)
    requests = [_filled(_up_any(), link, _native(_ANY_INDEX), index)]
    for address in addresses:
        for request in _raising(address.version):
            indexed = _filled(request, link, _native(_ANY_INDEX), index)
            requests.append(_filled(indexed, link, _ANY_ADDRESS[address.version].packed, address.packed))
    return requests


def _filled(request: Request, link: Link, place: bytes, value: bytes) -> Request:
    assert request.body.count(place) == 1
    return replace(request, body=request.body.replace(place, value), what=f"raise {link.device}")


def _told(error: NetlinkError) -> KernelError | Refused:
    """Which failures are the namespace's fault."""
    if error.number == errno.EEXIST:
        return Refused(Reason.NAMESPACE, "the namespace already has an eth0, or the link number is in use")
    if error.number in (errno.EPERM, errno.EINVAL, errno.EBADF):
        return Refused(Reason.NAMESPACE, f"the kernel refuses to put a link into that namespace: {error}")
    return error
