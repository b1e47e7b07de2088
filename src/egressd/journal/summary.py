"""The numbers a person reads, computed from records alone: for who makes a proof, checks one or prints one.

Exact are the kernel's counters: what each host was sent and sent back (`hosts`), what was refused by reason
(`denied`), what each sandbox's link saw (`sandboxes`). From events, which can be lost and whose loss is then
recorded (`losses`), come destinations, flows and times (`attempts`, `flows`). Nothing else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from msgspec import Struct

from egressd.journal import testimony
from egressd.journal.lines import Line
from egressd.journal.snapshots import (
    Counts,
    DeniedCount,
    Epoch,
    Equation,
    HostCount,
    LinkTotals,
    Snapshots,
    number,
    pair,
)

__all__ = [
    "LATE", "MAX_ATTEMPTS", "MAX_FLOWS", "SAYERS", "Attempt", "Claim", "Counts", "DeniedCount", "Epoch",
    "Equation", "Flow", "FlowBooks", "Grant", "HostCount", "HostTotal", "LinkTotals", "Loss", "Place",
    "PolicyChange", "Restart", "RouteChoice", "Sandbox", "Summary", "device", "speaks_for_itself",
    "summarise",
]  # fmt: skip

# Rows that are listed one by one; of the rest there is the number, and the sum.
MAX_ATTEMPTS: Final = 2000
MAX_FLOWS: Final = 5000
MAX_CLAIMS: Final = 2000

Fields: TypeAlias = dict[str, str | int | float | bool | None]

# event -> who refused, or would have
_ATTEMPTS: Final = {
    "denied": ("denied", "kernel"),
    "observed": ("observed", "kernel"),
    "dns-denied": ("denied", "resolver"),
    "dns-would-deny": ("observed", "resolver"),
    "dns-refused-address": ("denied", "resolver"),
    "flow-refused": ("denied", "inspector"),
    "relay-denied": ("denied", "relay"),
}


# event -> the one process that can say so: what evidence is made of. Those that read strangers' bytes have
# other words (auditor.py), so a record of another process was not written by an auditor as it should be.
SAYERS: Final = {
    **dict.fromkeys(
        (
            "attempt", "counted", "flows-cut", "name-granted", "name-released", "policy-changed",
            "registry-changed", "residency-admitted", "residency-refused", "route-refused", "route-selected",
            "sandbox-closed", "sandbox-lost", "sandbox-opening", "sandbox-resumed", "snapshot",
            *testimony.PRIVATE,
            *testimony.BY_HOLDERS,
        ),
        "controller",
    ),
    **dict.fromkeys(
        ("denied", "flow", "key-created", "key-rotated", "link-flows", "lost", "observed"), "auditor"
    ),
}  # fmt: skip


# Of sandboxes whose gateway began anew while there was no controller, the supervisor tells.
_ALSO: Final = frozenset({("sandbox-lost", "supervisor")})


def speaks_for_itself(line: Line) -> bool:
    """Whether a record is of the process that may say it."""
    said = (line.event, line.process)
    return said in _ALSO or SAYERS.get(*said) == line.process


# Reasons for which the kernel refuses what the guard has admitted (ruleset.build.LATE). The guard's counters
# of denials do not have them; where the link tells whose they are, they are recorded as denied.
LATE: Final = frozenset(
    {
        "budget-connections", "connections", "cut", "dial", "inspector", "invalid", "misrouted", "pace",
        "reply", "unmarked", "unresolved",
    }
)  # fmt: skip


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class HostTotal(_Part, frozen=True):
    """Of all epochs together. `start` and `end` are in `epochs`, since two epochs have two of each."""

    host: str
    kind: str
    wildcard: str
    addresses: tuple[str, ...]
    counted: Counts


class Attempt(_Part, frozen=True):
    """Equal attempts together. `verdict`: "denied", or "observed" where an observing guard let it go. `times`
    counts what was logged (packets, questions, connections), a lower bound; exact totals are in `denied`."""

    verdict: str
    by: str  # kernel, resolver, inspector, relay
    reason: str
    protocol: str
    destination: str  # an address or a name
    port: int | None
    times: int
    records: int
    first: str
    last: str
    links: tuple[str, ...]


class Claim(_Part, frozen=True):
    """What a sandbox's broker said of the process that tried. Not verified by anybody."""

    link: str
    protocol: str
    destination: str
    port: int | None
    executable: str
    command: str
    times: int
    first: str
    last: str


