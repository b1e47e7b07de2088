"""What a policy says about a name, an address or a flow. The same answers as the kernel and the resolver.

Nothing enforces by calling this: the guard's maps and the resolver's table are compiled from the same
policy. It is what `egressctl why` and the tests ask, and so must be the plainest statement of the rules:
a list of what is allowed, and denial for the rest.

A name is governed by one rule: the one that lists it, else the most specific wildcard that covers it
(`rule_for`). Rules for a name do not add up with those of a wildcard around it: whoever lists a name has
said all that is allowed of it, and a wider wildcard added later does not open more of it. So a rule that is
barred leaves its names with none: no wildcard around takes them over.

What residency or `local_only` bars of the *names* that are listed is denied under any guard: the resolver
answers for them. Of addresses that nobody has to ask for, a guard that does not enforce denies none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from egressd.model.addresses import Address, AddressClass, Network, classes, classify, usable
from egressd.model.errors import Unfit
from egressd.model.names import MAX_LABEL, MAX_NAME, canonical, covering
from egressd.model.verdicts import Reason, Verdict
from egressd.policy.compiled import (
    Barred,
    CidrRule,
    Guard,
    HostRule,
    LocalRule,
    Policy,
    Port,
    Protocol,
    Rule,
    Verify,
)
from egressd.residency.registry import Registry

__all__ = [
    "Decision", "barred_for", "decide_address", "decide_flow", "decide_name", "governing", "parse_address",
    "rule_for", "written_among",
]  # fmt: skip

# Refused in every mode: they would mean the gateway or the sandbox itself, or nobody in particular.
_NEVER_FORWARDED = frozenset(
    {
        AddressClass.LOOPBACK,
        AddressClass.MULTICAST,
        AddressClass.BROADCAST,
        AddressClass.UNSPECIFIED,
        AddressClass.THIS_NETWORK,
        AddressClass.OWN,
    }
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict and why. One that nobody filled in denies.

    `rule` is the rule that allows, or the one that nearly did. Under `off` and `observe`, `enforced` is
    what the list alone says: what `guard: enforce` would do.
    """

    verdict: Verdict = Verdict.DENIED
    reason: Reason = Reason.UNKNOWN
    rule: Rule | None = None
    text: str = Reason.UNKNOWN.text
    enforced: Decision | None = None
    remedy: str = ""  # of what residency or local_only denies

    @property
    def allowed(self) -> bool:
        return self.verdict is Verdict.ALLOWED


def rule_for(policy: Policy, name: str) -> HostRule | None:
    """The one rule that governs a canonical host name: exactly that name, else the most specific wildcard;
    None where there is none, and where that one is barred.

    More labels after the asterisks are more specific, and of equal ones `*.` is before `**.`. The controller
    grants by it; the resolver walks `covering(name)` through a table of its own, which is the same.
    """
    found = written_among(governing(policy), name)
    return found if isinstance(found, HostRule) else None


def barred_for(policy: Policy, name: str) -> Barred | None:
    """The rule that would govern a canonical name, if it is barred."""
    found = written_among(governing(policy), name) if policy.barred else None
    return found if isinstance(found, Barred) else None


def governing(policy: Policy) -> dict[str, HostRule | Barred]:
    """What is written about each host or wildcard, whether it takes part or not."""
    barred = {one.rule.host: one for one in policy.barred if isinstance(one.rule, HostRule)}
    return {**{rule.host: rule for rule in policy.hosts}, **barred}


def written_among(rules: Mapping[str, HostRule | Barred], name: str) -> HostRule | Barred | None:
    """What governs a canonical name, barred or not: `rules` are what `governing` says of a policy."""
    return next((rules[host] for host in covering(name) if host in rules), None)


def decide_name(policy: Policy, name: str, *, registry: Registry | None = None) -> Decision:
    """May the resolver answer for `name`, in any spelling? With a `registry`, a name that a wildcard covers
    is judged as it will be when it is first asked for."""
    listed = _listed_name(policy, name, registry)
    if policy.holding is Guard.ENFORCE or listed.reason in _BARS:
        return listed
    return _unrestricted(policy, listed) if _is_wire_name(name) else listed


def decide_address(policy: Policy, address: Address, *, own: Iterable[Network] = ()) -> Decision:
    """May anything be sent to this address at all? Says on which ports."""
    own = tuple(own)
    rules = [rule for rule in policy.cidrs if address in rule.network]
    if not rules or not usable(address, private=True, own=own):
        return _guarded(policy, _unlisted_address(policy, address, own), address, own)
    ports = ", ".join(str(port) for rule in rules for port in rule.ports)
    return _guarded(policy, _allow(rules[0], f"{rules[0].network} is allowed on {ports}"), address, own)


def decide_flow(
    policy: Policy,
    destination: Address | str,
    *,
    port: int,
    protocol: Protocol,
    own: Iterable[Network] = (),
    registry: Registry | None = None,
) -> Decision:
    """May a sandbox send to `port` of a host name, or of a real address?

    Synthetic addresses stand for names: whoever has one turns it into the name first.
    """
    if not 1 <= port <= 65535:
        return Decision(Verdict.DENIED, Reason.PORT, None, f"{port} is not a port")
    wanted = Port(port, protocol)
    own = tuple(own)
    if isinstance(destination, str):
        address = parse_address(destination)
        if address is None:
            return _decide_host(policy, destination, wanted, registry)
        destination = address
    return _guarded(policy, _listed_address(policy, destination, wanted, own), destination, own)


def parse_address(text: str) -> Address | None:
    """The address, or None. One with a scope is none: a scope may hold any character, and none leads out."""
    try:
        return None if "%" in text else ip_address(text)
    except ValueError:
        return None


