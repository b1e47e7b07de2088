r"""HTML that cannot be opened from inside: text is escaped by being text.

`Html` is the one type that is not escaped, and `element` the one maker of it. What a stranger chose (a name,
a command, an error of another program) is a plain `str`, so that forgetting to escape it is not possible.

`shown` spells what cannot be seen: control characters, bidirectional overrides, lone surrogates, blanks that
are no spaces become \u{202e}. A page that is evidence must not read otherwise than it is.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

__all__ = ["Child", "Html", "element", "joined", "shown"]

# Letters to Unicode, blanks to a reader: Hangul fillers (Lo), the empty Braille cell (So).
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")
_PLAIN = re.compile(r"[ -~]*")
_MARKS = 2  # combining marks on one letter; a pile of them would be drawn over the rows above


class Html(str):
    """Finished markup."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"

_VOID = frozenset({"br", "hr", "meta", "col", "wbr"})  # HTML, section 13.1.2: elements without an end tag


def element(name: str, /, *children: Child, **attributes: str | int | None) -> Html:
    """`<name attribute="...">children</name>`. `class_` is class, `aria_label` is aria-label; an attribute
    that is None is left out. Names of elements and attributes are this program's own, never a stranger's."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{html.escape(shown(str(value)))}"')
    parts.append(">")
    if name not in _VOID:
        _collect(children, parts)
        parts.append(f"</{name}>")
    return Html("".join(parts))


def joined(*children: Child) -> Html:
    """Children without an element around them."""
    parts: list[str] = []
    _collect(children, parts)
    return Html("".join(parts))


def _collect(children: Iterable[Child], parts: list[str]) -> None:
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(shown(child), quote=False))
        elif isinstance(child, int):
            parts.append(str(child))
        elif child is not None:
            _collect(child, parts)


def shown(text: str) -> str:
    """`text` with everything that does not show spelled out; line breaks and tabs count as such, too."""
    if _PLAIN.fullmatch(text):
        return text
    spelled, marks = [], 0
    for character in text:
        kind = _kind(character)
        marks = marks + 1 if kind == "mark" else 0
        hidden = kind == "hidden" or marks > _MARKS
        spelled.append(f"\\u{{{ord(character):04x}}}" if hidden else character)
    return "".join(spelled)


@lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    if not character.isprintable() or character in _BLANK:
        return "hidden"
    return "mark" if unicodedata.category(character) in ("Mn", "Me") else "plain"
