"""A record as a line for people: when, which sandbox, which workspace, the verdict, and what it was.

Events are an open set: one that this version does not know is shown with all its fields. Everything that
comes out of a record is escaped; a record's texts are often what a sandbox chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from egressd.cli.text import Paint, amount, duration, escape, octets, shorten
from egressd.journal.lines import Line
from egressd.journal.records import Fields, Scalar
from egressd.model.verdicts import Reason

__all__ = ["ALARM", "VERDICTS", "line", "sandbox", "told", "verdict"]

Teller: TypeAlias = Callable[[Fields], str]

ALARM: Final = "ALARM"
_LONGEST = 400  # characters of one field: a policy's change may be pages, and --json has all of it

# verdict -> the events that are one
VERDICTS: Final[dict[str, frozenset[str]]] = {
    "denied": frozenset({"denied", "dns-denied", "relay-denied", "attempt"}),
    "refused": frozenset(
        {
            "flow-refused",
            "dns-refused-address",
            "spawn-refused",
            "policy-refused",
            "residency-refused",
            "route-refused",
            "request-refused",
            "testimony-refused",
        }
    ),
    "observed": frozenset({"observed", "dns-would-deny"}),
    "allowed": frozenset({"flow", "flow-closed", "relay-closed"}),
    "granted": frozenset({"name-granted", "request-decided"}),
}
_VERDICT_OF: Final = {event: verdict for verdict, events in VERDICTS.items() for event in events}
_ALARMS: Final = frozenset(
    {
        "tampered", "host-mended", "drift", "books-unbalanced", "books-restarted", "lost", "log-ended",
        "journal-torn", "journal-damaged", "journal-truncated", "clock-stepped", "peer-broken",
        "sandbox-lost", "process-hung", "process-killed", "registry-broken", "flows-not-cut",
        "leftovers-removed", "lease-refused",
    }
)  # fmt: skip


def verdict(record: Line) -> str:
    """One of `VERDICTS`, `ALARM`, or "-" for what is neither."""
    return _VERDICT_OF.get(record.event) or (ALARM if record.event in _ALARMS else "-")


def line(record: Line, *, paint: Paint) -> str:
    """`2026-11-21 11:47:36.580Z  eg2    acme  denied    11.22.33.66:80/tcp: no rule ... [unlisted]`"""
    fields = record.fields
    columns = [
        f"{record.time[:10]} {record.time[11:23]}Z",
        escape(sandbox(fields)).ljust(6),
        escape(str(fields.get("workspace") or "-")).ljust(12),
        _coloured(verdict(record), paint),
        told(record),
    ]
    return "  ".join(columns)


def sandbox(fields: Fields) -> str:
    """The device's name, also of records that have its number."""
    link = fields.get("link")
    return f"eg{link}" if isinstance(link, int) else str(link or "-")


def told(record: Line) -> str:
    """What it was: where to, why, how much."""
    teller = _TELLERS.get(record.event)
    return _other(record) if teller is None else teller(record.fields)


def _coloured(verdict: str, paint: Paint) -> str:
    padded = verdict.ljust(8)
    if verdict in ("denied", "refused", ALARM):
        return paint.bad(padded)
    if verdict in ("allowed", "granted"):
        return paint.good(padded)
    return paint.strong(padded) if verdict == "observed" else padded


def _other(record: Line) -> str:
    """`process-started: name=warden pid=812 restarts=0`"""
    return f"{record.event}: {_named(record.fields)}".rstrip(": ")


def _named(fields: Fields, *, without: tuple[str, ...] = ("link", "workspace")) -> str:
    return " ".join(f"{key}={_shown(value)}" for key, value in sorted(fields.items()) if key not in without)


def _shown(value: Scalar) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return shorten(escape(str(value)), _LONGEST)


# ---- pieces


def _get(fields: Fields, key: str) -> str:
    """A field as text, escaped; empty if it is not there."""
    value = fields.get(key)
    return "" if value is None else _shown(value)


