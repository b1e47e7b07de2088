"""Whatever dies, and whenever: nothing leaves that policy forbids, streams go on, the books balance."""

from __future__ import annotations

from typing import Any

import pytest

from lab import chaos
from lab.capture import Capture
from lab.scale import scaled

BACK = 2.0  # seconds in which everything is back, by the median; a busy machine may take longer now and then


def judge(report: chaos.Report) -> None:
    print("\n".join(report.lines()))
    assert report.reached == [] and report.tried > 0
    assert report.cut == []
    assert report.balanced, report.unbalanced
    assert [fault for fault in report.faults if fault.back is None] == []
    times = sorted(fault.back for fault in report.faults if fault.signal == "SIGKILL" and fault.back)
    assert times[len(times) // 2] < BACK, report.lines()


def test_each_is_killed_once(start_daemon: Any, uplink: Capture) -> None:
    daemon = start_daemon(policies={"acme": chaos.POLICY}, **chaos.CONFIG)
    report = chaos.run(daemon, uplink, kills=len(chaos.EVERYBODY))
    judge(report)
    assert report.recorded["process-ended"] >= len(chaos.CHILDREN)
    assert report.recorded["sandbox-resumed"] >= 3 * 2  # the controller's end, and everybody's


@pytest.mark.slow
def test_each_is_killed_and_stopped_many_times(start_daemon: Any, uplink: Capture) -> None:
    daemon = start_daemon(policies={"acme": chaos.POLICY}, **chaos.CONFIG)
    count = scaled(270, least=9)
    report = chaos.run(daemon, uplink, kills=count, stops=scaled(24, least=2), seed=2)
    judge(report)
    assert report.recorded["process-ended"] >= count * 8 // 9
