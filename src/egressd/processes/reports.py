"""The JSON documents that egressctl shows: what is asked, from what the controller and the kernel know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import msgspec

from egressd import __version__
from egressd.ipc import messages
from egressd.ipc.peer import PeerGone
from egressd.model.errors import Problem, Refused, Unfit
from egressd.model.identities import Link
from egressd.model.names import canonical, is_pattern
from egressd.model.verdicts import Reason, Verdict
from egressd.policy.as_json import policy_document
from egressd.policy.compiled import CidrRule, Guard, HostRule, LocalRule, Policy, Rule
from egressd.policy.decide import Decision, rule_for
from egressd.policy.explain import Subject
from egressd.policy.explain import why as explain
from egressd.processes import evidence
from egressd.processes.workspaces import broken_workspaces
from egressd.ruleset.books import Books, Difference, Equation, books, contradictions, equations, sum_tallies
from egressd.ruleset.layout import RESOLVER_BLOCK, UNLISTED_BLOCK, Kind, Mark
from egressd.ruleset.observe import Counters, ElementCount, LinkCounts, Tally

if TYPE_CHECKING:
    from egressd.processes.controller import Controller
    from egressd.processes.grants import Grant
    from egressd.processes.leases import Sandbox
    from egressd.processes.remembered import Account
    from egressd.processes.snapshots import Refusals

__all__ = [
    "Document",
    "account",
    "answer",
    "journal",
    "journal_document",
    "metrics",
    "read_books",
    "why",
    "why_sandbox",
]

Document = dict[str, Any]
Visible = Mapping[str, Policy]


async def answer(controller: Controller, what: str, visible: Visible, *, everything: bool) -> Document:
    """The document for one `Ask`; Refused for what the asker may not see."""
    if what in ("ruleset", "diff") and not everything:
        raise Refused(Reason.MEMBER, "only root and the daemon's own user may see this: use sudo")
    return await _DOCUMENTS[what](controller, visible)


# ---- status


async def _status(controller: Controller, visible: Visible) -> Document:
    (_, found), state = await asyncio.gather(read_books(controller), journal(controller))
    return _status_of(controller, visible, found, state)


def _status_of(controller: Controller, visible: Visible, found: Books, state: Document) -> Document:
    everything = visible is controller.policies
    problems = controller.problems if everything else []
    shown = [s for s in controller.leases.by_link.values() if s.workspace in visible]
    return {
        "version": __version__,
        "enforcing": controller.settled.is_set(),
        "since": controller.since,
        "gateway": controller.config.gateway,
        "state_dir": controller.config.state_dir,
        "residency_dir": controller.config.residency_dir,
        # Who may not change policies need not know where they are.
        **(_directories(controller) if everything else {}),
        "processes": [
            {"name": p.name, "pid": p.pid, "state": p.state, "restarts": p.restarts}
            for p in controller.processes
        ],
        "workspaces": [_workspace(controller, policy, problems) for policy in visible.values()]
        + [_never_good(name, problems) for name in sorted(broken_workspaces(problems) - visible.keys())],
        "sandboxes": [_sandbox(sandbox) for sandbox in shown],
        # Rules and hosts of every workspace stand behind the colon.
        "alarms": [
            {"time": at, "text": text if everything else text.partition(":")[0]}
            for at, text in controller.alarms
        ],
        "balanced": found.balanced,
        "drift": controller.drifted if everything else _visible_drift(controller, visible),
        "drift_read": controller.drift_read,
        "journal": None if "error" in state else state,
        "journal_error": state.get("error"),
    }


def _directories(controller: Controller) -> Document:
    return {"workspaces_dir": controller.config.workspaces_dir}


def _visible_drift(controller: Controller, visible: Visible) -> list[str]:
    """What concerns these workspaces, or all of them."""
    # one of them may have been removed since it was asked
    owns = [evidence.Own.of(controller, name) for name in visible if name in controller.wants]
    return list(dict.fromkeys(text for own in owns for text in evidence.own_drift(controller.drifted, own)))


async def journal(controller: Controller) -> Document:
    """How the journal is; or {"error": why nobody knows}."""
    try:
        return journal_document(await controller.journal())
    except (Refused, PeerGone) as error:
        return {"error": str(error)}


def journal_document(state: messages.JournalState) -> Document:
    document: Document = msgspec.to_builtins(state)
    return {key: value for key, value in document.items() if key not in ("type", "request")}


async def metrics(controller: Controller) -> Document:
    """All that the exporter tells, from one reading of the counters."""
    refused, state = await asyncio.gather(controller.snapshots.refusals(), journal(controller))
    counters, found = await read_books(controller)
    status, control = _status_of(controller, controller.policies, found, state), controller.control
    return {
        "status": status,
        "counters": _counters_of(controller, controller.policies, counters, found, refused),
        "journal": status["journal"],
        "drift": None if controller.drift_read is None else controller.drifted,
        "requests": control.testifying.document(controller.policies) if control else {},
    }


def _workspace(controller: Controller, policy: Policy, problems: list[Problem]) -> Document:
    return {
        "workspace": policy.workspace,
        "guard": policy.guard.value,
        "local_only": policy.local_only,
        "residency": controller.residency.document(policy),
        "policy": policy.digest,
        "sandboxes": controller.leases.count(policy.workspace),
        "names": _names(controller, policy),
        "problem": _problem_text(policy.workspace, problems),
    }


def _names(controller: Controller, policy: Policy) -> Document | None:
    """Names that wildcards cover: how many are granted now, of how many; None without a wildcard."""
    if not any(rule.wildcard for rule in policy.hosts):
        return None
    return {
        "granted": len(controller.grants.of(policy.workspace)),
        "budget": policy.wildcards.workspace.names,
    }


def _never_good(name: str, problems: list[Problem]) -> Document:
    return {
        "workspace": name,
        "guard": None,
        "local_only": None,
        "residency": None,
        "policy": None,
        "sandboxes": 0,
        "names": None,
        "problem": _problem_text(name, problems),
    }


def _problem_text(workspace: str, problems: list[Problem]) -> str | None:
    return "; ".join(str(p) for p in problems if workspace in broken_workspaces([p])) or None


def _sandbox(sandbox: Sandbox) -> Document:
    return {
        "link": sandbox.link.number,
        "workspace": sandbox.workspace,
        "uid": sandbox.caller.uid,
        "pid": sandbox.caller.pid,
        "since": sandbox.since,
        "address4": str(sandbox.address4),
        "address6": str(sandbox.address6),
        "command": sandbox.command,
        "quota": sandbox.quota,
        "connections": sandbox.connections,
        "closed": sandbox.closed,
    }


# ---- counters


async def read_books(controller: Controller) -> tuple[Counters, Books]:
    """The kernel's counters, and whether they add up: exactly, or, while packets flow, as far as two readings
    can tell."""
    counters = await controller.counters()
    first = _equations(controller, counters)
    found = books(first)
    if not found.balanced and found.equations:
        counters = await controller.counters()
        found = contradictions(first, _equations(controller, counters))
    # Without a workspace there is nothing to account for; that much is in balance.
    return counters, found if found.equations else msgspec.structs.replace(found, balanced=True)


def _equations(controller: Controller, counters: Counters) -> tuple[Equation, ...]:
    accounts = controller.remembered.accounts
    retired = {name: sum_tallies(account.retired.values()) for name, account in accounts.items()}
    ended = {name: (account.ended,) for name, account in accounts.items()}
    workspace_of = {s.link.device: s.workspace for s in controller.leases.by_link.values()}
    return equations(counters, retired, ended, workspace_of=workspace_of)


async def _counters(controller: Controller, visible: Visible) -> Document:
    counters, found = await read_books(controller)
    return _counters_of(controller, visible, counters, found, await controller.snapshots.refusals())


def _counters_of(
    controller: Controller,
    visible: Visible,
    counters: Counters,
    found: Books,
    refused: Refusals,
) -> Document:
    return {
        "time": time.time(),
        "balanced": found.balanced,
        "differences": [
            f"{d.what}: {d.packets} packets, {d.bytes} bytes"
            for d in found.differences
            if visible is controller.policies or _workspace_of(controller, d) in visible
        ],
        "workspaces": [
            {
                **account(controller, counters, found, policy),
                "names_refused": sum(refused.names.get(name, {}).values()),
                "names_refused_by": dict(refused.names.get(name, {})),
                "flows_refused": dict(refused.flows.get(name, {})),
                "addresses_refused": controller.residency.addresses_refused(name),
            }
            for name, policy in visible.items()
        ],
        "late": {reason: _pair(tally) for reason, tally in counters.late.items()},
    }


def _workspace_of(controller: Controller, difference: Difference) -> str:
    """Whose equation does not hold (`ruleset.books`): of a link, "eg7: ..."; of a workspace, "acme: ..."; of
    its links that are gone, "acme, ended: ...". A workspace may be called eg7."""
    subject, _, equation = difference.what.partition(": ")
    if not equation.startswith("in = ") or subject.endswith(", ended"):
        return subject.removesuffix(", ended")
    link = Link.of_device(subject)
    sandbox = None if link is None else controller.leases.by_link.get(link)
    return "" if sandbox is None else sandbox.workspace


def account(controller: Controller, counters: Counters, found: Books, policy: Policy) -> Document:
    """One workspace's counters, in this reading."""
    name = policy.workspace
    links = {
        s.link.number: counters.links.get(s.link.device, LinkCounts())
        for s in controller.leases.of_workspace(name)
    }
    gone = controller.remembered.account(name)
    total = _sum_links([*links.values(), gone.ended])
    elements = [e for e in counters.elements if e.workspace == name]
    counted = sum_tallies(
        [
            *(Tally(e.packets, e.bytes) for e in elements),
            *gone.retired.values(),
            counters.unlisted.get(name, Tally()),
        ]
    )
    return {
        "workspace": name,
        "guard": policy.guard.value,
        "hosts": _hosts(controller, counters, policy, elements) + _retired(gone, policy),
        "denied": {reason: _pair(tally) for reason, tally in counters.denied.get(name, {}).items()},
        "links": [{"link": number, **_link(counts), **_budgets(counts)} for number, counts in links.items()],
        "ended": {"links": gone.links, **_link(gone.ended)},
        "balance": {
            "balanced": found.balanced
            or not any(_workspace_of(controller, d) == name for d in found.differences),
            **_link(total, admitted="admitted"),
            "elements": _pair(counted),
            "difference": [
                total.in_.packets - total.ok.packets - total.denied.packets - total.other.packets,
                total.in_.bytes - total.ok.bytes - total.denied.bytes - total.other.bytes,
            ],
        },
    }


