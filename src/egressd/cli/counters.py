"""`egressctl counters`: who was talked to, what was denied, and whether it adds up.

The balance is shown as the equation it is, and its sign is worked out here from the numbers shown: the
daemon's own word for it is not enough to print an equals sign.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.daemon import Document, answer
from egressd.cli.exits import FOUND, OK
from egressd.cli.screen import paint
from egressd.cli.status import moment
from egressd.cli.text import Paint, amount, escape, table

__all__ = ["add", "balances", "render", "run"]

_TERMS = ("admitted", "denied", "other")
_UNITS = ("packets", "bytes")


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "counters",
        summary="bytes and packets per workspace and host; do the books balance",
        says="What the kernel counted, per workspace and host: packets and bytes out and in, connections,\n"
        "and what was denied, by reason. Every frame that entered a sandbox's link is admitted, denied\n"
        "or other (not IP), and everything admitted belongs to a host: the equations say whether it does.\n"
        "Exit status 1 if the books do not balance.",
        examples="  egressctl counters            every workspace\n"
        "  egressctl counters acme       one workspace\n"
        "  egressctl counters --json     exact numbers for programs",
    )
    parser.add_argument("workspace", metavar="WORKSPACE", nargs="?", help="only this workspace")


def run(args: argparse.Namespace) -> int:
    return answer(
        args,
        lambda control: control.ask("counters", workspace=args.workspace),
        show=lambda document: print(render(document, paint=paint())),
        status=_status,
    )


def _status(document: Document) -> int:
    if balances(document):
        return OK
    print("egressctl: the books do not balance", file=sys.stderr)
    return FOUND


def balances(document: Document) -> bool:
    """Whether the daemon says so and the numbers of every workspace agree."""
    return bool(document["balanced"]) and all(
        w["balance"]["balanced"] and _adds_up(w["balance"]) for w in document["workspaces"]
    )


def _adds_up(balance: Mapping[str, Any]) -> bool:
    return all(
        balance["in"][unit] == sum(balance[term][unit] for term in _TERMS)
        and balance["admitted"][unit] == balance["elements"][unit]
        for unit in (0, 1)
    )


def render(document: Document, *, paint: Paint) -> str:
    """The whole page, one block per workspace."""
    parts = [f"read {moment(document['time'])}"]
    parts += [_workspace(workspace, paint) for workspace in document["workspaces"]]
    if not document["workspaces"]:
        parts.append("no workspaces")
    parts.append(_late(document["late"]))
    parts.append("\n".join(escape(text) for text in document.get("differences", ())))
    return "\n\n".join(part for part in parts if part)


def _workspace(workspace: Mapping[str, Any], paint: Paint) -> str:
    title = f"{paint.strong(escape(workspace['workspace']))}  guard {escape(workspace['guard'])}"
    parts = [
        _hosts(workspace["hosts"]),
        _denied(workspace["denied"]),
        _links(workspace["links"], workspace["ended"]),
        _balance(workspace["balance"], paint),
    ]
    return "\n\n".join([title, *(part for part in parts if part)])


def _hosts(hosts: list[dict[str, Any]]) -> str:
    head = ["host", "ports", "packets out", "bytes out", "packets in", "bytes in", "connections"]
    rows = [
        [
            escape(h["host"]) + (" (removed)" if h.get("kind") == "removed" else ""),
            escape(" ".join(h["ports"])),
            str(h["out"][0]),
            amount(h["out"][1]),
            str(h["in"][0]),
            amount(h["in"][1]),
            str(h["connections"]),
        ]
        for h in hosts
    ]
    if not rows:
        return "  no host is allowed"
    return table(head, rows, right="packets out,packets in,bytes out,bytes in,connections", indent="  ")


def _denied(denied: Mapping[str, list[int]]) -> str:
    rows = [[escape(reason), str(p), amount(b)] for reason, (p, b) in denied.items() if p or b]
    if not rows:
        return "  nothing was denied"
    return table(["denied", "packets", "bytes"], rows, right="packets,bytes", indent="  ")


def _links(links: list[dict[str, Any]], ended: Mapping[str, Any]) -> str:
    rows = [[f"eg{link['link']}", *_sums(link)] for link in links]
    if ended["links"]:
        rows.append([f"{ended['links']} ended", *_sums(ended)])
    if not rows:
        return ""
    head = ["link", "packets: in = admitted + denied + other", "bytes: in = admitted + denied + other"]
    return table(head, rows, indent="  ")


def _sums(link: Mapping[str, Any]) -> list[str]:
    return [
        _sum(link["in"][unit], [link[term][unit] for term in ("ok", "denied", "other")]) for unit in (0, 1)
    ]


def _sum(total: int, terms: list[int]) -> str:
    return f"{total} {_sign(total, sum(terms))} {' + '.join(map(str, terms))}"


def _sign(left: int, right: int) -> str:
    return "=" if left == right else "!="


def _balance(balance: Mapping[str, Any], paint: Paint) -> str:
    good = balance["balanced"] and _adds_up(balance)
    verdict = paint.good("the books balance") if good else paint.bad("THE BOOKS DO NOT BALANCE")
    lines = [f"  {verdict}", *(f"    {_equation(balance, unit)}" for unit in (0, 1))]
    if any(balance["difference"]):
        packets, size = balance["difference"]
        lines.append(f"    difference {packets} packets, {size} bytes")
    return "\n".join(lines)


def _equation(balance: Mapping[str, Any], unit: int) -> str:
    """`packets  in 44 = admitted 11 + denied 31 + other 2;  admitted 11 = hosts 11`"""
    total, admitted = balance["in"][unit], balance["admitted"][unit]
    parts = {term: balance[term][unit] for term in _TERMS}
    right = " + ".join(f"{term} {value}" for term, value in parts.items())
    hosts = balance["elements"][unit]
    return (
        f"{_UNITS[unit]:<7}  in {total} {_sign(total, sum(parts.values()))} {right};"
        f"  admitted {admitted} {_sign(admitted, hosts)} hosts {hosts}"
    )


def _late(late: Mapping[str, list[int]]) -> str:
    rows = [[escape(reason), str(p), amount(b)] for reason, (p, b) in late.items() if p or b]
    if not rows:
        return ""
    return table(["admitted, then lost", "packets", "bytes"], rows, right="packets,bytes")
