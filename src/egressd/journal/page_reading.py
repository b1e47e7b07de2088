"""From a verifier's report to the rows of the auditor's page.

Numbers are those of the statement's summary, which the verifier has added up again; times of the chart come
from its records. Nothing is judged here: what holds is the verifier's word.

A workspace's proof says what each host was sent by the kernel's counters. A receipt, of one sandbox, has no
counter per host: there the rows are the link's own flow records, and what the link sent beyond them is a row,
too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from egressd.journal import lines, notes
from egressd.journal.charts import human_bytes
from egressd.journal.keys import BadKey, Verifier
from egressd.journal.lines import Line
from egressd.journal.notes import NoteError
from egressd.journal.page_data import (
    Amount,
    Change,
    Check,
    Claim,
    Equation,
    Fact,
    FlowRow,
    Grant,
    Happening,
    HostRow,
    Moment,
    PageData,
    PlaceRow,
    Refusal,
    RouteRow,
    SandboxRow,
    Tried,
)
from egressd.journal.records import RecordError
from egressd.journal.residency import residency
from egressd.journal.statement import JournalPart, Predicate
from egressd.journal.summary import Flow, HostTotal, LinkTotals, Sandbox, Summary
from egressd.journal.testimony import Request
from egressd.journal.verification import Check as Checked
from egressd.journal.verification import Report, Verdict

__all__ = ["from_report"]

# Events of a refusal, and the field that says how many there were.
_REFUSED: Final = {
    "denied": "packets", "dns-denied": "count", "dns-refused-address": "count", "flow-refused": "connections",
    "relay-denied": "connections",
}  # fmt: skip
_UNITS: Final = {"kernel": "packets", "resolver": "questions"}
# Records of the machine that a reader should see one by one.
_HAPPENINGS: Final = frozenset(
    {
        "clock-stepped", "journal-damaged", "journal-torn", "journal-truncated",
        "key-rotated", "log-ended", "peer-broken", "process-hung", "process-killed", "record-refused",
    }
)  # fmt: skip
_MAX_HAPPENINGS: Final = 500


def from_report(report: Report, *, reasons: Mapping[str, str]) -> PageData:
    """Never raises for what stands in the report; one without a statement has its checks to show."""
    checks = tuple(_check(each) for each in report.checks)
    common = {
        "verified": report.verified,
        "failures": tuple(_failure(each) for each in report.broken),
        "remarks": tuple(each.text for each in report.notes),
        "proved": tuple(each.text for each in report.checks if each.verdict is Verdict.HOLDS),
        "not_proved": (*(each.text for each in report.notes), *report.limits),
        "checks": checks,
        "reasons": reasons,
    }
    if report.statement is None:
        file = (Fact("File", report.digest, exact=True),)
        return PageData(workspace="", evidence=file, **common)  # type: ignore[arg-type]
    predicate = report.statement.predicate
    found = _Reading(report, predicate)
    return PageData(**found.fields(), **common)  # type: ignore[arg-type]


def _check(check: Checked) -> Check:
    held = check.verdict is not Verdict.BROKEN
    return Check(check.name, held, check.text, check.verdict is Verdict.NOTE, check.place)


def _failure(check: Checked) -> str:
    return f"{check.text} [{check.place}]" if check.place else check.text


class _Reading:
    def __init__(self, report: Report, predicate: Predicate) -> None:
        self._report, self._predicate = report, predicate
        self._summary = predicate.summary
        self._lines = list(_window(predicate))

    def fields(self) -> dict[str, object]:
        predicate, summary = self._predicate, self._summary
        receipt = predicate.scope.link is not None
        hosts = _hosts_of_link(summary) if receipt else _hosts(summary)
        return {
            "workspace": predicate.scope.workspace,
            "link": predicate.scope.link or "",
            "since": predicate.window.since or "",
            "until": predicate.window.until or "",
            "guard": predicate.policy.guard,
            "restricted": self._restricted(),
            "complete": not summary.gaps and (bool(summary.epochs) or _whole(summary)),
            "source": _OF_LINK if receipt else "Counted by the kernel at the sandboxes' links, exactly.",
            "hosts": hosts,
            "flows": tuple(_flow(each) for each in summary.flows),
            "flows_more": _more(summary.flows_more, "connections"),
            "moments": tuple(_moments(self._lines)),
            "refusals": tuple(_refusals(summary)),
            "refused": _denied(summary.totals) if summary.epochs or receipt else None,
            "tried": tuple(_tried(summary)),
            "tried_more": _more(summary.attempts_more, "times"),
            "claims": tuple(_claims(summary)),
            "sandboxes": tuple(_sandbox(each) for each in summary.sandboxes),
            "request": () if predicate.request is None else tuple(_request(predicate.request)),
            "policy_text": _pretty(predicate.policy.text),
            "policy_digest": predicate.policy.digest,
            "changes": tuple(
                Change(c.time, c.change, c.widens, c.by, c.policy_before, c.policy)
                for c in summary.policy_changes
            ),
            "grants": tuple(
                Grant(g.time, g.granted, g.name, g.wildcard, g.link, g.addresses) for g in summary.grants
            ),
            **_placed(predicate),
            "ruleset_text": predicate.ruleset.text,
            "ruleset_digest": predicate.ruleset.digest,
            "drift": predicate.ruleset.drift,
            "equations": tuple(self._equations(hosts, receipt=receipt)),
            "equations_more": _added_up(summary),
            "lost": sum(loss.count for loss in summary.losses),
            "gaps": summary.gaps,
            "happenings": tuple(_happenings(summary, self._lines)),
            "scope": tuple(_scope(self._report, predicate)),
            "evidence": tuple(_evidence(self._report, predicate.journal)),
            "versions": tuple(Fact(name, text) for name, text in sorted(predicate.versions.items())),
        }

    def _restricted(self) -> bool:
        """Whether all that is told of the window was under an enforcing guard."""
        snapshots = (line.fields.get("guard") for line in self._lines if line.event == "snapshot")
        guards = {
            self._predicate.policy.guard,
            *snapshots,
            *(s.guard for s in self._summary.sandboxes if s.guard),
        }
        unlisted = any(h.kind == "unlisted" and h.counted.out_packets for h in self._summary.hosts)
        return guards == {"enforce"} and not unlisted

    def _equations(self, hosts: Sequence[HostRow], *, receipt: bool) -> Iterator[Equation]:
        summary = self._summary
        totals = summary.totals
        broken = any(check.name == "books" for check in self._report.broken)
        if summary.epochs or any(s.totals for s in summary.sandboxes):
            parts = (("admitted", _ok(totals)), ("refused", _denied(totals)), ("not IP", _other(totals)))
            yield _equation("What came over the links", ("in", _in(totals)), parts, broken=broken)
        if summary.epochs or (receipt and _whole(summary)):
            sent = sum((host.out for host in hosts), Amount())
            what = "Admitted is what hosts were sent"
            yield _equation(what, ("admitted", _ok(totals)), (("all hosts", sent),), broken=broken)
        if summary.epochs:
            refused = tuple((d.reason, Amount(d.packets, d.bytes)) for d in summary.denied)
            what = "Refused is the sum of its reasons"
            yield _equation(what, ("refused", _denied(totals)), refused, broken=broken)
        for each in summary.unequal:
            left, right = ("left", Amount(*each.left)), (("right", Amount(*each.right)),)
            yield Equation(f"{each.what}, at {each.time}", left, right, None if each.moving else False)


def _equation(
    what: str, left: tuple[str, Amount], right: tuple[tuple[str, Amount], ...], *, broken: bool
) -> Equation:
    exact = left[1] == sum((amount for _, amount in right), Amount())
    return Equation(what, left, right, True if exact else (False if broken else None))


def _window(predicate: Predicate) -> Iterator[Line]:
    """The window's records; those that cannot be read are the verifier's to tell."""
    for text in predicate.journal.records.lines[predicate.window.base :]:
        try:
            yield lines.read(text.encode())
        except (RecordError, UnicodeEncodeError):
            continue


# ---- hosts


def _hosts(summary: Summary) -> tuple[HostRow, ...]:
    """By the kernel's counters; ports, first and last from the records of their connections."""
    flows: dict[str, list[Flow]] = {}
    for flow in summary.flows:
        flows.setdefault(flow.host, []).append(flow)
    return tuple(_host(host, flows) for host in summary.hosts)


