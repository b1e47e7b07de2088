"""Roles, and what each may do: the one table of rights."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["LEAST", "Right", "Role", "may", "may_set"]


class Role(enum.IntEnum):
    """In a workspace. Zero is no membership, and may do nothing."""

    NONE = 0
    VIEWER = 1
    EDITOR = 2
    ADMIN = 3
    OWNER = 4

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def of(cls, text: str) -> Role:
        """The role spelled `text` ("viewer"); NONE for anything else, which denies."""
        return {str(role): role for role in cls}.get(text, cls.NONE)


class Right(enum.StrEnum):
    ASK = "ask"  # run an inference that the workspace offers
    RUN_COMMAND = "run-command"  # run a command of one's own
    SEE_MEMBERS = "see-members"
    SET_MEMBERS = "set-members"  # whom, and to what: see may_set
    INGEST = "ingest"  # read a source's documents anew
    SET_TRUST = "set-trust"  # which sources are believed, their defaults
    SET_BARRIERS = "set-barriers"
    SEE_ALL_REQUESTS = "see-all-requests"  # and cancel them


# The least role that has each right.
LEAST: Mapping[Right, Role] = MappingProxyType({
    Right.ASK: Role.VIEWER,
    Right.RUN_COMMAND: Role.EDITOR,
    Right.SEE_MEMBERS: Role.EDITOR,
    Right.INGEST: Role.EDITOR,
    Right.SET_MEMBERS: Role.ADMIN,
    Right.SET_TRUST: Role.ADMIN,
    Right.SET_BARRIERS: Role.ADMIN,
    Right.SEE_ALL_REQUESTS: Role.ADMIN,
})  # fmt: skip


def may(role: Role, right: Right) -> bool:
    return role is not Role.NONE and role >= LEAST[right]


def may_set(actor: Role, *, now: Role, then: Role) -> bool:
    """Whether `actor` may make somebody who is `now` to be `then` (NONE: no member).

    An admin sets viewers and editors; owners set everybody. Nobody gives what they do not have.
    """
    if not may(actor, Right.SET_MEMBERS):
        return False
    return actor is Role.OWNER or max(now, then) < Role.ADMIN
