"""What the author of a policy should know before it is in force, above all about where requests go.

`lint` looks at one file: its text, and what `load` made of it, a `Policy` or every problem. Each check is a
function that yields findings; `_CHECKS` lists them. None decides anything: what takes part under a pin is
asked of `barring` and of the registry, as everywhere, so that lint says nothing else than egressd does.

What cannot be known from a file is told as well (`unverified`): a report without findings is easily taken
for a proof. A file that is refused gives its problems, each under the rule it belongs to.

What is found in a file goes to terminals and to build logs: nothing that looks like a secret is repeated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date

from egressd.model.errors import PolicyError, Problem, Unfit
from egressd.model.tree import Path, Tree, read, spelt
from egressd.model.verdicts import Reason
from egressd.policy import barring, plain_secrets, routing
from egressd.policy.compiled import (
    CidrRule,
    Guard,
    HostRule,
    Policy,
    Provider,
    Rule,
)
from egressd.policy.lint_rules import INVALID_POLICY, RULES, Level
from egressd.policy.plain_secrets import Secrets
from egressd.residency import judge
from egressd.residency.endpoints import Endpoint
from egressd.residency.judge import Code
from egressd.residency.places import Declared, Pin, Placement, Scope
from egressd.residency.prefixes import Table, nested
from egressd.residency.registry import Registry

__all__ = ["Finding", "Report", "Unverified", "lint"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject` is whose it is (a host, a profile, a route), the same wherever the line moves to."""

    rule: str  # one of lint_rules.RULES
    level: Level
    line: int  # 1-based; 0 when the whole file is meant
    where: str  # the path inside the document, e.g. "providers.azure.base_url"
    text: str
    remedy: str = ""
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Unverified:
    """What remains open after everything that can be checked here was checked."""

    line: int
    text: str
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Of one file. Findings and open ends in the order of the lines."""

    source: str
    findings: tuple[Finding, ...]
    unverified: tuple[Unverified, ...]


def lint(
    data: bytes,
    *,
    source: str,
    read_as: Policy | PolicyError,
    registry: Registry,
    today: date,
    pin: Pin | None = None,
) -> Report:
    """Everything there is to say about a file. Never raises, whatever the bytes are.

    `read_as` is what `load` made of `data` with this registry. `pin` asks what would be found if the
    workspace were pinned so; None: as it is pinned.
    """
    tree = read(data, source=source)
    secrets = plain_secrets.find(data, tree)
    if isinstance(read_as, PolicyError):
        findings = [*_of_problems(read_as.problems, secrets, source), *_of_secrets(secrets)]
        unverified = [Unverified(0, "anything else about the file: it is refused as it stands")]
    else:
        if pin is not None:
            read_as = barring.judged(replace(read_as, residency=pin.codes), registry)
        case = _Case(read_as, tree, registry, today)
        findings = [found for check in _CHECKS for found in check(case)] + list(_of_secrets(secrets))
        unverified = list(_open_ends(case))
    return Report(source, _in_order(findings, secrets), _open_in_order(unverified, secrets))


def _in_order(findings: Iterable[Finding], secrets: Secrets) -> tuple[Finding, ...]:
    """By line, each once, with nothing of a secret in it."""
    safe = (
        replace(
            found,
            where=secrets.hide(found.where),
            text=secrets.hide(found.text),
            remedy=secrets.hide(found.remedy),
            subject=secrets.hide(found.subject),
        )
        for found in findings
    )
    order = list(Level)
    return tuple(sorted(dict.fromkeys(safe), key=lambda f: (f.line, order.index(f.level), f.rule, f.text)))


def _open_in_order(ends: Iterable[Unverified], secrets: Secrets) -> tuple[Unverified, ...]:
    safe = (replace(end, text=secrets.hide(end.text), subject=secrets.hide(end.subject)) for end in ends)
    return tuple(sorted(dict.fromkeys(safe), key=lambda end: (end.line, end.text)))


# ---- a file that is refused


def _of_problems(problems: Iterable[Problem], secrets: Secrets, source: str) -> Iterator[Finding]:
    for problem in problems:
        rule = _rule_of(problem)
        if rule == "secret-in-clear" and any(secret.line == problem.line for secret in secrets.found):
            continue  # told once, by `_of_secrets`
        where = problem.where or ("" if problem.source == source else problem.source)
        subject = _INDEX.sub("[]", problem.where) + " " + _NUMBERS.sub("", problem.text)
        yield Finding(rule, RULES[rule].level, problem.line, where, problem.text, problem.remedy, subject)


_INDEX = re.compile(r"\[[0-9]+\]")
_NUMBERS = re.compile(r"line [0-9]+")
# A problem says what is wrong in words only. Which rule it belongs to is read from where it stands and from
# the words of `judge.contradiction`, `profiles` and `values.secret`; tests hold them together.
_SECRET = re.compile(r"not a reference to a secret|user-info|query \(\?")
_REGION = re.compile(r"declares \S+, and its URL (?:says|is of a global endpoint)")
_JURISDICTION = re.compile(r"declares [A-Z]{2,3}, and .+ is in [A-Z]{2}")


def _rule_of(problem: Problem) -> str:
    if not problem.where.startswith(("providers.", "allow[")):
        return INVALID_POLICY
    if _SECRET.search(problem.text):
        return "secret-in-clear"
    if _REGION.search(problem.text):
        return "region-mismatch"
    if _JURISDICTION.search(problem.text):
        return "jurisdiction-mismatch"
    return INVALID_POLICY


def _of_secrets(secrets: Secrets) -> Iterator[Finding]:
    for secret in secrets.found:
        what = f"{secret.what} stands here in clear; it is not repeated"
        remedy = "write secret://env/NAME or secret://file/PATH, and replace the secret: it was shown"
        where = spelt(secret.path)
        yield _found("secret-in-clear", secret.line, where, what, remedy, subject=f"{secret.what} {where}")


# ---- a policy


@dataclass(frozen=True)
class _Case:
    """What the checks look at."""

    policy: Policy
    tree: Tree
    registry: Registry
    today: date

    @property
    def pin(self) -> Pin:
        return self.policy.pin

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """All that are written, also those that take no part."""
        return self.policy.written

    @functools.cached_property
    def pinned(self) -> Path:
        """Where the pin is written, or would be."""
        return ("residency",) if ("residency",) in self.tree.lines else ("workspace",)

    @functools.cached_property
    def _places(self) -> dict[int, list[int]]:
        """Line -> which entries of `allow` stand on it."""
        found: dict[int, list[int]] = {}
        for path, line in self.tree.lines.items():
            if len(path) == 2 and path[0] == "allow" and isinstance(path[1], int):
                found.setdefault(line, []).append(path[1])
        return found

    def at(self, rule: Rule) -> Path:
        """The entry of `allow` that this rule is, if only one stands on its line."""
        places = self._places.get(rule.line, [])
        return ("allow", places[0]) if len(places) == 1 else ("allow",)

    def judged(self, endpoint: Endpoint, declared: Declared | None) -> judge.Finding:
        return self.registry.judge_endpoint(endpoint, declared=declared, pin=self.pin)


def _found(
    rule: str,
    line: int,
    where: str,
    text: str,
    remedy: str = "",
    *,
    level: Level | None = None,
    subject: str = "",
) -> Finding:
    return Finding(rule, level or RULES[rule].level, line, where, text, remedy, subject)


def _at(
    case: _Case,
    path: Path,
    rule: str,
    text: str,
    remedy: str = "",
    *,
    subject: str,
    level: Level | None = None,
) -> Finding:
    """A finding at `path`, or at the nearest thing around it that stands in the file."""
    place = case.tree.problem(path, text)
    return _found(rule, place.line, place.where, text, remedy, level=level, subject=subject)


def _ruled(
    case: _Case, rule: Rule, name: str, text: str, remedy: str = "", *, level: Level | None = None
) -> Finding:
    """A finding about an entry of `allow`."""
    return _found(name, rule.line, spelt(case.at(rule)), text, remedy, level=level, subject=rule.key)


def _is_this_machine(placement: Placement) -> bool:
    return placement.scope is Scope.LOOPBACK


# ---- endpoints: what the URL says


def _endpoints(case: _Case) -> Iterator[Finding]:
    for provider in case.policy.providers:
        if _location(provider.endpoint) is None:
            path: Path = ("providers", provider.name, "base_url")
            for rule, text, remedy, level in _about(
                case, provider.endpoint, provider.declared, vouched=False
            ):
                yield _at(case, path, rule, text, remedy, level=level, subject=provider.name)
    for host in _plain_hosts(case):
        endpoint = _endpoint_of(host.host)
        if endpoint is not None:
            for rule, text, remedy, level in _about(
                case, endpoint, None, vouched=bool(host.vouch), plain=True
            ):
                yield _ruled(case, host, rule, text, remedy, level=level)


def _plain_hosts(case: _Case) -> Iterator[HostRule]:
    """Host rules that no profile stands behind, and that are no wildcards."""
    for rule in case.rules:
        if isinstance(rule, HostRule) and not rule.providers and not rule.wildcard:
            yield rule


def _endpoint_of(host: str) -> Endpoint | None:
    try:
        return Endpoint.of_host(host)
    except Unfit:
        return None


_Said = tuple[str, str, str, Level | None]


def _about(
    case: _Case, endpoint: Endpoint, declared: Declared | None, *, vouched: bool, plain: bool = False
) -> Iterator[_Said]:
    """Rule, text, remedy and level."""
    placement = case.registry.place(endpoint)
    if not case.pin:
        yield from _about_unpinned(placement, endpoint, declared, plain=plain)
        return
    finding = case.judged(endpoint, declared)
    rule = _BY_CODE.get(finding.code)
    if rule is not None:
        yield rule, finding.text, finding.remedy, None
    elif finding.code is Code.BY_ADDRESS and placement.scope is Scope.UNKNOWN and not vouched:
        remedy = "look up where it is, or write vouch: REASON"
        yield "unverifiable-host", finding.text, remedy, None


# What is told in other words elsewhere, or is no finding, is not here.
_BY_CODE = {
    Code.GLOBAL: "global-endpoint",
    Code.UNPLACED: "unplaced-endpoint",
    Code.OUTSIDE: "outside-pin",
}


def _about_unpinned(
    placement: Placement, endpoint: Endpoint, declared: Declared | None, *, plain: bool
) -> Iterator[_Said]:
    if placement.scope is Scope.GLOBAL:
        text = placement.note or f"{endpoint.name} is a global endpoint"
        yield "global-endpoint", text, "use a regional endpoint if it matters where", Level.NOTE
    elif placement.scope is Scope.UNPLACED and declared is None:
        text = placement.note or f"the URL of {endpoint.name} does not say in which region it is"
        yield "unplaced-endpoint", text, "list it as a provider with residency:", Level.NOTE
    elif placement.scope is Scope.UNKNOWN and declared is not None and not plain:
        text = f"{endpoint.name} is in no catalogue: nothing confirms that it is in {declared.region}"
        yield "unverifiable-host", text, "", Level.NOTE


def _networks(case: _Case) -> Iterator[Finding]:
    """Of cidr rules under the pin. What no table can place, the rule may vouch for."""
    for barred in case.policy.barred:
        rule, finding = barred.rule, barred.finding
        if isinstance(rule, CidrRule) and finding.code is not Code.BROKEN:
            name = "outside-pin" if finding.code is Code.OUTSIDE else "unplaced-network"
            yield _ruled(case, rule, name, finding.text, finding.remedy)


# ---- profiles: what they declare


def _declarations(case: _Case) -> Iterator[Finding]:
    for provider in case.policy.providers:
        path: Path = ("providers", provider.name)
        if provider.declared is None:
            if case.pin and not _is_this_machine(case.registry.place(provider.endpoint)):
                text = f"{provider.name} does not say where requests are processed"
                remedy = "add residency: {region: ..., jurisdiction: ..., source_url: ...}"
                yield _at(case, path, "missing-residency", text, remedy, subject=provider.name)
        elif not provider.declared.source_url:
            text = f"{provider.name} declares {provider.declared.region} without a source"
            remedy = "add source_url: the page where the provider says so"
            yield _at(case, (*path, "residency"), "missing-source", text, remedy, subject=provider.name)


def _encryption(case: _Case) -> Iterator[Finding]:
    for provider in case.policy.providers:
        if provider.endpoint.scheme != "http" or _is_this_machine(case.registry.place(provider.endpoint)):
            continue
        what = "requests, and the key with them," if provider.api_key else "requests"
        text = f"{what} go to {provider.endpoint.name} in clear"
        level = Level.ERROR if provider.api_key else None
        path: Path = ("providers", provider.name, "base_url")
        yield _at(case, path, "http-base-url", text, "write https://", level=level, subject=provider.name)


# ---- several regions at once

# Vertex AI: https://cloud.google.com/vertex-ai/generative-ai/docs/learn/locations
_LOCATION = re.compile(r"/locations/(global|eu|us)(?:/|$)")
# Bedrock's system-defined inference profiles: a geography before the vendor of the model.
# https://docs.aws.amazon.com/bedrock/latest/userguide/inference-profiles-support.html
_PROFILE = re.compile(r"(?:arn:[^/]*/)?(us|us-gov|eu|apac|jp|au|ca|global)\.[a-z0-9]+\.")
_BEDROCK = "aws-bedrock"
_SPREAD = "cross-region inference profile"  # the words of the catalogue
# What the holder of a key may choose, and the network does not see, by the provider's word in the catalogue.
_CHOICES = {
    _BEDROCK: "which models {host} is asked for, and so in which regions it has them answered",
    # https://learn.microsoft.com/azure/ai-services/openai/how-to/deployment-types
    "azure-openai": "of which type the deployments of {host} are: Global and Data Zone ones answer elsewhere",
}


def _location(endpoint: Endpoint) -> str | None:
    found = _LOCATION.search(endpoint.path)
    return found[1] if found and endpoint.host.endswith(".googleapis.com") else None


def _asked_for(endpoint: Endpoint, model: str) -> Endpoint:
    """The endpoint as a request for this model addresses it."""
    return replace(endpoint, path=f"{endpoint.path.rstrip('/')}/model/{model}")


def _several_regions(case: _Case) -> Iterator[Finding]:
    for provider in case.policy.providers:
        location = _location(provider.endpoint)
        if location is not None:
            what = f"locations/{location} of Vertex AI is not one region"
            path: Path = ("providers", provider.name, "base_url")
            yield _spread(case, provider, provider.endpoint, path, what)
        for number, model in enumerate(provider.models):
            yield from _about_model(case, provider, model, ("providers", provider.name, "models", number))


def _about_model(case: _Case, provider: Provider, model: str, path: Path) -> Iterator[Finding]:
    """Does it lead somewhere else than the URL alone?"""
    asked = _asked_for(provider.endpoint, model)
    placement, alone = case.registry.place(asked), case.registry.place(provider.endpoint)
    if _BEDROCK in (provider.type, alone.provider) and _PROFILE.match(model):
        yield _spread(case, provider, asked, path, f"{model} is a {_SPREAD}")
    elif placement != alone:
        level = None if case.pin else Level.NOTE
        text = placement.note or f"{model} is not answered where {provider.endpoint.name} is"
        subject = f"{provider.name} {model}"
        yield _at(case, path, "unplaced-endpoint", text, "name another model", level=level, subject=subject)


def _spread(case: _Case, provider: Provider, endpoint: Endpoint, path: Path, what: str) -> Finding:
    level, text = None, what
    if case.pin:
        finding = case.judged(endpoint, None)
        level = Level.NOTE if finding.compliant else Level.ERROR
        text = finding.text if _SPREAD in finding.text else f"{what}; {finding.text}"
    remedy = "" if level is Level.NOTE else "name a single region"
    subject = f"{provider.name} {endpoint.path}"
    return _at(case, path, "cross-region-profile", text, remedy, level=level, subject=subject)


def _choice_of_models(case: _Case) -> Iterator[Finding]:
    if not case.pin:
        return
    for rule in case.rules:
        if not isinstance(rule, HostRule) or rule.wildcard or (endpoint := _endpoint_of(rule.host)) is None:
            continue
        placement = case.registry.place(endpoint)
        if placement.provider == _BEDROCK and case.judged(endpoint, None).compliant:
            text = (
                f"a sandbox can ask {rule.host} for a cross-region inference profile, unseen by the network"
            )
            remedy = "deny them in the account: by aws:RequestedRegion and bedrock:InferenceProfileArn"
            yield _ruled(case, rule, "sandbox-can-choose-model", text, remedy)


# ---- rules and the guard under a pin


def _rules(case: _Case) -> Iterator[Finding]:
    for rule in case.rules:
        if isinstance(rule, HostRule | CidrRule) and rule.vouch:
            yield _ruled(case, rule, "vouched", f"somebody answers for {rule.key}: {rule.vouch}")
        if case.pin and isinstance(rule, HostRule) and rule.wildcard:
            text = f"which names {rule.host} covers, and where they are, shows when they are asked for"
            yield _ruled(case, rule, "wildcard-under-pin", text, "name the hosts instead")


def _guard(case: _Case) -> Iterator[Finding]:
    if case.pin and case.policy.holding is not Guard.ENFORCE:
        path: Path = ("guard",) if ("guard",) in case.tree.lines else case.pinned
        text = f"guard: {case.policy.guard} leaves open whatever is not listed, wherever it is"
        yield _at(case, path, "open-guard", text, "write guard: enforce", subject="guard")


# ---- the registry


def _registry(case: _Case) -> Iterator[Finding]:
    if not case.pin:
        return
    if case.registry.broken:
        text = f"everything is refused under {case.pin}: {case.registry.broken}"
        yield _at(case, case.pinned, "broken-registry", text, "correct the file named", subject="registry")
        return
    prefixes = case.registry.prefixes
    if not prefixes.names and any(isinstance(rule, HostRule | CidrRule) for rule in case.rules):
        text = "no published prefixes are here, so that no address of a name can be placed"
        remedy = "egressctl residency import, or name the directory with --residency-dir"
        yield _at(case, case.pinned, "no-tables", text, remedy, subject="tables")
    old = set(prefixes.stale(case.today))
    for table in prefixes.tables:
        if table.title in old:
            text = f"table {table.name} is of {table.age_from}"
            yield _at(case, case.pinned, "stale-table", text, "import a new one", subject=table.name)
    yield from _conflicts(case)


def _conflicts(case: _Case) -> Iterator[Finding]:
    for rule, table, text, remedy in _faults(case.registry):
        yield _at(case, case.pinned, rule, text, remedy, subject=table)


@functools.lru_cache(maxsize=2)  # the same for every file of a directory, and a table has 100,000 prefixes
def _faults(registry: Registry) -> tuple[tuple[str, str, str, str], ...]:
    """What the tables contradict themselves in, and what they say that nobody here understands: rule, table,
    text and remedy."""
    found = []
    for table in registry.prefixes.tables:
        strange = _strange_regions(registry, table)
        if strange:
            text = f"table {table.name} names regions that the catalogue does not place: {', '.join(strange)}"
            remedy = "addresses there are refused; add the region in the residency directory"
            found.append(("unknown-region", table.name, text, remedy))
        inner = list(nested(table))
        if inner:
            prefix, region, wider = inner[0]
            more = f", and {len(inner) - 1} more" if len(inner) > 1 else ""
            text = f"table {table.name}: {prefix} of {region} lies in a prefix of {wider}{more}"
            found.append(("conflicting-table", table.name, text, "compare the file with its publisher's"))
    return tuple(found)


def _strange_regions(registry: Registry, table: Table) -> list[str]:
    """At most a handful, for a person to read."""
    silent = (group for group in table.groups if not group.countries and not group.anycast)
    regions = {group.region for group in silent if group.region}
    strange = sorted(one for one in regions if not registry.catalogue.cloud_region(table.provider, one))
    return strange if len(strange) <= _MOST_TOLD else [*strange[:_MOST_TOLD], "..."]


_MOST_TOLD = 6


# ---- providers and routes


def _uses(case: _Case) -> Iterator[Finding]:
    used = {name for route in case.policy.routes for name in route.providers}
    used |= {name for rule in case.rules for name in rule.providers}
    for provider in case.policy.providers:
        if provider.name not in used:
            text = f"{provider.name} is in no route and under no rule"
            path: Path = ("providers", provider.name)
            yield _at(case, path, "unused-provider", text, "remove it, or use it", subject=provider.name)


def _routes(case: _Case) -> Iterator[Finding]:
    selections = routing.selections_by_url(case.policy)
    for route in case.policy.routes:
        path: Path = ("routes", route.name)
        selection = selections[route.name]
        for one in selection.candidates:
            if one.code in _NOT_ALLOWED:
                text = f"route {route.name} can select {one.provider}: {one.text}"
                subject = f"{route.name} {one.provider}"
                yield _at(case, path, "unreachable-provider", text, one.remedy, subject=subject)
        if selection.selected is None:
            name = "route-without-compliant-provider"
            remedy = selection.remedy or "add a provider that complies"
            yield _at(case, path, name, selection.text, remedy, subject=route.name)


_NOT_ALLOWED = frozenset({Reason.UNLISTED.value, Reason.PORT.value})


_CHECKS: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
    _endpoints,
    _networks,
    _several_regions,
    _choice_of_models,
    _declarations,
    _encryption,
    _rules,
    _guard,
    _registry,
    _uses,
    _routes,
)


# ---- what could not be verified


def _open_ends(case: _Case) -> Iterator[Unverified]:
    for provider in case.policy.providers:
        yield from _open_ends_of(case, provider)
    for rule in case.rules:
        if isinstance(rule, HostRule | CidrRule):
            yield from _open_ends_of_rule(case, rule)
    hosts = [rule for rule in case.rules if isinstance(rule, HostRule)]
    if case.pin and hosts:
        what = f"{len(hosts)} listed name{'' if len(hosts) == 1 else 's'}"
        text = f"where the addresses of {what} are: nothing was looked up"
        yield Unverified(0, text, "addresses")


def _open_ends_of(case: _Case, provider: Provider) -> Iterator[Unverified]:
    declared, placement = provider.declared, case.registry.place(provider.endpoint)
    if declared is not None and placement.scope in (Scope.UNPLACED, Scope.UNKNOWN):
        line = case.tree.line(("providers", provider.name, "residency"))
        text = f"that {provider.endpoint.name} is in {declared.region}, as {provider.name} declares"
        yield Unverified(line, f"{text}: its URL does not say it", provider.name)
    if declared is not None and declared.source_url:
        line = case.tree.line(("providers", provider.name, "residency", "source_url"))
        text = f"that the source of {provider.name} says so: {declared.source_url} was not fetched"
        yield Unverified(line, text, provider.name)


def _open_ends_of_rule(case: _Case, rule: HostRule | CidrRule) -> Iterator[Unverified]:
    if rule.vouch:
        yield Unverified(rule.line, f"the reason that the rule for {rule.key} gives", rule.key)
    if not case.pin or isinstance(rule, CidrRule):
        return
    if rule.wildcard:
        yield Unverified(rule.line, f"where the names that {rule.host} covers are", rule.key)
        return
    endpoint = _endpoint_of(rule.host)
    if endpoint is None:
        return
    placement = case.registry.place(endpoint)
    if placement.scope is Scope.UNKNOWN and not rule.providers:
        yield Unverified(rule.line, f"where {rule.host} is: no catalogue has it", rule.key)
    elif placement.provider in _CHOICES:
        yield Unverified(rule.line, _CHOICES[placement.provider].format(host=rule.host), rule.key)
