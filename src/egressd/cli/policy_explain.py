"""`egressctl policy explain`: a policy in words, from a file or as it is in force."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from egressd.cli.exits import FOUND, OK
from egressd.cli.screen import print_json
from egressd.cli.text import escape, escape_lines

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    if "/" in args.subject or args.subject.endswith(".yaml"):
        return _explain_file(args)
    return _explain_workspace(args)


def _explain_file(args: argparse.Namespace) -> int:
    from dataclasses import asdict  # noqa: PLC0415

    from egressd.model.errors import PolicyError  # noqa: PLC0415
    from egressd.policy.explain import explain_policy  # noqa: PLC0415
    from egressd.processes.registry_files import read_registry  # noqa: PLC0415
    from egressd.processes.workspaces import read_policy_file  # noqa: PLC0415

    try:
        policy = read_policy_file(Path(args.subject), registry=read_registry(Path(args.residency_dir)))
    except PolicyError as error:
        if args.json:
            print_json({"ok": False, "problems": [asdict(problem) for problem in error.problems]})
        for problem in error.problems:
            print(escape(str(problem)), file=sys.stderr)
        return FOUND
    document = {"workspace": policy.workspace, "digest": policy.digest, "text": explain_policy(policy)}
    _show(args, document)
    return OK


def _explain_workspace(args: argparse.Namespace) -> int:
    from egressd.cli.daemon import answer  # noqa: PLC0415

    return answer(
        args,
        lambda control: control.ask("policy", workspace=args.subject),
        show=lambda document: print(escape_lines(document["text"].rstrip("\n"))),
    )


def _show(args: argparse.Namespace, document: dict[str, str]) -> None:
    if args.json:
        print_json(document)
    else:
        print(escape_lines(document["text"].rstrip("\n")))
