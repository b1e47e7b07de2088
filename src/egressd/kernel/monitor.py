"""Hearing of changes in the gateway: who changed it, and what the elements that went had counted.

nftables numbers its rulesets: every committed batch adds one to the generation. egressd counts its own
batches, so a generation that is not accounted for is somebody else's, also when the notification was lost.
The notifications tell the rest: the process that committed (NFTA_GEN_PROC_*), and each deleted element with
its last counter, which exists nowhere else any more. (A deleted named counter comes without its value, and
the elements of a deleted map do not come at all: these are read before.)

Formats: linux/netfilter/nf_tables.h. Notifications of one batch end with its NEWGEN.
"""

from __future__ import annotations

import errno
import struct
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from egressd.kernel import netlink
from egressd.kernel.dumps import comment, count, counted, text
from egressd.kernel.netlink import Netlink, NetlinkError, Reply, Request, attribute, attributes
from egressd.kernel.unrest import Unrest
from egressd.ruleset import layout

__all__ = ["Batch", "Count", "GoneElement", "Monitor", "News"]

_NFTABLES = 10 << 8  # NFNL_SUBSYS_NFTABLES
_DELETE_ELEMENT, _NEWGEN, _GETGEN, _GET_OBJECT = 14, 15, 16, 19
_GROUP_NFTABLES = 7  # NFNLGRP_NFTABLES
_ROUTE_GROUPS = (1, 3, 5, 7, 8, 9, 11, 19)  # RTNLGRP_LINK, NEIGH, IPV4_{IFADDR,ROUTE,RULE}, IPV6_*
_NETDEV, _COUNTER = 5, 1  # NFPROTO_NETDEV, NFT_OBJECT_COUNTER
_BUFFER = 32 << 20  # bytes; 100,000 deleted elements fit
_ROUTE_BUFFER = 4 << 20

Count = tuple[int, int]  # packets, bytes


@dataclass(frozen=True, slots=True)
class GoneElement:
    family: int  # NFPROTO_*: 1 inet, 5 netdev
    table: str
    name: str  # of the set or map
    comment: str
    count: Count
    mark: int = 0  # what the map said, if it said a mark; of a set, its element, if that is one


@dataclass(slots=True)
class Batch:
    """What one committed batch removed, and who committed it."""

    generation: int = 0
    process: str = ""
    elements: list[GoneElement] = field(default_factory=list)


@dataclass(slots=True)
class News:
    """Everything heard since the last time. `routing`: it calls for a look at once. `lost`: there was more
    than the buffer held."""

    batches: list[Batch] = field(default_factory=list)
    routing: bool = False
    lost: bool = False


class Monitor:
    """Listens in the namespace it is made in."""

    def __init__(self, *, ignore: Collection[int]) -> None:
        """`ignore`: the netlink ports of our own routing sockets."""
        self._ours = frozenset(ignore)
        self.tables = Netlink(netlink.NETFILTER, groups=(_GROUP_NFTABLES,), buffer=_BUFFER)
        self.routing = Netlink(netlink.ROUTE, groups=_ROUTE_GROUPS, buffer=_ROUTE_BUFFER)
        self._asking = Netlink(netlink.NETFILTER)
        self._open = Batch()
        self.unrest = Unrest()

    def close(self) -> None:
        for sock in (self.tables, self.routing, self._asking):
            sock.close()

    def generation(self) -> int:
        """The number of the ruleset in force."""
        request = Request(_NFTABLES | _GETGEN, bytes(4), "read the ruleset's generation")
        (reply,) = self._asking.ask(request)
        return _u32(dict(attributes(reply.body[4:]))[1])

    def count(self, name: str) -> Count | None:
        """A named counter of `table netdev egressd`; None if there is none of that name."""
        body = struct.pack("=BBH", _NETDEV, 0, 0)
        body += attribute(1, f"{layout.TABLE}\0".encode()) + attribute(2, f"{name}\0".encode())
        body += attribute(3, struct.pack(">I", _COUNTER))
        gone = frozenset({errno.ENOENT})
        replies = self._asking.ask(Request(_NFTABLES | _GET_OBJECT, body, f"read {name}", 0, gone))
        return count(dict(attributes(replies[0].body[4:]))[4]) if replies else None

    def news(self) -> News:
        """What has arrived; never waits. The kernel queues a batch's notifications before it
        acknowledges the batch, so those of our own last one are always here."""
        news = News()
        try:
            for event in self.tables.events():
                self._table_event(event, news)
        except NetlinkError as error:
            news.lost |= _overrun(error)
        try:
            for event in self.routing.events():
                if event.port not in self._ours:
                    news.routing |= self.unrest.hear(event, time.monotonic())
        except NetlinkError as error:
            news.lost |= _overrun(error)
            news.routing = True
        return news

    def _table_event(self, event: Reply, news: News) -> None:
        kind = event.kind & 0xFF
        if kind == _DELETE_ELEMENT:
            self._open.elements += _elements(event.body)
        elif kind == _NEWGEN:
            said = dict(attributes(event.body[4:]))
            self._open.generation = _u32(said.get(1, bytes(4)))
            name = text(said.get(3, b""))
            name = name if name.isprintable() else ascii(name)[1:-1]  # of its own choice, and shown to people
            self._open.process = f"{name} (pid {_u32(said.get(2, bytes(4)))})"
            news.batches.append(self._open)
            self._open = Batch()


def _overrun(error: NetlinkError) -> bool:
    if error.number != errno.ENOBUFS:
        raise error
    return True


def _elements(body: bytes) -> list[GoneElement]:
    said = dict(attributes(body[4:]))
    table, name = text(said.get(1, b"")), text(said.get(2, b""))
    return [
        GoneElement(body[0], table, name, *_element(dict(attributes(element))))
        for _, element in attributes(said.get(3, b""))
    ]


def _element(said: dict[int, bytes]) -> tuple[str, Count, int]:
    """An element's comment, counter, and mark."""
    # NFTA_SET_ELEM_DATA, else NFTA_SET_ELEM_KEY; NFTA_DATA_VALUE
    data = dict(attributes(said.get(2, said.get(1, b"")))).get(1, b"")
    mark = int.from_bytes(data, sys.byteorder) if len(data) == 4 else 0
    return comment(said.get(6, b"")), counted(said), mark


def _u32(value: bytes) -> int:
    return int(struct.unpack(">I", value)[0])
