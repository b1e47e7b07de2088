"""What changes from one policy to the next, and whether it gives or takes; each change describes itself."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from egressd.model.names import covering
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
    Provider,
    Rule,
    Verify,
)
from egressd.policy.explain import budget_text, limit_text
from egressd.residency.jurisdictions import countries

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
    LOCAL_ONLY = "local_only"
    PROVIDER = "provider"
    ROUTE = "route"
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
        yield from _local_only(old.local_only, new.local_only)
        yield from _limits(old.limits, new.limits)
        yield from _budgets(old.wildcards, new.wildcards)
    yield from _members(old, new)
    yield from _rules(old, new)
    yield from _providers(old, new)
    yield from _routes(old, new)


def _guard(old: Guard, new: Guard) -> Iterator[Change]:
    if old is new:
        return
    widens, narrows = old is Guard.ENFORCE, new is Guard.ENFORCE
    yield Change(Action.CHANGED, Section.GUARD, "", "", str(old), str(new), widens=widens, narrows=narrows)


def _residency(old: tuple[str, ...], new: tuple[str, ...]) -> Iterator[Change]:
    """No jurisdictions at all means any. Compared as countries: `EU, DE` is no more than `EU`."""
    if set(old) == set(new):
        return
    before, after = countries(old), countries(new)
    widens = bool(before) and (not after or not after <= before)
    narrows = bool(after) and (not before or not before <= after)
    was, will_be = (", ".join(sorted(codes)) or "any" for codes in (old, new))
    yield Change(Action.CHANGED, Section.RESIDENCY, "", "", was, will_be, widens=widens, narrows=narrows)


def _local_only(old: bool, new: bool) -> Iterator[Change]:
    if old is not new:
        was, will_be = (str(value).lower() for value in (old, new))
        yield Change(Action.CHANGED, Section.LOCAL_ONLY, "", "", was, will_be, widens=old, narrows=new)


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


# ---- rules. A rule that is barred permits nothing, and keeps its names from the wildcards around it.


def _rules(old: Policy | None, new: Policy | None) -> Iterator[Change]:
    before, after = _written(old), _written(new)
    for key, rule in before.items():
        if key not in after:
            yield _gone(rule, after)
    for key, rule in after.items():
        if key in before:
            yield from _both(before[key], rule)
        else:
            yield _come(rule, before)


def _written(policy: Policy | None) -> dict[str, Rule | Barred]:
    """Every rule by its key, whether it takes part or not."""
    if policy is None:
        return {}
    return {**{rule.key: rule for rule in policy.rules}, **{one.rule.key: one for one in policy.barred}}


def _gone(rule: Rule | Barred, after: Mapping[str, Rule | Barred]) -> Change:
    heir = _heir(rule, after)
    if isinstance(rule, Barred):
        widens, narrows = heir is not None, False
    else:
        widens, narrows = opens(rule, heir), heir is None or opens(heir, rule)
    return _entire(Action.REMOVED, rule, widens=widens, narrows=narrows)


def _come(rule: Rule | Barred, before: Mapping[str, Rule | Barred]) -> Change:
    heir = _heir(rule, before)
    if isinstance(rule, Barred):
        widens, narrows = False, heir is not None
    else:
        widens, narrows = heir is None or opens(heir, rule), opens(rule, heir)
    return _entire(Action.ADDED, rule, widens=widens, narrows=narrows)


def _entire(action: Action, rule: Rule | Barred, *, widens: bool, narrows: bool) -> Change:
    written, terms = _rule_of(rule), _terms(rule)
    before, after = (terms, "") if action is Action.REMOVED else ("", terms)
    section = _section(written)
    return Change(action, section, written.key, "", before, after, widens=widens, narrows=narrows)


def _both(old: Rule | Barred, new: Rule | Barred) -> Iterator[Change]:
    """Of one key, before and after. What changes about a barred rule opens and closes nothing."""
    changes = _rule(_rule_of(old), _rule_of(new))
    if isinstance(old, Barred) or isinstance(new, Barred):
        changes = (replace(change, widens=False, narrows=False) for change in changes)
    yield from changes
    was, will_be = _standing(old), _standing(new)
    if was != will_be:
        written = _rule_of(new)
        widens = isinstance(old, Barred) and not isinstance(new, Barred)
        narrows = isinstance(new, Barred) and not isinstance(old, Barred)
        section = _section(written)
        yield Change(
            Action.CHANGED, section, written.key, "", was, will_be, widens=widens, narrows=narrows
        )  # fmt: skip


def _rule_of(rule: Rule | Barred) -> Rule:
    return rule.rule if isinstance(rule, Barred) else rule


def _standing(rule: Rule | Barred) -> str:
    return f"barred ({_bar(rule)})" if isinstance(rule, Barred) else "in force"


def _bar(barred: Barred) -> str:
    """`local-only`, or `residency: outside`."""
    if barred.reason is Reason.LOCAL_ONLY:
        return str(barred.reason)
    return f"{barred.reason}: {barred.finding.code}"


def _heir(rule: Rule | Barred, rules: Mapping[str, Rule | Barred]) -> HostRule | None:
    """The wildcard among `rules` that governs what `rule` covers where `rule` itself is not.

    A name has one rule. So a rule under a wildcard takes its names out of that wildcard when it comes, and
    gives them back when it goes: either may open as well as close. A barred wildcard has nothing to give.
    """
    written = _rule_of(rule)
    if isinstance(written, HostRule):
        for host in covering(written.host):
            wider = rules.get(host)
            if wider is not None:
                return wider if isinstance(wider, HostRule) else None
    return None


def opens(old: Rule | None, new: Rule | None) -> bool:
    """Does `new` permit anything that `old` does not, for a name that `old` governed?"""
    if not isinstance(old, HostRule) or not isinstance(new, HostRule):
        return False
    unread = any(_verify_widens(old, new, port) for port in set(old.ports) & set(new.ports))
    vouched = bool(new.vouch) > bool(old.vouch)
    more = new.private > old.private or vouched or unread or _ech_widens(old, new)
    return more or bool(set(new.ports) - set(old.ports))


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
    yield from _vouch(old, new)
    if old.providers != new.providers:
        was, will_be = (", ".join(rule.providers) or "none" for rule in (old, new))
        yield Change(Action.CHANGED, section, new.key, "providers", was, will_be)


def _vouch(old: Rule, new: Rule) -> Iterator[Change]:
    """Vouching lets addresses be reached that no table can place; another reason for it changes nothing."""
    was, will_be = ("" if isinstance(rule, LocalRule) else rule.vouch for rule in (old, new))
    if was != will_be:
        widens, narrows = bool(will_be) and not was, bool(was) and not will_be
        told, new_told = (f'"{text}"' if text else "none" for text in (was, will_be))
        section = _section(new)
        yield Change(
            Action.CHANGED, section, new.key, "vouch", told, new_told, widens=widens, narrows=narrows
        )


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


def _terms(rule: Rule | Barred) -> str:
    written = _rule_of(rule)
    extra = ""
    if isinstance(written, HostRule):
        extra = ", private" * written.private + ", ech allowed" * (written.ech is Ech.ALLOW)
    if not isinstance(written, LocalRule):
        extra += ", vouched for" * bool(written.vouch)
    if isinstance(rule, Barred):
        extra += f", barred by {_bar(rule)}"
    return ", ".join(_port_text(written, port) for port in written.ports) + extra


def _port_text(rule: Rule, port: Port) -> str:
    """As a document may write it: a port whose connections are read is N/tls."""
    read = isinstance(rule, HostRule) and rule.verify_on(port) is Verify.SNI
    return f"{port.number}/tls" if read else str(port)


# ---- providers and routes: they choose among what rules permit, and permit nothing themselves


def _providers(old: Policy | None, new: Policy | None) -> Iterator[Change]:
    before = {one.name: one for one in old.providers} if old else {}
    after = {one.name: one for one in new.providers} if new else {}
    for name in sorted(before.keys() - after.keys()):
        yield Change(Action.REMOVED, Section.PROVIDER, name, "", before=before[name].base_url)
    for name, provider in after.items():
        if name not in before:
            yield Change(Action.ADDED, Section.PROVIDER, name, "", after=provider.base_url)
            continue
        told = zip(_facts(before[name]), _facts(provider), strict=True)
        for (what, was), (_, will_be) in told:
            if was != will_be:
                yield Change(Action.CHANGED, Section.PROVIDER, name, what, was or "none", will_be or "none")


def _facts(provider: Provider) -> Iterator[tuple[str, str]]:
    declared = provider.declared
    yield "type", provider.type
    yield "base_url", provider.base_url
    yield "api_key", provider.api_key
    yield "residency", f"{declared.region} ({declared.jurisdiction})" if declared else ""
    yield "source_url", declared.source_url if declared else ""
    yield "models", ", ".join(provider.models)
    yield "finding", str(provider.finding.code)


def _routes(old: Policy | None, new: Policy | None) -> Iterator[Change]:
    before = {route.name: ", ".join(route.providers) for route in old.routes} if old else {}
    after = {route.name: ", ".join(route.providers) for route in new.routes} if new else {}
    for name in sorted(before.keys() - after.keys()):
        yield Change(Action.REMOVED, Section.ROUTE, name, "", before=before[name])
    for name, providers in after.items():
        if name not in before:
            yield Change(Action.ADDED, Section.ROUTE, name, "", after=providers)
        elif before[name] != providers:
            yield Change(Action.CHANGED, Section.ROUTE, name, "", before[name], providers)
