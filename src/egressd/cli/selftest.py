"""egressctl selftest: try to get out of a sandbox, in every way that is known, and say what became of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.exits import FOUND, OK, REFUSED
from egressd.cli.screen import complain, paint, print_json
from egressd.cli.text import Paint, escape, table
from egressd.model.errors import EgressdError

if TYPE_CHECKING:
    from egressd.selftest.judge import Report, Row, Way

__all__ = ["add", "run"]

ESCAPED = 2


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "selftest",
        summary="try to get out of a sandbox, in every way that is known",
        says="Make a throw-away sandbox of WORKSPACE and try, from inside it and as its owner, to get out:\n"
        "by addresses, protocols, names, TLS, frames, sockets and files of the machine, and system calls.\n"
        "Each must be refused as it has to be, and every frame counted at the link. Needs no more than to\n"
        "be a member. A whole run is put on record as your word. 0: all refused; 2: something escaped;\n"
        "1: something was refused otherwise than it must be; 125: it could not be tested.",
        examples="  egressctl selftest -w acme                    some hundred ways, in a few seconds\n"
        "  egressctl selftest -w acme --only names       of one group\n"
        "  egressctl selftest -w acme --only '*metadata*'\n"
        "  egressctl selftest --list                     what would be tried; needs no daemon\n"
        "  egressctl --json selftest -w acme             the same for programs",
    )
    parser.usage_status = REFUSED  # 2 is what must not be taken for a slip
    parser.add_argument(
        "-w",
        "--workspace",
        metavar="WORKSPACE",
        help="the workspace whose policy holds; the only one if there is one",
    )
    parser.add_argument(
        "--only", metavar="PATTERN",
        help="only those whose number, group or description this matches; such a run is not put on record",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the table and try nothing")
    parser.add_argument("--all", action="store_true", help="print what was refused as well, row by row")


def run(args: argparse.Namespace) -> int:
    from egressd.selftest import judge  # noqa: PLC0415 - the other verbs do not need it

    wanted = judge.chosen(args.only)
    if not wanted:
        complain(f"nothing matches {args.only!r}: see egressctl selftest --list")
        return REFUSED
    if args.list:
        return _list(wanted, json=args.json)
    try:
        report = judge.run(_workspace(args), run_dir=args.run_dir, only=args.only)
    except (EgressdError, OSError) as error:
        return _fail(error, json=args.json)
    if args.json:
        print_json(report.document())
    else:
        print(render(report, paint=paint(), everything=args.all))
    return status_of(report)


def _fail(error: EgressdError | OSError, *, json: bool) -> int:
    from egressd.model.verdicts import Reason  # noqa: PLC0415

    text = str(error) if isinstance(error, EgressdError) else f"the sandbox could not be tested: {error}"
    if json:
        print_json({"error": {"reason": getattr(error, "reason", Reason.UNKNOWN).value, "text": text}})
    complain(text)
    return REFUSED


def status_of(report: Report) -> int:
    from egressd.selftest.judge import Verdict  # noqa: PLC0415

    if report.count(Verdict.ESCAPED):
        return ESCAPED
    return FOUND if report.count(Verdict.UNCLEAR) or not report.tried else OK


def _workspace(args: argparse.Namespace) -> str:
    """The one that was named, or the only one there is for the caller."""
    from egressd.model.errors import Refused  # noqa: PLC0415
    from egressd.model.verdicts import Reason  # noqa: PLC0415
    from egressd.sandbox.control import Control  # noqa: PLC0415

    if args.workspace is not None:
        return str(args.workspace)
    with Control(args.run_dir) as control:
        document: Any = control.ask("workspaces")
    names = list(map(str, document["workspaces"]))
    if len(names) != 1:
        there = ", ".join(names) or "none"
        raise Refused(Reason.WORKSPACE, f"name a workspace with -w; of those you may see there are: {there}")
    return names[0]


def _list(wanted: tuple[Way, ...], *, json: bool) -> int:
    if json:
        ways = [
            {"number": w.number, "group": w.group, "name": w.name, "family": w.family, "must": list(w.must),
             "counted": w.counted}
            for w in wanted
        ]  # fmt: skip
        print_json({"ways": ways})
        return OK
    rows = [[str(w.number), w.group, w.name, w.family, " ".join(w.must), w.counted] for w in wanted]
    head = ["no", "group", "way out", "family", "must end as", "frames"]
    print(table(head, rows, right="no", columns=paint().columns))
    return OK


def render(report: Report, *, paint: Paint, everything: bool = False) -> str:
    """What was not refused first, then a line for each group, then the sum."""
    from egressd.selftest.judge import Verdict  # noqa: PLC0415

    shown = report.rows if everything else [r for r in report.rows if r.verdict is not Verdict.REFUSED]
    loud = [row for row in shown if row.verdict in (Verdict.ESCAPED, Verdict.UNCLEAR)]
    quiet = [row for row in shown if row not in loud]
    parts = [
        f"workspace {escape(report.workspace)}, guard {report.guard}, link {report.link}",
        _rows(quiet, paint),
        _groups(report, paint),
        _rows(loud, paint),
        _sum(report, paint),
    ]
    return "\n\n".join(part for part in parts if part)


def _rows(rows: list[Row], paint: Paint) -> str:
    if not rows:
        return ""
    cells = [
        [str(row.number), _way(row), escape(row.happened) or "-", _frames(row), _verdict(row)] for row in rows
    ]
    head = ["no", "way out", "happened", "frames", "verdict"]
    return table(head, cells, right="no", columns=paint.columns)


def _way(row: Row) -> str:
    return f"{row.group}: {row.name}" + ("" if row.family == "-" else f" ({row.family})")


def _verdict(row: Row) -> str:
    return row.verdict.value + (f": {escape(row.why)}" if row.why else "")


def _frames(row: Row) -> str:
    told = [
        f"{n} {name}" for name, n in (("admitted", row.ok), ("denied", row.denied), ("other", row.other)) if n
    ]
    return ", ".join(told) or "-"


def _groups(report: Report, paint: Paint) -> str:
    from egressd.selftest.judge import Verdict  # noqa: PLC0415

    order = (Verdict.REFUSED, Verdict.ESCAPED, Verdict.UNCLEAR, Verdict.NOT_TRIED)
    rows = []
    for group in dict.fromkeys(row.group for row in report.rows):
        verdicts = [row.verdict for row in report.rows if row.group == group]
        rows.append([group, *(str(verdicts.count(verdict)) for verdict in order)])
    names = [verdict.value.lower() for verdict in order]
    return table(["ways out by", *names], rows, right=",".join(names), columns=paint.columns)


def _sum(report: Report, paint: Paint) -> str:
    from egressd.selftest.judge import Verdict  # noqa: PLC0415

    escaped, unclear = report.count(Verdict.ESCAPED), report.count(Verdict.UNCLEAR)
    text = (
        f"{report.tried} ways tried, {report.count(Verdict.REFUSED)} refused, {escaped} escaped"
        + (f", {unclear} unclear" if unclear else "")
        + f"; {report.count(Verdict.NOT_TRIED)} not tried"
    )
    painted = paint.bad(text) if escaped or unclear else paint.good(text)
    if report.guard != "enforce" and escaped:
        name = escape(report.workspace)
        painted += f"\nThe guard of {name} is {report.guard}: egressctl guard {name} on"
    if report.recorded:
        painted += f"\nOn record over link {report.link}, as your word: {report.table}"
    elif report.whole:
        painted += f"\nNot on record: {escape(report.unrecorded)}"
    return painted
