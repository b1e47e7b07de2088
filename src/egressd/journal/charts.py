"""Charts as inline SVG: columns over time, bars per name. Pure functions from numbers to markup.

No script, no fixed width: x positions are percentages, so a chart is as wide as its place and its letters
keep their size on a phone and on paper. Colours are classes (the page's style knows light, dark and print),
and nothing is told by colour alone: every bar has its number and its word, every panel its title.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from egressd.journal.markup import Html, element, joined

__all__ = [
    "Bar", "Buckets", "Panel", "Scale", "ScaleKind", "bars", "buckets", "byte_scale", "count_scale",
    "counted", "elided", "human_bytes", "timeline",
]  # fmt: skip

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_NICE = (1, 2, 5)
# A linear axis is left when it would hide most of what it shows: more than half of the bars under this part
# of it.
_INVISIBLE = 0.01
# What one column may stand for, in seconds: 1 s ... 30 s, minutes, hours, days, weeks, a year.
_STEPS = (
    *(1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10800, 21600, 43200),
    *(86400, 172800, 604800, 1209600, 2592000, 7776000, 31536000),
)  # fmt: skip
_DAY = 86400
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


# ---- numbers as a reader wants them


def counted(value: int) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,}"


def human_bytes(value: int) -> str:
    """1234567 -> "1.18 MiB": three digits, binary units as in a policy's limits."""
    size, unit = value, 0
    while abs(size) >= 1024 ** (unit + 1) and unit < len(_UNITS) - 1:
        unit += 1
    if unit == 0:
        return f"{value} B"
    amount = value / 1024**unit
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:,.{digits}f} {_UNITS[unit]}"


def elided(text: str, most: int = 44) -> str:
    """At most `most` characters: the beginning and, longer, the end, which in a host name says whose it
    is."""
    if len(text) <= most:
        return text
    tail = (most - 1) * 2 // 3
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"


# ---- scales


class ScaleKind(enum.StrEnum):
    LINEAR = "linear"
    LOGARITHMIC = "logarithmic"


@dataclass(frozen=True, slots=True)
class Scale:
    """`ticks` are values with their labels, from the axis' zero upwards; the last one is its end."""

    kind: ScaleKind
    maximum: int
    ticks: tuple[tuple[int, str], ...]

    def place(self, value: int) -> float:
        """Where `value` lies on the axis, 0 to 1. Zero is 0 on both kinds; one on a logarithmic axis is
        not, since one byte is not none."""
        if value <= 0:
            return 0.0
        if self.kind is ScaleKind.LINEAR:
            return min(1.0, value / self.maximum)
        return min(1.0, math.log(value + 1) / math.log(self.maximum + 1))

    @property
    def words(self) -> str:
        """What a reader must know about it."""
        if self.kind is ScaleKind.LINEAR:
            return "Linear scale: twice the length is twice the amount."
        return (
            "Logarithmic scale, because the amounts differ so much that most would not show on a linear one:"
            " equal steps multiply, so compare the numbers, not the lengths."
        )


def count_scale(values: Iterable[int], *, ticks: int = 4) -> Scale:
    """Linear, from 0 to a round number not below the largest."""
    steps = _linear(max(values, default=0), ticks)
    return Scale(ScaleKind.LINEAR, steps[-1], tuple((each, _short(each)) for each in steps))


