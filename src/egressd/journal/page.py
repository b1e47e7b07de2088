"""One HTML page of a proof, for a person who has nothing else: to read on any screen, and to print.

It rests on a verifier's report alone (`page_reading`), made into plain rows (`page_data`). The page holds
no script and loads nothing: its content security policy admits one style sheet, by hash. All text of the
proof is foreign and goes through `markup`, which escapes by type.

The order is the order of an auditor's questions: does it hold; what left, to whom, how much, when; was
anything else tried; whose was it; under which rules; do the numbers add up; what is missing; what is not
claimed; how can I check it myself.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType

from egressd.journal import charts
from egressd.journal.charts import Bar, Panel, counted, human_bytes
from egressd.journal.markup import Child, Html, element, joined
from egressd.journal.page_data import (
    Amount,
    Check,
    Claim,
    Equation,
    Fact,
    Grant,
    HostRow,
    PageData,
    PlaceRow,
    RouteRow,
)
from egressd.journal.page_reading import from_report
from egressd.journal.page_style import STYLE
from egressd.journal.verification import Report

__all__ = ["page", "render"]

_CHARTED = 15  # hosts with bars, one page of A4; all are in the table
_NAMED = 6  # hosts named in the headline
_WIDE = 5  # columns; see page_style
_UNFOLDED = 120  # lines
_LAST_SECOND = 253_402_300_799  # of the year 9999, the last one datetime knows


# --------------------------------------------------------------------------------------------------
# the whole


def page(report: Report, *, reasons: Mapping[str, str] = MappingProxyType({})) -> str:
    """The page of a report. `reasons`: reason -> one sentence for a person (`model.verdicts.Reason.text`)."""
    return render(from_report(report, reasons=reasons))


def render(data: PageData) -> str:
    """The page. Always a whole page, also of a proof that holds nothing or does not verify."""
    sections = [(anchor, title, body) for anchor, title, body in _sections(data) if body]
    body = element(
        "body",
        element(
            "header",
            _verdict(data),
            _figures(data),
            element("nav", _contents(sections), aria_label="Contents"),
        ),
        element("main", (_section(*each) for each in sections)),
    )
    page = element("html", _head(data), body, lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _head(data: PageData) -> Html:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="robots", content="noindex"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"Egress of {_subject(data)}: {'verified' if data.verified else 'NOT VERIFIED'}"),
        element("style", Html(STYLE)),  # our own constant, the one child that is markup already
    )


def _sections(data: PageData) -> list[tuple[str, str, Html]]:
    return [
        ("scope", "What this is about", _scope(data)),
        ("hosts", "Who was talked to, and how much", _hosts(data)),
        ("time", "When", _times(data)),
        ("refused", "What was refused", _refused(data)),
        ("sandboxes", "Sandboxes", _sandboxes(data)),
        *_requested(data),
        ("policy", "The policy, and its changes", _policy(data)),
        *_where(data),
        ("balance", "Do the numbers add up", _balance(data)),
        ("losses", "Losses, restarts and alarms", _losses(data)),
        ("proved", "What is proved, and what is not", _proved(data)),
        ("checks", "What was checked", _checks(data)),
        ("evidence", "Journal, keys and versions", _evidence(data)),
        ("yourself", "How to check it yourself", _yourself(data)),
    ]


def _where(data: PageData) -> list[tuple[str, str, Html]]:
    told = data.pin or data.places or data.routes
    return [("residency", "Where it went", _residency(data))] if told else []


def _requested(data: PageData) -> list[tuple[str, str, Html]]:
    return [("request", "What the sandbox was shown", _request(data))] if data.request else []


def _section(anchor: str, title: str, body: Html) -> Html:
    return element(
        "section",
        element("h2", title, id=f"{anchor}-title"),
        body,
        id=anchor,
        aria_labelledby=f"{anchor}-title",
    )


def _contents(sections: Iterable[tuple[str, str, Html]]) -> Html:
    return element(
        "ul", (element("li", element("a", title, href=f"#{anchor}")) for anchor, title, _ in sections)
    )


def _subject(data: PageData) -> str:
    return f"{data.workspace or 'an unnamed workspace'}{f', link {data.link}' if data.link else ''}"


# ---- the top


def _verdict(data: PageData) -> Html:
    word, css = ("✓ Verified", "good") if data.verified else ("✗ NOT verified", "bad")
    return joined(
        element("p", f"Proof of egress: {_subject(data)}", class_="kicker"),
        element("p", word, class_=f"verdict {css}"),
        element("h1", data.headline or _headline(data)),
        element("p", _window(data), class_="kicker"),
        _failures(data),
        _remarks(data),
    )


def _headline(data: PageData) -> str:
    """What left, in one sentence; nothing is said to be so that was not verified."""
    if not data.verified:
        return "This proof does not hold. Nothing below can be relied on."
    used = [row for row in data.hosts if row.out.packets and row.kind != "resolver"]
    if not data.restricted and data.guard == "enforce":
        return f"For a part of the time nothing was restricted: the guard was opened. {_went_to(used)}"
    if not data.restricted:
        return f"Nothing was restricted: the guard was {data.guard or 'unknown'}. {_went_to(used)}"
    if not data.complete:
        return f"As far as it was counted, nothing left{f' but {_went_to(used)}' if used else '.'}"
    return f"Nothing left but {_went_to(used)}" if used else "Nothing left."


_NO_HOST = frozenset({"resolver", "unrecorded"})  # kinds of rows that are nowhere something went to


def _went_to(used: Sequence[HostRow]) -> str:
    """ "45.7 MiB to a.test and b.test." And what was admitted and belongs to no host, which must not be
    hidden."""
    reached = sorted((row for row in used if row.kind not in _NO_HOST), key=lambda row: -row.out.bytes)
    names = [charts.elided(row.host, 48) for row in reached[:_NAMED]]
    if len(reached) > _NAMED:
        names.append(f"{counted(len(reached) - _NAMED)} more hosts")
    nameless = sum(row.out.bytes for row in used if row.kind == "unrecorded")
    parts = [
        f"{human_bytes(sum(row.out.bytes for row in reached))} to {_listed(names)}" if names else "",
        f"{human_bytes(nameless)} that no record of a connection names" if nameless else "",
    ]
    said = _listed([part for part in parts if part])
    return f"{said}." if said else "Nothing left."


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


def _window(data: PageData) -> Html:
    since = _time(data.since) if data.since else "the beginning of the journal"
    until = _time(data.until) if data.until else "the end of the journal"
    return joined("From ", since, " to ", until, ", all times UTC.")


def _failures(data: PageData) -> Html | None:
    if data.verified:
        return None
    why = data.failures or ("The verifier gave no reason.",)
    return element("div", element("p", "Why:"), _items(why), class_="box bad", role="alert")


def _remarks(data: PageData) -> Html | None:
    if not data.remarks:
        return None
    return element("div", element("p", "Before you rely on it:"), _items(data.remarks), class_="box note")


def _figures(data: PageData) -> Html:
    hosts = [row for row in data.hosts if row.kind not in _NO_HOST]
    out, back = _total(row.out for row in data.hosts), _total(row.in_ for row in data.hosts)
    refused = data.refused or _total(row.total for row in data.refusals if row.unit == "packets")
    lost = "unknown" if data.lost is None else counted(data.lost)
    rows = [
        (
            "Hosts reached",
            counted(len([row for row in hosts if row.out.packets])),
            f"of {counted(len(hosts))} counted",
        ),
        ("Sent", human_bytes(out.bytes), f"{counted(out.bytes)} bytes"),
        ("Received", human_bytes(back.bytes), f"{counted(back.bytes)} bytes"),
        ("Refused", f"{counted(refused.packets)}", f"packets, {counted(refused.bytes)} bytes"),
        ("Sandboxes", counted(len(data.sandboxes)), ""),
        ("Records lost", lost, ""),
    ]
    return element(
        "dl",
        (
            element("div", element("dt", name), element("dd", value, element("span", more) if more else None))
            for name, value, more in rows
        ),
        class_="figures",
    )


def _total(amounts: Iterable[Amount]) -> Amount:
    return sum(amounts, Amount())


# ---- scope


def _scope(data: PageData) -> Html:
    guard = Fact("Guard", data.guard) if data.guard else None
    rows = [
        Fact("Workspace", data.workspace),
        Fact("Link", data.link or "all of the workspace"),
        guard,
        *data.scope,
    ]
    return _facts(rows)


def _facts(facts: Iterable[Fact | None]) -> Html:
    rows = []
    for fact in facts:
        if fact is not None:
            value = _lines(fact.value) if fact.exact else fact.value
            rows.append(joined(element("dt", fact.name), element("dd", value or "-")))
    return element("dl", rows, class_="facts")


def _lines(text: str) -> Html:
    """Line by line: within one, `shown` would spell line breaks out."""
    return joined(element("div", element("code", line)) for line in text.splitlines())


# ---- hosts


_HOST_KINDS = {
    "resolver": "egressd's own resolver",
    "unlisted": "destinations on no list",
    "cidr": "network",
    "local": "service of this machine",
    "granted": "granted under a wildcard",
    "wildcard": "wildcard",
    "removed": "removed from the policy",
    "unrecorded": "admitted; packets of no connection, or of one whose record was lost",
}


def _hosts(data: PageData) -> Html:
    if not data.hosts:
        return element("p", "No host has counted anything in this window.")
    rows = sorted(data.hosts, key=lambda row: (-row.out.bytes, -row.in_.bytes, row.host))
    return joined(
        _bars(rows),
        _table(
            "hosts",
            f"{data.source} Sent and received as the sandbox sees it, with IP headers.".strip(),
            ("Host", "Real addresses", "Sent", "Received", "Connections", "First and last"),
            (_host(row) for row in rows),
            css_of={1: "mid", 2: "n", 3: "n", 4: "n"},
            total=_host_totals(rows),
        ),
        _flows(data),
    )


def _bars(rows: Sequence[HostRow]) -> Html | None:
    some = [row for row in rows if row.out.bytes or row.in_.bytes][:_CHARTED]
    if not some:
        return None
    chart, scale = charts.bars(
        [Bar(row.host, (row.out.bytes, row.in_.bytes)) for row in some],
        (("sent", "sent"), ("received", "received")),
        label=f"Bytes sent and received, {len(some)} hosts",
    )
    which = (
        f"Drawn are {len(some)} of {counted(len(rows))}, those that were sent most."
        if len(rows) > len(some)
        else ""
    )
    words = f"Upper bar of each: sent. Lower bar: received. {which} {scale}"
    return element("figure", chart, element("figcaption", " ".join(words.split())), class_="chart")


_FLOW_KINDS = {"read": "up to egressd, which read its TLS", "dialled": "from egressd on"}


def _flows(data: PageData) -> Html | None:
    if not data.flows:
        return None
    rows = [
        (
            joined(
                _name(row.host),
                element("small", _FLOW_KINDS[row.kind]) if row.kind in _FLOW_KINDS else None,
            ),
            joined(_addresses((row.address,)), element("small", row.port)),
            counted(row.flows),
            _amount(row.out),
            _amount(row.in_),
            _span(row.first, row.last),
        )
        for row in data.flows
    ]
    caption = (
        "Connections, when they ended, as connection tracking told them. These records can be lost, and are"
        " then counted as lost. A connection whose TLS egressd read has two halves."
    )
    return joined(
        element("h3", "By real address and port"),
        _table(
            "flows",
            f"{caption} {data.flows_more}".strip(),
            ("Host", "Real address", "Connections", "Sent", "Received", "First and last"),
            rows,
            css_of={1: "mid", 2: "n", 3: "n", 4: "n"},
        ),
    )


def _host(row: HostRow) -> tuple[Child, ...]:
    kind = _HOST_KINDS.get(row.kind, "" if row.kind == "host" else row.kind)
    return (
        joined(
            _name(row.host),
            element("small", kind) if kind else None,
            element("small", f"under {row.wildcard}") if row.wildcard else None,
        ),
        joined(_addresses(row.addresses), element("small", ", ".join(row.ports)) if row.ports else None),
        joined(
            _amount(row.out),
            element("small", f"sent on: {counted(row.dialled.bytes)} B") if row.dialled else None,
        ),
        _amount(row.in_),
        counted(row.connections),
        _span(row.first, row.last),
    )


def _name(name: str) -> Html:
    """A host's name, which may be broken after its dots rather than anywhere."""
    first, *rest = name.split(".")
    return joined(first, (joined(".", element("wbr"), label) for label in rest))


