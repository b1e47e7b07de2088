"""What holds for a document, from all that speaks of it: its front matter, the access list, the source.

Front matter is what the document's author wrote; whether that author decides who may read is the source's
trust. An access list comes from the system that the documents come from, and always counts. Both may speak,
of different things or alike; where they differ, one of them is wrong, and which, nobody here can know: the
document is unreadable until they agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from egressd.access.acl_file import Listed
from egressd.access.documents import Acl
from egressd.access.front_matter import FrontMatter
from egressd.access.statements import Statement, agreed
from egressd.model.errors import Unfit
from egressd.model.names import quoted

__all__ = ["Effective", "Trust", "effective"]


_NOBODY = Acl()


@dataclass(frozen=True, slots=True)
class Trust:
    """Of a source. What it does not say, nobody gets: the default of defaults is unreadable.

    Each default stands where neither front matter nor access list says that one thing.
    """

    front_matter: bool = False  # whether it is believed; otherwise it is not even looked at
    default: Acl = _NOBODY
    default_clearance: str = ""  # a level; "" is none: then every document must say its own
    default_groups: frozenset[str] = frozenset()


class Effective(NamedTuple):
    """As fields of `documents.Document`. With a `problem` nobody may read it, and the rest is empty."""

    acl: Acl
    clearance: str
    groups: frozenset[str]
    problem: str


def effective(
    front: FrontMatter | Unfit | None,
    listed: Listed | None,
    trust: Trust,
    levels: tuple[str, ...],
    *,
    issuers: frozenset[str] | None = None,
) -> Effective:
    """`front` and `listed` as `front_matter.read` and `AclFile.of` gave them; a raised `Unfit` is passed on.

    With `issuers`, the names of the configured providers, a principal of another one is a problem: one that
    is misspelt in a list of the denied would otherwise deny nobody.
    """
    try:
        said = agreed(_heard(front, listed, trust))
        found = _with_defaults(said, trust)
        _check(found, levels, issuers)
    except Unfit as wrong:
        return Effective(Acl(), "", frozenset(), str(wrong))
    return found


def _heard(front: FrontMatter | Unfit | None, listed: Listed | None, trust: Trust) -> list[Statement]:
    if not trust.front_matter:
        front = None
    for one in (front, listed):
        if isinstance(one, Unfit):
            raise one
    return [one for one in (front, listed) if isinstance(one, Statement)]


def _with_defaults(said: Statement, trust: Trust) -> Effective:
    readers = trust.default.readers if said.readers is None else said.readers
    denied = trust.default.denied if said.denied is None else said.denied
    clearance = trust.default_clearance if said.clearance is None else said.clearance
    groups = trust.default_groups if said.groups is None else said.groups
    return Effective(Acl(readers, denied), clearance, groups, "")


def _check(found: Effective, levels: tuple[str, ...], issuers: frozenset[str] | None) -> None:
    if not found.clearance:
        raise Unfit("nothing says its clearance", "say it, or give the source a default")
    if found.clearance not in levels:
        raise Unfit(f"{quoted(found.clearance)} is not a level of this workspace", f"use {', '.join(levels)}")
    for name in sorted(found.acl.readers | found.acl.denied | found.groups):
        issuer = name.split(":", 2)[1]
        if issuers is not None and issuer not in issuers:
            raise Unfit(f"{quoted(name)} is of no provider that is configured", "check its second part")
