"""The prover: reads the journal and writes the statement of a proof. Has no key, and signs nothing.

Started by the auditor for each proof, so that reading a large journal stops nobody:

    python -I -m egressd.processes.prover --journal DIR --workspace W [--link N] [--since T] [--until T]
                                          --size N [--continues M] [--attestation FILE]

`Facts` come in on stdin as JSON, the statement goes out on stdout. Exit status 0; or 1 with one line on
stderr that says why there is no proof.

The journal is read once, in order, and only from the segment in which the window begins, or the last full
snapshot before it lies. What is kept is what goes into the proof, and that is bounded.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import os
import re
import select
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from egressd.journal import lines, merkle, notes, statement, testimony
from egressd.journal.keys import BadKey, Verifier
from egressd.journal.lines import Line, event_of
from egressd.journal.notes import Checkpoint, NoteError
from egressd.journal.records import RecordError, stamp
from egressd.journal.statement import (
    Attestation,
    Continued,
    Facts,
    JournalPart,
    Records,
    Rotation,
    Scope,
    Statement,
    Window,
)
from egressd.journal.summary import summarise
from egressd.model.errors import EgressdError
from egressd.processes import isolation, journal_reader

__all__ = ["MAX_BYTES", "MAX_RECORDS", "CannotProve", "main", "prove"]

MAX_RECORDS = 200_000
MAX_BYTES = 128 << 20  # of lines
_LATE = 60  # seconds that a record may be older than the one before it: floods are written when they end
_SLACK = 4
_CHUNK = 1 << 16
_NICE = 10
_MOST_REPORT = 1 << 16  # bytes; a report of SEV-SNP takes 1184
_TIME: Final = re.compile(rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
# What brokers said of requests is in no proof, but for what a receipt shows.
_UNSHOWN: Final = {
    receipt: frozenset(e.encode() for e in testimony.PRIVATE if not testimony.is_shown(e, receipt=receipt))
    for receipt in (False, True)
}
_SHARED: Final = frozenset(event.encode() for event in statement.SHARED)
_WITHHELD: Final = frozenset(event.encode() for event in statement.WITHHELD)
_SNAPSHOTS: Final = (b"counted", b"snapshot")
_KEYS: Final = (b"key-created", b"key-rotated")
_PLACED: Final = (b"residency-admitted", b"residency-refused")
_DASH: Final = "— ".encode()


class CannotProve(EgressdError):
    """There is no proof, and why; for the person who asked."""


@dataclass(frozen=True, slots=True)
class Asked:
    """`since`, `until`: a record's time, or None. `size`: of the checkpoint that the proof ends with;
    `continues`: of an earlier one, that somebody has kept. `attestation`: where a report of the hardware may
    lie, over `statement.report_data` of the signing key."""

    journal: Path
    scope: Scope
    since: str | None
    until: str | None
    size: int
    continues: int | None = None
    attestation: Path | None = None


# ---- which records


@dataclass(slots=True)
class Gathered:
    """Records by number. `base` come before the window, which is [first, past)."""

    base: list[tuple[int, bytes]] = field(default_factory=list)
    window: list[tuple[int, bytes]] = field(default_factory=list)
    first: int = 0
    past: int = 0
    since: str | None = None
    until: str | None = None  # time of the last line that was looked at
    withheld: Counter[str] = field(default_factory=Counter)


class _Chain:
    """The counters at a moment: the last full snapshot and those after it, as records."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bytes]] = []
        self._rows: dict[str, list[tuple[int, bytes]]] = {}

    def add(self, index: int, line: bytes) -> bool:
        """Whether with this record another snapshot is complete."""
        with contextlib.suppress(RecordError):
            record = lines.read(line)
            snapshot = str(record.fields.get("snapshot"))
            if record.event == "counted":
                self._rows.setdefault(snapshot, []).append((index, line))
                return False
            return self._close(record, (index, line), self._rows.pop(snapshot, []))
        return False

    def _close(self, record: Line, closing: tuple[int, bytes], rows: list[tuple[int, bytes]]) -> bool:
        full = record.fields.get("full") is True
        if len(rows) != record.fields.get("rows") or not (full or self.records):
            self.records = []  # rows are missing: what changed since is not known until all is said again
            return False
        self.records = [*([] if full else self.records), *rows, closing]
        return True


