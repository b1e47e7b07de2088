"""The three switches of a workspace: guard, residency, local-only. What may be said to each, and what shows.

How one is thrown: cli/switching.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from egressd.cli.arguments import Parser
from egressd.cli.exits import REFUSED, USAGE
from egressd.cli.screen import complain, print_json
from egressd.model.errors import EgressdError, Refused, Unfit
from egressd.model.identities import check_workspace
from egressd.model.names import quoted
from egressd.model.verdicts import Reason
from egressd.policy import edit
from egressd.policy.compiled import Guard, Policy
from egressd.processes.config import Config
from egressd.residency.jurisdictions import codes

__all__ = [
    "GUARD",
    "LOCAL_ONLY",
    "RESIDENCY",
    "Switch",
    "add_arguments",
    "add_options",
    "residency",
    "switch",
]


@dataclass(frozen=True, slots=True)
class Switch:
    """`read` makes of the words that were typed what the file is to say, or raises `Unfit`; `of` is what a
    policy says; `told` is how that is shown, and typed."""

    name: str
    key: str  # of the policy, and of a workspace in egressd's status
    values: str
    read: Callable[[Sequence[str]], edit.Setting]
    of: Callable[[Policy], edit.Setting]
    told: Callable[[edit.Setting], str]

    def asked(self, workspace: str, value: edit.Setting) -> str:
        """What is put on record: `guard acme enforce`."""
        return f"{self.name} {workspace} {self.told(value)}"


def _guard(words: Sequence[str]) -> edit.Setting:
    known = {"on": Guard.ENFORCE, **{guard.value: guard for guard in Guard}}
    word = " ".join(words)
    if word not in known:
        raise Unfit(f"{quoted(word)} is no way to guard", "say on, observe or off")
    return known[word].value


def _residency(words: Sequence[str]) -> edit.Setting:
    """In the order in which they were said."""
    text = " ".join(words)
    return () if text.lower() == "none" else codes(text)


def _truth(words: Sequence[str]) -> edit.Setting:
    known = {"on": True, "off": False}
    word = " ".join(words)
    if word not in known:
        raise Unfit(f"{quoted(word)} is neither on nor off", "say on or off")
    return known[word]


def _told_codes(value: edit.Setting) -> str:
    return ",".join(sorted(value)) if isinstance(value, tuple) and value else "none"


def _told_truth(value: edit.Setting) -> str:
    return "on" if value else "off"


def _told(value: edit.Setting) -> str:
    return str(value)


GUARD: Final = Switch("guard", edit.GUARD, "on|observe|off", _guard, lambda p: p.guard.value, _told)
RESIDENCY: Final = Switch(
    "residency", edit.RESIDENCY, "EU|EEA,CH|none", _residency, lambda p: p.residency, _told_codes
)
LOCAL_ONLY: Final = Switch(
    "local-only", edit.LOCAL_ONLY, "on|off", _truth, lambda p: p.local_only, _told_truth
)


def add_arguments(parser: Parser, which: Switch) -> None:
    parser.add_argument("workspace", metavar="WORKSPACE", help="whose switch")
    parser.add_argument(
        "value", metavar=which.values, nargs="?", help="what it is to be; without, what it is is shown"
    )
    add_options(parser)


def add_options(parser: Parser) -> None:
    """Of all three."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="change nothing, only say what would change, and what would open",
    )
    usual = Config().workspaces_dir
    parser.add_argument(
        "--workspaces-dir", metavar="DIR", default="",
        help=f"the directory of policies, where egressd does not run ({usual})",
    )  # fmt: skip


def residency(args: argparse.Namespace) -> int:
    """`egressctl residency WORKSPACE [CODE ...]`; `args.named` is the workspace if -w says it, and then the
    first word is a code already."""
    words = list(getattr(args, "value", ()))
    if args.named:
        words = [args.workspace, *words] if hasattr(args, "workspace") else words
    elif not hasattr(args, "workspace"):
        args.parser.error("the following arguments are required: ACTION|WORKSPACE")
    merged = {"dry_run": False, "workspaces_dir": "", **vars(args), "value": words}
    if args.named:
        merged["workspace"] = args.named
    return switch(argparse.Namespace(**merged), RESIDENCY)


def switch(args: argparse.Namespace, which: Switch) -> int:
    """Throw it, or show it. The exit status."""
    from egressd.cli import switching  # noqa: PLC0415 - the policy grammar: --help needs none of it

    words = [args.value] if isinstance(args.value, str) else list(args.value or ())
    try:
        workspace = check_workspace(args.workspace)
        value = which.read(words) if words else None
    except ValueError as error:
        return refuse(args, Reason.PROTOCOL, str(error), status=USAGE)
    try:
        if value is None:
            return switching.show(args, which, workspace)
        return switching.throw(args, which, workspace, value)
    except Refused as error:
        return refuse(args, error.reason, str(error))
    except (EgressdError, OSError, ValueError) as error:  # ValueError: an answer that is not JSON
        return refuse(args, Reason.UNKNOWN, str(error))


def refuse(args: argparse.Namespace, reason: Reason, text: str, *, status: int = REFUSED) -> int:
    """As every verb does: a line on standard error, and a document for those who asked for JSON."""
    if args.json:
        print_json({"error": {"reason": reason.value, "text": text}})
    complain(text)
    return status


def plain(value: edit.Setting) -> Any:
    """For a document."""
    return sorted(value) if isinstance(value, tuple) else value
