"""The scene's service behind a real socket: uvicorn in a thread, on a Unix socket or with TLS 1.3; and
whoever speaks to it byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from service_scene import Scene

from egressd.broker.config import Listen, Tls
from egressd.broker.web.listening import Bounds, BrokerServer, context, listening

T = TypeVar("T")


class Serving:
    """`do` runs something in the server's loop, such as looking at the scene's runners."""

    def __init__(self, scene: Scene, listen: Listen, *, tls: Tls | None, bounds: Bounds) -> None:
        self.scene, self.address = scene, listen
        self._stack = contextlib.ExitStack()
        bound = self._stack.enter_context(listening(listen))
        self.port = 0 if listen.path else bound.getsockname()[1]
        self.server = BrokerServer(
            scene.app, tls=None if tls is None else context(tls, source="broker.yaml"), bounds=bounds
        )
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(bound,))
        self._thread.start()

    def _run(self, bound: socket.socket) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self.server.serve(sockets=[bound]))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def do(self, work: Callable[[], Coroutine[Any, Any, T]], within: float = 20.0) -> T:
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(within)

    def close(self) -> None:
        self.do(lambda: self.scene.service.close(within=2))
        self.scene.service.dismiss()
        self.server.should_exit = True
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()
        self._stack.close()

    # ---- speaking to it

    def connect(self) -> socket.socket:
        if self.address.path:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            made.settimeout(20)
            made.connect(self.address.path)
            return made
        return socket.create_connection((self.address.address, self.port), timeout=20)

    def say(self, data: bytes) -> bytes:
        """Everything that comes back until the end of the connection."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):  # it may have heard enough
                connection.sendall(data)
            return everything(connection)


def everything(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            found += chunk
    return found


@contextlib.contextmanager
def serving(
    scene: Scene, listen: Listen, *, tls: Tls | None = None, bounds: Bounds | None = None
) -> Iterator[Serving]:
    made = Serving(scene, listen, tls=tls, bounds=bounds or Bounds(graceful=2))
    try:
        yield made
    finally:
        made.close()


# ---- certificates


@dataclass(frozen=True)
class Pair:
    certificate: str
    key: str


class Authority:
    """A certificate authority with a directory for what it signs."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory, self._name = directory, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(self._name, self._key, ca=True, usage=None)
        self.path = str(directory / f"{name}.pem")
        Path(self.path).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def pair(self, name: str, *, client: bool = False) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(subject, key, ca=False, usage=usage)
        paths = Pair(str(self._directory / f"{name}.pem"), str(self._directory / f"{name}.key"))
        Path(paths.certificate).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        Path(paths.key).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths

    def _signed(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool, usage: Any
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        public = self._key.public_key()
        building = (
            x509.CertificateBuilder(self._name, subject, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
                    key_encipherment=False, data_encipherment=False, key_agreement=False,
                    encipher_only=False, decipher_only=False,
                ),
                critical=True,
            )
        )  # fmt: skip
        if usage is not None:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            building = building.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            building = building.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return building.sign(self._key, hashes.SHA256())
