"""Sockets that must be made inside the gateway, with rights that nobody keeps afterwards.

A socket stays in the namespace it was made in; whoever is handed its descriptor uses it there. One that
somebody kept while egressd was away (systemd's descriptor store) is as good as a new one if `misfit` finds
nothing against it, and better: what came meanwhile waits in it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from egressd.kernel import namespaces
from egressd.kernel.netlink import ACK, NETFILTER, REQUEST, attribute, enlarge
from egressd.model.errors import KernelError
from egressd.ruleset import layout

__all__ = ["NAMES", "misfit", "open_all", "open_ended", "open_flows", "open_log", "refresh"]

DNS_PORT = 53
_BACKLOG = 1024
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75  # linux/in.h, linux/in6.h
_CONFIG = 4 << 8 | 1  # NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG
_BIND, _COPY_PACKET = 1, 2  # NFULNL_CFG_CMD_BIND, NFULNL_COPY_PACKET (linux/netfilter/nfnetlink_log.h)
_CFG_CMD, _CFG_MODE, _CFG_TIMEOUT, _CFG_THRESHOLD, _CFG_FLAGS = 1, 2, 4, 5, 6
_NUMBERED = 1  # NFULNL_CFG_F_SEQ: a gap in the numbers is exactly what was lost
_COPY_BYTES = 256  # headers and the beginning of the payload
_LOG_BUFFER, _QUESTIONS_BUFFER, _FLOWS_BUFFER = 8 << 20, 4 << 20, 32 << 20
_SOL_NETLINK, _ADD_MEMBERSHIP, _LIST_MEMBERSHIPS = 270, 1, 9  # linux/socket.h, linux/netlink.h
_SIOCGSKNS = 0x894C  # linux/sockios.h: a descriptor of a socket's network namespace
_SO_LOCK_FILTER = 44  # asm-generic/socket.h
_IP_MINTTL, _IPV6_MINHOPCOUNT = 21, 73  # linux/in.h, linux/in6.h
_CAP_VERSION_3, _CAP_NET_ADMIN = 0x20080522, 12  # linux/capability.h
_ENDED_CONNECTIONS = 3  # NFNLGRP_CONNTRACK_DESTROY (linux/netfilter/nfnetlink.h)


@dataclass(frozen=True, slots=True)
class _Place:
    kind: int
    address: str
    port: int
    transparent: bool = False

    @property
    def family(self) -> int:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


def _places() -> Iterator[tuple[str, _Place]]:
    resolver = {4: str(layout.RESOLVER4), 6: str(layout.RESOLVER6)}
    loopback = {4: "127.0.0.1", 6: "::1"}
    for version in (4, 6):
        yield f"udp{version}", _Place(socket.SOCK_DGRAM, resolver[version], DNS_PORT)
        yield f"tcp{version}", _Place(socket.SOCK_STREAM, resolver[version], DNS_PORT)
        for name, port in (("inspect", layout.INSPECTOR_PORT), ("relay", layout.RELAY_PORT)):
            yield f"{name}{version}", _Place(socket.SOCK_STREAM, loopback[version], port, transparent=True)


_PLACES = dict(_places())
NAMES = (*_PLACES, "nflog", "flows", "ended")


def open_all(*, but: Collection[str] = ()) -> dict[str, socket.socket]:
    """All of them by name, `but` those that are there already; or none. KernelError names what failed."""
    with ExitStack() as stack:
        found = {name: stack.enter_context(_open(name)) for name in NAMES if name not in but}
        stack.pop_all()
        return found


def _open(name: str) -> socket.socket:
    if name in _PLACES:
        sock = _bound(_PLACES[name])
    else:
        sock = {"nflog": open_log, "flows": open_flows, "ended": open_ended}[name]()
    # It outlives who is handed it: a filter of theirs would keep what they like from all who come after.
    sock.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
    return sock


def _bound(place: _Place) -> socket.socket:
    sock = socket.socket(place.family, place.kind | socket.SOCK_CLOEXEC)
    try:
        if place.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if place.transparent:
            sock.setsockopt(*_transparent(place), 1)
        if place.kind == socket.SOCK_STREAM:
            # Not of datagrams: whoever in the gateway set it as well could bind there, too, of any user,
            # and the newest gets them all (udp_lib_lport_inuse). Low ports are free to everybody there.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((place.address, place.port))
        if place.kind == socket.SOCK_DGRAM:
            enlarge(
                sock, _QUESTIONS_BUFFER
            )  # all sandboxes' questions wait in it: one's burst is not to fill it
        if place.kind == socket.SOCK_STREAM:
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise KernelError(
            f"{place.address} port {place.port} cannot be had in the gateway: {error.strerror}"
        ) from error
    return sock


def _transparent(place: _Place) -> tuple[int, int]:
    if place.family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, _IPV6_TRANSPARENT
    return socket.IPPROTO_IP, _IP_TRANSPARENT


# ---- sockets that outlived the daemon


def misfit(name: str, sock: socket.socket) -> str:
    """Why this is not what `open_all` would make in this thread's namespace; empty if it is. Needs
    CAP_NET_ADMIN there."""
    try:
        if _namespace(sock) != namespaces.own_identity():
            return "it lives in another network namespace"
        found = _unlike(sock, _PLACES[name]) if name in _PLACES else _unheard(name, sock)
        return found or _deafened(sock)
    except OSError as error:
        return f"the kernel does not say what it is: {error.strerror}"


def _deafened(sock: socket.socket) -> str:
    """What whoever had it could do to it without any right, to keep something from all who come after."""
    if not sock.getsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER):
        return "there may be a filter in it"
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).strip(b"\0"):
        return "it hears one device alone"
    if sock.family != socket.AF_NETLINK and sock.getsockopt(*_least_hops(sock)):
        return "it hears its neighbours alone"
    watch = select.poll()
    watch.register(sock, select.POLLRDHUP)
    if any(events & select.POLLRDHUP for _, events in watch.poll(0)):
        return "it is shut down"
    try:
        peer = sock.getpeername()
    except OSError:  # ENOTCONN
        return ""
    return "" if peer == (0, 0) else "it hears one peer alone"  # (0, 0): netlink's word for nobody


def _least_hops(sock: socket.socket) -> tuple[int, int]:
    if sock.family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT
    return socket.IPPROTO_IP, _IP_MINTTL


def refresh(name: str, sock: socket.socket) -> None:
    """Queues as long as those of a new one: whoever had it may have shortened them."""
    if name not in _PLACES:
        enlarge(sock, _LOG_BUFFER if name == "nflog" else _FLOWS_BUFFER)
    elif _PLACES[name].kind == socket.SOCK_STREAM:
        sock.listen(_BACKLOG)
    else:
        enlarge(sock, _QUESTIONS_BUFFER)


def _namespace(sock: socket.socket) -> namespaces.Identity:
    descriptor = fcntl.ioctl(sock, _SIOCGSKNS)
    try:
        return namespaces.identity(descriptor)
    finally:
        os.close(descriptor)


def _unlike(sock: socket.socket, place: _Place) -> str:
    if (sock.family, sock.type) != (place.family, place.kind):
        return f"it is of family {int(sock.family)} and type {int(sock.type)}"
    if sock.getsockname()[:2] != (place.address, place.port):
        return "it is bound elsewhere"
    stream = place.kind == socket.SOCK_STREAM
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != stream:
        return "it does not listen" if stream else "it listens"
    shared = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) and not stream
    if shared or sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return "others could be bound beside it"
    if sock.getsockopt(*_transparent(place)) != place.transparent:
        return "it is transparent, or should be"
    if place.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return "it takes IPv4, too"
    return ""


def _unheard(name: str, sock: socket.socket) -> str:
    if (sock.family, sock.proto) != (socket.AF_NETLINK, NETFILTER):
        return f"it is of family {int(sock.family)} and protocol {sock.proto}"
    if name == "nflog":
        return "" if _bound_to_log(sock.getsockname()[0]) else "the log group is not bound to it"
    groups = sock.getsockopt(_SOL_NETLINK, _LIST_MEMBERSHIPS, 8)
    member = int.from_bytes(groups, "little") >> (_ENDED_CONNECTIONS - 1) & 1
    return "" if member else "it does not hear of connections' ends"


def _bound_to_log(port: int) -> bool:
    """/proc/net/netfilter/nfnetlink_log: group, port id, and more, per line (nfnetlink_log.c, seq_show)."""
    table = Path("/proc/thread-self/net/netfilter/nfnetlink_log").read_text(encoding="ascii")
    return [str(layout.NFLOG_GROUP), str(port)] in [line.split()[:2] for line in table.splitlines()]


def open_log() -> socket.socket:
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


def open_flows() -> socket.socket:
    """A netlink socket that hears of each connection's end.

    Not with NETLINK_BROADCAST_SEND_ERROR: the kernel would then keep every entry of which it could not tell
    (nf_conntrack_ecache.c), and an auditor that hangs would fill the table for everybody. What does not fit
    is lost, recv(2) says so with ENOBUFS, and the sums of the link then fall short of its counter.
    """
    return _hearing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER))


def _hearing(sock: socket.socket) -> socket.socket:
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


def open_ended() -> socket.socket:
    """The same for whoever has CAP_NET_ADMIN over the host, and must have no say in the gateway: this one
    hears, and whatever is said over it is refused.

    A message to netfilter needs the capability twice, of who sends it and of who made the socket
    (__netlink_ns_capable, net/netlink/af_netlink.c); to join a group, that of who asks is enough.
    """
    with _without_net_admin():
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER)
    return _hearing(sock)


@contextmanager
def _without_net_admin() -> Iterator[None]:
    """This thread, for a moment (capset(2)); it stays permitted. KernelError if it cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, had = (ctypes.c_uint32 * 2)(_CAP_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    refused = libc.capget(header, had)
    less = (ctypes.c_uint32 * 6)(*had)
    less[0] &= ~(1 << _CAP_NET_ADMIN)  # the effective set
    if refused or libc.capset(header, less):
        raise KernelError(f"CAP_NET_ADMIN cannot be put aside: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        if libc.capset(header, had):
            raise KernelError(f"CAP_NET_ADMIN cannot be taken up again: {os.strerror(ctypes.get_errno())}")


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
