"""`egressctl verify`: is a proof, or a journal, what it says? Needs no daemon, no root and no network."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.exits import FOUND, OK, USAGE
from egressd.cli.screen import complain, paint, print_json
from egressd.cli.text import escape
from egressd.model.errors import PolicyError

if TYPE_CHECKING:
    from egressd.journal.keys import PublicKey, Verifier
    from egressd.processes.journal_reader import JournalReport

__all__ = ["add", "run"]


class _Unusable(Exception):
    """What was typed cannot be used; nothing was checked."""


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "verify",
        summary="check a proof, or a journal, on any machine",
        says="Check a proof: its signature, that its records are the signed journal's, numbers, policy.\n"
        "Says what is proved, what is not, and of a file that was changed where it breaks.\n"
        "With --key you say whose signature you trust; without it anybody could have signed.\n"
        "Exit status 0 if it holds, 1 if it does not, 2 if there is nothing to check.",
        examples="  egressctl verify acme.proof --key egressd.pem --policy acme.yaml\n"
        "  egressctl verify acme.proof --key 'host/egressd/1a2b3c4d+e5f6a7b8+AX...'\n"
        "  egressctl verify acme.proof --checkpoint october.proof   does the journal continue October's?\n"
        "  egressctl verify receipt.proof --manifest MANIFEST.json  are these the files it was shown?\n"
        "  egressctl verify acme.proof --html acme.html      one page to read and print\n"
        "  egressctl verify --journal /var/lib/egressd/journal      every record of a journal",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="the proof")
    parser.add_argument(
        "--journal", metavar="DIR", help="check this journal instead of a proof; also a copy of one"
    )
    parser.add_argument(
        "--key", metavar="KEY", help="the key to trust: a file, or a verifier key (see `egressctl key`)"
    )
    parser.add_argument("--policy", metavar="FILE.yaml", help="the policy that should have been in force")
    parser.add_argument(
        "--checkpoint", metavar="FILE",
        help="what you kept from earlier, a signed checkpoint or a proof: does the journal continue it?",
    )  # fmt: skip
    parser.add_argument(
        "--manifest", metavar="FILE",
        help="the MANIFEST.json of a request: is it the list of files that was put on record?",
    )  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="also as one page to read and print")


def run(args: argparse.Namespace) -> int:
    if args.manifest is not None and args.file is None:
        complain("--manifest is compared with the proof of a request: name that, too")
        return USAGE
    if (args.file is None) == (args.journal is None):
        complain("name a proof to check, or a journal with --journal (see egressctl verify --help)")
        return USAGE
    try:
        return _journal(args) if args.file is None else _proof(args)
    except _Unusable as error:
        complain(str(error))
        return USAGE


def _proof(args: argparse.Namespace) -> int:
    from egressd.cli.proof_words import document, render  # noqa: PLC0415
    from egressd.cli.whole_files import write_whole  # noqa: PLC0415
    from egressd.journal.verification import verify  # noqa: PLC0415

    key, origin = (None, None) if args.key is None else _key(args.key)
    digest = None if args.policy is None else _policy_digest(Path(args.policy))
    checkpoint = None if args.checkpoint is None else _checkpoint(args.checkpoint)
    report = verify(
        _read(args.file),
        key=key,
        origin=origin,
        policy_digest=digest,
        checkpoint=checkpoint,
        manifest=None if args.manifest is None else _read(args.manifest),
    )
    if args.html:
        from egressd.cli.proof import page_of  # noqa: PLC0415

        try:
            write_whole(Path(args.html), page_of(report))
        except OSError as error:
            raise _Unusable(f"the page cannot be written: {error}") from error
    if args.json:
        print_json(document(report))
    else:
        print(render(report, name=args.file, paint=paint()))
    return OK if report.verified else FOUND


def _read(name: str) -> bytes:
    """The file; more than any proof has is not read to its end."""
    from egressd.journal.verification import MAX_FILE  # noqa: PLC0415

    try:
        if name == "-":
            return sys.stdin.buffer.read(MAX_FILE + 1)
        with Path(name).open("rb") as file:
            return file.read(MAX_FILE + 1)
    except OSError as error:
        raise _Unusable(f"{name} cannot be read: {error.strerror or error}") from error


def _key(text: str) -> tuple[PublicKey, str | None]:
    """A verifier key, or a file that holds one, or a PEM. A verifier key says which journal's it is."""
    from egressd.journal.keys import BadKey, PublicKey, Verifier  # noqa: PLC0415

    with contextlib.suppress(BadKey):
        known = Verifier.parse(text)
        return known.key, known.name
    try:
        data = Path(text).read_bytes()[: 1 << 16]
    except (OSError, ValueError) as error:
        raise _Unusable(f"--key {text}: neither a verifier key nor a file that can be read") from error
    try:
        if b"-----BEGIN" in data:
            return PublicKey.load(data), None
        known = Verifier.parse(data.decode("utf-8", "replace").strip())
    except BadKey as error:
        raise _Unusable(f"--key {text}: {error}") from error
    return known.key, known.name


