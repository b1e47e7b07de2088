"""Reading a source's documents: which there are, what they hold, and who may read them by what is said.

Every file is read and digested. What is stored is bound to that digest: a file that changes afterwards does
not match it any more, and is refused when it is to be projected, until it is ingested again. Files are read
before the store is touched; what follows is one transaction, so a reader sees all of it or nothing.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from egressd.access import front_matter
from egressd.access.acl_file import AclFile
from egressd.access.identifiers import identifier
from egressd.access.roles import Right
from egressd.access.statements import Statement
from egressd.access.trust import Trust
from egressd.broker.store.account import as_owner
from egressd.broker.store.administration import (
    Actor,
    Administration,
    NothingToDo,
    Operator,
    Turn,
    Wanted,
    check_source,
    told_change,
)
from egressd.broker.store.rows import Source, Stored
from egressd.broker.store.statements import judged, said_text
from egressd.model.errors import Refused, Unfit
from egressd.model.verdicts import Reason
from egressd.sandbox.files import seen_anyway
from egressd.vault.beneath import Bounds, Found, Unopened, look, open_root, read_digest, shown, walk

__all__ = ["MAX_DOCUMENT", "AccessList", "Ingested", "ingest", "survey"]

MAX_DOCUMENT: Final = 1 << 30  # bytes; a request's copies are held in memory
_SETTLED: Final = 2_000_000_000  # ns: no file system's times are coarser (FAT's)
_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class AccessList:
    """What the source system exported, and the digest of that file."""

    rules: AclFile
    digest: str


@dataclass(frozen=True, slots=True)
class Read:
    """A file as it was read, and what it says of itself."""

    id: str
    path: bytes
    size: int
    digest: str
    own: str | None  # as `statements.said_text`
    stamp: str  # "" where a change could go unseen


@dataclass(frozen=True, slots=True)
class Survey:
    """All there is below a directory. `skipped` are (path as shown, why) of what is no document."""

    directory: str
    read: tuple[Read, ...]
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    octets: int  # that were read


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What an ingest changed, or with `dry_run` would change. Identifiers, sorted."""

    source: str
    directory: str
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: int
    unreadable: tuple[tuple[str, str], ...]  # documents that nobody may read: (id, why)
    skipped: tuple[tuple[str, str], ...]  # what is no document: (path, why)
    warnings: tuple[str, ...]
    trust: Trust  # what the source has now
    trust_set: bool  # by this ingest
    unbelieved: int  # documents of which nothing counts but what they say of themselves, which does not
    digest: str  # of all that is stored of the source now
    octets: int
    generation: int
    dry_run: bool


# ---- what is there


def survey(
    directory: str,
    source: str,
    *,
    known: Mapping[str, Stored] | None = None,
    bounds: Bounds | None = None,
    progress: Callable[[int, int], None] = lambda _files, _octets: None,
    now_ns: Callable[[], int] = time.time_ns,
) -> Survey:
    """Reads every file, or with `known` only those whose size, times and inode are not as stored there.
    `Refused` for a directory that is not to be trusted. `progress` is told (files, bytes) after each file."""
    place, warnings = _directory(directory)
    root = open_root(place)
    read: list[Read] = []
    skipped: list[tuple[str, str]] = []
    octets = 0
    try:
        for seen in walk(root, bounds=bounds):
            if not isinstance(seen, Found):
                skipped.append((shown(seen.path) or ".", seen.why.value))
                continue
            try:
                one, took = _read(root, seen.path, source, known or {}, now_ns)
            except (Unopened, Unfit) as error:
                skipped.append((shown(seen.path), _why(error)))
                continue
            read.append(one)
            octets += took
            progress(len(read), octets)
    finally:
        os.close(root)
    return Survey(place, tuple(read), tuple(skipped), warnings, octets)


def _why(error: Unopened | Unfit) -> str:
    return error.why.value if isinstance(error, Unopened) else error.text


def _read(
    root: int, path: bytes, source: str, known: Mapping[str, Stored], now_ns: Callable[[], int]
) -> tuple[Read, int]:
    id = identifier(source, path)
    # Looked at before it is read: what changes in between has another stamp the next time.
    stamp = _stamp(root, path, now_ns())
    before = known.get(id)
    if before is not None and stamp and before.stamp == stamp:
        return Read(id, path, before.size, before.digest, before.own, stamp), 0
    contents = read_digest(root, path, limit=MAX_DOCUMENT)
    return Read(
        id, path, contents.size, contents.digest, said_text(_own(contents.head)), stamp
    ), contents.size


def _own(head: bytes) -> Statement | Unfit | None:
    try:
        return front_matter.read(head)
    except Unfit as wrong:
        return wrong


