"""One record, one spelling; anything else is refused."""

from __future__ import annotations

import enum
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.journal import records
from egressd.journal.records import (
    MAX_FIELDS,
    MAX_LINE,
    MAX_TEXT,
    Record,
    RecordError,
    bounded,
    decode,
    encode,
)

TIME = "2026-03-01T12:00:00.000001Z"


def record(**changes) -> Record:
    given = {
        "seq": 7,
        "time": TIME,
        "process": "auditor",
        "event": "denied",
        "fields": {"port": 443, "link": "eg1"},
    }
    return Record(**{**given, **changes})


def test_a_line_is_json_with_sorted_keys_and_no_spaces() -> None:
    assert encode(record()) == (
        b'{"event":"denied","fields":{"link":"eg1","port":443},"process":"auditor","seq":7,'
        b'"time":"2026-03-01T12:00:00.000001Z"}\n'
    )


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("plain", b'"plain"'),
        ("two\nlines", rb'"two\nlines"'),
        ("\x1b[31mred", rb'"\u001b[31mred"'),
        ("\x7f\x9b", rb'"\u007f\u009b"'),
        ("über", rb'"\u00fcber"'),
        ("\u202egpj.exe", rb'"\u202egpj.exe"'),
        ("\U0001f600", rb'"\ud83d\ude00"'),
        ("\ud800", rb'"\ud800"'),
        ('"}', rb'"\"}"'),
        ("\\u0041", rb'"\\u0041"'),
    ],
)
def test_foreign_text_is_escaped_and_comes_back(text: str, spelled: bytes) -> None:
    line = encode(record(fields={"text": text}))
    assert b'{"text":' + spelled + b"}" in line
    assert line.count(b"\n") == 1
    assert decode(line).fields == {"text": text}


@pytest.mark.parametrize(
    "changes",
    [
        {"seq": -1}, {"seq": True}, {"seq": 1 << 63}, {"seq": 1.0},
        {"time": "2026-03-01T12:00:00Z"}, {"time": "2026-03-01 12:00:00.000000Z"}, {"time": TIME + "\n"},
        {"process": "Auditor"}, {"process": ""}, {"process": "a" * 33}, {"process": "a\n"},
        {"event": "x"}, {"event": "Denied"}, {"event": "denied\n"},
        {"fields": {"Port": 1}}, {"fields": {"": 1}}, {"fields": {"a" * 32: 1}}, {"fields": {"a\n": 1}},
        {"fields": {"a": [1]}}, {"fields": {"a": {"b": 1}}}, {"fields": {"a": float("nan")}},
        {"fields": {"a": float("inf")}}, {"fields": {"a": 1 << 64}}, {"fields": {"a": "x" * (MAX_TEXT + 25)}},
        {"fields": {f"k{i}": 1 for i in range(MAX_FIELDS + 1)}},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_record_may_not_hold_is_refused(changes: dict) -> None:
    with pytest.raises(RecordError):
        record(**changes)


GOOD = encode(record())


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\n", b"null", b"[]", b"{}", b"7", b"\xff", b"\x00" * 40, b"[" * 100_000,
        GOOD[:-2], GOOD[:40], GOOD + b"\n", b" " + GOOD, GOOD.replace(b":7", b": 7"),
        GOOD.replace(b":7", b":07"), GOOD.replace(b":7", b":7.0"), GOOD.replace(b":7", b":true"),
        GOOD.replace(b'"seq":7', b'"seq":6,"seq":7'),
        GOOD.replace(b'"seq":7', b'"extra":1,"seq":7'),
        GOOD.replace(b'"port":443', b'"port":443,"port":443'),
        GOOD.replace(b'"eg1"', b'"\\u0065g1"'), GOOD.replace(b'"eg1"', b'"\xc3\xbc"'),
        GOOD.replace(b'"eg1"', b'"\x7f"'), GOOD.replace(b'"eg1"', b'NaN'), GOOD.replace(b'"eg1"', b'1e999'),
        GOOD.replace(b'"eg1"', b"9" * 5000), GOOD.replace(b'"eg1"', b'"' + b"x" * MAX_LINE + b'"'),
        b'{"event":"denied","fields":[],"process":"auditor","seq":7,"time":"' + TIME.encode() + b'"}',
    ],
)  # fmt: skip
def test_a_line_that_is_not_canonical_is_refused(line: bytes) -> None:
    with pytest.raises(RecordError):
        decode(line)


def test_the_newline_is_optional_when_reading() -> None:
    assert decode(GOOD) == decode(GOOD[:-1]) == record()


def test_bounded_says_what_it_cut() -> None:
    cut = bounded({"a": "x" * (MAX_TEXT + 5), "B": 1, "c": [1], "d": float("nan"), "e": 10**400, "f": None})
    assert cut == {
        "a": "x" * MAX_TEXT + "...[+5]",
        "c": "[1]",
        "cut_fields": 1,
        "d": "nan",
        "e": "a very large number",
        "f": None,
    }
    many = bounded({f"k{i}": i for i in range(100)})
    assert len(many) == MAX_FIELDS
    assert many["cut_fields"] == 100 - (MAX_FIELDS - 1)


def test_the_largest_fields_still_make_a_line() -> None:
    fields = bounded({f"k{i}{'x' * 27}": "\U0001f600" * 5000 for i in range(60)})
    assert len(encode(record(fields=fields))) < MAX_LINE


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 64) + 1, (1 << 64) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=60, alphabet=st.characters(codec=None)),
)  # fmt: skip
KEYS = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, SCALARS, max_size=10), st.integers(0, (1 << 63) - 1))
def test_what_is_written_is_read_back(fields: dict, seq: int) -> None:
    line = encode(record(fields=fields, seq=seq))
    assert decode(line) == record(fields=fields, seq=seq)
    assert encode(decode(line)) == line
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])


