"""What `egressctl watch` shows, worked out from two readings of egressd's documents. Touches nothing.

A `History` is fed with one reading after the other; each gives a `Frame`, in which totals have become rates.
Counters that fell have begun anew: their rate is 0 until the next reading. All text in a frame is escaped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, TypeAlias

from egressd.cli.status import moment
from egressd.cli.text import Paint, duration, escape, shorten, table

__all__ = [
    "NO_DENIALS",
    "SORTS",
    "Frame",
    "Happening",
    "History",
    "Host",
    "Sandbox",
    "headline",
    "page",
    "rate",
    "size",
]

Document: TypeAlias = Mapping[str, Any]
Totals: TypeAlias = tuple[int, ...]

SORTS: Final = ("rate", "total", "name")
NO_DENIALS: Final = "no denial was seen so far"
_REMEMBERED: Final = 500  # denials
_LAST: Final = frozenset({"wildcard", "removed"})
_UNITS: Final = ("B", "K", "M", "G", "T", "P", "E")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One link. Rates per second: bytes into the link, denied packets."""

    link: str
    workspace: str
    since: float
    uid: int
    command: str
    in_rate: float
    denied_rate: float
    in_bytes: int
    denied_packets: int


@dataclass(frozen=True, slots=True)
class Host:
    """One row of a workspace's hosts. Rates in bytes per second; out is away from the sandbox."""

    workspace: str
    host: str
    kind: str
    out_rate: float
    in_rate: float
    connections: int
    out_bytes: int
    in_bytes: int


