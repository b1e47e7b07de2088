"""`make bench-neighbours`, once and small: it measures, and says against what."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Report

from bench import neighbours

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for raw sockets of a sandbox's owner")


def test_a_neighbour_is_measured_alone_beside_a_burner_and_beside_floods(lab: Any, internet: Any) -> None:
    report = Report("neighbours", say=lambda _: None)
    neighbours.measure(
        report, given=(lab, internet), rounds=1, seconds=0.05, connections=20, questions=10,
        floods=("denied", "dns"),
    )  # fmt: skip
    found = {figure.name: figure for figure in report.figures}
    for what in ("throughput", "connections", "questions"):
        assert set(found) >= {f"neighbour_{what}_beside_{name}" for name in ("burner", "denied", "dns")}
        for name in ("denied", "dns"):
            figure = found[f"neighbour_{what}_beside_{name}"]
            assert figure.ours > 0 and figure.target == ("at least", 0.9)
            assert figure.details["flood_packets_per_second"] > 0, "it did flood"
    assert not any("syn" in name for name in found)
