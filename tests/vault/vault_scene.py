"""A source's directory, documents of it as they were ingested, and children to which things may happen."""

# pathlib knows no paths that are bytes
# ruff: noqa: PTH103, PTH118, PTH120, PTH123
from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pickle
import signal
import stat
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from egressd.access.identifiers import identifier

T = TypeVar("T")
USER = 4001  # no account needed
AS_ROOT = os.geteuid() == 0


@dataclass(frozen=True)
class Copy:
    id: str
    root: bytes
    path: bytes
    size: int
    digest: str


@dataclass(frozen=True)
class Source:
    """A directory with documents."""

    root: Path
    name: str = "hand"

    def place(self, path: bytes | str) -> bytes:
        return os.path.join(os.fsencode(self.root), os.fsencode(path))

    def write(self, path: bytes | str, content: bytes = b"content") -> Copy:
        """A document, and how it is known once it is ingested."""
        os.makedirs(os.path.dirname(self.place(path)), exist_ok=True)
        with open(self.place(path), "wb") as file:
            file.write(content)
        return self.copy(path, content)

    def copy(self, path: bytes | str, content: bytes) -> Copy:
        path = os.fsencode(path)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        return Copy(identifier(self.name, path), os.fsencode(self.root), path, len(content), digest)


class Entry(NamedTuple):
    kind: str  # "directory", "file", or what it should not be
    mode: int
    mtime_ns: int
    links: int
    content: bytes | None


def everything(directory: Path | str) -> dict[bytes, Entry]:
    """All that is below a directory, links not followed."""
    found: dict[bytes, Entry] = {}
    top = os.fsencode(directory)
    for here, directories, files in os.walk(top):
        for name in [*directories, *files]:
            path = os.path.join(here, name)
            status = os.lstat(path)
            content = Path(os.fsdecode(path)).read_bytes() if stat.S_ISREG(status.st_mode) else None
            found[os.path.relpath(path, top)] = Entry(
                _kind(status.st_mode), stat.S_IMODE(status.st_mode), status.st_mtime_ns,
                1 if stat.S_ISDIR(status.st_mode) else status.st_nlink, content,
            )  # fmt: skip
    return found


def _kind(mode: int) -> str:
    return {stat.S_IFDIR: "directory", stat.S_IFREG: "file"}.get(stat.S_IFMT(mode), oct(mode))


# ---- children


class Child:
    """A forked process that does one thing. What it returns or raises comes back from `end`."""

    def __init__(self, does: Callable[[], Any], *, uid: int | None = None) -> None:
        self._answer, answer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(answer)
            return
        try:
            os.close(self._answer)
            signal.set_wakeup_fd(-1)
            if uid is not None and AS_ROOT:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                _as_if_started_so()
            data = pickle.dumps(_outcome(does))
            with open(answer, "wb") as pipe:
                pipe.write(data)
        finally:
            os._exit(0)

    def end(self) -> Any:
        """What it returned. Raises what it raised; `Killed` if it did not come to that."""
        with open(self._answer, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if not data:
            raise Killed(os.waitstatus_to_exitcode(status))
        value, error = pickle.loads(data)
        if error is not None:
            raise AssertionError(error)
        return value

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(Killed):
            self.end()


def _as_if_started_so() -> None:
    """A change of account leaves a process that is not dumpable, until it executes a program (prctl(2))."""
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE


class Killed(Exception):
    pass


def _outcome(does: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return does(), None
    except BaseException:
        return None, traceback.format_exc()


def in_child(does: Callable[[], T], *, uid: int | None = None) -> T:
    """What `does` returns in a process of its own, which may enter namespaces and have no rights."""
    result: T = Child(does, uid=uid).end()
    return result


def refusal(does: Callable[[], Any]) -> str:
    """The text with which it was refused; empty if it was not."""
    from egressd.model.errors import Refused

    try:
        does()
    except Refused as error:
        return str(error)
    return ""


def mounts_at(place: Path) -> list[int]:
    """Processes of the machine in whose view something is mounted there."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and f" {place} " in (process / "mountinfo").read_text():
                found.append(int(process.name))
    return found
