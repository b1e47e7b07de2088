"""A journal's lines, read fast: a proof may hold a hundred thousand of them.

What `records.decode` refuses is refused here as well. The difference is the way: a line is read by msgspec
and written again by it, and only where the two spellings differ (escapes, floats, damage) the exact and
slower reader decides.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from msgspec import Struct

from egressd.journal import records
from egressd.journal.records import MAX_FIELDS, MAX_LINE, MAX_TEXT, RecordError

__all__ = ["Line", "event_of", "read"]

_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_PREFIX: Final = b'{"event":"'


class Line(Struct, frozen=True, forbid_unknown_fields=True, gc=False):  # of scalars: no cycles
    """The same as `records.Record`."""

    event: str
    fields: dict[str, str | int | float | bool | None]
    process: str
    seq: int
    time: str


_decode: Final = msgspec.json.Decoder(Line).decode
_encode: Final = msgspec.json.Encoder(order="sorted").encode
_time: Final = _TIME.fullmatch


def read(line: bytes) -> Line:
    """A whole line without its newline. RecordError for one that is no record, or not in its one spelling."""
    try:
        found = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError("the line is not a record") from error
    if (
        _encode(found) != line
        or not line.isascii()
        or b"\x7f" in line
        or len(line) >= MAX_LINE
        or not _time(found.time)
        or found.seq < 0
        or len(found.fields) > MAX_FIELDS
        or (len(line) > MAX_TEXT and any(isinstance(v, float | str) for v in found.fields.values()))
    ):
        record = records.decode(line)
        return Line(record.event, dict(record.fields), record.process, record.seq, record.time)
    return found


def event_of(line: bytes) -> bytes:
    """The event of a line, without reading the rest: its first member, as `records.encode` sorts them. Empty
    for a line that is no record."""
    if not line.startswith(_PREFIX):
        return b""
    return line[len(_PREFIX) : line.find(b'"', len(_PREFIX))]
