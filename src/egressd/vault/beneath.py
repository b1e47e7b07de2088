"""Opening what lies beneath a directory, and nothing else.

A vault is written by others while it is read. Between a look at a path and its opening any part of it may
become a symbolic link, a mount, a FIFO. So nothing here looks first and opens then: openat2(2) resolves the
whole path in the kernel, under rules that hold at each step (linux/openat2.h):

- RESOLVE_BENEATH: never above the directory, whatever is renamed meanwhile;
- RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS: a link is refused, not followed. Who may write a link could
  otherwise have any file of this account's copied, and one of another source's read under this one's rules;
- RESOLVE_NO_XDEV: no mount is crossed. What is mounted inside a source was not meant when the source was
  named; with FUSE it is some user's program, which may answer each read differently, or never. A source's
  own directory may be a mount; a mount inside is named as a source of its own. (Btrfs subvolumes are no
  mounts, and stay readable.)

The path is opened with O_PATH first, which reads nothing and has no effect on what is found (open(2)). Only a
regular file is then opened for reading, by its descriptor, so that it is the one that was looked at: opening
a FIFO may wait for ever and wakes its writer, opening a device can do anything. O_NONBLOCK is for the one
regular file that makes an opener wait: one with a lease on it (fcntl(2), F_SETLEASE), up to 45 seconds.

There is no fallback for kernels without openat2: a walk in steps cannot promise the same.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from egressd.model.errors import Refused
from egressd.model.verdicts import Reason

__all__ = [
    "Bounds", "Contents", "Found", "Skipped", "Unopened", "Why", "check_path", "look", "open_beneath",
    "open_root", "read_digest", "reopened", "shown", "walk",
]  # fmt: skip

_OPENAT2 = 437  # asm-generic/unistd.h
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x01, 0x02, 0x04, 0x08
_RESOLVE = _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS | _NO_XDEV
HEAD = 64 * 1024  # bytes; front matter stands at a file's beginning
PIECE = 1 << 20  # bytes read at once
_LONGEST = 4095  # bytes of a path, PATH_MAX of linux/limits.h without its NUL
_HIGHEST = 255  # bytes of one name, NAME_MAX
_SHOWN = 200  # characters of a path in a message


class Why(enum.StrEnum):
    """Why something in a source is no document. For who administers the source."""

    SYMLINK = "a symbolic link"
    SPECIAL = "not a regular file"
    MOUNT = "on another mount than its source"
    UNREADABLE = "not to be read by this account"
    DEEP = "too deep"
    MANY = "one too many: it and what follows was not looked at"
    LONG = "its path is too long"
    GONE = "gone before it was looked at"
    CHANGED = "changed while it was read"
    BIG = "too big"
    LEASED = "held by another process (a lease)"
    FAILED = "an error of its file system"


class Unopened(Refused):
    """Something beneath a root that was not opened, and why."""

    def __init__(self, path: bytes, why: Why, detail: str = "") -> None:
        self.path, self.why = path, why
        more = f" ({detail})" if detail else ""
        super().__init__(Reason.FILES, f"{shown(path)} cannot be read: {why}{more}")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a walk and of a projection. What is beyond them is told, never cut off silently."""

    files: int = 100_000  # entries of all kinds in a walk; copies in a projection
    octets: int = 1 << 40  # of all copies together
    depth: int = 32  # names in a path
    path: int = 1024  # bytes of a path below its source


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file."""

    path: bytes  # below the root
    size: int  # bytes
    mtime_ns: int  # Unix time
    links: int  # more than one: the same file has other names, that may lie outside


@dataclass(frozen=True, slots=True)
class Skipped:
    path: bytes
    why: Why


class Contents(NamedTuple):
    """What a file held when it was read."""

    digest: str  # "sha256:" and 64 hex digits
    size: int  # bytes
    head: bytes  # the first 64 KiB


# ---- one path


class _OpenHow(ctypes.Structure):
    """struct open_how, linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _how(flags: int) -> _OpenHow:
    return _OpenHow(flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0, _RESOLVE)


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
# The kernel only reads them, so all calls share these two.
_LOOK = _how(os.O_PATH)
_LIST = _how(os.O_RDONLY | os.O_DIRECTORY)
_LOOK_AT, _LIST_AT = ctypes.addressof(_LOOK), ctypes.addressof(_LIST)
_HOW_SIZE = ctypes.sizeof(_OpenHow)
_TOO_OLD = "this kernel has no openat2(2), without which no path is safe: use Linux 5.6 or newer"

_WHY = {
    errno.ELOOP: Why.SYMLINK,
    errno.EXDEV: Why.MOUNT,
    errno.EACCES: Why.UNREADABLE,
    errno.EPERM: Why.UNREADABLE,
    errno.ENOENT: Why.GONE,
    errno.ENOTDIR: Why.GONE,
    errno.ENAMETOOLONG: Why.LONG,
    errno.EAGAIN: Why.LEASED,
}


def open_root(root: bytes | str) -> int:
    """A source's directory, as configured. It may itself be reached by links and mounts; the last name of it
    may not be a link, since who can change a link could move the whole source."""
    try:
        return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        place = shown(os.fsencode(root))
        raise Refused(
            Reason.FILES, f"the source's directory {place} cannot be opened: {error.strerror}"
        ) from error


def open_beneath(root: int, path: bytes) -> int:
    """The regular file at `path` below the directory `root`, to be read; `Unopened` for all else. ``Refused``
    where the kernel has no openat2(2)."""
    check_path(path)
    found, _ = look(root, path)
    try:
        return reopened(found, path)
    finally:
        os.close(found)


