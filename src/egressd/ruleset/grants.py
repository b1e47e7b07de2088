"""Elements that come and go one name at a time: what a wildcard grants while sandboxes run.

They stand in the workspace's want like those of its policy, so that whatever compares the kernel with it
knows them. Each change is worked out from the blocks it touches and no others: a workspace may have ten
thousand elements, and somebody waits for the answer.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from egressd.ruleset import build, diff
from egressd.ruleset.build import owner
from egressd.ruleset.diff import Operation
from egressd.ruleset.layout import Kind, Mark, Pools
from egressd.ruleset.wants import Element, WorkspaceWant, order

__all__ = ["Change", "grant", "withdraw"]


@dataclass(frozen=True, slots=True)
class Change:
    """`before` and `after` have the touched blocks only, `whole` is the want as it is to be."""

    before: WorkspaceWant
    after: WorkspaceWant
    whole: WorkspaceWant

    @property
    def owners(self) -> set[int]:
        """Workspace and block of everything that is there before or after."""
        return {owner(element) for element in (*self.before.elements, *self.after.elements)}

    @property
    def fresh(self) -> set[int]:
        """Marks that come into use."""
        return _marks(self.after) - _marks(self.before)

    @property
    def removed(self) -> set[int]:
        """Marks that nothing has any more."""
        return _marks(self.before) - _marks(self.after)

    def operations(self, pools: Pools) -> tuple[Operation, ...]:
        """ValueError when an element's mark, address and workspace do not belong together."""
        return diff.changes(self.before, self.after, pools=pools)


def grant(want: WorkspaceWant, elements: Iterable[Element]) -> Change:
    """Add `elements`; those that are there already stay as they are.

    ValueError for one that is not a host's of this workspace, or whose block belongs to another name.
    """
    wanted = tuple(dict.fromkeys(elements))
    for element in wanted:
        mark = Mark.of(element.mark)
        if mark.workspace != want.index or mark.kind not in (Kind.FORWARD, Kind.INSPECT):
            raise ValueError(f"mark {element.mark:#010x} is not of a host of workspace {want.workspace}")
    owners = {owner(element) for element in wanted}
    present = _of(want, owners)
    _one_name_each((*present, *wanted))
    new = tuple(element for element in wanted if element not in present)
    every = list(want.elements)
    for element in new:
        insort(every, element, key=order)
    return _change(want, present, (*present, *new), tuple(every))


def withdraw(want: WorkspaceWant, elements: Iterable[Element]) -> Change:
    """Take `elements` away; what is not there already is no error."""
    gone = set(elements)
    owners = {owner(element) for element in gone}
    present = _of(want, owners)
    every = tuple(e for e in want.elements if e.mark & build.OWNER not in owners or e not in gone)
    return _change(want, present, tuple(element for element in present if element not in gone), every)


def _of(want: WorkspaceWant, owners: set[int]) -> tuple[Element, ...]:
    return tuple(element for element in want.elements if element.mark & build.OWNER in owners)


def _one_name_each(elements: Iterable[Element]) -> None:
    names: dict[int, str] = {}
    for element in elements:
        name = names.setdefault(owner(element), element.comment)
        if name != element.comment:
            raise ValueError(f"the block of {name} cannot be that of {element.comment}, too")


def _change(
    want: WorkspaceWant, before: tuple[Element, ...], after: tuple[Element, ...], every: tuple[Element, ...]
) -> Change:
    return Change(
        before=msgspec.structs.replace(want, elements=before),
        after=msgspec.structs.replace(want, elements=after),
        whole=msgspec.structs.replace(want, elements=every),
    )


def _marks(want: WorkspaceWant) -> set[int]:
    return {mark for element in want.elements for mark in build.marks(element)}
