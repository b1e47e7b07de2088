"""Tables of prefixes: which one decides, what a network is covered by, what a table's file may hold."""

from __future__ import annotations

import itertools
import json
import time
from datetime import date
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_lists import DIGEST, group, table

from egressd.model.errors import Unfit
from egressd.residency.jurisdictions import countries
from egressd.residency.places import Observation
from egressd.residency.prefixes import Group, Prefixes, Source, Table, nested

REGIONS = {
    "eu-central-1": ("DE",),
    "eu-west-1": ("IE",),
    "us-east-1": ("US",),
    "europe": ("IE", "NL"),
    "somewhere": (),
}


def regions(provider: str, region: str) -> tuple[str, ...] | None:
    return REGIONS.get(region) if provider != "nobody" else None


def prefixes(*tables: Table) -> Prefixes:
    return Prefixes(tables, regions=regions)


WHOLE = prefixes(
    table(
        group("us-east-1", "3.0.0.0/9", "2600:1f00::/24"),
        group("eu-central-1", "3.120.0.0/14", "2a05:d014::/36", "2600:1f14::/36"),
        group("eu-west-1", "3.121.0.0/32", "5.5.5.0/24"),
        group("us-east-1", "5.5.5.0/24"),
        group("GLOBAL", "3.120.7.0/24", "15.197.0.0/16", "2600:9000::/28", anycast=True),
        group("mars-north-1", "7.7.7.0/24"),
        group("somewhere", "7.7.8.0/24"),
        group("", "3.120.9.0/24", "20.0.0.0/16", "20.0.0.0/24"),
        group("eu-west-1", "20.0.0.128/25"),
    )
)


@pytest.mark.parametrize(
    ("address", "prefix", "region", "where"),
    [
        ("3.120.0.0", "3.120.0.0/14", "eu-central-1", "DE"),
        ("3.123.255.255", "3.120.0.0/14", "eu-central-1", "DE"),
        ("3.124.0.0", "3.0.0.0/9", "us-east-1", "US"),
        ("3.119.255.255", "3.0.0.0/9", "us-east-1", "US"),
        ("3.121.0.0", "3.121.0.0/32", "eu-west-1", "IE"),
        ("3.121.0.1", "3.120.0.0/14", "eu-central-1", "DE"),
        ("3.120.7.9", "3.120.7.0/24", "GLOBAL", ""),
        ("3.120.8.0", "3.120.0.0/14", "eu-central-1", "DE"),
        ("3.120.9.9", "3.120.0.0/14", "eu-central-1", "DE"),  # a tag without a region hides nothing
        ("20.0.0.1", "20.0.0.0/24", "", ""),
        ("20.0.0.129", "20.0.0.128/25", "eu-west-1", "IE"),
        ("20.0.1.1", "20.0.0.0/16", "", ""),
        ("7.7.7.7", "7.7.7.0/24", "mars-north-1", ""),
        ("7.7.8.7", "7.7.8.0/24", "somewhere", ""),
        ("0.0.0.0", None, "", ""),
        ("3.128.0.0", None, "", ""),
        ("2.255.255.255", None, "", ""),
        ("255.255.255.255", None, "", ""),
        ("2600:1f14::1", "2600:1f14::/36", "eu-central-1", "DE"),
        ("2600:1f15::1", "2600:1f00::/24", "us-east-1", "US"),
        ("2600:9000::1", "2600:9000::/28", "GLOBAL", ""),
        ("2a05:d014:fff:ffff:ffff:ffff:ffff:ffff", "2a05:d014::/36", "eu-central-1", "DE"),
        ("2a05:d014:1000::", None, "", ""),
        ("::", None, "", ""),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", None, "", ""),
        ("::ffff:3.120.0.1", None, "", ""),  # an IPv4 address in disguise is not that address
    ],
)
def test_the_most_specific_prefix_decides(address: str, prefix: str | None, region: str, where: str) -> None:
    seen = WHOLE.observe(ip_address(address))
    assert (str(seen.address), seen.prefix, seen.region) == (str(ip_address(address)), prefix, region)
    assert seen.countries == tuple(where.split())
    assert seen.anycast == (region == "GLOBAL")
    assert (seen.table is None) == (prefix is None)
    assert not seen.conflict and not seen.others