def _addresses(addresses: Sequence[str]) -> Html | None:
    """One per line."""
    return joined(element("span", each, class_="mono") for each in addresses) if addresses else None


def _host_totals(rows: Sequence[HostRow]) -> tuple[Child, ...]:
    out, back = _total(row.out for row in rows), _total(row.in_ for row in rows)
    connections = counted(sum(row.connections for row in rows))
    return (f"All {counted(len(rows))}", None, _amount(out), _amount(back), connections, None)


def _amount(amount: Amount | None) -> Html | None:
    """Exact bytes; below them the packets."""
    if amount is None:
        return None
    return joined(
        element("span", f"{counted(amount.bytes)} B"),
        element("small", f"{counted(amount.packets)} packet{'' if amount.packets == 1 else 's'}"),
    )


# ---- time


def _times(data: PageData) -> Html:
    moments = [(seconds, each) for each in data.moments if (seconds := _seconds(each.time)) is not None]
    since, until = _seconds(data.since), _seconds(data.until)
    edges = [edge for edge in (since, until) if edge is not None] + [seconds for seconds, _ in moments]
    if not edges or not moments:
        return element("p", "The journal holds no connection that ended and no refusal in this window.")
    spans = charts.buckets(min(edges), max(edges))
    allowed = spans.totals((seconds, m.amount) for seconds, m in moments if not m.refused)
    refused = spans.totals((seconds, m.amount) for seconds, m in moments if m.refused)
    bound = "Refusals are those that were logged, a lower bound; exact totals stand below."
    words = f"Each column is {spans.words}. {bound}"
    panels = [
        Panel("Allowed", "connections, when they ended", "sent", allowed),
        Panel("Refused", "packets that were logged", "refused", refused),
    ]
    chart = charts.timeline(panels, spans, label="Connections and refusals over time", words=words)
    return joined(
        element("figure", chart, element("figcaption", words), class_="chart"),
        _time_table(spans, allowed, refused),
    )


