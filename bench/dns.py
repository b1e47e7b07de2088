"""How fast names are answered: dnsperf against the real resolver, unbound and dnsmasq, by turns.

Every server has one core and one thread, dnsperf has the other core. Each answers over the loopback of a
namespace of its own, so that wires and guards, which are the same for all, are left out. dnsperf sends as
fast as it is answered, at most 100 questions under way; the latency is measured at the same
moderate rate for all, because at full speed it is nothing but the rate turned over.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import nameservers
from bench.figures import Figure, Report, interleaved, percentile
from bench.nameservers import DENIED, Place
from egressd.ruleset.layout import RESOLVER4

__all__ = ["Run", "measure", "run"]

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
) -> Run:
    """dnsperf, over the names in the file again and again; with `rate`, verbosely at that rate."""
    words = ["dnsperf", "-s", str(RESOLVER4), "-a", source, "-d", str(path), "-e"]
    words += ["-q", str(limit), "-l", f"{seconds:g}", *(["-v", "-Q", str(rate)] if rate else [])]
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
