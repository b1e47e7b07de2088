"""What accounts without rights have left in directories of their own, taken away by root.

Whoever has such an account can put anything there: links, directories in place of files, a thousand of them
in one another. Root follows no link, waits for no FIFO, and walks down no tree that may have no end. The
units give it no right to pass by permissions (CAP_DAC_OVERRIDE), but one to change owners: so it makes a
directory its own first, which also shuts out who may still be there.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["BOOKS", "COUNTED", "NAMES", "NUMBERS", "OF_A_GATEWAY", "clear", "taken_back"]

# What a controller remembers of a gateway (remembered.py, remembered_names.py), and what goes when its tables
# begin anew. Named here so that root need not import how it is read.
BOOKS, NUMBERS, COUNTED, NAMES = "books.json", "numbers.json", "counted.json", "names.jsonl"
OF_A_GATEWAY = (BOOKS, NUMBERS, COUNTED, NAMES)


@contextmanager
def taken_back(name: str | os.PathLike[str], *, below: int | None = None) -> Iterator[int]:
    """A descriptor of the directory, which is root's alone from now on. OSError if it is none, or not there.
    `below`: the directory that it is in; that must be root's already, or it could be exchanged meanwhile."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=below, follow_symlinks=False).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(name))
    os.chown(name, os.geteuid(), os.getegid(), dir_fd=below, follow_symlinks=False)
    os.chmod(name, 0o700, dir_fd=below)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=below)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def clear(name: str, *, below: int) -> None:
    """Remove it from a directory that is root's, whatever it is; nothing if it is not there. Directories that
    are in it are lifted out before they are looked into, so that none is deeper than one."""
    waiting = [name]
    while waiting:
        each = waiting.pop()
        with suppress(FileNotFoundError):
            if not _unlinked(each, below):
                with taken_back(each, below=below) as inner:
                    waiting += [_lifted(one, inner, below) for one in _directories(inner)]
                os.rmdir(each, dir_fd=below)


def _directories(place: int) -> list[str]:
    """Those in it; everything else in it is removed."""
    return [name for name in os.listdir(place) if not _unlinked(name, place)]


def _unlinked(name: str, place: int) -> bool:
    """False: it is a directory."""
    try:
        os.unlink(name, dir_fd=place)
    except IsADirectoryError:
        return False
    return True


def _lifted(name: str, place: int, above: int) -> str:
    """Its new name there. rename(2) writes into a directory that gets another parent."""
    with taken_back(name, below=place):
        fresh = f"gone-{secrets.token_hex(8)}"
        os.rename(name, fresh, src_dir_fd=place, dst_dir_fd=above)
    return fresh