def _time_table(spans: charts.Buckets, allowed: Sequence[int], refused: Sequence[int]) -> Html:
    rows = [
        (charts.moment_words(spans.at(index), spans.step), counted(a), counted(r))
        for index, (a, r) in enumerate(zip(allowed, refused, strict=True))
        if a or r
    ]
    return element(
        "details",
        element("summary", "The same in numbers"),
        _table(
            "times",
            f"Each row is {spans.words}, from the time it names.",
            ("From", "Allowed", "Refused"),
            rows,
            css_of={1: "n", 2: "n"},
        ),
    )


# ---- refused


def _refused(data: PageData) -> Html:
    if not data.refusals and not data.tried and not data.claims:
        return element("p", "Nothing was refused in this window.")
    return joined(_reasons(data), _destinations(data), _claims(data.claims))


def _reasons(data: PageData) -> Html:
    rows = []
    for row in sorted(data.refusals, key=lambda row: (-row.total.packets, row.reason)):
        amount = _amount(row.total) if row.unit == "packets" else f"{counted(row.total.packets)} {row.unit}"
        rows.append((row.reason, data.reasons.get(row.reason, ""), amount, counted(row.logged)))
    return joined(
        element("h3", "By reason"),
        _table(
            "reasons",
            "In bytes and packets: the kernel's counters, exact. Questions and connections: what the process"
            " that refused wrote down. Logged is how many of them the journal holds with their destination.",
            ("Reason", "Meaning", "Refused", "Logged"),
            rows,
            css_of={2: "n", 3: "n"},
        ),
    )


