"""Every change of the store: may whoever wants it do so; on record first; then made.

An actor is either somebody with a verified token, whose role is read in the very transaction that makes the
change, or the local operator: who may open the store's file anyway, and is root or its owner. What is
recorded is `access-changed` (and `documents-ingested`), before the change is committed: record, then admit.
Where it cannot be recorded it is not made; where it was recorded and then could not be made, that is
recorded, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

from egressd.access.documents import Acl
from egressd.access.identifiers import SOURCE
from egressd.access.principals import Identity, principal
from egressd.access.roles import Right, Role, may, may_set
from egressd.access.trust import Trust
from egressd.broker.store.changes import Change
from egressd.broker.store.rows import Membership, Source, Stored, list_text
from egressd.broker.store.statements import judged
from egressd.broker.store.store import Store
from egressd.model.errors import EgressdError, Refused, Unfit
from egressd.model.identities import WORKSPACE_PATTERN
from egressd.model.verdicts import Reason

__all__ = [
    "Actor", "Administration", "NothingToDo", "Operator", "Record", "Turn", "Wanted", "check_source",
    "local_operator", "told_change",
]  # fmt: skip

Scalar: TypeAlias = str | int | float | bool | None
# (workspace, event, fields): returns when it is on record; raises `Refused` where it is not.
Record: TypeAlias = Callable[[str, str, Mapping[str, Scalar]], None]
_MOST_TOLD: Final = 1024  # characters of one field: six lists must fit a record (journal/records.py)


@dataclass(frozen=True, slots=True)
class Operator:
    """Who administers this machine. May do everything in every workspace; made by `local_operator`."""

    name: str  # for the record


Actor: TypeAlias = Identity | Operator


def local_operator(store: Store) -> Operator:
    """`Refused` unless this process is root's or the store's owner's."""
    uid = os.geteuid()
    if uid != 0 and store.owner not in (None, uid):
        raise Refused(Reason.MEMBER, "only root and the store's owner administer it here: use sudo")
    return Operator(_who(uid))


def _who(uid: int) -> str:
    """`uid 0 (root, login 1000)`. The login (pam_loginuid) is a number that sudo leaves alone."""
    name = ""
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(uid).pw_name
    beside = ", ".join(filter(None, (name, _login(uid))))
    return f"uid {uid} ({beside})" if beside else f"uid {uid}"


