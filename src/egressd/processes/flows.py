"""Flows: bytes between two sockets, moved by the kernel, in both directions, with everything that TCP says.

Theory. Each direction is a `Half`: a source socket, something in between, a sink socket. In between there is
at first a small buffer: most connections are a question and an answer, and end before a pipe has paid for
itself. Once a direction has moved `_SPLICE_FROM` bytes it gets a pipe, and splice(2) moves pages from the
source into the pipe and from the pipe into the sink; no byte is seen here any more. A half either *reads*
(nothing is held, we wait for the source) or *writes* (something is held, we wait for the sink), never both:
that is the back-pressure, since a source that is not read closes its own window. Buffer and pipe belong to
their half alone and die with it; they are never shared or reused, so no byte can end up in another flow.

What TCP says is passed on: the end of one direction (FIN) by shutdown(2) of the sink after the last byte; a
reset by resetting both sockets (SO_LINGER 0, socket(7)), also when it arrives while that socket is neither
read nor written: epoll(7) reports errors unasked.

Must not: block; believe an event rather than the socket; keep a finished socket registered (EPOLLHUP is
level-triggered and would spin).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["DESCRIPTORS", "Flow", "Gate", "Half", "Poller", "Stop", "keep_alive", "make_abrupt", "reset"]

DESCRIPTORS = 6  # two sockets, two pipes; or one and five attempts to connect
_COPY = 16_384  # bytes per read before there is a pipe: a TLS record (RFC 8446 5.2)
_COPY_MUCH = 1 << 18  # and where there should be one but cannot
_SPLICE_FROM = 1 << 16  # bytes that a direction moves before it gets a pipe
_PIPE = 1 << 20  # bytes; what a user without rights may ask for (/proc/sys/fs/pipe-max-size)
_TURNS = 16  # fill-and-drain rounds per event, so that one busy flow does not hold the loop
_SPLICE = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_TROUBLE = select.EPOLLERR | select.EPOLLHUP
_READABLE = select.EPOLLIN | _TROUBLE
_WRITABLE = select.EPOLLOUT | _TROUBLE
_RESET, _ORDERLY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
# A peer that vanished without a word is found within two and a half minutes (tcp(7)).
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 6))


def make_abrupt(sock: socket.socket) -> None:
    """However it is closed, the other end gets a TCP reset, and what is buffered is thrown away: also when
    the kernel closes it because we were killed, which would look like an orderly end in the middle of
    something. Accepted sockets inherit it. `Flow` takes it back where both sides have ended."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def reset(sock: socket.socket) -> None:
    """Close it abruptly."""
    with contextlib.suppress(OSError):
        make_abrupt(sock)
    sock.close()


def keep_alive(sock: socket.socket) -> None:
    """Let TCP ask now and then whether the other end is still there. Accepted sockets inherit it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Poller:
    """epoll with a function per descriptor. `now` is the time of the last wake-up, monotonic seconds."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._forgotten: set[int] = set()
        self.now = time.monotonic()

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

    def forget(self, descriptor: int, *, closing: bool = False) -> None:
        """Before it is closed. Events of this round that are still to be delivered are not: the number
        may belong to another socket by then.

        `closing`: the caller closes it at once, and nobody else has it open, so that the kernel takes it
        out by itself (epoll(7)).
        """
        if self._watched.pop(descriptor, None) is not None:
            if not closing:
                self._epoll.unregister(descriptor)
            self._forgotten.add(descriptor)

    def turn(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for events; deliver them once."""
        self._forgotten.clear()
        events = self._epoll.poll(timeout)
        self.now = time.monotonic()
        for descriptor, what in events:
            if descriptor not in self._forgotten and descriptor in self._watched:
                self._watched[descriptor][1](what)

    def close(self) -> None:
        self._epoll.close()


class Stop(Exception):
    """Raised by a `Gate`: the flow must end, `how`."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Gate(Protocol):
    """Watches the beginning of a flow, until it is `over`. What the server says goes on at once; what the
    client says may have to wait for it."""

    @property
    def over(self) -> bool: ...

    def client(self, data: bytes) -> bytes:
        """What of the client's bytes may go on now."""

    def server(self, data: bytes) -> bytes:
        """The client's bytes that had to wait for these, which are yet to be passed on."""


class Half:
    """One direction. `moved` counts bytes that the sink's socket has taken.

    `first` are bytes that somebody has read from the source already. `held` bytes are on their way, in the
    buffer or in the pipe.
    """

    __slots__ = (
        "_copies", "_pipe", "_rest", "done", "ended", "held", "keeps_end", "moved", "sink", "source", "tap",
    )  # fmt: skip

    def __init__(self, source: socket.socket, sink: socket.socket, first: bytes = b"") -> None:
        self.source, self.sink = source, sink
        self.moved = 0
        self.ended = False  # the source has said its last byte
        self.done = False  # and so has been told to the sink
        self.keeps_end = False  # the end of the source is not told yet
        self.tap: Callable[[bytes], bytes] | None = None  # sees every byte; what it returns goes on
        self.held = len(first)
        self._rest = memoryview(first)
        self._pipe: tuple[int, int] | None = None
        self._copies = False  # no pipe is to be had

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
            if self.ended and not self.held:  # in the turn that saw the end: no event would bring us back
                self._pass_end_on()
                return

    def _fill(self) -> bool:
        """Read once. False: there is no more for the time being."""
        if self._pipe is None and (self.tap or self.moved < _SPLICE_FROM or not self._open_pipe()):
            return self._copy(_COPY_MUCH if self._copies else _COPY)
        assert self._pipe is not None
        try:
            count = os.splice(self.source.fileno(), self._pipe[1], _PIPE, flags=_SPLICE)
        except BlockingIOError:
            # splice stops before urgent data (tcp_read_sock in net/ipv4/tcp.c) while epoll goes on calling
            # the socket readable, so a sandbox could keep us spinning with one byte.
            return self._copy(_COPY)
        self.held += count
        self.ended = count == 0
        return True

    def _copy(self, most: int) -> bool:
        try:
            data = self.source.recv(most)
        except BlockingIOError:
            return False
        if not data:
            self.ended = True
            return True
        whole = len(data) == most  # less than was asked for is all there was: epoll tells us of more
        if self.tap is not None:
            data = self.tap(data)
        self._rest, self.held = memoryview(data), len(data)
        return (not data or self._drain()) and whole

    def add(self, data: bytes) -> None:
        """Send these as well, after what is held."""
        if data:
            self._rest = memoryview(bytes(self._rest) + data)
            self.held += len(data)

    def _open_pipe(self) -> bool:
        """With the user's share of pipe pages used up (pipe(7), pipe-user-pages-soft) a pipe has two pages:
        then copying is faster, as it is possible without descriptors."""
        if self._copies:
            return False
        try:
            pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            self._copies = True
            return False
        try:
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, _PIPE)
        except OSError:
            for descriptor in pipe:
                os.close(descriptor)
            self._copies = True
            return False
        self._pipe = pipe
        return True

    def _drain(self) -> bool:
        """Write once. True: nothing is held any more."""
        try:
            if self._rest:
                count = self.sink.send(self._rest)
                self._rest = self._rest[count:]
            else:
                assert self._pipe is not None
                count = os.splice(self._pipe[0], self.sink.fileno(), self.held, flags=_SPLICE)
        except BlockingIOError:
            return False
        self.held -= count
        self.moved += count
        return not self.held

    def _pass_end_on(self) -> None:
        if not self.done and not self.keeps_end:
            self.done = True
            self.sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        if self._pipe is not None:
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None


