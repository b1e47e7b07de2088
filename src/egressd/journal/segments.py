"""How a journal lies in files: 0001.jsonl, 0002.jsonl, ... each a run of whole lines.

A file is only ever appended to, and only the last one. A line that a crash cut short is the one thing
that can be wrong at its end: `torn` says which bytes those are. Beside each lie 0001.leaves, its records'
leaf hashes, and once it is closed 0001.frontier, what is needed to go on hashing after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["frontier", "leaves", "name", "number", "numbers", "torn"]

_NAME = re.compile(r"([0-9]{4,12})\.jsonl")


def name(segment: int) -> str:
    """The file name of segment `segment`, counted from 1."""
    if segment < 1:
        raise ValueError(f"there is no segment {segment}")
    return f"{segment:04d}.jsonl"


def leaves(segment: int) -> str:
    """The file of its leaf hashes, 32 bytes each."""
    return name(segment).replace(".jsonl", ".leaves")


def frontier(segment: int) -> str:
    """The file of the Merkle frontier at its end."""
    return name(segment).replace(".jsonl", ".frontier")


def number(file_name: str) -> int | None:
    """The inverse of `name`; None for a file that is not a segment."""
    match = _NAME.fullmatch(file_name)
    segment = int(match[1]) if match else 0
    return segment if segment and name(segment) == file_name else None


def numbers(file_names: Iterable[str]) -> list[int]:
    """The segments among `file_names`, oldest first."""
    return sorted(found for file_name in file_names if (found := number(file_name)) is not None)


def torn(tail: bytes) -> int:
    """How many bytes at the end of `tail` belong to no whole line (0: it ends as a file should)."""
    return len(tail) - (tail.rfind(b"\n") + 1)
