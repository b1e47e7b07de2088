"""What happened while nobody kept the journal: kept in a file until the next auditor is told.

The foundation runs before the others do, and `--dismantle` when none of them runs. What they have to say for
the record is appended to state_dir/unrecorded.jsonl, which survives a reboot; the supervisor hands it to the
first auditor that it starts, and removes the file when all of it was handed over.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec import Struct

from egressd.processes import plain_files

__all__ = ["Happening", "Plain", "forget", "keep", "kept"]

log = logging.getLogger("egressd")

_FILE = "unrecorded.jsonl"
_MOST = 64 << 20  # bytes; a happening takes 300


Plain: TypeAlias = str | int | float | bool | None  # as in `messages.Event`


class Happening(Struct, frozen=True, forbid_unknown_fields=True):
    """As `messages.Event`, without the process that says it."""

    event: str
    fields: dict[str, Plain]


def keep(state: Path, happenings: Iterable[Happening]) -> None:
    """Append them; on disk when this returns."""
    lines = b"".join(msgspec.json.encode(happening) + b"\n" for happening in happenings)
    if not lines:
        return
    lines = b"\n" + lines  # where a crash cut off the line before
    state.mkdir(mode=0o755, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(state / _FILE, flags, 0o600)
    try:
        if os.fstat(descriptor).st_size + len(lines) > _MOST:
            log.error("%s is too large: what stood in it is not in the journal", state / _FILE)
            os.ftruncate(descriptor, 0)
        if os.write(descriptor, lines) != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), _FILE)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept(state: Path) -> list[Happening]:
    """In the order in which they happened. A line that a crash cut off is logged, and left out."""
    path = state / _FILE
    if not path.exists():
        return []
    try:
        data = plain_files.contents(lambda: os.open(path, plain_files.FLAGS), limit=_MOST, large=_large)
    except plain_files.Unreadable as error:
        log.error("%s: %s; what happened meanwhile is not in the journal", path, error)  # noqa: TRY400
        return []
    return [happening for line in data.splitlines() if line and (happening := _happening(line)) is not None]


def forget(state: Path) -> None:
    (state / _FILE).unlink(missing_ok=True)


def _happening(line: bytes) -> Happening | None:
    try:
        return msgspec.json.decode(line, type=Happening)
    except msgspec.DecodeError:
        log.error("a line of %s is no record: %r", _FILE, line[:200])  # noqa: TRY400
        return None


def _large(size: int) -> plain_files.Unreadable:
    return plain_files.Unreadable(f"it has {size} bytes")