class _Places:
    """Where addresses were last found to be, as records, if they were let in."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], tuple[int, bytes]] = {}

    def add(self, index: int, line: bytes) -> None:
        with contextlib.suppress(RecordError):
            record = lines.read(line)
            key = str(record.fields.get("host")), str(record.fields.get("address"))
            self._records.pop(key, None)
            if statement.is_place(record.event):
                self._records[key] = index, line

    def before(self, first: int) -> list[tuple[int, bytes]]:
        return [record for record in self._records.values() if record[0] < first]


class _Gathering:
    """One pass over the lines."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._needle = f'"workspace":"{asked.scope.workspace}"'.encode()
        self._since = None if asked.since is None else asked.since.encode()
        self._until = None if asked.until is None else asked.until.encode()
        self._end = None if asked.until is None else _later(asked.until)
        self._chain, self._places = _Chain(), _Places()
        self._snapshots = asked.scope.link is None  # a receipt's counters are its link's, in its own records
        self._unshown = _UNSHOWN[asked.scope.link is not None]
        self._link = None if asked.scope.link is None else f'"link":"{asked.scope.link}"'.encode()
        self._known = False  # there was a record of the link
        self._begun = self._since is None
        self._bytes = 0
        self._ahead: list[tuple[int, bytes]] = []  # later than `until`, unless one follows that is not
        self._ahead_withheld: Counter[str] = Counter()
        self.found = Gathered()
        self._first: int | None = None

    def run(self, found: Iterator[tuple[int, bytes]]) -> Gathered:
        for index, line in found:
            if index >= self._asked.size:
                break
            time = _time_of(line)
            if not self._begun and self._since is not None and time >= self._since:
                self._begin(index)
            if self._end is not None and time > self._end:
                break
            self._line(index, line, time)
            self.found.until = time.decode() or self.found.until
            if self._begun and self._until is not None and time <= self._until:
                self._take(past=index + 1)
        self._finish()
        return self.found

    def _line(self, index: int, line: bytes, time: bytes) -> None:
        if self._first is None:
            self._first = index
            self.found.first = index if self._begun else 0
            self.found.since = time.decode("ascii", "replace")
        event = event_of(line)
        if event in self._unshown:
            return
        if self._needle in line:
            if event in _SNAPSHOTS and not self._snapshots:
                return
            if event in _SNAPSHOTS and not self._begun and self._chain.add(index, line):
                self._restart(index, time)
                return
            if event in _PLACED and (not self._begun or self._link is not None):
                self._places.add(index, line)
            if self._link is not None and self._link in line and self._begun:
                self._of_link(index, event, time)
        elif event in _WITHHELD:
            self._ahead_withheld[event.decode()] += 1
            return
        elif event not in _SHARED:
            return
        self._keep(index, line)

    def _keep(self, index: int, line: bytes) -> None:
        if not self._begun and not self.found.base:
            return  # before the window, and there is nothing to count from
        self._ahead.append((index, line))
        self._bytes += len(line)
        self._check_size(1 if self._begun else _SLACK)

    def _check_size(self, times: int) -> None:
        """`times`: what lies between two snapshots may be more, as long as the later one is still to come."""
        kept = len(self._ahead) + len(self.found.window)
        if kept > times * MAX_RECORDS or self._bytes > times * MAX_BYTES:
            most = f"{MAX_RECORDS} records or {MAX_BYTES >> 20} MiB"
            raise CannotProve(f"the window holds more than {most}: ask for a shorter one")

    def _restart(self, index: int, time: bytes) -> None:
        """A snapshot before the window is complete: from here on, unless another one follows."""
        self._ahead.clear()
        self._ahead_withheld.clear()
        self._bytes = 0
        self.found.base = self._chain.records
        self.found.first, self.found.since = index + 1, time.decode()

    def _begin(self, index: int) -> None:
        """Here is `since`. Without a snapshot before it the window begins here and not earlier."""
        self._begun = True
        if not self.found.base:
            self._ahead.clear()
            self._ahead_withheld.clear()
            self._bytes = 0
            self.found.first, self.found.since = index, self._asked.since
        self._check_size(1)

    def _of_link(self, index: int, event: bytes, time: bytes) -> None:
        """A receipt is of the last sandbox that had the link: numbers begin anew with the machine, and what
        was said of an earlier one is somebody else's."""
        in_time = self._until is None or time <= self._until
        if event == b"sandbox-opening" and self._known and in_time:
            self._ahead.clear()
            self._ahead_withheld.clear()
            self._bytes = 0
            self.found = Gathered(first=index, since=time.decode())
        self._known = True

    def _take(self, *, past: int) -> None:
        self.found.past = past
        self.found.window += self._ahead
        self._ahead = []
        self.found.withheld += self._ahead_withheld
        self._ahead_withheld.clear()

    def _finish(self) -> None:
        if not self._begun:
            self._begin(self._asked.size)
        if self._until is None:
            self._take(past=self._asked.size)
        self.found.past = max(self.found.past, self.found.first)
        self.found.base = sorted({*self.found.base, *self._places.before(self.found.first)})


