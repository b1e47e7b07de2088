"""YAML bytes to plain data that remembers its lines: the smallest YAML our files need, and nothing else.

Built from the parser's events, not from its loader, because such a file is read by people before it is read
by us, and both must see the same thing:

- No anchors, aliases, tags, directives or second documents: what stands on a line is what counts there.
- Scalars follow YAML 1.2's core idea. `true` and `false` are booleans, decimal digits are numbers, an
  empty value or `null` is empty; everything else is text. In YAML 1.1 `off`, `no` and the country code
  NO are booleans.
- Characters that move text about for readers but not for parsers, or the reverse (bidirectional controls,
  U+2028, a lone carriage return), are refused: a rule could hide at the end of a comment.
- Size and depth are bounded before anything is built. Nesting is handled without recursion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import yaml

from egressd.model.errors import Problem
from egressd.model.names import quoted

__all__ = ["MAX_BYTES", "MAX_DEPTH", "Path", "Tree", "read"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
_MAX_REPORTED = 20  # bad characters told one by one
Path: TypeAlias = tuple[str | int, ...]

_HIDDEN = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]|\r(?!\n)"
)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")  # longer digits stay text: int() is quadratic
_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "": None, "null": None, "~": None}
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,40}")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it


@dataclass(slots=True)
class Tree:
    """`value` is the document as dicts, lists, text, numbers, booleans and None.

    With `readable` false nothing can be said beyond `problems`. Paths in `unclear` hold something that
    already is a problem: what their values would further complain about is noise.
    """

    source: str
    value: object = None
    readable: bool = False
    problems: list[Problem] = field(default_factory=list)
    lines: dict[Path, int] = field(default_factory=dict)
    unclear: set[Path] = field(default_factory=set)

    def line(self, path: Path) -> int:
        """Where `path` stands, or the nearest thing around it that stands anywhere. 1-based."""
        return self.lines.get(self._nearest(path), 0)

    def problem(self, path: Path, text: str, remedy: str = "") -> Problem:
        """A problem at `path`, or at the nearest thing around it."""
        nearest = self._nearest(path)
        return Problem(self.source, self.lines.get(nearest, 0), spelt(nearest), text, remedy)

    def is_unclear(self, path: Path) -> bool:
        return any(path[:length] in self.unclear for length in range(len(path) + 1))

    def _nearest(self, path: Path) -> Path:
        while path and path not in self.lines:
            path = path[:-1]
        return path


def spelt(path: Path) -> str:
    """`("allow", 2, "ports", 0)` as `allow[2].ports[0]`; foreign keys quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if _PLAIN_KEY.fullmatch(part) else quoted(part)
            text += f".{key}" if text else key
    return text


def read(data: bytes, *, source: str, most: int = MAX_BYTES) -> Tree:
    """Never raises for any bytes: what is wrong is in `problems`. `most` is the largest size, in bytes."""
    tree = Tree(source=source)
    text = _text(data, tree, most)
    if text is None:
        return tree
    builder = _Builder(tree)
    try:
        for event in _events(text):
            builder.take(event)
    except _Stop:
        return tree
    except yaml.YAMLError as error:
        tree.problems.append(_syntax(error, source))
        return tree
    tree.readable = True
    return tree


def _text(data: bytes, tree: Tree, most: int) -> str | None:
    """The file as text, or None with the reason among the problems."""

    def wrong(line: int, text: str, remedy: str) -> None:
        tree.problems.append(Problem(tree.source, line, "", text, remedy))

    if len(data) > most:
        wrong(0, f"the file is larger than {most >> 20} MiB", "split it")
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong(data.count(b"\n", 0, error.start) + 1, "the file is not UTF-8", "save it as UTF-8")
        return None
    for line, character in _hidden(text):
        wrong(line, f"there is a hidden character U+{ord(character):04X}", "remove it")
    return None if tree.problems else text


def _hidden(text: str) -> list[tuple[int, str]]:
    """The first hidden characters and their lines, each once per line."""
    found: dict[tuple[int, str], None] = {}
    for match in islice(_HIDDEN.finditer(text), _MAX_REPORTED):
        found[text.count("\n", 0, match.start()) + 1, match[0]] = None
    return list(found)


def _events(text: str) -> Iterator[Any]:
    yield from yaml.parse(text, Loader=_LOADER)


