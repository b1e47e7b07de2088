"""Dialogues as files (scenarios/*.yaml): who asks what, what is said, and what that caused upstream.

    title:       one sentence
    process:     false if it needs a long clock, or less than the real process does by itself
    hosts:       static ones: name -> addresses;   upstream: null for air-gapped
    workspaces:  name -> what dns.table.WorkspaceNames says (guard: enforce unless said)
    sandboxes:   link -> workspace
    upstream:    name -> NXDOMAIN | NODATA | SERVFAIL | {A: [...], AAAA: [...], ttl: 60}; others: NXDOMAIN
    steps:       one or several of, in this order:
      upstream               merged into the above from now on
      refuses: {address: why}  what the controller leads nowhere from now on, whatever the name
      workspaces             merged into the above from now on
      kernel: false          the controller refuses everything from now on; true: no more
      begin: {link: workspace};  end: link;  after: seconds
      ask: NAME [TYPE], from: link (1), times: how often
        rcode (NOERROR), addresses ([BLOCK.SLOT or an address]), pointer, ede, text (contained),
        ttl (at most), tc
      asks: [names], grants: [names], releases: [names]
                             since the step before: exactly these, in any order; default none
      denied: {reason: count}   in all so far

Two stages play them: `PureStage` here with a clock of its own, and one around the real process.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

import dnslib
import msgspec
import yaml

from egressd.dns import keeper, wildcards, wire
from egressd.dns.book import Book, Command
from egressd.dns.exchange import Question
from egressd.dns.keeper import Finding
from egressd.dns.replies import Extended, Failure, Reply, failure
from egressd.dns.table import Denied, Wait, WorkspaceNames
from egressd.model.addresses import Address
from egressd.ruleset.layout import Pools

__all__ = ["FILES", "FIRST_BLOCK", "Heard", "PureStage", "Scenario", "Stage", "load", "play", "records"]

FILES = sorted(Path(__file__).parent.joinpath("scenarios").glob("*.yaml"))
FIRST_BLOCK = 100  # of what a stage grants
POOLS = Pools()


@dataclass
class Scenario:
    title: str
    workspaces: dict[str, Any]
    steps: list[dict[str, Any]]
    sandboxes: dict[int, str] = field(default_factory=lambda: {1: "acme"})
    upstream: dict[str, Any] | None = field(default_factory=dict)
    hosts: dict[str, list[str]] = field(default_factory=dict)
    process: bool = True


@dataclass
class Heard:
    rcode: str
    addresses: list[str]
    ttl: int
    ede: int | None
    text: str
    tc: bool
    pointer: str | None = None

    @classmethod
    def of(cls, data: bytes) -> Heard:
        record = dnslib.DNSRecord.parse(data)
        options = [o for rr in record.ar if rr.rtype == 41 for o in rr.rdata if o.code == 15]
        ede = int.from_bytes(options[0].data[:2], "big") if options else None
        return cls(
            rcode=dnslib.RCODE[record.header.rcode],
            addresses=[str(ip_address(str(rr.rdata))) for rr in record.rr if rr.rtype in (1, 28)],
            ttl=max((rr.ttl for rr in (*record.rr, *record.auth)), default=0),
            ede=ede,
            text=options[0].data[2:].decode() if options else "",
            tc=bool(record.header.tc),
            pointer=next((str(rr.rdata).rstrip(".") for rr in record.rr if rr.rtype == 12), None),
        )


class Stage(Protocol):
    def names(self, listed: list[WorkspaceNames]) -> None: ...
    def script(self, upstream: dict[str, Any]) -> None: ...
    def kernel(self, good: bool) -> None: ...
    def refuses(self, refused: dict[str, str]) -> None: ...
    def begin(self, link: int, workspace: str) -> None: ...
    def end(self, link: int) -> None: ...
    def after(self, seconds: float) -> None: ...
    def ask(self, link: int, name: str, qtype: str) -> Heard: ...
    def caused(self, kind: str, *, expected: int) -> list[str]: ...
    def denied(self) -> dict[str, int]: ...
    def granted(self, workspace: str) -> dict[str, tuple[int, bool]]: ...


def load(path: Path) -> Scenario:
    return msgspec.convert(yaml.safe_load(path.read_text()), type=Scenario, strict=True)


def play(scenario: Scenario, stage: Stage) -> None:
    """Raises AssertionError at the first thing that is not as the file says."""
    workspaces, upstream = dict(scenario.workspaces), dict(scenario.upstream or {})
    stage.script(upstream)
    stage.names(_listed(workspaces, stage))
    for link, workspace in scenario.sandboxes.items():
        stage.begin(link, workspace)
    for number, step in enumerate(scenario.steps, 1):
        where = f"step {number}: {step}"
        unknown = set(step) - _KEYS
        assert not unknown, f"{where}: {unknown}"
        if "upstream" in step:
            upstream |= step["upstream"]
            stage.script(upstream)
        if "refuses" in step:
            stage.refuses(step["refuses"])
        if "workspaces" in step:
            workspaces |= step["workspaces"]
            stage.names(_listed({w: n for w, n in workspaces.items() if n is not None}, stage))
        _act(step, stage, where)
        for kind in ("asks", "grants", "releases"):
            expected = sorted(step.get(kind, ()))
            assert sorted(stage.caused(kind, expected=len(expected))) == expected, f"{where}: {kind}"
        if "denied" in step:
            assert stage.denied() == step["denied"], where


_KEYS = {
    "workspaces", "upstream", "kernel", "begin", "end", "after", "ask", "from", "times", "rcode", "addresses",
    "pointer", "ede", "text", "ttl", "tc", "asks", "grants", "releases", "denied", "why",
    "refuses",
}  # fmt: skip


def _act(step: dict[str, Any], stage: Stage, where: str) -> None:
    if "kernel" in step:
        stage.kernel(step["kernel"])
    for link, workspace in step.get("begin", {}).items():
        stage.begin(link, workspace)
    if "end" in step:
        stage.end(step["end"])
    if "after" in step:
        stage.after(step["after"])
    if "ask" in step:
        name, _, qtype = step["ask"].partition(" ")
        for _ in range(step.get("times", 1)):
            _compare(stage.ask(step.get("from", 1), name, qtype or "A"), step, qtype or "A", where)


def _compare(heard: Heard, step: dict[str, Any], qtype: str, where: str) -> None:
    said = f"{where}: {heard}"
    assert heard.rcode == step.get("rcode", "NOERROR"), said
    assert heard.addresses == [_address(a, qtype) for a in step.get("addresses", ())], said
    assert heard.pointer == step.get("pointer"), said
    assert heard.ede == step.get("ede"), said
    assert step.get("text", "") in heard.text, said
    assert heard.ttl <= step.get("ttl", 60), said
    assert heard.tc is step.get("tc", False), said


def _address(spelt: object, qtype: str) -> str:
    """`100.1` is slot 1 of block 100 (YAML reads a number); anything else is an address."""
    text = str(spelt)
    if text.count(".") != 1:
        return str(ip_address(text))
    block, slot = map(int, text.split("."))
    return str(POOLS.synthetic(block, slot)[0 if qtype == "A" else 1])


def _listed(workspaces: dict[str, Any], stage: Stage) -> list[WorkspaceNames]:
    return [
        msgspec.convert(
            {"workspace": w, "guard": "enforce", "granted": _surviving(w, names, stage), **names},
            type=WorkspaceNames,
        )
        for w, names in workspaces.items()
    ]


def _surviving(workspace: str, names: dict[str, Any], stage: Stage) -> dict[str, tuple[int, bool]]:
    """As the controller does: a grant whose wildcard is gone goes."""
    patterns = wildcards.Patterns(names.get("wildcards", {}))
    covers = {h: patterns.match(h) for h in stage.granted(workspace)}
    return {
        host: (block, cover.private)
        for host, (block, _) in stage.granted(workspace).items()
        if (cover := covers[host]) is not None and host not in names.get("hosts", {})
    }


def records(entry: Any, name: str, qtype: str) -> Finding:
    """What the script says about one family."""
    match entry:
        case None | "NXDOMAIN":
            return Finding(ttl=60, exists=False)
        case "NODATA":
            return Finding(ttl=60)
        case "SERVFAIL":
            return Finding(failure=Failure(Extended.OTHER, f"{name}: upstream answered SERVFAIL"))
    return Finding(tuple(ip_address(a) for a in entry.get(qtype, ())), entry.get("ttl", 60))


class PureStage:
    """The book and nothing else. Upstream and controller answer at once."""

    def __init__(self, scenario: Scenario) -> None:
        static = {name: tuple(ip_address(a) for a in found) for name, found in scenario.hosts.items()}
        self.book = Book(pools=POOLS, own=POOLS.own, static=static, upstream=scenario.upstream is not None)
        self.now = 1000.0
        self._script: dict[str, Any] = {}
        self._good = True
        self._refuses: dict[Address, str] = {}
        self._blocks: dict[tuple[str, str], int] = {}
        self._held: dict[str, dict[str, tuple[int, bool]]] = collections.defaultdict(dict)
        self._free = itertools.count(FIRST_BLOCK)
        self._caused: dict[str, list[str]] = collections.defaultdict(list)
        self._denied: collections.Counter[str] = collections.Counter()

    def names(self, listed: list[WorkspaceNames]) -> None:
        for names in listed:
            self._held[names.workspace] = dict(names.granted)
        self._perform(self.book.set_names(listed, now=self.now))

    def script(self, upstream: dict[str, Any]) -> None:
        self._script = dict(upstream)

    def kernel(self, good: bool) -> None:
        self._good = good

    def refuses(self, refused: dict[str, str]) -> None:
        self._refuses = {ip_address(address): why for address, why in refused.items()}

    def begin(self, link: int, workspace: str) -> None:
        self.book.began(link, workspace)

    def end(self, link: int) -> None:
        self._perform(self.book.ended(link, now=self.now))

    def after(self, seconds: float) -> None:
        """Everything that is due on the way happens when it is due."""
        end = self.now + seconds
        while (due := self.book.next_due()) is not None and due <= end:
            self.now = max(due, self.now)
            self._perform(self.book.tick(now=self.now))
        self.now = end

    def ask(self, link: int, name: str, qtype: str) -> Heard:
        data = bytes(dnslib.DNSRecord.question(name, qtype).pack())
        query = wire.read_query(data[:11] + b"\x01" + data[12:] + b"\0\0\x29\x04\xd0" + b"\0" * 6)
        assert isinstance(query, wire.Query)
        return Heard.of(wire.encode(query, self._answer(link, query), udp=True))

    def caused(self, kind: str, *, expected: int) -> list[str]:
        return self._caused.pop(kind, [])

    def denied(self) -> dict[str, int]:
        return dict(self._denied)

    def granted(self, workspace: str) -> dict[str, tuple[int, bool]]:
        return dict(self._held[workspace])

    def _answer(self, link: int, query: wire.Query) -> Reply:
        for _ in range(4):
            workspace = self.book.links.get(link, "")
            decision, commands = self.book.answer(link, workspace, query, now=self.now)
            self._perform(commands)
            match decision:
                case Reply():
                    return decision
                case Denied(reply, reason):
                    self._denied[str(reason)] += 1
                    return reply
                case Wait():
                    continue
            raise AssertionError(f"{decision} has no place in a scenario")
        return failure(Extended.NOT_READY, "not resolved yet")

    def _perform(self, commands: list[Command]) -> None:
        waiting = collections.deque(commands)
        while waiting:
            waiting.extend(self._do(waiting.popleft()))

    def _do(self, command: Command) -> list[Command]:
        match command:
            case keeper.Ask(target):
                return self.book.found(target, self._look(target.host), now=self.now)
            case keeper.Admit(target, slots4, slots6, serial) if self._good:
                return self.book.admitted(target, serial, refused=self._against(*slots4, *slots6))
            case keeper.Admit(target, serial=serial):
                return self.book.withheld(target, serial, "no kernel", now=self.now)
            case wildcards.Ask():
                return self.book.looked(command, self._look(command.host), now=self.now)
            case wildcards.Grant():
                return self._grant(command)
            case wildcards.Release(workspace, hosts):
                self._caused["releases"] += hosts
                for host in hosts:
                    self._held[workspace].pop(host, None)
                return self.book.released(command, now=self.now)
        return []

    def _look(self, host: str) -> keeper.Findings:
        self._caused["asks"].append(Question(wire.labels_of(host), 1).name)
        entry = self._script.get(host)
        return records(entry, host, "A"), records(entry, host, "AAAA")

    def _grant(self, grant: wildcards.Grant) -> list[Command]:
        if not self._good:
            return self.book.refused(grant, "no kernel", now=self.now)
        assert self.book.links.get(grant.link) == grant.workspace
        shown = {a for a in (*grant.standing.v4.slots, *grant.standing.v6.slots) if a is not None}
        refused = self._against(*shown)
        if shown == refused.keys():
            return self.book.barred(grant, next(iter(refused.values())), now=self.now)
        key = grant.workspace, grant.host
        block = self._blocks[key] if key in self._blocks else self._blocks.setdefault(key, next(self._free))
        self._held[grant.workspace][grant.host] = (block, False)
        self._caused["grants"].append(grant.host)
        return self.book.granted(grant, block, now=self.now, refused=refused)

    def _against(self, *shown: Address | None) -> dict[Address, str]:
        return {a: self._refuses[a] for a in shown if a is not None and a in self._refuses}


def scenarios() -> Iterator[tuple[str, Scenario]]:
    for path in FILES:
        yield path.stem, load(path)