def reopened(found: int, path: bytes) -> int:
    """What `look` found, opened to be read. The magic link leads to that very file, whatever has its name by
    now."""
    try:
        return os.open(b"/proc/self/fd/%d" % found, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:  # never the file itself: one that is removed still opens so
        raise Refused(Reason.FILES, "files are opened by /proc/self/fd: mount a procfs on /proc") from error
    except OSError as error:
        raise _unopened(path, error) from error


def look(root: int, path: bytes) -> tuple[int, os.stat_result]:
    """A descriptor of the regular file (O_PATH: nothing can be read by it), and what it was."""
    found = _openat2(root, path, _LOOK_AT)
    status = os.fstat(found)
    if stat.S_ISREG(status.st_mode):
        return found, status
    os.close(found)
    # O_PATH with O_NOFOLLOW finds a link itself, if it is the path's last name
    raise Unopened(path, Why.SYMLINK if stat.S_ISLNK(status.st_mode) else Why.SPECIAL)


def check_path(path: bytes) -> None:
    """Names and slashes only. `..` would stay beneath the root, and still have one file go by many paths."""
    parts = path.split(b"/")
    if b"\0" in path or b"" in parts or b"." in parts or b".." in parts:
        raise Refused(Reason.FILES, f"{shown(path)} is not a path below a directory")
    if len(path) > _LONGEST or len(max(parts, key=len)) > _HIGHEST:
        raise Unopened(path, Why.LONG)


def shown(path: bytes) -> str:
    """`path` for a message or a record: ASCII, one line, all bytes but printable ones spelled %XX."""
    text = "".join(chr(b) if 0x20 < b < 0x7F and b != 0x25 else f"%{b:02X}" for b in path[:_SHOWN])
    return text if len(path) <= _SHOWN else f"{text}..."


def _openat2(root: int, path: bytes, how: int) -> int:
    found = int(_syscall(_OPENAT2, root, path, how, _HOW_SIZE))
    if found >= 0:
        return found
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        raise Refused(Reason.FILES, _TOO_OLD)
    raise _unopened(path, OSError(code, os.strerror(code)))


def _unopened(path: bytes, error: OSError) -> Unopened:
    code = error.errno or 0
    return Unopened(path, _WHY.get(code, Why.FAILED), error.strerror or "")


# ---- a file's contents


def read_digest(root: int, path: bytes, *, limit: int) -> Contents:
    """All of a file that has at most `limit` bytes. `Unopened` where it has more, or changed meanwhile."""
    number = open_beneath(root, path)
    try:
        before = os.fstat(number)
        if before.st_size > limit:
            raise Unopened(path, Why.BIG, f"{before.st_size} bytes of at most {limit}")
        return _read(number, path, before)
    except OSError as error:
        raise _unopened(path, error) from error
    finally:
        os.close(number)


def _read(number: int, path: bytes, before: os.stat_result) -> Contents:
    whole, size, head = hashlib.sha256(), 0, b""
    while size <= before.st_size:
        piece = os.read(number, min(PIECE, before.st_size + 1 - size))
        if not piece:
            break
        whole.update(piece)
        head = piece[:HEAD] if not size else head + piece[: HEAD - len(head)]
        size += len(piece)
    after = os.fstat(number)
    if size != before.st_size or _moments(before) != _moments(after):
        raise Unopened(path, Why.CHANGED)
    return Contents(f"sha256:{whole.hexdigest()}", size, head)


def _moments(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


# ---- all there is


_Seen: TypeAlias = Found | Skipped


def walk(root: int, *, bounds: Bounds | None = None) -> Iterator[_Seen]:
    """Every file below the directory `root`, and everything that is not one. Sorted within each directory,
    a directory's entries after its neighbours. Follows no link and crosses no mount; opens no file.

    Each directory is opened from the root anew: one that was moved elsewhere meanwhile is not found again.
    """
    limits = bounds or Bounds()
    waiting, left = [b""], limits.files
    while waiting:
        here = waiting.pop()
        try:
            names = _names(root, here, most=left + 1)
        except Unopened as error:
            yield Skipped(here, error.why)
            continue
        below: list[bytes] = []
        for name, is_directory in names[:left]:
            path = here + b"/" + name if here else name
            if is_directory and _fits(path, limits):
                below.append(path)
            else:
                yield Skipped(path, _too(path, limits)) if is_directory else _seen(root, path, limits)
        if len(names) > left:
            yield Skipped(here + b"/" + names[left][0] if here else names[left][0], Why.MANY)
            return
        left -= len(names)
        waiting += reversed(below)


def _names(root: int, path: bytes, *, most: int) -> list[tuple[bytes, bool]]:
    """Up to `most` entries of a directory, sorted, and whether each is a directory."""
    number = _openat2(root, path or b".", _LIST_AT)
    try:
        with os.scandir(number) as entries:
            found = [
                (os.fsencode(e.name), e.is_dir(follow_symlinks=False))
                for e in itertools.islice(entries, most)
            ]
    except OSError as error:
        raise _unopened(path, error) from error
    finally:
        os.close(number)
    return sorted(found)


def _fits(path: bytes, bounds: Bounds) -> bool:
    """Whether a directory may hold something that is neither too deep nor too long."""
    return path.count(b"/") + 1 < bounds.depth and len(path) < bounds.path


def _too(path: bytes, bounds: Bounds) -> Why:
    return Why.LONG if len(path) >= bounds.path else Why.DEEP


def _seen(root: int, path: bytes, bounds: Bounds) -> _Seen:
    if len(path) > bounds.path:
        return Skipped(path, Why.LONG)
    try:
        found, status = look(root, path)
    except Unopened as error:
        return Skipped(path, error.why)
    os.close(found)
    return Found(path, status.st_size, status.st_mtime_ns, status.st_nlink)
