"""One property of a policy file, changed in its text. Everything else stays as it was written, to the byte.

A file of rules is its author's: comments, order, quoting, indentation and line endings are his. So nothing is
written out anew. The text is taken apart by the marks of YAML's nodes, one node's text is replaced, added or
taken out, and what comes out is read again: its data may differ in that property alone, and it has every
comment that was there, in the same order. Otherwise the change is refused, and its author has to make it.

A comment that stood beside something taken out stays on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from egressd.model.errors import PolicyError, Problem, Unfit
from egressd.model.tree import read

__all__ = ["GUARD", "LOCAL_ONLY", "RESIDENCY", "Setting", "changed"]

GUARD, RESIDENCY, LOCAL_ONLY = "guard", "residency", "local_only"
# guard: "enforce"; residency: codes, () for anywhere; local_only: a truth value
Setting: TypeAlias = str | bool | tuple[str, ...]

_JURISDICTIONS = "jurisdictions"
_DEFAULTS: dict[str, Setting] = {GUARD: "off", RESIDENCY: (), LOCAL_ONLY: False}
# After which key a new one stands: the first of these that is there.
_AFTER = {
    GUARD: ("workspace",),
    LOCAL_ONLY: (GUARD, "workspace"),
    RESIDENCY: ("members", LOCAL_ONLY, GUARD, "workspace"),
}
_BY_HAND = "change it by hand, then: egressctl policy apply"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BOM = "\ufeff"


def changed(text: str, key: str, value: Setting, *, source: str = "") -> str:
    """`text` with `key` as `value`: the same text if it says so already.

    PolicyError for what the policy reader would not read either (aliases, a key twice, no YAML at all),
    `Unfit` for what is written in a way that this does not edit.
    """
    before = _data(text, source)
    if _setting(before, key) == _comparable(value):
        return text
    bom, body = (_BOM, text[1:]) if text.startswith(_BOM) else ("", text)
    comments = list(_comments(body))
    if key == RESIDENCY:
        assert isinstance(value, tuple)
        body = _with_residency(body, value)
    else:
        body = _with_scalar(body, key, _spelt(value))
    if not _is_only_that(before, _data(bom + body, source), key, value) or comments != list(_comments(body)):
        raise Unfit(f"{key} is written in a way that cannot be changed alone", _BY_HAND)
    return bom + body


# ---- what the text says


def _data(text: str, source: str) -> dict[str, object]:
    found = read(text.encode(), source=source)
    if not found.readable or found.problems:
        raise PolicyError(found.problems)
    if not isinstance(found.value, dict):
        raise PolicyError([Problem(source, 0, "", "the file is not a mapping", "begin with workspace: NAME")])
    return found.value


def _setting(data: dict[str, object], key: str) -> object:
    if key not in data:
        return _comparable(_DEFAULTS[key])
    value = data[key]
    if key != RESIDENCY:
        return value
    codes = value.get(_JURISDICTIONS) if isinstance(value, dict) and len(value) == 1 else None
    good = isinstance(codes, list) and codes and all(isinstance(code, str) for code in codes)
    return frozenset(codes) if good else value  # type: ignore[arg-type]


def _comparable(value: Setting) -> object:
    return frozenset(value) if isinstance(value, tuple) else value


def _is_only_that(before: dict[str, object], after: dict[str, object], key: str, value: Setting) -> bool:
    others = [[pair for pair in data.items() if pair[0] != key] for data in (before, after)]
    return others[0] == others[1] and _setting(after, key) == _comparable(value)


def _comments(text: str) -> Iterator[str]:
    return (text[start:end] for start, end in _Layout.of(text).comments)


# ---- the text by its marks


@dataclass(frozen=True, slots=True)
class _Layout:
    """Places are indices into `text`. libyaml's marks count characters, and a CRLF as two."""

    text: str
    root: Any  # yaml.MappingNode
    commas: tuple[tuple[int, int], ...]  # of flow collections
    comments: tuple[tuple[int, int], ...]  # without their line breaks

    @classmethod
    def of(cls, text: str) -> _Layout:
        """Between two tokens there is nothing but blanks, line breaks and comments."""
        commas, comments, position = [], [], 0
        for token in yaml.scan(text, Loader=_LOADER):
            start, end = token.start_mark.index, token.end_mark.index
            comments += _found_between(text, position, start)
            position = max(position, end)
            if isinstance(token, yaml.FlowEntryToken):
                commas.append((start, end))
        comments += _found_between(text, position, len(text))
        return cls(text, yaml.compose(text, Loader=_LOADER), tuple(commas), tuple(comments))

    def pair(self, *keys: str) -> tuple[Any, Any] | None:
        """Key and value of the first of these that is there."""
        pairs = {key.value: (key, value) for key, value in self.root.value}
        return next((pairs[key] for key in keys if key in pairs), None)

    def end(self, node: Any) -> int:
        """Where its text ends. A block collection's mark is at whatever comes next, comments or not."""
        if isinstance(node, yaml.ScalarNode):
            end: int = node.end_mark.index
            return len(self.text[:end].rstrip()) if node.style in ("|", ">") else end
        if node.flow_style:
            return int(node.end_mark.index)
        last = node.value[-1]
        return self.end(last[1] if isinstance(node, yaml.MappingNode) else last)

    def line_start(self, place: int) -> int:
        return self.text.rfind("\n", 0, place) + 1

    def line_end(self, place: int) -> int:
        """Where the line's own text ends: before its break, or at the end of all."""
        found = self.text.find("\n", place)
        end = len(self.text) if found < 0 else found
        return end - 1 if self.text[place:end].endswith("\r") else end

    @property
    def line_break(self) -> str:
        first = self.text.find("\n")
        return "\r\n" if first > 0 and self.text[first - 1] == "\r" else "\n"

    def replaced(self, start: int, end: int, new: str) -> str:
        return self.text[:start] + new + self.text[end:]

    def entry(self, start: int, end: int) -> tuple[int, int]:
        """An entry of a flow collection with the comma that goes with it: the next, or the one before."""
        following = next((comma for comma in self.commas if comma[0] >= end), None)
        if following is not None and self._is_empty(end, following[0]):
            rest = self.text[following[1] :]
            return start, following[1] + len(rest) - len(rest.lstrip(" \t"))
        preceding = next((comma for comma in reversed(self.commas) if comma[1] <= start), None)
        if preceding is not None and self._is_empty(preceding[1], start):
            return preceding[0], end
        return start, end

    def _is_empty(self, start: int, end: int) -> bool:
        """Nothing there but blanks and comments?"""
        return not self._without_comments(start, end).strip()

    def _without_comments(self, start: int, end: int) -> str:
        text, position = "", start
        for begin, stop in self.comments:
            if begin >= start and stop <= end:
                text, position = text + self.text[position:begin], stop
        return text + self.text[position:end]

    def erased(self, start: int, end: int) -> str:
        """Without what is there, but with its comments. Lines that this leaves empty go."""
        first = place = self.line_start(start)
        kept = ""
        for line in _LINE.finditer(self.text, first):
            if line.start() > end or (line.start() == end and place > first):
                break
            place = line.end()
            stop = line.end("own")
            inside = max(line.start(), start), min(stop, end)
            if self._is_empty(*inside):
                kept += line[0]
            elif (rest := self._rest(line.start(), stop, *inside)).strip():
                kept += rest + line["break"]
        return self.replaced(first, place, kept)

    def _rest(self, first: int, last: int, start: int, end: int) -> str:
        """Of one line, without what stands from `start` to `end`. A comment keeps the blanks before it, or
        it would be none; one that has nothing left to stand beside begins the line."""
        before, after = self.text[first:start], self.text[end:last]
        notes = "".join(
            re.sub(r".*?([ \t]*)$", r"\1", self.text[start:begin]) + self.text[begin:stop]
            for begin, stop in self.comments
            if start <= begin and stop <= end
        )
        rest = notes + after
        if not before.strip():
            line = self.text[first:last]
            return line[: len(line) - len(line.lstrip(" \t"))] + rest.lstrip(" \t")
        if not rest.strip():
            return before.rstrip(" \t")
        # libyaml takes [# for the beginning of a comment; others do not
        return before + (" " if rest.startswith("#") and not before.endswith((" ", "\t")) else "") + rest