def test_one_prefix_with_two_regions_contradicts_itself() -> None:
    seen = WHOLE.observe(IPv4Address("5.5.5.5"))
    assert seen.conflict == "the same list puts it in different places: eu-west-1, us-east-1"
    assert seen.countries == ()


def test_one_prefix_with_a_region_and_many_places_is_in_many_places() -> None:
    both = prefixes(table(group("eu-west-1", "5.5.5.0/24"), group("GLOBAL", "5.5.5.0/24", anycast=True)))
    seen = both.observe(IPv4Address("5.5.5.5"))
    assert (seen.anycast, seen.countries, seen.conflict) == (True, (), "")


def test_two_regions_of_one_country_are_two_places_all_the_same() -> None:
    twice = table(group("a", "5.5.5.0/24", countries=("DE",)), group("b", "5.5.5.0/24", countries=("DE",)))
    assert prefixes(twice).observe(IPv4Address("5.5.5.5")).conflict


def test_every_table_that_has_an_address_speaks() -> None:
    own = table(group("here", "3.120.0.0/16", countries=("FR",)), name="own")
    both = prefixes(own, table(group("eu-central-1", "3.120.0.0/14")))
    seen = both.observe(IPv4Address("3.120.0.1"))
    assert [(one.provider, one.prefix, one.countries) for one in (seen, *seen.others)] == [
        ("aws", "3.120.0.0/14", ("DE",)),
        ("own", "3.120.0.0/16", ("FR",)),
    ]
    assert both.observe(IPv4Address("3.121.0.1")).others == ()
    assert [name.name for name in both.names] == ["aws", "own"]


def test_a_jurisdiction_of_a_list_of_ones_own() -> None:
    own = table(group("", "9.9.0.0/16", countries=("EU",)), name="own")
    seen = prefixes(own).observe(IPv4Address("9.9.9.9"))
    assert (seen.region, set(seen.countries)) == ("EU", countries(["EU"]))


def test_without_a_table_nothing_is_placed() -> None:
    assert Prefixes().observe(IPv4Address("3.120.0.1")) == Observation(IPv4Address("3.120.0.1"))
    assert [seen.prefix for seen in Prefixes().covers(IPv4Network("3.0.0.0/8"))] == [None]


# ---- networks


@pytest.mark.parametrize(
    ("network", "covered"),
    [
        ("3.120.16.0/20", ["3.120.0.0/14"]),
        ("3.120.0.0/14", ["3.120.0.0/14", "3.120.7.0/24", "3.121.0.0/32"]),
        ("3.120.0.0/13", ["3.120.0.0/14", "3.120.7.0/24", "3.121.0.0/32", "3.0.0.0/9"]),
        ("3.64.0.0/10", ["3.0.0.0/9", "3.120.0.0/14", "3.120.7.0/24", "3.121.0.0/32"]),
        ("7.7.0.0/16", [None, "7.7.7.0/24", "7.7.8.0/24"]),
        ("3.120.0.5/32", ["3.120.0.0/14"]),
        ("4.0.0.0/8", [None]),
        ("2600:1f14:800::/40", ["2600:1f14::/36"]),
        ("2600:1f14::/32", ["2600:1f14::/36", "2600:1f00::/24"]),
        ("2a05:d014::/35", ["2a05:d014::/36", None]),
    ],
)
def test_what_a_network_is_covered_by(network: str, covered: list[str | None]) -> None:
    """Each thing that is said of a part of it, once, and the holes."""
    assert [seen.prefix for seen in WHOLE.covers(ip_network(network))] == covered


# ---- against the naive way


