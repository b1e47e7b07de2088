"""A channel: typed messages over one SOCK_SEQPACKET socket, with at most one descriptor each.

Rules of this file: a message is read whole or not at all; anything unexpected (a truncated datagram, an
unknown type or field, a descriptor too many or too few, an unsealed payload) is a `ProtocolError`, every
descriptor that came with it is closed, and the caller is expected to end the connection. Nothing is
repaired. SOCK_SEQPACKET keeps message boundaries (unix(7)), so "half a message" cannot occur without
being seen as one.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Generic, TypeVar

import msgspec

from egressd.ipc import messages
from egressd.model.errors import ProtocolError

__all__ = ["MAX_MESSAGE", "Channel", "PeerCredentials", "Received", "pair", "payload", "peer_credentials"]

MAX_MESSAGE = 1 << 17  # bytes; SetNat at its bound is about 70 kB
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_CARRY_DESCRIPTOR = (messages.OpenLink, messages.Attach, messages.Resume, messages.NewPeer)
_MAY_CARRY_DESCRIPTOR = messages.KeepLink
_CUT_SHORT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)  # made once: an enum's `|` takes long
_DESCRIPTORS = socket.CMSG_SPACE(4 * struct.calcsize("i"))  # room to see that more than one was sent

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """SO_PEERCRED (unix(7)): who connected, as the kernel recorded it at connect()."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return PeerCredentials(*struct.unpack("iII", raw))


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, close-on-exec, with room for one largest message and its peers."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE)
    return ends


@contextlib.contextmanager
def payload(data: bytes) -> Iterator[int]:
    """A sealed memfd holding `data`: the receiver can map it knowing that it will not change."""
    descriptor = os.memfd_create("egressd-payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(data)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class Received(Generic[R]):
    """One message and the descriptor that came with it, which the receiver must `take` or `close`."""

    message: R
    descriptor: int | None = None

    def take(self) -> int:
        """Hand over ownership of the descriptor."""
        if self.descriptor is None:
            raise ProtocolError(f"{type(self.message).__name__} came without its descriptor")
        descriptor, self.descriptor = self.descriptor, None
        return descriptor

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.take())

    def payload(self) -> bytes:
        """Read and close the sealed memfd."""
        descriptor = self.take()
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ProtocolError("the payload is not sealed")
            length: int = self.message.payload_length  # type: ignore[attr-defined]
            data = os.pread(descriptor, length + 1, 0)
            if len(data) != length:
                raise ProtocolError(f"the payload holds {len(data)} bytes instead of {length}")
        except OSError as error:  # EINVAL: not a memfd at all
            raise ProtocolError(f"the payload cannot be read: {error}") from error
        else:
            return data
        finally:
            os.close(descriptor)


def decode_address(kind: type, value: Any) -> Any:
    """msgspec's dec_hook for the two types it does not know; ValueError as `ipaddress` raises it, and for
    what is no text (`ipaddress` takes numbers, too)."""
    if kind not in (IPv4Address, IPv6Address):
        raise NotImplementedError(f"{kind} is not part of any message")
    if not isinstance(value, str):
        raise ValueError(f"an address is text, not {type(value).__name__}")  # noqa: TRY004 -- see above
    return kind(value)


class Channel(Generic[R]):
    """One end. `receives` is the closed union of what may arrive here; sending is not restricted,
    since the other end checks."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self.socket = sock
        self.descriptors = True  # False: whatever is sent along leads nowhere, see `only_namespaces`
        self.throw_away: Callable[[int], None] | None = None  # see `only_namespaces`
        self._encoder = msgspec.json.Encoder(enc_hook=str)
        self._decoder: msgspec.json.Decoder[R] = msgspec.json.Decoder(receives, dec_hook=decode_address)

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def send(self, message: Any, *, descriptor: int | None = None) -> None:
        """Send one message. OSError as the socket gives it (BlockingIOError when it is full)."""
        data = self._encoder.encode(message)
        if len(data) > MAX_MESSAGE:
            raise ProtocolError(f"{type(message).__name__} of {len(data)} bytes is too large")
        ancillary = []
        if descriptor is not None:
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor])))
        self.socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)

    def receive(self) -> Received[R]:
        """The next message. EOFError at the end; BlockingIOError if the socket is non-blocking and
        empty; ProtocolError for anything that is not a whole, known, well-formed message."""
        room = _DESCRIPTORS if self.descriptors else 0
        data, ancillary, flags, _ = self.socket.recvmsg(MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
        descriptors = [self._let_in(descriptor) for descriptor in _descriptors(ancillary)]
        if not room and flags & socket.MSG_CTRUNC:  # there was one; without room for it the kernel let it go
            flags, descriptors = flags & ~socket.MSG_CTRUNC, [_nowhere()]
        try:
            message = self._decode(data, flags, len(descriptors))
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return Received(message, descriptors[0] if descriptors else None)

    def only_namespaces(self, throw_away: Callable[[int], None]) -> None:
        """Take in no descriptor but of a namespace; instead of another one, one that leads nowhere.

        The other end may be anybody, and close(2) of a file waits for who serves its file system: with FUSE
        that is anybody, too, and not even SIGKILL ends the wait (fuse_flush, request_wait_answer). So what
        came goes to `throw_away`, which must not close it in a thread that has something else to do.
        """
        self.throw_away = throw_away

    def _let_in(self, descriptor: int) -> int:
        if self.throw_away is None or _is_namespace(descriptor):
            return descriptor
        self.throw_away(descriptor)
        return _nowhere()

    def decode(self, data: bytes, flags: int = 0) -> R:
        """A message that was received without room for descriptors; `flags` of recvmsg(2). Raises as
        `receive` does."""
        return self._decode(data, flags, 0)

    def _decode(self, data: bytes, flags: int, descriptors: int) -> R:
        if not data and not descriptors:
            raise EOFError
        if flags & _CUT_SHORT:
            raise ProtocolError("the message is larger than any message may be")
        try:
            message = self._decoder.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"not a message: {error}") from error
        expected = isinstance(message, _CARRY_DESCRIPTOR) or hasattr(message, "payload_length")
        optional = descriptors == 1 and isinstance(message, _MAY_CARRY_DESCRIPTOR)
        if descriptors != int(expected) and not optional:
            raise ProtocolError(f"{type(message).__name__} came with {descriptors} descriptors")
        return message


def _is_namespace(descriptor: int) -> bool:
    """By the name that only a file of nsfs has (ns_dname in fs/nsfs.c), so that no file system is asked
    anything. A file's own path begins with a slash."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("net:[")  # noqa: PTH115 -- no path
    except OSError:
        return False


def _nowhere() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    if not ancillary:
        return []
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
