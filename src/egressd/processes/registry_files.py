"""The catalogue of endpoints and the tables of prefixes, read from their files.

    the package's residency/data/*.yaml    the catalogue that comes with egressd
    DIRECTORY/*.yaml                       entries of the user's: each replaces the one of the same key
    DIRECTORY/tables/NAME.json             prefixes, as `egressctl residency import` wrote them

They decide where a request may go as much as a policy does, and are opened as carefully. What is wrong with
one of them is not read around: a table that is missing makes an address look unpublished, and a catalogue
that is missing makes a global endpoint look like nobody's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from egressd.model.errors import PolicyError, Problem, Unfit
from egressd.processes.plain_files import FLAGS, Unreadable, contents, open_directory
from egressd.residency.catalogue import Catalogue
from egressd.residency.prefixes import Prefixes, Table
from egressd.residency.registry import Registry

__all__ = ["SUFFIX", "TABLES", "builtin_catalogue", "read_registry", "read_table"]

TABLES: Final = "tables"
SUFFIX: Final = ".json"
MAX_CATALOGUE: Final = 1 << 20
MAX_TABLE: Final = 128 << 20  # of 500,000 prefixes in IPv6's longest spelling
_MAX_FILES: Final = 256
T = TypeVar("T")


def read_registry(directory: Path) -> Registry:
    """Never raises: what cannot be read is told by `broken`, with the file and the remedy, and is left out. A
    directory that is not there adds nothing to the built-in catalogue."""
    problems: list[Problem] = []
    own = _tried(lambda: _files(directory, ".yaml", MAX_CATALOGUE), problems) or []
    named = tuple((str(directory / name), data) for name, data in own)
    catalogue = _tried(lambda: _catalogue(named), problems) or _tried(_catalogue, problems)
    catalogue = catalogue or Catalogue()
    tables = [
        table for name, data in _tried(lambda: _files(directory / TABLES, SUFFIX, MAX_TABLE), problems) or ()
        if (table := _tried(functools.partial(_table, data, source=directory / TABLES / name), problems))
    ]  # fmt: skip
    prefixes = Prefixes(tables, regions=catalogue.cloud_region)
    more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
    digests = tuple(f"{name}@sha256:{hashlib.sha256(data).hexdigest()}" for name, data in own)
    return Registry(catalogue, prefixes, f"{problems[0]}{more}" if problems else "", digests)


def _tried(reading: Callable[[], T], problems: list[Problem]) -> T | None:
    try:
        return reading()
    except PolicyError as error:
        problems.extend(error.problems)
    except OSError as error:
        problems.append(Problem(str(error.filename or "residency"), 0, "", f"it cannot be read: {error}"))
    return None


def read_table(path: Path) -> Table | None:
    """One table; None if there is no such file. PolicyError if it cannot be used."""
    if not os.path.lexists(path):
        return None
    opening = functools.partial(os.open, path, FLAGS)
    return _table(_contents(path, opening, MAX_TABLE), source=path)


def _table(data: bytes, *, source: Path) -> Table:
    try:
        table = Table.decode(data)
    except Unfit as error:
        raise PolicyError([Problem(str(source), 0, "", error.text, error.remedy)]) from error
    if table.name != source.name.removesuffix(SUFFIX):
        text = f"it holds the table {table.name}, and is called otherwise"
        raise PolicyError([Problem(str(source), 0, "name", text, f"call it {table.name}{SUFFIX}")])
    return table


def _files(directory: Path, suffix: str, limit: int) -> list[tuple[str, bytes]]:
    """Names and contents, sorted by name; none if there is no such directory. Hidden files, editors' leavings
    and directories are passed over; any other name is a problem: what is silently not read is worse than a
    complaint."""
    if not os.path.lexists(directory):
        return []
    try:
        descriptor = open_directory(directory)
    except (OSError, Unreadable) as error:
        raise _unopened(directory, error) from error
    try:
        return [
            (
                name,
                _contents(
                    directory / name, functools.partial(os.open, name, FLAGS, dir_fd=descriptor), limit
                ),
            )
            for name in _names(directory, descriptor, suffix)
        ]
    finally:
        os.close(descriptor)


def _unopened(directory: Path, error: OSError | Unreadable) -> PolicyError:
    if isinstance(error, Unreadable):
        return PolicyError([Problem(str(directory), 0, "", error.text, error.remedy)])
    text = f"the directory cannot be read: {error.strerror}"
    return PolicyError([Problem(str(directory), 0, "", text, "make it readable for the daemon's user")])


def _names(directory: Path, descriptor: int, suffix: str) -> list[str]:
    with os.scandir(descriptor) as entries:
        names = sorted(
            entry.name for entry in entries
            if not (entry.name.startswith(".") or entry.name.endswith("~") or _is_directory(entry))
        )  # fmt: skip
    strange = next((name for name in names if not name.endswith(suffix)), None)
    if strange is not None:
        text = f"it is not read: its name does not end in {suffix}"
        raise PolicyError([Problem(str(directory / strange), 0, "", text, "move it out of this directory")])
    if len(names) > _MAX_FILES:
        raise PolicyError([Problem(str(directory), 0, "", f"it holds more than {_MAX_FILES} files")])
    return names


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # it is gone
        return False


def _contents(path: Path, opening: functools.partial[int], limit: int) -> bytes:
    def large(size: int) -> Unreadable:
        return Unreadable(f"it has at least {size} bytes; {limit} are read", "look what it is")

    try:
        return contents(opening, limit=limit, large=large)
    except Unreadable as error:
        raise PolicyError([Problem(str(path), 0, "", error.text, error.remedy)]) from error


# ---- the catalogue


@functools.cache
def _builtin() -> tuple[tuple[str, bytes], ...]:
    """Of the package, so the same for as long as the process lives. A process that gives up its rights calls
    `builtin_catalogue` once before it does."""
    data = importlib.resources.files("egressd.residency").joinpath("data")
    found = sorted((entry for entry in data.iterdir() if entry.name.endswith(".yaml")), key=lambda e: e.name)
    return tuple((f"(built in) {entry.name}", entry.read_bytes()) for entry in found)


@functools.lru_cache(maxsize=2)
def _catalogue(files: tuple[tuple[str, bytes], ...] = ()) -> Catalogue:
    """Kept, since it takes longer to make than a policy to compile, and changes less often."""
    return Catalogue.load((*_builtin(), *files))


def builtin_catalogue() -> Catalogue:
    """PolicyError or OSError if the package is not whole."""
    return _catalogue()