def _stamp(root: int, path: bytes, now_ns: int) -> str:
    """Nobody but root can set a file's change time (stat(2)). One that is only just past says little: a
    second write within the clock's tick leaves the same one."""
    descriptor, found = look(root, path)
    os.close(descriptor)
    if now_ns - found.st_ctime_ns < _SETTLED:
        return ""
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _directory(directory: str) -> tuple[str, tuple[str, ...]]:
    """Absolute and free of links, and what to be warned of. `Refused` where somebody else could put another
    directory in its place, or put documents into it that its access list was not written for."""
    place = Path(directory).absolute()
    text = os.path.normpath(place)
    if not text.isprintable():
        raise _refused(shown(os.fsencode(text)), "has a name that cannot be stored", "give it a plain name")
    real = os.path.realpath(text)
    if real != text:
        raise _refused(text, "leads over a symbolic link, which may lead elsewhere tomorrow", f"name {real}")
    seen = seen_anyway(text)
    if seen is not None:
        raise _refused(text, f"is seen by every sandbox, which has {seen}", "keep documents elsewhere")
    for part in (Path(text), *Path(text).parents):
        _check_writable(part, text)
    group_may = Path(text).stat().st_mode & stat.S_IWGRP
    return text, (
        (f"the group of {text} may write to it, so it decides what is in there",) if group_may else ()
    )


def _check_writable(part: Path, text: str) -> None:
    try:
        mode = part.stat().st_mode
    except OSError as error:
        raise _refused(text, f"cannot be looked at: {error.strerror}", "name a directory") from error
    if not stat.S_ISDIR(mode):
        raise _refused(text, "is no directory", "name the directory that the documents are in")
    if mode & stat.S_IWOTH and not (mode & stat.S_ISVTX and str(part) != text):
        raise _refused(text, f"is not safe: everybody may write to {part}", f"chmod o-w {part}")


def _refused(text: str, why: str, remedy: str) -> Refused:
    return Refused(Reason.FILES, f"the directory {text} {why}: {remedy}")


# ---- into the store


def ingest(
    administration: Administration,
    actor: Actor,
    workspace: str,
    source: str,
    directory: str,
    *,
    access_list: AccessList | None = None,
    without_list: bool = False,
    trust: Wanted | None = None,
    dry_run: bool = False,
    quick: bool = False,
    bounds: Bounds | None = None,
    progress: Callable[[int, int], None] = lambda _files, _octets: None,
) -> Ingested:
    """Makes what is stored of a source what its directory holds now. A source that is new is the local
    operator's to make: a directory of the machine is not the workspace's to give.

    A source that had an access list needs one, or `without_list`: its documents would otherwise fall back to
    the source's defaults, which may be wider. With `trust` the source has that from now on, for which the
    right to set it is needed, too. `Refused` and `Unfit` leave everything as it was.
    """
    check_source(source)
    _may_look(administration, actor, workspace, source, directory)
    known = administration.stored(actor, workspace, source) if quick else {}
    with as_owner(administration.store):
        found = survey(directory, source, known=known, bounds=bounds, progress=progress)
    done: Ingested | None = None
    with administration.changing(actor, workspace, Right.INGEST) as turn:
        was = _source(turn, source, found.directory, access_list, without_list)
        then = was if trust is None else administration.believed(turn, was, trust)
        done = _store(administration, turn, then, found, access_list, was=was.trust)
        if trust is not None and trust.front_matter is False:
            done = replace(done, unbelieved=0)  # whoever says so need not be told
        if dry_run:
            raise NothingToDo
        turn.record("documents-ingested", {**_told(done, access_list), **told_change(was.trust, then.trust)})
    assert done is not None
    return replace(done, dry_run=dry_run)


def _may_look(
    administration: Administration, actor: Actor, workspace: str, source: str, directory: str
) -> None:
    """Before anything is read; all of it is checked again when it is stored."""
    sources = administration.sources(actor, workspace)
    if isinstance(actor, Operator):
        return
    if not directory or not any(one.name == source and one.directory == directory for one in sources):
        raise Refused(Reason.MEMBER, _NEW)


_NEW: Final = "a new source, or another directory, is for who administers the machine: egressctl ingest"