_BOUNDED = "Under a flood the kernel logs at a bounded rate, so these counts are lower bounds."


def _destinations(data: PageData) -> Html:
    rows = [
        (
            joined(
                element("span", row.destination, class_="mono"),
                element("small", row.name) if row.name else None,
            ),
            row.port,
            joined(row.reason, element("small", "let go: the guard observed") if row.observed else None),
            counted(row.count),
            row.by,
            _span(row.first, row.last),
        )
        for row in sorted(data.tried, key=lambda row: (-row.count, row.destination, row.port))
    ]
    return joined(
        element("h3", "By destination, as logged"),
        _table(
            "tried",
            f"{_BOUNDED} {data.tried_more}".strip(),
            ("Destination", "Port", "Reason", "Logged", "By", "First and last"),
            rows,
            css_of={1: "w", 2: "w", 3: "n"},
            empty="No refusal was logged with its destination.",
        ),
    )


def _claims(claims: Sequence[Claim]) -> Html | None:
    if not claims:
        return None
    rows = [
        (
            element("span", claim.destination, class_="mono"),
            joined(
                claim.program, element("small", element("code", claim.command)) if claim.command else None
            ),
            claim.link,
            counted(claim.count),
            _time(claim.last),
        )
        for claim in claims
    ]
    return joined(
        element("h3", "Which program tried"),
        _table(
            "claims",
            "As the program that started the sandbox said. Nobody has verified it.",
            ("Destination", "Program", "Link", "Times", "Last"),
            rows,
            css_of={1: "mid", 2: "w", 3: "n"},
        ),
    )


