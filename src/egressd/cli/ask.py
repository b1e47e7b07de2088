"""egressctl ask: an inference over documents that one may see, by way of the broker."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.exits import INTERRUPTED, REFUSED
from egressd.cli.screen import complain, print_json
from egressd.model.errors import EgressdError

if TYPE_CHECKING:
    from egressd.broker.client import Broker, Result

__all__ = ["add", "run"]

_TOKEN = "EGRESSD_TOKEN"  # noqa: S105 - the name of a variable
_NONCE = "EGRESSD_NONCE"
_BROKER = "EGRESSD_BROKER"
_MOST_TOKEN, _MOST_LIST, _MOST_INPUT = 1 << 16, 64 << 20, 256 << 20  # bytes
_FORBIDDEN = stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "ask",
        summary="run an inference over documents that you may see",
        says="Ask the broker to run an inference of WORKSPACE, or CMD where that is permitted, with the\n"
        "documents that you may see. Your ID token says who you are: it is read from a file or from\n"
        f"${_TOKEN}, and never from the command line, which others can read; the nonce that it was\n"
        f"asked for with, if any, from ${_NONCE}. Standard input is the command's, and so are standard\n"
        "output and error and the exit status. 125: the broker refuses, or the command line is wrong.",
        examples="  egressctl ask -w acme --candidates found.txt < question.txt     what retrieval found\n"
        "  egressctl ask -w acme --file handbook:hr/leave.md --inference summary < /dev/null\n"
        "  egressctl ask -w acme --network none -- grep -r notice /work\n"
        "  egressctl ask -w acme --receipt job.json --candidates found.txt < question.txt\n"
        "  egressctl ask -w acme --proof job.proof --manifest MANIFEST.json --file handbook:hr/leave.md",
    )
    parser.usage = (
        "egressctl ask -w WORKSPACE [--inference NAME] [--file ID] [--candidates FILE]\n"
        "                     [--network none] [--token-file FILE] [--broker ADDRESS] [--ca FILE]\n"
        "                     [--cert FILE] [--key FILE] [--receipt FILE] [--proof FILE]\n"
        "                     [--manifest FILE] [--no-stream] [--json] [--] [CMD ...]"
    )
    parser.usage_status = REFUSED  # 2 could be the command's own
    _add_what(parser)
    _add_whom(parser)


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-w", "--workspace", metavar="WORKSPACE", required=True, help="whose documents, whose policy"
    )
    parser.add_argument("--inference", metavar="NAME", help="one that the workspace offers (default)")
    parser.add_argument(
        "--file", metavar="ID", action="append", default=[],
        help="show this document, SOURCE:PATH; if you may not see it, nothing is run",
    )  # fmt: skip
    parser.add_argument(
        "--candidates", metavar="FILE",
        help="show those of these documents that you may see, one SOURCE:PATH per line; - is standard input",
    )  # fmt: skip
    parser.add_argument("--network", metavar="none", choices=["none"], help="none: without any network")
    parser.add_argument(
        "--receipt", metavar="FILE", help="write what was shown and done, with signed evidence"
    )
    parser.add_argument(
        "--proof", metavar="FILE", help="write the signed evidence alone, for egressctl verify"
    )
    parser.add_argument(
        "--manifest", metavar="FILE", help="write the MANIFEST.json that it was shown, for egressctl verify"
    )
    parser.add_argument("--no-stream", action="store_true", help="write the output when it is whole")
    parser.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER, help="a command of your own")


def _add_whom(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token-file", metavar="FILE", help=f"holds your ID token (else ${_TOKEN} does)")
    parser.add_argument(
        "--broker",
        metavar="ADDRESS",
        help=f"unix:PATH or https://HOST:PORT (${_BROKER}, else the usual socket)",
    )
    parser.add_argument("--ca", metavar="FILE", help="certificates that the broker's is checked by")
    parser.add_argument("--cert", metavar="FILE", help="your certificate, for a broker at https://")
    parser.add_argument("--key", metavar="FILE", help="its key")


def run(args: argparse.Namespace) -> int:
    """The exit status. Never raises for a refusal: says why on stderr and gives 125."""
    from egressd.broker.client import DEFAULT_BROKER, Broker  # noqa: PLC0415 - httpx, which no other verb needs

    try:
        request = _request(args)
        token = _token(args.token_file)
        address = args.broker or os.environ.get(_BROKER) or DEFAULT_BROKER
        nonce = os.environ.get(_NONCE, "")
        keys = {"ca": args.ca, "certificate": args.cert, "key": args.key}
        with Broker(address, token=token, nonce=nonce, **keys) as broker:
            return _ask(broker, request, args)
    except (EgressdError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        if args.json:
            print_json({"error": {"status": getattr(error, "status", None), "text": text}})
        complain(text)
        return REFUSED


# ---- what is asked


def _request(args: argparse.Namespace) -> dict[str, Any]:
    command = list(args.command)
    if command and command[0] == "--":
        command.pop(0)
    if command and args.inference:
        raise ValueError("an inference that the workspace offers, or a command of your own: not both")
    candidates = _candidates(args.candidates)
    return {
        "workspace": args.workspace,
        "inference": None if command else args.inference or "default",
        "command": command or None,
        "candidates": candidates,
        "files": args.file,
        "network": args.network,
        "input": b"" if args.candidates == "-" else _input(),
    }


def _candidates(path: str | None) -> list[str]:
    if path is None:
        return []
    data = (
        _bounded(sys.stdin.buffer, "standard input", _MOST_LIST) if path == "-" else _file(path, _MOST_LIST)
    )
    return [line for line in data.decode("ascii", "backslashreplace").split("\n") if line.strip()]


def _input() -> bytes:
    """Of a terminal nothing: nobody is asked for what they may not want to say."""
    if sys.stdin is None or sys.stdin.isatty():
        return b""
    return _bounded(sys.stdin.buffer, "standard input", _MOST_INPUT)


def _file(path: str, most: int) -> bytes:
    with Path(path).open("rb") as stream:
        return _bounded(stream, path, most)


def _bounded(stream: Any, name: str, most: int) -> bytes:
    data: bytes = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name} has more than {most} bytes")
    return data


def _token(path: str | None) -> str:
    """Never shown, whatever is wrong with it."""
    if path is None:
        text = os.environ.get(_TOKEN, "")
        where = f"${_TOKEN}"
    else:
        text, where = _token_file(path), path
    text = text.strip()
    if not text:
        raise ValueError(
            f"{where} holds no token: log in at your identity provider, and put your ID token there"
        )
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{where} holds something that is no token")
    return text


def _token_file(path: str) -> str:
    with Path(path).open("rb") as stream:
        found = os.fstat(stream.fileno())
        if stat.S_ISREG(found.st_mode) and found.st_mode & _FORBIDDEN:
            raise ValueError(f"others can read {path}, and could be you: chmod 600, and get another token")
        return _bounded(stream, path, _MOST_TOKEN).decode("ascii", "replace")


# ---- asking


def _ask(broker: Broker, request: dict[str, Any], args: argparse.Namespace) -> int:
    whole = args.no_stream or args.json
    try:
        result = _heard(broker, request, write=(lambda *_: None) if whole else _write)
    except KeyboardInterrupt:  # cancelled by then
        return INTERRUPTED
    if args.json:
        print_json(_document(result))
    elif args.no_stream:
        _write("stdout", result.output)
        _write("stderr", result.errors)
    if result.why and not args.json:
        complain(f"{result.why} ({result.id})")
    trouble = _keep(broker, result, args)
    if trouble:
        complain(trouble)
    return result.status or (REFUSED if trouble else 0)


def _heard(broker: Broker, request: dict[str, Any], *, write: Callable[[str, bytes], None]) -> Result:
    """Leaving before the end, by Ctrl-C or because nobody reads, cancels it: it ends with the connection."""
    with broker.stream(**request) as running:
        for piece in running:
            write(piece.stream, piece.data)
    assert running.result is not None
    return running.result


def _write(stream: str, data: bytes) -> None:
    out = sys.stderr.buffer if stream == "stderr" else sys.stdout.buffer
    out.write(data)
    out.flush()


def _document(result: Result) -> dict[str, Any]:
    return {
        "id": result.id,
        "state": result.state,
        "status": result.status,
        "why": result.why,
        "hit": list(result.hit),
        "stdout": result.stdout,
        "stderr": result.stderr,
        "receipt": dict(result.receipt),
    }


# ---- what is kept of it


def _keep(broker: Broker, result: Result, args: argparse.Namespace) -> str:
    """Write what was asked for; what was in the way, in words."""
    if args.receipt is None and args.proof is None and args.manifest is None:
        return ""
    envelope, trouble = _evidence(broker, result) if args.receipt or args.proof else (None, "")
    kept: list[tuple[str, bytes]] = []
    if args.receipt is not None:
        receipt = {**result.receipt, "signed": envelope}
        kept.append((args.receipt, json.dumps(receipt, indent=2).encode() + b"\n"))
    if args.proof is not None and envelope is not None:
        from egressd.journal import dsse  # noqa: PLC0415

        kept.append((args.proof, dsse.encode(envelope)))
    if args.proof is not None and envelope is None:
        trouble = trouble or "nothing was run, so there is no evidence to sign"
    if args.manifest is not None:
        try:
            kept.append((args.manifest, broker.manifest(result.id)))
        except EgressdError as error:
            trouble = trouble or f"there is no manifest of it: {error}"
    return _written(kept) or trouble


def _evidence(broker: Broker, result: Result) -> tuple[dict[str, Any] | None, str]:
    """An envelope, if there is to be one; what was in the way."""
    try:
        return (broker.receipt(result.id, proof=True) if result.receipt.get("signed") else None), ""
    except EgressdError as error:
        return None, f"there is no signed evidence of it: {error}"


def _written(kept: list[tuple[str, bytes]]) -> str:
    """Each, whole or not at all; what was in the way."""
    from egressd.cli.whole_files import write_whole  # noqa: PLC0415

    for place, data in kept:
        try:
            write_whole(Path(place), data)
        except OSError as error:
            return f"the receipt cannot be written: {place}: {error.strerror}"
    return ""
