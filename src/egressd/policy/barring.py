"""Which rules take part: residency and `local_only`, applied to rules that are each well formed.

A rule that is barred is in no map of the kernel and is answered by no resolver. It stays in the policy, with
the reason, because somebody wrote it and has to be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from egressd.model.verdicts import Reason
from egressd.policy.compiled import Barred, CidrRule, HostRule, LocalRule, Policy, Provider, Rule
from egressd.residency.judge import Code, Finding
from egressd.residency.places import Pin
from egressd.residency.registry import Registry

__all__ = ["LOCAL_ONLY", "judged"]

_ROUTING = "remove local_only: true, or: egressctl local-only WORKSPACE off"
LOCAL_ONLY = Finding(Code.LOCAL_ONLY, Reason.LOCAL_ONLY.text, _ROUTING)


@dataclass(frozen=True, slots=True)
class _Terms:
    """On what rules are let take part."""

    pin: Pin
    local_only: bool
    registry: Registry


def judged(policy: Policy, registry: Registry) -> Policy:
    """The policy as catalogue and tables have it today, whatever an earlier day made of it."""
    terms = _Terms(policy.pin, policy.local_only, registry)
    providers = tuple(_judged(provider, terms) for provider in policy.providers)
    rules, barred = _parted(policy.written, providers, terms)
    return replace(policy, providers=providers, rules=rules, barred=barred)


def _judged(provider: Provider, terms: _Terms) -> Provider:
    """The profile with what the catalogue and residency say of it today, its models included."""
    provider = replace(provider, placement=terms.registry.place(provider.endpoint))
    findings = _findings(provider, terms)
    first = next(findings)
    worst = next((finding for finding in (first, *findings) if not finding.compliant), first)
    return replace(provider, finding=worst)


def _findings(provider: Provider, terms: _Terms) -> Iterator[Finding]:
    pin, registry, endpoint = terms.pin, terms.registry, provider.endpoint
    yield registry.judge_endpoint(endpoint, declared=provider.declared, pin=pin)
    for model in provider.models:
        asked = replace(endpoint, path=f"{endpoint.path}/model/{model}")
        # Where the model makes no difference, what was said of the URL and the declaration stands.
        if registry.place(asked) != provider.placement:
            found = registry.judge_endpoint(asked, declared=None, pin=pin)
            yield found if model in found.text else replace(found, text=f"model {model}: {found.text}")


def _parted(
    rules: Iterable[Rule], providers: Iterable[Provider], terms: _Terms
) -> tuple[tuple[Rule, ...], tuple[Barred, ...]]:
    """The rules that take part, and those that do not, each in the order given."""
    profiles = {provider.name: provider for provider in providers}
    kept: list[Rule] = []
    barred: list[Barred] = []
    for rule in rules:
        why = _why(rule, profiles, terms)
        if why is None:
            kept.append(rule)
        else:
            barred.append(why)
    return tuple(kept), tuple(barred)


def _why(rule: Rule, profiles: dict[str, Provider], terms: _Terms) -> Barred | None:
    match rule:
        case HostRule():
            if terms.local_only:
                return Barred(rule, Reason.LOCAL_ONLY, LOCAL_ONLY)
            finding = _of_host(rule, profiles, terms)
        case CidrRule():
            finding = _of_network(rule, profiles, terms)
        case LocalRule():
            return None
    return None if finding.compliant else Barred(rule, Reason.RESIDENCY, finding)


def _of_host(rule: HostRule, profiles: dict[str, Provider], terms: _Terms) -> Finding:
    """Profiles say more of a host than its name does. All through which it is listed must comply: which of
    them a connection is for, nothing on the network tells."""
    if rule.providers:
        return _of_profiles(rule, profiles)
    if not rule.wildcard:
        return terms.registry.judge_name(rule.host, pin=terms.pin)
    text = f"each name under {rule.host} is judged when it is first asked for"
    return terms.registry.refusal(terms.pin) or Finding(Code.BY_ADDRESS, text)


def _of_profiles(rule: HostRule | CidrRule, profiles: dict[str, Provider]) -> Finding:
    findings = [(name, profiles[name].finding) for name in rule.providers]
    name, worst = next((found for found in findings if not found[1].compliant), findings[0])
    return worst if worst.compliant else replace(worst, text=f"provider {name}: {worst.text}")


def _of_network(rule: CidrRule, profiles: dict[str, Provider], terms: _Terms) -> Finding:
    if rule.providers:
        finding = _of_profiles(rule, profiles)
        if not finding.compliant:
            return finding
    return terms.registry.judge_network(rule.network, pin=terms.pin, vouched=bool(rule.vouch))
