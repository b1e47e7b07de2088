"""Residency while the daemon runs: to which addresses a name may lead, and what is cut when that changes.

The controller alone judges, by its registry (catalogue and tables of published prefixes). To the resolver it
gives *terms* with each name of a workspace that is pinned: a word that is another one whenever a decision may
be another, because the pin, the vouching, the catalogue or a table is. So a name under new terms is a new
name there: looked up again and shown here again; and its ways under the old terms go at once (`Addresses.use`
knows names by their terms, too). What is shown under terms that are not in force is led nowhere.

Ways concern new connections. Open ones are asked of the warden, judged one by one, and cut where the answer
is another now; those to addresses that still comply never notice.

What was found of each address is recorded before a name leads there, and remembered for as long as the terms
are in force: to be told once, counted and explained.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from egressd.ipc import messages
from egressd.ipc.peer import PeerGone
from egressd.model.addresses import Address
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.policy.compiled import HostRule, Policy
from egressd.processes.names import Key, Slots4, Slots6
from egressd.processes.registry_files import TABLES, read_registry
from egressd.residency.judge import Finding
from egressd.residency.places import Observation, Pin
from egressd.residency.registry import Registry
from egressd.ruleset.layout import Mark

if TYPE_CHECKING:
    from egressd.processes.controller import Controller

__all__ = ["Files", "Judged", "Residency", "evidence", "in_force", "tables_of"]

log = logging.getLogger("controller")

_REMEMBERED = 256  # addresses of one name under one set of terms
_NAMES = 16_384  # for which something is remembered; beyond that `why` knows less
_COUNTED = 1024  # of one row of a workspace: a rotating record is told again when there were more
_BATCH = 256  # messages.CutFlows' bound
_Row: TypeAlias = tuple[str, bool]  # host or pattern, refused
_Told: TypeAlias = tuple[str, str]  # host and address, terms
_LONGEST_CODES = 80  # characters; messages.NameTerms has 128


@dataclass(frozen=True, slots=True)
class _Held:
    """What stands behind terms."""

    pin: Pin
    vouched: bool


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found of an address that a name might lead to; `address` None: of the name itself."""

    address: Address | None
    finding: Finding
    seen: Observation | None
    since: float  # seconds since the epoch

    @property
    def refused(self) -> bool:
        return not self.finding.compliant


# ---- files


