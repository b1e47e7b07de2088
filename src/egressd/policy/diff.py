"""What changes from one policy to the next, and whether it gives or takes; each change describes itself."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from egressd.policy.compiled import CidrRule, Guard, HostRule, Limits, LocalRule, Policy, Rule, Verify
from egressd.policy.explain import limit_text

__all__ = ["Action", "Change", "Section", "diff"]


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
    return Change(Action.CHANGED, Section.LIMIT, name, "", was, will_be, widens=widens, narrows=not widens)


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
            yield Change(Action.REMOVED, _section(rule), key, "", before=_terms(rule), narrows=True)
    for key, rule in after.items():
        if key not in before:
            yield Change(Action.ADDED, _section(rule), key, "", after=_terms(rule), widens=True)
        else:
            yield from _rule(before[key], rule)


def _rule(old: Rule, new: Rule) -> Iterator[Change]:
    """Two rules of one key. Their kinds agree: a key tells host, network and service apart."""
    section = _section(new)
    for port in sorted(set(old.ports) - set(new.ports)):
        yield Change(Action.REMOVED, section, new.key, str(port), narrows=True)
    for port in sorted(set(new.ports) - set(old.ports)):
        yield Change(Action.ADDED, section, new.key, str(port), widens=True)
    if not isinstance(old, HostRule) or not isinstance(new, HostRule):
        return
    if old.private is not new.private:
        was, will_be = (str(value).lower() for value in (old.private, new.private))
        yield Change(
            Action.CHANGED, section, new.key, "private", was, will_be, widens=new.private, narrows=old.private
        )
    if old.verify is not new.verify:
        was, will_be = str(old.verify), str(new.verify)
        widens = new.verify is Verify.ADDRESS
        yield Change(
            Action.CHANGED, section, new.key, "verify", was, will_be, widens=widens, narrows=not widens
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
    private = ", private" if isinstance(rule, HostRule) and rule.private else ""
    return ", ".join(map(str, rule.ports)) + private
