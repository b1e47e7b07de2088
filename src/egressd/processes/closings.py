"""Connections that were carried and have ended: a record each, until there are many equal ones.

A client that begins connections as fast as the kernel lets it would make 15 GB of records a day. So, as with
flows (flow_accounts.py): of equal ones, to one host or service, by one sandbox, with one outcome, `EACH` a
second are recorded one by one, and those beyond are one record with their number, exact sums and the longest
duration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from egressd.model.identities import Link

__all__ = ["EACH", "Closing", "Closings", "Many"]

EACH = 10
_WINDOW = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Closing:
    """What makes two of them equal. `label`: the host or the service."""

    link: Link
    workspace: str
    label: str
    port: int
    how: str


@dataclass(slots=True)
class Many:
    """Bytes are of the payload. `seconds`: the longest."""

    connections: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Closings:
    """One second of them; the clock is an argument and must not run backwards."""

    _began: float = 0.0
    _each: Counter[Closing] = field(default_factory=Counter)
    _many: dict[Closing, Many] = field(default_factory=dict)

    def alone(self, closing: Closing, *, sent: int, received: int, seconds: float) -> bool:
        """True: it is to be recorded by itself. Else it has been added up with others like it."""
        if self._each[closing] < EACH:
            self._each[closing] += 1
            return True
        many = self._many.setdefault(closing, Many())
        many.connections += 1
        many.bytes_out += sent
        many.bytes_in += received
        many.seconds = max(many.seconds, seconds)
        return False

    def due(self, *, now: float) -> list[tuple[Closing, Many]]:
        """What was added up, once its second is over."""
        if now - self._began < _WINDOW:
            return []
        self._began = now
        self._each.clear()
        return self.take()

    def take(self, which: Callable[[Closing], bool] = lambda closing: True) -> list[tuple[Closing, Many]]:
        """Those of `which`, before their second is over: somebody is about to read, or nothing more comes."""
        return [(closing, self._many.pop(closing)) for closing in list(self._many) if which(closing)]