def _host(host: HostTotal, by_host: Mapping[str, list[Flow]]) -> HostRow:
    counted = host.counted
    flows = by_host.get(host.host, [])
    return HostRow(
        host=host.host,
        kind=host.kind,
        wildcard=host.wildcard,
        addresses=host.addresses,
        ports=_ports(flows),
        out=Amount(counted.out_packets, counted.out_bytes),
        in_=Amount(counted.in_packets, counted.in_bytes),
        connections=counted.connections,
        first=min((flow.first for flow in flows), default=""),
        last=max((flow.last for flow in flows), default=""),
        dialled=Amount(counted.dialled_packets, counted.dialled_bytes) if counted.dialled_packets else None,
    )


_OF_LINK: Final = (
    "From the records of this link's connections, and its own counters: a receipt has none for each host."
)


def _hosts_of_link(summary: Summary) -> tuple[HostRow, ...]:
    """By the link's flow records. The other halves of inspected connections are nobody's link's."""
    flows: dict[str, list[Flow]] = {}
    for flow in summary.flows:
        flows.setdefault(flow.host, []).append(flow)
    rows = [
        _host_of_link(name, each) for name, each in flows.items() if any(f.kind != "dialled" for f in each)
    ]
    return (*rows, *_beyond_records(summary))


def _host_of_link(name: str, flows: Sequence[Flow]) -> HostRow:
    own = [flow for flow in flows if flow.kind != "dialled"]
    dialled = [flow for flow in flows if flow.kind == "dialled"]
    return HostRow(
        host=name,
        kind=next((flow.kind for flow in own if flow.kind != "read"), "host"),
        addresses=tuple(sorted({flow.address for flow in (dialled or own) if flow.address})),
        ports=_ports(own),
        out=_sent(own),
        in_=Amount(sum(f.in_packets for f in own), sum(f.in_bytes for f in own)),
        connections=sum(f.flows for f in own),
        first=min(f.first for f in own),
        last=max(f.last for f in own),
        dialled=_sent(dialled) if dialled else None,
    )


