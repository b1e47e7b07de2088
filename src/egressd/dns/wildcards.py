"""Names that only a wildcard covers: from the first question to the last answer, without I/O and clock.

Theory of operation. A workspace's list has patterns beside its names. A name that a pattern covers is
looked up and granted when a sandbox first asks for it, and answered only once the controller says that the
kernel admits it: record, then admit, then answer. The owner tells what happens (`asked`, `looked`,
`granted`, `withheld`, `released`, `ended`, `tick`) and does what is returned.

    asked --budget--> asking --no address--> absent | failed, remembered for a while
                         \\--addresses--> queued --room--> granting --Failed--> failed, remembered
                                                               \\--Granted--> granted
    granting --all its addresses refused--> granting, with others that were found, as long as there are any
    granted --last sandbox that asked for it has ended--> lingers --600 s, or its room is needed-->
            releasing --Done--> gone

Who asks while a name is under way waits for the same outcome; what is granted or remembered costs no
budget and nothing upstream. Every table belongs to one workspace and is bounded, so no tenant can push
another's names out: names held by the workspace's budget, remembered ones by `REMEMBERED`.

The list may change while the controller is asked. Whether its answer was given before or after that cannot
be known here, so it is asked again (granting twice gives the same block); a name that is covered no longer
is given back as soon as it is granted.
"""

from __future__ import annotations

import collections
import enum
import heapq
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeAlias

from egressd.dns.budgets import Account, Spent
from egressd.dns.keeper import Note, Standing, State
from egressd.dns.replies import Extended, Failure
from egressd.dns.slots import EMPTY, assign
from egressd.model.addresses import Address
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Budgets

__all__ = [
    "Absent", "Admitted", "Ask", "Command", "Cover", "Dropped", "Failed", "Grant", "Patterns", "Pending",
    "Release", "Settled", "Verdict", "Wildcards",
]  # fmt: skip

LINGER = 600.0  # seconds that a name stays granted when the sandboxes that asked for it have ended
INHERITED = 86_400.0  # seconds, for what was granted before this process began: its users are unknown
REMEMBERED = 1024  # absent and failed names of a workspace
_SHORTEST, _LONGEST = 5.0, 3600.0  # seconds that an absence is remembered, whatever its TTL
_FAILED, _WITHHELD = 5.0, 1.0  # seconds; RFC 9520 section 3.2 wants one at least
_BATCH = 256  # names of one Release
# Host names only (RFC 1123 section 2.1): what is granted becomes a kernel element's comment and a journal
# line, and the rest of DNS, such as an underscore's service labels, has no addresses to connect to.
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_MAX_NAME = 253


# ---- patterns


@dataclass(frozen=True, slots=True)
class Cover:
    """The most specific wildcard that covers a name, whether it may resolve into private ranges, and its
    terms (see keeper.Target). `chosen` is how many bytes of the name the asker chose: the labels in front of
    the wildcard's base."""

    pattern: str
    private: bool
    chosen: int
    terms: str = ""


