"""Finding records in a journal's files, without decoding those that cannot match.

A line ends in its time, always spelled in the same 27 bytes, and begins with its event; texts in it are
spelled in one way (`journal.records`). So a line is first compared as bytes, and decoded only if it may
match. What was decoded is compared once more, exactly: the bytes only ever save work.

Times are almost in order: a record may have waited a little, and the clock may have been set. So the files
are cut into runs where `clock-stepped` or `journal-opened` stands, and each run is bisected by itself, with
slack. What stands shortly before such a mark is read whole: it may have been written just after the step.

The files may be written meanwhile: only what was there at the beginning is looked at, whole lines only, read
and never mapped, since the writer may cut off what it could not finish.
"""

# pathlib costs 9 ms to import; what is needed of it here is one listing
# ruff: noqa: PTH208
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import TypeAlias

from egressd.journal import segments
from egressd.journal.lines import Line, read
from egressd.journal.records import Fields, RecordError, stamp
from egressd.model.errors import Unfit
from egressd.model.names import canonical, is_pattern, matches

__all__ = ["Found", "Journal", "Query", "Search", "Tail", "host_of", "number_of"]

Found: TypeAlias = tuple[bytes, Line]

_CHUNK = 1 << 20
_GRAIN = 1 << 16  # bytes: a run is not halved further than this; as long as the longest line
_FUZZY = 4 << 20  # bytes before a mark that are read whole
_SLACK = timedelta(minutes=5)
_MARKS = (b'{"event":"clock-stepped"', b'{"event":"journal-opened"')
_TAIL = re.compile(rb'"time":"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{6}Z)"\}')
_TIME = slice(-29, -2)  # where the time stands in a line without its newline
_NAMES = ("host", "name", "service", "asked", "wildcard")
_ADDRESSES = ("destination", "address", "addresses")


# ---- what is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """All of what is not None must hold. `since` counts, `until` does not belong to it any more."""

    workspace: str | None = None
    workspaces: frozenset[str] | None = None  # of any of these
    sandbox: str | None = None  # "eg7"
    route: str | None = None
    after: int | None = None  # with a greater number
    host: str | None = None  # a canonical name, a pattern as policies have them, or an address
    request: str | None = None  # "r-..."
    asker: str | None = None  # requests of this principal; `Search` knows which those are
    events: frozenset[str] | None = None
    unshown: frozenset[str] = frozenset()  # events that whoever asks may not see
    reasons: frozenset[str] | None = None
    since: datetime | None = None
    until: datetime | None = None

    def holds(self, record: Line) -> bool:
        fields = record.fields
        return (
            (self.events is None or record.event in self.events)
            and record.event not in self.unshown
            and (self.workspace is None or fields.get("workspace") == self.workspace)
            and (self.workspaces is None or fields.get("workspace") in self.workspaces)
            and (self.route is None or fields.get("route") == self.route)
            and (self.request is None or fields.get("request") == self.request)
            and (self.after is None or record.seq > self.after)
            and (self.sandbox is None or _device(fields.get("link")) == self.sandbox)
            and (self.reasons is None or fields.get("reason") in self.reasons)
            and (self.since is None or record.time >= stamp(self.since))
            and (self.until is None or record.time < stamp(self.until))
            and (self.host is None or _names(self.host, fields))
        )


def _device(link: object) -> object:
    """A link as its device's name; some records of old have its number."""
    return f"eg{link}" if isinstance(link, int) else link


def _names(host: str, fields: Fields) -> bool:
    keys = _ADDRESSES if _is_address(host) else (*_NAMES, *_ADDRESSES)
    return any(_same(host, word) for key in keys for word in str(fields.get(key) or "").split(" "))


def _same(host: str, word: str) -> bool:
    return bool(word) and matches(host, word)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def host_of(text: str) -> str:
    """What somebody typed as a name, a pattern or an address, as records spell it."""
    try:
        return str(ip_address(text.strip("[]")))
    except ValueError:
        pass
    prefix = text[: text.index(".") + 1] if is_pattern(text) and "." in text else ""
    try:
        return prefix + canonical(text[len(prefix) :])
    except Unfit:  # what a sandbox asked for need not be a name at all
        return text


# ---- the bytes


