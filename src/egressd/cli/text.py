"""What a person reads: tables, amounts and foreign text made harmless. Imports nothing but builtins.

Foreign text is whatever a sandbox, a policy's author or a resolver chose: commands, host names, comments.
It is escaped before it is aligned, so that it can neither move the cursor nor fake a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TextIO

__all__ = ["Paint", "amount", "duration", "escape", "escape_lines", "octets", "shorten", "table"]

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_RED, _GREEN, _BOLD, _RESET = "\x1b[31m", "\x1b[32m", "\x1b[1m", "\x1b[0m"


def escape(text: str) -> str:
    r"""`text` on one line, with everything a terminal could act on written out: ESC becomes \x1b.

    `str.isprintable` also excludes the invisible and the direction-changing (Unicode categories Cc, Cf,
    Cs, Zl, Zp), so a right-to-left override cannot reorder a host name. A backslash is doubled, so that
    the escaped form has one reading.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else _written_out(c) for c in text)


def _written_out(character: str) -> str:
    number = ord(character)
    if character == "\\":
        return "\\\\"
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def escape_lines(text: str) -> str:
    """`escape` for text that is meant to have lines and tabs, such as a ruleset: those stay."""
    return "\n".join("\t".join(map(_harmless, line.split("\t"))) for line in text.split("\n"))


def _harmless(text: str) -> str:
    # No doubling of backslashes: what is listed here must stay what `nft` would print.
    return text if text.isprintable() else "".join(c if c.isprintable() else _written_out(c) for c in text)


def shorten(text: str, width: int) -> str:
    """At most `width` characters of `text`, already escaped; dots say that there is more."""
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def amount(number: int) -> str:
    """Bytes, exactly, and in a unit a person can compare: `48201 (47.1 KiB)`."""
    if abs(number) < 1024:
        return str(number)
    value, unit = float(number), 0
    while abs(value) >= 1023.95 and unit < len(_UNITS) - 1:  # so that 1023.96 KiB reads 1.0 MiB
        value, unit = value / 1024, unit + 1
    return f"{number} ({value:.1f} {_UNITS[unit]})"


def octets(number: int) -> str:
    """The same in a sentence: `48201 bytes (47.1 KiB)`."""
    exact, _, rough = amount(number).partition(" ")
    return f"{exact} byte{'' if number == 1 else 's'} {rough}".rstrip()


def duration(seconds: float) -> str:
    """`42 s`, `26 min`, `3 h 05 min`, `12 d 4 h`."""
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "", indent: str = "", columns: int = 0
) -> str:
    """Aligned columns, two spaces apart, under `head`. `right` names the columns of numbers.

    Where that is wider than a terminal of `columns` (0: as wide as it likes), each row becomes a paragraph of
    its own. The cells must be escaped already. No line ends in a blank, and the last one has no newline.
    """
    flush = [name in right.split(",") for name in head]
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [indent + _row(row, widths, flush) for row in cells]
    if columns and max(map(len, lines)) > columns:
        return "\n".join(line for row in rows for line in _paragraph(head, row, indent, columns))
    return "\n".join(lines)


def _paragraph(head: Sequence[str], row: Sequence[str], indent: str, columns: int) -> Iterator[str]:
    """`eu.api.openai.com` and below it `ports 443/tcp, packets out 7, ...`, broken between cells only."""
    yield f"{indent}{head[0]} {row[0]}"
    line = f"{indent}  "
    for name, cell in zip(head[1:], row[1:], strict=True):
        piece = f"{name} {cell}, "
        if len(line) + len(piece) - 1 > columns and line.strip():
            yield line.rstrip()
            line = f"{indent}  "
        line += piece
    if line.strip():
        yield line.rstrip(", ")


def _row(row: Sequence[str], widths: Sequence[int], flush: Sequence[bool]) -> str:
    aligned = (
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(row, widths, flush, strict=True)
    )
    return "  ".join(aligned).rstrip()


class Paint:
    """Colour where a person looks at a terminal, nothing anywhere else (https://no-color.org); and how wide
    that terminal is, 0 for "it does not matter"."""

    def __init__(self, stream: TextIO, *, no_color: bool, columns: int = 0) -> None:
        self.on = stream.isatty() and not no_color
        self.columns = columns

    def good(self, text: str) -> str:
        return self._wrap(_GREEN, text)

    def bad(self, text: str) -> str:
        return self._wrap(_RED, text)

    def strong(self, text: str) -> str:
        return self._wrap(_BOLD, text)

    def _wrap(self, code: str, text: str) -> str:
        return f"{code}{text}{_RESET}" if self.on else text
