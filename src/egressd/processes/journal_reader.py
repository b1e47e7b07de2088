"""Reading a journal's directory, also while the auditor writes it. Changes nothing, locks nothing.

    NNNN.jsonl      records, one per line; the truth
    NNNN.leaves     their leaf hashes, 32 bytes each; a cache, made again from the lines where it is missing
    NNNN.frontier   journal.merkle.Frontier of all records up to the end of a closed segment; a cache
    checkpoint      the latest signed note
    checkpoints     all of them, oldest first, each followed by a blank line
    origin          the log's name
    verifiers       its public keys as verifier keys, one per line, oldest first
    broken-N/       a log that came before and could not be continued; never read here

An index counts the whole lines over all segments from 0; it is the record's `seq`. A last line without its
newline is not written yet, and is not seen. The first segments may have been moved elsewhere: their lines
are then missing, and nothing else as long as their .leaves stay.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, overload

from egressd.journal import merkle, notes, records, segments
from egressd.journal.keys import BadKey, PublicKey
from egressd.journal.merkle import Frontier
from egressd.journal.notes import Checkpoint, NoteError, Verifier
from egressd.journal.records import RecordError

__all__ = [
    "Finding", "JournalReport", "Leaves", "check_journal", "checkpoints", "inspect_journal",
    "latest", "leaves", "lines", "origin", "segment_starts", "verifiers",
]  # fmt: skip

Keys: TypeAlias = Iterable[Verifier | PublicKey | str]

LEAF = 32  # bytes
_CHUNK = 1 << 20
_BATCH = 4096  # leaves
_MOST_FINDINGS = 200  # more do not tell more


# ---- where what lies


@dataclass(frozen=True, slots=True)
class Segment:
    """`first`: index of its first line. `count`: its whole lines, None for the last segment, which grows."""

    number: int
    first: int
    count: int | None


def segment_starts(directory: Path) -> list[Segment]:
    """All segments, oldest first, also those whose lines were moved away."""
    names = {entry.name for entry in directory.iterdir()}
    found = segments.numbers({name.replace(".leaves", ".jsonl") for name in names})
    starts: list[Segment] = []
    first = 0
    for number in found:
        if not starts and number > 1:  # older ones are gone altogether
            first = _frontier(directory / segments.frontier(number - 1)).size
        count = None if number == found[-1] else _count(directory, number, first)
        starts.append(Segment(number, first, count))
        first += count or 0
    return starts


def _count(directory: Path, number: int, first: int) -> int:
    """Lines of a closed segment."""
    with contextlib.suppress(OSError, merkle.MerkleError):
        return Frontier.load((directory / segments.frontier(number)).read_bytes()).size - first
    path = directory / segments.name(number)
    if path.exists():
        return sum(1 for _ in _whole_lines(path, 0))
    return (directory / segments.leaves(number)).stat().st_size // LEAF


def _frontier(path: Path) -> Frontier:
    try:
        return Frontier.load(path.read_bytes())
    except (FileNotFoundError, merkle.MerkleError):
        return Frontier()


def _whole_lines(path: Path, offset: int) -> Iterator[tuple[int, bytes]]:
    """(offset of the following line, line without newline), from `offset` on."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, line[:-1]


# ---- reading


def lines(directory: Path, first: int = 0) -> Iterator[tuple[int, bytes]]:
    """(index, line without its newline), from `first` on, up to what is whole now. Segments that were moved
    away are passed over."""
    for segment in segment_starts(directory):
        if segment.count is not None and segment.first + segment.count <= first:
            continue
        path = directory / segments.name(segment.number)
        if not path.exists():
            continue
        for index, (_, line) in enumerate(_whole_lines(path, 0), segment.first):
            if index >= first:
                yield index, line


class Leaves(Sequence[bytes]):
    """Leaf hashes of all records so far, mapped from the files. Does not grow: open it again for more."""

    def __init__(self, parts: Sequence[bytes | mmap.mmap], *, count: int | None = None) -> None:
        self._parts = [part for part in parts if len(part) >= LEAF]
        self._starts: list[int] = []
        self._length = 0
        for part in self._parts:
            self._starts.append(self._length)
            self._length += len(part) // LEAF
        if count is not None:
            self._length = count

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._length))]
        at = index + self._length if index < 0 else index
        if not 0 <= at < self._length:
            raise IndexError(index)
        which = bisect_right(self._starts, at) - 1
        offset = (at - self._starts[which]) * LEAF
        return self._parts[which][offset : offset + LEAF]

    def first(self, count: int) -> Leaves:
        """The tree of an older checkpoint, without copying. ValueError if there are not so many."""
        if not 0 <= count <= self._length:
            raise ValueError(f"the journal has {self._length} leaves, not {count}")
        return Leaves(self._parts, count=count)


