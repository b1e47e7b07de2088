"""`egressctl barrier`: two groups that must not see each other's documents."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from egressd.cli.administering import Document, add_options, administer
from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.text import escape

if TYPE_CHECKING:
    from egressd.broker.store.administration import Administration, Operator

__all__ = ["add", "run"]


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "barrier",
        summary="groups that must not see each other's documents: add, remove or list",
        says="Who is in one of the two groups is not shown what is of the other, whatever its access list\n"
        "says; who is in both is shown nothing of either.\n"
        "For root and the owner of the broker's store. Each change is on record before it is made.",
        examples="  egressctl barrier add -w acme group:okta:deals group:okta:research\n"
        "  egressctl barrier list -w acme",
    )
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", prog="egressctl barrier"
    )
    for name, summary, says in (
        ("add", "put a barrier between two groups", "Both ways, from the next decision on."),
        ("remove", "take a barrier away", "Each may then see what the access lists let them see."),
    ):
        action = verb_parser(
            actions, name, summary=summary, says=says,
            examples=f"  egressctl barrier {name} -w acme group:okta:deals group:okta:research",
        )  # fmt: skip
        add_options(action)
        action.add_argument("group", metavar="GROUP", help="group:ISSUER:NAME")
        action.add_argument("other", metavar="GROUP", help="group:ISSUER:NAME")
    listing = verb_parser(
        actions, "list", summary="all barriers of a workspace", says="All barriers of a workspace.",
        examples="  egressctl barrier list -w acme --json",
    )  # fmt: skip
    add_options(listing)


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        return administer(args, lambda to, by: _list(args, to, by), show=_show_list)
    return administer(args, lambda to, by: _change(args, to, by), show=_show_change)


def _change(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    change = to.add_barrier if args.action == "add" else to.remove_barrier
    changed = change(by, args.workspace, args.group, args.other)
    return {
        "workspace": args.workspace,
        "groups": sorted((args.group, args.other)),
        "barrier": args.action == "add",
        "changed": changed,
    }


def _list(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    return {"workspace": args.workspace, "barriers": [list(pair) for pair in to.barriers(by, args.workspace)]}


def _show_change(document: Document) -> None:
    one, other = map(escape, document["groups"])
    there = "there is a barrier" if document["barrier"] else "there is no barrier"
    before = "" if document["changed"] else "; so it was before"
    print(f"{escape(document['workspace'])}: {there} between {one} and {other}{before}")


def _show_list(document: Document) -> None:
    for one, other in document["barriers"]:
        print(f"{escape(one)}  {escape(other)}")
    if not document["barriers"]:
        print(f"{escape(document['workspace'])} has no barriers")
