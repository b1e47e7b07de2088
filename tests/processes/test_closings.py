"""Connections that ended alike: ten of a second one by one, the others as one record, and not a byte lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.identities import Link
from egressd.processes.closings import EACH, Closing, Closings, Many

OLLAMA = Closing(Link(7), "acme", "ollama", 11434, "finished")
ELSE = [
    Closing(Link(8), "acme", "ollama", 11434, "finished"),
    Closing(Link(7), "acme", "whisper", 11434, "finished"),
    Closing(Link(7), "acme", "ollama", 11435, "finished"),
    Closing(Link(7), "acme", "ollama", 11434, "reset"),
]


def test_the_first_ten_of_a_second_stand_alone_and_the_rest_together() -> None:
    closings = Closings()
    assert closings.due(now=100.0) == []
    alone = [closings.alone(OLLAMA, sent=n, received=10 * n, seconds=0.5 * n) for n in range(EACH + 3)]
    assert alone == [True] * EACH + [False] * 3
    assert closings.due(now=100.9) == []
    assert closings.due(now=101.0) == [(OLLAMA, Many(3, 33, 330, 6.0))]
    assert closings.due(now=102.0) == []
    assert closings.alone(OLLAMA, sent=1, received=1, seconds=1.0), "another second, another ten"


def test_unequal_ones_are_not_each_others() -> None:
    closings = Closings()
    for _ in range(EACH):
        assert closings.alone(OLLAMA, sent=1, received=1, seconds=1.0)
    assert all(closings.alone(each, sent=1, received=1, seconds=1.0) for each in ELSE)
    assert not closings.alone(OLLAMA, sent=1, received=1, seconds=1.0)


def test_of_a_link_that_ends_nothing_waits() -> None:
    closings = Closings()
    for closing in (OLLAMA, ELSE[0]):
        for _ in range(EACH + 1):
            closings.alone(closing, sent=5, received=6, seconds=0.1)
    assert closings.take(lambda closing: closing.link == Link(7)) == [(OLLAMA, Many(1, 5, 6, 0.1))]
    assert not closings.alone(OLLAMA, sent=1, received=1, seconds=1.0), "it is the same second"
    assert [closing for closing, _ in closings.take()] == [ELSE[0], OLLAMA]
    assert closings.take() == []


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([OLLAMA, *ELSE]), st.integers(0, 9), st.floats(0, 0.2))))
def test_the_sums_are_exact(story: list[tuple[Closing, int, float]]) -> None:
    closings, now = Closings(), 0.0
    wanted: Counter[Closing] = Counter()
    found: Counter[Closing] = Counter()
    for closing, size, step in story:
        now += step
        for each, many in closings.due(now=now):
            found[each] += many.connections + many.bytes_out + many.bytes_in
        wanted[closing] += 1 + size + 2 * size
        if closings.alone(closing, sent=size, received=2 * size, seconds=0.0):
            found[closing] += 1 + size + 2 * size
    for each, many in closings.take():
        found[each] += many.connections + many.bytes_out + many.bytes_in
    assert found == wanted
