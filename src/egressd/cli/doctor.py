"""`egressctl doctor`: is everything here that egressd needs, and does anything stand in its way?"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.exits import FOUND, OK, REFUSED
from egressd.cli.screen import complain, paint, print_json
from egressd.cli.text import Paint, escape
from egressd.diagnosis.facts import Facts
from egressd.diagnosis.findings import Finding, Result, Whose, conclude, healthy

__all__ = ["add", "document", "render", "run"]

_PATIENCE = 120.0  # seconds; programs that it tries have 20 s each


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "doctor",
        summary="what egressd needs of this machine: is it there, and how to get it",
        says="Each need of the daemon, of `egressctl run` and of the broker, how it was tested, whether\n"
        "it is met, and what to do where it is not; and what of this machine's network stands in the\n"
        "way: firewalls, ranges, resolvers. Rules, devices and namespaces are really made, apart from\n"
        "everything else, and thrown away; nothing is changed. What takes rights that you do not have is\n"
        "not tested, and that is said; as root, what callers need is tried as an account without rights.\n"
        "Exit status 1 if something is missing.",
        examples="  egressctl doctor                  before the first start, or when something is wrong\n"
        "  egressctl doctor --all            what is in order, too, with how it was tested\n"
        "  egressctl doctor --json | jq '.findings[] | select(.result != \"ok\")'",
    )
    parser.add_argument(
        "--config", metavar="FILE", default="/etc/egressd/egressd.yaml", help="the daemon's configuration"
    )
    parser.add_argument("--all", action="store_true", help="show what is in order, too")


def run(args: argparse.Namespace) -> int:
    try:
        facts = _examined(args.config, args.run_dir)
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError) as error:
        complain(f"this machine could not be examined: {error}")
        return REFUSED
    findings = conclude(facts)
    if args.json:
        print_json(document(facts, findings))
    else:
        print(render(facts, findings, paint=paint(), everything=args.all))
    return OK if healthy(findings) else FOUND


def _examined(config: str, run_dir: str) -> Facts:
    """The looking is done by a process of its own: this one has no part in the kernel's affairs."""
    command = [sys.executable, "-I", "-m", "egressd.processes.examiner", "--config", config]
    command += ["--run-dir", run_dir]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=_PATIENCE)
    return msgspec.json.decode(done.stdout, type=Facts)


def document(facts: Facts, findings: Sequence[Finding]) -> dict[str, object]:
    """What `--json` prints: findings in the order of the table, and the facts they rest on."""
    rows = [
        {
            "whose": str(finding.whose),
            "need": finding.need,
            "tested": finding.how,
            "result": str(finding.result),
            "said": finding.said,
            "fix": finding.fix,
        }
        for finding in findings
    ]
    return {
        "healthy": healthy(list(findings)),
        "findings": rows,
        "facts": msgspec.to_builtins(facts),
    }


_TITLES = {
    Whose.DAEMON: "the daemon",
    Whose.CALLERS: "egressctl run",
    Whose.BROKER: "the broker",
    Whose.NETWORK: "the neighbourhood",
}


def render(facts: Facts, findings: Sequence[Finding], *, paint: Paint, everything: bool) -> str:
    """A paragraph for each of whose needs they are; a line for each, and its remedy below."""
    who = "root" if facts.uid == 0 else f"uid {facts.uid}"
    lines = [
        f"{escape(facts.software.os or 'this machine')}, Linux {escape(facts.software.kernel)}, as {who}"
    ]
    for whose, title in _TITLES.items():
        own = [finding for finding in findings if finding.whose is whose]
        shown = [finding for finding in own if everything or finding.result is not Result.OK]
        met = sum(finding.result is Result.OK for finding in own)
        lines += ["", paint.strong(f"{title}: {met} of {len(own)} in order")]
        lines += [line for finding in shown for line in _lines(finding, paint)]
    return "\n".join([*lines, "", _sum(findings, paint)])


def _lines(finding: Finding, paint: Paint) -> list[str]:
    word = f"{finding.result:<11}"
    if finding.result is Result.OK:
        word = paint.good(word)
    elif finding.result is Result.MISSING:
        word = paint.bad(word)
    said = f": {escape(finding.said)}" if finding.said else ""
    lines = [f"  {word}{escape(finding.need)}{said}", f"{'':13}tested: {escape(finding.how)}"]
    return lines + (
        [f"{'':13}fix: {finding.fix if finding.fix.isprintable() else escape(finding.fix)}"]
        if finding.fix
        else []
    )


def _sum(findings: Sequence[Finding], paint: Paint) -> str:
    counts = {
        result: sum(finding.result is result for finding in findings)
        for result in (Result.MISSING, Result.WARNING, Result.UNTESTED)
    }
    told = ", ".join(f"{count} {result}" for result, count in counts.items() if count)
    if counts[Result.MISSING]:
        return paint.bad(told)
    return told or paint.good("everything that egressd needs is here")
