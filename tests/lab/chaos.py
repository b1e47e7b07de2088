"""Faults on purpose: processes of a running egressd are killed or stopped, at any moment, under traffic.

    with Daemon(lab, policies={"acme": chaos.POLICY}, ...) as daemon:
        report = chaos.run(lab, daemon, kills=300, seed=1)

Two sandboxes live through all of it. One holds streams that the kernel carries alone; the other tries to get
out by every door that is shut, without a pause. The capture on the uplink is the judge of what left.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from egressd.model.errors import EgressdError
from integration.chatter import Chatter
from integration.probe import Resident
from lab import topology
from lab.capture import Capture
from lab.daemon import Daemon
from lab.internet import start_internet
from lab.machine import Lab, LabError, poll

__all__ = ["EVERYBODY", "POLICY", "Fault", "Report", "run"]

MARKER = "chaos-must-not-leave-41c7"
POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp], verify: address}
  - {host: "*.search.test", ports: [7/tcp], verify: address}
  - local: ollama
"""
# The supervisor: every process at once, and started again, as a service manager would.
CHILDREN = (
    "warden",
    "custodian",
    "controller",
    "resolver",
    "relay",
    "inspector",
    "auditor",
    "exporter",
    "api",
)
EVERYBODY = (*CHILDREN, "supervisor")
CONFIG = {"metrics": "127.0.0.1:9464", "api": "127.0.0.1:8000"}
STREAMS = ("tcp4 plain.test 7", "tcp6 plain.test 7", "tcp4 a.search.test 7")
APPROVED = (
    topology.PLAIN4, topology.PLAIN6, topology.DNS4, topology.DNS6, "11.22.33.40", "2a10:5353::40",
)  # fmt: skip
_ALLOWED = (("tcp", "plain.test", 7, "x"), ("tcp", "127.0.0.1", 11434, "GET / HTTP/1.0\r\n\r\n"))
_BACK_WITHIN = 20.0  # seconds after which a fault counts as not mended

