"""Ed25519 keys, and how they are written down.

    private   PKCS #8 PEM (RFC 5958, RFC 8410), unencrypted: the file's mode is what protects it
    public    SubjectPublicKeyInfo PEM, or a signed-note verifier key:
              name "+" hex(key id) "+" base64(0x01 || 32 bytes)             https://c2sp.org/signed-note

Only this module touches cryptography. The signatures are those of RFC 8032, deterministic, 64 bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["BadKey", "PrivateKey", "PublicKey", "Verifier", "key_hash", "strict_base64"]

_ED25519 = b"\x01"  # signature type, signed-note
_RAW = 32  # bytes
_VERIFIER = re.compile(r"([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]+={0,2})")


class BadKey(ValueError):
    """The text is no key of a kind used here. Never repeats what it was given: it may be a secret."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """32 bytes. Says what it is and nothing of whose it is."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != _RAW:
            raise BadKey(f"an Ed25519 public key has {_RAW} bytes, not {len(self.raw)}")

    def verify(self, signature: bytes, data: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except InvalidSignature:
            return False
        return True

    @property
    def fingerprint(self) -> str:
        """`sha256:` and the hex digest of the 32 bytes."""
        return "sha256:" + hashlib.sha256(self.raw).hexdigest()

    def verifier(self, name: str) -> str:
        """The verifier key under this name."""
        return str(Verifier(name, self))

    def pem(self) -> str:
        key = Ed25519PublicKey.from_public_bytes(self.raw)
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return key.public_bytes(serialization.Encoding.PEM, form).decode("ascii")

    @classmethod
    def load(cls, text: str | bytes) -> PublicKey:
        """From PEM or from a verifier key, whose name is then forgotten."""
        data = text.encode("utf-8", "replace") if isinstance(text, str) else text
        if b"-----BEGIN" not in data:
            return Verifier.parse(data.decode("utf-8", "replace").strip()).key
        try:
            key = serialization.load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BadKey("this PEM holds no public key") from error
        if not isinstance(key, Ed25519PublicKey):
            raise BadKey("the public key is not an Ed25519 key")
        return cls(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key and the name it signs under. `str()` is its verifier key."""

    name: str
    key: PublicKey

    def __post_init__(self) -> None:
        if not self.name or "+" in self.name or any(c.isspace() or ord(c) < 0x20 for c in self.name):
            raise BadKey("a key's name has no spaces and no plus sign, and is not empty")

    def __str__(self) -> str:
        encoded = base64.b64encode(_ED25519 + self.key.raw).decode("ascii")
        return f"{self.name}+{key_hash(self.name, self.key):08x}+{encoded}"

    @classmethod
    def parse(cls, text: str) -> Verifier:
        match = _VERIFIER.fullmatch(text)
        if match is None:
            raise BadKey("neither PEM nor a verifier key (name+hash+base64)")
        try:
            data = strict_base64(match[3])
        except ValueError:
            data = b""
        if data[:1] != _ED25519:
            raise BadKey("the verifier key is not an Ed25519 key")
        verifier = cls(match[1], PublicKey(data[1:]))
        if int(match[2], 16) != key_hash(verifier.name, verifier.key):
            raise BadKey("the verifier key's hash is not that of its name and key")
        return verifier


class PrivateKey:
    """Signs. Its repr shows the public half alone."""

    __slots__ = ("_key", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.public = PublicKey(raw)

    def __repr__(self) -> str:
        return f"PrivateKey({self.public.fingerprint})"

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    @classmethod
    def generate(cls) -> PrivateKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> PrivateKey:
        """RFC 8032's 32 bytes; what Go's note package keeps in its PRIVATE+KEY texts."""
        if len(seed) != _RAW:
            raise BadKey(f"an Ed25519 seed has {_RAW} bytes, not {len(seed)}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, pem: bytes) -> PrivateKey:
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
            raise BadKey("no unencrypted private key in PEM (PKCS #8)") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise BadKey("the private key is not an Ed25519 key")
        return cls(key)

    def dump(self) -> bytes:
        """PKCS #8 PEM."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def key_hash(name: str, public: PublicKey) -> int:
    """The key id: the first four bytes of SHA-256(name || newline || 0x01 || key), big-endian."""
    digest = hashlib.sha256(name.encode() + b"\n" + _ED25519 + public.raw).digest()
    return int.from_bytes(digest[:4], "big")


def strict_base64(text: str) -> bytes:
    """RFC 4648 section 4 in its one spelling: padded, nothing else between, unused bits zero (section 3.5).
    ValueError says what is wrong."""
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(f"not base64: {error}") from error
    # Strict mode leaves one freedom: the bits of the last character that no byte takes up.
    last = data[len(data) - (len(data) % 3 or 3) :] if data else b""
    if base64.b64encode(last).decode("ascii") != text[-4:]:
        raise ValueError("base64 with bits set that mean nothing")
    return data
