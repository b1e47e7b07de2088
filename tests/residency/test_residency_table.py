"""Every endpoint of the table is placed, and judged under three pins, as the table says."""

from __future__ import annotations

import pytest
from builtin_catalogue import CATALOGUE, REGISTRY
from endpoint_table import TABLE

from egressd.residency.endpoints import Endpoint
from egressd.residency.jurisdictions import countries
from egressd.residency.places import Pin

ROWS = [line.split(" | ") for line in TABLE.splitlines() if line and not line.startswith("#")]
PINS = (Pin(("EU",)), Pin(("CH", "EEA")), Pin(("US",)))


def _countries(cell: str) -> tuple[str, ...]:
    return () if cell == "-" else tuple(sorted(countries(cell.split(", "))))


def test_the_table_is_long_and_has_no_row_twice() -> None:
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 300


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_an_endpoint(row: list[str]) -> None:
    url, scope, region, where, *codes = row
    endpoint = Endpoint.of(url)

    placement = CATALOGUE.place(endpoint)

    assert (str(placement.scope), placement.region or "-") == (scope, region)
    assert placement.countries == _countries(where)
    said = [REGISTRY.judge_endpoint(endpoint, declared=None, pin=pin).code for pin in PINS]
    assert list(map(str, said)) == (codes * 3)[:3]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_refusal_says_why(row: list[str]) -> None:
    endpoint = Endpoint.of(row[0])
    for pin in PINS:
        finding = REGISTRY.judge_endpoint(endpoint, declared=None, pin=pin)
        assert finding.text and finding.text.isprintable()
        if not finding.compliant:
            placement = CATALOGUE.place(endpoint)
            assert endpoint.name in finding.text or placement.note in finding.text
