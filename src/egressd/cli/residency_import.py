"""`egressctl residency import`: a published list of prefixes becomes a table.

In this order: the file is read, compared with what its publisher is known to have published, understood whole
and told; then the table is put in place of the one before it, and egressd asked to apply it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import BinaryIO

from egressd.cli.daemon import Document
from egressd.cli.exits import FOUND, OK, REFUSED, USAGE
from egressd.cli.residency_tables import Where, where
from egressd.cli.screen import complain, paint, print_json
from egressd.cli.text import Paint, escape
from egressd.cli.whole_files import replace_whole
from egressd.model.errors import EgressdError, PolicyError, Problem
from egressd.processes.registry_files import SUFFIX, TABLES, read_registry, read_table
from egressd.residency.formats import MAX_BYTES, Format, Given, as_table, read, too_large
from egressd.residency.intake import Changes, Intake, changes, intake
from egressd.residency.prefixes import Source, Table

__all__ = ["run"]

_CHUNK = 1 << 20
_LONG = 4 << 20  # bytes from which on somebody may want to see that it goes on
_EXAMPLES = 5  # shown to people; --json has more


class _Unusable(Exception):
    """What was typed cannot be used; nothing was read."""


def run(args: argparse.Namespace) -> int:
    place = where(args)
    try:
        document, table = _understood(args, place)
        if args.check:
            document["note"] = "nothing was changed"
        else:
            document["written"] = str(_write(table, place.directory / TABLES))
            _apply(document, table, place)
    except _Unusable as error:
        return _failed(args, [Problem("egressctl", 0, "", str(error))], USAGE)
    except PolicyError as error:
        return _failed(args, error.problems, FOUND)
    except OSError as error:
        text = f"the table cannot be written: {error.strerror or error}"
        return _failed(args, [Problem(str(place.directory / TABLES), 0, "", text)], REFUSED)
    if args.json:
        print_json(document)
    else:
        print(render(document, paint=paint()))
    return REFUSED if document["refused"] else OK


def _failed(args: argparse.Namespace, problems: tuple[Problem, ...] | list[Problem], status: int) -> int:
    if args.json:
        print_json({"error": {"problems": [asdict(problem) for problem in problems]}})
    for problem in problems:
        complain(problem.text if problem.source == "egressctl" else str(problem))
    return status


# ---- reading


def _understood(args: argparse.Namespace, place: Where) -> tuple[Document, Table]:
    show = _Progress(sys.stderr)
    name = "standard input" if args.file == "-" else Path(args.file).name
    data = _file(args.file, name, show)
    digest = hashlib.sha256(data).hexdigest()
    checked = _checked(args, data, digest, name)
    show("reading the list")
    form = None if args.format is None else Format(args.format)
    given = Given(args.provider, args.region, args.country)
    listing = read(data, name=name, form=form, given=given)
    source = Source(_printable(name), f"sha256:{digest}", len(data), checked)
    today = datetime.now(UTC).date()
    called = args.name or _name(listing.edition or listing.provider)
    table = as_table(listing, name=called, source=source, imported=today)
    show("comparing")
    registry = read_registry(place.directory)
    before, remark = _before(place.directory / TABLES / f"{table.name}{SUFFIX}")
    if before is not None and args.name is None:
        _refuse_another_kind(before, table, name)
    came = intake(table, registry.catalogue.cloud_region)
    other = None if before is None else changes(before, table)
    document = _document(table, came, other)
    document["remarks"] += [remark] if remark else [*_order(before, table, today), *_shrunk(table, other)]
    show("")
    return document, table


def _file(name: str, shown: str, show: Callable[[str], None]) -> bytes:
    """All of it, if it is no longer than a list may be. Nothing longer is held in memory."""
    try:
        if name == "-":
            return _bounded(sys.stdin.buffer, shown, show)
        with Path(name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise PolicyError([Problem(shown, 0, "", too_large(size), "look what it is")])
            return _bounded(file, shown, show)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        text = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
        raise PolicyError([Problem(shown, 0, "", text)]) from error


def _bounded(file: BinaryIO, shown: str, show: Callable[[str], None]) -> bytes:
    data = bytearray()
    while chunk := file.read(min(_CHUNK, MAX_BYTES + 1 - len(data))):
        data += chunk
        if len(data) > MAX_BYTES:
            raise PolicyError([Problem(shown, 0, "", too_large(len(data)), "look what it is")])
        if len(data) > _LONG:
            show(f"reading, {len(data) >> 20} MiB")
    return bytes(data)


class _Progress:
    """One line that is written over, where a person looks at a terminal; the empty text takes it away."""

    def __init__(self, stream: object) -> None:
        self._on = sys.stderr.isatty() and stream is sys.stderr

    def __call__(self, text: str) -> None:
        if self._on:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _printable(name: str) -> str:
    """A file may be called anything; the table's file is ASCII."""
    return ascii(name)[1:-1][:128]


