"""Where the copies of one request lie, and that nothing of them stays.

`PrivateScratch` is a tmpfs in a mount namespace of this process's own. Nobody outside can see it, nothing of
it is written to a disk, and it is gone with the last process inside, however that ends: there is nothing that
somebody could have to clean up. One thing is not promised: under memory pressure the kernel may write a tmpfs
to swap. See `swap_warnings`.

`DirectoryScratch` is for a machine that has no user namespaces, or not the memory: a directory of this
account's below one for all requests. Its process holds a lock on it (flock(2), which ends with the process).
What a killed process left is found by that: by its name, and by nobody holding it (see janitor.py).

Both look, when they have destroyed what was there, whether it is really gone, and say so: `looked`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time
from pathlib import Path
from types import TracebackType

from egressd.model.errors import EgressdError, KernelError, Refused
from egressd.model.verdicts import Reason
from egressd.vault import fscrypt, mounts, removal

__all__ = ["NAME", "DirectoryScratch", "PrivateScratch", "open_scratch", "swap_warnings"]

NAME = re.compile(r"r-[0-9a-z]{26}")  # a request's, as broker/runners/jobs.py makes them
INSIDE = "work"
_PATIENCE = 2.0  # seconds in which the last process of a sandbox lets go of its files
_TRIES = 5
_OWN_MODE = 0o700


class PrivateScratch:
    """`with scratch as path:`. Entering it moves this process into namespaces of its own, for good: it must
    have no threads (`Refused`), and be one that was made for this request."""

    def __init__(self, *, size: int, inodes: int, at: str | Path) -> None:
        """`size` in bytes, `inodes` with directories counted (see projection.room), `at` an empty directory:
        any will do, nothing is ever written there."""
        self.looked = False  # it is gone, and this was looked for
        self.trouble: tuple[str, ...] = ()  # what is not
        self._size, self._inodes, self._at = size, inodes, os.fspath(at)
        self._mounted = False

    def __enter__(self) -> Path:
        if not stat.S_ISDIR(os.lstat(self._at).st_mode):
            raise Refused(Reason.FILES, f"{self._at} is not a directory to mount a scratch on")
        mounts.enter_private_namespace()
        mounts.mount_tmpfs(self._at, size=self._size, inodes=self._inodes)
        self._mounted = True
        return Path(self._at)

    def seal(self) -> None:
        """Read-only from now on, for this process too."""
        mounts.remount(self._at, read_only=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def destroy(self) -> bool:
        """Empty it, see that every page and inode is free again, unmount it. Emptied first, because a file
        that some process still has open would otherwise live on unseen: so it is found out."""
        if self._mounted:
            self._mounted = False
            self.trouble = tuple(self._emptied()) + self._unmounted()
            self.looked = not self.trouble
        return self.looked

    def _emptied(self) -> list[str]:
        try:
            mounts.remount(self._at, read_only=False)
        except KernelError as error:
            return [str(error)]
        directory = os.open(self._at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            problems = removal.empty(directory)
            if not problems and not _free(directory):
                problems = ["some process still holds files of it"]
        finally:
            os.close(directory)
        return problems

    def _unmounted(self) -> tuple[str, ...]:
        if mounts.detach(self._at) and not mounts.is_mount(self._at):
            return ()
        return (f"{self._at} could not be unmounted",)


def _free(directory: int) -> bool:
    """Whether the tmpfs holds nothing but its root. Unlinked files that are open count as used."""
    end = time.monotonic() + _PATIENCE
    while True:
        _let_go()
        found = os.fstatvfs(directory)
        if found.f_bfree == found.f_blocks and found.f_files - found.f_ffree == 1:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.002)


def _let_go() -> None:
    """Sockets may lie in each other's queues, and files with them, when their last process is gone. The
    kernel looks for such when a socket is closed (net/unix/garbage.c); those are closed by nobody."""
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).close()


class DirectoryScratch:
    """`with scratch as path:`. The directory is `root`/`id`/work; `root` is this account's alone."""

    def __init__(self, root: str | Path, id: str, *, encrypted: bool = False) -> None:
        if not NAME.fullmatch(id):
            raise Refused(Reason.FILES, f"{id[:80]!a} is not a request's name")
        self.looked = False
        self.trouble: tuple[str, ...] = ()
        self._place, self._id, self._encrypted = os.fspath(root), id, encrypted
        self._root = self._held = -1

    def __enter__(self) -> Path:
        self._root = open_scratch(self._place)
        try:
            self._held = self._make()
            if self._encrypted:
                fscrypt.encrypt(self._held)
            os.mkdir(INSIDE, _OWN_MODE, dir_fd=self._held)
        except OSError as error:
            self.destroy()
            raise _cannot(self._place, error) from error
        except EgressdError:
            self.destroy()
            raise
        return Path(self._place, self._id, INSIDE)

    def _make(self) -> int:
        """A new directory, held. The janitor may find it before it is held, and take it for a leftover."""
        for _ in range(_TRIES):
            os.mkdir(self._id, _OWN_MODE, dir_fd=self._root)
            try:
                held = hold(self._id, above=self._root, wait=True)
            except OSError:  # a file system without locks, as some network ones
                os.rmdir(self._id, dir_fd=self._root)
                raise
            if held is not None:
                return held
        raise Refused(Reason.UNAVAILABLE, f"{self._place}: directories vanish as soon as they are made")

    def seal(self) -> None:
        """Nothing is to be done: the sandbox has it mounted read-only, and its files are not writable."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def destroy(self) -> bool:
        """Remove it and all beneath, and see that it is gone."""
        if self._held >= 0:
            self.trouble = tuple(discard(self._id, above=self._root, held=self._held))
            self.looked = not self.trouble
            self._held = -1
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
        return self.looked


def open_scratch(place: str | Path) -> int:
    """The directory for all requests. `Refused` unless it is this account's, and writable to nobody else: who
    can rename there could have something else removed."""
    try:
        number = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot(os.fspath(place), error) from error
    status = os.fstat(number)
    if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return number
    os.close(number)
    raise Refused(
        Reason.UNAVAILABLE,
        f"{place} is not safe as a scratch: it must belong to user {os.geteuid()} and be writable to nobody"
        " else (chmod 0700)",
    )


def hold(name: str, *, above: int, wait: bool) -> int | None:
    """Lock a request's directory. None if it is gone or, not waiting, if somebody else holds it."""
    try:
        number = removal.open_own(name, above=above)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(number), os.stat(name, dir_fd=above, follow_symlinks=False)):
            return number
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(number)
        raise
    os.close(number)
    return None


