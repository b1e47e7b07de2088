"""The compiled policy: what the rest of egressd works with. Only `compile` makes one.

A `Policy` is plain frozen data. The same document always gives the same policy and digest.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TypeAlias

__all__ = [
    "CidrRule", "Guard", "HostRule", "Limits", "LocalRule", "Member", "MemberKind", "Policy", "Port",
    "Protocol", "Rule", "Verify",
]  # fmt: skip


class Guard(enum.StrEnum):
    """How strictly a workspace's sandboxes are held to its list."""

    ENFORCE = "enforce"
    OBSERVE = "observe"
    OFF = "off"


class Protocol(enum.StrEnum):
    TCP = "tcp"
    UDP = "udp"


class Verify(enum.StrEnum):
    """How a flow to a host is checked beyond its address. `SNI` is reserved for the inspector."""

    ADDRESS = "address"
    SNI = "sni"


class MemberKind(enum.StrEnum):
    USER = "user"
    GROUP = "group"


@dataclass(frozen=True, slots=True, order=True)
class Port:
    number: int  # 1 to 65535
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.number}/{self.protocol}"


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """`user:infer`, `group:research`, or by number: `user:4001`."""

    kind: MemberKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True, slots=True)
class HostRule:
    """A name, its ports, and whether it may resolve into private ranges. `line` is where it stands."""

    host: str  # canonical, lower case, no trailing dot; "*.x" one label, "**.x" any depth
    ports: tuple[Port, ...]
    verify: Verify
    private: bool
    line: int

    @property
    def key(self) -> str:
        """What owns a block of synthetic addresses; also the comment on kernel elements."""
        return self.host

    @property
    def wildcard(self) -> bool:
        return self.host.startswith("*")


@dataclass(frozen=True, slots=True)
class CidrRule:
    """Real addresses, reached as they are (no synthetic address, no NAT from a name)."""

    network: IPv4Network | IPv6Network
    ports: tuple[Port, ...]
    line: int

    @property
    def key(self) -> str:
        return str(self.network)


@dataclass(frozen=True, slots=True)
class LocalRule:
    """A service on the host's own loopback, relayed. The sandbox sees it at the same port on its own
    127.0.0.1 and under the name `service`."""

    service: str  # one DNS label, e.g. "ollama"
    ports: tuple[Port, ...]  # TCP only
    line: int

    @property
    def key(self) -> str:
        return self.service


Rule: TypeAlias = HostRule | CidrRule | LocalRule


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one sandbox. None means no bound of ours."""

    wall: float | None = None  # seconds
    memory: int | None = None  # bytes
    processes: int | None = None
    egress_bytes: int | None = None  # bytes seen at the link's ingress, denied ones included
    connections: int | None = None  # concurrently open


@dataclass(frozen=True, slots=True)
class Policy:
    workspace: str
    guard: Guard
    members: tuple[Member, ...]
    residency: tuple[str, ...]  # jurisdictions, kept for the residency rooms
    rules: tuple[Rule, ...]
    limits: Limits
    digest: str  # "sha256:" + hex of the canonical form

    @property
    def hosts(self) -> tuple[HostRule, ...]:
        return tuple(r for r in self.rules if isinstance(r, HostRule))

    @property
    def cidrs(self) -> tuple[CidrRule, ...]:
        return tuple(r for r in self.rules if isinstance(r, CidrRule))

    @property
    def locals(self) -> tuple[LocalRule, ...]:
        return tuple(r for r in self.rules if isinstance(r, LocalRule))
