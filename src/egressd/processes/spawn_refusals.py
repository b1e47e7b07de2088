"""Who was not let in, or not believed, as records.

Anybody at the machine may ask without end, under names he makes up, and each record is kept for good. So
refusals of one user for one reason, of one workspace that there is or of any that there is not, are one
record a second with their number; what is told of them is told of the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from egressd.journal.floods import Flood, Floods
from egressd.journal.records import Scalar

__all__ = ["SpawnRefusals"]

_WINDOW = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class _Key:
    uid: int
    reason: str
    workspace: str | None  # None: there is no such workspace


class SpawnRefusals:
    """`later` is an event loop's `call_later`; `event` is what each record is called."""

    def __init__(
        self,
        record: Callable[[str, Mapping[str, Scalar]], None],
        *,
        later: Callable[[float, Callable[[], None]], object],
        event: str = "spawn-refused",
    ) -> None:
        self._record, self._later, self._event = record, later, event
        self._floods: Floods[_Key, Mapping[str, Scalar]] = Floods(window=_WINDOW)

    def add(self, uid: int, reason: str, workspace: str | None, fields: Mapping[str, Scalar]) -> None:
        """`fields`: what else the record says, if this is the first."""
        if not self._floods:
            self._later(_WINDOW, self._due)
        self._tell(self._floods.add(_Key(uid, reason, workspace), fields, now=time.monotonic()))

    def drain(self) -> None:
        """All of them, at an end."""
        self._tell(self._floods.drain())

    def _due(self) -> None:
        now = time.monotonic()
        self._tell(self._floods.due(now=now))
        following = self._floods.next_due()
        if following is not None:
            self._later(max(0.0, following - now), self._due)

    def _tell(self, floods: list[Flood[_Key, Mapping[str, Scalar]]]) -> None:
        for flood in floods:
            count = {"count": flood.count} if flood.count > 1 else {}
            self._record(
                self._event, {"uid": flood.key.uid, "reason": flood.key.reason, **flood.detail, **count}
            )
