"""A policy, and one decision, in words for the person who has to act on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from egressd.model.addresses import Address, Network
from egressd.model.errors import Unfit
from egressd.model.names import canonical, covering, matches, quoted
from egressd.model.verdicts import Reason
from egressd.policy.compiled import (
    Barred,
    Budget,
    Budgets,
    CidrRule,
    Ech,
    Guard,
    HostRule,
    Limits,
    LocalRule,
    Policy,
    Port,
    Protocol,
    Provider,
    Route,
    Rule,
    Verify,
)
from egressd.policy.decide import Decision, decide_address, decide_flow, decide_name, parse_address
from egressd.policy.routing import Selection, selections_by_url
from egressd.policy.units import duration_text, size_text
from egressd.residency.judge import Code
from egressd.residency.registry import Registry

__all__ = ["Explanation", "Subject", "budget_text", "explain_policy", "limit_text", "why"]

_GUARDS = {
    Guard.ENFORCE: "only what is listed is reachable",
    Guard.OBSERVE: "nothing is restricted; what would be denied is recorded",
    Guard.OFF: "nothing is restricted, only counted",
}


# ---- a policy


def explain_policy(policy: Policy) -> str:
    """The whole policy, one fact per line."""
    return "\n".join(_lines(policy))


def _lines(policy: Policy) -> Iterator[str]:
    yield f"workspace {policy.workspace} ({policy.digest[:19]})"
    yield f"guard: {policy.guard}: {_GUARDS[policy.guard]}"
    yield f"members: {', '.join(map(str, policy.members)) or 'none, so nobody may spawn here'}"
    if policy.local_only:
        yield f"local_only: {Reason.LOCAL_ONLY.text}, whatever the guard is"
    if policy.residency:
        yield f"residency: {_pin_text(policy)}"
    yield from (f"limit: {name} {limit_text(name, value)}" for name, value in _limits(policy.limits))
    if any(rule.wildcard for rule in policy.hosts):
        yield f"names of wildcards: {_budgets_text(policy.wildcards)}"
    if not policy.rules:
        yield "allowed: nothing"
    yield from (f"allowed: {rule_text(rule)}" for rule in policy.rules)
    yield from (f"barred: {_barred_text(barred)}" for barred in policy.barred)
    yield from (f"provider {provider.name}: {_provider_text(provider)}" for provider in policy.providers)
    selections = selections_by_url(policy)
    yield from (f"route {one.name}: {_route_text(one, selections[one.name])}" for one in policy.routes)


def _pin_text(policy: Policy) -> str:
    """`CH, EEA (31 countries)`."""
    count = len(policy.pin.countries)
    return f"{policy.pin} ({count} {'country' if count == 1 else 'countries'})"


def _barred_text(barred: Barred) -> str:
    """What would be allowed, and why it is not."""
    remedy = f" ({barred.finding.remedy})" if barred.finding.remedy else ""
    return f"{rule_text(barred.rule)}: {barred.finding.text}{remedy} [{barred.reason}]"


def _provider_text(provider: Provider) -> str:
    where = f", {provider.region}" if provider.region else ""
    source = (
        f", by {provider.declared.source_url}" if provider.declared and provider.declared.source_url else ""
    )
    models = f", {len(provider.models)} models" if provider.models else ""
    finding = provider.finding
    standing = "complies" if finding.compliant else "does not comply"
    judged = f": {standing}: {finding.text} [{finding.code}]" if finding.code is not Code.UNPINNED else ""
    return f"{provider.type} at {provider.base_url}{where}{source}{models} (line {provider.line}){judged}"


def _route_text(route: Route, selection: Selection) -> str:
    order = ", ".join(route.providers)
    if selection.selected is None:
        return f"{order} (line {route.line}): none is selected: {selection.text}"
    name = selection.selected.provider
    return f"{order} (line {route.line}): {name} by its URL; egressctl route says by its addresses"


def rule_text(rule: Rule) -> str:
    """`host api.example.com on 443/tcp (line 6)`."""
    ports = ", ".join(map(str, rule.ports))
    through = f", for provider {', '.join(rule.providers)}" if rule.providers else ""
    match rule:
        case HostRule():
            extra = (", also in private ranges" if rule.private else "") + _vouched(rule) + through
            return f"host {rule.host} on {ports}{_verified(rule)}{extra} (line {rule.line})"
        case CidrRule():
            return f"cidr {rule.network} on {ports}{_vouched(rule)}{through} (line {rule.line})"
        case LocalRule():
            where = f"on {ports} of this machine's loopback"
            return f"local service {rule.service} {where}{through} (line {rule.line})"


def _vouched(rule: HostRule | CidrRule) -> str:
    return f', vouched for: "{rule.vouch}"' if rule.vouch else ""


def _verified(rule: HostRule) -> str:
    """Which ports are checked for more than the address: `, 443/tcp verified by SNI`."""
    read = [str(port) for port, how in rule.inspected if how is Verify.SNI]
    if not read:
        return ""
    which = "" if len(read) == len(rule.ports) else f"of which {', '.join(read)} "
    ech = ", ECH allowed" if rule.ech is Ech.ALLOW else ""
    return f", {which}verified by SNI{ech}"


def _budgets_text(budgets: Budgets) -> str:
    return (
        f"{_budget_text(budgets.sandbox)} for a sandbox, {_budget_text(budgets.workspace)} for the workspace"
    )


def _budget_text(budget: Budget) -> str:
    labels = budget_text("bytes", budget.bytes)
    return f"{budget.names} names, {labels} of labels, {budget_text('rate', budget.rate)} a second"


def budget_text(name: str, value: float) -> str:
    """A part of a budget as its document would write it."""
    return size_text(int(value)) if name == "bytes" else f"{value:g}"


def limit_text(name: str, value: float) -> str:
    """A limit in the unit its document would use."""
    if name in ("wall", "idle"):
        return duration_text(value)
    return size_text(int(value)) if name in ("memory", "egress_bytes") else str(int(value))


def _limits(limits: Limits) -> Iterator[tuple[str, float]]:
    for name in Limits.__slots__:
        value = getattr(limits, name)
        if value is not None:
            yield name, value


# ---- one decision


@dataclass(frozen=True, slots=True)
class Subject:
    """What somebody asks about: a name or an address, perhaps with a port."""

    destination: Address | str
    port: int | None = None
    protocol: Protocol = Protocol.TCP

    @classmethod
    def of(cls, text: str) -> Subject:
        """`api.example.com`, `api.example.com:443`, `10.0.0.1:53/udp`, `[2001:db8::1]:443`, `2001:db8::1`.

        `Unfit` for a port that is none; the name itself may be anything.
        """
        if "://" in text:
            raise Unfit(f"{quoted(text)} is a URL", "write only the host name, and :PORT after it")
        rest, slash, protocol = text.partition("/")
        if slash and protocol not in tuple(Protocol):
            raise Unfit(f"{quoted(text)} has an unknown protocol", "write tcp or udp after the slash")
        host, port = _split(rest)
        if slash and port is None:
            raise Unfit(f"{quoted(text)} has a protocol but no port", "write api.example.com:443/tcp")
        return cls(parse_address(host) or host, port, Protocol(protocol) if slash else Protocol.TCP)


def _split(text: str) -> tuple[str, int | None]:
    host, colon, port = text.rpartition(":")
    if text.startswith("[") and text.endswith("]"):
        return text[1:-1], None
    if not colon or (":" in host and not host.startswith("[")):
        return text, None  # no port, or a bare IPv6 address
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise Unfit(f"{quoted(port)} is not a port", "ports are 1 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decision, and everything a person may want to know about it, one sentence each."""

    subject: Subject
    decision: Decision
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def why(
    policy: Policy, subject: str, *, own: Iterable[Network] = (), registry: Registry | None = None
) -> Explanation:
    """Why is this allowed or denied here? `Unfit` if `subject` cannot be read. With a `registry`, names that
    wildcards cover are judged, too."""
    asked = Subject.of(subject)
    decision = _decided(policy, asked, tuple(own), registry)
    return Explanation(asked, decision, tuple(_sentences(policy, asked, decision)))


