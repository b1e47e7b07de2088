"""The compiled policy: what the rest of egressd works with. Only `compile` makes one.

A `Policy` is plain frozen data. The same document always gives the same policy and digest.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network
from typing import TypeAlias

from egressd.model.errors import Unfit
from egressd.model.verdicts import Reason
from egressd.residency.endpoints import Endpoint
from egressd.residency.judge import Finding
from egressd.residency.jurisdictions import named
from egressd.residency.places import Declared, Pin, Placement
from egressd.residency.registry import Registry

__all__ = [
    "Barred", "Budget", "Budgets", "CidrRule", "Ech", "Guard", "HostRule", "Limits", "LocalRule", "Member",
    "MemberKind", "Policy", "Port", "Protocol", "Provider", "Route", "Rule", "Verify",
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
    """How a flow to a host is checked: by its address alone, or also by the name its TLS asks for."""

    ADDRESS = "address"
    SNI = "sni"


class Ech(enum.StrEnum):
    """May a ClientHello carry encrypted_client_hello, which can hide another name than the one read?"""

    REFUSE = "refuse"
    ALLOW = "allow"


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
    """A name, its ports, and whether it may resolve into private ranges. `line` is where it stands.

    `inspected` holds the ports whose connections are read, each with what for; sorted, TCP only.
    """

    host: str  # canonical, lower case, no trailing dot; "*.x" one label, "**.x" any depth
    ports: tuple[Port, ...]
    inspected: tuple[tuple[Port, Verify], ...]
    private: bool
    line: int
    ech: Ech = Ech.REFUSE
    vouch: str = ""  # why addresses that no table of prefixes can place may be reached all the same
    providers: tuple[str, ...] = ()  # profiles through which the host is allowed, sorted; () for a plain rule

    def verify_on(self, port: Port) -> Verify:
        """How a connection to this port is checked."""
        return dict(self.inspected).get(port, Verify.ADDRESS)

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
    vouch: str = ""  # as of a HostRule
    providers: tuple[str, ...] = ()  # as of a HostRule: profiles whose URL has an address

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
    providers: tuple[str, ...] = ()  # as of a HostRule: profiles of this machine

    @property
    def key(self) -> str:
        return self.service


Rule: TypeAlias = HostRule | CidrRule | LocalRule


@dataclass(frozen=True, slots=True)
class Barred:
    """A rule as it is written, and why it takes no part: residency, or external routing is off."""

    rule: Rule
    reason: Reason  # RESIDENCY or LOCAL_ONLY
    finding: Finding


@dataclass(frozen=True, slots=True)
class Provider:
    """A profile. `finding` is what residency says of its URL and its declaration, without its addresses."""

    name: str
    type: str  # a key of the catalogue, or "openai-compatible"
    base_url: str  # as written
    endpoint: Endpoint
    api_key: str  # a reference, "secret://..."; "" for none
    declared: Declared | None
    models: tuple[str, ...]
    finding: Finding
    line: int
    placement: Placement = field(default_factory=Placement)  # what the catalogue says of the URL

    @property
    def port(self) -> Port:
        return Port(self.endpoint.port, Protocol.TCP)

    @property
    def is_local(self) -> bool:
        """On this machine's own loopback, and so reached through a local rule."""
        address = self.endpoint.address
        return self.endpoint.host == "localhost" or (address is not None and address.is_loopback)

    @property
    def key(self) -> str:
        """Of the rule through which it is reached: host, network or service."""
        if self.is_local:
            return self.type
        address = self.endpoint.address
        return self.endpoint.host if address is None else f"{address}/{address.max_prefixlen}"

    @property
    def region(self) -> str:
        """Where it says it is: `francecentral (FR)`, declared or else by its URL; "" if nowhere."""
        if self.declared is not None:
            return f"{self.declared.region} ({self.declared.jurisdiction})"
        return _region_text(self.placement)


def _region_text(placement: Placement) -> str:
    where = named(placement.countries)
    if not placement.region:
        return where
    return f"{placement.region} ({where})" if where else placement.region


@dataclass(frozen=True, slots=True)
class Route:
    """The first of these profiles that complies is selected."""

    name: str
    providers: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one sandbox. None means no bound of ours."""

    wall: float | None = None  # seconds
    memory: int | None = None  # bytes
    processes: int | None = None
    egress_bytes: int | None = None  # bytes seen at the link's ingress, denied ones included
    connections: int | None = None  # concurrently open
    idle: float | None = None  # seconds without a byte, of an inspected connection


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be asked upstream because a wildcard covers it."""

    names: int  # distinct ones
    bytes: int  # of the labels that the asker chose
    rate: float  # fresh names per second; a second's worth at once


@dataclass(frozen=True, slots=True)
class Budgets:
    """`sandbox`: names and bytes in its whole life. `workspace`: names held at a time, bytes per day."""

    sandbox: Budget = Budget(names=64, bytes=4 << 10, rate=5.0)
    workspace: Budget = Budget(names=1024, bytes=256 << 10, rate=20.0)


@dataclass(frozen=True, slots=True)
class Policy:
    workspace: str
    guard: Guard
    members: tuple[Member, ...]
    residency: tuple[str, ...]  # jurisdictions; () for anywhere
    rules: tuple[Rule, ...]  # those that take part
    limits: Limits
    wildcards: Budgets
    digest: str  # "sha256:" + hex of the canonical form
    local_only: bool = False  # external routing is off
    barred: tuple[Barred, ...] = ()
    providers: tuple[Provider, ...] = ()
    routes: tuple[Route, ...] = ()

    @property
    def pin(self) -> Pin:
        return Pin(self.residency)

    @property
    def holding(self) -> Guard:
        """How strictly kernel and resolver hold to the list: `local_only` leaves nothing unlisted open,
        whatever `guard` says."""
        return Guard.ENFORCE if self.local_only else self.guard

    def applied(self, rule: HostRule) -> HostRule:
        """The rule as the kernel and the inspector get it: unless the guard enforces, nothing is read."""
        return rule if self.holding is Guard.ENFORCE else replace(rule, inspected=())

    @property
    def written(self) -> tuple[Rule, ...]:
        """Every rule, whether it takes part or not, in the order of the lines."""
        rules = (*self.rules, *(barred.rule for barred in self.barred))
        return tuple(sorted(rules, key=lambda rule: rule.line))

    def provider(self, name: str) -> Provider | None:
        return next((profile for profile in self.providers if profile.name == name), None)

    def route(self, name: str) -> Route | None:
        return next((route for route in self.routes if route.name == name), None)

    def declared(self, host: str, registry: Registry) -> str:
        """Which region is claimed for a name: by the profiles through which it is listed, else by its URL
        as far as the catalogue knows it; "" where nobody claims any. For records, never for decisions."""
        claims = sorted({p.region for p in self.providers if p.endpoint.host == host and p.region})
        if claims:
            return ", ".join(claims)
        try:
            return _region_text(registry.place(Endpoint.of_host(host)))
        except Unfit:
            return ""

    @property
    def hosts(self) -> tuple[HostRule, ...]:
        return tuple(r for r in self.rules if isinstance(r, HostRule))

    @property
    def cidrs(self) -> tuple[CidrRule, ...]:
        return tuple(r for r in self.rules if isinstance(r, CidrRule))

    @property
    def locals(self) -> tuple[LocalRule, ...]:
        return tuple(r for r in self.rules if isinstance(r, LocalRule))