def _number(fields: Fields, key: str) -> int | float:
    value = fields.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _where(fields: Fields, *, name: str = "host", address: str = "destination") -> str:
    """`eu.api.openai.com:443/tcp`, `[2001:db8::1]:443/tcp`, `icmp to 192.0.2.1`."""
    place = _get(fields, name) or _get(fields, address) or "an unknown destination"
    protocol = _get(fields, "protocol")
    if fields.get("port") is None:
        return f"{protocol} to {place}" if protocol else place
    shown = f"[{place}]" if ":" in place else place
    return f"{shown}:{_get(fields, 'port')}" + (f"/{protocol}" if protocol else "")


def _why(fields: Fields) -> str:
    """The reason in words and, in brackets, as it is spelled; a word that is no reason stands as it is."""
    word = _get(fields, "reason")
    known = Reason.of(str(fields.get("reason")))
    if known is Reason.UNKNOWN:
        return word or "no reason is recorded"
    return f"{known.text} [{word}]"


def _count(fields: Fields, key: str, what: str) -> str:
    """`1 flow`, `3 flows`."""
    count = int(_number(fields, key))
    return f"{count} {what}{'' if count == 1 else 's'}"


def _many(fields: Fields, key: str, what: str) -> str:
    """`3 packets`; nothing where it was one, or is not known."""
    return _count(fields, key, what) if _number(fields, key) > 1 else ""


def _seconds(fields: Fields) -> str:
    value = float(_number(fields, "seconds"))
    return f"{value:.3g} s" if value < 60 else duration(value)


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _octets(fields: Fields, key: str) -> str:
    return amount(int(_number(fields, key)))


# ---- one for each event


def _packet(fields: Fields) -> str:
    count = _many(fields, "packets", "packet")
    during = f" in {_seconds(fields)}" if count and fields.get("seconds") is not None else ""
    return _join(f"{_where(fields)}: {_why(fields)}", count + during)


def _question(fields: Fields) -> str:
    asked = f"name {_get(fields, 'name') or '-'} ({_get(fields, 'type') or '?'})"
    return _join(f"{asked}: {_why(fields)}", _many(fields, "count", "question"))


def _refused_address(fields: Fields) -> str:
    address, kind = _get(fields, "address"), _get(fields, "kind")
    return f"name {_get(fields, 'name')} leads to {address}, which is not used: {kind}"


def _steered(fields: Fields) -> str:
    """A connection that inspector or relay did not carry."""
    asked = _get(fields, "asked")
    return _join(
        f"{_where(fields)}: {_why(fields)}",
        f"asked for {asked}" if asked else "",
        _many(fields, "connections", "connection"),
    )


def _failed(fields: Fields) -> str:
    return f"connection failed: {_steered(fields)}"


def _attempt(fields: Fields) -> str:
    who = " ".join(filter(None, (_get(fields, "executable"), f"pid {_get(fields, 'pid') or '?'}")))
    command = _get(fields, "command")
    return f"{_where(fields)}: tried by {who}, as its broker says" + (f"; {command}" if command else "")


def _flow(fields: Fields) -> str:
    address, host = _get(fields, "address"), _get(fields, "host")
    leads = f" ({address})" if address and address != host else ""
    kind = {"read": "as far as the inspector; ", "dialled": "dialled by the inspector; "}
    return (
        f"{_where(fields)}{leads}: {kind.get(_get(fields, 'kind'), '')}"
        f"out {_octets(fields, 'out_bytes')}, in {_octets(fields, 'in_bytes')}, {_seconds(fields)}"
    )


def _carried(fields: Fields) -> str:
    """What the inspector or the relay carried; their bytes are those of the payload."""
    name = "host" if fields.get("host") is not None else "service"
    many = _many(fields, "connections", "connection")
    return (
        f"{_where(fields, name=name)}: {many and f'{many}, '}payload out {_octets(fields, 'bytes_out')},"
        f" in {_octets(fields, 'bytes_in')}, {_seconds(fields)}" + (f"; {_get(fields, 'how')}")
    ).rstrip("; ")


def _link_flows(fields: Fields) -> str:
    rest = int(_number(fields, "unrecorded_packets"))
    return _join(
        f"of this sandbox are recorded: {_count(fields, 'flows', 'flow')},"
        f" {_count(fields, 'questions', 'question')} to the resolver",
        f"out {_octets(fields, 'out_bytes')}, in {_octets(fields, 'in_bytes')}",
        f"{rest} admitted packets belong to no recorded flow" if rest else "",
    )


