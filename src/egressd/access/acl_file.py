"""The access list that a source system exports beside its documents: which paths, and who may read them.

```yaml
documents:
  - path: hr/**
    read: [group:okta:hr]
    clearance: confidential
  - path: hr/holidays.md
    groups: [group:okta:everybody]
```

or, shorter, `documents: {hr/**: {read: [...]}}`. The rules of it, all of them:

- A path is literal, but for `*` (any bytes of one name), `**` as a whole name (any number of directories) and
  `%XX`, one byte: a literal `*` is `%2A`, a literal `%` is `%25`. Identifiers (access/identifiers.py) without
  their source are therefore paths as they stand.
- All rules that match a document count together; there is no order and no "more specific". Of each of the
  four things that can be said (read, deny, clearance, groups) they must say the same or nothing: two that
  differ make the document unreadable.
- Names are compared byte by byte. A rule that matches nothing is worth a warning: `unused` finds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from egressd.access.statements import Statement, agreed, read_lists, read_rest
from egressd.model.errors import PolicyError, Unfit
from egressd.model.names import quoted
from egressd.model.tree import Path, Tree, read

__all__ = ["KEYS", "MAX_BYTES", "AclFile", "Glob", "Listed", "Rule", "load"]

Listed: TypeAlias = Statement | Unfit  # Unfit: rules contradict one another

KEYS = ("path", "read", "deny", "clearance", "groups")
MAX_BYTES = 1 << 23  # of a file: 80,000 paths; they take 3 seconds and 300 MB
MAX_GLOB = 4096  # characters, PATH_MAX of linux/limits.h
_MAX_PROBLEMS = 1000
_ESCAPE = re.compile(r"%([0-9A-F]{2})|(%)")
_DIRECTORIES = None  # `**`

_Name: TypeAlias = tuple[bytes, ...]  # of a glob: what stands between its `*`
_Parts: TypeAlias = tuple[_Name | None, ...]


@dataclass(frozen=True, slots=True)
class Glob:
    """`parts`, one per name of the path. `literal`: those before the first that matches more than itself."""

    parts: _Parts
    literal: tuple[bytes, ...]

    @classmethod
    def of(cls, text: object) -> Glob:
        """`Unfit` says what to write instead."""
        if not isinstance(text, str) or not text or len(text) > MAX_GLOB:
            raise Unfit(
                "this is not a path", 'write path: hr/**, in quotes if it is a number or begins with "*"'
            )
        if "\\" in text:
            raise Unfit(f"{quoted(text)} has a backslash", "write / between names; a literal one is %5C")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise Unfit("this path has half a character", "spell its bytes %XX")  # from YAML's "\\ud800"
        parts = [_name(part, text) for part in text.split("/")]
        if parts[-1] is _DIRECTORIES:
            parts.append((b"", b""))  # `hr/**` is what is below hr, not a file hr
        literal: list[bytes] = []
        for part in parts:
            if part is None or len(part) > 1:
                break
            literal.append(part[0])
        return cls(tuple(parts), tuple(literal))

    def matches(self, path: bytes) -> bool:
        """Without recursion or regular expressions: time is at most names of the path times those of this."""
        names = path.split(b"/")
        at = here = 0
        again, resume = -1, 0  # the last `**`, and the name that it would swallow next
        while here < len(names):
            part = self.parts[at] if at < len(self.parts) else ()
            if part is _DIRECTORIES:
                again, resume = at, here
                at += 1
            elif part and _fits(part, names[here]):
                at, here = at + 1, here + 1
            elif again >= 0:
                resume += 1
                at, here = again + 1, resume
            else:
                return False
        return at == len(self.parts)


@dataclass(frozen=True, slots=True)
class Rule:
    text: str  # of its path
    line: int
    glob: Glob
    says: Statement


@dataclass(frozen=True, slots=True)
class AclFile:
    """Rules found by the directories they name: a list of ten thousand paths is looked up, not searched."""

    rules: tuple[Rule, ...]
    _index: dict[tuple[bytes, ...], list[Rule]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for rule in self.rules:
            self._index.setdefault(rule.glob.literal, []).append(rule)

    def matching(self, path: bytes) -> Iterator[Rule]:
        names = tuple(path.split(b"/"))
        for length in range(len(names) + 1):
            for rule in self._index.get(names[:length], ()):
                if rule.glob.matches(path):
                    yield rule

    def of(self, path: bytes) -> Listed | None:
        """What the file says of the document at `path`, below the source's directory. None: nothing."""
        rules = list(self.matching(path))
        if not rules:
            return None
        try:
            return agreed(rule.says for rule in rules)
        except Unfit as wrong:
            lines = ", ".join(str(line) for line in sorted(rule.line for rule in rules)[:8])
            return Unfit(f"the access list contradicts itself (lines {lines}): {wrong.text}", wrong.remedy)

    def unused(self, paths: Iterable[bytes]) -> tuple[Rule, ...]:
        """Rules that match none of `paths`: misspelt, or of documents that are gone."""
        used = {id(rule) for path in paths for rule in self.matching(path)}
        return tuple(rule for rule in self.rules if id(rule) not in used)


