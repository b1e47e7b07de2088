"""A page of the journal's records, found within bounds: so many records, and so much time.

Pages go forward, by the records' numbers. Where neither a beginning nor a number is given, the page is the
last one there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from egressd.processes.journal_search import Journal, Query, Search, number_of

__all__ = ["MOST", "MOST_BYTES", "Page", "TooLong", "page"]

MOST = 1000  # records
# A record may have 64 KiB, most of them a sandbox's own words, and eight answers may wait for one who does
# not read them.
MOST_BYTES = 4 << 20


class TooLong(Exception):
    """Looking back from the end, not enough was found in time."""


@dataclass(frozen=True, slots=True)
class Page:
    """Lines of the journal, oldest first. `after`: the number to go on after, where there may be more."""

    lines: tuple[bytes, ...]
    after: int | None


def page(directory: str, query: Query, *, limit: int, over: Callable[[], bool]) -> Page:
    """At most `limit` records, and no more when they have `MOST_BYTES`; `over` says that time is up. OSError
    as the disk gives it.

    For who may see nothing no file is read: it would take as long as the journal is.
    """
    if query.workspaces is not None and not query.workspaces:
        return Page((), None)
    journal, search = Journal.open(directory), Search(query)
    if query.since is None and query.after is None:
        return _last(journal, search, limit, over)
    return _first(journal, search, limit, over)


def _first(journal: Journal, search: Search, limit: int, over: Callable[[], bool]) -> Page:
    """However little time there is, something new is looked through: who comes back gets on."""
    found = _Found(limit)
    start = seen = -1 if search.query.after is None else search.query.after
    for lines in _batches(journal, search.query):
        if seen > start and over():
            return Page(tuple(found.lines), seen)
        for line, record in search.pick(lines):
            if found.is_full_with(line):
                return Page(tuple(found.lines), record.seq)
        seen = next((number for line in reversed(lines) if (number := number_of(line)) is not None), seen)
    return Page(tuple(found.lines), None)


def _last(journal: Journal, search: Search, limit: int, over: Callable[[], bool]) -> Page:
    found = _Found(limit)
    for lines in _batches(journal, search.query, reverse=True):
        for line, _ in search.pick(lines):
            if found.is_full_with(line):
                return Page(tuple(reversed(found.lines)), None)
        if over():
            raise TooLong
    return Page(tuple(reversed(found.lines)), None)


class _Found:
    def __init__(self, limit: int) -> None:
        self.lines: list[bytes] = []
        self._limit, self._bytes = limit, 0

    def is_full_with(self, line: bytes) -> bool:
        self.lines.append(line)
        self._bytes += len(line)
        return len(self.lines) == self._limit or self._bytes >= MOST_BYTES


def _batches(journal: Journal, query: Query, *, reverse: bool = False) -> Iterator[list[bytes]]:
    """A segment at a time: to know what of one is wanted, it may have to be read."""
    for segment in reversed(journal.ends) if reverse else journal.ends:
        yield from journal.batches(journal.spans_of(segment, query), reverse=reverse)