def _beyond_records(summary: Summary) -> Iterator[HostRow]:
    """What the link was counted for and no flow record tells: questions to the resolver, and packets of no
    connection. Where connection tracking said nothing of the link, all that is missing is one row."""
    for sandbox in summary.sandboxes:
        books, totals = sandbox.flow_books, sandbox.totals
        _, packets, octets = sandbox.recorded
        told = Amount(packets, octets)
        if books is not None:
            asked = Amount(books.question_packets, books.question_bytes)
            answered = Amount(books.answer_packets, books.answer_bytes)
            yield HostRow("(resolver)", "resolver", out=asked, in_=answered, connections=books.questions)
            told += asked
        if totals is not None:
            rest = Amount(totals.ok_packets - told.packets, totals.ok_bytes - told.bytes)
            if rest != Amount():
                yield HostRow("(in no record)", "unrecorded", out=rest)


def _whole(summary: Summary) -> bool:
    """A receipt whose sandbox ended, with totals."""
    return bool(summary.sandboxes) and all(s.totals is not None for s in summary.sandboxes)


def _sent(flows: Iterable[Flow]) -> Amount:
    return sum((Amount(flow.out_packets, flow.out_bytes) for flow in flows), Amount())


def _ports(flows: Iterable[Flow]) -> tuple[str, ...]:
    """The ports that sandboxes used, by number."""
    found = {(flow.port, flow.protocol) for flow in flows if flow.port is not None and flow.kind != "dialled"}
    return tuple(f"{port}/{protocol}" for port, protocol in sorted(found))


def _flow(flow: Flow) -> FlowRow:
    return FlowRow(
        host=flow.host,
        kind=flow.kind,
        address=flow.address,
        port=_port(flow.port, flow.protocol),
        flows=flow.flows,
        out=_sent([flow]),
        in_=Amount(flow.in_packets, flow.in_bytes),
        first=flow.first,
        last=flow.last,
    )


def _port(port: int | None, protocol: str) -> str:
    return protocol if port is None else f"{port}/{protocol}"


# ---- when, and what was refused


