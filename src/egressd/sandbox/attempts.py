"""Which process of the sandbox tried what the gateway is about to refuse.

The kernel holds the first packet of such an attempt (queueing.py) until it was looked at here: whose socket
sent it, which process has that socket, what that process is. Then it goes on, whatever was found.

A process of its own does that (`Witness`), the one that laid the network (plumb.py), and the broker hears of
it (`Reports`). For what is held waits, and the broker may be stopped, or be a thread of a busy program. TCP
does not help: it repeats nothing while the first packet is still on this machine (skb_still_in_host_queue),
so a connection that a stopped broker held hung until the broker went on (tried).

It is a claim, made by the caller's own broker about the caller's own processes, and recorded as one. Whoever
lives in the sandbox can name itself as it likes, pass its sockets on, or be gone before anybody looks. What
is read of a process is foreign text: cut to a length, spelled in printable characters, and not understood.

Nobody waits long: a look that takes more than 20 ms is given up, what comes faster than 20 a second goes on
unseen, and when this process ends, for whatever reason, the kernel holds nothing any more.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH115, PTH123, PTH208
from __future__ import annotations

import contextlib
import errno
import os
import select
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from egressd.ipc import messages

if TYPE_CHECKING:
    from egressd.packets.headers import Attempt
    from egressd.packets.nfqueue import Held

__all__ = ["ATTEMPTS", "PER_SECOND", "Budget", "Culprit", "Reports", "Witness", "family", "printable"]

PER_SECOND, ATTEMPTS = 20, 10_000  # told of one sandbox
_PATIENCE = 0.02  # seconds for one look
_BRIEF = 5  # milliseconds that the shortest commands take
_FAREWELL = 0.1  # seconds for the last ones
_EXECUTABLE, _COMMAND = 1024, 2048  # characters, as `messages.Attempt` bounds them
_ICMP, _ICMPV6 = 1, 58  # linux/in.h
_DATAGRAM = 1 << 14  # bytes: one packet's headers and what is told about it
_NOTHING = bytes([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17]) + bytes(18)  # a datagram from nowhere to nowhere
_REPORT = 1 << 16  # bytes: one claim as JSON


@dataclass(frozen=True, slots=True)
class Culprit:
    """A process. `pid` as it is seen inside; None for one of the caller's that is not of the sandbox."""

    pid: int | None
    executable: str
    command: str


class Budget:
    """How many are told. `now` in seconds, of a clock that does not jump."""

    def __init__(self) -> None:
        self.left = ATTEMPTS
        self._second, self._within = float("-inf"), 0

    def allows(self, now: float) -> bool:
        if now - self._second >= 1.0:
            self._second, self._within = now, 0
        if self._within >= PER_SECOND or self.left <= 0:
            return False
        self._within += 1
        self.left -= 1
        return True


class Reports:
    """The broker's end. `fileno` is for its poll; `read` when it is readable."""

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self._channel, self._pid = channel, pid
        channel.setblocking(False)

    def fileno(self) -> int:
        return self._channel.fileno()

    def read(self) -> Iterator[messages.Attempt]:
        """What has been told. EOFError if there will be no more."""
        while True:
            try:
                data = self._channel.recv(_REPORT)
                if not data:
                    raise EOFError
                yield msgspec.json.decode(data, type=messages.Attempt)
            except BlockingIOError:
                return
            except (OSError, msgspec.DecodeError) as error:
                raise EOFError from error

    def finish(self) -> Iterator[messages.Attempt]:
        """Have what is held looked at a last time, and hear the rest; not for long."""
        self._channel.shutdown(socket.SHUT_WR)
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        end = time.monotonic() + _FAREWELL
        with contextlib.suppress(EOFError):
            while poll.poll(max(0.0, end - time.monotonic()) * 1000):
                yield from self.read()

    def close(self) -> None:
        """It has ended by itself if it was told to finish, unless somebody has stopped it."""
        self._channel.close()
        os.kill(self._pid, signal.SIGKILL)  # ours and not reaped: the number is still its own
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