# ---- names


def _listed_name(policy: Policy, name: str, registry: Registry | None) -> Decision:
    try:
        wanted = canonical(name)
    except Unfit as error:
        return Decision(Verdict.DENIED, Reason.NAME, None, error.text)
    rule = _rule_for(policy, wanted)
    if rule is None:
        barred = barred_for(policy, wanted)
        if barred is not None:
            return _barred(barred, wanted)
        text = f"{wanted} is not on the list of {policy.workspace}"
        return Decision(Verdict.DENIED, Reason.NAME, None, text)
    if registry is not None and isinstance(rule, HostRule) and rule.wildcard:
        found = registry.judge_name(wanted, pin=policy.pin)
        if not found.compliant:
            return _barred(Barred(rule, Reason.RESIDENCY, found), wanted)
    return _allow(rule, f"{_named(rule, wanted)} is allowed on {_ports(rule)}{_as(rule)}")


_BARS = frozenset({Reason.RESIDENCY, Reason.LOCAL_ONLY})


def _barred(barred: Barred, name: str = "") -> Decision:
    """Denied although it is written: by a rule of this line, which takes no part."""
    rule = barred.rule
    text = f"{_named(rule, name)} is listed{_as(rule)} (line {rule.line}) and barred: {barred.finding.text}"
    return Decision(Verdict.DENIED, barred.reason, rule, text, remedy=barred.finding.remedy)


def _decide_host(policy: Policy, name: str, wanted: Port, registry: Registry | None) -> Decision:
    listed = _listed_name(policy, name, registry)
    if listed.allowed and listed.rule is not None:
        listed = _on_port([listed.rule], wanted, canonical(name))
    if policy.holding is Guard.ENFORCE or listed.reason in _BARS or not _is_wire_name(name):
        return listed
    return _unrestricted(policy, listed)


def _rule_for(policy: Policy, name: str) -> HostRule | LocalRule | None:
    """Hosts have a dot and services have none, so that a name is at most one of them."""
    service = next((rule for rule in policy.locals if rule.service == name), None)
    return service or rule_for(policy, name)


def _on_port(rules: Sequence[Rule], wanted: Port, name: str = "") -> Decision:
    for rule in rules:
        if wanted in rule.ports:
            text = f"{_named(rule, name)} is allowed on {wanted}{_as(rule)}{_checked(rule, wanted)}"
            return _allow(rule, text)
    ports = ", ".join(map(_ports, rules))
    text = f"{_named(rules[0], name)} is allowed on {ports}{_as(rules[0])}, not on {wanted}"
    return Decision(Verdict.DENIED, Reason.PORT, rules[0], text)


def _is_wire_name(name: str) -> bool:
    """Could a DNS question carry it? All that is asked of a name when nothing is restricted."""
    labels = name.removesuffix(".").split(".")
    return (
        len(name) <= MAX_NAME + 1
        and name.isascii()
        and name.isprintable()
        and " " not in name
        and all(1 <= len(label) <= MAX_LABEL for label in labels)
    )


# ---- addresses


def _listed_address(policy: Policy, address: Address, wanted: Port, own: tuple[Network, ...]) -> Decision:
    rules = [rule for rule in policy.cidrs if address in rule.network]
    if not rules or not usable(address, private=True, own=own):
        return _unlisted_address(policy, address, own)
    return _on_port(rules, wanted)


def _unlisted_address(policy: Policy, address: Address, own: tuple[Network, ...]) -> Decision:
    if not usable(address, private=True, own=own):
        kind = AddressClass.OWN if _is_own(address, own) else classify(address)
        text = f"{address} is {kind}, which no rule may reach"
        return Decision(Verdict.DENIED, Reason.ADDRESS, None, text)
    for one in policy.barred:
        if isinstance(one.rule, CidrRule) and address in one.rule.network:
            return _barred(one)
    text = f"no cidr rule contains {address}; hosts are reached by name, not by their addresses"
    return Decision(Verdict.DENIED, Reason.UNLISTED, None, text)


def _guarded(policy: Policy, listed: Decision, address: Address, own: tuple[Network, ...]) -> Decision:
    """The list's decision, or what becomes of it when the guard does not enforce."""
    never = _is_own(address, own) or bool(classes(address) & _NEVER_FORWARDED)
    return listed if policy.holding is Guard.ENFORCE or never else _unrestricted(policy, listed)


def _is_own(address: Address, own: tuple[Network, ...]) -> bool:
    return any(address in network for network in own if network.version == address.version)


# ---- both


def _unrestricted(policy: Policy, listed: Decision) -> Decision:
    """Allowed because the guard does not enforce; what the list says stays on record."""
    text = f"guard: {policy.guard} counts and does not restrict"
    return Decision(Verdict.ALLOWED, Reason.UNRESTRICTED, listed.rule, text, listed)


def _allow(rule: Rule, text: str) -> Decision:
    return Decision(Verdict.ALLOWED, Reason.ALLOWED, rule, f"{text} (line {rule.line})")


def _ports(rule: Rule) -> str:
    return ", ".join(map(str, rule.ports))


def _named(rule: Rule, name: str) -> str:
    match rule:
        case HostRule():
            return name
        case CidrRule():
            return rule.key
        case LocalRule():
            return f"the local service {rule.service}"


def _as(rule: Rule) -> str:
    return f" as {rule.host}" if isinstance(rule, HostRule) and rule.wildcard else ""


def _checked(rule: Rule, port: Port) -> str:
    read = isinstance(rule, HostRule) and rule.verify_on(port) is Verify.SNI
    return ", if its TLS asks for that name" if read else ""
