"""The books: what came in is what was admitted, denied or not IP, to the packet and to the byte.

    each link            in        = ok + denied + other
    each workspace       sum of ok = its elements + unlisted + elements that are gone
    each workspace       sum of denied = sum of its counters by reason

Read while nothing flows, or read twice and use it if both are equal: nft lists counters one after the
other, so under traffic the later ones have seen more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct

from egressd.ruleset.observe import Counters, LinkCounts, Tally

__all__ = ["Books", "Difference", "books"]


class Difference(Struct, frozen=True):
    """An equation that does not hold: which, and left minus right."""

    what: str
    packets: int
    bytes: int


class Books(Struct, frozen=True):
    balanced: bool
    differences: tuple[Difference, ...]
    equations: int  # how many were checked: none checked is not balanced


def books(
    counters: Counters,
    retired: Mapping[str, Tally],
    ended: Mapping[str, tuple[LinkCounts, ...]],
    *,
    workspace_of: Mapping[str, str],
) -> Books:
    """Check every equation.

    `retired`: workspace -> sum of elements that left its maps. `ended`: workspace -> last counters of its
    links that are gone. `workspace_of`: live device -> workspace; a link it does not name is a difference.
    """
    equations = [
        *_links(counters.links.items()),
        *(pair for name in sorted(ended) for pair in _links((f"{name}, ended", c) for c in ended[name])),
        *_workspaces(counters, retired, ended, workspace_of),
    ]
    differences = tuple(
        Difference(what=what, packets=rest.packets, bytes=rest.bytes)
        for what, rest in equations
        if rest != Tally()
    )
    return Books(
        balanced=bool(equations) and not differences, differences=differences, equations=len(equations)
    )


def _links(links: Iterable[tuple[str, LinkCounts]]) -> Iterator[tuple[str, Tally]]:
    for device, counts in links:
        yield f"{device}: in = ok + denied + other", counts.in_ - counts.ok - counts.denied - counts.other


def _workspaces(
    counters: Counters,
    retired: Mapping[str, Tally],
    ended: Mapping[str, tuple[LinkCounts, ...]],
    workspace_of: Mapping[str, str],
) -> Iterator[tuple[str, Tally]]:
    links: dict[str, list[LinkCounts]] = {name: list(gone) for name, gone in ended.items()}
    for device, counts in counters.links.items():
        links.setdefault(workspace_of.get(device, f"nobody ({device})"), []).append(counts)
    admitted: dict[str, Tally] = {}
    for element in counters.elements:
        tally = Tally(element.packets, element.bytes)
        admitted[element.workspace] = admitted.get(element.workspace, Tally()) + tally
    for name in sorted({*links, *admitted, *counters.denied, *counters.unlisted, *retired}):
        mine = links.get(name, [])
        ok = _sum(link.ok for link in mine)
        listed = admitted.get(name, Tally()) + counters.unlisted.get(name, Tally())
        yield f"{name}: ok = elements + unlisted + retired", ok - listed - retired.get(name, Tally())
        reasons = _sum(counters.denied.get(name, {}).values())
        yield f"{name}: denied = its reasons", _sum(link.denied for link in mine) - reasons


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total += tally
    return total