def _spans(bits: int) -> st.SearchStrategy[list[tuple[int, int, str, bool]]]:
    """Prefixes in a small corner, so that they nest: (offset, bits of it, region, anycast)."""
    return st.lists(
        st.tuples(
            st.integers(0, (1 << bits) - 1),
            st.integers(0, bits),
            st.sampled_from(["eu-central-1", "eu-west-1", "us-east-1", ""]),
            st.booleans(),
        ),
        max_size=12,
    )


BITS = 6  # of addresses that are tried, one by one
CORNER = {4: int(IPv4Address("11.0.0.0")), 6: int(IPv6Address("2a00:1::"))}


def _network(version: int, offset: int, free: int) -> Any:
    length = {4: 32, 6: 128}[version] - free
    start = CORNER[version] + (offset >> free << free)
    return IPv4Network((start, length)) if version == 4 else IPv6Network((start, length))


def _naive(address: Any, rows: list[tuple[Any, str, bool]]) -> tuple[str | None, str, bool, bool]:
    """Prefix, regions, anycast, conflict: by looking at every row."""
    around = [row for row in rows if address in row[0]]
    placed = [row for row in around if row[1] or row[2]]
    if not (placed or around):
        return None, "", False, False
    best = max(row[0].prefixlen for row in placed or around)
    there = [row for row in placed or around if row[0].prefixlen == best]
    anycast = any(row[2] for row in there)
    named = sorted({row[1] for row in there if not row[2] and row[1]})
    region = ", ".join(named) if named else next(row[1] for row in there)
    return str(there[0][0]), region, anycast, len(named) > 1


@pytest.mark.parametrize("version", [4, 6])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spans=_spans(BITS))
def test_the_same_as_looking_at_every_prefix(version: int, spans: list[tuple[int, int, str, bool]]) -> None:
    rows = [(_network(version, offset, free), region, many) for offset, free, region, many in spans]
    made = prefixes(table(*(group(region, str(net), anycast=many) for net, region, many in rows)))
    for offset in range(-1, (1 << BITS) + 1):
        address = type(_network(version, 0, 0).network_address)(CORNER[version] + offset)
        seen, (prefix, region, anycast, conflict) = made.observe(address), _naive(address, rows)
        assert (seen.prefix, seen.anycast, bool(seen.conflict)) == (prefix, anycast, conflict), address
        if not anycast:
            assert seen.region == region


def _corner(version: int, rows: list[tuple[int, int, str, bool]], name: str) -> Table:
    groups = (
        group(region, str(_network(version, at, free)), anycast=many) for at, free, region, many in rows
    )
    return table(*groups, name=name)


@pytest.mark.parametrize("version", [4, 6])
@settings(max_examples=150, deadline=None)
@given(
    spans=_spans(BITS), others=_spans(BITS), offset=st.integers(0, (1 << BITS) - 1), free=st.integers(0, BITS)
)
def test_a_network_is_covered_by_what_its_addresses_are_in(
    version: int,
    spans: list[tuple[int, int, str, bool]],
    others: list[tuple[int, int, str, bool]],
    offset: int,
    free: int,
) -> None:
    made = prefixes(_corner(version, spans, "a"), _corner(version, others, "b"))
    network = _network(version, offset, free)

    def said(seen: Observation) -> list[tuple[str, str | None]]:
        return [(one.provider, one.prefix) for one in (seen, *seen.others)]

    one_by_one = [said(made.observe(address)) for address in network]
    covered = [said(seen) for seen in made.covers(network)]
    assert sorted(covered, key=str) == sorted(
        (key for key, _ in itertools.groupby(sorted(one_by_one, key=str))), key=str
    )


# ---- age and digest


