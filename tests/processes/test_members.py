"""Membership: what the kernel says of the caller against what the policy says of members."""

from __future__ import annotations

import grp
import os
import pwd
import socket

import pytest

from egressd.policy.compiled import Member, MemberKind
from egressd.processes.members import Caller, caller_of, is_member

CALLER = Caller(pid=1, uid=4001, groups=frozenset({4001, 50}))
ROOT = Caller(pid=1, uid=0, groups=frozenset({0}))


def user(name: str) -> Member:
    return Member(MemberKind.USER, name)


def group(name: str) -> Member:
    return Member(MemberKind.GROUP, name)


@pytest.mark.parametrize(
    ("caller", "members", "is_one"),
    [
        (CALLER, [], False),
        (ROOT, [], False),
        (CALLER, [user("4001")], True),
        (CALLER, [user("4002")], False),
        (CALLER, [group("4001")], True),
        (CALLER, [group("50")], True),
        (CALLER, [group("51")], False),
        (CALLER, [user("50")], False),
        (CALLER, [group("root"), user("4001")], True),
        (CALLER, [user("nobody-of-that-name")], False),
        (CALLER, [group("no-such-group")], False),
        (ROOT, [user(pwd.getpwuid(0).pw_name)], True),
        (ROOT, [group(grp.getgrgid(0).gr_name)], True),
        (CALLER, [user(pwd.getpwuid(0).pw_name)], False),
    ],
)
def test_membership(caller: Caller, members: list[Member], is_one: bool) -> None:
    assert is_member(caller, members) is is_one


def test_the_kernel_says_who_calls() -> None:
    left, right = socket.socketpair()
    with left, right:
        caller = caller_of(left)
    assert (caller.pid, caller.uid) == (os.getpid(), os.getuid())
    assert caller.groups == frozenset({os.getgid(), *os.getgroups()})
