"""One netlink socket, and what is said over it.

Messages are encoded with pyroute2's classes and sent over a plain socket, many in one sendmsg(2), because
a link costs a handful of them and pyroute2's own sockets run an event loop per call (milliseconds each).
Rules of this file: every request asks for an acknowledgement, every acknowledgement is read, and a refused
message raises with the kernel's own words (NETLINK_EXT_ACK).

Layouts: linux/netlink.h; attributes are (u16 length, u16 type, value, padding to 4).
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from egressd.model.errors import KernelError

__all__ = ["Netlink", "NetlinkError", "Reply", "Request", "attribute", "attributes", "encode", "enlarge"]

ROUTE, NETFILTER = 0, 12  # linux/netlink.h
ACK, REQUEST, DUMP = 0x004, 0x001, 0x300
REPLACE, EXCLUSIVE, CREATE = 0x100, 0x200, 0x400
_SOL_NETLINK, _ADD_MEMBERSHIP, _CAP_ACK, _EXT_ACK, _STRICT_CHECK = 270, 1, 10, 11, 12
_ERROR, _DONE = 2, 3
_BATCH_BEGIN, _BATCH_END = 16, 17  # NFNL_MSG_BATCH_*, linux/netfilter/nfnetlink.h
_DUMP_INTERRUPTED, _ACK_TLVS, _CAPPED = 0x10, 0x200, 0x100
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # NLA_F_NESTED and NLA_F_NET_BYTEORDER off
_CHUNK = 64  # messages in one sendmsg: their acknowledgements fit the default receive buffer
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h


class NetlinkError(KernelError):
    """The kernel refused one message. `number` is the errno, `what` the request's description."""

    def __init__(self, number: int, what: str, text: str = "") -> None:
        self.number, self.what = number, what
        super().__init__(f"{what}: {os.strerror(number)}{f' ({text})' if text else ''}")


@dataclass(frozen=True, slots=True)
class Request:
    """One message without its header, and what it is for. An errno in `tolerate` counts as success."""

    kind: int
    body: bytes
    what: str
    flags: int = 0
    tolerate: frozenset[int] = field(default=frozenset())


class Reply(NamedTuple):
    kind: int
    port: int  # who asked for the change, in a notification; 0 is the kernel itself
    body: bytes


def encode(cls: Any, attrs: list[tuple[str, Any]], **fields: Any) -> bytes:
    """The body (after nlmsghdr) of a message of one of pyroute2's classes."""
    unknown = [name for name, _ in attrs if name not in _attribute_names(cls)]
    if unknown:  # pyroute2 would leave it out and say nothing: a rule without its `iif` is another rule
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}")
    message = cls()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attrs
    message["header"] = {"type": 0, "flags": 0, "sequence_number": 0, "pid": 0}
    message.encode()
    return bytes(message.data[_HEADER.size :])


@functools.cache
def _attribute_names(cls: Any) -> frozenset[str]:
    return frozenset(name for entry in cls.nla_map for name in entry if isinstance(name, str))


