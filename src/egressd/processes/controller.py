"""The controller: compiles policy, keeps the sandbox table, decides who may spawn where.

It holds no right over the kernel. What it wants, it asks of the warden in typed messages; what the warden
has not acknowledged has not happened. The order of every grant is *record, then admit, then answer*.

What holds `changing` happens one after the other: a change of policy, a name of a wildcard granted or taken
back, another process brought up to date. Sandboxes come and go beside that.

Sandboxes outlive it, however it ends, unless it is told to stop. Leases, books and names are on disk before
the kernel has what they speak of (leases_file.py, remembered.py, remembered_names.py); the next controller
keeps the links of all of them, and each sandbox's broker comes back for its own (`resume`).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Container, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.ipc.channel import Channel, Received
from egressd.ipc.peer import Peer, PeerGone
from egressd.model.errors import EgressdError, PolicyError, Problem, ProtocolError, Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.policy import barring, diff
from egressd.policy.compiled import Policy
from egressd.policy.decide import rule_for
from egressd.processes import evidence, names, reports, ritual
from egressd.processes.control import MAX_CLIENTS_PER_USER, ControlSocket
from egressd.processes.ended_links import EndedLinks
from egressd.processes.grants import Grant, Granting, Grants, Held, with_grants
from egressd.processes.leases import Leases, LinkNumbers, Sandbox
from egressd.processes.leases_file import LeaseFiles, Lost, gateway_identity
from egressd.processes.members import Caller
from egressd.processes.name_blocks import NameTelling
from egressd.processes.registry_files import builtin_catalogue
from egressd.processes.remembered import Account, Remembered, Retiring
from egressd.processes.remembered_names import NamesFile
from egressd.processes.residency import Files, Residency, tables_of
from egressd.processes.snapshots import Snapshots
from egressd.processes.testifying import Said
from egressd.processes.turns import Turns
from egressd.processes.workspaces import broken_workspaces, public_suffixes, read_workspaces
from egressd.residency.registry import Registry
from egressd.ruleset import allocate, plan
from egressd.ruleset.books import Books
from egressd.ruleset.observe import Counters, LinkCounts, Tally
from egressd.ruleset.wants import NatEntry, WorkspaceWant

__all__ = ["Controller", "main"]

log = logging.getLogger("controller")

_BOOKS_EVERY, _DRIFT_EVERY = 5.0, 60.0  # seconds
_GONE = "its link was gone when it was looked for"
_UNKEPT = {Reason.NAMESPACE: _GONE, Reason.WORKSPACE: "its workspace is gone"}
_SHARE = (
    50  # reading holds the warden up, half a second with 10,000 hosts: at most this part of its time, each
)
_UNBOUND_WITHIN = 1.0  # seconds
_LINK_WITHIN = 25.0  # seconds: all that is listed meanwhile may take ten; a broker waits for thirty
_CLOSINGS_AT_ONCE = 8  # asked of the warden; of a thousand that end together the last would be out of time
_READINGS_AT_ONCE = 2  # of links: each may keep the warden for 10 ms (links.Links.spent), and others wait
RESUME_GRACE = 15.0  # seconds from listening in which sandboxes of a controller before may be resumed
_HEARD_AFTER, _HEARD_AT_ONCE = 0.2, 512  # seconds; messages.Heard's bound
_TOLD_WITHIN = 0.5  # seconds for the auditor to hear whose links there are; it may hang
_REPLIES = (
    messages.Done, messages.Failed, messages.Payload, messages.LinkClosed, messages.LinkSpent,
    messages.RefusedNames, messages.RefusedFlows, messages.JournalState,
)  # fmt: skip
_SERVING = ("resolver", "relay", "inspector")  # who has to know which source address is whose sandbox
# Sets that all workspaces share, and what their elements count.
_SHARED_SETS: Mapping[str, Retiring] = {"in": "replies", "opened": "opened"}
Totals = dict[str, tuple[int, int]]


@dataclass(slots=True, eq=False)
class Away:
    """A lease that a controller before this one gave, and that nobody has come back for yet."""

    sandbox: Sandbox
    said: Said
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Controller:
    """State and the decisions over it. The control socket (control.py) is where clients come in."""

    def __init__(self, start: ritual.Start) -> None:
        self.config = start.config
        self.pools = start.config.pools.pools()
        self.auditing = ritual.Auditing.over("controller", start.take("audit"))
        self.boot, self.began = evidence.boot_id(), time.monotonic()
        self.policies: dict[str, Policy] = {}
        self.problems: list[Problem] = []
        self.wants: dict[str, WorkspaceWant] = {}
        self.registry = Registry()  # what the policies in force were judged by
        self.residency = Residency(self)
        self._registry_files = Files(Path(self.config.residency_dir))
        own = Path(self.config.run_dir, "controller")
        self.names_file = NamesFile(own)
        self.addresses = names.Addresses(self.pools, self.names_file.note_names)
        self.grants = Grants()
        self._granting = Granting(self)
        self.snapshots = Snapshots(self)
        self.naming = NameTelling(self)
        self.lease_files = LeaseFiles(
            own / "leases", boot=self.boot, gateway=gateway_identity(self.config.gateway)
        )
        self.leases = Leases(self.pools, LinkNumbers(own / "next-link"))
        self._closers = asyncio.Semaphore(_CLOSINGS_AT_ONCE)
        self._readings = Turns("readings", at_once=_READINGS_AT_ONCE, most=MAX_CLIENTS_PER_USER)
        self.remembered = Remembered(own)
        self.remembered.load()
        self.processes: tuple[messages.ProcessState, ...] = ()
        self.alarms: collections.deque[tuple[float, str]] = collections.deque(maxlen=100)
        self.since = time.time()
        self.drifted: list[str] = []  # of the ruleset as read back, from the compiled policy
        self.drift_read: float | None = None  # when, Unix time
        self.ended = EndedLinks(own / "ended.jsonl")
        self.ended.load()
        self.away: dict[Link, Away] = {}
        self.peers: dict[str, Peer | None] = dict.fromkeys(("warden", *_SERVING, "evidence", "custodian"))
        self.settled = asyncio.Event()  # the warden enforces what we last said
        self.changing = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._next_reading: asyncio.Future[Counters] | None = None
        self._closing: dict[Link, _Closing] = {}
        self._telling = False  # the warden, which of its reports are in the books
        self._purged = False  # books of workspaces that went while there was no controller
        self._unbalanced = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.admitting = names.Admitting(self._set_nat, self.addresses.sending)
        self.control: ControlSocket | None = None

    # ---- the other processes

    def connect(self, name: str, sock: Any) -> None:
        """A channel to a process that has just started, or started again: bring it up to date."""
        old = self.peers.get(name)
        if old is not None:
            old.close("replaced")
        bring_up = {
            "warden": self._warden_came,
            "resolver": self._resolver_came,
            "relay": self._relay_came,
            "inspector": self._inspector_came,
            "evidence": self._evidence_came,
            "custodian": self._custodian_came,
        }
        receives = {
            "warden": messages.FROM_WARDEN,
            "resolver": messages.FROM_RESOLVER,
            "relay": messages.FROM_RELAY,
            "inspector": messages.FROM_INSPECTOR,
            "evidence": messages.FROM_EVIDENCE,
            "custodian": messages.FROM_CUSTODIAN,
        }[name]
        handler = {
            "warden": self._from_warden,
            "resolver": self._from_resolver,
            "custodian": self._from_custodian,
        }.get(name, _unexpected)
        peer = Peer(
            sock, receives, handler=handler, gone=lambda peer, why: self._lost(name, peer), replies=_REPLIES
        )
        self.peers[name] = peer
        self.background(bring_up[name](), f"bringing the {name} up to date")

    def _lost(self, name: str, peer: Peer) -> None:
        if self.peers.get(name) is peer:
            self.peers[name] = None
            if name == "warden":
                self.settled.clear()

    def peer(self, name: str) -> Peer:
        found = self.peers[name]
        if found is None:
            process = "auditor" if name == "evidence" else name
            raise Refused(Reason.UNAVAILABLE, f"the {process} is not running; it is being started again")
        return found

    def background(self, work: Coroutine[Any, Any, Any], what: str) -> None:
        """Run without waiting; a failure is logged and nothing is granted by it."""

        async def guarded() -> None:
            try:
                await work
            except (EgressdError, OSError) as error:
                log.error("%s: %s", what, error)  # noqa: TRY400 -- the text says it; a traceback helps nobody

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _warden_came(self) -> None:
        self.snapshots.begin_anew()
        async with self.changing:
            warden = self.peer("warden")
            await self._tell_heard(again=True)
            await self._set_workspaces(with_grants(self.wants, self.grants.held, self.pools))
            await self._keep_links(warden)
            # as names are known by now, behind whatever is under way already
            await self.admitting.admit(self.addresses.everything())
            await warden.ask(messages.Settle(request=warden.next_request()))
            self._purge_accounts()
            await self.residency.cut()
            self.settled.set()

    async def _keep_links(self, warden: Peer) -> None:
        """Of every lease. One that cannot be kept is closed, and says why; one that was being closed when the
        warden went is closed now."""
        for sandbox in list(self.leases.by_link.values()):
            closing = self._closing.pop(sandbox.link, None)
            if closing is not None:
                await self.close(sandbox, event=closing.event, why=closing.why)
                continue
            try:
                await warden.ask(_keep(warden, sandbox))
            except Refused as refused:
                why = _UNKEPT.get(refused.reason, str(refused)[:256])
                await self._end(sandbox, why)

    async def _end(self, sandbox: Sandbox, why: str) -> None:
        """Close it, and tell its broker, if there is one."""
        if self.control is not None:
            await self.control.revoke(sandbox, why, why=why)
        else:
            await self.close(sandbox, why=why)

    # Sources first: what these three serve at the moment they are told the rest is confirmed, or ends.

    async def _resolver_came(self) -> None:
        await self._bind_all("resolver")
        async with self.changing:
            await self._set_names()

    async def _relay_came(self) -> None:
        await self._bind_all("relay")
        await self._set_relays()

    async def _inspector_came(self) -> None:
        await self._bind_all("inspector")
        async with self.changing:
            await self._set_sites()

    async def _evidence_came(self) -> None:
        """Nothing to say: it is asked."""

    async def _custodian_came(self) -> None:
        """Nothing to say: it tells."""

    def _from_custodian(self, peer: Peer, received: Received[messages.HostMended]) -> None:
        message = received.message
        self.alarm(
            "host-mended",
            f"the host's side was changed by {message.process or 'somebody'}: {_shortened(message.what)}"
            f" ({'put right' if message.restored else 'NOT put right'})",
            {"what": message.what, "restored": message.restored, "by": message.process},
        )

    def auditor_came(self, sock: socket.socket) -> None:
        """Another auditor: it has to know whose links there are, and what the blocks are called. What was on
        its way to the one before may be lost."""
        self.auditing.connect(sock)
        for sandbox in list(self.leases.by_link.values()):
            self.auditing.pass_on(_bind(1, sandbox))
        self.snapshots.distrust()
        self.tell_names()

    def tell_names(self) -> None:
        self.background(self.naming.tell_all(), "telling the auditor which names there are")

    async def _bind_all(self, name: str) -> None:
        peer = self.peer(name)
        for sandbox in list(self.leases.by_link.values()):
            if sandbox.link in self.leases.by_link and sandbox.link not in self._closing:
                await peer.ask(_bind(peer.next_request(), sandbox))

    def _from_warden(self, peer: Peer, received: Received[Any]) -> None:
        message = received.message
        if not self._is_news(message.report):
            return
        if isinstance(message, messages.Tampered):
            self.alarm(
                "tampered",
                f"the gateway was changed by {message.process or 'somebody else'}: {_shortened(message.what)}"
                f" ({'restored' if message.restored else 'NOT restored'})",
                {"what": message.what, "restored": message.restored, "by": message.process},
            )
            self._retire_lost(message.lost)
            self.background(self._reopen_books(), "reopening the books")
        elif isinstance(message, messages.LinkLost):
            self._link_lost(message)
        elif isinstance(message, messages.Retired):
            self._retire(message)

    def _is_news(self, report: int) -> bool:
        """Is this not in the books yet? It is from now on: whoever asks saves them next."""
        if not report:
            return True
        if report in self.remembered.heard:
            return False
        self.remembered.heard.add(report)
        if not self._telling:
            self._telling = True
            self.background(self._tell_heard_soon(), "telling the warden what is in the books")
        return True

    async def _tell_heard_soon(self) -> None:
        try:
            await asyncio.sleep(_HEARD_AFTER)
        finally:
            self._telling = False
        if self.peers["warden"] is not None and self.remembered.heard:
            await self._tell_heard()

    async def _tell_heard(self, *, again: bool = False) -> None:
        """What is in the books on disk need not be told again; with `again`, the rest is."""
        warden = self.peer("warden")
        left = sorted(self.remembered.heard)
        for at in range(0, len(left) or 1, _HEARD_AT_ONCE):
            part = tuple(left[at : at + _HEARD_AT_ONCE])
            last = at + _HEARD_AT_ONCE >= len(left)
            message = messages.Heard(request=warden.next_request(), reports=part, again=again and last)
            await warden.ask(message, timeout=30.0)
            self.remembered.heard.difference_update(part)

    def _purge_accounts(self) -> None:
        """A workspace that went while there was no controller is out of the books as one that goes later."""
        if not self._purged:
            self._purged = True
            for name in self.remembered.accounts.keys() - self.policies.keys():
                self._close_account(name)

    def _retire_lost(self, lost: Totals) -> None:
        """Elements somebody deleted, by "acme_out4 host" or "in acme host": back at zero, but their last
        counters are known."""
        for key, (packets, octets) in lost.items():
            name, _, host = key.partition(" ")
            workspace, kind = name.rpartition("_")[0], _SHARED_SETS.get(name, "retired")
            if name in _SHARED_SETS:
                workspace, _, host = host.partition(" ")
            if workspace in self.policies:
                self._retire_one(workspace, kind, host, Tally(packets, octets))
        self.remembered.save_books()

    def _retire_one(self, workspace: str, kind: Retiring, host: str, last: Tally) -> None:
        self.remembered.account(workspace).retire(kind, self._row(workspace, host), last)
        if grant := self.grants.by_comment(workspace).get(host):
            self.snapshots.released(grant, kind, last)

    def _row(self, workspace: str, comment: str) -> str:
        """Where in the books an element that has gone belongs: names of wildcards come and go without end, so
        those that went stand under their pattern."""
        held = self.grants.pattern_of(workspace, comment)
        policy = self.policies.get(workspace)
        if held is not None or policy is None:
            return held or comment
        rule = rule_for(policy, comment)  # held by a controller before this one, perhaps
        return rule.host if rule is not None else comment

    async def _reopen_books(self) -> None:
        """Somebody may have flushed the tables, and with them what hosts and links had counted. If the books
        would balance but for what was counted before, they begin anew, and the record says so."""
        _, found = await reports.read_books(self)
        if found.balanced:
            return
        before, self.remembered.accounts = self.remembered.accounts, {}
        _, found = await reports.read_books(self)
        if not found.balanced:
            self.remembered.accounts = before  # not a flush: the difference stays an alarm
            return
        self.remembered.save_books()
        self.snapshots.begin_anew(lost=True)
        for workspace, account in before.items():
            totals = {"in_packets": account.ended.in_.packets, "in_bytes": account.ended.in_.bytes}
            self.alarm(
                "books-restarted",
                f"counters were lost with the ruleset, and the books of a workspace begin anew: {workspace}",
                {"workspace": workspace, "links": account.links, **totals},
            )

    def _link_lost(self, message: messages.LinkLost) -> None:
        """A link that nobody had named to the warden. Its counters belong in the books all the same."""
        sandbox = self.leases.by_link.get(Link(message.link))
        if sandbox is not None:
            closing = self._closing.get(sandbox.link, _Closing(why=_GONE))
            self._finish(sandbox, message.counters, closing)
            if self.control is not None:
                self.control.dismiss(sandbox, closing.why or _GONE)
            return
        if not message.counters and self.ended.get(Link(message.link)) is not None:
            return  # it is accounted, and on record; a warden that is new found what was left of its device
        workspace = message.workspace or "unknown"
        if message.workspace:
            self.remembered.account(workspace).end(_last(message.counters))
            self.remembered.save_books()
        if self.ended.get(Link(message.link)) is None:
            self._remember_ended(Link(message.link), workspace)
        facts: dict[str, Any] = {"link": Link(message.link).device, "workspace": workspace}
        for key, (packets, octets) in message.counters.items():
            facts |= {f"{key}_packets": packets, f"{key}_bytes": octets}
        self.auditing.record("sandbox-lost", facts)

    def _retire(self, message: messages.Retired) -> None:
        """Last counters of what left maps and sets: of sandboxes' packets, of what was dialled for them, of
        what they received."""
        workspace = message.workspace
        kinds: tuple[tuple[Retiring, Totals, str], ...] = (
            ("retired", message.elements, "{}"),
            ("dialled", message.dialled, "dialled_{}"),
            ("replies", message.replies, "in_{}"),
            ("opened", message.opened, ""),
        )
        for kind, gone, named in kinds:
            for host, (packets, octets) in gone.items():
                self._retire_one(workspace, kind, host, Tally(packets, octets))
                numbers = {named.format("packets"): packets, named.format("bytes"): octets}
                fields = numbers if named else {"connections": packets}
                self.auditing.record("host-retired", {"workspace": workspace, "host": host, **fields})
        self.remembered.save_books()

    def alarm(self, event: str, text: str, fields: dict[str, Any]) -> None:
        """`text`: what happened, a colon, and what of it not everybody may see (see reports)."""
        self.alarms.append((time.time(), text))
        log.error("%s", text)
        self.auditing.record(event, fields)

    # ---- names

    async def _from_resolver(self, peer: Peer, received: Received[Any]) -> None:
        message = received.message
        if isinstance(message, messages.Resolved):
            _reply(peer, await _outcome(message, self._resolved(message)))
        elif isinstance(message, messages.GrantName):
            async with self.changing:
                known = message.host in self.grants.of(message.workspace)
                _reply(peer, await _outcome(message, self._granted(message)))
                if peer.closed and not known:  # nobody was told, so nobody would give it back
                    await _outcome(message, self._granting.abandon(message))
        elif isinstance(message, messages.ReleaseNames):
            async with self.changing:
                _reply(peer, await _outcome(message, self._released(message)))
        else:
            _unexpected(peer, received)

    async def _resolved(self, message: messages.Resolved) -> messages.Admitted:
        names.check_addresses(message, private=message.private, pools=self.pools)
        led, refused = self.residency.admit(message)
        await self.admitting.admit(self.addresses.learn(led))
        return messages.Admitted(request=message.request, refused=refused)

    async def _granted(self, message: messages.GrantName) -> messages.Granted:
        grant, refused = await self._granting.grant(message)
        self.naming.tell(grant)
        return messages.Granted(request=message.request, block=grant.block, refused=refused)

    async def _released(self, message: messages.ReleaseNames) -> messages.Done:
        await self._granting.release(message)
        return messages.Done(request=message.request)

    async def _set_nat(self, entries: tuple[NatEntry, ...]) -> None:
        self.save_names()  # first: what the kernel has, the next controller must know of
        warden = self.peer("warden")
        await warden.ask(messages.SetNat(request=warden.next_request(), entries=entries))

    def save_names(self) -> None:
        """What has changed of where names lead, and of which are granted."""
        if self.names_file.flush(self.addresses.learned, self.grants.held):
            self.rewrite_names()

    def rewrite_names(self) -> None:
        self.remembered.save_numbers()
        self.names_file.rewrite(self.addresses.learned, self.grants.held)

    async def _set_names(self) -> None:
        peer = self.peer("resolver")
        document = msgspec.json.encode([self._names_of(policy) for policy in self.policies.values()])
        message = messages.SetNames(request=peer.next_request(), payload_length=len(document))
        await peer.ask(message, data=document, timeout=30.0)

    def _names_of(self, policy: Policy) -> WorkspaceNames:
        return names.names_of(
            policy,
            self.blocks(policy.workspace),
            self.grants.rules(policy.workspace),
            terms=lambda rule: self.residency.terms(policy, rule),
        )

    def blocks(self, workspace: str) -> Mapping[str, int]:
        """Rule key -> block, of one workspace."""
        numbers = self.remembered.allocation
        return numbers.blocks.get(workspace, {}) if numbers else {}

    def services(self, policy: Policy) -> Iterable[messages.LocalService]:
        """The local services of a workspace, and where they lie inside its sandboxes."""
        for rule in policy.locals:
            address4, address6 = self.pools.synthetic(self.blocks(policy.workspace)[rule.key])
            for port in rule.ports:
                yield messages.LocalService(
                    service=rule.service, port=port.number, address4=address4, address6=address6
                )

    async def _set_relays(self) -> None:
        peer = self.peer("relay")
        relays = tuple(
            messages.Relay(
                workspace=p.workspace,
                service=r.service,
                block=self.blocks(p.workspace)[r.key],
                port=port.number,
            )
            for p in self.policies.values()
            for r in p.locals
            for port in r.ports
        )
        await peer.ask(messages.SetRelays(request=peer.next_request(), relays=relays))

    async def _set_sites(self) -> None:
        peer = self.peer("inspector")
        sites = [site for policy in self.policies.values() for site in self._sites_of(policy)]
        document = msgspec.json.encode(sites)
        message = messages.SetSites(request=peer.next_request(), payload_length=len(document))
        await peer.ask(message, data=document, timeout=30.0)

    def _sites_of(self, policy: Policy) -> Iterable[messages.Site]:
        assert self.remembered.allocation is not None
        blocks = self.blocks(policy.workspace)
        exact = [(rule, blocks[rule.key]) for rule in policy.hosts if not rule.wildcard]
        index = self.remembered.allocation.workspaces[policy.workspace]
        return names.sites_of(policy, index, [*exact, *self.grants.rules(policy.workspace)])

    # ---- policy

    async def apply(
        self, *, dry_run: bool = False, by: str = "start", why: str = "", about: str = ""
    ) -> dict[str, Any]:
        """Read the directory again and make it true, as one change. The answer of `policy apply`. Who wanted
        it, and what he was asked to do (`about` one workspace, or all), are put on record."""
        async with self.changing:
            began = time.monotonic()
            wanted, problems, registry = await self._read()
            changes = _changes(self.policies, wanted)
            if not dry_run:
                before = self.policies
                self._record_registry(registry, by)
                try:
                    await self._become(wanted, registry)
                finally:
                    if self.policies is wanted:  # in force, though somebody may still have to be told
                        self.problems = problems
                        self._record_changes(before, changes, problems, by, why=why, about=about)
                        self._after_a_change(changes)
            return {
                "changes": [_change_document(workspace, change) for workspace, change in changes],
                "problems": [str(problem) for problem in problems],
                "applied": not dry_run,
                "milliseconds": round((time.monotonic() - began) * 1000, 3),
            }

    async def _read(self) -> tuple[dict[str, Policy], list[Problem], Registry]:
        """What the directory says, judged by what the files of the registry say. If it cannot be read at all,
        what was last good stays: at the start, nothing, so that every workspace is unknown and denied."""
        registry = await asyncio.to_thread(self._registry_files.read)
        try:
            found, problems = await asyncio.to_thread(
                read_workspaces, Path(self.config.workspaces_dir), pools=self.pools, registry=registry
            )
        except PolicyError as error:
            return self._last_good(self.policies, registry), list(error.problems), registry
        return {**self._last_good(broken_workspaces(problems), registry), **found}, problems, registry

    def _last_good(self, broken: Container[str], registry: Registry) -> dict[str, Policy]:
        """A file that broke keeps its last good policy, as far as it is good by this registry; a file that
        was never good gives none."""
        held = {name: policy for name, policy in self.policies.items() if name in broken}
        return {name: barring.judged(policy, registry) for name, policy in held.items()}

    async def begin(self) -> None:
        """What the directory says at the start. The warden hears of it when it is connected."""
        wanted, self.problems, registry = await self._read()
        await self._take_over()
        if self.control is not None:
            self.control.recall()  # before any of them is closed
        self._record_registry(registry, "start")
        held, gone = self._recall_names(wanted, registry)
        allocation, wants = self._numbered(wanted, held)
        held = self._still_numbered(held, allocation, gone)
        self._stand(wanted, allocation, wants, held, registry)
        self._granting.record_gone(gone)
        self.rewrite_names()
        self._record_changes({}, _changes({}, wanted), self.problems, "start")
        self.tell_names()

    async def _take_over(self) -> None:
        """The leases of a controller before this one. Who sees them refused sees them gone, too."""
        records, lost = self.lease_files.load()
        for record in records:
            sandbox = record.sandbox(self.pools)
            if record.link in self.remembered.settled:  # it ended between its account and its lease
                self.lease_files.remove(sandbox.link)
                continue
            try:
                self.leases.adopt(sandbox)
            except Refused as refused:
                lost.append(Lost(sandbox.link, str(refused)))
                self.lease_files.remove(sandbox.link)
                continue
            self.away[sandbox.link] = Away(sandbox, record.said)
        self.remembered.settled.clear()
        await self._tell_auditor()
        for one in lost:
            name = one.link.device if one.link is not None else "unknown"
            text = f"a lease is not taken over, and its sandbox ends: {name}: {one.text}"
            self.alarm("lease-refused", text, {"link": name, "text": one.text})

    async def _tell_auditor(self) -> None:
        """Whose links there are; each word when there is room for it."""
        end = time.monotonic() + _TOLD_WITHIN
        for sandbox in list(self.leases.by_link.values()):
            message = _bind(1, sandbox)
            while not self.auditing.offer(message) and time.monotonic() < end:
                await asyncio.sleep(0.005)
            if time.monotonic() >= end:
                self.auditing.pass_on(message)

    def _recall_names(
        self, wanted: dict[str, Policy], registry: Registry
    ) -> tuple[Held, list[tuple[Grant, str]]]:
        """Where names led, and which were granted: of those what stays, and what goes, and why."""
        memory = self.names_file.load(self.pools)
        self.addresses.restore(memory.learned)
        before = self.remembered.allocation
        if before is not None:
            blocks = {place: grant.block for place, grant in memory.granted.items()}
            self.remembered.allocation = allocate.restore(before, blocks, memory.gone)
        self.grants.held = memory.held()
        return self.grants.surviving(wanted, registry)

    def _still_numbered(
        self, held: Held, allocation: allocate.Allocation, gone: list[tuple[Grant, str]]
    ) -> Held:
        """Those that have the number they had, each with its workspace's."""
        stays: Held = {}
        for name, grants in held.items():
            for grant in grants.values():
                if allocation.blocks[name].get(grant.host) == grant.block:
                    stays.setdefault(name, {})[grant.host] = replace(grant, index=allocation.workspaces[name])
                else:
                    gone.append((grant, "its number is another's"))
        return stays

    def _record_registry(self, registry: Registry, by: str) -> None:
        """If it is another one."""
        if registry.digest == self.registry.digest:
            return
        fields = {"registry": registry.digest, "tables": " ".join(tables_of(registry)), "by": by}
        if registry.own:
            fields["catalogue"] = " ".join(registry.own)
        self.auditing.record("registry-changed", fields)
        if registry.broken:
            text = f"residency cannot be judged, and what is pinned is refused: {registry.broken}"
            self.alarm("registry-broken", text, {"registry": registry.digest, "text": registry.broken})

    def _numbered(
        self, wanted: dict[str, Policy], held: Held
    ) -> tuple[allocate.Allocation, dict[str, WorkspaceWant]]:
        allocation = allocate.allocate(wanted.values(), self.remembered.allocation, granted=held)
        return allocation, {
            name: plan.want(policy, allocation, self.pools) for name, policy in wanted.items()
        }

    def _stand(
        self,
        wanted: dict[str, Policy],
        allocation: allocate.Allocation,
        wants: dict[str, WorkspaceWant],
        held: Held,
        registry: Registry,
    ) -> tuple[NatEntry, ...]:
        """From now on this is the policy; returns what changes in where names lead."""
        self.policies, self.remembered.allocation, self.wants = wanted, allocation, wants
        self.registry, self.grants.held = registry, held
        self.residency.stand(wanted, registry)
        self.remembered.save_numbers()
        granted = (names.Use(*grant.user, grant.rule, grant.terms) for grant in self.grants.all())
        ways = self.addresses.use((*self._uses(allocation), *granted))
        self.residency.settle()
        return ways

    def _uses(self, allocation: allocate.Allocation) -> Iterable[names.Use]:
        """Of every exact host rule."""
        for name, policy in self.policies.items():
            index, blocks = allocation.workspaces[name], allocation.blocks[name]
            for rule in policy.hosts:
                if not rule.wildcard:
                    yield names.Use(index, blocks[rule.key], rule, self.residency.terms(policy, rule))

    async def _become(self, wanted: dict[str, Policy], registry: Registry) -> None:
        held, gone = self.grants.surviving(wanted, registry)
        allocation, wants = self._numbered(wanted, held)
        leaving = self.policies.keys() - wanted.keys()
        for name in leaving:
            await self._revoke_workspace(name)
        await self._last_snapshots(leaving)
        await self._set_workspaces(with_grants(wants, held, self.pools))
        for name in self.policies.keys() - wanted.keys():
            self._close_account(name)
        ways = self._stand(wanted, allocation, wants, held, registry)
        self._granting.record_gone(gone)
        self.save_names()
        try:
            await self._lead(ways)
        finally:  # this is the policy: whatever the warden said, the others are to hear of it
            await self.residency.cut()  # first: one of those who are told may take its time
            await self._tell_the_others()

    async def _lead(self, ways: Sequence[NatEntry]) -> None:
        """What closes ways comes first, and does not depend on the rest."""
        await self.admitting.admit(tuple(way for way in ways if way.real is None))
        await self.admitting.admit(tuple(way for way in ways if way.real is not None))

    async def make_good(self) -> None:
        """What the warden did not acknowledge, and connections that could not be judged, once more."""
        await self.admitting.rest(within=1.0)
        if self.addresses.in_doubt or self.residency.due:
            async with self.changing:
                try:
                    await self._lead(self.addresses.corrections())
                finally:
                    await self.residency.cut()

    async def _last_snapshots(self, leaving: Collection[str]) -> None:
        """Of workspaces that are about to go: their sandboxes have ended, these are their last numbers.
        Nobody waits for the journal to take them."""
        if leaving:
            try:
                drafts = await self.snapshots.draft(*leaving)
                self.background(self.snapshots.hand_over(drafts), "recording the last counters")
            except (Refused, PeerGone) as error:
                log.warning("what these had counted is not in the journal: %s: %s", ", ".join(leaving), error)

    def _after_a_change(self, changes: Sequence[tuple[str, diff.Change]]) -> None:
        if changes:
            changed = {workspace for workspace, _ in changes} & self.policies.keys()
            self.background(self.snapshots.take(*sorted(changed)), "recording the counters")
            self.tell_names()

    def _close_account(self, workspace: str) -> None:
        """A workspace that is gone is out of the books; its last totals are on record."""
        self.snapshots.forget(workspace)
        account = self.remembered.accounts.pop(workspace, Account())
        self.auditing.record(
            "workspace-removed",
            {"workspace": workspace, "links": account.links, "in_packets": account.ended.in_.packets,
             "in_bytes": account.ended.in_.bytes, "ok_packets": account.ended.ok.packets,
             "ok_bytes": account.ended.ok.bytes, "denied_packets": account.ended.denied.packets},
        )  # fmt: skip
        self.remembered.save_books()

    async def _tell_the_others(self) -> None:
        """Those who serve, if they run; one that does not is told when it comes back.

        For inspector and relay we wait: a revocation is complete only when they have closed the flows."""
        tellings = {"inspector": self._set_sites, "relay": self._set_relays, "resolver": self._set_names}
        for name, tell in tellings.items():
            try:
                await tell()
            except (Refused, PeerGone) as error:
                log.warning("the %s will be told later: %s", name, error)

    async def _set_workspaces(self, wants: dict[str, WorkspaceWant]) -> None:
        warden = self.peer("warden")
        document = msgspec.json.encode(list(wants.values()))
        message = messages.SetWorkspaces(request=warden.next_request(), payload_length=len(document))
        await warden.ask(message, data=document, timeout=60.0)

    def _record_changes(
        self,
        before: Mapping[str, Policy],
        changes: Iterable[tuple[str, diff.Change]],
        problems: Iterable[Problem],
        by: str,
        *,
        why: str = "",
        about: str = "",
    ) -> None:
        for workspace, change in changes:
            old, new = before.get(workspace), self.policies.get(workspace)
            self.auditing.record(
                "policy-changed",
                {
                    "workspace": workspace,
                    "change": change.describe(),
                    "widens": change.widens,
                    "by": by,
                    "policy": new.digest if new else None,
                    "policy_before": old.digest if old else None,
                    **({"why": why} if why and about in ("", workspace) else {}),
                },
            )
        for problem in problems:
            log.error("%s", problem)
            self.auditing.record("policy-refused", {"problem": str(problem), "by": by})

    async def _revoke_workspace(self, name: str) -> None:
        assert self.control is not None
        for sandbox in self.leases.of_workspace(name):
            await self.control.revoke(sandbox, f"workspace {name} was removed from the policy")

    # ---- sandboxes

    async def open(self, sandbox: Sandbox, descriptor: int) -> None:
        """Admit a sandbox: recorded first, then known to those who serve it, then linked."""
        if not self.settled.is_set():
            raise Refused(Reason.UNAVAILABLE, "the warden has just started; try again in a moment")
        self.save_lease(sandbox, Said())
        self.auditing.pass_on(_bind(1, sandbox))
        self.auditing.record("sandbox-opening", _opening(sandbox, boot=self.boot))
        warden = self.peer("warden")
        request = _open(warden, sandbox)
        served = [self._bound(name, sandbox) for name in _SERVING]
        linked = asyncio.ensure_future(warden.ask(request, descriptor=descriptor, timeout=_LINK_WITHIN))
        await asyncio.gather(*served)
        await linked

    async def _bound(self, name: str, sandbox: Sandbox) -> None:
        """Make the sandbox known. A process that is down learns of it when it comes back; until then
        its part of the world stays denied."""
        peer = self.peers[name]
        if peer is not None:
            with contextlib.suppress(PeerGone):
                await peer.ask(_bind(peer.next_request(), sandbox))

    def save_lease(self, sandbox: Sandbox, said: Said) -> None:
        """Refused where it cannot be written: it would end with us. One that is closed has none any more."""
        if sandbox.link not in self.leases.by_link:
            return
        try:
            self.lease_files.write(sandbox, said)
        except OSError as error:
            text = f"the lease of {sandbox.link.device} cannot be written: {error.strerror}"
            raise Refused(Reason.UNAVAILABLE, text) from error

    async def close(self, sandbox: Sandbox, *, event: str = "sandbox-closed", why: str = "") -> None:
        """Take link, chain and elements away; keep the last counters for the books. Without a warden it is
        done when there is one again."""
        if sandbox.link not in self.leases.by_link or sandbox.link in self._closing:
            return
        closing = self._closing[sandbox.link] = _Closing(event, why)
        self.away.pop(sandbox.link, None)
        async with self._closers:
            warden = self.peers["warden"]
            if warden is None or sandbox.link not in self.leases.by_link:
                return
            message = messages.CloseLink(request=warden.next_request(), link=sandbox.link.number)
            try:
                closed: messages.LinkClosed = (await warden.ask(message, timeout=_LINK_WITHIN)).message
            except (PeerGone, Refused) as error:
                log.warning("%s is not closed yet: %s", sandbox.link.device, error)
                return
        if sandbox.link in self.leases.by_link and self._is_news(closed.report):
            self._finish(sandbox, closed.counters, closing)

    def _finish(self, sandbox: Sandbox, counters: Totals, closing: _Closing) -> None:
        """The link is gone from the kernel."""
        for name in _SERVING:
            peer = self.peers[name]
            if peer is not None:
                with contextlib.suppress(PeerGone):
                    peer.send(messages.UnbindSource(request=peer.next_request(), link=sandbox.link.number))
        self.auditing.pass_on(messages.UnbindSource(request=1, link=sandbox.link.number))
        # Together, with nothing awaited between: a reading of the books sees the link here or there.
        self.leases.close(sandbox)
        self.away.pop(sandbox.link, None)
        self._closing.pop(sandbox.link, None)
        self._remember_ended(sandbox.link, sandbox.workspace)
        self._account(sandbox, counters, closing)

    # ---- sandboxes of a controller before this one

    def awaited(self, link: Link, caller: Caller) -> Away:
        """The lease that this account may come back for. One answer for whatever there is instead."""
        found = self.away.get(link)
        if found is not None and found.sandbox.caller.uid == caller.uid:
            return found
        text = (
            f"no lease of uid {caller.uid} waits on {link.device}: each can be resumed once, by the account"
            f" that holds it, within {RESUME_GRACE:g} s of a start of egressd"
        )
        raise Refused(Reason.MEMBER, text)

    async def resume(self, away: Away, caller: Caller, descriptor: int) -> None:
        """The caller holds this lease from now on, if the link leads into the namespace of the descriptor."""
        sandbox = away.sandbox
        async with away.lock:
            self.awaited(sandbox.link, caller)  # still
            await self._keep_resumed(sandbox, descriptor)
            self.awaited(sandbox.link, caller)
            del self.away[sandbox.link]
        facts = _facts(sandbox) | {"pid": caller.pid, "seconds": round(time.monotonic() - self.began, 3)}
        self.auditing.record("sandbox-resumed", facts)

    async def _keep_resumed(self, sandbox: Sandbox, descriptor: int) -> None:
        """Whoever asks in the moment in which the warden is another is not turned away for that."""
        end = time.monotonic() + RESUME_GRACE
        while True:
            try:
                await asyncio.wait_for(self.settled.wait(), max(0.0, end - time.monotonic()))
                warden = self.peer("warden")
                await warden.ask(_keep(warden, sandbox), descriptor=descriptor)
            except TimeoutError:
                raise Refused(Reason.UNAVAILABLE, "the warden is not running") from None
            except PeerGone:
                await asyncio.sleep(0.02)
            else:
                return

    async def give_up_waiting(self) -> None:
        """Close what nobody has come back for."""
        await asyncio.sleep(RESUME_GRACE)
        for away in list(self.away.values()):
            async with away.lock:
                if self.away.get(away.sandbox.link) is away:
                    await self.close(away.sandbox, event="sandbox-lost", why="nobody came back for it")

    async def spent(self, sandbox: Sandbox) -> messages.LinkSpent:
        """What its link has counted until now. Of each account's sandboxes one is read at a time."""
        uid = sandbox.caller.uid
        with self._readings.asked(uid):
            async with self._readings.turn(uid):
                warden = self.peer("warden")
                request = messages.ReadLink(request=warden.next_request(), link=sandbox.link.number)
                answer: messages.LinkSpent = (await warden.ask(request)).message
                return answer

    async def told(self, link: Link) -> None:
        """When this returns, those who served a closed link have said what it was denied: answers come in
        order, and to forget what is forgotten changes nothing. One that hangs is not waited for."""
        await asyncio.gather(*(self._unbound(name, link) for name in _SERVING))

    async def _unbound(self, name: str, link: Link) -> None:
        peer = self.peers[name]
        if peer is not None:
            message = messages.UnbindSource(request=peer.next_request(), link=link.number)
            with contextlib.suppress(PeerGone, Refused):
                await peer.ask(message, timeout=_UNBOUND_WITHIN)

    def _remember_ended(self, link: Link, workspace: str) -> None:
        asker = None if self.control is None else self.control.testifying.asker(link)
        self.ended.add(link, workspace, asker=asker)

    def _account(self, sandbox: Sandbox, counters: Totals, closing: _Closing) -> None:
        """On record, in the books, off the table on disk, in this order: whatever is done twice, because we
        end in between, counts once."""
        facts = _closing(sandbox)
        for key, (packets, octets) in counters.items():
            facts |= {f"{key}_packets": packets, f"{key}_bytes": octets}
        facts["seconds"] = round(max(0.0, time.time() - sandbox.since), 3)  # the clock may have been set
        if closing.why:
            facts["why"] = closing.why
        self.auditing.record(closing.event, facts)
        self.remembered.account(sandbox.workspace).end(_last(counters))
        self.remembered.settled.add(sandbox.link.number)
        self.remembered.save_books()
        self.lease_files.remove(sandbox.link)
        self.remembered.settled.discard(sandbox.link.number)

    # ---- reading

    async def watch_books(self) -> None:
        """Read the books for ever; what does not add up is an alarm, told once."""
        while True:
            began = time.monotonic()
            with contextlib.suppress(EgressdError):
                await self.make_good()
            with contextlib.suppress(Refused, PeerGone):
                await self.check_books()
            self.auditing.flush()
            await asyncio.sleep(max(_BOOKS_EVERY, _SHARE * (time.monotonic() - began)))

    async def check_books(self) -> None:
        """Do they add up? And, from the same reading, what the journal is to know of them."""
        refused = await self.snapshots.refusals() if self.snapshots.due() else None
        counters, found = await reports.read_books(self)
        self._judge(found)
        if refused is not None:
            await self.snapshots.record(counters, found, refused)

    def _judge(self, found: Books) -> None:
        if not found.balanced and not self._unbalanced:
            what = "; ".join(f"{d.what}: {d.packets} packets, {d.bytes} bytes" for d in found.differences)
            self.alarm("books-unbalanced", f"the books do not balance: {what}", {"differences": what})
        elif found.balanced and self._unbalanced:
            self.alarm("books-balanced", "the books balance again", {"equations": found.equations})
        self._unbalanced = not found.balanced

    async def watch_drift(self) -> None:
        """Read the ruleset back for ever; what is not as compiled is an alarm, told once."""
        while True:
            began = time.monotonic()
            with contextlib.suppress(Refused, PeerGone):
                await self.drift()
            await asyncio.sleep(max(_DRIFT_EVERY, _SHARE * (time.monotonic() - began)))

    async def counters(self) -> Counters:
        """Never older than the question. Whoever asks while one reading runs shares the next one, so that any
        number of askers costs the warden no more than two."""
        if self._next_reading is None:
            self._next_reading = asyncio.ensure_future(self._read_counters())
        return await asyncio.shield(self._next_reading)

    async def _read_counters(self) -> Counters:
        async with self._reading:
            self._next_reading = None  # who asks from here on wants a newer one
            warden = self.peer("warden")
            received = await warden.ask(messages.ReadCounters(request=warden.next_request()), timeout=30.0)
            return msgspec.json.decode(received.payload(), type=Counters)

    async def refused_names(self) -> Mapping[str, Mapping[str, int]]:
        """Questions the resolver refused: workspace -> reason -> count."""
        return await self._read_refused("resolver")

    async def refused_flows(self) -> Mapping[str, Mapping[str, int]]:
        """Connections the inspector refused: workspace -> reason -> count."""
        return await self._read_refused("inspector")

    async def _read_refused(self, name: str) -> Mapping[str, Mapping[str, int]]:
        """Nothing where it cannot be asked: it counts from its own start anyway."""
        peer = self.peers[name]
        if peer is not None:
            with contextlib.suppress(PeerGone, Refused):
                received = await peer.ask(messages.ReadRefused(request=peer.next_request()), timeout=2.0)
                counts: dict[str, dict[str, int]] = received.message.counts
                return counts
        return {}

    async def drift(self) -> list[str]:
        """What the kernel, read back, lacks or has too much of; an alarm, when it is news."""
        warden = self.peer("warden")
        received = await warden.ask(messages.ReadDrift(request=warden.next_request()), timeout=30.0)
        found = msgspec.json.decode(received.payload(), type=list[str])
        if found and found != self.drifted:
            what = "; ".join(found)
            self.alarm("drift", f"the ruleset is not as compiled: {_shortened(what)}", {"what": what})
        self.drifted, self.drift_read = found, time.time()
        return found

    async def journal(self) -> messages.JournalState:
        """Refused or PeerGone if the auditor does not say."""
        peer = self.peer("evidence")
        received = await peer.ask(messages.ReadJournal(request=peer.next_request()), timeout=2.0)
        return _journal_state(received)

    async def change_key(self) -> messages.JournalState:
        peer = self.peer("evidence")
        received = await peer.ask(messages.RotateKey(request=peer.next_request()), timeout=30.0)
        return _journal_state(received)

    async def ruleset(self) -> str:
        warden = self.peer("warden")
        received = await warden.ask(messages.ReadRuleset(request=warden.next_request()), timeout=30.0)
        return received.payload().decode()


