"""`egressctl ruleset`: the gateway's ruleset, read from the kernel at this moment."""

from __future__ import annotations

import argparse

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.daemon import answer
from egressd.cli.text import escape_lines

__all__ = ["add", "run"]


def add(subparsers: Subparsers) -> None:
    verb_parser(
        subparsers,
        "ruleset",
        summary="the gateway's nftables ruleset, as the kernel lists it",
        says="The ruleset of the gateway namespace as the kernel has it now, not as egressd meant it.\n"
        "The same as `ip netns exec egressd nft list ruleset`. For root and the daemon's user.",
        examples="  egressctl ruleset | less\n  egressctl ruleset | grep db.internal.example",
    )


def run(args: argparse.Namespace) -> int:
    return answer(
        args,
        lambda control: control.ask("ruleset"),
        show=lambda document: print(escape_lines(document["text"].rstrip("\n"))),
    )
