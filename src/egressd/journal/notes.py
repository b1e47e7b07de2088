"""Checkpoints of the log: C2SP tlog-checkpoint in a C2SP signed-note.

    machine/egressd/1f0c22aa                    origin: which log
    20852163                                    how many records
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=    root of the Merkle tree over them

    — machine/egressd/1f0c22aa Az3grl...        em dash, key name, base64(key id || signature)

Signed is the text with its last newline, without the blank line. A note may carry signatures of keys that
are not known here, such as witnesses' cosignatures: they are neither checked nor removed.
https://c2sp.org/signed-note, https://c2sp.org/tlog-checkpoint; Go's sumdb/note is what others use.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from egressd.journal.keys import BadKey, PrivateKey, Verifier, key_hash, strict_base64

__all__ = [
    "Checkpoint", "NoteError", "Signature", "Verifier", "cosigned", "key_hash", "open", "open_text", "parse",
    "sign", "signatures", "signers", "split",
]  # fmt: skip

MAX_NOTE = 1 << 20  # characters
MAX_SIGNATURES = 100  # as many as Go's reader takes
_DASH = "\u2014 "
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_ROOT = 32  # bytes
_ID = 4  # bytes


class NoteError(ValueError):
    """The note is malformed, or not signed as it must be."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`extensions`: further lines, which a log of ours never writes."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lines = (self.origin, *self.extensions)
        if not all(lines) or any(ord(c) < 0x20 or 0xD800 <= ord(c) < 0xE000 for line in lines for c in line):
            raise NoteError("a line of the checkpoint is empty or holds control characters")
        if type(self.size) is not int or not 0 <= self.size < 1 << 63 or len(self.root) != _ROOT:
            raise NoteError("the size or the root is not one a checkpoint can have")

    @property
    def text(self) -> str:
        """What is signed."""
        root = base64.b64encode(self.root).decode("ascii")
        return "".join(f"{line}\n" for line in (self.origin, self.size, root, *self.extensions))


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line. `key` is the key id, `data` what that key signed with."""

    name: str
    key: int
    data: bytes

    @property
    def line(self) -> str:
        encoded = base64.b64encode(self.key.to_bytes(_ID, "big") + self.data).decode("ascii")
        return f"{_DASH}{self.name} {encoded}\n"


def parse(text: str) -> Checkpoint:
    """The checkpoint in a note's text. Says nothing of who signed it: use `open`."""
    origin, size, root, *more = [*text.split("\n"), "", ""]
    extensions = more[:-3]
    data = _decoded(root)
    if more[-3:] != ["", "", ""] or not _SIZE.fullmatch(size) or data is None:
        raise NoteError("the text is not a checkpoint's: origin, size, root, each on its line")
    return Checkpoint(origin, int(size), data, tuple(extensions))


def sign(checkpoint: Checkpoint, name: str, keys: Sequence[PrivateKey]) -> str:
    """The note, signed by each of `keys` under `name`, in their order."""
    lines = [_sign(checkpoint.text, name, key).line for key in keys]
    if not lines:
        raise NoteError("a note without a signature is no note")
    return f"{checkpoint.text}\n{''.join(lines)}"


def _sign(text: str, name: str, key: PrivateKey) -> Signature:
    try:
        verifier = Verifier(name, key.public)
    except BadKey as error:
        raise NoteError(str(error)) from error
    return Signature(verifier.name, key_hash(name, key.public), key.sign(text.encode()))


def signatures(note: str) -> tuple[str, list[Signature]]:
    """The text of a note and its signatures, unchecked. NoteError if it is malformed."""
    if len(note) > MAX_NOTE or any((ord(c) < 0x20 and c != "\n") or 0xD800 <= ord(c) < 0xE000 for c in note):
        raise NoteError("the note is too long or holds control characters")
    text, blank, block = note.rpartition("\n\n")
    if not blank or not text or not block.endswith("\n"):
        raise NoteError("the note has no text, blank line and signatures")
    lines = block.removesuffix("\n").split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise NoteError(f"the note has more than {MAX_SIGNATURES} signatures")
    return text + "\n", [_signature(line) for line in lines]


def _signature(line: str) -> Signature:
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    data = _decoded(encoded)
    if not line.startswith(_DASH) or not _is_name(name) or data is None or len(data) <= _ID:
        raise NoteError("a signature line is malformed")
    return Signature(name, int.from_bytes(data[:_ID], "big"), data[_ID:])


def _decoded(text: str) -> bytes | None:
    try:
        return strict_base64(text)
    except ValueError:
        return None


def _is_name(name: str) -> bool:
    return bool(name) and "+" not in name and not any(c.isspace() for c in name)


def open_text(note: str, verifiers: Iterable[Verifier | str]) -> tuple[str, list[Verifier]]:
    """The text of any signed note, and which of `verifiers` signed it, in the note's order.

    As in Go's reader: the first signature of a known key decides for that key, a wrong one refuses the note,
    and so does a note that none of them signed.
    """
    text, found = signatures(note)
    known = _known(verifiers)
    signers: list[Verifier] = []
    seen: set[tuple[str, int]] = set()
    for signature in found:
        identity = signature.name, signature.key
        verifier = known.get(identity)
        if verifier is None or identity in seen:
            continue
        seen.add(identity)
        if not verifier.key.verify(signature.data, text.encode()):
            raise NoteError(f"the signature of {signature.name}+{signature.key:08x} is wrong")
        signers.append(verifier)
    if not signers:
        raise NoteError("the note is signed by none of the known keys")
    return text, signers


def _known(verifiers: Iterable[Verifier | str]) -> dict[tuple[str, int], Verifier]:
    known: dict[tuple[str, int], Verifier] = {}
    for given in verifiers:
        verifier = Verifier.parse(given) if isinstance(given, str) else given
        identity = verifier.name, key_hash(verifier.name, verifier.key)
        if known.setdefault(identity, verifier) != verifier:
            raise NoteError(f"two keys are called {verifier.name}+{identity[1]:08x}")
    return known


def open(note: str, verifiers: Iterable[Verifier | str]) -> Checkpoint:
    """The checkpoint that at least one of `verifiers` (or verifier keys) signed. NoteError says what is
    wrong; BadKey if a verifier key is none."""
    return parse(open_text(note, verifiers)[0])


def signers(note: str, verifiers: Iterable[Verifier | str]) -> list[Verifier]:
    """Which of `verifiers` signed; NoteError as `open`."""
    return open_text(note, verifiers)[1]


def cosigned(note: str, more: Iterable[Signature]) -> str:
    """The note with further signatures after its own; those it has already are not repeated."""
    _, present = signatures(note)
    return note + "".join(signature.line for signature in more if signature not in present)


def split(text: str) -> list[str]:
    """The notes of a `checkpoints` file, each there followed by a blank line. What follows the last one is
    a note not written to its end, and is not among them: `sum(len(note) + 1)` says where it begins."""
    notes, pending = [], []
    for part in text.split("\n\n")[:-1]:
        pending.append(part)
        if part.startswith(_DASH):
            notes.append("\n\n".join(pending) + "\n")
            pending = []
    return notes
