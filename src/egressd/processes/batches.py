"""Many datagrams per system call: recvmmsg(2) and sendmmsg(2), which Python does not have.

`Batch` is for questions and answers, `Inbox` for what is only read. A batch has `COUNT` places. What was
received in place i is answered from place i: same memory, same address. The kernel's work per datagram stays;
entering it and leaving it, and Python's part of that, is done once for all that wait.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct

from egressd.dns.hot import SLOT

__all__ = ["COUNT", "LONGEST", "Batch", "Inbox"]

COUNT = 64  # datagrams
LONGEST = 4096  # bytes read of one; a query is never longer, and what is cut does not parse
_NAME = 32  # bytes for a struct sockaddr_in (16) or sockaddr_in6 (28)
_ADDRESS = {socket.AF_INET: slice(4, 8), socket.AF_INET6: slice(8, 24)}  # ip(7), ipv6(7)


class _Vector(ctypes.Structure):
    """struct iovec, readv(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct mmsghdr with its struct msghdr, recvmmsg(2) and recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_ssize_t),  # an int, and the padding behind it
        ("length", ctypes.c_uint32),
    )


_c = ctypes.CDLL(None, use_errno=True)
_receive, _send = _c.recvmmsg, _c.sendmmsg
_receive.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
_send.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
_receive.restype = _send.restype = ctypes.c_int
# The same call with the interpreter's lock held. It does not wait; and who gives the lock away between two
# batches gets it back after as long as the other thread likes, five milliseconds (sys.setswitchinterval).
_receive_at_once = ctypes.PyDLL(None, use_errno=True).recvmmsg
_receive_at_once.argtypes, _receive_at_once.restype = _receive.argtypes, ctypes.c_int


