"""Corpora: one file for each target, a line of base64 for each input, sorted. What a fuzzer found worth
keeping is merged into them, and what it broke something with."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

__all__ = ["MOST", "SIZE", "load", "save"]

DIRECTORY = Path(__file__).parent / "corpus"
MOST, SIZE = 400, 2048  # inputs of a target, and bytes of one


def load(name: str) -> list[bytes]:
    path = DIRECTORY / f"{name}.b64"
    return [base64.b64decode(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(name: str, inputs: Iterable[bytes], *, always: Iterable[bytes] = ()) -> int:
    """The shortest first, as many as there is room for, and `always`; how many that is."""
    kept = sorted({data for data in inputs if len(data) <= SIZE}, key=lambda data: (len(data), data))[:MOST]
    lines = sorted({base64.b64encode(data).decode() for data in (*kept, *always)})
    (DIRECTORY / f"{name}.b64").write_text("".join(f"{line}\n" for line in lines))
    return len(lines)