def _time_of(line: bytes) -> bytes:
    """A record's time, its last member; empty for what is no record."""
    time = line[-29:-2]
    return time if _TIME.fullmatch(time) else b""


def _later(time: str) -> bytes:
    """A moment after which no record is looked for that is not later than `time`."""
    from datetime import datetime, timedelta  # noqa: PLC0415

    moment = datetime.strptime(time, "%Y-%m-%dT%H:%M:%S.%f%z") + timedelta(seconds=_LATE)
    return stamp(moment).encode()


def _gather(asked: Asked) -> Gathered:
    found = _Gathering(asked).run(journal_reader.lines(asked.journal, _start(asked)))
    read = [(index, line) for index, line in found.window if _belongs(line, asked.scope)]
    found.window = read
    return found


def _belongs(line: bytes, scope: Scope) -> bool:
    try:
        record = lines.read(line)
    except RecordError:
        return False
    return statement.belongs(record.event, record.fields, scope)


def _start(asked: Asked) -> int:
    """The number of the line to begin reading with."""
    if asked.since is None:
        return 0
    starts = [segment.first for segment in journal_reader.segment_starts(asked.journal)]
    since = asked.since.encode()
    earlier = [place for place, first in enumerate(starts) if _first_time(asked.journal, first) <= since]
    place = earlier[-1] if earlier else 0
    if asked.scope.link is None:
        while place > 0 and not _has_full_snapshot(asked, starts[place], since):
            place -= 1
    return starts[place] if starts else 0


def _first_time(journal: Path, first: int) -> bytes:
    return next((_time_of(line) for _, line in journal_reader.lines(journal, first)), b"")


def _has_full_snapshot(asked: Asked, first: int, since: bytes) -> bool:
    """Whether the counters of the workspace are told in full in what follows, before `since`, with every row:
    a snapshot may begin in one segment and end in the next. An epoch's first snapshot is a full one, so a
    workspace that has none anywhere before has counted nothing."""
    needle = f'"workspace":"{asked.scope.workspace}"'.encode()
    chain = _Chain()
    for index, line in journal_reader.lines(asked.journal, first):
        if _time_of(line) >= since:
            return False
        if event_of(line) in _SNAPSHOTS and needle in line and chain.add(index, line):
            return True
    return False


# ---- checkpoints


def _note_upto(journal: Path, size: int) -> str | None:
    """The last checkpoint of at most `size` records. The file is bisected: checkpoints only grow."""
    path = journal / "checkpoints"
    try:
        low, high = 0, path.stat().st_size
    except FileNotFoundError:
        return None
    with path.open("rb") as file:
        while high - low > _CHUNK:
            middle = (low + high) // 2
            found = _notes_from(file.fileno(), middle, _CHUNK)
            if found and found[0][1] <= size:
                low = found[0][0]
            else:
                high = middle
        fitting = [
            note for _, records, note in _notes_from(file.fileno(), low, 2 * _CHUNK) if records <= size
        ]
    return fitting[-1] if fitting else None


