"""How a verb describes itself: the same shape, options and examples for all."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn, TypeAlias

from egressd.cli.exits import USAGE
from egressd.cli.screen import complain

__all__ = ["Parser", "Subparsers", "verb_parser"]

Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """A wrong command line is told in one line that names the way out, after the usage; `usage_status` is the
    exit status for it. What was typed is shown harmlessly."""

    usage_status = USAGE

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        complain(f"{message} (see {self.prog} --help)")
        sys.exit(self.usage_status)


def verb_parser(
    subparsers: Subparsers, name: str, *, summary: str, says: str, examples: str, json: bool = True
) -> Parser:
    """A verb's parser. `says` is a paragraph, `examples` lines of commands with their meaning.

    The options of every verb may stand on either side of it; `json` is false for one whose output is not
    its own.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=says,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    # SUPPRESS: where the option is absent here, what stood before the verb counts.
    if json:
        parser.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document"
        )
    parser.add_argument(
        "--run-dir", metavar="DIR", default=argparse.SUPPRESS, help="where the control socket is"
    )
    return parser