@dataclass(frozen=True, slots=True)
class _Sieve:
    """What a line must have to be worth decoding: one of `starts`, and of each group one."""

    starts: tuple[bytes, ...]
    unshown: tuple[bytes, ...]
    groups: tuple[tuple[bytes, ...], ...]
    since: bytes
    until: bytes

    @classmethod
    def of(cls, query: Query) -> _Sieve:
        groups: list[tuple[bytes, ...]] = []
        if query.workspace is not None:
            groups.append((_pair("workspace", query.workspace),))
        if query.workspaces is not None:
            groups.append(tuple(_pair("workspace", name) for name in sorted(query.workspaces)))
        if query.route is not None:
            groups.append((_pair("route", query.route),))
        if query.request is not None:
            groups.append((_pair("request", query.request),))
        if query.asker is not None:
            groups.append((_pair("asker", query.asker), b'"request":'))
        if query.sandbox is not None:
            groups.append((_pair("link", query.sandbox), b'"link":' + query.sandbox[2:].encode()))
        if query.reasons is not None:
            groups.append(tuple(_pair("reason", reason) for reason in sorted(query.reasons)))
        if query.host is not None:
            groups.append((_json(query.host.lstrip("*"))[1:-1],))
        return cls(
            starts=tuple(_EVENT + _json(event) for event in sorted(query.events or ())),
            unshown=tuple(_EVENT + _json(event) for event in sorted(query.unshown)),
            groups=tuple(groups),
            since=stamp(query.since).encode() if query.since else b"",
            until=stamp(query.until).encode() if query.until else b"~",
        )

    def pick(self, lines: list[bytes]) -> list[bytes]:
        if self.starts:
            lines = [line for line in lines if line.startswith(self.starts)]
        if self.unshown:
            lines = [line for line in lines if not line.startswith(self.unshown)]
        for group in self.groups:
            if len(group) == 1:
                needle = group[0]
                lines = [line for line in lines if needle in line]
            else:
                lines = [line for line in lines if any(needle in line for needle in group)]
        if self.since or self.until != b"~":
            lines = [line for line in lines if self.since <= line[_TIME] < self.until]
        return lines


_EVENT = b'{"event":'


def _json(text: str) -> bytes:
    """As a record's line spells it."""
    return json.dumps(text).replace("\x7f", "\\u007f").encode("ascii")


def _pair(key: str, value: str) -> bytes:
    return b'"%s":%s' % (key.encode(), _json(value))


