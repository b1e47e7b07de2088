"""What one process tells the auditor: its socket, read many messages at a time.

Nearly all messages are events of a kind that came before: the same event with fields of the same names. A
run of them is decoded in one call, spelled in one call, and handed on as one sheaf. Whatever is not like that
-- another message, a name that was not seen yet, a text in other letters, a very long or malformed message --
goes through `Channel.decode`, one by one; and no message is taken here that is refused there.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from egressd.ipc import messages
from egressd.ipc.channel import MAX_MESSAGE, Channel
from egressd.journal import records
from egressd.model.errors import ProtocolError
from egressd.processes.batches import Inbox
from egressd.processes.journal_file import Sheaf, timestamp

__all__ = ["Teller", "inbox"]

_LITTLE = 2048  # bytes of a message: its texts together have fewer characters than `records.spelled` allows
_MOST_KINDS = 1024  # more than our own processes tell of


class _Plain(
    msgspec.Struct,
    frozen=True,
    tag_field="type",
    tag="Event",
    forbid_unknown_fields=True,
    kw_only=True,
    gc=False,
):
    """An Event whose values `records.spelled` can spell; of its names nothing is known yet."""

    process: str
    event: str
    fields: dict[
        str,
        Annotated[str, Meta(max_length=records.MAX_TEXT)]
        | Annotated[int, Meta(gt=-(1 << 62), lt=1 << 62)]
        | Annotated[float, Meta(gt=-1e15, lt=1e15)]
        | bool
        | None,
    ]


# Losses are here because a type that is alone needs no tag, and Event does.
_decode_lines = msgspec.json.Decoder(_Plain | messages.Losses).decode_lines


def inbox() -> Inbox:
    """For all sockets of a process."""
    return Inbox(MAX_MESSAGE)


def _decoded(data: list[bytes]) -> list[Any] | None:
    """The messages, if all of them are plain. Each begins and ends with a brace and has no newline: so none
    continues in the next (in a text the newline between them is refused, and in an object no brace follows
    another), and as there are as many values as messages, each is one."""
    text = b"\n".join(data)
    seams = len(data) - 1
    if not (text.startswith(b"{") and text.endswith(b"}")):
        return None
    if text.count(b"\n") != seams or text.count(b"}\n{") != seams or max(map(len, data)) > _LITTLE:
        return None
    try:
        found = _decode_lines(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return found if len(found) == len(data) else None


class Teller:
    """The reading end. `heard` gets each message that is looked at alone, and says whether further ones like
    it (the same event, the same names) may go into sheaves; `sheaf` gets those. `gone` is called once, with
    the reason."""

    def __init__(
        self,
        sock: socket.socket,
        process: str,
        inbox: Inbox,
        *,
        heard: Callable[[Any], bool],
        sheaf: Callable[[Sheaf], object],
        gone: Callable[[Teller, str], None],
    ) -> None:
        sock.setblocking(False)
        self.channel: Channel[Any] = Channel(sock, messages.TO_AUDITOR)
        self._process, self._inbox = process, inbox
        self._heard, self._sheaf, self._gone = heard, sheaf, gone
        self._kinds: dict[tuple[str, tuple[str, ...]], bytes] = {}
        self._loop = asyncio.get_running_loop()
        self.closed = False
        self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        self.read(Inbox.COUNT)

    def read(self, most: int) -> None:
        """Take in what has come, at most so many messages; the loop does so by itself, in its own time."""
        while most > 0 and not self.closed:
            asked = min(most, Inbox.COUNT)
            try:
                data, flags = self._inbox.receive(self.channel.fileno(), asked)
            except BlockingIOError:
                return
            except OSError as error:
                self.close(str(error))
                return
            self._take(data, flags)
            most -= asked
            if len(data) < asked:
                return

    def _take(self, data: list[bytes], flags: list[int]) -> None:
        events = None if any(flags) else _decoded(data)
        if events is None:
            for message, flag in zip(data, flags, strict=True):
                self._alone(message, flag)
            return
        kinds, process = self._kinds, self._process
        start = 0
        frames: list[bytes] = []
        for at, event in enumerate(events):
            if type(event) is _Plain and event.process == process:
                frame = kinds.get((event.event, tuple(event.fields)))
                if frame is not None:
                    frames.append(frame)
                    continue
            self._together(data, events, frames, start)
            self._alone(data[at], 0)
            start, frames = at + 1, []
        self._together(data, events, frames, start)

    def _together(self, data: list[bytes], events: list[Any], frames: list[bytes], start: int) -> None:
        """A run of events of known kinds, as many as there are frames."""
        if not frames or self.closed:
            return
        end = start + len(frames)
        spelled = records.spelled([event.fields for event in events[start:end]])
        if spelled is not None:
            self._sheaf(Sheaf(timestamp(), self._process, frames, spelled))
            return
        for message in data[start:end]:
            self._alone(message, 0)

    def _alone(self, data: bytes, flags: int) -> None:
        if self.closed:
            return
        try:
            message = self.channel.decode(data, flags)
        except EOFError:
            self.close("it ended")
            return
        except ProtocolError as error:
            self.close(str(error))
            return
        if self._heard(message) and message.process == self._process:
            self._learn(message.event, tuple(message.fields))

    def _learn(self, event: str, names: tuple[str, ...]) -> None:
        frame = records.frame(event=event, process=self._process, names=names)
        if frame is not None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            self._kinds[event, names] = frame

    def close(self, why: str = "closed") -> None:
        """End the connection; safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.channel.socket)
        self.channel.close()
        self._gone(self, why)
