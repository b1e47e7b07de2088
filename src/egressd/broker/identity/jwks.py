"""A provider's public keys as it publishes them (RFC 7517), and which of them a token was signed with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from egressd.model.errors import Unfit
from egressd.model.names import quoted

__all__ = ["Key", "NoKey", "PublicKey", "choose", "json_object", "read", "spelt"]

_MAX_KEYS = 100
_RSA_BITS = (2048, 8192)  # less is weak (RFC 7518, section 3.3), more takes long to verify
_MAX_EXPONENT_BITS = 32
_MAX_KID = 512  # characters

PublicKey: TypeAlias = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

# RFC 7518, section 3.1, RFC 8037: the algorithms that a key of this type and curve can verify.
_FITS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("RSA", ""): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
# Members of a private or symmetric key (RFC 7518, sections 6.2.2 to 6.4). Once published, anybody signs.
_PRIVATE = frozenset(("d", "p", "q", "dp", "dq", "qi", "oth", "k"))


class NoKey(Exception):
    """No key, or no single one, that this token can have been signed with."""


@dataclass(frozen=True, slots=True)
class Key:
    kid: str | None
    algorithms: frozenset[str]  # what it may verify
    public: PublicKey


def read(data: bytes, algorithms: tuple[str, ...]) -> tuple[Key, ...]:
    """The keys of a JWK set that can verify one of these algorithms. `Unfit` where it is no JWK set.

    Keys of unknown types, for other uses, weak or malformed ones are left out (RFC 7517, section 5): a
    provider may publish keys for all sorts of purposes. The same key twice counts once.
    """
    document = json_object(data, "the key set")
    listed = document.get("keys")
    if not isinstance(listed, list) or len(listed) > _MAX_KEYS:
        raise Unfit(f"the key set is no list of at most {_MAX_KEYS} keys", 'look for {"keys": [...]}')
    found: list[Key] = []
    for key in (_key(item, algorithms) for item in listed):
        if key is not None and key not in found:
            found.append(key)
    return tuple(found)


def _key(jwk: object, algorithms: tuple[str, ...]) -> Key | None:
    if not isinstance(jwk, dict) or jwk.keys() & _PRIVATE or not _for_signatures(jwk):
        return None
    kid, kind, curve = jwk.get("kid"), jwk.get("kty"), jwk.get("crv", "")
    if not isinstance(kid, str | None) or len(kid or "") > _MAX_KID:
        return None
    if not isinstance(kind, str) or not isinstance(curve, str):
        return None
    fits = set(_FITS.get((kind, curve), ())) & set(algorithms)
    if "alg" in jwk:
        fits &= {jwk["alg"]} if isinstance(jwk["alg"], str) else set()
    public = _public(jwk, min(fits)) if fits else None
    return None if public is None else Key(kid, frozenset(fits), public)


def _for_signatures(jwk: dict[str, Any]) -> bool:
    """`use` and `key_ops` (RFC 7517, sections 4.2 and 4.3) speak of signatures, or say nothing."""
    operations = jwk.get("key_ops", ["verify"])
    return jwk.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations


def _public(jwk: dict[str, Any], algorithm: str) -> PublicKey | None:
    try:
        key = jwt.PyJWK(jwk, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        return None  # PyJWT takes values of the wrong type to be text
    if isinstance(key, RSAPublicKey):
        strong = _RSA_BITS[0] <= key.key_size <= _RSA_BITS[1]
        return key if strong and key.public_numbers().e.bit_length() <= _MAX_EXPONENT_BITS else None
    return key if isinstance(key, EllipticCurvePublicKey | Ed25519PublicKey) else None


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """`Unfit` for anything else."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise Unfit(f"{what} is not JSON", "look at what stands there") from None
    if not isinstance(document, dict):
        raise Unfit(f"{what} is not a JSON object", "look at what stands there")
    return document


def choose(keys: tuple[Key, ...], kid: str | None, algorithm: str) -> Key | None:
    """None if there is none. `NoKey` if there are several: which one signs must not be tried out.

    A token may do without `kid` where only one key fits (OpenID Connect Core 1.0, section 10.1).
    """
    fitting = [key for key in keys if algorithm in key.algorithms and kid in (None, key.kid)]
    if len(fitting) > 1:
        raise NoKey(f"{len(fitting)} keys for {algorithm} could be meant by kid {spelt(kid)}")
    return fitting[0] if fitting else None


def spelt(kid: str | None) -> str:
    """For a message: the kid is foreign."""
    return "(none)" if kid is None else quoted(kid)