ODD = st.one_of(
    SCALARS,
    st.sampled_from([float("inf"), float("nan"), 1 << 64, -(1 << 64), "x" * (MAX_TEXT + 1), [1], b"x"]),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.one_of(KEYS, st.just("cut_fields")), ODD, max_size=10))
def test_names_that_are_known_vouch_for_no_value(fields: dict) -> None:
    """Fields named as earlier ones are looked at more shortly, and come out the same."""
    records._shapes.clear()
    slow = bounded(fields)
    bounded(dict.fromkeys(fields, 1))
    encode(record(fields=dict.fromkeys(fields, 1)))
    quick = bounded(fields)
    assert encode(record(fields=quick)) == encode(record(fields=slow))


def test_names_that_are_known_vouch_for_no_length() -> None:
    fields = {f"k{i}": "\U0001f600" * 1000 for i in range(MAX_FIELDS - 1)}
    bounded(dict.fromkeys(fields, 1))
    assert len(encode(record(fields=bounded(fields)))) < MAX_LINE


def slowly(given: Record) -> bytes:
    """What the one spelling is, said by json.dumps."""
    value = {
        "event": given.event, "fields": dict(given.fields), "process": given.process, "seq": given.seq,
        "time": given.time,
    }  # fmt: skip
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("\x7f", "\\u007f").encode("ascii") + b"\n"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(KEYS, SCALARS, max_size=10), min_size=1, max_size=4),
    st.integers(0, (1 << 63) - 1),
)
def test_the_fast_spelling_is_the_one_of_json(shapes: list[dict], seq: int) -> None:
    for fields in [*shapes, *shapes]:  # the second time each shape is known
        for order in (fields, dict(reversed(fields.items()))):
            assert encode(record(fields=order, seq=seq)) == slowly(record(fields=order, seq=seq))


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 62), 1 << 62),
    st.floats(-1e15, 1e15), st.floats(-1e-3, 1e-3),
    st.text(max_size=30, alphabet=st.characters(max_codepoint=0x7F)),
    st.text(max_size=30, alphabet='e-0.:1"\\'), st.text(max_size=5),
)  # fmt: skip


