"""Numbers for workspaces and blocks for rules: stable for ever, never handed to another key in a hurry.

A synthetic address means one name. So a name keeps its block across policy changes and restarts, and a
block that a revoked name leaves behind is the last one to be given to another: an application that still
holds the old name's address, or a conntrack entry that still leads to the old name's server, must not
end up being "the new name". The start of the search is a hash of the key, so most keys get the same
block even when the memory of the previous allocation is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from egressd.model.errors import PolicyError, Problem
from egressd.policy.compiled import Policy
from egressd.ruleset.layout import BLOCKS, WORKSPACES

__all__ = ["Allocation", "allocate", "give_back", "restore", "take"]

# index 0 and the resolver's block 0, and the last block (unlisted), are not handed out
_INDEXES = range(1, WORKSPACES)
_BLOCKS = range(1, BLOCKS - 1)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Who has which number.

    `workspaces`: name -> index (1 to 8191). `blocks`: name -> rule key -> block (1 to 16382). The
    `retired` ones are tombstones in the same shapes: keys that are gone, with the number they had.
    """

    workspaces: Mapping[str, int]
    blocks: Mapping[str, Mapping[str, int]]
    retired_workspaces: Mapping[str, int] = field(default_factory=dict)
    retired_blocks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def allocate(
    policies: Iterable[Policy],
    previous: Allocation | None = None,
    *,
    granted: Mapping[str, Iterable[str]] | None = None,
) -> Allocation:
    """Number every workspace and every rule key; what `previous` numbered, or remembers, keeps its number.

    `granted`: workspace -> names of its wildcards that are held now; they are numbered like rules.
    Deterministic: the order of `policies` does not matter. PolicyError when there are more workspaces, or
    more rules in one, than numbers.
    """
    known = previous or Allocation(workspaces={}, blocks={})
    held = granted or {}
    keys = {
        policy.workspace: {*(rule.key for rule in policy.rules), *held.get(policy.workspace, ())}
        for policy in policies
    }
    workspaces, retired_workspaces = _number(
        keys, given=known.workspaces, retired=known.retired_workspaces, numbers=_INDEXES, what="workspaces"
    )
    blocks: dict[str, Mapping[str, int]] = {}
    retired_blocks: dict[str, Mapping[str, int]] = {}
    for name in sorted({*keys, *known.blocks, *known.retired_blocks}):
        given, gone = _number(
            keys.get(name, ()),
            given=known.blocks.get(name, {}),
            retired=known.retired_blocks.get(name, {}),
            numbers=_BLOCKS,
            what=f"rules in workspace {name}",
        )
        if name in keys:
            blocks[name] = given
        if gone:
            retired_blocks[name] = gone
    return Allocation(
        workspaces=workspaces,
        blocks=blocks,
        retired_workspaces=retired_workspaces,
        retired_blocks=retired_blocks,
    )


def take(allocation: Allocation, workspace: str, key: str) -> tuple[Allocation, int]:
    """A block for one more key: the one it had, else one that is nobody's and was nobody's, else that of the
    key that gave its own back first. PolicyError when every block is in use."""
    given = allocation.blocks.get(workspace, {})
    graves = allocation.retired_blocks.get(workspace, {})
    if key in given:
        return allocation, given[key]
    block = graves.get(key) or _virgin_or_oldest(key, set(given.values()), graves)
    if block is None:
        raise PolicyError([Problem(source="(policies)", line=0, where="",
                                   text=f"every block of workspace {workspace} is in use",
                                   remedy="fewer rules, or a smaller budget of names")])  # fmt: skip
    left = {other: number for other, number in graves.items() if number != block}
    return _with_blocks(allocation, workspace, {**given, key: block}, left), block


def give_back(allocation: Allocation, workspace: str, keys: Iterable[str]) -> Allocation:
    """These keys are in use no more. Their blocks are the last to be taken by others."""
    given = dict(allocation.blocks.get(workspace, {}))
    graves = dict(allocation.retired_blocks.get(workspace, {}))
    graves.update({key: given.pop(key) for key in keys if key in given})
    return _with_blocks(allocation, workspace, given, graves)


def restore(
    allocation: Allocation, given: Mapping[tuple[str, str], int], gone: Mapping[tuple[str, str], int]
) -> Allocation:
    """With numbers that were taken and given back after it was written down: (workspace, key) -> block. What
    contradicts it is left out."""
    for workspace in dict.fromkeys(name for name, _ in (*gone, *given)):
        known = dict(allocation.blocks.get(workspace, {}))
        graves = dict(allocation.retired_blocks.get(workspace, {}))
        owners = {block: key for key, block in known.items()}
        dead = {block: key for key, block in graves.items()}
        for key, block in _of(workspace, gone):
            if block in _BLOCKS and owners.get(block, key) == key:
                owners.pop(known.pop(key, 0), None)
                graves.pop(dead.pop(block, ""), None)
                graves.pop(key, None)
                graves[key], dead[block] = block, key
        for key, block in _of(workspace, given):
            if block in _BLOCKS and key not in known and block not in owners:
                graves.pop(dead.pop(block, ""), None)
                graves.pop(key, None)
                known[key], owners[block] = block, key
        allocation = _with_blocks(allocation, workspace, known, graves)
    return allocation


def _of(workspace: str, numbers: Mapping[tuple[str, str], int]) -> Iterator[tuple[str, int]]:
    return ((key, block) for (name, key), block in numbers.items() if name == workspace)


def _with_blocks(
    allocation: Allocation, workspace: str, given: Mapping[str, int], graves: Mapping[str, int]
) -> Allocation:
    return replace(
        allocation,
        blocks={**allocation.blocks, workspace: given},
        retired_blocks={**allocation.retired_blocks, workspace: graves},
    )


def _virgin_or_oldest(key: str, given: set[int], graves: Mapping[str, int]) -> int | None:
    avoided = given.union(graves.values())
    if len(avoided) < len(_BLOCKS):
        return _free(key, _BLOCKS, avoided)
    return next(iter(graves.values()), None)


def _number(
    keys: Iterable[str],
    *,
    given: Mapping[str, int],
    retired: Mapping[str, int],
    numbers: range,
    what: str,
) -> tuple[dict[str, int], dict[str, int]]:
    """(numbers of `keys`, tombstones). A tombstone is dug up by its own key, or when all else is taken."""
    wanted = sorted(set(keys))
    if len(wanted) > len(numbers):
        problem = Problem(source="(policies)", line=0, where="", text=f"{len(wanted)} {what}: too many",
                          remedy=f"at most {len(numbers)} can be numbered")  # fmt: skip
        raise PolicyError([problem])
    remembered = {**retired, **given}
    result = {key: remembered[key] for key in wanted if key in remembered}
    graves = {key: number for key, number in remembered.items() if key not in result}
    taken = set(result.values())
    avoided = taken | set(graves.values())
    for key in wanted:
        if key not in result:
            number = _free(key, numbers, avoided if len(avoided) < len(numbers) else taken)
            result[key] = number
            taken.add(number)
            avoided.add(number)
    return dict(sorted(result.items())), {k: n for k, n in graves.items() if n not in taken}


def _free(key: str, numbers: range, taken: set[int]) -> int:
    """The first number not taken, from the one the key hashes to, around the end. There is one."""
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(numbers)
    for step in range(len(numbers)):
        number = numbers[(start + step) % len(numbers)]
        if number not in taken:
            return number
    raise AssertionError("the caller counted wrong")
