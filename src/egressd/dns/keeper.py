"""Every listed name: what is known of it, what the kernel has acknowledged, and what to do next.

Theory of operation. A *target* is a host name, whether it may resolve into private ranges, and the terms
the controller holds it to, which mean nothing here; several workspaces may share one. The owner of this
machine tells it what happens (`set_users`, `found`, `admitted`, `withheld`, `tick`) and does what it returns:
`Ask` upstream, `Admit` to the kernel, `Settled` (forget cached answers, wake who waits), `Note` (record).
Nothing else has an effect, so a test is a dialogue with a clock of its own.

The order is a rule: record, then admit, then answer. `standing` is what may be answered from; it changes
only in `admitted` and `withheld`, never when upstream answers. A refresh that the kernel does not take
leaves the old standing, which the kernel still has; a first resolution it does not take is a failure.

    idle --tick--> asking --found--> (slots unchanged) idle
                                \\--> admitting --admitted--> idle, new standing
                                    ^         \\--withheld--> idle, old standing; tried again later
                                    \\--admitted, but some addresses refused: the same without them

What the controller refuses of a proposal the kernel does not lead to. It is left out from then on, for as
long as upstream goes on naming it, and the others that were found take its slots: a name may have more
addresses than slots. Each round refuses one at least of at most 64 addresses (see wire.py), so they end.

A user that joins while the kernel is asked is not covered by that acknowledgement: it causes another.
A name that only a wildcard covers comes here once it has been granted (`adopt`), and is then kept alike.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeAlias

from egressd.dns import schedule
from egressd.dns.replies import Extended, Failure
from egressd.dns.sift import sift
from egressd.dns.slots import EMPTY, Slots, assign
from egressd.model.addresses import Address, AddressClass, Network
from egressd.model.verdicts import Reason

__all__ = [
    "Admit", "Ask", "Command", "Family", "Finding", "Findings", "Keeper", "Note", "Settled",
    "Standing", "State", "Target", "User",
]  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class Target:
    host: str
    private: bool
    terms: str = ""  # what the controller holds it to beside that; other terms, another target


@dataclass(frozen=True, slots=True, order=True)
class User:
    """Whose block of synthetic addresses leads to a target."""

    workspace: str
    block: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look at one family gave. `failure` set: nothing was learnt. Else `exists` says whether the
    name does, `addresses` may be empty (no data), and `ttl` holds for either."""

    addresses: tuple[Address, ...] = ()
    ttl: float = 0.0
    exists: bool = True
    failure: Failure | None = None


Findings: TypeAlias = tuple[Finding, Finding]  # IPv4, IPv6


@dataclass(frozen=True, slots=True)
class Family:
    """One address family of a target as acknowledged: where its slots lead, or why nowhere. `found` are the
    usable addresses there were, also those beyond the slots and those the controller refuses."""

    slots: Slots[Any] = EMPTY
    failure: Failure | None = None
    stale: bool = False  # older than their TTL, because upstream fails (RFC 8767)
    found: tuple[Address, ...] = field(default=(), compare=False)  # their order often changes, and no answer


class State(enum.Enum):
    PENDING = "pending"  # nothing known yet: whoever asks waits
    KNOWN = "known"
    FAILED = "failed"  # no address, and the reason is not that there is none


@dataclass(frozen=True, slots=True)
class Standing:
    """What may be answered about a target, and for whom the kernel leads there."""

    state: State = State.PENDING
    v4: Family = Family()
    v6: Family = Family()
    exists: bool = True
    ttl: float = 0.0  # of a negative answer, seconds
    failure: Failure | None = None
    users: frozenset[User] = frozenset()


# ---- commands


@dataclass(frozen=True, slots=True)
class Ask:
    """Look up both families upstream and report with `found`."""

    target: Target


@dataclass(frozen=True, slots=True)
class Admit:
    """Have the kernel lead there; report with `admitted` or `withheld`, naming `serial`."""

    target: Target
    slots4: Slots[IPv4Address]
    slots6: Slots[IPv6Address]
    serial: int


@dataclass(frozen=True, slots=True)
class Settled:
    """The standing of this target has changed, or it is no longer kept."""

    target: Target


