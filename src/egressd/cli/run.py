"""egressctl run: a command in a workspace's sandbox, behaving as it would under env(1)."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from egressd.model.errors import EgressdError

if TYPE_CHECKING:
    from egressd.sandbox.launch import Wish

__all__ = ["add", "run"]

FAILED = 125
_UNITS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0}


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to `subparsers` (of argparse.ArgumentParser.add_subparsers)."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run a command in a workspace's sandbox",
        description="Run CMD in a sandbox of WORKSPACE. The exit status is CMD's; 125 when egressd refuses,"
        " 124 when the time is up, 126 and 127 when CMD cannot be executed or found.",
    )
    parser.add_argument("-w", "--workspace", required=True, help="the workspace whose policy holds")
    parser.add_argument("--files", metavar="DIR", help="show DIR read-only at /work and start there")
    parser.add_argument(
        "--bind-ro", metavar="DIR", action="append", default=[], help="show DIR read-only where it is"
    )
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="set a variable for CMD"
    )
    parser.add_argument("--wall", metavar="TIME", help="end CMD after TIME (30s, 500ms, 2m)")
    parser.add_argument("--dry-run", action="store_true", help="print the sandbox's plan and run nothing")
    parser.add_argument("--debug", action="store_true", help="say on stderr what is done")
    parser.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER, help="the command")
    parser.set_defaults(handler=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """The exit status. Never raises for a refusal: says why on stderr and gives 125."""
    _fill_standard_descriptors()
    try:
        wish = _wish(args)
    except ValueError as error:
        return _fail(str(error))
    try:
        return _dry_run(wish) if args.dry_run else _run(wish, debug=args.debug)
    except EgressdError as error:
        return _failed(error)
    except OSError as error:
        return _fail(f"the sandbox could not be made: {error}")
    except KeyboardInterrupt:
        return 128 + 2  # before the signals were ours


def _wish(args: argparse.Namespace) -> Wish:
    from egressd.sandbox.launch import Wish  # noqa: PLC0415 - the other verbs do not need it

    command = list(args.command)
    if command and command[0] == "--":
        command.pop(0)
    return Wish(
        workspace=args.workspace,
        command=tuple(command),
        files=args.files,
        bind_ro=tuple(args.bind_ro),
        environment=dict(_variable(text) for text in args.env),
        wall=None if args.wall is None else _seconds(args.wall),
        terminal=any(_is_terminal(number) for number in (0, 1, 2)),
        **({"run_dir": args.run_dir} if getattr(args, "run_dir", None) else {}),
    )


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 came closed, the next thing opened would get that number, and be the command's: the
    connection to egressd, say. open() gives the lowest number that is free."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--env {text!r}: write NAME=VALUE")
    return name, value


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|)", text)
    if not match or not float(match[1]):
        raise ValueError(f"--wall {text!r}: write a time such as 30s, 500ms or 2m")
    return float(match[1]) * _UNITS[match[2]]


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False


def _run(wish: Wish, *, debug: bool) -> int:
    from egressd.sandbox.launch import start  # noqa: PLC0415
    from egressd.sandbox.signals import SignalDesk  # noqa: PLC0415

    with SignalDesk(terminal=wish.terminal) as desk:
        running = start(wish, desk=desk, say=_say if debug else None)
        outcome = running.watch(desk=desk)
    if outcome.why:
        _say(outcome.why)
    return outcome.status


def _dry_run(wish: Wish) -> int:
    from egressd.sandbox.control import Control  # noqa: PLC0415
    from egressd.sandbox.launch import prepare  # noqa: PLC0415
    from egressd.sandbox.plan import describe  # noqa: PLC0415

    with Control(wish.run_dir) as control:
        terms = control.enter(wish.workspace)
    prepared = prepare(wish, terms)
    if prepared.bounds.group is not None:
        prepared.bounds.group.close()
    for line in _facts(terms, prepared):
        print(f"# {line}")
    print(describe(prepared.plan), end="")
    return 0


def _facts(terms: Any, prepared: Any) -> list[str]:
    services = [f"127.0.0.1:{s.port} is {s.service} ({s.address4}, {s.address6})" for s in terms.services]
    wall = "no wall limit" if prepared.wall is None else f"at most {prepared.wall:g} s"
    return [
        f"workspace {terms.workspace}, guard {terms.guard}, policy {terms.policy}",
        f"limits: {prepared.bounds.text}; {wall}",
        *services,
        "by hand and without egressd it has no network:",
    ]


def _failed(error: EgressdError) -> int:
    from egressd.model.errors import Refused  # noqa: PLC0415
    from egressd.sandbox.launch import Interrupted  # noqa: PLC0415

    if isinstance(error, Interrupted):
        return 128 + error.signal
    reason = f" ({error.reason})" if isinstance(error, Refused) else ""
    return _fail(f"{error}{reason}")


def _fail(text: str) -> int:
    _say(text)
    return FAILED


def _say(text: str) -> None:
    """One message, one line: what comes from elsewhere is not to forge another."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    sys.stderr.write(f"egressctl: {shown}\n")
    sys.stderr.flush()
