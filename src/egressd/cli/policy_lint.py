"""`egressctl policy lint`: what a policy's author should know, without daemon, rights or network.

Findings are the answer, so they go to standard output: as lines in the manner of compilers, as one JSON
document, or as SARIF. Exit status 0 if nothing is wrong (notes never count), 1 for an error, and with
`--strict` for a warning; 2 for a wrong command line. A file that cannot be read is a finding, as in `check`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

from egressd import __version__
from egressd.cli.exits import FOUND, OK
from egressd.cli.screen import paint, print_json
from egressd.cli.text import Paint, escape
from egressd.model.errors import PolicyError, Unfit
from egressd.policy.compiled import Policy
from egressd.policy.lint import Finding, Report, lint
from egressd.policy.lint_rules import INVALID_POLICY, RULES, Level
from egressd.processes.registry_files import read_registry
from egressd.processes.workspaces import SUFFIX, policy_bytes, read_policy_file, read_workspaces
from egressd.residency.places import Pin
from egressd.residency.registry import Registry

__all__ = ["run"]

TEXT, JSON, SARIF = "text", "json", "sarif"
_COUNTED: Final = {Level.ERROR: "error", Level.WARNING: "warning", Level.NOTE: "note"}


@dataclass(frozen=True, slots=True)
class Terms:
    """On what the files are looked at."""

    registry: Registry
    pin: Pin | None
    today: date
    disabled: frozenset[str]


def run(args: argparse.Namespace) -> int:
    form = _form(args)
    terms = Terms(
        registry=read_registry(Path(args.residency_dir)),
        pin=_pin(args),
        today=datetime.now(UTC).date(),
        disabled=_disabled(args),
    )
    reports = [report for path in args.paths for report in _reports(Path(path), terms)]
    status = _status(reports, strict=args.strict)
    if form == JSON:
        print_json({"ok": status == OK} | _document(reports, terms))
    elif form == SARIF:
        from egressd.cli.lint_sarif import document  # noqa: PLC0415 - most of the time nobody asks for it

        print_json(document(reports, here=Path.cwd()))
    else:
        _print(reports, paint())
    return status


def _status(reports: Iterable[Report], *, strict: bool) -> int:
    counts = _counts(reports)
    wrong = counts[Level.ERROR] + (counts[Level.WARNING] if strict else 0)
    return FOUND if wrong else OK


# ---- the command line


def _form(args: argparse.Namespace) -> str:
    if args.json and args.format not in (None, JSON):
        args.parser.error(f"--json and --format {args.format} exclude each other")
    return JSON if args.json else args.format or TEXT


def _pin(args: argparse.Namespace) -> Pin | None:
    """`--pin EU` or `--pin EEA,CH`."""
    if args.pin is None:
        return None
    try:
        return Pin.of(args.pin)
    except Unfit as error:
        raise SystemExit(args.parser.error(f"--pin: {error}")) from error  # error() has left already


def _disabled(args: argparse.Namespace) -> frozenset[str]:
    for rule in args.disable:
        if rule not in RULES:
            args.parser.error(f"--disable: there is no rule {rule!r}; they are {', '.join(RULES)}")
        if rule == INVALID_POLICY:
            args.parser.error(f"--disable: {rule} cannot be disabled, the file would be refused all the same")
    return frozenset(args.disable)


# ---- files


def _reports(path: Path, terms: Terms) -> Iterator[Report]:
    """Of a file, or of each file of a directory, as egressd reads it."""
    if not path.is_dir() or path.is_symlink():
        yield _report(path, _read_file(path, terms.registry), terms)
        return
    try:
        policies, problems = read_workspaces(path, registry=terms.registry)
    except PolicyError as error:
        yield _report(path, error, terms)
        return
    found: dict[Path, Policy | PolicyError] = {
        path / f"{name}{SUFFIX}": one for name, one in policies.items()
    }
    for source in {problem.source for problem in problems}:
        found[Path(source)] = PolicyError([problem for problem in problems if problem.source == source])
    for file, read_as in sorted(found.items()):
        yield _report(file, read_as, terms)


def _read_file(path: Path, registry: Registry) -> Policy | PolicyError:
    try:
        return read_policy_file(path, registry=registry)
    except PolicyError as error:
        return error


def _report(path: Path, read_as: Policy | PolicyError, terms: Terms) -> Report:
    try:
        data = policy_bytes(path)
    except PolicyError as error:
        data, read_as = b"", read_as if isinstance(read_as, PolicyError) else error
    report = lint(
        data, source=str(path), read_as=read_as, registry=terms.registry, today=terms.today, pin=terms.pin
    )
    kept = tuple(found for found in report.findings if found.rule not in terms.disabled)
    return Report(report.source, kept, report.unverified)


# ---- text


def _print(reports: Sequence[Report], painted: Paint) -> None:
    for report in reports:
        for found in report.findings:
            print(_line(report.source, found, painted))
            if found.remedy:
                print(f"    {escape(found.remedy)}")
    for report in reports:
        for end in report.unverified:
            print(f"{_place(report.source, end.line)}: could not verify: {escape(end.text)}")
    print(_summary(reports, painted))


def _line(source: str, found: Finding, painted: Paint) -> str:
    """`acme.yaml:7: error: text [rule-id]`"""
    level = str(found.level)
    shown = {Level.ERROR: painted.bad, Level.WARNING: painted.strong}.get(found.level, str)(level)
    where = f"{escape(found.where)}: " if found.where else ""
    return f"{_place(source, found.line)}: {shown}: {where}{escape(found.text)} [{found.rule}]"


def _place(source: str, line: int) -> str:
    return f"{escape(source)}:{line}" if line else escape(source)


def _summary(reports: Sequence[Report], painted: Paint) -> str:
    if not reports:
        return "no policy files found"
    counts = _counts(reports)
    told = ", ".join(_plural(counts[level], word) for level, word in _COUNTED.items())
    color = painted.bad if counts[Level.ERROR] else painted.good
    open_ends = sum(len(report.unverified) for report in reports)
    return color(f"{_plural(len(reports), 'file')}: {told}; {open_ends} could not be verified")


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _counts(reports: Iterable[Report]) -> Counter[Level]:
    return Counter(found.level for report in reports for found in report.findings)


# ---- JSON


def _document(reports: Sequence[Report], terms: Terms) -> dict[str, Any]:
    counts = _counts(reports)
    return {
        "version": __version__,
        "pin": None if terms.pin is None else list(terms.pin.codes),
        "registry": _registry(terms.registry),
        "summary": {f"{word}s": counts[level] for level, word in _COUNTED.items()},
        "files": [report.source for report in reports],
        "findings": [_finding(report.source, found) for report in reports for found in report.findings],
        "unverified": [
            {"source": report.source, "line": end.line, "text": end.text}
            for report in reports
            for end in report.unverified
        ],
    }


def _registry(registry: Registry) -> dict[str, Any]:
    """What the findings rest on."""
    tables = registry.prefixes.names
    return {
        "digest": registry.digest,
        "catalogue": registry.catalogue.digest,
        "problem": registry.broken or None,
        "tables": [
            {
                "name": table.name,
                "digest": table.digest,
                "published": None if table.published is None else table.published.isoformat(),
            }
            for table in tables
        ],
    }


def _finding(source: str, found: Finding) -> dict[str, Any]:
    return {
        "source": source,
        "line": found.line,
        "where": found.where,
        "rule": found.rule,
        "level": str(found.level),
        "text": found.text,
        "remedy": found.remedy,
    }
