"""Names that wildcards cover: granted one by one, held while they are used, taken back.

The resolver asks (`GrantName`) when a name that a wildcard covers is asked for the first time and has an
address; it counts who uses the name, and gives it back (`ReleaseNames`). Here it is decided whether there is
such a wildcard, the name is numbered, and the kernel and the inspector are told:

    record name-granted -> warden: Grant (elements and ways, one batch) -> inspector: AddSites -> Granted

What fails on the way leaves nothing granted. Taking back goes the other way round in one respect: the kernel
is first again, so that nothing more is let through while flows are being closed. A change of policy does the
same for all names at once; a name whose wildcard is still there stays, under the rule as it is then.

What is held is on disk (remembered_names.py) before the kernel has it, so that a controller that starts again
holds it, too. It tells wardens, resolvers and inspectors, as it does those that start again themselves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from egressd.ipc import messages
from egressd.ipc.peer import PeerGone
from egressd.model.errors import EgressdError, PolicyError, Refused, Unfit
from egressd.model.identities import Link
from egressd.model.names import canonical
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Barred, HostRule, Policy
from egressd.policy.decide import governing, rule_for, written_among
from egressd.processes.names import check_addresses, sites_of
from egressd.processes.residency import in_force
from egressd.residency.registry import Registry
from egressd.ruleset import allocate, plan
from egressd.ruleset.layout import BLOCKS, SLOTS, Pools
from egressd.ruleset.wants import Element, WorkspaceWant, comment

if TYPE_CHECKING:
    from egressd.processes.controller import Controller

__all__ = ["Grant", "Granting", "Grants", "Held", "with_grants"]

log = logging.getLogger("controller")

_BATCH = 256  # elements, ways or sites in one message: of the longest names, half of what one may hold
_WAYS = 2 * SLOTS  # of one name, both families
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Grant:
    """One name. `rule` is the wildcard's, with the name in the place of its pattern."""

    workspace: str
    index: int
    rule: HostRule
    wildcard: str
    block: int
    since: float  # seconds since the epoch
    terms: str = ""  # see residency.py

    @property
    def host(self) -> str:
        return self.rule.host

    @property
    def user(self) -> tuple[int, int]:
        return self.index, self.block

    def elements(self, pools: Pools) -> tuple[Element, ...]:
        return plan.host_elements(self.rule, index=self.index, block=self.block, pools=pools)


Held: TypeAlias = dict[str, dict[str, Grant]]  # workspace -> name -> grant


class Grants:
    """What is held. Only `Granting` and a change of policy change it, under the controller's lock."""

    def __init__(self) -> None:
        self.held: Held = {}

    def of(self, workspace: str) -> Mapping[str, Grant]:
        return self.held.get(workspace, {})

    def all(self) -> Iterator[Grant]:
        return (grant for held in self.held.values() for grant in held.values())

    def rules(self, workspace: str) -> Iterator[tuple[HostRule, int]]:
        """(rule, block) of each name."""
        return ((grant.rule, grant.block) for grant in self.of(workspace).values())

    def add(self, grant: Grant) -> None:
        self.held.setdefault(grant.workspace, {})[grant.host] = grant

    def remove(self, grants: Iterable[Grant]) -> None:
        for grant in grants:
            self.held.get(grant.workspace, {}).pop(grant.host, None)

    def surviving(
        self, policies: Mapping[str, Policy], registry: Registry
    ) -> tuple[Held, list[tuple[Grant, str]]]:
        """Under these policies: what stays, each under the rule that governs it; and what goes, and why."""
        stays: Held = {}
        goes: list[tuple[Grant, str]] = []
        for workspace, held in self.held.items():
            policy = policies.get(workspace)
            rules = _applied(policy) if policy is not None else None
            crowded = policy is not None and len(policy.rules) + len(held) > BLOCKS - 2
            for grant in held.values():
                found = _governed(grant, rules)
                if policy is not None and isinstance(found, Grant):
                    found = _resident(found, policy, registry)
                if isinstance(found, str) or crowded:
                    goes.append((grant, found if isinstance(found, str) else "the rules need its number"))
                else:
                    stays.setdefault(workspace, {})[grant.host] = found
        return stays, goes

    def by_comment(self, workspace: str) -> dict[str, Grant]:
        """What the kernel calls the names of a workspace -> which they are."""
        return {comment(grant.host): grant for grant in self.of(workspace).values()}

    def pattern_of(self, workspace: str, said: str) -> str | None:
        """The wildcard under which the name with this comment is held. Linear: a name has gone."""
        for grant in self.of(workspace).values():
            if comment(grant.host) == said:
                return grant.wildcard
        return None


