"""Copying exactly what one request may see into a directory of its own.

What a copy is: at SOURCE/PATH, regular, with the content that was ingested and nothing else of the file's: no
owner, no times, no links, mode 0444; directories are 0555 with the epoch for their times, since a directory's
own would tell when something was last added beside what is shown. MANIFEST.json names what is there.

The content is settled by its digest, and the digest is always taken of what was written: of the very buffer
that goes to the copy, or read back from the copy where the kernel made it. So it does not matter what a file
becomes while it is copied; either the copy is what was ingested, or the whole projection is refused. It also
does not matter by how many names a file is known, or where its other names lie: a hard link is copied like
any file, and shows what was ingested and judged at that path.

Where the file system can share blocks (FICLONE) that is done; failing that, big files are copied within the
kernel (copy_file_range); smaller ones have to be read for their digest anyway, and are written from there.

A refused projection leaves what it had copied. The directory is a request's scratch, and is destroyed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Protocol

from egressd.access.identifiers import path_of, source_of
from egressd.model.errors import Refused, Unfit
from egressd.model.verdicts import Reason
from egressd.vault import manifest
from egressd.vault.beneath import PIECE, Bounds, Unopened, check_path, look, open_root, reopened

__all__ = ["MANIFEST", "Copy", "Manifest", "Room", "project", "room"]

MANIFEST = "MANIFEST.json"  # no source can have this name: theirs are lower-case
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_EPOCH = (0, 0)
_PAGE = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LINE = 200  # characters of one file in the manifest, but for its path


class Copy(Protocol):
    """A document as it was ingested."""

    @property
    def id(self) -> str: ...
    @property
    def root(self) -> bytes: ...  # the source's directory, as configured
    @property
    def path(self) -> bytes: ...  # below it
    @property
    def size(self) -> int: ...  # bytes
    @property
    def digest(self) -> str: ...  # "sha256:" and 64 hex digits


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was projected."""

    digest: str  # sha256:... of MANIFEST.json
    files: int
    octets: int  # of the copies; the manifest not counted


class Room(NamedTuple):
    """What a projection takes on a tmpfs."""

    octets: int
    inodes: int


class _Placed(NamedTuple):
    directory: bytes  # SOURCE, or SOURCE/DIRECTORIES
    name: bytes
    copy: Copy


def project(copies: Collection[Copy], into: int | str | bytes, *, bounds: Bounds | None = None) -> Manifest:
    """Copy all of them below the empty directory `into` (a path, or a descriptor for reading). `Refused` if
    one of them is not what was ingested, or cannot be copied: then nothing of it is to be used.

    `Refused`'s text is for the record. It names the document, and an asker must not be told.
    """
    placed = _placed(copies, bounds or Bounds())
    with contextlib.ExitStack() as opened:
        target = _target(into, opened)
        try:
            _fill(target, placed, opened)
            described = _describe(target, placed)
            _settle(target, _directories(placed))
        except OSError as error:
            raise _failed(error) from error
    return described


def room(copies: Collection[Copy]) -> Room:
    """Bytes and inodes for a tmpfs that holds them: whole pages, the directories, the manifest."""
    directories: set[bytes] = set()
    octets = 0
    for copy in copies:
        octets += _pages(copy.size)
        directories.update(_ancestors(_directory(copy)))
    octets += _pages(sum(_LINE + 2 * len(copy.id) for copy in copies) + _LINE)
    return Room(octets, len(copies) + len(directories) + 2)


# ---- what goes where


