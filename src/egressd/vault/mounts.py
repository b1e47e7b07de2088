"""A mount namespace of this process's own, and one tmpfs in it.

An ordinary account may make one by making a user namespace first (user_namespaces(7)): in it this process
holds every capability, over nothing but what it makes there. One user and one group are mapped, onto
themselves, so files belong to whom they belonged before and no right over anything else is won: root, too,
keeps only what its number may read. Groups stay as they were, and cannot be changed.

There is no way back out, and nobody with threads gets in (EINVAL): it is for a process that was forked for
one request.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from egressd.model.errors import KernelError, Refused
from egressd.model.verdicts import Reason

__all__ = ["detach", "enter_private_namespace", "is_mount", "mount_tmpfs", "remount", "why_refused"]

_CLONE_NEWNS, _CLONE_NEWUSER = 0x0002_0000, 0x1000_0000  # linux/sched.h
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32  # linux/mount.h
_MS_REC, _MS_PRIVATE = 0x4000, 0x4_0000
_MNT_DETACH = 2
_PR_GET_DUMPABLE = 3  # linux/prctl.h
_PLAIN = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_libc = ctypes.CDLL(None, use_errno=True)
_NOT_WEAKER = "egressd does not run requests without it; a scratch directory on disk is the other way"


def enter_private_namespace() -> None:
    """Make both namespaces, map this process's user and group, and let no mount out. `Refused` where the
    machine does not allow it, naming what is to be changed."""
    user, group = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
        raise why_refused(ctypes.get_errno(), "no user namespace can be made")
    try:
        # A group can be mapped only after setgroups(2) is given up: user_namespaces(7)
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1"),
        ):  # fmt: skip
            Path("/proc/self", name).write_text(text)
    except OSError as error:
        raise why_refused(error.errno or 0, "the user namespace cannot be set up") from error
    if _mount("none", "/", "none", _MS_REC | _MS_PRIVATE, "") != 0:
        raise why_refused(ctypes.get_errno(), "mounts cannot be made private")


def mount_tmpfs(at: str, *, size: int, inodes: int) -> None:
    """`size` in bytes. noswap (Linux 6.4) would be the option to ask for, but the kernel refuses it in user
    namespaces (mm/shmem.c): see `scratch.swap_warnings`."""
    options = f"size={size},nr_inodes={inodes},mode=0700"
    if _mount("egressd", at, "tmpfs", _PLAIN, options) != 0:
        raise why_refused(ctypes.get_errno(), f"no tmpfs can be mounted at {at}")


def remount(at: str, *, read_only: bool) -> None:
    """The file system itself, so that it holds for every mount made of it. EBUSY while a file is open for
    writing."""
    if _mount("none", at, "none", _MS_REMOUNT | _PLAIN | (_MS_RDONLY if read_only else 0), "") != 0:
        mode = "read-only" if read_only else "writable"
        raise KernelError(f"{at} cannot be made {mode}: {os.strerror(ctypes.get_errno())}")


def detach(at: str) -> bool:
    """Unmount; False if somebody still held it, and it now goes with its last user."""
    place = os.fsencode(at)
    if _libc.umount2(place, 0) == 0:
        return True
    _libc.umount2(place, _MNT_DETACH)
    return False


def is_mount(at: str) -> bool:
    return Path(at).is_mount()


def why_refused(code: int, what: str, *, proc: str = "/proc") -> Refused:
    """`what` failed with errno `code`. Says which of the machine's switches is the cause."""
    return Refused(
        Reason.UNAVAILABLE, f"{what} ({os.strerror(code)}): {_cause(code, Path(proc))}; {_NOT_WEAKER}"
    )


def _cause(code: int, proc: Path) -> str:
    if code == errno.EACCES and _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 1:
        return "it changed its user after its program began, so /proc/self is root's: start it as its user"
    if len(list((proc / "self" / "task").glob("*"))) > 1:
        return "this process has threads, and only one without any can enter a user namespace"
    for name, bad, remedy in _SWITCHES:
        if _read(proc / "sys" / name) == bad:
            return f"{name.replace('/', '.')} is {bad}: {remedy}"
    if code == errno.ENOSPC:
        return "user.max_user_namespaces or user.max_mnt_namespaces is reached, or namespaces nest 32 deep"
    if code == errno.EINVAL:
        return "the kernel has no user namespaces (CONFIG_USER_NS)"
    return (
        "something forbids it to this process: a seccomp filter (systemd's RestrictNamespaces=, or a"
        " container's), a chroot, or a security module"
    )


# Each a file of /proc/sys, the value that forbids, and what to do.
_SWITCHES = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns", "1",
        "give egressd-broker an AppArmor profile with `userns,`, or set it to 0",
    ),
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("user/max_mnt_namespaces", "0", "sysctl -w user.max_mnt_namespaces=15000"),
)  # fmt: skip


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _mount(source: str, at: str, kind: str, flags: int, options: str) -> int:
    return int(
        _libc.mount(source.encode(), os.fsencode(at), kind.encode(), ctypes.c_ulong(flags), options.encode())
    )
