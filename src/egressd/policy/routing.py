"""Which provider may serve a route now, and why, or why none may.

The first profile of the route that complies is selected; there is no other order, and no fallback. "Complies"
takes three things: its URL and declaration, judged with the policy; a rule that lets it be reached; and where
its addresses lie, which only who has looked them up can say. What cannot be shown is not selected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from egressd.model.addresses import Address
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Barred, HostRule, Policy, Provider, Rule
from egressd.policy.decide import governing, written_among
from egressd.residency.judge import Code, Finding
from egressd.residency.jurisdictions import named
from egressd.residency.places import Observation

__all__ = [
    "NONE",
    "Candidate",
    "Evidence",
    "Seen",
    "Selection",
    "select",
    "selections_by_url",
]

NONE = "none-complies"
_Rules: TypeAlias = Mapping[str, HostRule | Barred]  # see decide.governing


@dataclass(frozen=True, slots=True)
class Seen:
    """An address to which the profile's host leads, and what residency says of it."""

    address: Address
    finding: Finding
    observation: Observation


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where a profile's host leads at present. Nothing: it has not resolved."""

    addresses: tuple[Seen, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One profile of a route: whether it complies, and why or why not. `code` is one of residency's findings,
    or why the policy does not let it be reached ("unlisted", "port", "local-only", "unresolved")."""

    provider: str
    selectable: bool
    code: str
    text: str
    remedy: str
    type: str
    host: str  # name or address of the base URL
    port: int
    base_url: str
    declared_region: str
    api_key: str  # the reference
    jurisdiction: str
    source_url: str
    addresses: tuple[str, ...] = ()  # those that may be reached
    refused: tuple[tuple[str, str], ...] = ()  # the others: address and why
    prefixes: tuple[str, ...] = ()  # in which `addresses` lie, in the same order; "" for none
    tables: tuple[str, ...] = ()  # NAME@DIGEST of all that were asked about `addresses`


@dataclass(frozen=True, slots=True)
class Selection:
    """`selected` is None where none complies: block, and nothing in its place."""

    workspace: str
    route: str
    policy: str  # digest
    pin: tuple[str, ...]
    candidates: tuple[Candidate, ...]  # in the order of the route
    selected: Candidate | None
    code: str  # of the one selected; of the only candidate; or NONE
    text: str
    remedy: str = ""


def select(policy: Policy, route: str, evidence: Mapping[str, Evidence]) -> Selection:
    """The first profile of `route` that complies; `evidence` is by the profile's name.

    KeyError for a route that the policy does not have.
    """
    rules, none = governing(policy), Evidence()
    found = [
        _by_policy(policy, rules, one) or _by_evidence(one, evidence.get(one.name, none))
        for one in _profiles(policy, route)
    ]
    return _selection(policy, route, found)


def selections_by_url(policy: Policy) -> dict[str, Selection]:
    """What would be selected for each route if every address were where it should be: all that a file can
    tell."""
    rules = governing(policy)
    found = {
        one.name: _by_policy(policy, rules, one) or _passed(one, one.finding) for one in policy.providers
    }
    return {
        route.name: _selection(policy, route.name, [found[one.name] for one in _profiles(policy, route.name)])
        for route in policy.routes
    }


def _profiles(policy: Policy, route: str) -> list[Provider]:
    found = policy.route(route)
    if found is None:
        raise KeyError(route)
    return [profile for name in found.providers if (profile := policy.provider(name)) is not None]


def _selection(policy: Policy, route: str, candidates: Sequence[Candidate]) -> Selection:
    chosen = next((one for one in candidates if one.selectable), None)
    found = Selection(
        workspace=policy.workspace,
        route=route,
        policy=policy.digest,
        pin=policy.residency,
        candidates=tuple(candidates),
        selected=chosen,
        code=candidates[0].code if len(candidates) == 1 else NONE,
        text=_refusal(route, candidates),
        remedy=next((one.remedy for one in candidates if one.remedy), ""),
    )
    return found if chosen is None else replace(found, code=chosen.code, text=chosen.text, remedy="")


def _refusal(route: str, candidates: Sequence[Candidate]) -> str:
    whys = "; ".join(f"{one.provider}: {one.text}" for one in candidates)
    return f"no provider of route {route} complies: {whys}"


# ---- one profile


def _by_policy(policy: Policy, rules: _Rules, profile: Provider) -> Candidate | None:
    """Why the policy alone keeps the profile out, whatever its addresses; None if it does not."""
    if policy.local_only and not profile.is_local and profile.endpoint.address is None:
        remedy = f"egressctl local-only {policy.workspace} off"
        return _out(profile, Reason.LOCAL_ONLY.value, Reason.LOCAL_ONLY.text, remedy)
    if not profile.finding.compliant:
        return _refused(profile, profile.finding)
    rule = _written(policy, rules, profile)
    if isinstance(rule, Barred):
        return _refused(profile, rule.finding)
    remedy = f"add - provider: {profile.name} under allow:"
    if rule is None:
        text = f"no rule of {policy.workspace} allows {profile.endpoint.name}"
        return _out(profile, Reason.UNLISTED.value, text, remedy)
    if profile.port not in rule.ports:
        text = f"{rule.key} (line {rule.line}) is not allowed on {profile.port}"
        return _out(profile, Reason.PORT.value, text, remedy)
    return None


def _written(policy: Policy, rules: _Rules, profile: Provider) -> Rule | Barred | None:
    """The rule through which the profile is reached, or would be."""
    if profile.is_local:
        return next((rule for rule in policy.locals if profile.port in rule.ports), None)
    address = profile.endpoint.address
    if address is None:
        return written_among(rules, profile.endpoint.host)
    around = [rule for rule in policy.cidrs if address in rule.network]
    on_port = next((rule for rule in around if profile.port in rule.ports), None)
    barred = next((one for one in policy.barred if one.rule.key == profile.key), None)
    return on_port or barred or (around[0] if around else None)


def _by_evidence(profile: Provider, evidence: Evidence) -> Candidate:
    """Of a profile that the policy lets be reached."""
    if profile.is_local:
        return replace(_passed(profile, profile.finding), addresses=("127.0.0.1",), prefixes=("",))
    if profile.endpoint.address is not None and not evidence.addresses:
        # its one address was judged with the rule for it
        known = (str(profile.endpoint.address),)
        return replace(_passed(profile, profile.finding), addresses=known, prefixes=("",))
    return _by_address(profile, evidence)


def _by_address(profile: Provider, evidence: Evidence) -> Candidate:
    reached = tuple(seen for seen in evidence.addresses if seen.finding.compliant)
    others = tuple(seen for seen in evidence.addresses if not seen.finding.compliant)
    refused = tuple((str(seen.address), seen.finding.text) for seen in others)
    if not evidence.addresses:
        text = f"{profile.endpoint.name} has not resolved to any usable address"
        return _out(profile, Reason.UNRESOLVED.value, text)
    if not reached:
        text = "; ".join(dict.fromkeys(why for _, why in refused))
        worst = others[0].finding
        return replace(_out(profile, worst.code.value, text, worst.remedy), refused=refused)
    by_address = profile.finding.code is Code.BY_ADDRESS
    return replace(
        _passed(profile, reached[0].finding if by_address else profile.finding),
        addresses=tuple(str(seen.address) for seen in reached),
        prefixes=tuple(seen.observation.prefix or "" for seen in reached),
        refused=refused,
        tables=_tables(reached),
    )


def _tables(seen: tuple[Seen, ...]) -> tuple[str, ...]:
    every = (one for address in seen for one in (address.observation, *address.observation.others))
    return tuple(sorted({str(one.table) for one in every if one.table is not None}))


def _passed(profile: Provider, finding: Finding) -> Candidate:
    return replace(_out(profile, finding.code.value, finding.text), selectable=True)


def _refused(profile: Provider, finding: Finding) -> Candidate:
    return _out(profile, finding.code.value, finding.text, finding.remedy)


def _out(profile: Provider, code: str, text: str, remedy: str = "") -> Candidate:
    declared, placement = profile.declared, profile.placement
    return Candidate(
        provider=profile.name,
        selectable=False,
        code=code,
        text=text,
        remedy=remedy,
        type=profile.type,
        host=profile.endpoint.name,
        port=profile.endpoint.port,
        base_url=profile.base_url,
        api_key=profile.api_key,
        declared_region=declared.region if declared else placement.region,
        jurisdiction=declared.jurisdiction if declared else named(placement.countries),
        source_url=declared.source_url if declared else placement.source,
    )