def together(fields: list[dict], *, seq: int = 0) -> list[bytes] | None:
    """As a batch, each of an event of its own."""
    frames = [
        records.frame(event=f"ev-{'x' * at}", process="p", names=tuple(each))
        for at, each in enumerate(fields)
    ]
    spelled = records.spelled(fields)
    assert None not in frames
    return None if spelled is None else records.finished(frames, spelled, seq=seq, time=TIME)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(KEYS.filter("cut_fields".__ne__), PLAIN, max_size=6), min_size=1, max_size=4),
    st.integers(0, 1 << 62),
)
def test_the_spelling_of_many_is_the_one_of_each(fields: list[dict], seq: int) -> None:
    found = together(fields, seq=seq)
    assert found is None or found == [
        records.spell(seq=seq + at, time=TIME, process="p", event=f"ev-{'x' * at}", fields=each)
        for at, each in enumerate(fields)
    ]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("some-host.e-1.test", True), ("\x00\n\x1b\x7f\"\\/", True), ("%b%d%", True), ("1e-7", True),
        (7, True), (-(1 << 62), True), (True, True), (None, True), (0.0, True), (-0.0, True), (0.001, True),
        (1e-4, True),
        (999999999999999.9, True), (9e-5, False), (-9e-5, False), (1e-7, False), (-2.5e-300, False),
        ("caf\u00e9", False), ("\u202e", False),
    ],
)  # fmt: skip
def test_what_is_spelled_together_and_what_is_looked_at_alone(value: object, plain: bool) -> None:
    fields = [{"a": 1}, {"b": value, "a": value}, {}]
    found = together(fields)
    assert (found is not None) is plain
    if found is not None:
        assert [decode(line).fields for line in found] == fields


def test_names_that_need_a_closer_look_have_no_frame() -> None:
    def framed(*names: str) -> bool:
        return records.frame(event="ev", process="p", names=names) is not None

    assert framed() and framed("a", "b_2") and framed(*(f"k{i}" for i in range(MAX_FIELDS - 1)))
    assert not framed("A") and not framed("a", "a b") and not framed("a\n") and not framed("%b")
    assert not framed("cut_fields") and not framed(*(f"k{i}" for i in range(MAX_FIELDS)))
    for event, process in (("Ev", "p"), ("e%bv", "p"), ("ev", "p%")):
        with pytest.raises(RecordError):
            records.frame(event=event, process=process, names=())


class Colour(enum.StrEnum):
    RED = "red\n"


class Number(enum.IntEnum):
    ONE = 1


def test_kinds_of_texts_and_numbers_are_spelled_as_what_they_are() -> None:
    odd = record(fields={"a": Colour.RED, "b": Number.ONE, "c": True, "d": -0.0, "e": 1e22, "f": 1e-7})
    assert encode(odd) == slowly(odd)
    assert rb'"a":"red\n","b":1,"c":true,"d":-0.0,"e":1e+22,"f":1e-07' in encode(odd)


def test_spelling_refuses_what_a_record_refuses() -> None:
    good = {"seq": 1, "time": TIME, "process": "p", "event": "ev", "fields": {"a": 1}}
    assert records.spell(**good) == encode(Record(**good))
    for change in (
        {"seq": -1}, {"seq": True}, {"time": "x"}, {"process": "P"}, {"event": "e\n"}, {"fields": {"A": 1}},
        {"fields": {"a": [1]}}, {"fields": {"a": float("nan")}}, {"fields": {"a": 1 << 64}},
        {"fields": {"a": "x" * (MAX_TEXT + 25)}}, {"fields": {f"k{i}": 1 for i in range(MAX_FIELDS + 1)}},
    ):  # fmt: skip
        with pytest.raises(RecordError):
            records.spell(**{**good, **change})


def test_shapes_are_forgotten_before_they_are_too_many() -> None:
    for number in range(records._MOST_SHAPES + 10):
        encode(record(fields={f"k{number}": 1}))
    assert len(records._shapes) <= records._MOST_SHAPES


ANYTHING = st.recursive(
    st.one_of(SCALARS, st.floats(), st.integers(), st.binary(max_size=9)), lambda x: st.lists(x, max_size=3)
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.one_of(KEYS, st.text(max_size=40)), ANYTHING, max_size=60))
def test_whatever_comes_can_be_recorded(fields: dict) -> None:
    line = encode(record(fields=bounded(fields)))
    assert decode(line).fields == bounded(fields)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda at, b: GOOD[:at] + b + GOOD[at + len(b) :],
            st.integers(0, len(GOOD)),
            st.binary(max_size=4),
        ),
        st.builds(
            lambda v: json.dumps(v).encode(), st.recursive(SCALARS, lambda x: st.dictionaries(KEYS, x))
        ),
    )
)
def test_any_line_is_a_record_or_refused(line: bytes) -> None:
    try:
        found = records.decode(line)
    except RecordError:
        return
    assert encode(found) == line.removesuffix(b"\n") + b"\n"
