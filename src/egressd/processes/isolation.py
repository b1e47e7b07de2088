"""Giving up rights, in stages, the same in every process.

The order, and why:

1. The program is exec'd as root with its sockets open and imports everything it will ever need. Afterwards
   it may be unable to read its own libraries (a Python under a private home directory).
2. `become` sets the parent-death signal, empties the bounding set down to the card, sets the groups and
   ids while keeping the permitted set (PR_SET_KEEPCAPS), then cuts the permitted, effective and
   inheritable sets to the card and forbids gaining anything by exec (PR_SET_NO_NEW_PRIVS).
3. `verify` reads it all back. A right that could not be given up ends the process: a restriction that
   was asked for and cannot be applied is never skipped.

Must not do: open files, import, or log anything a stranger wrote.

Numbers: linux/prctl.h, linux/capability.h (_LINUX_CAPABILITY_VERSION_3).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from egressd.processes.cards import Capability, Card

__all__ = [
    "IsolationError",
    "become",
    "close_other_descriptors",
    "die_with_parent",
    "drop_bounding",
    "limit_to",
    "no_new_privileges",
    "verify",
]

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_CAP_VERSION_3 = 0x20080522
_LAST_CAP = 63  # PR_CAPBSET_READ answers EINVAL above the kernel's own last one

_libc = ctypes.CDLL(None, use_errno=True)


class IsolationError(Exception):
    """A right could not be given up. The process must end."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def become(card: Card, *, uid: int, gid: int, groups: Iterable[int] = ()) -> None:
    """Give up everything that is not on `card` and become `uid`:`gid`, in `groups` and no others.
    IsolationError if it fails.

    Where the process already runs as `uid` (a lab without subordinate ids) the ids stay, the
    capabilities go all the same.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    drop_bounding(card.capabilities)
    changed = _change_ids(uid, gid, sorted(set(groups)))
    limit_to(effective=card.capabilities, permitted=card.capabilities)
    no_new_privileges()
    # After a change of ids the kernel clears the parent-death signal (prctl(2)): set it again.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_DUMPABLE, 0)
    verify(card, uid=uid, gid=gid, groups=groups if changed else None)


def die_with_parent() -> None:
    """For a worker of the same user: its end is ours, however it comes. The kernel sends the signal when the
    thread that started us ends; a parent that has ended before is not noticed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _change_ids(uid: int, gid: int, groups: list[int]) -> bool:
    """Whether there was anything to change."""
    if (os.getresuid(), os.getresgid()) == ((uid,) * 3, (gid,) * 3):
        return False
    _prctl(_PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise IsolationError(f"cannot become uid {uid}, gid {gid}: {error.strerror}") from error
    return True


def drop_bounding(keep: Iterable[Capability]) -> None:
    """Empty this thread's bounding set down to `keep`; needs CAP_SETPCAP."""
    kept = {int(c) for c in keep}
    for number in range(_LAST_CAP + 1):
        if number not in kept and _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            _prctl(_PR_CAPBSET_DROP, number)


def limit_to(*, effective: Iterable[Capability], permitted: Iterable[Capability]) -> None:
    """Set this thread's capability sets; the inheritable and ambient sets are emptied."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    e, p = _bits(effective), _bits(permitted)
    header = _Header(_CAP_VERSION_3, 0)
    data = (_Data * 2)(
        _Data(e & 0xFFFF_FFFF, p & 0xFFFF_FFFF, 0),
        _Data(e >> 32, p >> 32, 0),
    )
    if _libc.capset(ctypes.byref(header), data) != 0:
        raise IsolationError(f"capset: {os.strerror(ctypes.get_errno())}")


def _bits(capabilities: Iterable[Capability]) -> int:
    return sum(1 << c for c in set(capabilities))


def verify(card: Card, *, uid: int, gid: int, groups: Iterable[int] | None = None) -> None:
    """Read back from the kernel what `become` set; IsolationError naming the first difference. `groups` None:
    they were left as they are."""
    status = dict(
        line.split(":\t", 1)
        for line in Path("/proc/thread-self/status").read_text().splitlines()
        if ":\t" in line
    )
    bits = _bits(card.capabilities)
    wanted = {
        "Uid": "\t".join([str(uid)] * 4),
        "Gid": "\t".join([str(gid)] * 4),
        "NoNewPrivs": "1",
        "CapPrm": f"{bits:016x}",
        "CapEff": f"{bits:016x}",
        "CapBnd": f"{bits:016x}",
        "CapInh": f"{0:016x}",
        "CapAmb": f"{0:016x}",
    }
    if groups is not None:
        wanted["Groups"] = " ".join(map(str, sorted(set(groups))))
    for field, value in wanted.items():
        if status.get(field, "").strip() != value:
            raise IsolationError(f"{card.name}: {field} is {status.get(field)!r} instead of {value!r}")


def no_new_privileges() -> None:
    """Exec gains nothing any more, for this thread and all it starts."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def close_other_descriptors(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not named."""
    low = 3
    for descriptor in sorted(d for d in keep if d > 2):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        raise IsolationError(f"prctl({option}, {argument}): {os.strerror(ctypes.get_errno())}")
