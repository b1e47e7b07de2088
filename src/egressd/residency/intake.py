"""What came in with a list of prefixes: how many, for where, what is doubtful, what is other than before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from egressd.residency.prefixes import Regions, Said, Table, nested, sayings

__all__ = ["EXAMPLES", "Changes", "Intake", "changes", "intake"]

EXAMPLES: Final = 1000  # of conflicts, nested prefixes and moves that are kept; all are counted


@dataclass(frozen=True, slots=True)
class Intake:
    """Numbers are of prefixes. Examples are (prefix, in words)."""

    four: int
    six: int
    regions: Mapping[str, int]
    countries: Mapping[str, int]
    anycast: int
    unplaced: int  # the list does not say where
    unknown: Mapping[str, int]  # regions that the catalogue cannot place
    conflicts: int
    conflicting: tuple[tuple[str, str], ...]
    nested: int  # in a wider prefix of another region
    nesting: tuple[tuple[str, str], ...]


def intake(table: Table, regions: Regions) -> Intake:
    """`regions` as `prefixes.Prefixes` has them."""
    numbers: dict[str, Counter[str]] = {"regions": Counter(), "countries": Counter(), "unknown": Counter()}
    kinds: Counter[str] = Counter()
    conflicting = []
    for prefix, said in sayings(table, regions):
        kinds["six" if ":" in prefix else "four"] += 1
        kind = _kind(said)
        kinds[kind] += 1
        if kind == "conflict":
            conflicting.append((prefix, said.conflict))
        elif kind in ("known", "unknown"):
            numbers["regions"][said.region] += 1
            numbers["countries"].update(said.countries)
        if kind == "unknown":
            numbers["unknown"][said.region] += 1
    inside = [(prefix, f"{region or 'many places'} in {around}") for prefix, region, around in nested(table)]
    return Intake(
        four=kinds["four"],
        six=kinds["six"],
        regions=_sorted(numbers["regions"]),
        countries=_sorted(numbers["countries"]),
        anycast=kinds["anycast"],
        unplaced=kinds["unplaced"],
        unknown=_sorted(numbers["unknown"]),
        conflicts=len(conflicting),
        conflicting=tuple(conflicting[:EXAMPLES]),
        nested=len(inside),
        nesting=tuple(inside[:EXAMPLES]),
    )


def _kind(said: Said) -> str:
    if said.conflict:
        return "conflict"
    if not said.placed:
        return "unplaced"
    if said.anycast:
        return "anycast"
    return "known" if said.countries else "unknown"


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, slots=True)
class Changes:
    """Against the table that was there before. `moved`: examples of (prefix, "eu-west-1 -> us-east-1")."""

    added: int
    removed: int
    moves: int
    moved: tuple[tuple[str, str], ...]


def changes(before: Table, after: Table) -> Changes:
    old, new = _regions_of(before), _regions_of(after)
    moved = [
        (prefix, f"{old[prefix]} -> {region}")
        for prefix, region in new.items()
        if prefix in old and old[prefix] != region
    ]
    return Changes(
        added=len(new.keys() - old.keys()),
        removed=len(old.keys() - new.keys()),
        moves=len(moved),
        moved=tuple(moved[:EXAMPLES]),
    )


def _regions_of(table: Table) -> dict[str, str]:
    """By prefix, in the table's own words: a country may have changed in the catalogue, too."""
    found = {}
    for prefix, said in sayings(table, lambda _, __: None):
        where = "many places" if said.anycast else "nowhere in particular" if not said.placed else said.region
        found[prefix] = where
    return found
