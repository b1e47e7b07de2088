"""What a document says about itself in its front matter: YAML between two lines of dashes at its top.

Where a source's front matter is believed, a document that hides its access list from us must not be taken
for one that has none, which gets the source's default. So whatever another program might take for front
matter, and we do not read, is unreadable: TOML and JSON, a block that never closes, another encoding, a key
`ACL` or `acl.read`. python-frontmatter says where the block is; it would read it with a YAML that
knows aliases, duplicate keys and tags, and is not asked to.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from itertools import islice
from typing import TypeAlias

from frontmatter.default_handlers import YAMLHandler

from egressd.access.statements import Statement, read_lists, read_rest
from egressd.model.errors import Problem, Unfit
from egressd.model.names import quoted
from egressd.model.tree import Tree
from egressd.model.tree import read as read_tree

__all__ = ["MAX_HEAD", "FrontMatter", "read"]

FrontMatter: TypeAlias = Statement

MAX_HEAD = 1 << 16  # bytes of a document that are looked at
_MAX_TOLD = 3  # problems of one document
_DASHES: re.Pattern[str] = YAMLHandler.FM_BOUNDARY
# What an editor may have left, or an attacker put, before the first line that people see, or into a word: the
# characters of Unicode's Default_Ignorable_Code_Point, and those that are blank without being spaces.
_IGNORABLE = (
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_UNSEEN = re.compile(rf"[\s\x00-\x1f\x7f-\x9f{_IGNORABLE}]*")
_MARKS = ("---", "+++", ";;;")
_WIDE = tuple(mark.encode() for mark in _MARKS)
_WORDS = {
    "+++": "it begins with TOML front matter (+++), which is not read",
    ";;;": "it begins with JSON front matter (;;;), which is not read",
}
_JSON = re.compile(r'\{.*?"acl"\s*:', re.DOTALL)
_YAML = "write it as YAML between two lines ---"
_KEYS = ("acl", "clearance", "groups")
_BELOW = ("read", "deny")


def read(head: bytes) -> FrontMatter | None:
    """`head` is the document's beginning, all of it or 64 KiB. None: it has no front matter.

    `Unfit`, with the line, for front matter that cannot be read or does not say one thing.
    """
    head = head[:MAX_HEAD]
    text = _opening(head)
    if text is None:
        return None
    block = _block(text, cut=len(head) == MAX_HEAD)
    tree = read_tree(block.encode("utf-8", "surrogateescape"), source="front matter")
    if tree.problems:
        raise _unfit(tree.problems)
    return _statement(tree)


def _opening(head: bytes) -> str | None:
    """The text, with nothing but space before its first mark; None where no front matter begins."""
    _refuse_wide(head)
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    unseen = _UNSEEN.match(text)
    start = unseen.end() if unseen else 0
    if text.startswith("{", start) and _JSON.match(text, start):
        raise Unfit("it begins with JSON that has an access list, which is not read", _YAML)
    mark = text[start : start + 3]
    if mark not in _MARKS:
        return None
    first = text[start:].partition("\n")[0].rstrip()
    if mark == "---" and first.startswith("----") and first.strip("-"):
        return None  # -----BEGIN CERTIFICATE-----
    if not text[:start].isspace() and start:
        raise Unfit("characters that nobody sees stand before its front matter", "remove them")
    if mark != "---":
        raise Unfit(_WORDS[mark], _YAML)
    return text


def _refuse_wide(head: bytes) -> None:
    """UTF-16 and UTF-32: their marks are the same bytes, with zeros between."""
    start = head[:32]
    bare = start.translate(None, b"\0\xff\xfe").lstrip()
    if bare.startswith(_WIDE) and b"\0" in start.partition(bare[:1] * 3)[0]:
        raise Unfit("its front matter is not UTF-8", "save it as UTF-8")


def _block(text: str, *, cut: bool) -> str:
    """What stands between the dashes, after as many empty lines as it has lines above it."""
    bare = text.lstrip()
    dashes = list(islice(_DASHES.finditer(bare), 2))
    if not dashes or dashes[0].start():
        raise Unfit(f"{quoted(bare.partition(chr(10))[0])} does not begin front matter", _YAML)
    if len(dashes) == 1:
        where = " within 64 KiB" if cut else ""
        raise Unfit(f"its front matter never closes{where}", "write --- on a line of its own")
    above, below = dashes
    if above[0].rstrip() != below[0].rstrip():  # programs differ in which of the lines closes it
        raise Unfit("its front matter is closed by another line than it is opened by", "write --- twice")
    lines = text.count("\n", 0, len(text) - len(bare) + above.end())
    return "\n" * lines + bare[above.end() : below.start()]


# ---- what the block says


def _statement(tree: Tree) -> FrontMatter:
    root = {} if tree.value is None else tree.value
    if not isinstance(root, dict):
        raise _unfit([tree.problem((), "front matter is not a mapping", "write KEY: VALUE")])
    for key in root:
        _check_key(tree, key)
    clearance, groups = read_rest(tree, root, ())
    lists = _acl(tree, root["acl"]) if "acl" in root else {}
    if tree.problems:
        raise _unfit(tree.problems)
    return Statement(lists.get("readers"), lists.get("denied"), clearance, groups)


def _check_key(tree: Tree, key: str) -> None:
    """Other keys are the document's own business; but none that was meant to be one of ours."""
    if key in _KEYS:
        return
    seen = re.sub(f"[{_IGNORABLE}]", "", unicodedata.normalize("NFKC", key))
    folded = seen.strip().casefold()
    if folded.startswith("acl") or folded in _KEYS:
        tree.problems.append(tree.problem((key,), f"{quoted(key)} is not read", "write acl: {read: [...]}"))
    elif folded in _BELOW:
        tree.problems.append(tree.problem((key,), f"{quoted(key)} is not below acl", "indent it"))
    elif key == "<<":
        tree.problems.append(tree.problem((key,), "keys are not merged here", "write them out"))


def _acl(tree: Tree, value: object) -> dict[str, frozenset[str]]:
    if not isinstance(value, dict) or not value:
        tree.problems.append(tree.problem(("acl",), "acl says nothing", "write acl: {read: [...]}"))
        return {}
    for key in value:
        if key not in _BELOW:
            text = f"{quoted(key)} is not a key of acl"
            tree.problems.append(tree.problem(("acl", key), text, "the keys here are read, deny"))
    return read_lists(tree, value, ("acl",))


def _unfit(problems: list[Problem]) -> Unfit:
    """The first few, in the document's order: one line, for a record."""
    told = [_told(problem) for problem in sorted(problems)[:_MAX_TOLD]]
    more = len(problems) - len(told)
    return Unfit("; ".join(told) + (f"; and {more} more" if more else ""))


def _told(problem: Problem) -> str:
    line = f"line {problem.line}: " if problem.line else ""
    where = f"{problem.where}: " if problem.where else ""
    return f"{line}{where}{problem.text}"
