"""Who asks, and is that a member? Identity comes from the kernel, never from the message.

SO_PEERCRED and SO_PEERGROUPS (unix(7), Linux 4.13) are what the kernel recorded at connect(): the asker's
effective ids and supplementary groups. Names in policies are looked up here, at the time of asking, so a
removed account stops being a member at once.
"""

from __future__ import annotations

import array
import errno
import grp
import pwd
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from egressd.ipc.channel import peer_credentials
from egressd.policy.compiled import Member, MemberKind

__all__ = ["Caller", "caller_of", "is_member"]

_SO_PEERGROUPS = 59  # asm-generic/socket.h


@dataclass(frozen=True, slots=True)
class Caller:
    pid: int
    uid: int
    groups: frozenset[int]
    gid: int | None = None  # the effective one; None: nobody asked


def caller_of(sock: socket.socket) -> Caller:
    """The other end of a connected unix socket. OSError if the kernel cannot say."""
    credentials = peer_credentials(sock)
    groups = frozenset({credentials.gid, *_peer_groups(sock)})
    return Caller(credentials.pid, credentials.uid, groups, credentials.gid)


def _peer_groups(sock: socket.socket) -> Iterable[int]:
    for room in (64, 65_536):  # NGROUPS_MAX (linux/limits.h)
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, room * 4)
        except OSError as error:
            if error.errno == errno.ERANGE:
                continue
            raise
        return array.array("I", raw)
    return ()


def is_member(caller: Caller, members: Iterable[Member]) -> bool:
    return any(_matches(caller, member) for member in members)


def _matches(caller: Caller, member: Member) -> bool:
    try:
        if member.kind is MemberKind.USER:
            return caller.uid == _number(member.name, lambda name: pwd.getpwnam(name).pw_uid)
        return _number(member.name, lambda name: grp.getgrnam(name).gr_gid) in caller.groups
    except KeyError:  # no such account on this machine: nobody is it
        return False


def _number(name: str, look_up) -> int:  # type: ignore[no-untyped-def]
    return int(name) if name.isdigit() else int(look_up(name))
