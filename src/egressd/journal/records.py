r"""The canonical record: what one line of the journal says, and exactly how it is spelled.

    {"event":"denied","fields":{"link":"eg7","port":443},"process":"auditor","seq":12,"time":"2026-..."}

One record is one JSON object on one line: keys sorted, no spaces, ASCII only. Everything outside
printable ASCII is spelled \uNNNN, so no control character, terminal escape, bidirectional override or
lone surrogate that a stranger chose reaches a terminal, a pager or another parser unescaped; DEL (0x7f),
which JSON allows, too. There is one spelling per record: `encode(decode(line)) == line`, and a line for
which that does not hold is refused. A log over these lines may hash them as they are: the bytes of
`encode` without the newline are the leaf.

Writing is done once per denial in a flood, so `spell` checks and spells in one pass, with the names of a
shape of record (which fields, in which order they came) looked up; `json.dumps` says the same bytes, which a
test holds it to.

Bounds: texts are cut to `MAX_TEXT` characters and say so, fields to `MAX_FIELDS`, lines to `MAX_LINE`
bytes. What is cut ends in "...[+N]", N being the number of characters that are missing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from json.encoder import encode_basestring_ascii
from operator import mod
from typing import Any, TypeAlias

import msgspec

__all__ = [
    "MAX_FIELDS", "MAX_LINE", "MAX_TEXT", "Fields", "Record", "RecordError", "Scalar", "bounded", "decode",
    "encode", "finished", "frame", "spell", "spelled", "stamp",
]  # fmt: skip

Scalar: TypeAlias = str | int | float | bool | None
Fields: TypeAlias = Mapping[str, Scalar]

MAX_TEXT = 4096  # characters of one text: as many as a message carries (ipc.messages)
MAX_FIELDS = 48
MAX_LINE = 1 << 16  # bytes, newline included
_SHORT_TEXT = 64  # characters, where cutting to MAX_TEXT is not enough for MAX_LINE
_LITTLE_TEXT = 4096  # characters of all texts together: far from MAX_LINE, though each took 12 bytes
_MAX_CUT = 24  # room for "...[+N]"
_MAX_INTEGER = 1 << 64
_MAX_SEQ = 1 << 63

_KEY = re.compile(r"[a-z][a-z0-9_]{0,30}")
_EVENT = re.compile(r"[a-z][a-z-]{1,40}")
_PROCESS = re.compile(r"[a-z][a-z0-9-]{0,31}")
# RFC 3339 section 5.6, in UTC, always with microseconds: one spelling per instant
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_TOP = ("event", "fields", "process", "seq", "time")


def stamp(moment: datetime) -> str:
    """An instant as a record spells it; before the year 1000 with the zeros that strftime leaves out."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


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
    if _harmless(fields):
        return dict(fields)
    kept: dict[str, Scalar] = {}
    for key in sorted(k for k in fields if isinstance(k, str) and _KEY.fullmatch(k) and k != "cut_fields"):
        if len(kept) == MAX_FIELDS - 1:
            break
        kept[key] = _scalar(fields[key], MAX_TEXT)
    missing = len(fields) - len(kept)
    if missing:
        kept["cut_fields"] = missing
    else:
        _shape(fields)  # so that the next of its kind is known
    if len(_json(kept)) > MAX_LINE - 512:  # 512: seq, time, process, event and their names
        kept = {key: _scalar(value, _SHORT_TEXT) for key, value in kept.items()}
    return kept


def _harmless(fields: Mapping[str, Any]) -> bool:
    """Nothing in them needs to be cut: names that are known, little text, finite numbers. Nearly all are; a
    closer look takes eight times as long."""
    if tuple(fields) not in _shapes or len(fields) >= MAX_FIELDS or "cut_fields" in fields:
        return False
    text = 0
    for value in fields.values():
        kind = type(value)
        if kind is str:
            if len(value) > MAX_TEXT:
                return False
            text += len(value)
        elif kind is int:
            if not -_MAX_INTEGER < value < _MAX_INTEGER:
                return False
        elif kind is float:
            if not math.isfinite(value):
                return False
        elif kind is not bool and value is not None:
            return False
    return text <= _LITTLE_TEXT


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
    return spell(
        seq=record.seq, time=record.time, process=record.process, event=record.event, fields=record.fields
    )


_MOST_SHAPES = 4096  # more than our own processes ever make; kept few should one of them be somebody else's
_Shape: TypeAlias = tuple[tuple[str, str], ...]  # (name, '"name":'), sorted
_shapes: dict[tuple[str, ...], _Shape] = {}
_frames: dict[tuple[str, str], tuple[str, str]] = {}  # (event, process) -> what stands around the fields


def spell(*, seq: int, time: str, process: str, event: str, fields: Fields) -> bytes:
    """`encode(Record(...))`, in one pass. RecordError as there."""
    if type(seq) is not int or not 0 <= seq < _MAX_SEQ:
        raise RecordError("seq is not a number a record can have")
    if not (isinstance(time, str) and _TIME.fullmatch(time)):
        raise RecordError("time is not spelled as a record spells it")
    before, after = _frames.get((event, process)) or _frame(event, process)
    shape = _shapes.get(tuple(fields)) or _shape(fields)
    body = ",".join([prefix + _spelled(name, fields[name]) for name, prefix in shape])
    text = f'{before}{body}{after}{seq},"time":"{time}"}}\n'
    line = (text.replace("\x7f", "\\u007f") if "\x7f" in text else text).encode("ascii")
    if len(line) > MAX_LINE:
        raise RecordError(f"the record takes {len(line) - 1} bytes")
    return line


