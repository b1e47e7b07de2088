"""Whole requests, measured with tiny counts: that they are what they are said to be, and leave nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Figure, Report

from bench import cycle, request

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="benchmarks measure as root what an ordinary user gets"),
]


def test_whole_requests_are_measured_and_checked(
    lab: Any, internet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "measure", lambda *_, **__: None)  # has tests of its own
    report = Report("request", say=lambda _: None)
    with lab.leaving_nothing():
        cycle.measure(report, given=(lab, internet), rounds=2, sizes=(20, 60), repeats=1, plots=tmp_path)
    assert not lab.path("request").exists()
    found: dict[str, Figure] = {figure.name: figure for figure in report.figures}
    whole = found["request_cycle_ms"]
    assert (whole.details["files"], whole.details["discarded"]) == (298, 346)
    assert 0 < whole.details["command_ms"] < whole.ours < 20_000
    assert set(whole.details["where_the_time_goes_ms"]) == {"decide", "project", "start", "destroy", "rest"}
    assert found["request_cycle_nothing_shown"].details["ours_spread"]["n"] == 2
    assert 0 < found["request_decided"].ours < 20_000
    assert set(found["request_cycle_growth_per_candidate"].details["ms_by_candidates"]) == {"20", "60"}
    drawn = ElementTree.fromstring((tmp_path / "request-cycle-growth.svg").read_text())
    assert len([one for one in drawn.iter() if one.tag.endswith("circle")]) == 2


def test_an_answer_that_shows_too_little_is_no_figure(lab: Any, internet: Any) -> None:
    with lab.leaving_nothing(), cycle.stand((lab, internet)) as at:
        source = cycle.ingested(at, "handbook", 20, 9)
        assert (len(source.documents), len(source.shown)) == (20, 9)
        right, wrong = (cycle.Cycles(at, source.documents, shown) for shown in (9, 10))
        assert right.once() > 0
        assert at.discarded(right.last) == 11
        with pytest.raises(RuntimeError, match="9 files were shown, not 10"):
            wrong.once()