@dataclass(frozen=True, slots=True)
class _Closing:
    """How a link's end is recorded."""

    event: str = "sandbox-closed"
    why: str = ""


def _shortened(what: str) -> str:
    """The first few of many changes; the record has them all."""
    changes = what.split("; ")
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def _last(counters: Totals) -> LinkCounts:
    """From the warden's words to the books'."""
    tallies = {key: Tally(*pair) for key, pair in counters.items()}
    none = Tally()
    return LinkCounts(
        in_=tallies.get("in", none),
        ok=tallies.get("ok", none),
        denied=tallies.get("denied", none),
        other=tallies.get("other", none),
    )


async def _outcome(
    message: Any, work: Coroutine[Any, Any, messages.Done | messages.Admitted | messages.Granted | None]
) -> messages.Done | messages.Admitted | messages.Granted | messages.Failed | None:
    """The answer to a request, whatever became of it."""
    try:
        return await work
    except (EgressdError, OSError) as error:
        reason = error.reason if isinstance(error, Refused) else Reason.UNAVAILABLE
        return messages.Failed(request=message.request, reason=reason.value, text=str(error)[:4096])


def _reply(peer: Peer, message: Any) -> None:
    with contextlib.suppress(PeerGone):
        peer.send(message)


def _unexpected(peer: Peer, received: Received[Any]) -> None:
    received.close()
    peer.close(f"{type(received.message).__name__} was not expected")


