"""What is allowed to stand in a policy, but which its author should know. Never a reason to refuse it."""

from __future__ import annotations

from collections.abc import Iterator

from egressd.model.addresses import AddressClass, classify
from egressd.model.errors import Problem
from egressd.policy.compiled import CidrRule, Guard, Limits, Policy

__all__ = ["remarks"]

# A network of public addresses wider than these is more than one organisation's, as a rule.
_WIDE = {4: 16, 6: 32}


def remarks(policy: Policy, *, source: str = "") -> tuple[Problem, ...]:
    """Remarks in the order of the file. `source` is what messages call it."""
    return tuple(
        Problem(source, line, where, text, remedy)
        for line, where, text, remedy in (*_about_workspace(policy), *_about_rules(policy))
    )


_Remark = tuple[int, str, str, str]


def _about_workspace(policy: Policy) -> Iterator[_Remark]:
    if policy.guard is not Guard.ENFORCE:
        yield 0, "guard", f"guard: {policy.guard} restricts nothing, it only counts", "write guard: enforce"
    if not policy.members:
        yield 0, "members", "nobody is a member, so nobody can spawn here", "add members: [user:NAME]"
    if policy.residency:
        text = "jurisdictions are recorded, and not enforced in this version"
        yield 0, "residency", text, "choose the hosts accordingly"
    absent = [name for name in Limits.__slots__ if getattr(policy.limits, name) is None]
    if absent:
        yield 0, "limits", f"no limit is set for {', '.join(absent)}", "add them under limits:"
    if not policy.rules and policy.guard is Guard.ENFORCE:
        yield 0, "allow", "nothing is allowed, so nothing can be reached", "add rules under allow:"


def _about_rules(policy: Policy) -> Iterator[_Remark]:
    for rule in policy.rules:
        if isinstance(rule, CidrRule) and _is_wide(rule):
            text = f"{rule.network} is wide for public addresses, and its counters cannot tell hosts apart"
            yield rule.line, "", text, "name the hosts instead"


def _is_wide(rule: CidrRule) -> bool:
    network = rule.network
    public = classify(network.network_address) is AddressClass.GLOBAL
    return public and network.prefixlen < _WIDE[network.version]
