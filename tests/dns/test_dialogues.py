"""Every scenario file, against the pure machines with a clock of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from dialogue import FILES, PureStage, load, play


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dialogue(path: Path) -> None:
    scenario = load(path)
    play(scenario, PureStage(scenario))


def test_there_are_some() -> None:
    assert len(FILES) >= 10