def leaves(directory: Path) -> Leaves:
    """The leaf hashes of all records that are on disk. FileNotFoundError names a segment of which neither
    lines nor leaves are there."""
    parts: list[bytes | mmap.mmap] = []
    expected = 1
    for segment in segment_starts(directory):
        if segment.number != expected:
            missing = directory / segments.leaves(expected)
            raise FileNotFoundError(2, "the journal cannot be read whole without it", str(missing))
        expected += 1
        parts.append(_leaves_of(directory, segment))
    return Leaves(parts)


def _leaves_of(directory: Path, segment: Segment) -> bytes | mmap.mmap:
    with (
        contextlib.suppress(FileNotFoundError),
        (directory / segments.leaves(segment.number)).open("rb") as file,
    ):
        size = os.fstat(file.fileno()).st_size // LEAF * LEAF
        if segment.count is None or size == segment.count * LEAF:
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    path = directory / segments.name(segment.number)
    return b"".join(merkle.leaf_hash(line) for _, line in _whole_lines(path, 0))


def origin(directory: Path) -> str:
    """The log's name; empty if there is none yet."""
    try:
        return (directory / "origin").read_text("utf-8").strip()
    except FileNotFoundError:
        return ""


def verifiers(directory: Path) -> list[Verifier]:
    """Its public keys, oldest first, as the directory says: who trusts the journal's owner least brings
    the keys from elsewhere. What is no verifier key is passed over."""
    found: list[Verifier] = []
    with contextlib.suppress(FileNotFoundError):
        for line in (directory / "verifiers").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(BadKey):
                found.append(Verifier.parse(line))
    return found


def latest(directory: Path) -> str | None:
    """The latest checkpoint, as a signed note, unchecked."""
    try:
        return (directory / "checkpoint").read_text("utf-8", "replace")
    except FileNotFoundError:
        return None


def checkpoints(directory: Path) -> Iterator[str]:
    """All of them, oldest first, as signed notes, unchecked."""
    for _, note in _checkpoints(directory):
        yield note


def _checkpoints(directory: Path) -> Iterator[tuple[int, str]]:
    """(offset in the file, note)."""
    rest, offset = b"", 0
    with contextlib.suppress(FileNotFoundError), (directory / "checkpoints").open("rb") as file:
        while chunk := file.read(_CHUNK):
            rest += chunk
            whole = rest.rfind(b"\n\n") + 2
            if whole < 2:
                continue
            taken = 0
            for note in notes.split(rest[:whole].decode("utf-8", "surrogateescape")):
                yield offset + taken, note
                taken += len(note.encode("utf-8", "surrogateescape")) + 1
            offset, rest = offset + taken, rest[taken:]


# ---- checking


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `line` counts from 1 in its file, `offset` in bytes from 0; `index` is the
    record's. None where it is not about a line."""

    file: str
    what: str
    line: int | None = None
    offset: int | None = None
    index: int | None = None

    def __str__(self) -> str:
        place = f"{self.file}" + (f", line {self.line}" if self.line is not None else "")
        place += f", offset {self.offset}" if self.offset is not None else ""
        return f"{place}: {self.what}"


@dataclass(slots=True)
class JournalReport:
    """What was looked at, and what was wrong with it. `signed`: records under the latest good checkpoint."""

    origin: str = ""
    records: int = 0
    signed: int = 0
    checkpoints: int = 0
    archived: int = 0  # records whose lines were moved away
    latest: Checkpoint | None = None
    findings: list[Finding] = field(default_factory=list)


def check_journal(directory: Path, keys: Keys | None = None) -> list[Finding]:
    """Everything that is wrong with a journal; empty for one that is in order. See `inspect_journal`."""
    return inspect_journal(directory, keys).findings


def inspect_journal(directory: Path, keys: Keys | None = None) -> JournalReport:
    """Read all of it: every line canonical, its `seq` its index, its leaf the sidecar's; every checkpoint
    signed, of this origin, and of the tree that the lines make.

    With `keys` (public keys, verifier keys or PEM) the latest checkpoint must be signed by one of them, or by
    one that took over in a checkpoint signed by both. None: by one of those the directory lists, which
    proves only that the journal agrees with itself. OSError if the directory cannot be read.
    """
    return _Inspection(directory, keys).run()


