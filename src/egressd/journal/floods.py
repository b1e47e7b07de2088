"""Many equal happenings, one record with an exact count.

Happenings with the same key within `window` seconds of the first are one `Flood`: the first one's
details, how many there were, when the last one came. Nothing is estimated and nothing is dropped: with
more than `capacity` different keys at once the oldest is simply handed out early.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Flood", "Floods"]

K = TypeVar("K", bound=Hashable)
D = TypeVar("D")


@dataclass(slots=True)
class Flood(Generic[K, D]):
    """`first` and `last` are seconds on the caller's clock."""

    key: K
    detail: D
    first: float
    last: float
    count: int = 1


class Floods(Generic[K, D]):
    """Counts until `due`. The clock is an argument and must not run backwards."""

    def __init__(self, *, window: float = 1.0, capacity: int = 4096) -> None:
        self._window, self._capacity = window, capacity
        self._open: OrderedDict[K, Flood[K, D]] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._open)

    def add(self, key: K, detail: D, *, now: float, count: int = 1) -> list[Flood[K, D]]:
        """Count one, or `count` of them; returns the floods that are over."""
        over = self.due(now=now)
        flood = self._open.get(key)
        if flood is not None:
            flood.count += count
            flood.last = now
            return over
        if len(self._open) >= self._capacity:
            over.append(self._open.popitem(last=False)[1])
        self._open[key] = Flood(key, detail, now, now, count)
        return over

    def due(self, *, now: float) -> list[Flood[K, D]]:
        """Floods whose window has passed, oldest first."""
        over = []
        while self._open:
            flood = next(iter(self._open.values()))
            if now - flood.first < self._window:
                break
            over.append(self._open.popitem(last=False)[1])
        return over

    def next_due(self) -> float | None:
        """When the oldest will be over; None if there is none."""
        return next((flood.first + self._window for flood in self._open.values()), None)

    def take(self, which: Callable[[K], bool]) -> list[Flood[K, D]]:
        """Those of `which`, before their window has passed, oldest first: nothing more will come of them."""
        return [self._open.pop(key) for key in [key for key in self._open if which(key)]]

    def drain(self) -> list[Flood[K, D]]:
        """All of them, at an end."""
        over = list(self._open.values())
        self._open.clear()
        return over