# ---- sandboxes


def _sandboxes(data: PageData) -> Html:
    rows = [
        (
            row.link,
            row.who,
            joined(
                element("code", row.command) if row.command else None,
                element("small", row.digest, class_="mono") if row.digest else None,
            ),
            _span(row.opened, row.closed or "not ended"),
            joined(row.ended or "-", element("small", row.resources) if row.resources else None),
            _amount(row.admitted),
            _amount(row.denied),
        )
        for row in data.sandboxes
    ]
    return _table(
        "sandboxes",
        "A link is the one wire of a sandbox. Who started it is what the kernel said of the caller; command,"
        " exit and resources are what the caller's program said.",
        ("Link", "Who", "Command", "From and to", "End", "Admitted", "Refused"),
        rows,
        css_of={1: "w", 2: "mid", 4: "w", 5: "n", 6: "n"},
        empty="No sandbox ran in this window.",
    )


def _request(data: PageData) -> Html:
    return joined(
        element(
            "p",
            "A broker decided which files a request may read, put that on record, and ran it in this sandbox."
            " All of this is its word; when it said so is the journal's. Who asked stands in the journal, and"
            " is in no proof. Whoever has the list of files can have it compared:",
        ),
        element("pre", "egressctl verify FILE.proof --key KEY --manifest MANIFEST.json"),
        _facts(data.request),
    )


# ---- policy


def _policy(data: PageData) -> Html:
    rows = [
        (
            _time(row.time),
            joined(element("strong", "widens: " if row.widens else ""), row.what),
            row.by,
            joined(*(element("small", f"{word} {digest}", class_="mono") for word, digest in
                     (("before", row.before), ("after", row.after)) if digest)),
        )
        for row in data.changes
    ]  # fmt: skip
    return joined(
        _facts([Fact("Policy digest", data.policy_digest, exact=True)]) if data.policy_digest else None,
        element("h3", "Changes in this window"),
        _table(
            "changes",
            None,
            ("When", "What", "By", "Policies"),
            rows,
            css_of={2: "w"},
            empty="The policy did not change.",
        ),
        _grants(data.grants),
        _text("The policy in force at the end", data.policy_text),
        _ruleset(data),
    )


def _grants(grants: Sequence[Grant]) -> Html | None:
    if not grants:
        return None
    rows = [
        (_time(g.time), "granted" if g.granted else "taken back", g.name, g.wildcard, g.link, g.addresses)
        for g in grants
    ]
    heads = ("When", "What", "Name", "Under", "Link", "Real addresses")
    return joined(
        element("h3", "Names granted under wildcards"),
        _table("grants", None, heads, rows, css_of={1: "w", 2: "mid", 4: "w", 5: "mid"}),
    )


def _residency(data: PageData) -> Html:
    pin = f"Pinned to {data.pin}." if data.pin else "Not pinned to any jurisdiction at the end of the window."
    return joined(
        element("p", joined(pin, " External routing was off." if data.local_only else "")),
        element(
            "p",
            "Where an address is, is what its provider publishes: evidence, not a legal guarantee.",
        ),
        _table(
            "places",
            None,
            ("Host", "Real address", "Verdict", "Prefix", "Of", "Declared"),
            (_place(row) for row in data.places),
            css_of={2: "w", 4: "w", 5: "w"},
            empty="No address was judged in this window.",
        ),
        joined(element("h3", "Vouched for, by the rules' author"), _facts(data.vouched))
        if data.vouched
        else None,
        joined(element("h3", "What that rests on: tables of published prefixes"), _facts(data.tables))
        if data.tables
        else None,
        _routes(data.routes),
    )


