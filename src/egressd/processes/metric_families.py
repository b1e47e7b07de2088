"""The metrics: from the controller's document to families of prometheus_client.

Every label has few values, whatever a sandbox does. `workspace` and `host` are of the policies: names under
a wildcard, which sandboxes choose, count under the wildcard, and beyond `MAX_HOSTS` hosts of a workspace the
rest counts as `(other)`. `reason`, `process`, `verdict`, `direction`, `outcome` and `cause` come from closed
sets; what is not in them counts as `(other)`. docs/metrics.md has the table; a test compares the two.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from egressd.model.verdicts import Reason
from egressd.processes.cards import CARDS

__all__ = ["MAX_HOSTS", "OTHER", "TABLE", "Document", "Families", "Row", "Rows", "Told", "read", "tell"]

MAX_HOSTS = 1000  # of one workspace, by name
OTHER = "(other)"
_MAX_CAUSES = 64
_REASONS = frozenset(reason.value for reason in Reason)
# Told as zero from the beginning: a count that appears with its first occurrence has not grown, for
# Prometheus.
_NAME_REASONS = (
    Reason.NAME, Reason.TYPE, Reason.BUDGET_NAMES, Reason.BUDGET_BYTES, Reason.BUDGET_RATE, Reason.RESIDENCY,
    Reason.LOCAL_ONLY,
)  # fmt: skip
_FLOW_REASONS = (
    Reason.SNI_MISSING, Reason.SNI_ADDRESS, Reason.SNI_REPEATED, Reason.SNI_OTHER, Reason.ECH, Reason.NOT_TLS,
    Reason.HELLO_MALFORMED, Reason.HELLO_TOO_LONG, Reason.HELLO_TOO_SLOW,
)  # fmt: skip
_TESTIMONY_REASONS = (Reason.MEMBER, Reason.PROTOCOL, Reason.LIMIT)
_OUTCOMES = ("done", "failed", "stopped", "refused")
T = TypeVar("T")

Count: TypeAlias = Annotated[int, Meta(ge=0)]
Tally: TypeAlias = tuple[Count, Count]  # packets, bytes


# --------------------------------------------------------------------------------------------------
# What the controller answers to Ask(what="metrics"), as far as it is told on. More fields are passed over.
class Process(Struct, frozen=True):
    name: str
    state: str
    restarts: Count


class Names(Struct, frozen=True):
    granted: Count
    budget: Count


class Residency(Struct, frozen=True):
    barred: Count
    addresses_refused: Count
    stale: list[str]
    broken: str | None = None


class Workspace(Struct, frozen=True):
    workspace: str
    guard: str | None
    policy: str | None
    sandboxes: Count
    names: Names | None = None
    residency: Residency | None = None  # None: not pinned
    problem: str | None = None


class Status(Struct, frozen=True):
    version: str
    enforcing: bool
    since: float
    processes: list[Process]
    workspaces: list[Workspace]
    alarms: list[Any]
    balanced: bool


class Row(Struct, frozen=True):
    host: str
    out: Tally
    in_: Tally = msgspec.field(name="in")
    connections: Count
    dialled: Tally | None = None
    wildcard: str | None = None  # the pattern that grants this name


class Ended(Struct, frozen=True):
    links: Count


class Balance(Struct, frozen=True):
    balanced: bool
    in_: Tally = msgspec.field(name="in")
    admitted: Tally
    denied: Tally
    other: Tally


class Account(Struct, frozen=True):
    workspace: str
    hosts: list[Row]
    denied: dict[str, Tally]
    ended: Ended
    balance: Balance
    names_refused_by: dict[str, Count] = {}
    flows_refused: dict[str, Count] = {}


class Counters(Struct, frozen=True):
    workspaces: list[Account]
    late: dict[str, Tally] = {}


class Journal(Struct, frozen=True):
    """messages.JournalState."""

    records: Count
    octets: Count
    segments: Count
    queued: Count
    lag: float
    lost: dict[str, Count]
    failing: str = ""
    checkpoint_size: Count = 0
    checkpoint_time: float = 0.0


class RequestCounts(Struct, frozen=True):
    outcomes: dict[str, Count] = {}
    documents: Count = 0
    undestroyed: Count = 0
    leftovers: Count = 0


class Requests(Struct, frozen=True):
    workspaces: dict[str, RequestCounts] = {}
    refused: dict[str, Count] = {}


class Document(Struct, frozen=True):
    status: Status
    counters: Counters
    journal: Journal | None = None  # None: the auditor did not answer
    drift: list[str] | None = None  # None: not known
    requests: Requests = Requests()


def read(document: Any) -> Document:
    """msgspec.ValidationError if it is not what is expected."""
    return msgspec.convert(document, type=Document)


# --------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Sums:
    """What is told of one host."""

    out: Tally = (0, 0)
    in_: Tally = (0, 0)
    connections: int = 0
    dialled: Tally | None = None

    def add(self, row: Row) -> None:
        self.out, self.in_ = _plus(self.out, row.out), _plus(self.in_, row.in_)
        self.connections += row.connections
        if row.dialled is not None:
            self.dialled = _plus(self.dialled or (0, 0), row.dialled)


def _plus(one: Tally, other: Tally) -> Tally:
    return one[0] + other[0], one[1] + other[1]


@dataclass(slots=True)
class Rows:
    """Which hosts of a workspace are told by name. Who is among the others stays there as long as there is
    such a row, so that no count moves from one label to another and `(other)` never shrinks."""

    limit: int = MAX_HOSTS
    _named: dict[str, set[str]] = field(default_factory=dict)
    _others: dict[str, set[str]] = field(default_factory=dict)

    def sums(self, account: Account) -> dict[str, Sums]:
        """Two rows may be of one host: one that was removed and is listed again."""
        hosts = dict.fromkeys(row.wildcard or row.host for row in account.hosts)
        named, others = self._assigned(account.workspace, hosts)
        found: dict[str, Sums] = {host: Sums() for host in hosts if host in named}
        if others:
            found[OTHER] = Sums()
        for row in account.hosts:
            host = row.wildcard or row.host
            found[host if host in named else OTHER].add(row)
        return found

    def _assigned(self, workspace: str, hosts: Mapping[str, None]) -> tuple[set[str], set[str]]:
        named = self._named.get(workspace, set()) & hosts.keys()
        others = self._others.get(workspace, set()) & hosts.keys()
        for host in hosts:  # in the policy's order
            if host not in named and host not in others:
                (named if len(named) < self.limit else others).add(host)
        self._named[workspace], self._others[workspace] = named, others
        return named, others

    def forget_but(self, workspaces: Iterable[str]) -> None:
        kept = set(workspaces)
        for memory in (self._named, self._others):
            for gone in memory.keys() - kept:
                del memory[gone]


# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Told:
    """One metric. A counter's name ends in `_total`, as Prometheus has it."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    kind: Literal["counter", "gauge"] = "gauge"

    def family(self) -> CounterMetricFamily | GaugeMetricFamily:
        made = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        return made(self.name, self.text, labels=self.labels)


