"""Where names lead: the controller's knowledge of real addresses, and how it reaches the kernel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple, TypeAlias

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.model.errors import EgressdError
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Ech, HostRule, Policy, Verify
from egressd.ruleset.layout import SLOTS, Kind, Mark, Pools
from egressd.ruleset.plan import comment
from egressd.ruleset.wants import NatEntry

__all__ = ["Addresses", "Admitting", "Key", "Use", "batches", "names_of", "sites_of"]

Slots4: TypeAlias = tuple[IPv4Address | None, ...]
Slots6: TypeAlias = tuple[IPv6Address | None, ...]
Key: TypeAlias = tuple[str, bool, str]  # host, private, terms (see messages.NameTerms)
_BATCH = 512  # messages.SetNat's bound


class Use(NamedTuple):
    """Who uses a name: a rule of the workspace of this index, on these terms."""

    workspace: int
    block: int
    rule: HostRule
    terms: str = ""


@dataclass(slots=True)
class Addresses:
    """What each name resolved to, who uses the name, and what the kernel has acknowledged of it."""

    pools: Pools
    learned: dict[Key, tuple[Slots4, Slots6]] = field(default_factory=dict)
    _users: dict[Key, list[tuple[int, int]]] = field(default_factory=dict)  # (workspace index, block)
    _kernel: dict[tuple[int, str], NatEntry] = field(default_factory=dict)
    # Entries of a rule, made once per set of addresses: ten thousand names are eighty thousand of them, which
    # every change of any policy goes through.
    _made: dict[tuple[Key, tuple[int, int]], tuple[tuple[Slots4, Slots6], tuple[NatEntry, ...]]] = field(
        default_factory=dict
    )

    def learn(self, resolved: messages.Resolved) -> tuple[NatEntry, ...]:
        """Remember where a name leads; returns what has to change in the kernel."""
        key = (resolved.host, resolved.private, resolved.terms)
        self.learned[key] = (resolved.slots4, resolved.slots6)
        return tuple(self._missing(key, self._users.get(key, ())))

    def use(self, uses: Iterable[Use]) -> tuple[NatEntry, ...]:
        """The policy changed: these use names now. Returns what has to change in the kernel: ways of rules
        that are gone, or on other terms, are taken away, ways of new rules with known names are opened."""
        self._users = {}
        for index, block, rule, terms in uses:
            self._users.setdefault((rule.host, rule.private, terms), []).append((index, block))
        self.learned = {key: slots for key, slots in self.learned.items() if key in self._users}
        self._made = {
            (key, user): made
            for (key, user), made in self._made.items()
            if key in self.learned and user in self._users[key]
        }
        fresh = [e for key in self.learned for e in self._missing(key, self._users[key])]
        return (*self.superfluous(), *fresh)

    def superfluous(self) -> tuple[NatEntry, ...]:
        """What takes out of the kernel the ways that it has and nobody is to use."""
        wanted = {
            (entry.mark, entry.synthetic)
            for key in self.learned
            for user in self._users.get(key, ())
            for entry in self._entries(key, user)
        }
        return tuple(
            NatEntry(e.mark, e.synthetic, None, e.comment)
            for place, e in self._kernel.items()
            if place not in wanted
        )

    def join(
        self, user: tuple[int, int], rule: HostRule, slots: tuple[Slots4, Slots6], *, terms: str = ""
    ) -> tuple[tuple[NatEntry, ...], tuple[NatEntry, ...]]:
        """One more uses a name, which was just found there. Returns what has to change in the kernel: for
        `user` (workspace index, block), and for those who used the name before."""
        key = (rule.host, rule.private, terms)
        others = [each for each in self._users.get(key, ()) if each != user]
        self._users[key] = [*others, user]
        self.learned[key] = slots
        return tuple(self._missing(key, [user])), tuple(self._missing(key, others))

    def nowhere(self, user: tuple[int, int], rule: HostRule) -> tuple[NatEntry, ...]:
        """What takes each way of this one out of the kernel, whether it was acknowledged or not."""
        key = (rule.host, rule.private, "")
        return tuple(self._make(key, user, ((None,) * SLOTS, (None,) * SLOTS)))

    def leave(self, user: tuple[int, int], rule: HostRule, *, terms: str = "") -> None:
        """This one uses the name no more, and its ways are out of the kernel."""
        key = (rule.host, rule.private, terms)
        self.acknowledged(self.nowhere(user, rule))
        self._made.pop((key, user), None)
        left = [each for each in self._users.get(key, ()) if each != user]
        if left:
            self._users[key] = left
        else:
            self._users.pop(key, None)
            self.learned.pop(key, None)

    def acknowledged(self, entries: Iterable[NatEntry]) -> None:
        """The kernel now leads there."""
        for entry in entries:
            if entry.real is None:
                self._kernel.pop((entry.mark, entry.synthetic), None)
            else:
                self._kernel[entry.mark, entry.synthetic] = entry

    def entries(self) -> tuple[NatEntry, ...]:
        """Everything the kernel was told, for a warden that starts again."""
        return tuple(self._kernel.values())

    def users(self, key: Key) -> Sequence[tuple[int, int]]:
        """(workspace index, block) of each."""
        return self._users.get(key, ())

    def of(self, rule: HostRule, *, terms: str = "") -> list[str]:
        """The real addresses of a rule's name, each once, in slot order."""
        slots4, slots6 = self.learned.get((rule.host, rule.private, terms), ((), ()))
        return list(dict.fromkeys(str(a) for a in (*slots4, *slots6) if a is not None))

    def _missing(self, key: Key, users: Iterable[tuple[int, int]]) -> Iterable[NatEntry]:
        for user in users:
            for entry in self._entries(key, user):
                known = self._kernel.get((entry.mark, entry.synthetic))
                if (known.real if known else None) != entry.real:
                    yield entry

    def _entries(self, key: Key, user: tuple[int, int]) -> tuple[NatEntry, ...]:
        slots = self.learned[key]
        made = self._made.get((key, user))
        if made is None or made[0] != slots:
            made = self._made[key, user] = (slots, tuple(self._make(key, user, slots)))
        return made[1]

    def _make(self, key: Key, user: tuple[int, int], slots: tuple[Slots4, Slots6]) -> Iterable[NatEntry]:
        index, block = user
        mark = int(Mark(kind=Kind.FORWARD, workspace=index, block=block))
        for slot in range(SLOTS):
            for synthetic, real in zip(
                self.pools.synthetic(block, slot), (slots[0][slot], slots[1][slot]), strict=True
            ):
                yield NatEntry(mark, str(synthetic), None if real is None else str(real), comment(key[0]))


