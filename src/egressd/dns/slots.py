"""Which of a name's four synthetic addresses leads to which real one.

Streams are kept by connection tracking; a slot's change only matters to new connections. What stays in
the answer stays in its slot, so that an application holding on to one address keeps talking to one
machine; and as long as the name has any address, every slot leads somewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

__all__ = ["EMPTY", "SLOTS", "Slots", "assign", "leading"]

SLOTS = 4

A = TypeVar("A")
Slots: TypeAlias = tuple[A | None, A | None, A | None, A | None]
EMPTY: Slots[None] = (None, None, None, None)


def assign(previous: Slots[A], fresh: Sequence[A]) -> tuple[Slots[A], int]:
    """The new slots and how many distinct addresses they hold (0 to 4).

    Of more than four fresh addresses those that already have a slot are preferred, then the earlier ones.
    The same fresh addresses in another order change nothing.
    """
    offered = list(dict.fromkeys(fresh))
    kept = [a for a in dict.fromkeys(previous) if a is not None and a in offered]
    live = (kept + [a for a in offered if a not in kept])[:SLOTS]
    slots = [a if a in live else None for a in previous]
    for address in live:
        if address not in slots:
            slots[_vacant(slots)] = address
    for number in range(SLOTS if live else 0):
        if slots[number] is None:
            slots[number] = min(live, key=slots.count)
    first, second, third, fourth = slots
    return (first, second, third, fourth), len(live)


def _vacant(slots: list[A | None]) -> int:
    """An empty slot, or else the last one that only repeats another."""
    if None in slots:
        return slots.index(None)
    return max(number for number in range(SLOTS) if slots.index(slots[number]) < number)


def leading(slots: Slots[A]) -> tuple[int, ...]:
    """The slots to answer with: the first of each distinct address."""
    return tuple(n for n in range(SLOTS) if slots[n] is not None and slots.index(slots[n]) == n)
