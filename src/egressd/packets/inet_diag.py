"""Whose socket sent a packet: the kernel's socket diagnosis, asked about one, and the tables of /proc/net.

Shapes: linux/sock_diag.h, linux/inet_diag.h, proc_pid_net(5).

Rules of this file: any bytes give an inode or None, never an exception.
"""

from __future__ import annotations

import struct

from egressd.packets.headers import Attempt
from egressd.packets.netlink import HEADER, Malformed, pieces

__all__ = ["inode", "owner", "question", "row"]

_SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 20, 1
_INET, _INET6, _TCP, _UDP = 2, 10, 6, 17  # linux/socket.h, linux/in.h
_REQUEST = struct.Struct("=BBBxI")  # inet_diag_req_v2: family, protocol, extensions, states
_NO_COOKIE = b"\xff" * 8  # INET_DIAG_NOCOOKIE: whichever socket it is
_INODE = 4 + 48 + 16  # in inet_diag_msg: after its bytes, its inet_diag_sockid and four numbers
_UID = _INODE - 4
_MAPPED = b"\0" * 10 + b"\xff\xff"  # RFC 4291 section 2.5.5.2
_ENDS = slice(4, 4 + 36)  # of it: both ports and both addresses, before the device and the cookie
# linux/tcp_states.h: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING
_CONNECTED = frozenset({1, 4, 5, 8, 9, 11})


def question(attempt: Attempt) -> bytes | None:
    """Ask for the socket at the sandbox's end of this packet; None for what is neither TCP nor UDP.

    For UDP the ends change places: "src and dst are swapped for historical reasons" (net/ipv4/udp_diag.c).
    """
    ends = (attempt.source, attempt.source_port), (attempt.destination, attempt.destination_port)
    if attempt.number == _UDP:
        ends = ends[1], ends[0]
    elif attempt.number != _TCP:
        return None
    (one, port), (other, other_port) = ends
    if one is None or other is None or port is None or other_port is None:
        return None
    family = _INET if one.version == 4 else _INET6
    body = _REQUEST.pack(family, attempt.number, 0, 0xFFFF_FFFF) + struct.pack("!HH", port, other_port)
    body += one.packed.ljust(16, b"\0") + other.packed.ljust(16, b"\0") + struct.pack("=I", 0) + _NO_COOKIE
    return HEADER.pack(HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0) + body


def inode(answer: bytes) -> int | None:
    """The socket's inode; None if there is no such socket, or no process has it any more."""
    for piece in pieces(answer):
        if isinstance(piece, Malformed):
            return None
        if piece.kind == _SOCK_DIAG_BY_FAMILY and len(piece.body) >= _INODE + 4:
            number: int = struct.unpack_from("=I", piece.body, _INODE)[0]
            return number or None
    return None


def owner(answer: bytes, attempt: Attempt) -> int | None:
    """Whose the TCP socket at the source's end is; None if nobody's who could be named.

    The uid of a socket that no process has any more reads 0, as if it were root's (an orphan, one in
    TIME_WAIT, a connection not yet accepted: net/ipv4/inet_diag.c), and where no connection is found the
    answer is about whoever listens at its port. So it has to be connected, between these very ends, and
    somebody's. An IPv6 socket may hold an IPv4 connection (RFC 3493 section 3.7; all of Java's do): asked for
    IPv4, the kernel finds it, and tells it with mapped addresses.
    """
    for piece in pieces(answer):
        if isinstance(piece, Malformed):
            return None
        body = piece.body
        if piece.kind == _SOCK_DIAG_BY_FAMILY and len(body) >= _INODE + 4:
            uid, number = struct.unpack_from("=II", body, _UID)
            there = (body[0], body[_ENDS]) in _spellings(attempt) and body[1] in _CONNECTED
            return uid if there and number else None
    return None


def _spellings(attempt: Attempt) -> tuple[tuple[int, bytes], ...]:
    """Family and ends, as an answer about this TCP connection may have them."""
    asked = question(attempt)
    if asked is None:
        return ()
    family, ends = asked[HEADER.size], asked[HEADER.size + _REQUEST.size :][:36]
    if family != _INET:
        return ((family, ends),)
    mapped = b"".join(_MAPPED + ends[at : at + 4] for at in (4, 20))
    return (_INET, ends), (_INET6, ends[:4] + mapped)


def row(table: bytes, port: int) -> int | None:
    """The inode of the one row of a table like /proc/net/raw with this number as its local port (which is the
    protocol for raw sockets, the identifier for ping sockets). None if there are none, or several."""
    found = set()
    for line in table.splitlines()[1:]:
        words = line.split()
        local, _, number = words[1].rpartition(b":") if len(words) > 9 else (b"", b"", b"")
        if local and words[9].isdigit() and number == b"%04X" % port:
            found.add(int(words[9]))
    return found.pop() if len(found) == 1 else None
