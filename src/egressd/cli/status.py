"""`egressctl status`: is it enforcing, for whom, and what happened."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from time import time
from typing import Any

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.daemon import Document, answer
from egressd.cli.exits import FOUND, OK
from egressd.cli.screen import paint
from egressd.cli.text import Paint, duration, escape, shorten, table

__all__ = ["add", "healthy", "moment", "render", "run"]

_COMMAND_WIDTH = 60
_ALARM_WIDTH = 240  # a flushed ruleset is an alarm of pages
_DRIFT_LINES = 10
_LONG_LAG = 15.0  # seconds that a record waits; a disk that refuses says so, one that hangs does not
_NOT_A_MEMBER = "no workspaces that you are a member of (root sees them all)"


def add(subparsers: Subparsers) -> None:
    verb_parser(
        subparsers,
        "status",
        summary="is egressd enforcing; which workspaces, which sandboxes",
        says="Is egressd enforcing, which processes, workspaces and sandboxes are there, what was noticed.\n"
        "Exit status 1 if it does not enforce, a policy is broken, the books do not balance, the ruleset is\n"
        "not as compiled, the journal fails, hangs, has lost records or is not known, or a process is down.",
        examples="  egressctl status           for people\n"
        "  egressctl status --json    for programs\n"
        "  egressctl status >/dev/null || page-somebody",
    )


def run(args: argparse.Namespace) -> int:
    return answer(
        args,
        lambda control: control.ask("status"),
        show=lambda document: print(render(document, paint=paint(), now=time())),
        status=lambda document: OK if healthy(document) else FOUND,
    )


def healthy(document: Document) -> bool:
    broken = any(workspace["problem"] for workspace in document["workspaces"])
    down = any(process["state"] == "down" for process in document["processes"])
    wrong = broken or down or document["drift"] or _journal_problems(document)
    return bool(document["enforcing"] and document["balanced"] and not wrong)


def _journal_problems(document: Document) -> list[str]:
    """What is wrong with the journal, in words; foreign ones are not escaped."""
    journal = document["journal"]
    if journal is None:
        return [f"not known: {document['journal_error']}"]
    problems = [f"failing: {journal['failing']}"] if journal["failing"] else []
    if journal["lag"] > _LONG_LAG:
        problems.append(f"nothing was written for {duration(journal['lag'])}: the disk hangs")
    lost = {cause: count for cause, count in journal["lost"].items() if count}
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(lost.items()))
    return problems + ([f"{sum(lost.values())} records lost ({causes})"] if lost else [])


def render(document: Document, *, paint: Paint, now: float) -> str:
    """The whole page. `now` is Unix time."""
    parts = [
        "\n".join(part(document, paint, now) for part in (_headline, _ruleset, _journal)),
        _processes(document["processes"], paint),
        _workspaces(document["workspaces"], paint),
        _residency(document["workspaces"], paint),
        _sandboxes(document["sandboxes"], now, paint),
        _alarms(document["alarms"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(document: Document, paint: Paint, now: float) -> str:
    since = document["since"]
    enforcing = paint.good("enforcing") if document["enforcing"] else paint.bad("NOT ENFORCING")
    books = paint.good("books balance") if document["balanced"] else paint.bad("BOOKS DO NOT BALANCE")
    return "\n".join(
        [
            f"egressd {escape(document['version'])}: {enforcing}, {books}",
            f"since {moment(since)} ({duration(now - since)}), gateway {escape(document['gateway'])}",
        ]
    )


def _ruleset(document: Document, paint: Paint, now: float) -> str:
    """Is the kernel's ruleset the compiled one?"""
    drift, read = document["drift"], document["drift_read"]
    ago = "not read back yet" if read is None else f"read back {duration(now - read)} ago"
    if not drift:
        return f"ruleset: {'as compiled, ' if read is not None else ''}{ago}"
    lines = [f"ruleset: {paint.bad('NOT AS COMPILED')}, {ago}; to make it so would take"]
    lines += [f"  {shorten(escape(text), _ALARM_WIDTH)}" for text in drift[:_DRIFT_LINES]]
    more = len(drift) - _DRIFT_LINES
    return "\n".join(lines + ([f"  and {more} more (whole with --json)"] if more > 0 else []))


def _journal(document: Document, paint: Paint, now: float) -> str:
    journal, problems = document["journal"], _journal_problems(document)
    told = [paint.bad(escape(problem)) for problem in problems]
    if journal is not None:
        told = [f"{journal['records']} records", _checkpoint(journal, now), *told]
        if journal["queued"]:
            told.append(f"{journal['queued']} waiting, for {duration(journal['lag'])}")
        if not problems:
            told.append("none lost")
    return f"journal: {', '.join(told)}"


