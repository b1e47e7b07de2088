"""Removing what dead requests left in a scratch on disk, when the service starts: after SIGKILL, a power cut,
a disk that was full.

A request's process holds its directory (flock(2)) as long as it lives, so what nobody holds is a leftover.
Only directories of this account's that are named as requests are looked at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from egressd.vault import scratch

__all__ = ["Swept", "sweep"]


@dataclass(frozen=True, slots=True)
class Swept:
    """What was removed, and what could not be."""

    count: int = 0
    names: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def sweep(root: str | Path) -> Swept:
    """Remove leftovers in the scratch directory `root`. `Refused` where others can write to it."""
    number = scratch.open_scratch(root)
    try:
        names = sorted(name for name in os.listdir(number) if scratch.NAME.fullmatch(name))  # noqa: PTH208
        found = {name: _sweep(name, above=number) for name in names}
    finally:
        os.close(number)
    removed = tuple(name for name, problems in found.items() if problems == [])
    said = tuple(f"{name}: {problem}" for name, problems in found.items() for problem in problems or ())
    return Swept(len(removed), removed, said)


def _sweep(name: str, *, above: int) -> list[str] | None:
    """What stood in the way; None for what lives."""
    try:
        if os.stat(name, dir_fd=above, follow_symlinks=False).st_uid != os.geteuid():
            return ["belongs to somebody else, and was left"]
        held = scratch.hold(name, above=above, wait=False)
    except FileNotFoundError:
        return None  # its own process was faster
    except OSError as error:
        return [f"was left: {error.strerror}"]
    return None if held is None else scratch.discard(name, above=above, held=held)
