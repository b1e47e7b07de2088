"""What the guard costs a stream, a connection, a policy change; and what egressd weighs.

Two workspaces stand side by side: `few` allows one host, `many` ten thousand. A client in a sandbox
of each and one in a bare namespace (bare.py) take turns, so whatever else the machine does hits all three.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bench import memory, revoke, scene
from bench.bare import Wires
from bench.figures import Figure, Report, interleaved
from lab import topology
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Lab, Process, poll

__all__ = ["measure"]

ADDRESS = "11.22.33.77"
GIGABIT = 1e9 / 8
BARE, NAT = Wires("bare"), Wires("nat", nat=True)


def policy(workspace: str, user: int, names: Sequence[str] = ()) -> str:
    lines = [f"  - {{host: {name}, ports: [7/tcp], verify: address}}\n" for name in names]
    return (
        f"workspace: {workspace}\nguard: enforce\nmembers: [user:{user}]\nallow:\n"
        "  - {host: bench.test, ports: [7001/tcp, 7002/tcp], verify: address}\n" + "".join(lines)
    )


def measure(
    report: Report,
    *,
    given: tuple[Lab, Internet] | None = None,
    rounds: int = 9,
    seconds: float = 0.25,
    connections: int = 800,
    hosts: int = 10_000,
    sandboxes: int = 200,
    revocations: int = 25,
) -> None:
    with scene.stage(given) as (made, internet):
        _names(internet)
        policies = {name: policy(name, made.user) for name in ("few", "many")}
        with scene.started(made, policies) as daemon, _wires(made), _clients(daemon) as clients:
            measures = _Measures(clients, rounds, seconds, connections)
            _memory(report, "memory_idle", daemon)
            alone = _throughput(report, measures)
            with _crowd(daemon, sandboxes):
                _memory(report, "memory_200_sandboxes", daemon, sandboxes=sandboxes)
                _flat_sandboxes(report, measures, alone)
            _revocations(report, daemon, revocations)
            _apply(report, daemon, hosts)
            _memory(report, "memory_10k_hosts", daemon, hosts=hosts)
            _quiet(daemon)
            _flat_hosts(report, measures)
            scene.alarms(daemon)


def _names(internet: Internet) -> None:
    internet.set("bench.test", A=[ADDRESS])
    internet.set("*.bench.test", topology.Records({"A": [ADDRESS]}, ttl=3600))


# ---- the clients


class Client:
    """inside/client.py, somewhere."""

    def __init__(self, process: Process) -> None:
        self._process, self._answers = process, 0
        self.address = self._next()["address"]

    def _next(self) -> dict[str, Any]:
        self._answers += 1

        def answered() -> bool:
            if self._process.status() is not None:
                self._process.drain()
                raise RuntimeError(f"a client ended: {self._process.err}")
            return self._process.out.count("\n") >= self._answers

        poll(answered, timeout=30, what="a client's answer")
        found: dict[str, Any] = json.loads(self._process.out.splitlines()[self._answers - 1])
        return found

    def rate(self, **order: Any) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return float(self._next()["rate"])

    def stop(self) -> None:
        self._process.close()
        self._process.wait()


@contextlib.contextmanager
def _clients(daemon: Daemon) -> Iterator[dict[str, Client]]:
    text = (scene.PROJECT / "bench" / "inside" / "client.py").read_text()
    words = ["/usr/bin/python3", "-I", "-c", text]
    lab = daemon.lab
    clients = {
        wires.name: Client(lab.start([*words, wires.server], where=wires.place("box")))
        for wires in (BARE, NAT)
    }
    clients |= {
        "few": Client(daemon.start_sandbox("few", [*words, "bench.test"])),
        "many": Client(daemon.start_sandbox("many", [*words, "bench.test"])),
    }
    for name in ("few", "many"):
        if not clients[name].address.startswith("198.18."):
            raise RuntimeError(f"{clients[name].address} is no synthetic address: there is no guard")
    try:
        yield clients
    finally:
        for client in clients.values():
            client.stop()


@contextlib.contextmanager
def _wires(lab: Lab) -> Iterator[None]:
    """The bare wires, and a server at the end of each way."""
    for wires in (BARE, NAT):
        wires.build(lab)
    servers = [
        lab.start(scene.program("server"), where=where, env=scene.environment(), cwd=str(scene.PROJECT))
        for where in (BARE.place("net"), NAT.place("net"), topology.NET)
    ]
    try:
        for server in servers:
            poll(lambda: "ready\n" in server.out, timeout=10, what=f"a server: {server.err}")  # noqa: B023
        yield
    finally:
        for server in servers:
            server.kill()
            server.close()
        for wires in (BARE, NAT):
            wires.remove(lab)


class _Measures:
    def __init__(self, clients: dict[str, Client], rounds: int, seconds: float, connections: int) -> None:
        self.clients, self.rounds = clients, rounds
        self._seconds, self._connections = seconds, connections

    def streams(self, *names: str) -> dict[str, list[float]]:
        """Gbit/s of each, by turns."""
        return interleaved(self.rounds, {name: lambda name=name: self._stream(name) for name in names})

    def connections(self, *names: str) -> dict[str, list[float]]:
        """Connections per second of each, by turns."""
        return interleaved(self.rounds, {name: lambda name=name: self._connect(name) for name in names})

    def _stream(self, name: str) -> float:
        return self.clients[name].rate(do="stream", seconds=self._seconds) / GIGABIT

    def _connect(self, name: str) -> float:
        return self.clients[name].rate(do="connect", count=self._connections)


# ---- the figures


def _throughput(report: Report, measures: _Measures) -> dict[str, list[float]]:
    """Against the bare wires, and against wires with NAT; returns the parts of the former, for later."""
    streams, connections = measures.streams("bare", "nat", "few"), measures.connections("bare", "nat", "few")
    for name, peer, target in (
        ("datapath_throughput", "bare", ("at least", 0.95)),
        ("datapath_throughput_vs_nat", "nat", None),
    ):
        report.add(Figure.paired(name, streams["few"], streams[peer], "Gbit/s", target=target))
    for name, peer in (("datapath_connections", "bare"), ("datapath_connections_vs_nat", "nat")):
        report.add(Figure.paired(name, connections["few"], connections[peer], "conn/s"))
    return {"streams": _relative(streams), "connections": _relative(connections)}


def _quiet(daemon: Daemon) -> None:
    """Wait until egressd has looked up its new names: that work is not the data path's."""
    pids = daemon.pids().values()
    spent = memory.processor_time(daemon.lab, pids)
    for _ in range(16):
        time.sleep(0.25)
        before, spent = spent, memory.processor_time(daemon.lab, pids)
        if spent - before < 0.05:
            return


