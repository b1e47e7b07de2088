"""The output of a command on its way to the service, and the limits that are held on the way.

In the launcher's own poll (sandbox/launch.py, `Mover`). At most one piece waits here: while the service does
not read, the pipes are not read either, and in the end the command waits in write(2). The clock goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import Any

from egressd.broker.runners.desk import Desk, Stopped
from egressd.broker.runners.jobs import Limits, Output
from egressd.broker.runners.limits import Meter, Usage
from egressd.ipc.channel import payload
from egressd.model.errors import Refused
from egressd.sandbox.launch import Enough, Outcome
from egressd.sandbox.plan import FAILED

__all__ = ["Relay", "texts"]

_PIECE = 1 << 15  # bytes: in base64, and twice, it fits the channel
_EVERY = 0.05  # seconds between two looks at the clock of a limit
_ENDED = 128 + 9  # by us: as a command that is killed
_STOPPED = 128 + 15


def texts(limits: Limits) -> dict[str, str]:
    """How the end by each limit that we hold is put into words."""
    return {
        "cpu": f"the cpu limit of {limits.cpu:g} s is reached" if limits.cpu else "",
        "output": f"the output limit of {limits.output} bytes is reached",
        "tokens": f"the budget of {limits.tokens} tokens is spent",
        "cost": f"the budget of {limits.cost:g} is spent" if limits.cost else "",
    }


class Relay:
    """`theirs` are the command's 0, 1, 2. `hit` are the limits that were reached here."""

    def __init__(self, desk: Desk, limits: Limits, stdin: bytes) -> None:
        self.hit: set[str] = set()
        self.usage = Usage()
        self.meter: Meter | None = None
        self._desk, self._limits = desk, limits
        self._left = limits.output
        self._looked = 0.0  # when, of a clock that does not jump
        self._waiting: Any = None  # the one message that there was no room for
        self._kept: list[Output] = []  # what was in the pipes at the end
        self._reports = -1
        self._theirs = [_file_of(stdin)]
        self._streams: dict[int, Any] = {}
        for stream in ("stdout", "stderr"):
            ours, theirs = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(ours, False)
            self._streams[ours] = stream
            self._theirs.append(theirs)

    @property
    def theirs(self) -> tuple[int, ...]:
        return tuple(self._theirs)

    def begin(self, meter: Meter, reports: int, message: Any) -> None:
        """The command has them, and runs. `message` is to be told before its output."""
        self.meter, self._reports = meter, reports
        self.close_theirs()
        self._waiting = message

    def close_theirs(self) -> None:
        while self._theirs:
            os.close(self._theirs.pop())

    def close(self) -> None:
        self.close_theirs()
        while self._streams:
            os.close(self._streams.popitem()[0])

    def said(self) -> str:
        """What a sandbox that was never begun wrote to its standard error: bubblewrap's own reasons."""
        found = b""
        for number, stream in self._streams.items():
            if stream == "stderr":
                with contextlib.suppress(OSError):
                    found = os.read(number, 1024)
        return found.decode(errors="replace").strip()

    # ---- in the launcher's poll

    @property
    def pause(self) -> float | None:
        return None if self.meter is None else self.meter.pause

    def register(self, poll: select.poll) -> None:
        if self._reports >= 0:
            poll.register(self._reports, select.POLLIN)
        poll.register(self._desk.fileno(), select.POLLIN | select.POLLOUT)  # `begin` left a message

    def move(self, ready: set[int], poll: select.poll) -> None:
        if self._desk.fileno() in ready:
            self._attend(poll)
        if self._reports in ready:
            self._count(poll)
        self._check()
        for number in [n for n in self._streams if n in ready and self._waiting is None]:
            self._take(number, poll)

    def _attend(self, poll: select.poll) -> None:
        try:
            self._desk.heed()
            if self._waiting is not None and self._desk.offer(self._waiting):
                self._waiting = None
                self._listen(poll, held=False)
        except Stopped as stopped:
            self._stop(stopped)

    def _count(self, poll: select.poll) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self.usage.read(self._reports):
                poll.unregister(self._reports)
                self._reports = -1

    def _stop(self, stopped: Stopped) -> None:
        raise Enough(Outcome(_STOPPED, str(stopped))) from None

    def _listen(self, poll: select.poll, *, held: bool) -> None:
        """To the command, or else for room at the service."""
        for number in self._streams:
            if held:
                poll.unregister(number)
            else:
                poll.register(number, select.POLLIN)
        poll.modify(self._desk.fileno(), select.POLLIN | (select.POLLOUT if held else 0))

    def _check(self) -> None:
        found = set(self.usage.reached(self._limits))
        if self.meter is not None:
            self._look(self.meter)
            found |= {"cpu"} if self.meter.cpu_spent else set()  # the others end nothing by themselves
        if found:
            self._reach(*sorted(found))

    def _look(self, meter: Meter) -> None:
        """A command that writes much has us called for each piece."""
        now = time.monotonic()
        if meter.pause is None or now - self._looked < _EVERY:
            return
        self._looked = now
        try:
            meter.look()
        except Refused as refused:
            raise Enough(Outcome(FAILED, str(refused))) from refused

    def _reach(self, *names: str) -> None:
        self.hit.update(names)
        raise Enough(Outcome(_ENDED, "; ".join(texts(self._limits)[name] for name in names)))

    def _take(self, number: int, poll: select.poll) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(number, _PIECE)
            if not data:
                poll.unregister(number)
                os.close(number)
                del self._streams[number]
                return
            self._pass_on(Output(stream=self._streams[number], data=self._allowed(data)), poll)
            if "output" in self.hit:
                self._reach("output")

    def _allowed(self, data: bytes) -> bytes:
        """As much of it as may still be passed on."""
        if self._left is None:
            return data
        if len(data) > self._left:
            self.hit.add("output")
        allowed = data[: self._left]
        self._left -= len(allowed)
        return allowed

    def _pass_on(self, piece: Output, poll: select.poll) -> None:
        if not piece.data:
            return
        try:
            if not self._desk.offer(piece):
                self._waiting = piece
                self._listen(poll, held=True)
        except Stopped as stopped:
            self._stop(stopped)

    # ---- after the end

    def drain(self) -> None:
        """What is left in the pipes is kept, not sent: nothing waits for the service before all is gone. A
        pipe holds 64 KiB, or what its writer made of it, at most /proc/sys/fs/pipe-max-size."""
        if self._reports >= 0:
            with contextlib.suppress(OSError):
                while self.usage.read(self._reports):
                    pass
            self._reports = -1
        self.hit |= self.usage.reached(self._limits)
        for number, stream in self._streams.items():
            with contextlib.suppress(BlockingIOError):
                while "output" not in self.hit and (data := os.read(number, _PIECE)):
                    self._keep(stream, self._allowed(data))
        self.close()

    def _keep(self, stream: Any, data: bytes) -> None:
        if data:
            self._kept.append(Output(stream=stream, data=data))

    def send_rest(self) -> None:
        """Waits for the service."""
        for message in (self._waiting, *self._kept):
            if message is not None:
                self._desk.tell(message)
        self._waiting = None
        self._kept.clear()


def _file_of(data: bytes) -> int:
    """The command's standard input: a file that nobody can change, so that nobody has to feed a pipe."""
    with payload(data) as sealed:
        os.lseek(sealed, 0, os.SEEK_SET)
        return os.dup(sealed)
