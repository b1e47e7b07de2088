"""The journal on disk: whole lines, appended by one writer, and a thread that does the writing.

`JournalFile` owns the directory STATE_DIR/journal. What it promises:

* One writer. It holds flock(2) on the directory; a second one is refused, not queued.
* Only whole lines. A write that did not succeed to its last byte is cut off again before anything else is
  written. A line that a crash tore is moved to NNNN.torn on the next start, and that is recorded.
* `seq` has no gaps: it is the line's number over all segments, and a number is used up only by a line that
  reached the disk. What was lost is said in a `lost` record.
* Whatever is written stays what it is, or it is seen: the lines are the leaves of a Merkle log with signed
  checkpoints (journal_tree.py). A log that contradicts its last checkpoint is set aside under broken-N/, and
  a new one, with a name of its own, begins by saying so.

Old segments may be moved away, never the last one: move NNNN.jsonl, lowest numbers first, and leave
NNNN.leaves and NNNN.frontier where they are; proofs of newer records need them.

`Writer` is the queue in front of it. `submit` never waits: the caller reads from sockets that must not
fill up. The queue is bounded; what does not fit is counted by cause and recorded as soon as it can be.
A disk that is full, or fails, is tried again for as long as the process lives.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import errno
import fcntl
import itertools
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from egressd.journal import notes, records, segments
from egressd.journal.notes import NoteError
from egressd.journal.records import Fields, RecordError
from egressd.model.errors import EgressdError
from egressd.processes.journal_keys import KeyProblem, Keys
from egressd.processes.journal_tree import FILE_MODE, Broken, SignedTree, write_all

__all__ = [
    "Clock", "Draft", "JournalBusy", "JournalFile", "Sheaf", "Unwritten", "Writer", "WriterState",
    "timestamp",
]  # fmt: skip

SEGMENT_BYTES = 64 << 20  # a segment that has reached this is followed by the next
_QUEUE_RECORDS, _QUEUE_BYTES = 65_536, 32 << 20
_BATCH_RECORDS = 4096
_GATHER = 0.02  # seconds to wait for company before an fsync
_RETRY = 1.0  # seconds between attempts while the disk fails
_SEAL_EVERY = 1.0  # seconds between checkpoints, if there is something new
_CHUNK = 1 << 16
_DIRECTORY_MODE = 0o750
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_OF_A_LOG = re.compile(
    r"[0-9]{4,12}(\.[0-9]+)?\.(jsonl|leaves|frontier|torn)|(checkpoints?|origin|verifiers)(\.new)?"
)
_BACKWARD, _FORWARD = 0.05, 60.0  # seconds that the clock may step unsaid


class JournalBusy(EgressdError):
    """Another process writes this journal."""


class Unwritten(EgressdError):
    """The journal ended before what was waited for was on disk and signed."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A record without its number. `process` and `event` are already checked names."""

    time: str
    process: str
    event: str
    fields: Fields

    @property
    def weight(self) -> int:
        """About how many bytes it takes while it waits."""
        return 256 + sum([64 + len(v) if type(v) is str else 64 for v in self.fields.values()])


@dataclass(frozen=True, slots=True)
class Sheaf:
    """Many records of one process and one moment whose fields are already spelled (records.spelled), each
    with what stands around them."""

    time: str
    process: str
    frames: list[bytes]
    spelled: bytes

    @property
    def weight(self) -> int:
        return 256 + 64 * len(self.frames) + len(self.spelled)

    def first(self, records: int, octets: int) -> Sheaf:
        """As many of them as weigh no more."""
        ends = itertools.accumulate(len(body) + 65 for body in self.spelled.split(b"\n")[:-1])
        count = min(records, bisect.bisect_right(list(ends), octets - 256))
        bodies = self.spelled.split(b"\n", count)[:count]
        return Sheaf(self.time, self.process, self.frames[:count], b"".join(body + b"\n" for body in bodies))


def timestamp(seconds: float | None = None) -> str:
    """RFC 3339 in UTC with microseconds; now, if `seconds` since 1970 is None or no time at all."""
    if seconds is None:
        return _now()
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return _now()
    return records.stamp(moment)


