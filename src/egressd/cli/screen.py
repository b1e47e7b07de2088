"""The three standard descriptors: one JSON document, colour if a person looks, no crash if nobody does."""

from __future__ import annotations

import contextlib
import io
import os
import sys

from egressd.cli.text import Paint, escape

__all__ = ["complain", "discard_output", "paint", "prepare", "print_json"]


def prepare() -> None:
    """Make the three standard descriptors fit to be used, whatever the caller closed or how it is spelled.

    Where 0, 1 or 2 came closed, the next thing opened would get that number: the connection to egressd, say,
    and a command would inherit it. open(2) gives the lowest number that is free.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a letter shows its number
        sys.stdout.reconfigure(errors="backslashreplace")


def complain(text: str) -> None:
    """One line on standard error, with what comes from elsewhere made harmless. Never fails."""
    with contextlib.suppress(OSError):
        print(f"egressctl: {escape(text)}", file=sys.stderr, flush=True)


def discard_output() -> None:
    """What is still buffered goes nowhere; otherwise the interpreter would complain once more at its end."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: not a real file, in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(document: object) -> None:
    """One document. ASCII only, so that it is harmless on a terminal too."""
    import json  # noqa: PLC0415 - most of the time nobody asks for it

    json.dump(document, sys.stdout, indent=2 if sys.stdout.isatty() else None)
    print()


def paint() -> Paint:
    return Paint(sys.stdout, no_color=bool(os.environ.get("NO_COLOR")), columns=_columns())


def _columns() -> int:
    """The width of the terminal that is looked at; 0 where nobody looks, and for a size that is not known."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0
    except (OSError, ValueError):
        return 0