def _applied(policy: Policy) -> dict[str, HostRule | Barred]:
    """As they are applied; those that are barred as they are written."""
    return {
        host: policy.applied(rule) if isinstance(rule, HostRule) else rule
        for host, rule in governing(policy).items()
    }


def _governed(grant: Grant, rules: Mapping[str, HostRule | Barred] | None) -> Grant | str:
    """The grant under these host rules, or why there is none."""
    if rules is None:
        return "the workspace was removed"
    rule = written_among(rules, grant.host)
    if isinstance(rule, Barred):
        return f"{rule.rule.key} is barred: {rule.finding.text}"
    if rule is None:
        return "no wildcard covers it any more"
    if not rule.wildcard:
        return "it has a rule of its own now"
    if rule.private != grant.rule.private:
        return "where it may lead has changed"
    return replace(grant, rule=replace(rule, host=grant.host), wildcard=rule.host)


def _resident(grant: Grant, policy: Policy, registry: Registry) -> Grant | str:
    """The grant on the terms that hold now, or why there is none. Its addresses are judged when they are
    looked up on these terms."""
    if not policy.pin:
        return replace(grant, terms="")
    finding = registry.judge_name(grant.host, pin=policy.pin)
    if not finding.compliant:
        return finding.text
    return replace(grant, terms=in_force(policy, grant.rule, registry.digest))


def with_grants(wants: Mapping[str, WorkspaceWant], held: Held, pools: Pools) -> dict[str, WorkspaceWant]:
    """The wants, and the elements of what is held."""
    return {
        name: plan.with_elements(want, (e for grant in held[name].values() for e in grant.elements(pools)))
        if held.get(name)
        else want
        for name, want in wants.items()
    }


