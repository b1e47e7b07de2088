r"""The canonical record: what one line of the journal says, and exactly how it is spelled.

    {"event":"denied","fields":{"link":"eg7","port":443},"process":"auditor","seq":12,"time":"2026-..."}

One record is one JSON object on one line: keys sorted, no spaces, ASCII only. Everything outside
printable ASCII is spelled \uNNNN, so no control character, terminal escape, bidirectional override or
lone surrogate that a stranger chose reaches a terminal, a pager or another parser unescaped; DEL (0x7f),
which JSON allows, too. There is one spelling per record: `encode(decode(line)) == line`, and a line for
which that does not hold is refused. A log over these lines may hash them as they are: the bytes of
`encode` without the newline are the leaf.

Bounds: texts are cut to `MAX_TEXT` characters and say so, fields to `MAX_FIELDS`, lines to `MAX_LINE`
bytes. What is cut ends in "...[+N]", N being the number of characters that are missing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = [
    "MAX_FIELDS", "MAX_LINE", "MAX_TEXT", "Fields", "Record", "RecordError", "Scalar", "bounded", "decode",
    "encode",
]  # fmt: skip

Scalar: TypeAlias = str | int | float | bool | None
Fields: TypeAlias = Mapping[str, Scalar]

MAX_TEXT = 1024  # characters of one text
MAX_FIELDS = 48
MAX_LINE = 1 << 16  # bytes, newline included
_SHORT_TEXT = 64  # characters, where cutting to MAX_TEXT is not enough for MAX_LINE
_MAX_CUT = 24  # room for "...[+N]"
_MAX_INTEGER = 1 << 64
_MAX_SEQ = 1 << 63

_KEY = re.compile(r"[a-z][a-z0-9_]{0,30}")
_EVENT = re.compile(r"[a-z][a-z-]{1,40}")
_PROCESS = re.compile(r"[a-z][a-z0-9-]{0,31}")
# RFC 3339 section 5.6, in UTC, always with microseconds: one spelling per instant
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_TOP = ("event", "fields", "process", "seq", "time")


class RecordError(ValueError):
    """The line, or the record, is not one a journal may hold."""


@dataclass(frozen=True, slots=True)
class Record:
    """`seq` counts from 0 without gaps over all files of a journal; `time` is RFC 3339, UTC, microseconds."""

    seq: int
    time: str
    process: str
    event: str
    fields: Fields

    def __post_init__(self) -> None:
        if type(self.seq) is not int or not 0 <= self.seq < _MAX_SEQ:
            raise RecordError("seq is not a number a record can have")
        for name, pattern in (("time", _TIME), ("process", _PROCESS), ("event", _EVENT)):
            value = getattr(self, name)
            if not (isinstance(value, str) and pattern.fullmatch(value)):
                raise RecordError(f"{name} is not spelled as a record spells it")
        if len(self.fields) > MAX_FIELDS:
            raise RecordError(f"more than {MAX_FIELDS} fields")
        for key, value in self.fields.items():
            _check(key, value)


def _check(key: Any, value: Any) -> None:
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise RecordError("a field's name is not spelled as a record spells it")
    if isinstance(value, str):
        if len(value) > MAX_TEXT + _MAX_CUT:
            raise RecordError(f"{key} is longer than {MAX_TEXT} characters")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"{key} is not a finite number")
    elif isinstance(value, int):  # bool is one
        if not -_MAX_INTEGER < value < _MAX_INTEGER:
            raise RecordError(f"{key} is out of range")
    elif value is not None:
        raise RecordError(f"{key} is neither text, number, truth value nor null")


def bounded(fields: Mapping[str, Any]) -> dict[str, Scalar]:
    """Whatever `fields` hold, made into what a record may hold; nothing is dropped silently.

    For events of other processes, which must be recorded even when they are odd. Values that are no
    scalars are recorded by their repr; fields too many or ill-named are counted in `cut_fields`.
    """
    kept: dict[str, Scalar] = {}
    for key in sorted(k for k in fields if isinstance(k, str) and _KEY.fullmatch(k) and k != "cut_fields"):
        if len(kept) == MAX_FIELDS - 1:
            break
        kept[key] = _scalar(fields[key], MAX_TEXT)
    missing = len(fields) - len(kept)
    if missing:
        kept["cut_fields"] = missing
    if len(_json(kept)) > MAX_LINE - 512:  # 512: seq, time, process, event and their names
        kept = {key: _scalar(value, _SHORT_TEXT) for key, value in kept.items()}
    return kept


def _scalar(value: Any, limit: int) -> Scalar:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -_MAX_INTEGER < value < _MAX_INTEGER:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, int):
        return "a very large number"  # its decimal form may take long, and refuses beyond 4300 digits
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}...[+{len(text) - limit}]"


def encode(record: Record) -> bytes:
    """The record's line, newline included. RecordError if it is longer than `MAX_LINE`."""
    line = _json(
        {
            "event": record.event,
            "fields": dict(record.fields),
            "process": record.process,
            "seq": record.seq,
            "time": record.time,
        }
    )
    if len(line) >= MAX_LINE:
        raise RecordError(f"the record takes {len(line)} bytes")
    return line + b"\n"


def _json(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("\x7f", "\\u007f").encode("ascii")


def decode(line: bytes) -> Record:
    """Read a line as `encode` wrote it, with or without its newline. RecordError for anything else."""
    body = line.removesuffix(b"\n")
    if len(body) >= MAX_LINE:
        raise RecordError("the line is longer than any record")
    try:
        value = json.loads(body.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise RecordError("the line is not JSON in ASCII") from error
    if not (isinstance(value, dict) and sorted(value) == list(_TOP) and isinstance(value["fields"], dict)):
        raise RecordError("the line is not a record")
    record = Record(
        seq=value["seq"],
        time=value["time"],
        process=value["process"],
        event=value["event"],
        fields=value["fields"],
    )
    if encode(record).removesuffix(b"\n") != body:
        raise RecordError("the line is not spelled canonically")
    return record
