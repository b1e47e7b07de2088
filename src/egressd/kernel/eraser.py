"""Removing what is left of closed links, beside the warden's loop.

Deleting a veth pair and walking the connection tracking table take tens of milliseconds, nearly all of it
waiting for the kernel (RCU grace periods) without any lock of ours. One thread does it, so that a sandbox
that ends does not keep another from beginning. A link comes here silenced: down, and without a chain.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from egressd.kernel import netlink
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.netlink import Netlink
from egressd.kernel.routing import remove_link
from egressd.model.errors import KernelError
from egressd.model.identities import Link
from egressd.ruleset.layout import Pools

__all__ = ["Eraser"]

log = logging.getLogger("egressd")


class Eraser:
    """Works in the namespace, and with the rights, of the thread that makes it."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._route, self._conntrack = Netlink(netlink.ROUTE), Conntrack()
        self._queue: queue.SimpleQueue[Link] = queue.SimpleQueue()
        self._busy: set[tuple[IPv4Address, IPv6Address]] = set()
        self._done: queue.SimpleQueue[Link] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="eraser", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The netlink port its changes come from."""
        return self._route.port

    def erase(self, link: Link) -> None:
        """Delete the device and its connections, soon."""
        self._busy.add(self._pools.sandbox(link))
        self._queue.put(link)

    def busy(self, link: Link) -> bool:
        """May connections of an earlier link with these addresses still be known?"""
        return self._pools.sandbox(link) in self._busy

    def erased(self) -> Iterator[Link]:
        """Links that are gone altogether since this was last asked."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._done.get_nowait()

    def _run(self) -> None:
        while True:
            link = self._queue.get()
            try:
                self._route.run([remove_link(link.device)])
                self._conntrack.forget_sources(self._pools.sandbox(link))
                self._busy.discard(self._pools.sandbox(link))
                self._done.put(link)
            except (KernelError, OSError) as error:  # its addresses stay busy: nobody gets them
                log.error("%s cannot be removed: %s", link.device, error)  # noqa: TRY400
