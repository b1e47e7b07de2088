"""How figures are told: the line, the ratio, the target, the spread."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Figure, Report, interleaved, percentile


@pytest.mark.parametrize(
    ("figure", "line"),
    [
        (Figure("spawn", 12.3456, "ms", 4.0), "spawn 3.086 12.35 4 ms"),
        (Figure("memory", 120.04, "MiB"), "memory - 120 - MiB"),
        (Figure.paired("rate", [9, 1, 8], [10, 10, 10], "conn/s"), "rate 0.800 8 10 conn/s"),
        (Figure.alone("p99", [1, 2, 300], "ms", of="p99"), "p99 - 300 - ms"),
    ],
)
def test_a_figure_is_one_line(figure: Figure, line: str) -> None:
    assert figure.line() == line


@pytest.mark.parametrize(
    ("ours", "target", "met"),
    [
        (4.0, ("at most", 4.0), True),
        (4.1, ("at most", 4.0), False),
        (0.9, ("at least", 0.9), True),
        (0.89, ("at least", 0.9), False),
        (0.89, None, None),
    ],
)
def test_a_target_is_met_or_missed(ours: float, target: tuple[str, float] | None, met: bool | None) -> None:
    assert Figure("x", ours, "ms", 1.0, target=target).met is met


def test_the_spread_of_pairs_is_in_the_file(tmp_path: Path) -> None:
    said: list[str] = []
    report = Report("spawn", say=said.append)
    figure = Figure.paired("x", [2.0, 6.0], [1.0, 2.0], "ms", target=("at most", 4.0), details={"why": "w"})
    report.add(figure)
    (told,) = json.loads(report.write(tmp_path).read_text())["figures"]
    assert said == ["x 2.667 4 1.5 ms"]
    assert (told["ratio_of_pairs"]["min"], told["ratio_of_pairs"]["max"]) == (2.0, 3.0)
    assert (told["ours"], told["ours_spread"]["n"], told["met"], told["why"]) == (4.0, 2, True, "w")


def test_everybody_has_a_turn_in_every_round_and_nobody_is_always_first() -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved(3, {name: lambda name=name: turn(name) for name in "abc"})  # type: ignore[misc]
    assert "".join(order) == "abcbcacab"
    assert found["a"] == [1.0, 6.0, 8.0]


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2), (75, 3), (99, 4), (100, 4)])
def test_a_percentile_is_a_value_that_was_seen(percent: float, value: float) -> None:
    assert percentile([3, 1, 4, 2], percent) == value
