"""A sandbox's link, the gateway's side of it: a veth pair whose other end is born in the sandbox's namespace.

The order is the safety. The device is made down; then the guard chain is bound to it (kernels before 6.x
refuse a chain for an absent device, later ones keep it for the next device of that name); only then it goes
up. On the way out the device goes first. Nothing here ever enters the sandbox's namespace: its inside is
the broker's business, and no security property rests on it.
"""

from __future__ import annotations

import errno
import ipaddress

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from egressd.kernel.conntrack import Conntrack
from egressd.kernel.ledger import Ledger
from egressd.kernel.monitor import Batch, Count
from egressd.kernel.netlink import CREATE, EXCLUSIVE, Netlink, NetlinkError, Request, encode
from egressd.kernel.nft import Nft
from egressd.kernel.routing import (
    IFF_NOARP,
    NEWLINK,
    Device,
    Neighbour,
    Route,
    Tables,
    Thing,
    change_link,
    remove_link,
)  # fmt: skip
from egressd.model.errors import KernelError, Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.ruleset import build, layout
from egressd.ruleset.layout import Pools
from egressd.ruleset.wants import WorkspaceWant

__all__ = ["Links"]

SANDBOX_DEVICE = "eth0"
# Our ends get the interface index this plus their number, so that one message can make a link and the
# next ones, sent along, can refer to it. Far above what the kernel hands out by itself.
_INDEX_BASE = 1 << 20
_MTU = 1500


class Links:
    """The links of the gateway this thread is in."""

    def __init__(self, route: Netlink, nft: Nft | Ledger, conntrack: Conntrack, pools: Pools) -> None:
        self._route, self._nft, self._conntrack, self._pools = route, nft, conntrack, pools

    def open(self, link: Link, want: WorkspaceWant, *, namespace: int, quota: int | None) -> None:
        """Make the link, guard first. `Refused` if the namespace cannot take it, KernelError if the
        kernel fails; either way nothing of it is left."""
        try:
            self._route.run([_create(link, namespace)])
        except NetlinkError as error:
            raise _told(error) from error
        try:
            self._nft.run(build.link(link, want, self._pools, quota))
            self._route.run(self._raise(link))
        except BaseException:
            self._remove(link)
            raise

    def _raise(self, link: Link) -> list[Request]:
        index = _INDEX_BASE + link.number
        indexes = {link.device: index}
        return [_up(link.device, index), *(thing.make(indexes) for thing in self.things(link))]

    def raise_device(self, device: Device) -> Request:
        """What brings an existing device back to where `sound` holds."""
        return _up(device.name, device.index)

    def things(self, link: Link) -> list[Thing]:
        """Neighbours and routes of the gateway's side."""
        device = link.device
        found: list[Thing] = []
        for address in self._pools.sandbox(link):
            found.append(Neighbour(device, address, layout.SANDBOX_MAC))
            found.append(Route(network=ipaddress.ip_network(address), device=device))
        return found

    def close(self, link: Link) -> dict[str, Count]:
        """Take everything of the link away: device, chain, counters, connections. Whatever is already
        gone is no error. Returns its last counters, by "in", "ok", "denied", "other"."""
        batch = self._remove(link)
        self._conntrack.forget_sources(self._pools.sandbox(link))
        prefix = f"{link.device}_"
        found = batch.counters if batch else {}
        return {name.removeprefix(prefix): count for name, count in found.items() if name.startswith(prefix)}

    def _remove(self, link: Link) -> Batch | None:
        self._route.run([remove_link(link.device)])
        return self._nft.run(build.unlink(link))

    def present(self) -> dict[Link, Device]:
        """Every device with a link's name."""
        devices = Tables(self._route).devices().values()
        return {link: device for device in devices if (link := Link.of_device(device.name)) is not None}

    def sound(self, device: Device) -> bool:
        """Up, without ARP, in the group that the ruleset looks at."""
        return device.up and not device.arp and device.group == layout.LINK_GROUP


def _up(name: str, index: int) -> Request:
    return change_link(index, f"set {name} up", up=True, group=layout.LINK_GROUP)


def _create(link: Link, namespace: int) -> Request:
    peer = {
        "attrs": [
            ("IFLA_IFNAME", SANDBOX_DEVICE),
            ("IFLA_NET_NS_FD", namespace),
            ("IFLA_ADDRESS", layout.SANDBOX_MAC),
            ("IFLA_MTU", _MTU),
        ]
    }
    info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})]}
    attrs = [
        ("IFLA_IFNAME", link.device),
        ("IFLA_ADDRESS", layout.GATEWAY_MAC),
        ("IFLA_MTU", _MTU),
        ("IFLA_GROUP", layout.LINK_GROUP),
        ("IFLA_LINKINFO", info),
    ]
    index = _INDEX_BASE + link.number
    body = encode(ifinfmsg, attrs, index=index, flags=IFF_NOARP, change=IFF_NOARP)
    return Request(NEWLINK, body, f"make {link.device}", CREATE | EXCLUSIVE)


def _told(error: NetlinkError) -> KernelError | Refused:
    """Which failures are the namespace's fault."""
    if error.number == errno.EEXIST:
        return Refused(Reason.NAMESPACE, "the namespace already has an eth0, or the link number is in use")
    if error.number in (errno.EPERM, errno.EINVAL, errno.EBADF):
        return Refused(Reason.NAMESPACE, f"the kernel refuses to put a link into that namespace: {error}")
    return error
