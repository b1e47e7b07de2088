"""The journal on disk: whole lines, appended by one writer, and a thread that does the writing.

`JournalFile` owns the directory STATE_DIR/journal. What it promises:

* One writer. It holds flock(2) on the directory; a second one is refused, not queued.
* Only whole lines. A write that did not succeed to its last byte is cut off again before anything else is
  written. A line that a crash tore is moved to NNNN.torn on the next start, and that is recorded.
* `seq` has no gaps: a number is used up only by a line that reached the disk. What was lost is said in
  a `lost` record.

`Writer` is the queue in front of it. `submit` never waits: the caller reads from sockets that must not
fill up. The queue is bounded; what does not fit is counted by cause and recorded as soon as it can be.
A disk that is full, or fails, is tried again for as long as the process lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from egressd.journal import records, segments
from egressd.journal.records import Fields, Record, RecordError
from egressd.model.errors import EgressdError

__all__ = ["Draft", "JournalBusy", "JournalFile", "Writer", "timestamp"]

SEGMENT_BYTES = 64 << 20  # a segment that has reached this is followed by the next
_QUEUE_RECORDS, _QUEUE_BYTES = 65_536, 32 << 20
_BATCH_RECORDS = 2048
_GATHER = 0.02  # seconds to wait for company before an fsync
_RETRY = 1.0  # seconds between attempts while the disk fails
_CHUNK = 1 << 16
_DIRECTORY_MODE, _FILE_MODE = 0o750, 0o640


class JournalBusy(EgressdError):
    """Another process writes this journal."""


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
        return 256 + sum(64 + (len(v) if isinstance(v, str) else 0) for v in self.fields.values())


def timestamp(seconds: float | None = None) -> str:
    """RFC 3339 in UTC with microseconds; now, if `seconds` since 1970 is None or no time at all."""
    try:
        moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        moment = datetime.now(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


class JournalFile:
    """The files. Not thread-safe: `Writer` uses it from one thread. OSError as the disk gives it."""

    def __init__(self, directory: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.directory = directory
        self._segment_bytes = segment_bytes
        self.notes: list[Draft] = []  # what opening it found; to be recorded first
        directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._file = -1
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
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    # ---- opening

    def _resume(self) -> None:
        found = segments.numbers(entry.name for entry in self.directory.iterdir())
        self.segment = found[-1] if found else 1
        self._open_segment()
        if found:
            self._cut_torn_line()
        self.seq = self._next_seq(found)
        self._note("journal-opened", {"file": segments.name(self.segment), "next": self.seq})

    def _note(self, event: str, fields: Mapping[str, Any]) -> None:
        self.notes.append(Draft(timestamp(), "auditor", event, records.bounded(fields)))

    def _open_segment(self) -> None:
        self._file = self._open(segments.name(self.segment), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._size = os.fstat(self._file).st_size
        os.fsync(self._lock)  # the directory: a new name must survive a crash as well as the data

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE, dir_fd=self._lock)

    def _cut_torn_line(self) -> None:
        whole = _end_of_last_line(self._file, self._size)
        if whole == self._size:
            return
        side = self._set_aside(whole)
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
                _write_all(side, data)
            os.fsync(side)
        finally:
            os.close(side)
        return name

    def _next_seq(self, found: list[int]) -> int:
        """One more than the last record's. Whole lines that are no records stay where they are and use
        up a number each, so that what somebody damaged is neither repaired nor counted over."""
        damaged = 0
        for segment in reversed(found):
            descriptor = self._open(segments.name(segment), os.O_RDONLY)
            try:
                for line in _lines_backwards(descriptor):
                    try:
                        last = records.decode(line).seq
                    except RecordError:
                        damaged += 1
                        continue
                    self._note_damage(damaged)
                    return last + 1 + damaged
            finally:
                os.close(descriptor)
        self._note_damage(damaged)
        return damaged

    def _note_damage(self, lines: int) -> None:
        if lines:
            self._note("journal-damaged", {"lines": lines})

    # ---- writing

    def append(self, drafts: Iterable[Draft]) -> int:
        """Number, write and sync; returns how many bytes. OSError: none of them is in the journal."""
        if self._size >= self._segment_bytes:
            self._rotate()
        lines = [
            records.encode(Record(self.seq + i, draft.time, draft.process, draft.event, draft.fields))
            for i, draft in enumerate(drafts)
        ]
        data = b"".join(lines)
        try:
            if os.fstat(self._file).st_size != self._size:  # what an earlier attempt could not cut off
                os.ftruncate(self._file, self._size)
            _write_all(self._file, data)
            os.fdatasync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)
        self.seq += len(lines)
        return len(data)

    def _rotate(self) -> None:
        previous = self._file
        self.segment += 1
        try:
            self._open_segment()
        except OSError:
            self.segment -= 1
            self._file = previous
            raise
        os.close(previous)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


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


class Writer:
    """The queue and its thread. `say` gets a line for people whenever the state of the disk changes;
    `written` each draft that reached the disk; both are called from the thread."""

    def __init__(
        self,
        journal: JournalFile,
        *,
        say: Callable[[str], None],
        written: Callable[[Draft], None] = lambda draft: None,
        queue_records: int = _QUEUE_RECORDS,
        queue_bytes: int = _QUEUE_BYTES,
    ) -> None:
        self._journal, self._say, self._written = journal, say, written
        self._max_records, self._max_bytes = queue_records, queue_bytes
        self._changed = threading.Condition()
        self._queue: deque[Draft] = deque(journal.notes)
        self._bytes = sum(draft.weight for draft in self._queue)
        self._lost: Counter[tuple[str, str]] = Counter()
        self._batch: list[Draft] = []  # taken from the queue, not yet on the disk
        self._ending = False
        self._failing: str | None = None
        self._given_up = 0  # lost to the queue since the disk began to fail
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def submit(self, draft: Draft) -> bool:
        """Queue one; False, and counted, if there is no room."""
        with self._changed:
            weight = draft.weight
            if len(self._queue) >= self._max_records or self._bytes + weight > self._max_bytes:
                self._lost["queue", draft.process] += 1
                self._given_up += 1
                return False
            self._queue.append(draft)
            self._bytes += weight
            if len(self._queue) == 1:
                self._changed.notify()
            return True

    def lose(self, *, cause: str, process: str, count: int) -> None:
        """Something was lost before it came here. Recorded as `lost`, summed by cause and process."""
        with self._changed:
            self._lost[cause, process] += count
            self._changed.notify()

    def end(self, *, patience: float = 5.0) -> bool:
        """Write what is queued, one last time, and stop. False if something could not be written."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(patience)
        if self._thread.is_alive():  # the disk hangs: the journal must not keep the process
            return False
        self._journal.close()
        return not (self._batch or self._queue or self._lost)

    def _run(self) -> None:
        while True:
            self._wait()
            self._fill_batch()
            if not self._batch:
                return  # nothing left, so we are ending
            if not self._write_batch() and self._ending:
                self._say(f"{len(self._batch) + len(self._queue)} records could not be written at the end")
                return

    def _wait(self) -> None:
        with self._changed:
            if self._failing is not None:
                self._changed.wait_for(lambda: self._ending, timeout=_RETRY)
                return
            self._changed.wait_for(lambda: self._queue or self._lost or self._ending)
            self._changed.wait_for(lambda: self._ending, timeout=_GATHER)

    def _fill_batch(self) -> None:
        with self._changed:
            if self._batch:
                return  # the last attempt failed: the same records again, in the same order
            now = timestamp()
            for (cause, process), count in sorted(self._lost.items()):
                fields: Fields = {"cause": cause, "count": count, "from": process}
                self._batch.append(Draft(now, "auditor", "lost", fields))
            self._lost.clear()
            while self._queue and len(self._batch) < _BATCH_RECORDS:
                draft = self._queue.popleft()
                self._bytes -= draft.weight
                self._batch.append(draft)

    def _write_batch(self) -> bool:
        try:
            self._journal.append(self._batch)
        except OSError as error:
            self._report(error.strerror or str(error))
            return False
        self._report(None)
        for draft in self._batch:
            self._written(draft)
        self._batch = []
        return True

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