def _hosts(
    controller: Controller, counters: Counters, policy: Policy, elements: list[ElementCount]
) -> list[Document]:
    """One row per rule, in the policy's order, and below a wildcard one for each name that is granted under
    it; then the resolver and, unrestricted, everything else."""
    by_block: dict[int, list[ElementCount]] = {}
    for element in elements:
        by_block.setdefault(Mark.of(element.mark).block, []).append(element)
    dialled = _dialled(counters, policy.workspace)
    blocks = controller.blocks(policy.workspace)
    gone = controller.remembered.account(policy.workspace)
    documents = []
    for rule in _each_key_once(policy):
        if isinstance(rule, HostRule) and rule.wildcard:
            documents.append(_pattern(rule, gone))
            for grant in _granted_under(controller, policy.workspace, rule.host):
                row = _host(counters, grant.host, "granted", by_block.get(grant.block, []), dialled)
                addresses = controller.addresses.of(grant.rule, terms=grant.terms)
                documents.append({**row, "addresses": addresses, "wildcard": rule.host, "since": grant.since})
        else:
            counted = by_block.get(blocks.get(rule.key, -1), [])
            row = _host(counters, rule.key, _kind(rule), counted, dialled)
            addresses = _addresses(controller, policy, rule) if isinstance(rule, HostRule) else []
            documents.append({**row, "addresses": addresses})
    documents.append(_host(counters, "(resolver)", "resolver", by_block.get(RESOLVER_BLOCK, []), {}))
    if policy.holding is not Guard.ENFORCE or any(_pair(counters.unlisted.get(policy.workspace, Tally()))):
        documents.append(_unlisted(controller, counters, policy.workspace))
    return documents


def _addresses(controller: Controller, policy: Policy, rule: HostRule) -> list[str]:
    return controller.addresses.of(rule, terms=controller.residency.terms(policy, rule))


def _granted_under(controller: Controller, workspace: str, wildcard: str) -> list[Grant]:
    held = [grant for grant in controller.grants.of(workspace).values() if grant.wildcard == wildcard]
    return sorted(held, key=lambda grant: grant.host)


def _pattern(rule: HostRule, gone: Account) -> Document:
    """A wildcard has no element of its own: its row holds what names counted that were given back."""
    return _gone(rule.host, "wildcard", gone) | {"ports": sorted(map(str, rule.ports))}


def _gone(host: str, kind: str, account: Account) -> Document:
    """A row of last counters."""
    dialled = account.dialled.get(host)
    return _row(host, kind) | {
        "out": _pair(account.retired.get(host, Tally())),
        "in": _pair(account.replies.get(host, Tally())),
        "connections": account.opened.get(host, Tally()).packets,
        "dialled": None if dialled is None else _pair(dialled),
    }


def _dialled(counters: Counters, workspace: str) -> dict[int, Tally]:
    """What the inspector sent upstream for this workspace, by block."""
    sums: dict[int, Tally] = {}
    for element in counters.dialled:
        if element.workspace == workspace:
            block = Mark.of(element.mark).block
            sums[block] = sums.get(block, Tally()) + Tally(element.packets, element.bytes)
    return sums


def _each_key_once(policy: Policy) -> list[Rule]:
    """Two rules may name one host with different ports; they share its block and its counters."""
    return list({rule.key: rule for rule in policy.rules}.values())


def _row(host: str, kind: str) -> Document:
    """A row of the table of hosts before anything was counted. `dialled` is what the inspector sent upstream
    on behalf of those whose connections it reads; None where it reads none."""
    return {
        "host": host,
        "kind": kind,
        "ports": [],
        "addresses": [],
        "out": [0, 0],
        "in": [0, 0],
        "connections": 0,
        "dialled": None,
    }


def _host(
    counters: Counters, host: str, kind: str, elements: list[ElementCount], dialled: Mapping[int, Tally]
) -> Document:
    marks = {element.mark for element in elements}
    read = [Mark.of(mark).block for mark in marks if Mark.of(mark).kind is Kind.INSPECT]
    return _row(host, kind) | {
        "ports": sorted({f"{e.port}/{e.protocol}" for e in elements}),
        "out": _pair(sum_tallies(Tally(e.packets, e.bytes) for e in elements)),
        "in": _pair(sum_tallies(counters.replies.get(mark, Tally()) for mark in marks)),
        "connections": sum(counters.opened.get(mark, Tally()).packets for mark in marks),
        "dialled": _pair(sum_tallies(dialled.get(block, Tally()) for block in read)) if read else None,
    }


def _unlisted(controller: Controller, counters: Counters, workspace: str) -> Document:
    index = controller.wants[workspace].index
    marks = [
        m for m in counters.replies if (Mark.of(m).workspace, Mark.of(m).block) == (index, UNLISTED_BLOCK)
    ]
    row = _gone("(unlisted)", "unlisted", controller.remembered.account(workspace))
    received = sum_tallies(counters.replies[mark] for mark in marks) + Tally(*row["in"])
    return row | {
        "out": _pair(counters.unlisted.get(workspace, Tally())),
        "in": _pair(received),
        "connections": row["connections"] + sum(counters.opened.get(m, Tally()).packets for m in marks),
    }


def _retired(gone: Account, policy: Policy) -> list[Document]:
    """Hosts that were removed. What counted under a wildcard that is still there stands in its row."""
    patterns = {rule.host for rule in policy.hosts if rule.wildcard}
    hosts = dict.fromkeys((*gone.retired, *gone.dialled, *gone.replies, *gone.opened))
    elsewhere = {*patterns, "(unlisted)"}
    return [_gone(host, "removed", gone) for host in hosts if host not in elsewhere]


def _kind(rule: HostRule | CidrRule | LocalRule) -> str:
    return {HostRule: "host", CidrRule: "cidr", LocalRule: "local"}[type(rule)]


