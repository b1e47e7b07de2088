"""`egressctl policy check`: every problem of every file, without daemon and without root."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from egressd.cli.exits import FOUND, OK
from egressd.cli.screen import print_json
from egressd.cli.text import escape
from egressd.model.errors import PolicyError, Problem
from egressd.policy.compiled import Policy
from egressd.policy.remarks import remarks
from egressd.processes.registry_files import read_registry
from egressd.processes.workspaces import SUFFIX, read_policy_file, read_workspaces
from egressd.residency.registry import Registry

__all__ = ["Findings", "check", "run"]


@dataclass(slots=True)
class Findings:
    """What was read, what is wrong with the rest, and what the authors of the good ones should know."""

    policies: list[Policy] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)

    def keep(self, policy: Policy, source: Path, registry: Registry) -> None:
        self.policies.append(policy)
        self.remarks += remarks(policy, source=str(source), registry=registry)


def run(args: argparse.Namespace) -> int:
    findings = check([Path(path) for path in args.paths], read_registry(Path(args.residency_dir)))
    if args.json:
        print_json(_document(findings))
    else:
        _print(findings)
    return FOUND if findings.problems else OK


def check(paths: Sequence[Path], registry: Registry) -> Findings:
    """Read each file, and each file of each directory, with what is known of providers and prefixes."""
    findings = Findings()
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                policies, problems = read_workspaces(path, registry=registry)
                findings.problems += problems
                for name, policy in policies.items():
                    findings.keep(policy, path / f"{name}{SUFFIX}", registry)
            else:
                findings.keep(read_policy_file(path, registry=registry), path, registry)
        except PolicyError as error:
            findings.problems += error.problems
    return findings


def _print(findings: Findings) -> None:
    for problem in findings.problems:
        print(escape(str(problem)), file=sys.stderr)
    for remark in findings.remarks:
        print(escape(str(replace(remark, where=f"remark: {remark.where}".rstrip(": ")))), file=sys.stderr)
    for policy in findings.policies:
        rules = f"{len(policy.rules)} rule{'' if len(policy.rules) == 1 else 's'}"
        print(f"{policy.workspace}: ok, guard {policy.guard}, {rules}, {policy.digest[:19]}")
    if not findings.policies and not findings.problems:
        print("no policy files found", file=sys.stderr)


def _document(findings: Findings) -> dict[str, Any]:
    return {
        "ok": not findings.problems,
        "policies": [
            {"workspace": p.workspace, "guard": str(p.guard), "rules": len(p.rules), "digest": p.digest}
            for p in findings.policies
        ],
        "problems": list(map(_problem, findings.problems)),
        "remarks": list(map(_problem, findings.remarks)),
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {field: getattr(problem, field) for field in ("source", "line", "where", "text", "remedy")}
