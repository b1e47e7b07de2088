"""Does residency let it be? The one place where that is decided: for an endpoint by its URL, for an address
by its prefix. Compiling a policy, selecting a route, linting and leading a name in the kernel all ask here.

A list of what is permitted: whatever is not known to be inside the pin is outside.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from egressd.model.addresses import Network
from egressd.residency.jurisdictions import named
from egressd.residency.places import Declared, Observation, Pin, Placement, Scope

__all__ = ["Code", "Finding", "contradiction", "judge_address", "judge_endpoint", "judge_network"]


class Code(enum.StrEnum):
    """Why, for machines: the journal, SARIF, the HTTP API. The zero refuses."""

    UNJUDGED = "unjudged"
    INSIDE = "inside"
    UNPINNED = "unpinned"
    LOOPBACK = "loopback"
    BY_ADDRESS = "by-address"  # the URL leaves it open, its addresses will decide
    VOUCHED = "vouched"
    OUTSIDE = "outside"
    GLOBAL = "global-endpoint"
    UNPLACED = "unplaced"
    CONTRADICTED = "contradicted"
    ANYCAST = "anycast"
    UNPUBLISHED = "no-prefix"
    CONFLICT = "conflicting-prefixes"
    LOCAL_ONLY = "local-only"  # external routing is off, wherever it would lead
    BROKEN = "broken-registry"  # the files of the catalogue or of the prefixes cannot be read


_GOOD = frozenset({Code.INSIDE, Code.UNPINNED, Code.LOOPBACK, Code.BY_ADDRESS, Code.VOUCHED})


@dataclass(frozen=True, slots=True)
class Finding:
    """`text` is a sentence for a person, `remedy` what could be done, or ""."""

    code: Code = Code.UNJUDGED
    text: str = "it was not judged, and what is not judged is refused"
    remedy: str = ""

    @property
    def compliant(self) -> bool:
        return self.code in _GOOD


# ---- by URL


def judge_endpoint(placement: Placement, *, declared: Declared | None, pin: Pin, name: str) -> Finding:
    """May requests go to the endpoint that people call `name`? `declared` is None for a plain host rule.

    BY_ADDRESS is all that a URL outside the catalogue can get: its addresses have to show where it is.
    """
    if not pin:
        return Finding(Code.UNPINNED, "the workspace is not pinned to any jurisdiction")
    wrong = contradiction(placement, declared) if declared is not None else None
    if wrong is not None:
        return Finding(Code.CONTRADICTED, wrong, "correct the profile")
    match placement.scope:
        case Scope.LOOPBACK:
            return Finding(Code.LOOPBACK, f"{name} is this machine itself")
        case Scope.REGION | Scope.MULTI_REGION:
            return _inside(placement.countries, pin, f"{name} is {_where(placement)}")
        case Scope.GLOBAL:
            note = (
                placement.note
                or f"{name} is a global endpoint: nothing in its URL binds a request to a region"
            )
            return Finding(Code.GLOBAL, note, "use a regional endpoint of the provider")
        case Scope.UNPLACED:
            return _unplaced(placement, declared, pin, name)
        case _:
            return _unknown(declared, pin, name)


def _unplaced(placement: Placement, declared: Declared | None, pin: Pin, name: str) -> Finding:
    note = placement.note or f"the URL of {name} does not say in which region it is"
    if not placement.declarable:
        return Finding(Code.UNPLACED, note)
    if declared is None:
        remedy = "list it as a provider, with the region and its source under residency:"
        return Finding(Code.UNPLACED, note, remedy)
    return _declared(declared, pin, name)


def _unknown(declared: Declared | None, pin: Pin, name: str) -> Finding:
    if declared is not None:
        return _declared(declared, pin, name)
    return Finding(Code.BY_ADDRESS, f"{name} is in no catalogue: its addresses have to show where it is")


def _declared(declared: Declared, pin: Pin, name: str) -> Finding:
    if declared.countries - pin.countries:
        text = (
            f"{name} is declared to be in {declared.jurisdiction} ({declared.region}), and the pin is {pin}"
        )
        return Finding(Code.OUTSIDE, text)
    where = f"{declared.jurisdiction} ({declared.region})"
    return Finding(Code.BY_ADDRESS, f"{name} is declared to be in {where}: its addresses have to show it")


def _inside(found: Iterable[str], pin: Pin, what: str) -> Finding:
    there = frozenset(found)
    outside = there - pin.countries
    if not there:
        return Finding(Code.UNPLACED, f"{what}, and in which country that is, is not known")
    if outside:
        verb = "is" if len(outside) == 1 else "are"
        return Finding(Code.OUTSIDE, f"{what}, and {named(outside)} {verb} not in {pin}")
    return Finding(Code.INSIDE, what)


def _where(placement: Placement) -> str:
    where = named(placement.countries) or "nobody says where"
    region = f"in {placement.region} ({where})" if placement.region else f"in {where}"
    return f"{region}: {placement.note}" if placement.note else region


def contradiction(placement: Placement, declared: Declared) -> str | None:
    """What the URL says against the declaration, whatever the pin; None if nothing."""
    if placement.scope is Scope.GLOBAL and declared.region != "global":
        return f"it declares {declared.region}, and its URL is of a global endpoint"
    if placement.scope not in (Scope.REGION, Scope.MULTI_REGION):
        return None
    if placement.region and declared.region != placement.region:
        return f"it declares {declared.region}, and its URL says {placement.region}"
    outside = set(placement.countries) - declared.countries
    if outside:
        what = placement.region or "its URL"
        return f"it declares {declared.jurisdiction}, and {what} is in {named(outside)}"
    return None


# ---- by address


def judge_address(seen: Observation, *, pin: Pin, vouched: bool) -> Finding:
    """May a name of a workspace with this pin lead to this address?

    Every table that has the address must place it inside. `vouched`: the rule's author answers in writing for
    what no table can place; never for what a table places outside.
    """
    if not pin:
        return Finding(Code.UNPINNED, "the workspace is not pinned to any jurisdiction")
    findings = [_judge_one(one, pin) for one in (seen, *seen.others)]
    refused = [finding for finding in findings if not finding.compliant]
    if not refused:
        return findings[0]
    worst = _worst(refused)
    if vouched and worst.code in _VOUCHABLE:
        return Finding(Code.VOUCHED, f"{worst.text}; the rule vouches for it")
    return worst


def judge_network(network: Network, seen: Iterable[Observation], *, pin: Pin, vouched: bool) -> Finding:
    """May a rule lead to all of this network, of whose addresses this was `seen`? The worst is told."""
    findings = [judge_address(one, pin=pin, vouched=vouched) for one in seen]
    refused = [finding for finding in findings if not finding.compliant]
    if not refused:
        return findings[0]
    worst = _worst(refused)
    return replace(worst, text=f"in {network}, {worst.text}")


_VOUCHABLE = frozenset({Code.ANYCAST, Code.UNPUBLISHED})


def _worst(refused: Sequence[Finding]) -> Finding:
    """What cannot be vouched for is worse than what can."""
    return next((finding for finding in refused if finding.code not in _VOUCHABLE), refused[0])


def _judge_one(seen: Observation, pin: Pin) -> Finding:
    if seen.prefix is None:
        text = f"{seen.address} is in no published prefix that was imported"
        return Finding(Code.UNPUBLISHED, text, "import the provider's prefixes, or write vouch: REASON")
    what = f"{seen.address} is in {seen.prefix} of {seen.provider or 'a list'}"
    if seen.conflict:
        return Finding(Code.CONFLICT, f"{what}, and {seen.conflict}")
    if seen.anycast:
        return Finding(Code.ANYCAST, f"{what}, which is announced from many places", "write vouch: REASON")
    if not seen.countries:
        return Finding(Code.CONFLICT, f"{what}, whose region {seen.region or 'is not told'} nobody can place")
    where = named(seen.countries)
    region = where if seen.region == where else f"{seen.region} ({where})"  # a plain list names countries
    return _inside(seen.countries, pin, f"{what}, {region}")
