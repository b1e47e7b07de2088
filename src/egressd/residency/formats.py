"""Lists of prefixes as their publishers write them, read strictly: AWS, Google, Azure, and plain CIDR lists.

    AWS     ip-ranges.json  https://docs.aws.amazon.com/vpc/latest/userguide/aws-ip-syntax.html
    Google  cloud.json      https://www.gstatic.com/ipranges/cloud.json, https://support.google.com/a/answer/10026322
    Azure   ServiceTags_*   https://learn.microsoft.com/en-us/azure/virtual-network/service-tags-overview
    CIDR    one prefix per line, then perhaps a region or a jurisdiction; "#" begins a comment

A list is taken whole or not at all. A publisher may add fields: those are passed over. What may not be passed
over is a prefix that cannot be read, since the one around it would then decide in its place.

What a list says without saying where:

- AWS writes GLOBAL for what is announced from many places. A network border group other than the region is a
  Local or Wavelength Zone, which may lie in another country than its region does (eu-west-3-cmn-wlz-1 is in
  Casablanca, its region in Paris): the group is taken for the region.
- Google's goog.json holds all of Google's prefixes, without regions.
- Azure's tags without a region hold those of all regions together. They place nothing (see `prefixes`); but
  those of Front Door and Traffic Manager are announced from many places.
"""

from __future__ import annotations

import enum
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from ipaddress import ip_network
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct, field

from egressd.model.errors import PolicyError, Problem, Unfit
from egressd.model.names import quoted
from egressd.residency.jurisdictions import CODES
from egressd.residency.prefixes import MAX_PREFIXES, WIDEST, Group, Source, Table, key_of

__all__ = ["MAX_BYTES", "Entry", "Format", "Listing", "as_table", "guess", "read", "too_large"]

MAX_BYTES: Final = 64 << 20  # Azure's, the longest, had 5 MB in 2025
_MAX_TOLD = 20  # problems
_MAX_COUNTED = 1000  # what has more is no list of prefixes, and reading on would take minutes
_ASIDE = "download it again"


class Format(enum.StrEnum):
    AWS = "aws"
    GOOGLE = "google"
    AZURE = "azure"
    CIDR = "cidr"


class Entry(NamedTuple):
    """One line of a list. `prefix` in its one spelling; `region` "" where the list does not say."""

    prefix: str
    region: str
    service: str
    anycast: bool = False
    countries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """What a file says."""

    format: Format
    provider: str
    published: date | None
    serial: str
    entries: tuple[Entry, ...]
    edition: str = ""  # what its table is called if nobody says; "" as the provider


@dataclass(frozen=True, slots=True)
class Given:
    """What the importer says of a CIDR list, which says little itself."""

    provider: str = ""
    region: str = ""
    country: str = ""


def too_large(size: int) -> str:
    return f"it has at least {size} bytes; a list of prefixes may have {MAX_BYTES} ({MAX_BYTES >> 20} MiB)"


def read(data: bytes, *, name: str, form: Format | None = None, given: Given | None = None) -> Listing:
    """`name` is the file's, for problems, and because Azure writes the date there. PolicyError with what is
    wrong, each with its place."""
    given = given or Given()
    if len(data) > MAX_BYTES:
        raise _refused(name, 0, "", too_large(len(data)), "look what it is")
    text = _text(data, name)
    form = form or guess(text)
    _check_given(form, given, name)
    listing = _cidr(text, name, given) if form is Format.CIDR else _json(text, name, form)
    if not listing.entries:
        raise _refused(name, 0, "", "it lists no prefix", _ASIDE)
    return listing


def guess(text: str) -> Format:
    """By how it begins: each publisher's own words stand at the front. What is not JSON is a plain list."""
    head = text[:4096].lstrip()
    if not head.startswith(("{", "[")):
        return Format.CIDR
    if '"createDate"' in head or '"ip_prefix"' in head:
        return Format.AWS
    if '"creationTime"' in head or '"ipv4Prefix"' in head or '"ipv6Prefix"' in head:
        return Format.GOOGLE
    return Format.AZURE


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refused(name, line, "", "the file is not UTF-8 text", _ASIDE) from error