def _checkpoint(journal: dict[str, Any], now: float) -> str:
    if not journal["checkpoint_time"]:
        return "no checkpoint yet"
    age = duration(now - journal["checkpoint_time"])
    return f"last checkpoint {age} ago at {journal['checkpoint_size']}"


def moment(unix: float) -> str:
    """UTC, to the second: `2026-11-21 10:00:00Z`."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _processes(processes: list[dict[str, Any]], paint: Paint) -> str:
    rows = [
        [escape(p["name"]), str(p["pid"] or "-"), escape(p["state"]), str(p["restarts"])] for p in processes
    ]
    head = ["process", "pid", "state", "restarts"]
    return table(head, rows, right="pid,restarts", columns=paint.columns) if rows else ""


def _workspaces(workspaces: list[dict[str, Any]], paint: Paint) -> str:
    if not workspaces:
        return "no workspaces: nobody may spawn a sandbox" if _sees_all() else _NOT_A_MEMBER
    rows = [
        [
            escape(w["workspace"]),
            escape(w["guard"] or "-") + (" local-only" if w.get("local_only") else ""),
            str(w["sandboxes"]),
            _names(w["names"]),
            shorten(escape(w["policy"] or "-"), 19),  # "sha256:" and 9 digits, for the eye
            escape(w["problem"] or "-"),
        ]
        for w in workspaces
    ]
    head = ["workspace", "guard", "sandboxes", "names", "policy", "problem"]
    return table(head, rows, right="sandboxes,names", columns=paint.columns)


def _residency(workspaces: list[dict[str, Any]], paint: Paint) -> str:
    """Of those that are pinned: where to, what is kept out by that, and what the judgement rests on."""
    rows = [
        [
            escape(w["workspace"]),
            escape(", ".join(found["jurisdictions"])),
            str(found["barred"]),
            str(found["addresses_refused"]),
            shorten(escape(found["registry"]), 19),
            _tables(found, paint),
        ]
        for w in workspaces
        if (found := w.get("residency")) is not None
    ]
    head = ["workspace", "residency", "rules barred", "addresses refused", "registry", "tables"]
    return table(head, rows, right="rules barred,addresses refused", columns=paint.columns) if rows else ""


def _tables(found: dict[str, Any], paint: Paint) -> str:
    if found["broken"]:
        return paint.bad(f"BROKEN: {escape(found['broken'])}")
    names = [each.partition("@")[0] for each in found["tables"]]
    told = [
        f"{escape(name)} ({paint.bad('STALE')})" if name in found["stale"] else escape(name) for name in names
    ]
    return ", ".join(told) or "none imported"


def _names(names: dict[str, int] | None) -> str:
    """Names of wildcards that are granted now, of how many."""
    return "-" if names is None else f"{names['granted']}/{names['budget']}"


def _sees_all() -> bool:
    """Whether the daemon shows us every workspace. It also does so to its own user, who never looks."""
    return os.geteuid() == 0


def _sandboxes(sandboxes: list[dict[str, Any]], now: float, paint: Paint) -> str:
    if not sandboxes:
        return "no sandboxes"
    rows = [
        [
            f"eg{s['link']}",
            escape(s["workspace"]),
            str(s["uid"]),
            str(s["pid"]),
            duration(now - s["since"]),
            escape(s["address4"]),
            escape(s["address6"]),
            shorten(escape(s["command"]), _COMMAND_WIDTH),
            _held_to(s),
        ]
        for s in sandboxes
    ]
    head = ["sandbox", "workspace", "uid", "pid", "age", "IPv4", "IPv6", "command"]
    if any(row[-1] for row in rows):
        head.append("held to")
    else:
        rows = [row[:-1] for row in rows]
    return table(head, rows, right="uid,pid,age", columns=paint.columns)


def _held_to(sandbox: dict[str, Any]) -> str:
    """What this sandbox alone is held to."""
    if sandbox.get("closed"):
        return "no network"
    bounds = {"bytes": sandbox.get("quota"), "connections": sandbox.get("connections")}
    return ", ".join(f"{bound} {what}" for what, bound in bounds.items() if bound is not None)


def _alarms(alarms: list[dict[str, Any]]) -> str:
    if not alarms:
        return ""
    shown = [f"  {moment(a['time'])}  {shorten(escape(a['text']), _ALARM_WIDTH)}" for a in alarms]
    return "\n".join(["alarms (whole with --json, and in the journal)", *shown])
