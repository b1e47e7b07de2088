"""`egressctl route`: which provider serves a route now, for gateways and scripts to call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.daemon import Document, answer
from egressd.cli.exits import FOUND, OK
from egressd.cli.text import escape
from egressd.sandbox.control import Control

__all__ = ["add", "refusal", "render", "run"]


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "route",
        summary="which provider serves a route, and why; or why none",
        says="The first provider of a ROUTE that complies with the residency of the workspace, by its URL,\n"
        "its declaration and its addresses: on the first line its name and base URL, then why. There is no\n"
        "fallback: where none complies, exit status 1, and why on standard error. Each answer is on record.\n"
        "For members of the workspace.",
        examples="  egressctl route -w acme default\n"
        '  egressctl route -w acme default | { read -r name url rest; echo "$url"; }\n'
        "  egressctl route -w acme default --json | jq -r .selected.base_url",
    )
    parser.add_argument("-w", "--workspace", metavar="WORKSPACE", required=True, help="in which workspace")
    parser.add_argument("route", metavar="ROUTE", help="its name under `routes:` of the policy")


def run(args: argparse.Namespace) -> int:
    return answer(
        args,
        lambda control: _ask(control, args.workspace, args.route),
        show=_show,
        status=lambda document: FOUND if document["selected"] is None else OK,
    )


def _ask(control: Control, workspace: str, route: str) -> Document:
    document: Document = control.select_route(workspace, route)
    return document


def _show(document: Document) -> None:
    if document["selected"] is None:
        print(refusal(document), file=sys.stderr)
    else:
        print(render(document))


def render(document: Document) -> str:
    """The first line is for `read name url`."""
    selected = document["selected"]
    lines = [
        f"{escape(selected['provider'])} {escape(selected['base_url'])}",
        f"  {escape(document['reason'])}",
    ]
    region = " ".join(filter(None, (selected["region"], _in(selected["jurisdiction"]))))
    lines += [f"  {label}: {escape(text)}" for label, text in (
        ("region", region),
        ("source", selected["source_url"]),
        ("key", selected["api_key"]),
    ) if text]  # fmt: skip
    lines += [f"  address: {line}" for line in _addresses(selected)]
    lines += [f"  passed over: {line}" for line in _refused(document, before=selected["provider"])]
    return "\n".join(lines)


def _in(jurisdiction: str) -> str:
    return f"({jurisdiction})" if jurisdiction else ""


def _addresses(selected: Document) -> Iterator[str]:
    for address, prefix in zip(selected["addresses"], selected["prefixes"], strict=True):
        yield escape(f"{address} in {prefix}" if prefix else address)


def refusal(document: Document) -> str:
    """Why none is selected, provider by provider."""
    where = f"route {escape(document['route'])} of {escape(document['workspace'])}"
    return "\n".join([f"{where}: no provider complies", *(f"  {line}" for line in _refused(document))])


def _refused(document: Document, *, before: str | None = None) -> Iterator[str]:
    """Each that does not comply, as far as the one that was selected: the others were not in question."""
    for one in document["candidates"]:
        if one["provider"] == before:
            return
        remedy = f" ({one['remedy']})" if one["remedy"] else ""
        yield escape(f"{one['provider']}: {one['reason']}{remedy} [{one['code']}]")