# ---- many at a time

_sorted = msgspec.json.Encoder(order="sorted")
_TINY = re.compile(rb":-?(0\.0000|[0-9.]+e-)")


def frame(*, event: str, process: str, names: tuple[str, ...]) -> bytes | None:
    """For `finished`; None if fields of these names need a closer look than `spelled` takes."""
    if len(names) >= MAX_FIELDS or "cut_fields" in names or not all(map(_KEY.fullmatch, names)):
        return None
    before, after = _frame(event, process)
    # The braces are with the fields. Time first, the others later; no name has a percent sign.
    return f'{before[:-1]}%%b{after[1:]}%%d,"time":"%b"}}\n'.encode("ascii")


def spelled(fields: Sequence[Fields]) -> bytes | None:
    """The fields of many records as `spell` spells them, `{...}` and a newline for each; None if some of them
    are not so plain that msgspec spells them like json.

    Taken as given: names and number of fields as `frame` wants them; texts of at most `MAX_TEXT` characters,
    4096 altogether; values of these exact types, integers of 64 bits, floats finite and below 1e15."""
    text = _sorted.encode_lines(fields)
    if not text.isascii() or _may_hold_tiny(text):
        return None
    return text.replace(b"\x7f", b"\\u007f") if b"\x7f" in text else text


def _may_hold_tiny(text: bytes) -> bool:
    """A float below 1e-4, where the two differ: 9e-05 is 0.00009 to msgspec, 1e-07 is 1e-7. A text may look
    like one, and costs time."""
    return any(_found_at(mark, text) for mark in (b"0.0000", b"e-"))


def _found_at(mark: bytes, text: bytes) -> bool:
    """Finding two letters takes a tenth of the time that a pattern takes, and nearly always finds nothing."""
    at = text.find(mark)
    while at >= 0:
        if _TINY.search(text, max(0, at - 32), at + len(mark)):
            return True
        at = text.find(mark, at + len(mark))
    return False


def finished(frames: Sequence[bytes], spelled: bytes, *, seq: int, time: str) -> list[bytes]:
    """The lines of `spelled` fields, the first having number `seq`."""
    now = time.encode("ascii")
    timed = {frame: frame % now for frame in set(frames)}
    bodies = zip(spelled.split(b"\n"), count(seq), strict=False)
    return list(map(mod, map(timed.__getitem__, frames), bodies))


def _frame(event: str, process: str) -> tuple[str, str]:
    for name, value, pattern in (("process", process, _PROCESS), ("event", event, _EVENT)):
        if not (isinstance(value, str) and pattern.fullmatch(value)):
            raise RecordError(f"{name} is not spelled as a record spells it")
    if len(_frames) >= _MOST_SHAPES:
        _frames.clear()
    frame = _frames[event, process] = f'{{"event":"{event}","fields":{{', f'}},"process":"{process}","seq":'
    return frame


def _shape(fields: Fields) -> _Shape:
    if len(fields) > MAX_FIELDS:
        raise RecordError(f"more than {MAX_FIELDS} fields")
    for name in fields:
        if not (isinstance(name, str) and _KEY.fullmatch(name)):
            raise RecordError("a field's name is not spelled as a record spells it")
    if len(_shapes) >= _MOST_SHAPES:
        _shapes.clear()
    shape = _shapes[tuple(fields)] = tuple((name, f'"{name}":') for name in sorted(fields))
    return shape


def _spelled(name: str, value: Any) -> str:
    """As json.dumps spells it: the exact types by hand, everything else by the exact way."""
    kind = type(value)
    if kind is str:
        if len(value) <= MAX_TEXT + _MAX_CUT:
            return encode_basestring_ascii(value)
    elif kind is int:
        if -_MAX_INTEGER < value < _MAX_INTEGER:
            return int.__repr__(value)
    elif kind is bool:
        return "true" if value else "false"
    elif kind is float:
        if math.isfinite(value):
            return float.__repr__(value)
    elif value is None:
        return "null"
    _check(name, value)
    return json.dumps(value, allow_nan=False)


def _json(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("\x7f", "\\u007f").encode("ascii")


def decode(line: bytes) -> Record:
    """Read a line as `encode` wrote it, with or without its newline. RecordError for anything else."""
    body = line.removesuffix(b"\n")
    if len(body) >= MAX_LINE:
        raise RecordError("the line is longer than any record")
    record = _record(_parsed(body))
    if encode(record)[:-1] == body:
        return record
    record = _record(_parsed_exactly(body))  # msgspec reads an integer below -2**63 as a float
    if encode(record)[:-1] != body:
        raise RecordError("the line is not spelled canonically")
    return record


def _record(value: Any) -> Record:
    if not (isinstance(value, dict) and sorted(value) == list(_TOP) and isinstance(value["fields"], dict)):
        raise RecordError("the line is not a record")
    return Record(
        seq=value["seq"],
        time=value["time"],
        process=value["process"],
        event=value["event"],
        fields=value["fields"],
    )


def _parsed(body: bytes) -> Any:
    """msgspec and json agree on every line that is canonical, where msgspec reads it at all (it takes no lone
    surrogates); others do not come through `decode`."""
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return _parsed_exactly(body)


def _parsed_exactly(body: bytes) -> Any:
    try:
        return json.loads(body.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise RecordError("the line is not JSON in ASCII") from error
