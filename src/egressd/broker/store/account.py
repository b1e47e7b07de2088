"""Acting as the store's owner, where root administers it.

The broker's account is what the workspaces know: it is a member of those it serves, and its word is recorded.
And what it may not read, it could not show: root would ingest files that no request can ever project.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator

from egressd.broker.store.store import Store

__all__ = ["as_owner"]


@contextlib.contextmanager
def as_owner(store: Store) -> Iterator[None]:
    """With the effective rights of the account that the store's file belongs to, if this process is root's
    and the file another's. Of the whole process: not for one that does other things meanwhile."""
    uid = store.owner
    if os.geteuid() != 0 or not uid:
        yield
        return
    before = os.getegid(), os.getgroups()
    gid, groups = _groups(uid, store.owner_group)
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)  # takes the effective capabilities along (capabilities(7))
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(before[0])
        os.setgroups(before[1])


def _groups(uid: int, fallback: int) -> tuple[int, list[int]]:
    """Of the account; one without a name has the file's group alone."""
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        return fallback, []
    return account.pw_gid, os.getgrouplist(account.pw_name, account.pw_gid)