class Flow(_Part, frozen=True):
    """Ended connections of one host and real address together. `kind` "read": the sandbox's half of what the
    inspector carries, "dialled": the other half."""

    host: str
    kind: str
    protocol: str
    address: str
    port: int | None
    flows: int
    out_packets: int
    out_bytes: int
    in_packets: int
    in_bytes: int
    longest: float  # seconds
    first: str
    last: str


class Sandbox(_Part, frozen=True):
    """`opened` or `closed` is None where that is not in the window. What egressd knows: link, uid, pid, times
    and totals. What the broker said: command, digest, exit, resources. `recorded`: flows of the link that are
    in the proof, packets and bytes out; `flow_books`: what they came to when the link ended."""

    link: str
    opened: str | None
    closed: str | None
    lost: bool  # its end was found, not seen: the daemon had been away
    uid: int | None
    pid: int | None
    command: str
    command_digest: str
    policy: str
    guard: str
    seconds: float | None
    exit: int | None
    why: str
    user_seconds: float | None
    system_seconds: float | None
    max_rss: int | None
    totals: LinkTotals | None
    balanced: bool | None
    recorded: tuple[int, int, int]
    flow_books: FlowBooks | None


class FlowBooks(_Part, frozen=True):
    """What connection tracking said of a link in all, against the guard's `ok` counter, which is exact.
    `out` and `in` hold the questions to the resolver, which are not recorded one by one. `unrecorded` is
    ok - out: packets of no connection. `partial`: part of it was not seen."""

    flows: int
    out_packets: int
    out_bytes: int
    in_packets: int
    in_bytes: int
    questions: int
    question_packets: int
    question_bytes: int
    answer_packets: int
    answer_bytes: int
    ok_packets: int
    ok_bytes: int
    unrecorded_packets: int
    unrecorded_bytes: int
    partial: bool


class Grant(_Part, frozen=True):
    """A name that a wildcard covers: granted to a link, which asked for it, or taken back."""

    time: str
    granted: bool
    name: str
    wildcard: str
    link: str
    addresses: str


class PolicyChange(_Part, frozen=True):
    time: str
    change: str
    widens: bool
    by: str
    policy: str
    policy_before: str


class Place(_Part, frozen=True):
    """Where an address of a host was found to be, and whether the workspace's residency let it be reached.
    Equal findings together. `table`: the published prefixes it rests on, `registry` all there were."""

    host: str
    address: str
    admitted: bool
    code: str
    text: str
    declared: str
    provider: str
    region: str
    prefix: str
    table: str
    table_digest: str
    registry: str
    times: int
    first: str
    last: str


class RouteChoice(_Part, frozen=True):
    """Which provider was named for a route, to whom; `provider` is "" where none complied."""

    route: str
    provider: str
    host: str
    region: str
    jurisdiction: str
    text: str
    by: str
    times: int
    first: str
    last: str


class Loss(_Part, frozen=True):
    """Records that were lost: of this machine, so perhaps of this workspace."""

    cause: str
    process: str
    count: int
    first: str
    last: str


class Restart(_Part, frozen=True):
    process: str
    started: int
    ended: int
    first: str
    last: str


class Summary(_Part, frozen=True):
    records: int
    first: str | None  # time of the first record of the window
    last: str | None
    epochs: tuple[Epoch, ...]
    hosts: tuple[HostTotal, ...]
    denied: tuple[DeniedCount, ...]
    totals: LinkTotals
    gaps: tuple[str, ...]  # what no snapshot says, in words
    attempts: tuple[Attempt, ...]
    attempts_more: tuple[int, int]  # rows that are not listed, and their `times`
    claims: tuple[Claim, ...]
    claims_more: int
    flows: tuple[Flow, ...]
    flows_more: tuple[int, int]  # rows that are not listed, and their flows
    sandboxes: tuple[Sandbox, ...]
    grants: tuple[Grant, ...]
    policy_changes: tuple[PolicyChange, ...]
    places: tuple[Place, ...]
    routes: tuple[RouteChoice, ...]
    losses: tuple[Loss, ...]
    restarts: tuple[Restart, ...]
    equations: int  # how many were checked
    unequal: tuple[Equation, ...]
    events: dict[str, int]  # records by event, all of them


