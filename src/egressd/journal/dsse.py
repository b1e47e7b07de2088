"""DSSE, the envelope around a proof: what is signed is the type and the bytes, never their JSON.

https://github.com/secure-systems-lab/dsse, protocol.md and envelope.md, version 1.0.2. An envelope is

    {"payload":"<base64>","payloadType":"application/vnd.in-toto+json","signatures":[{"keyid":"...","sig":"..."}]}

Others may spell an envelope as they like and still be right; a proof file is held to one spelling
(`encode`), so that no byte of it can be changed without being noticed: neither blanks nor repeated
members nor the spare bits of a base64 ending, all of which a signature does not cover. The specification
leaves `keyid` unsigned and calls it a hint; here it must be the fingerprint of the key that signed.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import msgspec
from msgspec import Struct

from egressd.journal.keys import strict_base64 as _decoded

__all__ = [
    "IN_TOTO", "DsseError", "Envelope", "Signature", "Signed", "Signer", "Verifier", "decode", "encode",
    "open", "pae", "seal", "signers", "strict_base64",
]  # fmt: skip

IN_TOTO: Final = "application/vnd.in-toto+json"
MAX_SIGNATURES: Final = 16


class DsseError(ValueError):
    """The envelope is not one. `place` is where, as a JSON path or a byte of the file."""

    def __init__(self, text: str, *, place: str = "") -> None:
        self.place = place
        super().__init__(text)


class Verifier(Protocol):
    """What is needed of a public key."""

    @property
    def fingerprint(self) -> str: ...

    def verify(self, signature: bytes, data: bytes) -> bool: ...


class Signer(Protocol):
    """What is needed of a private key."""

    @property
    def public(self) -> Verifier: ...

    def sign(self, data: bytes) -> bytes: ...


class Signature(Struct, frozen=True, forbid_unknown_fields=True):
    keyid: str
    sig: str


class Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    payload: str
    payload_type: str = msgspec.field(name="payloadType")
    signatures: tuple[Signature, ...]


class Signed(Struct, frozen=True):
    """An envelope, opened and not yet believed: (key id, signature) pairs over `pae(type, payload)`."""

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]


def pae(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding: "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(payload_type: str, payload: bytes, keys: Sequence[Signer]) -> dict[str, Any]:
    """The envelope as a JSON document, signed with every key. ValueError without a key."""
    if not keys:
        raise ValueError("an envelope without a signature proves nothing")
    data = pae(payload_type, payload)
    return {
        "payload": base64.b64encode(payload).decode("ascii"),
        "payloadType": payload_type,
        "signatures": [
            {"keyid": key.public.fingerprint, "sig": base64.b64encode(key.sign(data)).decode("ascii")}
            for key in keys
        ],
    }


def encode(envelope: dict[str, Any]) -> bytes:
    """The one spelling of an envelope in a file: members sorted, no blanks, a newline at the end."""
    members = msgspec.convert(envelope, Envelope)
    return msgspec.json.encode(members, order="sorted") + b"\n"


def decode(data: bytes) -> Envelope:
    """Read a file. DsseError for what is no envelope, and for one that is not spelled as `encode` does."""
    if not data:
        raise DsseError("the file is empty", place="byte 0")
    if not data.isascii():
        at = _first_difference(data, data.decode("ascii", "replace").encode("ascii", "replace"))
        raise DsseError("the file holds a byte that no proof holds", place=f"byte {at}")
    try:
        envelope = msgspec.json.decode(data, type=Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DsseError(f"the file is not a proof: {error}", place="the file") from error
    proper = msgspec.json.encode(envelope, order="sorted") + b"\n"
    if proper != data:
        at = _first_difference(proper, data)
        raise DsseError("the file was changed where no signature reaches", place=f"byte {at}")
    return envelope


def _first_difference(left: bytes, right: bytes) -> int:
    """By halves: a proof may be hundreds of megabytes."""
    same, most = 0, min(len(left), len(right))
    while same < most:
        middle = (same + most + 1) // 2
        if left[same:middle] == right[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


def open(envelope: Envelope) -> Signed:
    """Undo the base64, strictly. The signatures are not checked; `signers` does."""
    if not 1 <= len(envelope.signatures) <= MAX_SIGNATURES:
        raise DsseError("no signature, or more than any proof has", place="signatures")
    return Signed(
        payload_type=envelope.payload_type,
        payload=strict_base64(envelope.payload, place="payload"),
        signatures=tuple(
            (each.keyid, strict_base64(each.sig, place=f"signatures[{number}].sig"))
            for number, each in enumerate(envelope.signatures)
        ),
    )


def strict_base64(text: str, *, place: str) -> bytes:
    """`keys.strict_base64`; DsseError, naming the place, for anything else."""
    try:
        return _decoded(text)
    except ValueError as error:
        raise DsseError(str(error), place=place) from error


def signers(signed: Signed, keys: Iterable[Verifier]) -> tuple[str, ...]:
    """The fingerprints of those who signed. DsseError if any signature is not by the key it names, is
    repeated, or names a key that is not among `keys`: nothing in a proof is there for nothing."""
    known = {key.fingerprint: key for key in keys}
    data = pae(signed.payload_type, signed.payload)
    found: list[str] = []
    for number, (keyid, signature) in enumerate(signed.signatures):
        key = known.get(keyid)
        if key is None:
            raise DsseError(
                f"signed by a key that the proof does not list: {keyid}", place=f"signatures[{number}].keyid"
            )
        if keyid in found:
            raise DsseError("two signatures by one key", place=f"signatures[{number}]")
        if not key.verify(signature, data):
            raise DsseError("the signature does not fit what is signed", place=f"signatures[{number}].sig")
        found.append(keyid)
    return tuple(found)
