"""All that is answered from, in one place: lists, names kept fresh, names of wildcards. No I/O, no clock.

The owner tells what happens and does the commands that come back, which are those of the two machines
inside (keeper.py, wildcards.py) as far as somebody else must act:

    keeper.Ask, wildcards.Ask       look both families up, then `found` or `looked`
    keeper.Admit                    record, tell the controller, then `admitted` or `withheld`
    wildcards.Grant                 record, ask the controller, then `granted`, `refused` or `barred`
    wildcards.Release               tell the controller, then `released` or `kept`
    keeper.Settled                  forget what is cached about the target; who waits for it may ask again
    wildcards.Settled               who waits for it may ask again
    Note                            record
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from egressd.dns import keeper, replies, wildcards
from egressd.dns.budgets import Spent
from egressd.dns.keeper import Findings, Keeper, Note, Target, User
from egressd.dns.replies import Extended, Reply
from egressd.dns.table import (
    Covered,
    Decision,
    Denied,
    Forward,
    Pools,
    Table,
    Wait,
    WorkspaceNames,
    answer,
    failed,
    unlisted,
    users_of,
)
from egressd.dns.wildcards import Absent, Failed, Pending, Wildcards
from egressd.dns.wire import Query
from egressd.model.addresses import Address, Network
from egressd.policy.compiled import Guard

__all__ = ["Book", "Command"]

_MAX_NEGATIVE_TTL = 60.0  # seconds
_NONE: Mapping[Address, str] = {}
Command: TypeAlias = (
    keeper.Ask
    | keeper.Admit
    | keeper.Settled
    | wildcards.Ask
    | wildcards.Grant
    | wildcards.Release
    | wildcards.Settled
    | Note
)


class Book:
    """`own`, `static`, `upstream` and `jitter` are the keeper's. Times are seconds of one monotonic clock."""

    def __init__(
        self,
        *,
        pools: Pools,
        own: Sequence[Network] = (),
        static: Mapping[str, tuple[Address, ...]] | None = None,
        upstream: bool = True,
        jitter: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.pools = pools
        self.keeper = Keeper(own=own, static=static, upstream=upstream, jitter=jitter)
        self.wildcards = Wildcards()
        self.tables: dict[str, Table] = {}
        self.links: dict[int, str] = {}  # sandboxes -> workspace

    def next_due(self) -> float | None:
        """When `tick` has something to do."""
        times = [t for t in (self.keeper.next_due(), self.wildcards.next_due()) if t is not None]
        return min(times, default=None)

    # ---- the controller's side

    def set_names(self, listed: Iterable[WorkspaceNames], *, now: float) -> list[Command]:
        """The names of every workspace from now on."""
        tables = {names.workspace: Table.of(names, self.pools) for names in listed}
        commands = self._carry_out(self.wildcards.keep_only(tables), now)
        for table in tables.values():
            commands += self._list_wildcards(table, now)
        self.tables = tables
        for workspace, table in tables.items():
            for host, (block, private, terms) in self.wildcards.granted_in(workspace).items():
                table.grant(host, block, private=private, terms=terms)
        return [*commands, *self.keeper.set_users(users_of(tables), now=now)]

    def _list_wildcards(self, table: Table, now: float) -> list[Command]:
        names = table.names
        commands = self.wildcards.set_list(
            table.workspace,
            wildcards=names.wildcards,
            budgets=names.budgets,
            granted=names.granted,
            exact=frozenset(names.hosts) | frozenset(names.services) | frozenset(names.barred),
            now=now,
            terms=names.terms,
        )
        return self._carry_out(commands, now)

    def new_controller(self) -> list[Command]:
        """It is told the slots. Which names are granted it says with the next list (`set_names`): those that
        it does not hold go then; what sandboxes have spent of their budgets stays spent."""
        return [*self.keeper.readmit()]

    def began(self, link: int, workspace: str) -> None:
        self.links[link] = workspace

    def ended(self, link: int, *, now: float) -> list[Command]:
        self.links.pop(link, None)
        return self._carry_out(self.wildcards.ended(link, now=now), now)

    def admitted(
        self, target: Target, serial: int, *, refused: Mapping[Address, str] = _NONE
    ) -> list[Command]:
        return [*self.keeper.admitted(target, serial, refused=refused)]

    def withheld(self, target: Target, serial: int, text: str, *, now: float) -> list[Command]:
        return [*self.keeper.withheld(target, serial, text, now=now)]

    def granted(
        self, grant: wildcards.Grant, block: int, *, now: float, refused: Mapping[Address, str] = _NONE
    ) -> list[Command]:
        found = self.wildcards.granted(
            grant.workspace, grant.host, grant.serial, block, now=now, refused=refused
        )
        return self._carry_out(found, now)

    def barred(self, grant: wildcards.Grant, text: str, *, now: float) -> list[Command]:
        found = self.wildcards.barred(grant.workspace, grant.host, grant.serial, text, now=now)
        return self._carry_out(found, now)

    def refused(self, grant: wildcards.Grant, text: str, *, now: float) -> list[Command]:
        found = self.wildcards.withheld(grant.workspace, grant.host, grant.serial, text, now=now)
        return self._carry_out(found, now)

    def released(self, release: wildcards.Release, *, now: float) -> list[Command]:
        return self._carry_out(self.wildcards.released(release.workspace, release.hosts), now)

    def kept(self, release: wildcards.Release, *, now: float) -> list[Command]:
        return self._carry_out(self.wildcards.kept(release.workspace, release.hosts, now=now), now)

    # ---- upstream's side

    def tick(self, *, now: float) -> list[Command]:
        return [*self.keeper.tick(now=now), *self._carry_out(self.wildcards.tick(now=now), now)]

    def found(self, target: Target, findings: Findings, *, now: float) -> list[Command]:
        return [*self.keeper.found(target, findings, now=now)]

    def looked(self, ask: wildcards.Ask, findings: Findings, *, now: float) -> list[Command]:
        standing, notes = self.keeper.judge(_target(ask), findings, now=now)
        found = self.wildcards.looked(ask.workspace, ask.host, ask.serial, standing, now=now)
        return [*notes, *self._carry_out(found, now)]

    # ---- the sandboxes' side

    def answer(
        self, link: int, workspace: str, query: Query, *, now: float
    ) -> tuple[Decision, list[Command]]:
        """What to do about a query of ordinary class and type; never `Covered`."""
        table = self.tables.get(workspace)
        if table is None:
            return replies.failure(Extended.NOT_READY, f"workspace {workspace} has no list of names"), []
        decision = answer(table, query, self.keeper.standing)
        if isinstance(decision, Covered):
            return self._of_wildcard(table, link, query, decision, now)
        if query.name in table.granted:
            self.wildcards.used(workspace, link, query.name)
        elif isinstance(decision, Reply) and not decision.shared:
            return self._of_other_type(workspace, query.name, decision, now), []
        return decision, []

    def _of_wildcard(
        self, table: Table, link: int, query: Query, covered: Covered, now: float
    ) -> tuple[Decision, list[Command]]:
        if self.links.get(link) != table.workspace:  # it ended while it waited
            return replies.refused("the sandbox has ended"), []
        verdict, found = self.wildcards.asked(table.workspace, link, covered.host, covered.cover, now=now)
        commands = self._carry_out(found, now)
        match verdict:
            case Pending() if self.wildcards.is_pending(verdict):
                return Wait(verdict), commands
            case Pending():  # what needed no question upstream is settled by now
                decision, more = self.answer(link, table.workspace, query, now=now)
                return decision, [*commands, *more]
            case Spent():
                return _refused(table, query, verdict), commands
            case _:
                return _failed_or_absent(table, verdict), commands

    def _of_other_type(self, workspace: str, name: str, reply: Reply, now: float) -> Reply:
        known = self.wildcards.recall(workspace, name, now=now)
        return _not_there(known) if isinstance(known, Absent) and not known.exists else reply

    # ---- inside

    def _carry_out(self, commands: Iterable[wildcards.Command], now: float) -> list[Command]:
        """Do what concerns table and keeper; the rest is the owner's."""
        left: list[Command] = []
        for command in commands:
            match command:
                case wildcards.Admitted():
                    left += self._admit(command)
                case wildcards.Dropped():
                    left += self._drop(command)
                case wildcards.Ask():
                    left += self._ask(command, now)
                case _:
                    left.append(command)
        return left

    def _admit(self, admitted: wildcards.Admitted) -> list[Command]:
        table = self.tables.get(admitted.workspace)
        if table is None:
            return []
        table.grant(admitted.host, admitted.block, private=admitted.private, terms=admitted.terms)
        user = User(admitted.workspace, admitted.block)
        found = self.keeper.adopt(
            _target(admitted), user, admitted.standing, seen=admitted.seen, refused=admitted.refused
        )
        return [*found]

    def _drop(self, dropped: wildcards.Dropped) -> list[Command]:
        table = self.tables.get(dropped.workspace)
        if table is not None:
            table.release(dropped.host)
        user = User(dropped.workspace, dropped.block)
        return [*self.keeper.leave(_target(dropped), user)]

    def _ask(self, ask: wildcards.Ask, now: float) -> list[Command]:
        """Upstream is asked only for what nobody here knows."""
        known = self.keeper.shortcut(_target(ask), now=now)
        if known is None:
            return [ask]
        found = self.wildcards.looked(ask.workspace, ask.host, ask.serial, known, now=now)
        return self._carry_out(found, now)


def _refused(table: Table, query: Query, spent: Spent) -> Decision:
    """An open guard restricts nothing: there the name is one like those that no rule has."""
    if Guard(table.names.guard) is not Guard.ENFORCE:
        decision = unlisted(table, query)
        return replace(decision, reason=spent.reason) if isinstance(decision, Forward) else decision
    return Denied(replace(replies.blocked(f"{query.name}: {spent.text}"), shared=False), spent.reason)


def _target(name: wildcards.Ask | wildcards.Admitted | wildcards.Dropped) -> Target:
    return Target(name.host, name.private, name.terms)


def _failed_or_absent(table: Table, verdict: Absent | Failed) -> Decision:
    if isinstance(verdict, Failed) and verdict.failure.reason is not None:
        return failed(table, verdict.failure)
    return _not_there(verdict)


def _not_there(outcome: Absent | Failed) -> Reply:
    if isinstance(outcome, Failed):
        return replace(replies.failure(outcome.failure.code, outcome.failure.text), shared=False)
    ttl = int(min(outcome.ttl, _MAX_NEGATIVE_TTL))
    found = replies.no_data(ttl=ttl) if outcome.exists else replies.no_name(ttl=ttl)
    return replace(found, shared=False)
