"""Where people come in: the control socket, and the addresses of metrics and the HTTP API.

Opened while still root, so that nobody else takes an address first, and a port below 1024 is a port like any
other. One that systemd kept over a restart (ipc/readiness.py) is used again if it is the right one: whoever
connected meanwhile waits in it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from egressd.ipc import listening
from egressd.model.errors import KernelError
from egressd.processes.config import Config, ListenAddress

__all__ = ["open_doors"]

log = logging.getLogger("egressd")

_CONTROL_BACKLOG = 4096  # the kernel bounds it by net.core.somaxconn
_HTTP_BACKLOG = 1024  # connections that wait to be accepted


@dataclass(frozen=True, slots=True)
class _Door:
    role: str  # its name among the supervisor's sockets
    what: str
    where: ListenAddress
    kind: int
    group: int
    mode: int  # of a path
    backlog: int = _HTTP_BACKLOG

    @property
    def address(self) -> str | tuple[str, int]:
        where = self.where
        return where.path if where.address is None else (str(where.address), where.port)

    @property
    def shown(self) -> str:
        where = self.where
        if where.address is None:
            return where.path
        return (
            f"{where.address}:{where.port}"
            if where.address.version == 4
            else f"[{where.address}]:{where.port}"
        )


def open_doors(config: Config, kept: Mapping[str, int]) -> tuple[dict[str, socket.socket], set[str]]:
    """All that the configuration names, by role; and which of them are those that were `kept` (descriptors,
    which are ours to close). KernelError for an address that cannot be had."""
    Path(config.run_dir).mkdir(mode=0o755, parents=True, exist_ok=True)
    found: dict[str, socket.socket] = {}
    same = set()
    for door in _doors(config):
        sock = _same(door, kept[door.role]) if door.role in kept else None
        if sock is not None:
            same.add(door.role)
        found[door.role] = sock or _open(door)
    for role in kept.keys() - found.keys():
        os.close(kept[role])
    return found, same


def _doors(config: Config) -> Iterator[_Door]:
    # Anyone may connect; who may do what is decided by peer credentials.
    control = ListenAddress(None, 0, str(config.control_socket))
    yield _Door("control", "control", control, socket.SOCK_SEQPACKET, 0, 0o666, _CONTROL_BACKLOG)
    accounts = config.accounts()
    if config.metrics_address is not None:
        # For root and the group of the account: whoever is to read joins that group.
        gid = accounts["metrics"].gid
        yield _Door("metrics", "metrics", config.metrics_address, socket.SOCK_STREAM, gid, 0o660)
    if config.api_address is not None:
        # For everybody: each peer is asked who it is.
        gid = accounts["api"].gid
        yield _Door("api", "the HTTP API", config.api_address, socket.SOCK_STREAM, gid, 0o666)


def _same(door: _Door, number: int) -> socket.socket | None:
    """The one that was kept, in order again; None, and it is closed, if it is another."""
    try:
        sock = socket.socket(fileno=number)
    except OSError:  # ENOTSOCK
        os.close(number)
        return None
    why = listening.misfit(sock, kind=door.kind, address=door.address)
    if why:
        log.warning("the socket %s that was kept cannot be used: %s", door.role, why)
        sock.close()
        return None
    if door.where.address is None:
        _admit(door)
    sock.listen(door.backlog)
    return sock


def _open(door: _Door) -> socket.socket:
    if door.where.address is None:
        return _open_path(door)
    sock = socket.socket(socket.AF_INET if door.where.address.version == 4 else socket.AF_INET6, door.kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _bind(sock, door)
    sock.listen(door.backlog)
    return sock


def _open_path(door: _Door) -> socket.socket:
    path = Path(door.where.path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise KernelError(f"{door.what}: {path} is there already and is not a socket; name another path")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, door.kind)
    # Before listen(2) nobody can connect: there is no moment with another mode.
    _bind(sock, door)
    _admit(door)
    sock.listen(door.backlog)
    return sock


def _admit(door: _Door) -> None:
    os.chown(door.where.path, 0, door.group)
    Path(door.where.path).chmod(door.mode)


def _bind(sock: socket.socket, door: _Door) -> None:
    try:
        sock.bind(door.address)
    except OSError as error:
        sock.close()
        raise KernelError(f"{door.what} cannot be offered at {door.shown}: {error.strerror}") from error
