"""How tests wait, and how much of a slow one is run."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from lab.machine import LabError, poll
from lab.scale import scaled


def slowly(answers: list[bool]) -> Callable[[], bool]:
    """A look that takes 50 ms, and finds these answers one after the other."""

    def look() -> bool:
        time.sleep(0.05)
        return answers.pop(0)

    return look


def test_a_look_that_ends_too_late_is_not_the_last() -> None:
    poll(slowly([False, True]), timeout=0.01)


def test_a_look_that_begins_too_late_is() -> None:
    with pytest.raises(LabError, match=r"not within 0\.01 s: the moon"):
        poll(slowly([False, False, True]), timeout=0.01, what="the moon")


@pytest.mark.parametrize(
    ("scale", "count"), [(None, 500), ("1", 500), ("0.1", 50), ("0.001", 20), ("0", 20), ("3", 1500)]
)
def test_the_scale_of_slow_tests(monkeypatch: pytest.MonkeyPatch, scale: str | None, count: int) -> None:
    monkeypatch.delenv("EGRESSD_SCALE", raising=False)
    if scale is not None:
        monkeypatch.setenv("EGRESSD_SCALE", scale)
    assert scaled(500, least=20) == count


def test_a_scale_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGRESSD_SCALE", "short")
    with pytest.raises(ValueError, match="short"):
        scaled(500)