class Files:
    """The registry's files, read again when one of them is another: a hundred thousand prefixes take most of
    a second, and every change of a policy asks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: tuple[object, Registry] | None = None

    def read(self) -> Registry:
        """As `read_registry` does. Takes its time: not for the event loop."""
        state = _state_of(self._directory)  # first: what changes meanwhile is another state the next time
        if self._read is None or state is None or self._read[0] != state:
            self._read = state, read_registry(self._directory)
        return self._read[1]


def _state_of(directory: Path) -> object | None:
    """Another one whenever a file was replaced, written to, or had its rights changed; None: not known."""
    try:
        places = (directory, directory / TABLES)
        listed = [place for place in places if place.exists()]
        files = [entry for place in listed for entry in sorted(place.iterdir())]
        stats = [(str(path), path.lstat()) for path in (*listed, *files)]
    except OSError:
        return None
    return [(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]


def tables_of(registry: Registry) -> list[str]:
    """`aws@sha256:…`, one for each table of prefixes."""
    return [str(table) for table in registry.prefixes.names]


# ---- terms


class Residency:
    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._held: dict[str, _Held] = {"": _Held(Pin(), False)}
        self._terms: dict[str, dict[str, str]] = {}  # workspace -> host or pattern -> terms, where pinned
        self._judged: dict[Key, dict[Address | None, Judged]] = {}
        self._told: dict[str, dict[_Row, dict[_Told, None]]] = {}  # by workspace: what is on record
        self._names: dict[int, str] = {}  # index -> workspace
        self._known = ""  # digest of the registry in force
        self._uncut: set[str] = set()  # workspaces whose open connections are still to be judged
        self._hindered: dict[str, str] = {}  # of these: why they could not be, as it was told

    def stand(self, policies: Mapping[str, Policy], registry: Registry) -> None:
        """From now on these are in force. Who is pinned, and on other terms than before, is due for `cut`."""
        before, self._terms, self._held = self._terms, {}, {"": _Held(Pin(), False)}
        numbers = self._controller.remembered.allocation
        self._names = {index: name for name, index in numbers.workspaces.items()} if numbers else {}
        self._known = registry.digest
        for name, policy in policies.items():
            if policy.pin:
                self._held |= {_spelt(held, self._known): held for held in _both(policy)}
                self._terms[name] = {rule.host: self.terms(policy, rule) for rule in policy.hosts}
        for name, terms in self._terms.items():
            had = before.get(name, {})
            if any(had.get(host) != text for host, text in terms.items()):
                self._uncut.add(name)
        self._uncut &= self._terms.keys()

    def settle(self) -> None:
        """Names are used on these terms now: forget what was found on others, and tell who has come to use a
        name of which something was found already."""
        addresses = self._controller.addresses
        self._judged = {key: found for key, found in self._judged.items() if key[2] in self._held}
        self._told = {
            name: {row: _on_terms(told, self._terms[name].get(row[0])) for row, told in rows.items()}
            for name, rows in self._told.items()
            if name in self._terms
        }
        for key, found in self._judged.items():
            slots4, slots6 = addresses.learned.get(key, ((), ()))
            led = {*slots4, *slots6}
            self._tell(key, [one for one in found.values() if one.refused or one.address in led])

    def terms(self, policy: Policy, rule: HostRule) -> str:
        """Of a rule of a policy in force, or of a name that its wildcard covers; "" without a pin."""
        return in_force(policy, rule, self._known) if policy.pin else ""

    # ---- addresses

    def admit(self, message: messages.Resolved) -> tuple[messages.Resolved, dict[str, str]]:
        """What may be led of it, and what not: address -> why. Refused if its terms are not in force."""
        key = (message.host, message.private, message.terms)
        found = self._judge(key, message)
        self._remember(key, found)
        self._tell(key, found)
        return _without(message, found), _said(found)

    def admit_grant(
        self, message: messages.GrantName, policy: Policy, rule: HostRule
    ) -> tuple[messages.GrantName, dict[str, str]]:
        """The same for a name that this wildcard covers. Refused if nothing of it may be led."""
        key = (message.host, rule.private, self.terms(policy, rule))
        finding = self._controller.registry.judge_name(message.host, pin=policy.pin)
        found = [Judged(None, finding, None, time.time())]
        if finding.compliant:
            found = self._judge(key, message)
        self._remember(key, found)
        self._tell_one(policy.workspace, rule.host, key, found)
        led, refused = _without(message, found), [one for one in found if one.refused]
        if refused and (refused[0].address is None or not any((*led.slots4, *led.slots6))):
            raise Refused(Reason.RESIDENCY, refused[0].finding.text)
        return led, _said(found)

    def _judge(self, key: Key, message: messages.Resolved | messages.GrantName) -> list[Judged]:
        held = self._held.get(key[2])
        if held is None:
            raise Refused(Reason.RESIDENCY, "the terms of this name have changed; it is looked up again")
        if not held.pin:
            return []
        now, judge = time.time(), self._controller.registry.judge_address
        shown = dict.fromkeys(a for a in (*message.slots4, *message.slots6) if a is not None)
        return [Judged(a, *judge(a, pin=held.pin, vouched=held.vouched), now) for a in shown]

    # ---- telling

    def _remember(self, key: Key, judged: Iterable[Judged]) -> None:
        for one in judged:
            found = self._judged.setdefault(key, {})
            found.pop(one.address, None)
            found[one.address] = one
            while len(found) > _REMEMBERED:
                del found[next(iter(found))]
        while len(self._judged) > _NAMES:
            del self._judged[next(iter(self._judged))]

    def _tell(self, key: Key, judged: Sequence[Judged]) -> None:
        """To everybody who uses the name."""
        for index, _ in self._controller.addresses.users(key) if judged else ():
            workspace = self._names.get(index, "")
            grant = self._controller.grants.of(workspace).get(key[0])
            if workspace in self._controller.policies:
                self._tell_one(workspace, key[0] if grant is None else grant.wildcard, key, judged)

    def _tell_one(self, workspace: str, row: str, key: Key, judged: Iterable[Judged]) -> None:
        """Once for each workspace, host, address and terms. Names that sandboxes choose count under their
        pattern."""
        for one in judged:
            told = self._told.setdefault(workspace, {}).setdefault((row, one.refused), {})
            what = (f"{key[0]} {one.address}", key[2])
            if what not in told:
                told[what] = None
                event = "residency-refused" if one.refused else "residency-admitted"
                self._controller.auditing.record(event, self._facts(workspace, key[0], one))
            while len(told) > _COUNTED:
                del told[next(iter(told))]

    def placements(self, workspace: str) -> Iterator[Mapping[str, str]]:
        """Where each address is to which names lead now, as records: told again with each full snapshot,
        since a proof looks no further back."""
        policy, addresses = self._controller.policies.get(workspace), self._controller.addresses
        if policy is None or not policy.pin:
            return
        for _, rule in self._rules(policy).values():
            key = (rule.host, rule.private, self.terms(policy, rule))
            led = {address for slots in addresses.learned.get(key, ()) for address in slots}
            for one in self._judged.get(key, {}).values():
                if one.address in led and not one.refused:
                    yield self._facts(workspace, rule.host, one)

    def _facts(self, workspace: str, host: str, judged: Judged) -> dict[str, str]:
        policy, registry = self._controller.policies[workspace], self._controller.registry
        facts = {
            "workspace": workspace,
            "host": host,
            "address": "" if judged.address is None else str(judged.address),
            "code": judged.finding.code.value,
            "text": judged.finding.text,
            "declared": policy.declared(host, registry),
            "registry": self._known,
        }
        return facts | evidence(judged.seen)

    # ---- open connections

    @property
    def due(self) -> bool:
        """Is there anybody whose terms have changed since `cut`?"""
        return bool(self._uncut)

    async def cut(self) -> None:
        """End what is open to addresses that are refused by now. A workspace whose connections could not be
        judged is due again: soon (`Controller.make_good`), or when the warden is another."""
        for workspace in sorted(self._uncut):
            policy = self._controller.policies.get(workspace)
            try:
                if policy is not None:
                    await self._cut_of(policy)
            except (Refused, PeerGone) as error:
                text = f"open connections could not be judged anew: workspace {workspace}: {error}"
                if self._hindered.get(workspace) != str(error):
                    fields = {"workspace": workspace, "text": str(error)}
                    self._controller.alarm("flows-not-cut", text, fields)
                self._hindered[workspace] = str(error)
            else:
                self._uncut.discard(workspace)
                self._hindered.pop(workspace, None)

    async def _cut_of(self, policy: Policy) -> None:
        controller = self._controller
        warden = controller.peer("warden")
        request = messages.ReadFlows(request=warden.next_request(), workspace=policy.workspace)
        received = await warden.ask(request, timeout=30.0)
        flows = msgspec.json.decode(received.payload(), type=list[tuple[int, str]])
        over = list(self._no_longer(policy, flows))
        for at in range(0, len(over), _BATCH):
            part = over[at : at + _BATCH]
            message = messages.CutFlows(
                request=warden.next_request(),
                workspace=policy.workspace,
                flows=tuple((mark, address) for mark, address, _, _ in part),
            )
            await warden.ask(message, timeout=30.0)
            for _, address, host, finding in part:
                fields = {"workspace": policy.workspace, "host": host, "address": address}
                fields |= {"code": finding.code.value, "text": finding.text}
                controller.auditing.record("flows-cut", fields)

    def _no_longer(
        self, policy: Policy, flows: Iterable[tuple[int, str]]
    ) -> Iterator[tuple[int, str, str, Finding]]:
        """(mark, address, host, why) of those that may not be. Of a host that is gone, the guard lets nothing
        through any more."""
        rules = self._rules(policy)
        for mark, address in flows:
            host, rule = rules.get(Mark.of(mark).block, ("", None))
            if rule is None:
                continue
            finding, _ = self._controller.registry.judge_address(
                ip_address(address), pin=policy.pin, vouched=bool(rule.vouch)
            )
            if not finding.compliant:
                yield mark, address, host, finding

    def _rules(self, policy: Policy) -> dict[int, tuple[str, HostRule]]:
        """By block: each listed name, and each that is granted."""
        blocks = self._controller.blocks(policy.workspace)
        found = {blocks[rule.key]: (rule.host, rule) for rule in policy.hosts if not rule.wildcard}
        granted = self._controller.grants.rules(policy.workspace)
        return found | {block: (rule.host, rule) for rule, block in granted}

    # ---- showing

    def refusals(self, policy: Policy, rule: HostRule) -> Sequence[Judged]:
        """What is refused of a name, latest last. `rule`: its own, or its wildcard's with the name in it."""
        found = self._judged.get((rule.host, rule.private, self.terms(policy, rule)), {})
        return tuple(one for one in found.values() if one.refused)

    def addresses_refused(self, workspace: str) -> dict[str, int]:
        """Different addresses that were refused on the terms in force: host or pattern -> how many."""
        rows = self._told.get(workspace, {}).items()
        return {row: len(told) for (row, refused), told in sorted(rows) if refused and told}

    def document(self, policy: Policy) -> dict[str, Any] | None:
        """For `status`; None where residency has no say."""
        if not policy.pin:
            return None
        registry = self._controller.registry
        return {
            "jurisdictions": list(policy.pin.codes),
            "barred": len(policy.barred),
            "addresses_refused": sum(self.addresses_refused(policy.workspace).values()),
            "registry": registry.digest,
            "tables": tables_of(registry),
            "stale": [table.name for table in registry.prefixes.stale(datetime.now(UTC).date())],
            "broken": registry.broken or None,
        }


