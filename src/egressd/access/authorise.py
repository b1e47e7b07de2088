"""The one place that decides which documents an asker may read."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from egressd.access.documents import Asker, Document, Rules
from egressd.access.roles import Right, may

__all__ = ["Cleared", "Finding", "authorise", "judge"]


class Finding(enum.StrEnum):
    """Why. For the record and for who administers; an asker is never told which of these it was."""

    UNKNOWN = "unknown"  # no such document
    ROLE = "role"
    UNREADABLE = "unreadable"  # nobody may: unparsable, contradictory, not listed
    UNLISTED = "unlisted"
    DENIED = "denied"
    CLEARANCE = "clearance"
    BARRIER = "barrier"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class Cleared:
    """`discarded` counts candidates that are not shown, for whatever reason; duplicates count once."""

    documents: tuple[Document, ...]  # in the order of the candidates
    discarded: int


def judge(asker: Asker, document: Document | None, rules: Rules) -> Finding:
    """Cleared only if everything says so."""
    return _Judge(asker, rules).find(document)


def authorise(
    asker: Asker, candidates: Iterable[str], documents: Mapping[str, Document], rules: Rules
) -> Cleared:
    """Candidates ∩ what the asker may read."""
    judge = _Judge(asker, rules)
    wanted = dict.fromkeys(candidates)
    cleared: list[Document] = []
    for id in wanted:
        document = documents.get(id)
        # one found under another's name would be copied as what it is not
        if document is not None and document.id == id and judge.find(document) is Finding.CLEARED:
            cleared.append(document)
    return Cleared(tuple(cleared), len(wanted) - len(cleared))


class _Judge:
    """One asker under one workspace's rules: what is the same for every document is worked out once."""

    def __init__(self, asker: Asker, rules: Rules) -> None:
        self._may_ask = may(asker.role, Right.ASK)
        self._names = asker.identity.principals
        self._levels = _up_to(asker.clearance, rules.levels)
        self._barred = _barred(asker.identity.groups, rules.barriers)

    def find(self, document: Document | None) -> Finding:
        if document is None:
            return Finding.UNKNOWN
        if not self._may_ask:
            return Finding.ROLE
        if document.problem:
            return Finding.UNREADABLE
        if self._names & document.acl.denied:
            return Finding.DENIED
        if not self._names & document.acl.readers:
            return Finding.UNLISTED
        if document.clearance not in self._levels:
            return Finding.CLEARANCE
        # what names a group as its reader is that group's, too; a user's name is never in `_barred`
        if self._barred & document.groups or self._barred & document.acl.readers:
            return Finding.BARRIER
        return Finding.CLEARED


def _up_to(level: str, levels: tuple[str, ...]) -> frozenset[str]:
    """The levels that one of `level` may read. None for a level that the ladder does not have."""
    return frozenset(levels[: levels.index(level) + 1]) if level in levels else frozenset()


def _barred(mine: frozenset[str], barriers: frozenset[frozenset[str]]) -> frozenset[str]:
    """The groups whose documents somebody of the groups `mine` must not see.

    An asker on one side of a barrier sees nothing that is of the other side; one on both, nothing of either.
    What is of both sides is therefore closed to both.
    """
    return frozenset(
        there for barrier in barriers for here in barrier & mine for there in barrier if there != here
    )
