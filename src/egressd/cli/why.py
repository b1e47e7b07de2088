"""`egressctl why`: the reason for one name, address or sandbox."""

from __future__ import annotations

import argparse

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.daemon import Document, answer
from egressd.cli.screen import paint
from egressd.cli.text import Paint, escape
from egressd.model.errors import Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.sandbox.control import Control

__all__ = ["add", "render", "run"]


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "why",
        summary="why a name, an address or a sandbox is allowed or denied",
        says="What would happen to SUBJECT in a workspace, and by which rule: a name, a name or address\n"
        "with a port, or a sandbox by its link. Of a name that a wildcard covers, whether it is granted\n"
        "now. A denial is an answer: exit status 0.",
        examples="  egressctl why -w acme tracker.example\n"
        "  egressctl why tracker.example                        where you are a member of one workspace\n"
        "  egressctl why -w acme db.internal.example:5432/tcp\n"
        "  egressctl why -w acme 169.254.169.254:80/tcp\n"
        "  egressctl why -w acme '[2001:db8::1]:443/tcp'\n"
        "  egressctl why eg7",
    )
    parser.add_argument(
        "-w", "--workspace", metavar="WORKSPACE", default="",
        help="in which workspace; not needed for a link, and where there is only one for you",
    )  # fmt: skip
    parser.add_argument(
        "subject", metavar="SUBJECT", help="NAME, ADDRESS, either with :PORT/PROTOCOL, or a link"
    )


def run(args: argparse.Namespace) -> int:
    return answer(
        args,
        lambda control: _ask(control, args.workspace, args.subject),
        show=lambda document: print(render(document, paint=paint())),
    )


def _ask(control: Control, workspace: str, subject: str) -> Document:
    if not workspace and Link.of_device(subject) is None:
        workspace = _only_workspace(control)
    document: Document = control.why(workspace, subject)
    return document


def _only_workspace(control: Control) -> str:
    """The one workspace the caller may ask about; Refused, with the choice, if it is not one."""
    seen = [each["workspace"] for each in control.ask("status")["workspaces"] if each["policy"]]
    if not seen:
        raise Refused(Reason.WORKSPACE, "there is no workspace you may ask about: you are a member of none")
    if len(seen) > 1:
        raise Refused(Reason.WORKSPACE, f"in which workspace? Say -w with one of {', '.join(sorted(seen))}")
    return str(seen[0])


def render(document: Document, *, paint: Paint) -> str:
    verdict = escape(document["verdict"])
    colour = paint.good if verdict == "allowed" else paint.bad
    where = f" in workspace {escape(document['workspace'])}" if document["workspace"] else ""
    lines = [
        f"{escape(document['subject'])}: {colour(verdict)}{where}",
        f"  {escape(document['reason'])}: {escape(document['text'])}",
        *(f"  {escape(detail)}" for detail in document["details"]),
    ]
    return "\n".join(lines)