class Witness:
    """In the process that looks. `first` is the sandbox's first process: while it lives its number is its
    own, and when it is dead nobody is left in there."""

    def __init__(self, *, queue: int, asking: int, first: int) -> None:
        self._queue, self._asking, self._first = queue, asking, first
        self._budget = Budget()
        self._last: int | None = None  # who was found the last time: mostly the same

    def serve(self, channel: socket.socket) -> None:
        """Until the broker has had enough, or has gone; closes the channel. OSError if the queue is of no use
        any more."""
        _keep_only(channel.fileno(), self._queue, self._asking)
        channel.setblocking(False)
        poll = select.poll()
        for source in (channel, self._queue):
            poll.register(source, select.POLLIN)
        events = poll.poll(_BRIEF)
        if not events:
            self._rehearse()
        while True:
            over = any(number != self._queue for number, _ in events)
            if any(number == self._queue for number, _ in events):
                self._tell(channel)
            if over:
                channel.close()  # who waits for that need not wait until our memory is given back
                return
            events = poll.poll()

    def _rehearse(self) -> None:
        """Import what a look needs, and touch the memory of one: 4 ms, for which nobody shall wait, neither
        who tries, nor the end of a short run. The first look is then as quick as others; without, it comes
        too late for nearly all datagrams whose sender ends at once."""
        from egressd.packets import headers, inet_diag, nfqueue  # noqa: PLC0415

        nfqueue.parse(nfqueue.accept(nfqueue.Held(0, 0, 0, b"")))
        nothing = headers.parse(_NOTHING)
        with contextlib.suppress(OSError):
            os.write(self._asking, inet_diag.question(nothing) or b"")
            inet_diag.inode(os.read(self._asking, _DATAGRAM))
            for pid in family(self._first):
                _has(pid, "", time.monotonic() + _PATIENCE)
            msgspec.json.encode(_claim(nothing, _culprit(self._first, first=self._first)))

    def _tell(self, channel: socket.socket) -> None:
        while (claims := self.look()) is not None:
            for claim in claims:
                with contextlib.suppress(BlockingIOError):  # who does not listen misses it
                    channel.send(msgspec.json.encode(claim))

    def look(self) -> list[messages.Attempt] | None:
        """Let go what is held, and say whose it was. None if nothing is held. OSError if the queue is of no
        use any more."""
        from egressd.packets import nfqueue  # noqa: PLC0415

        try:
            datagram = os.read(self._queue, _DATAGRAM)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # what did not fit went on unseen
                raise
            return []
        claims = []
        for held in nfqueue.parse(datagram):
            if isinstance(held, nfqueue.Held):
                try:
                    claim = self._judge(held)
                finally:
                    os.write(self._queue, nfqueue.accept(held))
                claims += [claim] if claim is not None else []
        return claims

    def _judge(self, held: Held) -> messages.Attempt | None:
        from egressd.packets import headers  # noqa: PLC0415

        if not self._budget.allows(time.monotonic()):
            return None
        attempt = headers.parse(held.payload, ethertype=held.ethertype)
        with contextlib.suppress(OSError):  # gone meanwhile
            return _claim(attempt, self._culprit(attempt, held.payload))
        return None

    # ---- from the packet to the process

    def _culprit(self, attempt: Attempt, packet: bytes) -> Culprit | None:
        inode = self._inode(attempt, packet)
        if inode is None:
            return None
        deadline = time.monotonic() + _PATIENCE
        name = f"socket:[{inode}]"
        for pid in self._candidates(deadline):
            if _has(pid, name, deadline):
                self._last = pid
                return _culprit(pid, first=self._first)
            if time.monotonic() > deadline:
                break
        return None

    def _inode(self, attempt: Attempt, packet: bytes) -> int | None:
        from egressd.packets import inet_diag  # noqa: PLC0415

        question = inet_diag.question(attempt)
        if question is None:
            return self._unconnected(attempt, packet)
        os.write(self._asking, question)
        return inet_diag.inode(os.read(self._asking, _DATAGRAM))

    def _unconnected(self, attempt: Attempt, packet: bytes) -> int | None:
        """Neither TCP nor UDP: a ping socket by its identifier, else the raw socket of the protocol."""
        from egressd.packets import inet_diag  # noqa: PLC0415

        six = "6" if attempt.family == "ipv6" else ""
        number = attempt.number
        if number is None:
            return None
        tables = [("raw", number)]
        if number in (_ICMP, _ICMPV6) and not attempt.options:
            at = 44 if six else 24
            tables.insert(0, ("icmp", int.from_bytes(packet[at : at + 2], "big")))
        for name, port in tables:
            with open(f"/proc/{self._first}/net/{name}{six}", "rb") as stream:
                found = inet_diag.row(stream.read(1 << 16), port)
            if found is not None:
                return found
        return None

    def _candidates(self, deadline: float) -> Iterator[int]:
        """Who may have the socket: who had the last one, the sandbox's processes, others in its network."""
        if self._last is not None:
            yield self._last
        yield from family(self._first)
        network = os.readlink(f"/proc/{self._first}/ns/net")
        for name in os.listdir("/proc"):
            if time.monotonic() > deadline:
                return
            with contextlib.suppress(OSError):
                if name.isdigit() and os.readlink(f"/proc/{name}/ns/net") == network:
                    yield int(name)