class _Inspection:
    """One pass. Everything that grows is read in the order in which it is not written: checkpoints first,
    lines last, so that what a checkpoint speaks of is there."""

    def __init__(self, directory: Path, keys: Keys | None) -> None:
        self._directory = directory
        self._report = JournalReport(origin=origin(directory))
        self._frontier = Frontier()
        listed = verifiers(directory)
        given = listed if keys is None else [_verifier(key, self._report.origin) for key in keys]
        self._trusted = {verifier.key for verifier in given}
        self._known = list(dict.fromkeys([*listed, *given]))
        self._due: list[tuple[Checkpoint, Finding]] = []  # to be compared, smallest last; where each stands
        self._agreed = 0  # size of the last checkpoint whose root was right
        self._contradicted = False

    def run(self) -> JournalReport:
        self._read_checkpoints()
        numbers = [segment.number for segment in segment_starts(self._directory)]
        for expected, number in enumerate(numbers, 1):
            if number != expected:
                self._find(segments.name(expected), "neither this segment nor its leaves are there")
                break
            self._segment(number, closed=number != numbers[-1])
        self._report.records = self._frontier.size
        self._advance([], end=True)
        return self._report

    def _find(self, file: str, what: str, **place: int) -> None:
        if len(self._report.findings) < _MOST_FINDINGS:
            self._report.findings.append(Finding(file, what, **place))

    # ---- checkpoints

    def _read_checkpoints(self) -> None:
        # Both may be written meanwhile. What `checkpoint` says was in `checkpoints` before, so it is read
        # first; and what is added there from now on is not looked at as its end.
        single, size = latest(self._directory), _size(self._directory / "checkpoints")
        good: list[tuple[Checkpoint, Finding]] = []
        end, trusted = 0, False
        for offset, note in _checkpoints(self._directory):
            end = offset + len(note.encode("utf-8", "surrogateescape")) + 1
            place = Finding("checkpoints", "", offset=offset)
            checkpoint, trusted = self._opened(note, place, trusted=trusted)
            if checkpoint is not None:
                good.append((checkpoint, place))
        if single is not None:
            place = Finding("checkpoint", "")
            checkpoint, alone = self._opened(single, place, trusted=trusted)
            if checkpoint is not None and (not good or checkpoint.size >= good[-1][0].size):
                trusted = alone
            good += [(checkpoint, place)] if checkpoint is not None else []
        self._check_end(end, size, single)
        self._take(good, trusted=trusted)

    def _check_end(self, end: int, size: int, single: str | None) -> None:
        """What follows the last whole checkpoint, up to `size`, may be one that is being written, or that a
        crash cut short. The one in `checkpoint` is not: it was written there after it was written here."""
        try:
            with (self._directory / "checkpoints").open("rb") as file:
                file.seek(end)
                rest = file.read(max(0, min(size - end, notes.MAX_NOTE))).decode("utf-8", "ignore")
        except FileNotFoundError:
            return
        text = (single or "").partition("\n\n")[0] + "\n\n"
        if not _begins_checkpoint(rest, self._report.origin) or (single and rest.startswith(text)):
            self._find("checkpoints", "what follows here is not a checkpoint", offset=end)

    def _take(self, good: list[tuple[Checkpoint, Finding]], *, trusted: bool) -> None:
        report = self._report
        report.checkpoints = len(good)
        if not good:
            self._find("checkpoint", "there is no good checkpoint: nothing is signed")
            return
        self._due = sorted(good, key=lambda pair: -pair[0].size)
        report.latest = self._due[0][0]
        if not trusted:
            self._find(self._due[0][1].file, "the latest checkpoint is signed by none of the given keys")

    def _opened(self, note: str, place: Finding, *, trusted: bool) -> tuple[Checkpoint | None, bool]:
        """The checkpoint, and whether a trusted key signed it; its other signers are trusted from then on."""
        try:
            text, signers = notes.open_text(note, self._known)
            checkpoint = notes.parse(text)
        except NoteError as error:
            self._find(place.file, str(error), **_place(place))
            return None, trusted
        if checkpoint.origin != self._report.origin:
            self._find(
                place.file, f"this is a checkpoint of another log, {checkpoint.origin}", **_place(place)
            )
            return None, trusted
        if not any(verifier.key in self._trusted for verifier in signers):
            return checkpoint, False
        self._trusted |= {verifier.key for verifier in signers}
        return checkpoint, True

    def _advance(self, leaves: Sequence[bytes], *, end: bool = False) -> None:
        """Append leaves, and compare with the checkpoints that stand between them."""
        taken = 0
        base = self._frontier.size
        while self._due and self._due[-1][0].size <= base + len(leaves):
            checkpoint, place = self._due.pop()
            self._frontier.extend(leaves[taken : checkpoint.size - base])
            taken = max(taken, checkpoint.size - base)
            self._compare(checkpoint, place)
        self._frontier.extend(leaves[taken:])
        if end and self._due:
            checkpoint, place = self._due[0]
            what = f"says {checkpoint.size} records, {self._frontier.size} are there"
            self._find(place.file, what, **_place(place))

    def _compare(self, checkpoint: Checkpoint, place: Finding) -> None:
        if self._frontier.root() == checkpoint.root:
            self._agreed = self._report.signed = checkpoint.size
        elif not self._contradicted:
            self._contradicted = True  # all that follow are wrong, too
            what = f"the first {checkpoint.size} records are not those that were signed"
            what += f"; those up to {self._agreed} are" if self._agreed else ""
            self._find(place.file, what, **_place(place))

    # ---- lines

    def _segment(self, number: int, *, closed: bool) -> None:
        sidecar = self._bytes(segments.leaves(number))
        path = self._directory / segments.name(number)
        if not path.exists():
            leaves = [sidecar[at : at + LEAF] for at in range(0, len(sidecar) // LEAF * LEAF, LEAF)]
            self._report.archived += len(leaves)
            self._advance(leaves)
        else:
            self._lines(path, sidecar, closed=closed)
        stored = self._bytes(segments.frontier(number))
        if closed and stored and stored != self._frontier.dump():
            self._find(segments.frontier(number), "this is not the frontier of the records up to here")

    def _lines(self, path: Path, sidecar: bytes, *, closed: bool) -> None:
        first, offset, count = self._frontier.size, 0, 0
        batch: list[bytes] = []
        for following, line in _whole_lines(path, 0):
            leaf = merkle.leaf_hash(line)
            place = {"line": count + 1, "offset": offset, "index": first + count}
            self._line(path.name, line, place)
            beside = sidecar[count * LEAF : (count + 1) * LEAF]
            if beside != leaf and len(beside) == LEAF:
                self._find(path.name, "this is not the line whose hash was kept beside it", **place)
            batch.append(leaf)
            offset, count = following, count + 1
            if len(batch) == _BATCH:
                self._advance(batch)
                batch = []
        self._advance(batch)
        if closed and sidecar and len(sidecar) < count * LEAF:
            self._find(
                path.with_suffix(".leaves").name, "hashes are missing; remove the file, it is made again"
            )
        if len(sidecar) // LEAF > count:
            what = f"{len(sidecar) // LEAF} lines were written, {count} are there"
            self._find(path.name, what, line=count + 1, offset=offset)
        elif closed and offset != path.stat().st_size:
            self._find(path.name, "the last line has no end", line=count + 1, offset=offset)

    def _line(self, file: str, line: bytes, place: dict[str, int]) -> None:
        try:
            seq = records.decode(line).seq
        except RecordError as error:
            self._find(file, str(error), **place)
            return
        if seq != place["index"]:
            self._find(file, f"the record says it is number {seq}, it is number {place['index']}", **place)

    def _bytes(self, name: str) -> bytes:
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return b""


def _size(path: Path) -> int:
    """In bytes; 0 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _begins_checkpoint(rest: str, name: str) -> bool:
    """Is this the beginning of a note of log `name`, perhaps of no length?"""
    *whole, partial = rest.split("\n")
    signature = f"\u2014 {name} "
    patterns = [re.escape(name), r"[0-9]+", r"[A-Za-z0-9+/]+={0,2}", ""]
    signed = re.escape(signature) + r"[A-Za-z0-9+/]+={0,2}"
    if not all(re.fullmatch(patterns[at] if at < 4 else signed, line) for at, line in enumerate(whole)):
        return False
    expected = (name, "", "", "", signature)[min(len(whole), 4)]
    return (
        expected.startswith(partial)
        or bool(re.fullmatch((*patterns, signed)[min(len(whole), 4)], partial))
        or (len(whole) > 3 and partial.startswith(signature))
    )


def _place(finding: Finding) -> dict[str, int]:
    return {} if finding.offset is None else {"offset": finding.offset}


def _verifier(key: Verifier | PublicKey | str, name: str) -> Verifier:
    """A key without a name is taken under the log's."""
    if isinstance(key, Verifier):
        return key
    if isinstance(key, str) and "-----BEGIN" not in key:
        return Verifier.parse(key.strip())
    return Verifier(name, PublicKey.load(key) if isinstance(key, str) else key)
