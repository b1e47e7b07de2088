"""Leases on disk: what a controller that is started again must know of the sandboxes that go on without it.

One file each, `egN.json`, in a directory that only the daemon may read or write. It is there before the link
is, and goes when the link is closed and its counters are in the books. So a link in the kernel without a file
is nobody's, and a file without a link is one that was about to open, or to be accounted.

A file is believed as far as it was written by this account, in this boot, for this gateway; the kernel says
the rest when the lease is resumed. One that is not as it must be is refused, told of and removed: its link,
which nobody then names, is taken away by the warden.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from egressd.ipc import messages
from egressd.model.identities import Link
from egressd.processes.leases import Identity, Sandbox
from egressd.processes.members import Caller
from egressd.processes.plain_files import FLAGS, Unreadable, contents, replace
from egressd.processes.testifying import Said
from egressd.ruleset.layout import Pools
from egressd.ruleset.wants import WorkspaceName

__all__ = ["LeaseFiles", "Lost", "Record", "gateway_identity"]

log = logging.getLogger("controller")

_MOST: Final = 1 << 16  # bytes; a command has 4096 characters of up to four
_Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Record(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One lease. `boot` and `gateway`: what it can only be adopted in."""

    boot: str
    gateway: tuple[_Number, _Number] | None
    link: messages.LinkNumber
    workspace: WorkspaceName
    namespace: tuple[_Number, _Number]
    uid: messages.UserId
    gid: messages.UserId | None
    pid: Annotated[int, Meta(ge=0, lt=1 << 31)]
    groups: Annotated[tuple[messages.UserId, ...], Meta(max_length=4096)]
    command: messages.Text
    since: Annotated[float, Meta(ge=0)]
    quota: Annotated[int, Meta(ge=1, le=1 << 62)] | None
    connections: Annotated[int, Meta(ge=1, le=messages.MOST_CONNECTIONS)] | None
    closed: bool
    digest: Annotated[str, Meta(max_length=128)]
    policy: Annotated[str, Meta(max_length=128)]
    guard: Annotated[str, Meta(max_length=32)]
    request: Annotated[str, Meta(max_length=256)] = ""
    events: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=64)] = ()

    def sandbox(self, pools: Pools) -> Sandbox:
        link = Link(self.link)
        address4, address6 = pools.sandbox(link)
        return Sandbox(
            link=link,
            workspace=self.workspace,
            caller=Caller(self.pid, self.uid, frozenset(self.groups), self.gid),
            command=self.command,
            since=self.since,
            address4=address4,
            address6=address6,
            quota=self.quota,
            digest=self.digest,
            policy=self.policy,
            guard=self.guard,
            connections=self.connections,
            closed=self.closed,
            namespace=self.namespace,
        )

    @property
    def said(self) -> Said:
        return Said(self.request, set(self.events))


@dataclass(frozen=True, slots=True)
class Lost:
    """A file that is no lease. `link` None: its name names none."""

    link: Link | None
    text: str


class LeaseFiles:
    def __init__(self, directory: Path, *, boot: str, gateway: Identity | None) -> None:
        self._directory, self._boot, self._gateway = directory, boot, gateway

    def write(self, sandbox: Sandbox, said: Said) -> None:
        """All of it anew. OSError if it cannot be written; the file before it is still there then."""
        caller = sandbox.caller
        record = Record(
            boot=self._boot,
            gateway=self._gateway,
            link=sandbox.link.number,
            workspace=sandbox.workspace,
            namespace=sandbox.namespace,
            uid=caller.uid,
            gid=caller.gid,
            pid=caller.pid,
            groups=tuple(sorted(caller.groups))[:4096],
            command=sandbox.command,
            since=sandbox.since,
            quota=sandbox.quota,
            connections=sandbox.connections,
            closed=sandbox.closed,
            digest=sandbox.digest,
            policy=sandbox.policy,
            guard=sandbox.guard,
            request=said.request,
            events=tuple(sorted(said.events)),
        )
        self._directory.mkdir(mode=0o700, exist_ok=True)
        replace(self._path(sandbox.link), msgspec.json.encode(record))

    def remove(self, link: Link) -> None:
        with contextlib.suppress(OSError):
            self._path(link).unlink()

    def _path(self, link: Link) -> Path:
        return self._directory / f"{link.device}.json"

    # ---- what a controller before this one has left

    def load(self) -> tuple[list[Record], list[Lost]]:
        """By number. What is refused is not there any more afterwards."""
        records: list[Record] = []
        lost: list[Lost] = []
        for path in self._listed():
            if path.suffix == ".new":  # it ended while it wrote; the link was not opened yet
                _discard(path)
                continue
            link = Link.of_device(path.stem) if path.suffix == ".json" else None
            try:
                records.append(self._read(path, link))
            except (Unreadable, ValueError) as error:
                log.error("the lease %r is not taken over: %s", path.name, error)  # noqa: TRY400
                lost.append(Lost(link, str(error)[:512]))
                _discard(path)
        return sorted(records, key=lambda record: record.link), lost

    def _listed(self) -> Iterable[Path]:
        try:
            return sorted(self._directory.iterdir())
        except FileNotFoundError:
            return ()
        except OSError as error:
            log.error("the leases in %s cannot be read: %s", self._directory, error.strerror)  # noqa: TRY400
            return ()

    def _read(self, path: Path, link: Link | None) -> Record:
        """Unreadable or ValueError for whatever stands against it."""
        if link is None:
            raise Unreadable("its name names no link")
        data = contents(lambda: _opened(path), limit=_MOST, large=_large)
        record = msgspec.json.decode(data, type=Record)
        if record.link != link.number:
            raise Unreadable(f"it is about eg{record.link}")
        if record.boot != self._boot:
            raise Unreadable("it is of another boot of the machine")
        if record.gateway != self._gateway:
            raise Unreadable("it is of another gateway")
        return record


def _opened(path: Path) -> int:
    """ValueError for a file of somebody else's: only root could have put it here."""
    descriptor = os.open(path, FLAGS)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise ValueError("it is another account's")
    return descriptor


def _large(size: int) -> Unreadable:
    return Unreadable(f"it has {size} bytes, and a lease has at most {_MOST}")


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):  # a directory stays, and is refused the next time, too
        path.unlink()


def gateway_identity(name: str, *, directory: str = "/run/netns") -> Identity | None:
    """Of the namespace pinned by that name; None where there is none to be seen."""
    try:
        found = os.stat(Path(directory, name))  # noqa: PTH116 -- a mount, not a path
    except OSError:
        return None
    return found.st_dev, found.st_ino
