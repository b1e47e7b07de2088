"""Equal happenings within a second are one, with an exact count."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.journal.floods import Flood, Floods


def test_one_happening_is_handed_out_after_its_window() -> None:
    floods: Floods[str, str] = Floods(window=1.0)
    assert floods.add("a", "first", now=10.0) == []
    assert floods.due(now=10.99) == []
    assert floods.next_due() == 11.0
    assert floods.due(now=11.0) == [Flood("a", "first", 10.0, 10.0, 1)]
    assert floods.due(now=99.0) == []
    assert floods.next_due() is None


def test_equal_ones_are_counted_and_the_first_ones_details_kept() -> None:
    floods: Floods[str, int] = Floods(window=1.0)
    for i in range(1000):
        assert floods.add("a", i, now=10 + i / 2000) == []
    assert floods.add("b", 7, now=10.6) == []
    assert floods.due(now=11.0) == [Flood("a", 0, 10.0, 10 + 999 / 2000, 1000)]
    assert floods.drain() == [Flood("b", 7, 10.6, 10.6, 1)]


def test_some_are_taken_out_before_their_window_has_passed() -> None:
    floods: Floods[tuple[int, str], None] = Floods(window=1.0)
    for key in ((1, "a"), (2, "a"), (1, "b"), (1, "a")):
        floods.add(key, None, now=1.0)
    assert floods.take(lambda key: key[0] == 1) == [
        Flood((1, "a"), None, 1.0, 1.0, 2),
        Flood((1, "b"), None, 1.0, 1.0, 1),
    ]
    assert floods.take(lambda key: key[0] == 1) == []
    assert floods.due(now=2.0) == [Flood((2, "a"), None, 1.0, 1.0, 1)]


def test_the_window_begins_anew_after_it_has_passed() -> None:
    floods: Floods[str, int] = Floods(window=1.0)
    floods.add("a", 1, now=1.0)
    assert floods.add("a", 2, now=2.0) == [Flood("a", 1, 1.0, 1.0, 1)]
    assert floods.add("a", 3, now=2.5) == []
    assert floods.due(now=3.0) == [Flood("a", 2, 2.0, 2.5, 2)]


def test_with_too_many_kinds_the_oldest_goes_early_and_none_is_dropped() -> None:
    floods: Floods[int, None] = Floods(window=1.0, capacity=3)
    out = [flood for i in range(10) for flood in floods.add(i, None, now=0.0)]
    assert [flood.key for flood in out] == list(range(7))
    assert len(floods) == 3
    assert [flood.key for flood in floods.drain()] == [7, 8, 9]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 0.7)), max_size=60), st.integers(1, 4))
def test_counts_add_up(steps: list[tuple[int, float]], capacity: int) -> None:
    floods: Floods[int, None] = Floods(window=1.0, capacity=capacity)
    now, out = 0.0, []
    for key, pause in steps:
        now += pause
        out += floods.add(key, None, now=now)
        assert len(floods) <= capacity
    out += floods.drain()
    for key in range(6):
        assert sum(flood.count for flood in out if flood.key == key) == sum(k == key for k, _ in steps)
    assert all(flood.last - flood.first < 1.0 for flood in out)
