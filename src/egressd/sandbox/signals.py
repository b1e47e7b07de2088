"""Signals of `egressctl run`: what reaches the launcher reaches the command.

The signals are blocked and read from a descriptor, so that they wait in the same poll as everything else,
and so that their origin is known (siginfo's code): on a terminal the kernel has already sent Ctrl-C to
everybody in the foreground, the command included, and forwarding it would make it two.

Only for a program's main thread; `egressd.Sandbox` leaves its host's signals alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from dataclasses import dataclass
from typing import Any

__all__ = ["Arrived", "SignalDesk"]

S = signal.Signals
FORWARDED = (S.SIGINT, S.SIGQUIT, S.SIGTERM, S.SIGHUP, S.SIGUSR1, S.SIGUSR2, S.SIGWINCH, S.SIGCONT, S.SIGTSTP)
# Sent to a whole process group, these would end bubblewrap's outer process and with it the sandbox.
SHIELDED = (S.SIGINT, S.SIGQUIT, S.SIGTERM, S.SIGHUP, S.SIGUSR1, S.SIGUSR2)
ENDING = frozenset(SHIELDED)
_SI_KERNEL = 0x80  # asm-generic/siginfo.h
_SFD_CLOEXEC, _SFD_NONBLOCK = 0o2000000, 0o4000
_SIGINFO = 128  # sizeof(struct signalfd_siginfo)


@dataclass(frozen=True, slots=True)
class Arrived:
    signal: S
    from_kernel: bool


class SignalDesk:
    """`with SignalDesk(terminal=...) as desk`: from here on signals wait at `desk.fileno()`."""

    def __init__(self, *, terminal: bool) -> None:
        self.terminal = terminal
        # what the caller ignores (nohup) stays ignored, for the command too
        self._taken = [s for s in FORWARDED if signal.getsignal(s) is not signal.SIG_IGN]
        self._descriptor = -1
        self._before: set[signal.Signals] = set()
        self._handlers: dict[S, Any] = {}

    @property
    def mask(self) -> list[S]:
        """The signal mask the command is to start with: the one we were started with."""
        return [S(s) for s in self._before]

    @property
    def to_restore(self) -> tuple[str, ...]:
        """What bubblewrap starts ignoring and the gate must set back, as env(1) spells it."""
        return tuple(s.name[3:] for s in SHIELDED if s in self._taken) if self.terminal else ()

    @property
    def defaults(self) -> list[S]:
        """What the spawned process starts with at its default action. SIGPIPE and SIGXFSZ, because
        Python ignores them."""
        kept = () if self.terminal else self._taken
        return [S.SIGPIPE, S.SIGXFSZ, *kept]

    def fileno(self) -> int:
        return self._descriptor

    def __enter__(self) -> SignalDesk:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)
        self._before = {S(s) for s in before}
        self._descriptor = _signalfd(self._taken)
        if self.terminal:
            for shielded in SHIELDED:
                if shielded in self._taken:
                    # blocked as well as ignored, it still arrives at the descriptor (kernel/signal.c:
                    # "blocked signals are never ignored")
                    self._handlers[shielded] = signal.signal(shielded, signal.SIG_IGN)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
        os.close(self._descriptor)

    def read(self) -> list[Arrived]:
        """What has arrived since; empty when nothing has."""
        try:
            data = os.read(self._descriptor, 16 * _SIGINFO)
        except BlockingIOError:
            return []
        found = []
        for at in range(0, len(data), _SIGINFO):
            number, _, code = struct.unpack_from("=Iii", data, at)
            found.append(Arrived(S(number), from_kernel=code == _SI_KERNEL))
        return found


def _signalfd(numbers: list[S]) -> int:
    """signalfd(2), which Python does not have."""
    mask = 0
    for number in numbers:
        mask |= 1 << (number - 1)
    words = struct.pack("=Q", mask) + bytes(120)  # sigset_t of glibc and musl: 128 bytes
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.signalfd(-1, words, _SFD_CLOEXEC | _SFD_NONBLOCK)
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "signalfd")
    return descriptor
