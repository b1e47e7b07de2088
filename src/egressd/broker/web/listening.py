"""The socket, its TLS, and a server that is not held up by those who say little.

uvicorn runs the application, by h11. What it leaves to a proxy is added here, since there is none: time
limits for a request's head and its body, an end to connections whose reader has stopped reading, and a bound
on how many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from egressd.broker.config import Listen, Tls
from egressd.model.errors import PolicyError, Problem, Refused
from egressd.model.verdicts import Reason

__all__ = ["Bounds", "BrokerServer", "context", "listening"]

_SOCKET_MODE = 0o666  # who asks is known by their token, not by their account
_BACKLOG = 128
_HEAD_PIECE = 8 << 10  # bytes


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds, bytes, connections."""

    handshake: float = 10.0
    head: float = 10.0
    body: float = 60.0
    unread: float = 30.0  # for which a reader may not read what is sent
    idle: int = 10
    head_bytes: int = 32 << 10  # a token, and little else
    connections: int = 256
    graceful: int = 10


# ---- TLS and sockets


def context(tls: Tls, *, source: str) -> ssl.SSLContext:
    """TLS 1.3 alone, and no client without a certificate. PolicyError where a file cannot be used."""
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.minimum_version = found.maximum_version = ssl.TLSVersion.TLSv1_3
    found.verify_mode = ssl.CERT_REQUIRED
    found.verify_flags |= ssl.VERIFY_X509_STRICT
    found.set_alpn_protocols(["http/1.1"])
    found.num_tickets = 0  # each connection shows its certificate
    try:
        found.load_cert_chain(tls.certificate, tls.key, password=_no_password)
    except (OSError, ValueError) as error:
        files = f"{tls.certificate} and {tls.key}"
        raise _unusable(source, "tls.certificate", files, error) from error
    try:
        found.load_verify_locations(tls.client_ca)
    except OSError as error:  # ssl.SSLError is one
        raise _unusable(source, "tls.client_ca", tls.client_ca, error) from error
    return found


def _no_password() -> str:
    """A service that asks at a terminal would wait for ever."""
    raise ValueError("the key is encrypted")


def _unusable(source: str, where: str, files: str, error: Exception) -> PolicyError:
    text = f"{files} cannot be used: {getattr(error, 'strerror', None) or error}"
    return PolicyError(
        [Problem(source, 0, where, text, "name PEM files that the service's account may read")]
    )


@contextlib.contextmanager
def listening(listen: Listen) -> Iterator[socket.socket]:
    """Bound and listening; a Unix socket is removed at the end. `Refused` where that cannot be."""
    bound = _unix(listen.path) if listen.path else _tcp(listen.address, listen.port)
    try:
        yield bound
    finally:
        bound.close()
        if listen.path:
            with contextlib.suppress(OSError):
                os.unlink(listen.path)  # noqa: PTH108


def _unix(path: str) -> socket.socket:
    _remove_old(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        made.bind(path)
        os.chmod(path, _SOCKET_MODE)  # noqa: PTH101
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise Refused(Reason.UNAVAILABLE, f"{path} cannot be listened at: {error.strerror}") from error
    return made


def _remove_old(path: str) -> None:
    """Of a service that was killed. One that somebody listens at is left alone."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Refused(Reason.UNAVAILABLE, f"{path} is there, and is no socket: move it away")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # noqa: PTH108
        except OSError as error:
            raise Refused(Reason.UNAVAILABLE, f"{path}: {error}") from error
        else:
            raise Refused(Reason.UNAVAILABLE, f"somebody listens at {path} already")


def _tcp(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # who accepts inherits it
        made.bind((address, port))
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise Refused(
            Reason.UNAVAILABLE, f"{address} port {port} cannot be listened at: {error.strerror}"
        ) from error
    return made


# ---- connections


class Connection(H11Protocol):
    """With a clock on each thing that its client is to do."""

    bounds = Bounds()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._clock: asyncio.TimerHandle | None = None
        self._timed: tuple[Any, int] | None = None
        self._cycles = 0
        self._unread: asyncio.TimerHandle | None = None
        if len(self.connections) > 2 * self.bounds.connections:
            transport.abort()
            return
        self._time()

    def data_received(self, data: bytes) -> None:
        # h11 looks at the length of a head that is not whole yet: one that comes whole would pass.
        while self.conn.their_state is h11.IDLE and len(data) > _HEAD_PIECE:
            super().data_received(data[:_HEAD_PIECE])
            data = data[_HEAD_PIECE:]
            if self.transport.is_closing():
                return
        super().data_received(data)
        self._time()

    def on_response_complete(self) -> None:
        self._cycles += 1
        super().on_response_complete()
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._clock, self._unread):
            if timer is not None:
                timer.cancel()

    def _time(self) -> None:
        """A clock begins when something else is waited for, not with each byte of it."""
        state = (self.conn.their_state, self._cycles)
        if state == self._timed:
            return
        self._timed = state
        if self._clock is not None:
            self._clock.cancel()
        within = {h11.IDLE: self.bounds.head, h11.SEND_BODY: self.bounds.body}.get(state[0])
        # Between two requests uvicorn's own clock runs, until the first byte of the next one stops it.
        self._clock = None if within is None else self.loop.call_later(within, self._too_slow)

    def _too_slow(self) -> None:
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.bounds.unread, self._too_slow)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class BrokerServer(Server):
    """Serves one bound socket until `should_exit`. Signals are its caller's."""

    def __init__(self, app: ASGIApp, *, tls: ssl.SSLContext | None = None, bounds: Bounds = Bounds()) -> None:
        protocol = type("BoundedConnection", (Connection,), {"bounds": bounds})
        super().__init__(
            Config(
                app,
                http=protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=bounds.idle,
                timeout_graceful_shutdown=bounds.graceful,
                limit_concurrency=bounds.connections,
                h11_max_incomplete_event_size=bounds.head_bytes,
            )
        )
        self._tls, self._bounds = tls, bounds

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but with a clock on the handshake."""
        await self.lifespan.startup()
        loop = asyncio.get_running_loop()
        more: dict[str, Any] = {}
        if self._tls is not None:
            more = {"ssl": self._tls, "ssl_handshake_timeout": self._bounds.handshake}
        self.servers = [
            await loop.create_server(self._connection, sock=one, backlog=_BACKLOG, **more)
            for one in sockets or []
        ]
        self.started = True

    def _connection(self) -> asyncio.Protocol:
        made: Any = self.config.http_protocol_class  # a class, though declared as more than that
        protocol: asyncio.Protocol = made(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol
