"""What changes from one policy to the next, and whether it gives or takes; each change describes itself."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from egressd.model.names import covering
from egressd.policy.compiled import (
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
    Rule,
    Verify,
)
from egressd.policy.explain import budget_text, limit_text

__all__ = ["Action", "Change", "Section", "diff", "opens"]


class Action(enum.StrEnum):
    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


class Section(enum.StrEnum):
    WORKSPACE = "workspace"
    GUARD = "guard"
    MEMBER = "member"
    RESIDENCY = "residency"
    HOST = "host"
    CIDR = "cidr"
    LOCAL = "local"
    LIMIT = "limit"
    WILDCARDS = "wildcards"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. `widens` and `narrows` say whether it permits more or less than before."""

    action: Action
    section: Section
    subject: str  # the host, network, service, member or limit; "" for the guard and the residency
    detail: str  # which property of it: "443/tcp", "private"; "" when the whole thing came or went
    before: str = ""
    after: str = ""
    widens: bool = False
    narrows: bool = False

    @property
    def sign(self) -> str:
        """`+` permits more, `-` permits less, `~` both or neither."""
        return {(True, False): "+", (False, True): "-"}.get((self.widens, self.narrows), "~")

    def describe(self) -> str:
        """`+ host api.example.com: 8443/tcp added`."""
        what = " ".join(part for part in (str(self.section), self.subject) if part)
        detail = f" {self.detail}" if self.detail else ""
        values = {
            Action.ADDED: f" ({self.after})" if self.after else "",
            Action.REMOVED: f" ({self.before})" if self.before else "",
            Action.CHANGED: f" from {self.before} to {self.after}",
        }[self.action]
        return f"{self.sign} {what}:{detail} {self.action}{values}"


def diff(old: Policy | None, new: Policy | None) -> tuple[Change, ...]:
    """Every difference in meaning; () for two policies that say the same. None is a workspace that is not."""
    if old is None and new is None:
        return ()
    return tuple(_changes(old, new))


def _changes(old: Policy | None, new: Policy | None) -> Iterator[Change]:
    if old is None and new is not None:
        yield Change(Action.ADDED, Section.WORKSPACE, new.workspace, "", after=str(new.guard), widens=True)
    elif new is None and old is not None:
        yield Change(
            Action.REMOVED, Section.WORKSPACE, old.workspace, "", before=str(old.guard), narrows=True
        )
    elif old is not None and new is not None:
        yield from _guard(old.guard, new.guard)
        yield from _residency(old.residency, new.residency)
        yield from _limits(old.limits, new.limits)
        yield from _budgets(old.wildcards, new.wildcards)
    yield from _members(old, new)
    yield from _rules(old, new)


def _guard(old: Guard, new: Guard) -> Iterator[Change]:
    if old is new:
        return
    widens, narrows = old is Guard.ENFORCE, new is Guard.ENFORCE
    yield Change(Action.CHANGED, Section.GUARD, "", "", str(old), str(new), widens=widens, narrows=narrows)


def _residency(old: tuple[str, ...], new: tuple[str, ...]) -> Iterator[Change]:
    """No jurisdictions at all means any."""
    before, after = set(old), set(new)
    if before == after:
        return
    widens = bool(before) and (not after or not after <= before)
    narrows = bool(after) and (not before or not before <= after)
    was, will_be = (", ".join(sorted(codes)) or "any" for codes in (before, after))
    yield Change(Action.CHANGED, Section.RESIDENCY, "", "", was, will_be, widens=widens, narrows=narrows)


def _limits(old: Limits, new: Limits) -> Iterator[Change]:
    for name in Limits.__slots__:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield _limit(name, before, after)


def _limit(name: str, before: float | None, after: float | None) -> Change:
    widens = after is None or (before is not None and after > before)
    was, will_be = ("none" if value is None else limit_text(name, value) for value in (before, after))
    if name == "idle":  # when a silent connection ends opens nothing and closes nothing
        return Change(Action.CHANGED, Section.LIMIT, name, "", was, will_be)
    return Change(Action.CHANGED, Section.LIMIT, name, "", was, will_be, widens=widens, narrows=not widens)


def _budgets(old: Budgets, new: Budgets) -> Iterator[Change]:
    for whose in Budgets.__slots__:
        for name in Budget.__slots__:
            before, after = getattr(getattr(old, whose), name), getattr(getattr(new, whose), name)
            if before != after:
                was, will_be = budget_text(name, before), budget_text(name, after)
                more = after > before
                yield Change(
                    Action.CHANGED,
                    Section.WILDCARDS,
                    whose,
                    name,
                    was,
                    will_be,
                    widens=more,
                    narrows=not more,
                )


def _members(old: Policy | None, new: Policy | None) -> Iterator[Change]:
    before = set(old.members) if old else set()
    after = set(new.members) if new else set()
    for member in sorted(before - after):
        yield Change(Action.REMOVED, Section.MEMBER, str(member), "", narrows=True)
    for member in sorted(after - before):
        yield Change(Action.ADDED, Section.MEMBER, str(member), "", widens=True)


def _rules(old: Policy | None, new: Policy | None) -> Iterator[Change]:
    before = {rule.key: rule for rule in old.rules} if old else {}
    after = {rule.key: rule for rule in new.rules} if new else {}
    for key, rule in before.items():
        if key not in after:
            heir = _heir(rule, after)
            yield Change(
                Action.REMOVED, _section(rule), key, "", before=_terms(rule),
                widens=opens(rule, heir), narrows=heir is None or opens(heir, rule),
            )  # fmt: skip
    for key, rule in after.items():
        if key not in before:
            heir = _heir(rule, before)
            yield Change(
                Action.ADDED, _section(rule), key, "", after=_terms(rule),
                widens=heir is None or opens(heir, rule), narrows=opens(rule, heir),
            )  # fmt: skip
        else:
            yield from _rule(before[key], rule)


def _heir(rule: Rule, rules: Mapping[str, Rule]) -> HostRule | None:
    """The wildcard among `rules` that governs what `rule` covers where `rule` itself is not.

    A name has one rule. So a rule under a wildcard takes its names out of that wildcard when it comes, and
    gives them back when it goes: either may open as well as close.
    """
    if isinstance(rule, HostRule):
        for host in covering(rule.host):
            wider = rules.get(host)
            if isinstance(wider, HostRule):
                return wider
    return None


def opens(old: Rule | None, new: Rule | None) -> bool:
    """Does `new` permit anything that `old` does not, for a name that `old` governed?"""
    if not isinstance(old, HostRule) or not isinstance(new, HostRule):
        return False
    unread = any(_verify_widens(old, new, port) for port in set(old.ports) & set(new.ports))
    return (
        bool(set(new.ports) - set(old.ports)) or new.private > old.private or unread or _ech_widens(old, new)
    )


def _verify_widens(old: HostRule, new: HostRule, port: Port) -> bool:
    return new.verify_on(port) is Verify.ADDRESS and old.verify_on(port) is Verify.SNI


def _ech_widens(old: HostRule, new: HostRule) -> bool:
    """Only where something is read before and after does ECH make a difference of its own."""
    return bool(old.inspected and new.inspected) and (old.ech, new.ech) == (Ech.REFUSE, Ech.ALLOW)


def _rule(old: Rule, new: Rule) -> Iterator[Change]:
    """Two rules of one key. Their kinds agree: a key tells host, network and service apart."""
    section = _section(new)
    for port in sorted(set(old.ports) - set(new.ports)):
        yield Change(Action.REMOVED, section, new.key, _port_text(old, port), narrows=True)
    for port in sorted(set(new.ports) - set(old.ports)):
        yield Change(Action.ADDED, section, new.key, _port_text(new, port), widens=True)
    if isinstance(old, HostRule) and isinstance(new, HostRule):
        yield from _host(old, new)


def _host(old: HostRule, new: HostRule) -> Iterator[Change]:
    if old.private is not new.private:
        was, will_be = (str(value).lower() for value in (old.private, new.private))
        yield _changed(new, "private", was, will_be, widens=new.private)
    for port in sorted(set(old.ports) & set(new.ports)):
        was, will_be = str(old.verify_on(port)), str(new.verify_on(port))
        if was != will_be:
            yield _changed(new, f"verify on {port}", was, will_be, widens=_verify_widens(old, new, port))
    if old.inspected and new.inspected and old.ech is not new.ech:
        yield _changed(new, "ech", str(old.ech), str(new.ech), widens=new.ech is Ech.ALLOW)


def _changed(rule: HostRule, detail: str, was: str, will_be: str, *, widens: bool) -> Change:
    return Change(
        Action.CHANGED, Section.HOST, rule.key, detail, was, will_be, widens=widens, narrows=not widens
    )


def _section(rule: Rule) -> Section:
    match rule:
        case HostRule():
            return Section.HOST
        case CidrRule():
            return Section.CIDR
        case LocalRule():
            return Section.LOCAL


def _terms(rule: Rule) -> str:
    extra = ""
    if isinstance(rule, HostRule):
        extra = ", private" * rule.private + ", ech allowed" * (rule.ech is Ech.ALLOW)
    return ", ".join(_port_text(rule, port) for port in rule.ports) + extra


def _port_text(rule: Rule, port: Port) -> str:
    """As a document may write it: a port whose connections are read is N/tls."""
    read = isinstance(rule, HostRule) and rule.verify_on(port) is Verify.SNI
    return f"{port.number}/tls" if read else str(port)