def _placed(copies: Collection[Copy], bounds: Bounds) -> list[_Placed]:
    """In order of the places, so that neither order nor inode numbers tell of anything else."""
    if len(copies) > bounds.files:
        raise _refused(f"{len(copies)} documents are more than {bounds.files} at once")
    octets = sum(copy.size for copy in copies)
    if octets > bounds.octets:
        raise _refused(f"{len(copies)} documents have {octets} bytes, more than {bounds.octets} at once")
    placed = sorted((_place(copy, bounds) for copy in copies), key=lambda p: p[:2])
    for one, other in itertools.pairwise(placed):
        if one[:2] == other[:2]:
            raise _refused(f"{one.copy.id} is asked for twice")
    directories = _directories(placed)
    for directory, name, copy in placed:
        if directory + b"/" + name in directories:
            raise _refused(f"{copy.id} is at the place of a directory")
    return placed


def _place(copy: Copy, bounds: Bounds) -> _Placed:
    try:
        same = path_of(copy.id) == copy.path
        check_path(copy.path)
    except Unfit as error:
        raise _refused(str(error)) from error
    if not same:
        raise _refused(f"{copy.id} does not name the path that comes with it")
    if copy.path.count(b"/") >= bounds.depth or len(copy.path) > bounds.path:
        raise _refused(f"{copy.id} lies too deep, or its path is too long")
    if copy.size < 0:
        raise _refused(f"{copy.id} has no size")
    return _Placed(_directory(copy), copy.path.rpartition(b"/")[2], copy)


def _directory(copy: Copy) -> bytes:
    above = copy.path.rpartition(b"/")[0]
    source = source_of(copy.id).encode()
    return source + b"/" + above if above else source


def _ancestors(directory: bytes) -> Iterator[bytes]:
    """A directory and all above it."""
    while directory:
        yield directory
        directory = directory.rpartition(b"/")[0]


def _directories(placed: Iterable[_Placed]) -> list[bytes]:
    """All that are needed, those above first."""
    found: set[bytes] = set()
    for last in {one.directory for one in placed}:
        found.update(_ancestors(last))
    return sorted(found)


# ---- doing it


def _target(into: int | str | bytes, opened: contextlib.ExitStack) -> int:
    if isinstance(into, int):
        target = into
    else:
        target = os.open(into, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        opened.callback(os.close, target)
    if os.listdir(target):  # noqa: PTH208 - a descriptor
        raise _refused("the directory to project into is not empty")
    return target


def _fill(target: int, placed: Collection[_Placed], opened: contextlib.ExitStack) -> None:
    for directory in _directories(placed):
        os.mkdir(directory, 0o700, dir_fd=target)
    roots: dict[bytes, int] = {}
    copier, here, number = _Copier(), b"", -1
    with contextlib.ExitStack() as current:
        for directory, name, copy in placed:
            if directory != here:
                current.close()
                here, number = directory, _open_directory(target, directory)
                current.callback(os.close, number)
            if copy.root not in roots:
                roots[copy.root] = open_root(copy.root)
                opened.callback(os.close, roots[copy.root])
            copier.copy(copy, root=roots[copy.root], directory=number, name=name)


def _open_directory(target: int, path: bytes) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target)


class _Copier:
    """Remembers which file systems cannot share blocks with the scratch, and need not be asked again."""

    def __init__(self) -> None:
        self._apart: set[int] = set()  # devices

    def copy(self, copy: Copy, *, root: int, directory: int, name: bytes) -> None:
        source, device = _source(copy, root)
        try:
            made = os.open(name, _NEW, 0o400, dir_fd=directory)
            try:
                if self._copied(source, made, copy, device) != copy.digest:
                    _changed(copy)
                os.fchmod(made, 0o444)
                os.utime(made, ns=_EPOCH)
            finally:
                os.close(made)
        finally:
            os.close(source)

    def _copied(self, source: int, made: int, copy: Copy, device: int) -> str:
        """The digest of what was written, in the way that is best here."""
        if device not in self._apart and copy.size:
            if _cloned(source, made):
                return _digest_of(made, copy)
            self._apart.add(device)
        if copy.size <= PIECE:
            return _through(source, made, copy)
        if _ranged(source, made, copy):
            return _digest_of(made, copy)
        return _in_pieces(source, made, copy)


