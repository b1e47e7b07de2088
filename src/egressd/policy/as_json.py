"""The policy in force as a document for programs: what `egressctl policy explain` says in sentences."""

from __future__ import annotations

from typing import Any

from egressd.policy.compiled import (
    Barred,
    CidrRule,
    HostRule,
    LocalRule,
    Policy,
    Provider,
    Rule,
)
from egressd.policy.explain import explain_policy
from egressd.residency.judge import Finding

__all__ = ["policy_document"]

Document = dict[str, Any]


def policy_document(policy: Policy) -> Document:
    """Everything of a policy but its members' budgets and limits, and of a key its reference only."""
    return {
        "workspace": policy.workspace,
        "digest": policy.digest,
        "text": explain_policy(policy),
        "guard": policy.guard.value,
        "local_only": policy.local_only,
        "holding": policy.holding.value,
        "pin": {"jurisdictions": list(policy.pin.codes), "countries": sorted(policy.pin.countries)},
        "members": [str(member) for member in policy.members],
        "rules": [_rule(rule) for rule in policy.rules],
        "barred": [_barred(barred) for barred in policy.barred],
        "providers": [_provider(provider) for provider in policy.providers],
        "routes": [{"route": r.name, "providers": list(r.providers)} for r in policy.routes],
    }


def _rule(rule: Rule) -> Document:
    common = {
        "ports": [str(port) for port in rule.ports],
        "line": rule.line,
        "providers": list(rule.providers),
    }
    match rule:
        case HostRule():
            return {
                "kind": "host",
                "host": rule.host,
                **common,
                "verify": {str(port): rule.verify_on(port).value for port in rule.ports},
                "private": rule.private,
                "ech": rule.ech.value,
                "vouch": rule.vouch,
            }
        case CidrRule():
            return {"kind": "cidr", "network": str(rule.network), **common, "vouch": rule.vouch}
        case LocalRule():
            return {"kind": "local", "service": rule.service, **common}


def _barred(barred: Barred) -> Document:
    return {
        "rule": _rule(barred.rule),
        "reason": barred.reason.value,
        "text": barred.reason.text,
        "finding": _finding(barred.finding),
    }


def _provider(provider: Provider) -> Document:
    declared = provider.declared
    return {
        "provider": provider.name,
        "type": provider.type,
        "base_url": provider.base_url,
        "region": provider.region,
        # A document that took a value for a reference was refused; this is the second look.
        "api_key": provider.api_key if provider.api_key.startswith("secret://") else "",
        "declared": None
        if declared is None
        else {
            "region": declared.region,
            "jurisdiction": declared.jurisdiction,
            "source_url": declared.source_url,
        },
        "models": list(provider.models),
        "finding": _finding(provider.finding),
    }


def _finding(finding: Finding) -> Document:
    return {
        "code": finding.code.value,
        "compliant": finding.compliant,
        "text": finding.text,
        "remedy": finding.remedy,
    }
