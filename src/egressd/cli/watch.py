"""`egressctl watch`: what goes on, as it goes on. Asks egressd again and again, and shows what changed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import sleep, time
from typing import TYPE_CHECKING, Any, Final

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.exits import OK, REFUSED
from egressd.cli.screen import complain, paint, print_json
from egressd.cli.watch_frame import Frame, Happening, History, page
from egressd.model.errors import EgressdError, Refused
from egressd.model.verdicts import Reason
from egressd.sandbox.control import Control

if TYPE_CHECKING:
    from egressd.processes.journal_search import Found, Search, Tail

__all__ = ["Source", "add", "run"]

_ROWS: Final = 50  # of each table, where the picture is text
_DUMB: Final = ("", "dumb", "unknown")  # terminals that cannot place a cursor


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "watch",
        summary="sandboxes, hosts, rates and denials, live",
        says="A live picture: sandboxes and hosts with their rates, and the latest denials; these come from\n"
        "the journal where it may be read, else from the counters. Those who are not root see the\n"
        "workspaces they are a member of.\n"
        "Keys: q quit, w next workspace, s sort, d denials only, p pause.",
        examples="  egressctl watch              until q is pressed\n"
        "  egressctl watch -w acme      one workspace\n"
        "  egressctl watch --once       one picture as text\n"
        "  egressctl watch --json       one document per line, for programs",
        json=False,
    )
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document per line"
    )
    parser.add_argument("-w", "--workspace", metavar="WORKSPACE", help="begin with only this workspace")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_interval, default=1.0, help="between two readings (1)"
    )
    parser.add_argument(
        "--once", action="store_true", help="one picture as text, from two readings, and no terminal needed"
    )
    parser.add_argument(
        "--journal", metavar="DIR", help="the journal's directory, where egressd does not tell"
    )


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}: write seconds between 0.1 and 3600")
    return seconds


def run(args: argparse.Namespace) -> int:
    source = Source(args)
    if args.json:
        return _stream(args, source)
    if args.once:
        return _once(args, source)
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "") in _DUMB:
        complain(
            "watch needs a terminal: use `egressctl watch --once`, `egressctl status` or `egressctl counters`"
        )
        return REFUSED
    from egressd.cli.watch_screen import Watch  # noqa: PLC0415 - textual takes a third of a second

    app = Watch(source.read, interval=args.interval, workspace=args.workspace)
    app.run()
    return app.return_code or OK


def _once(args: argparse.Namespace, source: Source) -> int:
    try:
        source.read()
        sleep(args.interval)
        frame = source.read()
    except (EgressdError, OSError, ValueError) as error:
        complain(str(error))
        return REFUSED
    print(page(frame.of(args.workspace).sorted_by("rate"), paint=paint(), most=_ROWS))
    return OK


def _stream(args: argparse.Namespace, source: Source) -> int:
    import json  # noqa: PLC0415

    try:
        for frame in _frames(args, source):
            print(json.dumps(frame.of(args.workspace).document()), flush=True)
    except (EgressdError, ValueError) as error:
        print_json({"error": {"reason": getattr(error, "reason", Reason.UNKNOWN).value, "text": str(error)}})
        complain(str(error))
        return REFUSED
    return OK


def _frames(args: argparse.Namespace, source: Source) -> Iterator[Frame]:
    """The first has no rates, so it is not told."""
    source.read()
    while True:
        sleep(args.interval)
        yield source.read()
        if args.once:
            return


@dataclass(slots=True)
class Source:
    """Reads what a frame is made of. A daemon that is away raises Refused; the next reading tries again."""

    args: argparse.Namespace
    history: History = field(default_factory=History)
    _log: _Log | None = None
    _tried: bool = False

    def read(self) -> Frame:
        """EgressdError, OSError or ValueError if there is no answer, or none that can be read."""
        with Control(self.args.run_dir) as control:
            status, counters = control.ask("status"), control.ask("counters")
        if not self._tried:
            self._tried = True
            self._log = _Log.open(self.args, status)
            self.history.journalled = self._log is not None
        news = self._log.news() if self._log else []
        try:
            return self.history.take(status, counters, news=news)
        except (KeyError, TypeError) as error:
            raise Refused(Reason.PROTOCOL, f"egressd's answer has another shape: {error!r}") from error


@dataclass(slots=True)
class _Log:
    """The denials of the journal: those of the last hour at first, then the new ones."""

    search: Search
    tail: Tail
    first: list[Happening]

    @classmethod
    def open(cls, args: argparse.Namespace, status: dict[str, Any]) -> _Log | None:
        """None where the journal may not be read, or is not there."""
        from itertools import islice  # noqa: PLC0415

        from egressd.cli.audit import instant  # noqa: PLC0415
        from egressd.cli.audit_words import VERDICTS  # noqa: PLC0415
        from egressd.processes.journal_search import Journal, Query, Search, Tail  # noqa: PLC0415

        directory = args.journal or f"{status.get('state_dir') or '/var/lib/egressd'}/journal"
        events = VERDICTS["denied"] | VERDICTS["refused"] | VERDICTS["observed"]
        try:
            journal = Journal.open(directory)
            recent = Search(Query(events=events, since=instant("1h", now=time())))
            first = list(islice(recent.through(journal, reverse=True), _ROWS))[::-1]
            return cls(Search(Query(events=events)), Tail(journal), [_happening(each) for each in first])
        except OSError:
            return None

    def news(self) -> list[Happening]:
        found, self.first = self.first, []
        try:
            while lines := self.tail.read():
                found += [_happening(each) for each in self.search.pick(lines)]
        except OSError as error:  # told as what it is, among the rest
            found.append(Happening(time(), "-", f"the journal cannot be read: {error.strerror}"))
        return found


def _happening(found: Found) -> Happening:
    from datetime import datetime  # noqa: PLC0415

    from egressd.cli.audit_words import sandbox, told, verdict  # noqa: PLC0415
    from egressd.cli.text import escape  # noqa: PLC0415

    _, record = found
    at = datetime.fromisoformat(record.time).timestamp()
    link = escape(sandbox(record.fields))
    workspace = escape(str(record.fields.get("workspace") or "-"))
    return Happening(at, workspace, f"{link}  {verdict(record)}  {told(record)}")