def _login(uid: int) -> str:
    try:
        login = int(Path("/proc/self/loginuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ""
    return "" if login in (uid, 0xFFFF_FFFF) else f"login {login}"  # linux/audit.h, AUDIT_UID_UNSET


@dataclass(slots=True)
class Turn:
    """One actor's change of one workspace, not committed yet."""

    change: Change
    actor: Actor
    by: str  # as the record spells the actor
    role: Role
    clearance: str
    say: Callable[[str, Mapping[str, Scalar]], None]
    said: list[tuple[str, Mapping[str, Scalar]]] = field(default_factory=list)

    def changed(self, what: str, **fields: Scalar) -> None:
        """On record as `access-changed`; only then may the change be committed."""
        self.record("access-changed", {"what": what, **fields})

    def record(self, event: str, fields: Mapping[str, Scalar]) -> None:
        whole = {**fields, "by": self.by, "generation": self.change.generation}
        whole = {name: _told(value) for name, value in whole.items()}
        self.say(event, whole)
        self.said.append((event, whole))


def _told(value: Scalar) -> Scalar:
    """What is too long is told by its beginning and its digest: no two values are told alike."""
    if isinstance(value, str) and len(value) > _MOST_TOLD:
        digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{value[: _MOST_TOLD - 100]}... ({len(value)} characters, sha256:{digest})"
    return value


class NothingToDo(Exception):
    """There is nothing to change: nothing is recorded, and the generation stays."""


class Administration:
    """`Refused` with Reason.WORKSPACE where the actor is no member (answer it like what does not exist), with
    Reason.MEMBER where the role does not have the right, with Reason.UNAVAILABLE where the store or the
    record does not work. `Unfit` for a value that is none. Thread-safe if `record` is.
    """

    def __init__(
        self,
        store: Store,
        record: Record,
        *,
        issuers: frozenset[str] | None = None,  # names of the configured providers; None: not known here
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.issuers = issuers
        self.clock = clock
        self._record = record

    # ---- members

    def members(self, actor: Actor, workspace: str) -> tuple[Membership, ...]:
        self._may_see(actor, workspace, Right.SEE_MEMBERS)
        return self.store.members(workspace)

    def set_member(
        self, actor: Actor, workspace: str, name: str, role: Role, clearance: str = ""
    ) -> Membership | None:
        """What was so before; None for a new member. `clearance` "" keeps what is there, and is the lowest
        level for a new member."""
        name = self._one(name)
        if role is Role.NONE:
            raise Unfit("that is no role", "name viewer, editor, admin or owner, or remove the member")
        was = None
        with self.changing(actor, workspace, Right.SET_MEMBERS) as turn:
            was = turn.change.member(name)
            level = self._level(clearance or (was.clearance if was else self.store.levels[0]))
            if was is not None and (was.role, was.clearance) == (role, level):
                raise NothingToDo
            self._may_set(turn, was, role)
            if was is None or level != was.clearance:
                self._may_clear(turn, level)
            turn.change.put_member(Membership(name, role, level, turn.by, self.clock()))
            turn.changed("member-set", principal=name, role=str(role), clearance=level, **_before(was))
        return was

    def remove_member(self, actor: Actor, workspace: str, name: str) -> Membership | None:
        """What was so before; None for one who was no member."""
        name = principal(name)
        was = None
        with self.changing(actor, workspace, Right.SET_MEMBERS) as turn:
            was = turn.change.member(name)
            if was is None:
                raise NothingToDo
            self._may_set(turn, was, Role.NONE)
            turn.change.drop_member(name)
            turn.changed("member-removed", principal=name, **_before(was))
        return was

    # ---- sources

    def sources(self, actor: Actor, workspace: str) -> tuple[Source, ...]:
        self._may_see(actor, workspace, Right.INGEST)
        return self.store.sources(workspace)

    def stored(self, actor: Actor, workspace: str, source: str) -> Mapping[str, Stored]:
        """The documents of a source, by id."""
        self._may_see(actor, workspace, Right.INGEST)
        return self.store.stored(workspace, source)

    def set_trust(
        self,
        actor: Actor,
        workspace: str,
        name: str,
        *,
        front_matter: bool | None = None,
        read: frozenset[str] | None = None,
        deny: frozenset[str] | None = None,
        groups: frozenset[str] | None = None,
        clearance: str | None = None,
    ) -> Source:
        """What is believed of a source, and what holds where nothing is said; None keeps what is there. All
        documents stored of it are judged anew, in the same transaction. The local operator may say it of a
        source that is yet to be ingested: it is known from then on, without a directory."""
        wanted = self.wanted(front_matter, read, deny, groups, clearance)
        with self.changing(actor, workspace, Right.SET_TRUST) as turn:
            found = turn.change.source(name)
            was = found or self._to_come(turn, name, wanted)
            then = self.believed(turn, was, wanted)
            if found is not None and then.trust == was.trust:
                raise NothingToDo
            source = replace(then, changed_by=turn.by, at=self.clock())
            turn.change.put_source(source)
            self._judge_anew(turn.change, source)
            turn.changed(
                "trust-set", source=name, **_told_trust(then.trust), **_told_trust(was.trust, "_before")
            )
            return source
        return was

    def wanted(
        self,
        front_matter: bool | None = None,
        read: frozenset[str] | None = None,
        deny: frozenset[str] | None = None,
        groups: frozenset[str] | None = None,
        clearance: str | None = None,
    ) -> Wanted:
        """`Unfit` for what is no principal and no level."""
        if clearance:
            self._level(clearance)
        return Wanted(front_matter, self._known(read), self._known(deny), self._known(groups), clearance)

    def believed(self, turn: Turn, was: Source, wanted: Wanted) -> Source:
        """The source with that trust, not stored yet; `Refused` where it is not the actor's to say."""
        _check_right(turn.role, Right.SET_TRUST)
        then = wanted.of(was.trust)
        if then == was.trust:
            return was
        for level in filter(None, {was.trust.default_clearance, then.default_clearance}):
            self._may_clear(turn, self._level(level))
        if was.trust.front_matter and not then.front_matter:
            # Documents lose the clearance that they ask for themselves, whatever it is.
            self._may_clear(turn, self.store.levels[-1])
        return replace(was, trust=then)

    def _to_come(self, turn: Turn, name: str, wanted: Wanted) -> Source:
        """Sources are the local operator's to make (`ingest`); to say nothing of one does not make it."""
        if not isinstance(turn.actor, Operator) or wanted == Wanted():
            raise _no_source(turn, name)
        check_source(name)
        return Source(name=name, directory="")

    def _judge_anew(self, change: Change, source: Source) -> None:
        stored = change.documents(source.name).values()
        now = [judged(one, source.trust, self.store.levels, self.issuers) for one in stored]
        change.judge([one for one, old in zip(now, stored, strict=True) if one != old])

    def drop_source(self, actor: Actor, workspace: str, name: str) -> int:
        """With all its documents; how many those were. The files stay."""
        documents = 0
        with self.changing(actor, workspace, Right.SET_TRUST) as turn:
            was = self.source(turn, name)
            documents = len(turn.change.documents(name))
            turn.change.drop_source(name)
            turn.changed("source-dropped", source=name, directory=was.directory, documents=documents)
        return documents

    # ---- barriers

    def barriers(self, actor: Actor, workspace: str) -> tuple[tuple[str, str], ...]:
        self._may_see(actor, workspace, Right.SET_BARRIERS)
        return self.store.barriers(workspace)

    def add_barrier(self, actor: Actor, workspace: str, a: str, b: str) -> bool:
        """False if it was there already."""
        a, b = _pair(self._one(a), self._one(b))
        with self.changing(actor, workspace, Right.SET_BARRIERS) as turn:
            if (a, b) in turn.change.barriers():
                raise NothingToDo
            turn.change.put_barrier(a, b)
            turn.changed("barrier-added", a=a, b=b)
            return True
        return False

    def remove_barrier(self, actor: Actor, workspace: str, a: str, b: str) -> bool:
        """False if there was none. Who is kept from something by it does not take it away."""
        a, b = _pair(principal(a), principal(b))
        with self.changing(actor, workspace, Right.SET_BARRIERS) as turn:
            if (a, b) not in turn.change.barriers():
                raise NothingToDo
            if isinstance(actor, Identity) and not actor.groups.isdisjoint((a, b)):
                raise Refused(Reason.MEMBER, "you stand behind it yourself")
            turn.change.drop_barrier(a, b)
            turn.changed("barrier-removed", a=a, b=b)
            return True
        return False

    # ---- who may what

    @contextlib.contextmanager
    def changing(self, actor: Actor, workspace: str, right: Right) -> Iterator[Turn]:
        """A turn of an actor who has that right, committed at the end."""
        check_workspace(workspace)
        turn: Turn | None = None
        try:
            with contextlib.suppress(NothingToDo), self.store.change(workspace) as change:
                turn = self._turn(actor, change)
                _check_right(turn.role, right)
                yield turn
        except BaseException:
            if turn is not None:
                self._unsay(workspace, turn)
            raise

    def _turn(self, actor: Actor, change: Change) -> Turn:
        def say(event: str, fields: Mapping[str, Scalar]) -> None:
            self._record(change.workspace, event, fields)

        if isinstance(actor, Operator):
            return Turn(change, actor, actor.name, Role.OWNER, self.store.levels[-1], say)
        asker = self.store.asker(change, actor)
        return Turn(change, actor, actor.user, asker.role, asker.clearance, say)

    def _unsay(self, workspace: str, turn: Turn) -> None:
        """What was recorded did not happen. Said as well as can be: the store or the daemon has failed."""
        for event, fields in turn.said:
            with contextlib.suppress(EgressdError, OSError):
                not_made = {"what": "not-made", "event": event, "of": fields.get("what", ""), "by": turn.by}
                self._record(workspace, "access-changed", {**not_made, "generation": fields["generation"]})

    def _may_see(self, actor: Actor, workspace: str, right: Right) -> None:
        check_workspace(workspace)
        if not isinstance(actor, Operator):
            _check_right(self.store.snapshot(workspace, actor, ()).asker.role, right)

    def _may_set(self, turn: Turn, was: Membership | None, then: Role) -> None:
        now = was.role if was else Role.NONE
        if not may_set(turn.role, now=now, then=then):
            raise Refused(Reason.MEMBER, f"{_an(turn.role)} may not make a member who is {now} to be {then}: "
                                         "ask an owner of the workspace")  # fmt: skip
        if now is Role.OWNER and then is not Role.OWNER and _owners(turn.change) == 1:
            raise Refused(Reason.MEMBER, "that is the workspace's last owner: make somebody else owner first")

    def _may_clear(self, turn: Turn, level: str) -> None:
        """Nobody gives what they do not have."""
        if self.store.rank(level) > self.store.rank(turn.clearance):
            raise Refused(Reason.MEMBER, f"only somebody who is cleared for {level} may do that")

    def _known(self, names: Iterable[str] | None) -> frozenset[str] | None:
        return None if names is None else frozenset(map(self._one, names))

    def _one(self, text: str) -> str:
        """A principal, of a provider that is configured: one that is misspelt would never match."""
        name = principal(text)
        if self.issuers is not None and name.split(":")[1] not in self.issuers:
            known = ", ".join(sorted(self.issuers))
            raise Unfit(f"{name[:80]!r} is of no provider that is configured", f"the providers are {known}")
        return name

    def _level(self, level: str) -> str:
        if level not in self.store.levels:
            raise Unfit(f"{level[:40]!r} is no clearance", f"name {', '.join(self.store.levels)}")
        return level

    def source(self, turn: Turn, name: str) -> Source:
        found = turn.change.source(name)
        if found is None:
            raise _no_source(turn, name)
        return found


def _no_source(turn: Turn, name: str) -> Unfit:
    known = ", ".join(source.name for source in turn.change.sources()) or "none"
    return Unfit(f"there is no source {name[:40]!r}", f"the sources are: {known}; ingest makes one")


def check_source(name: str) -> None:
    if not SOURCE.fullmatch(name):
        raise Unfit(f"{name[:40]!r} is not a source's name", "use lower-case letters, digits, inner hyphens")


def check_workspace(workspace: str) -> None:
    if len(workspace) > 32 or not re.fullmatch(WORKSPACE_PATTERN, workspace):  # ruleset/wants.py
        raise Unfit(f"{workspace[:40]!r} is not a workspace's name", "name one that has a policy")


def _check_right(role: Role, right: Right) -> None:
    if role is Role.NONE:
        raise Refused(Reason.WORKSPACE, "there is no such workspace")
    if not may(role, right):
        raise Refused(Reason.MEMBER, f"{_an(role)} may not do that ({right})")


def _an(role: Role) -> str:
    return f"{'a' if role is Role.VIEWER else 'an'} {role}"


def _owners(change: Change) -> int:
    return sum(member.role is Role.OWNER for member in change.members())


def _before(was: Membership | None) -> dict[str, str]:
    if was is None:
        return {"role_before": str(Role.NONE), "clearance_before": ""}
    return {"role_before": str(was.role), "clearance_before": was.clearance}


def _told_trust(trust: Trust, suffix: str = "") -> dict[str, Scalar]:
    return {
        f"front_matter{suffix}": trust.front_matter,
        f"read{suffix}": list_text(trust.default.readers),
        f"deny{suffix}": list_text(trust.default.denied),
        f"groups{suffix}": list_text(trust.default_groups),
        f"clearance{suffix}": trust.default_clearance,
    }


def told_change(was: Trust, then: Trust) -> dict[str, Scalar]:
    """As `trust-set` says it; nothing where there is no change."""
    return {} if was == then else {**_told_trust(then), **_told_trust(was, "_before")}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of a source's trust; None keeps what is there. Made by `Administration.wanted`."""

    front_matter: bool | None = None
    read: frozenset[str] | None = None
    deny: frozenset[str] | None = None
    groups: frozenset[str] | None = None
    clearance: str | None = None

    def of(self, was: Trust) -> Trust:
        return Trust(
            front_matter=was.front_matter if self.front_matter is None else self.front_matter,
            default=Acl(
                was.default.readers if self.read is None else self.read,
                was.default.denied if self.deny is None else self.deny,
            ),
            default_groups=was.default_groups if self.groups is None else self.groups,
            default_clearance=was.default_clearance if self.clearance is None else self.clearance,
        )


def _pair(a: str, b: str) -> tuple[str, str]:
    """In one order, whichever way they were named."""
    for name in (a, b):
        if not name.startswith("group:"):
            raise Unfit(f"{name[:80]!r} is no group", "a barrier stands between two groups")
    if a == b:
        raise Unfit("a group is not kept from itself", "name two groups")
    return (a, b) if a < b else (b, a)