def summarise(lines: Iterable[Line], *, base: int, from_beginning: bool) -> Summary:
    """`lines` in the journal's order, the first `base` of which come before the window and carry the counters
    it begins with. `from_beginning`: the window begins where the journal does."""
    reading, place = _Reading(from_beginning=from_beginning), 0
    for line in lines:
        if place == base:
            reading.begin()
        reading.add(line, in_window=place >= base)
        place += 1
    if place == base:
        reading.begin()  # nothing is in the window, and nothing was counted in it
    return reading.summary()


class _Reading:
    def __init__(self, *, from_beginning: bool) -> None:
        self._snapshots = Snapshots(from_beginning=from_beginning)
        self._records = 0
        self._first: str | None = None
        self._last: str | None = None
        self._events: dict[str, int] = {}
        self._attempts: dict[tuple[Any, ...], list[Any]] = {}
        self._claims: dict[tuple[Any, ...], list[Any]] = {}
        self._flows: dict[tuple[Any, ...], list[Any]] = {}
        self._by_link: dict[str, list[int]] = {}  # flows, packets, bytes out
        self._sandboxes: dict[str, dict[str, Any]] = {}
        self._grants: list[Grant] = []
        self._changes: list[PolicyChange] = []
        self._places: dict[tuple[Any, ...], list[Any]] = {}
        self._routes: dict[tuple[Any, ...], list[Any]] = {}
        self._losses: dict[tuple[str, str], list[Any]] = {}
        self._restarts: dict[str, list[Any]] = {}
        self._unequal: list[Equation] = []
        self._equations = 0
        attempts = dict.fromkeys(_ATTEMPTS, self._attempt)
        self._handlers: dict[str, Callable[[Line, Fields], None]] = {
            **attempts,
            "counted": lambda line, fields: self._snapshots.row(fields),
            "snapshot": lambda line, fields: self._snapshots.close(fields, line.time),
            "attempt": self._claim,
            "flow": self._flow,
            "link-flows": self._link_flows,
            "sandbox-opening": self._opening,
            "sandbox-closed": self._closed,
            "sandbox-lost": self._closed,
            "name-granted": self._granted,
            "name-released": self._granted,
            "policy-changed": self._changed,
            "residency-admitted": self._placed,
            "residency-refused": self._placed,
            "route-selected": self._routed,
            "route-refused": self._routed,
            "lost": self._lost,
            "process-started": self._restarted,
            "process-ended": self._restarted,
        }

    def begin(self) -> None:
        self._snapshots.begin()

    def add(self, line: Line, *, in_window: bool) -> None:
        event, believed = line.event, speaks_for_itself(line)
        if not in_window:
            if believed and event == "counted":
                self._snapshots.row(line.fields)
            elif believed and event == "snapshot":
                self._snapshots.close(line.fields, line.time)
            elif believed and event == "residency-admitted":
                self._placed(line, line.fields)
            return
        self._records += 1
        if self._first is None:
            self._first = line.time
        self._last = line.time
        self._events[event] = self._events.get(event, 0) + 1
        handler = self._handlers.get(event)
        if handler is not None and believed:
            handler(line, line.fields)

    # ---- one record each

    def _attempt(self, line: Line, fields: Fields) -> None:
        get = fields.get
        key = (
            line.event, get("reason"), get("protocol"), get("destination"), get("port"), get("name"),
            get("type"), get("host"),
        )  # fmt: skip
        found = self._attempts.get(key)
        times = get("packets") or get("connections") or get("count") or 1
        if type(times) is not int:
            times = 1
        if found is None:
            self._attempts[key] = [times, 1, line.time, line.time, {get("link")}]
            return
        found[0] += times
        found[1] += 1
        found[2] = min(found[2], line.time)
        found[3] = max(found[3], line.time)
        found[4].add(get("link"))

    def _claim(self, line: Line, fields: Fields) -> None:
        key = (
            device(fields), _text(fields, "protocol"), _text(fields, "destination"), _port(fields),
            _text(fields, "executable"), _text(fields, "command"),
        )  # fmt: skip
        found = self._claims.setdefault(key, [0, line.time, line.time])
        found[0] += 1
        found[2] = max(found[2], line.time)

    def _flow(self, line: Line, fields: Fields) -> None:
        get = fields.get
        key = (get("host"), get("kind"), get("protocol"), get("address"), get("port"))
        found = self._flows.get(key)
        if found is None:
            found = self._flows[key] = [0, 0, 0, 0, 0, 0.0, line.time, line.time]
        packets, octets = number(fields, "out_packets"), number(fields, "out_bytes")
        flows = number(fields, "flows") or 1
        found[0] += flows
        found[1] += packets
        found[2] += octets
        found[3] += number(fields, "in_packets")
        found[4] += number(fields, "in_bytes")
        found[5] = max(found[5], _seconds(get("seconds")))
        found[6] = min(found[6], line.time)
        found[7] = max(found[7], line.time)
        link = get("link")
        if link is not None:
            sums = self._by_link.setdefault(str(link), [0, 0, 0])
            sums[0] += flows
            sums[1] += packets
            sums[2] += octets

    def _link_flows(self, line: Line, fields: Fields) -> None:
        counts = {name: number(fields, name) for name in FlowBooks.__struct_fields__[:-1]}
        partial = bool(fields.get("partial") or fields.get("uncounted"))
        self._sandbox(fields)["flow_books"] = FlowBooks(**counts, partial=partial)

    def _sandbox(self, fields: Fields) -> dict[str, Any]:
        return self._sandboxes.setdefault(device(fields), {})

    def _opening(self, line: Line, fields: Fields) -> None:
        self._sandbox(fields).update(_known(fields), opened=line.time)

    def _closed(self, line: Line, fields: Fields) -> None:
        sandbox = self._sandbox(fields)
        lost = line.event == "sandbox-lost"
        sandbox.update(_known(fields), closed=line.time, lost=lost)
        if "in_packets" not in fields:
            return  # the warden was gone, and so is the link's last word
        totals = LinkTotals(**{name: number(fields, name) for name in LinkTotals.__struct_fields__})
        left = pair(fields, "in")
        right = tuple(map(sum, zip(*(pair(fields, term) for term in _TERMS), strict=True)))
        sandbox.update(totals=totals, balanced=left == right)
        self._equations += 1
        if left != right:
            what = f"{device(fields)}: in = ok + denied + other"
            self._unequal.append(Equation(what, line.time, left, (right[0], right[1]), False))

    def _granted(self, line: Line, fields: Fields) -> None:
        granted = line.event == "name-granted"
        name, wildcard, addresses = (_text(fields, key) for key in ("name", "wildcard", "addresses"))
        self._grants.append(Grant(line.time, granted, name, wildcard, device(fields), addresses))

    def _changed(self, line: Line, fields: Fields) -> None:
        change, by = _text(fields, "change"), _text(fields, "by")
        after, before = _text(fields, "policy"), _text(fields, "policy_before")
        self._changes.append(PolicyChange(line.time, change, fields.get("widens") is True, by, after, before))

    def _placed(self, line: Line, fields: Fields) -> None:
        admitted = line.event == "residency-admitted"
        host, address = _text(fields, "host"), _text(fields, "address")
        key = (host, address, admitted, *(_text(fields, name) for name in _PLACED))
        _again(self._places, key, line.time, 1)

    def _routed(self, line: Line, fields: Fields) -> None:
        key = tuple(_text(fields, name) for name in _ROUTED)
        _again(self._routes, key, line.time, number(fields, "count") or 1)

    def _lost(self, line: Line, fields: Fields) -> None:
        key = _text(fields, "cause"), _text(fields, "from")
        found = self._losses.setdefault(key, [0, line.time, line.time])
        found[0] += number(fields, "count")
        found[2] = line.time

    def _restarted(self, line: Line, fields: Fields) -> None:
        found = self._restarts.setdefault(_text(fields, "name"), [0, 0, line.time, line.time])
        found[0 if line.event == "process-started" else 1] += 1
        found[3] = line.time

    # ---- all of them

    def summary(self) -> Summary:
        epochs = self._snapshots.epochs()
        attempts, attempts_more = self._attempt_rows()
        flows, flows_more = self._flow_rows()
        claims = sorted(self._claims.items(), key=lambda item: (-item[1][0], _order(item[0])))
        return Summary(
            records=self._records,
            first=self._first,
            last=self._last,
            epochs=epochs,
            hosts=_hosts(epochs),
            denied=_denied(epochs),
            totals=self._totals(epochs),
            gaps=tuple(_gaps(epochs, self._last)),
            attempts=attempts,
            attempts_more=attempts_more,
            claims=tuple(Claim(*key, *found) for key, found in claims[:MAX_CLAIMS]),
            claims_more=max(len(claims) - MAX_CLAIMS, 0),
            flows=flows,
            flows_more=flows_more,
            sandboxes=tuple(self._sandbox_rows()),
            grants=tuple(self._grants),
            policy_changes=tuple(self._changes),
            places=tuple(Place(*key, *found) for key, found in sorted(self._places.items(), key=_by_place)),
            routes=tuple(RouteChoice(*key, *found) for key, found in sorted(self._routes.items())),
            losses=tuple(Loss(*key, *found) for key, found in sorted(self._losses.items())),
            restarts=tuple(Restart(name, *found) for name, found in sorted(self._restarts.items())),
            equations=self._equations + self._snapshots.equations,
            unequal=(*self._snapshots.unequal, *self._unequal),
            events=dict(sorted(self._events.items())),
        )

    def _attempt_rows(self) -> tuple[tuple[Attempt, ...], tuple[int, int]]:
        merged: dict[tuple[Any, ...], list[Any]] = {}
        for (event, reason, protocol, destination, port, name, kind, host), found in self._attempts.items():
            verdict, by = _ATTEMPTS[event]
            where = destination if by == "kernel" else name or host or destination
            at = port if type(port) is int else None
            key = (verdict, by, _said(reason), _said(protocol or kind), _said(where), at)
            known = merged.setdefault(key, [0, 0, found[2], found[3], set()])
            known[0] += found[0]
            known[1] += found[1]
            known[2], known[3] = min(known[2], found[2]), max(known[3], found[3])
            known[4] |= found[4]
        rows = sorted(merged.items(), key=lambda item: (-item[1][0], _order(item[0])))
        rest = rows[MAX_ATTEMPTS:]
        listed = tuple(_attempt_row(key, found) for key, found in rows[:MAX_ATTEMPTS])
        return listed, (len(rest), sum(found[0] for _, found in rest))

    def _flow_rows(self) -> tuple[tuple[Flow, ...], tuple[int, int]]:
        rows = sorted(self._flows.items(), key=lambda item: (-(item[1][2] + item[1][4]), _order(item[0])))
        rest = rows[MAX_FLOWS:]
        listed = tuple(_flow_row(key, found) for key, found in rows[:MAX_FLOWS])
        return listed, (len(rest), sum(found[0] for _, found in rest))

    def _sandbox_rows(self) -> Iterable[Sandbox]:
        for link, known in sorted(self._sandboxes.items(), key=lambda item: (len(item[0]), item[0])):
            flows, packets, octets = self._by_link.get(link, (0, 0, 0))
            yield Sandbox(link=link, recorded=(flows, packets, octets), **{**_UNKNOWN, **known})

    def _totals(self, epochs: tuple[Epoch, ...]) -> LinkTotals:
        """Of the workspace by its snapshots; of a receipt, which has none, by its sandboxes."""
        parts = [epoch.counted for epoch in epochs]
        if not parts:
            parts = [s["totals"] for s in self._sandboxes.values() if s.get("totals") is not None]
        return LinkTotals(**{n: sum(getattr(p, n) for p in parts) for n in LinkTotals.__struct_fields__})


