"""`egressctl proof`: evidence of a workspace, or of one sandbox of it, as one file that anybody can check."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.checkpoints import kept, size_of
from egressd.cli.exits import FOUND, OK, REFUSED
from egressd.cli.screen import complain, paint, print_json
from egressd.journal.records import stamp
from egressd.model.errors import EgressdError
from egressd.model.identities import Link
from egressd.model.verdicts import Reason

if TYPE_CHECKING:
    from egressd.journal.verification import Report

__all__ = ["add", "fetch", "page_of", "run"]

_BEGINNING, _BOOT = "beginning", "boot"


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "proof",
        summary="signed evidence of what a workspace sent, to whom, and what was refused",
        says="Write one signed file: the policy and the ruleset that were in force, what the kernel counted\n"
        "per host and reason, each flow, denial and sandbox as it was recorded, and a proof that these are\n"
        "the journal's records. It is checked at once, and by anybody, anywhere, with `egressctl verify`.\n"
        "The window begins at the last snapshot of the counters before --since.\n"
        "Exit status 1 if what it proves is that something is wrong (the books do not balance).",
        examples="  egressctl proof -w acme                          everything, into acme.proof\n"
        "  egressctl proof -w acme --since 1h -o hour.proof the last hour\n"
        "  egressctl proof -w acme --since 2026-11-01 --until 2026-12-01 --html november.html\n"
        "  egressctl proof -w acme --sandbox eg7            one sandbox, after its end, into acme-eg7.proof",
    )
    parser.add_argument("-w", "--workspace", metavar="WORKSPACE", required=True, help="of which workspace")
    parser.add_argument("--sandbox", metavar="LINK", type=_link, help="of this sandbox alone, such as eg7")
    parser.add_argument(
        "--since", metavar="TIME", type=_moment,
        help="30m, 2h, 7d, a date with or without a time (UTC), boot or beginning (the default)",
    )  # fmt: skip
    parser.add_argument("--until", metavar="TIME", type=_moment, help="the same; without it until now")
    parser.add_argument(
        "--checkpoint", metavar="FILE",
        help="prove as well that the journal continues this checkpoint, or that of an earlier proof",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write it; - is standard output")
    parser.add_argument("--html", metavar="FILE", help="also as one page to read and print")


def run(args: argparse.Namespace) -> int:
    try:
        checkpoint = None if args.checkpoint is None else kept(args.checkpoint)
        data = fetch(
            args.run_dir,
            args.workspace,
            link=args.sandbox,
            since=args.since,
            until=args.until,
            continues=None if checkpoint is None else size_of(checkpoint) or None,
        )
    except (EgressdError, OSError, ValueError) as error:
        if args.json:
            reason = getattr(error, "reason", Reason.UNKNOWN)
            print_json({"error": {"reason": reason.value, "text": str(error)}})
        complain(str(error))
        return REFUSED
    return _deliver(args, data, checkpoint)


def fetch(
    run_dir: str,
    workspace: str,
    *,
    link: int | None = None,
    since: str | None = None,
    until: str | None = None,
    continues: int | None = None,
) -> bytes:
    """The proof's file. Refused, ProtocolError, OSError; ValueError for an answer that is no envelope."""
    from egressd.journal import dsse  # noqa: PLC0415
    from egressd.sandbox.control import Control  # noqa: PLC0415

    with Control(run_dir) as control:
        return dsse.encode(control.prove(workspace, link=link, since=since, until=until, continues=continues))


def _deliver(args: argparse.Namespace, data: bytes, checkpoint: str | None) -> int:
    from egressd.cli.proof_words import document, render  # noqa: PLC0415
    from egressd.cli.whole_files import write_whole  # noqa: PLC0415
    from egressd.journal.verification import verify  # noqa: PLC0415

    report = verify(data, checkpoint=checkpoint)
    where = name = args.output or _name(args.workspace, args.sandbox)
    try:
        if name == "-":
            sys.stdout.buffer.write(data)
        else:
            write_whole(Path(name), data)
        if args.html:
            where = args.html
            write_whole(Path(where), page_of(report))
    except OSError as error:
        complain(f"the proof could not be written to {where}: {error.strerror or error}")
        return REFUSED
    if name == "-":
        pass
    elif args.json:
        print_json({"file": name, **document(report)})
    else:
        print(render(report, name=name, paint=paint()))
    return OK if report.verified else FOUND


def _name(workspace: str, link: int | None) -> str:
    """Of a workspace that the daemon knows, so its name holds no slash."""
    return f"{workspace}.proof" if link is None else f"{workspace}-eg{link}.proof"


def page_of(report: Report) -> bytes:
    """The report as one HTML page."""
    from egressd.journal.page import page  # noqa: PLC0415

    return page(report, reasons={reason.value: reason.text for reason in Reason}).encode()


# ---- what is typed


def _link(text: str) -> int:
    link = Link.written(text)
    if link is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no sandbox: write eg7, as `egressctl audit` does")
    return link.number


def _moment(text: str) -> str | None:
    if text == _BEGINNING:
        return None
    if text == _BOOT:
        return stamp(datetime.now(UTC) - timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME)))
    from egressd.cli.audit import instant  # noqa: PLC0415

    return stamp(instant(text))