_second = (-1, "")  # since 1970, and how it is spelled: a flood has thousands of records in each


def _now() -> str:
    global _second  # noqa: PLW0603
    whole, rest = divmod(time.time_ns(), 1_000_000_000)
    known, text = _second
    if whole != known:
        text = datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        _second = whole, text  # one assignment: the journal's thread asks, too
    return f"{text}.{rest // 1000:06d}Z"


class Clock:
    """Has the time been set since the last look? CLOCK_BOOTTIME is slewed together with CLOCK_REALTIME and
    goes on in suspend, so their difference changes when somebody sets the time and never otherwise."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        running: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._wall, self._running = wall, running
        self._least, self._most = self._difference()

    def _difference(self) -> tuple[float, float]:
        """Between which bounds the difference lies: the two clocks cannot be read in one moment."""
        before = self._running()
        wall = self._wall()
        return wall - self._running(), wall - before

    def stepped(self) -> float | None:
        """Seconds that the clock went forward (more than 60) or backward."""
        least, most = self._difference()
        step = None
        if most < self._least - _BACKWARD:
            step = most - self._least
        elif least > self._most + _FORWARD:
            step = least - self._most
        self._least, self._most = least, most
        return step


class JournalFile:
    """The files. Not thread-safe: `Writer` uses it from one thread. OSError as the disk gives it.

    Without `keys` no checkpoint is signed. `host`: for the name of a log that begins; the machine's, if None.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keys: Keys | None = None,
        host: str | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        clock: Clock | None = None,
    ) -> None:
        self.directory = directory
        self._keys, self._host = keys, host
        self._segment_bytes = segment_bytes
        self.clock = clock or Clock()
        self.notes: list[Draft] = []  # what opening it found; to be recorded first
        directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._file = -1
        self.tree = SignedTree(self._lock, keys, host=host)
        try:
            self._take_lock()
            self._resume()
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalBusy(f"{self.directory} is being written by another process") from error

    def close(self) -> None:
        self.tree.close()
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    @property
    def seq(self) -> int:
        """The number of the next record."""
        return self.tree.size

    # ---- opening

    def _resume(self) -> None:
        try:
            self._take_up()
        except Broken as error:
            self._set_log_aside(error)
            self._take_up()
        if self.tree.created:
            self._note_earlier_logs()
        self.segments = len(segments.numbers(self._names()))
        self.octets = sum((self.directory / name).stat().st_size for name in self._segment_names())
        self._note("journal-opened", {"file": segments.name(self.segment), "next": self.seq})
        self._note_keys()
        self._note_clock()

    def _take_up(self) -> None:
        names = self._names()
        found = segments.numbers(names)
        known = segments.numbers(name.replace(".leaves", ".jsonl") for name in names)
        self.segment = found[-1] if found else 1
        if found:
            self._open_segment()
            self._cut_torn_line()
        elif known:  # the last segment was moved away, too: there is nothing to continue
            self.segment = known[-1]
        else:
            self._open_segment()
        self.tree.restore(self.segment)
        if self._file < 0:
            raise Broken(f"{segments.name(self.segment)} is not there", self.tree.latest)
        self._count_damage()

    def _names(self) -> list[str]:
        return [entry.name for entry in self.directory.iterdir()]

    def _segment_names(self) -> list[str]:
        return [name for name in self._names() if segments.number(name) is not None]

    def _note(self, event: str, fields: Mapping[str, Any]) -> None:
        self.notes.append(Draft(timestamp(), "auditor", event, records.bounded(fields)))

    def _open_segment(self) -> None:
        self._file = self._open(segments.name(self.segment), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._size = os.fstat(self._file).st_size
        os.fsync(self._lock)  # the directory: a new name must survive a crash as well as the data

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE, dir_fd=self._lock)

    def _cut_torn_line(self) -> None:
        whole = _end_of_last_line(self._file, self._size)
        if whole == self._size:
            return
        try:
            side: str | None = self._set_aside(whole)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            side = None  # half a line was never a record; that more can be written is worth more
        torn = self._size - whole
        os.ftruncate(self._file, whole)
        os.fsync(self._file)
        self._size = whole
        self._note("journal-torn", {"file": segments.name(self.segment), "bytes": torn, "moved_to": side})

    def _set_aside(self, start: int) -> str:
        """Copy what follows `start` to a file beside the segment, durably, before it is cut off."""
        for attempt in range(1, 10_000):
            name = f"{self.segment:04d}{'' if attempt == 1 else f'.{attempt}'}.torn"
            with contextlib.suppress(FileExistsError):
                side = self._open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                break
        else:
            raise FileExistsError(errno.EEXIST, "too many torn lines set aside", str(self.directory))
        try:
            while data := os.pread(self._file, _CHUNK, start):
                start += len(data)
                write_all(side, data)
            os.fsync(side)
        except OSError:
            os.unlink(name, dir_fd=self._lock)
            raise
        finally:
            os.close(side)
        return name

    # ---- what opening found

    def _count_damage(self) -> None:
        """Whole lines at the end that are no records, or not the ones of their number, stay where they are,
        so that what somebody damaged is neither repaired nor counted over. Under a checkpoint none can be."""
        signed = self.tree.latest.size if self.tree.latest else 0
        damaged = 0
        for index, line in _numbered_backwards(self._file, self.tree.size):
            if index < max(signed, self.tree.first):
                break
            damaged += not _is_record(line, index)
        if damaged:
            self._note("journal-damaged", {"lines": damaged})
        for name in self.tree.repaired:
            self._note("journal-damaged", {"file": name})

    def _set_log_aside(self, error: Broken) -> None:
        """All of the log into broken-N/, the checkpoint last: an interrupted move is seen again, and goes on.
        What else lies there stays: lost+found of a file system of its own cannot even be moved."""
        self.tree.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        side = self._new_side()
        late = ["checkpoints", "origin", "verifiers", "checkpoint"]
        names = [name for name in self._names() if _OF_A_LOG.fullmatch(name)]
        for name in sorted(names, key=lambda name: (name in late and late.index(name) + 1, name)):
            os.rename(name, f"{side}/{name}", src_dir_fd=self._lock, dst_dir_fd=self._lock)
        (self.directory / side / "why").write_text(error.why + "\n", "utf-8")
        os.fsync(self._lock)
        self.notes = []
        self.tree = SignedTree(self._lock, self._keys, host=self._host)

    def _new_side(self) -> str:
        number = 1 + max([int(name[7:]) for name in self._names() if _is_side(name)], default=0)
        side = f"broken-{number}"
        os.mkdir(side, _DIRECTORY_MODE, dir_fd=self._lock)
        return side

    def _note_earlier_logs(self) -> None:
        """The first record of a log that follows a broken one says so, whenever that was set aside."""
        sides = sorted((name for name in self._names() if _is_side(name)), key=lambda name: int(name[7:]))
        if not sides:
            return
        found = _broken_log(self.directory / sides[-1])
        self.notes.insert(0, Draft(timestamp(), "auditor", "journal-truncated", records.bounded(found)))

    def _note_keys(self) -> None:
        if self._keys is not None and self.tree.latest is None:
            key = self._keys.current.public
            named = {"key": key.verifier(self.tree.origin), "fingerprint": key.fingerprint}
            self._note("key-created", {**named, "origin": self.tree.origin})
        if self.tree.rotated is not None:
            old, new = self.tree.rotated
            self._note("key-rotated", {"old": old, "new": new})

    def _note_clock(self) -> None:
        """Since the last record, perhaps long ago: only that the time is earlier now can be known."""
        for index, line in _numbered_backwards(self._file, self.tree.size):
            if _is_record(line, index):
                last = records.decode(line).time
                if last > timestamp(time.time() + 1):
                    self._note("clock-stepped", {"since": last, "seconds": _between(last, timestamp())})
            return

    # ---- writing

    def append(self, drafts: Iterable[Draft | Sheaf]) -> int:
        """Number, write and sync; returns how many bytes. OSError: none of them is in the journal."""
        if self._size >= self._segment_bytes:
            self._rotate()
        lines = _lines(drafts, self.seq)
        data = b"".join(lines)
        try:
            if os.fstat(self._file).st_size != self._size:  # what an earlier attempt could not cut off
                os.ftruncate(self._file, self._size)
            write_all(self._file, data)
            os.fdatasync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)
        self.octets += len(data)
        self.tree.extend(lines)
        return len(data)

    def _rotate(self) -> None:
        """The next segment. What lies beside the old one is made complete first."""
        if self.tree.unsigned:
            self.tree.checkpoint()
        self.tree.close_segment(self.segment)
        previous, size = self._file, self._size
        self.segment += 1
        try:
            self._open_segment()
            self.tree.open_segment(self.segment)
        except OSError:
            if self._file != previous:
                os.close(self._file)
            self.segment -= 1
            self._file, self._size = previous, size
            raise
        self.segments += 1
        os.close(previous)