def discard(name: str, *, above: int, held: int) -> list[str]:
    """Remove a directory that is held; lets go of it. Says what is left.

    One that is encrypted has to be let go of a little earlier: an open file keeps the key in the kernel. The
    directory outlives its key, because it is what names the key to a janitor.
    """
    try:
        identifier = fscrypt.identifier_of(held)
        # what was renamed meanwhile, too; blank, because what is still open somewhere would stay on the disk
        problems = removal.empty(held, blank=True) and removal.empty(held, blank=True)
        if identifier is None:
            return problems + removal.remove_empty(name, above=above)
    finally:
        os.close(held)
    kept = _without_key(above, identifier)
    return [*problems, *([kept] if kept else []), *removal.remove_empty(name, above=above)]


def _without_key(above: int, identifier: bytes) -> str:
    """What keeps the key in the kernel; "" where nothing does."""
    end = time.monotonic() + _PATIENCE
    while (kept := fscrypt.remove_key(above, identifier)) and time.monotonic() < end:
        _let_go()
        time.sleep(0.01)
    return kept


def _cannot(place: str, error: OSError) -> Refused:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Refused(Reason.LIMIT, f"{place} is full: make room, or give requests another scratch")
    return Refused(Reason.UNAVAILABLE, f"{place} cannot be used as a scratch: {error.strerror}")


# ---- swap


def swap_warnings(*, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> tuple[str, ...]:
    """What an operator should know before tmpfs is called memory: swap that a tmpfs's pages could reach."""
    try:
        lines = Path(proc, "swaps").read_text().splitlines()[1:]
    except OSError:
        lines = []
    places = [line.split()[0] for line in lines if line.strip()]
    disks = [place for place in places if not place.startswith("/dev/zram")]
    if not disks or _never_swapped(Path(proc), Path(cgroups)):
        return ()
    return (
        f"swap is on ({', '.join(disks)}), and copies in memory may be written there: have the service's unit"
        " say MemorySwapMax=0, encrypt the swap, or turn it off",
    )


def _never_swapped(proc: Path, cgroups: Path) -> bool:
    """Whether this process's control group, or one above it, may not swap (cgroup v2)."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return False
    own = next((line[4:] for line in lines if line.startswith("0::/")), None)
    if own is None:
        return False
    group = cgroups / own.strip("/")
    for one in (group, *group.parents):
        with contextlib.suppress(OSError):
            if (one / "memory.swap.max").read_text().strip() == "0":
                return True
    return False
