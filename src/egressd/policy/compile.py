"""Rules that are each well formed, made into one policy; what is wrong only in their company is found here.

`document` reads a file into a `Draft`. `conflicts` says what keeps the draft from being a policy;
`compile` refuses a draft that has any. Rules for the same host, network or service become one rule, so
that every key of a `Policy` is unique: a key owns a block of synthetic addresses, and its elements in
the kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, TypeVar

from egressd.policy import barring
from egressd.policy.compiled import (
    Budgets,
    CidrRule,
    Ech,
    Guard,
    HostRule,
    Limits,
    LocalRule,
    Member,
    Policy,
    Port,
    Provider,
    Route,
    Rule,
)
from egressd.residency.places import Scope
from egressd.residency.registry import Registry

__all__ = ["MAX_RULES", "Conflict", "Draft", "Drafted", "canonical", "compile", "conflicts", "digest"]

# Blocks a workspace can own: 2**14 less the resolver's and the one for unlisted traffic (ruleset/layout.py).
MAX_RULES = (1 << 14) - 2
T = TypeVar("T")


class Drafted(NamedTuple):
    """A rule and where it stands: `allow[place]`."""

    place: int
    rule: Rule


@dataclass(frozen=True, slots=True)
class Draft:
    """A document whose every part is well formed on its own."""

    workspace: str
    guard: Guard
    members: tuple[Member, ...]
    residency: tuple[str, ...]
    rules: tuple[Drafted, ...]
    limits: Limits
    wildcards: Budgets
    local_only: bool = False
    providers: tuple[Provider, ...] = ()  # not judged yet
    routes: tuple[Route, ...] = ()


class Conflict(NamedTuple):
    """What two or more rules do to each other. `path` is inside the document."""

    path: tuple[str | int, ...]
    text: str
    remedy: str


def compile(draft: Draft, registry: Registry | None = None) -> Policy:
    """The policy. ValueError if `conflicts` has anything to say: half a policy is none.

    What residency does not let be is set aside as `barred`, and takes no part in anything; so is every host
    while external routing is off. Without a `registry` nothing is known about any provider or address.
    """
    found = conflicts(draft)
    if found:
        raise ValueError(found[0].text)
    policy = Policy(
        workspace=draft.workspace,
        guard=draft.guard,
        members=tuple(sorted(draft.members)),
        residency=tuple(sorted(draft.residency)),
        rules=_merged(draft.rules),
        limits=draft.limits,
        wildcards=draft.wildcards,
        digest="",
        local_only=draft.local_only,
        providers=draft.providers,
        routes=draft.routes,
    )
    return barring.judged(replace(policy, digest=digest(policy)), registry or Registry())


def conflicts(draft: Draft) -> tuple[Conflict, ...]:
    """Everything wrong between the rules, in no particular order."""
    checks: tuple[Callable[[Draft], Iterator[Conflict]], ...] = (
        _repeated_ports,
        _disagreeing_hosts,
        _disagreeing_verification,
        _disagreeing_profiles,
        _crowded_blocks,
        _overlapping_networks,
        _shared_loopback_ports,
        _repeated_members,
        _repeated_jurisdictions,
    )
    return tuple(finding for check in checks for finding in check(draft))


def digest(policy: Policy) -> str:
    """`sha256:` and 64 hex digits over what the policy means: not over comments, lines or order."""
    return "sha256:" + hashlib.sha256(canonical(policy).encode()).hexdigest()


def canonical(policy: Policy) -> str:
    """What the policy means, as the JSON that its digest is of: as its author wrote it, whatever of it takes
    part. What is barred depends on the catalogue and the tables, which have a digest of their own; a policy
    has one on every machine.

    Format 2 has what format 1 could not say. A policy that says nothing of it keeps format 1, and with it the
    digest that proofs of earlier versions name.
    """
    written = policy.written
    meaning = {
        "format": 1,
        "workspace": policy.workspace,
        "guard": str(policy.guard),
        "members": sorted(map(str, policy.members)),
        "residency": sorted(policy.residency),
        "rules": sorted((_meaning(rule) for rule in written), key=lambda rule: str(rule["key"])),
        "limits": {name: getattr(policy.limits, name) for name in Limits.__slots__},
        "wildcards": asdict(policy.wildcards),
    }
    more = {
        "local_only": policy.local_only,
        "providers": {provider.name: _provider_meaning(provider) for provider in policy.providers},
        "routes": {route.name: list(route.providers) for route in policy.routes},
    }
    if any(more.values()) or any(_vouch(rule) for rule in written):
        meaning |= more | {"format": 2}
    return json.dumps(meaning, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _meaning(rule: Rule) -> dict[str, object]:
    meaning: dict[str, object] = {"key": rule.key, "ports": [str(port) for port in sorted(rule.ports)]}
    if _vouch(rule):
        meaning["vouch"] = _vouch(rule)
    if rule.providers:
        meaning["providers"] = list(rule.providers)
    match rule:
        case HostRule():
            return meaning | {
                "kind": "host",
                "private": rule.private,
                "inspected": [[str(port), str(how)] for port, how in rule.inspected],
                "ech": str(rule.ech),
            }
        case CidrRule():
            return meaning | {"kind": "cidr"}
        case LocalRule():
            return meaning | {"kind": "local"}


def _vouch(rule: Rule) -> str:
    return "" if isinstance(rule, LocalRule) else rule.vouch


def _provider_meaning(provider: Provider) -> dict[str, object]:
    declared = provider.declared
    return {
        "type": provider.type,
        "base_url": provider.base_url,
        "api_key": provider.api_key,
        "declared": None if declared is None else asdict(declared),
        "models": list(provider.models),
    }


def _merged(drafted: tuple[Drafted, ...]) -> tuple[Rule, ...]:
    """One rule per key, in the order the keys first appear, ports sorted."""
    rules: dict[str, Rule] = {}
    for _, rule in drafted:
        known = rules.get(rule.key)
        rules[rule.key] = _joined(known or rule, rule)
    return tuple(rules.values())


def _joined(known: Rule, rule: Rule) -> Rule:
    """Two rules of one key. Each port keeps the way in which its own rule has it verified."""
    ports = tuple(sorted({*known.ports, *rule.ports}))
    providers = tuple(sorted({*known.providers, *rule.providers}))
    if not isinstance(known, HostRule) or not isinstance(rule, HostRule):
        return replace(known, ports=ports, providers=providers)
    inspected = tuple(sorted({*known.inspected, *rule.inspected}))
    # a rule that has nothing inspected has no say: its `ech` is the default (see _disagreeing_hosts)
    ech = Ech.ALLOW if Ech.ALLOW in (known.ech, rule.ech) else Ech.REFUSE
    return replace(known, ports=ports, inspected=inspected, ech=ech, providers=providers)


# ---- the checks. Each is at most n log n in the number of (rule, port) pairs.


def _repeated_ports(draft: Draft) -> Iterator[Conflict]:
    """Written twice, or the same profile twice. Several profiles may share a host, and stand beside a rule
    for it: they differ in what is asked there, of which the network sees nothing."""
    first: dict[tuple[str, Port, tuple[str, ...]], int] = {}
    for place, rule in draft.rules:
        for number, port in enumerate(rule.ports):
            this = (rule.key, port, rule.providers)
            if this in first:
                yield Conflict(
                    ("allow", place, "ports", number),
                    f"{rule.key} is allowed on {port} twice, first on line {first[this]}",
                    "remove one of them",
                )
            first.setdefault(this, rule.line)


def _disagreeing_hosts(draft: Draft) -> Iterator[Conflict]:
    hosts = [(place, rule) for place, rule in draft.rules if isinstance(rule, HostRule)]
    yield from _disagreeing(hosts, "private")
    # ECH is a matter of what is read: the rule with the other ports has nothing to say about it
    yield from _disagreeing([(place, rule) for place, rule in hosts if rule.inspected], "ech")
    yield from _disagreeing(hosts, "vouch")
    cidrs = [(place, rule) for place, rule in draft.rules if isinstance(rule, CidrRule)]
    yield from _disagreeing(cidrs, "vouch")


def _disagreeing(rules: Sequence[tuple[int, HostRule | CidrRule]], name: str) -> Iterator[Conflict]:
    first: dict[str, HostRule | CidrRule] = {}
    for place, rule in rules:
        known = first.setdefault(rule.key, rule)
        if getattr(known, name) != getattr(rule, name):
            what = "host" if isinstance(rule, HostRule) else "network"
            yield Conflict(
                ("allow", place, name),
                f"{rule.key} has another value for {name} on line {known.line}",
                f"a {what} has one value for it, whatever the port",
            )


def _disagreeing_verification(draft: Draft) -> Iterator[Conflict]:
    """Where two rules meet on a port at all, one of them is for a profile (see _repeated_ports)."""
    first: dict[tuple[str, Port], HostRule] = {}
    for place, rule in draft.rules:
        if not isinstance(rule, HostRule):
            continue
        for port in rule.ports:
            known = first.setdefault((rule.key, port), rule)
            if known.providers != rule.providers and known.verify_on(port) is not rule.verify_on(port):
                yield Conflict(
                    ("allow", place, "verify"),
                    f"{rule.key} is verified otherwise on {port} by line {known.line}",
                    "write the same verify in both",
                )


def _disagreeing_profiles(draft: Draft) -> Iterator[Conflict]:
    """A host is in one place. Where its URL says in which, `contradiction` has compared it already."""
    first: dict[str, Provider] = {}
    for provider in draft.providers:
        if provider.declared is None or provider.placement.scope not in (Scope.UNKNOWN, Scope.UNPLACED):
            continue
        known = first.setdefault(provider.endpoint.name, provider)
        if known.declared is not None and _place(known) != _place(provider):
            yield Conflict(
                ("providers", provider.name, "residency"),
                f"{provider.endpoint.name} is declared to be in {known.region} on line {known.line}, and in"
                f" {provider.region} here",
                "a host is in one place: correct one of them",
            )


def _place(provider: Provider) -> tuple[str, str]:
    assert provider.declared is not None
    return provider.declared.region, provider.declared.jurisdiction


def _crowded_blocks(draft: Draft) -> Iterator[Conflict]:
    """A name that a wildcard covers takes a block of addresses, as a rule does, while it is held."""
    rules = {rule.key: rule for _, rule in draft.rules}
    names = draft.wildcards.workspace.names
    if len(rules) + names > MAX_RULES and any(isinstance(r, HostRule) and r.wildcard for r in rules.values()):
        yield Conflict(
            ("wildcards", "workspace", "names"),
            f"{len(rules)} rules and {names} names of wildcards are more than {MAX_RULES} together",
            "set a smaller budget of names under wildcards: {workspace: {names: ...}}",
        )


def _overlapping_networks(draft: Draft) -> Iterator[Conflict]:
    """The kernel's interval map cannot hold overlapping keys, and a packet must have one rule."""
    by_port: dict[tuple[Port, int], list[tuple[int, CidrRule]]] = {}
    for place, rule in draft.rules:
        if isinstance(rule, CidrRule):
            for port in rule.ports:
                by_port.setdefault((port, rule.network.version), []).append((place, rule))
    for (port, _), entries in by_port.items():
        yield from _overlaps(port, entries)