def _gauge(name: str, text: str, *labels: str) -> Told:
    return Told(f"egressd_{name}", text, labels)


def _counter(name: str, text: str, *labels: str) -> Told:
    return Told(f"egressd_{name}_total", text, labels, "counter")


TABLE: dict[str, Told] = {
    told.name.removeprefix("egressd_"): told
    for told in (
        _gauge("up", "1 if the controller answered. Without it only the exporter's own metrics are told."),
        _gauge("build_info", "Always 1; the version that runs.", "version"),
        _gauge("start_time_seconds", "Unix time at which the controller started."),
        _gauge("enforcing", "1 if the controller and the warden agree about every sandbox."),
        _gauge("books_balanced", "0 if a frame of a sandbox is not accounted for."),
        _gauge("ruleset_drift", "Differences between the kernel's ruleset, read back, and what it must be."),
        _gauge("alarms", "Alarms that `egressctl status` shows."),
        _gauge("process_up", "1 if the process runs and is ready.", "process"),
        _counter("process_restarts", "Times the process was started again.", "process"),
        _gauge("policy_info", "Always 1; the policy in force.", "workspace", "guard", "digest"),
        _gauge("policy_broken", "1 if the file of the workspace has a problem.", "workspace"),
        _gauge("sandboxes", "Sandboxes there are.", "workspace"),
        _counter("links_ended", "Sandboxes that have ended.", "workspace"),
        _gauge("names_granted", "Names under wildcards that are held.", "workspace"),
        _gauge("names_budget", "Names under wildcards that may be held.", "workspace"),
        _gauge("residency_broken", "1 if the registry cannot be read: all is refused.", "workspace"),
        _gauge("residency_stale_tables", "Tables of prefixes older than 30 days.", "workspace"),
        _gauge("residency_barred_rules", "Rules of a pinned workspace that take no part.", "workspace"),
        _gauge("residency_refused_addresses", "Addresses of listed names that were refused.", "workspace"),
        _counter("host_packets", "Packets of a listed host.", "workspace", "host", "direction"),
        _counter("host_bytes", "Bytes of a listed host.", "workspace", "host", "direction"),
        _counter("host_connections", "Connections begun to a listed host.", "workspace", "host"),
        _counter("host_upstream_packets", "Packets the inspector sent to the host.", "workspace", "host"),
        _counter("host_upstream_bytes", "Bytes the inspector sent to the host.", "workspace", "host"),
        _counter("received_packets", "Packets that came in over the links of sandboxes.", "workspace"),
        _counter("received_bytes", "Bytes that came in over the links of sandboxes.", "workspace"),
        _counter("judged_packets", "What became of the packets received.", "workspace", "verdict"),
        _counter("judged_bytes", "What became of the bytes received.", "workspace", "verdict"),
        _gauge("workspace_balanced", "0 if a frame of the workspace is not accounted for.", "workspace"),
        _counter("denied_packets", "Packets refused at the link.", "workspace", "reason"),
        _counter("denied_bytes", "Bytes refused at the link.", "workspace", "reason"),
        _counter("late_packets", "Packets admitted at the link and lost behind it.", "reason"),
        _counter("late_bytes", "Bytes admitted at the link and lost behind it.", "reason"),
        _counter("names_refused", "Questions the resolver refused.", "workspace", "reason"),
        _counter("flows_refused", "Connections the inspector refused.", "workspace", "reason"),
        _counter("requests", "Requests that have ended, or were refused.", "workspace", "outcome"),
        _counter("request_documents", "Documents that requests were shown.", "workspace"),
        _counter("requests_undestroyed", "Requests whose copies were not seen destroyed.", "workspace"),
        _counter("request_leftovers", "Requests whose copies were found later.", "workspace"),
        _counter("testimony_refused", "Records of brokers that were not taken.", "reason"),
        _gauge("journal_up", "1 if the auditor answered."),
        _counter("journal_records", "Records on disk."),
        _gauge("journal_bytes", "Bytes of records on disk."),
        _gauge("journal_segments", "Files of records."),
        _gauge("journal_queue", "Records that wait to be written."),
        _gauge("journal_lag_seconds", "Seconds the oldest waiting record has waited."),
        _gauge("journal_failing", "1 if the disk refuses records."),
        _counter("journal_lost", "Records lost since the auditor started.", "cause"),
        _gauge("journal_uncovered_records", "Records that no signed checkpoint covers yet."),
        _gauge("journal_checkpoint_age_seconds", "Seconds since the last signed checkpoint."),
        _gauge("exporter_reading_seconds", "How long the controller took to answer."),
        _counter("exporter_failed_readings", "Readings without an answer that can be used."),
        _counter("exporter_requests", "HTTP requests answered.", "code"),
        _counter("exporter_dropped_connections", "Connections ended without an answer.", "why"),
    )
}  # fmt: skip


