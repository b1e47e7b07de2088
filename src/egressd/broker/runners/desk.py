"""The runner's end of its channel to the service: what it is told, and what it says.

Nothing here waits for the service but `tell`, and that not for ever: a service that does not read holds up
its own request's output, never the clock of that request's limits.
"""

# ruff: noqa: PTH208
from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from egressd.broker.runners import jobs
from egressd.ipc.channel import Channel
from egressd.model.errors import EgressdError, ProtocolError, Refused
from egressd.model.verdicts import Reason

__all__ = ["Desk", "Stopped"]

_PATIENCE = 60.0  # seconds for one thing that the service is to do


class Stopped(EgressdError):
    """The service said `Stop`, or is gone: then nobody hears what becomes of it."""


class Desk:
    """`with` is not needed: whoever made the socket closes it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.channel: Channel[Any] = Channel(connection, jobs.TO_RUNNER)
        self.may_go = False
        self.deserted = False

    def fileno(self) -> int:
        return self.channel.fileno()

    # ---- hearing

    def heed(self) -> None:
        """Read what is there; `Stopped` if it is to end."""
        while True:
            try:
                received = self.channel.receive()
            except BlockingIOError:
                return
            except (EOFError, OSError, ProtocolError) as error:
                self.deserted = True
                raise Stopped(f"the service is gone ({error or 'end of file'})") from None
            received.close()
            match received.message:
                case jobs.Go():
                    self.may_go = True
                case jobs.Stop(why=why):
                    raise Stopped(why or "it was stopped")
                case _:
                    raise Stopped("the service said what it must not say now")

    def await_go(self) -> None:
        """Until the service says so. `Refused` if it never does."""
        end = time.monotonic() + _PATIENCE
        while not self.may_go:
            if not self._wait(select.POLLIN, end - time.monotonic()):
                raise Refused(Reason.UNAVAILABLE, f"the service did not say go within {_PATIENCE:g} s")
            self.heed()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block `Stopped` may be raised anywhere, once: for work that cannot look here itself.
        SIGIO comes for every message, and for the end (fcntl(2), O_ASYNC).

        Anywhere is also between a system call that opens something and the assignment of its number, which
        nobody then knows to close. So what the block opened is closed here, if it is left so.
        """

        def heed(_number: int, _frame: FrameType | None) -> None:
            try:
                self.heed()
            except Stopped:
                signal.signal(signal.SIGIO, signal.SIG_IGN)  # a second one would stop what clears up
                raise

        number = self.fileno()
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        known = _descriptors()
        before = signal.signal(signal.SIGIO, heed)
        try:
            fcntl.fcntl(number, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(number, fcntl.F_SETFL, flags | os.O_ASYNC)
            self.heed()  # what came before
            yield
        except Stopped:
            for stray in _descriptors() - known:
                os.close(stray)
            raise
        finally:
            fcntl.fcntl(number, fcntl.F_SETFL, flags)
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            signal.signal(signal.SIGIO, before)

    # ---- saying

    def offer(self, message: Any) -> bool:
        """Say it if there is room for it now."""
        try:
            self.channel.send(message)
        except BlockingIOError:
            return False
        except OSError:
            self.deserted = True
            raise Stopped("the service is gone") from None
        return True

    def tell(self, message: Any) -> None:
        """Say it, however long the service takes, within reason. Nothing is raised: a service that is gone,
        or does not read, does without."""
        end = time.monotonic() + _PATIENCE
        with contextlib.suppress(Stopped):
            while not self.deserted and not self.offer(message):
                if not self._wait(select.POLLOUT, end - time.monotonic()):
                    self.deserted = True  # and not waited for again

    def hang_up(self) -> None:
        """The last word has been said. What the service says now is refused at once (EPIPE): a socket that is
        closed with something unread would give ECONNRESET to who has not read all of ours yet."""
        with contextlib.suppress(OSError):
            self.channel.socket.shutdown(socket.SHUT_RD)
            while self.channel.socket.recv(1):
                pass

    def _wait(self, event: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), event)
        return seconds > 0 and bool(poll.poll(seconds * 1000))


def _descriptors() -> set[int]:
    """All that are open: the listing's own, which stands in it too, is not any more."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(int(name), fcntl.F_GETFD)
            found.add(int(name))
    return found
