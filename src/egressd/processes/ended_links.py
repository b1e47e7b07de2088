"""Links that have ended: which workspace's each was, and whose receipt it is, for who asks for one.

A line each on disk, appended when the link is closed, so that receipts can be had after a restart, too.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from egressd.ipc import messages
from egressd.model.identities import Link
from egressd.processes import plain_files

__all__ = ["EndedLinks"]

log = logging.getLogger("controller")

_MOST: Final = 65_536  # links that are remembered after their end


class _Line(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    link: messages.LinkNumber
    workspace: Annotated[str, Meta(max_length=64)]
    asker: messages.UserId | None  # the broker whose request ran in it


class EndedLinks:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: collections.OrderedDict[Link, _Line] = collections.OrderedDict()
        self._lines = 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, link: Link) -> str | None:
        """Its workspace."""
        found = self._known.get(link)
        return None if found is None else found.workspace

    def askers(self) -> Iterator[tuple[Link, int]]:
        """Of each whose receipt is only its broker's."""
        return ((link, line.asker) for link, line in self._known.items() if line.asker is not None)

    def add(self, link: Link, workspace: str, *, asker: int | None = None) -> None:
        line = _Line(link.number, workspace, asker)
        self._remember(line)
        try:
            with self._path.open("ab", buffering=0) as stream:
                stream.write(msgspec.json.encode(line) + b"\n")
            self._lines += 1
            if self._lines > 2 * _MOST:
                self._rewrite()
        except OSError as error:
            log.error("%s: %s", self._path, error.strerror)  # noqa: TRY400

    def _remember(self, line: _Line) -> None:
        self._known[Link(line.link)] = line
        while len(self._known) > _MOST:
            self._known.popitem(last=False)

    def _rewrite(self) -> None:
        lines = (msgspec.json.encode(line) + b"\n" for line in self._known.values())
        plain_files.replace(self._path, b"".join(lines))
        self._lines = len(self._known)

    def load(self) -> None:
        """What is no line of ours is left out: nobody gets its receipt."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return
        for line in data.splitlines():
            self._lines += 1
            try:
                self._remember(msgspec.json.decode(line, type=_Line))
            except ValueError as error:
                log.error("%s:%d: %s", self._path, self._lines, error)  # noqa: TRY400
        with contextlib.suppress(OSError):  # so that nothing is appended to half a line
            self._rewrite()
