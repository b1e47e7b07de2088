"""What each role may do: the whole table, written out."""

from __future__ import annotations

import pytest

from egressd.access.roles import LEAST, Right, Role, may, may_set

NONE, VIEWER, EDITOR, ADMIN, OWNER = Role
#                            none   viewer editor admin  owner
TABLE = {
    Right.ASK:              (False, True,  True,  True,  True),
    Right.RUN_COMMAND:      (False, False, True,  True,  True),
    Right.SEE_MEMBERS:      (False, False, True,  True,  True),
    Right.INGEST:           (False, False, True,  True,  True),
    Right.SET_MEMBERS:      (False, False, False, True,  True),
    Right.SET_TRUST:        (False, False, False, True,  True),
    Right.SET_BARRIERS:     (False, False, False, True,  True),
    Right.SEE_ALL_REQUESTS: (False, False, False, True,  True),
}  # fmt: skip


def test_every_right_has_its_least_role() -> None:
    assert set(LEAST) == set(Right) == set(TABLE)


@pytest.mark.parametrize("right", Right)
def test_rights(right: Right) -> None:
    assert tuple(may(role, right) for role in Role) == TABLE[right]


@pytest.mark.parametrize("text", ["", "none", "Viewer", "root", "4", "OWNER ", "superowner"])
def test_an_unknown_role_is_none(text: str) -> None:
    assert Role.of(text) is NONE
    assert not any(may(Role.of(text), right) for right in Right)


def test_roles_are_spelt_as_they_are_read() -> None:
    assert [str(role) for role in Role] == ["none", "viewer", "editor", "admin", "owner"]
    assert all(Role.of(str(role)) is role for role in Role)


@pytest.mark.parametrize("now", Role)
@pytest.mark.parametrize("then", Role)
def test_who_sets_whom(now: Role, then: Role) -> None:
    low = {NONE, VIEWER, EDITOR}
    assert may_set(OWNER, now=now, then=then)
    assert may_set(ADMIN, now=now, then=then) == (now in low and then in low)
    assert not any(may_set(actor, now=now, then=then) for actor in low)