class Flow:
    """Two connected, non-blocking sockets, joined until both have ended.

    `first` are bytes of the client that have been read already; they are sent before anything else.
    `over(how)` is called once, when both sockets are closed: how is "finished", "reset", or what `abort` or a
    `Stop` was given. With a `gate`, that decides how long the client's later bytes wait.
    """

    __slots__ = ("_gate", "_over", "_poller", "client", "closed", "inward", "outward", "upstream")

    def __init__(
        self,
        poller: Poller,
        client: socket.socket,
        upstream: socket.socket,
        *,
        over: Callable[[str], None],
        first: bytes = b"",
        gate: Gate | None = None,
    ) -> None:
        self._poller, self._over, self._gate = poller, over, gate
        self.client, self.upstream = client, upstream
        self.outward, self.inward = Half(client, upstream, first), Half(upstream, client)
        self.closed = False
        if gate is not None and not gate.over:
            self.outward.tap, self.inward.tap = self._client_said, self._server_said
            self.outward.keeps_end = True

    def begin(self) -> None:
        """The rest follows from events."""
        self._pump(self.outward)

    @property
    def moved(self) -> int:
        """Bytes, both ways."""
        return self.outward.moved + self.inward.moved

    # ---- while there is a gate

    def _client_said(self, data: bytes) -> bytes:
        assert self._gate is not None
        passed = self._gate.client(data)
        if self._gate.over:
            self._open()
        return passed

    def _server_said(self, data: bytes) -> bytes:
        assert self._gate is not None
        self.outward.add(self._gate.server(data))
        if self._gate.over:
            self._open()
        self.outward.pump()
        return data

    def _open(self) -> None:
        self.outward.tap = self.inward.tap = self._gate = None
        self.outward.keeps_end = False

    # ---- events

    def _watch(self) -> None:
        outward, inward = self.outward, self.inward
        self._watch_one(self.client, outward, inward, self._client_event)
        self._watch_one(self.upstream, inward, outward, self._upstream_event)

    def _watch_one(self, sock: socket.socket, reads: Half, writes: Half, call: Callable[[int], None]) -> None:
        if reads.ended and writes.done:
            self._poller.forget(sock.fileno())  # nothing more will come of it but EPOLLHUP
            return
        events = (select.EPOLLIN if reads.reading else 0) | (select.EPOLLOUT if writes.held else 0)
        self._poller.watch(sock.fileno(), events, call)

    def _client_event(self, events: int) -> None:
        self._event(self.client, events, self.outward, self.inward)

    def _upstream_event(self, events: int) -> None:
        self._event(self.upstream, events, self.inward, self.outward)

    def _event(self, sock: socket.socket, events: int, reads: Half, writes: Half) -> None:
        if events & _TROUBLE and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.abort("reset")
            return
        if events & _WRITABLE:
            self._pump(writes)
        if events & _READABLE and not self.closed:
            self._pump(reads)

    def _pump(self, half: Half) -> None:
        try:
            half.pump()
            if self.inward.ended and self.outward.keeps_end:  # no answer will come that could let it out
                self.outward.keeps_end = False
                self.outward.pump()
        except OSError:
            self.abort("reset")
            return
        except Stop as stop:
            self.abort(stop.how)
            return
        if self.outward.done and self.inward.done:
            self._end("finished", abort=False)
        else:
            self._watch()

    # ---- ends

    def abort(self, how: str) -> None:
        """Reset both sides now."""
        self._end(how, abort=True)

    def _end(self, how: str, *, abort: bool) -> None:
        if self.closed:
            return
        self.closed = True
        for sock in (self.client, self.upstream):
            self._poller.forget(sock.fileno(), closing=True)
            if abort:
                reset(sock)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ORDERLY)
                sock.close()
        self.outward.close()
        self.inward.close()
        self._over(how)
