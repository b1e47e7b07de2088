"""Floods are counted exactly, and one sandbox's do not bury another's."""

from __future__ import annotations

from collections import Counter

from egressd.dns.tally import OTHERS, Happening, Tally


def denied(link: int, name: str) -> Happening:
    return Happening("dns-denied", link, "acme", name, "A", "name")


def test_equal_ones_are_one_with_a_count() -> None:
    tally = Tally()
    for n in range(100):
        assert tally.add(denied(1, "x.example"), now=n / 200) == []
    assert tally.add(denied(2, "x.example"), now=0.5) == []
    assert tally.due(now=0.99) == []
    assert tally.due(now=1.0) == [(denied(1, "x.example"), 100)]
    assert tally.next_due() == 1.5
    assert tally.due(now=1.5) == [(denied(2, "x.example"), 1)]
    assert tally.next_due() is None


def test_of_a_link_that_has_ended_nothing_waits() -> None:
    tally = Tally()
    tally.add(denied(1, "x.example"), now=0)
    tally.add(denied(1, "x.example"), now=0.1)
    tally.add(denied(2, "x.example"), now=0.1)
    assert tally.ended(1) == [(denied(1, "x.example"), 2)]
    assert tally.ended(1) == tally.ended(3) == []
    assert list(tally._open) == [2]
    assert tally.due(now=2) == [(denied(2, "x.example"), 1)]


def test_fresh_names_without_end_are_counted_together_and_nothing_is_lost() -> None:
    tally = Tally(distinct=4)
    over: Counter[tuple[int, str]] = Counter()
    for n in range(1000):
        tally.add(denied(1, f"n{n}.example"), now=0)
    tally.add(denied(2, "quiet.example"), now=0)
    for happening, count in tally.due(now=1):
        over[happening.link, happening.name] += count
    assert over == {
        **{(1, f"n{n}.example"): 1 for n in range(4)},
        (1, OTHERS): 996,
        (2, "quiet.example"): 1,
    }
    assert tally._open == {}
    tally.add(denied(1, "n999.example"), now=2)  # a new second, a new start
    assert tally.due(now=3) == [(denied(1, "n999.example"), 1)]