def _decided(policy: Policy, asked: Subject, own: tuple[Network, ...], registry: Registry | None) -> Decision:
    if asked.port is not None:
        return decide_flow(
            policy, asked.destination, port=asked.port, protocol=asked.protocol, own=own, registry=registry
        )
    if isinstance(asked.destination, str):
        return decide_name(policy, asked.destination, registry=registry)
    return decide_address(policy, asked.destination, own=own)


def _sentences(policy: Policy, asked: Subject, decision: Decision) -> Iterator[str]:
    yield f"{decision.verdict} in {policy.workspace}: {decision.text} [{decision.reason}]"
    listed = decision.enforced or decision
    if decision.enforced is not None:
        yield f"under guard: enforce it would be {listed.verdict}: {listed.text} [{listed.reason}]"
    if listed.rule is not None:
        yield f"the rule is: {rule_text(listed.rule)}"
    if listed.reason in (Reason.RESIDENCY, Reason.LOCAL_ONLY):
        yield from _what_to_change(policy, listed)
    if listed.allowed and isinstance(listed.rule, HostRule):
        yield from _conditions(policy, listed.rule, asked)
    if listed.reason is Reason.PORT and isinstance(listed.rule, HostRule):
        yield from _set_aside(policy, listed.rule, asked)
    if listed.reason is Reason.NAME and isinstance(asked.destination, str):
        yield from _near_misses(policy, asked.destination)


