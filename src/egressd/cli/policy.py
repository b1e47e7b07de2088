"""`egressctl policy`: check, lint, diff, apply, explain. Each action's work is in a file of its own."""

from __future__ import annotations

import argparse
import importlib
from typing import Final

from egressd.cli.arguments import Subparsers, verb_parser

__all__ = ["ACTIONS", "RESIDENCY_DIR", "add", "run"]

RESIDENCY_DIR: Final = "/etc/egressd/residency"  # what processes/config.py has where nothing is written

# action -> module of egressd.cli; `check`, `lint` and `explain` load the policy grammar, the others do not
ACTIONS: Final[dict[str, str]] = {
    "check": "policy_check",
    "lint": "policy_lint",
    "diff": "policy_changes",
    "apply": "policy_changes",
    "explain": "policy_explain",
}


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "policy",
        summary="check, lint, compare, apply or explain policies",
        says="A policy is one file per workspace, WORKSPACE.yaml. A file with anything wrong in it is\n"
        "refused whole, with every problem listed; the last good policy of that workspace stays.",
        examples="  egressctl policy check /etc/egressd/workspaces\n"
        "  egressctl policy diff && egressctl policy apply\n"
        "  egressctl policy explain acme",
    )
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", prog="egressctl policy"
    )
    _add_check(actions)
    _add_lint(actions)
    _add_diff(actions)
    _add_apply(actions)
    _add_explain(actions)


def run(args: argparse.Namespace) -> int:
    module = importlib.import_module(f"egressd.cli.{ACTIONS[args.action]}")
    status: int = module.run(args)
    return status


def _add_check(actions: Subparsers) -> None:
    parser = verb_parser(
        actions,
        "check",
        summary="list every problem of policy files; needs no daemon and no root",
        says="Read policy files exactly as egressd does and list every problem: file, line, what, remedy.\n"
        "Exit status 1 if there is any. Remarks, on what is allowed but perhaps not meant, do not count.",
        examples="  egressctl policy check acme.yaml\n"
        "  egressctl policy check /etc/egressd/workspaces      every file in it\n"
        "  egressctl policy check --json *.yaml                for an editor or a CI job",
    )
    parser.add_argument("paths", metavar="FILE", nargs="+", help="a policy file, or a directory of them")
    _add_residency_dir(parser)


def _add_lint(actions: Subparsers) -> None:
    parser = verb_parser(
        actions,
        "lint",
        summary="what a policy's author should know about regions and secrets; needs no daemon and no root",
        says="Look at policy files for what egressd would take and their author may not mean: declared\n"
        "regions against URLs, global endpoints, profiles that spread requests over regions, old tables of\n"
        "prefixes, secrets in clear. What cannot be known from the file is told at the end.\n"
        "Exit status 1 if there is an error, with --strict also for a warning. docs/lint.md has the rules.",
        examples="  egressctl policy lint acme.yaml\n"
        "  egressctl policy lint --pin EU /etc/egressd/workspaces    what would an EU pin bar?\n"
        "  egressctl policy lint --format sarif --strict *.yaml      for code scanning",
    )
    parser.add_argument(
        "paths", metavar="FILE|DIRECTORY", nargs="+", help="a policy file, or a directory of them"
    )
    parser.add_argument(
        "--format", choices=("text", "json", "sarif"), help="lines, one JSON document, or SARIF 2.1.0"
    )
    _add_residency_dir(parser)
    parser.add_argument(
        "--pin", metavar="CODES", help="look as if the workspace were pinned so: EU, or EEA,CH"
    )
    parser.add_argument("--strict", action="store_true", help="exit status 1 also for a warning")
    parser.add_argument(
        "--disable", metavar="RULE", action="append", default=[], help="leave a rule out; may be repeated"
    )


def _add_diff(actions: Subparsers) -> None:
    parser = verb_parser(
        actions,
        "diff",
        summary="what the directory says, against what is in force",
        says="What `policy apply` would change: the directory of policies against the running policy. Lines\n"
        "that give a sandbox more than it has now say so. For root and the daemon's user.\n"
        "Exit status 1 if a file has problems.",
        examples="  egressctl policy diff\n"
        "  egressctl policy diff --exit-code || echo 'the directory was changed but not applied'",
    )
    parser.add_argument(
        "--exit-code", action="store_true", help="exit status 1 also if there is a difference"
    )


def _add_apply(actions: Subparsers) -> None:
    parser = verb_parser(
        actions,
        "apply",
        summary="read the directory again and apply it as one change",
        says="Read the directory of policies again and put it in force as one change: there is no moment\n"
        "with more, or with less, than the old or the new version allows. For root and the daemon's user.\n"
        "Exit status 1 if a file has problems; the last good policy of that workspace stays.",
        examples="  egressctl policy apply --dry-run      only say what would change\n"
        "  egressctl policy apply",
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, only say what would change")


def _add_explain(actions: Subparsers) -> None:
    parser = verb_parser(
        actions,
        "explain",
        summary="a policy in words",
        says="Say in words what a policy lets through. A FILE is read here and needs no daemon; the name of\n"
        "a WORKSPACE asks egressd for the policy that is in force.",
        examples="  egressctl policy explain acme             in force now\n"
        "  egressctl policy explain ./acme.yaml      as written in the file",
    )
    parser.add_argument("subject", metavar="FILE|WORKSPACE", help="a path if it has a slash or ends in .yaml")
    _add_residency_dir(parser)


def _add_residency_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--residency-dir", metavar="DIR", default=RESIDENCY_DIR,
        help="the catalogue's additions and the tables of prefixes (%(default)s)",
    )  # fmt: skip
