"""One question to the upstream servers, without I/O: which server next, when to give up, which answer counts.

The owner of sockets and clock feeds what happens (`received`, `broken`, `expired`) and does what it is
told: `Send` opens a fresh socket (its own source port) or uses a stream, `Finish` carries the result. The
previous attempt's socket may be closed as soon as the next `Send` or `Finish` appears: a late answer to it
no longer counts.

An answer counts if it comes from the server asked, with the id and the question of this very attempt.
Anything else is not even an event: over UDP anyone can send it, and a forger must not be able to end the
wait. Ids are drawn by the caller (unpredictable), one per attempt. With `mixed_case` the letters of the name
are as well (draft-vixie-dnsext-dns0x20), and what comes back over UDP must have them so; that keeps forgers
guessing longer, but not every server does it.

    for each server, twice:  ask --answer--> finish
                                 --TC------> ask the same server by TCP
                                 --SERVFAIL, timeout, network error--> next
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeAlias

from egressd.dns import wire
from egressd.dns.replies import Extended, Failure, Rcode
from egressd.model.addresses import Address

__all__ = ["LIMIT", "Command", "Exchange", "Finish", "Question", "Send", "Server", "Transport"]

LIMIT = 8.0  # seconds for everything
_ROUNDS = 2
_UDP_TIMEOUT, _STREAM_TIMEOUT = 1.0, 3.0  # seconds; UDP's doubles in the second round


class Transport(enum.StrEnum):
    UDP = "udp"
    TCP = "tcp"
    TLS = "tls"


_PORTS = {Transport.UDP: 53, Transport.TCP: 53, Transport.TLS: 853}  # RFC 1035, RFC 7858
_URL = re.compile(
    r"(?P<transport>udp|tcp|tls)://(?:(?P<name>[A-Za-z0-9.-]{1,253})@)?"
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+)(?=$|:\d)|(?P<bare>[0-9A-Fa-f:.]+)$)"
    r"(?::(?P<port>[0-9]{1,5}))?"
)


@dataclass(frozen=True, slots=True)
class Server:
    """One upstream server. `name` is what its certificate must be for (TLS only)."""

    transport: Transport
    address: Address
    port: int
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Server:
        """`udp://ADDR[:PORT]`, `tcp://...` or `tls://NAME@ADDR[:PORT]`; IPv6 in brackets before a port.

        ValueError says what is wrong.
        """
        match = _URL.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not an upstream server: write udp://ADDRESS[:PORT], tcp://ADDRESS[:PORT]"
                " or tls://NAME@ADDRESS[:PORT]"
            )
        transport, name = Transport(match["transport"]), match["name"]
        if (name is not None) != (transport is Transport.TLS):
            raise ValueError(
                f"{text!r}: a name to check the certificate for belongs to tls://, and only there"
            )
        port = int(match["port"] or _PORTS[transport])
        if not 1 <= port <= 65535:
            raise ValueError(f"{text!r}: there is no port {port}")
        return cls(transport, ip_address(match["v6"] or match["v4"] or match["bare"]), port, name)

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        name = f"{self.name}@" if self.name else ""
        return f"{self.transport}://{name}{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Question:
    labels: wire.Labels
    qtype: int

    @property
    def name(self) -> str:
        return wire.canonical(self.labels)


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to the server over `transport`, from a new source port if that is UDP. Report what
    comes with this `attempt`'s number; call `expired` at `deadline` (seconds of the caller's clock)."""

    attempt: int
    server: Server
    transport: Transport
    message: bytes
    deadline: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The end. `server` is the one whose answer it is; None with a `Failure`."""

    result: wire.Answer | Failure
    server: Server | None = None


Command: TypeAlias = Send | Finish


class Exchange:
    """`draw` gives an unpredictable number of 16 bits for each attempt, and more for mixed case."""

    def __init__(
        self,
        question: Question,
        servers: Sequence[Server],
        *,
        draw: Callable[[], int],
        mixed_case: bool = False,
    ) -> None:
        self.question = question
        self._draw, self._mixed_case = draw, mixed_case
        self._plan = self._attempts(servers)
        self._attempt = 0
        self._sent: Send | None = None
        self._id = -1
        self._end = 0.0
        self._failure = Failure(Extended.NO_REACHABLE_AUTHORITY, "no upstream server is configured")
        self.finished = False

    @staticmethod
    def _attempts(servers: Sequence[Server]) -> Iterator[tuple[Server, float]]:
        for number in range(_ROUNDS):
            for server in servers:
                udp = server.transport is Transport.UDP
                yield server, _UDP_TIMEOUT * 2**number if udp else _STREAM_TIMEOUT

    def start(self, *, now: float) -> Command:
        self._end = now + LIMIT
        return self._next(now)

    def received(
        self, attempt: int, data: bytes, *, source: tuple[Address, int], now: float
    ) -> Command | None:
        """Bytes arrived from `source`, an address and port. None: not the answer, go on waiting."""
        sent = self._current(attempt)
        if sent is None or source != (sent.server.address, sent.server.port):
            return None
        response = wire.read_response(data)
        if response is None or not self._matches(response):
            return None
        if sent.transport is Transport.UDP and self._mixed_case and not _echoes(sent.message, data):
            return None
        if response.truncated and sent.transport is Transport.UDP:
            return self._send(sent.server, Transport.TCP, _STREAM_TIMEOUT, now)
        if response.answer is None:  # over UDP a forger's, perhaps; over a stream nobody else's
            return None if sent.transport is Transport.UDP else self._failed("sent nonsense", now)
        return self._answered(response.answer, sent.server, now)

    def broken(self, attempt: int, text: str, *, now: float) -> Command | None:
        """The attempt cannot succeed: the network said so, or the stream ended."""
        if self._current(attempt) is None:
            return None
        return self._failed(f"cannot be reached ({text})", now, code=Extended.NETWORK_ERROR)

    def expired(self, attempt: int, *, now: float) -> Command | None:
        """The attempt's deadline has passed."""
        if self._current(attempt) is None:
            return None
        return self._failed("did not answer in time", now, code=Extended.NO_REACHABLE_AUTHORITY)

    def _current(self, attempt: int) -> Send | None:
        return self._sent if not self.finished and attempt == self._attempt else None

    def _matches(self, response: wire.Response) -> bool:
        asked = (self._id, self.question.name, self.question.qtype, 1)
        return asked == (response.id, response.name, response.qtype, response.qclass)

    def _answered(self, answer: wire.Answer, server: Server, now: float) -> Command:
        if answer.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
            self.finished = True
            return Finish(answer, server)
        word = Rcode(answer.rcode).name if answer.rcode in set(Rcode) else f"code {answer.rcode}"
        return self._failed(f"answered {word}", now, code=answer.extended or Extended.OTHER)

    def _failed(self, what: str, now: float, *, code: int = Extended.OTHER) -> Command:
        assert self._sent is not None
        self._failure = Failure(code, f"{self.question.name}: {self._sent.server} {what}")
        return self._next(now)

    def _next(self, now: float) -> Command:
        server, timeout = next(self._plan, (None, 0.0))
        if server is None or now >= self._end:
            self.finished = True
            return Finish(self._failure)
        return self._send(server, server.transport, timeout, now)

    def _send(self, server: Server, transport: Transport, timeout: float, now: float) -> Send:
        self._attempt += 1
        self._id = self._draw() & 0xFFFF
        message = wire.query(id=self._id, labels=self.question.labels, qtype=self.question.qtype)
        if self._mixed_case and transport is Transport.UDP:
            message = _mixed(message, self._draw)
        self._sent = Send(self._attempt, server, transport, message, min(now + timeout, self._end))
        return self._sent


_HEADER = 12  # bytes before the question


def _name_end(message: bytes) -> int:
    """Where the question's name ends. Ours, or one that was read already: it does end."""
    at = _HEADER
    while message[at]:
        at += 1 + message[at]
    return at + 1


def _mixed(message: bytes, draw: Callable[[], int]) -> bytes:
    """The message with a bit drawn for every letter of the name: is it a capital?"""
    end = _name_end(message)
    bits = [number >> bit & 1 for number in (draw() for _ in range(0, end, 16)) for bit in range(16)]
    name = bytearray(message[_HEADER:end])
    for at, byte in enumerate(name):
        if bits[at] and 0x61 <= byte <= 0x7A:  # lengths of labels are below these
            name[at] = byte - 0x20
    return message[:_HEADER] + bytes(name) + message[end:]


def _echoes(asked: bytes, answered: bytes) -> bool:
    end = _name_end(asked)
    return asked[_HEADER:end] == answered[_HEADER:end]