def _lines(drafts: Iterable[Draft | Sheaf], first: int) -> list[bytes]:
    lines: list[bytes] = []
    for draft in drafts:
        seq = first + len(lines)
        if isinstance(draft, Draft):
            lines.append(_spell(seq, draft))
        else:
            lines += records.finished(draft.frames, draft.spelled, seq=seq, time=draft.time)
    return lines


def _spell(seq: int, draft: Draft) -> bytes:
    """A draft that cannot be spelled uses up its number, or the log would wait for it for ever."""
    try:
        return records.spell(
            seq=seq, time=draft.time, process=draft.process, event=draft.event, fields=draft.fields
        )
    except RecordError as error:
        fields = records.bounded({"why": str(error), "event": draft.event, "from": draft.process})
        refused = Draft(timestamp(), "auditor", "record-refused", fields)
        return _spell(seq, refused)


def _is_record(line: bytes, index: int) -> bool:
    try:
        return records.decode(line).seq == index
    except RecordError:
        return False


def _is_side(name: str) -> bool:
    return name.startswith("broken-") and name[7:].isdecimal() and name.isascii()


def _between(earlier: str, later: str) -> float:
    form = "%Y-%m-%dT%H:%M:%S.%fZ"
    try:
        return (datetime.strptime(later, form) - datetime.strptime(earlier, form)).total_seconds()
    except ValueError:
        return 0.0


