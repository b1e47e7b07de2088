"""The Merkle log beside the records: leaf hashes, frontier, checkpoints. What promises that nothing written
down is changed or taken away later without being seen.

`SignedTree` belongs to one `JournalFile` and is as little thread-safe. The lines are the truth: leaf hashes
and frontiers are made again from them wherever they are missing, short or wrong. What cannot be made again is
a checkpoint; so a log whose lines contradict its last checkpoint is not continued (`Broken`).

Order of writing: records and fdatasync, leaf hashes, then at most once a second `checkpoints` (appended,
synced) and `checkpoint` (replaced). So a checkpoint never says more than what survives a crash.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence

from egressd.journal import merkle, notes, segments
from egressd.journal.keys import PrivateKey
from egressd.journal.merkle import Frontier, MerkleError
from egressd.journal.notes import Checkpoint, NoteError, Verifier
from egressd.processes.journal_keys import Keys

__all__ = ["FILE_MODE", "Broken", "SignedTree", "new_origin", "write_all"]

FILE_MODE = 0o640
_LEAF = 32
_CHUNK = 1 << 20
_TAIL = 1 << 17  # bytes: more than the longest note we write
_ORIGIN = re.compile(r"[a-z0-9.-]{1,64}/egressd/[0-9a-f]{8}")


class Broken(Exception):
    """The log cannot go on where its last checkpoint says it was."""

    def __init__(self, why: str, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(why)
        self.why, self.checkpoint = why, checkpoint


def new_origin(host: str | None = None) -> str:
    """`<host name, cleaned>/egressd/<8 hex>`: two logs of one machine, or of two with one name, differ."""
    name = re.sub(r"[^a-z0-9.-]+", "-", (socket.gethostname() if host is None else host).lower()).strip("-.")
    return f"{name[:64] or 'machine'}/egressd/{os.urandom(4).hex()}"


class SignedTree:
    """`directory`: descriptor of the journal's directory. Without `keys` nothing is signed."""

    def __init__(self, directory: int, keys: Keys | None, *, host: str | None = None) -> None:
        self._directory, self.keys, self._host = directory, keys, host
        self.frontier = Frontier()
        self.first = 0  # index of the current segment's first line
        self.origin = ""
        self.verifiers: list[Verifier] = []
        self.latest: Checkpoint | None = None
        self.rotated: tuple[str, str] | None = None  # verifier keys, old and new, of a change to be recorded
        self.created = False  # the log begins here
        self.repaired: list[str] = []  # files that were not as they should be
        self.note = ""  # the latest checkpoint as it was signed
        self.signed_at = 0.0  # Unix time of it
        self._pending = b""  # leaf hashes that are not in their file yet
        self._number = 1  # the current segment
        self._leaves = -1
        self._leaves_size = 0

    def close(self) -> None:
        if self._leaves >= 0:
            os.close(self._leaves)
            self._leaves = -1

    @property
    def size(self) -> int:
        return self.frontier.size

    @property
    def unsigned(self) -> bool:
        """Is there something that no checkpoint covers, or a change of keys to be signed?"""
        if self.keys is None:
            return False
        return self.latest is None or self.size > self.latest.size or bool(self.keys.previous)

    # ---- opening

    def restore(self, last: int) -> None:
        """Take up the log whose segments end with `last`, their lines whole. Broken; OSError."""
        self._sweep()
        self.origin = self._read_origin()
        self.verifiers = list(self._read_verifiers())
        self.latest, note, listed = self._last_checkpoint()
        if not (self._rebuild(last, trusting=True) or self._rebuild(last, trusting=False)):
            assert self.latest is not None
            raise Broken(self._why_broken(self.latest.size), self.latest)
        self._begin_log()
        if self.latest is not None:
            self.note, self.signed_at = note, self._age("checkpoint")
            with contextlib.suppress(OSError):  # a full disk: the next checkpoint is written to both
                self._mend_checkpoints(note, listed=listed)
        self._settle_keys(note)

    def _why_broken(self, expected: int) -> str:
        if self.size < expected:
            return f"the last checkpoint says {expected} records, {self.size} are there"
        return f"the records are not those of the last checkpoint, which has {expected}"

    def _sweep(self) -> None:
        """What an interrupted replacement of a file left behind."""
        for name in ("checkpoint.new", "origin.new", "verifiers.new"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._directory)

    def _read_origin(self) -> str:
        text = self._read("origin").decode("utf-8", "replace").strip()
        if text and not _ORIGIN.fullmatch(text):
            raise Broken("the file origin does not hold a log's name")
        return text

    def _read_verifiers(self) -> Iterator[Verifier]:
        for line in self._read("verifiers").decode("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                yield Verifier.parse(line)

    def _last_checkpoint(self) -> tuple[Checkpoint | None, str, bool]:
        """The latest good one, its note, and whether `checkpoints` ends with it. Both files are looked at:
        one may be a step ahead when the machine stops in between."""
        single, listed = self._read("checkpoint").decode("utf-8", "surrogateescape"), self._listed()
        best: Checkpoint | None = None
        note, why = "", ""
        for candidate in (listed, single):
            if not candidate:
                continue
            try:
                found = self._opened(candidate)
            except NoteError as error:
                why = str(error)
                continue
            if best is None or found.size > best.size:
                best, note = found, candidate
        if best is None and why:
            raise Broken(f"the last checkpoint cannot be believed: {why}")
        if why:
            self.repaired.append("checkpoint")
        return best, note, bool(note) and note == listed

    def _opened(self, note: str) -> Checkpoint:
        """A checkpoint of ours, signed by a key we hold (without keys: by one that the journal lists)."""
        checkpoint = notes.parse(notes.signatures(note)[0])
        if self.origin and checkpoint.origin != self.origin:
            raise NoteError(f"it is of another log, {checkpoint.origin}")
        if not _ORIGIN.fullmatch(checkpoint.origin):
            raise NoteError("its origin is no name that we give")
        known = self.verifiers
        if self.keys is not None:
            known = [Verifier(checkpoint.origin, key.public) for key in self.keys.all]
        self.origin = self.origin or checkpoint.origin
        return notes.open(note, known)

    def _listed(self) -> str:
        """The last note in `checkpoints`; what is not whole at its end is cut off."""
        if not self._age("checkpoints"):
            return ""
        with self._opened_file("checkpoints", os.O_RDWR) as descriptor:
            size = os.fstat(descriptor).st_size
            tail = os.pread(descriptor, _TAIL, max(0, size - _TAIL))
            listed = notes.split(tail.decode("utf-8", "surrogateescape"))
            last = listed[-1].encode("utf-8", "surrogateescape") + b"\n" if listed else b""
            end = tail.rfind(last) + len(last) if last else 0
            if end != len(tail) and (last or size <= _TAIL):
                os.ftruncate(descriptor, size - len(tail) + end)
                os.fsync(descriptor)
            return listed[-1] if listed else ""

    # ---- making the tree again

    def _rebuild(self, last: int, *, trusting: bool) -> bool:
        """The frontier at the end of segment `last`; False if the lines are not those of the checkpoint.

        Trusting stored frontiers, only what follows the last one before the checkpoint is read: the root that
        grows from it must then agree with the checkpoint's."""
        limit = None if self.latest is None else self.latest.size
        start, frontier = self._stored(last, limit) if trusting else (0, Frontier())
        self._mend_lengths(start)
        agreed = limit is None or (frontier.size == limit and self._agrees(frontier))
        for number in range(start + 1, last + 1):
            first = frontier.size
            found = self._leaves_of(number)
            if not agreed and limit is not None and first + len(found) >= limit:
                frontier.extend(found[: limit - first])
                if not self._agrees(frontier):
                    self.frontier = frontier
                    return False
                agreed = True
                frontier.extend(found[limit - first :])
            else:
                frontier.extend(found)
            self._mend_segment(number, first, found, frontier, closed=number < last)
        self.frontier = frontier
        return agreed

    def _agrees(self, frontier: Frontier) -> bool:
        return self.latest is not None and frontier.root() == self.latest.root

    def _stored(self, last: int, limit: int | None) -> tuple[int, Frontier]:
        """The last closed segment whose frontier can be used; (0, empty) if there is none."""
        if limit is None:
            return 0, Frontier()  # nothing signed: everything from the lines
        for number in range(last - 1, 0, -1):
            with contextlib.suppress(MerkleError):
                frontier = Frontier.load(self._read(segments.frontier(number)))
                if frontier.size <= limit:
                    return number, frontier
        return 0, Frontier()

    def _leaves_of(self, number: int) -> list[bytes]:
        """From the lines; where those were moved away, from the sidecar. Broken if there is neither."""
        try:
            return self._hashed(number)
        except FileNotFoundError:
            data = self._read(segments.leaves(number))
            if not data or len(data) % _LEAF:
                why = f"neither {segments.name(number)} nor its leaves are there"
                raise Broken(why, self.latest) from None
            return [data[at : at + _LEAF] for at in range(0, len(data), _LEAF)]

    def _hashed(self, number: int) -> list[bytes]:
        with self._opened_file(segments.name(number), os.O_RDONLY) as descriptor:
            return [merkle.leaf_hash(line) for line in _lines(descriptor)]

    def _mend_segment(
        self, number: int, first: int, found: Sequence[bytes], frontier: Frontier, *, closed: bool
    ) -> None:
        """Caches need not be written now: on a full disk the journal is opened all the same."""
        data = b"".join(found)
        if not closed:
            self.first = first
            self._begin_leaves(number, data)
            return
        with contextlib.suppress(OSError):
            if self._read(segments.leaves(number)) != data:
                self._write_whole(segments.leaves(number), data)
            if self._read(segments.frontier(number)) != frontier.dump():
                self._write_whole(segments.frontier(number), frontier.dump())

    def _mend_lengths(self, last: int) -> None:
        """Sidecars of the segments that are not read: whether they are as long as they must be. What is wrong
        in one of the right length is found by `egressctl verify --journal`, or by a proof that fails."""
        before = 0
        for number in range(1, last + 1):
            with contextlib.suppress(OSError, MerkleError):
                size = Frontier.load(self._read(segments.frontier(number))).size
                if self._length(segments.leaves(number)) != (size - before) * _LEAF:
                    self._write_whole(segments.leaves(number), b"".join(self._hashed(number)))
                before = size

    def _begin_leaves(self, number: int, data: bytes) -> None:
        """The current segment's sidecar, which must become `data`."""
        self.close()
        self._number = number
        there = self._read(segments.leaves(number))
        same = len(there) if data.startswith(there) else 0
        self._leaves_size, self._pending = same, data[same:]
        with contextlib.suppress(OSError):
            self._write_leaves()

    # ---- names and keys

    def _begin_log(self) -> None:
        self.created = self.latest is None and self.size == 0
        if not self.origin:
            self.origin = new_origin(self._host)
        if self._read("origin").decode("utf-8", "replace").strip() != self.origin:
            self._replace("origin", (self.origin + "\n").encode())

    def _settle_keys(self, note: str) -> None:
        """Whether a change of keys is to be recorded, is under way, or is over."""
        if self.keys is None:
            return
        if self.latest is None:
            self._settle_first()
        else:
            signers = {verifier.key for verifier in notes.signers(note, map(self._verifier, self.keys.all))}
            if self.keys.current.public in signers:
                self.keys.settle()
            else:
                self.keys.previous = [key for key in self.keys.previous if key.public in signers]
                self._note_rotation()
        self._list_keys()

    def _settle_first(self) -> None:
        """A new log has the current key alone. A key beside a credential is left: it may belong to a log
        that was moved away."""
        assert self.keys is not None
        if self.keys.credential:
            self.keys.previous = []
        else:
            self.keys.settle()

    def _note_rotation(self) -> None:
        assert self.keys is not None
        old, new = self.keys.previous[0].public, self.keys.current.public
        self.rotated = old.verifier(self.origin), new.verifier(self.origin)

    def rotate(self) -> tuple[str, str]:
        """Change the key; (old, new) as verifier keys, for the record. Both sign the next checkpoint."""
        if self.keys is None:
            raise OSError("this journal is not signed")
        old, new = self.keys.rotate()
        self._list_keys()
        return old.public.verifier(self.origin), new.public.verifier(self.origin)

    def _list_keys(self) -> None:
        assert self.keys is not None
        for key in reversed(self.keys.all):
            if self._verifier(key) not in self.verifiers:
                self.verifiers.append(self._verifier(key))
        data = "".join(f"{verifier}\n" for verifier in self.verifiers).encode()
        if self._read("verifiers") != data:
            self._replace("verifiers", data)

    def _verifier(self, key: PrivateKey) -> Verifier:
        return Verifier(self.origin, key.public)

    # ---- growing

    def extend(self, lines: Iterable[bytes]) -> None:
        """These lines (with their newlines) are on disk. Never fails: leaf hashes that cannot be written now
        are written before the next checkpoint."""
        found = merkle.leaf_hashes([line[:-1] for line in lines])
        self.frontier.extend(found)
        self._pending += b"".join(found)
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._write_leaves()

    def _write_leaves(self) -> None:
        if self._leaves < 0:
            name = segments.leaves(self._number)
            self._leaves = self._open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        _append(self._leaves, self._pending, self._leaves_size)
        self._leaves_size += len(self._pending)
        self._pending = b""

    def close_segment(self, number: int) -> None:
        """What lies beside segment `number` is complete and durable."""
        self._write_leaves()
        os.fsync(self._leaves)
        self._write_whole(segments.frontier(number), self.frontier.dump())

    def open_segment(self, number: int) -> None:
        self.first = self.size
        self._begin_leaves(number, b"")

    def checkpoint(self) -> str:
        """Sign what is there and make it known. OSError: it is not, and may be tried again."""
        assert self.keys is not None
        self.flush()
        checkpoint = Checkpoint(self.origin, self.size, self.frontier.root())
        note = notes.sign(checkpoint, self.origin, [*reversed(self.keys.previous), self.keys.current])
        self._list(note)
        self._replace("checkpoint", note.encode())
        self.latest, self.note, self.signed_at = checkpoint, note, time.time()
        if self.keys.previous:
            self.keys.settle()
        return note

    def _list(self, note: str) -> None:
        with self._opened_file("checkpoints", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
            _append(descriptor, note.encode() + b"\n", os.fstat(descriptor).st_size)
            os.fdatasync(descriptor)

    def _mend_checkpoints(self, note: str, *, listed: bool) -> None:
        """Both files end with the latest one."""
        if not listed:
            self._list(note)
        if self._read("checkpoint") != note.encode():
            self._replace("checkpoint", note.encode())

    # ---- files

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE, dir_fd=self._directory)

    @contextlib.contextmanager
    def _opened_file(self, name: str, flags: int) -> Iterator[int]:
        descriptor = self._open(name, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _age(self, name: str) -> float:
        with contextlib.suppress(OSError):
            return os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_mtime
        return 0.0

    def _length(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_size
        return 0

    def _read(self, name: str) -> bytes:
        """The content; nothing if the file is not there."""
        try:
            descriptor = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            return b""
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    def _write_whole(self, name: str, data: bytes) -> None:
        """A cache: need not survive a crash, but a torn one is seen by its length."""
        with self._opened_file(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            write_all(descriptor, data)

    def _replace(self, name: str, data: bytes) -> None:
        """The old content or the new one, whenever the machine stops."""
        with self._opened_file(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            write_all(descriptor, data)
            os.fsync(descriptor)
        os.rename(f"{name}.new", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.fsync(self._directory)


def _append(descriptor: int, data: bytes, size: int) -> None:
    """Write at `size`; what an attempt left half is cut off, now or by the next one."""
    if os.fstat(descriptor).st_size != size:
        os.ftruncate(descriptor, size)
    try:
        write_all(descriptor, data)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _lines(descriptor: int) -> Iterator[bytes]:
    """The whole lines of a file, without their newlines."""
    with os.fdopen(os.dup(descriptor), "rb", _CHUNK) as file:
        file.seek(0)
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1]
