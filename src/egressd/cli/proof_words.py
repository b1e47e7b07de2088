"""A verified proof in words: the same for who asks for one and for who checks one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from egressd.cli.text import Paint, amount, duration, escape, octets, shorten, table
from egressd.journal.statement import Predicate
from egressd.journal.summary import Summary
from egressd.journal.verification import Report, Verdict

__all__ = ["document", "render"]

_LONGEST = 60  # characters of a command
_ROWS = 20  # of each table; the file, the page and --json have all of them
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def render(report: Report, *, name: str, paint: Paint) -> str:
    """Everything a person needs to weigh the proof, most important first."""
    parts = [_title(report, name, paint), *_broken(report, paint)]
    if report.statement is not None:
        predicate = report.statement.predicate
        parts.append(_about(predicate))
        if not report.verified:
            parts.append("What the file says is not shown: not all of it holds.")
        else:
            parts += [part for part in (_request(predicate), *_tables(predicate.summary, paint)) if part]
    proved = [check.text for check in report.checks if check.verdict is Verdict.HOLDS]
    parts.append(_listed("Proved" if report.verified else "What does hold", proved, "+"))
    parts.append(_listed("To know", [check.text for check in report.notes], "!"))
    parts.append(_listed("Not proved, by this or any such file", report.limits, "-"))
    return "\n\n".join(part for part in parts if part)


def _title(report: Report, name: str, paint: Paint) -> str:
    if not report.verified:
        return f"{escape(name)}: {paint.bad('NOT VERIFIED')}"
    if report.pinned:
        return f"{escape(name)}: {paint.good('verified')}, signed by the key that was given"
    return f'{escape(name)}: {paint.good("verified")}, by the key that is in it (see "To know")'


def _broken(report: Report, paint: Paint) -> Iterator[str]:
    for check in report.broken:
        where = f"\n    at {escape(check.place)}" if check.place else ""
        yield f"  {paint.bad('broken')} {check.name}: {escape(check.text)}{where}"


def _about(predicate: Predicate) -> str:
    scope, window = predicate.scope, predicate.window
    what = escape(f"workspace {scope.workspace}" + (f", sandbox {scope.link}" if scope.link else ""))
    span = f"{_moment(window.since)} to {_moment(window.until)}"
    return f"{what}, {span}\npolicy {predicate.policy.digest}, guard {escape(predicate.policy.guard)}"


def _moment(time: str | None) -> str:
    return "the beginning" if time is None else f"{escape(time[:19].replace('T', ' '))}Z"


def _request(predicate: Predicate) -> str:
    found = predicate.request
    if found is None:
        return ""
    network = "no network" if found.network == "none" else "network by policy"
    many = f"{found.files} file{'' if found.files == 1 else 's'}"
    shown = f"{many}, {octets(found.octets)}, manifest {found.manifest}"
    lines = (f"  {found.id}: {found.action}, role {found.role}, {network}", f"  {shown}")
    return _titled("The request that ran in it (its broker's word)", "\n".join(map(escape, lines)))


def _tables(summary: Summary, paint: Paint) -> Iterator[str]:
    if summary.epochs:
        yield _titled("What left, to whom, and what came back", _hosts(summary, paint))
    else:
        yield _titled("What left, to whom, and what came back (ended connections)", _flows(summary, paint))
    yield _titled("What was refused, exactly", _denied(summary, paint))
    yield _titled("What else was tried", _attempts(summary, paint))
    yield _titled("Which programs tried (their broker's word)", _claims(summary, paint))
    yield _titled("Where its addresses are", _places(summary, paint))
    yield _titled("Which providers were named for its routes", _routes(summary, paint))
    yield _titled("Sandboxes", _sandboxes(summary, paint))
    yield _titled("Records that were lost", _losses(summary, paint))


def _titled(title: str, body: str) -> str:
    return f"{title}\n{body}" if body else ""


def _hosts(summary: Summary, paint: Paint) -> str:
    found = [h for h in summary.hosts if any(msgspec.structs.astuple(h.counted))]
    if not found:
        return "  nothing left"
    rows = [
        [
            escape(f"{h.host} ({h.wildcard})" if h.wildcard else h.host), str(h.counted.out_packets),
            amount(h.counted.out_bytes), amount(h.counted.in_bytes), str(h.counted.connections),
            amount(h.counted.dialled_bytes) if h.counted.dialled_packets else "-",
            escape(" ".join(h.addresses)) or "-",
        ]
        for h in found
    ]  # fmt: skip
    right = ("packets out", "bytes out", "bytes in", "connections", "bytes upstream")
    return _table(["host", *right, "real addresses"], rows, ",".join(right), paint)


def _flows(summary: Summary, paint: Paint) -> str:
    rows = [
        [
            escape(f.host) or "-", escape(f.kind), escape(f.protocol), escape(f.address) or "-",
            "-" if f.port is None else str(f.port), str(f.flows), amount(f.out_bytes), amount(f.in_bytes),
        ]
        for f in summary.flows
    ]  # fmt: skip
    head = ["host", "kind", "protocol", "real address", "port", "connections", "bytes out", "bytes in"]
    return _table(head, rows, "port,connections,bytes out,bytes in", paint) if rows else "  nothing left"


def _denied(summary: Summary, paint: Paint) -> str:
    rows = [[escape(d.reason), str(d.packets), amount(d.bytes)] for d in summary.denied if d.packets]
    if not rows and not summary.totals.denied_packets:
        return "  nothing was refused by the guard"
    if not rows:
        rows = [["all reasons", str(summary.totals.denied_packets), amount(summary.totals.denied_bytes)]]
    return _table(["reason", "packets", "bytes"], rows, "packets,bytes", paint)


def _attempts(summary: Summary, paint: Paint) -> str:
    rows = [
        [
            escape(a.destination) or "-", "-" if a.port is None else str(a.port), escape(a.protocol) or "-",
            escape(f"{a.verdict}: {a.reason}"), a.by, str(a.times), _moment(a.first),
        ]
        for a in summary.attempts
    ]  # fmt: skip
    head = ["destination", "port", "protocol", "verdict", "by", "times", "first"]
    return _table(head, rows, "port,times", paint) if rows else ""


def _claims(summary: Summary, paint: Paint) -> str:
    rows = [
        [
            escape(c.link), escape(c.destination) or "-", "-" if c.port is None else str(c.port),
            escape(c.protocol) or "-", str(c.times), escape(c.executable) or "-",
            escape(shorten(c.command, _LONGEST)) or "-",
        ]
        for c in summary.claims
    ]  # fmt: skip
    head = ["link", "destination", "port", "protocol", "times", "program", "command"]
    return _table(head, rows, "port,times", paint) if rows else ""


def _places(summary: Summary, paint: Paint) -> str:
    rows = [
        [
            escape(p.host), escape(p.address), "admitted" if p.admitted else f"refused: {escape(p.code)}",
            escape(p.prefix) or "-", escape(f"{p.provider} {p.region}".strip()) or "-",
            escape(p.table) or "-", escape(p.declared) or "-", _moment(p.first), _moment(p.last),
        ]
        for p in summary.places
    ]  # fmt: skip
    head = ["host", "real address", "verdict", "published prefix", "of", "table", "declared", "first", "last"]
    return _table(head, rows, "", paint) if rows else ""


def _routes(summary: Summary, paint: Paint) -> str:
    rows = [
        [
            escape(r.route), escape(r.provider) or "none", escape(r.host) or "-", escape(r.region) or "-",
            escape(r.jurisdiction) or "-", escape(r.by) or "-", str(r.times), _moment(r.first),
        ]
        for r in summary.routes
    ]  # fmt: skip
    head = ["route", "provider", "host", "declared region", "jurisdiction", "asked by", "times", "first"]
    return _table(head, rows, "times", paint) if rows else ""


def _sandboxes(summary: Summary, paint: Paint) -> str:
    rows = [
        [
            escape(s.link), "-" if s.uid is None else str(s.uid), _moment(s.opened) if s.opened else "-",
            "-" if s.seconds is None else _lasted(s.seconds), "-" if s.exit is None else str(s.exit),
            "-" if s.totals is None else str(s.totals.ok_packets),
            "-" if s.totals is None else str(s.totals.denied_packets),
            escape(_DIGEST.sub(lambda digest: f"{digest[0][:19]}...", s.command)) or "-",
        ]
        for s in summary.sandboxes
    ]  # fmt: skip
    head = ["link", "uid", "opened", "for", "exit", "admitted", "denied", "command (its caller's word)"]
    return _table(head, rows, "uid,exit,admitted,denied", paint) if rows else ""


def _lasted(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _losses(summary: Summary, paint: Paint) -> str:
    rows = [
        [escape(x.cause), escape(x.process), str(x.count), _moment(x.first), _moment(x.last)]
        for x in summary.losses
    ]
    return _table(["cause", "from", "count", "first", "last"], rows, "count", paint) if rows else ""


def _table(head: list[str], rows: list[list[str]], right: str, paint: Paint) -> str:
    shown = table(head, rows[:_ROWS], right=right, indent="  ", columns=paint.columns)
    more = len(rows) - _ROWS
    return f"{shown}\n  and {more} more (--json, --html)" if more > 0 else shown


def _listed(title: str, texts: Iterable[str], mark: str) -> str:
    found = [f"  {mark} {escape(text)}" for text in texts]
    return "\n".join([title, *found]) if found else ""


def document(report: Report) -> dict[str, Any]:
    """For programs. The records themselves are in the file."""
    found = report.statement
    return {
        "verified": report.verified,
        "pinned": report.pinned,
        "signers": list(report.signers),
        "digest": report.digest,
        "checks": [
            {"name": c.name, "verdict": c.verdict.value, "text": c.text, "place": c.place}
            for c in report.checks
        ],
        "limits": list(report.limits),
        "statement": None if found is None else _without_records(found.predicate),
    }


def _without_records(predicate: Predicate) -> dict[str, Any]:
    whole: dict[str, Any] = msgspec.to_builtins(predicate)
    journal = whole["journal"]
    journal["records"] = {"count": len(journal["records"]["indices"])}
    return whole
