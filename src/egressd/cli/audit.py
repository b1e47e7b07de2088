"""`egressctl audit`: what the journal says, of one workspace, sandbox, name, verdict or hour.

It reads the journal's files and asks the daemon nothing, so it works on a copy, and while egressd is down.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from time import time
from typing import TYPE_CHECKING, Final

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.exits import FOUND, OK, REFUSED
from egressd.cli.screen import complain, paint, print_json
from egressd.journal.moments import moment
from egressd.model.errors import Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason

if TYPE_CHECKING:
    from egressd.processes.journal_search import Found, Journal, Query, Search, Tail

__all__ = ["add", "instant", "journal_directory", "run"]

_CONFIG: Final = "/etc/egressd/egressd.yaml"
_STATE_DIR: Final = "/var/lib/egressd"
_LOOK: Final = 0.25  # seconds between two looks at a journal that is followed
_AT_ONCE: Final = 256  # records per write
_BEFORE: Final = 10  # records shown before those that are waited for
_VERDICTS: Final = ("denied", "observed", "allowed", "granted", "refused")


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "audit",
        summary="what was recorded: denials, flows, grants, sandboxes, requests, changes",
        says="Records of the journal, oldest first: those for which every option that is given holds.\n"
        "Times are in UTC. Needs no running egressd, but the right to read the journal: root, or a member\n"
        "of the group egressd-audit.\n"
        "Exit status 1 if the journal holds lines that are no records.",
        examples="  egressctl audit -w acme --since 1h                what happened in acme within the hour\n"
        "  egressctl audit --verdict denied,refused -f       what is refused, as it happens\n"
        "  egressctl audit --host '**.example.com' -n 20     the last 20 about names below example.com\n"
        "  egressctl audit --sandbox eg7 --json > eg7.jsonl  the records of one sandbox, byte for byte\n"
        "  egressctl audit --asker user:okta:00u1 --since 7d what somebody asked for in a week",
        json=False,
    )
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS,
        help="the records' lines as the journal holds them, one document each",
    )  # fmt: skip
    parser.add_argument("-w", "--workspace", metavar="WORKSPACE", help="of this workspace")
    parser.add_argument("--sandbox", metavar="LINK", type=_sandbox, help="of this sandbox, such as eg7")
    parser.add_argument("--request", metavar="ID", type=_request, help="of this request, such as r-...")
    parser.add_argument(
        "--asker", metavar="USER", type=_asker,
        help="of the requests of this user, such as user:okta:00u1",
    )  # fmt: skip
    parser.add_argument(
        "--host", metavar="NAME",
        help="about this name or address; *.example.com is one label more, **.example.com any",
    )  # fmt: skip
    parser.add_argument("--event", metavar="EVENTS", type=_events, help="of these kinds, such as denied,flow")
    parser.add_argument(
        "--verdict", metavar="VERDICTS", type=_verdicts, help=f"any of {', '.join(_VERDICTS)}; with commas"
    )
    parser.add_argument(
        "--reason", metavar="REASONS", type=_reasons, help="for these reasons, such as sni-other"
    )
    parser.add_argument(
        "--since", metavar="TIME", type=instant,
        help="not before: 30m, 2h or 7d ago, today, yesterday, or 2026-11-21T10:00",
    )  # fmt: skip
    parser.add_argument("--until", metavar="TIME", type=instant, help="before, spelled alike")
    parser.add_argument("-n", "--limit", metavar="N", type=_count, help="only the last N")
    parser.add_argument("-r", "--reverse", action="store_true", help="newest first")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is recorded from now on")
    parser.add_argument("--journal", metavar="DIR", help="the journal's directory; also a copy of one")


# ---- what is typed


def instant(text: str, *, now: float | None = None) -> datetime:
    """`30m` ago, `today`, `yesterday`, `now`, a date, or a date with a time; in UTC if it does not say."""
    try:
        return moment(text, now=datetime.fromtimestamp(time() if now is None else now, UTC))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _sandbox(text: str) -> str:
    link = Link.written(text)
    if link is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no sandbox: write eg7, as `egressctl status` does")
    return link.device


def _request(text: str) -> str:
    from egressd.journal.testimony import is_request  # noqa: PLC0415

    if not is_request(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no request: write r-..., as the broker's answer does")
    return text


def _asker(text: str) -> str:
    from egressd.access.principals import principal  # noqa: PLC0415

    try:
        return principal(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of records")
    return int(text)


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip() for word in text.split(",") if word.strip())


def _events(text: str) -> frozenset[str]:
    """Events are an open set: a journal may be of another version."""
    found = _words(text)
    odd = [word for word in sorted(found) if not re.fullmatch(r"[a-z][a-z-]{1,40}", word)]
    if odd or not found:
        raise argparse.ArgumentTypeError(f"{', '.join(odd) or text!r}: write events such as denied,flow")
    return found


def _verdicts(text: str) -> frozenset[str]:
    return _listed(text, _VERDICTS, "verdict")


def _reasons(text: str) -> frozenset[str]:
    return _listed(text, [reason.value for reason in Reason], "reason")


def _listed(text: str, known: Iterable[str], what: str) -> frozenset[str]:
    import difflib  # noqa: PLC0415

    found = _words(text)
    for word in sorted(found - set(known)) or ([] if found else [text]):
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"there is no {what} {word!r}: {hint}")
    return found


# ---- where the journal is


def journal_directory(args: argparse.Namespace) -> str:
    """What `--journal` says; else that of the daemon at `--run-dir`, Refused if it does not tell. Where that
    is not said: by the configuration file; without one, as the daemon says or as it is by default. The file
    comes before the daemon since a journal must be readable while egressd is in trouble."""
    from egressd.cli.main import DEFAULT_RUN_DIR  # noqa: PLC0415

    if args.journal:
        return str(args.journal)
    if args.run_dir != DEFAULT_RUN_DIR:
        return f"{_told(args.run_dir)}/journal"
    state_dir = _configured()
    if state_dir is None:
        try:
            state_dir = _told(args.run_dir)
        except Refused:
            state_dir = _STATE_DIR
    return f"{state_dir}/journal"


def _told(run_dir: str) -> str:
    from egressd.sandbox.control import Control  # noqa: PLC0415

    try:
        with Control(run_dir) as control:
            state_dir = control.ask("status").get("state_dir")
    except Refused as error:
        raise Refused(error.reason, f"{error}; or name the journal: --journal DIR") from error
    if not isinstance(state_dir, str):
        raise Refused(Reason.PROTOCOL, "egressd does not say where its journal is: --journal DIR")
    return state_dir


def _configured() -> str | None:
    """By the configuration file; None if there is none that can be read. Only this key is looked at: the
    journal must be readable though something else in the file is wrong."""
    from egressd.model import tree  # noqa: PLC0415

    try:
        with open(_CONFIG, "rb") as stream:  # noqa: PTH123 - pathlib is slow to import
            found = tree.read(stream.read(tree.MAX_BYTES + 1), source=_CONFIG)
    except OSError:
        return None
    state_dir = found.value.get("state_dir") if isinstance(found.value, dict) else None
    return state_dir if isinstance(state_dir, str) else _STATE_DIR


# ---- the verb


def run(args: argparse.Namespace) -> int:
    if args.follow and (args.reverse or args.until):
        args.parser.error("--follow goes on for ever: it goes with neither --reverse nor --until")
    try:
        return _read(args, journal_directory(args))
    except Refused as error:
        return _refuse(args, error.reason, str(error))


def _read(args: argparse.Namespace, directory: str) -> int:
    from egressd.processes.journal_search import Journal, Search, Tail  # noqa: PLC0415

    try:
        journal = Journal.open(directory)
        search = Search(_query(args))
        spell = _speller(args)
        count = _show(_selected(args, search, journal), spell)
        if args.follow:
            sys.stdout.flush()
            _follow(Tail(journal), search, spell)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:  # not the journal: standard output
            raise
        raise Refused(Reason.UNAVAILABLE, _remedy(directory, error)) from error
    if search.damaged:
        complain(
            f"{search.damaged} lines are no records: `egressctl verify --journal {directory}` says where"
        )
        return FOUND
    if not count and not args.json:
        complain(f"nothing in {directory} matches" if any(journal.ends.values()) else f"{directory} is empty")
    return OK


def _query(args: argparse.Namespace) -> Query:
    from egressd.cli.audit_words import VERDICTS  # noqa: PLC0415
    from egressd.processes.journal_search import Query, host_of  # noqa: PLC0415

    events = args.event
    if args.verdict is not None:
        meant = frozenset[str]().union(*(VERDICTS[verdict] for verdict in args.verdict))
        events = meant if events is None else events & meant
    return Query(
        workspace=args.workspace,
        sandbox=args.sandbox,
        request=args.request,
        asker=args.asker,
        host=None if args.host is None else host_of(args.host),
        events=events,
        reasons=args.reason,
        since=args.since,
        until=args.until,
    )


def _selected(args: argparse.Namespace, search: Search, journal: Journal) -> Iterable[Found]:
    limit = args.limit
    if args.follow and limit is None and args.since is None:
        limit = _BEFORE
    if limit is None:
        return search.through(journal, reverse=args.reverse)
    newest = islice(search.through(journal, reverse=True), limit)
    return newest if args.reverse else reversed(list(newest))


def _speller(args: argparse.Namespace) -> Callable[[Found], str]:
    from egressd.cli.audit_words import line  # noqa: PLC0415

    colours = paint()
    if args.json:
        return lambda found: found[0].decode("ascii")
    return lambda found: line(found[1], paint=colours)


def _show(found: Iterable[Found], spell: Callable[[Found], str]) -> int:
    """Some at a time: a write for each of a million records costs more than finding them."""
    count, spelled = 0, map(spell, found)
    while some := list(islice(spelled, _AT_ONCE)):
        print("\n".join(some))
        count += len(some)
    return count


def _follow(tail: Tail, search: Search, spell: Callable[[Found], str]) -> None:
    """For ever: until interrupted, or until nobody reads what is written."""
    for _ in _looks():
        while lines := tail.read():
            _show(search.pick(lines), spell)
        sys.stdout.flush()


def _looks() -> Iterator[None]:
    """Pauses between, and notices meanwhile that the reader of standard output has gone."""
    gone = select.poll()
    gone.register(sys.stdout.fileno(), 0)  # POLLERR and POLLHUP are told unasked
    while True:
        yield
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in gone.poll(_LOOK * 1000)):
            raise BrokenPipeError


def _remedy(directory: str, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return (
            f"{error.filename} may only be read by root and the group egressd-audit: use sudo, or"
            f" `adduser {_me()} egressd-audit` and log in again"
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"there is no journal at {directory}: name its directory with --journal DIR"
    return f"the journal in {directory} cannot be read: {error.strerror or error}"


def _me() -> str:
    import pwd  # noqa: PLC0415

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _refuse(args: argparse.Namespace, reason: Reason, text: str) -> int:
    if args.json:
        print_json({"error": {"reason": reason.value, "text": text}})
    complain(text)
    return REFUSED
