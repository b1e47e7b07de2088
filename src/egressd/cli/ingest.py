"""`egressctl ingest`: read a source's documents, and who may see them, into the broker's store."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from egressd.cli.administering import DEFAULT_CONFIG, DEFAULT_RUN_DIR, Document, add_options, administer
from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.exits import FOUND, OK
from egressd.cli.source import add_trust_options, show_trust, trust_document, wanted
from egressd.cli.text import amount, escape, octets
from egressd.model.errors import PolicyError, Problem

if TYPE_CHECKING:
    from egressd.broker.store.administration import Administration, Operator
    from egressd.broker.store.ingest import AccessList, Ingested

__all__ = ["add", "run"]

_SHOWN: Final = 20  # lines of each kind; --json has all
_EACH: Final = 0.2  # seconds between two words on progress


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "ingest",
        summary="read documents, and who may see them, into the broker's store",
        says="Read every file below DIR, digest it, and compute from its front matter, the access list and\n"
        "the source's trust who may see it. A file that changes afterwards is shown to nobody until it is\n"
        "ingested again. All of it takes effect together, on record first; Ctrl-C changes nothing.\n"
        "What is believed of the source (`source trust`) stays, unless it is said here.\n"
        "For root and the owner of the broker's store. Exit status 1 if something is no document.",
        examples="  egressctl ingest /srv/handbook -w acme --source handbook --front-matter on\n"
        "  egressctl ingest /srv/export -w acme --source crm --acl /srv/export.acl.yaml\n"
        "  egressctl ingest /srv/handbook -w acme --source handbook --dry-run",
    )
    add_options(parser)
    parser.add_argument("directory", metavar="DIR", help="where the documents are")
    parser.add_argument("--source", metavar="NAME", required=True, help="what the directory is called")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--acl", metavar="FILE", help="the access list that the source system exports")
    which.add_argument("--no-acl", action="store_true", help="there is none any more")
    add_trust_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    parser.add_argument(
        "--quick", action="store_true", help="do not read files whose size, times and inode are as before"
    )


def run(args: argparse.Namespace) -> int:
    return administer(
        args,
        lambda to, by: _ingest(args, to, by),
        show=_show,
        status=lambda document: FOUND if document["skipped"] or document["unreadable"] else OK,
    )


def _ingest(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    from egressd.broker.store.ingest import ingest  # noqa: PLC0415

    access_list = _access_list(args.acl, to.store.levels) if args.acl else None
    said = wanted(args, to)
    trust = said if said != to.wanted() else None
    progress = _Progress()
    try:
        done = ingest(
            to,
            by,
            args.workspace,
            args.source,
            args.directory,
            access_list=access_list,
            without_list=args.no_acl,
            trust=trust,
            dry_run=args.dry_run,
            quick=args.quick,
            progress=progress if sys.stderr.isatty() else lambda _files, _octets: None,
        )
    finally:
        progress.clear()
    return _document(args, done)


def _access_list(name: str, levels: tuple[str, ...]) -> AccessList:
    """`PolicyError` has every problem of the file, each with its line."""
    from egressd.access.acl_file import MAX_BYTES, load  # noqa: PLC0415
    from egressd.broker.store.ingest import AccessList  # noqa: PLC0415
    from egressd.processes.plain_files import FLAGS, Unreadable, contents  # noqa: PLC0415

    path = Path(name)
    try:
        data = contents(
            lambda: _open(path, FLAGS),
            limit=MAX_BYTES,
            large=lambda size: Unreadable(f"it has {size} bytes", f"at most {MAX_BYTES} are read"),
        )
    except Unreadable as error:
        raise PolicyError([Problem(name, 0, "", error.text, error.remedy)]) from error
    rules = load(data, source=name, levels=levels)
    return AccessList(rules, f"sha256:{hashlib.sha256(data).hexdigest()}")


def _open(path: Path, flags: int) -> int:
    import os  # noqa: PLC0415

    return os.open(path, flags)


class _Progress:
    """A line on standard error, for who looks at a terminal while it takes long."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 1
        self._width = 0

    def __call__(self, files: int, octets: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EACH
        self._write(f"{files} files, {amount(octets)} read")

    def _write(self, text: str) -> None:
        print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
        self._width = len(text)

    def clear(self) -> None:
        if self._width:
            self._write("")
            print("\r", end="", file=sys.stderr, flush=True)


def _document(args: argparse.Namespace, done: Ingested) -> Document:
    return {
        "workspace": args.workspace,
        "source": done.source,
        "directory": done.directory,
        "dry_run": done.dry_run,
        "added": list(done.added),
        "changed": list(done.changed),
        "removed": list(done.removed),
        "unchanged": done.unchanged,
        "unreadable": [{"id": id, "why": why} for id, why in done.unreadable],
        "skipped": [{"path": path, "why": why} for path, why in done.skipped],
        "warnings": [*done.warnings, *_unbelieved(args, done)],
        "trust": trust_document(done.trust),
        "trust_set": done.trust_set,
        "digest": done.digest,
        "bytes_read": done.octets,
    }


def _unbelieved(args: argparse.Namespace, done: Ingested) -> list[str]:
    """One line, with what to type."""
    if not done.unbelieved:
        return []
    words = ["egressctl", *_unless(DEFAULT_RUN_DIR, "--run-dir", args.run_dir), "source", "trust",
             "-w", args.workspace, done.source, "--front-matter", "on",
             *_unless(DEFAULT_CONFIG, "--broker-config", args.broker_config)]  # fmt: skip
    if args.store:
        # One with a password is not repeated.
        words += ["--store", "URL" if "@" in args.store or "?" in args.store else args.store]
    one = done.unbelieved == 1
    many = "one document says of itself" if one else f"{done.unbelieved} documents say of themselves"
    return [f"what {many} is not believed: {shlex.join(words)}"]


def _unless(default: str, option: str, value: str) -> list[str]:
    return [] if value == default else [option, str(value)]


def _show(document: Document) -> None:
    would = "would be " if document["dry_run"] else ""
    counts = ", ".join(f"{len(document[name])} {would}{name}" for name in ("added", "changed", "removed"))
    print(f"{escape(document['source'])}: {counts}, {document['unchanged']} unchanged")
    if document["trust_set"]:
        show_trust(document["trust"])
    if document["dry_run"]:
        for name, sign in (("added", "+"), ("changed", "~"), ("removed", "-")):
            _lines(f"{sign} {id}" for id in document[name])
    _lines(f"nobody may read {one['id']}: {one['why']}" for one in document["unreadable"])
    _lines(f"no document: {one['path']}: {one['why']}" for one in document["skipped"])
    _lines(f"warning: {warning}" for warning in document["warnings"])
    print(f"  {octets(document['bytes_read'])} read; {document['digest']}")


def _lines(texts: Iterable[str]) -> None:
    lines = list(texts)
    for line in lines[:_SHOWN]:
        print(f"  {escape(line)}")
    if len(lines) > _SHOWN:
        print(f"  ... and {len(lines) - _SHOWN} more; --json has all")