def _sum_links(counts: Iterable[LinkCounts]) -> LinkCounts:
    listed = list(counts)
    return LinkCounts(
        in_=sum_tallies(c.in_ for c in listed),
        ok=sum_tallies(c.ok for c in listed),
        denied=sum_tallies(c.denied for c in listed),
        other=sum_tallies(c.other for c in listed),
    )


def _link(counts: LinkCounts, *, admitted: str = "ok") -> Document:
    return {
        "in": _pair(counts.in_),
        admitted: _pair(counts.ok),
        "denied": _pair(counts.denied),
        "other": _pair(counts.other),
    }


def _budgets(counts: LinkCounts) -> Document:
    """[used, of how many], of a sandbox's own bounds; None where there is none."""
    used, bytes_ = counts.quota_used, counts.quota
    opened, connections = counts.connections_used, counts.connections
    return {
        "quota": None if bytes_ is None else [used, bytes_],
        "connections": None if connections is None else [opened, connections],
    }


def _pair(tally: Tally) -> list[int]:
    return [tally.packets, tally.bytes]


# ---- the rest


async def _ruleset(controller: Controller, visible: Visible) -> Document:
    return {"text": await controller.ruleset()}


async def _policy(controller: Controller, visible: Visible) -> Document:
    if len(visible) != 1:
        raise Refused(Reason.WORKSPACE, "name one workspace: egressctl policy explain WORKSPACE")
    (policy,) = visible.values()
    return policy_document(policy)


async def _diff(controller: Controller, visible: Visible) -> Document:
    """The directory against the policy in force, and the policy in force against the kernel as read back."""
    return {**await controller.apply(dry_run=True, by="diff"), "drift": await controller.drift()}


# ---- why


async def why(controller: Controller, policy: Policy, subject: str) -> Document:
    """Why a name or address is allowed or denied; a synthetic address stands for its name. Refused if
    the subject cannot be read."""
    try:
        meant = _meant(controller, policy, subject)
        found = explain(policy, meant, own=controller.pools.own, registry=controller.registry)
    except Unfit as error:
        raise Refused(Reason.PROTOCOL, str(error)) from error
    details = list(found.sentences[1:])
    if meant != subject:
        details.insert(0, f"in a sandbox {subject} is {meant}")
    details += await _leads(controller, policy, found.subject)
    decision, nowhere = found.decision, _nowhere(controller, policy, found.subject)
    if decision.allowed and nowhere:
        details.insert(0, f"by its rule it would be allowed: {decision.text}")
        decision = Decision(Verdict.DENIED, Reason.RESIDENCY, decision.rule, nowhere)
    return {
        "subject": subject,
        "workspace": policy.workspace,
        "verdict": str(decision.verdict),
        "reason": decision.reason.value,
        "text": decision.text,
        "details": details,
    }


def _nowhere(controller: Controller, policy: Policy, subject: Subject) -> str:
    """Why a listed name leads nowhere now, where residency has refused every address of it; else ""."""
    name = _name_of(subject)
    rule = rule_for(policy, name) if name else None
    if rule is None or rule.wildcard:
        return ""
    refused = controller.residency.refusals(policy, rule)
    if not refused or _addresses(controller, policy, rule):
        return ""
    return f"every address of {name} is refused, the last one because {refused[-1].finding.text}"


def _meant(controller: Controller, policy: Policy, subject: str) -> str:
    asked = Subject.of(subject)
    if isinstance(asked.destination, str):
        return subject
    if asked.destination.is_loopback:
        # Each local service stands at its own port of the sandbox's loopback.
        for rule in policy.locals:
            if any((p.number, p.protocol) == (asked.port, asked.protocol) for p in rule.ports):
                return f"{rule.key}:{asked.port}/{asked.protocol}"
        return subject
    place = controller.pools.block_of(asked.destination)
    for key, block in controller.blocks(policy.workspace).items():
        if place is not None and place[0] == block and not is_pattern(key):
            return key if asked.port is None else f"{key}:{asked.port}/{asked.protocol}"
    return subject


