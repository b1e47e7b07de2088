"""`egressctl source`: which directories a workspace's documents come from, and what is believed of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from egressd.cli.administering import Document, add_options, administer, when
from egressd.cli.arguments import Parser, Subparsers, verb_parser
from egressd.cli.text import escape

if TYPE_CHECKING:
    from egressd.access.trust import Trust
    from egressd.broker.store.administration import Administration, Operator, Wanted
    from egressd.broker.store.store import Source

__all__ = ["add", "add_trust_options", "run", "show_trust", "trust_document", "wanted"]


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "source",
        summary="where a workspace's documents come from, and what is believed of them",
        says="A source is a directory that was ingested, or will be. Nothing that its documents say of\n"
        "themselves is believed, and nobody may read what nothing is said of, unless it is said here.\n"
        "For root and the owner of the broker's store. Each change is on record before it is made.",
        examples="  egressctl source list -w acme\n"
        "  egressctl source trust -w acme handbook --front-matter on --clearance internal\n"
        "  egressctl source trust -w acme wiki --read group:okta:staff --clearance public\n"
        "  egressctl source drop -w acme wiki",
    )
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", prog="egressctl source"
    )
    listing = verb_parser(
        actions, "list", summary="all sources of a workspace", says="All sources of a workspace.",
        examples="  egressctl source list -w acme --json",
    )  # fmt: skip
    add_options(listing)
    _add_trust(actions)
    dropping = verb_parser(
        actions,
        "drop",
        summary="forget a source and all its documents",
        says="Forget a source and all its documents. The files stay, and can be ingested again.",
        examples="  egressctl source drop -w acme wiki",
    )
    add_options(dropping)
    dropping.add_argument("name", metavar="NAME", help="as `source list` spells it")


def _add_trust(actions: Subparsers) -> None:
    trusting: Parser = verb_parser(
        actions,
        "trust",
        summary="what is believed of a source, and its defaults",
        says="Whether the front matter of a source's documents is believed, and what holds of those of\n"
        "which neither front matter nor an access list says something. What is not named here stays. A\n"
        "list replaces the one there was; --read '' empties it. Takes effect at once, and reads no file.\n"
        "A source that is yet to be ingested is known from then on, without documents.",
        examples="  egressctl source trust -w acme handbook --front-matter on\n"
        "  egressctl source trust -w acme wiki --read group:okta:staff --deny group:okta:guests",
    )
    add_options(trusting)
    trusting.add_argument("name", metavar="NAME", help="as `source list` spells it, or `ingest` will")
    add_trust_options(trusting)


def add_trust_options(parser: Parser) -> None:
    """`ingest` has them, too."""
    parser.add_argument(
        "--front-matter",
        metavar="on|off",
        choices=("on", "off"),
        help="whether what documents say of themselves is believed",
    )
    for option, what in (
        ("--read", "who may read, by default; may be repeated"),
        ("--deny", "who may not, by default; may be repeated"),
        ("--group", "whose it is, by default: for barriers; may be repeated"),
    ):
        parser.add_argument(option, metavar="PRINCIPAL", action="append", help=what)
    parser.add_argument("--clearance", metavar="LEVEL", help="the clearance, by default")


def run(args: argparse.Namespace) -> int:
    if args.action == "trust":
        return administer(args, lambda to, by: _trust(args, to, by), show=lambda d: _show(d["source"]))
    if args.action == "drop":
        return administer(args, lambda to, by: _drop(args, to, by), show=_show_dropped)
    return administer(args, lambda to, by: _list(args, to, by), show=_show_list)


def _trust(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    now = to.set_trust(by, args.workspace, args.name, **_said(args))
    return {"workspace": args.workspace, "source": _source(now)}


def wanted(args: argparse.Namespace, to: Administration) -> Wanted:
    """What the options of `add_trust_options` say."""
    return to.wanted(**_said(args))


def _said(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "front_matter": None if args.front_matter is None else args.front_matter == "on",
        "read": _names(args.read),
        "deny": _names(args.deny),
        "groups": _names(args.group),
        "clearance": args.clearance,
    }


def _names(words: list[str] | None) -> frozenset[str] | None:
    return None if words is None else frozenset(word for word in words if word)


def _drop(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    return {
        "workspace": args.workspace,
        "source": args.name,
        "documents": to.drop_source(by, args.workspace, args.name),
    }


def _list(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    return {
        "workspace": args.workspace,
        "sources": [
            {**_source(one), "documents": len(to.stored(by, args.workspace, one.name))}
            for one in to.sources(by, args.workspace)
        ],
    }


def _source(source: Source) -> Document:
    return {
        "name": source.name,
        "directory": source.directory or None,
        **trust_document(source.trust),
        "access_list": source.access_list,
        "changed_by": source.changed_by,
        "at": when(source.at),
        "ingested_at": None if source.ingested_at is None else when(source.ingested_at),
    }


def trust_document(trust: Trust) -> Document:
    return {
        "front_matter": trust.front_matter,
        "read": sorted(trust.default.readers),
        "deny": sorted(trust.default.denied),
        "groups": sorted(trust.default_groups),
        "clearance": trust.default_clearance,
    }


def _show(source: Document) -> None:
    print(f"{escape(source['name'])}  {escape(source['directory'] or 'not ingested yet: egressctl ingest')}")
    show_trust(source)
    print(f"  access list: {escape(source['access_list']) or 'none'}")
    print(f"  changed by {escape(source['changed_by'])}, {escape(source['at'])}")


def show_trust(source: Document) -> None:
    print(f"  front matter: {'believed' if source['front_matter'] else 'not believed'}")
    for name, none in (("read", "nobody"), ("deny", "nobody"), ("groups", "none")):
        print(f"  {name} by default: {', '.join(map(escape, source[name])) or none}")
    print(f"  clearance by default: {escape(source['clearance']) or 'none: each document must say its own'}")


def _show_list(document: Document) -> None:
    for source in document["sources"]:
        _show(source)
        print(f"  documents: {source['documents']}, ingested {escape(source['ingested_at'] or 'never')}")
    if not document["sources"]:
        print(f"{escape(document['workspace'])} has no sources: egressctl ingest")


def _show_dropped(document: Document) -> None:
    print(f"{escape(document['source'])} is dropped, with {document['documents']} documents")
