"""Published lists: what comes of them, and what is refused or flagged."""

from __future__ import annotations

import json
import time
from datetime import date
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_lists import DIGEST, aws, azure, google

from egressd.model.errors import PolicyError
from egressd.residency.formats import MAX_BYTES, Entry, Format, Given, Listing, as_table, guess, read
from egressd.residency.intake import Intake, changes, intake
from egressd.residency.prefixes import Prefixes, Source, Table

DATE = date(2026, 11, 21)


def regions(provider: str, region: str) -> tuple[str, ...] | None:
    return {
        ("aws", "eu-central-1"): ("DE",),
        ("aws", "eu-west-3"): ("FR",),
        ("aws", "us-east-1"): ("US",),
        ("google", "europe-west3"): ("DE",),
        ("azure", "westeurope"): ("NL",),
        ("azure", "centralfrance"): ("FR",),
        ("ovhcloud", "GRA"): ("FR",),
    }.get((provider, region))


def made(data: bytes, *, name: str = "list.json", **said: str) -> Table:
    listing = read(data, name=name, given=Given(**said))
    return as_table(listing, name=listing.provider, source=Source(name, DIGEST, len(data)), imported=DATE)


def came(data: bytes, **said: str) -> Intake:
    return intake(made(data, **said), regions)


def where(table: Table, address: str) -> tuple[str | None, str, tuple[str, ...], bool]:
    seen = Prefixes([table], regions=regions).observe(ip_address(address))
    return seen.prefix, seen.region, seen.countries, seen.anycast


def problems(data: bytes, *, name: str = "list.json", form: Format | None = None, **said: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        read(data, name=name, form=form, given=Given(**said))
    return [str(problem) for problem in caught.value.problems]


# ---- AWS


def ec2(*prefixes: str) -> bytes:
    return aws(*((prefix, "eu-central-1", "EC2") for prefix in prefixes))


SWISS = {"provider": "a", "country": "CH"}
AWS = aws(
    ("3.120.0.0/14", "eu-central-1", "AMAZON"),
    ("3.120.0.0/14", "eu-central-1", "EC2"),
    ("3.0.0.0/9", "us-east-1", "AMAZON"),
    ("13.34.9.0/24", "eu-west-3", "EC2", "eu-west-3-cmn-wlz-1"),
    ("15.197.0.0/16", "GLOBAL", "GLOBALACCELERATOR"),
    ("99.82.170.0/24", "eu-west-3", "GLOBALACCELERATOR"),
    ("52.84.0.0/15", "GLOBAL", "CLOUDFRONT"),
    ("205.251.192.0/21", "GLOBAL", "ROUTE53"),
    ("15.177.0.0/18", "GLOBAL", "ROUTE53_HEALTHCHECKS"),
    ("35.180.1.0/24", "eu-west-3", "ROUTE53_HEALTHCHECKS"),
    ("52.219.0.0/20", "eu-west-3", "S3", "GLOBAL"),
    ("18.60.0.0/24", "us-east-1", "EC2", "eu-central-1"),
    ("18.60.1.0/24", "eu-west-1", "EC2", "eu-west-12"),
    ("2a05:d014::/36", "eu-central-1", "AMAZON"),
    ("2600:9000::/28", "GLOBAL", "CLOUDFRONT"),
)


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("3.120.0.1", ("3.120.0.0/14", "eu-central-1", ("DE",), False)),
        ("3.0.0.1", ("3.0.0.0/9", "us-east-1", ("US",), False)),
        ("2a05:d014::1", ("2a05:d014::/36", "eu-central-1", ("DE",), False)),
        # a Wavelength Zone in Casablanca, of the region in Paris
        ("13.34.9.1", ("13.34.9.0/24", "eu-west-3-cmn-wlz-1", (), False)),
        # a group that is not its region's: whichever is wrong, nothing is placed there
        ("18.60.0.1", ("18.60.0.0/24", "us-east-1/eu-central-1", (), False)),
        ("18.60.1.1", ("18.60.1.0/24", "eu-west-1/eu-west-12", (), False)),
        ("15.197.0.1", ("15.197.0.0/16", "GLOBAL", (), True)),
        ("99.82.170.1", ("99.82.170.0/24", "eu-west-3", (), True)),
        ("52.84.0.1", ("52.84.0.0/15", "GLOBAL", (), True)),
        ("205.251.192.1", ("205.251.192.0/21", "GLOBAL", (), True)),
        ("15.177.0.1", ("15.177.0.0/18", "GLOBAL", (), True)),
        ("35.180.1.1", ("35.180.1.0/24", "eu-west-3", ("FR",), False)),
        ("52.219.0.1", ("52.219.0.0/20", "GLOBAL", (), True)),
        ("2600:9000::1", ("2600:9000::/28", "GLOBAL", (), True)),
    ],
)
def test_aws(address: str, seen: Any) -> None:
    assert where(made(AWS), address) == seen


