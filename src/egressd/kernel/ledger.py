"""Every batch of ours goes through here, so that what is not ours can be told.

The kernel numbers its rulesets. Each batch of ours should raise the number by one; any other step is
somebody else's work. What our own batches removed comes back with its last counters.
"""

from __future__ import annotations

from collections.abc import Sequence

from egressd.kernel.monitor import Batch, Count, Monitor
from egressd.kernel.nft import Nft

__all__ = ["Ledger"]


class Ledger:
    """`foreign`, `routing` and `lost` collect what was heard until somebody `settles` it."""

    def __init__(self, nft: Nft, monitor: Monitor) -> None:
        self._nft, self._monitor = nft, monitor
        monitor.news()
        self.generation = monitor.generation()
        self.foreign: list[Batch] = []
        self.routing = self.unexplained = False

    def run(self, commands: Sequence[str]) -> Batch:
        """Commit one batch; returns what it removed. KernelError as `Nft.run` raises it."""
        self.look()
        before = self.generation
        self._nft.run(commands)
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
