"""What the auditor's page shows, as plain rows. `page_reading` makes them from a report, `page` shows
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Amount", "Change", "Check", "Claim", "Equation", "Fact", "FlowRow", "Grant", "Happening", "HostRow",
    "Moment", "PageData", "PlaceRow", "Refusal", "RouteRow", "SandboxRow", "Tried",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Amount:
    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.packets + other.packets, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class HostRow:
    """`kind` is a counter row's: host, cidr, local, resolver, unlisted, ... Times as records spell them, or
    empty."""

    host: str
    kind: str = "host"
    addresses: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    out: Amount = Amount()
    in_: Amount = Amount()
    connections: int = 0
    first: str = ""
    last: str = ""
    wildcard: str = ""  # that covers the name
    dialled: Amount | None = None  # what the inspector sent on


@dataclass(frozen=True, slots=True)
class Moment:
    """When something was: `amount` connections that ended, or packets that were refused."""

    time: str
    refused: bool
    amount: int = 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """`total` is the kernel's exact count; `logged` how many of these packets the journal holds one by
    one."""

    reason: str
    total: Amount
    logged: int = 0
    unit: str = "packets"


@dataclass(frozen=True, slots=True)
class Tried:
    """A refused destination as the journal has it; `count` is a lower bound, since logging is rate
    limited."""

    destination: str
    name: str = ""
    port: str = ""
    reason: str = ""
    count: int = 0
    first: str = ""
    last: str = ""
    by: str = ""
    observed: bool = False  # an observing guard let it go


@dataclass(frozen=True, slots=True)
class FlowRow:
    """Connections that ended, of one host, real address and port together."""

    host: str
    kind: str = "host"
    address: str = ""
    port: str = ""
    flows: int = 0
    out: Amount = Amount()
    in_: Amount = Amount()
    first: str = ""
    last: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """Which program tried, as the sandbox's own broker said; nobody has verified it."""

    link: str
    destination: str
    program: str = ""
    command: str = ""
    count: int = 0
    last: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """A name under a wildcard: granted to the link that asked for it, or taken back."""

    time: str
    granted: bool
    name: str
    wildcard: str = ""
    link: str = ""
    addresses: str = ""


@dataclass(frozen=True, slots=True)
class PlaceRow:
    """Where an address of a host is, and whether it was let in."""

    host: str
    address: str
    admitted: bool
    why: str
    prefix: str = ""
    of: str = ""
    declared: str = ""


@dataclass(frozen=True, slots=True)
class RouteRow:
    """`provider` is "" where none complied."""

    route: str
    provider: str
    where: str
    why: str
    by: str
    times: int
    first: str


@dataclass(frozen=True, slots=True)
class SandboxRow:
    link: str
    who: str = ""
    command: str = ""
    digest: str = ""
    opened: str = ""
    closed: str = ""
    ended: str = ""  # "exit 0", "signal 9 (wall)"; empty: nobody said
    resources: str = ""
    in_: Amount | None = None
    admitted: Amount | None = None
    denied: Amount | None = None
    other: Amount | None = None


@dataclass(frozen=True, slots=True)
class Change:
    time: str
    what: str
    widens: bool = False
    by: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class Equation:
    """`left` = the sum of `right`. `holds`: None where it does not to the last byte, and the verifier found
    no contradiction, since packets flowed while it was read."""

    what: str
    left: tuple[str, Amount]
    right: tuple[tuple[str, Amount], ...]
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Happening:
    """A loss, a restart, an alarm."""

    time: str
    what: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the verifier. `remark`: it held, with a limit that `detail` names. `place`: where it
    breaks."""

    name: str
    held: bool
    detail: str = ""
    remark: bool = False
    place: str = ""


@dataclass(frozen=True, slots=True)
class Fact:
    """`exact`: digests, keys and the like, in a fixed-width face, line by line."""

    name: str
    value: str
    exact: bool = False


@dataclass(frozen=True, slots=True)
class PageData:
    """Everything the page says. `restricted`: the guard enforced the policy during the whole window.
    `complete`: the counters say everything that was counted in it. None in `lost`: not known."""

    verified: bool
    workspace: str
    link: str = ""
    since: str = ""
    until: str = ""
    headline: str = ""
    failures: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    restricted: bool = False
    complete: bool = False
    source: str = ""  # where the rows of `hosts` come from, a sentence
    guard: str = ""
    hosts: tuple[HostRow, ...] = ()
    flows: tuple[FlowRow, ...] = ()
    flows_more: str = ""  # of what is not listed: how many there are
    moments: Sequence[Moment] = ()
    refusals: tuple[Refusal, ...] = ()
    refused: Amount | None = None  # by the links' own counters; None: the sum of `refusals`
    tried: tuple[Tried, ...] = ()
    tried_more: str = ""
    claims: tuple[Claim, ...] = ()
    sandboxes: tuple[SandboxRow, ...] = ()
    request: tuple[Fact, ...] = ()  # of a sandbox that ran one
    policy_text: str = ""
    policy_digest: str = ""
    changes: tuple[Change, ...] = ()
    grants: tuple[Grant, ...] = ()
    pin: str = ""  # the jurisdictions, where the workspace is pinned
    local_only: bool = False
    vouched: tuple[Fact, ...] = ()
    places: tuple[PlaceRow, ...] = ()
    tables: tuple[Fact, ...] = ()
    routes: tuple[RouteRow, ...] = ()
    ruleset_text: str = ""
    ruleset_digest: str = ""
    drift: tuple[str, ...] = ()
    equations: tuple[Equation, ...] = ()
    equations_more: str = ""  # what else was added up
    lost: int | None = None
    gaps: tuple[str, ...] = ()  # what no counter says
    happenings: tuple[Happening, ...] = ()
    proved: tuple[str, ...] = ()
    not_proved: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    scope: tuple[Fact, ...] = ()
    evidence: tuple[Fact, ...] = ()
    versions: tuple[Fact, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)  # reason -> one sentence for a person