def _notes_from(descriptor: int, offset: int, length: int) -> list[tuple[int, int, str]]:
    """(offset, records, note) of the whole notes that begin within `length` bytes."""
    data = os.pread(descriptor, length, offset)
    at = 0
    if offset:  # a blank line ends a note, and stands in it before its signatures
        at = next(
            (m.end() for m in re.finditer(rb"\n\n", data) if not data.startswith(_DASH, m.end())), length
        )
    found = []
    for note in notes.split(data[at:].decode("utf-8", "surrogateescape")):
        with contextlib.suppress(NoteError):
            found.append((offset + at, notes.parse(notes.signatures(note)[0]).size, note))
        at += len(note.encode("utf-8", "surrogateescape")) + 1
    return found


def _end_note(asked: Asked) -> tuple[str, Checkpoint]:
    for note in (journal_reader.latest(asked.journal), _note_upto(asked.journal, asked.size)):
        if note is not None:
            checkpoint = notes.parse(notes.signatures(note)[0])
            if checkpoint.size == asked.size:
                return note, checkpoint
    raise CannotProve(f"the journal has no checkpoint of {asked.size} records")


def _rotations(
    asked: Asked, verifiers: Sequence[Verifier], keys: Sequence[tuple[int, bytes]], leaves: Sequence[bytes]
) -> Iterator[Rotation]:
    """For each change of keys the first checkpoint after it, if the older key signed that too."""
    for older, newer in itertools.pairwise(verifiers):
        named = next(
            (index for index, line in keys if str(newer).encode() in line and b"key-rotated" in line), None
        )
        if named is None:
            continue
        for note in _notes_after(asked.journal, named):
            with contextlib.suppress(NoteError, BadKey):
                checkpoint = notes.open(note, [older])
                if named < checkpoint.size <= asked.size:
                    yield Rotation(note, _base64(merkle.consistency(leaves, checkpoint.size)))
                    break


def _notes_after(journal: Path, index: int) -> list[str]:
    """The first checkpoints that hold record `index`."""
    path = journal / "checkpoints"
    before = _note_upto(journal, index)
    if not path.exists():
        return []
    data = path.read_bytes()
    at = 0 if before is None else data.find(before.encode("utf-8", "surrogateescape"))
    return notes.split(data[max(at, 0) :][: 2 * _CHUNK].decode("utf-8", "surrogateescape"))[:64]


def _key_records(asked: Asked, first: int) -> list[tuple[int, bytes]]:
    """Those before the window: they say which key came after which."""
    found = []
    for index, line in journal_reader.lines(asked.journal):
        if index >= first:
            break
        if event_of(line) in _KEYS:
            found.append((index, line))
    return found


# ---- the statement


def prove(asked: Asked, facts: Facts) -> Statement:
    """CannotProve, or OSError for a journal that cannot be read."""
    if asked.since is not None and asked.until is not None and asked.since > asked.until:
        raise CannotProve("the window ends before it begins: --since is later than --until")
    origin = journal_reader.origin(asked.journal)
    verifiers = journal_reader.verifiers(asked.journal)
    note, end = _end_note(asked)
    found = _gather(asked)
    leaves = journal_reader.leaves(asked.journal).first(asked.size)
    if len(verifiers) > 1:
        found.base = sorted({*found.base, *_key_records(asked, found.first)})
    gathered = [*found.base, *found.window]
    read = [lines.read(line) for _, line in gathered]
    if asked.scope.link is not None:
        _check_whole(asked.scope.link, {line.event for line in read})
    keys = [(index, line) for index, line in gathered if event_of(line) in _KEYS]
    start = _note_upto(asked.journal, found.first) if found.first else None
    begins = 0 if start is None else notes.parse(notes.signatures(start)[0]).size
    journal = JournalPart(
        origin=origin,
        keys=tuple(map(str, verifiers)),
        start=start,
        end=note,
        consistency=_base64(merkle.consistency(leaves, begins)) if start is not None else (),
        rotations=tuple(_rotations(asked, verifiers, keys, leaves)),
        continued=_continued(asked, leaves),
        records=_records(gathered, leaves),
    )
    return statement.build(
        msgspec.structs.replace(facts, attestation=_attestation(asked.attestation) or facts.attestation),
        scope=asked.scope,
        window=_window(asked, found, read),
        summary=summarise(read, base=len(found.base), from_beginning=found.first == 0),
        withheld=dict(sorted(found.withheld.items())),
        journal=journal,
        size=end.size,
        root=end.root,
        request=statement.request_of(read, asked.scope),
    )


