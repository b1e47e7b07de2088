"""Amounts, tables, and foreign text that must not reach a terminal as it is."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.cli.text import Paint, amount, duration, escape, escape_lines, octets, shorten, table


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("eu.api.openai.com", "eu.api.openai.com"),
        ("bücher.example", "bücher.example"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("two\nlines\r", r"two\x0alines\x0d"),
        ("\x9b31m", r"\x9b31m"),  # CSI as one byte, C1
        ("a\u202egnp.exe", r"a\u202egnp.exe"),  # right-to-left override
        ("zero\u200bwidth", r"zero\u200bwidth"),
        ("\U000e0041", r"\U000e0041"),  # tag characters: invisible text
        (r"\x1b", r"\\x1b"),  # not to be confused with the escaped form
        ("nul\x00", r"nul\x00"),
        ("", ""),
    ],
)
def test_foreign_text_is_written_out(foreign: str, shown: str) -> None:
    assert escape(foreign) == shown


@given(st.text(max_size=40))
@settings(max_examples=150)
def test_whatever_is_escaped_is_printable(text: str) -> None:
    assert escape(text).isprintable()
    assert "\n" not in escape(text)


@given(st.lists(st.text(alphabet=st.sampled_from("ab\x1b\\x1\n\t"), max_size=8), unique=True, max_size=10))
@settings(max_examples=100)
def test_different_texts_stay_different(texts: list[str]) -> None:
    assert len({escape(text) for text in texts}) == len(texts)


def test_a_listing_keeps_its_lines_and_tabs_and_nothing_else() -> None:
    assert escape_lines('table {\n\tcomment "\x1b]0;x\x07"\n}') == 'table {\n\tcomment "\\x1b]0;x\\x07"\n}'


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1024 (1.0 KiB)"),
        (48201, "48201 (47.1 KiB)"),
        (1_048_575, "1048575 (1.0 MiB)"),
        (1_048_576, "1048576 (1.0 MiB)"),
        (17_400_000_000, "17400000000 (16.2 GiB)"),
        (1 << 62, "4611686018427387904 (4.0 EiB)"),
        (-2048, "-2048 (-2.0 KiB)"),
    ],
)
def test_bytes_are_exact_and_readable(number: int, shown: str) -> None:
    assert amount(number) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 bytes"), (1, "1 byte"), (167, "167 bytes"), (48201, "48201 bytes (47.1 KiB)")],
)
def test_amounts_in_a_sentence_say_what_they_are_of(number: int, shown: str) -> None:
    assert octets(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3600 * 3 + 300, "3 h 05 min"),
        (86400 * 12 + 14_400, "12 d 4 h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_numbers_are_flush_right_and_no_line_ends_in_a_blank() -> None:
    shown = table(["host", "bytes", "note"], [["a", "5", ""], ["long.example", "12345", "x"]], right="bytes")
    assert shown.split("\n") == [
        "host          bytes  note",
        "a                 5",
        "long.example  12345  x",
    ]


@pytest.mark.parametrize(("text", "shown"), [("abcd", "abcd"), ("abcdef", "ab...")])
def test_shortened_text_says_so(text: str, shown: str) -> None:
    assert shorten(text, 5) == shown


def test_no_colour_unless_somebody_looks_and_wants_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert Paint(io.StringIO(), no_color=False).bad("x") == "x"
    assert Paint(Terminal(), no_color=True).bad("x") == "x"
    assert Paint(Terminal(), no_color=False).bad("x") == "\x1b[31mx\x1b[0m"
