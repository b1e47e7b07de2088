"""Questions that were answered before: bytes in, bytes out, no message is read.

What a sandbox asked, without the id in front, is the key; what it was told, without the id, the value. A
`Lane` is one source address: the answers of its workspace, and what it was denied since the last `fold`,
so that a denial from here is counted and recorded as exactly as any other.

Every dictionary belongs to one workspace and is bounded; spelling names in new ways (or asking for new ones)
costs the workspace itself its memory of others, nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["SLOT", "Cache", "Denial", "Folded", "Lane", "shed", "sweep"]

SLOT = 512  # bytes of a place in a batch: a question that is kept fits in, and so does its answer
_ANSWERS, _DENIALS = 4096, 2048  # kept, per workspace
_LONGEST = 320  # bytes of the longest question that is kept


@dataclass(slots=True, eq=False)
class Denial:
    """An answer that is a denial; what it is recorded as."""

    answer: bytes
    name: str
    type: str
    reason: str


@dataclass(frozen=True, slots=True)
class Folded:
    """So many denials of one question to one link since the last time. `denial` is None for questions that
    nobody looked at, because the link's were too many."""

    link: int
    workspace: str
    denial: Denial | None
    count: int


@dataclass(slots=True)
class _Workspace:
    answers: dict[bytes, bytes] = field(default_factory=dict)
    denials: dict[bytes, Denial] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Lane:
    """The way of one source address. `answers` and `denials` are its workspace's."""

    link: int
    workspace: str
    answers: dict[bytes, bytes]
    denials: dict[bytes, Denial]
    changed: list[Lane]  # where it puts itself when there is something to fold
    pending: dict[Denial, int] = field(default_factory=dict)
    dropped: int = 0

    def answer(self, question: bytes) -> bytes | None:
        """What `sweep` does, for one."""
        found = self.answers.get(question)
        if found is None:
            denial = self.denials.get(question)
            if denial is not None:
                self.count(denial)
                return denial.answer
        return found

    def count(self, denial: Denial) -> None:
        if not self.pending:
            self.changed.append(self)
        self.pending[denial] = self.pending.get(denial, 0) + 1

    def drop(self, count: int) -> None:
        if not self.dropped:
            self.changed.append(self)
        self.dropped += count

    def keep(self, question: bytes, answer: bytes) -> None:
        """Remember an answer that holds until the cache is told otherwise."""
        if len(question) <= _LONGEST and len(answer) <= SLOT - 2:
            if len(self.answers) >= _ANSWERS:
                self.answers.clear()
            self.answers[question] = answer

    def keep_denial(self, question: bytes, denial: Denial) -> None:
        """Remember a denial that follows from the workspace's list alone; it is not counted by this."""
        if len(question) <= _LONGEST and len(denial.answer) <= SLOT - 2:
            if len(self.denials) >= _DENIALS:
                self.denials.clear()
            self.denials[question] = denial


class Cache:
    """The lanes by packed source address, and the answers by workspace."""

    def __init__(self) -> None:
        self.lanes: dict[bytes, Lane] = {}
        self._changed: list[Lane] = []
        self._workspaces: dict[str, _Workspace] = {}

    def forget(self) -> None:
        """Everything: lists have changed. What is counted stays counted."""
        self.lanes.clear()
        self._workspaces.clear()

    def void(self, workspace: str) -> None:
        """Its answers; not its denials, which no address changes."""
        known = self._workspaces.get(workspace)
        if known is not None:
            known.answers.clear()

    def unbind(self) -> None:
        """Sources belong to others now: nobody has a lane until asked about again."""
        self.lanes.clear()

    def lane(self, source: bytes, *, link: int, workspace: str) -> Lane:
        """For `source` (4 or 16 bytes), which is the link's as the caller has found, of a known workspace."""
        lane = self.lanes.get(source)
        if lane is None or lane.link != link or lane.workspace != workspace:
            known = self._workspaces.setdefault(workspace, _Workspace())
            lane = Lane(link, workspace, known.answers, known.denials, self._changed)
            self.lanes[source] = lane
        return lane

    def fold(self) -> list[Folded]:
        """What was counted since the last time, each once."""
        folded = []
        changed, self._changed[:] = list(self._changed), []
        for lane in changed:
            pending, lane.pending = lane.pending, {}
            dropped, lane.dropped = lane.dropped, 0
            folded += [Folded(lane.link, lane.workspace, denial, count) for denial, count in pending.items()]
            if dropped:
                folded.append(Folded(lane.link, lane.workspace, None, dropped))
        return folded


def sweep(
    batch: bytes,
    senders: Sequence[tuple[int, bytes]],
    lanes: dict[bytes, Lane],
    *,
    out: bytearray,
    lengths: memoryview,
) -> list[int]:
    """Answer what can be answered at once; returns the numbers of the others, what is left out among them.

    `senders` has size and source of each message, size 0 for one to be left out. Message i begins at SLOT*i.
    Its answer is written to the same place of `out`, where its id is already, and its length to lengths[i].
    """
    others, last = [], b""
    lane, answers, denials = None, _NO_ANSWERS, _NO_DENIALS
    at = 2 - SLOT
    for number, (size, source) in enumerate(senders):
        at += SLOT
        if source != last:
            last, lane = source, lanes.get(source)
            answers, denials = (lane.answers, lane.denials) if lane else (_NO_ANSWERS, _NO_DENIALS)
        # What is longer than its place runs into the next one here, and is then longer than any that is kept.
        question = batch[at : at + size - 2]
        answer = answers.get(question)
        if answer is None:
            denial = denials.get(question)
            if denial is None or lane is None:
                others.append(number)
                continue
            answer, pending = denial.answer, lane.pending
            if denial in pending:
                pending[denial] += 1
            else:
                lane.count(denial)
        length = len(answer)
        out[at : at + length] = answer
        lengths[number] = length + 2
    return others


_NO_ANSWERS: dict[bytes, bytes] = {}
_NO_DENIALS: dict[bytes, Denial] = {}


def shed(
    senders: Sequence[tuple[int, bytes]], shares: dict[bytes, int], share: int
) -> tuple[list[tuple[int, bytes]], dict[bytes, int]]:
    """Leave out what exceeds each source's `share`; `shares` is what each has had. Returns the senders as
    `sweep` wants them, and how many of whom are left out."""
    kept, over = [], dict[bytes, int]()
    for size, source in senders:
        had = shares.get(source, 0)
        if had < share:
            shares[source] = had + 1
            kept.append((size, source))
        else:
            over[source] = over.get(source, 0) + 1
            kept.append((0, source))
    return kept, over