def _source(copy: Copy, root: int) -> tuple[int, int]:
    """The document, open for reading, and its device. Its size is looked at first: what has grown out of all
    bounds is never read."""
    try:
        found, status = look(root, copy.path)
        try:
            if status.st_size != copy.size:
                _changed(copy)
            return reopened(found, copy.path), status.st_dev
        finally:
            os.close(found)
    except Unopened as error:
        raise _refused(f"{copy.id} cannot be shown: {error.why}") from error


def _through(source: int, made: int, copy: Copy) -> str:
    """One buffer: hashed, and written."""
    data = os.read(source, copy.size + 1)
    while len(data) <= copy.size and (more := os.read(source, copy.size + 1 - len(data))):
        data += more
    if len(data) != copy.size:
        _changed(copy)
    _write(made, data)
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _in_pieces(source: int, made: int, copy: Copy) -> str:
    whole, size = hashlib.sha256(), 0
    while data := os.read(source, min(PIECE, copy.size + 1 - size)):
        size += len(data)
        if size > copy.size:
            break
        whole.update(data)
        _write(made, data)
    if size != copy.size:
        _changed(copy)
    return f"sha256:{whole.hexdigest()}"


def _write(made: int, data: bytes) -> None:
    written = os.write(made, data)
    while written < len(data):
        written += os.write(made, data[written:])


def _cloned(source: int, made: int) -> bool:
    """Both on one file system that can share blocks: btrfs, XFS, bcachefs."""
    try:
        fcntl.ioctl(made, _FICLONE, source)
    except OSError as error:
        if error.errno in _FULL:
            raise
        return False
    return True


def _ranged(source: int, made: int, copy: Copy) -> bool:
    """copy_file_range(2), one byte too many if there is one. False, and nothing is there, where it cannot."""
    done = 0
    try:
        while done <= copy.size and (more := os.copy_file_range(source, made, copy.size + 1 - done)):
            done += more
    except OSError as error:
        if error.errno in _FULL:
            raise
        os.lseek(source, 0, os.SEEK_SET)
        os.lseek(made, 0, os.SEEK_SET)
        os.ftruncate(made, 0)
        return False
    return True


def _digest_of(made: int, copy: Copy) -> str:
    """Of a copy that the kernel made, read back from it."""
    if os.fstat(made).st_size != copy.size:
        _changed(copy)
    whole, offset = hashlib.sha256(), 0
    while data := os.pread(made, PIECE, offset):
        whole.update(data)
        offset += len(data)
    return f"sha256:{whole.hexdigest()}"


# ---- what is said of it


def _describe(target: int, placed: Collection[_Placed]) -> Manifest:
    text = manifest.written([one.copy for one in placed])
    made = os.open(MANIFEST, _NEW, 0o400, dir_fd=target)
    try:
        _write(made, text)
        os.fchmod(made, 0o444)
        os.utime(made, ns=_EPOCH)
    finally:
        os.close(made)
    octets = sum(one.copy.size for one in placed)
    return Manifest(manifest.digest_of(text), len(placed), octets)


def _settle(target: int, directories: list[bytes]) -> None:
    """Modes and times of directories, when nothing is added to them any more."""
    for directory in reversed(directories):
        os.chmod(directory, 0o555, dir_fd=target)  # noqa: S103 - who may reach it decides the scratch
        os.utime(directory, ns=_EPOCH, dir_fd=target, follow_symlinks=False)
    os.fchmod(target, 0o555)
    os.utime(target, ns=_EPOCH)


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _changed(copy: Copy) -> NoReturn:
    raise _refused(f"{copy.id} is not what was ingested: ingest its source again")


def _failed(error: OSError) -> Refused:
    if error.errno in _FULL:
        return Refused(Reason.LIMIT, f"the scratch is full ({error.strerror}): give it more room")
    return _refused(f"the copies cannot be made: {error.strerror}")


def _refused(text: str) -> Refused:
    return Refused(Reason.FILES, text)
