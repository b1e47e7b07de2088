"""What the service remembers of an inference: its state, what it wrote, how it ended. In memory alone, and
for a while: what must be kept for good is in the journal.

States: ``deciding`` (whether, and what it may see), ``projecting`` (copies are made), ``running``, then
``ended`` or ``refused``. All of this belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import base64
import bisect
import enum
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from egressd.broker.runners.jobs import Job
from egressd.broker.web.requests import spelled

__all__ = ["Inference", "Inferences", "Piece", "Shown", "State"]

_PIECE = 256  # bytes that one takes, about, and to which small ones are put together


class State(enum.StrEnum):
    DECIDING = "deciding"
    PROJECTING = "projecting"
    RUNNING = "running"
    ENDED = "ended"
    REFUSED = "refused"

    @property
    def over(self) -> bool:
        return self in (State.ENDED, State.REFUSED)


@dataclass(frozen=True, slots=True)
class Piece:
    """Of what the command wrote. `at` counts bytes of both streams together, in the order they came."""

    at: int
    stream: str
    data: bytes

    def told(self) -> dict[str, Any]:
        return {"stream": self.stream, "offset": self.at, **text_or_base64(self.data)}

    def after(self, offset: int) -> Piece:
        """What of it is not before `offset`."""
        skip = max(offset - self.at, 0)
        return Piece(self.at + skip, self.stream, self.data[skip:])


def text_or_base64(data: bytes) -> dict[str, str]:
    """Bytes in JSON: as `text` where they are UTF-8, as `base64` (RFC 4648, section 4) where they are not."""
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode("ascii")}


class Shown(NamedTuple):
    """A document that it is shown, as it was ingested."""

    id: str
    digest: str  # sha256:...
    size: int  # bytes


@dataclass(slots=True)
class Inference:
    """`job` holds what it is shown; nothing of it that was not cleared is here."""

    id: str
    owner: str  # principal
    workspace: str
    action: str
    role: str
    job: Job | None
    files: tuple[Shown, ...]
    network: str
    asked: str  # as a record spells a time
    state: State = State.DECIDING
    status: int | None = None
    why: str = ""
    hit: tuple[str, ...] = ()
    refused: str = ""  # the reason, for who administers
    destroyed: bool = False
    link: int | None = None
    policy: str = ""
    manifest: str = ""  # sha256:... of MANIFEST.json, once that is there and is what was decided
    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens: int = 0
    cost: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    started: str = ""
    ended: str = ""
    stop: str = ""  # why it is to be stopped, once somebody wants that
    pieces: list[Piece] = field(default_factory=list)
    written: int = 0  # bytes
    cut: int = 0  # bytes that were written beyond what is kept
    over_since: float = 0.0  # of the service's clock
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    # ---- what happens to it

    def change(self, state: State | None = None) -> None:
        """Whoever waits is woken."""
        self.state = self.state if state is None else state
        self._changed.set()
        self._changed = asyncio.Event()

    def write(self, stream: str, data: bytes, *, most: int) -> None:
        """Kept, as far as `most` bytes go; what a piece takes beside its bytes counts, too."""
        kept = data[: max(most - self.written - _PIECE * len(self.pieces), 0)]
        self.cut += len(data) - len(kept)
        if not kept:
            return
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.stream == stream and len(last.data) < _PIECE:
            self.pieces[-1] = Piece(last.at, stream, last.data + kept)
        else:
            self.pieces.append(Piece(self.written, stream, kept))
        self.written += len(kept)
        self.change()

    def forget_output(self) -> None:
        self.cut += self.written
        self.written = 0
        self.pieces.clear()

    # ---- who waits for it

    async def over(self, within: float | None) -> bool:
        """Whether it is over before `within` seconds are."""
        try:
            async with asyncio.timeout(within):
                while not self.state.over:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def output(self, offset: int = 0) -> AsyncIterator[Piece]:
        """From `offset` to the end of the run. By bytes and not by pieces: the last of those may grow."""
        while True:
            while (piece := self._piece(offset)) is not None:
                offset = piece.at + len(piece.data)
                yield piece
            if self.state.over:
                return
            await self._changed.wait()

    def _piece(self, offset: int) -> Piece | None:
        if offset >= self.written:
            return None
        at = bisect.bisect_right(self.pieces, offset, key=lambda piece: piece.at) - 1
        return self.pieces[at].after(offset)

    # ---- what is told of it

    def told(self, *, reason: bool = False, output: bool = True, readable: bool = True) -> dict[str, Any]:
        """As JSON. `reason`: to somebody who may know why it was refused. Not `readable`: to somebody who may
        know how it ended, and neither what it was shown nor what it wrote."""
        found: dict[str, Any] = {
            "id": self.id,
            "state": self.state.value,
            "workspace": self.workspace,
            "action": self.action,
            "asked": self.asked,
        }
        if self.state.over:
            found["result"] = self.result(reason=reason, output=output) if readable else self._end()
        return found

    def _end(self) -> dict[str, Any]:
        return {"status": self.status, "why": self.why, "hit": spelled(self.hit)}

    def result(self, *, reason: bool = False, output: bool = True) -> dict[str, Any]:
        refused = self.state is State.REFUSED
        return {
            **self._end(),
            **({"refused": self.refused} if refused and reason else {}),
            **({"output": self._whole_output()} if output else {}),
            "receipt": self.receipt(),
        }

    def _whole_output(self) -> dict[str, Any]:
        streams = {
            name: text_or_base64(b"".join(piece.data for piece in self.pieces if piece.stream == name))
            for name in ("stdout", "stderr")
        }
        return {**streams, "octets": self.written, "cut": self.cut}

    def receipt(self) -> dict[str, Any]:
        """What was shown, what it was held to, what became of it. Nothing about what was not shown."""
        return {
            "request": self.id,
            "workspace": self.workspace,
            "asker": self.owner,
            "action": self.action,
            "role": self.role,
            "files": [{"id": one.id, "sha256": one.digest.removeprefix("sha256:")} for one in self.files],
            "manifest": self.manifest,
            "network": {"mode": self.network, "link": self.link, "counters": self._counters()},
            "policy": self.policy,
            "status": self.status,
            "why": self.why,
            "hit": spelled(self.hit),
            "tokens": self.tokens,
            "cost": self.cost,
            "destroyed": self.destroyed,
            "times": {
                "asked": self.asked,
                "started": self.started,
                "ended": self.ended,
                "steps": self.seconds,
            },
            "signed": f"/v1/inferences/{self.id}/receipt?proof=1" if self.link is not None else None,
        }

    def _counters(self) -> dict[str, dict[str, int]]:
        return {
            name: {"packets": packets, "bytes": octets} for name, (packets, octets) in self.counters.items()
        }


class Inferences:
    """All that are remembered. Those that are over are forgotten after `keep` seconds, and what they wrote
    earlier if all of it together is more than `most` bytes: first that of who takes most of it."""

    def __init__(self, *, keep: float, most: int, clock: Callable[[], float]) -> None:
        self._keep, self._most, self._clock = keep, most, clock
        self._all: dict[str, Inference] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, inference: Inference) -> None:
        self.tidy()
        self._all[inference.id] = inference

    def get(self, id: str) -> Inference | None:
        self.tidy()
        return self._all.get(id)

    def of(self, owner: str) -> list[Inference]:
        self.tidy()
        return [inference for inference in self._all.values() if inference.owner == owner]

    def under_way(self) -> list[Inference]:
        return [inference for inference in self._all.values() if not inference.state.over]

    def tidy(self) -> None:
        now = self._clock()
        for inference in [one for one in self._all.values() if one.state.over]:
            if now - inference.over_since > self._keep:
                del self._all[inference.id]
        self._make_room()

    def _make_room(self) -> None:
        over = [one for one in self._all.values() if one.state.over and one.written]
        excess = sum(one.written for one in over) - self._most
        while excess > 0:
            of: dict[str, int] = {}
            for one in over:
                of[one.owner] = of.get(one.owner, 0) + one.written
            greedy = max(of, key=lambda owner: of[owner])
            oldest = min((one for one in over if one.owner == greedy), key=lambda one: one.over_since)
            excess -= oldest.written
            over.remove(oldest)
            oldest.forget_output()
