"""`python -m bench`: all of them, or the ones that are named. `--short` first: few rounds, to see that they
still measure; the figures mean little, and go to a place of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bench import cycle, datapath, dns, inspector, journal, neighbours, residency, scale, spawn
from bench.figures import Report

RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARKS = {
    "spawn": spawn.measure,
    "datapath": datapath.measure,
    "dns": dns.measure,
    "inspector": inspector.measure,
    "journal": journal.measure,
    "residency": residency.measure,
    "request": cycle.measure,
    "neighbours": neighbours.measure,
    "scale": scale.measure,
}
SHORT: dict[str, dict[str, Any]] = {
    "spawn": {"rounds": 6, "at_once": 10, "waves": 1},
    "datapath": {
        "rounds": 2, "seconds": 0.1, "connections": 100, "hosts": 500, "sandboxes": 20, "revocations": 3,
    },
    "dns": {"rounds": 1, "seconds": 0.2, "names": 20, "many": 1000, "fresh": 3},
    "inspector": {"rounds": 2, "seconds": 0.1, "connections": 20, "flood": 100, "idle": 50},
    "journal": {"rounds": 2, "count": 2000, "pairs": 2, "questions": 20, "spawns": 2, "proved": 400},
    "residency": {"rounds": 2, "prefixes": 2000, "lookups": 500},
    "neighbours": {"rounds": 1, "seconds": 0.1, "connections": 50, "questions": 20},
    "request": {"rounds": 3, "sizes": (100, 300), "repeats": 2, "plots": RESULTS / "short"},
    "scale": {"sandboxes": 60, "rounds": 2, "probes": 5, "apart": 3},
}  # fmt: skip


def main(words: list[str]) -> int:
    """The exit status says whether it was measured, not whether the targets were met: see the lines."""
    short = words[:1] == ["--short"]
    names = words[1:] if short else words
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print(
            "bench: root is needed, to measure what an ordinary user gets: sudo make bench", file=sys.stderr
        )
        return 1
    for name in names or BENCHMARKS:
        report = Report(name)
        BENCHMARKS[name](report, **(SHORT.get(name, {}) if short else {}))
        report.write(RESULTS / "short" if short else RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
