"""Which slot leads where: what stays in the answer stays in its slot, and no slot leads nowhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.dns.slots import EMPTY, Slots, assign, leading


def slots(text: str) -> Slots[str]:
    a, b, c, d = (None if x == "-" else x for x in text)
    return a, b, c, d


@pytest.mark.parametrize(
    ("previous", "fresh", "expected", "distinct"),
    [
        ("----", "", "----", 0),
        ("----", "A", "AAAA", 1),
        ("----", "AB", "ABAB", 2),
        ("----", "ABCD", "ABCD", 4),
        ("----", "ABCDE", "ABCD", 4),  # at most four, the earlier ones
        ("----", "AAB", "ABAB", 2),
        ("ABCD", "DCBA", "ABCD", 4),  # rotation changes nothing
        ("ABCD", "EFBA", "ABEF", 4),  # what stays keeps its slot
        ("ABCD", "EFGHA", "AEFG", 4),  # and is preferred to what is new
        ("ABCD", "BD", "BBDD", 2),
        ("AAAA", "AB", "AAAB", 2),
        ("AAAB", "AB", "AAAB", 2),
        ("AAAA", "B", "BBBB", 1),
        ("ABAB", "ABC", "ABAC", 3),
        ("ABCD", "", "----", 0),
    ],
)
def test_assign(previous: str, fresh: str, expected: str, distinct: int) -> None:
    assert assign(slots(previous), fresh) == (slots(expected), distinct)


@given(st.lists(st.lists(st.integers(0, 7), max_size=6), max_size=6))
@settings(max_examples=200)
def test_always(answers: list[list[int]]) -> None:
    now: Slots[int] = EMPTY
    for fresh in answers:
        before = now
        now, distinct = assign(before, fresh)
        assert (
            distinct == len(leading(now)) == len({a for a in now if a is not None}) == min(len(set(fresh)), 4)
        )
        assert (None in now) == (not fresh)
        assert all(a in fresh for a in now if a is not None)
        stayed = [n for n in leading(before) if before[n] in fresh]
        assert all(now[n] == before[n] for n in stayed)
        assert assign(now, fresh) == (now, distinct)
        assert assign(now, sorted(fresh)) == (now, distinct) or len(set(fresh)) > 4


@pytest.mark.parametrize(
    ("now", "expected"), [("----", ()), ("AAAA", (0,)), ("AABB", (0, 2)), ("ABCD", (0, 1, 2, 3))]
)
def test_leading(now: str, expected: tuple[int, ...]) -> None:
    assert leading(slots(now)) == expected