_PLACED: Final = (
    "code", "text", "declared", "provider", "region", "prefix", "table", "table_digest", "registry",
)  # fmt: skip
_ROUTED: Final = ("route", "provider", "host", "declared_region", "jurisdiction", "text", "by")
_TERMS: Final = ("ok", "denied", "other")
_UNKNOWN: Final[dict[str, Any]] = {
    "opened": None, "closed": None, "lost": False, "uid": None, "pid": None, "command": "",
    "command_digest": "", "policy": "", "guard": "", "seconds": None, "exit": None, "why": "",
    "user_seconds": None, "system_seconds": None, "max_rss": None, "totals": None, "balanced": None,
    "flow_books": None,
}  # fmt: skip
_WHOLE: Final = ("uid", "pid", "exit", "max_rss")
_REAL: Final = ("seconds", "user_seconds", "system_seconds")
_TEXTS: Final = ("command", "command_digest", "policy", "guard", "why")


def _known(fields: Fields) -> dict[str, Any]:
    """What a record says of its sandbox, of the type it must have."""
    found: dict[str, Any] = {}
    for name in _WHOLE:
        if type(fields.get(name)) is int:
            found[name] = fields[name]
    for name in _REAL:
        if type(fields.get(name)) in (int, float):
            found[name] = float(fields[name])  # type: ignore[arg-type]
    for name in _TEXTS:
        if isinstance(fields.get(name), str):
            found[name] = fields[name]
    return found


