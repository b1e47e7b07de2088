"""The resolver's benchmark, with tiny counts: that it measures what it says, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Report

from bench import dns

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("dnsperf", "unbound", "dnsmasq"))),
        reason="needs root, and the packages that make bench-dns installs",
    ),
]


def test_answers_are_measured_against_unbound_and_dnsmasq(lab: Any, internet: Any) -> None:
    report = Report("dns", say=lambda _: None)
    namespaces = set(Path("/run/netns").glob("rs-*"))
    with lab.leaving_nothing():
        dns.measure(report, given=(lab, internet), rounds=1, seconds=0.2, names=20, many=1000, fresh=3)
    assert set(Path("/run/netns").glob(f"rs-{os.getpid()}-*")) <= namespaces
    found = {figure.name: figure for figure in report.figures}
    for kind in ("dns_hot_qps", "dns_denied_qps", "dns_hot_p99"):
        for peer in ("unbound", "dnsmasq"):
            figure = found[f"{kind}_vs_{peer}"]
            assert figure.ours > 0 and figure.theirs is not None and figure.theirs > 0
    assert 5 < found["dns_rss_after_1k_names"].ours < 500
    assert found["dns_wildcard_first_answer"].details["ours_spread"]["n"] == 3
    assert found["dns_neighbour_p99_vs_quiet"].ours > 0


def test_what_dnsperf_says_is_read() -> None:
    text = """> NOERROR a.test A 0.000123
> NOERROR b.test A 0.000456
  Queries sent:         2
  Queries completed:    2 (100.00%)
  Queries lost:         0 (0.00%)
  Response codes:       NOERROR 1 (50.00%), NXDOMAIN 1 (50.00%)
  Queries per second:   1234.5
"""
    found = dns._read(text, 10.0)
    assert (found.rate, found.lost, found.codes) == (1234.5, 0, {"NOERROR": 1, "NXDOMAIN": 1})
    assert [round(latency) for latency in found.latencies] == [123, 456]
    assert found.processor == 5.0
    with pytest.raises(RuntimeError, match="connection refused"):
        dns._read("connection refused", 1.0)
