"""Files that decide something, opened without trust: policies, the catalogue, tables of prefixes.

A file is opened without following a link and without waiting (a FIFO would hold the reader for ever), looked
at while open, and read only if it is a regular file of bounded size that not everybody may write to. The
files of a directory are opened relative to its descriptor, so that renaming the directory meanwhile changes
nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["FLAGS", "Unreadable", "check", "contents", "open_directory", "replace"]

# O_NONBLOCK: opening a FIFO or a device does not wait (open(2)); it changes nothing for a regular file.
# O_NOCTTY: opening a terminal does not make it ours.
FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CHUNK: Final = 1 << 20
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_OPENING: Final = {
    errno.ELOOP: ("it is a symbolic link", "put the file itself here"),
    errno.ENXIO: ("it is a socket, not a regular file", "put the file itself here"),  # open(2) on AF_UNIX
    errno.ENOENT: ("there is no such file", ""),
    errno.EACCES: ("it may not be read", "make it readable for the user that runs this"),
}


class Unreadable(Exception):
    """Why a file is not read, and what to do about it."""

    def __init__(self, text: str, remedy: str = "") -> None:
        self.text, self.remedy = text, remedy
        super().__init__(text)


def contents(opening: Callable[[], int], *, limit: int, large: Callable[[int], Unreadable]) -> bytes:
    """All of the file that `opening` opens with `FLAGS`. `large` says that it has at least so many bytes,
    which are more than `limit`. `Unreadable` for whatever stands against it."""
    try:
        descriptor = opening()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _not_opened(error) from error
    try:
        found = os.fstat(descriptor)
        check(found)
        if found.st_size > limit:
            raise large(found.st_size)
        return _bounded(descriptor, limit, large)
    except OSError as error:
        raise _not_opened(error) from error
    finally:
        os.close(descriptor)


def _not_opened(error: OSError | ValueError) -> Unreadable:
    if isinstance(error, OSError) and error.errno in _OPENING:
        return Unreadable(*_OPENING[error.errno])
    return Unreadable(f"it cannot be read: {getattr(error, 'strerror', None) or error}")


def check(found: os.stat_result) -> None:
    """`Unreadable` unless it is a regular file to which not everybody may write."""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise Unreadable(f"it is {kind}, not a regular file", "put the file itself here")
    if found.st_mode & stat.S_IWOTH:
        raise Unreadable("everybody may write to it, so anybody could widen it", "chmod o-w")


def _bounded(descriptor: int, limit: int, large: Callable[[int], Unreadable]) -> bytes:
    """All of it. The size is checked again: what grows while it is read, or says 0 as /proc does, is held
    to the same bound."""
    chunks: list[bytes] = []
    size = 0
    while chunk := os.read(descriptor, min(_CHUNK, limit + 1 - size)):
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise large(size)
    return b"".join(chunks)


def open_directory(directory: Path) -> int:
    """Its descriptor. OSError if it cannot be opened, `Unreadable` if everybody may write to it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.fstat(descriptor).st_mode & stat.S_IWOTH:
        os.close(descriptor)
        raise Unreadable("everybody may write to the directory", "chmod o-w")
    return descriptor


def replace(path: Path, data: bytes) -> None:
    """All of the file anew, or what it was: whoever is killed meanwhile leaves the one before, and a `.new`.
    A machine that loses its power may lose both. OSError if it cannot be written."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_bytes(data)
    fresh.replace(path)
