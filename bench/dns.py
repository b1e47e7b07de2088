"""How fast names are answered: dnsperf against the real resolver, unbound and dnsmasq, by turns.

Every server has one core and one thread, dnsperf has the other core. Each answers over the loopback of a
namespace of its own, so that wires and guards, which are the same for all, are left out. dnsperf sends as
fast as it is answered, at most 100 questions under way; the latency is measured at the same
moderate rate for all, because at full speed it is nothing but the rate turned over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import nameservers, scene
from bench.figures import Figure, Report, Sample, interleaved, percentile
from bench.nameservers import DENIED, Place
from egressd.ruleset.layout import RESOLVER4
from lab import topology
from lab.internet import Internet
from lab.machine import Lab, poll

__all__ = ["Run", "measure", "run"]

_ADDRESS = "11.22.33.77"
_LATENCY_RATE = 5_000  # questions per second, for the p99


@dataclass(frozen=True)
class Run:
    """What dnsperf saw."""

    rate: float  # answers per second
    lost: int
    codes: dict[str, int]
    latencies: tuple[float, ...]  # microseconds, in verbose runs
    processor: float  # microseconds of the server's core per answer


def measure(
    report: Report,
    *,
    rounds: int = 7,
    seconds: float = 1.0,
    names: int = 1000,
    many: int = 100_000,
    fresh: int = 40,
    given: tuple[Lab, Internet] | None = None,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    server, client = {cores[0]}, {cores[-1]}
    listed = nameservers.listed(names)
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(nameservers.ours(listed, cores=server))]
        places += [
            stack.enter_context(start(listed, cores=server))
            for name, start in (("unbound", nameservers.unbound), ("dnsmasq", nameservers.dnsmasq))
            if shutil.which(name)
        ]
        bench = _Bench(places, stack.enter_context(_files()), client, rounds, seconds)
        bench.hot(report, listed)
        bench.denied(report, names)
        bench.latency(report, listed)
        bench.neighbour(report, listed[0])
        bench.memory(report, many)
    _wildcards(report, given, rounds=max(rounds, fresh))


class _Bench:
    def __init__(
        self, places: Sequence[Place], files: Path, cores: set[int], rounds: int, seconds: float
    ) -> None:
        self._places, self._files, self._cores = places, files, cores
        self._rounds, self._seconds = rounds, seconds

    def _series(self, names: Sequence[str], code: str) -> dict[str, list[Run]]:
        path = self._files / "names"
        path.write_text("".join(f"{name} A\n" for name in names))

        def once(place: Place) -> Run:
            found = run(place, path, cores=self._cores, seconds=self._seconds)
            if set(found.codes) != {code} or found.lost > 0:
                raise RuntimeError(f"{place.name} answered {found.codes} and left out {found.lost}")
            return found

        return interleaved(self._rounds, {p.name: lambda p=p: once(p) for p in self._places})

    def hot(self, report: Report, names: Sequence[str]) -> None:
        _rates(report, "dns_hot", self._series(names, "NOERROR"))

    def denied(self, report: Report, count: int) -> None:
        names = [f"name-{number:05d}.{DENIED}" for number in range(count)]
        _rates(report, "dns_denied", self._series(names, "NXDOMAIN"))

    def latency(self, report: Report, names: Sequence[str]) -> None:
        path = self._files / "names"
        path.write_text("".join(f"{name} A\n" for name in names))

        def p99(place: Place) -> float:
            found = run(place, path, cores=self._cores, seconds=self._seconds, rate=_LATENCY_RATE)
            return percentile(found.latencies, 99)

        series = {p.name: lambda p=p: p99(p) for p in self._places}  # type: ignore[misc]
        _paired(report, "dns_hot_p99", interleaved(self._rounds, series), "us", ("at most", 1.2))

    def neighbour(self, report: Report, name: str) -> None:
        """What one sandbox feels of another's flood of denied questions, sent without waiting for answers.

        It asks at a moderate rate, by itself and then beside the flood; a lost question counts as a second.
        """
        place = self._places[0]
        path = self._files / "one"
        path.write_text(f"{name} A\n")

        def p99(found: Run) -> float:
            return percentile([*found.latencies, *[1e6] * found.lost], 99)

        alone, beside, lost = list[float](), list[float](), 0
        for _ in range(self._rounds):
            alone.append(p99(quiet := _asked_from(place, path, self._cores, self._seconds)))
            with _flood(place, self._cores):
                found = _asked_from(place, path, self._cores, self._seconds)
            beside.append(p99(found))
            lost += found.lost - quiet.lost
        details = {"lost": lost}
        report.add(Figure.paired("dns_neighbour_p99_vs_quiet", beside, alone, "us", details=details))

    def memory(self, report: Report, many: int) -> None:
        """After ever new names of every spelling, all denied, against after the first thousand of them."""
        place = self._places[0]
        sizes = []
        for first, end in ((0, many // 100), (many // 100, many)):
            path = self._files / "fresh"
            path.write_text("".join(f"fresh-{number:06d}.{DENIED} A\n" for number in range(first, end)))
            found = run(place, path, cores=self._cores, seconds=120, once=True)
            if sum(found.codes.values()) != end - first:
                raise RuntimeError(f"of {end - first} questions {found.codes} were answered")
            sizes.append(_resident(place.pid))
        before, after = sizes
        target = ("at most", 1.2)
        report.add(Figure(f"dns_rss_after_{many // 1000}k_names", after, "MiB", before, target=target))


def _asked_from(place: Place, path: Path, cores: set[int], seconds: float) -> Run:
    """Link 2, of another workspace, asks at a moderate rate."""
    return run(place, path, cores=cores, seconds=seconds, rate=500, source="198.19.0.2", limit=20, patience=1)


_FLOOD = """
import socket, itertools
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("198.19.0.1", 0))
sock.connect(("{server}", 53))
head = bytes.fromhex("000701000001000000000000")
print("ready", flush=True)
for number in itertools.count():
    label = b"n%07d" % (number % 10_000_000)
    try:
        sock.send(head + bytes((len(label),)) + label + b"\\4evil\\4test\\0\\0\\1\\0\\1")
    except OSError:
        pass