def _journal_state(received: Received[Any]) -> messages.JournalState:
    if not isinstance(received.message, messages.JournalState):
        received.close()
        raise Refused(Reason.PROTOCOL, f"the auditor answered {type(received.message).__name__}")
    return received.message


def _facts(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "link": sandbox.link.device,
        "workspace": sandbox.workspace,
        "uid": sandbox.caller.uid,
        "pid": sandbox.caller.pid,
    }


def _opening(sandbox: Sandbox, *, boot: str) -> dict[str, Any]:
    return _facts(sandbox) | {
        "gid": sandbox.caller.gid,
        "command": sandbox.command,
        "command_digest": sandbox.digest,
        "policy": sandbox.policy,
        "guard": sandbox.guard,
        "address4": str(sandbox.address4),
        "address6": str(sandbox.address6),
        "boot": boot,
        **({"quota": sandbox.quota} if sandbox.quota is not None else {}),
        **({"connections": sandbox.connections} if sandbox.connections is not None else {}),
        **({"closed": True} if sandbox.closed else {}),
    }


def _closing(sandbox: Sandbox) -> dict[str, Any]:
    """With what its broker claimed, if it said anything."""
    facts, claims = _facts(sandbox), sandbox.claims
    if claims.ended is not None:
        facts |= {"exit": claims.ended.status, "why": claims.ended.why}
        if claims.ended.max_rss:  # no process has none: it does not know
            facts |= {
                "user_seconds": round(claims.ended.user_seconds, 3),
                "system_seconds": round(claims.ended.system_seconds, 3),
                "max_rss": claims.ended.max_rss,
            }
    if claims.attempts or claims.unrecorded:
        facts |= {"attempts": claims.attempts, "attempts_unrecorded": claims.unrecorded}
    return facts