class Families:
    """Samples as they are told, by metric."""

    def __init__(self) -> None:
        self._made: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}

    def tell(self, name: str, value: float, *labels: str) -> None:
        if name not in self._made:
            self._made[name] = TABLE[name].family()
        self._made[name].add_metric(labels, value)

    def tally(self, name: str, tally: Tally, *labels: str) -> None:
        """Packets and bytes."""
        self.tell(f"{name}_packets_total", tally[0], *labels)
        self.tell(f"{name}_bytes_total", tally[1], *labels)

    def __iter__(self) -> Iterator[Metric]:
        """In the order of the table."""
        return (self._made[name] for name in TABLE if name in self._made)


def tell(document: Document, rows: Rows, told: Families, *, now: float) -> None:
    """`now`: Unix time."""
    rows.forget_but(account.workspace for account in document.counters.workspaces)
    _daemon(document, told)
    for process in document.status.processes:
        name = process.name if process.name in CARDS else OTHER
        told.tell("process_up", process.state == "running", name)
        told.tell("process_restarts_total", process.restarts, name)
    for workspace in document.status.workspaces:
        _workspace(workspace, told)
    for account in document.counters.workspaces:
        _account(account, rows.sums(account), told)
    for reason, tally in _by_reason(document.counters.late, _plus).items():
        told.tally("late", tally, reason)
    _requests(document.requests, told)
    told.tell("journal_up", document.journal is not None)
    if document.journal is not None:
        _journal(document.journal, told, now=now)


