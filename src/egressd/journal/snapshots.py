"""From the rows of snapshots to what was counted between two of them.

A snapshot is a run of `counted` records and a closing `snapshot` record with their number. Counters of one
epoch only grow; a new epoch (another boot, another ruleset) begins at nothing, and what the old one counted
after its last snapshot is in none: that is said, never guessed. A snapshot whose rows are not all there is
not used, and neither are those that follow until one is full again, since they leave out what did not change.

A name that a wildcard covers has a row of its own, which names the wildcard. What shrinks within an epoch
contradicts the promise that nothing does, and is told as an equation that does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from msgspec import Struct

__all__ = [
    "Counts", "DeniedCount", "Epoch", "Equation", "HostCount", "LinkTotals", "Snapshots", "number", "pair",
]  # fmt: skip

Fields: TypeAlias = Mapping[str, str | int | float | bool | None]

_COLUMNS: Final = (
    "out_packets", "out_bytes", "in_packets", "in_bytes", "connections", "dialled_packets", "dialled_bytes",
)  # fmt: skip
_TOTALS: Final = (
    "in_packets", "in_bytes", "ok_packets", "ok_bytes", "denied_packets", "denied_bytes", "other_packets",
    "other_bytes",
)  # fmt: skip


class Counts(Struct, frozen=True, forbid_unknown_fields=True):
    """Of a host. `out` is what sandboxes sent; `dialled` what the inspector sent on for them."""

    out_packets: int
    out_bytes: int
    in_packets: int
    in_bytes: int
    connections: int
    dialled_packets: int
    dialled_bytes: int


class LinkTotals(Struct, frozen=True, forbid_unknown_fields=True):
    """in = ok + denied + other, of all links together or of one."""

    in_packets: int
    in_bytes: int
    ok_packets: int
    ok_bytes: int
    denied_packets: int
    denied_bytes: int
    other_packets: int
    other_bytes: int


class HostCount(Struct, frozen=True, forbid_unknown_fields=True):
    """`counted` is what was counted from `start` to `end`. `wildcard`: the rule of a granted name."""

    host: str
    kind: str
    wildcard: str
    addresses: tuple[str, ...]
    start: Counts
    end: Counts
    counted: Counts


class DeniedCount(Struct, frozen=True, forbid_unknown_fields=True):
    """By reason, exactly: packets and bytes that the kernel refused."""

    reason: str
    packets: int
    bytes: int


class Epoch(Struct, frozen=True, forbid_unknown_fields=True):
    """`begins`: where counting began for the proof: "at a snapshot" before the window, "at nothing" because
    the epoch itself began in it, or "at its first snapshot" because nothing earlier is known."""

    epoch: str
    begins: str
    snapshots: int
    unusable: int  # incomplete, or following an incomplete one
    start_time: str | None
    end_time: str
    hosts: tuple[HostCount, ...]
    denied: tuple[DeniedCount, ...]
    start: LinkTotals
    end: LinkTotals
    counted: LinkTotals


class Equation(Struct, frozen=True, forbid_unknown_fields=True):
    """One that does not hold to the last byte. `moving`: packets flowed while it was read, and egressd found
    two readings without a contradiction."""

    what: str
    time: str
    left: tuple[int, int]
    right: tuple[int, int]
    moving: bool


def pair(fields: Fields, name: str) -> tuple[int, int]:
    """Packets and bytes called `name`."""
    return number(fields, f"{name}_packets"), number(fields, f"{name}_bytes")


def number(fields: Fields, name: str) -> int:
    """A counter; 0 if it is not there or no whole number (`records` holds it below 2**64)."""
    value = fields.get(name)
    return value if type(value) is int and value >= 0 else 0


@dataclass(slots=True)
class _Row:
    """Of one host."""

    kind: str = ""
    wildcard: str = ""
    addresses: set[str] = field(default_factory=set)
    start: tuple[int, ...] = (0,) * len(_COLUMNS)
    value: tuple[int, ...] = (0,) * len(_COLUMNS)


@dataclass(slots=True)
class _Books:
    """One epoch while it is read."""

    epoch: str
    begins: str
    start_time: str | None = None
    end_time: str = ""
    snapshots: int = 0
    unusable: int = 0
    usable: bool = False  # whether a snapshot that is not full says all
    known: bool = False  # whether any snapshot was taken in
    rows: dict[str, _Row] = field(default_factory=dict)
    out: list[int] = field(default_factory=lambda: [0, 0])  # sum over the rows
    denied: dict[str, tuple[int, int]] = field(default_factory=dict)
    denied_start: dict[str, tuple[int, int]] = field(default_factory=dict)
    totals: tuple[int, ...] = (0,) * len(_TOTALS)
    totals_start: tuple[int, ...] = (0,) * len(_TOTALS)


class Snapshots:
    """Feed it `counted` and `snapshot` records in order, and `begin` where the window begins."""

    def __init__(self, *, from_beginning: bool) -> None:
        """`from_beginning`: nothing is before what is fed, so what is counted first was counted in it."""
        self._from_beginning = from_beginning
        self._rows: dict[str, list[Fields]] = {}
        self._books: list[_Books] = []
        self._in_window = from_beginning
        self.equations = 0
        self.unequal: list[Equation] = []

    # ---- what is fed

    def row(self, fields: Fields) -> None:
        self._rows.setdefault(str(fields.get("snapshot")), []).append(fields)

    def begin(self) -> None:
        """The window begins: what was fed so far is its base."""
        self._in_window = True
        self._rows.clear()
        self._books = self._books[-1:]
        for books in self._books:
            books.snapshots = books.unusable = 0
            _rebase(books, "at a snapshot")

    def close(self, fields: Fields, time: str) -> None:
        """The closing record: take its rows in, if they are all there."""
        rows = self._rows.pop(str(fields.get("snapshot")), [])
        books = self._books_of(str(fields.get("epoch")))
        books.snapshots += 1
        full, complete = fields.get("full") is True, len(rows) == number(fields, "rows")
        books.usable = complete and (full or books.usable)
        if not books.usable:
            books.unusable += 1
            return
        totals = tuple(number(fields, name) for name in _TOTALS)
        if any(after < before for before, after in zip(books.totals, totals, strict=True)):
            self._shrunk("the totals", time)
        self._take(books, rows, time)
        books.totals, books.end_time = totals, time
        if not books.known and books.begins == "at its first snapshot":
            _rebase(books, books.begins)
        books.known = True
        self._check(books, fields, time)

    def _books_of(self, epoch: str) -> _Books:
        if not self._books or self._books[-1].epoch != epoch:
            known = bool(self._books) or self._from_beginning
            self._books.append(_Books(epoch, "at nothing" if known else "at its first snapshot"))
        return self._books[-1]

    def _take(self, books: _Books, rows: Sequence[Fields], time: str) -> None:
        for fields in rows:
            reason = fields.get("reason")
            if reason is None:
                self._host(books, fields, time)
            else:
                books.denied[str(reason)] = pair(fields, "denied")

    def _host(self, books: _Books, fields: Fields, time: str) -> None:
        name = str(fields.get("host"))
        row = books.rows.setdefault(name, _Row())
        value = tuple(number(fields, column) for column in _COLUMNS)
        if any(after < before for before, after in zip(row.value, value, strict=True)):
            self._shrunk(name, time)
        for unit in (0, 1):
            books.out[unit] += value[unit] - row.value[unit]
        row.value, row.kind = value, str(fields.get("kind"))
        row.wildcard = str(fields.get("wildcard") or "")
        addresses = fields.get("addresses")
        if isinstance(addresses, str) and addresses:
            row.addresses.update(addresses.split(" "))

    # ---- whether it adds up

    def _shrunk(self, what: str, time: str) -> None:
        self.equations += 1
        self.unequal.append(Equation(f"{what}: nothing shrinks within an epoch", time, (0, 0), (1, 1), False))

    def _check(self, books: _Books, fields: Fields, time: str) -> None:
        if not self._in_window:
            return
        total = dict(zip(_TOTALS, books.totals, strict=True))
        terms = [pair(total, name) for name in ("ok", "denied", "other")]
        for what, left, right in (
            ("in = ok + denied + other", pair(total, "in"), _sum(terms)),
            ("ok = sum of hosts", pair(total, "ok"), (books.out[0], books.out[1])),
            ("denied = sum of reasons", pair(total, "denied"), _sum(books.denied.values())),
        ):
            self.equations += 1
            if left != right:
                self.unequal.append(Equation(what, time, left, right, fields.get("balanced") is True))

    # ---- what came out

    def epochs(self) -> tuple[Epoch, ...]:
        return tuple(_epoch(books) for books in self._books if books.known or books.snapshots)


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    packets = octets = 0
    for one, other in pairs:
        packets, octets = packets + one, octets + other
    return packets, octets


def _rebase(books: _Books, begins: str) -> None:
    """What was counted so far is where counting begins."""
    books.begins = begins
    for row in books.rows.values():
        row.start = row.value
    books.denied_start = dict(books.denied)
    books.totals_start = books.totals
    books.start_time = books.end_time or None


def _epoch(books: _Books) -> Epoch:
    return Epoch(
        epoch=books.epoch,
        begins=books.begins,
        snapshots=books.snapshots,
        unusable=books.unusable,
        start_time=books.start_time,
        end_time=books.end_time,
        hosts=tuple(_host_count(name, row) for name, row in sorted(books.rows.items())),
        denied=tuple(_denied(books)),
        start=LinkTotals(*books.totals_start),
        end=LinkTotals(*books.totals),
        counted=LinkTotals(*_grown(books.totals_start, books.totals)),
    )


def _grown(start: Sequence[int], end: Sequence[int]) -> Iterator[int]:
    return (max(after - before, 0) for before, after in zip(start, end, strict=True))


def _host_count(name: str, row: _Row) -> HostCount:
    return HostCount(
        host=name,
        kind=row.kind,
        wildcard=row.wildcard,
        addresses=tuple(sorted(row.addresses)),
        start=Counts(*row.start),
        end=Counts(*row.value),
        counted=Counts(*_grown(row.start, row.value)),
    )


def _denied(books: _Books) -> Iterator[DeniedCount]:
    for reason, now in sorted(books.denied.items()):
        yield DeniedCount(reason, *_grown(books.denied_start.get(reason, (0, 0)), now))
