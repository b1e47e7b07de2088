"""`egressctl guard`: how strictly a workspace's sandboxes are held to its list."""

from __future__ import annotations

import argparse

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.switches import GUARD, add_arguments, switch

__all__ = ["add", "run"]


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "guard",
        summary="is what is not listed refused: on, observe or off",
        says="Write `guard:` into the policy of a workspace, and apply it: `on` refuses what is not listed,\n"
        "`observe` lets it through and records it, `off` lets it through. Everything else in the file stays\n"
        "as it is, comments too. Who did it is on record. For root and the daemon's user.",
        examples="  egressctl guard acme                what it is\n"
        "  egressctl guard acme on             enforce\n"
        "  egressctl guard acme off --dry-run  what that would open",
    )
    add_arguments(parser, GUARD)


def run(args: argparse.Namespace) -> int:
    return switch(args, GUARD)
