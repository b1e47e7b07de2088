"""As whom somebody logged in who is root by now: what the kernel's audit has kept of him.

A login (pam_loginuid) writes a number that sudo and su leave alone: /proc/PID/loginuid, 4294967295 until
then. It is told beside the uid that asks, and decides nothing.

What is read by pid may be another process's, once the one that connected has ended. So the process is held
by a descriptor meanwhile: the kernel's own of the connection (SO_PEERPIDFD, Linux 6.5), or, before that, one
by its number, if it is of the same user and older than the connection.
"""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path
from typing import Final

from egressd.processes.members import Caller

__all__ = ["who"]

_SO_PEERPIDFD: Final = 77  # asm-generic/socket.h
UNSET: Final = 0xFFFF_FFFF  # linux/audit.h, AUDIT_UID_UNSET
_START: Final = 19  # of /proc/PID/stat, counted from what follows the name (proc(5): field 22)
PROC: Final = Path("/proc")


def who(caller: Caller, sock: socket.socket | None, *, accepted: float) -> str:
    """`uid 0`, or `uid 0 (login 1000)`. `accepted`: seconds of CLOCK_BOOTTIME when the connection was."""
    login = None if sock is None else _login(caller, sock, accepted)
    beside = "" if login in (None, UNSET, caller.uid) else f" (login {login})"
    return f"uid {caller.uid}{beside}"


def _login(caller: Caller, sock: socket.socket, accepted: float) -> int | None:
    """None where nobody can say: another pid namespace, a hidden /proc, a kernel without audit."""
    held = _held(caller, sock, accepted)
    if held is None:
        return None
    try:
        text = Path(PROC, str(caller.pid), "loginuid").read_text(encoding="ascii")
        # Alive after it was read: then the number was its own all the time.
        return int(text) if text.isdigit() and _lives(held) else None
    except (OSError, ValueError):
        return None
    finally:
        os.close(held)


def _held(caller: Caller, sock: socket.socket, accepted: float) -> int | None:
    """A pidfd of the process that connected."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass  # ENOPROTOOPT: an older kernel; ESRCH, EINVAL: it has ended, and the next fails, too
    if caller.pid <= 0:
        return None
    try:
        held = os.pidfd_open(caller.pid)
    except OSError:
        return None
    if _is_of(caller, accepted):
        return held
    os.close(held)
    return None


def _is_of(caller: Caller, accepted: float) -> bool:
    try:
        directory = PROC / str(caller.pid)
        started = int((directory / "stat").read_bytes().rpartition(b")")[2].split()[_START])
        return directory.stat().st_uid == caller.uid and started / os.sysconf("SC_CLK_TCK") <= accepted
    except (OSError, ValueError, IndexError):
        return False


def _lives(pidfd: int) -> bool:
    """pidfd_open(2): readable when the process has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return not poller.poll(0)
