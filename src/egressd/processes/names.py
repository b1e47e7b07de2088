"""Where names lead: the controller's knowledge of real addresses, and how it reaches the kernel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple, TypeAlias

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.ipc.peer import PeerGone
from egressd.model.addresses import objection
from egressd.model.errors import EgressdError, Refused
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Ech, HostRule, Policy, Verify
from egressd.ruleset.layout import SLOTS, Kind, Mark, Pools
from egressd.ruleset.wants import NatEntry, comment

__all__ = ["Addresses", "Admitting", "Key", "Use", "batches", "check_addresses", "names_of", "sites_of"]

Slots4: TypeAlias = tuple[IPv4Address | None, ...]
Slots6: TypeAlias = tuple[IPv6Address | None, ...]
Key: TypeAlias = tuple[str, bool, str]  # host, private, terms (see messages.NameTerms)
_Place: TypeAlias = tuple[int, str]  # mark, synthetic address
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
    noted: Callable[[Iterable[Key]], None] = lambda _: None  # told of each name that may lead elsewhere now
    learned: dict[Key, tuple[Slots4, Slots6]] = field(default_factory=dict)
    _users: dict[Key, list[tuple[int, int]]] = field(default_factory=dict)  # (workspace index, block)
    _kernel: dict[_Place, NatEntry] = field(default_factory=dict)
    # What was sent and not acknowledged, by the number of the last sending: it is on its way, or the warden
    # hung, and may do it yet. Should the policy change meanwhile, that must not be what stays.
    _doubtful: dict[_Place, int] = field(default_factory=dict)
    _sendings: int = 0
    # Entries of a rule, made once per set of addresses: ten thousand names are eighty thousand of them, which
    # every change of any policy goes through.
    _made: dict[tuple[Key, tuple[int, int]], tuple[tuple[Slots4, Slots6], tuple[NatEntry, ...]]] = field(
        default_factory=dict
    )

    def learn(self, resolved: messages.Resolved) -> tuple[NatEntry, ...]:
        """Remember where a name leads; returns what has to change in the kernel."""
        key = (resolved.host, resolved.private, resolved.terms)
        self._lead(key, (resolved.slots4, resolved.slots6))
        return tuple(self._missing(key, self._users.get(key, ())))

    def restore(self, learned: Mapping[Key, tuple[Slots4, Slots6]]) -> None:
        """Where names led, as a controller before this one knew; `use` says of which that matters."""
        self.learned = dict(learned)

    def _lead(self, key: Key, slots: tuple[Slots4, Slots6]) -> None:
        if self.learned.get(key) != slots:
            self.learned[key] = slots
            self.noted([key])

    def use(self, uses: Iterable[Use]) -> tuple[NatEntry, ...]:
        """The policy changed: these use names now. Returns what has to change in the kernel: ways of rules
        that are gone, or on other terms, are taken away, ways of new rules with known names are opened."""
        self._users = {}
        for index, block, rule, terms in uses:
            self._users.setdefault((rule.host, rule.private, terms), []).append((index, block))
        self.noted([key for key in self.learned if key not in self._users])
        self.learned = {key: slots for key, slots in self.learned.items() if key in self._users}
        self._made = {
            (key, user): made
            for (key, user), made in self._made.items()
            if key in self.learned and user in self._users[key]
        }
        return self.corrections()

    def corrections(self) -> tuple[NatEntry, ...]:
        """What has to change in the kernel, as far as is known of it: first what takes out ways that nobody
        is to use, then what opens or turns others."""
        fresh = [e for key in self.learned for e in self._missing(key, self._users.get(key, ()))]
        return (*self._superfluous(), *fresh)

    def everything(self) -> tuple[NatEntry, ...]:
        """For a warden that starts again, and keeps nothing that it is not told of."""
        ways = [entry for entry in self._wanted().values() if entry.real is not None]
        return (*self._superfluous(), *ways)

    @property
    def in_doubt(self) -> bool:
        """Is there anything of which nobody knows whether the kernel has it?"""
        return bool(self._doubtful)

    def _superfluous(self) -> Iterator[NatEntry]:
        wanted = self._wanted()
        for place in {**self._kernel, **self._doubtful}:
            if place not in wanted:
                known = self._kernel.get(place)
                yield NatEntry(*place, None, known.comment if known else "in doubt")

    def _wanted(self) -> dict[_Place, NatEntry]:
        return {
            (entry.mark, entry.synthetic): entry
            for key in self.learned
            for user in self._users.get(key, ())
            for entry in self._entries(key, user)
        }

    def join(
        self, user: tuple[int, int], rule: HostRule, slots: tuple[Slots4, Slots6], *, terms: str = ""
    ) -> tuple[tuple[NatEntry, ...], tuple[NatEntry, ...]]:
        """One more uses a name, which was just found there. Returns what has to change in the kernel: for
        `user` (workspace index, block), and for those who used the name before."""
        key = (rule.host, rule.private, terms)
        others = [each for each in self._users.get(key, ()) if each != user]
        self._users[key] = [*others, user]
        self._lead(key, slots)
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
            self.noted([key])

    def sending(self, entries: tuple[NatEntry, ...]) -> Callable[[], None]:
        """These are going to be sent, behind what was before. Returns what is to be called once the kernel
        has acknowledged them."""
        self._sendings += 1
        number = self._sendings
        places = [(entry.mark, entry.synthetic) for entry in entries]
        self._doubtful.update(dict.fromkeys(places, number))

        def done() -> None:
            for place in places:
                if self._doubtful.get(place) == number:  # else there is more on the way
                    del self._doubtful[place]
            self.acknowledged(entries)

        return done

    def acknowledged(self, entries: Iterable[NatEntry]) -> None:
        """The kernel now leads there."""
        for entry in entries:
            if entry.real is None:
                self._kernel.pop((entry.mark, entry.synthetic), None)
            else:
                self._kernel[entry.mark, entry.synthetic] = entry

    def entries(self) -> tuple[NatEntry, ...]:
        """Everything the kernel has acknowledged."""
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
                place = entry.mark, entry.synthetic
                known = self._kernel.get(place)
                if place in self._doubtful or (known.real if known else None) != entry.real:
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


@dataclass(slots=True)
class _Waiting:
    """Somebody who wants these ways, and what to call when they are there."""

    entries: tuple[NatEntry, ...]
    acknowledged: Callable[[], None]
    future: asyncio.Future[None]

    def succeed(self) -> None:
        self.acknowledged()
        if not self.future.done():
            self.future.set_result(None)

    def fail(self, error: EgressdError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Admitting:
    """Gathers changes that arrive together into few kernel batches; each waiter is told the truth.

    Ten thousand names resolving at once are some dozens of batches instead of ten thousand. One way that is
    refused fails a batch as a whole; then each waiter has one of its own, so that nobody can keep the ways of
    others open, or closed, by asking for what cannot be.
    """

    def __init__(
        self,
        write: Callable[[tuple[NatEntry, ...]], Awaitable[None]],
        sending: Callable[[tuple[NatEntry, ...]], Callable[[], None]],
    ) -> None:
        """`sending` is told of everything when it is queued, and returns what to call once it is done."""
        self._write, self._sending = write, sending
        self._queue: list[_Waiting] = []
        self._flushing: asyncio.Task[None] | None = None

    async def admit(self, entries: tuple[NatEntry, ...]) -> None:
        """Returns once the kernel has acknowledged every entry; raises what the warden said if not."""
        if not entries:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(entries, self._sending(entries), future))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        await future

    async def rest(self, within: float) -> None:
        """Returns when nothing is under way, and after so many seconds at the latest: there may always be
        something."""
        if self._flushing is not None:
            await asyncio.wait([self._flushing], timeout=within)

    async def _flush(self) -> None:
        while self._queue:
            waiting = self._next()
            try:
                await self._send(waiting)
            except PeerGone as error:
                for one in waiting:
                    one.fail(error)
            except EgressdError:
                await self._send_apart(waiting)

    async def _send_apart(self, waiting: Iterable[_Waiting]) -> None:
        for one in waiting:
            try:
                await self._send([one])
            except EgressdError as error:
                one.fail(error)

    async def _send(self, waiting: Sequence[_Waiting]) -> None:
        whole = {(entry.mark, entry.synthetic): entry for one in waiting for entry in one.entries}
        for part in batches(tuple(whole.values())):
            await self._write(part)
        for one in waiting:
            one.succeed()

    def _next(self) -> list[_Waiting]:
        waiting: list[_Waiting] = []
        places: set[_Place] = set()
        while self._queue and len(places) < _BATCH:
            waiting.append(self._queue.pop(0))
            places.update((entry.mark, entry.synthetic) for entry in waiting[-1].entries)
        return waiting


def batches(entries: Sequence[NatEntry]) -> Iterator[tuple[NatEntry, ...]]:
    """In pieces that one message can carry."""
    return (tuple(entries[at : at + _BATCH]) for at in range(0, len(entries), _BATCH))


def check_addresses(message: messages.Resolved | messages.GrantName, *, private: bool, pools: Pools) -> None:
    """Refused for what a resolver never shows (dns/sift.py), unless somebody has taken it over: addresses
    that no name may lead to. Among them are those that carry an IPv4 address, of which no table knows where
    they lead."""
    for address in (*message.slots4, *message.slots6):
        against = None if address is None else objection(address, private=private, own=pools.own)
        if against is not None:
            raise Refused(Reason.ADDRESS, f"{message.host} may not lead to {address} ({against})")


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