@dataclass(frozen=True, slots=True)
class Note:
    """Something to be recorded."""

    event: str
    fields: Mapping[str, str | int | float | bool | None]


Command: TypeAlias = Ask | Admit | Settled | Note


# ---- the machine

_NONE: Mapping[Address, str] = {}


@dataclass(slots=True)
class _Entry:
    target: Target
    users: frozenset[User]
    standing: Standing = field(default_factory=Standing)
    asking: bool = False
    due: float | None = None  # of the next look; None while asking
    failures: int = 0
    good_at: list[float | None] = field(default_factory=lambda: [None, None])  # per family
    ttls: list[float] = field(default_factory=lambda: [0.0, 0.0])  # per family, of what was found then
    latest: Standing | None = None  # as upstream last had it, whatever the kernel thinks of it
    proposed: Standing | None = None  # with the kernel
    serial: int = 0
    refused: dict[Address, str] = field(default_factory=dict)  # by the controller, and why; of those found


class Keeper:
    """`own` are ranges no name may lead to; `static` answers before any upstream; with `upstream` False
    (air-gapped) no `Ask` is ever returned. `jitter` draws from [0, 1]."""

    def __init__(
        self,
        *,
        own: Sequence[Network] = (),
        static: Mapping[str, tuple[Address, ...]] | None = None,
        upstream: bool = True,
        jitter: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._own, self._static, self._upstream = tuple(own), dict(static or {}), upstream
        self._jitter = jitter
        self._entries: dict[Target, _Entry] = {}
        self._due: list[tuple[float, Target]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def standing(self, target: Target) -> Standing:
        """What may be answered now; PENDING for a target nobody uses."""
        entry = self._entries.get(target)
        return entry.standing if entry else Standing()

    def next_due(self) -> float | None:
        """When `tick` has something to do; None while nothing is scheduled."""
        while self._due and not self._is_current(*self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    # ---- what happens

    def set_users(self, users: Mapping[Target, frozenset[User]], *, now: float) -> list[Command]:
        """The targets there are, each with who uses it. Those no longer named are forgotten."""
        commands: list[Command] = []
        for target in [t for t in self._entries if not users.get(t)]:
            del self._entries[target]
            commands.append(Settled(target))
        for target, wanted in users.items():
            if wanted:
                commands += self._use(target, wanted, now)
        return commands

    def shortcut(self, target: Target, *, now: float) -> Standing | None:
        """What is known of a name without asking upstream: it is kept for somebody else already, it is
        static, or there is nobody to ask."""
        entry = self._entries.get(target)
        if entry is not None:
            return entry.latest if entry.latest is not None and entry.latest.state is State.KNOWN else None
        findings = self._unasked(target.host)
        return None if findings is None else self.judge(target, findings, now=now)[0]

    def judge(self, target: Target, findings: Findings, *, now: float) -> tuple[Standing, list[Note]]:
        """What `found` would make of these, and what is to be recorded. Nothing is kept."""
        kept = self._entries.get(target)
        entry = _Entry(target, frozenset())
        if kept is not None:
            entry.latest, entry.good_at, entry.ttls = kept.latest, list(kept.good_at), list(kept.ttls)
            entry.refused = dict(kept.refused)
        return self._learn(entry, findings, now)

    def adopt(
        self,
        target: Target,
        user: User,
        standing: Standing,
        *,
        seen: float,
        refused: Mapping[Address, str] = _NONE,
    ) -> list[Command]:
        """The kernel leads to the slots of this standing, found at `seen`, for this user, but for addresses
        that are `refused`: a name that a wildcard covers was granted. From now on it is kept like others."""
        entry = self._entries.get(target)
        if entry is None:
            return self._adopt_new(target, user, standing, seen, refused)
        entry.users |= {user}
        entry.refused.update(refused)
        # For others it was known before. What differs meanwhile is asked anew, of the kernel alone.
        led = _without(standing, entry.refused)
        if entry.proposed is None and not refused and _same_way(entry.standing, led):
            entry.standing = replace(entry.standing, users=entry.standing.users | {user})
            return []
        if entry.latest is None or entry.latest.state is not State.KNOWN:
            entry.latest = standing  # the others' luck
        entry.latest = _reassigned(entry, entry.latest)
        return self._apply(entry, entry.latest)

    def leave(self, target: Target, user: User) -> list[Command]:
        """This user is one no more. A name that nobody uses is forgotten."""
        entry = self._entries.get(target)
        if entry is None or user not in entry.users:
            return []
        if entry.users == {user}:
            del self._entries[target]
            return [Settled(target)]
        self._narrow(entry, entry.users - {user})
        return [Settled(target)]

    def readmit(self) -> list[Command]:
        """The controller is a new one, which knows of no slots: tell it all of them again, and have it judge
        again what the old one refused. Answers continue meanwhile, because the kernel still leads where it
        did."""
        commands: list[Command] = []
        for entry in self._entries.values():
            if entry.latest is not None:
                entry.refused.clear()
                entry.latest = _reassigned(entry, entry.latest)
                commands += self._propose(entry, entry.latest)
        return commands

    def tick(self, *, now: float) -> list[Command]:
        """Look up what is due."""
        commands: list[Command] = []
        while self._due and self._due[0][0] <= now:
            due, target = heapq.heappop(self._due)
            if self._is_current(due, target):
                commands += self._look(self._entries[target], now)
        return commands

    def found(self, target: Target, findings: Findings, *, now: float) -> list[Command]:
        """Upstream has answered, or not."""
        entry = self._entries.get(target)
        if entry is None:
            return []
        entry.asking = False
        entry.latest, notes = self._learn(entry, findings, now)
        self._reschedule(entry, findings, now)
        return [*notes, *self._apply(entry, entry.latest)]

    def admitted(
        self, target: Target, serial: int, *, refused: Mapping[Address, str] = _NONE
    ) -> list[Command]:
        """The kernel leads where the `Admit` of that serial said, but for addresses that are refused for as
        long as the target has these terms: address -> why."""
        entry = self._entries.get(target)
        if entry is None or entry.proposed is None or entry.serial != serial:
            return []
        proposed, entry.proposed = entry.proposed, None
        against = {a: why for a, why in refused.items() if a in _ways(proposed)}
        entry.standing = _without(proposed, against)
        latest = entry.latest or proposed
        if against:
            entry.refused.update(against)
            latest = entry.latest = _reassigned(entry, latest)
        return [Settled(target), *self._apply(entry, latest)]

    def withheld(self, target: Target, serial: int, text: str, *, now: float) -> list[Command]:
        """The kernel does not lead there. Nothing is answered that was not before, and it is tried again."""
        entry = self._entries.get(target)
        if entry is None or entry.proposed is None or entry.serial != serial:
            return []
        entry.proposed = None
        entry.failures += 1
        if not entry.standing.users & entry.users or entry.standing.state is State.PENDING:
            failure = Failure(Extended.NOT_READY, f"{target.host} is not admitted: {text}")
            entry.standing = Standing(State.FAILED, failure=failure)
        if not entry.asking:
            self._at(entry, now + schedule.retry_after(entry.failures, jitter=self._jitter()))
        note = Note("dns-withheld", {"name": target.host, "reason": text})
        return [note, Settled(target)]

    # ---- inside

    def _is_current(self, due: float, target: Target) -> bool:
        entry = self._entries.get(target)
        return entry is not None and entry.due == due

    def _use(self, target: Target, users: frozenset[User], now: float) -> list[Command]:
        entry = self._entries.get(target)
        if entry is None:
            entry = self._entries[target] = _Entry(target, users)
            return self._look(entry, now)
        self._narrow(entry, users)
        return self._apply(entry, entry.latest) if entry.latest is not None else []

    def _narrow(self, entry: _Entry, users: frozenset[User]) -> None:
        """Whoever left has lost what the kernel had for it; should it come back, that must be asked anew."""
        entry.users = users
        entry.standing = replace(entry.standing, users=entry.standing.users & users)
        if entry.proposed is not None:
            entry.proposed = replace(entry.proposed, users=entry.proposed.users & users)

    def _adopt_new(
        self, target: Target, user: User, standing: Standing, seen: float, refused: Mapping[Address, str]
    ) -> list[Command]:
        users = frozenset({user})
        entry = self._entries[target] = _Entry(target, users, refused=dict(refused))
        entry.standing = replace(_without(standing, refused), users=users)
        entry.latest = _reassigned(entry, standing)
        families = (standing.v4, standing.v6)
        entry.good_at = [seen if family.failure is None else None for family in families]
        entry.ttls = [standing.ttl, standing.ttl]
        entry.failures = int(None in entry.good_at)
        self._pace(entry, standing.ttl, seen)
        return self._apply(entry, entry.latest)

    def _look(self, entry: _Entry, now: float) -> list[Command]:
        entry.due = None
        findings = self._unasked(entry.target.host)
        if findings is not None:
            return self.found(entry.target, findings, now=now)
        entry.asking = True
        return [Ask(entry.target)]

    def _unasked(self, host: str) -> Findings | None:
        """What is to be said without asking upstream."""
        if host in self._static:
            return _static_findings(self._static[host])
        if self._upstream:
            return None
        lost = Finding(failure=Failure(Extended.NO_REACHABLE_AUTHORITY, _AIR_GAPPED.format(host)))
        return lost, lost

    def _learn(self, entry: _Entry, findings: Findings, now: float) -> tuple[Standing, list[Note]]:
        before = entry.latest or Standing()
        v4, notes4 = self._family(entry, 0, findings[0], before.v4, now)
        v6, notes6 = self._family(entry, 1, findings[1], before.v6, now)
        there = {*v4.found, *v6.found}
        entry.refused = {address: why for address, why in entry.refused.items() if address in there}
        return _standing(v4, v6, findings, exists=before.exists), [*notes4, *notes6]

    def _family(
        self, entry: _Entry, number: int, finding: Finding, old: Family, now: float
    ) -> tuple[Family, list[Note]]:
        """One family after a look: new slots, none, or the last good ones."""
        if finding.failure is not None:
            good_at = entry.good_at[number]
            if good_at is None or schedule.is_stale_too_long(good_at=good_at, now=now):
                return Family(failure=finding.failure), []
            return replace(old, stale=old.slots != EMPTY and now >= good_at + entry.ttls[number]), []
        entry.good_at[number], entry.ttls[number] = now, finding.ttl
        host = entry.target.host
        good, refused = sift(finding.addresses, private=entry.target.private, own=self._own)
        notes = [_refused(host, address, kind) for address, kind in refused]
        if good:
            return _led(entry, Family(old.slots, found=good)), notes
        seen = ", ".join(f"{a} ({kind})" for a, kind in refused[:2])
        text = f"every address of {host} is refused: {seen}"
        return Family(failure=Failure(Extended.BLOCKED, text) if refused else None), notes

    def _reschedule(self, entry: _Entry, findings: Findings, now: float) -> None:
        failed = any(f.failure is not None for f in findings)
        entry.failures = entry.failures + 1 if failed else 0
        self._pace(entry, min(f.ttl for f in findings), now)

    def _pace(self, entry: _Entry, ttl: float, now: float) -> None:
        jitter = self._jitter()
        if entry.failures:
            self._at(entry, now + schedule.retry_after(entry.failures, jitter=jitter))
        else:
            self._at(entry, now + schedule.refresh_after(ttl, jitter=jitter))

    def _at(self, entry: _Entry, due: float) -> None:
        entry.due = due
        heapq.heappush(self._due, (due, entry.target))

    def _apply(self, entry: _Entry, fresh: Standing) -> list[Command]:
        """Propose what the kernel must know; settle at once what it need not."""
        if entry.proposed is not None:
            return []  # `admitted` or `withheld` comes back to it
        covered = entry.users <= entry.standing.users
        if covered and _same_way(fresh, entry.standing):
            changed = replace(fresh, users=entry.standing.users)
            if _same_answer(changed, entry.standing):
                return []
            entry.standing = changed
            return [Settled(entry.target)]
        return self._propose(entry, fresh)

    def _propose(self, entry: _Entry, standing: Standing) -> list[Command]:
        self._serial += 1
        entry.serial = self._serial
        entry.proposed = replace(standing, users=entry.users)
        return [Admit(entry.target, standing.v4.slots, standing.v6.slots, entry.serial)]


_AIR_GAPPED = "no upstream is configured and {} is not among the static hosts"


def _static_findings(known: Iterable[Address]) -> Findings:
    found = tuple(known)
    v4 = tuple(a for a in found if a.version == 4)
    v6 = tuple(a for a in found if a.version == 6)
    return Finding(v4, schedule.MAX_REFRESH), Finding(v6, schedule.MAX_REFRESH)


def _standing(v4: Family, v6: Family, findings: Findings, *, exists: bool) -> Standing:
    """What both families together say. One address in either makes the name known."""
    learnt = [f for f in findings if f.failure is None]
    ttl = min((f.ttl for f in learnt), default=schedule.MIN_REFRESH)
    if v4.slots != EMPTY or v6.slots != EMPTY:
        return Standing(State.KNOWN, v4, v6, ttl=ttl)
    if not (all(f.exists for f in learnt) if learnt else exists):
        return Standing(State.KNOWN, v4, v6, exists=False, ttl=ttl)
    failure = v4.failure or v6.failure
    if failure is not None:
        return Standing(State.FAILED, v4, v6, failure=failure)
    return Standing(State.KNOWN, v4, v6, ttl=ttl)


def _led(entry: _Entry, family: Family) -> Family:
    """The family without the addresses that the controller refuses; why, if none is left."""
    if not family.found:
        return family
    good = [address for address in family.found if address not in entry.refused]
    failure = None if good else _none_left(entry, family.found)
    return replace(family, slots=assign(family.slots, good)[0], failure=failure)


def _none_left(entry: _Entry, found: tuple[Address, ...]) -> Failure:
    whys = [entry.refused[address] for address in found]
    more = f"; and {len(whys) - 1} more" if len(whys) > 1 else ""
    text = f"every address of {entry.target.host} is refused: {whys[0]}{more}"
    return Failure(Extended.BLOCKED, text, Reason.RESIDENCY)


def _reassigned(entry: _Entry, standing: Standing) -> Standing:
    """The same once more: more or less of it is refused by now."""
    v4, v6 = _led(entry, standing.v4), _led(entry, standing.v6)
    fresh = replace(standing, v4=v4, v6=v6)
    if _has_way(fresh):
        return replace(fresh, state=State.KNOWN, failure=None)
    failure = v4.failure or v6.failure
    if standing.state is State.KNOWN and failure is not None:
        return replace(fresh, state=State.FAILED, failure=failure)
    return fresh


def _without(standing: Standing, refused: Mapping[Address, str]) -> Standing:
    """What the kernel has of it: a slot whose address is refused leads nowhere. If none leads anywhere, what
    can be said is still to come."""
    if not refused:
        return standing
    v4, v6 = (replace(family, slots=_masked(family.slots, refused)) for family in (standing.v4, standing.v6))
    fresh = replace(standing, v4=v4, v6=v6)
    return replace(fresh, state=State.PENDING) if _has_way(standing) and not _has_way(fresh) else fresh


def _masked(slots: Slots[Any], refused: Mapping[Address, str]) -> Slots[Any]:
    first, second, third, fourth = (None if address in refused else address for address in slots)
    return first, second, third, fourth


def _ways(standing: Standing) -> frozenset[Address]:
    return frozenset(a for a in (*standing.v4.slots, *standing.v6.slots) if a is not None)


def _has_way(standing: Standing) -> bool:
    return standing.v4.slots != EMPTY or standing.v6.slots != EMPTY


def _refused(host: str, address: Address, kind: AddressClass) -> Note:
    return Note("dns-refused-address", {"name": host, "address": str(address), "kind": kind.value})


def _same_way(one: Standing, other: Standing) -> bool:
    return (one.v4.slots, one.v6.slots) == (other.v4.slots, other.v6.slots)


def _same_answer(one: Standing, other: Standing) -> bool:
    return replace(one, ttl=0.0) == replace(other, ttl=0.0)