def _resolved(fields: Fields) -> str:
    return f"name {_get(fields, 'name')} leads to {_get(fields, 'addresses')}"


def _unresolved(fields: Fields) -> str:
    return f"name {_get(fields, 'name')} could not be looked up: {_get(fields, 'reason')}"


def _started(fields: Fields) -> str:
    again = int(_number(fields, "restarts"))
    return f"process {_get(fields, 'name')} starts, pid {_get(fields, 'pid')}" + (
        f", for the {again + 1}. time" if again else ""
    )


def _ended(fields: Fields) -> str:
    pid, status = _get(fields, "pid"), _get(fields, "status")
    return f"process {_get(fields, 'name')} has ended, pid {pid}, status {status}"


def _opening(fields: Fields) -> str:
    return f"sandbox opens for uid {_get(fields, 'uid')}: {_get(fields, 'command') or 'a command not named'}"


def _closed(fields: Fields) -> str:
    ended = _get(fields, "why") or (f"exit {_get(fields, 'exit')}" if fields.get("exit") is not None else "")
    return _join(
        f"sandbox is closed after {_seconds(fields)}",
        ended,
        f"in {_octets(fields, 'in_bytes')} = admitted {_octets(fields, 'ok_bytes')}"
        f" + denied {_octets(fields, 'denied_bytes')} + other {_octets(fields, 'other_bytes')}",
    )


def _sandbox_lost(fields: Fields) -> str:
    why = _get(fields, "why")
    return _closed(fields) if why else "the end of a sandbox was found, not seen"


def _resumed(fields: Fields) -> str:
    return (
        f"sandbox is resumed by uid {_get(fields, 'uid')}, pid {_get(fields, 'pid')},"
        f" {_seconds(fields)} after egressd was started"
    )


def _lease_refused(fields: Fields) -> str:
    return f"a lease on disk, of link {_get(fields, 'link')}, is refused: {_get(fields, 'text')}"


def _spawn(fields: Fields) -> str:
    why = f"no sandbox for uid {_get(fields, 'uid')}: {_get(fields, 'text')} [{_get(fields, 'reason')}]"
    return _join(why, _many(fields, "count", "time"))


def _granted(fields: Fields) -> str:
    return (
        f"name {_get(fields, 'name')} under {_get(fields, 'wildcard')}, ports {_get(fields, 'ports')};"
        f" leads to {_get(fields, 'addresses') or 'nowhere yet'}"
    )


def _released(fields: Fields) -> str:
    return f"name {_get(fields, 'name')} is given back after {_seconds(fields)}: {_get(fields, 'text')}"


def _policy(fields: Fields) -> str:
    wider = " (gives more)" if fields.get("widens") else ""
    asked = f" ({_get(fields, 'why')})" if _get(fields, "why") else ""
    return f"policy changed by {_get(fields, 'by')}{asked}: {_get(fields, 'change')}{wider}"


def _placed(fields: Fields) -> str:
    """An address of a name, judged: where it lies, by which table."""
    table, digest = _get(fields, "table"), _get(fields, "table_digest")
    return _join(
        f"name {_get(fields, 'host')}: {_get(fields, 'text')} [{_get(fields, 'code')}]",
        f"declared {_get(fields, 'declared')}" if _get(fields, "declared") else "",
        f"by table {table}, {digest[:19]}" if table else "",
    )


def _route(fields: Fields) -> str:
    asked = f"route {_get(fields, 'route')}, asked by {_get(fields, 'by')}"
    if not _get(fields, "provider"):
        return f"{asked}: none; {_get(fields, 'text')} [{_get(fields, 'code')}]"
    where = _get(fields, "addresses") or "nowhere yet"
    return f"{asked}: {_get(fields, 'provider')}, {_get(fields, 'host')} at {where} [{_get(fields, 'code')}]"


def _cut(fields: Fields) -> str:
    where = f"{_get(fields, 'address')} of {_get(fields, 'host')}"
    return f"open connections to {where} were ended: {_get(fields, 'text')} [{_get(fields, 'code')}]"


