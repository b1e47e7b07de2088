"""What a proof says about where its hosts are: the policy's pin, against what was found of each address.

Under a pin every address is judged before a name leads to it, and what was found is recorded: in which
published prefix it lies, of which table. Here those records are held against the addresses that were reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from egressd.journal.statement import Predicate
from egressd.journal.summary import Place

__all__ = ["CLAIM", "Residency", "Unproved", "Vouched", "residency"]

CLAIM: Final = (
    "That an address is where its provider publishes it to be is the provider's word, in the tables named: "
    "evidence of a place, not a legal guarantee, and none of where an allowed host passes things on to."
)
# Rows of hosts whose addresses are real ones of names: a network was placed when the policy was compiled.
_NAMED: Final = frozenset({"host", "granted"})


@dataclass(frozen=True, slots=True)
class Vouched:
    """A rule whose author answers for addresses that no table can place."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unproved:
    """An address that was reached, and of which the window has no record that it was let in."""

    host: str
    address: str


@dataclass(frozen=True, slots=True)
class Residency:
    """`pin`: at the end of the window. `admitted` and `refused`: what was found of each address in it."""

    pin: tuple[str, ...]
    local_only: bool
    vouched: tuple[Vouched, ...]
    admitted: tuple[Place, ...]
    refused: tuple[Place, ...]
    unproved: tuple[Unproved, ...]
    tables: tuple[tuple[str, str], ...]  # name, digest


def residency(predicate: Predicate) -> Residency:
    """From the policy's text and the records. A policy without a pin has an empty one."""
    policy = predicate.policy.meaning
    places = predicate.summary.places
    admitted = tuple(place for place in places if place.admitted)
    pin = tuple(code for code in _list(policy, "residency") if isinstance(code, str))
    return Residency(
        pin=pin,
        local_only=policy.get("local_only") is True,
        vouched=tuple(_vouched(policy)),
        admitted=admitted,
        refused=tuple(place for place in places if not place.admitted),
        unproved=tuple(_unproved(predicate, admitted)) if pin else (),
        tables=tuple(sorted({(p.table, p.table_digest) for p in places if p.table})),
    )


def _vouched(policy: Mapping[str, Any]) -> Iterator[Vouched]:
    for rule in _list(policy, "rules"):
        if isinstance(rule, dict) and isinstance(rule.get("vouch"), str) and rule["vouch"]:
            yield Vouched(str(rule.get("key")), rule["vouch"])


def _unproved(predicate: Predicate, admitted: tuple[Place, ...]) -> Iterator[Unproved]:
    known = {(place.host, place.address) for place in admitted}
    for host, address in sorted(set(_reached(predicate))):
        if (host, address) not in known:
            yield Unproved(host, address)


def _reached(predicate: Predicate) -> Iterator[tuple[str, str]]:
    """Real addresses of names to which packets went. Flow records tell each, rows of counters the last."""
    for host in predicate.summary.hosts:
        if host.kind in _NAMED and (host.counted.out_packets or host.counted.dialled_packets):
            yield from ((host.host, address) for address in host.addresses)
    for flow in predicate.summary.flows:
        if flow.kind in _NAMED or flow.kind == "dialled":
            yield flow.host, flow.address


def _list(policy: Mapping[str, Any], name: str) -> list[Any]:
    found = policy.get(name)
    return found if isinstance(found, list) else []
