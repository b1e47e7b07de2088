"""A checkpoint that somebody kept: a signed note, or the one that an earlier proof ends with."""

from __future__ import annotations

from pathlib import Path

__all__ = ["BadCheckpoint", "kept", "size_of"]

_MOST = 360 << 20  # bytes, as of a proof


class BadCheckpoint(ValueError):
    """The file holds none; for the person who named it."""


def kept(name: str) -> str:
    """The note in a file, unchecked."""
    from egressd.journal import dsse, statement  # noqa: PLC0415

    try:
        with Path(name).open("rb") as file:
            data = file.read(_MOST)
        if data.startswith(b"{"):
            return statement.decode(dsse.open(dsse.decode(data)).payload).predicate.journal.end
        note = data.decode()
        size_of(note)
    except OSError as error:
        raise BadCheckpoint(f"--checkpoint {name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # DsseError, StatementError, NoteError
        text = f"--checkpoint {name} holds neither a signed note nor a proof: {error}"
        raise BadCheckpoint(text) from error
    return note


def size_of(note: str) -> int:
    """Records under it."""
    from egressd.journal import notes  # noqa: PLC0415

    return notes.parse(notes.signatures(note)[0]).size
