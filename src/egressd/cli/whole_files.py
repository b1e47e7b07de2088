"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["replace_whole", "write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """With the caller's umask. OSError; the name stays what it was."""
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: nothing can be renamed over those
        path.write_bytes(data)
        return
    replace_whole(path, data, mode=0o666 & ~_umask())


def replace_whole(path: Path, data: bytes, *, mode: int) -> None:
    """Whatever has that name. Who needs the name itself to survive a crash syncs the directory."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