async def _leads(controller: Controller, policy: Policy, subject: Subject) -> list[str]:
    """Where the name leads at present; for one that a wildcard covers, what has become of it."""
    name = _name_of(subject)
    rule = rule_for(policy, name) if name else None
    if rule is None:
        return []
    if not rule.wildcard:
        led = _addresses(controller, policy, rule)
        return [_leads_to(led), *_judged(controller, policy, rule, led)]
    grant = controller.grants.of(policy.workspace).get(name)
    if grant is None:
        refused = _judged(controller, policy, replace(rule, host=name), [])
        return [*await _not_granted(controller, policy, rule), *refused]
    led = controller.addresses.of(grant.rule, terms=grant.terms)
    since = datetime.fromtimestamp(grant.since, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return [
        f"it was asked for and granted under {grant.wildcard} at {since}",
        _leads_to(led),
        *_judged(controller, policy, grant.rule, led),
    ]


def _judged(controller: Controller, policy: Policy, rule: HostRule, led: Iterable[str]) -> list[str]:
    """Under a pin: why it leads there, and to which addresses it does not lead. `rule` has the name."""
    if not policy.pin:
        return []
    judge, vouched = controller.registry.judge_address, bool(rule.vouch)
    lines = [judge(ip_address(address), pin=policy.pin, vouched=vouched)[0].text for address in led]
    for refusal in controller.residency.refusals(policy, rule)[-_MOST_REFUSED:]:
        at = datetime.fromtimestamp(refusal.since, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        lines.append(f"refused at {at} [{Reason.RESIDENCY}]: {refusal.finding.text}")
    return lines


_MOST_REFUSED = 16  # that are explained one by one


def _name_of(subject: Subject) -> str:
    """The name as the policy spells it, or nothing."""
    try:
        return canonical(subject.destination) if isinstance(subject.destination, str) else ""
    except Unfit:
        return ""


def _leads_to(addresses: list[str]) -> str:
    if not addresses:
        return "it has not resolved to any usable address"
    return f"it leads to {', '.join(addresses)}"


async def _not_granted(controller: Controller, policy: Policy, rule: HostRule) -> list[str]:
    """A name that would be granted when it is asked for, if there is budget left."""
    held, budget = len(controller.grants.of(policy.workspace)), policy.wildcards.workspace.names
    lines = [
        f"no sandbox holds it now: the first question for it under {rule.host} goes upstream, within budget",
        f"{held} of {budget} names are held by the workspace",
    ]
    refused = (await controller.refused_names()).get(policy.workspace, {})
    for reason in _BUDGETS:
        if refused.get(reason.value):
            lines.append(f"{refused[reason.value]} questions were refused [{reason.value}]: {reason.text}")
    return lines


_BUDGETS = (Reason.BUDGET_NAMES, Reason.BUDGET_BYTES, Reason.BUDGET_RATE)


def why_sandbox(sandbox: Sandbox, policy: Policy) -> Document:
    """Why a sandbox is there."""
    return {
        "subject": sandbox.link.device,
        "workspace": sandbox.workspace,
        "verdict": "allowed",
        "reason": Reason.ALLOWED.value,
        "text": f"uid {sandbox.caller.uid} is a member of {sandbox.workspace}",
        "details": [
            f"process {sandbox.caller.pid} holds it",
            f"its addresses are {sandbox.address4} and {sandbox.address6}",
            f"it runs {sandbox.command or 'a command that was not named'}",
            f"it is held to policy {policy.digest}",
            *_bounds(sandbox),
        ],
    }


def _bounds(sandbox: Sandbox) -> list[str]:
    """What its link alone is held to."""
    if sandbox.closed:
        return [f"nothing of what it sends is admitted [{Reason.CLOSED}]: {Reason.CLOSED.text}"]
    lines = []
    if sandbox.quota is not None:
        lines.append(f"it may send {sandbox.quota} bytes, denied ones included")
    if sandbox.connections is not None:
        lines.append(f"it may open {sandbox.connections} connections in all")
    return lines


async def _journal(controller: Controller, visible: Visible) -> Document:
    if not visible and visible is not controller.policies:
        raise Refused(Reason.MEMBER, "the journal is for root and for members of a workspace")
    return journal_document(await controller.journal())


_DOCUMENTS: dict[str, Callable[[Controller, Visible], Awaitable[Document]]] = {
    "journal": _journal,
    "status": _status,
    "counters": _counters,
    "ruleset": _ruleset,
    "policy": _policy,
    "diff": _diff,
}