def attribute(kind: int, value: bytes, *, nested: bool = False) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind | (0x8000 if nested else 0)) + value + bytes(-length % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The (type, value) pairs of an attribute area; stops at the first that does not fit."""
    at, end = 0, len(data)
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > end:
            return
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def enlarge(sock: socket.socket, size: int) -> None:
    """Set the receive buffer, beyond net.core.rmem_max where that is allowed: in a child user namespace it
    is not (sk_setsockopt asks for CAP_NET_ADMIN over init's), and a smaller one means earlier losses."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


class Netlink:
    """A socket of one netlink protocol in the namespace it was made in. Not for use by several threads."""

    def __init__(self, protocol: int, *, groups: Sequence[int] = (), buffer: int = 0) -> None:
        """`groups` are multicast groups to join; `buffer` the receive buffer in bytes (CAP_NET_ADMIN)."""
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        try:
            if buffer:
                enlarge(self.socket, buffer)
            for option in (_CAP_ACK, _EXT_ACK, _STRICT_CHECK):
                self.socket.setsockopt(_SOL_NETLINK, option, 1)
            self.socket.bind((0, 0))
            for group in groups:
                self.socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError as error:
            self.socket.close()
            raise KernelError(f"a netlink socket cannot be made: {error.strerror}") from error
        self.port: int = self.socket.getsockname()[0]

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def run(self, requests: Sequence[Request]) -> None:
        """Send all and read every acknowledgement. NetlinkError for the first that was refused; the
        kernel has then still tried the others of its chunk."""
        for start in range(0, len(requests), _CHUNK):
            self._run(requests[start : start + _CHUNK])

    def _run(self, requests: Sequence[Request]) -> None:
        waiting: dict[int, Request] = {}
        data = b""
        for request in requests:
            sequence = self._next()
            waiting[sequence] = request
            flags = request.flags | REQUEST | ACK
            length = _HEADER.size + len(request.body)
            data += _HEADER.pack(length, request.kind, flags, sequence, 0) + request.body
            data += bytes(-length % 4)
        self.socket.send(data)
        refused: NetlinkError | None = None
        while waiting:
            for kind, flags, sequence, _, body in self._receive():
                if kind != _ERROR or sequence not in waiting:
                    continue
                request = waiting.pop(sequence)
                error = _refusal(flags, body, request)
                refused = refused or error
        if refused is not None:
            raise refused

    def transact(self, subsystem: int, requests: Sequence[Request]) -> None:
        """One batch of a subsystem of nfnetlink: all of it or nothing. NetlinkError for the first that was
        refused."""
        ends = struct.pack("=BBH", 0, 0, socket.htons(subsystem))  # struct nfgenmsg
        begin = last = self._next()
        sent = {begin: requests[0]}  # what is refused as a whole
        data = _message(_BATCH_BEGIN, REQUEST, begin, ends)
        for number, request in enumerate(requests, 1):
            last = self._next()
            sent[last] = request
            acknowledged = ACK if number == len(requests) else 0
            data += _message(request.kind, request.flags | REQUEST | acknowledged, last, request.body)
        self.socket.send(data + _message(_BATCH_END, REQUEST, self._next(), ends))
        refused: NetlinkError | None = None
        done = False
        while not done:
            # In order, but that an error of the whole comes before all others (nfnetlink_rcv_batch).
            for kind, flags, sequence, _, body in self._receive():
                if kind == _ERROR and sequence in sent:
                    refused = refused or _refusal(flags, body, sent[sequence])
                    done |= sequence in (begin, last)
        if refused is not None:
            raise refused

    def ask(self, request: Request) -> list[Reply]:
        """Send one request and collect its replies: a dump, or a single object."""
        for _ in range(8):
            replies, interrupted = self._ask(request)
            if not interrupted:
                return replies
        raise NetlinkError(errno.EINTR, request.what, "the tables keep changing while they are read")

    def _ask(self, request: Request) -> tuple[list[Reply], bool]:
        sequence = self._next()
        dump = bool(request.flags & DUMP)
        flags = request.flags | REQUEST | (0 if dump else ACK)
        length = _HEADER.size + len(request.body)
        self.socket.send(_HEADER.pack(length, request.kind, flags, sequence, 0) + request.body)
        replies: list[Reply] = []
        interrupted = False
        while True:
            for kind, reply_flags, number, port, body in self._receive():
                if number != sequence:
                    continue
                interrupted |= bool(reply_flags & _DUMP_INTERRUPTED)
                if kind in (_ERROR, _DONE):
                    refused = _refusal(reply_flags, body, request) if len(body) >= 4 else None
                    if refused is not None:
                        raise refused
                    return replies, interrupted
                replies.append(Reply(kind, port, body))

    def events(self) -> Iterator[Reply]:
        """Notifications that have arrived; never waits. NetlinkError(ENOBUFS) if some were lost."""
        while True:
            try:
                received = list(self._receive(socket.MSG_DONTWAIT))
            except BlockingIOError:
                return
            except OSError as error:
                raise NetlinkError(error.errno or errno.EIO, "read kernel events") from error
            for kind, _, _, port, body in received:
                yield Reply(kind, port, body)

    def _next(self) -> int:
        self._sequence = self._sequence % 0xFFFF_FFFE + 1
        return self._sequence

    def _receive(self, flags: int = 0) -> Iterator[tuple[int, int, int, int, bytes]]:
        data, _, _, (sender, _) = self.socket.recvmsg(1 << 18, 0, flags)
        if sender != 0:  # another process of this namespace, not the kernel (netlink(7))
            return
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, message_flags, sequence, port = _HEADER.unpack_from(data, at)
            if length < _HEADER.size or at + length > len(data):
                return
            yield kind, message_flags, sequence, port, data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def _refusal(flags: int, body: bytes, request: Request) -> NetlinkError | None:
    """What an NLMSG_ERROR or NLMSG_DONE says; None when it is an acknowledgement."""
    (code,) = struct.unpack_from("=i", body)
    if code == 0 or -code in request.tolerate:
        return None
    text = ""
    if flags & _ACK_TLVS:
        after = 4 + _HEADER.size if flags & _CAPPED else 4  # nlmsgerr: error, then the header
        if not flags & _CAPPED and len(body) >= 4 + _HEADER.size:
            after = 4 + struct.unpack_from("=I", body, 4)[0]
        said = dict(attributes(body[after:]))
        text = said.get(1, b"").rstrip(b"\0").decode("ascii", "replace")  # NLMSGERR_ATTR_MSG
    return NetlinkError(-code, request.what, text)