def _attestation(path: Path | None) -> Attestation | None:
    """The report as it lies there, unread: `verify` says what it is worth. CannotProve for what is none."""
    try:
        report = path.read_bytes() if path is not None else b""
    except FileNotFoundError:
        return None
    if len(report) > _MOST_REPORT:
        raise CannotProve(f"{path} is no attestation report: it takes {len(report)} bytes")
    return Attestation("sev-snp", base64.b64encode(report).decode("ascii")) if report else None


def _check_whole(link: str, events: Container[str]) -> None:
    if "sandbox-closed" not in events:
        raise CannotProve(f"the journal does not hold the end of sandbox {link}")
    if "sandbox-opening" not in events:
        raise CannotProve(f"sandbox {link} was opened before the window: ask from an earlier moment on")


def _continued(asked: Asked, leaves: Sequence[bytes]) -> Continued | None:
    size = asked.continues
    if size is None:
        return None
    if size > asked.size:
        text = f"the checkpoint is of {size} records, and the journal has {asked.size}"
        raise CannotProve(f"{text}: it was truncated, or is another journal")
    return Continued(size, _base64(merkle.consistency(leaves, size)))


def _window(asked: Asked, found: Gathered, read: Sequence[Line]) -> Window:
    last = max([found.until or "", *(line.time for line in read)])
    until = min(asked.until or last, last)  # nothing is known of what is still to come
    return Window(
        asked_since=asked.since,
        asked_until=asked.until,
        since=min(found.since or until, until) or None,
        until=until or None,
        first=found.first,
        past=found.past,
        base=len(found.base),
    )


def _records(gathered: Sequence[tuple[int, bytes]], leaves: Sequence[bytes]) -> Records:
    indices = [index for index, _ in gathered]
    marks = b"".join(merkle.leaf_hash(line)[: statement.MARK] for _, line in gathered)
    return Records(
        indices=tuple(indices),
        lines=tuple(line.decode("ascii") for _, line in gathered),
        hashes=_base64(merkle.included(leaves, indices)),
        marks=base64.b64encode(marks).decode("ascii"),
    )


def _base64(hashes: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(base64.b64encode(each).decode("ascii") for each in hashes)


# ---- the program


def main(arguments: list[str] | None = None) -> int:
    asked = _asked(arguments)
    with contextlib.suppress(OSError):
        os.nice(_NICE - os.nice(0))
    try:
        facts = msgspec.json.decode(sys.stdin.buffer.read(), type=Facts)
        sys.stdout.buffer.write(statement.encode(prove(asked, facts)))
        sys.stdout.buffer.flush()
    except msgspec.DecodeError as error:
        return _fail(f"the facts cannot be read: {error}")
    except (CannotProve, merkle.MerkleError, NoteError, OSError) as error:
        return _fail(str(error))
    return 0


def _asked(arguments: list[str] | None) -> Asked:
    parser = argparse.ArgumentParser(prog="egressd[prover]", allow_abbrev=False)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--link", type=int)
    parser.add_argument("--since", type=_time)
    parser.add_argument("--until", type=_time)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--continues", type=int)
    parser.add_argument("--attestation", type=Path)
    args = parser.parse_args(arguments)
    link = None if args.link is None else f"eg{args.link}"
    scope = Scope(args.workspace, link)
    return Asked(args.journal, scope, args.since, args.until, args.size, args.continues, args.attestation)


def _time(text: str) -> str:
    if not _TIME.fullmatch(text.encode()):
        raise argparse.ArgumentTypeError("not a time as a record spells it")
    _later(text)  # ValueError for the 31st of February
    return text


def _fail(text: str) -> int:
    print(text.replace("\n", " "), file=sys.stderr)
    return 1


def _stay_no_longer() -> None:
    """Than who asked: nobody would read the statement. An auditor that was killed before we asked the kernel
    for the signal has closed its end of our output: exit(2) closes descriptors first, and signals then."""
    isolation.die_with_parent()
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        sys.exit(1)


if __name__ == "__main__":
    _stay_no_longer()
    sys.exit(main())