"""


@contextlib.contextmanager
def _flood(place: Place, cores: set[int]) -> Iterator[None]:
    """Link 1 sends fresh denied questions as fast as it can, and reads nothing."""
    pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))]
    text = _FLOOD.format(server=RESOLVER4)
    words = ["ip", "netns", "exec", place.namespace.name, *pinned, sys.executable, "-I", "-c", text]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def _resident(pid: int) -> float:
    """MiB (VmRSS, proc(5))."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0


_POLICY = """\
workspace: few
guard: enforce
members: [user:{user}]
allow:
  - {{host: "*.bench.test", ports: [7001/tcp], verify: address}}
wildcards:
  sandbox: {{names: 1000, bytes: 64KiB, rate: 1000}}
  workspace: {{names: 1000, bytes: 64KiB, rate: 1000}}
"""


def _wildcards(report: Report, given: tuple[Lab, Internet] | None, *, rounds: int) -> None:
    """The first answer about a name of a wildcard: asked upstream, admitted by the kernel, answered."""
    text = (scene.PROJECT / "bench" / "inside" / "asker.py").read_text()
    with scene.stage(given) as (made, internet):
        internet.set("*.bench.test", topology.Records({"A": [_ADDRESS]}, ttl=3600))
        policies = {"few": _POLICY.format(user=made.user)}
        with scene.started(made, policies) as daemon:
            words = ["/usr/bin/python3", "-I", "-c", text, "bench.test", str(rounds)]
            asker = daemon.start_sandbox("few", words)
            poll(lambda: asker.status() is not None, timeout=60, what="the asker")
            try:
                found = json.loads(asker.out)
            except ValueError:
                raise RuntimeError(f"the asker said {asker.out!r} {asker.err!r}") from None
            scene.alarms(daemon)
    details = {"again_ms": Sample(tuple(found["again"])).document()}
    report.add(Figure.alone("dns_wildcard_first_answer", found["first"], "ms", details=details))


def _rates(report: Report, name: str, found: dict[str, list[Run]]) -> None:
    rates = {place: [run.rate for run in runs] for place, runs in found.items()}
    _paired(report, f"{name}_qps", rates, "q/s", ("at least", 1.0))
    spent = {place: [run.processor for run in runs] for place, runs in found.items()}
    _paired(report, f"{name}_processor", spent, "us/answer", None)


def _paired(
    report: Report, name: str, found: dict[str, list[float]], unit: str, target: tuple[str, float] | None
) -> None:
    for peer in ("unbound", "dnsmasq"):
        if peer in found:
            figure = Figure.paired(f"{name}_vs_{peer}", found["ours"], found[peer], unit, target=target)
            report.add(figure)


@contextlib.contextmanager
def _files() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="egressd-bench-", dir="/tmp") as name:
        yield Path(name)


def run(
    place: Place,
    path: Path,
    *,
    cores: set[int],
    seconds: float,
    rate: int | None = None,
    source: str = "198.19.0.1",
    limit: int = 100,
    patience: float = 5,
    once: bool = False,
) -> Run:
    """dnsperf, over the names in the file again and again or `once`; with `rate`, verbosely at that rate."""
    words = ["dnsperf", "-s", str(RESOLVER4), "-a", source, "-d", str(path), "-e"]
    words += ["-q", str(limit), "-l", f"{seconds:g}", *(["-v", "-Q", str(rate)] if rate else [])]
    words += ["-t", f"{patience:g}", *(["-n", "1"] if once else [])]
    pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))]
    before = _processor(place.pid)
    done = subprocess.run(
        ["ip", "netns", "exec", place.namespace.name, *pinned, *words],
        capture_output=True,
        text=True,
        timeout=seconds + 30,
        check=False,
    )
    return _read(done.stdout + done.stderr, _processor(place.pid) - before)


def _processor(pid: int) -> float:
    """Microseconds that the process has run (Documentation/scheduler/sched-stats.rst)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e3


def _read(text: str, processor: float) -> Run:
    def number(what: str) -> float:
        match = re.search(rf"{what}:\s+([\d.]+)", text)
        if match is None:
            raise RuntimeError(f"dnsperf said: {text[-2000:]}")
        return float(match[1])

    line = re.search(r"Response codes:\s+(.*)", text)
    codes = {code: int(count) for code, count in re.findall(r"([A-Z]+) (\d+)", line[1] if line else "")}
    latencies = tuple(float(found) * 1e6 for found in re.findall(r"^> \S+ \S+ \S+ ([\d.]+)$", text, re.M))
    answered = number("Queries completed")
    lost = int(number("Queries lost"))
    return Run(number("Queries per second"), lost, codes, latencies, processor / max(1, answered))