def _check_given(form: Format, given: Given, name: str) -> None:
    if form is not Format.CIDR:
        if given != Given():
            text = f"a list of the format {form} says itself whose it is and where"
            raise _refused(name, 0, "", text, "leave out --provider, --region and --country")
        return
    if not given.provider:
        remedy = "--provider NAME, a cloud of the catalogue or a name of your own"
        raise _refused(name, 0, "", "a plain list does not say whose it is", remedy)
    for option, word in (("--provider", given.provider), ("--region", given.region)):
        if word and not _WORD.fullmatch(word):
            raise _refused(name, 0, option, f"{quoted(word)} is not one word", "letters, digits and ._/-")
    if given.country and given.country not in CODES:
        remedy = "EU, EEA, UK or a country's two letters, such as CH"
        raise _refused(name, 0, "--country", f"{quoted(given.country)} is not a jurisdiction", remedy)


_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")


def _refused(name: str, line: int, where: str, text: str, remedy: str = "") -> PolicyError:
    return PolicyError([Problem(name, line, where, text, remedy)])


# ---- one prefix


def _prefix(text: str) -> str:
    """In its one spelling. `Unfit` with what to do about it."""
    try:
        key_of(text)
    except ValueError:
        return _respelled(text)
    return text


def _respelled(text: str) -> str:
    """Of what is not spelled as we do, or wrong."""
    try:
        network = ip_network("" if "%" in text or len(text) > 64 else text, strict=True)
    except ValueError as error:
        if "host bits" in str(error):
            loose = ip_network(text, strict=False)
            raise Unfit(f"{quoted(text)} has bits set behind its length", f"is {loose} meant?") from None
        raise Unfit(
            f"{quoted(text)} is not a prefix", "write it as in 192.0.2.0/24 or 2001:db8::/32"
        ) from None
    if network.prefixlen < WIDEST[network.version]:
        widest = f"/{WIDEST[network.version]}"
        raise Unfit(f"{network} is wider than {widest}, which says nothing about a place", "list its parts")
    try:
        key_of(str(network))
    except ValueError as error:
        raise Unfit(str(error), "list the IPv4 prefix itself") from None
    return str(network)


class _Problems:
    """The first of them, and how many there were."""

    def __init__(self, name: str) -> None:
        self._name, self._told, self._count = name, list[Problem](), 0

    def add(self, error: Unfit, *, line: int = 0, where: str = "") -> None:
        """PolicyError when it has become pointless to go on."""
        self._count += 1
        if len(self._told) < _MAX_TOLD:
            self._told.append(Problem(self._name, line, where, error.text, error.remedy))
        if self._count == _MAX_COUNTED:
            self.check()

    def check(self) -> None:
        """PolicyError if there are any."""
        more = self._count - len(self._told)
        if more:
            least = "at least " if self._count == _MAX_COUNTED else ""
            self._told.append(Problem(self._name, 0, "", f"and {least}{more} more such problems", _ASIDE))
        if self._told:
            raise PolicyError(self._told)


def _entries(name: str, found: Iterable[tuple[str, str, Entry]]) -> tuple[Entry, ...]:
    """`found`: where it stands, the prefix as it is written, the rest."""
    problems, entries = _Problems(name), list[Entry]()
    for where, text, entry in found:
        try:
            entries.append(entry._replace(prefix=_prefix(text)))
        except Unfit as error:
            problems.add(error, where=where)
        if len(entries) > _MAX_ENTRIES:
            raise _refused(name, 0, "", f"it has more than {_MAX_ENTRIES} entries", "look what it is")
    problems.check()
    _check_count(name, entries)
    return tuple(entries)


