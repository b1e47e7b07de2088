"""A channel inside an asyncio loop: requests with replies, and messages that come unasked.

Replies find their request by its number. When the connection ends every waiting request fails with
`PeerGone`; nobody waits for ever. A queue of outgoing messages is bounded: a peer that reads nothing is
treated as gone, because waiting for it would let it stop us.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from egressd.ipc import messages
from egressd.ipc.channel import Channel, Received, payload
from egressd.model.errors import EgressdError, ProtocolError, Refused
from egressd.model.verdicts import Reason

__all__ = ["Peer", "PeerGone"]

_MAX_QUEUE = 4096
_SLOW = 10.0  # seconds without room for the next part of a document, after which a reader is taken for gone
# What a crowded machine says, not the other end: this message cannot be sent, the next one may be.
_CROWDED = frozenset({errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
_PAUSE = 0.05  # seconds
_MAX_READS = 64  # per wake-up, so that one busy peer cannot hold the loop
T = TypeVar("T")


class PeerGone(EgressdError):
    """The other process ended, or stopped reading, before it replied."""


class Peer:
    """`handler` gets each message that is no reply; `gone` is called once, with the reason. At most `reads`
    messages are taken in per turn of the loop."""

    def __init__(
        self,
        sock: socket.socket,
        receives: Any,
        *,
        handler: Callable[[Peer, Received[Any]], Awaitable[None] | None],
        gone: Callable[[Peer, str], None] | None = None,
        replies: tuple[type[Any], ...] = (),
        reads: int = _MAX_READS,
    ) -> None:
        sock.setblocking(False)
        self.channel: Channel[Any] = Channel(sock, receives)
        self._loop = asyncio.get_running_loop()
        self._handler, self._gone, self._replies, self._reads = handler, gone, replies, reads
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Received[Any]]] = {}
        self._queue: collections.deque[tuple[Any, int | None]] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False
        self._loop.add_reader(sock, self._readable)

    # ---- sending

    def send(self, message: Any, *, descriptor: int | None = None) -> None:
        """Queue one message; the descriptor is duplicated, the caller keeps its own."""
        if self.closed:
            raise PeerGone(f"{type(message).__name__} cannot be sent: the connection has ended")
        if not self._queue and self._sent_at_once(message, descriptor):
            return
        if len(self._queue) >= _MAX_QUEUE:
            self.close("it stopped reading")
            raise PeerGone("the other end stopped reading")
        self._queue.append((message, None if descriptor is None else os.dup(descriptor)))

    def _sent_at_once(self, message: Any, descriptor: int | None) -> bool:
        try:
            self.channel.send(message, descriptor=descriptor)
        except BlockingIOError:
            self._loop.add_writer(self.channel.socket, self._writable)
            return False
        except OSError as error:
            if error.errno not in _CROWDED:
                self.close(str(error))
            raise PeerGone(f"{type(message).__name__} cannot be sent: {error.strerror}") from error
        return True

    def send_payload(self, message: Any, data: bytes) -> None:
        with payload(data) as descriptor:
            self.send(message, descriptor=descriptor)

    async def send_document(self, data: bytes) -> None:
        """Send a JSON document as `Part`s, each when there is room for it. Who does not read is closed."""
        text = data.decode()
        for start in range(0, len(text) or 1, messages.PART):
            piece = text[start : start + messages.PART]
            self.send(messages.Part(text=piece, last=start + messages.PART >= len(text)))
            await self._drained()

    async def _drained(self) -> None:
        deadline = self._loop.time() + _SLOW
        while self._queue and not self.closed:
            if self._loop.time() > deadline:
                self.close("it does not read its answer")
            await asyncio.sleep(0.002)
        if self.closed:
            raise PeerGone("the other end is gone before it had its whole answer")

    def next_request(self) -> int:
        return next(self._numbers)

    async def ask(
        self, message: Any, *, descriptor: int | None = None, data: bytes | None = None, timeout: float = 10.0
    ) -> Received[Any]:
        """Send a request and wait for its reply. `Refused` if the reply is `Failed`, `PeerGone` if
        none comes."""
        future: asyncio.Future[Received[Any]] = self._loop.create_future()
        self._waiting[message.request] = future
        try:
            if data is not None:
                self.send_payload(message, data)
            else:
                self.send(message, descriptor=descriptor)
            received = await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise PeerGone(f"no reply to {type(message).__name__} within {timeout:g} s") from None
        finally:
            self._waiting.pop(message.request, None)
            future.cancel()  # where sending failed, nobody has looked at it, and nobody will
        if isinstance(received.message, messages.Failed):
            raise Refused(Reason.of(received.message.reason), received.message.text)
        return received

    def _writable(self) -> None:
        while self._queue:
            message, descriptor = self._queue[0]
            try:
                self.channel.send(message, descriptor=descriptor)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _CROWDED:  # poll would call us again at once, and again
                    self._loop.remove_writer(self.channel.socket)
                    self._loop.call_later(_PAUSE, self._resume)
                else:
                    self.close(str(error))
                return
            self._queue.popleft()
            if descriptor is not None:
                os.close(descriptor)
        self._loop.remove_writer(self.channel.socket)

    def _resume(self) -> None:
        if not self.closed and self._queue:
            self._loop.add_writer(self.channel.socket, self._writable)

    # ---- receiving

    def _readable(self) -> None:
        self.read(self._reads)

    def read(self, most: int) -> None:
        """Take in what has come, at most so many messages; the loop does so by itself, in its own time."""
        for _ in range(most):
            if self.closed:
                return
            try:
                received = self.channel.receive()
            except BlockingIOError:
                return
            except EOFError:
                self.close("it ended")
                return
            except (ProtocolError, OSError) as error:
                self.close(str(error))
                return
            self._dispatch(received)

    def _dispatch(self, received: Received[Any]) -> None:
        message: Any = received.message
        if isinstance(message, self._replies):
            future = self._waiting.pop(message.request, None)
            if future is None or future.done():
                received.close()  # the asker gave up; its reply grants nothing
            else:
                future.set_result(received)
            return
        result = self._handler(self, received)
        if result is not None:
            task = asyncio.ensure_future(result)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def close(self, why: str = "closed") -> None:
        """End the connection; safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.channel.socket)
        self._loop.remove_writer(self.channel.socket)
        self.channel.close()
        for _, descriptor in self._queue:
            if descriptor is not None:
                os.close(descriptor)
        self._queue.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(PeerGone(f"the connection ended: {why}"))
        if self._gone is not None:
            self._gone(self, why)