def _place(row: PlaceRow) -> tuple[Child, ...]:
    verdict = "let in" if row.admitted else element("strong", "refused")
    return row.host, row.address, joined(verdict, element("small", row.why)), row.prefix, row.of, row.declared


def _routes(routes: Sequence[RouteRow]) -> Html | None:
    if not routes:
        return None
    rows = [
        (_time(r.first), r.route, r.provider or element("strong", "none: blocked"), r.where, r.why, r.by,
         str(r.times))
        for r in routes
    ]  # fmt: skip
    heads = ("First", "Route", "Provider", "Where", "Why", "Asked by", "Times")
    return joined(
        element("h3", "Providers named for routes"),
        _table("routes", None, heads, rows, css_of={3: "w", 4: "w", 6: "n"}),
    )


def _ruleset(data: PageData) -> Html:
    return joined(
        element("h3", "What the kernel was found to enforce"),
        _facts([Fact("Ruleset digest", data.ruleset_digest, exact=True)]) if data.ruleset_digest else None,
        element(
            "div",
            element("p", "The kernel's ruleset differs from the policy:"),
            _items(data.drift),
            class_="box bad",
        )
        if data.drift
        else None,
        _text("The ruleset as it was read back", data.ruleset_text),
    )


def _text(title: str, text: str) -> Html | None:
    """Long text line by line, since `shown` would spell line breaks out. Unfolded if it is short enough to be
    read on paper."""
    if not text:
        return None
    lines = text.removesuffix("\n").expandtabs(4).split("\n")
    folded = len(lines) > _UNFOLDED
    words = f"{counted(len(lines))} line{'' if len(lines) == 1 else 's'}"
    size = f"{title} ({words}{', unfold it to print it' if folded else ''})"
    body = joined(*(joined(line, Html("\n")) for line in lines))
    return element("details", element("summary", size), element("pre", body), open=None if folded else "open")


# ---- the books


def _balance(data: PageData) -> Html:
    if not data.equations:
        return element("p", "The proof holds no counters that could be compared.")
    return joined(
        element(
            "p",
            "What entered each link is what was admitted, refused or not IP, to the packet and to the byte.",
        ),
        _table(
            "balance",
            None,
            ("Equation", "Left", "Right", "Result"),
            (_equation(each) for each in data.equations),
            css_of={3: "mid"},
        ),
        element("p", data.equations_more) if data.equations_more else None,
    )


def _equation(each: Equation) -> tuple[Child, ...]:
    total = _total(amount for _, amount in each.right)
    name, left = each.left
    difference = Amount(left.packets - total.packets, left.bytes - total.bytes)
    apart = f"{difference.packets:+,} packets, {difference.bytes:+,} bytes"
    if each.holds:
        result = element("strong", "✓ holds")
    elif each.holds is None:
        result = joined(
            element("strong", "≈ holds"), element("small", f"{apart}: packets flowed while it was read")
        )
    else:
        result = element("strong", f"✗ does not hold: {apart}", class_="bad")
    return (
        each.what,
        _term(name, left),
        joined(*(element("div", _term(*term)) for term in each.right)),
        result,
    )


def _term(name: str, amount: Amount) -> Html:
    return joined(
        name, ": ", element("b", f"{counted(amount.bytes)} B"), f" in {counted(amount.packets)} packets"
    )


# ---- losses


def _losses(data: PageData) -> Html:
    if data.lost is None:
        word = "Whether records were lost is not known."
    elif data.lost:
        told = "The counters above are the kernel's and include what they would have told."
        word = f"{counted(data.lost)} records were lost. {told}"
    else:
        word = "No record was lost."
    rows = [(_time(row.time), row.what, row.detail) for row in data.happenings]
    return joined(
        element("p", word),
        element("div", element("p", "What no counter says:"), _items(data.gaps), class_="box note")
        if data.gaps
        else None,
        _table(
            "losses", None, ("When", "What", "Details"), rows, empty="No restart and no alarm in this window."
        ),
    )


# ---- what is proved