_DOORS = [
    (family, kind, str(address), port)
    for family, addresses in (
        (2, (topology.EVIL4, topology.METADATA4, topology.HOST4, topology.OTHER_DNS4)),
        (10, (topology.EVIL6, topology.METADATA6, topology.HOST6, topology.OTHER_DNS6)),
    )
    for address in addresses
    for kind, port in ((1, 443), (2, 53), (1, 7), (2, 443))
]
# Runs inside: tries what is denied, for ever, and says what came through.
_INTRUDER = (
    f"doors, marker = {_DOORS!r}, {MARKER!r}"
    + """
import itertools, json, select, socket, sys
tried, reached = 0, []
print("open", flush=True)
for number, (family, kind, address, port) in enumerate(itertools.cycle(doors)):
    if select.select([0], [], [], 0)[0]:
        if not sys.stdin.readline():
            break
        print(json.dumps([tried, reached]), flush=True)
    tried += 1
    with socket.socket(family, kind) as door:
        door.settimeout(0.05)
        try:
            door.connect((address, port))
            door.send(marker.encode())
            if kind == 1 or door.recv(100):
                reached.append([address, port])
        except OSError:
            pass
    if not number % 16:
        try:
            reached.append(socket.getaddrinfo(marker + ".evil.test", 443)[0][4][0])
        except OSError:
            pass
"""
)


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to whom, and after how many seconds everything worked again; None: it never did."""

    signal: str
    name: str
    back: float | None
    why: str = ""


@dataclass(slots=True)
class Report:
    faults: list[Fault] = field(default_factory=list)
    tried: int = 0  # by who wants out
    reached: list[Any] = field(default_factory=list)
    cut: list[dict[str, Any]] = field(default_factory=list)  # streams
    beats: dict[str, int] = field(default_factory=dict)
    balanced: bool = False
    unbalanced: list[str] = field(default_factory=list)
    recorded: Counter[str] = field(default_factory=Counter)  # events of the journal

    def lines(self) -> list[str]:
        """The table of docs/reliability.md: a row for each kind of fault."""
        rows = ["| fault | times | back after, median | at most |", "|---|---|---|---|"]
        for kind in sorted({(fault.signal, fault.name) for fault in self.faults}):
            found = [f.back for f in self.faults if (f.signal, f.name) == kind]
            seconds = [back for back in found if back is not None]
            worst = "never" if None in found else f"{max(seconds):.2f} s"
            middle = f"{statistics.median(seconds):.2f} s" if seconds else "-"
            rows.append(f"| {kind[0]} of {kind[1]} | {len(found)} | {middle} | {worst} |")
        echoes = ", ".join(f"{flow}: {count}" for flow, count in self.beats.items())
        return [
            *rows,
            "",
            f"{len(self.faults)} faults; {self.tried} attempts to get out, {len(self.reached)} got out;"
            f" {len(self.cut)} streams cut; the books {'balance' if self.balanced else 'DO NOT balance'}",
            f"echoes: {echoes}",
        ]


class Chaos:
    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.daemon, self.random, self.report = daemon, random.Random(seed), Report()
        self.resident = Resident(daemon, timeout=0.5)

    # ---- faults

    def kill(self, name: str) -> None:
        time.sleep(self.random.uniform(0, 0.05))
        began = time.monotonic()
        if name == "supervisor":
            self.daemon.kill()
            self.daemon.start()
        else:
            before = self._pid(name)
            self.daemon.lab.signal(before, signal.SIGKILL)
            self._until(lambda: self.daemon.pids().get(name, before) != before)
        self._mended("SIGKILL", name, began)

    def stop(self, name: str, seconds: float) -> None:
        """For a while: the others go on meanwhile, as far as they do not need this one."""
        stopped = self._pid(name)
        self.daemon.lab.signal(stopped, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            began = time.monotonic()
            if name not in self.daemon.pids() or self.daemon.pids()[name] == stopped:
                self.daemon.lab.signal(stopped, signal.SIGCONT)
        self._mended("SIGSTOP", name, began)

    def _pid(self, name: str) -> int:
        found: int = poll(lambda: self.daemon.pids().get(name), timeout=_BACK_WITHIN, what=name)
        return found

    def _until(self, condition: Any) -> None:
        poll(condition, timeout=_BACK_WITHIN)

    def _mended(self, kind: str, name: str, began: float) -> None:
        why = ""
        try:
            self._until(self.works)
            back: float | None = time.monotonic() - began
        except (LabError, AssertionError) as error:
            back, why = None, str(error)
        self.report.faults.append(Fault(kind, name, back, why))

    def works(self) -> bool:
        """Every process runs, a workspace may be entered, a listed name leads to an answer, and so does a
        local service."""
        try:
            states = {p["state"] for p in self.daemon.ask("status")["processes"]}
        except (EgressdError, OSError, LabError):
            return False
        if states != {"running"}:
            return False
        return all(outcome.result == "ok" for outcome in self.resident.tries(*_ALLOWED))


def run(
    daemon: Daemon, uplink: Capture, *, kills: int, stops: int = 0, seed: int = 1,
    names: Sequence[str] = EVERYBODY, tell: Callable[[Fault], object] = lambda _: None,
) -> Report:  # fmt: skip
    """`kills` and `stops` faults in turn over `names`; `tell` hears of each. The uplink is judged here:
    AssertionError with the frames if anything left that policy forbids. What is to be said of the rest is
    the caller's."""
    chaos = Chaos(daemon, seed)
    report = chaos.report
    intruder = daemon.start_sandbox("acme", ["/usr/bin/python3", "-I", "-c", _INTRUDER])
    with chaos.resident, Chatter(daemon, STREAMS) as chatter:
        poll(lambda: "open\n" in intruder.out, timeout=10, what=f"the intruder begins: {intruder.err}")
        poll(chaos.works, timeout=10)
        for name in _deck(names, kills, chaos.random):
            chaos.kill(name)
            tell(report.faults[-1])
        for name in _deck([name for name in names if name != "supervisor"], stops, chaos.random):
            chaos.stop(name, chaos.random.uniform(0.5, 3.0))
            tell(report.faults[-1])
        report.cut, report.beats = chatter.events(), chatter.beats()
        report.tried, report.reached = _told(intruder)
    intruder.wait(10)
    poll(lambda: not daemon.ask("status")["sandboxes"], timeout=10, what="the sandboxes end")
    counters = daemon.counters("acme")
    report.balanced = counters["balance"]["balanced"]
    report.unbalanced = [str(counters["balance"])] if not report.balanced else []
    report.recorded = _events(daemon)
    uplink.assert_never(MARKER.encode())
    uplink.assert_only_to(*APPROVED)
    return report


def main(count: int) -> int:
    """That many faults, a tenth of them stops; the table. Exit status 1 if anything got out, was cut, did not
    come back, or does not balance."""
    stops = count // 10
    with Lab() as lab:
        start_internet(lab)
        with Daemon(lab, policies={"acme": POLICY}, **CONFIG) as daemon, Capture(lab) as uplink:
            seed, done = random.randrange(1 << 30), itertools.count(1)

            def tell(fault: Fault) -> None:
                back = "NOT BACK" if fault.back is None else f"back after {fault.back:.2f} s"
                print(f"{next(done)}/{count}: {fault.signal} of {fault.name}, {back}", file=sys.stderr)

            report = run(daemon, uplink, kills=count - stops, stops=stops, seed=seed, tell=tell)
    print("\n".join(report.lines()))
    lost = [fault for fault in report.faults if fault.back is None]
    for fault in lost:
        print(f"not mended: {fault}")
    return 1 if report.reached or report.cut or lost or not report.balanced else 0


def _deck(names: Sequence[str], count: int, dice: random.Random) -> list[str]:
    """Everybody equally often, in any order."""
    deck = [names[number % len(names)] for number in range(count)]
    dice.shuffle(deck)
    return deck


def _told(intruder: Any) -> tuple[int, list[Any]]:
    before = len(intruder.out.splitlines())
    intruder.stdin.write(b"?\n")
    poll(lambda: len(intruder.out.splitlines()) > before and intruder.out.endswith("\n"), timeout=10)
    tried, reached = json.loads(intruder.out.splitlines()[-1])
    intruder.stdin.close()
    return tried, reached


def _events(daemon: Daemon) -> Counter[str]:
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return Counter(json.loads(line)["event"] for line in lines)
