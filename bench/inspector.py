"""What it costs that a name is read before a byte goes out: the inspector against the kernel's own path, and
against nginx and haproxy, which read names for a living.

Two places. In the lab egressd runs whole, and one host is allowed on two ports: one verified (443/tls in
other words), one by address, which the kernel forwards alone. One client talks to both by turns. In a
smaller place (tests/processes/inspector_lab.py) the inspector stands alone between three namespaces, and
nginx and haproxy beside it in the same one, each on one core: what they do is the same, but that they are
called by their own address, where the inspector is steered to and must find out who calls.

How many connections a second one core carries is counted in the *process's own processor time*, the
kernel's work for it included (utime and stime), because client and server need a core, too, and are no
faster. What the clock said is in the details.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import scene
from bench.figures import Figure, Report, interleaved, percentile
from lab import topology
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Lab, Process, poll
from tls import record

__all__ = ["against_peers", "against_the_kernel", "measure"]

HOST, ADDRESS = record.NAME, "11.22.33.77"
VERIFIED, PLAIN = 7101, 7102
GIGABIT = 1e9 / 8
_POLICY = """\
workspace: few
guard: enforce
members: [user:{user}]
allow:
  - {{host: {host}, ports: [{verified}/tls]}}
  - {{host: {host}, ports: [{plain}/tcp], verify: address}}
"""


def _hello() -> bytes:
    """What curl sends, recorded: 517 bytes, as most clients' without post-quantum shares."""
    return record.load(record.CORPUS / "curl.hex")[1]


def _record(kind: int, body: bytes) -> bytes:
    message = bytes([kind]) + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack("!H", len(message)) + message


ANSWER = _record(2, b"\x03\x03" + bytes(range(32)) + b"\x20" + bytes(32) + b"\x13\x01\x00" + bytes(46))


def measure(
    report: Report,
    *,
    given: tuple[Lab, Internet] | None = None,
    rounds: int = 9,
    seconds: float = 0.4,
    connections: int = 150,
    flood: int = 2000,
    idle: int = 1000,
) -> None:
    with scene.stage(given) as (lab, internet):
        internet.set(HOST, A=[ADDRESS])
        against_the_kernel(report, lab, rounds=rounds, seconds=seconds, connections=connections)
    against_peers(report, rounds=rounds, flood=flood, idle=idle)


# ---- clients


class Greeter:
    """inside/greeter.py, somewhere: `say` writes to it, `hear` gives its next line."""

    def __init__(self, say: Callable[[bytes], object], hear: Callable[[], str]) -> None:
        self._say, self._hear = say, hear

    def ask(self, do: str, port: int = 0, *, host: str = HOST, **order: Any) -> Any:
        to = {"to": [host, port]} if port else {}
        self._say(json.dumps({"do": do, **to, **order}).encode() + b"\n")
        return json.loads(self._hear())


def _words(hello: bytes) -> list[str]:
    text = (scene.PROJECT / "bench" / "inside" / "greeter.py").read_text()
    return ["/usr/bin/python3", "-I", "-c", text, hello.hex(), str(len(ANSWER))]


def _server(hello: bytes, *ports: int) -> list[str]:
    return scene.program("greeted", hello.hex(), ANSWER.hex(), *map(str, ports))


# ---- in the lab, against the kernel's path


def against_the_kernel(report: Report, lab: Lab, *, rounds: int, seconds: float, connections: int) -> None:
    hello = _hello()
    policy = _POLICY.format(user=lab.user, host=HOST, verified=VERIFIED, plain=PLAIN)
    with scene.started(lab, {"few": policy}) as daemon, _lab_server(lab, hello):
        client = daemon.start_sandbox("few", _words(hello))
        try:
            greeter = Greeter(*_pipes(client))
            _throughput(report, greeter, rounds, seconds)
            _overhead(report, greeter, rounds, connections)
        finally:
            client.close()
            client.wait()
        scene.alarms(daemon)
        _really_inspected(daemon)


@contextlib.contextmanager
def _lab_server(lab: Lab, hello: bytes) -> Iterator[None]:
    words = _server(hello, VERIFIED, PLAIN)
    server = lab.start(words, where=topology.NET, env=scene.environment(), cwd=str(scene.PROJECT))
    try:
        poll(lambda: "ready\n" in server.out, timeout=10, what=f"the server: {server.err}")
        yield
    finally:
        server.kill()
        server.close()


def _pipes(process: Process) -> tuple[Callable[[bytes], object], Callable[[], str]]:
    assert process.stdin is not None
    answers = 0

    def hear() -> str:
        nonlocal answers
        answers += 1

        def answered() -> bool:
            if process.status() is not None:
                process.drain()
                raise RuntimeError(f"the client ended: {process.err}")
            return process.out.count("\n") >= answers

        poll(answered, timeout=60, what="the client's answer")
        return process.out.splitlines()[answers - 1]

    return process.stdin.write, hear