def _syntax(error: yaml.YAMLError, source: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or "it cannot be parsed"
    line = mark.line + 1 if mark is not None else 0
    return Problem(source, line, "", f"this is not YAML: {quoted(str(what))[1:-1]}", "check the indentation")


class _Stop(Exception):
    """Nothing sensible can be read past this point; the reason is among the problems."""


@dataclass(slots=True)
class _Frame:
    """An open list or mapping. `key` is the mapping's key whose value comes next."""

    path: Path
    items: list[object] | dict[str, object]
    key: str | None = None
    dropped: bool = False  # that value has no place: its key was there before


class _Builder:
    """Takes the parser's events one by one and fills the tree."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._stack: list[_Frame] = []
        self._documents = 0

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        match event:
            case yaml.ScalarEvent():
                self._scalar(event, line)
            case yaml.MappingStartEvent():
                self._open(event, {}, line)
            case yaml.SequenceStartEvent():
                self._open(event, [], line)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._stack.pop()
            case yaml.AliasEvent():
                self._alias(line)
            case yaml.DocumentStartEvent():
                self._document(event, line)

    def _document(self, event: Any, line: int) -> None:
        self._documents += 1
        if self._documents > 1:
            self._wrong(line, (), "a second document begins here", "one file holds one document")
            raise _Stop
        if event.version or event.tags:
            self._wrong(line, (), "there is a % directive", "remove it")

    def _scalar(self, event: Any, line: int) -> None:
        frame = self._stack[-1] if self._stack else None
        if frame is not None and isinstance(frame.items, dict) and frame.key is None:
            self._key(frame, event, line)
            return
        path = self._place(line)
        self._refuse_extras(event, line, path)
        self._put(_value(event.value) if not event.style else event.value)

    def _key(self, frame: _Frame, event: Any, line: int) -> None:
        key = event.value
        path = (*frame.path, key)
        assert isinstance(frame.items, dict)
        self._refuse_extras(event, line, frame.path)
        frame.key, frame.dropped = key, key in frame.items
        if frame.dropped:
            first = self._tree.lines[path]
            self._wrong(line, path, f"the key stands here again, first on line {first}", "remove one of them")
        self._tree.lines.setdefault(path, line)

    def _open(self, event: Any, items: list[object] | dict[str, object], line: int) -> None:
        if len(self._stack) == MAX_DEPTH:
            self._wrong(line, self._stack[-1].path, "the document is nested too deeply", "flatten it")
            raise _Stop
        path = self._place(line)
        self._refuse_extras(event, line, path)
        self._put(items)
        self._stack.append(_Frame(path=path, items=items))

    def _alias(self, line: int) -> None:
        path = self._place(line)
        self._wrong(line, path, "aliases (*name) are not used here", "write the value out")
        self._tree.unclear.add(path)
        self._put(None)

    def _place(self, line: int) -> Path:
        """The path of the value that comes now. A list's item gets its own line, a key has one already."""
        if not self._stack:
            path: Path = ()
        else:
            frame = self._stack[-1]
            if isinstance(frame.items, dict) and frame.key is None:
                self._wrong(line, frame.path, "a key is not plain text", "write key: value")
                raise _Stop
            path = (*frame.path, len(frame.items) if frame.key is None else frame.key)
        self._tree.lines.setdefault(path, line)
        return path

    def _put(self, value: object) -> None:
        if not self._stack:
            self._tree.value = value
            return
        frame = self._stack[-1]
        if isinstance(frame.items, list):
            frame.items.append(value)
            return
        assert frame.key is not None
        if not frame.dropped:
            frame.items[frame.key] = value
        frame.key = None

    def _refuse_extras(self, event: Any, line: int, path: Path) -> None:
        if event.anchor is not None:
            self._wrong(line, path, "anchors (&name) are not used here", "remove the anchor")
        if event.tag is not None:
            self._wrong(line, path, "tags (!name) are not used here", "remove the tag")
            self._tree.unclear.add(path)

    def _wrong(self, line: int, path: Path, text: str, remedy: str) -> None:
        self._tree.problems.append(Problem(self._tree.source, line, spelt(path), text, remedy))


def _value(text: str) -> object:
    """A plain scalar: constants and decimal numbers are recognised, the rest is text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    return int(text) if _NUMBER.fullmatch(text) else text