class Admitting:
    """Gathers changes that arrive together into few kernel batches; each waiter is told the truth.

    Ten thousand names resolving at once are some dozens of batches instead of ten thousand.
    """

    def __init__(
        self,
        write: Callable[[tuple[NatEntry, ...]], Awaitable[None]],
        done: Callable[[Iterable[NatEntry]], None],
    ) -> None:
        self._write, self._done = write, done
        self._queue: list[tuple[tuple[NatEntry, ...], asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def admit(self, entries: tuple[NatEntry, ...]) -> None:
        """Returns once the kernel has acknowledged every entry; raises what the warden said if not."""
        if not entries:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((entries, future))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        await future

    async def done(self) -> None:
        """Returns when nothing is under way of what was to be admitted up to now."""
        if self._flushing is not None:
            await asyncio.wait([self._flushing])

    async def _flush(self) -> None:
        while self._queue:
            batch, waiters = self._next_batch()
            try:
                for part in batches(batch):
                    await self._write(part)
                self._done(batch)
            except EgressdError as error:
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_exception(error)
            else:
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(None)

    def _next_batch(self) -> tuple[tuple[NatEntry, ...], list[asyncio.Future[None]]]:
        batch: dict[tuple[int, str], NatEntry] = {}
        waiters = []
        while self._queue and len(batch) < _BATCH:
            entries, future = self._queue.pop(0)
            batch.update({(entry.mark, entry.synthetic): entry for entry in entries})
            waiters.append(future)
        return tuple(batch.values()), waiters


def batches(entries: Sequence[NatEntry]) -> Iterator[tuple[NatEntry, ...]]:
    """In pieces that one message can carry."""
    return (tuple(entries[at : at + _BATCH]) for at in range(0, len(entries), _BATCH))


def names_of(
    policy: Policy,
    blocks: Mapping[str, int],
    granted: Iterable[tuple[HostRule, int]] = (),
    *,
    terms: Callable[[HostRule], str] = lambda _: "",
) -> WorkspaceNames:
    """What the resolver has to know of a workspace. `granted`: names of wildcards, with their blocks."""
    granted = list(granted)
    held = ((rule.host, terms(rule)) for rule in (*policy.hosts, *(rule for rule, _ in granted)))
    return WorkspaceNames(
        workspace=policy.workspace,
        guard=policy.holding.value,
        hosts={rule.host: (blocks[rule.key], rule.private) for rule in policy.hosts if not rule.wildcard},
        services={rule.service: blocks[rule.key] for rule in policy.locals},
        wildcards={rule.host: rule.private for rule in policy.hosts if rule.wildcard},
        granted={rule.host: (block, rule.private) for rule, block in granted},
        budgets=policy.wildcards,
        terms={host: text for host, text in held if text},
        barred={
            one.rule.host: (_word(one.reason), one.finding.text[:1024])
            for one in policy.barred
            if isinstance(one.rule, HostRule)
        },
    )


def _word(reason: Reason) -> Literal["residency", "local-only"]:
    return "local-only" if reason is Reason.LOCAL_ONLY else "residency"


def sites_of(policy: Policy, index: int, rules: Iterable[tuple[HostRule, int]]) -> Iterator[messages.Site]:
    """What the inspector has to know of these (rule, block) of a workspace: each port that it reads."""
    for rule, block in rules:
        for port, verify in policy.applied(rule).inspected:
            if verify is Verify.SNI:
                yield messages.Site(
                    workspace=policy.workspace,
                    index=index,
                    host=rule.host,
                    block=block,
                    port=port.number,
                    ech=rule.ech is Ech.ALLOW,
                    idle=policy.limits.idle,
                )