def _flat_hosts(report: Report, measures: _Measures) -> None:
    """Ten thousand hosts in one workspace against one host in the other."""
    streams, connections = measures.streams("many", "few"), measures.connections("many", "few")
    for name, found, unit in (
        ("datapath_flat_hosts", streams, "Gbit/s"),
        ("datapath_flat_hosts_connections", connections, "conn/s"),
    ):
        report.add(Figure.paired(name, found["many"], found["few"], unit, target=("at least", 0.9)))


def _relative(found: dict[str, list[float]]) -> list[float]:
    return [few / wires for few, wires in zip(found["few"], found["bare"], strict=True)]


def _flat_sandboxes(report: Report, measures: _Measures, alone: dict[str, list[float]]) -> None:
    """With the crowd against without, each as a part of what the bare wires gave in the same moments."""
    for name, found, before in (
        ("datapath_flat_sandboxes", measures.streams("bare", "few"), alone["streams"]),
        ("datapath_flat_sandboxes_connections", measures.connections("bare", "few"), alone["connections"]),
    ):
        report.add(Figure.paired(name, _relative(found), before, "of-bare", target=("at least", 0.9)))


def _apply(report: Report, daemon: Daemon, hosts: int) -> None:
    """From the request to the answer, the kernel's batch included; from one host to many and back."""
    names = [f"h{number:05d}.bench.test" for number in range(hosts)]
    few, many = policy("many", daemon.lab.user), policy("many", daemon.lab.user, names)
    more, less = [], []
    with revoke.Applier(daemon) as applier:
        for turn in range(3):
            daemon.write_policy("many", many if turn % 2 == 0 else few)
            (more if turn % 2 == 0 else less).append(applier.apply())
    details = {"hosts": hosts, "back_to_one_host_ms": [round(value, 1) for value in less]}
    report.add(Figure.alone("policy_apply_10k_hosts", more, "ms", details=details))


@contextlib.contextmanager
def _crowd(daemon: Daemon, count: int) -> Iterator[None]:
    crowd = daemon.lab.start(
        scene.program("crowd", daemon.run_dir, "few", str(count)),
        uid=daemon.lab.user,
        env=scene.environment(),
        cwd=str(scene.PROJECT),
    )

    def opened() -> bool:
        if crowd.status() is not None:
            raise RuntimeError(f"the crowd ended: {crowd.err}\n{daemon.log}")
        return "open\n" in crowd.out

    poll(opened, timeout=60, what="the crowd")
    try:
        yield
    finally:
        crowd.close()
        crowd.wait(60)


def _revocations(report: Report, daemon: Daemon, count: int) -> None:
    names = [f"r{number:05d}.bench.test" for number in range(count)]
    user = daemon.lab.user
    daemon.write_policy("few", policy("few", user, names))
    with revoke.Applier(daemon) as applier:
        applier.apply()
    found = revoke.cuts(daemon, names=names, policy=lambda left: policy("few", user, left))
    commits = [cut.from_commit for cut in found]
    report.add(Figure.alone("revoke_to_reset_p99", commits, "ms", of="p99"))
    requests = [cut.from_request for cut in found]
    report.add(Figure.alone("revoke_request_to_reset_p99", requests, "ms", of="p99"))


def _memory(report: Report, name: str, daemon: Daemon, **details: Any) -> None:
    """Of egressd's own processes; sandboxes and their callers are not counted."""
    found = {process: memory.pss(daemon.lab, [pid]) for process, pid in daemon.pids().items()}
    each = {process: round(size, 1) for process, size in found.items()}
    details |= {"of": "PSS of egressd's processes", "each": each}
    report.add(Figure(name, sum(found.values()), "MiB", details=details))
