"""`egressctl counters`: who was talked to, what was denied, and whether it adds up.

The balance is shown as the equation it is, and its sign is worked out here from the numbers shown: the
daemon's own word for it is not enough to print an equals sign. The kernel lists counters one by one; while
packets flow the later ones have seen more. Then it is read twice: counters only grow, so each side of
an equation had, at the moment between, a value between its two readings; if those cannot meet, it is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, TypeAlias

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.daemon import Document, answer
from egressd.cli.exits import FOUND, OK
from egressd.cli.screen import complain, paint
from egressd.cli.status import moment
from egressd.cli.text import Paint, amount, escape, table
from egressd.sandbox.control import Control

__all__ = ["add", "balances", "render", "run"]

Balance: TypeAlias = Mapping[str, Any]
_TERMS = ("admitted", "denied", "other")
_UNITS = ("packets", "bytes")


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "counters",
        summary="bytes and packets per workspace and host; do the books balance",
        says="What the kernel counted, per workspace and host: packets and bytes out and in, connections,\n"
        "what the inspector sent upstream for them, and what was denied or refused, by reason. Names that\n"
        "a wildcard covers stand below it; its own row has what names counted that are no longer held.\n"
        "Every frame that entered a sandbox's link is admitted, denied or other (not IP), and everything\n"
        "admitted belongs to a host: the equations say whether it does.\n"
        "Exit status 1 if the books do not balance.",
        examples="  egressctl counters            every workspace\n"
        "  egressctl counters acme       one workspace\n"
        "  egressctl counters --json     exact numbers for programs",
    )
    parser.add_argument("workspace", metavar="WORKSPACE", nargs="?", help="only this workspace")


def run(args: argparse.Namespace) -> int:
    return answer(
        args,
        lambda control: _read(control, args.workspace),
        show=lambda document: print(render(document, paint=paint())),
        status=_status,
    )


def _read(control: Control, workspace: str | None) -> Document:
    """The counters; `moving` is added where packets flowed and two readings leave no contradiction."""
    first: Document = control.ask("counters", workspace=workspace)
    if balances(first):
        return first
    second: Document = control.ask("counters", workspace=workspace)
    return {**second, "moving": not balances(second) and _may_meet(first, second)}


def _may_meet(first: Document, second: Document) -> bool:
    later = {each["workspace"]: each["balance"] for each in second["workspaces"]}
    pairs = [(e["balance"], later[e["workspace"]]) for e in first["workspaces"] if e["workspace"] in later]
    return all(
        left[0] <= right[1] and right[0] <= left[1]
        for before, after in pairs
        for left, right in zip(_sides(before, after), _sides(before, after, right=True), strict=True)
    )


def _sides(before: Balance, after: Balance, *, right: bool = False) -> list[tuple[int, int]]:
    """One side of the four equations of a workspace, each in both readings."""
    return [
        (side(before, unit), side(after, unit))
        for unit in (0, 1)
        for side in ((_all_terms, _of_hosts) if right else (_all_in, _admitted))
    ]


def _all_in(balance: Balance, unit: int) -> int:
    return int(balance["in"][unit])


def _all_terms(balance: Balance, unit: int) -> int:
    return sum(balance[term][unit] for term in _TERMS)


def _admitted(balance: Balance, unit: int) -> int:
    return int(balance["admitted"][unit])


def _of_hosts(balance: Balance, unit: int) -> int:
    return int(balance["elements"][unit])


def _status(document: Document) -> int:
    if balances(document):
        return OK
    complain("the books do not balance")
    return FOUND


def balances(document: Document) -> bool:
    """Whether the daemon says so and the numbers of every workspace agree, or may while they move."""
    moving = document.get("moving", False)
    return bool(document["balanced"]) and all(
        w["balance"]["balanced"] and (moving or _adds_up(w["balance"])) for w in document["workspaces"]
    )


def _adds_up(balance: Balance) -> bool:
    return all(
        _all_in(balance, unit) == _all_terms(balance, unit)
        and _admitted(balance, unit) == _of_hosts(balance, unit)
        for unit in (0, 1)
    )


def render(document: Document, *, paint: Paint) -> str:
    """The whole page, one block per workspace."""
    parts = [f"read {moment(document['time'])}"]
    moving = document.get("moving", False)
    parts += [_workspace(workspace, paint, moving=moving) for workspace in document["workspaces"]]
    if not document["workspaces"]:
        parts.append("no workspaces to show")
    parts.append(_late(document["late"], paint))
    parts.append("\n".join(escape(text) for text in document.get("differences", ())))
    return "\n\n".join(part for part in parts if part)


def _workspace(workspace: Mapping[str, Any], paint: Paint, *, moving: bool) -> str:
    title = f"{paint.strong(escape(workspace['workspace']))}  guard {escape(workspace['guard'])}"
    parts = [
        _hosts(workspace["hosts"], paint),
        _denied(workspace["denied"], paint),
        _refused("questions refused by the resolver", workspace["names_refused_by"], paint),
        _refused("connections refused by the inspector", workspace["flows_refused"], paint),
        _addresses(workspace.get("addresses_refused", {})),
        _links(workspace["links"], workspace["ended"], paint),
        _balance(workspace["balance"], paint, moving=moving),
    ]
    return "\n\n".join([title, *(part for part in parts if part)])


def _hosts(hosts: list[dict[str, Any]], paint: Paint) -> str:
    """A wildcard's names stand below it, indented; its own row has what names counted that it no longer
    holds. The last column is there when the inspector dials for somebody."""
    if not hosts:
        return "  no host is allowed"
    read = any(h["dialled"] is not None for h in hosts)
    head = ["host", "ports", "packets out", "bytes out", "packets in", "bytes in", "connections"]
    rows = [[*_host(h), *([_upstream(h)] if read else [])] for h in hosts]
    right = "packets out,packets in,bytes out,bytes in,connections,bytes upstream"
    head += ["bytes upstream"] if read else []
    return table(head, rows, right=right, indent="  ", columns=paint.columns)


def _host(host: Mapping[str, Any]) -> list[str]:
    name = {"removed": "{} (removed)", "granted": "  {}"}.get(host["kind"], "{}").format(escape(host["host"]))
    return [
        name,
        escape(" ".join(host["ports"])),
        str(host["out"][0]),
        amount(host["out"][1]),
        str(host["in"][0]),
        amount(host["in"][1]),
        str(host["connections"]),
    ]


def _upstream(host: Mapping[str, Any]) -> str:
    return "-" if host["dialled"] is None else amount(host["dialled"][1])


def _denied(denied: Mapping[str, list[int]], paint: Paint) -> str:
    rows = [[escape(reason), str(p), amount(b)] for reason, (p, b) in denied.items() if p or b]
    if not rows:
        return "  nothing was denied"
    head = ["denied", "packets", "bytes"]
    return table(head, rows, right="packets,bytes", indent="  ", columns=paint.columns)


def _refused(title: str, counts: Mapping[str, int], paint: Paint) -> str:
    """By reason. Their packets were admitted, to the resolver or to the inspector, and are in a row above;
    what they asked for was refused there."""
    rows = [[escape(reason), str(count)] for reason, count in sorted(counts.items()) if count]
    return table([title, "count"], rows, right="count", indent="  ", columns=paint.columns) if rows else ""


def _addresses(refused: Mapping[str, int]) -> str:
    """`addresses refused by residency: 5 of six.example, 1 of *.search.example`"""
    told = ", ".join(f"{count} of {escape(host)}" for host, count in refused.items() if count)
    return f"  addresses refused by residency: {told}" if told else ""


def _links(links: list[dict[str, Any]], ended: Mapping[str, Any], paint: Paint) -> str:
    rows = [[f"eg{link['link']}", *_sums(link), _used(link)] for link in links]
    if ended["links"]:
        rows.append([f"{ended['links']} ended", *_sums(ended), ""])
    if not rows:
        return ""
    head = ["link", "packets: in = admitted + denied + other", "bytes: in = admitted + denied + other"]
    if any(row[-1] for row in rows):
        head.append("used")
    else:
        rows = [row[:-1] for row in rows]
    return table(head, rows, indent="  ", columns=paint.columns)


def _used(link: Mapping[str, Any]) -> str:
    """`1200/50000 bytes, 3/4 connections`: of what the sandbox alone is held to."""
    budgets = {"bytes": link.get("quota"), "connections": link.get("connections")}
    return ", ".join(f"{used[0]}/{used[1]} {what}" for what, used in budgets.items() if used)


def _sums(link: Mapping[str, Any]) -> list[str]:
    return [
        _sum(link["in"][unit], [link[term][unit] for term in ("ok", "denied", "other")]) for unit in (0, 1)
    ]


def _sum(total: int, terms: list[int]) -> str:
    return f"{total} {_sign(total, sum(terms))} {' + '.join(map(str, terms))}"


def _sign(left: int, right: int) -> str:
    return "=" if left == right else "!="


def _balance(balance: Balance, paint: Paint, *, moving: bool) -> str:
    good = balance["balanced"] and (moving or _adds_up(balance))
    verdict = paint.good("the books balance") if good else paint.bad("THE BOOKS DO NOT BALANCE")
    if good and not _adds_up(balance):
        verdict += "; packets flowed while they were read, and two readings leave no contradiction"
    lines = [f"  {verdict}", *(f"    {_equation(balance, unit)}" for unit in (0, 1))]
    if any(balance["difference"]) and not good:
        packets, size = balance["difference"]
        lines.append(f"    difference {packets} packets, {size} bytes")
    return "\n".join(lines)


def _equation(balance: Balance, unit: int) -> str:
    """`packets  in 44 = admitted 11 + denied 31 + other 2;  admitted 11 = hosts 11`"""
    total, admitted = balance["in"][unit], balance["admitted"][unit]
    parts = {term: balance[term][unit] for term in _TERMS}
    right = " + ".join(f"{term} {value}" for term, value in parts.items())
    hosts = balance["elements"][unit]
    return (
        f"{_UNITS[unit]:<7}  in {total} {_sign(total, sum(parts.values()))} {right};"
        f"  admitted {admitted} {_sign(admitted, hosts)} hosts {hosts}"
    )


def _late(late: Mapping[str, list[int]], paint: Paint) -> str:
    rows = [[escape(reason), str(p), amount(b)] for reason, (p, b) in late.items() if p or b]
    if not rows:
        return ""
    head = ["admitted, then lost", "packets", "bytes"]
    return table(head, rows, right="packets,bytes", columns=paint.columns)
