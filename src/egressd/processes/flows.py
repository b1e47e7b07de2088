"""Flows: bytes between two sockets, moved by the kernel, in both directions, with everything that TCP says.

Theory. Each direction is a `Half`: a source socket, a pipe, a sink socket. splice(2) moves pages from the
source into the pipe and from the pipe into the sink; no byte is seen here. A half either *reads* (its pipe
is empty, we wait for the source) or *writes* (its pipe holds something, we wait for the sink), never both:
that is the back-pressure, since a source that is not read closes its own window. The pipe belongs to its
half alone and dies with it; pipes are never shared or reused, so no byte can end up in another flow.

What TCP says is passed on: the end of one direction (FIN) by shutdown(2) of the sink after the last byte; a
reset by resetting both sockets (SO_LINGER 0, socket(7)), also when it arrives while that socket is neither
read nor written: epoll(7) reports errors unasked.

Must not: block; believe an event rather than the socket; keep a finished socket registered (EPOLLHUP is
level-triggered and would spin).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["DESCRIPTORS", "Flow", "Half", "Poller", "reset"]

DESCRIPTORS = 6  # two sockets, two pipes
_CHUNK = 1 << 20  # bytes per splice; the pipe's own size is the real bound
_TURNS = 16  # fill-and-drain rounds per event, so that one busy flow does not hold the loop
# What an empty pipe always takes: with pipe-user-pages-soft used up, a pipe has two pages (pipe(7)).
_SMALL = 4096
_SPLICE = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_TROUBLE = select.EPOLLERR | select.EPOLLHUP
_RESET = struct.pack("ii", 1, 0)


def reset(sock: socket.socket) -> None:
    """Close so that the other end gets a TCP reset, and what is buffered is thrown away."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


class Poller:
    """epoll with a function per descriptor."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._forgotten: set[int] = set()

    def watch(self, descriptor: int, events: int, call: Callable[[int], None]) -> None:
        """Call `call(events)` on any of `events`; a second time changes both.

        0 asks for errors only, each told once: EPOLLHUP cannot be masked (epoll_ctl(2)), and stays for as
        long as both ends of a connection are shut, also while we are in no position to act on it.
        """
        events = events or select.EPOLLET
        known = self._watched.get(descriptor)
        if known is None:
            self._epoll.register(descriptor, events)
        elif known[0] != events:
            self._epoll.modify(descriptor, events)
        self._watched[descriptor] = (events, call)

    def forget(self, descriptor: int) -> None:
        """Before it is closed. Events of this round that are still to be delivered are not: the number
        may belong to another socket by then."""
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            self._forgotten.add(descriptor)

    def turn(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for events; deliver them once."""
        self._forgotten.clear()
        for descriptor, events in self._epoll.poll(timeout):
            if descriptor not in self._forgotten and descriptor in self._watched:
                self._watched[descriptor][1](events)

    def close(self) -> None:
        self._epoll.close()


@dataclass(slots=True)
class Half:
    """One direction. `moved` counts bytes that the sink's socket has taken."""

    source: socket.socket
    sink: socket.socket
    moved: int = 0
    ended: bool = False  # the source has said its last byte
    done: bool = False  # and so has been told to the sink
    held: int = 0  # bytes in the pipe
    _pipe: tuple[int, int] = field(default_factory=lambda: os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))

    @property
    def reading(self) -> bool:
        return not self.held and not self.ended

    def pump(self) -> None:
        """Move what can be moved. OSError: one of the two sockets has failed."""
        for _ in range(_TURNS):
            if self.reading and not self._fill():
                return
            if self.held and not self._drain():
                return
            if self.ended and not self.held:
                self._pass_end_on()
                return

    def _fill(self) -> bool:
        try:
            count = os.splice(self.source.fileno(), self._pipe[1], _CHUNK, flags=_SPLICE)
        except BlockingIOError:
            return self._copy()
        self.held += count
        self.ended = count == 0
        return True

    def _copy(self) -> bool:
        """Read what splice will not: it stops before urgent data (tcp_read_sock in net/ipv4/tcp.c) while
        epoll goes on calling the socket readable, so a sandbox could keep us spinning with one byte."""
        try:
            data = self.source.recv(_SMALL)
        except BlockingIOError:
            return False
        self.held += os.write(self._pipe[1], data) if data else 0
        self.ended = not data
        return True

    def _drain(self) -> bool:
        try:
            count = os.splice(self._pipe[0], self.sink.fileno(), self.held, flags=_SPLICE)
        except BlockingIOError:
            return False
        self.held -= count
        self.moved += count
        return not self.held

    def _pass_end_on(self) -> None:
        if not self.done:
            self.done = True
            self.sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for descriptor in self._pipe:
            os.close(descriptor)