class Patterns:
    """A workspace's wildcards by their base, so that a name costs a look per label, not per wildcard.

    The longest base decides; of `*.x` and `**.x` the first, which covers less."""

    def __init__(
        self, wildcards: Mapping[str, bool], terms: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._terms = terms
        self._single = {p.removeprefix("*."): private for p, private in wildcards.items() if p[1] == "."}
        self._deep = {p.removeprefix("**."): private for p, private in wildcards.items() if p[1] == "*"}

    def match(self, name: str) -> Cover | None:
        """The wildcard that covers a canonical name; None too for what is no host name."""
        if not self._single and not self._deep:
            return None
        labels = name.split(".")
        if len(name) > _MAX_NAME or not all(map(_LABEL.fullmatch, labels)):
            return None
        base = name
        for number, label in enumerate(labels[:-1]):
            base = base[len(label) + 1 :]
            chosen = len(name) - len(base) - 1
            if number == 0 and base in self._single:
                return self._cover(f"*.{base}", self._single[base], chosen)
            if base in self._deep:
                return self._cover(f"**.{base}", self._deep[base], chosen)
        return None

    def _cover(self, pattern: str, private: bool, chosen: int) -> Cover:
        return Cover(pattern, private, chosen, self._terms.get(pattern, ""))


# ---- verdicts


@dataclass(frozen=True, slots=True)
class Pending:
    """It is under way; `Settled` comes when there is something to say."""

    workspace: str
    host: str


@dataclass(frozen=True, slots=True)
class Absent:
    """There is no such name, or it has no address. `ttl` is in seconds from now."""

    exists: bool
    ttl: float


@dataclass(frozen=True, slots=True)
class Failed:
    failure: Failure


Verdict: TypeAlias = Pending | Absent | Failed | Spent


# ---- commands


@dataclass(frozen=True, slots=True)
class Ask:
    """Look up both families and report with `looked`, naming `serial`."""

    workspace: str
    host: str
    private: bool
    serial: int
    terms: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """Record it, have it admitted; report with `granted`, `withheld` or `barred`, naming `serial`."""

    workspace: str
    link: int
    host: str
    wildcard: str
    standing: Standing
    serial: int


@dataclass(frozen=True, slots=True)
class Release:
    """Give these back; report with `released` or `kept`."""

    workspace: str
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Admitted:
    """Answer this name from now on. `standing` is as it was looked up, `seen` when; the kernel leads there,
    but for what is `refused`: address -> why."""

    workspace: str
    host: str
    block: int
    private: bool
    standing: Standing
    seen: float
    terms: str = ""
    refused: Mapping[Address, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dropped:
    """Answer this name no more."""

    workspace: str
    host: str
    block: int
    private: bool
    terms: str = ""


@dataclass(frozen=True, slots=True)
class Settled:
    """Whoever waits for it may ask again."""

    name: Pending


Command: TypeAlias = Ask | Grant | Release | Admitted | Dropped | Settled | Note


# ---- the machine


class Stage(enum.Enum):
    ASKING = "asking"
    QUEUED = "queued"  # until there is room: one that is being given back still takes it
    GRANTING = "granting"
    GRANTED = "granted"
    RELEASING = "releasing"


@dataclass(slots=True)
class _Name:
    host: str
    cover: Cover
    serial: int
    stage: Stage = Stage.ASKING
    users: set[int] = field(default_factory=set)  # links
    standing: Standing = field(default_factory=Standing)
    seen: float = 0.0
    block: int = 0
    until: float | None = None  # when it is given back, while it lingers
    again: bool = False  # the list changed while the controller was asked
    doomed: bool = False  # and does not cover it any more
    refused: dict[Address, str] = field(default_factory=dict)  # by the controller, of those found, and why


@dataclass(frozen=True, slots=True)
class _Memory:
    outcome: Absent | Failed
    until: float


@dataclass(slots=True)
class _Space:
    """One workspace."""

    workspace: str
    account: Account
    wildcards: tuple[dict[str, bool], dict[str, str]] = ({}, {})  # `private` and terms of each
    patterns: Patterns = field(default_factory=lambda: Patterns({}))
    names: dict[str, _Name] = field(default_factory=dict)
    lingering: dict[str, None] = field(default_factory=dict)  # unused for longest first
    queue: collections.deque[str] = field(default_factory=collections.deque)
    counts: collections.Counter[Stage] = field(default_factory=collections.Counter)
    remembered: dict[str, _Memory] = field(default_factory=dict)  # oldest first

    def add(self, name: _Name) -> None:
        self.names[name.host] = name
        self.counts[name.stage] += 1

    def move(self, name: _Name, stage: Stage) -> None:
        self.counts[name.stage] -= 1
        name.stage = stage
        self.counts[stage] += 1

    def remove(self, name: _Name) -> None:
        self.counts[name.stage] -= 1
        del self.names[name.host]
        self.lingering.pop(name.host, None)

    @property
    def held(self) -> int:
        """What the budget of names counts."""
        return len(self.names) - self.counts[Stage.RELEASING]

    @property
    def occupied(self) -> int:
        """What the controller has, or may have."""
        return self.counts[Stage.GRANTING] + self.counts[Stage.GRANTED] + self.counts[Stage.RELEASING]

    def pending(self, host: str) -> Pending:
        return Pending(self.workspace, host)


class Wildcards:
    """All workspaces. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._spaces: dict[str, _Space] = {}
        self._due: list[tuple[float, str, str]] = []
        self._serial = 0

    def sizes(self, workspace: str) -> dict[str, int]:
        """How full its tables are: held, remembered, queue, sandboxes."""
        space = self._spaces.get(workspace)
        if space is None:
            return {}
        return {
            "held": space.held,
            "remembered": len(space.remembered),
            "queue": len(space.queue),
            "sandboxes": len(space.account),
        }

    def granted_in(self, workspace: str) -> dict[str, tuple[int, bool, str]]:
        """Names that may be answered, each with its block, whether it may be private, and its terms."""
        space = self._spaces.get(workspace)
        names = space.names.values() if space else ()
        return {n.host: (n.block, n.cover.private, n.cover.terms) for n in names if n.stage is Stage.GRANTED}

    def is_pending(self, name: Pending) -> bool:
        """Whether it is under way, one way or the other."""
        space = self._spaces.get(name.workspace)
        found = space.names.get(name.host) if space else None
        return found is not None and found.stage is not Stage.GRANTED

    def next_due(self) -> float | None:
        """When `tick` has something to do."""
        while self._due and not self._is_current(*self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    # ---- what happens

    def set_list(
        self,
        workspace: str,
        *,
        wildcards: Mapping[str, bool],
        budgets: Budgets,
        granted: Mapping[str, tuple[int, bool]],
        exact: Container[str],
        now: float,
        terms: Mapping[str, str] = MappingProxyType({}),
    ) -> list[Command]:
        """The workspace's policy. `granted` is what the controller has granted already, `exact` are names
        that are listed themselves, which no wildcard covers; `terms` are those of wildcards."""
        space = self._spaces.get(workspace)
        if space is None:
            space = self._spaces[workspace] = _Space(workspace, Account(budgets, now=now))
        space.account.change(budgets, now=now)
        listed = dict(wildcards), {p: terms[p] for p in wildcards if p in terms}
        if space.wildcards != listed:
            space.wildcards, space.patterns = listed, Patterns(*listed)
            space.remembered.clear()  # with `private` or the terms, what was refused may have changed
        commands: list[Command] = []
        for name in list(space.names.values()):
            cover = None if name.host in exact else space.patterns.match(name.host)
            commands += self._review(space, name, cover, granted.get(name.host))
        for host, (block, private) in granted.items():
            cover = None if host in exact else space.patterns.match(host)
            if host not in space.names and cover is not None and cover.private == private:
                commands += self._restore(space, host, cover, block, now)
        return [*commands, *self._advance(space)]

    def keep_only(self, workspaces: Container[str]) -> list[Command]:
        """Forget the others: their policies are gone."""
        commands: list[Command] = []
        for workspace in [w for w in self._spaces if w not in workspaces]:
            commands += self._empty(self._spaces.pop(workspace))
        return commands

    def asked(
        self, workspace: str, link: int, host: str, cover: Cover, *, now: float
    ) -> tuple[Verdict, list[Command]]:
        """A sandbox asks for the addresses of a name that is covered and not granted yet."""
        space = self._spaces[workspace]
        name = space.names.get(host)
        if name is not None:
            if name.stage is not Stage.RELEASING:
                name.users.add(link)
            return space.pending(host), []
        memory = space.remembered.get(host)
        if memory is not None and now < memory.until:
            return _remembered(memory, now), []
        return self._begin(space, link, host, cover, now)

    def used(self, workspace: str, link: int, host: str) -> None:
        """A sandbox was told the addresses of a granted name."""
        space = self._spaces.get(workspace)
        name = space.names.get(host) if space else None
        if space is not None and name is not None and name.stage is Stage.GRANTED:
            name.users.add(link)
            name.until = None
            space.lingering.pop(host, None)

    def recall(self, workspace: str, host: str, *, now: float) -> Absent | Failed | None:
        """What is remembered of a name, for questions that need no address."""
        space = self._spaces.get(workspace)
        memory = space.remembered.get(host) if space else None
        return _remembered(memory, now) if memory is not None and now < memory.until else None

    def looked(
        self, workspace: str, host: str, serial: int, standing: Standing, *, now: float
    ) -> list[Command]:
        """Upstream has answered, or not."""
        space, name = self._find(workspace, host, Stage.ASKING, serial)
        if space is None or name is None:
            return []
        if not name.users:  # they have all ended
            space.remove(name)
            return [Settled(space.pending(host))]
        if standing.state is not State.KNOWN or not _has_address(standing):
            return self._remember(space, name, _outcome(standing), _period(standing), now)
        name.standing, name.seen = standing, now
        space.move(name, Stage.QUEUED)
        space.queue.append(host)
        return self._advance(space)

    def granted(
        self,
        workspace: str,
        host: str,
        serial: int,
        block: int,
        *,
        now: float,
        refused: Mapping[Address, str] = MappingProxyType({}),
    ) -> list[Command]:
        """The kernel admits it and leads there, but for what is `refused`."""
        space, name = self._find(workspace, host, Stage.GRANTING, serial)
        if space is None or name is None:
            return []
        name.block = block
        if name.doomed:
            return [*self._release(space, [name]), Settled(space.pending(host))]
        if name.again:
            name.again, name.refused = False, {}
            return [self._grant(space, name)]
        space.move(name, Stage.GRANTED)
        self._linger(space, name, now)
        cover, against = name.cover, {**name.refused, **refused}
        commands: list[Command] = [
            Admitted(workspace, host, block, cover.private, name.standing, name.seen, cover.terms, against)
        ]
        name.standing, name.refused = Standing(), {}
        return [*commands, Settled(space.pending(host))]

    def withheld(self, workspace: str, host: str, serial: int, text: str, *, now: float) -> list[Command]:
        """It is not admitted; nothing is granted."""
        space, name = self._find(workspace, host, Stage.GRANTING, serial)
        if space is None or name is None:
            return []
        failure = Failure(Extended.NOT_READY, f"{host} is not admitted: {text}")
        note = Note("dns-withheld", {"name": host, "workspace": workspace, "reason": text})
        return [note, *self._fail(space, name, Failed(failure), _WITHHELD, now)]

    def barred(self, workspace: str, host: str, serial: int, text: str, *, now: float) -> list[Command]:
        """It is not admitted, because of where it is, or every address of it that was shown. If more were
        found, they are shown next; a name may have more than fit into its slots."""
        space, name = self._find(workspace, host, Stage.GRANTING, serial)
        if space is None or name is None:
            return []
        if name.again and not name.doomed:  # which list was that about?
            name.again, name.refused = False, {}
            return [self._grant(space, name)]
        shown = (*name.standing.v4.slots, *name.standing.v6.slots)
        name.refused |= {address: text for address in shown if address is not None}
        left = _others(name.standing, name.refused)
        if _has_address(left) and not name.doomed:
            name.standing = left
            return [self._grant(space, name)]
        failure = Failure(Extended.BLOCKED, f"{host} is refused: {text}", Reason.RESIDENCY)
        period = _period(replace(name.standing, failure=failure))
        return self._fail(space, name, Failed(failure), period, now)

    def released(self, workspace: str, hosts: Iterable[str]) -> list[Command]:
        """The controller has taken them back."""
        space = self._spaces.get(workspace)
        if space is None:
            return []
        commands: list[Command] = []
        for host in hosts:
            name = space.names.get(host)
            if name is not None and name.stage is Stage.RELEASING:
                space.remove(name)
                commands.append(Settled(space.pending(host)))
        return [*commands, *self._advance(space)]

    def kept(self, workspace: str, hosts: Iterable[str], *, now: float) -> list[Command]:
        """It has not taken them back. They are not answered any more; tried again after a while."""
        space = self._spaces.get(workspace)
        for host in hosts:
            name = space.names.get(host) if space else None
            if space is not None and name is not None and name.stage is Stage.RELEASING:
                self._end_at(space, name, now + LINGER)
        return []

    def ended(self, link: int, *, now: float) -> list[Command]:
        """The sandbox is over: its budgets are forgotten, names that only it used begin to linger."""
        for space in self._spaces.values():
            space.account.close(link)
            for name in space.names.values():
                if link in name.users:
                    name.users.discard(link)
                    if name.stage is Stage.GRANTED:
                        self._linger(space, name, now)
        return []

    def tick(self, *, now: float) -> list[Command]:
        """Give back what has lingered long enough."""
        over: dict[str, list[_Name]] = {}
        while self._due and self._due[0][0] <= now:
            due = heapq.heappop(self._due)
            if self._is_current(*due):
                over.setdefault(due[1], []).append(self._spaces[due[1]].names[due[2]])
        commands: list[Command] = []
        for workspace, names in over.items():
            commands += self._release(self._spaces[workspace], names)
        return commands

    # ---- inside

    def _is_current(self, due: float, workspace: str, host: str) -> bool:
        space = self._spaces.get(workspace)
        name = space.names.get(host) if space else None
        return name is not None and name.until == due

    def _find(
        self, workspace: str, host: str, stage: Stage, serial: int
    ) -> tuple[_Space | None, _Name | None]:
        space = self._spaces.get(workspace)
        name = space.names.get(host) if space else None
        if name is None or name.stage is not stage or name.serial != serial:
            return space, None
        return space, name

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _begin(
        self, space: _Space, link: int, host: str, cover: Cover, now: float
    ) -> tuple[Verdict, list[Command]]:
        oldest = next(iter(space.lingering), None)
        makes_room = oldest is not None and space.held >= space.account.budgets.workspace.names
        held = space.held - makes_room
        spent = space.account.charge(link, host, cover.chosen, held=held, now=now)
        if spent is not None:
            return spent, []
        commands: list[Command] = []
        if makes_room and oldest is not None:
            commands += self._release(space, [space.names[oldest]])
        space.remembered.pop(host, None)
        name = _Name(host, cover, self._next_serial(), users={link})
        space.add(name)
        commands.append(Ask(space.workspace, host, cover.private, name.serial, cover.terms))
        return space.pending(host), commands

    def _advance(self, space: _Space) -> list[Command]:
        """Have granted what waits for room."""
        commands: list[Command] = []
        while space.queue and space.occupied < space.account.budgets.workspace.names:
            name = space.names.get(space.queue.popleft())
            if name is None or name.stage is not Stage.QUEUED:
                continue
            if not name.users:
                space.remove(name)
                commands.append(Settled(space.pending(name.host)))
                continue
            space.move(name, Stage.GRANTING)
            commands.append(self._grant(space, name))
        return commands

    def _grant(self, space: _Space, name: _Name) -> Grant:
        name.serial = self._next_serial()
        # Of several the one that came first; none is left only where the list changed meanwhile.
        link = min(name.users, default=0)
        return Grant(space.workspace, link, name.host, name.cover.pattern, name.standing, name.serial)

    def _review(
        self, space: _Space, name: _Name, cover: Cover | None, listed: tuple[int, bool] | None
    ) -> list[Command]:
        """What a new list means for a name that is under way or granted. One that is granted goes on under
        other terms, by which the keeper looks it up and shows it to the controller again."""
        same = cover is not None and cover.private == name.cover.private
        match name.stage:
            case Stage.GRANTED if not same or listed != (name.block, name.cover.private):
                return self._drop(space, name)
            case Stage.RELEASING if listed is None:
                space.remove(name)
                return [Settled(space.pending(name.host))]
            case Stage.GRANTING:
                name.again, name.doomed = True, not same
            case Stage.ASKING | Stage.QUEUED if not same:
                space.remove(name)
                return [Settled(space.pending(name.host))]
        if same and cover is not None:
            name.cover = cover
        return []

    def _restore(self, space: _Space, host: str, cover: Cover, block: int, now: float) -> list[Command]:
        """Granted before this process knew of it. Sandboxes may hold its addresses without asking again."""
        name = _Name(host, cover, self._next_serial(), stage=Stage.GRANTED, block=block)
        space.add(name)
        space.remembered.pop(host, None)
        self._linger(space, name, now, INHERITED)
        return [Settled(space.pending(host))]

    def _drop(self, space: _Space, name: _Name) -> list[Command]:
        space.remove(name)
        dropped = _dropped(space, name)
        return [dropped, Settled(space.pending(name.host))]

    def _empty(self, space: _Space) -> list[Command]:
        commands: list[Command] = []
        for name in list(space.names.values()):
            if name.stage is Stage.GRANTED:
                commands += self._drop(space, name)
            else:
                space.remove(name)
                commands.append(Settled(space.pending(name.host)))
        space.queue.clear()
        space.account.close_all()
        return commands

    def _linger(self, space: _Space, name: _Name, now: float, period: float = LINGER) -> None:
        if not name.users:
            space.lingering[name.host] = None
            self._end_at(space, name, now + period)

    def _end_at(self, space: _Space, name: _Name, until: float) -> None:
        name.until = until
        heapq.heappush(self._due, (until, space.workspace, name.host))

    def _release(self, space: _Space, names: list[_Name]) -> list[Command]:
        commands: list[Command] = []
        for name in names:
            if name.stage is Stage.GRANTED:
                commands.append(_dropped(space, name))
            space.move(name, Stage.RELEASING)
            space.lingering.pop(name.host, None)
            name.until = None
        hosts = [name.host for name in names]
        for at in range(0, len(hosts), _BATCH):
            commands.append(Release(space.workspace, tuple(hosts[at : at + _BATCH])))
        return commands

    def _fail(self, space: _Space, name: _Name, outcome: Failed, period: float, now: float) -> list[Command]:
        """Not granted; but where it was asked for twice, the first answer may have been that it is."""
        if name.block:
            return [*self._release(space, [name]), Settled(space.pending(name.host))]
        return [*self._remember(space, name, outcome, period, now), *self._advance(space)]

    def _remember(
        self, space: _Space, name: _Name, outcome: Absent | Failed, period: float, now: float
    ) -> list[Command]:
        space.remove(name)
        while len(space.remembered) >= REMEMBERED:
            del space.remembered[next(iter(space.remembered))]
        space.remembered[name.host] = _Memory(outcome, now + period)
        return [Settled(space.pending(name.host))]


def _dropped(space: _Space, name: _Name) -> Dropped:
    return Dropped(space.workspace, name.host, name.block, name.cover.private, name.cover.terms)


def _others(standing: Standing, refused: Container[Address]) -> Standing:
    """With the addresses that were found beside these."""
    v4, v6 = (
        replace(family, slots=assign(EMPTY, [a for a in family.found if a not in refused])[0])
        for family in (standing.v4, standing.v6)
    )
    return replace(standing, v4=v4, v6=v6)


def _remembered(memory: _Memory, now: float) -> Absent | Failed:
    if isinstance(memory.outcome, Failed):
        return memory.outcome
    return Absent(memory.outcome.exists, memory.until - now)


def _has_address(standing: Standing) -> bool:
    return standing.v4.slots != EMPTY or standing.v6.slots != EMPTY


def _outcome(standing: Standing) -> Absent | Failed:
    if standing.state is State.FAILED and standing.failure is not None:
        return Failed(standing.failure)
    return Absent(standing.exists, standing.ttl)


def _period(standing: Standing) -> float:
    """How long it is remembered. A refused address is an answer; no answer is tried again soon."""
    answered = standing.failure is None or standing.failure.code == Extended.BLOCKED
    return min(max(standing.ttl, _SHORTEST), _LONGEST) if answered else _FAILED
