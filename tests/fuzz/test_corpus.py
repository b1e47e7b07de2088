"""Each parser of foreign bytes against what was worth keeping, and what Hypothesis makes of that."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import corpora
from fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_kept_does_no_harm(name: str) -> None:
    inputs = corpora.load(name)
    assert len(inputs) >= 10, "a corpus that is lost tests nothing"
    for data in inputs:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_neither_does_what_resembles_it(name: str) -> None:
    seeds = corpora.load(name)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds), st.data())
    def holds(seed: bytes, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(seed)))
        cut = data.draw(st.integers(at, len(seed)))
        TARGETS[name](seed[:at] + data.draw(st.binary(max_size=40)) + seed[cut:])

    holds()


def test_no_corpus_is_without_its_target() -> None:
    assert {path.stem for path in corpora.DIRECTORY.glob("*.b64")} == set(TARGETS)