def _what_to_change(policy: Policy, listed: Decision) -> Iterator[str]:
    if listed.reason is Reason.RESIDENCY:
        yield f"the workspace is pinned to {_pin_text(policy)}"
    if listed.remedy:
        line = f"line {listed.rule.line}: " if listed.rule and listed.reason is Reason.RESIDENCY else ""
        yield f"{line}{listed.remedy}"


def _conditions(policy: Policy, rule: HostRule, asked: Subject) -> Iterator[str]:
    """What else must hold for a flow that the list allows."""
    if asked.port is not None and rule.verify_on(Port(asked.port, asked.protocol)) is Verify.SNI:
        ech = (
            "may hide another in it" if rule.ech is Ech.ALLOW else "may not hide another in it (ech: refuse)"
        )
        yield f"its TLS ClientHello is read: it must ask for that very name, and {ech}"
    if policy.pin:
        yield _addresses_text(policy, rule)
    if rule.wildcard:
        budget = _budget_text(policy.wildcards.sandbox)
        yield f"a name under {rule.host} is looked up when first asked for; a sandbox has a budget: {budget}"


def _addresses_text(policy: Policy, rule: HostRule) -> str:
    text = f"it leads only to addresses that are published for {policy.pin}"
    if not rule.vouch:
        return text
    return f'{text}, or that nobody can place, for which line {rule.line} vouches: "{rule.vouch}"'


def _set_aside(policy: Policy, rule: HostRule, asked: Subject) -> Iterator[str]:
    """A wider wildcard would allow the port; but a name has one rule."""
    hosts = {other.host: other for other in policy.hosts}
    for host in covering(rule.host):
        wider = hosts.get(host)
        if wider is not None and Port(asked.port or 0, asked.protocol) in wider.ports:
            yield (
                f"line {wider.line} allows it to names under {wider.host}; but a name has one rule, the most"
                f" specific one: add the port to line {rule.line}"
            )
            return


def _near_misses(policy: Policy, text: str) -> Iterator[str]:
    """A rule that almost covers the name: its parent, its child, or its other spelling."""
    try:
        name = canonical(text)
    except Unfit as error:
        if error.remedy:
            yield error.remedy
        return
    hosts = {rule.key: rule for rule in policy.rules if not isinstance(rule, CidrRule)}
    around = [rule for rule in policy.hosts if rule.wildcard and matches("**." + _base(rule), "x." + name)]
    if around:
        nearest_wildcard = max(around, key=lambda rule: (len(rule.host), rule.host))
        yield _not_covered(nearest_wildcard, name)
        return
    related = [key for key in hosts if key.endswith("." + name) or name.endswith("." + key)]
    if related:
        nearest = min(related, key=lambda key: (abs(len(key) - len(name)), key))
        yield f"a rule covers exactly the name it lists, and line {hosts[nearest].line} lists {nearest}"
        return
    for close in difflib.get_close_matches(name, _alike(name, hosts), n=1, cutoff=0.8):
        yield f"did you mean {close} (line {hosts[close].line})?"


def _base(rule: HostRule) -> str:
    return rule.host.lstrip("*").removeprefix(".")


def _not_covered(rule: HostRule, name: str) -> str:
    if name == _base(rule):
        return f"{rule.host} (line {rule.line}) does not cover {name} itself: add a rule for it"
    return f"{rule.host} (line {rule.line}) covers one label and no more; **.{_base(rule)} is for any depth"


def _alike(name: str, hosts: Iterable[str]) -> list[str]:
    """Names of nearly the same length and letters: comparing with all of 16,000 would take seconds."""
    letters = set(name)
    return [
        key for key in hosts if abs(len(key) - len(name)) <= 4 and len(letters.symmetric_difference(key)) <= 4
    ][:2000]
