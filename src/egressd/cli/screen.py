"""Standard output: one JSON document, or colour if a person is looking."""

from __future__ import annotations

import json
import os
import sys

from egressd.cli.text import Paint

__all__ = ["paint", "print_json"]


def print_json(document: object) -> None:
    """One document. ASCII only, so that it is harmless on a terminal too."""
    json.dump(document, sys.stdout, indent=2 if sys.stdout.isatty() else None)
    print()


def paint() -> Paint:
    return Paint(sys.stdout, no_color=bool(os.environ.get("NO_COLOR")))