def _registry(fields: Fields) -> str:
    tables = _get(fields, "tables") or "none"
    own = _get(fields, "catalogue")
    return (
        f"catalogue and prefixes changed by {_get(fields, 'by')}: {_get(fields, 'registry')}; tables {tables}"
        + (f"; catalogue files of this machine {own}" if own else "")
    )


def _policy_refused(fields: Fields) -> str:
    return f"policy refused: {_get(fields, 'problem')}"


def _lost(fields: Fields) -> str:
    return f"{_get(fields, 'count')} records of {_get(fields, 'from')} were lost: {_get(fields, 'cause')}"


def _counted(fields: Fields) -> str:
    if fields.get("host") is None:
        octets = _octets(fields, "denied_bytes")
        count = _count(fields, "denied_packets", "packet")
        return f"counted until now: denied [{_get(fields, 'reason')}] {count}, {octets} bytes"
    return (
        f"counted until now: {_get(fields, 'host')} out {_octets(fields, 'out_bytes')},"
        f" in {_octets(fields, 'in_bytes')}, {_count(fields, 'connections', 'connection')}"
    )


def _snapshot(fields: Fields) -> str:
    books = "the books balance" if fields.get("balanced") else "THE BOOKS DO NOT BALANCE"
    return (
        f"all counters recorded: in {_octets(fields, 'in_bytes')} = admitted {_octets(fields, 'ok_bytes')}"
        f" + denied {_octets(fields, 'denied_bytes')} + other {_octets(fields, 'other_bytes')}; {books}"
    )


def _journal_opened(fields: Fields) -> str:
    return f"journal opened: {_get(fields, 'file')}, from record {_get(fields, 'next')} on"


def _key_created(fields: Fields) -> str:
    return f"signing key made: {_get(fields, 'fingerprint')}"


def _key_rotated(fields: Fields) -> str:
    return f"signing key changed: from now on {_get(fields, 'new')}, before it {_get(fields, 'old')}"


def _proof(fields: Fields) -> str:
    since, until = _get(fields, "since"), _get(fields, "until")
    window = f"from {since or 'the beginning'} to {until or 'now'}"
    had = f"the journal had {_get(fields, 'size')} records"
    return _join(f"proof handed out: {_get(fields, 'digest')}", window, had)


# ---- requests, as brokers tell of them


def _asked(fields: Fields) -> str:
    """`request r-... of user:okta:00u1 (ann@acme.test), clearance internal; 346 candidates not shown`"""
    email, clearance = _get(fields, "email"), _get(fields, "clearance")
    return _join(
        f"request {_get(fields, 'request')} of {_get(fields, 'asker')}"
        + (f" ({email})" if email else "")
        + (f", clearance {clearance}" if clearance else ""),
        f"{_count(fields, 'discarded', 'candidate')} not shown" if "discarded" in fields else "",
    )


def _decided(fields: Fields) -> str:
    network = ", without a network" if fields.get("network") == "none" else ""
    return (
        f"request {_get(fields, 'request')} ({_get(fields, 'role')}, {_get(fields, 'action')}){network}:"
        f" {_count(fields, 'cleared', 'document')} cleared, {octets(int(_number(fields, 'octets')))},"
        f" manifest {_get(fields, 'manifest')}"
    )


def _files(fields: Fields) -> str:
    listed = str(fields.get("files") or "").split("\n")
    part = f"part {_get(fields, 'part')} of {_get(fields, 'parts')}" if "part" in fields else "its documents"
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"request {_get(fields, 'request')}, {part}: {_shown(listed[0]) or 'none'}{more}"


def _request_refused(fields: Fields) -> str:
    what = f" ({_get(fields, 'action')})" if _get(fields, "action") else ""
    whose = _get(fields, "asker") or "somebody not known"
    code = f" [{_get(fields, 'code')}]" if _get(fields, "code") else ""
    return f"request {_get(fields, 'request')} of {whose}{what}: {_get(fields, 'text')}{code}"


