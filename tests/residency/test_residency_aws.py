"""botocore as an independent judge: the endpoints that Amazon's client makes, in every region it knows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.endpoint_provider import EndpointProvider
from botocore.exceptions import BotoCoreError
from botocore.loaders import Loader
from builtin_catalogue import CATALOGUE

from egressd.residency.endpoints import Endpoint
from egressd.residency.places import Scope

LOADER = Loader()
PARTITIONS = LOADER.load_data("partitions")
SERVICES = sorted(one for one in LOADER.list_available_services("service-2") if "bedrock" in one)
# Where Amazon says a region is. Its spelling of a place, and the country it lies in.
PLACES = {
    "Cape Town": "ZA", "Hong Kong": "HK", "Taipei": "TW", "Tokyo": "JP", "Seoul": "KR", "Osaka": "JP",
    "Mumbai": "IN", "Hyderabad": "IN", "Singapore": "SG", "Sydney": "AU", "Jakarta": "ID",
    "Melbourne": "AU", "Malaysia": "MY", "New Zealand": "NZ", "Thailand": "TH", "Canada": "CA",
    "Frankfurt": "DE", "Zurich": "CH", "Stockholm": "SE", "Milan": "IT", "Spain": "ES", "Ireland": "IE",
    "London": "UK", "Paris": "FR", "Tel Aviv": "IL", "UAE": "AE", "Bahrain": "BH", "Saudi Arabia": "SA",
    "Mexico": "MX", "Sao Paulo": "BR", "Chile": "CL", "Virginia": "US", "Ohio": "US", "California": "US",
    "Oregon": "US", "GovCloud": "US", "Beijing": "CN", "Ningxia": "CN", "Germany": "DE", "US ISO": "US",
}  # fmt: skip


def regions() -> Iterator[tuple[str, str, str]]:
    """Partition, region, description."""
    for partition in PARTITIONS["partitions"]:
        for region, entry in partition["regions"].items():
            if not region.endswith("global"):
                yield partition["id"], region, entry["description"]


REGIONS = list(regions())


def urls(service: str, region: str) -> set[str]:
    rules = LOADER.load_service_model(service, "endpoint-rule-set-1")
    provider: Any = EndpointProvider(rules, PARTITIONS)
    found = set()
    for fips, dual in itertools.product([False, True], repeat=2):
        try:
            made = provider.resolve_endpoint(Region=region, UseFIPS=fips, UseDualStack=dual)
        except BotoCoreError:  # there is none of that kind
            continue
        found.add(made.url)
    return found


def test_botocore_knows_enough_to_judge() -> None:
    assert len(REGIONS) >= 40 and len(SERVICES) >= 4
    assert {"bedrock", "bedrock-runtime", "bedrock-agent-runtime"} <= set(SERVICES)


@pytest.mark.parametrize("partition, region, description", REGIONS, ids=[row[1] for row in REGIONS])
def test_every_region_is_known_and_where_amazon_says(partition: str, region: str, description: str) -> None:
    there = CATALOGUE.cloud_region("aws", region)
    place = next((country for spelt, country in PLACES.items() if spelt in description), None)

    assert there is not None
    assert there == ((place,) if place else ()), description
    runtime = f"bedrock-runtime.{region}." + {"aws-cn": "amazonaws.com.cn", "aws-eusc": "amazonaws.eu"}.get(
        partition, "amazonaws.com"
    )
    placement = CATALOGUE.place(Endpoint.of_host(runtime))
    if partition.startswith("aws-iso"):
        assert placement.scope is Scope.UNPLACED  # air-gapped: these names lead nowhere
    else:
        assert placement.partition == ("" if partition == "aws" else partition)


@pytest.mark.parametrize("service", [*SERVICES, "sagemaker-runtime"])
def test_every_endpoint_is_placed_in_its_region_or_not_at_all(service: str) -> None:
    placed = 0
    for partition, region, _ in REGIONS:
        made = urls(service, region)
        assert made, (service, region)
        for url in made:
            placement = CATALOGUE.place(Endpoint.of(url))
            if placement.scope is Scope.UNPLACED:
                assert not placement.countries and placement.note
                continue
            assert (placement.scope, placement.region) == (Scope.REGION, region), url
            assert placement.partition == ("" if partition == "aws" else partition)
            assert placement.provider == ("aws-sagemaker" if "sagemaker" in service else "aws-bedrock")
            placed += 1
    assert placed >= len(REGIONS) or service not in ("bedrock-runtime", "sagemaker-runtime")


@pytest.mark.parametrize("partition, region, _", REGIONS, ids=[row[1] for row in REGIONS])
def test_the_ordinary_endpoint_of_a_public_partition_is_placed(partition: str, region: str, _: str) -> None:
    rules = LOADER.load_service_model("bedrock-runtime", "endpoint-rule-set-1")
    provider: Any = EndpointProvider(rules, PARTITIONS)
    url = provider.resolve_endpoint(Region=region, UseFIPS=False, UseDualStack=False).url

    placement = CATALOGUE.place(Endpoint.of(url))

    if partition.startswith("aws-iso"):
        assert placement.scope is Scope.UNPLACED
    else:
        assert placement.region == region
        assert CATALOGUE.host_of("aws-bedrock", region) == urlsplit(url).hostname


def test_pseudo_regions_are_not_placed() -> None:
    for region in ("aws-global", "aws-cn-global", "aws-us-gov-global"):
        for url in urls("bedrock-runtime", region):
            assert CATALOGUE.place(Endpoint.of(url)).scope is Scope.UNPLACED
