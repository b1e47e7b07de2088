"""Floods of equal events, counted instead of repeated, and one link's floods kept to itself.

A sandbox that asks for a fresh name each time makes fresh events without end. Beyond `distinct` open ones
of a link the rest is counted under one name, so that the record of the others stays readable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from egressd.journal.floods import Flood, Floods

__all__ = ["OTHERS", "Happening", "Tally"]

OTHERS = "(others)"


@dataclass(frozen=True, slots=True)
class Happening:
    """What is counted together within a second. `link` is 0 for a source that is nobody's."""

    event: str
    link: int
    workspace: str
    name: str
    type: str
    reason: str


class Tally:
    """Add happenings; take out (happening, count) when their second is over."""

    def __init__(self, *, window: float = 1.0, distinct: int = 64) -> None:
        self._floods: Floods[Happening, None] = Floods(window=window, capacity=1 << 16)
        self._distinct = distinct
        self._open: dict[int, set[Happening]] = {}  # by link

    def add(self, happening: Happening, *, now: float, count: int = 1) -> list[tuple[Happening, int]]:
        """Count it, `count` times. Returns those whose second is over."""
        over = self.due(now=now)
        known = self._open.setdefault(happening.link, set())
        if happening not in known and len(known) >= self._distinct:
            event, link, workspace = happening.event, happening.link, happening.workspace
            happening = Happening(event, link, workspace, OTHERS, OTHERS, happening.reason)
        known.add(happening)
        return over + self._closed(self._floods.add(happening, None, now=now, count=count))

    def due(self, *, now: float) -> list[tuple[Happening, int]]:
        return self._closed(self._floods.due(now=now))

    def ended(self, link: int) -> list[tuple[Happening, int]]:
        """All of a link that has ended."""
        if link not in self._open:
            return []
        return self._closed(self._floods.take(lambda happening: happening.link == link))

    def drain(self) -> list[tuple[Happening, int]]:
        """All of them, before their second is over."""
        return self._closed(self._floods.drain())

    def next_due(self) -> float | None:
        return self._floods.next_due()

    def _closed(self, floods: Iterable[Flood[Happening, None]]) -> list[tuple[Happening, int]]:
        over = []
        for flood in floods:
            known = self._open.get(flood.key.link, set())
            known.discard(flood.key)
            if not known:
                self._open.pop(flood.key.link, None)
            over.append((flood.key, flood.count))
        return over
