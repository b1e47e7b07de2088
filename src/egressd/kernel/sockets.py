"""Sockets that must be made inside the gateway, with rights that nobody keeps afterwards.

A socket stays in the namespace it was made in; whoever is handed its descriptor uses it there.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

from egressd.kernel.netlink import ACK, NETFILTER, REQUEST, attribute, enlarge
from egressd.model.errors import KernelError
from egressd.ruleset import layout

__all__ = ["open_all"]

DNS_PORT = 53
_BACKLOG = 1024
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75  # linux/in.h, linux/in6.h
_CONFIG = 4 << 8 | 1  # NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG
_BIND, _COPY_PACKET = 1, 2  # NFULNL_CFG_CMD_BIND, NFULNL_COPY_PACKET (linux/netfilter/nfnetlink_log.h)
_CFG_CMD, _CFG_MODE, _CFG_TIMEOUT, _CFG_THRESHOLD, _CFG_FLAGS = 1, 2, 4, 5, 6
_NUMBERED = 1  # NFULNL_CFG_F_SEQ: a gap in the numbers is exactly what was lost
_COPY_BYTES = 256  # headers and the beginning of the payload
_LOG_BUFFER, _QUESTIONS_BUFFER, _FLOWS_BUFFER = 8 << 20, 4 << 20, 32 << 20
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1  # linux/socket.h, linux/netlink.h
_ENDED_CONNECTIONS = 3  # NFNLGRP_CONNTRACK_DESTROY (linux/netfilter/nfnetlink.h)


def open_all() -> dict[str, socket.socket]:
    """All of them by name, or none. KernelError names the one that failed."""
    with ExitStack() as stack:
        found = {}
        for name, sock in _each():
            found[name] = stack.enter_context(sock)
        stack.pop_all()
        return found


def _each() -> Iterator[tuple[str, socket.socket]]:
    resolver = {4: str(layout.RESOLVER4), 6: str(layout.RESOLVER6)}
    loopback = {4: "127.0.0.1", 6: "::1"}
    for version in (4, 6):
        yield f"udp{version}", _bound(version, socket.SOCK_DGRAM, (resolver[version], DNS_PORT))
        yield f"tcp{version}", _bound(version, socket.SOCK_STREAM, (resolver[version], DNS_PORT))
        for name, port in (("inspect", layout.INSPECTOR_PORT), ("relay", layout.RELAY_PORT)):
            place = (loopback[version], port)
            yield f"{name}{version}", _bound(version, socket.SOCK_STREAM, place, transparent=True)
    yield "nflog", _log()
    yield "flows", _flows()


def _bound(version: int, kind: int, place: tuple[str, int], *, transparent: bool = False) -> socket.socket:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    try:
        if version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent and version == 4:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        elif transparent:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        if kind == socket.SOCK_STREAM:
            # Not of datagrams: whoever in the gateway set it as well could bind there, too, of any user,
            # and the newest gets them all (udp_lib_lport_inuse). Low ports are free to everybody there.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        if kind == socket.SOCK_DGRAM:
            enlarge(
                sock, _QUESTIONS_BUFFER
            )  # all sandboxes' questions wait in it: one's burst is not to fill it
        if kind == socket.SOCK_STREAM:
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise KernelError(
            f"{place[0]} port {place[1]} cannot be had in the gateway: {error.strerror}"
        ) from error
    return sock


def _log() -> socket.socket:
    """A netlink socket bound to our group of the kernel's packet log; the binding ends with the socket."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER)
    try:
        enlarge(sock, _LOG_BUFFER)
        sock.bind((0, 0))
        sock.send(_log_configuration())
        _acknowledged(sock.recv(4096))
    except OSError as error:
        sock.close()
        raise KernelError(
            f"log group {layout.NFLOG_GROUP} cannot be bound in the gateway: {error.strerror};"
            " another process may hold it (see /proc/net/netfilter/nfnetlink_log)"
        ) from error
    return sock


def _flows() -> socket.socket:
    """A netlink socket that hears of each connection's end.

    Not with NETLINK_BROADCAST_SEND_ERROR: the kernel would then keep every entry of which it could not tell
    (nf_conntrack_ecache.c), and an auditor that hangs would fill the table for everybody. What does not fit
    is lost, recv(2) says so with ENOBUFS, and the sums of the link then fall short of its counter.
    """
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER)
    try:
        enlarge(sock, _FLOWS_BUFFER)
        sock.bind((0, 0))
        sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _ENDED_CONNECTIONS)
    except OSError as error:
        sock.close()
        raise KernelError(
            f"the ends of connections cannot be heard of in the gateway: {error.strerror};"
            " CONFIG_NF_CONNTRACK_EVENTS (modprobe nf_conntrack_netlink)"
        ) from error
    return sock


def _log_configuration() -> bytes:
    mode = struct.pack(">IBB", _COPY_BYTES, _COPY_PACKET, 0)  # struct nfulnl_msg_config_mode
    body = struct.pack(">BBH", 0, 0, layout.NFLOG_GROUP)  # struct nfgenmsg; the group is its res_id
    body += attribute(_CFG_CMD, struct.pack("=B", _BIND)) + attribute(_CFG_MODE, mode)
    body += attribute(_CFG_TIMEOUT, struct.pack(">I", 10))  # hundredths of a second
    body += attribute(_CFG_THRESHOLD, struct.pack(">I", 16))  # packets in one message
    body += attribute(_CFG_FLAGS, struct.pack(">H", _NUMBERED))
    return struct.pack("=IHHII", 16 + len(body), _CONFIG, REQUEST | ACK, 1, 0) + body


def _acknowledged(data: bytes) -> None:
    (code,) = struct.unpack_from("=i", data, 16)
    if code:
        raise OSError(-code, f"errno {-code}")