def _broken_log(side: Path) -> dict[str, Any]:
    """What a log that was set aside says of itself; nothing of it is believed."""
    found: dict[str, Any] = {"moved_to": side.name}
    with contextlib.suppress(OSError):
        found["why"] = (side / "why").read_text("utf-8", "replace").strip()
    for name in ("checkpoints", "checkpoint"):
        with contextlib.suppress(OSError, NoteError):
            text = (side / name).read_text("utf-8", "replace")
            for note in notes.split(text)[-1:] if name == "checkpoints" else [text]:
                told = notes.parse(notes.signatures(note)[0])
                root = base64.b64encode(told.root).decode("ascii")
                found |= {"origin": told.origin, "size": told.size, "root": root}
    return found


def _end_of_last_line(descriptor: int, size: int) -> int:
    """The offset after the last newline; 0 if there is none."""
    end = size
    while end > 0:
        start = max(0, end - _CHUNK)
        chunk = os.pread(descriptor, end - start, start)
        cut = segments.torn(chunk)
        if cut < len(chunk):
            return end - cut
        end = start
    return 0


def _numbered_backwards(descriptor: int, past: int) -> Iterator[tuple[int, bytes]]:
    """(index, line) from the last one back, `past` being the index after it."""
    for line in _lines_backwards(descriptor):
        past -= 1
        yield past, line


def _lines_backwards(descriptor: int) -> Iterable[bytes]:
    """The whole lines of a file, last one first, without their newlines."""
    end = _end_of_last_line(descriptor, os.fstat(descriptor).st_size)
    rest = b""  # the beginning of a line, up to and without its newline
    first = True
    while end > 0:
        start = max(0, end - _CHUNK)
        parts = (os.pread(descriptor, end - start, start) + rest).split(b"\n")
        if first:
            parts.pop()  # empty: the file ends in a newline
            first = False
        rest = parts[0]
        yield from reversed(parts[1:])
        end = start
    if not first:
        yield rest