def _by_place(item: tuple[tuple[Any, ...], list[Any]]) -> tuple[Any, ...]:
    """Of one host after the other, as it went."""
    (host, *rest), (_, first, _) = item
    return host, first, *rest


def _again(rows: dict[Any, list[Any]], key: tuple[Any, ...], time: str, times: int) -> None:
    found = rows.setdefault(key, [0, time, time])
    found[0] += times
    found[2] = time


def device(fields: Fields) -> str:
    """The link as a device's name; "" where there is none."""
    link = fields.get("link")
    return "" if link is None else _link(link)


def _link(link: object) -> str:
    return f"eg{link}" if type(link) is int else str(link)


def _text(fields: Fields, name: str) -> str:
    return _said(fields.get(name))


def _said(value: object) -> str:
    return "" if value is None else str(value)


def _port(fields: Fields) -> int | None:
    port = fields.get("port")
    return port if type(port) is int else None


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _attempt_row(key: tuple[Any, ...], found: list[Any]) -> Attempt:
    verdict, by, reason, protocol, destination, port = key
    times, records, first, last, links = found
    named = tuple(sorted({_link(link) for link in links if link is not None}))
    return Attempt(verdict, by, reason, protocol, destination, port, times, records, first, last, named)


def _flow_row(key: tuple[Any, ...], found: list[Any]) -> Flow:
    host, kind, protocol, address = map(_said, key[:4])
    return Flow(host, kind, protocol, address, key[4] if type(key[4]) is int else None, *found)


