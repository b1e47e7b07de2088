"""How a verb describes itself: the same shape, options and examples for all."""

from __future__ import annotations

import argparse
from typing import TypeAlias

__all__ = ["Subparsers", "verb_parser"]

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def verb_parser(
    subparsers: Subparsers, name: str, *, summary: str, says: str, examples: str
) -> argparse.ArgumentParser:
    """A verb's parser. `says` is a paragraph, `examples` lines of commands with their meaning.

    The two options of every verb may stand on either side of it.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=says,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # SUPPRESS: where the option is absent here, what stood before the verb counts.
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document")
    parser.add_argument(
        "--run-dir", metavar="DIR", default=argparse.SUPPRESS, help="where the control socket is"
    )
    return parser
