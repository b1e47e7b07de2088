"""The pipes of a run that is given its input or whose output is kept, inside the launcher's own poll.

The numbers -1 (PIPE), -2 (STDOUT) and -3 (DEVNULL) are subprocess's; it is not imported for three numbers.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import IO, Any

__all__ = ["Pump"]

PIPE, STDOUT, DEVNULL = -1, -2, -3
_CHUNK = 1 << 16


class Pump:
    """`theirs` are the descriptors the command gets as 0, 1, 2. `out` and `err` are what came, or None."""

    def __init__(
        self,
        *,
        input: bytes | str | None,
        stdin: int | IO[Any] | None,
        stdout: int | IO[Any] | None,
        stderr: int | IO[Any] | None,
        text: bool,
    ) -> None:
        if input is not None and stdin is not None:
            raise ValueError("stdin and input cannot both be given")
        self._text = text
        self._input = memoryview(input.encode() if isinstance(input, str) else input or b"")
        self._feed = -1
        self._kept: dict[int, bytearray] = {}  # our end of a pipe -> what came through
        self._outputs: list[bytearray | None] = [None, None]
        self._to_close: list[int] = []
        try:
            first = self._in(PIPE if input is not None else stdin)
            second = self._out(stdout, 0)
            third = second if stderr == STDOUT else self._out(stderr, 1)
        except BaseException:
            self.close()
            raise
        self.theirs = (first, second, third)

    def __enter__(self) -> Pump:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def out(self) -> bytes | str | None:
        return self._kept_as(0)

    @property
    def err(self) -> bytes | str | None:
        return self._kept_as(1)

    def _kept_as(self, which: int) -> bytes | str | None:
        data = self._outputs[which]
        if data is None:
            return None
        return data.decode(errors="replace") if self._text else bytes(data)

    def _in(self, wanted: int | IO[Any] | None) -> int:
        if wanted != PIPE:
            return self._plain(wanted, 0)
        theirs, self._feed = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._feed, False)
        self._to_close.append(theirs)
        return theirs

    def _out(self, wanted: int | IO[Any] | None, which: int) -> int:
        if wanted != PIPE:
            return self._plain(wanted, which + 1)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ours, False)
        self._to_close.append(theirs)
        self._outputs[which] = self._kept[ours] = bytearray()
        return theirs

    def _plain(self, wanted: int | IO[Any] | None, default: int) -> int:
        if wanted is None:
            return default
        if wanted == DEVNULL:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            self._to_close.append(null)
            return null
        return wanted if isinstance(wanted, int) else wanted.fileno()

    def close_theirs(self) -> None:
        """Once the command has them."""
        while self._to_close:
            os.close(self._to_close.pop())

    def close(self) -> None:
        self.close_theirs()
        self._end_feed()
        while self._kept:
            os.close(self._kept.popitem()[0])

    def _end_feed(self) -> None:
        if self._feed >= 0:
            os.close(self._feed)
            self._feed = -1

    # ---- in the launcher's poll

    @property
    def pause(self) -> float | None:
        """There is nothing here that waits for a time."""
        return None

    def register(self, poll: select.poll) -> None:
        for number in self._kept:
            poll.register(number, select.POLLIN)
        if self._feed >= 0:
            poll.register(self._feed, select.POLLOUT)

    def move(self, ready: set[int], poll: select.poll) -> None:
        if self._feed in ready:
            feed = self._feed
            if not self._give():
                poll.unregister(feed)
                self._end_feed()
        for number in [n for n in self._kept if n in ready]:
            if not self._take(number):
                poll.unregister(number)
                os.close(number)
                del self._kept[number]

    def _give(self) -> bool:
        """Write some of the input; False when there is no more, or nobody to read it."""
        try:
            written = os.write(self._feed, self._input[:_CHUNK])
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        self._input = self._input[written:]
        return bool(self._input)

    def _take(self, number: int) -> bool:
        """Read some of an output; False at its end."""
        try:
            data = os.read(number, _CHUNK)
        except BlockingIOError:
            return True
        self._kept[number] += data
        return bool(data)

    def drain(self) -> None:
        """After the sandbox's end: what is still in the pipes. Nobody is left to write to them."""
        self._end_feed()
        for number, data in self._kept.items():
            with contextlib.suppress(BlockingIOError):
                while piece := os.read(number, _CHUNK):
                    data.extend(piece)