@pytest.mark.parametrize(
    ("published", "today", "stale"),
    [
        (date(2026, 11, 20), date(2026, 11, 21), False),
        (date(2026, 11, 20), date(2026, 12, 20), False),
        (date(2026, 11, 20), date(2026, 12, 21), True),
        (None, date(2026, 12, 21), False),  # counted from its import, a day later
        (None, date(2026, 12, 22), True),
        (date(2031, 1, 1), date(2026, 12, 22), True),  # a date to come keeps nothing fresh
    ],
)
def test_a_table_becomes_stale(published: date | None, today: date, stale: bool) -> None:
    found = prefixes(table(group("eu-west-1", "3.0.0.0/8"), published=published)).stale(today)
    assert [name.name for name in found] == (["aws"] if stale else [])


@pytest.mark.parametrize(
    ("today", "stale"), [(date(2026, 11, 21), False), (date(2026, 11, 20), False), (date(2026, 11, 19), True)]
)
def test_a_table_imported_in_a_time_to_come_is_stale(today: date, stale: bool) -> None:
    """The clock was wrong then, or is now: how old it is, nobody knows."""
    made = table(group("eu-west-1", "3.0.0.0/8"), published=None)
    assert made.imported == date(2026, 11, 21)
    assert bool(prefixes(made).stale(today)) == stale


def test_the_digest_is_of_everything_in_the_tables() -> None:
    one = table(group("eu-west-1", "3.0.0.0/8"))
    others = [
        table(group("eu-west-1", "3.0.0.0/9")),
        table(group("eu-west-2", "3.0.0.0/8")),
        table(group("eu-west-1", "3.0.0.0/8", anycast=True)),
        table(group("eu-west-1", "3.0.0.0/8", countries=("IE",))),
        table(group("eu-west-1", "3.0.0.0/8"), name="b"),
    ]
    digests = [prefixes(each).digest for each in (one, *others)]
    assert len(set(digests)) == len(digests)
    assert prefixes(one) == prefixes(one) and prefixes(one) != prefixes(others[0])
    assert prefixes(one, others[4]) == prefixes(others[4], one)


# ---- the file of a table


def test_a_table_is_read_back_as_it_was() -> None:
    for made in WHOLE.tables:
        assert Table.decode(made.encode()) == made


_WORDS = st.text("abcdefgh-123", min_size=1, max_size=8)


def _spelled(version: int, number: int, length: int) -> str:
    free = {4: 32, 6: 128}[version] - length
    start = number >> free << free
    return str(IPv4Network((start, length)) if version == 4 else IPv6Network((start, length)))


_UNICAST = st.integers(0x2A00 << 112, (0x2A01 << 112) - 1)
_PREFIXES = st.builds(_spelled, st.just(4), st.integers(0, 2**32 - 1), st.integers(8, 32)) | st.builds(
    _spelled, st.just(6), _UNICAST, st.integers(16, 128)
)
_TABLES = st.builds(
    Table,
    name=st.just("aws"),
    provider=_WORDS,
    format=_WORDS,
    source=st.builds(Source, name=_WORDS, digest=st.just(DIGEST), bytes=st.integers(0, 2**26)),
    serial=_WORDS,
    published=st.none() | st.dates(),
    imported=st.dates(),
    groups=st.lists(
        st.builds(
            Group,
            region=_WORDS,
            services=st.lists(_WORDS, max_size=3).map(tuple),
            prefixes=st.lists(_PREFIXES, min_size=1, max_size=5).map(tuple),
            anycast=st.booleans(),
            countries=st.sampled_from([(), ("DE",), ("EU", "CH")]),
        ),
        max_size=4,
    ).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(made=_TABLES)
def test_any_table_is_read_back_as_it_was(made: Table) -> None:
    assert Table.decode(made.encode()) == made


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["version", "name", "groups", "prefixes", "x"]), inner, max_size=4
            )
        ),
    ).map(lambda document: json.dumps(document).encode())
)
def test_whatever_else_is_in_a_file_is_refused(data: bytes) -> None:
    with pytest.raises(Unfit):
        Table.decode(data)