def _name(provider: str) -> str:
    """Of the table: what the provider is called, in the letters that a file may have."""
    return re.sub(r"[^a-z0-9]+", "-", provider.lower()).strip("-")[:40].strip("-")


# ---- is it what was published?


def _checked(args: argparse.Namespace, data: bytes, digest: str, name: str) -> str:
    """How it was compared, for the table. PolicyError if it is something else, `_Unusable` if what to compare
    it with makes no sense."""
    ways = []
    if args.sha256 is not None:
        wanted = args.sha256.lower().removeprefix("sha256:")
        if not re.fullmatch("[0-9a-f]{64}", wanted):
            raise _Unusable("--sha256: a SHA-256 digest is 64 hexadecimal digits")
        if wanted != digest:
            raise _differs(name, f"its digest is sha256:{digest}, and not the one that was given")
        ways.append("sha256")
    if (args.signature is None) != (args.key is None):
        raise _Unusable("--signature and --key need each other")
    if args.signature is not None:
        ways.append(f"ed25519 {_signed(args, data, name)}")
    return ", ".join(ways)


def _signed(args: argparse.Namespace, data: bytes, name: str) -> str:
    """The fingerprint of the key whose signature is good."""
    from egressd.journal.keys import BadKey, PublicKey, strict_base64  # noqa: PLC0415

    try:
        key = PublicKey.load(_small(args.key))
        signature = _small(args.signature)
        if len(signature) != 64:
            signature = strict_base64(signature.decode("ascii", "replace").strip())
    except (BadKey, ValueError) as error:
        raise _Unusable(f"--signature or --key: {error}") from error
    if len(signature) != 64 or not key.verify(signature, data):
        raise _differs(name, f"the signature is not one over this file by {key.fingerprint}")
    return key.fingerprint


