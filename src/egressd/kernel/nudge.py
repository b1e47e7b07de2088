"""A nudge: two segments that make one end of a TCP connection say where it is.

A connection that was cut ends with the next packet of one of its ends, and both may be waiting for the other.
What resets a connection must have just the right sequence number (RFC 5961 3.2), and nobody but the two ends
knows it. But an end that gets data outside its window says, by RFC 9293 3.10.7.4, what it expects and what it
would send next: an acknowledgement without data. The rules (ruleset.build, chain cut) turn the first of these
into a reset for the far end, and answer the second with one for the near end. Hence two.

They come from a socket that stands, for a moment, in the far end's place: bound to an address that is
nobody's here (IP_TRANSPARENT) and connected without a handshake (TCP_REPAIR, net/ipv4/tcp.c); both are for
CAP_NET_ADMIN alone. Its sequence numbers are 0, outside the window of all but one connection in thousands;
of that one the byte lies among others that were not expected yet, and dies with them. They bear data, since
Linux answers segments without any only twice a second (tcp_oow_rate_limited). No answer comes back to the
socket: to the rules it is the connection's. That a low port may be bound is a setting of the gateway
(GATEWAY_SETTINGS).
"""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

from egressd.ruleset.layout import NUDGE

__all__ = ["nudge"]

# linux/tcp.h, linux/in.h, linux/in6.h
_TCP_REPAIR, _TCP_REPAIR_WINDOW = 19, 29
_ON, _OFF = 1, -1  # -1: without a window probe
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_WINDOW = 1 << 12
_TWICE = 2


def nudge(*, of: tuple[str, int], to: tuple[str, int]) -> None:
    """Make the end `to` of the connection between these two (address, port) say something. OSError where the
    kernel will not have it. Never waits."""
    six = ip_address(to[0]).version == 6
    with socket.socket(
        socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    ) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, NUDGE)
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _repair(sock, _ON)
        sock.bind(of)
        sock.connect(to)
        # struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup
        window = struct.pack("=5I", 0, _WINDOW, _WINDOW, _WINDOW, 0)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_WINDOW, window)
        _repair(sock, _OFF)
        try:
            for _ in range(_TWICE):
                sock.send(b"\0")
        finally:
            _repair(sock, _ON)  # closed like this, it says nothing more


def _repair(sock: socket.socket, value: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, value)
