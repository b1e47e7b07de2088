"""The inspector's benchmark, with tiny counts: that it measures what it says, and leaves nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Figure, Report

from bench import inspector

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="benchmarks measure as root what an ordinary user gets"),
]


def figures(report: Report) -> dict[str, Figure]:
    return {figure.name: figure for figure in report.figures}


def test_streams_and_connections_go_through_the_inspector_and_past_it(lab: Any, internet: Any) -> None:
    report = Report("inspector", say=lambda _: None)
    with lab.leaving_nothing():
        internet.set(inspector.HOST, A=[inspector.ADDRESS])
        inspector.against_the_kernel(report, lab, rounds=2, seconds=0.05, connections=5)
    found = figures(report)
    assert set(found) == {
        "inspector_throughput_vs_kernel_path",
        "inspector_throughput_vs_kernel_path_8_streams",
        "inspector_connect_overhead_p50",
        "inspector_connect_overhead_p99",
    }
    for figure in found.values():
        assert figure.ours > 0
        assert figure.theirs is not None
        assert figure.theirs > 0


def test_connections_are_counted_against_peers() -> None:
    report = Report("inspector", say=lambda _: None)
    before = set(Path("/run/netns").iterdir())
    inspector.against_peers(report, rounds=2, flood=100, idle=10)
    mine = {
        path for path in set(Path("/run/netns").iterdir()) - before if path.name.endswith(str(os.getpid()))
    }
    assert not mine
    found = figures(report)
    rates = [figure for name, figure in found.items() if name.startswith("inspector_connections_per_s")]
    assert rates
    for figure in rates:
        assert 100 < figure.ours < 1e6
        assert figure.details["ours_by_the_clock"] > 10
    assert any(name.startswith("inspector_memory_1000_idle") for name in found)
