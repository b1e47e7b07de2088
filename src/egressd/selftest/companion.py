"""A process of the caller's in the sandbox's own network, where no filter holds and every capability is its.

It plays the caller that turns against its sandbox's link (`frames`), and counts what went into the link on
that side: what the kernel says to have sent there is compared with what the gateway's end has counted.
It is forked by the judge, which must have no threads (setns(2), CLONE_NEWUSER), and ends with it.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH123
from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import Any, Self

from egressd.model.errors import KernelError
from egressd.sandbox import plumb

__all__ = ["Companion"]

_PATIENCE = 10.0  # seconds
_READY, _SENT, _FAILED = b"r", b"s", b"f"


class Companion:
    """`with Companion(first) as c: c.send(frame); c.sent()`. `first`: the pid of the sandbox's first process,
    which must be held by a pidfd."""

    def __init__(self, first: int) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_PATIENCE)
        namespace = os.open(f"/proc/{first}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid == 0:
            self._channel.close()
            _serve(theirs, namespace)  # never returns
        theirs.close()
        os.close(namespace)
        try:
            self._expect(_READY)
        except BaseException:
            self.close()
            raise

    def send(self, frame: bytes) -> None:
        """Put these bytes on the link as they are. OSError where the sandbox's kernel does not take them."""
        self._channel.send(_SENT + frame)
        self._expect(_SENT)

    def sent(self) -> int:
        """Frames that the sandbox's end of the link has sent."""
        self._channel.send(_READY)
        (number,) = struct.unpack("=Q", self._expect(_READY))
        return int(number)

    def _expect(self, wanted: bytes) -> bytes:
        said = self._channel.recv(4096)
        if said[:1] == _FAILED:
            code = int.from_bytes(said[1:5], "little")
            raise OSError(code, os.strerror(code))
        if said[:1] != wanted:
            raise KernelError("the process in the sandbox's network has ended")
        return said[1:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _serve(channel: socket.socket, namespace: int) -> None:
    try:
        plumb.enter(namespace)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as wire:
            wire.bind((plumb.DEVICE, 0))
            channel.send(_READY)
            while data := channel.recv(1 << 16):
                channel.send(_done(data, wire))
    except OSError as error:
        with contextlib.suppress(OSError):
            channel.send(_FAILED + (error.errno or 0).to_bytes(4, "little"))
    finally:
        os._exit(0)


def _done(data: bytes, wire: socket.socket) -> bytes:
    if data[:1] == _READY:
        return _READY + struct.pack("=Q", _frames())
    try:
        wire.send(data[1:])
    except OSError as error:
        return _FAILED + (error.errno or 0).to_bytes(4, "little")
    return _SENT


def _frames() -> int:
    """The tenth number of the device's line (proc(5), /proc/net/dev): packets sent."""
    with open("/proc/self/net/dev", encoding="ascii") as stream:
        for line in stream:
            name, _, numbers = line.partition(":")
            if name.strip() == plumb.DEVICE:
                return int(numbers.split()[9])
    # what ran inside may have renamed it: then nothing can be said, and 0 would say that nothing was sent
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), plumb.DEVICE)