def _found_between(text: str, start: int, end: int) -> list[tuple[int, int]]:
    return [match.span() for match in _COMMENT.finditer(text, start, max(start, end))]


_COMMENT = re.compile(r"#[^\r\n]*")
_LINE = re.compile(r"(?P<own>[^\r\n]*)(?P<break>\r?\n|(?<=.)$)")


# ---- scalars


def _spelt(value: Setting) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with_scalar(text: str, key: str, spelt: str) -> str:
    layout = _Layout.of(text)
    pair = layout.pair(key)
    if pair is None:
        return _inserted(layout, key, spelt)
    node = pair[1]
    if not isinstance(node, yaml.ScalarNode) or node.style in ("|", ">"):
        raise Unfit(f"{key} is not written on one line", _BY_HAND)
    start, end = node.start_mark.index, node.end_mark.index
    # true and false in quotes are text
    new = spelt if key == LOCAL_ONLY else _quoted_as(node, spelt)
    return layout.replaced(start, end, new if start < end else f" {new}")


def _quoted_as(node: Any, text: str) -> str:
    quote = node.style if node.style in ("'", '"') else ""
    return f"{quote}{text}{quote}"


def _inserted(layout: _Layout, key: str, spelt: str) -> str:
    """A key that was not there, after one that was."""
    beside = layout.pair(*_AFTER[key])
    if beside is None:
        raise Unfit("the file does not say which workspace it is", "begin with workspace: NAME")
    place = layout.end(beside[1])
    if layout.root.flow_style:
        return layout.replaced(place, place, f", {_quoted_as(beside[0], key)}: {spelt}")
    place = layout.line_end(place)
    indent = " " * layout.root.start_mark.column
    return layout.replaced(place, place, f"{layout.line_break}{indent}{key}: {spelt}")