class Granting:
    """The work. Whoever calls holds `controller.changing`, so that the policy stays what it is meanwhile."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    # ---- granting

    async def grant(self, message: messages.GrantName) -> tuple[Grant, dict[str, str]]:
        """With the addresses to which it does not lead: address -> why. Refused or PeerGone if the name is
        not granted, and then nothing of it is."""
        controller = self._controller
        rule = self._rule(message)
        check_addresses(message, private=rule.private, pools=controller.pools)
        policy = controller.policies[message.workspace]
        message, refused = controller.residency.admit_grant(message, policy, rule)
        held = controller.grants.of(message.workspace).get(message.host)
        if held is not None:  # the resolver gave up waiting for us, and asks again
            slots = (message.slots4, message.slots6)
            ways = controller.addresses.join(held.user, held.rule, slots, terms=held.terms)
            await controller.admitting.admit((*ways[0], *ways[1]))
            return held, refused
        self._check_budget(message)
        grant = self._numbered(message, rule)
        controller.auditing.record("name-granted", _facts(grant, message))
        try:
            await self._admit(grant, message)
        except (EgressdError, OSError) as error:
            await self._undo(grant)
            self._record_released(grant, f"not granted: {error}")
            raise
        controller.grants.add(grant)
        return grant, refused

    def _rule(self, message: messages.GrantName) -> HostRule:
        """The wildcard's rule. Refused if there is none, or the asker is no sandbox of that workspace."""
        controller = self._controller
        if not controller.settled.is_set():
            raise Refused(Reason.UNAVAILABLE, "the warden has just started; try again in a moment")
        sandbox = controller.leases.by_link.get(Link(message.link))
        policy = controller.policies.get(message.workspace)
        if policy is None or sandbox is None or sandbox.workspace != message.workspace:
            raise Refused(Reason.WORKSPACE, f"link {message.link} is not in workspace {message.workspace}")
        rule = rule_for(policy, message.host) if _is_canonical(message.host) else None
        if rule is None or rule.host != message.wildcard or not rule.wildcard:
            raise Refused(Reason.NAME, f"{message.wildcard} of {message.workspace} does not cover this name")
        return policy.applied(rule)

    def _check_budget(self, message: messages.GrantName) -> None:
        """The resolver keeps the budget; this is what it cannot exceed should it be mistaken."""
        budget = self._controller.policies[message.workspace].wildcards.workspace.names
        if len(self._controller.grants.of(message.workspace)) >= budget:
            raise Refused(Reason.BUDGET_NAMES, f"workspace {message.workspace} holds {budget} names")

    def _numbered(self, message: messages.GrantName, rule: HostRule) -> Grant:
        remembered = self._controller.remembered
        assert remembered.allocation is not None
        try:
            remembered.allocation, block = allocate.take(
                remembered.allocation, message.workspace, message.host
            )
        except PolicyError as error:
            raise Refused(Reason.LIMIT, str(error)) from error
        return Grant(
            workspace=message.workspace,
            index=remembered.allocation.workspaces[message.workspace],
            rule=replace(rule, host=message.host),
            wildcard=rule.host,
            block=block,
            since=time.time(),
            terms=self._controller.residency.terms(self._controller.policies[message.workspace], rule),
        )

    async def _admit(self, grant: Grant, message: messages.GrantName) -> None:
        """The kernel, then the inspector. Names shared with others lead there for them as well."""
        controller = self._controller
        slots = (message.slots4, message.slots6)
        own, others = controller.addresses.join(grant.user, grant.rule, slots, terms=grant.terms)
        controller.names_file.note_grant(grant, held=True)
        controller.save_names()  # first: what the kernel has, the next controller must know of
        warden = controller.peer("warden")
        for number, elements in enumerate(_parts(grant.elements(controller.pools))):
            await warden.ask(
                messages.Grant(
                    request=warden.next_request(),
                    workspace=grant.workspace,
                    elements=elements,
                    entries=() if number else own,
                )
            )
        controller.addresses.acknowledged(own)
        if others:
            controller.background(controller.admitting.admit(others), f"leading {grant.host} elsewhere")
        await self._tell_inspector([grant], messages.AddSites)

    async def _undo(self, grant: Grant) -> None:
        """Nothing of it may stay. A warden that is gone is not told of it when it comes back."""
        try:
            await self._withdraw_from_kernel([grant])
            await self._tell_inspector([grant], messages.RemoveSites)
        except (EgressdError, OSError) as error:
            log.warning("%s, which was not granted, could not be withdrawn: %s", grant.host, error)
        self._forget([grant])

    # ---- taking back

    async def release(self, message: messages.ReleaseNames) -> None:
        """Take names back that nobody uses. Names that are not held are not worth an error."""
        held = self._controller.grants.of(message.workspace)
        await self.withdraw([held[host] for host in message.hosts if host in held], "nobody used it any more")

    async def abandon(self, message: messages.GrantName) -> None:
        """The resolver that asked for this name is gone, and did not hear that it was granted."""
        held = self._controller.grants.of(message.workspace).get(message.host)
        await self.withdraw([held] if held is not None else [], "the resolver was gone when it was granted")

    async def withdraw(self, grants: Sequence[Grant], why: str) -> None:
        """From the kernel, from the inspector, from the table. Refused if the kernel keeps them."""
        if not grants:
            return
        try:
            await self._withdraw_from_kernel(grants)
        except PeerGone:
            log.warning("the warden is gone; the next one is not told of %d names", len(grants))
        await self._tell_inspector(grants, messages.RemoveSites)
        self._controller.grants.remove(grants)
        self._forget(grants)
        for grant in grants:
            self._record_released(grant, why)

    async def _withdraw_from_kernel(self, grants: Sequence[Grant]) -> None:
        controller = self._controller
        warden = controller.peers["warden"]
        if warden is None:
            return  # the next one is not told of them
        for workspace, group in _batches(grants, controller.pools):
            elements = [e for grant in group for e in grant.elements(controller.pools)]
            ways = [e for grant in group for e in controller.addresses.nowhere(grant.user, grant.rule)]
            for number, part in enumerate(_parts(elements)):
                await warden.ask(
                    messages.Withdraw(
                        request=warden.next_request(),
                        workspace=workspace,
                        elements=part,
                        entries=() if number else tuple(ways),
                    )
                )

    def _forget(self, grants: Sequence[Grant]) -> None:
        """Where they led, and their numbers, which are the last to be given to others."""
        controller = self._controller
        for grant in grants:
            controller.addresses.leave(grant.user, grant.rule, terms=grant.terms)
            controller.names_file.note_grant(grant, held=False)
        for workspace in {grant.workspace for grant in grants}:
            assert controller.remembered.allocation is not None
            hosts = [grant.host for grant in grants if grant.workspace == workspace]
            controller.remembered.allocation = allocate.give_back(
                controller.remembered.allocation, workspace, hosts
            )
        controller.save_names()

    # ---- both

    async def _tell_inspector(
        self, grants: Sequence[Grant], kind: type[messages.AddSites] | type[messages.RemoveSites]
    ) -> None:
        """One that is gone is told of everything when it comes back; until then these connections are
        refused by the kernel."""
        controller = self._controller
        sites = [
            site
            for grant in grants
            for site in sites_of(
                controller.policies[grant.workspace], grant.index, [(grant.rule, grant.block)]
            )
        ]
        inspector = controller.peers["inspector"]
        try:
            for part in _parts(sites) if inspector is not None else ():
                assert inspector is not None
                await inspector.ask(kind(request=inspector.next_request(), sites=part))
        except PeerGone as error:
            log.warning("the inspector will be told later: %s", error)

    def record_gone(self, goes: Iterable[tuple[Grant, str]]) -> None:
        """A change of policy has taken them."""
        for grant, why in goes:
            self._controller.names_file.note_grant(grant, held=False)
            self._record_released(grant, why)

    def _record_released(self, grant: Grant, why: str) -> None:
        fields: dict[str, str | float] = {
            "workspace": grant.workspace,
            "name": grant.host,
            "wildcard": grant.wildcard,
            "seconds": round(max(0.0, time.time() - grant.since), 3),
            "text": why,
        }
        self._controller.auditing.record("name-released", fields)


