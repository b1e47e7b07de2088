"""An identity provider of the tests' own: keys, tokens right and wrong, and its two documents over HTTPS."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from egressd.broker.identity.fetching import Fetched
from egressd.broker.identity.issuers import Issuer
from egressd.broker.identity.rereading import Unavailable
from lab.authority import Authority

NOW = 1_800_000_000.0  # when these tests take place
WELL_KNOWN = "/.well-known/openid-configuration"


@functools.cache
def rsa_key(number: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Made once for all tests: it takes a tenth of a second."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@functools.cache
def ec_key(number: int = 0, curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


@functools.cache
def ed_key(number: int = 0) -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


def jwk(private: Any, **members: Any) -> dict[str, Any]:
    """The public half as a JWK. A member that is None is left out."""
    public = private.public_key()
    kind = {
        rsa.RSAPublicKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePublicKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PublicKey: jwt.algorithms.OKPAlgorithm,
    }
    algorithm = next(kind[one] for one in kind if isinstance(public, one))
    found = {k: v for k, v in algorithm.to_jwk(public, as_dict=True).items() if k != "key_ops"} | members
    return {key: value for key, value in found.items() if value is not None}


def pem(private: Any) -> bytes:
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def key_set(*keys: Any) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


def spelt(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(header: Any, claims: Any, sign: Callable[[bytes], bytes]) -> str:
    """A JWS in its compact form, of whatever is to stand in it: bytes as they are, all else as JSON."""
    parts = [spelt(one if isinstance(one, bytes) else json.dumps(one).encode()) for one in (header, claims)]
    text = ".".join(parts)
    return f"{text}.{spelt(sign(text.encode()))}"


def signer(private: Any, algorithm: str) -> Callable[[bytes], bytes]:
    """RFC 7518, section 3: how each algorithm signs. Not by the library under test."""
    hashing = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}.get(
        algorithm[-3:], hashes.SHA256
    )()
    match algorithm[:2]:
        case "RS":
            return lambda text: private.sign(text, padding.PKCS1v15(), hashing)
        case "PS":
            pss = padding.PSS(padding.MGF1(hashing), hashing.digest_size)
            return lambda text: private.sign(text, pss, hashing)
        case "ES":
            return lambda text: _raw(private.sign(text, ec.ECDSA(hashing)), (private.curve.key_size + 7) // 8)
        case "HS":
            return lambda text: hmac.digest(private, text, hashlib.new(f"sha{algorithm[2:]}").name)
        case _:
            return private.sign


def _raw(der: bytes, size: int) -> bytes:
    return b"".join(number.to_bytes(size) for number in decode_dss_signature(der))


def claims_of(issuer: Issuer, **other: Any) -> dict[str, Any]:
    """What a good token says. A claim that is None is left out."""
    found = {
        "iss": issuer.issuer,
        "aud": issuer.audiences[0],
        "sub": "00u1anna",
        "iat": int(NOW) - 10,
        "exp": int(NOW) + 3600,
        "email": "anna@acme.example",
        "groups": ["finance"],
    }
    return {key: value for key, value in (found | other).items() if value is not None}


@dataclass
class Pages:
    """A provider's documents without a network: `pages(url, ca_file)` is what a `Keyring` fetches with."""

    issuer: str
    keys: list[dict[str, Any]]
    max_age: float | None = None
    down: bool = False
    asked: list[str] = field(default_factory=list)
    description: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None  # instead of the keys

    def __call__(self, url: str, ca_file: str) -> Fetched:
        self.asked.append(url)
        if self.down:
            raise Unavailable(f"{url}: connection refused")
        if url.endswith(WELL_KNOWN):
            said = {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"} | self.description
            return Fetched(json.dumps(said).encode())
        return Fetched(key_set(*self.keys) if self.raw is None else self.raw, self.max_age)


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# ---- over HTTPS

Answer = tuple[int, dict[str, str], bytes]


class Server(socketserver.ThreadingTCPServer):
    """`answers[path]` is what is said there, or what says it to the handler's `wfile`; `asked` who came."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, authority: Authority, name: str = "127.0.0.1") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._context = authority.context(name)
        self.answers: dict[str, Answer | Callable[[Any], None]] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}"

    def serve_json(self, path: str, document: Any, **headers: str) -> None:
        spelt = {name.replace("_", "-"): value for name, value in headers.items()}
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.answers[path] = (200, spelt, body)

    def serve_provider(self, *keys: Any, path: str = "", **headers: str) -> str:
        """Both documents; the issuer's URL."""
        issuer = self.url + path
        self.serve_json(path + WELL_KNOWN, {"issuer": issuer, "jwks_uri": f"{issuer}/keys"})
        self.serve_json(path + "/keys", key_set(*keys), **headers)
        return issuer

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(20)
        try:
            with self._context.wrap_socket(request, server_side=True) as secure:
                super().finish_request(secure, client_address)
        except (ssl.SSLError, OSError):
            pass  # the client did not like the certificate, or went

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answer = self.server.answers.get(self.path, (404, {}, b""))
        if callable(answer):
            answer(self)
            return
        status, headers, body = answer
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(authority: Authority, name: str = "127.0.0.1") -> Iterator[Server]:
    server = Server(authority, name)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def slowly(pieces: bytes, server: Server, *, pause: float) -> Callable[[Any], None]:
    """Says `pieces` byte by byte until the client goes or the server closes."""

    def answer(handler: Any) -> None:
        for one in pieces:
            if server.closing.wait(pause):
                return
            handler.wfile.write(bytes([one]))
            handler.wfile.flush()

    return answer


def written(path: Path, data: bytes) -> Path:
    """By rename, as the file's readers ask for."""
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(data)
    aside.rename(path)
    return path


def unix_now() -> int:
    return int(time.time())