def _selftest(fields: Fields) -> str:
    came = ", ".join(f"{_get(fields, name)} {name}" for name in ("refused", "escaped", "unclear"))
    left = f"{_get(fields, 'not_tried')} not tried"
    return f"self-test, as its caller says: {_get(fields, 'tried')} ways out tried, {came}; {left}"


def _request_ended(fields: Fields) -> str:
    spent = [f"{_get(fields, name)} {name}" for name in ("tokens", "cost") if _number(fields, name)]
    hit = _get(fields, "hit")
    gone = fields.get("destroyed") is True
    return _join(
        f"request {_get(fields, 'request')} has ended, status {_get(fields, 'status')}",
        _get(fields, "why"),
        f"reached its limit of {hit.replace(',', ' ').replace(' ', ', ')}" if hit else "",
        _seconds(fields) if "seconds" in fields else "",
        *spent,
        "its copies are destroyed" if gone else "ITS COPIES WERE NOT SEEN TO BE DESTROYED",
    )


def _access(fields: Fields) -> str:
    rest = _named(fields, without=("link", "workspace", "what", "by", "boot", "broker_uid"))
    return _join(f"access changed by {_get(fields, 'by')}: {_get(fields, 'what')}", rest)


def _ingested(fields: Fields) -> str:
    counts = [f"{_get(fields, name)} {name}" for name in _INGESTED if name in fields]
    by = f" by {_get(fields, 'by')}" if _get(fields, "by") else ""
    trust = {name: value for name, value in fields.items() if name.removesuffix("_before") in _TRUST}
    ingested = f"source {_get(fields, 'source')} ingested{by}: {', '.join(counts)}"
    return _join(ingested, _get(fields, "digest"), _named(trust))


_INGESTED: Final = ("added", "changed", "removed", "unreadable")
_TRUST: Final = ("front_matter", "read", "deny", "groups", "clearance")  # where the ingest has set it


def _leftovers(fields: Fields) -> str:
    where = f" in {_get(fields, 'where')}" if _get(fields, "where") else ""
    return f"copies of {_count(fields, 'count', 'request')} were left{where}, and are removed"


def _testimony(fields: Fields) -> str:
    why = f"{_get(fields, 'text')} [{_get(fields, 'reason')}]"
    told = f"uid {_get(fields, 'uid')} may not put {_get(fields, 'told')} on record: {why}"
    return _join(told, _many(fields, "count", "time"))


_TELLERS: Final[Mapping[str, Teller]] = {
    "denied": _packet,
    "observed": _packet,
    "attempt": _attempt,
    "dns-denied": _question,
    "dns-would-deny": _question,
    "dns-refused-address": _refused_address,
    "dns-resolved": _resolved,
    "dns-upstream-failed": _unresolved,
    "process-started": _started,
    "process-ended": _ended,
    "relay-denied": _steered,
    "relay-failed": _failed,
    "flow-refused": _steered,
    "flow-failed": _failed,
    "flow": _flow,
    "flow-closed": _carried,
    "relay-closed": _carried,
    "link-flows": _link_flows,
    "sandbox-opening": _opening,
    "sandbox-closed": _closed,
    "sandbox-lost": _sandbox_lost,
    "sandbox-resumed": _resumed,
    "lease-refused": _lease_refused,
    "spawn-refused": _spawn,
    "name-granted": _granted,
    "name-released": _released,
    "policy-changed": _policy,
    "residency-admitted": _placed,
    "residency-refused": _placed,
    "route-selected": _route,
    "route-refused": _route,
    "flows-cut": _cut,
    "registry-changed": _registry,
    "policy-refused": _policy_refused,
    "lost": _lost,
    "journal-opened": _journal_opened,
    "key-created": _key_created,
    "key-rotated": _key_rotated,
    "proof-issued": _proof,
    "counted": _counted,
    "snapshot": _snapshot,
    "request-asked": _asked,
    "request-decided": _decided,
    "request-files": _files,
    "request-refused": _request_refused,
    "request-ended": _request_ended,
    "selftest": _selftest,
    "access-changed": _access,
    "documents-ingested": _ingested,
    "leftovers-removed": _leftovers,
    "testimony-refused": _testimony,
}
