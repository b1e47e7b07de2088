"""`python -m bench`: all of them, or the ones that are named."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bench import datapath, dns, inspector, spawn
from bench.figures import Report

RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARKS = {
    "spawn": spawn.measure,
    "datapath": datapath.measure,
    "dns": dns.measure,
    "inspector": inspector.measure,
}


def main(names: list[str]) -> int:
    """The exit status says whether it was measured, not whether the targets were met: see the lines."""
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
        BENCHMARKS[name](report)
        report.write(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
