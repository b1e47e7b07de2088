"""A policy file, replaced as one step: whenever it is read, and wherever the machine stops, it is the old
one or the new one.

One writer at a time holds the lock beside the file. What he read he replaces only if it is still what is
there: an editor knows nothing of the lock. The new file has its predecessor's owner, mode and extended
attributes (access lists among them), and is on the disk before it gets the name.

The same ways are refused as where policies are read (processes/plain_files.py), and a file with two names.
"""

# ruff: noqa: PTH208 - relative to the directory's descriptor, so that nobody can swap the way to it
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from egressd.model.errors import EgressdError
from egressd.policy.document import MAX_BYTES
from egressd.processes.plain_files import FLAGS, Unreadable, check, open_directory
from egressd.processes.workspaces import SUFFIX

__all__ = ["NotReplaced", "PolicyFile"]

_LOCK: Final = ".egressctl.lock"  # hidden names are passed over where policies are read
_LOCK_WITHIN: Final = 10.0  # seconds; another one's apply takes a part of one
_FRESH: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ACCESS: Final = "system.posix_acl_access"  # acl(5)


class NotReplaced(EgressdError):
    """Nothing was changed, and why."""


@dataclass(slots=True)
class PolicyFile:
    """`with PolicyFile(directory, "acme") as file: file.replace(new, instead_of=file.read())`.

    NotReplaced for every no, with the remedy.
    """

    directory: str
    workspace: str
    _directory: int = -1
    _lock: int = -1
    _seen: os.stat_result | None = None

    @property
    def name(self) -> str:
        return f"{self.workspace}{SUFFIX}"

    @property
    def path(self) -> str:
        return f"{self.directory.rstrip('/')}/{self.name}"

    def __enter__(self) -> PolicyFile:
        self._directory = _open_directory(self.directory)
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._lock, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._directory = -1

    def lock(self) -> None:
        """Wait until no other egressctl changes policies here. A lock file of its own: a directory may be
        opened, and so locked, by whoever may read it."""
        within = os.fstat(self._directory)
        try:
            self._lock = os.open(
                _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._directory
            )
            found = os.fstat(self._lock)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                # whoever may write here could have made it another name of any file, and it is given away now
                text = f"{self.directory}/{_LOCK} is no file of egressctl's"
                raise NotReplaced(f"{text}: look what it is, and remove it")
            if within.st_mode & stat.S_IWGRP:  # whoever may write here may lock
                with contextlib.suppress(OSError):
                    os.fchown(self._lock, -1, within.st_gid)
                    os.fchmod(self._lock, 0o660)
        except OSError as error:
            raise NotReplaced(f"{self.directory} cannot be written to: {_why(error)}") from error
        end = time.monotonic() + _LOCK_WITHIN
        while not _locked(self._lock):
            if time.monotonic() > end:
                text = f"another egressctl has been changing policies in {self.directory} for a while"
                raise NotReplaced(f"{text}; try again when it is done")
            time.sleep(0.02)

    def read(self) -> bytes:
        """What is there now; what `replace` will compare with."""
        data, self._seen = self._contents()
        return data

    def _contents(self) -> tuple[bytes, os.stat_result]:
        try:
            descriptor = os.open(self.name, FLAGS, dir_fd=self._directory)
        except OSError as error:
            raise NotReplaced(self._not_opened(error)) from error
        try:
            found = os.fstat(descriptor)
            self._check(found)
            data = b""
            while piece := os.read(descriptor, MAX_BYTES + 1 - len(data)):
                data += piece
        except OSError as error:
            raise NotReplaced(f"{self.path} cannot be read: {_why(error)}") from error
        finally:
            os.close(descriptor)
        if len(data) > MAX_BYTES:
            raise NotReplaced(f"{self.path} is larger than a policy may be")
        return data, found

    def _not_opened(self, error: OSError) -> str:
        if error.errno == errno.ELOOP:
            return f"{self.path} is a symbolic link, which egressd does not read: put the file itself there"
        if error.errno == errno.ENOENT:
            return f"there is no workspace {self.workspace}: no {self.name} in {self.directory}"
        return f"{self.path} cannot be read: {_why(error)}"

    def _check(self, found: os.stat_result) -> None:
        try:
            check(found)
        except Unreadable as error:
            raise NotReplaced(f"{self.path}: {error.text}: {error.remedy}") from error
        if found.st_nlink > 1:
            text = f"{self.path} has another name (a hard link), which would keep the old policy"
            raise NotReplaced(f"{text}: remove that one")

    # ---- writing

    def check_right(self) -> None:
        """May the caller write it? Asked before anything is done; a file is replaced by who may write into
        its directory, and that alone is not enough."""
        try:
            os.stat(self.name, dir_fd=self._directory, follow_symlinks=False)
        except OSError as error:
            raise NotReplaced(self._not_opened(error)) from error
        for name in (self.name, "."):
            if not os.access(name, os.W_OK, dir_fd=self._directory, effective_ids=True):
                text = f"you may not write to {self.path if name != '.' else self.directory}"
                raise NotReplaced(f"{text}: use sudo")

    def replace(self, data: bytes, *, instead_of: bytes) -> None:
        """From here on the file is `data`, if it still is `instead_of`."""
        assert self._lock >= 0, "the lock is not held"
        try:
            self._remove_leavings()
            fresh = f"{self._prefix}{secrets.token_hex(8)}"
            try:
                self._write(fresh, data, like=self._unchanged(instead_of))
                self._unchanged(instead_of)
                os.rename(fresh, self.name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(fresh, dir_fd=self._directory)
                raise
            os.fsync(self._directory)
        except OSError as error:
            raise NotReplaced(f"{self.path} cannot be written: {_why(error)}") from error
        _, self._seen = self._contents()

    @property
    def _prefix(self) -> str:
        return f".{self.name}.egressctl-"

    def _remove_leavings(self) -> None:
        """Of one that was killed: nobody else is here while we hold the lock."""
        for name in os.listdir(self._directory):
            if name.startswith(self._prefix):
                os.unlink(name, dir_fd=self._directory)

    def _unchanged(self, data: bytes) -> os.stat_result:
        there, found = self._contents()
        seen = self._seen
        same = seen is not None and (found.st_dev, found.st_ino) == (seen.st_dev, seen.st_ino)
        if there != data or not same:
            raise NotReplaced(f"{self.path} was changed by somebody else just now: look at it, and try again")
        return found

    def _write(self, name: str, data: bytes, *, like: os.stat_result) -> None:
        descriptor = os.open(name, _FRESH, 0o600, dir_fd=self._directory)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            self._resemble(descriptor, like)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _resemble(self, descriptor: int, like: os.stat_result) -> None:
        """Owner first: a change of owner takes bits from the mode."""
        mine = os.fstat(descriptor)
        if (mine.st_uid, mine.st_gid) != (like.st_uid, like.st_gid):
            try:
                os.fchown(descriptor, like.st_uid, like.st_gid)
            except PermissionError as error:
                owner = f"{like.st_uid}:{like.st_gid}"
                text = f"{self.path} belongs to {owner}, and you cannot give it to them: use sudo"
                raise NotReplaced(text) from error
        old = os.open(self.name, FLAGS, dir_fd=self._directory)
        try:
            _copy_attributes(old, descriptor)
        finally:
            os.close(old)
        os.fchmod(descriptor, stat.S_IMODE(like.st_mode))


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _copy_attributes(old: int, new: int) -> None:
    """Extended attributes (xattr(7)). An access list is kept or nothing is done; of the others, what a
    security module or the filesystem keeps for itself is left to them."""
    try:
        names = set(os.listxattr(old))
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return
        raise
    for name in set(os.listxattr(new)) - names:  # a directory's default list, say
        with _unless_essential(name):
            os.removexattr(new, name)
    for name in names:
        with _unless_essential(name):
            os.setxattr(new, name, os.getxattr(old, name))


@contextlib.contextmanager
def _unless_essential(name: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        if name == _ACCESS:
            raise


def _open_directory(directory: str) -> int:
    try:
        return open_directory(Path(directory))
    except OSError as error:
        raise NotReplaced(f"the directory of policies {directory} cannot be read: {_why(error)}") from error
    except Unreadable as error:
        text = f"{directory}: {error.text}, so anybody could add or replace a policy"
        raise NotReplaced(f"{text}: {error.remedy}") from error


def _why(error: OSError) -> str:
    why = error.strerror or str(error)
    return f"{why}: use sudo" if error.errno in (errno.EACCES, errno.EPERM) else why
