"""A thousand sandboxes at once: spawned, used, ended, and again; with nothing left of them each time.

What is measured is one more spawn while they stand against one more while a single one stands, both of them
several times in each round; and each beside bubblewrap alone in the same moments: the machine does other
things, and is slower with thousands of processes. Names of figures say how many stood. The sandboxes are
real ones (`sandbox.launch`), of one user, held by a few forked processes (inside/multitude.py): so memory
is what a sandbox costs and not what an interpreter costs.

A round that leaves anything behind (a link, an nft object, a connection, a descriptor, a process, a file), or
whose requests are not exact in the books, ends the benchmark: its figures would be of something broken.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench import first, memory, scene
from bench.figures import Figure, Report
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Lab, Process, poll

__all__ = ["Crowd", "Left", "check_books", "measure", "policy", "quiet", "settled"]

POLICY = """\
workspace: acme
guard: enforce
members: ["user:{uid}"]
allow:
  - {{host: plain.test, ports: [7/tcp], verify: address}}
  - local: ollama
"""
HOST = "plain.test"
ALLOWED, DENIED = f"{HOST} 7", "11.22.33.200 7"
_PATIENCE = 600.0  # seconds for one order to all of them
_GONE_WITHIN = 60.0  # seconds after the last has ended, on a busy machine
_MEMORY = ("AnonPages", "Slab", "SUnreclaim", "PageTables", "KernelStack", "Percpu")  # of /proc/meminfo


def policy(user: int) -> str:
    return POLICY.format(uid=user)


def measure(
    report: Report,
    *,
    given: tuple[Lab, Internet] | None = None,
    sandboxes: int = 1000,
    rounds: int = 3,
    probes: int = 25,
    apart: int = 20,
    hands: int = 16,
) -> None:
    """`apart`: how many are held by `egressctl run` instead, to see what that adds."""
    with scene.stage(given) as (made, _), scene.started(made, {"acme": policy(made.user)}) as daemon:
        with Crowd.started(daemon, hands=hands) as crowd:
            found = [_round(daemon, crowd, sandboxes, probes, number) for number in range(rounds)]
        one = _held_apart(daemon, apart)
        alarms = scene.alarms(daemon)
    _tell(report, found, sandboxes, one, alarms)


# ---- the crowd


class Crowd:
    """inside/multitude.py, in the lab, as the lab's user."""

    def __init__(self, process: Process, daemon: Daemon) -> None:
        self._process, self._daemon, self._answers = process, daemon, 0
        self._next()  # ready

    @classmethod
    @contextlib.contextmanager
    def started(cls, daemon: Daemon, *, hands: int) -> Iterator[Crowd]:
        with scene.shared_directory() as files:
            orders = {
                "run_dir": daemon.run_dir,
                "workspace": "acme",
                "files": str(files),
                "first": first.command(files, seen_as="/work"),
                "outside": first.command(files, seen_as=str(files)),
                "hands": hands,
                "allowed": ALLOWED,
                "denied": DENIED,
            }
            process = daemon.lab.start(
                scene.program("multitude", json.dumps(orders)),
                uid=daemon.lab.user,
                env=scene.environment(),
                cwd=str(scene.PROJECT),
            )
            try:
                yield cls(process, daemon)
            finally:
                process.close()
                process.wait(_PATIENCE)

    def tell(self, do: str, **order: Any) -> dict[str, Any]:
        """One order and its answer. RuntimeError if it could not be done."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
        answer = self._next()
        if "problem" in answer:
            raise RuntimeError(f"{do}: {answer['problem']}\n{self._daemon.log[-4000:]}")
        return answer

    def _next(self) -> dict[str, Any]:
        self._answers += 1

        def answered() -> bool:
            if self._process.status() is not None:
                self._process.drain()
                raise RuntimeError(f"the crowd ended: {self._process.err}\n{self._daemon.log[-4000:]}")
            time.sleep(0.05)  # who waits must not be what is measured
            return bool(self._process.out.count("\n") >= self._answers)

        poll(answered, timeout=_PATIENCE, what="the crowd's answer")
        found: dict[str, Any] = json.loads(self._process.out.splitlines()[self._answers - 1])
        return found


# ---- what is left


@dataclass(frozen=True)
class Left:
    """What exists when no sandbox does. Equal from round to round."""

    links: tuple[str, ...]
    rules: dict[str, int]  # nft objects by sort, and elements
    namespaces: int  # that the gateway's kernel has numbers for
    connections: int  # that the gateway tracks
    processes: int
    descriptors: dict[str, int]
    files: tuple[str, ...]  # of the run directory

    @classmethod
    def now(cls, daemon: Daemon, pids: dict[str, int]) -> Left:
        lab, where = daemon.lab, daemon.gateway
        counted = lab.run(["cat", "/proc/sys/net/netfilter/nf_conntrack_count"], where=where).check().out
        numbers = lab.run(["ip", "netns", "list-id"], where=where).check().out
        root = Path(f"/proc/{lab.keeper_pid}/root")
        run_dir = root / daemon.run_dir.lstrip("/")
        return cls(
            links=tuple(daemon.sandbox_links()),
            rules=_rules(json.loads(lab.run(["nft", "-j", "list", "ruleset"], where=where).check().out)),
            namespaces=len(numbers.splitlines()),
            connections=int(counted),
            processes=len(lab.processes()),
            descriptors={
                name: len(list((root / f"proc/{pid}/fd").iterdir())) for name, pid in sorted(pids.items())
            },
            files=tuple(sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))),
        )

    def beyond(self, before: Left) -> list[str]:
        """What is there now and was not, or the other way round."""
        names = [field.name for field in fields(self)]
        pairs = [(name, getattr(before, name), getattr(self, name)) for name in names]
        # what the resolver has asked is tracked for half a minute, whoever wanted to know; the kernel takes
        # namespaces away when it finds the time
        return [
            f"{name}: {now}, was {was}"
            for name, was, now in pairs
            if now != was and not (name in ("connections", "namespaces") and now < was)
        ]


def _rules(listing: dict[str, Any]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for entry in listing["nftables"]:
        for sort, body in entry.items():
            found[sort] += 1
            found["elements"] += len(body.get("elem", ())) if sort in ("set", "map") else 0
    return dict(found)


def settled(daemon: Daemon, pids: dict[str, int], before: Left) -> None:
    """RuntimeError if what a crowd left does not go away."""
    deadline = time.monotonic() + _GONE_WITHIN
    while rest := Left.now(daemon, pids).beyond(before):
        if time.monotonic() > deadline:
            raise RuntimeError("left behind:\n  " + "\n  ".join(rest))
        time.sleep(0.2)


def check_books(before: dict[str, Any], after: dict[str, Any], count: int) -> int:
    """`counters` of the workspace before and after `count` sandboxes asked once each for what is allowed and
    once for what is not. How many denied packets were something else (a late answer of the resolver, to which
    the kernel in the sandbox says that nobody waits any more). RuntimeError if a number is wrong."""
    opened = _host(after)["connections"] - _host(before)["connections"]
    links = after["links"]
    denied = sum(link["denied"][0] for link in links)
    total = after["denied"]["unlisted"][0] - before["denied"]["unlisted"][0]
    wrong = []
    if len(links) != count:
        wrong.append(f"{len(links)} links are in the books")
    if opened != count:
        wrong.append(f"{opened} connections were opened to {_host(after)['host']}")
    if silent := [link["link"] for link in links if link["denied"][0] < 1 or link["ok"][0] < 1]:
        wrong.append(f"nothing was denied, or nothing admitted, to {silent[:5]}")
    if denied != total:
        wrong.append(f"{denied} packets were denied by links, {total} in all")
    if wrong:
        raise RuntimeError(f"of {count} sandboxes: " + "; ".join(wrong))
    return int(denied - count)


def _host(workspace: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(h for h in workspace["hosts"] if h["host"] == HOST)
    return found


def _books(daemon: Daemon) -> dict[str, Any]:
    document = daemon.ask("counters", workspace="acme")
    if not document["balanced"]:
        raise RuntimeError(f"the books do not balance: {document['differences']}")
    found: dict[str, Any] = document["workspaces"][0]
    return found


# ---- a round


@dataclass(frozen=True)
class _Round:
    with_one: dict[str, list[float]]  # milliseconds, by who spawned
    with_all: dict[str, list[float]]
    spawned: dict[str, Any]
    asked: float  # seconds
    stray: int
    ended: dict[str, Any]
    gone: float  # seconds from the word to the last link's end
    memory: dict[str, float]  # KiB of a sandbox
    daemon: dict[str, float]  # MiB of each process, with all of them
    idle: dict[str, float]  # the same, with none
    records: float  # of the journal, for each sandbox


def _round(daemon: Daemon, crowd: Crowd, count: int, probes: int, number: int) -> _Round:
    if number == 0:  # what is made once, is made now
        crowd.tell("spawn", count=2)
        crowd.tell("ask")
        crowd.tell("end")
        poll(lambda: not daemon.sandbox_links(), timeout=_GONE_WITHIN, what="the first links go")
    pids = daemon.pids()
    before, records = quiet(daemon, pids), _records(daemon)
    crowd.tell("spawn", count=1)
    with_one = crowd.tell("probe", count=probes)
    free, kinds, books = _available(), _kinds(), _books(daemon)
    spawned = crowd.tell("spawn", count=count - 1)
    taken = {"all": (free - _available()) / (count - 1)}
    taken |= {name: (size - kinds[name]) / (count - 1) for name, size in _kinds().items()}
    with_all = crowd.tell("probe", count=probes)
    weight = _weights(daemon, pids)
    asked = crowd.tell("ask")
    if asked["answers"] != {"yes no": count}:
        raise RuntimeError(f"allowed and denied were answered {asked['answers']}")
    stray = check_books(books, _books(daemon), count)
    began = time.monotonic()
    ended = crowd.tell("end")
    poll(lambda: not daemon.sandbox_links(), timeout=_GONE_WITHIN, what="the last link goes")
    gone = time.monotonic() - began
    settled(daemon, pids, before)
    made = count + 2 * probes  # sandboxes; bubblewrap's own are none of egressd's
    return _Round(
        with_one=with_one, with_all=with_all, spawned=spawned, asked=asked["seconds"], stray=stray,
        ended=ended, gone=gone, memory=taken, daemon=weight, idle=_weights(daemon, pids),
        records=(_records(daemon) - records) / made,
    )  # fmt: skip


def quiet(daemon: Daemon, pids: dict[str, int]) -> Left:
    """As it is when nothing changes any more."""
    found = [Left.now(daemon, pids) for _ in range(2)]

    def same() -> bool:
        time.sleep(0.5)
        found.append(Left.now(daemon, pids))
        return found[-1] == found[-2] == found[-3] and not found[-1].links

    poll(same, timeout=_GONE_WITHIN, what="nothing changes any more")
    return found[-1]


def _records(daemon: Daemon) -> int:
    return int(daemon.ask("status")["journal"]["records"])


def _available() -> int:
    """KiB that the machine could still give."""
    return _meminfo()["MemAvailable"]


def _kinds() -> dict[str, int]:
    found = _meminfo()
    return {name: found[name] for name in _MEMORY if name in found}


def _meminfo() -> dict[str, int]:
    lines = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(rest.split()[0]) for name, _, rest in lines}


def _weights(daemon: Daemon, pids: dict[str, int]) -> dict[str, float]:
    return {name: memory.pss(daemon.lab, [pid]) for name, pid in sorted(pids.items())}


def _held_apart(daemon: Daemon, count: int) -> dict[str, float]:
    """KiB (PSS) of a sandbox that `egressctl run` holds, its processes all together, and of that process."""
    lab = daemon.lab
    held = [daemon.start_sandbox("acme", ["sleep", "infinity"]) for _ in range(count)]
    poll(lambda: len(daemon.sandbox_links()) == count, timeout=_PATIENCE, what="egressctl run")
    time.sleep(0.5)  # the last one's command begins
    holders = [process.pid for process in held]
    below = [child.pid for pid in holders for child in lab.descendants(pid)]
    own, all_ = memory.pss(lab, holders), memory.pss(lab, [*holders, *below])
    for process in held:
        process.signal(15)
    for process in held:
        process.wait(_PATIENCE)
    poll(lambda: not daemon.sandbox_links(), timeout=_GONE_WITHIN, what="egressctl run ends")
    return {"kib": 1024 * all_ / count, "holder": 1024 * own / count, "count": count}


# ---- the figures


def _tell(
    report: Report, found: list[_Round], count: int, apart: dict[str, float], alarms: list[str]
) -> None:
    with_one = [statistics.median(each.with_one["egressd"]) for each in found]
    with_all = [statistics.median(each.with_all["egressd"]) for each in found]
    beside = {
        "standing": count,
        "bwrap_ms": {
            "with_one": _medians(found, "with_one"), "with_all": _medians(found, "with_all")
        },
        "ratio_to_bwrap": {
            "with_one": _relative(found, "with_one"), "with_all": _relative(found, "with_all")
        },
        "alarms": alarms,
    }  # fmt: skip
    report.add(
        Figure.paired(
            f"scale_spawn_p50_at_{count}_vs_1",
            with_all,
            with_one,
            "ms",
            target=("at most", 2.0),
            details=beside,
        )
    )
    times = [_relative(found, when) for when in ("with_all", "with_one")]
    report.add(Figure.paired(f"scale_spawn_beside_bwrap_at_{count}_vs_1", *times, "times bwrap"))
    every = [value for each in found for value in each.with_all["egressd"]]
    report.add(Figure.alone(f"scale_spawn_p99_at_{count}", every, "ms", of="p99"))
    rates = [len(each.spawned["ms"]) / each.spawned["seconds"] for each in found]
    report.add(Figure.alone("scale_spawn_rate", rates, "sandboxes/s"))
    ends = {"each_ms": [round(statistics.median(each.ended["ms"]), 2) for each in found]}
    report.add(Figure.alone("scale_teardown", [each.gone for each in found], "s", details=ends))
    asked = {"sandboxes": count, "exact": True, "denied_besides": [each.stray for each in found]}
    report.add(Figure.alone("scale_requests_at_once", [each.asked for each in found], "s", details=asked))
    _tell_memory(report, found, count, apart)


def _tell_memory(report: Report, found: list[_Round], count: int, apart: dict[str, float]) -> None:
    kinds = {name: [round(each.memory[name]) for each in found] for name in found[0].memory}
    taken = [each.memory["all"] for each in found]
    report.add(Figure.alone("scale_memory_per_sandbox", taken, "KiB", details={"of_it_by_kind": kinds}))
    kernel = [each.memory["Slab"] + each.memory["KernelStack"] + each.memory["PageTables"] for each in found]
    report.add(Figure.alone("scale_memory_kernel_per_sandbox", kernel, "KiB"))
    details = {"of": "PSS of its processes", "held": apart["count"], "holder_kib": round(apart["holder"])}
    report.add(Figure("scale_memory_egressctl_run", apart["kib"], "KiB", details=details))
    grown = [1024 * (sum(each.daemon.values()) - sum(found[0].idle.values())) / count for each in found]
    each_of = {name: [round(each.daemon[name], 1) for each in found] for name in found[0].daemon}
    report.add(Figure.alone("scale_memory_daemon_per_sandbox", grown, "KiB", details={"mib": each_of}))
    idle = [sum(each.idle.values()) for each in found]
    flat = {"mib_after_each_round": [round(value, 1) for value in idle]}
    report.add(Figure("scale_memory_growth_by_rounds", idle[-1] / idle[0], "times", details=flat))
    records = [round(each.records, 3) for each in found]
    report.add(Figure("scale_journal_records_per_sandbox", records[-1], "records", details={"each": records}))


def _medians(found: list[_Round], when: str) -> list[float]:
    return [round(statistics.median(getattr(each, when)["bwrap"]), 3) for each in found]


def _relative(found: list[_Round], when: str) -> list[float]:
    """What a spawn took, as so many times what bubblewrap alone took in the same moments."""
    pairs = ((getattr(each, when)["egressd"], getattr(each, when)["bwrap"]) for each in found)
    return [round(statistics.median(a / b for a, b in zip(*pair, strict=True)), 3) for pair in pairs]