def _source(
    turn: Turn, name: str, directory: str, access_list: AccessList | None, without_list: bool
) -> Source:
    sources = turn.change.sources()
    was = next((source for source in sources if source.name == name), None)
    for other in sources:
        if other.name != name and other.directory and _overlap(directory, other.directory):
            raise _refused(directory, f"and {other.directory} of source {other.name} hold the same files",
                           "a file has one source; ingest a directory beside it")  # fmt: skip
    if was is None or not was.directory:  # new, or only spoken of until now
        if not isinstance(turn.actor, Operator):
            raise Refused(Reason.MEMBER, _NEW)
        return replace(was or Source(name=name, directory=""), directory=directory)
    if was.directory != directory:
        raise _refused(directory, f"is not the one of source {name}, {was.directory}",
                       f"egressctl source drop {name}, or give it another name")  # fmt: skip
    if was.access_list and access_list is None and not without_list:
        raise Refused(Reason.FILES, f"source {name} was ingested with an access list: give it again (--acl "
                                    "FILE), or say that there is none any more (--no-acl)")  # fmt: skip
    return was


def _overlap(one: str, other: str) -> bool:
    return os.path.commonpath([one, other]) in (one, other)


def _store(
    administration: Administration,
    turn: Turn,
    source: Source,
    found: Survey,
    access_list: AccessList | None,
    *,
    was: Trust,
) -> Ingested:
    levels, issuers = administration.store.levels, administration.issuers
    before = turn.change.documents(source.name)
    now = {one.id: judged(_said(one, access_list), source.trust, levels, issuers) for one in found.read}
    added = sorted(now.keys() - before.keys())
    removed = sorted(before.keys() - now.keys())
    changed = sorted(id for id in now.keys() & before.keys() if not _same(now[id], before[id]))
    touched = [now[id] for id in now if id not in before or now[id] != before[id]]
    done = Ingested(
        source=source.name,
        directory=found.directory,
        added=tuple(added),
        changed=tuple(changed),
        removed=tuple(removed),
        unchanged=len(now) - len(added) - len(changed),
        unreadable=tuple((id, now[id].problem or _NOBODY) for id in sorted(now) if _unreadable(now[id])),
        skipped=found.skipped,
        warnings=(*found.warnings, *_unused(access_list, found)),
        trust=source.trust,
        trust_set=source.trust != was,
        unbelieved=0 if source.trust.front_matter else sum(map(_unheard, now.values())),
        digest=_digest(now),
        octets=found.octets,
        generation=turn.change.generation,
        dry_run=False,
    )
    turn.change.put_source(replace(
        source, access_list=access_list.digest if access_list else "", changed_by=turn.by,
        at=administration.clock(), ingested_at=administration.clock(),
    ))  # fmt: skip
    turn.change.drop_documents(before[id].id for id in removed)
    turn.change.put_documents(source.name, touched)
    return done


_NOTHING: Final = said_text(Statement())  # front matter that is silent about who may read
_NOBODY: Final = "nobody is listed who may read it"


def _unreadable(document: Stored) -> bool:
    return bool(document.problem) or document.acl.startswith('{"read":[],')


def _unheard(document: Stored) -> bool:
    """It says something of itself, and no access list that lets somebody read it speaks for it. Nobody should
    have to find out why it is closed to those it names, or open by default to those it does not."""
    return document.own not in (None, _NOTHING) and (document.listed is None or _unreadable(document))


def _said(one: Read, access_list: AccessList | None) -> Stored:
    listed = None if access_list is None else access_list.rules.of(one.path)
    return Stored(
        id=one.id, path=one.path, size=one.size, digest=one.digest, acl="", clearance="", groups="",
        problem="", own=one.own, listed=said_text(listed), stamp=one.stamp,
    )  # fmt: skip


def _same(one: Stored, other: Stored) -> bool:
    """But for when the file was touched."""
    return replace(one, stamp="") == replace(other, stamp="")


def _unused(access_list: AccessList | None, found: Survey) -> tuple[str, ...]:
    if access_list is None:
        return ()
    rules = access_list.rules.unused(one.path for one in found.read)
    return tuple(f"line {rule.line} of the access list matches nothing: {rule.text}" for rule in rules)


def _digest(documents: Mapping[str, Stored]) -> str:
    """Of what is in force: two ingests with the same digest let the same people read the same bytes."""
    whole = hashlib.sha256()
    for id in sorted(documents):
        one = documents[id]
        for text in (id, one.digest, one.acl, one.clearance, one.groups, one.problem):
            data = text.encode()
            whole.update(b"%d:" % len(data) + data)
    return f"sha256:{whole.hexdigest()}"


def _told(done: Ingested, access_list: AccessList | None) -> dict[str, Any]:
    return {
        "source": done.source,
        "directory": done.directory,
        "added": len(done.added),
        "changed": len(done.changed),
        "removed": len(done.removed),
        "unchanged": done.unchanged,
        "unreadable": len(done.unreadable),
        "skipped": len(done.skipped),
        "digest": done.digest,
        "access_list": access_list.digest if access_list else "",
    }
