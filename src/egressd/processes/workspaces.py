"""The directory of policies, read safely. Used by the controller and by `egressctl policy`.

A policy decides who reaches what, so the way to it is as strict as its grammar: a file is opened without
following a link and without waiting (a FIFO would hold the reader for ever), looked at while open, and
read only if it is a regular file of at most 1 MiB that not everybody may write to. Files are opened
relative to the directory's descriptor, so that renaming the directory meanwhile changes nothing.

One broken file does not hide the others: each is either a `Policy` or a list of problems.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from publicsuffixlist import PublicSuffixList

from egressd.model.errors import PolicyError, Problem
from egressd.policy.compiled import Policy
from egressd.policy.document import load
from egressd.ruleset.layout import Pools

__all__ = [
    "DEFAULT_POOLS",
    "MAX_BYTES",
    "SUFFIX",
    "broken_workspaces",
    "public_suffixes",
    "read_policy_file",
    "read_workspaces",
]

MAX_BYTES: Final = 1 << 20
SUFFIX: Final = ".yaml"
DEFAULT_POOLS: Final = Pools()
# O_NONBLOCK: opening a FIFO or a device does not wait (open(2)); it changes nothing for a regular file.
# O_NOCTTY: opening a terminal does not make it ours.
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_OPENING: Final = {
    errno.ELOOP: ("it is a symbolic link", "put the file itself here"),
    errno.ENXIO: ("it is a socket, not a regular file", "put the file itself here"),  # open(2) on AF_UNIX
    errno.ENOENT: ("there is no such file", ""),
    errno.EACCES: ("it may not be read", "make it readable for the user that runs this"),
}


class _Unreadable(Exception):
    """Why a file is not read, and what to do about it."""

    def __init__(self, text: str, remedy: str = "") -> None:
        self.text, self.remedy = text, remedy
        super().__init__(text)


def read_workspaces(
    directory: Path, *, pools: Pools = DEFAULT_POOLS
) -> tuple[dict[str, Policy], list[Problem]]:
    """Every policy of `directory` by workspace, and everything wrong with the files that are not here.

    `NAME.yaml` holds workspace NAME. Hidden files and editors' leavings (`.x`, `x~`) are passed over; any
    other name is a problem, because a policy that is silently not read is worse than a complaint.
    `broken_workspaces` names the workspaces whose last good policy should stay. `pools` are egressd's own
    addresses, which no rule may touch.

    PolicyError when the directory itself cannot be read or is open to everybody: nothing is known then, so
    nothing should change.
    """
    descriptor = _open_directory(directory)
    try:
        names = sorted(name for name in os.listdir(descriptor) if not _passed_over(name))  # noqa: PTH208
        return _read_all(directory, names, descriptor, pools)
    finally:
        os.close(descriptor)


def _read_all(
    directory: Path, names: Iterable[str], descriptor: int, pools: Pools
) -> tuple[dict[str, Policy], list[Problem]]:
    policies: dict[str, Policy] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            policy = _read_entry(directory / name, name, descriptor, pools)
        except PolicyError as error:
            problems.extend(error.problems)
        else:
            policies[policy.workspace] = policy
    return policies, problems


def _read_entry(path: Path, name: str, descriptor: int, pools: Pools) -> Policy:
    if not name.endswith(SUFFIX):
        raise PolicyError(
            [Problem(str(path), 0, "", "it is not read: its name does not end in .yaml",
                     "name it WORKSPACE.yaml, or move it out of this directory")]
        )  # fmt: skip
    opening = functools.partial(os.open, name, _FLAGS, dir_fd=descriptor)
    return _read(str(path), opening, name.removesuffix(SUFFIX), pools)


def read_policy_file(path: Path, *, pools: Pools = DEFAULT_POOLS) -> Policy:
    """The policy in one file, which must be called after its workspace if it ends in `.yaml`.

    PolicyError lists everything wrong with it.
    """
    expected = path.name.removesuffix(SUFFIX) if path.name.endswith(SUFFIX) else None
    return _read(str(path), lambda: os.open(path, _FLAGS), expected, pools)


def _read(source: str, opening: Callable[[], int], expected_name: str | None, pools: Pools) -> Policy:
    try:
        data = _contents(opening)
    except _Unreadable as error:
        raise PolicyError([Problem(source, 0, "", error.text, error.remedy)]) from error
    return load(
        data,
        source=source,
        expected_name=expected_name,
        is_public_suffix=public_suffixes(),
        own=pools.own,
    )


def _contents(opening: Callable[[], int]) -> bytes:
    try:
        descriptor = opening()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _not_opened(error) from error
    try:
        _check(os.fstat(descriptor))
        return _bounded(descriptor)
    except OSError as error:
        raise _not_opened(error) from error
    finally:
        os.close(descriptor)


def _not_opened(error: OSError | ValueError) -> _Unreadable:
    if isinstance(error, OSError) and error.errno in _OPENING:
        return _Unreadable(*_OPENING[error.errno])
    return _Unreadable(f"it cannot be read: {getattr(error, 'strerror', None) or error}")


def _check(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise _Unreadable(f"it is {kind}, not a regular file", "put the file itself here")
    if found.st_mode & stat.S_IWOTH:
        raise _Unreadable("everybody may write to it, so anybody could widen it", "chmod o-w")
    if found.st_size > MAX_BYTES:
        raise _too_large(found.st_size)


def _bounded(descriptor: int) -> bytes:
    """All of it. The size is checked again: what grows while it is read, or says 0 as /proc does, is held
    to the same bound."""
    chunks: list[bytes] = []
    size = 0
    while chunk := os.read(descriptor, MAX_BYTES + 1 - size):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            raise _too_large(size)
    return b"".join(chunks)


def _too_large(size: int) -> _Unreadable:
    return _Unreadable(
        f"it has at least {size} bytes; a policy may have {MAX_BYTES}",
        "split the workspace",
    )


def _open_directory(directory: Path) -> int:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        text = f"the directory of policies cannot be read: {error.strerror}"
        raise PolicyError([Problem(str(directory), 0, "", text)]) from error
    mode = os.fstat(descriptor).st_mode
    if mode & stat.S_IWOTH:
        os.close(descriptor)
        text = "everybody may write to the directory, so anybody could add or replace a policy"
        raise PolicyError([Problem(str(directory), 0, "", text, "chmod o-w")])
    return descriptor


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name.endswith("~")


def broken_workspaces(problems: Iterable[Problem]) -> frozenset[str]:
    """The workspaces whose files these problems stand in."""
    names = (os.path.basename(problem.source) for problem in problems)  # noqa: PTH119 - no file is meant
    return frozenset(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))


@functools.cache
def public_suffixes() -> Callable[[str], bool]:
    """Tells whether a name is a public suffix (publicsuffix.org), from the list that is installed.

    The list is a file: a process that gives up its rights calls this once before it does.
    """
    suffixes = PublicSuffixList()

    def is_public_suffix(name: str) -> bool:
        return bool(suffixes.is_public(name))

    return is_public_suffix