def _bind(request: int, sandbox: Sandbox) -> messages.BindSource:
    return messages.BindSource(
        request=request,
        link=sandbox.link.number,
        workspace=sandbox.workspace,
        source4=sandbox.address4,
        source6=sandbox.address6,
    )


def _open(warden: Peer, sandbox: Sandbox) -> messages.OpenLink:
    return messages.OpenLink(request=warden.next_request(), **_link(sandbox))


def _keep(warden: Peer, sandbox: Sandbox) -> messages.KeepLink:
    return messages.KeepLink(request=warden.next_request(), **_link(sandbox))


def _link(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "link": sandbox.link.number,
        "workspace": sandbox.workspace,
        "owner": sandbox.caller.uid,
        "quota": sandbox.quota,
        "connections": sandbox.connections,
        "closed": sandbox.closed,
    }


def _changes(before: dict[str, Policy], after: dict[str, Policy]) -> list[tuple[str, diff.Change]]:
    return [
        (name, change)
        for name in sorted(before.keys() | after.keys())
        for change in diff.diff(before.get(name), after.get(name))
    ]


def _change_document(workspace: str, change: diff.Change) -> dict[str, Any]:
    return {"workspace": workspace, "text": change.describe(), "widens": change.widens}


# ---- the process


async def _serve(start: ritual.Start) -> None:
    controller = Controller(start)
    controller.control = ControlSocket(controller, start.take("control"))
    supervisor: Channel[Any] = Channel(start.take("supervisor"), messages.TO_CHILD)
    stop, leave = asyncio.Event(), asyncio.Event()

    def leaving() -> None:
        """The sandboxes go on; whoever comes next takes them over."""
        leave.set()
        stop.set()

    _watch_signals(controller, stop, leaving)
    await controller.begin()
    asyncio.get_running_loop().add_reader(
        supervisor.socket, _from_supervisor, controller, supervisor, leaving
    )
    for name in ("warden", *_SERVING, "evidence", "custodian"):
        controller.connect(name, start.take(name))
    await controller.settled.wait()
    controller.control.listen()
    controller.background(controller.give_up_waiting(), "closing what nobody came back for")
    controller.background(controller.watch_books(), "reading the books")
    controller.background(controller.watch_drift(), "reading the ruleset back")
    supervisor.send(messages.Ready())
    await _beat_until(stop, supervisor)
    if leave.is_set():
        controller.control.leave()
        controller.save_names()
        controller.auditing.flush()
    else:
        await controller.control.close_all("egressd is stopping")