# ---- the files


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one segment, whole lines only."""

    segment: int
    start: int
    end: int


@dataclass(slots=True)
class Journal:
    """A journal's directory as it was when it was opened: which segments, and where their whole lines end.
    OSError as the disk gives it."""

    directory: str
    ends: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str) -> Journal:
        journal = cls(directory)
        for segment in segments.numbers(os.listdir(directory)):
            with closing(_File(directory, segment)) as file:
                journal.ends[segment] = file.end_of_lines()
        return journal

    def spans(self, query: Query) -> list[Span]:
        """What can hold a match, oldest first."""
        return [span for segment in self.ends for span in self.spans_of(segment, query)]

    def spans_of(self, segment: int, query: Query) -> list[Span]:
        """The same, of one segment."""
        end = self.ends[segment]
        timed = query.since is not None or query.until is not None
        if not timed and query.after is None:
            return [Span(segment, 0, end)]
        with closing(_File(self.directory, segment)) as file:
            after = 0 if query.after is None else _after(file, end, query.after)
            parts = list(_narrowed(file, end, query)) if timed else [(0, end)]
        spans = [Span(segment, max(start, after), stop) for start, stop in parts]
        return [span for span in spans if span.start < span.end]

    def batches(self, spans: Sequence[Span], *, reverse: bool = False) -> Iterator[list[bytes]]:
        """The lines of these spans without their newlines, some at a time; newest first if `reverse`."""
        for span in reversed(spans) if reverse else spans:
            with closing(_File(self.directory, span.segment)) as file:
                yield from (file.backwards if reverse else file.forwards)(span.start, span.end)


class _File:
    """One segment. Symbolic links are refused: the writer makes none."""

    def __init__(self, directory: str, segment: int) -> None:
        path = f"{directory}/{segments.name(segment)}"
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, start: int, end: int) -> bytes:
        """Fewer bytes only where the file has become shorter."""
        parts = []
        while start < end and (data := os.pread(self._descriptor, min(end - start, _CHUNK), start)):
            parts.append(data)
            start += len(data)
        return b"".join(parts)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def identity(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_dev, found.st_ino

    def end_of_lines(self) -> int:
        """The offset after the last newline."""
        end = self.size()
        while end > 0:
            start = max(0, end - _GRAIN)
            newline = self.read(start, end).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0

    def forwards(self, start: int, end: int) -> Iterator[list[bytes]]:
        rest = b""
        while start < end and (data := self.read(start, min(end, start + _CHUNK))):
            start += len(data)
            lines = (rest + data).split(b"\n")
            rest = lines.pop()
            yield lines

    def backwards(self, start: int, end: int) -> Iterator[list[bytes]]:
        rest, first = b"", True
        while start < end:
            begin = max(start, end - _CHUNK)
            lines = (self.read(begin, end) + rest).split(b"\n")
            end = begin
            if first:
                lines.pop()  # empty: a span ends in a newline
                first = False
            rest = lines.pop(0) if lines and begin > start else b""
            yield lines[::-1]

    def line_from(self, offset: int, end: int) -> tuple[int, bytes] | None:
        """The first line that begins at or after `offset` and has a time: where it begins, and the time.
        None if there is none within reach."""
        base = max(offset - 1, 0)
        data = self.read(base, min(end, offset + 2 * _GRAIN))
        at = data.find(b"\n") + 1 if offset else 0
        while 0 < at < len(data) or (at == 0 and not offset):
            newline = data.find(b"\n", at)
            if newline < 0:
                return None
            found = _TAIL.fullmatch(data, max(newline - 37, at), newline)
            if found:
                return base + at, found[1]
            at = newline + 1
        return None

    def number_from(self, offset: int, end: int) -> tuple[int, int] | None:
        """The same, with its number instead of its time."""
        found = self.line_from(offset, end)
        if found is None:
            return None
        line, _, _ = self.read(found[0], min(end, found[0] + 2 * _GRAIN)).partition(b"\n")
        number = number_of(line)
        return None if number is None else (found[0], number)


def _after(file: _File, end: int, number: int) -> int:
    """Where lines of a greater number begin, or a little before: numbers only grow."""
    low, high = 0, end
    while high - low > _GRAIN:
        middle = (low + high) // 2
        found = file.number_from(middle, high)
        if found is None:
            return low
        at, seen = found
        if seen <= number:
            low = at
        else:
            high = middle
    return low


def _narrowed(file: _File, end: int, query: Query) -> Iterator[tuple[int, int]]:
    since = _apart(query.since, -_SLACK)
    until = _apart(query.until, _SLACK)
    for start, stop, ordered in _runs(file, end):
        if not ordered:
            yield start, stop
            continue
        first = start if since is None else _bisect(file, start, stop, since)[0]
        last = stop if until is None else _bisect(file, first, stop, until)[1]
        yield first, last


def _apart(time: datetime | None, slack: timedelta) -> bytes | None:
    """As a record spells it. At the ends of the calendar there is no slack, and nothing that needs it."""
    try:
        return None if time is None else stamp(time + slack).encode()
    except OverflowError:
        return None


def _runs(file: _File, end: int) -> Iterator[tuple[int, int, bool]]:
    """The lines up to `end` as runs: where each begins, where it ends, and whether its times are in order."""
    start = 0
    for mark in _marks(file, end):
        fuzzy = _line_start(file, max(start, mark - _FUZZY), start, mark)
        yield start, fuzzy, True
        yield fuzzy, mark, False
        start = mark
    yield start, end, True


def _line_start(file: _File, offset: int, low: int, high: int) -> int:
    found = file.line_from(offset, high) if offset > low else None
    return low if found is None else found[0]


def _marks(file: _File, end: int) -> Iterator[int]:
    """Where lines begin after which the clock may say something else."""
    at = 0
    for lines in _blocks(file, end):
        found = [at + hit for mark in _MARKS for hit in _hits(lines, mark)]
        yield from sorted(found)
        at += len(lines)


def _blocks(file: _File, end: int) -> Iterator[bytes]:
    """The bytes up to `end`, cut behind newlines."""
    at, rest = 0, b""
    while at < end and (data := file.read(at, min(end, at + _CHUNK))):
        at += len(data)
        data = rest + data
        cut = data.rfind(b"\n") + 1
        rest = data[cut:]
        yield data[:cut]


def _hits(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        if at == 0 or data[at - 1 : at] == b"\n":
            yield at
        at = data.find(mark, at + 1)


def _bisect(file: _File, start: int, end: int, bound: bytes) -> tuple[int, int]:
    """Of a run in order, two beginnings of lines (or its end): before the first one every time is below
    `bound`, from the second one on none is."""
    low, high = start, end
    while high - low > _GRAIN:
        middle = (low + high) // 2
        found = file.line_from(middle, high)
        if found is None:
            return start, end  # damaged, or one line longer than any record: all of it is looked at
        at, time = found
        if at >= high:
            high = middle
        elif time < bound:
            low = at
        else:
            high = middle
    after = file.line_from(high, end) if high < end else None
    return low, end if after is None else after[0]


# ---- searching


@dataclass(slots=True)
class Search:
    """Takes lines, gives those that match. `damaged` counts lines that may have matched, and are no
    records.

    Who asked is said in one record of a request; the others name the request. So whoever looks for an asker
    has to know which requests were theirs, whenever that was said, and learns of new ones as they come."""

    query: Query
    damaged: int = 0
    _requests: set[str] = field(default_factory=set)
    _sieve: _Sieve = field(init=False)

    def __post_init__(self) -> None:
        self._sieve = _Sieve.of(self.query)

    def pick(self, lines: list[bytes]) -> Iterator[Found]:
        for line in self._sieve.pick(lines):
            try:
                record = read(line)
            except RecordError:
                self.damaged += 1
                continue
            if self._is_asked(record) and self.query.holds(record):
                yield line, record

    def _is_asked(self, record: Line) -> bool:
        asker, request = self.query.asker, record.fields.get("request")
        if asker is None:
            return True
        if record.fields.get("asker") != asker:
            return request in self._requests
        if isinstance(request, str):
            self._requests.add(request)
        return True

    def _know(self, journal: Journal) -> None:
        """The requests of whoever is asked for."""
        asked = Search(Query(asker=self.query.asker, events=_TELLING), _requests=self._requests)
        for lines in journal.batches(journal.spans(asked.query)):
            for _ in asked.pick(lines):
                pass

    def through(self, journal: Journal, *, reverse: bool = False) -> Iterator[Found]:
        if self.query.asker is not None:
            self._know(journal)
        for lines in journal.batches(journal.spans(self.query), reverse=reverse):
            yield from self.pick(lines)


_TELLING = frozenset({"request-asked", "request-refused"})  # events that say who asked


# ---- following


class Tail:
    """What is appended to a journal after `journal` was opened, across segments. A line counts when its
    newline is there.

    The writer cuts off what it could not finish and writes the same lines again, so one whose number was
    passed already is not given twice. A journal that could not be continued is moved aside and begun anew:
    its files are others then, and numbers begin at 0.
    """

    def __init__(self, journal: Journal) -> None:
        self._directory = journal.directory
        self._segment = max(journal.ends, default=0)
        self._offset = journal.ends.get(self._segment, 0)
        self._identity: tuple[int, int] | None = None
        self._seen = -1
        if self._segment:
            with closing(_File(self._directory, self._segment)) as file:
                self._identity = file.identity()
                lines = file.read(max(0, self._offset - _GRAIN), self._offset).split(b"\n")
            self._seen = next((n for n in map(number_of, lines[-2:-1]) if n is not None), -1)

    def read(self) -> list[bytes]:
        """The whole lines that are new; none is no reason to stop."""
        numbers = segments.numbers(os.listdir(self._directory))
        lines = self._rest()  # read after looking: a segment that has a successor is complete
        later = [number for number in numbers if number > self._segment]
        if later and not lines:
            self._segment, self._offset, self._identity = later[0], 0, None
            lines = self._rest()
        return [line for line in lines if self._is_new(line)]

    def _rest(self) -> list[bytes]:
        if not self._segment:
            return []
        try:
            file = _File(self._directory, self._segment)
        except FileNotFoundError:
            self._begin_anew()
            return []
        with closing(file):
            if self._identity not in (None, file.identity()):
                self._begin_anew()
                return []
            self._identity, size = file.identity(), file.size()
            self._offset = min(self._offset, size)  # cut off: written again from there
            data = file.read(self._offset, min(size, self._offset + 4 * _CHUNK))
        cut = data.rfind(b"\n") + 1
        self._offset += cut
        return data[:cut].split(b"\n")[:-1]

    def _begin_anew(self) -> None:
        self._segment, self._offset, self._seen, self._identity = 0, 0, -1, None

    def _is_new(self, line: bytes) -> bool:
        number = number_of(line)
        if number is None:
            return True
        if number <= self._seen:
            return False
        self._seen = number
        return True


_SEQ = re.compile(rb'"seq":([0-9]{1,19}),"time":"[^"]{27}"\}$')


def number_of(line: bytes) -> int | None:
    """The number of a line without its newline, which is not read any further."""
    found = _SEQ.search(line, max(len(line) - 80, 0))
    return int(found[1]) if found else None
