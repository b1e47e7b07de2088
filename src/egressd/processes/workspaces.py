"""The directory of policies, read safely. Used by the controller and by `egressctl policy`.

A policy decides who reaches what, so the way to it is as strict as its grammar: `plain_files`. A file may
have 1 MiB.

One broken file does not hide the others: each is either a `Policy` or a list of problems.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeAlias

from publicsuffixlist import PublicSuffixList

from egressd.model.errors import PolicyError, Problem
from egressd.policy.compiled import Policy
from egressd.policy.document import load
from egressd.processes.plain_files import FLAGS, Unreadable, contents, open_directory
from egressd.residency.registry import Registry
from egressd.ruleset.layout import Pools

__all__ = [
    "DEFAULT_POOLS",
    "MAX_BYTES",
    "SUFFIX",
    "broken_workspaces",
    "policy_bytes",
    "public_suffixes",
    "read_policy_file",
    "read_workspaces",
]

MAX_BYTES: Final = 1 << 20
SUFFIX: Final = ".yaml"
DEFAULT_POOLS: Final = Pools()
NOTHING_KNOWN: Final = Registry()
_Loading: TypeAlias = Callable[[bytes, str, str | None], Policy]


def read_workspaces(
    directory: Path, *, pools: Pools = DEFAULT_POOLS, registry: Registry = NOTHING_KNOWN
) -> tuple[dict[str, Policy], list[Problem]]:
    """Every policy of `directory` by workspace, and everything wrong with the files that are not here.

    `NAME.yaml` holds workspace NAME. Hidden files and editors' leavings (`.x`, `x~`) are passed over; any
    other name is a problem, because a policy that is silently not read is worse than a complaint.
    `broken_workspaces` names the workspaces whose last good policy should stay. `pools` are egressd's own
    addresses, which no rule may touch; `registry` is what is known about providers and published prefixes.

    PolicyError when the directory itself cannot be read or is open to everybody: nothing is known then, so
    nothing should change.
    """
    descriptor = _open_directory(directory)
    try:
        names = sorted(name for name in os.listdir(descriptor) if not _passed_over(name))  # noqa: PTH208
        return _read_all(
            directory, names, descriptor, functools.partial(_loaded, pools=pools, registry=registry)
        )
    finally:
        os.close(descriptor)


def _read_all(
    directory: Path, names: Iterable[str], descriptor: int, loading: _Loading
) -> tuple[dict[str, Policy], list[Problem]]:
    policies: dict[str, Policy] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            policy = _read_entry(directory / name, name, descriptor, loading)
        except PolicyError as error:
            problems.extend(error.problems)
        else:
            policies[policy.workspace] = policy
    return policies, problems


def _read_entry(path: Path, name: str, descriptor: int, loading: _Loading) -> Policy:
    if not name.endswith(SUFFIX):
        raise PolicyError(
            [Problem(str(path), 0, "", "it is not read: its name does not end in .yaml",
                     "name it WORKSPACE.yaml, or move it out of this directory")]
        )  # fmt: skip
    opening = functools.partial(os.open, name, FLAGS, dir_fd=descriptor)
    return _read(str(path), opening, name.removesuffix(SUFFIX), loading)


def read_policy_file(
    path: Path, *, pools: Pools = DEFAULT_POOLS, registry: Registry = NOTHING_KNOWN
) -> Policy:
    """The policy in one file, which must be called after its workspace if it ends in `.yaml`.

    PolicyError lists everything wrong with it.
    """
    expected = path.name.removesuffix(SUFFIX) if path.name.endswith(SUFFIX) else None
    loading = functools.partial(_loaded, pools=pools, registry=registry)
    return _read(str(path), lambda: os.open(path, FLAGS), expected, loading)


def _read(source: str, opening: Callable[[], int], expected_name: str | None, loading: _Loading) -> Policy:
    try:
        data = _contents(opening)
    except Unreadable as error:
        raise PolicyError([Problem(source, 0, "", error.text, error.remedy)]) from error
    return loading(data, source, expected_name)


def _loaded(
    data: bytes, source: str, expected_name: str | None, *, pools: Pools, registry: Registry
) -> Policy:
    return load(
        data,
        source=source,
        expected_name=expected_name,
        is_public_suffix=public_suffixes(),
        own=pools.own,
        registry=registry,
    )


def _contents(opening: Callable[[], int]) -> bytes:
    return contents(opening, limit=MAX_BYTES, large=_too_large)


def policy_bytes(path: Path) -> bytes:
    """What a policy file holds, read as carefully as `read_policy_file` does. PolicyError if it is not."""
    try:
        return _contents(lambda: os.open(path, FLAGS))
    except Unreadable as error:
        raise PolicyError([Problem(str(path), 0, "", error.text, error.remedy)]) from error


def _too_large(size: int) -> Unreadable:
    return Unreadable(f"it has at least {size} bytes; a policy may have {MAX_BYTES}", "split the workspace")


def _open_directory(directory: Path) -> int:
    try:
        return open_directory(directory)
    except OSError as error:
        text = f"the directory of policies cannot be read: {error.strerror}"
        raise PolicyError([Problem(str(directory), 0, "", text)]) from error
    except Unreadable as error:
        text = f"{error.text}, so anybody could add or replace a policy"
        raise PolicyError([Problem(str(directory), 0, "", text, error.remedy)]) from error


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