@dataclass(frozen=True, slots=True)
class WriterState:
    """What messages.JournalState says, field for field."""

    records: int
    octets: int
    segments: int
    queued: int
    lag: float
    lost: dict[str, int] = field(default_factory=dict)
    failing: str = ""
    origin: str = ""
    key: str = ""
    checkpoint_size: int = 0
    checkpoint_time: float = 0.0


class Writer:
    """The queue and its thread. `say` gets a line for people whenever the state of the disk changes,
    `written` each draft that reached the disk, but nothing of a sheaf; both are called from the thread.
    `modest`: processes that have half of the queue, so that what they say without end crowds out nobody
    else."""

    def __init__(
        self,
        journal: JournalFile,
        *,
        say: Callable[[str], None],
        written: Callable[[Draft], None] = lambda draft: None,
        queue_records: int = _QUEUE_RECORDS,
        queue_bytes: int = _QUEUE_BYTES,
        modest: frozenset[str] = frozenset(),
        seal_every: float = _SEAL_EVERY,
    ) -> None:
        self._journal, self._say, self._written = journal, say, written
        self._max_records, self._max_bytes = queue_records, queue_bytes
        self._modest, self._seal_every = modest, seal_every
        self._changed = threading.Condition()
        self._queue: deque[tuple[Draft | Sheaf, int, float]] = deque()  # weight; when: monotonic seconds
        self._records = self._bytes = 0  # of the queue
        self._lost: Counter[tuple[str, str]] = Counter()
        self._lost_ever: Counter[str] = Counter()
        self._batch: list[Draft | Sheaf] = []  # taken from the queue, not yet on the disk
        self._batch_since = 0.0
        self._submitted = self._through = 0  # drafts taken in; those of them on disk
        self._awaited: list[
            tuple[int, Future[str]]
        ] = []  # (how many must be on disk and signed, whom to tell)
        self._rotations: list[Future[str]] = []
        self._rotated: list[Draft] = []  # to be written before anything else
        self._sealed_at = 0.0  # monotonic seconds
        self._ending = False
        self._failing: str | None = None
        self._given_up = 0  # lost to the queue since the disk began to fail
        with self._changed:
            for draft in journal.notes:
                self._put(draft, draft.weight)
        self._publish()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    # ---- from any thread

    def submit(self, draft: Draft) -> bool:
        """Queue one; False, and counted, if there is no room."""
        weight = draft.weight
        part = 2 if draft.process in self._modest else 1
        with self._changed:
            records_waiting, bytes_waiting = self._records, self._bytes + weight
            if part * records_waiting >= self._max_records or part * bytes_waiting > self._max_bytes:
                self._lose(draft.process, 1)
                return False
            self._put(draft, weight)
            return True

    def submit_sheaf(self, sheaf: Sheaf) -> int:
        """Queue as many as there is room for, the first ones, and count the others. How many were queued."""
        weight, count = sheaf.weight, len(sheaf.frames)
        part = 2 if sheaf.process in self._modest else 1
        with self._changed:
            room, bytes_room = (
                -(-self._max_records // part) - self._records,
                self._max_bytes // part - self._bytes,
            )
            if count > room or weight > bytes_room:
                sheaf = sheaf.first(max(0, room), bytes_room)
                weight = sheaf.weight
            taken = len(sheaf.frames)
            if taken:
                self._put(sheaf, weight, taken)
            if taken < count:
                self._lose(sheaf.process, count - taken)
            return taken

    def _lose(self, process: str, count: int) -> None:
        self._lost["queue", process] += count
        self._lost_ever["queue"] += count
        self._given_up += count

    def _put(self, draft: Draft | Sheaf, weight: int, count: int = 1) -> None:
        self._queue.append((draft, weight, time.monotonic()))
        before = self._records
        self._records += count
        self._bytes += weight
        self._submitted += count
        if before == 0 or before < _BATCH_RECORDS <= self._records:
            self._changed.notify()

    def lose(self, *, cause: str, process: str, count: int) -> None:
        """Something was lost before it came here. Recorded as `lost`, summed by cause and process."""
        with self._changed:
            self._lost[cause, process] += count
            self._lost_ever[cause] += count
            self._changed.notify()

    def barrier(self) -> Future[str]:
        """Done when everything submitted so far is on disk and under a signed checkpoint; the result is that
        checkpoint, a signed note (empty if the journal is not signed). Unwritten if the writer ends before;
        a disk that fails keeps it waiting. For asyncio: `asyncio.wrap_future`."""
        return self._await(rotate=False)

    def rotate(self) -> Future[str]:
        """Change the signing key. Done when both have signed; the result is that checkpoint. KeyProblem or
        OSError if it cannot be changed."""
        return self._await(rotate=True)

    def _await(self, *, rotate: bool) -> Future[str]:
        future: Future[str] = Future()
        with self._changed:
            if self._ending:
                future.set_exception(Unwritten("the journal is being closed"))
            elif rotate:
                self._rotations.append(future)
            else:
                self._awaited.append((self._submitted, future))
            self._changed.notify()
        return future

    def state(self) -> WriterState:
        with self._changed:
            oldest = self._batch_since if self._batch else self._queue[0][2] if self._queue else 0.0
            published = self._published
            return WriterState(
                **published,
                queued=self._records + _count(self._batch),
                lag=max(0.0, time.monotonic() - oldest) if oldest else 0.0,
                lost=dict(self._lost_ever),
                failing=self._failing or "",
            )

    def end(self, *, patience: float = 5.0) -> bool:
        """Write what is queued, one last time, sign, and stop. False if something could not be written."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(patience)
        self._give_up_waiting()
        if self._thread.is_alive():  # the disk hangs: the journal must not keep the process
            return False
        self._journal.close()
        return not (self._batch or self._queue or self._lost or self._failing)

    def _give_up_waiting(self) -> None:
        with self._changed:
            waiting = [*(future for _, future in self._awaited), *self._rotations]
            self._awaited, self._rotations = [], []
        for future in waiting:
            _fail(future, Unwritten("the journal was closed before it was written"))

    # ---- the thread

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # a defect of ours; that nothing is written any more must not go unseen
            with self._changed:
                self._ending, self._failing = True, f"{type(error).__name__}: {error}"
            self._say(f"the journal in {self._journal.directory} is not written any more: {self._failing}")
            self._give_up_waiting()
            raise

    def _serve(self) -> None:
        while True:
            self._wait()
            self._begin_rotations()
            self._fill_batch()
            done = self._write_batch() and self._seal()
            self._publish()
            if self._ending and (not done or not (self._batch or self._queue or self._lost)):
                if not done and (self._batch or self._queue):
                    count = _count(self._batch) + self._records
                    self._say(f"{count} records could not be written at the end")
                return

    def _wait(self) -> None:
        with self._changed:
            if self._failing is not None:
                self._changed.wait_for(lambda: self._ending, timeout=_RETRY)
                return
            self._changed.wait_for(self._has_work, timeout=self._until_seal())
            self._changed.wait_for(
                lambda: self._ending or self._records >= _BATCH_RECORDS, timeout=self._gather()
            )

    def _has_work(self) -> bool:
        waiting = self._awaited and not self._journal.tree.unsigned
        return bool(self._queue or self._lost or self._rotations or self._ending or waiting)

    def _gather(self) -> float:
        """Seconds: what came while the last batch was written has waited already."""
        if self._queue:
            return max(0.0, self._queue[0][2] + _GATHER - time.monotonic())
        return _GATHER if self._lost else 0.0

    def _until_seal(self) -> float | None:
        """Seconds until the next checkpoint is due; None if there is nothing to sign."""
        if not self._journal.tree.unsigned:
            return None
        return max(0.0, self._sealed_at + self._seal_every - time.monotonic())

    def _begin_rotations(self) -> None:
        """The record of a new key comes before everything else, so that what both keys sign contains it."""
        with self._changed:
            if self._batch:
                return
            rotations, self._rotations = self._rotations, []
        for future in rotations:
            try:
                old, new = self._journal.tree.rotate()
            except (OSError, KeyProblem) as error:
                _fail(future, error)
                continue
            self._rotated.append(Draft(timestamp(), "auditor", "key-rotated", {"old": old, "new": new}))
            with self._changed:
                self._awaited.append((self._through, future))  # and under the checkpoint of both

    def _fill_batch(self) -> None:
        with self._changed:
            if self._batch:
                return  # the last attempt failed: the same records again, in the same order
            self._batch, self._rotated = [*self._rotated], []
            now = timestamp()
            step = self._journal.clock.stepped()
            if step is not None:
                self._batch.append(Draft(now, "auditor", "clock-stepped", {"seconds": round(step, 3)}))
            for (cause, process), count in sorted(self._lost.items()):
                fields: Fields = {"cause": cause, "count": count, "from": process}
                self._batch.append(Draft(now, "auditor", "lost", fields))
            self._lost.clear()
            self._batch_since = self._queue[0][2] if self._queue else time.monotonic()
            count = len(self._batch)
            while self._queue and count < _BATCH_RECORDS:
                draft, weight, _ = self._queue.popleft()
                size = _size(draft)
                self._records, self._bytes = self._records - size, self._bytes - weight
                self._through += size
                count += size
                self._batch.append(draft)

    def _write_batch(self) -> bool:
        """True if there is nothing (more) to write."""
        if not self._batch:
            return True
        try:
            self._journal.append(self._batch)
        except OSError as error:
            self._report(error.strerror or str(error))
            return False
        self._report(None)
        for draft in self._batch:
            if isinstance(draft, Draft):
                self._written(draft)
        self._batch = []
        return True

    def _seal(self) -> bool:
        """Sign if something is new and it is time, and tell who waited. The batch is on disk."""
        tree = self._journal.tree
        if (
            tree.unsigned
            and (self._ending or self._until_seal() == 0.0)
            and not (self._ending and self._queue)
        ):
            try:
                tree.checkpoint()
            except OSError as error:
                self._report(error.strerror or str(error))
                return False
            self._report(None)
            self._sealed_at = time.monotonic()
        if not tree.unsigned:
            self._publish()  # first: who is told may ask how the journal is
            self._tell(self._through)
        return True

    def _tell(self, through: int) -> None:
        with self._changed:
            ready = [future for count, future in self._awaited if count <= through]
            self._awaited = [pair for pair in self._awaited if pair[0] > through]
        for future in ready:
            if future.set_running_or_notify_cancel():
                future.set_result(self._journal.tree.note)

    def _publish(self) -> None:
        """What `state` may tell without touching what only the thread may touch."""
        journal, tree = self._journal, self._journal.tree
        published = {
            "records": journal.seq,
            "octets": journal.octets,
            "segments": journal.segments,
            "origin": tree.origin,
            "key": tree.keys.current.public.verifier(tree.origin) if tree.keys else "",
            "checkpoint_size": tree.latest.size if tree.latest else 0,
            "checkpoint_time": tree.signed_at,
        }
        with self._changed:
            self._published: dict[str, Any] = published

    def _report(self, trouble: str | None) -> None:
        """Once per change, not once per attempt."""
        if trouble == self._failing:
            return
        if trouble is not None:
            self._say(f"the journal in {self._journal.directory} cannot be written: {trouble}; still trying")
        else:
            self._say(f"the journal is written again; {self._given_up} records did not fit while it was not")
        if self._failing is None or trouble is None:
            self._given_up = 0
        self._failing = trouble


def _size(draft: Draft | Sheaf) -> int:
    return 1 if isinstance(draft, Draft) else len(draft.frames)


def _count(batch: Iterable[Draft | Sheaf]) -> int:
    return sum(map(_size, batch))


def _fail(future: Future[str], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