def test_what_aws_says_of_the_whole() -> None:
    table = made(AWS)
    assert (table.provider, table.format, table.published) == ("aws", "aws", date(2026, 11, 20))
    assert table.serial == "1795204388"
    (both,) = (one for one in table.groups if "3.120.0.0/14" in one.prefixes)
    assert both.services == ("AMAZON", "EC2")


def test_aws_before_there_were_border_groups() -> None:
    document = json.loads(AWS)
    for entry in document["prefixes"] + document["ipv6_prefixes"]:
        del entry["network_border_group"]
    assert where(made(json.dumps(document).encode()), "3.120.0.1")[1] == "eu-central-1"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (AWS[:400], "the file ends in the middle"),
        (AWS[: AWS.index(b"eu-central-1") + 4], "the file ends in the middle"),
        (AWS.rstrip()[:-1], "the file ends in the middle"),
        (aws(), "it lists no prefix"),
        (ec2("3.120.0.1/14"), "prefixes[0].ip_prefix: '3.120.0.1/14' has bits set behind its length (is 3.1"),
        (ec2("0.0.0.0/0"), "0.0.0.0/0 is wider than /8, which says nothing"),
        (ec2("2.0.0.0/7"), "2.0.0.0/7 is wider than /8"),
        (ec2("::/0"), "::/0 is wider than /16"),
        (ec2("2a00::/15"), "2a00::/15 is wider than /16"),
        (ec2("::ffff:3.120.0.0/112"), "holds IPv4 addresses in disguise (list the IPv4 prefix itself)"),
        (ec2("fe80::%1/64"), "is not a prefix"),
        (ec2("3.120.0/14"), "'3.120.0/14' is not a prefix"),
        (ec2(""), "'' is not a prefix"),
        (aws(created="2026-02-31-00-00-00"), "createDate: '2026-02-31-00-00-00' is not a date"),
        (aws(created="Friday"), "createDate: 'Friday' is not a date"),
        (AWS.replace(b'"eu-central-1"', b"7", 1), "prefixes[0].region: it is no list of the format aws"),
        (AWS.replace(b'"createDate"', b'"createdate"', 1), "missing required field `createDate`"),
        (AWS.replace(b'"region": ', b'"region": "us-east-1", "region": ', 1), "'region' stands twice"),
        (AWS.replace(b'"eu-central-1"', b"NaN", 1), "it has NaN, which is no JSON"),
        (AWS.replace(b'"eu-central-1"', b"1" * 5000, 1), "a number that is too long"),
        (AWS.replace(b"[", b"", 1), "it is not JSON"),
        (b'{"createDate": ' + b"[" * 100_000, "it is nested too deeply"),
        (AWS.replace(b"eu-central", b"eu\xffcentral", 1), "the file is not UTF-8 text"),
        (AWS.replace(b"eu-central-1", b"eu\\u202ecentral-1"), "it is no table of prefixes"),
    ],
)  # fmt: skip
def test_wrong_lists_of_aws(data: bytes, said: str) -> None:
    if b"u202e" in data:
        with pytest.raises(PolicyError) as caught:
            made(data)
        found = [str(problem) for problem in caught.value.problems]
    else:
        found = problems(data)
    assert any(said in problem for problem in found), found
    assert all("(" in problem for problem in found), "each has a remedy"


