"""egressctl run: a command in a workspace's sandbox, behaving as it would under env(1)."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING, Any

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.exits import REFUSED
from egressd.cli.screen import complain
from egressd.model.errors import EgressdError

if TYPE_CHECKING:
    from egressd.sandbox.launch import Wish

__all__ = ["add", "run"]

_UNITS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0}


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "run",
        summary="run a command in a sandbox of a workspace",
        says="Run CMD in a new sandbox of WORKSPACE, as you. It sees a read-only system, a /tmp of its\n"
        "own, a clean environment, and of the network only what the workspace's policy lists.\n"
        "Standard input, output and error, signals and the exit status are CMD's. 125: egressd refuses,\n"
        "or the command line is wrong; 124: the time is up; 126, 127: CMD cannot be executed or found.",
        examples="  egressctl run -w acme -- curl https://eu.api.openai.com/v1/models\n"
        "  egressctl run -w acme --files ./job -- python3 infer.py      ./job is /work, read-only\n"
        "  egressctl run -w acme --bind-ro ~/venv -- ~/venv/bin/python infer.py\n"
        '  egressctl run -w acme --env OPENAI_API_KEY="$KEY" --wall 2m -- python3 infer.py\n'
        "  egressctl run -w acme --receipt job.proof -- python3 infer.py   signed evidence of this one run\n"
        "  egressctl run -w acme --dry-run -- true                      what would be run, and nothing is",
        json=False,
    )
    parser.usage = (
        "egressctl run -w WORKSPACE [--files DIR] [--bind-ro DIR] [--env NAME=VALUE]\n"
        "                     [--wall TIME] [--receipt FILE] [--preflight] [--dry-run] [--debug]\n"
        "                     [--run-dir DIR] [--] CMD ..."
    )
    parser.usage_status = REFUSED  # 2 could be the command's own
    parser.add_argument(
        "-w", "--workspace", metavar="WORKSPACE", required=True, help="the workspace whose policy holds"
    )
    parser.add_argument("--files", metavar="DIR", help="show DIR read-only at /work and start there")
    parser.add_argument(
        "--bind-ro", metavar="DIR", action="append", default=[], help="show DIR read-only where it is"
    )
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="set a variable for CMD"
    )
    parser.add_argument("--wall", metavar="TIME", help="end CMD after TIME (30s, 500ms, 2m)")
    parser.add_argument(
        "--receipt", metavar="FILE",
        help="write a signed proof of this run to FILE; status 125 where it cannot be had and CMD's was 0",
    )  # fmt: skip
    parser.add_argument(
        "--preflight", action="store_true",
        help="try first, in the sandbox, a handful of ways out; unless all are refused nothing runs (125)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the sandbox's plan and run nothing")
    parser.add_argument("--debug", action="store_true", help="say on stderr what is done")
    parser.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER, help="command and arguments")


def run(args: argparse.Namespace) -> int:
    """The exit status. Never raises for a refusal: says why on stderr and gives 125."""
    try:
        wish = _wish(args)
    except ValueError as error:
        return _fail(str(error))
    try:
        if args.dry_run:
            return _dry_run(wish)
        return _run(wish, debug=args.debug) if args.receipt is None else _run_with_receipt(args, wish)
    except EgressdError as error:
        return _failed(error)
    except OSError as error:
        return _fail(f"the sandbox could not be made: {error}")
    except KeyboardInterrupt:
        return 128 + 2  # before the signals were ours


def _wish(args: argparse.Namespace) -> Wish:
    """ValueError for what is not meant as it was typed."""
    from egressd.sandbox.launch import Wish  # noqa: PLC0415 - the other verbs do not need it

    command = list(args.command)
    if command and command[0] == "--":
        command.pop(0)
    if not command:
        raise ValueError(f"there is no command to run: egressctl run -w {args.workspace} -- CMD ...")
    return Wish(
        workspace=args.workspace,
        command=tuple(command),
        files=args.files,
        bind_ro=tuple(args.bind_ro),
        environment=dict(_variable(text) for text in args.env),
        wall=None if args.wall is None else _seconds(args.wall),
        terminal=any(_is_terminal(number) for number in (0, 1, 2)),
        preflight=_preflight(args) if args.preflight else (),
        **({"run_dir": args.run_dir} if getattr(args, "run_dir", None) else {}),
    )


def _preflight(args: argparse.Namespace) -> tuple[str, ...]:
    from egressd.selftest import preflight  # noqa: PLC0415 - most of the time nobody asks for it

    return preflight.command(args.run_dir)


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
    return _watched(wish, debug=debug)[0]


def _watched(wish: Wish, *, debug: bool) -> tuple[int, int]:
    """The exit status, and the number of the link it had."""
    from egressd.sandbox.launch import start  # noqa: PLC0415
    from egressd.sandbox.signals import SignalDesk  # noqa: PLC0415

    with SignalDesk(terminal=wish.terminal) as desk:
        running = start(wish, desk=desk, say=complain if debug else None)
        outcome = running.watch(desk=desk)
    if outcome.why:
        complain(outcome.why)
    return outcome.status, running.link


def _run_with_receipt(args: argparse.Namespace, wish: Wish) -> int:
    """The command's own status counts; a success without the receipt that was asked for is none."""
    from egressd.cli.receipt import Receipt  # noqa: PLC0415

    receipt = Receipt(args.receipt, wish.run_dir, wish.workspace)
    receipt.check_writable()  # before anything runs: OSError says what is wrong
    status, link = _watched(wish, debug=args.debug)
    trouble = receipt.fetch(link)
    if trouble:
        complain(trouble)
    return status or (REFUSED if trouble else 0)


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
    complain(text)
    return REFUSED
