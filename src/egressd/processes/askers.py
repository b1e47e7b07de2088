"""Who is at the other end of a connection: by the kernel's word, never by what was sent.

Over a Unix socket it is SO_PEERCRED and SO_PEERGROUPS. Over TCP on the loopback both ends are sockets of this
machine's network, so the kernel is asked whose the other one is (sock_diag(7), which needs no right), and the
user database which groups that user is in. A connection whose other end is not found -- it came from another
network namespace, through address translation, or is gone already -- is nobody's.
"""

from __future__ import annotations

import os
import pwd
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from egressd.packets import inet_diag
from egressd.packets.headers import Attempt, Family
from egressd.processes.members import caller_of

__all__ = ["Asker", "Unknown", "at", "complete"]

_NETLINK_SOCK_DIAG = 4  # linux/netlink.h
_TCP = 6
_MOST_GROUPS = 1024  # as many as ForUser takes; who is in more is taken for a member of fewer
_DATAGRAM = 1 << 14


class Unknown(Exception):
    """The text says why nobody knows, and what to do."""


@dataclass(frozen=True, slots=True)
class Asker:
    """`gids` None: not known yet (see `complete`)."""

    uid: int
    gids: tuple[int, ...] | None


def at(sock: Any) -> Asker:
    """The other end of a connected socket. Never blocks. Unknown if nobody can say."""
    try:
        if sock.family == socket.AF_UNIX:
            caller = caller_of(sock)
            return Asker(caller.uid, tuple(sorted(caller.groups))[:_MOST_GROUPS])
        uid = _owner(sock.getpeername(), sock.getsockname())
    except (OSError, ValueError) as error:
        raise Unknown(f"the kernel does not say who is connected ({error}); {_REMEDY}") from error
    if uid is None:
        raise Unknown(
            f"no process on this machine is known to hold the other end of the connection; {_REMEDY}"
        )
    return Asker(uid, None)


_REMEDY = "connect from this machine, outside of containers, or over a Unix socket (api: unix:PATH)"


def _owner(there: tuple[Any, ...], here: tuple[Any, ...]) -> int | None:
    """Of the TCP socket that sends from `there` to `here`. The kernel answers while it is asked: net/core/
    sock_diag.c works in the context of the sender."""
    source, destination = ip_address(there[0]), ip_address(here[0])
    attempt = Attempt(
        family=Family.IPV4 if source.version == 4 else Family.IPV6,
        protocol="tcp",
        number=_TCP,
        source=source,
        destination=destination,
        source_port=there[1],
        destination_port=here[1],
    )
    question = inet_diag.question(attempt)
    if question is None:
        return None
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as asking:
        asking.settimeout(1.0)
        asking.send(question)
        return inet_diag.owner(asking.recv(_DATAGRAM), attempt)


def complete(asker: Asker) -> Asker:
    """With the groups the user database has. It may wait for a directory service."""
    if asker.gids is not None:
        return asker
    try:
        entry = pwd.getpwuid(asker.uid)
        groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    except (KeyError, OSError):  # no such account: in no group
        groups = []
    return Asker(asker.uid, tuple(sorted(set(groups)))[:_MOST_GROUPS])
