"""The sandbox table: who holds which link. Plain data; the controller does what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from egressd.ipc import messages
from egressd.model.errors import Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.processes import plain_files
from egressd.processes.members import Caller
from egressd.ruleset.layout import Pools

__all__ = ["ATTEMPTS", "ATTEMPTS_PER_SECOND", "Claims", "Identity", "Leases", "LinkNumbers", "Sandbox"]

Identity = tuple[int, int]  # st_dev, st_ino of a namespace

ATTEMPTS_PER_SECOND, ATTEMPTS = 20, 10_000  # of one sandbox, recorded
_RESERVE = 64  # numbers written ahead, so that one spawn in 64 touches the disk


@dataclass(slots=True)
class Claims:
    """What its broker says of a sandbox. Recorded as that; believed in nothing."""

    ended: messages.Ended | None = None
    attempts: int = 0  # recorded
    unrecorded: int = 0  # too many, or too fast
    _second: float = 0.0
    _within: int = 0

    def may_record(self, *, now: float) -> bool:
        """Count one attempt; whether it is to be recorded. `now` on a monotonic clock."""
        if now - self._second >= 1.0:
            self._second, self._within = now, 0
        if self._within >= ATTEMPTS_PER_SECOND or self.attempts >= ATTEMPTS:
            self.unrecorded += 1
            return False
        self._within += 1
        self.attempts += 1
        return True


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One lease: it lasts as long as the broker's connection, or, where it was we who ended, until nobody has
    come back for it."""

    link: Link
    workspace: str
    caller: Caller
    command: str  # recorded, never interpreted
    since: float  # seconds since the epoch
    address4: IPv4Address
    address6: IPv6Address
    quota: int | None  # bytes
    digest: str = ""  # of the whole command, as the broker says
    policy: str = ""  # digest of the policy it was admitted under
    guard: str = ""
    connections: int | None = None  # that it may ever open; `limits.connections` is another matter
    closed: bool = False  # started without a network
    namespace: Identity = (0, 0)  # as its broker handed it over
    claims: Claims = field(default_factory=Claims, compare=False)


@dataclass(slots=True)
class LinkNumbers:
    """Never the same number twice while the gateway exists, also across restarts of the controller.

    The file lies in the run directory, which the machine clears together with the gateway. What it holds
    is the first number that has not been reserved yet.
    """

    path: Path
    _next: int = 0
    _limit: int = 0

    def take(self) -> Link:
        if self._next >= self._limit:
            self._reserve()
        link = Link(self._next)
        self._next += 1
        return link

    def _reserve(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._next = max(self._next, int(self.path.read_text() or 1))
        self._next = max(self._next, 1)
        self._limit = self._next + _RESERVE
        plain_files.replace(self.path, str(self._limit).encode())


@dataclass(slots=True)
class Leases:
    pools: Pools
    numbers: LinkNumbers
    by_link: dict[Link, Sandbox] = field(default_factory=dict)
    _addresses: set[IPv4Address] = field(default_factory=set)

    def open(
        self,
        *,
        workspace: str,
        caller: Caller,
        command: str,
        since: float,
        quota: int | None,
        digest: str = "",
        policy: str = "",
        guard: str = "",
        connections: int | None = None,
        closed: bool = False,
        namespace: Identity = (0, 0),
    ) -> Sandbox:
        """Enter a new sandbox into the table. Refused when every address is taken."""
        link, address4, address6 = self._free()
        sandbox = Sandbox(
            link=link,
            workspace=workspace,
            caller=caller,
            command=command,
            since=since,
            address4=address4,
            address6=address6,
            quota=quota,
            digest=digest,
            policy=policy,
            guard=guard,
            connections=connections,
            closed=closed,
            namespace=namespace,
        )
        self._enter(sandbox)
        return sandbox

    def adopt(self, sandbox: Sandbox) -> None:
        """Enter one that was here before. Refused when its address, or its number, is another's."""
        if sandbox.link in self.by_link or sandbox.address4 in self._addresses:
            raise Refused(Reason.LIMIT, f"{sandbox.link.device} or its address is in use")
        self._enter(sandbox)

    def _enter(self, sandbox: Sandbox) -> None:
        self.by_link[sandbox.link] = sandbox
        self._addresses.add(sandbox.address4)

    def _free(self) -> tuple[Link, IPv4Address, IPv6Address]:
        for _ in range(65_536):
            link = self.numbers.take()
            address4, address6 = self.pools.sandbox(link)
            if address4 not in self._addresses:
                return link, address4, address6
        raise Refused(Reason.LIMIT, "every sandbox address is in use")

    def close(self, sandbox: Sandbox) -> None:
        if self.by_link.pop(sandbox.link, None) is not None:
            self._addresses.discard(sandbox.address4)

    def of_workspace(self, workspace: str) -> Iterator[Sandbox]:
        return (s for s in list(self.by_link.values()) if s.workspace == workspace)

    def count(self, workspace: str) -> int:
        return sum(1 for _ in self.of_workspace(workspace))
