"""Published prefixes: in which region an address is, as far as its provider says.

A table is one list as a provider published it, imported once: `formats` reads those, `Table` is what is kept.
Its prefixes nest: the most specific one decides. So they are laid flat when the table is loaded, into
intervals that neither overlap nor leave a gap, and a lookup is one bisection:

    3.0.0.0/8 us-east-1, 3.120.0.0/14 eu-central-1
    starts   0      3.0.0.0    3.120.0.0     3.124.0.0  4.0.0.0
    owners   none   us-east-1  eu-central-1  us-east-1  none

A list may say nothing of where a prefix is (Azure's tags without a region): such a prefix counts only where
no other of the same list has the address, however wide that one is.

In which country a region is says the catalogue, when tables are loaded: nothing of that is frozen in a table.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date, timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Struct

from egressd.model.addresses import Address, Network
from egressd.model.errors import Unfit
from egressd.model.names import quoted
from egressd.residency.jurisdictions import CODES, countries, named
from egressd.residency.places import Observation, TableName

__all__ = [
    "MAX_PREFIXES",
    "STALE_DAYS",
    "WIDEST",
    "Group",
    "Prefixes",
    "Regions",
    "Source",
    "Table",
    "key_of",
    "nested",
]

STALE_DAYS: Final = 30  # AWS and Azure publish weekly or more often
MAX_PREFIXES: Final = 500_000  # the longest list, Azure's, had about 100,000 in 2025
WIDEST: Final = {4: 8, 6: 16}  # a prefix wider than this says nothing about a place; nobody was given one
Regions: TypeAlias = Callable[[str, str], tuple[str, ...] | None]
"""(provider, region) -> its countries; None if it has no such region."""

_Word = Annotated[str, Meta(max_length=128, pattern=r"^[\x21-\x7e][\x20-\x7e]*$")]
_Maybe = Annotated[str, Meta(max_length=128, pattern=r"^[\x20-\x7e]*$")]
_Code = Annotated[str, Meta(min_length=2, max_length=3)]
_Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """The file that was imported."""

    name: _Maybe
    digest: _Digest
    bytes: Annotated[int, Meta(ge=0, le=1 << 40)]
    checked: _Maybe = ""  # how it was compared with its publisher: "sha256", "ed25519 sha256:..."; "": not


class Group(Struct, frozen=True, forbid_unknown_fields=True):
    """Prefixes of which a list says the same. `region` "": it does not say where. `countries` only where the
    list itself names them."""

    region: _Maybe
    services: tuple[_Word, ...]
    prefixes: Annotated[tuple[Annotated[str, Meta(max_length=43)], ...], Meta(min_length=1)]
    anycast: bool = False
    countries: tuple[_Code, ...] = ()

    @property
    def placed(self) -> bool:
        """Whether it says anything of where."""
        return bool(self.region or self.countries or self.anycast)


class Table(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One imported list, and the content of its file tables/NAME.json."""

    version: Literal[1] = 1
    name: Annotated[str, Meta(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?$")]
    provider: _Word  # a cloud of the catalogue ("aws", "google", "azure"), or what the importer called it
    format: _Word
    source: Source
    serial: _Maybe = ""  # how the publisher numbers its editions
    published: date | None
    imported: date
    groups: tuple[Group, ...]

    def encode(self) -> bytes:
        """Its one spelling: `decode` takes no other."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @staticmethod
    def decode(data: bytes) -> Table:
        """`Unfit` for whatever is not exactly what `encode` writes of a good table: it names the place."""
        remedy = "import the list again"
        try:
            table = msgspec.json.decode(data, type=Table)
            for number, group in enumerate(table.groups):
                _check(group, number)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unfit(f"it is no table of prefixes: {error}", remedy) from error
        if sum(len(group.prefixes) for group in table.groups) > 2 * MAX_PREFIXES:
            raise Unfit(f"it has more than {2 * MAX_PREFIXES} prefixes", remedy)
        # A key that stands there twice, for one, is read one way here and another way by others.
        if table.encode() != data:
            raise Unfit("it is not spelled as egressd writes it: it was edited, or cut off", remedy)
        return table

    @property
    def title(self) -> TableName:
        return TableName(self.name, self.source.digest, self.published)

    @property
    def age_from(self) -> date:
        """When it was made, as far as is known. A date in the future keeps no table fresh."""
        return self.imported if self.published is None else min(self.published, self.imported)


def _check(group: Group, number: int) -> None:
    for place, text in enumerate(group.prefixes):
        try:
            key_of(text)
        except ValueError as error:
            raise Unfit(f"groups[{number}].prefixes[{place}]: {error}", "import the list again") from error
    for code in group.countries:
        if code not in CODES:
            raise Unfit(f"groups[{number}].countries: {quoted(code)} is none", "import the list again")


# ---- one prefix


# A prefix as one number, for speed: its first address, then 8 bits of length. So a wider one sorts before
# those that lie in it and begin where it does.
_LENGTH: Final = 8
BITS: Final = {4: 32, 6: 128}
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
# ipaddress takes four times as long, and a table has a hundred thousand.
_FOUR = re.compile(rf"{_OCTET}\.{_OCTET}\.{_OCTET}\.{_OCTET}/([12]?[0-9]|3[0-2])", re.ASCII)
_SIX = re.compile(r"([0-9a-f:.]{2,39})/(0|[1-9][0-9]?|1[01][0-9]|12[0-8])", re.ASCII)
_MAPPED: Final = 0xFFFF  # ::ffff:0:0/96, RFC 4291 section 2.5.5.2


def key_of(text: str) -> tuple[int, int]:
    """Of a prefix in its one spelling: the family, and the number. ValueError says what is wrong with it:
    host bits, too wide, not canonical, an IPv4 address in disguise."""
    match = _FOUR.fullmatch(text)
    if match is None:
        return _key6(text)
    a, b, c, d, length = map(int, match.groups())
    start = a << 24 | b << 16 | c << 8 | d
    _check_span(text, 4, start, length)
    return 4, start << _LENGTH | length


def _key6(text: str) -> tuple[int, int]:
    match = _SIX.fullmatch(text)
    try:
        address = IPv6Address(match[1] if match else "")
    except ValueError:
        raise ValueError(f"{quoted(text)} is no prefix in its ordinary spelling") from None
    assert match is not None
    if str(address) != match[1]:
        raise ValueError(f"{quoted(text)} is spelled {address}/{match[2]}")
    start, length = int(address), int(match[2])
    _check_span(text, 6, start, length)
    if start >> 32 == _MAPPED:
        raise ValueError(f"{text} holds IPv4 addresses in disguise")
    return 6, start << _LENGTH | length


def _check_span(text: str, version: int, start: int, length: int) -> None:
    if length < WIDEST[version]:
        raise ValueError(f"{text} is wider than /{WIDEST[version]}, which says nothing about a place")
    if start & ((1 << (BITS[version] - length)) - 1):
        raise ValueError(f"{text} has bits set behind its length")


def extent(version: int, key: int) -> tuple[int, int]:
    """First number, and the first behind it."""
    start = key >> _LENGTH
    return start, start + (1 << (BITS[version] - (key & 0xFF)))


# ---- one table, laid flat


class Said(NamedTuple):
    """What a table says of one prefix, its countries looked up. `fixed`: the different places it names."""

    fixed: frozenset[tuple[str, tuple[str, ...]]]
    region: str
    countries: tuple[str, ...]
    anycast: bool
    conflict: str
    placed: bool


class _Sayings:
    """A table has few of them and many prefixes."""

    def __init__(self, provider: str, regions: Regions) -> None:
        self._provider, self._regions = provider, regions
        self._merged: dict[tuple[Said, Said], Said] = {}

    def of(self, group: Group) -> Said:
        if not group.placed:
            return Said(frozenset(), "", (), anycast=False, conflict="", placed=False)
        region = _region(group)
        if group.anycast:
            return Said(frozenset(), region, (), anycast=True, conflict="", placed=True)
        said = countries(group.countries)
        known = frozenset(self._regions(self._provider, group.region) or ())
        where, conflict = tuple(sorted(said or known)), ""
        if said and known - said:
            # whoever imported it wrote --country beside a region that is known to be elsewhere
            conflict = f"the list says {', '.join(group.countries)}, and {region} is in {named(known)}"
            where = ()
        return Said(
            frozenset({(region, where)}), region, where, anycast=False, conflict=conflict, placed=True
        )

    def merged(self, one: Said, other: Said) -> Said:
        """Of the same prefix."""
        if not (one.placed and other.placed):
            return one if one.placed else other
        if (one, other) not in self._merged:
            self._merged[one, other] = _merged(one, other)
        return self._merged[one, other]


def _merged(one: Said, other: Said) -> Said:
    fixed = one.fixed | other.fixed
    anycast = one.anycast or other.anycast
    regions = ", ".join(sorted({region for region, _ in fixed})) or one.region
    if len(fixed) > 1:
        conflict = f"the same list puts it in different places: {regions}"
        return Said(fixed, regions, (), anycast, conflict, placed=True)
    where = next((where for _, where in fixed), ())
    return Said(
        fixed, regions, () if anycast else where, anycast, one.conflict or other.conflict, placed=True
    )


def _region(group: Group) -> str:
    return group.region or "/".join(group.countries)


_HOLE: Final = -1


class _Flat:
    """One family of a table. From `starts[i]` to before `starts[i + 1]`, number `owners[i]` decides; `_HOLE`:
    none. The first start is 0, so every address has one."""

    __slots__ = ("owners", "said", "starts", "texts")

    def __init__(self, version: int, claims: dict[int, Said], texts: dict[int, str]) -> None:
        order = sorted(claims)
        self.said = [claims[key] for key in order]
        self.texts = [texts[key] for key in order]
        self.starts, self.owners = _lay(version, order, [said.placed for said in self.said])

    def at(self, value: int) -> tuple[str, Said] | None:
        owner = self.owners[bisect_right(self.starts, value) - 1]
        return None if owner == _HOLE else (self.texts[owner], self.said[owner])

    def edges(self, first: int, behind: int) -> Sequence[int]:
        """Where, between these, something else begins."""
        return self.starts[bisect_right(self.starts, first) : bisect_left(self.starts, behind)]


def _flats(table: Table, regions: Regions) -> dict[int, _Flat]:
    sayings = _Sayings(table.provider, regions)
    claims: dict[int, dict[int, Said]] = {version: {} for version in BITS}
    texts: dict[int, dict[int, str]] = {version: {} for version in BITS}
    for group in table.groups:
        said = sayings.of(group)
        for text in group.prefixes:
            version, key = key_of(text)
            before = claims[version].setdefault(key, said)
            if before is not said:
                claims[version][key] = sayings.merged(before, said)
            texts[version][key] = text
    return {version: _Flat(version, claims[version], texts[version]) for version in BITS}


def sayings(table: Table, regions: Regions) -> Iterator[tuple[str, Said]]:
    """Each prefix once, in order, with all that the table says of it."""
    for flat in _flats(table, regions).values():
        yield from zip(flat.texts, flat.said, strict=True)


def _lay(version: int, order: Sequence[int], placed: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Starts and owners. Each prefix comes behind those that hold it, which are those on the stack."""
    starts, owners = [0], [_HOLE]
    stack: list[tuple[int, int]] = [(1 << BITS[version], _HOLE)]  # (end, owner), the innermost last

    def begin(start: int, owner: int) -> None:
        if starts[-1] == start:
            owners[-1] = owner
        elif owners[-1] != owner:
            starts.append(start)
            owners.append(owner)

    for number, key in enumerate(order):
        start, end = extent(version, key)
        while stack[-1][0] <= start:
            ended, _ = stack.pop()
            begin(ended, stack[-1][1])
        around = stack[-1][1]
        hidden = around != _HOLE and placed[around] and not placed[number]
        stack.append((end, around if hidden else number))
        begin(start, stack[-1][1])
    while len(stack) > 1:
        ended, _ = stack.pop()
        begin(ended, stack[-1][1])
    return starts, owners


# ---- all of them


class Prefixes:
    """All tables together. The empty one has no prefix. Equal if their tables are."""

    __slots__ = ("_laid", "digest", "names", "tables")

    names: tuple[TableName, ...]
    tables: tuple[Table, ...]
    digest: str

    def __init__(self, tables: Iterable[Table] = (), *, regions: Regions = lambda _, __: None) -> None:
        self.tables = tuple(sorted(tables, key=lambda table: table.name))
        self.names = tuple(table.title for table in self.tables)
        flats = [_flats(table, regions) for table in self.tables]
        self._laid = {
            version: tuple(
                (table.provider, name, flat[version])
                for table, name, flat in zip(self.tables, self.names, flats, strict=True)
            )
            for version in BITS
        }
        # Of the tables, not of the files they were made from: one list can be imported in two ways.
        whole = hashlib.sha256()
        for table in self.tables:
            whole.update(hashlib.sha256(table.encode()).digest())
        self.digest = "sha256:" + whole.hexdigest()

    def __repr__(self) -> str:
        return f"Prefixes({', '.join(name.name for name in self.names)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prefixes) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def observe(self, address: Address) -> Observation:
        """The first table, by name, that has the address; further ones in `others`."""
        value = int(address)
        found = [
            _observation(address, provider, name, *at)
            for provider, name, flat in self._laid[address.version]
            if (at := flat.at(value)) is not None
        ]
        if len(found) < 2:
            return found[0] if found else Observation(address)
        return replace(found[0], others=tuple(found[1:]))

    def covers(self, network: Network) -> tuple[Observation, ...]:
        """What is said of the addresses of a network: one observation for each different thing that is, of
        the first address it is said of. A part of the network in no table is one with `prefix` None."""
        first, behind = int(network.network_address), int(network.broadcast_address) + 1
        laid = self._laid[network.version]
        edges = {first}.union(*(flat.edges(first, behind) for _, _, flat in laid))
        found: dict[tuple[object, ...], Observation] = {}
        for value in sorted(edges):
            seen = self.observe(IPv4Address(value) if network.version == 4 else IPv6Address(value))
            found.setdefault(tuple((one.table, one.prefix) for one in (seen, *seen.others)), seen)
        return tuple(found.values())

    def stale(self, today: date, days: int = STALE_DAYS) -> tuple[TableName, ...]:
        """Those made, or if that is not known imported, more than so many days ago; and those imported on a
        day that is still to come: nobody knows how old they are."""
        oldest, latest = today - timedelta(days=days), today + timedelta(days=1)
        return tuple(
            table.title for table in self.tables if table.age_from < oldest or table.imported > latest
        )


def _observation(address: Address, provider: str, name: TableName, prefix: str, said: Said) -> Observation:
    return Observation(
        address, prefix, provider, said.region, said.countries, said.anycast, said.conflict, name
    )


def nested(table: Table) -> Iterator[tuple[str, str, str]]:
    """Prefixes that lie in a wider one of another region: (prefix, its region, the wider one's). Those that
    do not say where are passed over."""
    told: dict[int, dict[int, tuple[str, str]]] = {version: {} for version in BITS}
    for group in table.groups:
        if group.placed:
            for text in group.prefixes:
                version, key = key_of(text)
                told[version][key] = (text, _region(group))
    for version, prefixes in told.items():
        stack: list[tuple[int, str]] = []  # (end, region)
        for key in sorted(prefixes):
            (start, end), (text, region) = extent(version, key), prefixes[key]
            while stack and stack[-1][0] <= start:
                stack.pop()
            if stack and stack[-1][1] != region:
                yield text, region, stack[-1][1]
            stack.append((end, region))
