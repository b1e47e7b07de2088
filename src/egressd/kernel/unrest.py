"""Which of what is heard of the routing calls for a look at all of it.

A look costs in proportion to the links there are, and each sandbox that comes or goes is heard of about ten
times: the kernel tells of every step that our own request, or the end of a namespace, has led to. What is
heard of a link's device alone, from the kernel itself, is therefore read: a device that is up as it should be
is at rest; one that went down, or lost a route or a neighbour, mostly is about to go altogether. Only when
that is not heard within a moment somebody has changed it (by ioctl(2), which is told in the kernel's name).

Everything else (another process, another device, an address, a rule) calls for a look at once.
"""

from __future__ import annotations

import struct

from egressd.kernel.netlink import Reply, attributes
from egressd.kernel.routing import (
    DELLINK,
    DELNEIGH,
    DELROUTE,
    IFF_NOARP,
    IFF_UP,
    NEWLINK,
    NEWNEIGH,
    NEWROUTE,
)
from egressd.ruleset import layout

__all__ = ["LINKS", "Unrest"]

LINKS = 1 << 20  # interface indexes from here on are of links: this plus their number
_IFLA_GROUP, _RTA_OIF = 27, 4  # linux/if_link.h, linux/rtnetlink.h
_KERNEL = 2  # RTPROT_KERNEL: routes that come and go with a device
_MOMENT = (
    0.2  # seconds; unregister_netdevice_many waits for a grace period between the first word and the last
)


class Unrest:
    """`now` is of a clock that does not jump, in seconds."""

    def __init__(self) -> None:
        self._down: dict[int, float] = {}  # devices as they should not be, by index; since when
        self._changed: dict[int, float] = {}  # devices of which something was taken away, or put on

    def hear(self, event: Reply, now: float) -> bool:
        """Take in one event; True if it calls for a look at once."""
        index = _index(event) if event.port == 0 else 0
        if index < LINKS:
            return True
        if event.kind == DELLINK:
            self._down.pop(index, None)
            self._changed.pop(index, None)
        elif event.kind == NEWLINK and _sound(event.body):
            self._down.pop(index, None)
        elif event.kind == NEWLINK:
            self._down.setdefault(index, now)
        elif not (event.kind in (NEWROUTE, DELROUTE) and event.body[5] == _KERNEL):
            self._changed.setdefault(index, now)
        return False

    def due(self, now: float) -> set[int]:
        """Numbers of links that have been waited for long enough. They are forgotten."""
        late = set()
        for waiting in (self._down, self._changed):
            while waiting and now - waiting[oldest := next(iter(waiting))] >= _MOMENT:
                del waiting[oldest]
                late.add(oldest - LINKS)
        return late


def _index(event: Reply) -> int:
    """Of the one device that it is about; 0 for none, or if it is about something else."""
    if event.kind in (NEWLINK, DELLINK, NEWNEIGH, DELNEIGH):
        return int(struct.unpack_from("=i", event.body, 4)[0])  # ifinfomsg and ndmsg alike
    if event.kind in (NEWROUTE, DELROUTE):
        device = dict(attributes(event.body[12:])).get(_RTA_OIF)
        return 0 if device is None else int(struct.unpack("=i", device)[0])
    return 0


def _sound(body: bytes) -> bool:
    """As `Links.sound` has it: up, without ARP, in its group."""
    flags = struct.unpack_from("=I", body, 8)[0]
    group = dict(attributes(body[16:])).get(_IFLA_GROUP, b"")
    up = flags & (IFF_UP | IFF_NOARP) == IFF_UP | IFF_NOARP
    return bool(up and group == struct.pack("=I", layout.LINK_GROUP))