def _order(key: tuple[Any, ...]) -> tuple[str, ...]:
    """Any key has a place, also where it holds None."""
    return tuple(_said(part) if type(part) is not int else f"{part:020}" for part in key)


def _hosts(epochs: tuple[Epoch, ...]) -> tuple[HostTotal, ...]:
    merged: dict[str, list[HostCount]] = {}
    for epoch in epochs:
        for host in epoch.hosts:
            merged.setdefault(host.host, []).append(host)
    return tuple(
        HostTotal(
            host=name,
            kind=found[-1].kind,
            wildcard=found[-1].wildcard,
            addresses=tuple(sorted({a for each in found for a in each.addresses})),
            counted=Counts(*(sum(getattr(e.counted, n) for e in found) for n in Counts.__struct_fields__)),
        )
        for name, found in sorted(merged.items())
    )


def _denied(epochs: tuple[Epoch, ...]) -> tuple[DeniedCount, ...]:
    sums: dict[str, tuple[int, int]] = {}
    for epoch in epochs:
        for each in epoch.denied:
            packets, octets = sums.get(each.reason, (0, 0))
            sums[each.reason] = packets + each.packets, octets + each.bytes
    return tuple(DeniedCount(reason, *found) for reason, found in sorted(sums.items()))


def _gaps(epochs: tuple[Epoch, ...], last: str | None) -> Iterable[str]:
    """Where counters moved, or may have, between what snapshots say."""
    for place, epoch in enumerate(epochs):
        if epoch.begins == "at its first snapshot":
            yield f"what epoch {epoch.epoch} counted before its first snapshot is not counted here"
        if epoch.unusable:
            yield f"{epoch.unusable} snapshots of epoch {epoch.epoch} are incomplete and were not used"
        if not epoch.end_time:
            continue
        if place + 1 < len(epochs):
            yield f"what epoch {epoch.epoch} counted after {epoch.end_time}, its last snapshot, is in none"
        elif last is not None and last > epoch.end_time:
            yield f"what was counted after {epoch.end_time}, the last snapshot, is in no snapshot"