def _checkpoint(name: str) -> str:
    from egressd.cli.checkpoints import BadCheckpoint, kept  # noqa: PLC0415

    try:
        return kept(name)
    except BadCheckpoint as error:
        raise _Unusable(str(error)) from error


def _policy_digest(path: Path) -> str:
    """By this machine's catalogue: it says whether the file is taken, and which host `region:` means."""
    from egressd.processes.config import Config  # noqa: PLC0415
    from egressd.processes.registry_files import read_registry  # noqa: PLC0415
    from egressd.processes.workspaces import read_policy_file  # noqa: PLC0415

    try:
        return read_policy_file(path, registry=read_registry(Path(Config().residency_dir))).digest
    except PolicyError as error:
        raise _Unusable(f"the policy has problems: {error.problems[0]}") from error


def _journal(args: argparse.Namespace) -> int:
    from egressd.journal.keys import Verifier  # noqa: PLC0415
    from egressd.processes import journal_reader  # noqa: PLC0415

    directory = Path(args.journal)
    note = None if args.checkpoint is None else _checkpoint(args.checkpoint)
    try:
        keys = None
        if args.key is not None:
            (key, named), origin = _key(args.key), journal_reader.origin(directory)
            if named not in (None, origin):
                raise _Unusable(f"the key that was given is of journal {named}, and this one is {origin}")
            keys = [Verifier(origin, key), *_successors(directory, key)]
        report = journal_reader.inspect_journal(directory, keys)
        kept = None if note is None else _departs(directory, note, report)
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise _Unusable(f"the journal in {args.journal} cannot be read: {why}") from error
    findings = [str(finding) for finding in report.findings] + ([kept] if kept else [])
    if args.json:
        print_json(
            {
                "verified": not findings, "origin": report.origin, "records": report.records,
                "signed": report.signed, "checkpoints": report.checkpoints, "archived": report.archived,
                "findings": findings,
            }
        )  # fmt: skip
        return FOUND if findings else OK
    look = paint()
    verdict = look.bad("NOT VERIFIED") if findings else look.good("verified")
    print(f"{escape(args.journal)}: {verdict}")
    print(f"  {report.records} records of {escape(report.origin)}, {report.signed} under a signed checkpoint")
    print(f"  {report.checkpoints} checkpoints, {report.archived} records moved elsewhere")
    if kept == "":
        print("  It continues the checkpoint that was given.")
    for finding in findings:
        print(f"  {look.bad('broken')} {escape(finding)}")
    if args.key is None:
        print("  ! No key was given: the signatures are by the keys that the directory itself lists.")
    return FOUND if findings else OK


def _departs(directory: Path, note: str, report: JournalReport) -> str:
    """How the journal is not one that continues this checkpoint, which the reader kept and so believes;
    empty if it does."""
    from egressd.journal import merkle, notes  # noqa: PLC0415
    from egressd.processes import journal_reader  # noqa: PLC0415

    given = notes.parse(notes.signatures(note)[0])
    if given.origin != report.origin:
        return f"the checkpoint that was given is of another log, {given.origin}"
    if given.size > report.records:
        return f"the checkpoint that was given says {given.size} records, {report.records} are there"
    if merkle.root(journal_reader.leaves(directory).first(given.size)) != given.root:
        return f"the first {given.size} records are not those of the checkpoint that was given"
    return ""


def _successors(directory: Path, key: PublicKey) -> list[Verifier]:
    """The keys that follow `key`: each is named in a record, and the one before it signed a checkpoint
    that holds this record. Whether records and checkpoints are what they should be is checked elsewhere."""
    from egressd.processes import journal_reader  # noqa: PLC0415

    known = journal_reader.verifiers(directory)
    places = [place for place, each in enumerate(known) if each.key == key]
    found: list[Verifier] = []
    for older, newer in itertools.pairwise(known[places[0] :] if places else ()):
        named = _named(directory, str(newer))
        if named is None or named >= _signed_upto(directory, older):
            break
        found.append(newer)
    return found


def _named(directory: Path, verifier: str) -> int | None:
    """The record that says that this key follows."""
    from egressd.journal import lines  # noqa: PLC0415
    from egressd.journal.records import RecordError  # noqa: PLC0415
    from egressd.processes import journal_reader  # noqa: PLC0415

    for index, line in journal_reader.lines(directory):
        if lines.event_of(line) == b"key-rotated":
            with contextlib.suppress(RecordError):
                if lines.read(line).fields.get("new") == verifier:
                    return index
    return None


def _signed_upto(directory: Path, verifier: Verifier) -> int:
    """Records under the last checkpoint that this key signed."""
    from egressd.journal import notes  # noqa: PLC0415
    from egressd.processes import journal_reader  # noqa: PLC0415

    most = 0
    for note in journal_reader.checkpoints(directory):
        with contextlib.suppress(ValueError):  # NoteError: signed by others
            most = max(most, notes.open(note, [verifier]).size)
    return most
