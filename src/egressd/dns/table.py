"""One workspace's view of the DNS: a query in, a `Reply`, `Wait` or `Forward` out. Pure lookups.

What may be asked for is decided by the list alone. A name on it is answered with the synthetic addresses
of its block, never with real ones; nothing a sandbox asks about a listed name goes upstream.

    asked for                      enforce                    observe, off
    a listed name, A or AAAA       synthetic, or why not      the same
    a listed name, ANY             HINFO (RFC 8482)           the same
    a listed name, any other type  NODATA                     the same
    covered by a wildcard, granted as a listed name           the same
    covered, A or AAAA             granted first (`Covered`)  the same
    covered, any other type        NODATA, nothing is asked   the same
    barred, or covered by a
      barred wildcard              NXDOMAIN, Blocked (15)     the same
    a local service                synthetic slot 0           the same
    localhost                      127.0.0.1, ::1             the same
    PTR of a synthetic address     its name                   the same
    anything else                  NXDOMAIN, Blocked (15)     A, AAAA: forwarded; other types: NODATA
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Literal, Protocol, TypeAlias

from msgspec import Meta, Struct

from egressd.dns import replies
from egressd.dns.keeper import Standing, State, Target, User
from egressd.dns.replies import Extended, Failure, Reply, Type
from egressd.dns.slots import leading
from egressd.dns.wildcards import Cover, Patterns, Pending
from egressd.dns.wire import Query, reverse_address
from egressd.model.addresses import Address
from egressd.model.identities import WORKSPACE_PATTERN
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Budgets, Guard

__all__ = [
    "Covered", "Decision", "Denied", "Forward", "Pools", "Table", "Wait", "WorkspaceNames", "answer",
    "failed", "unlisted", "users_of",
]  # fmt: skip

_Block = Annotated[int, Meta(ge=0, lt=1 << 14)]
_Host = Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[a-z0-9._-]+$")]
_Pattern = Annotated[str, Meta(max_length=255, pattern=r"^\*\*?(?:\.[a-z0-9-]{1,63}){2,}$")]
_Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^(?:\*\*?\.)?[a-z0-9._-]+$")]  # either
_Listed = tuple[_Block, bool]
_Barring = tuple[Literal["residency", "local-only"], Annotated[str, Meta(max_length=1024)]]
_Terms = Annotated[str, Meta(max_length=128, pattern=r"^[A-Za-z0-9:,/ -]*$")]  # ipc.messages.NameTerms
_MAX_NEGATIVE_TTL = 60.0  # seconds; what upstream says about absence is looked at again anyway


class WorkspaceNames(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the resolver is to know of one workspace; a list of these is the payload of `SetNames`."""

    workspace: Annotated[str, Meta(pattern=f"^(?:{WORKSPACE_PATTERN})$", max_length=32)]
    guard: Literal["off", "observe", "enforce"]
    hosts: dict[_Host, _Listed] = {}  # canonical names without wildcards -> their block, and `private`
    services: dict[_Host, _Block] = {}  # `local:` rules
    wildcards: dict[_Pattern, bool] = {}  # "*.x" or "**.x" -> `private`
    granted: dict[_Host, _Listed] = {}  # names that only a wildcard covers, as far as they are granted
    budgets: Budgets = Budgets()  # of such names
    terms: dict[_Name, _Terms] = {}  # of hosts, wildcards and granted names; "" for the others
    # Listed, and yet not to be led anywhere, whatever the guard: why. Patterns bar what they cover, unless
    # something more specific is listed.
    barred: dict[_Name, _Barring] = {}