def _keep_only(*numbers: int) -> None:
    """Close all that came along from the broker: pipes whose end somebody waits for, others' leases."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in numbers:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def family(first: int) -> Iterator[int]:
    """A process and all that descend from it (CONFIG_PROC_CHILDREN): of the first of a sandbox, all of that,
    since what loses its parent in there becomes a child of it."""
    waiting = [first]
    while waiting:
        pid = waiting.pop(0)
        yield pid
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                children = f"/proc/{pid}/task/{thread}/children"
                with contextlib.suppress(OSError), open(children, "rb") as stream:  # it may just have ended
                    waiting += map(int, stream.read().split())


def _has(pid: int, name: str, deadline: float) -> bool:
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{number}") == name:
                    return True
            if time.monotonic() > deadline:
                break
    return False


def _culprit(pid: int, *, first: int) -> Culprit:
    """OSError when it has just gone."""
    executable = os.readlink(f"/proc/{pid}/exe".encode())
    with open(f"/proc/{pid}/cmdline", "rb") as stream:
        words = stream.read(2 * _COMMAND).removesuffix(b"\0").split(b"\0")
    inside = os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{first}/ns/pid")
    return Culprit(
        pid=_pid_inside(pid) if inside else None,
        executable=printable(executable)[:_EXECUTABLE],
        command=shlex.join(map(printable, words))[:_COMMAND],
    )


def _pid_inside(pid: int) -> int | None:
    """The last of NSpid is the number in the innermost namespace (proc_pid_status(5))."""
    with open(f"/proc/{pid}/status", "rb") as stream:
        for line in stream:
            if line.startswith(b"NSpid:"):
                return int(line.split()[-1])
    return None


def printable(data: bytes) -> str:
    """UTF-8 as far as it is that, and nothing that a terminal would act on."""
    text = data.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _claim(attempt: Attempt, culprit: Culprit | None) -> messages.Attempt | None:
    """None where nobody was found: that there was an attempt, the gateway records itself."""
    if culprit is None or attempt.destination is None:
        return None
    return messages.Attempt(
        protocol=attempt.protocol,
        destination=str(attempt.destination),
        port=attempt.destination_port,
        pid=culprit.pid,
        executable=culprit.executable,
        command=culprit.command,
    )