def evidence(seen: Observation | None) -> dict[str, str]:
    """In which prefix an address is, by whose table."""
    table = None if seen is None else seen.table
    return {
        "prefix": "" if seen is None else seen.prefix or "",
        "provider": "" if seen is None else seen.provider,
        "region": "" if seen is None else seen.region,
        "table": "" if table is None else table.name,
        "table_digest": "" if table is None else table.digest,
    }


def _on_terms(told: Iterable[_Told], terms: str | None) -> dict[_Told, None]:
    return {one: None for one in told if one[1] == terms}


def in_force(policy: Policy, rule: HostRule, registry: str) -> str:
    """The terms of a rule of a pinned policy, under the registry of this digest."""
    return _spelt(_Held(policy.pin, bool(rule.vouch)), registry)


def _both(policy: Policy) -> tuple[_Held, _Held]:
    return _Held(policy.pin, False), _Held(policy.pin, True)


def _spelt(held: _Held, registry: str) -> str:
    codes = "/".join(held.pin.codes)
    if len(codes) > _LONGEST_CODES:
        codes = hashlib.sha256(codes.encode()).hexdigest()[:32]
    return f"{codes}{' vouched' if held.vouched else ''} {registry.removeprefix('sha256:')[:16]}"


def _said(judged: Iterable[Judged]) -> dict[str, str]:
    return {str(one.address): one.finding.text[:4096] for one in judged if one.refused}


def _without(message: Any, judged: Iterable[Judged]) -> Any:
    """The message with nothing in the slots of what is refused."""
    gone = {one.address for one in judged if one.refused}
    if not gone:
        return message
    slots4: Slots4 = tuple(None if a in gone else a for a in message.slots4)
    slots6: Slots6 = tuple(None if a in gone else a for a in message.slots6)
    return msgspec.structs.replace(message, slots4=slots4, slots6=slots6)