@dataclass(frozen=True, slots=True)
class Happening:
    """A denial: when (Unix time, or as the journal's line says it), whose, and what, in words."""

    time: float
    workspace: str
    text: str


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture. `journal`: a few words on it; empty if egressd says nothing of one."""

    time: float
    version: str
    since: float
    enforcing: bool
    balanced: bool
    journal: str = ""
    journal_trouble: bool = False
    problems: tuple[str, ...] = ()
    drift: tuple[str, ...] = ()  # where the kernel's ruleset is not the compiled one
    alarms: int = 0
    workspaces: tuple[str, ...] = ()
    sandboxes: tuple[Sandbox, ...] = ()
    hosts: tuple[Host, ...] = ()
    denials: tuple[Happening, ...] = ()  # oldest first

    def of(self, workspace: str | None) -> Frame:
        """Only what belongs to `workspace`; None: everything."""
        if workspace is None:
            return self
        return replace(
            self,
            sandboxes=tuple(s for s in self.sandboxes if s.workspace == workspace),
            hosts=tuple(h for h in self.hosts if h.workspace == workspace),
            denials=tuple(d for d in self.denials if d.workspace == workspace),
        )

    def sorted_by(self, key: str) -> Frame:
        order = {
            "rate": lambda h: (-(h.out_rate + h.in_rate), -(h.out_bytes + h.in_bytes), h.workspace, h.host),
            "total": lambda h: (-(h.out_bytes + h.in_bytes), h.workspace, h.host),
            "name": lambda h: (h.workspace, h.host),
        }[key]
        return replace(self, hosts=tuple(sorted(self.hosts, key=order)))

    def document(self) -> dict[str, Any]:
        """For programs, with the names of the fields."""
        return asdict(self)


# ---- from documents to frames


@dataclass(slots=True)
class History:
    """What was read before. `journalled`: denials come from the journal, so none is made of counters."""

    journalled: bool = False
    _at: float = 0.0
    _before: dict[tuple[str, ...], Totals] = field(default_factory=dict)
    _now: dict[tuple[str, ...], Totals] = field(default_factory=dict)
    _denials: deque[Happening] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def take(self, status: Document, counters: Document, *, news: Iterable[Happening] = ()) -> Frame:
        """The next reading. KeyError for documents of another shape."""
        self._now = {}
        at = float(counters["time"])
        elapsed = at - self._at if self._before and at > self._at else 0.0
        sandboxes = tuple(self._sandboxes(status, counters, elapsed))
        hosts = tuple(
            self._host(each["workspace"], host, elapsed)
            for each in counters["workspaces"]
            for host in each["hosts"]
        )
        denied = list(self._denied(counters, at))
        self._denials.extend([*news] if self.journalled else denied)
        self._before, self._at = self._now, at
        journal, trouble = _journal(status.get("journal"), status.get("journal_error"))
        return Frame(
            time=at,
            version=escape(str(status["version"])),
            since=float(status["since"]),
            enforcing=bool(status["enforcing"]),
            balanced=bool(status["balanced"] and counters["balanced"]),
            journal=journal,
            journal_trouble=trouble,
            problems=tuple(escape(f"{w['workspace']}: {w['problem']}") for w in _broken(status)),
            drift=tuple(map(escape, status.get("drift") or ())),
            alarms=len(status["alarms"]),
            workspaces=tuple(escape(w["workspace"]) for w in status["workspaces"]),
            sandboxes=sandboxes,
            hosts=hosts,
            denials=tuple(self._denials),
        )

    def _rates(self, key: tuple[str, ...], totals: tuple[int, int], elapsed: float) -> tuple[float, float]:
        """Per second since the last reading. What was not there then began at 0, unless this is the first."""
        self._now[key] = totals
        before = self._before.get(key, (0, 0))
        if not elapsed or totals[0] < before[0] or totals[1] < before[1]:
            return 0.0, 0.0
        return (totals[0] - before[0]) / elapsed, (totals[1] - before[1]) / elapsed

    def _sandboxes(self, status: Document, counters: Document, elapsed: float) -> Iterator[Sandbox]:
        counted = {link["link"]: link for each in counters["workspaces"] for link in each["links"]}
        for sandbox in status["sandboxes"]:
            link = counted.get(sandbox["link"], {"in": [0, 0], "denied": [0, 0]})
            totals = (link["in"][1], link["denied"][0])
            in_rate, denied_rate = self._rates(("link", str(sandbox["link"])), totals, elapsed)
            yield Sandbox(
                link=f"eg{sandbox['link']}",
                workspace=escape(sandbox["workspace"]),
                since=float(sandbox["since"]),
                uid=sandbox["uid"],
                command=escape(sandbox["command"]),
                in_rate=in_rate,
                denied_rate=denied_rate,
                in_bytes=totals[0],
                denied_packets=totals[1],
            )

    def _host(self, workspace: str, host: Document, elapsed: float) -> Host:
        totals = (host["out"][1], host["in"][1])
        key = ("host", workspace, host["host"], host["kind"])
        # What a row of last counters gains was counted long ago, under a name that was given back just now.
        out_rate, in_rate = self._rates(key, totals, 0.0 if host["kind"] in _LAST else elapsed)
        return Host(
            workspace=escape(workspace),
            host=escape(host["host"]),
            kind=escape(host["kind"]),
            out_rate=out_rate,
            in_rate=in_rate,
            connections=host["connections"],
            out_bytes=totals[0],
            in_bytes=totals[1],
        )

    def _denied(self, counters: Document, at: float) -> Iterator[Happening]:
        for each in counters["workspaces"]:
            found = {("denied", r): (p, "packets denied") for r, (p, _) in each["denied"].items()}
            found |= {("name", r): (n, "questions refused") for r, n in each["names_refused_by"].items()}
            found |= {("flow", r): (n, "connections refused") for r, n in each["flows_refused"].items()}
            for (kind, reason), (count, what) in found.items():
                key = (kind, each["workspace"], reason)
                self._now[key] = (count,)
                more = count - self._before.get(key, (0,))[0]
                if more > 0 and self._before:
                    text = f"{more} {what} [{escape(reason)}]"
                    yield Happening(at, escape(each["workspace"]), text)


def _broken(status: Document) -> list[Document]:
    return [workspace for workspace in status["workspaces"] if workspace["problem"]]


def _journal(state: Any, error: Any) -> tuple[str, bool]:
    """A few words on the journal, and whether they are bad ones."""
    if error:
        return f"NO WORD OF THE JOURNAL: {shorten(escape(str(error)), 60)}", True
    if not isinstance(state, Mapping):
        return "", False
    lost = state.get("lost") or {}
    count = sum(lost.values()) if isinstance(lost, Mapping) else int(lost)
    words = [f"journal {state.get('records', '?')} records"]
    if state.get("failing"):
        words = [f"JOURNAL FAILS: {shorten(escape(str(state['failing'])), 60)}"]
    if state.get("lag", 0) >= 1:
        words.append(f"{state['lag']:.0f} s behind")
    if count:
        words.append(f"{count} lost")
    return ", ".join(words), bool(state.get("failing") or count)


# ---- in words


def size(count: float) -> str:
    """At most five characters: `0`, `47.1K`, `3.3M`, `999M`. 1K is 1024."""
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    if unit == 0:
        return str(round(count))
    return f"{count:.1f}{_UNITS[unit]}" if count < 99.95 else f"{count:.0f}{_UNITS[unit]}"


def rate(per_second: float) -> str:
    """`-` for nothing, so that what moves stands out; below one per second, `<1`."""
    if per_second <= 0:
        return "-"
    return "<1" if per_second < 1 else size(per_second)


def headline(frame: Frame, paint: Paint) -> str:
    """Two lines."""
    enforcing = paint.good("enforcing") if frame.enforcing else paint.bad("NOT ENFORCING")
    books = paint.good("books balance") if frame.balanced else paint.bad("BOOKS DO NOT BALANCE")
    second = [f"{moment(frame.time)}", f"up {duration(frame.time - frame.since)}"]
    if frame.journal:
        second.append(paint.bad(frame.journal) if frame.journal_trouble else frame.journal)
    troubles = {
        "policies with problems": len(frame.problems),
        "differences of the ruleset": len(frame.drift),
        "alarms": frame.alarms,
    }
    second += [paint.bad(f"{count} {what}") for what, count in troubles.items() if count]
    return f"egressd {frame.version}: {enforcing}, {books}\n{', '.join(second)}"


SANDBOX_HEAD: Final = ("sandbox", "workspace", "age", "in/s", "denied/s", "in", "denied", "command")
HOST_HEAD: Final = ("host", "workspace", "out/s", "in/s", "conn", "out", "in")


def sandbox_cells(sandbox: Sandbox, now: float) -> tuple[str, ...]:
    return (
        sandbox.link,
        sandbox.workspace,
        duration(now - sandbox.since),
        rate(sandbox.in_rate),
        rate(sandbox.denied_rate),
        size(sandbox.in_bytes),
        str(sandbox.denied_packets),
        shorten(sandbox.command, 40),
    )


def host_cells(host: Host) -> tuple[str, ...]:
    return (
        shorten(host.host, 60),
        host.workspace,
        rate(host.out_rate),
        rate(host.in_rate),
        str(host.connections),
        size(host.out_bytes),
        size(host.in_bytes),
    )


def denial_line(happening: Happening) -> str:
    """`14:13:20Z  acme  3 packets denied [unlisted]`"""
    return f"{moment(happening.time)[11:]}  {happening.workspace}  {happening.text}"


def page(frame: Frame, *, paint: Paint, most: int, only_denials: bool = False) -> str:
    """The whole picture as text, with at most `most` rows of each kind."""
    parts = [headline(frame, paint)]
    if not only_denials:
        parts += [_sandboxes(frame, paint, most), _hosts(frame, paint, most)]
    lines = [f"  {denial_line(each)}" for each in frame.denials[-most:]]
    parts.append("\n".join(["latest denials", *lines]) if lines else NO_DENIALS)
    return "\n\n".join(parts)


def _sandboxes(frame: Frame, paint: Paint, most: int) -> str:
    rows = [sandbox_cells(sandbox, frame.time) for sandbox in frame.sandboxes[:most]]
    if not rows:
        return "no sandboxes"
    shown = table(SANDBOX_HEAD, rows, right="age,in/s,denied/s,in,denied", columns=paint.columns)
    return shown + _more(len(frame.sandboxes) - most, "sandboxes")


def _hosts(frame: Frame, paint: Paint, most: int) -> str:
    rows = [host_cells(host) for host in frame.hosts[:most]]
    if not rows:
        return "no hosts"
    shown = table(HOST_HEAD, rows, right="out/s,in/s,conn,out,in", columns=paint.columns)
    return shown + _more(len(frame.hosts) - most, "hosts")


def _more(count: int, what: str) -> str:
    return f"\n... and {count} more {what}" if count > 0 else ""
