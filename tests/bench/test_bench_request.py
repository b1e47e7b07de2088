"""The request, measured with tiny counts: that the vault is what it is said to be, and both sides copy it."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Figure, Report

from bench import request


def test_the_vault_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    vault = request.make_vault(tmp_path)
    decided = vault.authorise(list(vault.documents))
    assert (len(vault.documents), len(decided.documents), decided.discarded) == (644, 298, 346)
    sizes = [document.size for document in vault.documents.values()]
    assert min(sizes) >= 2000 and max(sizes) <= 200_000
    assert 20_000 < sum(sizes) / len(sizes) < 27_000
    assert not [document for document in vault.documents.values() if document.problem]


def test_the_same_vault_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (request.make_vault(tmp_path / name, count=40, cleared=9) for name in ("one", "two"))
    assert [d.digest for d in one.documents.values()] == [d.digest for d in two.documents.values()]
    assert len(one.authorise(list(one.documents)).documents) == 9


def test_each_figure(tmp_path: Path) -> None:
    report = Report("request", say=lambda _: None)
    request.measure(report, rounds=2, sizes=(20, 60), repeats=2, plots=tmp_path)
    found: dict[str, Figure] = {figure.name: figure for figure in report.figures}
    assert set(found) == {"request_cycle_vs_rsync", "request_growth_per_candidate"}
    versus = found["request_cycle_vs_rsync"]
    assert (versus.details["files"], versus.details["discarded"]) == (298, 346)
    assert versus.theirs is not None
    assert set(found["request_growth_per_candidate"].details["ms_by_candidates"]) == {"20", "60"}
    drawn = ElementTree.fromstring((tmp_path / "request-growth.svg").read_text())
    assert len([one for one in drawn.iter() if one.tag.endswith("circle")]) == 2


def test_a_projection_that_lacks_something_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = request.project
    monkeypatch.setattr(request, "project", lambda copies, place: project(copies[1:], place))
    with pytest.raises(RuntimeError, match="failed"):
        request.measure(Report("request", say=lambda _: None), rounds=1, sizes=(20,), repeats=1, plots=None)


def test_linear_growth_has_the_exponent_one() -> None:
    assert request.exponent({100: 2.0, 1000: 20.0, 10_000: 200.0}) == pytest.approx(1)
    assert request.exponent({100: 2.0, 10_000: 20_000.0}) == pytest.approx(2)