_MAX_ENTRIES: Final = 4 * MAX_PREFIXES  # AWS and Azure list a prefix once for each service
_MAX_OBJECTS: Final = _MAX_ENTRIES + MAX_PREFIXES


def _check_count(name: str, entries: Sequence[Entry]) -> None:
    count = len({entry.prefix for entry in entries})
    if count > MAX_PREFIXES:
        text = f"it has {count} prefixes; a table may have {MAX_PREFIXES}"
        raise _refused(name, 0, "", text, "split it")


# ---- JSON


def _json(text: str, name: str, form: Format) -> Listing:
    document = _parsed(text, name)
    shape, reader = _READERS[form]
    try:
        found: Any = msgspec.convert(document, type=shape, strict=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        said = f"it is no list of the format {form}: {what}"
        raise _refused(name, 0, where.rstrip("`").lstrip("."), said, f"--format, or {_ASIDE}") from error
    return reader(found, name)


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Unique(), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            said = "the file ends in the middle: only a part of it is here"
            raise _refused(name, error.lineno, "", said, _ASIDE) from error
        raise _refused(name, error.lineno, "", f"it is not JSON: {error.msg}", _ASIDE) from error
    except RecursionError as error:
        raise _refused(name, 0, "", "it is nested too deeply", "look what it is") from error
    except Unfit as error:
        raise _refused(name, 0, "", error.text, error.remedy) from error
    except ValueError as error:  # a number of thousands of digits
        raise _refused(name, 0, "", "it has a number that is too long", "look what it is") from error


class _Unique:
    """Makes dicts of objects. 64 MiB of empty ones would take two gigabytes."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count += 1
        if self._count > _MAX_OBJECTS:
            raise Unfit(f"it has more than {_MAX_OBJECTS} objects", "look what it is")
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise Unfit(f"the key {quoted(twice)} stands twice in one object: which one counts?", _ASIDE)
        return found


def _no_constant(text: str) -> Any:
    raise Unfit(f"it has {text}, which is no JSON", _ASIDE)


# ---- AWS


class _AwsPrefix(Struct):
    region: str
    service: str
    ip_prefix: str | None = None
    ipv6_prefix: str | None = None
    network_border_group: str | None = None  # absent before 2020


class _Aws(Struct):
    prefixes: list[_AwsPrefix]
    sync_token: str = field(name="syncToken")
    create_date: str = field(name="createDate")
    ipv6_prefixes: list[_AwsPrefix] = []


# Announced from many places whatever region stands beside them. Route 53's health checkers have places, its
# servers have not.
_AWS_ANYCAST = frozenset({"CLOUDFRONT", "GLOBALACCELERATOR", "ROUTE53"})
_AWS_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)-\d\d-\d\d-\d\d", re.ASCII)


def _aws(found: _Aws, name: str) -> Listing:
    return Listing(
        Format.AWS, "aws", _date(_AWS_DATE, found.create_date, name, "createDate"),
        _serial(found.sync_token, name, "syncToken"), _entries(name, _aws_entries(found)),
    )  # fmt: skip


def _aws_entries(found: _Aws) -> Iterator[tuple[str, str, Entry]]:
    for number, one in enumerate(found.prefixes):
        yield f"prefixes[{number}].ip_prefix", one.ip_prefix or "", _aws_entry(one)
    for number, one in enumerate(found.ipv6_prefixes):
        yield f"ipv6_prefixes[{number}].ipv6_prefix", one.ipv6_prefix or "", _aws_entry(one)


def _aws_place(one: _AwsPrefix) -> str:
    """The group, which is called as its region is, with more behind it. Two that have nothing to do with each
    other are both told: no region is called so, and nothing is placed there."""
    group = one.network_border_group or one.region
    related = group == one.region or group.startswith(f"{one.region}-") or "GLOBAL" in (one.region, group)
    return group if related else f"{one.region}/{group}"


def _aws_entry(one: _AwsPrefix) -> Entry:
    region = _aws_place(one)
    everywhere = "GLOBAL" in (one.region, region)
    anycast = everywhere or one.service in _AWS_ANYCAST
    return Entry("", "GLOBAL" if everywhere else region, one.service, anycast)


# ---- Google


class _GooglePrefix(Struct):
    ipv4: str | None = field(name="ipv4Prefix", default=None)
    ipv6: str | None = field(name="ipv6Prefix", default=None)
    service: str = ""
    scope: str | None = None


class _Google(Struct):
    prefixes: list[_GooglePrefix]
    creation_time: str = field(name="creationTime")
    sync_token: str | int = field(name="syncToken", default="")


_GOOGLE_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)T.*", re.ASCII)


def _google(found: _Google, name: str) -> Listing:
    if all(one.scope is None for one in found.prefixes):
        said = "none of its prefixes has a region (scope): it is goog.json, all of Google's"
        remedy = "import cloud.json (https://www.gstatic.com/ipranges/cloud.json)"
        raise _refused(name, 0, "prefixes", said, remedy)
    return Listing(
        Format.GOOGLE, "google", _date(_GOOGLE_DATE, found.creation_time, name, "creationTime"),
        _serial(str(found.sync_token), name, "syncToken"), _entries(name, _google_entries(found)),
    )  # fmt: skip


def _google_entries(found: _Google) -> Iterator[tuple[str, str, Entry]]:
    for number, one in enumerate(found.prefixes):
        where, scope = f"prefixes[{number}]", one.scope or ""
        rest = Entry("", scope, one.service, scope == "global")
        written = [text for text in (one.ipv4, one.ipv6) if text is not None]
        for text in written or [""]:
            yield where, text, rest


# ---- Azure


class _Properties(Struct):
    prefixes: list[str] = field(name="addressPrefixes")
    region: str = ""
    service: str = field(name="systemService", default="")


class _Tag(Struct):
    name: str
    properties: _Properties


class _Azure(Struct):
    values: list[_Tag]
    change: int = field(name="changeNumber")
    cloud: str = ""


# ServiceTags_Public_20261116.json: the file itself has no date.
_AZURE_NAME = re.compile(r".*_(\d{4})(\d\d)(\d\d)(?:\.json)?", re.ASCII | re.DOTALL)
_AZURE_ANYCAST = ("AzureFrontDoor", "AzureTrafficManager")


def _azure(found: _Azure, name: str) -> Listing:
    match = _AZURE_NAME.fullmatch(name)
    published = _as_date(match) if match else None
    entries = _entries(name, _azure_entries(found))
    # Lists of the sovereign clouds have the same shape: one must not take the place of another.
    cloud = re.sub("[^a-z0-9]", "", found.cloud.lower())[:16]
    edition = f"azure-{cloud}" if cloud not in ("", "public") else ""
    return Listing(Format.AZURE, "azure", published, str(found.change), entries, edition)


def _azure_entries(found: _Azure) -> Iterator[tuple[str, str, Entry]]:
    for number, tag in enumerate(found.values):
        kind = tag.name.partition(".")[0]
        anycast = any(word.startswith(_AZURE_ANYCAST) for word in (kind, tag.properties.service))
        rest = Entry("", tag.properties.region, kind, anycast)
        for place, text in enumerate(tag.properties.prefixes):
            yield f"values[{number}].properties.addressPrefixes[{place}]", text, rest


_READERS: Final[dict[Format, tuple[type, Callable[[Any, str], Listing]]]] = {
    Format.AWS: (_Aws, _aws),
    Format.GOOGLE: (_Google, _google),
    Format.AZURE: (_Azure, _azure),
}


def _date(pattern: re.Pattern[str], text: str, name: str, where: str) -> date:
    match = pattern.fullmatch(text)
    found = _as_date(match) if match else None
    if found is None:
        raise _refused(name, 0, where, f"{quoted(text)} is not a date as this publisher writes it", _ASIDE)
    return found


def _as_date(match: re.Match[str]) -> date | None:
    try:
        return date(*map(int, match.groups()))
    except ValueError:  # the 31st of February
        return None


def _serial(text: str, name: str, where: str) -> str:
    if len(text) > 64 or not (text.isascii() and text.isprintable()):
        raise _refused(name, 0, where, f"{quoted(text)} is no number of an edition", _ASIDE)
    return text


# ---- CIDR lists


def _cidr(text: str, name: str, given: Given) -> Listing:
    problems, entries = _Problems(name), list[Entry]()
    for number, line in enumerate(_lines(text), 1):
        if number > _MAX_ENTRIES:
            raise _refused(name, number, "", f"it has more than {_MAX_ENTRIES} lines", "look what it is")
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            entries.append(_cidr_entry(words, given))
        except Unfit as error:
            problems.add(error, line=number)
        if len(entries) > MAX_PREFIXES:
            raise _refused(name, number, "", f"it has more than {MAX_PREFIXES} prefixes", "split it")
    problems.check()
    return Listing(Format.CIDR, given.provider, None, "", tuple(entries))


def _lines(text: str) -> Iterator[str]:
    """One after the other: a list of 64 million empty lines takes half a gigabyte."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


def _cidr_entry(words: list[str], given: Given) -> Entry:
    """A second word in capitals that is a jurisdiction is one; any other is a region."""
    if len(words) > 2:
        raise Unfit("more than a prefix and a region stand here", "begin a comment with #")
    prefix, second = _prefix(words[0]), words[1] if len(words) > 1 else ""
    if second and not _WORD.fullmatch(second):
        raise Unfit(f"{quoted(second)} is neither a region nor a jurisdiction", "letters, digits and ._/-")
    if second in CODES:
        return Entry(prefix, "", "", countries=(second,))
    named = (given.country,) if given.country else ()
    region = second or given.region
    if not (region or named):
        remedy = "a second word, --region or --country"
        raise Unfit(f"nothing says where {prefix} is", remedy)
    return Entry(prefix, region, "", countries=named)


# ---- as a table


def as_table(listing: Listing, *, name: str, source: Source, imported: date) -> Table:
    """Entries of one prefix and one region are one, with the services of all. PolicyError if a field is
    longer than a table can hold, or `name` is none."""
    services: dict[tuple[str, str, bool, tuple[str, ...]], set[str]] = defaultdict(set)
    placed = {entry.prefix for entry in listing.entries if _says_where(entry)}
    for entry in listing.entries:
        if _says_where(entry) or entry.prefix not in placed:
            key = (entry.prefix, entry.region, entry.anycast, entry.countries)
            services[key].add(entry.service)
    grouped: dict[tuple[str, bool, tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    for (prefix, region, anycast, named), all_of_them in services.items():
        grouped[region, anycast, named, _shown(all_of_them)].append(prefix)
    groups = tuple(
        Group(
            region=region,
            services=shown,
            anycast=anycast,
            countries=named,
            prefixes=tuple(sorted(grouped[region, anycast, named, shown], key=key_of)),
        )
        for region, anycast, named, shown in sorted(grouped)
    )
    table = Table(
        name=name,
        provider=listing.provider,
        format=listing.format,
        source=source,
        serial=listing.serial,
        published=listing.published,
        imported=imported,
        groups=groups,
    )
    try:
        return Table.decode(table.encode())  # the same checks as whenever it is read
    except Unfit as error:
        raise _refused(source.name, 0, "", error.text, "look what it is") from error


def _says_where(entry: Entry) -> bool:
    return bool(entry.region or entry.countries or entry.anycast)


_SERVICES = 12  # shown of a prefix; Azure's regional tags are many


def _shown(services: set[str]) -> tuple[str, ...]:
    named = sorted(service for service in services if service)
    return tuple(named[:_SERVICES])
