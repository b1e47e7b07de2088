"""What a flooding sandbox takes from the one beside it: throughput, connections, answers to questions.

One neighbour measures, by turns alone, beside a process that only burns its processor (in plain bubblewrap,
without a network: an honest neighbour that is as busy), and beside a sandbox of another workspace that
floods with each kind of packet, as fast as one process can send frames. The ratio is against the burner: on
two processors a busy neighbour takes something whatever it does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from bench import scene
from bench.figures import Figure, Report, Sample, interleaved
from integration import inside
from lab import topology
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Lab, Process, poll

__all__ = ["FLOODS", "measure"]

ADDRESS, STRANGER, RESOLVER = "11.22.33.77", "11.22.33.66", "169.254.53.53"
GIGABIT = 1e9 / 8
PAUSE = 0.0015  # seconds after each connection: below the 1,000 in a second that are everybody's bound
# kind of packet -> what it is called, and where it goes; None: the address of the listed name
FLOODS: dict[str, tuple[str, str | None, int]] = {
    "denied": ("udp", STRANGER, 9),
    "syn": ("syn", None, 7002),
    "udp": ("udp", None, 7003),
    "dns": ("dns", RESOLVER, 53),
    "dns_ports": ("udp", RESOLVER, 53),
}
_TARGET = ("at least", 0.9)


def policy(workspace: str, user: int) -> str:
    return (
        f"workspace: {workspace}\nguard: enforce\nmembers: [user:{user}]\nallow:\n"
        "  - {host: bench.test, ports: [7001/tcp, 7002/tcp, 7003/udp], verify: address}\n"
    )


def measure(
    report: Report,
    *,
    given: tuple[Lab, Internet] | None = None,
    rounds: int = 9,
    seconds: float = 0.3,
    connections: int = 200,
    questions: int = 100,
    floods: tuple[str, ...] = tuple(FLOODS),
) -> None:
    with scene.stage(given) as (made, internet):
        internet.set("bench.test", A=[ADDRESS])
        policies = {name: policy(name, made.user) for name in ("good", "bad")}
        with scene.started(made, policies) as daemon, _server(made), _neighbour(daemon) as neighbour:
            with _burner(made) as burner, _flooder(daemon) as flooder:
                beside: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
                    "alone": contextlib.nullcontext,
                    "burner": lambda: burner.busy(do="burn"),
                }
                for name in floods:
                    beside[name] = lambda name=name: flooder.floods(name)  # type: ignore[misc]
                for what, unit, work in (
                    ("throughput", "Gbit/s", lambda: neighbour.stream(seconds)),
                    ("connections", "conn/s", lambda: neighbour.connect(connections)),
                    ("questions", "answers/s", lambda: neighbour.ask(questions)),
                ):
                    found = interleaved(
                        rounds, {name: lambda s=s, w=work: _beside(s, w) for name, s in beside.items()}
                    )
                    _figures(report, what, unit, found, flooder.rates)
            scene.alarms(daemon)


def _beside(
    somebody: Callable[[], contextlib.AbstractContextManager[object]], work: Callable[[], float]
) -> float:
    with somebody():
        return work()


def _figures(
    report: Report, what: str, unit: str, found: dict[str, list[float]], rates: dict[str, list[float]]
) -> None:
    """Higher is better for all three: a latency stands as its reciprocal, one at a time per second."""
    busy = Figure.paired(f"neighbour_{what}_beside_burner", found["burner"], found["alone"], unit)
    report.add(busy)
    for name in (name for name in found if name in FLOODS):
        alone = Sample(tuple(x / y for x, y in zip(found[name], found["alone"], strict=True))).median
        details = {
            "of_alone": round(alone, 3),
            "flood_packets_per_second": round(Sample(tuple(rates[name])).median),
        }
        figure = Figure.paired(
            f"neighbour_{what}_beside_{name}", found[name], found["burner"], unit,
            target=_TARGET, details=details,
        )  # fmt: skip
        report.add(figure)


# ---- who takes part


class _Program:
    """One of the programs in inside/ that answer each line with one."""

    def __init__(self, process: Process) -> None:
        self._process, self._answers = process, 0

    def order(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    def answer(self, timeout: float = 60) -> Any:
        self._answers += 1

        def answered() -> bool:
            if self._process.status() is not None:
                self._process.drain()
                raise RuntimeError(f"a program ended: {self._process.err}")
            return self._process.out.count("\n") >= self._answers

        poll(answered, timeout=timeout, what="an answer")
        return json.loads(self._process.out.splitlines()[self._answers - 1])

    def said(self, word: str) -> None:
        """The one line that is no JSON."""
        poll(lambda: f"{word}\n" in self._process.out, timeout=10, what=f"{word}: {self._process.err}")
        self._answers += 1

    def stop(self) -> None:
        self._process.close()
        self._process.wait()


class Neighbour:
    def __init__(self, client: _Program, asker: _Program) -> None:
        self._client, self._asker = client, asker

    def stream(self, seconds: float) -> float:
        self._client.order(do="stream", seconds=seconds)
        return float(self._client.answer()["rate"]) / GIGABIT

    def connect(self, count: int) -> float:
        """One over the median of how many seconds one takes; slower than a sandbox may open them."""
        self._client.order(do="connect", count=count, pause=PAUSE)
        return float(self._client.answer()["rate"])

    def ask(self, count: int) -> float:
        """One over the median of how many seconds an answer takes."""
        self._asker.order(do="ask", name="bench.test", count=count)
        return 1e3 / Sample(tuple(self._asker.answer())).median


@contextlib.contextmanager
def _neighbour(daemon: Daemon) -> Iterator[Neighbour]:
    programs = []
    for name, words in (("client", ["bench.test"]), ("stormer", [])):
        text = (scene.PROJECT / "bench" / "inside" / f"{name}.py").read_text()
        command = ["/usr/bin/python3", "-I", "-c", text, *words]
        programs.append(_Program(daemon.start_sandbox("good", command)))
    client, asker = programs
    if not client.answer()["address"].startswith("198.18."):
        raise RuntimeError("there is no guard")
    asker.said("ready")
    try:
        yield Neighbour(client, asker)
    finally:
        for program in programs:
            program.stop()


class Busy:
    def __init__(self, program: _Program) -> None:
        self._program = program

    @contextlib.contextmanager
    def busy(self, **order: Any) -> Iterator[list[float]]:
        """Until the end of this; then how many frames it has sent in a second."""
        rate: list[float] = []
        self._program.order(**order)
        self._program.answer()
        try:
            yield rate
        finally:
            self._program.order(do="stop")
            done = self._program.answer()
            rate.append(done["sent"] / done["seconds"])


class Flooder(Busy):
    def __init__(self, program: _Program, source: str, listed: str) -> None:
        super().__init__(program)
        self._source, self._listed = source, listed
        self.rates: dict[str, list[float]] = {name: [] for name in FLOODS}

    @contextlib.contextmanager
    def floods(self, name: str) -> Iterator[None]:
        kind, to, port = FLOODS[name]
        where = [to or self._listed, port]
        order = {"do": kind, "from": self._source, "to": where, "name": "bench.test"}
        with self.busy(**order) as rate:
            yield
        self.rates[name] += rate


def _flooder_text() -> str:
    return (scene.PROJECT / "bench" / "inside" / "flooder.py").read_text()


@contextlib.contextmanager
def _burner(lab: Lab) -> Iterator[Busy]:
    """As somebody would run it without egressd."""
    bwrap = ["bwrap", "--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib"]
    bwrap += ["--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--die-with-parent"]
    words = [*bwrap, "/usr/bin/python3", "-I", "-c", _flooder_text()]
    program = _Program(lab.start(words, uid=lab.user))
    try:
        yield Busy(program)
    finally:
        program.stop()


@contextlib.contextmanager
def _flooder(daemon: Daemon) -> Iterator[Flooder]:
    home = daemon.start_sandbox("bad", ["/bin/sh", "-c", "getent ahostsv4 bench.test; exec sleep 3600"])
    poll(lambda: "198.18." in home.out, timeout=10, what=f"the flooder's sandbox {home.err}")
    (source,) = [s["address4"] for s in daemon.json("status")["sandboxes"] if s["workspace"] == "bad"]
    process = inside.start(daemon, home, "/usr/bin/python3", "-I", "-c", _flooder_text())
    program = _Program(process)
    try:
        yield Flooder(program, source, home.out.split()[0])
    finally:
        program.stop()
        home.kill()
        home.wait()


@contextlib.contextmanager
def _server(lab: Lab) -> Iterator[None]:
    server = lab.start(
        scene.program("server"), where=topology.NET, env=scene.environment(), cwd=str(scene.PROJECT)
    )
    try:
        poll(lambda: "ready\n" in server.out, timeout=10, what=f"a server: {server.err}")
        yield
    finally:
        server.kill()
        server.close()
