"""Removing what is left of closed links, beside the warden's loop.

Deleting a veth pair takes milliseconds of waiting for the kernel (RCU grace periods), and walking the
connection tracking table, all of its 262,144 buckets, ten of work. One thread does both, so that a sandbox
that ends does not keep another from beginning. A link comes here silenced: down, and without a chain.

The table is walked once for all that have ended meanwhile, and not at all where nobody can be in it: nothing
was ever admitted over the link, or the table is empty. After each walk it rests for four times as long, so
that a thousand ends a minute cost no more than a fifth of one processor. Until then the addresses are busy.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
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
_REST = 4  # times as long as a walk took
_AT_ONCE = 64  # devices deleted between two looks at the time


class Eraser:
    """Works in the namespace, and with the rights, of the thread that makes it."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._route, self._conntrack = Netlink(netlink.ROUTE), Conntrack()
        self._queue: queue.SimpleQueue[tuple[Link, bool]] = queue.SimpleQueue()
        self._busy: set[tuple[IPv4Address, IPv6Address]] = set()
        self._done: queue.SimpleQueue[Link] = queue.SimpleQueue()
        self._rested = 0.0  # when the table may be walked again, monotonic seconds
        self.walks = 0  # through the table, until now
        self._thread = threading.Thread(target=self._run, name="eraser", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The netlink port its changes come from."""
        return self._route.port

    def erase(self, link: Link, *, unused: bool = False) -> None:
        """Delete the device and its connections, soon. `unused`: nothing was ever admitted over it."""
        self._busy.add(self._pools.sandbox(link))
        self._queue.put((link, unused))

    def busy(self, link: Link) -> bool:
        """May connections of an earlier link with these addresses still be known?"""
        return self._pools.sandbox(link) in self._busy

    def erased(self) -> Iterator[Link]:
        """Links that are gone altogether since this was last asked."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._done.get_nowait()

    def _run(self) -> None:
        waiting: list[Link] = []  # for a walk
        while True:
            patience = max(0.0, self._rested - time.monotonic()) if waiting else None
            for link, unused in self._ended(patience):
                with self._telling(link):
                    self._route.run([remove_link(link.device)])
                    if unused:
                        self._gone(link)
                    else:
                        waiting.append(link)
            if waiting and time.monotonic() >= self._rested:
                self._forget(waiting)
                waiting = []

    def _ended(self, patience: float | None) -> list[tuple[Link, bool]]:
        """What has come; waits for it so many seconds, or for ever."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._queue.get(timeout=patience))
            while len(found) < _AT_ONCE:
                found.append(self._queue.get_nowait())
        return found

    def _forget(self, links: list[Link]) -> None:
        began = time.monotonic()
        with self._telling(*links):
            if self._conntrack.count():
                self.walks += 1
                self._conntrack.forget_sources([a for link in links for a in self._pools.sandbox(link)])
            for link in links:
                self._gone(link)
        now = time.monotonic()
        self._rested = now + _REST * (now - began)

    def _gone(self, link: Link) -> None:
        self._busy.discard(self._pools.sandbox(link))
        self._done.put(link)

    @contextlib.contextmanager
    def _telling(self, *links: Link) -> Iterator[None]:
        """What cannot be removed keeps its addresses busy: nobody gets them."""
        try:
            yield
        except (KernelError, OSError) as error:
            names = ", ".join(link.device for link in links)
            log.error("%s cannot be removed: %s", names, error)  # noqa: TRY400
