"""Charts are numbers first: ticks are round, places lie on the chart, whatever was counted."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.journal.charts import (
    Bar,
    Panel,
    ScaleKind,
    bars,
    buckets,
    byte_scale,
    count_scale,
    counted,
    elided,
    human_bytes,
    timeline,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1_234_567, "1.18 MiB"),
        (12_345_678, "11.8 MiB"),
        (999 * MIB, "999 MiB"),
        (1 << 64, "16.0 EiB"),
        (10**30, "867,361,737,988 EiB"),
    ],
)
def test_bytes_for_people(value: int, said: str) -> None:
    assert human_bytes(value) == said


def test_numbers_are_grouped() -> None:
    assert counted(1_234_567) == "1,234,567"


@pytest.mark.parametrize(
    ("largest", "labels"),
    [
        (0, ["0", "1"]),
        (1, ["0", "1"]),
        (3, ["0", "1", "2", "3"]),
        (77, ["0", "20", "40", "60", "80"]),
        (400, ["0", "100", "200", "300", "400"]),
        (12_000, ["0", "5k", "10k", "15k"]),
        (10**20, ["0", "50E", "100E"]),
    ],
)
def test_ticks_of_counts(largest: int, labels: list[str]) -> None:
    assert [name for _, name in count_scale([largest, 0]).ticks] == labels


@pytest.mark.parametrize(
    ("amounts", "kind", "labels"),
    [
        ([], ScaleKind.LINEAR, ["0", "1 B"]),
        ([0, 0], ScaleKind.LINEAR, ["0", "1 B"]),
        ([700], ScaleKind.LINEAR, ["0", "200 B", "400 B", "600 B", "800 B"]),
        ([3 * MIB, MIB], ScaleKind.LINEAR, ["0", "1 MiB", "2 MiB", "3 MiB"]),
        ([GIB, GIB, 5], ScaleKind.LINEAR, ["0", "1 GiB"]),  # one small one among many does not bend the axis
        ([GIB, 5, 7], ScaleKind.LOGARITHMIC, ["0", "1 KiB", "1 MiB"]),
    ],
)
def test_ticks_of_bytes(amounts: list[int], kind: ScaleKind, labels: list[str]) -> None:
    scale = byte_scale(amounts)
    assert (scale.kind, [name for _, name in scale.ticks]) == (kind, labels)


def test_the_scale_says_what_it_is() -> None:
    assert byte_scale([GIB, GIB]).words.startswith("Linear scale")
    assert "compare the numbers, not the lengths" in byte_scale([GIB, 1, 1]).words


@given(st.lists(st.integers(0, 1 << 70), max_size=30))
@settings(max_examples=150)
def test_places_lie_on_the_axis_and_keep_the_order(amounts: list[int]) -> None:
    for scale in (byte_scale(amounts), count_scale(amounts)):
        places = [scale.place(amount) for amount in sorted(amounts)]
        assert places == sorted(places)
        assert all(0.0 <= place <= 1.0 for place in places)
        assert all((scale.place(amount) > 0) == (amount > 0) for amount in amounts)
        values = [value for value, _ in scale.ticks]
        assert values == sorted(set(values))
        assert len(values) <= 6
        assert scale.maximum >= max(amounts, default=0)


@given(st.floats(0, 2.5e11), st.floats(0, 2.5e11))
@settings(max_examples=150)
def test_buckets_cover_both_ends(first: float, last: float) -> None:
    spans = buckets(first, last)
    assert 1 <= spans.count <= 74
    assert spans.index(first) is not None
    assert spans.index(max(first, last)) is not None
    assert spans.index(spans.start - 1) is None
    assert sum(spans.totals([(first, 3), (max(first, last), 4), (-1.0, 9)])) == 7
    svg = timeline([Panel("A", "things", "sent", spans.totals([(first, 1)]))], spans, label="l", words="w")
    assert all(0 <= float(place) <= 100 for place in re.findall(r' x="([0-9.]+)%"', svg))


@pytest.mark.parametrize(
    ("span", "words", "count"),
    [
        (0, "1 second", 1),
        (60, "1 second", 61),
        (3600, "1 minute", 61),
        (21_600, "5 minutes", 73),
        (86_400, "30 minutes", 49),
        (31 * 86_400, "12 hours", 63),
    ],
)
def test_columns_are_of_round_lengths(span: int, words: str, count: int) -> None:
    spans = buckets(1_763_596_800, 1_763_596_800 + span)
    assert (spans.words, spans.count) == (words, count)


def test_one_moment_is_one_column() -> None:
    spans = buckets(1_763_596_800.5, 1_763_596_800.5)
    svg = timeline(
        [Panel("Allowed", "connections", "sent", spans.totals([(1_763_596_800.5, 5)]))],
        spans,
        label="Over time",
        words="Each column is 1 second.",
    )
    assert svg.count("<rect") == 1
    assert "2025-11-20 00:00:00: 5 connections" in svg
    assert "<title>Over time</title>" in svg


def test_nothing_draws_no_column() -> None:
    spans = buckets(0, 3600)
    svg = timeline([Panel("Allowed", "x", "sent", [0] * spans.count)], spans, label="l", words="w")
    assert "<rect" not in svg
    assert "Allowed (x)" in svg


def test_what_happened_once_beside_a_flood_is_seen() -> None:
    spans = buckets(0, 30)
    svg = timeline(
        [Panel("A", "x", "sent", spans.totals([(0, 10**9), (30, 1)]))], spans, label="l", words="w"
    )
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([0-9.]+)"', svg)]
    assert len(heights) == 2
    assert min(heights) == 2.0


def test_dates_stand_where_days_begin() -> None:
    spans = buckets(1_763_676_600, 1_763_676_600 + 6 * 3600)  # 20 November 2025, 22:10
    svg = timeline([Panel("A", "x", "sent", [0] * spans.count)], spans, label="l", words="w")
    assert svg.count(">20 Nov<") == 1
    assert len(re.findall(r"<text[^>]*>21 Nov<", svg)) == 2  # wide pages and narrow ones show one of the two
    assert len(re.findall(r'<text[^>]*class="(?:alternate|narrow)"[^>]*>21 Nov<', svg)) == 2


def test_bars_have_their_numbers_beside_them() -> None:
    rows = [Bar("a.test", (3 * MIB, 0)), Bar("b.test", (MIB, 2 * MIB))]
    svg, words = bars(rows, (("sent", "sent"), ("received", "received")), label="Bytes")
    assert words.startswith("Linear")
    assert svg.count("<rect") == 3  # zero has no bar, and its number
    for text in ("a.test", "3.00 MiB sent", "0 B received", "1.00 MiB sent", "2.00 MiB received"):
        assert f">{text}<" in svg
    assert "a.test: sent 3,145,728 bytes, received 0 bytes" in svg
    ends = [float(w) for w in re.findall(r'<rect[^>]* width="([0-9.]+)%"', svg)]
    assert max(ends) <= 66.0


def test_long_names_keep_their_end() -> None:
    assert elided("short.test") == "short.test"
    name = f"{'x' * 200}.search.example.com"
    assert elided(name).endswith("….search.example.com"[1:])
    assert len(elided(name)) == 44