def _moments(found: Iterable[Line]) -> Iterator[Moment]:
    for line in found:
        if line.event == "flow" and line.fields.get("kind") != "dialled":
            yield Moment(line.time, refused=False, amount=_amount(line.fields.get("flows")))
        elif line.event in _REFUSED:
            yield Moment(line.time, refused=True, amount=_amount(line.fields.get(_REFUSED[line.event])))


def _amount(value: object) -> int:
    return value if type(value) is int and value > 0 else 1


def _refusals(summary: Summary) -> Iterator[Refusal]:
    logged: dict[tuple[str, str], int] = {}
    for each in summary.attempts:
        if each.verdict == "denied":
            logged[each.by, each.reason] = logged.get((each.by, each.reason), 0) + each.times
    for count in summary.denied:
        if count.packets or count.bytes:
            amount = Amount(count.packets, count.bytes)
            yield Refusal(count.reason, amount, logged.pop(("kernel", count.reason), 0))
    for (by, reason), times in sorted(logged.items()):
        unit = (
            f"{_UNITS.get(by, 'connections')}, as logged by {'the kernel' if by == 'kernel' else f'the {by}'}"
        )
        yield Refusal(reason, Amount(times), times, unit)


def _tried(summary: Summary) -> Iterator[Tried]:
    for each in summary.attempts:
        yield Tried(
            destination=each.destination,
            port=_port(each.port, each.protocol),
            reason=each.reason,
            count=each.times,
            first=each.first,
            last=each.last,
            by=f"{each.by}; {', '.join(each.links)}" if each.links else each.by,
            observed=each.verdict == "observed",
        )


def _claims(summary: Summary) -> Iterator[Claim]:
    for each in summary.claims:
        where = f"{each.destination} {_port(each.port, each.protocol)}"
        yield Claim(each.link, where, each.executable, each.command, each.times, each.last)


def _more(rest: tuple[int, int], what: str) -> str:
    rows, times = rest
    return f"{rows:,} more rows, {times:,} {what} together, are in the proof's records." if rows else ""


# ---- sandboxes and books


def _sandbox(found: Sandbox) -> SandboxRow:
    totals = found.totals
    return SandboxRow(
        link=found.link,
        who="" if found.uid is None else f"uid {found.uid}",
        command=found.command,
        digest=found.command_digest,
        opened=found.opened or "before the window",
        closed=found.closed or "not ended in it",
        ended=_ended(found),
        resources=", ".join(_resources(found)),
        in_=None if totals is None else _in(totals),
        admitted=None if totals is None else _ok(totals),
        denied=None if totals is None else _denied(totals),
        other=None if totals is None else _other(totals),
    )


def _request(found: Request) -> Iterator[Fact]:
    yield Fact("Request", found.id, exact=True)
    yield Fact("What was asked for", found.action)
    yield Fact("Role of who asked", found.role)
    yield Fact("Files it was shown", f"{found.files:,}, {found.octets:,} bytes")
    yield Fact("Their list, MANIFEST.json", found.manifest, exact=True)
    yield Fact("Network", "none" if found.network == "none" else "as the policy has it")
    yield Fact("Decided", found.decided)
    yield Fact("Ended", _request_ended(found))
    yield Fact("Destroyed, and looked for", "yes" if found.destroyed else "nobody says so")


def _request_ended(found: Request) -> str:
    if found.ended is None:
        return "not on record"
    why = "; ".join(part for part in (found.why, found.hit and f"limits reached: {found.hit}") if part)
    return f"{found.ended}, status {found.status}" + (f": {why}" if why else "")


def _ended(found: Sandbox) -> str:
    if found.lost:
        return "its end was found later"
    if found.exit is None:
        return found.why
    said = f"exit {found.exit}" if found.exit >= 0 else f"signal {-found.exit}"
    return f"{said} ({found.why})" if found.why else said


def _resources(found: Sandbox) -> Iterator[str]:
    if found.user_seconds is not None:
        yield f"{found.user_seconds:.2f} s user"
    if found.system_seconds is not None:
        yield f"{found.system_seconds:.2f} s system"
    if found.max_rss:
        yield f"{human_bytes(found.max_rss)} of memory"


def _in(totals: LinkTotals) -> Amount:
    return Amount(totals.in_packets, totals.in_bytes)


def _ok(totals: LinkTotals) -> Amount:
    return Amount(totals.ok_packets, totals.ok_bytes)


