"""What the verbs that need the daemon share: ask it, and say plainly when it refuses or is not there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

from egressd.cli.exits import OK, REFUSED
from egressd.cli.screen import complain, print_json
from egressd.model.errors import EgressdError
from egressd.model.verdicts import Reason
from egressd.sandbox.control import Control

__all__ = ["Document", "answer"]

Document: TypeAlias = dict[str, Any]


def answer(
    args: argparse.Namespace,
    question: Callable[[Control], Document],
    *,
    show: Callable[[Document], None],
    status: Callable[[Document], int] = lambda _: OK,
) -> int:
    """Ask, `show` the answer (or print it as JSON), and return `status` of it; 125 if there is none.

    A refusal is a line on standard error and, for those who asked for JSON, a document too:
    `{"error": {"reason": "member", "text": "..."}}`.
    """
    try:
        with Control(args.run_dir) as control:
            document = question(control)
    except (EgressdError, OSError, ValueError) as error:  # ValueError: an answer that is not JSON
        if args.json:
            reason = getattr(error, "reason", Reason.UNKNOWN)
            print_json({"error": {"reason": reason.value, "text": str(error)}})
        complain(str(error))
        return REFUSED
    if args.json:
        print_json(document)
    else:
        show(document)
    return status(document)