def _by_turns(rounds: int, measure: Callable[[int], Any]) -> dict[str, list[Any]]:
    return interleaved(rounds, {"verified": lambda: measure(VERIFIED), "plain": lambda: measure(PLAIN)})


def _throughput(report: Report, greeter: Greeter, rounds: int, seconds: float) -> None:
    for streams, suffix, target in ((1, "", ("at least", 0.75)), (8, "_8_streams", None)):
        found = _by_turns(
            rounds,
            lambda port, streams=streams: (  # type: ignore[misc]
                greeter.ask("stream", port, seconds=seconds, streams=streams) / GIGABIT
            ),
        )
        name = f"inspector_throughput_vs_kernel_path{suffix}"
        report.add(Figure.paired(name, found["verified"], found["plain"], "Gbit/s", target=target))


def _overhead(report: Report, greeter: Greeter, rounds: int, count: int) -> None:
    """From connect() until the server's first byte has come, the hello sent in between."""
    found = _by_turns(rounds, lambda port: greeter.ask("connect", port, count=count))
    for percent in (50, 99):
        ours, theirs = (
            [percentile(times, percent) * 1e3 for times in found[name]] for name in ("verified", "plain")
        )
        more = sorted(a - b for a, b in zip(ours, theirs, strict=True))
        details = {"overhead_ms": round(more[len(more) // 2], 4), "connections_each": count}
        report.add(
            Figure.paired(f"inspector_connect_overhead_p{percent}", ours, theirs, "ms", details=details)
        )


def _really_inspected(daemon: Daemon) -> None:
    """Otherwise the figures would be of two equal ways."""
    hosts = json.dumps(daemon.json("counters"))
    if HOST not in hosts:
        raise RuntimeError(f"nothing was counted for {HOST}: {hosts}")


# ---- alone, against nginx and haproxy

_NGINX = """\
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; master_process off; pid {directory}/nginx.pid; error_log stderr warn;
events {{ worker_connections 8192; }}
stream {{
  access_log off;
  map $ssl_preread_server_name $site {{ {host} {server}; }}
  server {{
    listen {address}:{port} backlog=4096;
    ssl_preread on; preread_timeout 10s; proxy_timeout 2h;
    proxy_pass $site;
  }}
}}
"""
_HAPROXY = """\
global
  nbthread 1
  maxconn 8192
defaults
  mode tcp
  timeout connect 10s
  timeout client 2h
  timeout server 2h
frontend in
  bind {address}:{port} backlog 4096
  tcp-request inspect-delay 10s
  tcp-request content accept if {{ req.ssl_sni -m str -i {host} }}
  tcp-request content reject
  default_backend out
backend out
  server s {server}
"""
_GATEWAY = "169.254.53.53"
_PEERS = {"nginx": ("/usr/sbin/nginx", _NGINX, 7201), "haproxy": ("/usr/sbin/haproxy", _HAPROXY, 7202)}


@dataclass(frozen=True)
class Proxy:
    """One that reads names: where it is called, and the process."""

    pid: int
    host: str
    port: int
    sources: tuple[str, ...]

    def spent(self) -> float:
        """Seconds of processor time, to the nanosecond (Documentation/scheduler/sched-stats.rst)."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory(self) -> float:
        """MiB, proportional (bench/memory.py)."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def against_peers(report: Report, *, rounds: int, flood: int, idle: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(_world())
        proxies = {"ours": stack.enter_context(_ours(world))}
        proxies |= {name: stack.enter_context(_peer(world, name)) for name in _PEERS if _installed(name)}
        for proxy in proxies.values():
            os.sched_setaffinity(proxy.pid, {cores[0]})
        greeter = stack.enter_context(_outside(world, {cores[-1]}))
        _flood(report, greeter, proxies, rounds, flood)
        _idle(report, greeter, proxies, idle)


def _installed(name: str) -> bool:
    return shutil.which(_PEERS[name][0]) is not None


@contextlib.contextmanager
def _world() -> Iterator[Any]:
    # The tests' own labs import one another by their bare names, as pytest has them.
    sys.path.insert(0, str(scene.PROJECT / "tests" / "processes"))
    import inspector_lab

    world = inspector_lab.World()
    try:
        for namespace in world.made:
            for setting in ("tcp_tw_reuse=1", "ip_local_port_range=10000 65000"):
                words = ("ip", "netns", "exec", namespace.name, "sysctl", "-qw", f"net.ipv4.{setting}")
                subprocess.run(words, check=True)
        # everything else is steered
        rule = f"insert rule inet t c ip daddr {_GATEWAY} accept"
        subprocess.run(("ip", "netns", "exec", world.gateway.name, "nft", rule), check=True)
        yield world
    finally:
        world.remove()


@contextlib.contextmanager
def _ours(world: Any) -> Iterator[Proxy]:
    import inspector_lab
    import relay_lab

    inspector = inspector_lab.Inspector(world, descriptors=_descriptors()).ready()
    try:
        inspector.bind()
        inspector.bind(link=8, source4=relay_lab.OTHER4, source6=relay_lab.OTHER6)
        inspector.sites(inspector_lab.site(HOST, port=VERIFIED))
        sources = (relay_lab.SOURCE4, relay_lab.OTHER4)
        yield Proxy(inspector.process.pid, inspector_lab.slot_address(0, v6=False), VERIFIED, sources)
    finally:
        inspector.kill()


@contextlib.contextmanager
def _peer(world: Any, name: str) -> Iterator[Proxy]:
    import inspector_lab
    import relay_lab

    program, text, port = _PEERS[name]
    server = f"{inspector_lab.slot_address(0, v6=False)}:{VERIFIED}"
    with tempfile.TemporaryDirectory(prefix="egressd-bench-", dir="/tmp") as directory:
        path = Path(directory) / "configuration"
        path.write_text(
            text.format(directory=directory, host=HOST, server=server, address=_GATEWAY, port=port)
        )
        words = [program, "-c", str(path)] if name == "nginx" else [program, "-db", "-f", str(path)]
        with _running(world.gateway, words) as process:
            listening = ("ip", "netns", "exec", world.gateway.name, "ss", "-Hltn", f"sport = :{port}")
            poll(
                lambda: process.poll() is not None or subprocess.check_output(listening),
                timeout=10,
                what=f"{name} listens",
            )
            if process.poll() is not None:
                raise RuntimeError(f"{name} did not start")
            yield Proxy(process.pid, _GATEWAY, port, (relay_lab.SOURCE4, relay_lab.OTHER4))


def _descriptors() -> int:
    """As many as we may give."""
    return min(32_768, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


@contextlib.contextmanager
def _running(namespace: Any, words: list[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    limit = _descriptors()
    inside = ["ip", "netns", "exec", namespace.name, "prlimit", f"--nofile={limit}:{limit}", *words]
    process = subprocess.Popen(inside, **more)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def _outside(world: Any, cores: set[int]) -> Iterator[Greeter]:
    """A client in the sandbox's place, and the server in the world's, both on this core."""
    hello = _hello()
    pipes: Mapping[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    more = {"env": scene.environment(), "cwd": str(scene.PROJECT), **pipes}
    with (
        _running(world.host, _server(hello, VERIFIED), **more) as server,
        _running(world.sandbox, _words(hello), **pipes) as client,
    ):
        assert server.stdout is not None and client.stdin is not None and client.stdout is not None
        if server.stdout.readline() != b"ready\n":
            raise RuntimeError("the server did not start")
        for process in (server, client):
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cores)
        stdin, stdout = client.stdin, client.stdout

        def say(data: bytes) -> None:
            stdin.write(data)
            stdin.flush()

        def hear() -> str:
            line = stdout.readline()
            if not line:
                raise RuntimeError("the client ended; see above")
            return line.decode()

        yield Greeter(say, hear)


def _flood(report: Report, greeter: Greeter, proxies: dict[str, Proxy], rounds: int, count: int) -> None:
    clock: dict[str, list[float]] = {name: [] for name in proxies}

    def rate(name: str) -> float:
        proxy = proxies[name]
        before = proxy.spent()
        clock[name].append(greeter.ask("flood", proxy.port, host=proxy.host, count=count, at_once=64))
        time.sleep(0.02)  # the account is written when the process leaves its core
        return count / (proxy.spent() - before)

    for name in proxies:
        rate(name)  # warm
    found = interleaved(rounds, {name: lambda name=name: rate(name) for name in proxies})  # type: ignore[misc]
    for name in proxies:
        clock[name] = sorted(clock[name][1:])
    seen = {f"{name}_by_the_clock": round(values[len(values) // 2]) for name, values in clock.items()}
    for name in [name for name in proxies if name != "ours"]:
        report.add(
            Figure.paired(
                f"inspector_connections_per_s_vs_{name}", found["ours"], found[name], "conn/s",
                target=("at least", 0.5), details=seen,
            )
        )  # fmt: skip
    if len(proxies) == 1:
        report.add(Figure.alone("inspector_connections_per_s", found["ours"], "conn/s", details=seen))


def _idle(report: Report, greeter: Greeter, proxies: dict[str, Proxy], count: int) -> None:
    """What a thousand silent connections take. The sockets' own memory is the kernel's, and not in it."""
    grown = {}
    for name, proxy in proxies.items():
        before = proxy.memory()
        held = greeter.ask("hold", proxy.port, host=proxy.host, sources=proxy.sources, count=count)
        if held != count:
            raise RuntimeError(f"{name} held {held} connections of {count}")
        grown[name] = (proxy.memory() - before) * 1000 / count
        greeter.ask("drop")
    for name in [name for name in proxies if name != "ours"] or ["ours"]:
        # a peer that has taken all it needs before the first connection is no denominator
        theirs = grown[name] if name != "ours" and grown[name] > 0 else None
        report.add(
            Figure(
                f"inspector_memory_1000_idle_vs_{name}", grown["ours"], "MiB", theirs, details={"held": count}
            )
        )
