"""Every batch of ours goes through here, so that what is not ours can be told.

The kernel numbers its rulesets. Each batch of ours should raise the number by one; any other step is
somebody else's work. What our own batches removed comes back with its last counters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from egressd.kernel import netlink
from egressd.kernel.monitor import Batch, Count, Monitor
from egressd.kernel.netlink import Netlink
from egressd.kernel.nft import Nft
from egressd.kernel.stencils import Addresses, Make, Stencils
from egressd.model.errors import KernelError
from egressd.model.identities import Link

__all__ = ["Ledger"]

log = logging.getLogger("egressd")
_NFTABLES = 10  # NFNL_SUBSYS_NFTABLES, linux/netfilter/nfnetlink.h


class Ledger:
    """`foreign`, `routing` and `lost` collect what was heard until somebody `settles` it."""

    def __init__(self, nft: Nft, monitor: Monitor) -> None:
        self._nft, self._monitor = nft, monitor
        self._stencils, self._batches = Stencils(nft), Netlink(netlink.NETFILTER)
        monitor.news()
        self.generation = monitor.generation()
        self.foreign: list[Batch] = []
        self.routing = self.unexplained = False

    def run(self, commands: Sequence[str]) -> Batch:
        """Commit one batch; returns what it removed. KernelError as `Nft.run` raises it."""
        return self._commit(lambda: self._nft.run(commands))

    def run_link(self, make: Make, link: Link, addresses: Addresses) -> Batch:
        """`run(make(link))`, at the same cost however many links there are (see stencils.py)."""
        return self._commit(lambda: self._stamp(make, link, addresses))

    def _stamp(self, make: Make, link: Link, addresses: Addresses) -> None:
        requests = self._stencils.requests(make, link, addresses)
        if requests is not None:
            try:
                self._batches.transact(_NFTABLES, requests)
            except KernelError as error:  # nothing of it is in force
                log.warning("%s; asking libnftables", error)
                self._stencils.forget()
            else:
                return
        self._nft.run(make(link))

    def _commit(self, commit: Callable[[], None]) -> Batch:
        self.look()
        before = self.generation
        commit()
        after = self._monitor.generation()
        ours = _next(before)
        self.unexplained |= after not in (before, ours)
        self.generation = after
        own = Batch(generation=ours)
        for batch in self._news():
            if batch.generation == ours:
                own = batch
            else:
                self.foreign.append(batch)
        return own

    def count(self, name: str) -> Count | None:
        """See `Monitor.count`."""
        return self._monitor.count(name)

    def look(self) -> bool:
        """Take in what was heard; True if the ruleset is not as our last batch left it."""
        self.foreign += self._news()
        now = self._monitor.generation()
        self.unexplained |= now != self.generation
        self.generation = now
        return self.unexplained or bool(self.foreign)

    def _news(self) -> list[Batch]:
        news = self._monitor.news()
        self.routing |= news.routing
        self.unexplained |= news.lost
        return news.batches

    def settled(self) -> list[Batch]:
        """The ruleset has been compared and is right as of now; returns who changed it."""
        foreign, self.foreign = self.foreign, []
        self.unexplained = False
        return foreign


def _next(generation: int) -> int:
    """Zero is left out (nf_tables_commit)."""
    return generation + 1 if generation < 0xFFFF_FFFF else 1
