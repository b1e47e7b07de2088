"""What a benchmark found: figures, and how they are told."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

__all__ = ["Figure", "Report", "Sample", "interleaved", "percentile"]


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: a value that was really seen."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def document(self) -> dict[str, Any]:
        return {
            "n": len(self.values),
            "median": _round(self.median),
            "min": _round(min(self.values)),
            "p10": _round(percentile(self.values, 10)),
            "p90": _round(percentile(self.values, 90)),
            "max": _round(max(self.values)),
        }


@dataclass(frozen=True)
class Figure:
    """One line. `target` is ("at most" | "at least", number) for the ratio, or None."""

    name: str
    ours: float
    unit: str
    theirs: float | None = None
    target: tuple[str, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def paired(name: str, ours: Sequence[float], theirs: Sequence[float], unit: str, **more: Any) -> Figure:
        """Of two interleaved series: the medians, and how the ratio of each pair spread."""
        a, b = Sample(tuple(ours)), Sample(tuple(theirs))
        pairs = Sample(tuple(x / y for x, y in zip(ours, theirs, strict=True)))
        details = dict(more.pop("details", {}))
        details |= {
            "ours_spread": a.document(),
            "theirs_spread": b.document(),
            "ratio_of_pairs": pairs.document(),
        }
        return Figure(name, a.median, unit, b.median, details=details, **more)

    @staticmethod
    def alone(name: str, values: Sequence[float], unit: str, *, of: str = "median", **more: Any) -> Figure:
        """Without a peer. `of` is "median" or a percentile such as "p99"."""
        sample = Sample(tuple(values))
        ours = sample.median if of == "median" else percentile(values, float(of.removeprefix("p")))
        details = dict(more.pop("details", {})) | {"ours_spread": sample.document()}
        return Figure(name, ours, unit, details=details, **more)

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None where there is none."""
        if self.target is None or self.ratio is None:
            return None
        word, bound = self.target
        return self.ratio <= bound if word == "at most" else self.ratio >= bound

    def line(self) -> str:
        """`name ratio ours theirs unit`."""
        theirs = "-" if self.theirs is None else f"{self.theirs:.4g}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.3f}"
        return f"{self.name} {ratio} {self.ours:.4g} {theirs} {self.unit}"

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "ours": _round(self.ours), "unit": self.unit}
        if self.ratio is not None and self.theirs is not None:
            found |= {"ratio": _round(self.ratio), "theirs": _round(self.theirs)}
        if self.target is not None:
            found |= {"target": f"{self.target[0]} {self.target[1]:g}", "met": self.met}
        return found | dict(self.details)


class Report:
    """Prints each figure as it comes; keeps all for the JSON file."""

    def __init__(self, name: str, *, say: Callable[[str], None] = print) -> None:
        self.name, self.figures = name, list[Figure]()
        self._say, self._began = say, time.monotonic()

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        self._say(figure.line())

    def document(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "seconds": round(time.monotonic() - self._began, 1),
            "machine": _machine(),
            "figures": [figure.document() for figure in self.figures],
        }

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps(self.document(), indent=2) + "\n")
        return path


def interleaved(rounds: int, measures: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Each of `measures` once per round, the order turning, so that drift and neighbours hit all alike."""
    names = list(measures)
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(measures[name]())
    return found


def _machine() -> dict[str, Any]:
    load = os.getloadavg()[0]
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_at_the_end": round(load, 2),
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")