def _small(name: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            return file.read(1 << 14)
    except (OSError, ValueError) as error:
        raise _Unusable(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _differs(name: str, text: str) -> PolicyError:
    return PolicyError([Problem(name, 0, "", text, "get it again, from its publisher")])


# ---- against the one before


def _before(path: Path) -> tuple[Table | None, str]:
    """The table that will be replaced, or why it cannot be compared with."""
    try:
        return read_table(path), ""
    except PolicyError as error:
        return None, f"the table before cannot be read, and is replaced: {error.problems[0].text}"


def _refuse_another_kind(before: Table, table: Table, name: str) -> None:
    """A plain list of three prefixes with `--provider aws` is not the next edition of ip-ranges.json. In its
    place, what lies elsewhere would lie in no table, and could be vouched for."""
    if (before.format, before.provider) == (table.format, table.provider):
        return
    text = f"there is a table {before.name}, of {before.provider} and the format {before.format}"
    remedy = f"--name with another name keeps both; --name {before.name} puts this one ({table.format}) there"
    raise PolicyError([Problem(name, 0, "", f"{text}: this is no later edition of it", remedy)])


def _shrunk(table: Table, other: Changes | None) -> list[str]:
    """Half a list is well formed, too, where a publisher's server has cut it between two entries."""
    if other is None or other.removed <= sum(len(group.prefixes) for group in table.groups):
        return []
    return ["more prefixes have gone than are left: was only a part of it downloaded?"]


def _order(before: Table | None, table: Table, today: date) -> list[str]:
    remarks = []
    if table.published and table.published > today:
        remarks.append(f"it says that it was published on {table.published}, which is to come")
    if before and before.published and table.published and table.published < before.published:
        remarks.append(f"it is older than the table before, which was published on {before.published}")
    return remarks


# ---- writing


def _write(table: Table, directory: Path) -> Path:
    """The file is there whole or not at all, for everybody to read; it survives a crash once this returns."""
    _make(directory)
    path = directory / f"{table.name}{SUFFIX}"
    replace_whole(path, table.encode(), mode=0o644)
    _sync(directory)
    return path


def _make(directory: Path) -> None:
    """For everybody to read, whatever the umask: egressd reads it as a user of its own."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        each.chmod(0o755)


def _sync(directory: Path) -> None:
    """The new name, too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _apply(document: Document, table: Table, place: Where) -> None:
    """Ask egressd, if it runs and reads this directory."""
    from egressd.sandbox.control import Control  # noqa: PLC0415

    if place.silent:
        document["refused"] = place.silent
        return
    if place.running is None:
        document["note"] = "egressd is not running: the table holds when it next starts"
        return
    if place.running.resolve() != place.directory.resolve():
        document["note"] = f"the running egressd reads {place.running}: nothing was applied"
        return
    try:
        with Control(place.run_dir) as control:
            document["applied"] = control.apply(why=f"residency import {table.name}")
    except (EgressdError, OSError, ValueError) as error:
        document["refused"] = str(error)


# ---- telling


def _document(table: Table, came: Intake, other: Changes | None) -> Document:
    return {
        "table": table.name,
        "provider": table.provider,
        "format": table.format,
        "file": table.source.name,
        "bytes": table.source.bytes,
        "digest": table.source.digest,
        "checked": table.source.checked,
        "serial": table.serial,
        "published": None if table.published is None else table.published.isoformat(),
        "imported": table.imported.isoformat(),
        "prefixes": {"ipv4": came.four, "ipv6": came.six},
        "regions": dict(came.regions),
        "countries": dict(came.countries),
        "anycast": came.anycast,
        "unplaced": came.unplaced,
        "unknown_regions": dict(came.unknown),
        "conflicts": {"count": came.conflicts, "examples": _pairs(came.conflicting)},
        "nested": {"count": came.nested, "examples": _pairs(came.nesting)},
        "changes": None
        if other is None
        else {
            "added": other.added,
            "removed": other.removed,
            "moved": {"count": other.moves, "examples": _pairs(other.moved)},
        },
        "remarks": [],
        "written": None,
        "applied": None,
        "refused": None,
        "note": None,
    }


def _pairs(found: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"prefix": prefix, "text": text} for prefix, text in found]


def render(document: Document, *, paint: Paint) -> str:
    """For people: what came in, what is doubtful in it, and what became of it."""
    lines = [_headline(document), *_counted(document), *_doubts(document, paint), *_moved(document)]
    lines += [f"  {paint.bad('!')} {escape(remark)}" for remark in document["remarks"]]
    return "\n".join([*lines, *_outcome(document, paint)])


def _headline(document: Document) -> str:
    four, six = document["prefixes"]["ipv4"], document["prefixes"]["ipv6"]
    published = document["published"] or "at a date that it does not say"
    checked = document["checked"] or "not compared with anything: --sha256 or --signature"
    return "\n".join(
        [
            f"{escape(document['table'])}: {four + six} prefixes of {escape(document['provider'])}"
            f" ({four} IPv4, {six} IPv6), published {published}",
            f"  file {escape(document['file'])}, {document['bytes']} bytes, {document['digest']}",
            f"  checked: {escape(checked)}",
        ]
    )


def _counted(document: Document) -> list[str]:
    lines = [f"  {len(document['regions'])} regions: {_few(document['regions'], 8)}"]
    if document["countries"]:
        lines.append(f"  {len(document['countries'])} countries: {_few(document['countries'], 40)}")
    if document["anycast"]:
        lines.append(f"  announced from many places: {document['anycast']}")
    if document["unplaced"]:
        lines.append(
            f"  without a region: {document['unplaced']}, which count where no other has the address"
        )
    return lines


def _few(counts: dict[str, int], most: int) -> str:
    shown = [f"{escape(name)} {count}" for name, count in list(counts.items())[:most]]
    more = len(counts) - len(shown)
    return ", ".join([*shown, f"and {more} more"] if more > 0 else shown) or "none"


def _doubts(document: Document, paint: Paint) -> list[str]:
    lines = []
    unknown, conflicts, inside = document["unknown_regions"], document["conflicts"], document["nested"]
    if unknown:
        lines.append(f"  {paint.bad('!')} regions that the catalogue does not know: {_few(unknown, 12)}")
        lines.append("    their prefixes are kept, and refused where a workspace is pinned")
    if conflicts["count"]:
        lines.append(
            f"  {paint.bad('!')} {conflicts['count']} prefixes contradict themselves, and are refused:"
        )
        lines += _examples(conflicts)
    if inside["count"]:
        lines.append(
            f"  {inside['count']} prefixes lie in a wider one of another region; the narrower decides:"
        )
        lines += _examples(inside)
    return lines


def _examples(found: Document) -> list[str]:
    shown = found["examples"][:_EXAMPLES]
    lines = [f"    {one['prefix']}: {escape(one['text'])}" for one in shown]
    more = found["count"] - len(shown)
    return [*lines, f"    and {more} more (--json)"] if more > 0 else lines


def _moved(document: Document) -> list[str]:
    other = document["changes"]
    if other is None:
        return ["  there was no such table before"]
    moved = other["moved"]
    line = f"  against the table before: {other['added']} added, {other['removed']} removed"
    return [f"{line}, {moved['count']} moved to another region", *_examples(moved)]


def _outcome(document: Document, paint: Paint) -> list[str]:
    lines = [f"written: {escape(document['written'])}"] if document["written"] else []
    if document["note"]:
        lines.append(escape(document["note"]))
    if document["applied"] is not None:
        from egressd.cli.policy_changes import render as applied  # noqa: PLC0415

        # "no changes" is about rules: where their names lead is judged anew
        told = applied(document["applied"], paint=paint)
        lines.append(told.replace("no changes, applied in", "rules: no changes; addresses judged anew in"))
    if document["refused"]:
        lines.append(paint.bad("NOT APPLIED") + f": {escape(document['refused'])}")
    return lines
