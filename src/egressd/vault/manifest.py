"""What MANIFEST.json says of the files that a request is shown, byte for byte. Pure: who copies them and who
decided on them get the same bytes, each by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Protocol

import msgspec

__all__ = ["Entry", "digest_of", "written"]


class Entry(Protocol):
    """A document as it was ingested."""

    @property
    def id(self) -> str: ...
    @property
    def size(self) -> int: ...  # bytes
    @property
    def digest(self) -> str: ...  # "sha256:" and 64 hex digits


def written(entries: Collection[Entry]) -> bytes:
    """Canonical: keys and files sorted, ASCII, no spaces, one line feed at the end."""
    files = [_told(entry) for entry in sorted(entries, key=lambda entry: entry.id)]
    return msgspec.json.encode({"files": files}) + b"\n"


def digest_of(text: bytes) -> str:
    """As records and receipts spell it."""
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def _told(entry: Entry) -> dict[str, str | int]:
    """The path is spelled as in the identifier: what is no plain ASCII is %XX."""
    digest = entry.digest.removeprefix("sha256:")
    return {"id": entry.id, "path": entry.id.replace(":", "/", 1), "sha256": digest, "size": entry.size}