def _proved(data: PageData) -> Html:
    if not data.verified:
        return element(
            "div", element("p", "Nothing is proved, since the proof does not verify."), class_="box bad"
        )
    return joined(
        element("h3", "Proved"),
        _items(data.proved) if data.proved else element("p", "The verifier named nothing."),
        element("h3", "Not proved"),
        _items(data.not_proved) if data.not_proved else None,
    )


def _checks(data: PageData) -> Html:
    rows = [
        (_result(row), row.name, f"{row.detail} (at {row.place})" if row.place else row.detail)
        for row in data.checks
    ]
    return _table(
        "checks", None, ("Result", "Check", "Details"), rows, empty="The verifier listed no checks.", head=1
    )


def _result(check: Check) -> Html:
    if not check.held:
        return element("strong", "✗ failed", class_="bad")
    return element("strong", "! held, with a limit" if check.remark else "✓ held")


def _evidence(data: PageData) -> Html:
    return joined(
        _facts(data.evidence),
        element("h3", "Versions") if data.versions else None,
        _facts(data.versions) if data.versions else None,
    )


def _yourself(data: PageData) -> Html:
    return joined(
        element(
            "p",
            "This page is a rendering, and anybody can write one. What counts is the proof file it was made"
            " from. Have it checked by a program that you trust, with a key that you got from somewhere else"
            " than this page:",
        ),
        element("pre", "egressctl verify FILE.proof --key KEY --policy POLICY.yaml"),
        element(
            "ol",
            element(
                "li", "Compare the key's fingerprint above with the one the operator gave you by another way."
            ),
            element("li", "Compare the policy's digest with that of the policy you were promised."),
            element("li", "Keep the checkpoint. A later proof of this journal must be consistent with it."),
        ),
        element(
            "p",
            "The file is a DSSE envelope around an in-toto Statement, checkpoints are C2SP signed notes, the"
            " log is hashed as in RFC 6962. Tools of others read all three.",
        ),
    )


# ---- pieces


def _items(texts: Iterable[str]) -> Html:
    return element("ul", (element("li", text) for text in texts))


def _table(
    css: str,
    caption: str | None,
    heads: Sequence[str],
    rows: Iterable[Sequence[Child]],
    *,
    css_of: Mapping[int, str] = MappingProxyType({}),
    total: Sequence[Child] | None = None,
    empty: str = "",
    head: int = 0,
) -> Html:
    """`head`: which column names the row. `css_of`: classes of columns, n: numbers, w: a word or two,
    mid: not too narrow. On a narrow page each row becomes a card, its cells with their
    heading before them (`data-label`)."""
    listed = list(rows)
    if not listed:
        return element("p", empty)
    classes = [css_of.get(index) for index in range(len(heads))]
    body = [_row(row, heads, classes, head) for row in listed]
    titles = (element("th", name, scope="col", class_=c) for name, c in zip(heads, classes, strict=True))
    return element(
        "table",
        element("caption", caption) if caption else None,
        element("thead", element("tr", titles)),
        element("tbody", body),
        element("tfoot", _row(total, heads, classes, head)) if total else None,
        class_=f"cards {css}{' wide' if len(heads) > _WIDE else ''}",
    )


def _row(cells: Sequence[Child], heads: Sequence[str], classes: Sequence[str | None], head: int) -> Html:
    made = []
    for index, (cell, name, css) in enumerate(zip(cells, heads, classes, strict=True)):
        if index == head:
            made.append(element("th", cell, scope="row"))
        else:
            made.append(element("td", cell, class_=css, data_label=name))
    return element("tr", made)


def _seconds(time: str) -> float | None:
    """Unix time of a record's time; None for what is not one, and for what is before 1970."""
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return None
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return seconds if 0 <= seconds <= _LAST_SECOND else None


def _time(time: str) -> Html:
    """To the second; the exact one in the markup. What is no time is shown as it is."""
    seconds = _seconds(time)
    if seconds is None:
        return joined(time)
    moment = datetime.fromtimestamp(seconds, UTC)
    return element("time", moment.strftime("%Y-%m-%d %H:%M:%S"), datetime=moment.isoformat())


def _span(first: str, last: str) -> Html | None:
    if not first and not last:
        return None
    if first == last:
        return _time(first)
    return joined(_time(first), element("br"), _time(last))