def _is_canonical(host: str) -> bool:
    try:
        return canonical(host) == host
    except Unfit:
        return False


def _facts(grant: Grant, message: messages.GrantName) -> dict[str, str | int]:
    leads = dict.fromkeys(str(a) for a in (*message.slots4, *message.slots6) if a is not None)
    return {
        "workspace": grant.workspace,
        "link": Link(message.link).device,
        "name": grant.host,
        "wildcard": grant.wildcard,
        "ports": " ".join(map(str, grant.rule.ports)),
        "addresses": " ".join(leads),
    }


def _parts(items: Sequence[T]) -> Iterator[tuple[T, ...]]:
    return (tuple(items[at : at + _BATCH]) for at in range(0, len(items), _BATCH))


def _batches(grants: Sequence[Grant], pools: Pools) -> Iterator[tuple[str, list[Grant]]]:
    """By workspace, in groups whose elements and ways one message can carry."""
    for workspace in dict.fromkeys(grant.workspace for grant in grants):
        group: list[Grant] = []
        elements = 0
        for grant in (grant for grant in grants if grant.workspace == workspace):
            more = len(grant.elements(pools))
            if group and (elements + more > _BATCH or len(group) >= _BATCH // _WAYS):
                yield workspace, group
                group, elements = [], 0
            group.append(grant)
            elements += more
        yield workspace, group