class Pools(Protocol):
    """Synthetic addresses by block and slot; ruleset.layout.Pools is one."""

    def synthetic(self, block: int, slot: int = 0) -> tuple[IPv4Address, IPv6Address]: ...

    def block_of(self, address: IPv4Address | IPv6Address) -> tuple[int, int] | None: ...


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be said yet; ask again when this has settled."""

    target: Target | Pending


@dataclass(frozen=True, slots=True)
class Covered:
    """A wildcard covers the name, which is not granted yet. See `wildcards.Wildcards.asked`."""

    host: str
    cover: Cover


@dataclass(frozen=True, slots=True)
class Forward:
    """The guard does not restrict: ask upstream. `record` is whether to record it (observe), and as what."""

    record: bool
    reason: Reason = Reason.NAME


@dataclass(frozen=True, slots=True)
class Denied:
    """A reply that is a denial, to be recorded with its reason."""

    reply: Reply
    reason: Reason


Decision: TypeAlias = Reply | Wait | Forward | Denied | Covered


@dataclass(frozen=True, slots=True)
class Table:
    """A workspace's names, ready to be looked up."""

    names: WorkspaceNames
    pools: Pools
    patterns: Patterns  # those that are barred, too: the most specific one decides
    by_block: dict[int, str] = field(default_factory=dict)
    granted: dict[str, tuple[int, bool, str]] = field(default_factory=dict)  # block, `private`, terms

    @classmethod
    def of(cls, names: WorkspaceNames, pools: Pools) -> Table:
        """Granted names are added with `grant`: what the list says of them may be out of date."""
        by_block = {block: host for host, (block, _) in names.hosts.items()}
        by_block |= {block: service for service, block in names.services.items()}
        patterns = dict.fromkeys((p for p in names.barred if p.startswith("*")), False) | names.wildcards
        return cls(names, pools, Patterns(patterns, names.terms), by_block)

    @property
    def workspace(self) -> str:
        return self.names.workspace

    def barring(self, host: str) -> _Barring | None:
        """Why the name, which is not listed itself, may not be led anywhere."""
        found = self.names.barred.get(host)
        if found is not None or not self.names.barred:
            return found
        cover = self.patterns.match(host)
        return None if cover is None else self.names.barred.get(cover.pattern)

    def grant(self, host: str, block: int, *, private: bool, terms: str = "") -> None:
        self.granted[host] = (block, private, terms)
        self.by_block[block] = host

    def release(self, host: str) -> None:
        block, _, _ = self.granted.pop(host, (None, False, ""))
        if block is not None:
            self.by_block.pop(block, None)


def users_of(tables: Mapping[str, Table]) -> dict[Target, frozenset[User]]:
    """Which targets there are, and who uses each: what `Keeper.set_users` wants."""
    users: dict[Target, set[User]] = {}
    for table in tables.values():
        for host, (block, private) in table.names.hosts.items():
            if host not in table.names.services:
                target = Target(host, private, table.names.terms.get(host, ""))
                users.setdefault(target, set()).add(User(table.workspace, block))
        for host, (block, private, terms) in table.granted.items():
            users.setdefault(Target(host, private, terms), set()).add(User(table.workspace, block))
    return {target: frozenset(found) for target, found in users.items()}


def answer(table: Table, query: Query, standing: Callable[[Target], Standing]) -> Decision:
    """What to do about a query of a sandbox of this workspace. Class and type must be ordinary ones
    (the caller answers others, see `resolver`)."""
    name = query.name
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761 section 6.3
        return _fixed(query, (IPv4Address("127.0.0.1"), IPv6Address("::1")))
    block = table.names.services.get(name)
    if block is not None:
        return _fixed(query, table.pools.synthetic(block))
    listed = table.names.hosts.get(name)
    if listed is not None:
        block, private = listed
        return _listed(table, query, block, Target(name, private, table.names.terms.get(name, "")), standing)
    address = reverse_address(name)
    if address is not None and query.qtype in (Type.PTR, Type.ANY):
        found = _name_of(table, address)
        if found is not None:
            return replies.pointer(found)
    return _covered(table, query, standing)


