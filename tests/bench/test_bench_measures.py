"""The benchmarks, with tiny counts: that each really measures what it says, not how fast anything is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Figure, Report

from bench import datapath, first, spawn

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="benchmarks measure as root what an ordinary user gets"),
]


def figures(report: Report) -> dict[str, Figure]:
    assert len(report.document()["figures"]) == len(report.figures)
    return {figure.name: figure for figure in report.figures}


def test_the_command_tells_the_time_of_its_first_instruction(tmp_path: Path) -> None:
    before = time.monotonic_ns()
    done = subprocess.run(first.command(tmp_path, seen_as=str(tmp_path)), capture_output=True, check=True)
    assert before < first.nanoseconds(done.stdout) < time.monotonic_ns()


@pytest.mark.parametrize("output", [b"", b"short", bytes(17)])
def test_a_command_that_never_ran_has_no_time(output: bytes) -> None:
    with pytest.raises(ValueError, match="did not tell the time"):
        first.nanoseconds(output)


def test_spawning_is_measured_against_bubblewrap(lab: Any, internet: Any) -> None:
    report = Report("spawn", say=lambda _: None)
    with lab.leaving_nothing():
        spawn.measure(report, given=(lab, internet), rounds=4, at_once=3, waves=1)
    found = figures(report)
    against = found["spawn_cold_vs_bwrap"]
    assert against.theirs is not None and 0 < against.theirs < 1000 and 0 < against.ours < 5000
    steps = against.details["where_the_time_goes_ms"]
    assert len(steps) == 10 and min(steps.values()) >= 0 and sum(steps.values()) < 5000
    assert found["spawn_50_concurrent_p99"].details["ours_spread"]["n"] == 3
    if shutil.which("firejail") is None:
        assert found["spawn_cold_vs_firejail"].theirs is None
        assert "firejail" in found["spawn_cold_vs_firejail"].details["why_no_peer"]


def test_the_data_path_is_measured_against_bare_wires(lab: Any, internet: Any) -> None:
    report = Report("datapath", say=lambda _: None)
    with lab.leaving_nothing():
        datapath.measure(
            report,
            given=(lab, internet),
            rounds=2,
            seconds=0.05,
            connections=20,
            hosts=50,
            sandboxes=5,
            revocations=2,
        )
    found = figures(report)
    for name in ("datapath_throughput", "datapath_flat_hosts", "datapath_flat_sandboxes"):
        assert found[name].ratio is not None and 0 < found[name].ratio < 100
    assert found["datapath_connections"].ours > 10
    assert found["memory_idle"].ours > 1
    assert found["policy_apply_10k_hosts"].details["hosts"] == 50
    assert found["revoke_to_reset_p99"].details["ours_spread"]["n"] == 2
