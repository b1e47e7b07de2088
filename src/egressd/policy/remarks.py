"""What is allowed to stand in a policy, but which its author should know. Never a reason to refuse it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice

from egressd.model.addresses import AddressClass, classify
from egressd.model.errors import Problem
from egressd.model.names import covering
from egressd.model.verdicts import Reason
from egressd.policy.compiled import (
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
    Rule,
    Verify,
)
from egressd.policy.diff import opens
from egressd.policy.routing import selections_by_url
from egressd.residency.judge import Code
from egressd.residency.registry import Registry

__all__ = ["remarks"]

# A network of public addresses wider than these is more than one organisation's, as a rule.
_WIDE = {4: 16, 6: 32}
_HTTPS, _QUIC = Port(443, Protocol.TCP), Port(443, Protocol.UDP)
# Where customers of one provider, strangers to each other, have names side by side. The public suffix list
# has most of them, and those are refused; others it lacks, has for some regions only, or they lie below a
# domain that is itself none (amazonaws.com). Good enough for remarks, since such a list is never complete.
_SHARED_HOSTING = (
    "amazonaws.com", "amazonaws.com.cn", "aliyuncs.com", "appspot.com", "awsglobalaccelerator.com",
    "azure-api.net", "azureedge.net", "azurefd.net", "azurewebsites.net", "backblazeb2.com", "cloudapp.net",
    "cloudfront.net", "digitaloceanspaces.com", "edgekey.net", "edgesuite.net", "fastly.net",
    "googleapis.com", "googleusercontent.com", "myhuaweicloud.com", "myqcloud.com", "netlify.app",
    "oraclecloud.com", "r2.cloudflarestorage.com", "run.app", "trafficmanager.net", "vercel.app",
    "wasabisys.com", "windows.net", "workers.dev",
)  # fmt: skip
# Labels below those that are a service's own and no customer's: *.s3.eu-south-9.amazonaws.com is everybody's
_SERVICE = re.compile(
    r"s3|s3-[a-z0-9-]+|dualstack|blob|web|file|queue|table|dfs|core|storage|[a-z]{2,4}(-[a-z]+)+-?[0-9]+"
)


def remarks(policy: Policy, *, source: str = "", registry: Registry | None = None) -> tuple[Problem, ...]:
    """What the author of this policy should know. `source` is what messages call the file; with the
    `registry` that the policy was compiled with, also what that cannot know."""
    found = (
        *_about_workspace(policy),
        *_about_residency(policy, registry),
        *_about_providers(policy),
        *_about_barred(policy),
        *_about_rules(policy, registry),
    )
    return tuple(Problem(source, line, where, text, remedy) for line, where, text, remedy in found)


_Remark = tuple[int, str, str, str]


def _about_workspace(policy: Policy) -> Iterator[_Remark]:
    if policy.holding is not Guard.ENFORCE:
        yield 0, "guard", f"guard: {policy.guard} restricts nothing, it only counts", "write guard: enforce"
    if not policy.members:
        yield 0, "members", "nobody is a member, so nobody can spawn here", "add members: [user:NAME]"
    absent = [name for name in Limits.__slots__ if name != "idle" and getattr(policy.limits, name) is None]
    if absent:
        yield 0, "limits", f"no limit is set for {', '.join(absent)}", "add them under limits:"
    if not policy.rules and policy.holding is Guard.ENFORCE:
        remedy = "see why each rule is barred" if policy.barred else "add rules under allow:"
        yield 0, "allow", "nothing is allowed, so nothing can be reached", remedy
    if policy.wildcards != Budgets() and not any(rule.wildcard for rule in policy.hosts):
        yield 0, "wildcards", "budgets are set, and no rule has a wildcard", "remove wildcards:"


def _about_residency(policy: Policy, registry: Registry | None) -> Iterator[_Remark]:
    if not policy.pin:
        return
    if policy.holding is not Guard.ENFORCE:
        text = f"guard: {policy.guard} leaves open whatever is not listed, wherever it is"
        yield 0, "residency", text, "write guard: enforce"
    if registry is not None and registry.broken:
        yield (
            0,
            "residency",
            f"everything under the pin is refused: {registry.broken}",
            "correct the file named",
        )
    elif registry is not None and not registry.prefixes.names and policy.hosts:
        text = "no published prefixes are imported, so no address can be placed, and hosts lead nowhere"
        yield 0, "residency", text, "egressctl residency import"


def _about_providers(policy: Policy) -> Iterator[_Remark]:
    listed = {name for rule in policy.written for name in rule.providers}
    for provider in policy.providers:
        where = f"providers.{provider.name}"
        if provider.name not in listed:
            text = f"no rule is for provider {provider.name}, so it cannot be selected"
            yield provider.line, where, text, f"add - provider: {provider.name} under allow:"
        if provider.endpoint.scheme == "http" and not provider.is_local:
            text = f"{provider.base_url} is not encrypted, and its name is verified by nothing"
            yield provider.line, where, text, "write https:// if it speaks TLS"
    selections = selections_by_url(policy)
    for route in policy.routes:
        selection = selections[route.name]
        if selection.selected is None:
            yield route.line, f"routes.{route.name}", selection.text, selection.remedy


def _about_barred(policy: Policy) -> Iterator[_Remark]:
    """One for each rule that residency bars; one for all that `local_only` does."""
    shut = [one for one in policy.barred if one.reason is Reason.LOCAL_ONLY]
    if shut:
        text = f"external routing is off: {len(shut)} of the rules are for hosts, and take no part"
        yield 0, "local_only", text, "remove local_only: true to let them take part"
    for one in policy.barred:
        if one.reason is not Reason.LOCAL_ONLY:
            text = f"{one.rule.key} is barred by residency: {one.finding.text}"
            yield one.rule.line, "", text, one.finding.remedy or "remove the rule"


def _about_rules(policy: Policy, registry: Registry | None) -> Iterator[_Remark]:
    hosts = {rule.host: rule for rule in policy.hosts}
    for rule in policy.rules:
        if isinstance(rule, CidrRule) and _is_wide(rule):
            text = f"{rule.network} is wide for public addresses, and its counters cannot tell hosts apart"
            yield rule.line, "", text, "name the hosts instead"
        elif isinstance(rule, HostRule):
            yield from ((rule.line, "", text, remedy) for text, remedy in _about_host(rule, hosts))
        yield from ((rule.line, "", text, remedy) for text, remedy in _about_place(policy, rule, registry))


def _about_place(policy: Policy, rule: Rule, registry: Registry | None) -> Iterator[tuple[str, str]]:
    """Text and remedy, of where a rule that takes part may lead."""
    if isinstance(rule, LocalRule):
        return
    if rule.vouch and policy.pin:
        text = f'{rule.key} is vouched for: where its addresses are, no table has to show ("{rule.vouch}")'
        yield text, "leave vouch out where a table has its addresses"
    elif rule.vouch:
        yield f"{rule.key} is vouched for, and no residency is asked of it", "remove vouch, or add residency:"
    if not policy.pin or not isinstance(rule, HostRule):
        return
    if rule.wildcard:
        text = f"of names under {rule.host} nothing is known until they are asked for: each is judged then"
        yield text, "name the hosts, so that they are judged here"
    elif not rule.vouch and _is_by_address(policy, rule, registry):
        text = f"where {rule.host} is, only its addresses can show: those in no published prefix are refused"
        yield text, "import the prefixes of whoever runs it"


def _is_by_address(policy: Policy, rule: HostRule, registry: Registry | None) -> bool:
    if rule.providers:
        found = (policy.provider(name) for name in rule.providers)
        return any(one is not None and one.finding.code is Code.BY_ADDRESS for one in found)
    return registry is not None and registry.judge_name(rule.host, pin=policy.pin).code is Code.BY_ADDRESS


def _about_host(rule: HostRule, hosts: Mapping[str, HostRule]) -> Iterator[tuple[str, str]]:
    """Text and remedy."""
    yield from _about_verification(rule)
    if rule.wildcard:
        yield from _about_wildcard(rule.host)
    wider = next((hosts[host] for host in islice(covering(rule.host), 1, None) if host in hosts), None)
    if wider is not None and opens(rule, wider):
        where = f"{wider.host} (line {wider.line})"
        text = f"{rule.host} is under {where}, which allows more and does not count for it"
        yield text, "a name has one rule: write here all that is allowed"


def _about_verification(rule: HostRule) -> Iterator[tuple[str, str]]:
    weak = "verified by address alone: other names behind the same address can be asked for"
    for port in rule.ports:
        if port == _QUIC:
            yield f"{rule.host} on {port} is QUIC, {weak}", "leave it out, clients fall back to TCP"
        elif port == _HTTPS and rule.verify_on(port) is Verify.ADDRESS:
            yield f"{rule.host} on {port} is {weak}", "leave out verify: address if it speaks TLS"
    if rule.ech is Ech.ALLOW:
        yield (
            f"{rule.host} may be sent encrypted_client_hello, which can hide another name from the check",
            "leave out ech: allow unless the clients are browsers",
        )


def _about_wildcard(host: str) -> Iterator[tuple[str, str]]:
    stars, _, base = host.partition(".")
    if stars == "**":
        yield (
            f"{host} covers names of any depth, so long texts can be sent to the name servers of {base}",
            f"write *.{base} if one label is enough",
        )
    if _is_shared(base):
        yield f"{host} covers names of customers of one provider, who are strangers", "name the hosts instead"


def _is_shared(base: str) -> bool:
    """Is the domain a provider's own down to the wildcard, with nobody's name in it?"""
    for shared in _SHARED_HOSTING:
        if base == shared or shared.endswith("." + base):
            return True
        if base.endswith("." + shared):
            return all(map(_SERVICE.fullmatch, base.removesuffix("." + shared).split(".")))
    return False


def _is_wide(rule: CidrRule) -> bool:
    network = rule.network
    public = classify(network.network_address) is AddressClass.GLOBAL
    return public and network.prefixlen < _WIDE[network.version]