def _overlaps(port: Port, entries: list[tuple[int, CidrRule]]) -> Iterator[Conflict]:
    """Networks nest or are apart; sorted, the ones inside a network follow it directly."""
    entries.sort(key=lambda entry: (int(entry[1].network.network_address), entry[1].network.prefixlen))
    outer = entries[0][1]
    for place, rule in entries[1:]:
        if int(rule.network.network_address) > int(outer.network.broadcast_address):
            outer = rule
        elif rule.network != outer.network:  # the same network twice is told by _repeated_ports
            yield Conflict(
                ("allow", place),
                f"{rule.network} lies inside {outer.network} (line {outer.line}), both on {port}",
                "keep one of them",
            )


def _shared_loopback_ports(draft: Draft) -> Iterator[Conflict]:
    owners: dict[Port, LocalRule] = {}
    for place, rule in draft.rules:
        if not isinstance(rule, LocalRule):
            continue
        for number, port in enumerate(rule.ports):
            owner = owners.setdefault(port, rule)
            if owner.service != rule.service:
                yield Conflict(
                    ("allow", place, "ports", number),
                    f"port {port} of the loopback is already {owner.service}'s (line {owner.line})",
                    "a port of this machine is one service",
                )


def _repeated_members(draft: Draft) -> Iterator[Conflict]:
    for place, member in _repeats(draft.members):
        yield Conflict(("members", place), f"{member} is a member twice", "remove one of them")


def _repeated_jurisdictions(draft: Draft) -> Iterator[Conflict]:
    for place, code in _repeats(draft.residency):
        yield Conflict(("residency", "jurisdictions", place), f"{code} is listed twice", "remove one of them")


def _repeats(items: tuple[T, ...]) -> Iterator[tuple[int, T]]:
    seen: set[T] = set()
    for place, item in enumerate(items):
        if item in seen:
            yield place, item
        seen.add(item)
