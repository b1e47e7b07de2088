"""What a document's front matter, or one rule of an access list, says of who may read.

```yaml
acl:
  read: [group:okta:finance, user:okta:00u1a2b3]
  deny: [group:okta:contractors]
clearance: confidential
groups: [group:okta:finance]
```

Each of the four is either said or not said; nothing in between is guessed. An empty list says "nobody".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from egressd.access.principals import principal
from egressd.model.errors import Unfit
from egressd.model.names import quoted
from egressd.model.tree import Path, Tree

__all__ = ["ASPECTS", "MAX_LISTED", "Statement", "agreed", "read_lists", "read_rest"]

MAX_LISTED = 4096  # principals in one list
_MAX_LEVEL = 63  # characters


@dataclass(frozen=True, slots=True)
class Statement:
    """None: not said."""

    readers: frozenset[str] | None = None  # principals
    denied: frozenset[str] | None = None
    clearance: str | None = None  # a level, whether or not the ladder has it
    groups: frozenset[str] | None = None


ASPECTS: Mapping[str, str] = {  # as messages call them
    "readers": "who may read", "denied": "who may not", "clearance": "the clearance", "groups": "whose it is",
}  # fmt: skip


def agreed(statements: Iterable[Statement]) -> Statement:
    """What all of them say together. `Unfit` where two speak of the same thing and differ."""
    said: dict[str, object] = {}
    for statement in statements:
        for aspect, words in ASPECTS.items():
            value = getattr(statement, aspect)
            if value is not None and said.setdefault(aspect, value) != value:
                raise Unfit(f"two that speak of it differ in {words}", "let one of them speak")
    return Statement(**said)  # type: ignore[arg-type]  # the values are the fields' own


# ---- reading


def read_lists(tree: Tree, mapping: Mapping[str, object], path: Path) -> dict[str, frozenset[str]]:
    """`read` and `deny` of a mapping, as fields of `Statement`. What is wrong joins the tree's problems."""
    return {
        field: _principals(tree, mapping[key], (*path, key), ("user:", "group:"))
        for key, field in (("read", "readers"), ("deny", "denied"))
        if key in mapping
    }


def read_rest(
    tree: Tree, mapping: Mapping[str, object], path: Path
) -> tuple[str | None, frozenset[str] | None]:
    """`clearance` and `groups` of a mapping."""
    clearance = groups = None
    if "clearance" in mapping:
        clearance = _level(tree, mapping["clearance"], (*path, "clearance"))
    if "groups" in mapping:
        groups = _principals(tree, mapping["groups"], (*path, "groups"), ("group:",))
    return clearance, groups


def _level(tree: Tree, value: object, path: Path) -> str:
    if isinstance(value, str) and 0 < len(value) <= _MAX_LEVEL and value.isprintable():
        return value
    tree.problems.append(tree.problem(path, "this is not a level", "write one of the workspace's levels"))
    return ""


def _principals(tree: Tree, value: object, path: Path, kinds: tuple[str, ...]) -> frozenset[str]:
    if not isinstance(value, list):
        tree.problems.append(tree.problem(path, "this is not a list", "write [NAME, ...]; [] is nobody"))
        return frozenset()
    if len(value) > MAX_LISTED:
        text = f"there are {len(value)} entries, {MAX_LISTED} are the most"
        tree.problems.append(tree.problem(path, text, "list groups"))
        return frozenset()
    found: set[str] = set()
    for index, item in enumerate(value):
        try:
            found.add(_principal(item, kinds))
        except Unfit as wrong:
            tree.problems.append(tree.problem((*path, index), wrong.text, wrong.remedy))
    return frozenset(found)


def _principal(item: object, kinds: tuple[str, ...]) -> str:
    name = principal(item)
    if not name.startswith(kinds):
        raise Unfit(f"{quoted(name)} is not a group", "write group:ISSUER:NAME")
    return name
