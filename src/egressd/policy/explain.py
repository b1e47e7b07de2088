"""A policy, and one decision, in words for the person who has to act on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from egressd.model.addresses import Address, Network
from egressd.model.errors import Unfit
from egressd.model.names import canonical, quoted
from egressd.model.verdicts import Reason
from egressd.policy.compiled import CidrRule, Guard, HostRule, Limits, LocalRule, Policy, Protocol, Rule
from egressd.policy.decide import Decision, decide_address, decide_flow, decide_name, parse_address
from egressd.policy.units import duration_text, size_text

__all__ = ["Explanation", "Subject", "explain_policy", "limit_text", "why"]

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
    if policy.residency:
        yield f"residency: {', '.join(policy.residency)}"
    yield from (f"limit: {name} {limit_text(name, value)}" for name, value in _limits(policy.limits))
    if not policy.rules:
        yield "allowed: nothing"
    yield from (f"allowed: {rule_text(rule)}" for rule in policy.rules)


def rule_text(rule: Rule) -> str:
    """`host api.example.com on 443/tcp (line 6)`."""
    ports = ", ".join(map(str, rule.ports))
    match rule:
        case HostRule():
            extra = ", also in private ranges" if rule.private else ""
            return f"host {rule.host} on {ports}{extra} (line {rule.line})"
        case CidrRule():
            return f"cidr {rule.network} on {ports} (line {rule.line})"
        case LocalRule():
            return f"local service {rule.service} on {ports} of this machine's loopback (line {rule.line})"


def limit_text(name: str, value: float) -> str:
    """A limit in the unit its document would use."""
    if name == "wall":
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


def why(policy: Policy, subject: str, *, own: Iterable[Network] = ()) -> Explanation:
    """Why is this allowed or denied here? `Unfit` if `subject` cannot be read."""
    asked = Subject.of(subject)
    decision = _decided(policy, asked, tuple(own))
    return Explanation(asked, decision, tuple(_sentences(policy, asked, decision)))


def _decided(policy: Policy, asked: Subject, own: tuple[Network, ...]) -> Decision:
    if asked.port is not None:
        return decide_flow(policy, asked.destination, port=asked.port, protocol=asked.protocol, own=own)
    if isinstance(asked.destination, str):
        return decide_name(policy, asked.destination)
    return decide_address(policy, asked.destination, own=own)


def _sentences(policy: Policy, asked: Subject, decision: Decision) -> Iterator[str]:
    yield f"{decision.verdict} in {policy.workspace}: {decision.text} [{decision.reason}]"
    listed = decision.enforced or decision
    if decision.enforced is not None:
        yield f"under guard: enforce it would be {listed.verdict}: {listed.text} [{listed.reason}]"
    if listed.rule is not None:
        yield f"the rule is: {rule_text(listed.rule)}"
    if listed.reason is Reason.NAME and isinstance(asked.destination, str):
        yield from _near_misses(policy, asked.destination)


def _near_misses(policy: Policy, text: str) -> Iterator[str]:
    """A rule that almost covers the name: its parent, its child, or its other spelling."""
    try:
        name = canonical(text)
    except Unfit as error:
        if error.remedy:
            yield error.remedy
        return
    hosts = {rule.key: rule for rule in policy.rules if not isinstance(rule, CidrRule)}
    related = [key for key in hosts if key.endswith("." + name) or name.endswith("." + key)]
    if related:
        nearest = min(related, key=lambda key: (abs(len(key) - len(name)), key))
        yield f"a rule covers exactly the name it lists, and line {hosts[nearest].line} lists {nearest}"
        return
    for close in difflib.get_close_matches(name, _alike(name, hosts), n=1, cutoff=0.8):
        yield f"did you mean {close} (line {hosts[close].line})?"


def _alike(name: str, hosts: Iterable[str]) -> list[str]:
    """Names of nearly the same length and letters: comparing with all of 16,000 would take seconds."""
    letters = set(name)
    return [
        key for key in hosts if abs(len(key) - len(name)) <= 4 and len(letters.symmetric_difference(key)) <= 4
    ][:2000]
