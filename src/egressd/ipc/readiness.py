"""Telling systemd how things stand, and having it keep descriptors, where it has asked (sd_notify(3)).

What is handed to it with `keep` comes back after a restart of the service as `kept`, and whatever arrived
at those sockets meanwhile waits in them. The unit says how many it may be (FileDescriptorStoreMax=); without
that, or without systemd, nothing is kept, and nothing here does anything. Whoever takes a descriptor back has
to look whether it is what its name says: names are all that systemd knows of it.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Sequence

__all__ = ["drop", "keep", "kept", "notify"]

log = logging.getLogger("egressd")

_FIRST = 3  # SD_LISTEN_FDS_START
_WITHIN = 1.0  # seconds for systemd to take a message, or to have read all before it
_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def notify(state: str, descriptors: Sequence[int] = ()) -> None:
    """Nothing happens without systemd. What it does not take within a second is logged, never raised."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_WITHIN)
        try:
            sock.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            socket.send_fds(sock, [state.encode()], list(descriptors))
        except OSError as error:
            log.warning("systemd was not told %s: %s", state.partition("\n")[0], error)


def keep(name: str, descriptor: int) -> None:
    """Have systemd keep it under that name. FDPOLL=0: an error that waits in a socket (ENOBUFS of netlink) is
    no reason to let go of it."""
    notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])


def drop(names: Sequence[str]) -> None:
    """Have it close all of these, and wait until it has."""
    if not names or "NOTIFY_SOCKET" not in os.environ:
        return
    for name in names:
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
    reader, writer = os.pipe2(os.O_CLOEXEC)
    notify("BARRIER=1", [writer])  # it closes its copy when it has read everything before
    os.close(writer)
    poll = select.poll()
    poll.register(reader, 0)  # POLLHUP comes unasked
    if not poll.poll(_WITHIN * 1000):
        log.warning("systemd does not say whether it has let go of its descriptors")
    os.close(reader)


def kept() -> dict[str, int]:
    """What was kept, by name, each ours to close; once. The variables that tell of it are gone afterwards,
    so that no other program takes them for its own (sd_listen_fds(3))."""
    pid, count, names, _ = (os.environ.pop(name, "") for name in _LISTEN)
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, int] = {}
    words = names.split(":")
    for number in range(_FIRST, _FIRST + int(count)):
        name = words[number - _FIRST] if number - _FIRST < len(words) else ""
        try:
            os.set_inheritable(number, False)
        except OSError:
            continue  # it is not open
        if name and name not in found:
            found[name] = number
        else:
            os.close(number)
    return found
