"""Names of files, and where their last whole line ends."""

from __future__ import annotations

import pytest

from egressd.journal import segments


@pytest.mark.parametrize(
    ("number", "name"), [(1, "0001.jsonl"), (9999, "9999.jsonl"), (10_000, "10000.jsonl")]
)
def test_a_segment_has_one_name(number: int, name: str) -> None:
    assert segments.name(number) == name
    assert segments.number(name) == number


@pytest.mark.parametrize(
    "name", ["", "1.jsonl", "0000.jsonl", "00001.jsonl", "0001.torn", "0001.jsonl.gz", "x0001.jsonl"]
)
def test_other_files_are_no_segments(name: str) -> None:
    assert segments.number(name) is None


def test_segments_are_ordered_by_number_not_by_spelling() -> None:
    assert segments.numbers(["10000.jsonl", "0002.jsonl", "0002.torn", "9999.jsonl"]) == [2, 9999, 10_000]


def test_there_is_no_segment_zero() -> None:
    with pytest.raises(ValueError, match="no segment"):
        segments.name(0)


@pytest.mark.parametrize(
    ("tail", "torn"), [(b"", 0), (b"a\n", 0), (b"a\nb", 1), (b"ab", 2), (b"a\n\n", 0), (b"\nabc", 3)]
)
def test_a_torn_line_is_what_follows_the_last_newline(tail: bytes, torn: int) -> None:
    assert segments.torn(tail) == torn