class Batch:
    """The memory for one batch of a socket's datagrams, used again and again."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._descriptor = sock, sock.fileno()
        self._address = _ADDRESS[sock.family]
        first, end = self._address.start, self._address.stop
        pattern = f"{first}x{end - first}s{_NAME - end}x"
        self._layouts = [struct.Struct(pattern * count) for count in range(COUNT + 1)]
        self.out, self._long = bytearray(SLOT * COUNT), bytearray((LONGEST - SLOT) * COUNT)
        self._names = bytearray(_NAME * COUNT)
        step = ctypes.sizeof(_Message)
        received, lengths = bytearray(step * COUNT), bytearray(ctypes.sizeof(_Vector) * COUNT)
        self._in_vectors = (_Vector * (2 * COUNT))()
        self._out_vectors = (_Vector * COUNT).from_buffer(lengths)
        self._in, self._out = (_Message * COUNT).from_buffer(received), (_Message * COUNT)()
        self._lay_out()
        self._in_at = ctypes.addressof(self._in)
        self._out_places = [ctypes.addressof(self._out) + step * number for number in range(COUNT)]
        # The two fields that are looked at each time, without going through objects of ctypes. size_t is an
        # unsigned long wherever Linux runs.
        self._received = memoryview(received).cast("I")[_Message.length.offset // 4 :: step // 4]
        self.lengths = memoryview(lengths).cast("L")[1::2]
        self._view = memoryview(self.out)  # also keeps it where it is: its size cannot change now

    def _lay_out(self) -> None:
        data, long, names = map(_address_of, (self.out, self._long, self._names))
        length = 16 if self._socket.family == socket.AF_INET else 28
        vector = ctypes.sizeof(_Vector)
        ins, outs = ctypes.addressof(self._in_vectors), ctypes.addressof(self._out_vectors)
        for number in range(COUNT):
            place = data + SLOT * number
            self._in_vectors[2 * number] = _Vector(place, SLOT)
            rest = LONGEST - SLOT
            self._in_vectors[2 * number + 1] = _Vector(long + rest * number, rest)
            self._out_vectors[number] = _Vector(place, 0)
            name = names + _NAME * number
            self._in[number] = _Message(name, length, ins + 2 * vector * number, 2)
            self._out[number] = _Message(name, length, outs + vector * number, 1)

    def receive(self) -> int:
        """How many datagrams came; 0 when none waits, or for an error of one sent earlier (ip(7))."""
        return int(max(0, _receive(self._descriptor, self._in_at, COUNT, socket.MSG_DONTWAIT, None)))

    def senders(self, count: int) -> list[tuple[int, bytes]]:
        """Of each datagram its size and its source, a packed address."""
        sources = self._layouts[count].unpack_from(self._names)
        return list(zip(self._received[:count].tolist(), sources, strict=True))

    def data(self, count: int) -> bytes:
        """All of them, one every SLOT bytes; of longer ones only the beginning."""
        return bytes(self._view[: SLOT * count])

    def whole(self, number: int, size: int) -> bytes:
        begin = bytes(self.out[SLOT * number : SLOT * number + min(size, SLOT)])
        rest = (LONGEST - SLOT) * number
        return begin + self._long[rest : rest + size - SLOT] if size > SLOT else begin

    def place(self, number: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """The sender, as `sendto` wants it."""
        name = self._names[_NAME * number : _NAME * (number + 1)]
        host = socket.inet_ntop(self._socket.family, name[self._address])
        port = int.from_bytes(name[2:4], "big")
        if self._socket.family == socket.AF_INET:
            return host, port
        # sin6_scope_id is in the machine's own order
        return host, port, int.from_bytes(name[4:8], "big"), int.from_bytes(name[24:28], "little")

    def answer(self, number: int, data: bytes) -> bool:
        """Put an answer into its place, if there is room for it."""
        if len(data) > SLOT:
            return False
        self.out[SLOT * number : SLOT * number + len(data)] = data
        self.lengths[number] = len(data)
        return True

    def send_alone(self, data: bytes, place: tuple[object, ...]) -> None:
        try:
            self._socket.sendto(data, place)
        except OSError:  # full or unreachable: a datagram may be lost
            return

    def send(self, first: int, end: int) -> None:
        """Send the answers in the places from `first` to before `end`; some may be lost."""
        while first < end:
            sent = _send(self._descriptor, self._out_places[first], end - first, socket.MSG_DONTWAIT)
            if sent <= 0 and ctypes.get_errno() == errno.EAGAIN:
                return
            first += max(1, sent)  # the one that failed is lost, those behind it are not


class Inbox:
    """Messages of SOCK_SEQPACKET sockets, up to `COUNT` per call, without descriptors. One memory for all
    sockets of a process: what was received is taken out before the next call."""

    COUNT = 128
    _PLACE = 2048  # bytes of a message that lie close together; nearly all are shorter

    def __init__(self, longest: int) -> None:
        """`longest`: bytes of a message; one that has more comes with MSG_TRUNC."""
        self._rest = max(0, longest - self._PLACE)
        # Pages that are not touched take no memory, and those of a long message are given back.
        self._close, self._far = (
            bytearray(self._PLACE * self.COUNT),
            mmap.mmap(-1, self._rest * self.COUNT or 1),
        )
        step = ctypes.sizeof(_Message)
        headers = bytearray(step * self.COUNT)
        self._vectors = (_Vector * (2 * self.COUNT))()
        self._headers = (_Message * self.COUNT).from_buffer(headers)
        self._lay_out()
        self._at = ctypes.addressof(self._headers)
        fields = memoryview(headers).cast("I")
        self._lengths = fields[_Message.length.offset // 4 :: step // 4]
        self._flags = fields[_Message.flags.offset // 4 :: step // 4]
        self._view = memoryview(self._close)

    def _lay_out(self) -> None:
        close = _address_of(self._close)
        far = ctypes.addressof((ctypes.c_char * len(self._far)).from_buffer(self._far))
        vectors = ctypes.addressof(self._vectors)
        for number in range(self.COUNT):
            self._vectors[2 * number] = _Vector(close + self._PLACE * number, self._PLACE)
            self._vectors[2 * number + 1] = _Vector(far + self._rest * number, self._rest)
            first = vectors + 2 * ctypes.sizeof(_Vector) * number
            self._headers[number] = _Message(None, 0, first, 2, None, 0, 0, 0)

    def receive(self, descriptor: int, most: int = COUNT) -> tuple[list[bytes], list[int]]:
        """What waits, at most so many; and of each its flags (recvmsg(2)): MSG_TRUNC if it was too long,
        MSG_CTRUNC if it had descriptors, which the kernel has closed. An empty message is the end.
        BlockingIOError if nothing waits; OSError."""
        count = _receive_at_once(descriptor, self._at, min(most, self.COUNT), socket.MSG_DONTWAIT, None)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))  # BlockingIOError where it is EAGAIN
        lengths = self._lengths[:count].tolist()
        view, place = self._view, self._PLACE
        if max(lengths) > place:
            found = [self._whole(number, length) for number, length in enumerate(lengths)]
            self._far.madvise(mmap.MADV_DONTNEED)
        else:
            found = [
                bytes(view[at : at + size])
                for at, size in zip(range(0, place * count, place), lengths, strict=True)
            ]
        return found, self._flags[:count].tolist()

    def _whole(self, number: int, length: int) -> bytes:
        close, far = self._PLACE * number, self._rest * number
        begin = bytes(self._view[close : close + min(length, self._PLACE)])
        return begin + self._far[far : far + max(0, length - self._PLACE)]


def _address_of(memory: bytearray) -> int:
    """A bytearray is moved only when its size changes, and none of these ever does."""
    return ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
