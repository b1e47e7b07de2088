"""What is known of a document and of an asker when it is decided whether one may read the other."""

from __future__ import annotations

from dataclasses import dataclass

from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.model.errors import Unfit

__all__ = ["LEVELS", "Acl", "Asker", "Document", "Rules"]

LEVELS = ("public", "internal", "confidential", "secret")  # the default ladder of clearances, lowest first


@dataclass(frozen=True, slots=True)
class Acl:
    """Who may read a document: who is listed and not denied. Nobody, if nobody is listed."""

    readers: frozenset[str] = frozenset()  # principals
    denied: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Document:
    """As ingested. `problem` says why nobody may read it; then the rest decides nothing."""

    id: str
    root: str  # the source's directory
    path: bytes  # below it
    size: int  # bytes
    digest: str  # "sha256:" and 64 hex digits, of the content
    acl: Acl = Acl()
    clearance: str = ""  # a level; one that the ladder does not have is unreadable
    groups: frozenset[str] = frozenset()  # whose it is, beside the groups that its list names: for barriers
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Asker:
    identity: Identity
    role: Role = Role.NONE
    clearance: str = ""  # a level


@dataclass(frozen=True, slots=True)
class Rules:
    """Of a workspace. A barrier is a set of groups (mostly a pair) that must not see each other's documents.

    `Unfit` for a barrier that would bind nobody, and for a ladder that could be read two ways.
    """

    levels: tuple[str, ...] = LEVELS
    barriers: frozenset[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if len(set(self.levels)) != len(self.levels) or not all(self.levels):
            raise Unfit("two levels have one name, or none", "name each level once, lowest first")
        if any(len(barrier) < 2 for barrier in self.barriers):
            raise Unfit("a barrier stands between two groups at least", "name both")