def _denied(totals: LinkTotals) -> Amount:
    return Amount(totals.denied_packets, totals.denied_bytes)


def _other(totals: LinkTotals) -> Amount:
    return Amount(totals.other_packets, totals.other_bytes)


def _added_up(summary: Summary) -> str:
    exact = summary.equations - len(summary.unequal)
    numbers = f"{exact:,} of {summary.equations:,} equations hold to the byte."
    return f"Over all snapshots and ended sandboxes {numbers}"


def _happenings(summary: Summary, found: Iterable[Line]) -> list[Happening]:
    rows = [
        Happening(loss.first, "records lost", f"{loss.count:,}: {loss.cause}, from {loss.process}")
        for loss in summary.losses
    ]
    rows += [
        Happening(
            each.first,
            "process started or ended",
            f"{each.process}: started {each.started}, ended {each.ended}",
        )
        for each in summary.restarts
    ]
    rows += [_happening(line) for line in found if line.event in _HAPPENINGS][:_MAX_HAPPENINGS]
    return sorted(rows, key=lambda row: row.time)


def _happening(line: Line) -> Happening:
    detail = ", ".join(f"{name} {value}" for name, value in sorted(line.fields.items()))
    return Happening(line.time, line.event.replace("-", " "), detail)


# ---- what it rests on


def _scope(report: Report, predicate: Predicate) -> Iterator[Fact]:
    window = predicate.window
    yield Fact("Asked for", f"{window.asked_since or 'the beginning'} to {window.asked_until or 'the end'}")
    yield Fact("Records of the journal", f"{window.first:,} up to and without {window.past:,}")
    yield Fact("Of these in the proof", f"{predicate.summary.records:,}")
    yield Fact("Machine's boot", predicate.machine.boot, exact=True)
    yield Fact("Proof file", report.digest, exact=True)


def _evidence(report: Report, journal: JournalPart) -> Iterator[Fact]:
    yield Fact("Journal", journal.origin, exact=True)
    verifiers = list(_verifiers(journal))
    yield from _checkpoint(journal, verifiers)
    for verifier in verifiers:
        fingerprint = verifier.key.fingerprint
        signed = "Key that signed" if fingerprint in report.signers else "Older key"
        yield Fact(signed, f"{fingerprint}\n{verifier}", exact=True)
    pinned = "yes" if report.pinned else "no: nothing but this file says whose key it is"
    yield Fact("Key compared with yours", pinned)


def _verifiers(journal: JournalPart) -> Iterator[Verifier]:
    for text in journal.keys:
        try:
            yield Verifier.parse(text)
        except BadKey:
            continue


def _checkpoint(journal: JournalPart, verifiers: Sequence[Verifier]) -> Iterator[Fact]:
    try:
        end = notes.open(journal.end, verifiers)
    except (NoteError, BadKey):
        yield Fact("Checkpoint", "cannot be read")
    else:
        yield Fact("Checkpoint", f"{end.size:,} records")
        yield Fact("Root", end.root.hex(), exact=True)
    yield Fact("Signed note", journal.end, exact=True)


def _placed(predicate: Predicate) -> dict[str, object]:
    """Residency: the pin, what was found of each address, and which tables that rests on."""
    found, summary = residency(predicate), predicate.summary
    return {
        "pin": ", ".join(found.pin),
        "local_only": found.local_only,
        "vouched": tuple(Fact(each.key, each.reason) for each in found.vouched),
        "tables": (
            *(Fact(name, digest, exact=True) for name, digest in found.tables),
            *(Fact("catalogue file of its own", own, exact=True) for own in predicate.registry.catalogue),
        ),
        "places": tuple(
            PlaceRow(
                p.host, p.address, p.admitted, p.text, p.prefix, f"{p.provider} {p.region}".strip(),
                p.declared,
            )
            for p in summary.places
        ),
        "routes": tuple(
            RouteRow(
                r.route, r.provider, f"{r.host} {r.region} {r.jurisdiction}".strip(), r.text, r.by, r.times,
                r.first,
            )
            for r in summary.routes
        ),
    }  # fmt: skip


def _pretty(text: str) -> str:
    """The canonical policy is JSON in one line; the digest is of that line."""
    try:
        return msgspec.json.format(text, indent=2)
    except msgspec.DecodeError:
        return text
