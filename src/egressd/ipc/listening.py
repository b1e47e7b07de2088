"""A listening socket of this machine that somebody kept for us: is it the one?

Its name says nothing (readiness.py). The kernel says what it is, where it is bound, in which network
namespace, and, for a path, whether that path still leads to it.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

__all__ = ["misfit"]

_SIOCGSKNS = 0x894C  # linux/sockios.h: a descriptor of a socket's network namespace
_SIOCUNIXFILE = 0x89E0  # linux/un.h (4.16): an O_PATH descriptor of the file it is bound to


def misfit(sock: socket.socket, *, kind: int, address: str | tuple[str, int]) -> str:
    """Why this is not a socket of that kind that listens there; empty if it is. Needs CAP_NET_ADMIN."""
    try:
        if _identity(fcntl.ioctl(sock, _SIOCGSKNS)) != _own_network():
            return "it lives in another network namespace"
        if sock.type != kind or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return "it is of another kind, or does not listen"
        if isinstance(address, str):
            return _elsewhere(sock, address)
        return "" if sock.getsockname()[:2] == address else "it is bound elsewhere"
    except OSError as error:
        return f"the kernel does not say what it is: {error.strerror}"


def _elsewhere(sock: socket.socket, path: str) -> str:
    if sock.family != socket.AF_UNIX or sock.getsockname() != path:
        return "it is bound elsewhere"
    file = os.stat(path, follow_symlinks=False)  # noqa: PTH116
    if _identity(fcntl.ioctl(sock, _SIOCUNIXFILE)) != (file.st_dev, file.st_ino):
        return "its path leads to another file"
    return ""


def _own_network() -> tuple[int, int]:
    found = Path("/proc/thread-self/ns/net").stat()
    return found.st_dev, found.st_ino


def _identity(descriptor: int) -> tuple[int, int]:
    """Of the file that it is open for; closes it."""
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return found.st_dev, found.st_ino
