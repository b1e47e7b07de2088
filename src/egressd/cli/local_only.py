"""`egressctl local-only`: external routing off; what is local, and networks that are listed, go on."""

from __future__ import annotations

import argparse

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.switches import LOCAL_ONLY, add_arguments, switch

__all__ = ["add", "run"]


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "local-only",
        summary="is external routing off: on or off",
        says="Write `local_only:` into the policy of a workspace, and apply it. While it is on, only its\n"
        "`local` and `cidr` rules remain: hosts are out of the kernel's maps, and open connections to them\n"
        "are reset. Guard and residency stay as they are. For root and the daemon's user.",
        examples="  egressctl local-only acme           what it is\n"
        "  egressctl local-only acme on        no host is reached any more\n"
        "  egressctl local-only acme off       the hosts that are listed are",
    )
    add_arguments(parser, LOCAL_ONLY)


def run(args: argparse.Namespace) -> int:
    return switch(args, LOCAL_ONLY)