async def _beat_until(stop: asyncio.Event, supervisor: Channel[Any]) -> None:
    while not stop.is_set():
        with contextlib.suppress(OSError):
            supervisor.send(messages.Heartbeat())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), messages.HEARTBEAT)


def _from_supervisor(controller: Controller, channel: Channel[Any], leaving: Callable[[], None]) -> None:
    try:
        received = channel.receive()
    except BlockingIOError:
        return
    except (EOFError, OSError, ProtocolError):
        asyncio.get_running_loop().remove_reader(channel.socket)
        leaving()  # no supervisor, no daemon: the next one finds the leases, or their brokers give up
        return
    if isinstance(received.message, messages.ProcessTable):
        controller.processes = received.message.processes
    elif isinstance(received.message, messages.NewPeer):
        _new_peer(controller, received)


def _new_peer(controller: Controller, received: Received[Any]) -> None:
    sock = socket.socket(fileno=received.take())
    if received.message.name == "audit":
        controller.auditor_came(sock)
    else:
        controller.connect(received.message.name, sock)


def _watch_signals(controller: Controller, stop: asyncio.Event, leaving: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def reload() -> None:
        controller.background(controller.apply(by="SIGHUP"), "applying the policy")

    handlers: dict[int, Callable[[], None]] = {
        signal.SIGHUP: reload,
        signal.SIGTERM: stop.set,
        signal.SIGINT: stop.set,
        signal.SIGUSR2: leaving,
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)


def main() -> int:
    public_suffixes()  # a file: read while everything may still be read
    builtin_catalogue()  # the same
    evidence.versions()  # a program: run while it may still be run
    asyncio.run(_serve(ritual.begin("controller")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