class Flow:
    """A client and the service it is relayed to, from the moment of dialing.

    `over(flow, how)` is called once, when both sockets are closed: how is "finished", "reset", "refused"
    (never connected; `error` says why) or what `abort` was given. OSError from the constructor: no
    descriptors are left; the client is still the caller's.
    """

    def __init__(
        self,
        poller: Poller,
        client: socket.socket,
        upstream: tuple[str, int],
        *,
        over: Callable[[Flow, str], None],
    ) -> None:
        self._poller, self._over = poller, over
        self.client, self._upstream_address = client, upstream
        self.error: int | None = None
        self.connecting, self.closed = True, False
        with contextlib.ExitStack() as undo:
            self.upstream = undo.enter_context(_new_socket())
            self.outward = Half(client, self.upstream)
            undo.callback(self.outward.close)
            self.inward = Half(self.upstream, client)
            undo.callback(self.inward.close)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            undo.pop_all()

    def dial(self) -> None:
        """Connect to the service; the rest follows from events."""
        code = self.upstream.connect_ex(self._upstream_address)
        if code not in (0, errno.EINPROGRESS):
            self._refuse(code)
        else:
            self._watch()

    # ---- events

    def _watch(self) -> None:
        if self.connecting:
            self._poller.watch(self.client.fileno(), 0, self._client_event)
            self._poller.watch(self.upstream.fileno(), select.EPOLLOUT, self._upstream_event)
            return
        self._watch_one(self.client, self.outward, self.inward, self._client_event)
        self._watch_one(self.upstream, self.inward, self.outward, self._upstream_event)

    def _watch_one(self, sock: socket.socket, reads: Half, writes: Half, call: Callable[[int], None]) -> None:
        if reads.ended and writes.done:
            self._poller.forget(sock.fileno())  # nothing more will come of it but EPOLLHUP
            return
        events = (select.EPOLLIN if reads.reading else 0) | (select.EPOLLOUT if writes.held else 0)
        self._poller.watch(sock.fileno(), events, call)

    def _client_event(self, events: int) -> None:
        if self.connecting:  # errors only: the client went away while we dialed
            self._end("reset", abort=True)
        else:
            self._event(self.client, events)

    def _upstream_event(self, events: int) -> None:
        if self.connecting:
            self._connected()
        else:
            self._event(self.upstream, events)

    def _connected(self) -> None:
        code = self.upstream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0 and self.upstream.getsockname() == self.upstream.getpeername():
            # Nobody listens, and the kernel chose the service's own port as the source: TCP connects to
            # itself (RFC 9293 3.5, simultaneous open). That is no service.
            code = errno.ECONNREFUSED
        if code != 0:
            self._refuse(code)
            return
        self.connecting = False
        self._pump()

    def _event(self, sock: socket.socket, events: int) -> None:
        if events & _TROUBLE:
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code != 0:
                self.error = code
                self._end("reset", abort=True)
                return
        self._pump()

    def _pump(self) -> None:
        try:
            self.outward.pump()
            self.inward.pump()
        except OSError as error:
            self.error = error.errno
            self._end("reset", abort=True)
            return
        if self.outward.done and self.inward.done:
            self._end("finished", abort=False)
        else:
            self._watch()

    # ---- ends

    def _refuse(self, code: int) -> None:
        self.error = code
        self._end("refused", abort=True)

    def abort(self, how: str) -> None:
        """Reset both sides now."""
        self._end(how, abort=True)

    def _end(self, how: str, *, abort: bool) -> None:
        if self.closed:
            return
        self.closed = True
        for sock in (self.client, self.upstream):
            self._poller.forget(sock.fileno())
            if abort:
                reset(sock)
            else:
                sock.close()
        self.outward.close()
        self.inward.close()
        self._over(self, how)


def _new_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    return sock