def in_group(fields: dict[str, Any]) -> Any:
    return lambda table: table | {"groups": [table["groups"][0] | fields]}


GOOD = json.loads(table(group("eu-west-1", "3.0.0.0/8", "2a05:d014::/36")).encode())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"version": 2}, "version"),
        (lambda t: t | {"name": "../../etc/passwd"}, "name"),
        (lambda t: t | {"name": "A"}, "name"),
        (lambda t: t | {"mystery": 1}, "mystery"),
        (lambda t: {k: v for k, v in t.items() if k != "groups"}, "groups"),
        (lambda t: t | {"published": "yesterday"}, "published"),
        (lambda t: t | {"source": t["source"] | {"digest": "sha256:1234"}}, "digest"),
        (in_group({"prefixes": []}), "prefixes"),
        (in_group({"prefixes": ["3.0.0.1/8"]}), "groups[0].prefixes[0]: 3.0.0.1/8 has bits set"),
        (in_group({"prefixes": ["3.0.0.0/8", "0.0.0.0/0"]}), "groups[0].prefixes[1]: 0.0.0.0/0 is wider"),
        (in_group({"prefixes": ["::/0"]}), "wider than /16"),
        (in_group({"prefixes": ["::ffff:3.0.0.0/104"]}), "is spelled"),
        (in_group({"prefixes": ["::ffff:300:0/104"]}), "disguise"),
        (in_group({"prefixes": ["03.0.0.0/8"]}), "ordinary spelling"),
        (in_group({"prefixes": ["2A05::/32"]}), "ordinary spelling"),
        (in_group({"countries": ["XX"]}), "groups[0].countries: 'XX' is none"),
        (in_group({"region": "a\nb"}), "region"),
    ],
)  # fmt: skip
def test_a_file_with_anything_wrong_is_refused_with_its_place(change: Any, said: str) -> None:
    with pytest.raises(Unfit) as caught:
        Table.decode(json.dumps(change(GOOD), indent=1).encode() + b"\n")
    assert said in str(caught.value)


def test_a_file_that_was_edited_or_cut_off_is_refused() -> None:
    data = table(group("eu-west-1", "3.0.0.0/8")).encode()
    for wrong in (data[:-1], data + b"\n", data[: len(data) // 2], data.replace(b'"aws"', b' "aws"', 1), b""):
        with pytest.raises(Unfit):
            Table.decode(wrong)
    twice = data.replace(b'"name": "aws",', b'"name": "aws",\n "name": "aws",', 1)
    assert json.loads(twice) == json.loads(data)
    with pytest.raises(Unfit, match="edited, or cut off"):
        Table.decode(twice)


def test_prefixes_in_wider_ones_of_other_regions_are_told() -> None:
    (whole,) = WHOLE.tables
    assert sorted(nested(whole)) == [
        ("2600:1f14::/36", "eu-central-1", "us-east-1"),
        ("3.120.0.0/14", "eu-central-1", "us-east-1"),
        ("3.120.7.0/24", "GLOBAL", "eu-central-1"),
        ("3.121.0.0/32", "eu-west-1", "eu-central-1"),
    ]


def test_a_hundred_thousand_prefixes_are_read_and_asked_in_time() -> None:
    """Generous bounds: a busy machine is told apart from a lookup that looks at each of them."""
    every = [f"{3 + (i >> 16)}.{i >> 8 & 255}.{i & 255}.0/24" for i in range(100_000)]
    groups = (group(region, *every[start::3]) for start, region in enumerate(("eu-west-1", "us-east-1", "")))
    data = table(*groups).encode()
    began = time.process_time()
    made = prefixes(Table.decode(data))
    assert time.process_time() - began < 5
    addresses = [IPv4Address((3 << 24) + i * 256 + 7) for i in range(0, 100_000, 10)]
    began = time.process_time()
    seen = [made.observe(address).prefix for address in addresses]
    assert (time.process_time() - began) / len(addresses) < 100e-6
    assert seen == every[::10]
