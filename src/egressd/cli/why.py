"""`egressctl why`: the reason for one name, address or sandbox."""

from __future__ import annotations

import argparse

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.daemon import Document, answer
from egressd.cli.screen import paint
from egressd.cli.text import Paint, escape

__all__ = ["add", "render", "run"]


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "why",
        summary="why a name, an address or a sandbox is allowed or denied",
        says="What would happen to SUBJECT in a workspace, and by which rule: a name, a name or address\n"
        "with a port, or a sandbox by its link. A denial is an answer: exit status 0.",
        examples="  egressctl why -w acme tracker.example\n"
        "  egressctl why -w acme db.internal.example:5432/tcp\n"
        "  egressctl why -w acme 169.254.169.254:80/tcp\n"
        "  egressctl why -w acme '[2001:db8::1]:443/tcp'\n"
        "  egressctl why eg7",
    )
    parser.add_argument(
        "-w", "--workspace", metavar="WORKSPACE", default="",
        help="in which workspace; a sandbox's link needs none",
    )  # fmt: skip
    parser.add_argument(
        "subject", metavar="SUBJECT", help="NAME, ADDRESS, either with :PORT/PROTOCOL, or a link"
    )


def run(args: argparse.Namespace) -> int:
    return answer(
        args,
        lambda control: control.why(args.workspace, args.subject),
        show=lambda document: print(render(document, paint=paint())),
    )


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