def load(data: bytes, *, source: str, levels: tuple[str, ...] | None = None) -> AclFile:
    """`PolicyError` has everything wrong with it; nothing else is raised.

    `source` is what messages call the file. With `levels`, a clearance that is none of them is told here, at
    its line; otherwise by `access.trust.effective`, for each document.
    """
    tree = read(data, source=source, most=MAX_BYTES)
    rules: tuple[Rule, ...] = ()
    if tree.readable:
        rules = tuple(_rules(tree, levels))
    if tree.problems:
        raise PolicyError(sorted(tree.problems)[:_MAX_PROBLEMS])
    return AclFile(rules)


# ---- globs


def _name(part: str, text: str) -> _Name | None:
    if part == "**":
        return _DIRECTORIES
    if part in ("", ".", ".."):
        raise Unfit(
            f"{quoted(text)} is not a path below a directory", "write hr/leave.md, or hr/** for a directory"
        )
    if "**" in part:
        raise Unfit(f"{quoted(text)} has ** inside a name", "write ** between slashes, or one *")
    name = tuple(_bytes(piece, text) for piece in part.split("*"))
    if any(b"/" in piece or b"\0" in piece for piece in name) or name in ((b".",), (b"..",)):
        raise Unfit(f"{quoted(text)} spells what no name has", "write / between names")
    return name


def _bytes(piece: str, text: str) -> bytes:
    found = bytearray()
    last = 0
    for escape in _ESCAPE.finditer(piece):
        if escape[2]:
            raise Unfit(f"{quoted(text)} has a % that spells no byte", "write %25 for a literal one")
        found += piece[last : escape.start()].encode() + bytes([int(escape[1], 16)])
        last = escape.end()
    return bytes(found + piece[last:].encode())


def _fits(part: _Name, name: bytes) -> bool:
    """Leftmost is enough for every piece but the last: what follows it can only be longer."""
    first, *middle = part
    if not middle:
        return name == first
    last = middle.pop()
    if not name.startswith(first) or len(name) < len(first) + len(last) or not name.endswith(last):
        return False
    at, end = len(first), len(name) - len(last)
    for piece in middle:
        found = name.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


# ---- reading


def _rules(tree: Tree, levels: tuple[str, ...] | None) -> Iterator[Rule]:
    root = tree.value
    if not isinstance(root, dict) or "documents" not in root:
        tree.problems.append(
            tree.problem((), "there is no list of documents", "write documents: [{path: ...}]")
        )
        return
    for key in root.keys() - {"documents"}:
        tree.problems.append(tree.problem((key,), f"{quoted(key)} is not a key of this file", "remove it"))
    for path, glob, entry in _entries(tree, root["documents"]):
        rule = _rule(tree, path, glob, entry, levels)
        if rule is not None:
            yield rule


def _entries(tree: Tree, section: object) -> Iterator[tuple[Path, object, object]]:
    """Each rule: where it stands, its glob as written, its mapping."""
    if isinstance(section, dict):
        for glob, entry in section.items():
            if isinstance(entry, dict) and "path" in entry:
                place = ("documents", glob, "path")
                tree.problems.append(tree.problem(place, "the path stands here twice", "remove this one"))
            yield ("documents", glob), glob, entry
    elif isinstance(section, list):
        for index, entry in enumerate(section):
            yield ("documents", index), entry.get("path") if isinstance(entry, dict) else "", entry
    else:
        text = "this is neither a list nor a mapping"
        tree.problems.append(
            tree.problem(("documents",), text, "write documents: [{path: ...}]; [] lists none")
        )


def _rule(tree: Tree, path: Path, glob: object, entry: object, levels: tuple[str, ...] | None) -> Rule | None:
    if not isinstance(entry, dict):
        tree.problems.append(tree.problem(path, "this is not a mapping", "write {path: ..., read: [...]}"))
        return None
    _check_keys(tree, path, entry)
    says = _says(tree, path, entry)
    if levels is not None and says.clearance and says.clearance not in levels:
        text = f"{quoted(says.clearance)} is not a level of this workspace"
        tree.problems.append(tree.problem((*path, "clearance"), text, f"the levels are {', '.join(levels)}"))
    try:
        return Rule(str(glob), tree.line(path), Glob.of(glob), says)
    except Unfit as wrong:
        tree.problems.append(tree.problem((*path, "path"), wrong.text, wrong.remedy))
        return None


def _check_keys(tree: Tree, path: Path, entry: dict[str, object]) -> None:
    for key in entry:
        if key not in KEYS:
            text = f"{quoted(key)} is not a key of a rule"
            tree.problems.append(tree.problem((*path, key), text, f"the keys are {', '.join(KEYS)}"))
    if not entry.keys() - {"path"}:
        tree.problems.append(tree.problem(path, "this rule says nothing", "write read: [...]; [] is nobody"))


def _says(tree: Tree, path: Path, entry: dict[str, object]) -> Statement:
    lists = read_lists(tree, entry, path)
    clearance, groups = read_rest(tree, entry, path)
    return Statement(lists.get("readers"), lists.get("denied"), clearance, groups)