def test_every_problem_is_told_up_to_a_bound() -> None:
    found = problems(ec2(*["3.120.0.1/14"] * 50))
    assert len(found) == 21 and any("and 30 more such problems" in one for one in found)
    found = problems(ec2(*["3.120.0.1/14"] * 5000))
    assert len(found) == 21 and any("and at least 980 more" in one for one in found)


def test_doubtful_prefixes_are_flagged_and_kept() -> None:
    found = came(
        aws(
            ("9.9.9.0/24", "eu-west-3", "EC2"),
            ("9.9.9.0/24", "us-east-1", "S3"),
            ("3.0.0.0/9", "us-east-1", "EC2"),
            ("3.120.0.0/14", "eu-central-1", "EC2"),
            ("3.121.0.0/16", "mars-north-1", "EC2"),
            ("3.122.0.0/16", "mars-north-1", "EC2"),
            ("2600:9000::/28", "GLOBAL", "CLOUDFRONT"),
        )
    )
    assert (found.four, found.six, found.anycast, found.unplaced) == (5, 1, 1, 0)
    assert found.regions == {"mars-north-1": 2, "eu-central-1": 1, "us-east-1": 1}
    assert found.countries == {"DE": 1, "US": 1}
    assert found.unknown == {"mars-north-1": 2}
    assert found.conflicting == (
        ("9.9.9.0/24", "the same list puts it in different places: eu-west-3, us-east-1"),
    )
    assert found.nesting == (
        ("3.120.0.0/14", "eu-central-1 in us-east-1"),
        ("3.121.0.0/16", "mars-north-1 in eu-central-1"),
        ("3.122.0.0/16", "mars-north-1 in eu-central-1"),
    )


# ---- Google


def test_google() -> None:
    table = made(
        google(
            ("34.89.128.0/17", "europe-west3"),
            ("34.96.0.0/20", "global"),
            ("2600:1900:40d0::/44", "europe-west3"),
        )
    )
    assert (table.provider, table.published) == ("google", date(2026, 11, 19))
    assert where(table, "34.89.128.1") == ("34.89.128.0/17", "europe-west3", ("DE",), False)
    assert where(table, "2600:1900:40d0::1") == ("2600:1900:40d0::/44", "europe-west3", ("DE",), False)
    assert where(table, "34.96.0.1") == ("34.96.0.0/20", "global", (), True)


def test_all_of_googles_prefixes_have_no_regions() -> None:
    (problem,) = problems(google(("8.8.8.0/24", None), ("34.89.128.0/17", None)))
    assert "it is goog.json, all of Google's" in problem
    assert "import cloud.json (https://www.gstatic.com/ipranges/cloud.json)" in problem


def test_a_prefix_of_google_without_a_prefix() -> None:
    data = google(("34.89.128.0/17", "europe-west3")).replace(b"ipv4Prefix", b"ipv5Prefix")
    assert problems(data, form=Format.GOOGLE) == [
        "list.json: prefixes[0]: '' is not a prefix (write it as in 192.0.2.0/24 or 2001:db8::/32)"
    ]


# ---- Azure