# ---- residency


def _with_residency(text: str, codes: Sequence[str]) -> str:
    layout = _Layout.of(text)
    pair = layout.pair(RESIDENCY)
    if not codes:
        assert pair is not None
        return _without(layout, *pair)
    if pair is None:
        return _inserted(layout, RESIDENCY, _section(layout, codes))
    for _ in range(2 * len(_items(pair[1])) + len(codes)):
        fresh = _one_step(layout, codes)
        if fresh is None:
            break
        text, layout = fresh, _Layout.of(fresh)
    return text


def _section(layout: _Layout, codes: Sequence[str]) -> str:
    """In flow style; quoted as JSON is, where the file is JSON."""
    first = layout.root.value[0][0]
    if layout.root.flow_style and first.style == '"':
        return f'{{"{_JURISDICTIONS}": [{", ".join(f"{code!s}".join(chr(34) * 2) for code in codes)}]}}'
    return f"{{{_JURISDICTIONS}: [{', '.join(codes)}]}}"


def _without(layout: _Layout, key: Any, value: Any) -> str:
    start, end = key.start_mark.index, layout.end(value)
    if layout.root.flow_style:
        return layout.erased(*layout.entry(start, end))
    if layout.text[layout.line_start(start) : start].strip():
        raise Unfit(f"{key.value} does not begin its line", _BY_HAND)
    return layout.erased(start, end)


def _items(section: Any) -> list[Any]:
    """The nodes of the list; Unfit if there is not exactly that."""
    pairs: list[Any] = section.value if isinstance(section, yaml.MappingNode) else []
    nodes = pairs[0][1] if len(pairs) == 1 and pairs[0][0].value == _JURISDICTIONS else None
    items = nodes.value if isinstance(nodes, yaml.SequenceNode) else []
    if not items or not all(_is_plain(item) for item in items):
        raise Unfit("residency is not a list of jurisdictions", "write residency: {jurisdictions: [EU]}")
    return list(items)


def _is_plain(item: Any) -> bool:
    """Text that stands where its marks say: an entry of which there is only a dash stands nowhere."""
    is_scalar = isinstance(item, yaml.ScalarNode) and item.style not in ("|", ">")
    return is_scalar and item.start_mark.index < item.end_mark.index


def _one_step(layout: _Layout, codes: Sequence[str]) -> str | None:
    """One entry written over, taken out or added; None when the list is as wanted. What goes makes room for
    what comes, and what stays is not touched."""
    pair = layout.pair(RESIDENCY)
    assert pair is not None
    items = _items(pair[1])
    there = [item.value for item in items]
    fresh = next((code for code in codes if code not in there), None)
    leaving = next((item for item in items if item.value not in codes), None)
    if fresh is None and leaving is None:
        return None
    in_flow = bool(pair[1].value[0][1].flow_style)
    if leaving is None:
        assert fresh is not None
        return _added(layout, items[-1], fresh, in_flow=in_flow)
    start, end = leaving.start_mark.index, leaving.end_mark.index
    if fresh is not None:
        return layout.replaced(start, end, _quoted_as(leaving, fresh))
    return layout.erased(*layout.entry(start, end)) if in_flow else layout.erased(_dash(layout, start), end)


def _added(layout: _Layout, last: Any, code: str, *, in_flow: bool) -> str:
    start, end = last.start_mark.index, last.end_mark.index
    new = _quoted_as(last, code)
    if in_flow:
        return layout.replaced(end, end, f", {new}")
    before = layout.text[layout.line_start(_dash(layout, start)) : start]
    place = layout.line_end(end)
    return layout.replaced(place, place, f"{layout.line_break}{before}{new}")


def _dash(layout: _Layout, start: int) -> int:
    """Where the dash before an entry of a block list stands, first on its line."""
    before = layout.text[layout.line_start(start) : start]
    if not re.fullmatch(r" *-[ \t]+", before):
        raise Unfit("residency is not written with one jurisdiction to a line", _BY_HAND)
    return layout.line_start(start) + before.index("-")
