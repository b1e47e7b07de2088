"""The books: what came in is what was admitted, denied or not IP, to the packet and to the byte.

    each link            in        = ok + denied + other
    each workspace       sum of ok = its elements + unlisted + elements that are gone
    each workspace       sum of denied = sum of its counters by reason

While nothing flows, `books` compares exactly. The kernel lists counters one after the other, so under traffic
the later ones have seen more, and no single reading can be exact. But every counter only grows: at the
moment between two readings each side of an equation had a value between its two readings. `contradictions`
are the equations whose sides cannot have been equal at that moment, and those are wrong whatever flowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from egressd.ruleset.observe import Counters, LinkCounts, Tally

__all__ = ["Books", "Difference", "Equation", "books", "contradictions", "equations", "sum_tallies"]


class Difference(Struct, frozen=True):
    """An equation that does not hold: which, and left minus right."""

    what: str
    packets: int
    bytes: int


class Equation(Struct, frozen=True):
    what: str
    left: Tally
    right: Tally


class Books(Struct, frozen=True):
    balanced: bool
    differences: tuple[Difference, ...]
    equations: int  # how many were checked: none checked is not balanced


def equations(
    counters: Counters,
    retired: Mapping[str, Tally],
    ended: Mapping[str, tuple[LinkCounts, ...]],
    *,
    workspace_of: Mapping[str, str],
) -> tuple[Equation, ...]:
    """Everything that must hold.

    `retired`: workspace -> sum of elements that left its maps. `ended`: workspace -> last counters of its
    links that are gone. `workspace_of`: live device -> workspace; a link it does not name is a difference.
    """
    return (
        *_links(counters.links.items()),
        *(each for name in sorted(ended) for each in _links((f"{name}, ended", c) for c in ended[name])),
        *_workspaces(counters, retired, ended, workspace_of),
    )


def books(found: Sequence[Equation]) -> Books:
    """Check every equation of one reading, exactly."""
    return _verdict(found, [_difference(each) for each in found if each.left != each.right])


def contradictions(before: Sequence[Equation], after: Sequence[Equation]) -> Books:
    """Check two readings, taken one after the other while packets flow. What only one of them has (a link
    that came or went) cannot be judged and is left out."""
    later = {each.what: each for each in after}
    judged = [(each, later[each.what]) for each in before if each.what in later]
    wrong = [_difference(second) for first, second in judged if not _may_meet(first, second)]
    return _verdict([first for first, _ in judged], wrong)


def _may_meet(first: Equation, second: Equation) -> bool:
    return all(
        getattr(first.left, what) <= getattr(second.right, what)
        and getattr(first.right, what) <= getattr(second.left, what)
        for what in ("packets", "bytes")
    )


def _difference(equation: Equation) -> Difference:
    rest = equation.left - equation.right
    return Difference(what=equation.what, packets=rest.packets, bytes=rest.bytes)


def _verdict(checked: Sequence[Equation], wrong: Sequence[Difference]) -> Books:
    return Books(balanced=bool(checked) and not wrong, differences=tuple(wrong), equations=len(checked))


def _links(links: Iterable[tuple[str, LinkCounts]]) -> Iterator[Equation]:
    for device, counts in links:
        yield Equation(
            f"{device}: in = ok + denied + other", counts.in_, counts.ok + counts.denied + counts.other
        )


def _workspaces(
    counters: Counters,
    retired: Mapping[str, Tally],
    ended: Mapping[str, tuple[LinkCounts, ...]],
    workspace_of: Mapping[str, str],
) -> Iterator[Equation]:
    links: dict[str, list[LinkCounts]] = {name: list(gone) for name, gone in ended.items()}
    for device, counts in counters.links.items():
        links.setdefault(workspace_of.get(device, f"nobody ({device})"), []).append(counts)
    admitted: dict[str, Tally] = {}
    for element in counters.elements:
        tally = Tally(element.packets, element.bytes)
        admitted[element.workspace] = admitted.get(element.workspace, Tally()) + tally
    for name in sorted({*links, *admitted, *counters.denied, *counters.unlisted, *retired}):
        mine = links.get(name, [])
        ok = sum_tallies(link.ok for link in mine)
        listed = admitted.get(name, Tally()) + counters.unlisted.get(name, Tally())
        yield Equation(f"{name}: ok = elements + unlisted + retired", ok, listed + retired.get(name, Tally()))
        reasons = sum_tallies(counters.denied.get(name, {}).values())
        yield Equation(f"{name}: denied = its reasons", sum_tallies(link.denied for link in mine), reasons)


def sum_tallies(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total += tally
    return total