AZURE = azure(
    ("AzureCloud", "", ["20.50.0.0/16", "20.61.0.0/16", "40.66.0.0/16", "2603:1020::/47", "51.4.0.0/16"]),
    ("AzureCloud.westeurope", "westeurope", ["20.50.0.0/16", "2603:1020::/47"]),
    ("AzureCloud.centralfrance", "centralfrance", ["40.66.0.0/16"]),
    ("CognitiveServicesManagement", "", ["20.50.7.0/24", "20.61.7.8/32"]),
    ("Storage.WestEurope", "westeurope", ["20.50.9.0/24"]),
    ("AzureFrontDoor.Frontend", "", ["20.50.21.0/29", "13.107.208.0/24", "2620:1ec:4::/46"]),
    ("AzureTrafficManager", "", ["40.66.1.1/32"]),
)


@pytest.mark.parametrize(
    ("cloud", "edition"),
    [
        ("Public", ""),
        ("", ""),
        ("AzureGovernment", "azure-azuregovernment"),
        ("China", "azure-china"),
        ("../../x", "azure-x"),
    ],
)
def test_a_sovereign_clouds_list_takes_nobodys_place(cloud: str, edition: str) -> None:
    document = json.loads(AZURE) | {"cloud": cloud}
    assert read(json.dumps(document).encode(), name="list.json").edition == edition


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("20.50.0.1", ("20.50.0.0/16", "westeurope", ("NL",), False)),
        ("20.50.7.1", ("20.50.0.0/16", "westeurope", ("NL",), False)),  # the narrower tag says nothing
        ("20.50.9.1", ("20.50.9.0/24", "westeurope", ("NL",), False)),
        ("40.66.0.1", ("40.66.0.0/16", "centralfrance", ("FR",), False)),
        ("2603:1020::1", ("2603:1020::/47", "westeurope", ("NL",), False)),
        ("51.4.0.1", ("51.4.0.0/16", "", (), False)),
        ("20.61.7.8", ("20.61.7.8/32", "", (), False)),
        ("20.50.21.1", ("20.50.21.0/29", "", (), True)),
        ("13.107.208.1", ("13.107.208.0/24", "", (), True)),
        ("2620:1ec:4::1", ("2620:1ec:4::/46", "", (), True)),
        ("40.66.1.1", ("40.66.1.1/32", "", (), True)),
        ("40.66.1.2", ("40.66.0.0/16", "centralfrance", ("FR",), False)),
    ],
)
def test_azure(address: str, seen: Any) -> None:
    assert where(made(AZURE), address) == seen


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("ServiceTags_Public_20261116.json", date(2026, 11, 16)),
        ("ServiceTags_AzureGovernment_20261116.json", date(2026, 11, 16)),
        ("ServiceTags_Public_20261316.json", None),
        ("tags.json", None),
    ],
)
def test_azure_writes_the_date_in_the_name(name: str, published: date | None) -> None:
    table = made(AZURE, name=name)
    assert (table.provider, table.serial, table.published) == ("azure", "321", published)


def test_azure_in_another_tag_of_another_region() -> None:
    found = came(
        azure(("Sql.A", "westeurope", ["20.50.0.0/24"]), ("Sql.B", "centralfrance", ["20.50.0.0/24"]))
    )
    assert found.conflicts == 1


# ---- plain lists


def test_a_plain_list() -> None:
    data = b"""# our own data centres
5.39.0.0/17            # France, as given
5.40.0.0/16   BHS      # somewhere else
5.41.0.0/16   CH
5.42.0.1
2001:41d0::/32
"""
    table = made(data, name="own.txt", provider="ovhcloud", region="GRA")
    assert (table.provider, table.format, table.published) == ("ovhcloud", "cidr", None)
    assert where(table, "5.39.0.1") == ("5.39.0.0/17", "GRA", ("FR",), False)
    assert where(table, "5.40.0.1") == ("5.40.0.0/16", "BHS", (), False)
    assert where(table, "5.41.0.1") == ("5.41.0.0/16", "CH", ("CH",), False)
    assert where(table, "5.42.0.1") == ("5.42.0.1/32", "GRA", ("FR",), False)
    assert where(table, "5.42.0.2") == (None, "", (), False)
    assert where(table, "2001:41d0::1") == ("2001:41d0::/32", "GRA", ("FR",), False)