def _daemon(document: Document, told: Families) -> None:
    status = document.status
    told.tell("build_info", 1, status.version)
    told.tell("start_time_seconds", status.since)
    told.tell("enforcing", status.enforcing)
    told.tell("books_balanced", status.balanced)
    told.tell("alarms", len(status.alarms))
    if document.drift is not None:
        told.tell("ruleset_drift", len(document.drift))


def _workspace(workspace: Workspace, told: Families) -> None:
    name = workspace.workspace
    if workspace.policy is not None:
        told.tell("policy_info", 1, name, workspace.guard or "", workspace.policy)
    told.tell("policy_broken", workspace.problem is not None, name)
    told.tell("sandboxes", workspace.sandboxes, name)
    if workspace.names is not None:
        told.tell("names_granted", workspace.names.granted, name)
        told.tell("names_budget", workspace.names.budget, name)
    if workspace.residency is not None:
        told.tell("residency_broken", workspace.residency.broken is not None, name)
        told.tell("residency_stale_tables", len(workspace.residency.stale), name)
        told.tell("residency_barred_rules", workspace.residency.barred, name)
        told.tell("residency_refused_addresses", workspace.residency.addresses_refused, name)


def _account(account: Account, hosts: Mapping[str, Sums], told: Families) -> None:
    name, balance = account.workspace, account.balance
    told.tell("links_ended_total", account.ended.links, name)
    for host, sums in hosts.items():
        told.tally("host", sums.out, name, host, "out")
        told.tally("host", sums.in_, name, host, "in")
        told.tell("host_connections_total", sums.connections, name, host)
        if sums.dialled is not None:
            told.tally("host_upstream", sums.dialled, name, host)
    told.tally("received", balance.in_, name)
    for verdict in ("admitted", "denied", "other"):
        told.tally("judged", getattr(balance, verdict), name, verdict)
    told.tell("workspace_balanced", balance.balanced, name)
    for reason, tally in _by_reason(account.denied, _plus).items():
        told.tally("denied", tally, name, reason)
    names = dict.fromkeys(_NAME_REASONS, 0) | account.names_refused_by
    for reason, count in _by_reason(names, operator.add).items():
        told.tell("names_refused_total", count, name, reason)
    flows = dict.fromkeys(_FLOW_REASONS, 0) | account.flows_refused
    for reason, count in _by_reason(flows, operator.add).items():
        told.tell("flows_refused_total", count, name, reason)


def _requests(requests: Requests, told: Families) -> None:
    for name, counts in requests.workspaces.items():
        for outcome in _OUTCOMES:
            told.tell("requests_total", counts.outcomes.get(outcome, 0), name, outcome)
        told.tell("request_documents_total", counts.documents, name)
        told.tell("requests_undestroyed_total", counts.undestroyed, name)
        told.tell("request_leftovers_total", counts.leftovers, name)
    refused = dict.fromkeys(_TESTIMONY_REASONS, 0) | requests.refused
    for reason, count in _by_reason(refused, operator.add).items():
        told.tell("testimony_refused_total", count, reason)


def _by_reason(counts: Mapping[str, T], plus: Callable[[T, T], T]) -> dict[str, T]:
    """Some are counted by processes that read strangers' bytes: what is not a reason of ours is no label."""
    found: dict[str, T] = {}
    for word, count in counts.items():
        reason = word if word in _REASONS else OTHER
        found[reason] = plus(found[reason], count) if reason in found else count
    return found


def _journal(journal: Journal, told: Families, *, now: float) -> None:
    told.tell("journal_records_total", journal.records)
    told.tell("journal_bytes", journal.octets)
    told.tell("journal_segments", journal.segments)
    told.tell("journal_queue", journal.queued)
    told.tell("journal_lag_seconds", journal.lag)
    told.tell("journal_failing", bool(journal.failing))
    for cause, count in _bounded(journal.lost).items():
        told.tell("journal_lost_total", count, cause)
    told.tell("journal_uncovered_records", max(0, journal.records - journal.checkpoint_size))
    if journal.checkpoint_time:
        told.tell("journal_checkpoint_age_seconds", max(0.0, now - journal.checkpoint_time))


def _bounded(lost: Mapping[str, int]) -> dict[str, int]:
    """Causes are few; a process that made them up would not make more than these."""
    found = dict(sorted(lost.items())[:_MAX_CAUSES])
    rest = sum(lost.values()) - sum(found.values())
    return {**found, OTHER: found.get(OTHER, 0) + rest} if rest else found
