"""`egressctl policy diff` and `policy apply`: the directory of policies against the one in force."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from egressd.cli.daemon import Document, answer
from egressd.cli.exits import FOUND, OK
from egressd.cli.screen import paint
from egressd.cli.text import Paint, escape
from egressd.sandbox.control import Control

__all__ = ["change_lines", "render", "run"]


def run(args: argparse.Namespace) -> int:
    differing = FOUND if getattr(args, "exit_code", False) else OK
    return answer(
        args,
        _diff if args.action == "diff" else lambda control: control.apply(dry_run=args.dry_run),
        show=lambda document: print(render(document, paint=paint())),
        status=lambda document: (
            FOUND
            if document["problems"]
            else differing
            if document["changes"] or document.get("drift")
            else OK
        ),
    )


def _diff(control: Control) -> Document:
    document: Document = control.ask("diff")
    return document


def change_lines(changes: Iterable[Document], paint: Paint) -> list[str]:
    return [
        f"{escape(change['workspace'])}: {escape(change['text'])}"
        + (paint.bad("  (gives more)") if change["widens"] else "")
        for change in changes
    ]


def render(document: Document, *, paint: Paint) -> str:
    lines = change_lines(document["changes"], paint)
    lines += [f"{paint.bad('problem')}: {escape(problem)}" for problem in document["problems"]]
    lines += [f"{paint.bad('kernel')}: {escape(drift)}" for drift in document.get("drift", ())]
    return "\n".join([*lines, _conclusion(document)])


def _conclusion(document: Document) -> str:
    count = len(document["changes"])
    changes = "no changes" if not count else "1 change" if count == 1 else f"{count} changes"
    if document["applied"]:
        return f"{changes}, applied in {document['milliseconds']:.1f} ms"
    return f"{changes}, nothing applied" if count else "no changes: what is in force is what is written"