def byte_scale(values: Iterable[int], *, ticks: int = 4) -> Scale:
    """Linear, or logarithmic where more than half of what is not zero would be invisible."""
    some = [value for value in values if value > 0]
    largest = max(some, default=0)
    unseen = sum(value < largest * _INVISIBLE for value in some)
    if unseen * 2 > len(some):
        return _logarithmic(largest)
    unit = max((u for u in range(len(_UNITS)) if 1024**u <= max(largest, 1)), default=0)
    steps = [each * 1024**unit for each in _linear(-(-largest // 1024**unit), ticks)]
    return Scale(ScaleKind.LINEAR, steps[-1], tuple((each, human_bytes_round(each)) for each in steps))


def human_bytes_round(value: int) -> str:
    """2097152 -> "2 MiB", for ticks, which are round."""
    unit = max((u for u in range(len(_UNITS)) if 1024**u <= max(value, 1)), default=0)
    return f"{value // 1024**unit:,} {_UNITS[unit]}" if value else "0"


def _linear(largest: int, ticks: int) -> list[int]:
    """0 and multiples of 1, 2 or 5 times a power of ten, the last not below `largest`; at most ticks + 1
    steps."""
    largest = max(largest, 1)
    step = next(
        n * 10**power
        for power in range(len(str(largest)) + 1)
        for n in _NICE
        if n * 10**power * ticks >= largest
    )
    return list(range(0, -(-largest // step) * step + 1, step))


def _logarithmic(largest: int) -> Scale:
    exponents = range(len(_UNITS) - 1)
    ticks = [1024**power for power in exponents if 1024**power < largest]
    every = -(-len(ticks) // 3)  # labels must not touch on a phone
    return Scale(
        ScaleKind.LOGARITHMIC,
        largest,
        ((0, "0"), *((each, human_bytes_round(each)) for each in ticks[1::every])),
    )


def _short(value: int) -> str:
    """12000 -> "12k"; axis labels have little room."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power * 10 or (value >= 10**power and value % 10**power == 0):
            amount = f"{value / 10**power:.1f}".removesuffix(".0")
            return amount + letter
    return str(value)


# ---- time


@dataclass(frozen=True, slots=True)
class Buckets:
    """`count` spans of `step` seconds, the first beginning at `start` (Unix time, a multiple of step)."""

    start: int
    step: int
    count: int

    def index(self, moment: float) -> int | None:
        """Which one `moment` falls in; None outside."""
        found = int((moment - self.start) // self.step)
        return found if 0 <= found < self.count else None

    def at(self, index: int) -> datetime:
        return _EPOCH + timedelta(seconds=self.start + index * self.step)

    def totals(self, moments: Iterable[tuple[float, int]]) -> list[int]:
        """Sums of the amounts of (Unix time, amount) by bucket."""
        sums = [0] * self.count
        for moment, amount in moments:
            where = self.index(moment)
            if where is not None:
                sums[where] += amount
        return sums

    @property
    def words(self) -> str:
        """ "5 minutes"."""
        for seconds, name in ((_DAY, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
            if self.step % seconds == 0:
                number = self.step // seconds
                return f"{number} {name}{'' if number == 1 else 's'}"
        raise AssertionError(self.step)


def buckets(first: float, last: float, *, most: int = 72) -> Buckets:
    """At most `most` + 1 equal spans of a round length that cover `first` to `last`, both included."""
    last = max(first, last)
    step = next((s for s in _STEPS if (last - first) / s <= most), _STEPS[-1])
    while (last - first) / step > most:  # centuries: a clock that was wrong
        step *= 10
    start = int(first // step) * step
    return Buckets(start=start, step=step, count=int((last - start) // step) + 1)


@dataclass(frozen=True, slots=True)
class Panel:
    """One row of columns. `css`: the class that colours it. `name` is its heading, `unit` what is counted."""

    name: str
    unit: str
    css: str
    amounts: Sequence[int]


_PANEL = 110  # pixels
_HEADING = 38
_AXIS = 40


def timeline(panels: Sequence[Panel], spans: Buckets, *, label: str, words: str) -> Html:
    """Panels one above the other over one axis of time. `label` and `words` are title and description."""
    height = (_PANEL + _HEADING) * len(panels) + _AXIS
    body, axis = [], []
    for number, panel in enumerate(panels):
        top = number * (_PANEL + _HEADING) + _HEADING
        scale = count_scale(panel.amounts, ticks=3)
        axis.append(_y_axis(scale, top))
        body.append(_grid(scale, top))
        body.append(element("text", f"{panel.name} ({panel.unit})", x=0, y=top - 10, class_="heading"))
        body.append(_columns(panel, spans, scale, top))
    body.append(_x_axis(spans, height - _AXIS, height))
    scale_side = element("svg", *axis, class_="side", width="100%", height=height, aria_hidden="true")
    return element(
        "div",
        scale_side,
        _image(body, height=height, label=label, words=words),
        class_="timeline",
    )


def _image(body: Iterable[Html], *, height: int, label: str, words: str) -> Html:
    return element(
        "svg",
        element("title", label),
        element("desc", words),
        *body,
        role="img",
        aria_label=f"{label}. {words}",
        width="100%",
        height=height,
    )


def _columns(panel: Panel, spans: Buckets, scale: Scale, top: int) -> Html:
    wide = 100 / spans.count
    gap = 0.12 * wide
    drawn = []
    for index, amount in enumerate(panel.amounts):
        if amount:
            tall = max(2.0, scale.place(amount) * _PANEL)  # what happened once must be seen, too
            words = f"{moment_words(spans.at(index), spans.step)}: {counted(amount)} {panel.unit}"
            drawn.append(
                element(
                    "rect",
                    element("title", words),
                    x=f"{index * wide + gap / 2:.3f}%",
                    y=f"{top + _PANEL - tall:.1f}",
                    width=f"{wide - gap:.3f}%",
                    height=f"{tall:.1f}",
                    class_=panel.css,
                )
            )
    return element("g", *drawn)


def moment_words(moment: datetime, step: int) -> str:
    """As exact as a column is wide."""
    if step % _DAY == 0:
        return moment.strftime("%Y-%m-%d")
    return moment.strftime("%Y-%m-%d %H:%M:%S" if step < 60 else "%Y-%m-%d %H:%M")


def _grid(scale: Scale, top: int) -> Html:
    lines = []
    for value, _ in scale.ticks:
        y = top + _PANEL - scale.place(value) * _PANEL
        lines.append(
            element("line", x1=0, x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid" if value else "base")
        )
    return joined(lines)


def _y_axis(scale: Scale, top: int) -> Html:
    texts = []
    for value, name in scale.ticks:
        y = top + _PANEL - scale.place(value) * _PANEL
        texts.append(element("text", name, x="100%", dx=-6, y=f"{y + 4:.1f}", text_anchor="end"))
    return joined(texts)


def _x_axis(spans: Buckets, top: int, bottom: int) -> Html:
    """Round times at the columns' left edges; a day under the first one and wherever a new one begins. Every
    other tick is of class `alternate`, whose text a narrow page leaves out."""
    drawn, day, day_if_narrow = [], "", ""
    for number, (place, moment) in enumerate(_time_ticks(spans)):
        x, css = f"{place:.3f}%", "alternate" if number % 2 else None
        at = {"x": x, "text_anchor": "start" if place < 6 else "end" if place > 94 else "middle"}
        drawn.append(element("line", x1=x, x2=x, y1=top, y2=top + 5, class_="base"))
        date = f"{moment.day} {_MONTHS[moment.month - 1]}"
        if spans.step % _DAY:
            name = moment.strftime("%H:%M:%S" if spans.step < 60 else "%H:%M")
            drawn.append(element("text", name, y=top + 18, class_=css, **at))
        if date != day:
            drawn.append(element("text", date, y=bottom - 6, class_=css, **at))
        elif date != day_if_narrow and css is None:  # its first tick is one of those left out
            drawn.append(element("text", date, y=bottom - 6, class_="narrow", **at))
        day, day_if_narrow = date, day_if_narrow if css else date
    return joined(drawn)


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def _time_ticks(spans: Buckets) -> list[tuple[float, datetime]]:
    """Places in percent, and times: at most eight, multiples of a round step."""
    length = spans.step * spans.count
    step = next((s for s in _STEPS if s >= spans.step and s * 7 >= length), max(_STEPS[-1], spans.step))
    first = -(-spans.start // step) * step
    found = range(first, spans.start + length, step) if length // step < 9 else range(first, first + 1)
    return [(100 * (t - spans.start) / length, _EPOCH + timedelta(seconds=t)) for t in found]


# ---- bars


@dataclass(frozen=True, slots=True)
class Bar:
    """A name and its amounts, in the order of the chart's series."""

    name: str
    amounts: tuple[int, ...]


_NAME = 18
_BAR = 14
_BETWEEN = 10
_ROOM = 0.66  # of the width; the rest is for the number behind the longest bar


def bars(rows: Sequence[Bar], series: Sequence[tuple[str, str]], *, label: str) -> tuple[Html, str]:
    """Horizontal bars of bytes, `series` (word, class) for each row. Returns the chart and the sentence about
    its scale, which belongs beside it."""
    scale = byte_scale(amount for row in rows for amount in row.amounts)
    each = _NAME + _BAR * len(series) + _BETWEEN
    height = each * len(rows) + 24
    drawn = [_bar_grid(scale, height)]
    for number, row in enumerate(rows):
        drawn.append(_bar_row(row, series, scale, number * each))
    return _image(drawn, height=height, label=label, words=scale.words), scale.words


def _bar_row(row: Bar, series: Sequence[tuple[str, str]], scale: Scale, top: int) -> Html:
    words = ", ".join(
        f"{word} {counted(amount)} bytes" for (word, _), amount in zip(series, row.amounts, strict=True)
    )
    drawn = [
        element("title", f"{row.name}: {words}"),
        element("text", elided(row.name), x=0, y=top + 13, class_="heading halo"),
    ]
    for number, ((word, css), amount) in enumerate(zip(series, row.amounts, strict=True)):
        y, wide = top + _NAME + number * _BAR, 100 * _ROOM * scale.place(amount)
        if amount:
            drawn.append(
                element("rect", x=0, y=y + 1, width=f"{max(wide, 0.4):.3f}%", height=_BAR - 3, class_=css)
            )
        drawn.append(
            element("text", f"{human_bytes(amount)} {word}", x=f"{wide:.3f}%", dx=6, y=y + 10, class_="halo")
        )
    return element("g", *drawn)


def _bar_grid(scale: Scale, height: int) -> Html:
    drawn = []
    for value, name in scale.ticks:
        x = f"{100 * _ROOM * scale.place(value):.3f}%"
        drawn.append(element("line", x1=x, x2=x, y1=0, y2=height - 20, class_="grid" if value else "base"))
        drawn.append(element("text", name, x=x, y=height - 6, text_anchor="middle" if value else "start"))
    return joined(drawn)