@pytest.mark.parametrize(
    ("region", "country", "seen"),
    [
        ("us-east-1", "DE", ()),
        ("us-east-1", "EU", ()),
        ("eu-central-1", "DE", ("DE",)),
        ("eu-central-1", "FR", ()),
        ("home", "DE", ("DE",)),  # none of AWS's: who imports it says what it is
    ],
)
def test_no_country_is_given_to_a_region_that_is_known_to_be_elsewhere(
    region: str, country: str, seen: tuple[str, ...]
) -> None:
    table = made(b"5.39.0.0/17\n", provider="aws", region=region, country=country)
    assert where(table, "5.39.0.1")[2] == seen
    found = intake(table, regions)
    assert found.conflicts == (0 if seen else 1)
    both = made(b"5.39.0.0/17 home\n5.39.0.0/17 us-east-1\n", provider="aws", country="DE")
    assert where(both, "5.39.0.1")[2] == ()


def test_a_country_of_the_importers() -> None:
    table = made(b"5.39.0.0/17 x-1\n5.40.0.0/16\n", provider="somebody", country="CH")
    assert where(table, "5.39.0.1") == ("5.39.0.0/17", "x-1", ("CH",), False)
    assert where(table, "5.40.0.1") == ("5.40.0.0/16", "CH", ("CH",), False)


@pytest.mark.parametrize(
    ("data", "given_", "said"),
    [
        (b"5.39.0.0/17\n", {}, "a plain list does not say whose it is (--provider NAME"),
        (b"5.39.0.0/17\n", {"provider": "a"}, "own.txt:1: nothing says where 5.39.0.0/17 is (a second word,"),
        (b"5.39.0.0/17\n", {"provider": "a", "country": "XX"}, "--country: 'XX' is not a jurisdiction"),
        (b"5.39.0.0/17\n", {"provider": "a", "country": "ch"}, "--country: 'ch' is not a jurisdiction"),
        (b"5.39.0.0/17\n", {"provider": "a b", "country": "CH"}, "--provider: 'a b' is not one word"),
        (b"\n5.39.0.1/17\n", SWISS, "own.txt:2: '5.39.0.1/17' has bits set behind its length (is 5"),
        (b"5.39.0.0/17 a b\n", {"provider": "a"}, "more than a prefix and a region"),
        (b"5.39.0.0/17 \x1b[2J\n", {"provider": "a"}, "own.txt:1: '\\x1b[2J' is neither a region"),
        (b"example.com\n", SWISS, "'example.com' is not a prefix"),
        (b"0.0.0.0/0\n", SWISS, "wider than /8"),
        (b"# nothing\n\n", SWISS, "it lists no prefix"),
        (b"", SWISS, "it lists no prefix"),
    ],
)  # fmt: skip
def test_wrong_plain_lists(data: bytes, given_: dict[str, str], said: str) -> None:
    found = problems(data, name="own.txt", **given_)
    assert any(said in problem for problem in found), found
    assert "\x1b" not in "".join(found)


def test_a_list_that_says_all_itself_is_told_nothing() -> None:
    assert "says itself whose it is" in problems(AWS, country="DE")[0]


# ---- which one is it?


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (AWS, Format.AWS),
        (b"\n\n" + AWS, Format.AWS),
        (google(("34.89.128.0/17", "europe-west3")), Format.GOOGLE),
        (google(("8.8.8.0/24", None)), Format.GOOGLE),
        (AZURE, Format.AZURE),
        (b"5.39.0.0/17\n", Format.CIDR),
        (b"", Format.CIDR),
    ],
)
def test_the_format_is_guessed(data: bytes, form: Format) -> None:
    assert guess(data.decode()) is form


