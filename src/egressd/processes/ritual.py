"""The start-up ritual, the same in every process, so that a missing step is visible.

    python -m egressd.processes.NAME --fd ROLE=N ... --uid N --gid N [--group N ...] --config-json '{...}'

1. exec'd by the supervisor, with every socket open;  2. imports done (by reaching `begin`);
3. `begin` parses the command line and closes all other descriptors;  4. `isolation.become`;
5. the program builds its loop;  6. `Ready`, then a heartbeat for as long as the loop turns.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import resource
import socket
import struct
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from egressd.ipc import journald, messages
from egressd.ipc.channel import Channel
from egressd.model.errors import ProtocolError
from egressd.processes import isolation
from egressd.processes.cards import CARDS, Card
from egressd.processes.config import Config

__all__ = ["Auditing", "Start", "begin", "introduced"]

_DESCRIPTORS = 65_536


@dataclass(slots=True)
class Start:
    """What a process was started with. Sockets are taken out by name, once."""

    card: Card
    config: Config
    sockets: dict[str, socket.socket]

    def take(self, name: str) -> socket.socket:
        try:
            return self.sockets.pop(name)
        except KeyError:
            raise ProtocolError(f"{self.card.name} was started without --fd {name}=N") from None


def begin(name: str, arguments: list[str] | None = None) -> Start:
    """Steps 3 and 4. Everything the process will import must be imported by now."""
    options = _parse(name, arguments)
    journald.configure(name, long_lived=True)
    isolation.close_other_descriptors(options.fd.values())
    _raise_descriptor_limit()
    card = CARDS[name]
    sockets = {role: socket.socket(fileno=number) for role, number in options.fd.items()}
    for sock in sockets.values():
        sock.set_inheritable(False)
    # Should the supervisor be stopped, heartbeats fill its channel; nobody waits for it to read them.
    if "supervisor" in sockets:
        sockets["supervisor"].setblocking(False)
    isolation.become(card, uid=options.uid, gid=options.gid, groups=options.group)
    return Start(card, Config.decode(options.config_json), sockets)


def introduced(
    supervisor: Channel[messages.TO_CHILD], peers: Mapping[str, Callable[[socket.socket], object]]
) -> bool:
    """Take what the supervisor has sent, without waiting: a connection to one of `peers`, by its name. False
    when it is gone."""
    try:
        received = supervisor.receive()
    except BlockingIOError:
        return True
    except (EOFError, ProtocolError, OSError):
        return False
    message = received.message
    if isinstance(message, messages.NewPeer) and message.name in peers:
        peers[message.name](socket.socket(fileno=received.take()))
    received.close()
    return True


def _raise_descriptor_limit() -> None:
    """As far as the hard limit lets us: thousands of strangers may connect, and descriptors on their way to
    another process count, too (unix(7), ETOOMANYREFS). select(2), which could not take them, is not used."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _parse(name: str, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"egressd-{name}")
    parser.add_argument("--fd", action=_Descriptors, default={}, metavar="ROLE=N")
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--group", type=int, action="append", default=[])
    parser.add_argument("--config-json", required=True)
    return parser.parse_args(arguments)


class _Descriptors(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        role, _, number = str(values).partition("=")
        try:
            os.fstat(int(number))
        except (ValueError, OSError):
            parser.error(f"{values!r} does not name an open descriptor")
        namespace.fd = {**namespace.fd, role: int(number)}


@dataclass(slots=True)
class Auditing:
    """Hands events to the auditor. Never waits: what does not fit is counted, and the count is sent
    when there is room again."""

    process: str
    channel: Channel[None] | None = None
    lost: int = 0

    @classmethod
    def over(cls, process: str, sock: socket.socket) -> Auditing:
        auditing = cls(process)
        auditing.connect(sock)
        return auditing

    def connect(self, sock: socket.socket) -> None:
        """Begin, or after a restart of the auditor begin again, to use this socket."""
        if self.channel is not None:
            self.channel.close()
        sock.setblocking(False)
        self.channel = Channel(sock, None)

    def record(self, event: str, fields: Mapping[str, str | int | float | bool | None]) -> None:
        self.pass_on(messages.Event(process=self.process, event=event, fields=dict(fields)))

    def pass_on(self, message: messages.TO_AUDITOR) -> None:
        self.flush()
        if not self._sent(message):
            self.lost += 1

    def offer(self, message: messages.TO_AUDITOR) -> bool:
        """Hand over, unless half of the channel is in use: for who has time, and can come back. The other
        half is for who cannot. Nothing is counted as lost."""
        self.flush()
        return self.channel is not None and _half_empty(self.channel.socket) and self._sent(message)

    def flush(self) -> None:
        """Tell of losses even if nothing else happens."""
        if self.lost and self._sent(messages.Losses(process=self.process, count=self.lost)):
            self.lost = 0

    def _sent(self, message: messages.TO_AUDITOR) -> bool:
        if self.channel is None:
            return False
        try:
            self.channel.send(message)
        except (OSError, ProtocolError):
            return False
        return True


def _half_empty(sock: socket.socket) -> bool:
    """unix(7), SIOCOUTQ: what the other end has not read yet, in the measure of SO_SNDBUF."""
    try:
        unread = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
    except OSError:
        return False
    return bool(2 * unread <= sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