def _covered(table: Table, query: Query, standing: Callable[[Target], Standing]) -> Decision:
    """By a wildcard. An answer about such a name is only for who asked: asking is what keeps it granted."""
    barring = table.barring(query.name)
    if barring is not None:
        return _barred(table, query, *barring)
    granted = table.granted.get(query.name)
    if granted is not None:
        block, private, terms = granted
        decision = _listed(table, query, block, Target(query.name, private, terms), standing)
        return replace(decision, shared=False) if isinstance(decision, Reply) else decision
    cover = table.patterns.match(query.name)
    if cover is None:
        return unlisted(table, query)
    if query.qtype in _ADDRESS_TYPES:
        return Covered(query.name, cover)
    if query.qtype == Type.ANY:
        return replace(replies.any_type(), shared=False)
    return replace(replies.no_data(extended=Extended.NOT_SUPPORTED, text=Reason.TYPE.text), shared=False)


def _barred(table: Table, query: Query, reason: str, text: str) -> Denied:
    said = f"{query.name} is barred in workspace {table.workspace}: {text}"
    return Denied(replies.blocked(said), Reason.of(reason))


def _fixed(query: Query, pair: tuple[IPv4Address, IPv6Address]) -> Reply:
    if query.qtype == Type.ANY:
        return replies.any_type()
    version = {Type.A: 4, Type.AAAA: 6}.get(Type(query.qtype)) if query.qtype in _ADDRESS_TYPES else None
    found = tuple(a for a in pair if a.version == version)
    return replies.addresses(found) if found else replies.no_data()


_ADDRESS_TYPES = (Type.A, Type.AAAA)


def _name_of(table: Table, address: Address) -> str | None:
    if address.is_loopback:
        return "localhost"
    found = table.pools.block_of(address)
    return table.by_block.get(found[0]) if found else None


def _listed(
    table: Table, query: Query, block: int, target: Target, standing: Callable[[Target], Standing]
) -> Decision:
    known = standing(target)
    if known.state is State.FAILED and known.failure is not None:
        return failed(table, known.failure)
    if known.state is State.PENDING or User(table.workspace, block) not in known.users:
        return Wait(target)
    ttl = int(min(known.ttl, _MAX_NEGATIVE_TTL))
    if not known.exists:
        return replies.no_name(ttl=ttl)
    if query.qtype in _ADDRESS_TYPES:
        return _synthetic(table, query, block, known, ttl)
    if query.qtype == Type.ANY:
        return replies.any_type()
    # HTTPS and SVCB are among these on purpose: their ECH keys hide the name from the inspector, their
    # address hints are real addresses.
    return replies.no_data(ttl=ttl, extended=Extended.NOT_SUPPORTED, text=Reason.TYPE.text)


def failed(table: Table, failure: Failure) -> Reply | Denied:
    """No address, for this reason. One of ours is a denial, which another address may end at any time."""
    if failure.reason is None:
        return replies.failure(failure.code, failure.text)
    reply = replies.blocked(f"in workspace {table.workspace} {failure.text}")
    return Denied(replace(reply, shared=False), failure.reason)


def _synthetic(table: Table, query: Query, block: int, known: Standing, ttl: int) -> Reply | Denied:
    family, which = (known.v4, 0) if query.qtype == Type.A else (known.v6, 1)
    slots = leading(family.slots)
    if slots:
        found = tuple(table.pools.synthetic(block, slot)[which] for slot in slots)
        return replies.stale(found) if family.stale else replies.addresses(found)
    if family.failure is None:
        return replies.no_data(ttl=ttl)
    reply = replies.no_data(extended=family.failure.code, text=family.failure.text)
    return (
        reply
        if family.failure.reason is None
        else Denied(replace(reply, shared=False), family.failure.reason)
    )


def unlisted(table: Table, query: Query) -> Decision:
    """Nothing on the list has a say in it: the guard decides."""
    guard = Guard(table.names.guard)
    if guard is Guard.ENFORCE:
        text = f"{query.name or '.'} is not on the list of workspace {table.workspace}"
        return Denied(replies.blocked(text), Reason.NAME)
    if query.qtype in _ADDRESS_TYPES:
        return Forward(record=guard is Guard.OBSERVE)
    if query.qtype == Type.ANY:
        return replies.any_type()
    return replies.no_data(extended=Extended.NOT_SUPPORTED, text=Reason.TYPE.text)
