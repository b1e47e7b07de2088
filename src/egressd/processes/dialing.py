"""Dialing: one connection to whichever of several addresses answers first, in the manner of RFC 8305.

Attempts are begun one after the other, `STEP` apart, or at once when one has failed; the first that stands
wins and the others are closed. Nothing is sent here. RFC 8305's search for names has no place: whoever calls
knows the addresses and their order.

Must not: hold more than `AT_ONCE` sockets; call `done` twice.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from egressd.processes.flows import Poller, make_abrupt

__all__ = ["AT_ONCE", "STEP", "Race", "Target"]

STEP = 0.25  # seconds: RFC 8305 section 5, "Connection Attempt Delay"
AT_ONCE = 5  # with the client's socket as many descriptors as a joined flow may have (flows.DESCRIPTORS)
# linux/in.h: choose the port at connect(2), where it need only be unique together with the destination.
# Chosen by bind(2), a workspace could have no more than one connection per port, whatever the destination.
_IP_BIND_ADDRESS_NO_PORT = 24
# linux/in6.h. A `local` route makes its addresses our own for IPv4, but bind(2) of IPv6 asks for an address
# on a device, or for this, which needs no right (inet6_bind in net/ipv6/af_inet6.c).
_IPV6_FREEBIND = 78
_TROUBLE = select.EPOLLERR | select.EPOLLHUP
_KIND = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, and from which of our addresses (None: the kernel chooses)."""

    family: int
    address: tuple[str, int]
    source: tuple[str, int] | None = None


class Race:
    """`done(sock)` is called once, with the connected socket or None; then `error` is the errno of the first
    attempt, which was to the address that was meant."""

    __slots__ = ("_anywhere", "_attempts", "_done", "_next", "_poller", "_targets", "error", "step_at")

    def __init__(
        self,
        poller: Poller,
        targets: Sequence[Target],
        *,
        done: Callable[[socket.socket | None], None],
    ) -> None:
        self._poller, self._targets, self._done = poller, targets, done
        self._attempts: list[socket.socket] = []
        self._next = 0
        self._anywhere = any(target.source is None for target in targets)
        self.error: int | None = None
        self.step_at = 0.0  # monotonic seconds: when to call `step`

    def step(self) -> None:
        """Begin the next attempt, if there is one."""
        self.step_at = self._poller.now + STEP
        while self._next < len(self._targets) and len(self._attempts) < AT_ONCE:
            target = self._targets[self._next]
            self._next += 1
            try:
                sock = _dial(target)
            except OSError as error:
                self._failed(error.errno)
                continue
            self._attempts.append(sock)
            self._poller.watch(sock.fileno(), select.EPOLLOUT, partial(self._answered, sock))
            return
        if not self._attempts:
            self._finish(None)

    def _answered(self, sock: socket.socket, events: int) -> None:
        # A connect that failed is an error for epoll, too (tcp_poll in net/ipv4/tcp.c): no need to ask.
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & _TROUBLE else 0
        if code == 0 and self._anywhere and _with_itself(sock):
            code = errno.ECONNREFUSED
        self._attempts.remove(sock)
        if code == 0:
            self._finish(sock)
            return
        self._poller.forget(sock.fileno(), closing=True)
        sock.close()
        self._failed(code)
        self.step()

    def _failed(self, code: int | None) -> None:
        if self.error is None:
            self.error = code

    def _finish(self, sock: socket.socket | None) -> None:
        self.abandon()
        self._done(sock)

    def abandon(self) -> None:
        """Close what is still being tried. `done` is not called."""
        for sock in self._attempts:
            self._poller.forget(sock.fileno(), closing=True)
            sock.close()
        self._attempts.clear()
        self._next = len(self._targets)


def _with_itself(sock: socket.socket) -> bool:
    """Nobody listens, and the kernel chose the port dialed as the source: TCP connects to itself (RFC 9293
    3.5, simultaneous open). That is no service."""
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # ENOTCONN: it stood, and has been reset since
        return False


def _dial(target: Target) -> socket.socket:
    """A socket that is connecting. OSError, and no descriptor left, if it cannot even begin."""
    sock = socket.socket(target.family, _KIND)
    try:
        make_abrupt(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        if target.source is not None:
            sock.setsockopt(socket.SOL_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            if target.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            sock.bind(target.source)
        with contextlib.suppress(BlockingIOError):  # EINPROGRESS
            sock.connect(target.address)
    except BaseException:
        sock.close()
        raise
    return sock