def test_a_list_is_not_read_as_one_of_another_format() -> None:
    assert "it is no list of the format google" in problems(AWS, form=Format.GOOGLE)[0]
    assert "it is no list of the format azure" in problems(b'{"hello": 1}')[0]
    assert "is not a prefix" in problems(b'{"syncToken":\n', form=Format.CIDR, **SWISS)[0]


# ---- size


def test_more_than_a_list_may_have_is_not_even_looked_at() -> None:
    began = time.process_time()
    (problem,) = problems(b"[" * (MAX_BYTES + 1), provider="a")
    assert (
        f"it has at least {MAX_BYTES + 1} bytes; a list of prefixes may have {MAX_BYTES} (64 MiB)" in problem
    )
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" + b"{}," * (4 << 20) + b"{}]", "more than 2500000 objects"),
        (b"\n" * (4 << 20), "more than 2000000 lines"),
        (b"x\n" * (4 << 20), "and at least 980 more"),
        (b"\0" * (4 << 20), "is not a prefix"),
    ],
)
def test_junk_is_given_up_early(data: bytes, said: str) -> None:
    began = time.process_time()
    given_ = {} if data.startswith(b"[") else SWISS
    found = problems(data, **given_)
    assert any(said in problem for problem in found)
    assert all(len(problem) < 1000 for problem in found)
    assert time.process_time() - began < 5


# ---- anything at all


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=300) | st.text(max_size=300).map(str.encode),
    form=st.sampled_from([None, *Format]),
)
def test_whatever_the_bytes_a_list_or_problems(data: bytes, form: Format | None) -> None:
    try:
        said = Given() if form not in (None, Format.CIDR) else Given(provider="a", country="CH")
        assert isinstance(read(data, name="x", form=form, given=said), Listing)
    except PolicyError as error:
        assert error.problems


_KEYS = ["syncToken", "createDate", "prefixes", "ip_prefix", "region", "service", "ipv4Prefix", "scope"]
_KEYS += ["creationTime", "values", "name", "properties", "addressPrefixes", "changeNumber"]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["3.0.0.0/8", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(_KEYS),
            inner,
            max_size=5,
        )
    ),
)


@settings(max_examples=200, deadline=None)
@given(document=_JSON, form=st.sampled_from([Format.AWS, Format.GOOGLE, Format.AZURE]))
def test_whatever_the_json_a_list_or_problems(document: Any, form: Format) -> None:
    try:
        read(json.dumps(document).encode(), name="x", form=form)
    except PolicyError as error:
        assert error.problems


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, len(AWS) - 2))
def test_no_part_of_a_list_passes_for_the_whole(cut: int) -> None:
    with pytest.raises(PolicyError):
        read(AWS[:cut], name="x", form=Format.AWS)


# ---- against the table before


def test_what_is_other_than_before() -> None:
    before = aws(
        ("3.0.0.0/9", "us-east-1", "EC2"),
        ("3.120.0.0/14", "eu-central-1", "EC2"),
        ("9.9.9.0/24", "us-east-1", "S3"),
    )
    after = aws(
        ("3.0.0.0/9", "us-east-1", "S3"),
        ("3.120.0.0/14", "us-east-1", "EC2"),
        ("2a05:d014::/36", "eu-central-1", "S3"),
    )
    found = changes(made(before), made(after))
    assert (found.added, found.removed, found.moves) == (1, 1, 1)
    assert found.moved == (("3.120.0.0/14", "eu-central-1 -> us-east-1"),)
    same = changes(made(before), made(before))
    assert (same.added, same.removed, same.moves) == (0, 0, 0)


def test_umbrella_entries_are_left_out_where_the_same_prefix_is_placed() -> None:
    entries = (Entry("3.0.0.0/8", "", "All"), Entry("3.0.0.0/8", "westeurope", "One"))
    listing = Listing(Format.AZURE, "azure", None, "", entries)
    table = as_table(listing, name="azure", source=Source("x", DIGEST, 1), imported=DATE)
    assert [(one.region, one.services) for one in table.groups] == [("westeurope", ("One",))]
